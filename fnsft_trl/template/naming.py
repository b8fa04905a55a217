"""Names that a person gives to the networks of a template on disk. No torch."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..errors import FNSFTError
from ..hub.names import is_text
from ..ranges import format_ranges
from ..writing import disk_errors
from .card import template_card
from .figure import networks_svg
from .storage import CARD_FILE, CONFIG_FILE, FIGURE_FILE, TENSOR_FILE, places, read_description, write_files


def name_networks(directory: str | os.PathLike, names: Mapping[int, str]) -> None:
    """Write names of networks into a template: into its `config.json` and its card. The tensors stay as they are.

    Args:
        directory: of the template.
        names: number of a network -> its name; an empty one takes the name away.

    Raises:
        FNSFTError: there is no template, no such network, a name that is no line of text, or no right to write.
    """
    path = Path(directory).expanduser()
    found = read_description(path)
    count = len(found.components)
    if unknown := [number for number in names if not 0 <= number < count]:
        lacking, there = format_ranges(sorted(unknown)), format_ranges(range(count))
        raise FNSFTError(f"{directory} has no network {lacking}; its networks are {there}")
    if wrong := [name for name in names.values() if name and not is_text(name)]:
        raise FNSFTError(f"the name {wrong[0]!r} is no line of printable text, or too long; give another one")
    components = tuple(
        replace(component, name=names[number] or None) if number in names else component
        for number, component in enumerate(found.components)
    )
    named = replace(found, components=components)
    source = next(place for place in places(path, TENSOR_FILE) if place.is_file())
    with disk_errors(path):
        write_files(
            path,
            {
                TENSOR_FILE: source.read_bytes(),
                CARD_FILE: template_card(named).encode(),
                FIGURE_FILE: networks_svg(named).encode(),
                CONFIG_FILE: named.to_bytes(),
            },
        )
