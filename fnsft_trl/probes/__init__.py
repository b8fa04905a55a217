"""Probes: which networks matter, beside controls; the texts in which they are active; the page that shows them."""

from ..lazy import lazy_names


__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "ProbeConfig": "config",
        "ProbeData": "data",
        "Condition": "condition",
        "Probe": "probe",
        "probe_networks": "probe",
    },
)
