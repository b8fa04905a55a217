"""The networks of a model: their description, and their files on disk and on the Hub. Free of torch."""

from ..lazy import lazy_names


__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "FunctionalNetworkTemplate": "template",
        "Component": "description",
    },
)
