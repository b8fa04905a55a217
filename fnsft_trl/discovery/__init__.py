"""Discovery: texts -> activations -> a sketch of constant size -> independent components -> a template."""

from .discovery import discover_group, discover_networks


__all__ = ["discover_group", "discover_networks"]
