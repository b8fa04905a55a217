"""Saving a template from the command line: in this project's form and, where it has room, in the original's."""

import os
from pathlib import Path

from ..template.legacy import LEGACY_FILE, legacy_bytes
from ..template.template import FunctionalNetworkTemplate


def save_template(template: FunctionalNetworkTemplate, directory: str | os.PathLike) -> None:
    """Save a template, and beside it the original project's JSON of the same networks, and say where."""
    directory = Path(directory).expanduser()
    template.save_pretrained(directory)
    print(f"Template saved to: {directory}")
    if len(set(template.widths.values())) == 1:  # the original's form has no room for more
        (directory / LEGACY_FILE).write_bytes(legacy_bytes(template.listed(), template.widths, template.site))
        print(f"The same networks in the original project's form: {directory / LEGACY_FILE}")
