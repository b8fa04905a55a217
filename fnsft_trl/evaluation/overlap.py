"""Rows that two sets of texts share, found by the hash of what is written in them."""

import hashlib
from collections.abc import Iterable, Mapping
from itertools import islice
from textwrap import shorten
from typing import Any


_TEXTS = ("text", "prompt", "completion", "messages", "content")


def written(text: Any) -> list[str]:
    """The pieces of text in a string, a message, a conversation or a row of a dataset, without what is empty."""
    if isinstance(text, str):
        return [text] if text.strip() else []
    if isinstance(text, Mapping):
        named = [text[name] for name in _TEXTS if text.get(name) is not None]
        return [piece for part in (named or text.values()) for piece in written(part)]
    if isinstance(text, (list, tuple)):
        return [piece for part in text for piece in written(part)]
    return []


class SharedRows:
    """Which texts stand in another set of texts too: as a whole row, or as one part of it (a prompt, a turn).

    Letter case and white space do not count.

    Args:
        series: name -> its texts.
    """

    def __init__(self, series: Mapping[str, Iterable]) -> None:
        self._known: dict[bytes, list[tuple[str, int]]] = {}  # hash -> the rows that have it
        self._texts = {name: list(texts) for name, texts in series.items()}
        for name, texts in self._texts.items():
            for number, text in enumerate(texts):
                if pieces := written(text):
                    self._known.setdefault(_hash(" ".join(pieces)), []).append((name, number))

    def among(self, rows: Iterable, *, most: int | None = None) -> dict[str, list[str]]:
        """The texts that stand among rows.

        Args:
            rows: of the other set.
            most: read at most so many of them.

        Returns:
            Name of a series -> the beginning of each of its texts that is there; series that share none are left out.
        """
        shared: set[tuple[str, int]] = set()
        for row in islice(rows, most):
            pieces = written(row)
            for piece in {" ".join(pieces), *pieces}:
                shared |= set(self._known.get(_hash(piece), ()))
        found: dict[str, list[str]] = {}
        for name, number in sorted(shared):
            text = " ".join(written(self._texts[name][number]))
            found.setdefault(name, []).append(shorten(text, 80, placeholder=" ..."))
        return found


def _hash(text: str) -> bytes:
    return hashlib.blake2b(" ".join(text.casefold().split()).encode(), digest_size=16).digest()
