"""Cells of the study as they could have been: what an arm forgets grows with the square of what it learns."""

import random
from collections.abc import Mapping

from study.arms import KEY, Setting
from study.plan import BASES, BY_SCALES, BY_STEPS, DOMAINS, SCALES, SCORED_STEPS, SCREENED, SCREENED_NETWORKS
from study.running import BASE, SCREEN
from study.stages import WANTED


BASE_LOSS, DEMONSTRATED, BEST = 20.0, 8.0, 1.0
ARTICLES = {"wikipedia": 12, "questions": 20, "docs": 15, "chat": 6}
PARTS = {
    "choose": ("wikipedia", "questions"),
    "screen": ("wikipedia", "questions", "docs"),
    "confirm": ("wikipedia", "questions", "chat"),
    "afterwards": ("wikipedia", "questions", "chat"),
    "dissociation": ("wikipedia", "docs"),
}
TOKENS = 100


def forgets(arm: str) -> float:
    """KL at the end of a training, of arms without another number."""
    return {"full": 0.4, "lora": 0.5, "replay": 0.3, "subspace": 0.02, "random": 0.38, "networks": 0.05}.get(
        arm.partition(" ")[0], 0.2
    )


def synthetic(setting: Setting, kl: Mapping[str, float] | None = None) -> dict:
    """A cell: the same for the same setting."""
    draw = random.Random(repr(setting.key))
    head = {"stage": setting.stage, **dict(zip(KEY, setting.key, strict=True))}
    if setting.arm == BASE:
        point = {"step": 0, "learning": BASE_LOSS, "retention": {}, "kl_sums": {}}
        return head | {"points": [point], "demonstrated": DEMONSTRATED}
    end = {name: (kl or {}).get(setting.arm, forgets(setting.arm)) for name in PARTS[setting.part]}
    of, _, domain = setting.arm.partition(" of ")
    if domain:  # protecting a domain keeps it, by supervision most
        protected = domain.split()[0]
        keeps = (kl or {}).get(of, {"ceiling": 0.2, "networks": 0.3, "pca": 0.6}[of])
        end[protected] *= keeps
    noise = {name: draw.uniform(0.9, 1.1) for name in end}
    sums = {name: [draw.uniform(0.7, 1.3) for _ in range(ARTICLES[name])] for name in end}

    def point(share: float, **more) -> dict:
        level = {name: end[name] * noise[name] * share**2 for name in end}
        return {
            **more,
            "learning": BASE_LOSS - share * (BASE_LOSS - BEST),
            "retention": {name: {"kl": value, "rise": value} for name, value in level.items()},
            "kl_sums": {name: [TOKENS * level[name] * part for part in sums[name]] for name in end},
        }

    also = {"interpolated": [point(scale, scale=scale) for scale in SCALES] if setting.path != BY_STEPS else []}
    if setting.part in ("confirm", "afterwards"):
        also["capability"] = {"acc_norm": draw.uniform(0.3, 0.4)}
    if setting.arm == SCREEN:
        ways = ["subspace", "random", "down alone", *(f"networks {m}" for m in SCREENED_NETWORKS)]
        ways += [f"{b} of {d} {m}" for b in BASES for d in DOMAINS for m in SCREENED]
        also = {"screen": [point(0.97, way=way) for way in ways]}
    steps = list(zip((0.5, 0.9, 1.0), SCORED_STEPS, strict=True))[-1 if setting.path == BY_SCALES else 0 :]
    points = [point(0.0, step=0), *(point(share, step=step) for share, step in steps)]
    retention = {name: {"sequence_tokens": [TOKENS] * ARTICLES[name]} for name in end}
    return head | {"points": points, "also": also, "retention": retention}


def whole_study(kl: Mapping[str, float] | None = None, *, stages: tuple[str, ...] = tuple(WANTED)) -> dict:
    """All cells of some stages, each stage as those before it have it."""
    found = {}
    for stage in stages:
        while missing := [each for each in WANTED[stage](found) if each.key not in found]:
            found |= {each.key: synthetic(each, kl) for each in missing}
    return found
