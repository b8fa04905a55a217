"""Saving a template from the command line: in this project's form and, where it has room, in the original's."""

import os
from pathlib import Path

from ..template.legacy import LEGACY_FILE
from ..template.template import FunctionalNetworkTemplate


def save_template(template: FunctionalNetworkTemplate, directory: str | os.PathLike) -> None:
    """Save a template, and beside it the original project's JSON of the same networks, and say where."""
    directory = Path(directory).expanduser()
    template.save_pretrained(directory, with_lists=True)
    print(f"Template saved to: {directory}")
    if (directory / LEGACY_FILE).is_file():  # the original's form has no room for some
        print(f"The same networks in the original project's form: {directory / LEGACY_FILE}")
