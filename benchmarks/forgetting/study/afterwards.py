"""Cells that were added when the verdict was known. They decide nothing: they say what the verdict leaves open.

With fresh seeds the rival's rate, which had just reached the target in the tuning, did not reach it on the second
shift, and no arm did on the third. So the same rival is trained at the rate with which it learnt most in the tuning,
and on the third shift it and protection are trained at their rates of the second.
"""

from __future__ import annotations

from .arms import Setting
from .comparing import Comparison, Run, compare, paired, runs
from .paths import PATHS, Found, Levels, Path, at_target, of_arm
from .plan import SEEDS, SHARE, TUNING_SEED
from .stages import CHOOSE, WANTED, best_of, confirmation, kept_shifts, rival, third, tuned_shifts


AFTERWARDS = "afterwards"  # the stage, and the part of its cells; their texts are those of the confirmation
PROTECTED = "subspace"


def afterwards(found: Found) -> list[Setting]:
    """What the verdict leaves open, once it is there."""
    wanted = [*confirmation(found), *third(found)]
    if not wanted or any(each.key not in found for each in wanted):
        return []
    settings = [
        Setting(task, rival(found, task), learning_rate(found, task), seed, AFTERWARDS, AFTERWARDS)
        for task in _open(found)
        for seed in SEEDS
    ]
    task = _third(found)
    if task is None:
        return settings
    second = tuned_shifts(found)[1]
    rates = {PROTECTED: best_of(found, second, PROTECTED).learning_rate, rival(found, second): _rate(found, second)}
    ways = [(seed, arm, rate) for seed in SEEDS for arm, rate in rates.items()]
    return settings + [Setting(task, arm, rate, seed, AFTERWARDS, AFTERWARDS) for seed, arm, rate in ways]


def learning_rate(found: Found, task: str) -> float:
    """The rate with which the rival of a shift learnt most in the tuning."""
    cells = of_arm(found, task, rival(found, task), part=CHOOSE, seed=TUNING_SEED)
    return min(cells, key=lambda cell: cell["points"][-1]["learning"])["learning_rate"]


def comparisons(found: Found, share: float = SHARE) -> dict[str, Comparison]:
    """Protection beside the rival at that rate, as far as its cells are there: what is compared -> numbers."""
    compared, pairs = {}, []
    for task in tuned_shifts(found):
        pairs += _pairs(runs(found, task, PROTECTED, share), _rivals(found, task, share))
    if _open(found) and pairs:
        compared["both shifts"] = compare(PROTECTED, {task: rival(found, task) for task in tuned_shifts(found)}, pairs)
    task = _third(found)
    if task is not None:
        second = tuned_shifts(found)[1]
        sides = [_runs(found, task, arm, second, share) for arm in (PROTECTED, rival(found, second))]
        if all(sides):
            compared[task] = compare(PROTECTED, {task: rival(found, second)}, _pairs(*sides))
    return compared


def _open(found: Found) -> list[str]:
    """Shifts on which the rival misses the target with some seed."""
    tasks = tuned_shifts(found)
    return [t for t in tasks if paired(found, PROTECTED, {t: rival(found, t)}, SHARE).missed[1]]


def _third(found: Found) -> str | None:
    """The third shift, where no pair of it reaches the target."""
    if not third(found):
        return None
    first, task = tuned_shifts(found)[0], kept_shifts(found)[2]
    return task if paired(found, PROTECTED, {task: rival(found, first)}, SHARE, like=first).ratio is None else None


def _rate(found: Found, task: str) -> float:
    return (
        learning_rate(found, task) if task in _open(found) else best_of(found, task, rival(found, task)).learning_rate
    )


def _rivals(found: Found, task: str, share: float) -> list[Run]:
    if task in _open(found):
        return _runs(found, task, rival(found, task), task, share)
    return runs(found, task, rival(found, task), share)


def _runs(found: Found, task: str, arm: str, like: str, share: float) -> list[Run]:
    """Of cells that were added, each on the path that forgot less in the tuning of `like`, at its rate."""
    loss, tuned = Levels.of(found, task).target(share), Levels.of(found, like).target(SHARE)
    cells = of_arm(found, task, arm, part=AFTERWARDS)
    if not cells:
        return []
    rate = cells[0]["learning_rate"]
    chosen = next(c for c in of_arm(found, like, arm, part=CHOOSE, seed=TUNING_SEED) if c["learning_rate"] == rate)
    which = min(PATHS, key=lambda path: at_target(chosen, path, tuned).log_mean)
    return [Run(task, cell["seed"], Path.of(cell, which), loss) for cell in cells]


def _pairs(first: list[Run], second: list[Run]) -> list[tuple[Run, Run]]:
    by_seed = {run.seed: run for run in second}
    return [(run, by_seed[run.seed]) for run in first if run.seed in by_seed]


EVERY = WANTED | {AFTERWARDS: afterwards}
