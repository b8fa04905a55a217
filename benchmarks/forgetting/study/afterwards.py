"""Cells that were added when the verdict was known. They decide nothing: they say what the verdict leaves open.

With fresh seeds the rival's rate, which had just reached the target in the tuning, did not reach it on the second
shift. So the same rival is trained at the rate with which it learnt most in the tuning.
"""

from __future__ import annotations

from .arms import Setting
from .comparing import Comparison, Run, compare, paired, runs
from .paths import PATHS, Found, Levels, Path, at_target, of_arm
from .plan import SEEDS, SHARE, TUNING_SEED
from .stages import CHOOSE, WANTED, confirmation, rival, tuned_shifts


AFTERWARDS = "afterwards"  # the stage, and the part of its cells; their texts are those of the confirmation
PROTECTED = "subspace"


def afterwards(found: Found) -> list[Setting]:
    """What the verdict leaves open, once it is there."""
    wanted = confirmation(found)
    if not wanted or any(each.key not in found for each in wanted):
        return []
    return [
        Setting(task, rival(found, task), learning_rate(found, task), seed, AFTERWARDS, AFTERWARDS)
        for task in left_open(found)
        for seed in SEEDS
    ]


def left_open(found: Found) -> list[str]:
    """Shifts on which the rival misses the target with some seed."""
    tasks = tuned_shifts(found)
    return [task for task in tasks if paired(found, PROTECTED, {task: rival(found, task)}, SHARE).missed[1]]


def learning_rate(found: Found, task: str) -> float:
    """The rate with which the rival of a shift learnt most in the tuning."""
    cells = of_arm(found, task, rival(found, task), part=CHOOSE, seed=TUNING_SEED)
    return min(cells, key=lambda cell: cell["points"][-1]["learning"])["learning_rate"]


def beside_other_rate(found: Found) -> Comparison | None:
    """Protection beside the rival of both shifts, at that rate where it was trained at it; `None` where none was."""
    if not any(key[0] == AFTERWARDS for key in found):
        return None
    tasks, pairs = tuned_shifts(found), []
    for task in tasks:
        others = {run.seed: run for run in rivals(found, task)}
        first = runs(found, task, PROTECTED, SHARE)
        pairs += [(run, others[run.seed]) for run in first if run.seed in others]
    return compare(PROTECTED, {task: rival(found, task) for task in tasks}, pairs)


def rivals(found: Found, task: str) -> list[Run]:
    """The rival of a shift, at its other rate where it has one, on the path that forgot less in the tuning."""
    arm, loss = rival(found, task), Levels.of(found, task).target(SHARE)
    cells = of_arm(found, task, arm, part=AFTERWARDS)
    if not cells:
        return runs(found, task, arm, SHARE)
    rate = learning_rate(found, task)
    tuned = of_arm(found, task, arm, part=CHOOSE, seed=TUNING_SEED)
    (chosen,) = (cell for cell in tuned if cell["learning_rate"] == rate)
    which = min(PATHS, key=lambda path: at_target(chosen, path, loss).log_mean)
    return [Run(task, cell["seed"], Path.of(cell, which), loss) for cell in cells]


EVERY = WANTED | {AFTERWARDS: afterwards}
