"""Records: what the passes of a probe have given, as JSON lines, whole on disk at any moment."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FNSFTError
from ..json_text import WRONG_VALUES, from_json
from ..writing import disk_errors, remove_leftovers, write_text_whole


INTACT = "intact"  # the key of the model without an intervention

_EVERY = 20.0  # seconds after which what was found is brought to the disk
_MEASURES = ("nll", "kl", "exact")


class Records:
    """What is known of each condition on each batch.

    Every process writes a file of its own, `passes-<number>.jsonl`, and reads those of all, so that a probe goes on
    with another number of processes too. Its first line says what the probe is of.

    Args:
        directory: where the files are; made where it does not exist.
        about: what the records depend on, as JSON values.
        index: number of this process.

    Raises:
        FNSFTError: the directory holds the passes of another probe.
    """

    def __init__(self, directory: Path, about: dict[str, Any], *, index: int = 0) -> None:
        self.directory, self.about = directory, json.loads(json.dumps(about))
        self._path = directory / f"passes-{index}.jsonl"
        self._own: list[dict[str, Any]] = []
        self._scores: dict[tuple[str, int, str], dict[str, Any]] = {}
        self._texts: dict[tuple[str, str], list[str]] = {}
        self._timings: list[tuple[float, float]] = []
        self._written = time.monotonic()
        self.read()

    def read(self) -> None:
        """Read what all processes have written."""
        remove_leftovers(self._path)
        self._timings.clear()
        for path in sorted(self.directory.glob("passes-*.jsonl")):
            try:
                first, *lines = map(from_json, path.read_text(encoding="utf-8").splitlines())
                self._check(path, first["about"])
                for line in lines:
                    self._take(line)
            except FNSFTError:
                raise
            except (OSError, *WRONG_VALUES) as error:
                raise FNSFTError(
                    f"{path} holds no passes of a probe ({error}); delete it, or name another output_dir"
                ) from error
            if path == self._path:
                self._own = lines

    def _check(self, path: Path, about: dict[str, Any]) -> None:
        other = [name for name in {**about, **self.about} if about.get(name) != self.about.get(name)]
        if other:
            raise FNSFTError(
                f"{path} holds the passes of another probe: {other[0]} was {_short(about.get(other[0]))} and is now "
                f"{_short(self.about.get(other[0]))}; name another output_dir, or delete that file"
            )

    def _take(self, line: dict[str, Any]) -> None:
        if "texts" in line:
            self._texts[line["data"], line["key"]] = list(map(str, line["texts"]))
        elif "whole" in line:
            self._timings.append((float(line["seconds"]), float(line["whole"])))
        else:
            measured = [np.asarray(line[name], float) for name in _MEASURES]
            if any(each.ndim != 1 or len(each) != len(measured[0]) for each in measured):
                raise ValueError("a pass has not one value of each measure for each item")
            if not np.isfinite(measured).all():
                raise ValueError("a pass gave NaN or an infinite value")
            costs = {name: float(line[name]) for name in ("seconds", "share")}
            self._scores[line["data"], line["batch"], line["key"]] = line | costs

    def _add(self, line: dict[str, Any]) -> None:
        self._own.append(line)
        self._take(line)
        if time.monotonic() - self._written > _EVERY:
            self.flush()

    def flush(self) -> None:
        """Bring what was found to the disk."""
        with disk_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            lines = [{"about": self.about}, *self._own]
            write_text_whole(self._path, "".join(json.dumps(line) + "\n" for line in lines))
        self._written = time.monotonic()

    def missing(self, data: str, batch: int, keys: Sequence[str]) -> list[str]:
        """Those of some conditions that are not known yet."""
        return [key for key in keys if (data, batch, key) not in self._scores]

    def add(self, data: str, batch: int, key: str, scores: dict[str, list], *, seconds: float, share: float) -> None:
        """Note what a pass gave.

        Args:
            data, batch, key: of what.
            scores: measure -> one value for each item.
            seconds: that it took.
            share: of the layers, that it computed.
        """
        rounded = {name: [float(f"{value:.8g}") for value in values] for name, values in scores.items()}
        line = {"data": data, "batch": batch, "key": key, **rounded}
        self._add({**line, "seconds": round(seconds, 4), "share": round(share, 4)})

    def add_texts(self, data: str, key: str, texts: list[str]) -> None:
        """Note how prompts were continued."""
        self._add({"data": data, "key": key, "texts": texts})

    def add_timing(self, seconds: float, share: float) -> None:
        """Note how long a pass took that was run to be compared with another one."""
        self._add({"seconds": round(seconds, 4), "whole": round(share, 4)})

    def has_texts(self, data: str, key: str) -> bool:
        """Whether it is known how a condition continues the prompts."""
        return (data, key) in self._texts

    def texts(self, data: str, key: str) -> list[str] | None:
        """How it does, if it is known."""
        return self._texts.get((data, key))

    def scores(self, data: str, batches: int, key: str) -> dict[str, np.ndarray]:
        """What is known of a condition: measure -> one value for each item, in the order of the batches."""
        found = [self._scores[data, batch, key] for batch in range(batches)]
        return {name: np.concatenate([np.asarray(line[name], float) for line in found]) for name in _MEASURES}

    def cost(self) -> dict[str, float]:
        """What the passes took.

        Returns:
            `passes`, `seconds` in all, `layers`: the share of all layers that they computed; and, of the passes that
            were run both ways, the mean `seconds_whole` and `seconds_begun` and their ratio `saving`.
        """
        lines = [line for (_, _, key), line in self._scores.items() if key != INTACT]
        found = {"passes": len(lines), "seconds": sum(line["seconds"] for line in lines)}
        found["layers"] = float(np.mean([line["share"] for line in lines])) if lines else 1.0
        whole = [seconds for seconds, share in self._timings if share == 1]
        begun = [seconds for seconds, share in self._timings if share < 1]
        if whole and begun:
            found |= {"seconds_whole": float(np.mean(whole)), "seconds_begun": float(np.mean(begun))}
            found["saving"] = found["seconds_whole"] / found["seconds_begun"]
        return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
