"""ContinualStudy: all stages of a plan, each a cell of an experiment, resumable at any point."""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import FNSFTError
from ..experiments.arms import Arm, versions
from ..experiments.cells import Cells
from ..experiments.runner import ARMS, CELLS_FILE, run_experiment
from ..training.elastic import EWC_DIR
from ..writing import one_writer
from .finishing import StageWork, finish_stage
from .plan import Plan, Stage
from .stages import GROWN_DIR, MERGED_DIR
from .tasks import Task


BASE = "base"  # the arm of the model before training
BASE_FILE = "base.jsonl"

_LOCK = ".continual.lock"
_WEIGHTS = ("model*.safetensors", "model*.safetensors.index.json")


@dataclass(frozen=True)
class ContinualStudy:
    """What a continual run does.

    Attributes:
        plan ([`Plan`]): tasks, orders and arms.
        tasks (`Sequence[Task]`): with their rows.
        make_arm (`Callable[[str, Stage], Arm]`): makes what trains a stage of an arm.
        works (`Mapping[str, StageWork]`): name of an arm -> what its stages need when they are trained.
        score_base (`Callable[[], dict]`): scores the model before training on all tasks.
        settings (`dict`): what these scores depend on, as JSON values.
        sources (`dict[str, str]`): hash of every local file that they depend on, by its path.
    """

    plan: Plan
    tasks: Sequence[Task]
    make_arm: Callable[[str, Stage], Arm]
    works: Mapping[str, StageWork]
    score_base: Callable[[], dict[str, Any]]
    settings: dict[str, Any]
    sources: dict[str, str]

    def run(
        self,
        seeds: Sequence[int],
        directory: str | os.PathLike,
        *,
        jobs: int = 1,
        restart: bool = False,
        keep_models: bool = False,
        say: Callable[[str], None] = lambda text: None,
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Train and score all stages; what is finished already is not done again.

        Stages run in waves: the first ones of all arms, orders and seeds, then the second ones, and so on. Orders that
        begin with the same tasks share these stages.

        Args:
            seeds: of the sequences; a stage with a new adapter draws its own from that ([`stage_seed`]).
            directory: where all goes; an older run in it goes on.
            jobs, restart: as in [`run_experiment`].
            keep_models: whether whole models of stages that others have gone on from are kept.
            say: is told what is done.

        Returns:
            The cell of the model before training, and those of all stages.

        Raises:
            FNSFTError: as [`run_experiment`], after the wave in which some cells failed.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        try:
            with one_writer(directory / _LOCK, waits=False):
                base = self._base(directory, restart=restart, say=say)
                return base, self._waves(seeds, directory, jobs=jobs, restart=restart, keep=keep_models, say=say)
        except TimeoutError as error:
            raise FNSFTError(
                f"another process runs stages in {directory}; wait for it, or choose another output directory"
            ) from error

    def _base(self, directory: Path, *, restart: bool, say) -> dict[str, Any]:
        cells = Cells(directory / BASE_FILE)
        arm = Arm(BASE, BASE, None, self.settings, self.sources)
        changed = cells.changed([arm])
        if changed and not restart:
            raise FNSFTError(
                f"{cells.path} holds scores of the model before training, and since then something has changed: "
                f"{next(iter(changed.values()))}; put it back, choose another output directory, or do anew what has "
                "changed (restart)"
            )
        cells.drop(list(changed))
        if not cells.found:
            say("scores the model before training")
            told = {"settings": self.settings, "sources": self.sources, "versions": versions()}
            cells.add({"task": BASE, "arm": BASE, "seed": 0, "tasks": self.score_base(), **told})
        return cells.found[BASE, 0]

    def _waves(self, seeds, directory: Path, *, jobs: int, restart: bool, keep: bool, say) -> list[dict[str, Any]]:
        waves = self.plan.waves()
        arms = [[self.make_arm(*each) for each in wave] for wave in waves]
        self._train_again(waves, seeds, directory, arms=arms, restart=restart, say=say)
        found = []
        for number, (wave, of_wave) in enumerate(zip(waves, arms, strict=True), 1):
            say(f"stage {number} of {len(waves)}: {len(wave) * len(seeds)} cells")
            works = {stage_name(arm, stage): self._work(arm, stage) for arm, stage in wave}
            also = partial(finish_stage, self.tasks, works)
            found += run_experiment(of_wave, seeds, directory, jobs=jobs, restart=restart, also=also, say=say)
            for arm, stage in waves[number - 2] if number > 1 and not keep else ():
                if self.plan.goes_on(arm, stage) or self._is_single(stage):
                    for seed in seeds:
                        _forget(folder_of(directory, arm, stage, seed))
        return found

    def _is_single(self, stage: Stage) -> bool:
        """Whether a stage trains a task alone, and ends no order."""
        is_last = any(
            stage in self.plan.stages(arm, order)[-1:] for arm in self.plan.ways for order in self.plan.orders
        )
        return stage.before is None and not is_last

    def _work(self, arm: str, stage: Stage) -> StageWork:
        """What a stage needs; nothing but scores where none goes on from it."""
        return self.works[arm] if self.plan.goes_on(arm, stage) else StageWork()

    def _train_again(self, waves, seeds, directory: Path, *, arms, restart: bool, say) -> None:
        """Forget finished stages whose model is gone and that one which waits goes on from."""
        cells = Cells(directory / CELLS_FILE)
        changed = set(cells.changed([arm for wave in arms for arm in wave])) if restart else set()
        for wave in reversed(waves):
            for arm, stage in wave:
                for seed in seeds:
                    key = stage_name(arm, stage), seed
                    if stage.before is None or (key in cells.found and key not in changed):
                        continue
                    before, folder = stage_name(arm, stage.before), folder_of(directory, arm, stage.before, seed)
                    if (before, seed) in cells.found and not self._is_whole(folder, arm):
                        say(f"trains {before}, seed {seed}, again, since its model is gone")
                        cells.drop([(before, seed)])

    def _is_whole(self, folder: Path, arm: str) -> bool:
        """Whether what the next stage goes on from is there."""
        if self.works[arm].grows and not (folder / GROWN_DIR).is_dir():
            return False
        names = [_WEIGHTS[0], "adapter_model.safetensors"]
        if self.works[arm].merges:
            names = [f"{MERGED_DIR}/{_WEIGHTS[0]}"]
        return any(any(folder.glob(name)) for name in names)


def stage_name(arm: str, stage: Stage) -> str:
    """The name of a stage of an arm, as an arm of the experiment."""
    return f"{arm}/{stage.name}"


def folder_of(directory: Path, arm: str, stage: Stage, seed: int) -> Path:
    """Where a stage has its model."""
    return directory / ARMS / stage_name(arm, stage) / f"seed-{seed}"


def _forget(folder: Path) -> None:
    """Remove the whole model of a stage that others have gone on from; adapters and networks stay."""
    weights = [path for pattern in _WEIGHTS for path in folder.glob(pattern)]
    for path in weights:
        path.unlink()
    # What EWC keeps of all weights is as large as they are, and is of no use without them.
    for name in (MERGED_DIR, *([EWC_DIR] if weights else [])):
        shutil.rmtree(folder / name, ignore_errors=True)
