"""Stages: which cells each of them needs, given what the cells before it have shown."""

from __future__ import annotations

from collections.abc import Callable

from .arms import NETWORKS, Setting
from .paths import At, Found, Levels, every_at, of_arm
from .plan import (
    BASES,
    BY_STEPS,
    DOMAINS,
    GATE,
    HARDER,
    LADDER,
    LEAST_FORGETTING,
    NETWORK_RATES,
    SEEDS,
    SHARE,
    SHIFTS,
    THIRD,
    TUNING,
    TUNING_SEED,
    UNPROTECTED,
    WANTED_SHIFTS,
)
from .running import BASE, SCREEN
from .screening import chosen_directions, chosen_networks


CHOOSE, CONFIRM, DISSOCIATION = "choose", "confirm", "dissociation"  # parts of the texts


def gate(found: Found) -> list[Setting]:
    """The base, full training and LoRA on every shift that is proposed."""
    return [each for task in proposed(found) for each in _gate_of(task)]


def proposed(found: Found) -> list[str]:
    """All shifts, and harder ones, one after the other, for as long as fewer are kept than are wanted."""
    tasks = list(SHIFTS)
    for task in HARDER:
        kept = [each for each in kept_shifts(found) if each in tasks]
        if len(kept) >= WANTED_SHIFTS or any(forgetting(found, each) is None for each in tasks):
            break
        tasks.append(task)
    return tasks


def _gate_of(task: str) -> list[Setting]:
    base = Setting(task, BASE, 0.0, TUNING_SEED, "gate", CHOOSE)
    ways = [(arm, rate) for arm, rates in GATE.items() for rate in rates]
    return [base, *(Setting(task, arm, rate, TUNING_SEED, "gate", CHOOSE) for arm, rate in ways)]


def forgetting(found: Found, task: str) -> dict[str, At] | None:
    """The least that each way of the gate forgets at the target, by arm; `None` until all of its cells are there."""
    levels = Levels.of(found, task, rates=GATE)
    if levels is None or any(each.key not in found for each in _gate_of(task)):
        return None
    loss, best = levels.target(SHARE), {}
    for arm, rates in GATE.items():
        cells = [cell for cell in of_arm(found, task, arm, part=CHOOSE) if cell["learning_rate"] in rates]
        best[arm] = min(every_at(cells, loss), key=lambda at: at.mean)
    return best


def kept_shifts(found: Found) -> list[str]:
    """Those that forget enough whichever way of the gate is taken; a way that never gets there spares nothing."""
    kept = []
    for task in (*SHIFTS, *HARDER):
        best = forgetting(found, task)
        if best is None or all(at.kl is None for at in best.values()):
            continue
        if all(at.mean >= LEAST_FORGETTING for at in best.values()):
            kept.append(task)
    return kept


def tuned_shifts(found: Found) -> list[str]:
    """The two on which rates are chosen."""
    return kept_shifts(found)[:2]


def tuning(found: Found) -> list[Setting]:
    """Every arm but that of networks at three rates, and at one more where the best is at an edge of them."""
    return [each for task in tuned_shifts(found) for arm in TUNING for each in _rates(found, task, arm, "tuning")]


def _rates(found: Found, task: str, arm: str, stage: str) -> list[Setting]:
    rates = TUNING.get(arm, NETWORK_RATES)
    first = [Setting(task, arm, rate, TUNING_SEED, stage, CHOOSE) for rate in rates]
    if any(each.key not in found for each in first):
        return first
    best = best_of(found, task, arm, rates=rates).learning_rate
    place, more = LADDER.index(best), []
    if best == rates[0] and place > 0:
        more.append(LADDER[place - 1])
    if best == rates[-1] and place + 1 < len(LADDER):
        more.append(LADDER[place + 1])
    return first + [Setting(task, arm, rate, TUNING_SEED, stage, CHOOSE) for rate in more]


def _are_there(found: Found, wanted: list[Setting]) -> bool:
    return bool(wanted) and all(each.key in found for each in wanted)


def screen(found: Found) -> list[Setting]:
    """One more cell of full training for each shift, whose change is projected afterwards."""
    tasks = tuned_shifts(found)
    if len(tasks) < 2 or not _are_there(found, tuning(found)):
        return []
    rates = {task: best_of(found, task, "full").learning_rate for task in tasks}
    return [Setting(task, SCREEN, rate, TUNING_SEED, "screen", "screen") for task, rate in rates.items()]


def networks_arm(found: Found, task: str) -> str | None:
    """The arm of networks on a shift, as the screen has chosen it; `None` until it has."""
    cells = [found[each.key] for each in screen(found) if each.task == task and each.key in found]
    return f"{NETWORKS}{chosen_networks(cells[0])}" if cells else None


def networks(found: Found) -> list[Setting]:
    """The tuning of the arm of networks."""
    if not _are_there(found, screen(found)):
        return []
    arms = {task: networks_arm(found, task) for task in tuned_shifts(found)}
    return [each for task, arm in arms.items() for each in _rates(found, task, arm, "networks")]


def arms_of(found: Found, task: str) -> list[str]:
    """All arms of the confirmation on a shift."""
    arm = networks_arm(found, task)
    return [*TUNING, *([arm] if arm else [])]


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
    """Whether every cell by which something is chosen is there."""
    return _are_there(found, networks(found))


def confirmation(found: Found) -> list[Setting]:
    """Five fresh seeds of every arm, at the rate that was chosen."""
    if not is_tuned(found):
        return []
    arms = [(task, arm) for task in tuned_shifts(found) for arm in arms_of(found, task)]
    best = {(task, arm): best_of(found, task, arm) for task, arm in arms}
    return [
        Setting(task, arm, at.learning_rate, seed, "confirmation", CONFIRM, at.path)
        for seed in SEEDS
        for (task, arm), at in best.items()
    ]


def third(found: Found) -> list[Setting]:
    """Three arms on a shift that nothing was chosen on, at the rates of the first that was."""
    if not is_tuned(found) or len(kept_shifts(found)) < 3:
        return []
    first, task = tuned_shifts(found)[0], kept_shifts(found)[2]
    arms = [rival(found, first) if arm == "unprotected" else arm for arm in THIRD]
    best = {arm: best_of(found, first, arm) for arm in arms}
    return [
        Setting(task, arm, at.learning_rate, seed, "third", CONFIRM, at.path)
        for seed in SEEDS
        for arm, at in best.items()
    ]


def dissociation(found: Found) -> list[Setting]:
    """Every basis with either domain protected."""
    if not is_tuned(found):
        return []
    task = tuned_shifts(found)[0]
    rate = best_of(found, task, "subspace").learning_rate
    return [
        Setting(task, protecting(found, basis, domain), rate, seed, "dissociation", DISSOCIATION, BY_STEPS)
        for seed in SEEDS
        for basis in BASES
        for domain in DOMAINS
    ]


def protecting(found: Found, basis: str, domain: str) -> str:
    """The arm that protects a domain's directions of a basis, as many as the screen has chosen."""
    directions = chosen_directions(found[screen(found)[0].key])
    return f"{basis} of {domain} {directions}"


WANTED: dict[str, Callable[[Found], list[Setting]]] = {
    "gate": gate,
    "tuning": tuning,
    "screen": screen,
    "networks": networks,
    "confirmation": confirmation,
    "third": third,
    "dissociation": dissociation,
}
