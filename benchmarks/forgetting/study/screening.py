"""The screen: what a full fine-tune has changed, projected off bases afterwards, without any more training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fnsft_trl.experiments.held_out import HeldOut
from fnsft_trl.interventions.restoring import projected

from .bases import Bases, Basis
from .learnt import point, put_back, start_of
from .plan import BASES, DOMAINS, PRIMARY, SCREENED, SCREENED_NETWORKS


_WITHIN = 0.05  # share of the task's gain that a choice may cost


def screened(trainer, bases: Bases) -> list[dict[str, Any]]:
    """Points of a trained model whose change is projected.

    Args:
        trainer: of a full fine-tune of the MLPs, trained, with a `Start`.
        bases: the directions.
    """
    model, start = trainer.model, start_of(trainer).weights
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if name in start}
    held_out = HeldOut.of(trainer.eval_dataset, trainer.processing_class)
    found = []
    try:
        for name, basis, is_down_alone in _ways(bases):
            put_back(model, _projected(start, trained, basis, is_down_alone))
            found.append({"way": name, **point(trainer, held_out)})
    finally:
        put_back(model, trained)
    return found


def _ways(bases: Bases) -> Iterator[tuple[str, Basis, bool]]:
    """Name of a way, its basis, and whether only what the down projections have changed is left."""
    yield "subspace", bases.subspace(0), False
    yield "random", bases.random(0), False
    for directions in SCREENED_NETWORKS:
        yield f"networks {directions}", bases.networks(directions), False
    yield "down alone", {}, True
    for kind in BASES:
        for domain in DOMAINS:
            for directions in SCREENED:
                yield f"{kind} of {domain} {directions}", bases.of_domain(kind, domain, directions), True


def _projected(
    start: Mapping[str, torch.Tensor], trained: Mapping[str, torch.Tensor], basis: Basis, is_down_alone: bool
) -> dict[str, torch.Tensor]:
    """Weights whose change has nothing along a basis."""
    found = {}
    for name, weight in trained.items():
        module = name.removesuffix(".weight")
        if is_down_alone and not module.endswith("down_proj"):
            found[name] = start[name]
        elif module in basis:
            change = projected((weight - start[name]).float(), basis[module].to(weight.device, torch.float32))
            found[name] = start[name] + change
        else:
            found[name] = weight
    return found


def chosen_networks(cell: Mapping[str, Any]) -> int:
    """How many directions of networks forget least within 5% of the task's gain; of all that cost more, the one that
    costs least.

    Args:
        cell: of the screen.
    """
    base, trained = cell["points"][0]["learning"], cell["points"][-1]["learning"]
    limit = trained + _WITHIN * (base - trained)
    ways = {d: way for d in SCREENED_NETWORKS for way in cell["also"]["screen"] if way["way"] == f"networks {d}"}
    within = {d: way for d, way in ways.items() if way["learning"] <= limit}
    if not within:
        return min(ways, key=lambda d: ways[d]["learning"])
    return min(within, key=lambda d: sum(math.log(way_kl(within[d], name)) for name in PRIMARY))


def index(cell: Mapping[str, Any], kind: str, directions: int) -> float:
    """I of a basis whose directions were taken out afterwards, at the losses that this gives."""
    ways = {way["way"]: way for way in cell["also"]["screen"]}
    total = 0.0
    for domain in DOMAINS:
        for protected in DOMAINS:
            log = math.log(way_kl(ways[f"{kind} of {protected} {directions}"], domain))
            total += -log if protected == domain else log
    return total / 2


def chosen_directions(cell: Mapping[str, Any]) -> int:
    """How many directions of a domain tell the two domains apart best, of the ceiling."""
    return max(SCREENED, key=lambda directions: index(cell, "ceiling", directions))


def way_kl(way: Mapping[str, Any], name: str) -> float:
    """KL of a point on a text, in nats per token."""
    return max(way["retention"][name]["kl"], 1e-7)
