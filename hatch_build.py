"""The README as the package index shows it, where nothing lies beside it that a link could lead to."""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface


_PICTURE = re.compile(r"^!\[[^]]*\]\((?!https?:)[^)]*\)\n+", flags=re.MULTILINE)
_LINK = re.compile(r"\[([^]]+)\]\((?!https?:)([^)#]+)[^)]*\)")


class ReadmeHook(MetadataHookInterface):
    """Sets `readme`, which `pyproject.toml` names as dynamic."""

    PLUGIN_NAME = "custom"

    def update(self, metadata: dict) -> None:
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": without_relative_links(text)}


def without_relative_links(text: str) -> str:
    """Markdown in which a link to a file of this repository is the file's name, and pictures of it are left out."""
    return _LINK.sub(lambda link: _named(*link.groups()), _PICTURE.sub("", text))


def _named(text: str, path: str) -> str:
    return f"`{path}`" if text in path else f"{text} (`{path}`)"
