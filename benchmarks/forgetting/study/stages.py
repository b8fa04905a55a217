"""Stages: which cells each of them needs, given what the cells before it have shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .arms import Setting
from .paths import At, Found, Levels, every_at, of_arm
from .plan import (
    GATE,
    LADDER,
    LEAST_FORGETTING,
    SEEDS,
    SHARE,
    SHIFTS,
    THIRD,
    TUNING,
    TUNING_SEED,
    UNPROTECTED,
)
from .running import BASE


CHOOSE, CONFIRM = "choose", "confirm"


def gate(found: Found) -> list[Setting]:
    """The base, full training and LoRA on every shift that is proposed."""
    bases = [Setting(task, BASE, 0.0, TUNING_SEED, "gate", CHOOSE) for task in SHIFTS]
    return bases + [
        Setting(task, arm, rate, TUNING_SEED, "gate", CHOOSE)
        for task in SHIFTS
        for arm, rates in GATE.items()
        for rate in rates
    ]


def forgetting(found: Found, task: str) -> dict[str, At] | None:
    """The least that each way of the gate forgets at the target, by arm; `None` until all of its cells are there."""
    levels = Levels.of(found, task, rates=GATE)
    wanted = [each for each in gate(found) if each.task == task]
    if levels is None or any(each.key not in found for each in wanted):
        return None
    loss, best = levels.target(SHARE), {}
    for arm, rates in GATE.items():
        cells = [cell for cell in of_arm(found, task, arm, part=CHOOSE) if cell["learning_rate"] in rates]
        best[arm] = min(every_at(cells, loss), key=lambda at: at.mean)
    return best


def kept_shifts(found: Found) -> list[str]:
    """Those that forget enough whichever way of the gate is taken; a way that never gets there keeps none."""
    kept = []
    for task in SHIFTS:
        best = forgetting(found, task)
        if best is not None and all(at.kl is not None and at.mean >= LEAST_FORGETTING for at in best.values()):
            kept.append(task)
    return kept


def tuned_shifts(found: Found) -> list[str]:
    """The two on which rates are chosen."""
    return kept_shifts(found)[:2]


def tuning(found: Found) -> list[Setting]:
    """Every arm at three rates, and at one more where the best is at an edge of them."""
    wanted = []
    for task in tuned_shifts(found):
        for arm, rates in TUNING.items():
            first = [Setting(task, arm, rate, TUNING_SEED, "tuning", CHOOSE) for rate in rates]
            wanted += first
            if all(each.key in found for each in first):
                wanted += [Setting(task, arm, rate, TUNING_SEED, "tuning", CHOOSE) for rate in _more(found, task, arm)]
    return wanted


def _more(found: Found, task: str, arm: str) -> Iterator[float]:
    """The rate beyond an edge."""
    rates = TUNING[arm]
    best = best_of(found, task, arm, rates=rates).learning_rate
    place = LADDER.index(best)
    if best == rates[0] and place > 0:
        yield LADDER[place - 1]
    if best == rates[-1] and place + 1 < len(LADDER):
        yield LADDER[place + 1]


def best_of(found: Found, task: str, arm: str, *, rates: tuple[float, ...] | None = None) -> At:
    """The rate and path of an arm that forget least at the target; of those that never reach it, the one that learns
    most."""
    loss = Levels.of(found, task).target(SHARE)
    cells = of_arm(found, task, arm, part=CHOOSE, seed=TUNING_SEED)
    cells = [cell for cell in cells if rates is None or cell["learning_rate"] in rates]
    return min(every_at(cells, loss), key=lambda at: (at.log_mean, min(at.losses)))


def rival(found: Found, task: str) -> str:
    """The unprotected arm that forgot least in the tuning."""
    return min(UNPROTECTED, key=lambda arm: best_of(found, task, arm).log_mean)


def is_tuned(found: Found) -> bool:
    """Whether every cell of the tuning is there."""
    return len(tuned_shifts(found)) == 2 and all(each.key in found for each in tuning(found))


def confirmation(found: Found) -> list[Setting]:
    """Five fresh seeds of every arm, at the rate that was chosen."""
    if not is_tuned(found):
        return []
    rates = {(task, arm): best_of(found, task, arm).learning_rate for task in tuned_shifts(found) for arm in TUNING}
    return [
        Setting(task, arm, rate, seed, "confirmation", CONFIRM)
        for seed in SEEDS
        for (task, arm), rate in rates.items()
    ]


def third(found: Found) -> list[Setting]:
    """Three arms on a shift that nothing was chosen on, at the rates of the first that was."""
    if not is_tuned(found) or len(kept_shifts(found)) < 3:
        return []
    first, task = tuned_shifts(found)[0], kept_shifts(found)[2]
    arms = [rival(found, first) if arm == "unprotected" else arm for arm in THIRD]
    rates = {arm: best_of(found, first, arm).learning_rate for arm in arms}
    return [Setting(task, arm, rate, seed, "third", CONFIRM) for seed in SEEDS for arm, rate in rates.items()]


WANTED: dict[str, Callable[[Found], list[Setting]]] = {
    "gate": gate,
    "tuning": tuning,
    "confirmation": confirmation,
    "third": third,
}
