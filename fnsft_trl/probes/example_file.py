"""Examples: the texts in which each network is most active, as a file beside a template. No torch."""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import FNSFTError
from ..json_text import WRONG_VALUES, from_json
from ..writing import disk_errors, write_text_whole


EXAMPLES_FILE = "examples.json"
FORMAT = "fnsft_trl.examples"

_MOST = 10_000  # examples of a network, tokens of an example
_LARGEST = 2**26  # bytes


@dataclass(frozen=True)
class Example:
    """A passage.

    Attributes:
        tokens (`tuple[str, ...]`): its tokens as text.
        activity (`tuple[float, ...]`): of the network at each of them, in standard deviations.
        source (`str`): name of the dataset.
    """

    tokens: tuple[str, ...]
    activity: tuple[float, ...]
    source: str

    @property
    def peak(self) -> float:
        """The largest absolute activity."""
        return max(map(abs, self.activity))


@dataclass(frozen=True)
class Examples:
    """The examples of all networks of a template.

    Attributes:
        networks (`tuple[tuple[Example, ...], ...]`): of each network, the most active first.
        tokens (`int`): how many were read to find them.
        tensors_sha256 (`str` or `None`): which template they are of.
    """

    networks: tuple[tuple[Example, ...], ...]
    tokens: int
    tensors_sha256: str | None

    def save(self, directory: str | os.PathLike) -> Path:
        """Write `examples.json`.

        Raises:
            FNSFTError: the disk does not take it.
        """
        path = Path(directory) / EXAMPLES_FILE
        content = {"format": FORMAT, "tokens": self.tokens, "tensors_sha256": self.tensors_sha256}
        content["networks"] = [[asdict(example) for example in of_network] for of_network in self.networks]
        with disk_errors(directory):
            write_text_whole(path, json.dumps(content, ensure_ascii=False) + "\n")
        return path

    @classmethod
    def read(cls, directory: str | os.PathLike, *, tensors_sha256: str | None, networks: int) -> "Examples | None":
        """The examples that lie in a directory; `None` where there are none.

        Args:
            directory: of a template, or of a probe.
            tensors_sha256, networks: of the template that they must be of.

        Raises:
            FNSFTError: the file is damaged, or of another template.
        """
        path = Path(directory) / EXAMPLES_FILE
        if not path.is_file():
            return None
        try:
            if path.stat().st_size > _LARGEST:
                raise ValueError("it is too large")
            found = from_json(path.read_text(encoding="utf-8"))
            if found["format"] != FORMAT:
                raise ValueError(f"its format is {found['format']!r}")
            parts = tuple(tuple(map(_example, of_network)) for of_network in found["networks"])
            result = cls(parts, int(found["tokens"]), found["tensors_sha256"])
        except (OSError, *WRONG_VALUES) as error:
            raise FNSFTError(f"{path} holds no examples ({error}); find them again, or delete it") from error
        if len(parts) != networks or tensors_sha256 not in (None, result.tensors_sha256):
            raise FNSFTError(f"{path} is of another template; find the examples again, or delete it")
        return result


def _example(value: dict[str, Any]) -> Example:
    tokens, activity = tuple(value["tokens"]), tuple(map(float, value["activity"]))
    valid = 0 < len(tokens) <= _MOST and len(tokens) == len(activity) and all(map(math.isfinite, activity))
    if not valid or not all(isinstance(token, str) for token in tokens) or not isinstance(value["source"], str):
        raise ValueError("an example lacks tokens, or their activity")
    return Example(tokens, activity, value["source"])
