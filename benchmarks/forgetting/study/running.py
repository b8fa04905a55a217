"""Study: its cells, one after the other, each a line of a file when it is finished."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from fnsft_trl.data.embedded import embedded_model
from fnsft_trl.evaluation.demonstrations import with_demonstrations
from fnsft_trl.evaluation.metrics import score_rows
from fnsft_trl.evaluation.rows import RowReader
from fnsft_trl.experiments.arms import train_and_score, versions
from fnsft_trl.experiments.cells import Cells
from fnsft_trl.writing import one_writer

from .arms import KEY, Place, Setting, make_arm
from .bases import Bases
from .capability import capability
from .chat import make_chat
from .learnt import interpolated
from .pausing import Pause
from .plan import BY_STEPS, CHOOSING, CONFIRMING, DEMONSTRATIONS, DISSOCIATION, SCALES, SCREENING
from .screening import screened
from .shifts import shift
from .texts import CHAT, scored_texts


TEXTS = {"choose": CHOOSING, "screen": SCREENING, "confirm": CONFIRMING, "dissociation": DISSOCIATION}
TEXTS["afterwards"] = CONFIRMING
BASE = "base"  # the arm of a cell that trains nothing
SCREEN = "screen"  # that of a cell whose change is projected afterwards

_SECONDS = 2.0  # between two looks, while other processes are at work on all cells that are missing


@dataclass
class Study:
    """
    What runs the cells of a plan.

    Attributes:
        file (`Path`): of the cells.
        work (`Path`): a directory for what a cell needs meanwhile.
        pause ([`Pause`]): waited for.
        say (`Callable`): is told what is done.
        model (`str` or `None`): directory of the model; the embedded one by default.
        device (`str`): where its cells are trained and scored.
        place (`Callable`): gives what the cells of a part share; of the plan by default.
    """

    file: Path
    work: Path
    pause: Pause
    say: Callable[[str], None]
    model: str | None = None
    device: str = "cpu"
    place: Callable[[str], Place] | None = None
    _places: dict[str, Place] = field(default_factory=dict)

    def cells(self) -> dict[tuple, dict[str, Any]]:
        """All that are finished, by their key."""
        return Cells(self.file, by=KEY).found

    def run(self, wanted: Callable[[dict[tuple, dict[str, Any]]], Sequence[Setting]]) -> None:
        """Finish the cells that are wanted, until none is missing. Several processes may do so at once.

        Args:
            wanted: is given the cells that are finished, and says which there should be: what is trained next may
                depend on them.

        Raises:
            FNSFTError: one cannot be trained.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        while missing := self._missing(wanted):
            if not any(self._finish(setting, len(missing)) for setting in missing):
                time.sleep(_SECONDS)  # others are at work on all of them

    def _missing(self, wanted) -> list[Setting]:
        found = self.cells()
        return [each for each in wanted(found) if each.key not in found]

    def _finish(self, setting: Setting, missing: int) -> bool:
        """Train and keep one cell; `False` where another process is at work on it."""
        with ExitStack() as held:
            try:
                held.enter_context(one_writer(self._lock(_name(setting)), waits=False))
            except TimeoutError:
                return False
            if setting.key in self.cells():
                return True  # the other process has finished it since
            self.pause.wait()
            self.say(f"{missing} to go; begins: {setting.title}")
            cell = self.cell(setting)
            with one_writer(self._lock("file")):
                Cells(self.file, by=KEY).add(cell)
        return True

    def _lock(self, name: str) -> Path:
        return self.file.with_name(f".{self.file.name}.{name}.lock")

    def cell(self, setting: Setting) -> dict[str, Any]:
        """Train and score one cell."""
        place = self._place(setting.part)
        head = {"stage": setting.stage, "part": setting.part, "code": code()}
        if setting.arm == BASE:
            return head | _base(setting, place)
        directory = self.work / f"cell-{_name(setting)}"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        try:
            also = partial(_also, setting, place)
            return head | train_and_score(make_arm(setting, place), setting.seed, directory, also=also)
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def _place(self, part: str) -> Place:
        if part not in self._places:
            self._places[part] = self.place(part) if self.place else self._planned(part)
        return self._places[part]

    def _planned(self, part: str) -> Place:
        model = self.model or str(embedded_model())
        if "chat" in TEXTS[part].tokens and not CHAT.exists():
            make_chat(model, CHAT, tokens=2 * TEXTS[part].tokens["chat"])
        texts = scored_texts(TEXTS[part], AutoTokenizer.from_pretrained(model))
        bases = Bases(model, self.work / "bases", self.device)
        return Place(model, texts, (self.pause,), bases, device=self.device)


def _name(setting: Setting) -> str:
    """Of a cell, in names of files."""
    return hashlib.sha256(repr(setting.key).encode()).hexdigest()[:12]


@cache
def code() -> str | None:
    """The commit that the cells are run from; `None` outside of a repository."""
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _also(setting: Setting, place: Place, trainer, directory: Path) -> dict[str, Any]:
    """What is measured of a trained model beside its points."""
    if setting.arm == SCREEN:
        return {"screen": screened(trainer, place.bases)}
    found: dict[str, Any] = {}
    if setting.path != BY_STEPS:
        found["interpolated"] = interpolated(trainer, SCALES)
    if TEXTS[setting.part] is CONFIRMING:
        found["capability"] = capability(trainer)
    return found


def _base(setting: Setting, place: Place) -> dict[str, Any]:
    """A cell of the base: its loss on a task alone, and after demonstrations."""
    tokenizer = AutoTokenizer.from_pretrained(place.model)
    model = AutoModelForCausalLM.from_pretrained(place.model, dtype="float32").to(place.device)
    reader = RowReader(tokenizer)
    train, test = ([reader.read(row, number) for number, row in enumerate(rows)] for rows in shift(setting.task))
    shown = with_demonstrations(test, train, count=DEMONSTRATIONS, seed=setting.seed)
    alone, after = ([score.answer_nll for score in score_rows(model, rows)] for rows in (test, shown))
    nll = sum(alone) / len(alone)
    return {
        "task": setting.task,
        "arm": setting.arm,
        "learning_rate": setting.learning_rate,
        "seed": setting.seed,
        "points": [{"step": 0, "learning": nll, "nll": nll, "retention": {}, "kl_sums": {}}],
        "demonstrated": sum(after) / len(after),
        "demonstrations": DEMONSTRATIONS,
        "rows": {"nll": alone, "demonstrated": after},
        "device": place.device,
        "versions": versions(),
    }
