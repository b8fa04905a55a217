"""Discovery: texts -> activations -> a sketch of constant size -> independent components -> a template."""

from .discovery import discover_group, discover_networks
from .progress import clear_progress


__all__ = ["clear_progress", "discover_group", "discover_networks"]
