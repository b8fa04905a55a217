"""Selection: networks, and the controls they must be compared with, as NeuronMasks."""

from ..lazy import lazy_names


__getattr__, __dir__, __all__ = lazy_names(
    __name__, {"SELECTORS": "select", "SelectorEvidence": "evidence", "select_neurons": "select"}
)
