"""ProtectedBases: the directions that a ProtectionConfig asks for, of the inputs of some modules of one model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..data.sequences import two_parts
from ..discovery.directions import LEADING, InputDirections, KeptDirections, KeptText, orthonormal
from ..discovery.inputs import module_named, shared_inputs
from ..discovery.module_directions import directions_of_modules
from ..discovery.saved_directions import rounded
from ..errors import FNSFTError
from ..hub.names import absolute_sources, source_names
from ..neurons.sites import linear_shape
from ..ranges import format_ranges, parse_ranges
from ..template.template import FunctionalNetworkTemplate
from .protection_config import ENERGY_TOKENS, ProtectionConfig
from .retention_texts import RetentionTexts


logger = logging.get_logger(__name__)

MOST_LEADING = 512  # leading directions that are looked at where a share of the energy is asked for
_PROBE = [1, 2, 3, 4]  # token ids by which inputs that modules share are told where no text is given


@dataclass
class ProtectedBases:
    """
    The directions, and what they are of.

    Attributes:
        kept (`KeptDirections`): of each input, as they are on disk.
        what (`str`): in words.
        energy (`dict[str, float]`): name of a text to keep -> share of its energy that they hold, in passages that
            gave no directions.
        tokens (`dict[str, int]`): name of a text -> tokens that gave directions.
        sinks (`dict[str, int]`): name of a text -> attention sinks beside position 0.
    """

    kept: KeptDirections
    what: str
    energy: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    sinks: dict[str, int] = field(default_factory=dict)


class KeptTexts:
    """The texts to keep of a config, read before a model is loaded.

    Args:
        config ([`ProtectionConfig`]): what is asked for.

    Raises:
        FNSFTError: a source cannot be read, or holds no text.
    """

    def __init__(self, config: ProtectionConfig) -> None:
        texts = config.texts()
        self.config = config
        self.rows = {} if texts is None else RetentionTexts(texts).texts

    def tokenized(self, tokenizer) -> dict[str, tuple[KeptText, KeptText]]:
        """Name -> the passages that give directions, and others on which it is measured what they hold."""
        found, shares = {}, self.config.shares()
        wanted = (self.config.protect_tokens, ENERGY_TOKENS)
        for name, rows in self.rows.items():
            giving, measured = two_parts(rows, tokenizer, wanted, name=f"the text {name}")
            found[name] = KeptText(giving, shares[name]), KeptText(measured)
            if found[name][0].tokens < wanted[0]:
                logger.warning(
                    f"of the text {name}, directions come from {found[name][0].tokens} tokens, not the {wanted[0]} "
                    "asked for (protect_tokens)"
                )
        return found


def texts_sha256(texts: Mapping[str, tuple[KeptText, KeptText]]) -> dict[str, str]:
    """Name of a text -> SHA-256 of the token ids that give its directions."""
    return {name: hashlib.sha256(repr(giving.sequences).encode()).hexdigest() for name, (giving, _) in texts.items()}


def find_bases(
    config: ProtectionConfig,
    model: nn.Module,
    modules: Sequence[str],
    texts: Mapping[str, tuple[KeptText, KeptText]],
    *,
    stored: KeptDirections | None = None,
    template: FunctionalNetworkTemplate | None = None,
    title: str | None = "directions to protect",
) -> ProtectedBases:
    """Find the directions that a config asks for.

    Args:
        config: what is asked for.
        model: with its adapters switched off.
        modules: names of the linear modules that train.
        texts: of [`KeptTexts.tokenized`].
        stored: directions that were found before, in the place of texts.
        template: the networks to protect, with `protect: networks`.
        title: of the progress bars; `None` for none.

    Raises:
        FNSFTError: a module has none, or the template does not fit.
    """
    giving = {name: text for name, (text, _) in texts.items()}
    counts = None
    if giving:
        leading = MOST_LEADING if config.is_share else 0 if config.protect == "networks" else config.leading
        kept = KeptDirections.find(model, modules, giving, leading=leading, title=title)
        counts = _counts(config, kept, model, texts, title)
    elif stored is not None:
        kept = _of_modules(stored, modules, model)
        counts = [_count(config, each) for each in kept.inputs]
    else:
        kept = _empty(config, model, modules)
    kept = kept if counts is None else kept.first(counts)
    if config.protect == "random":
        kept, what = kept.random(seed=config.protect_seed), "random directions, a control"
    elif config.protect == "networks":
        kept, what = _of_networks(config, kept, model, template)
    else:
        what = "the subspace of " + (", ".join(giving) or source_names(absolute_sources([config.protect_basis]))[0])
    kept = rounded(kept)
    found = ProtectedBases(kept, what)
    for name, (text, measured) in texts.items():
        found.energy[name] = held(kept, model, measured, None if title is None else f"energy of {name}")
        found.tokens[name] = text.tokens
        found.sinks[name] = kept.sinks[name].count
    return found


def held(kept: KeptDirections, model: nn.Module, text: KeptText, title: str | None) -> float:
    """The share of a text's energy that all directions hold, the mean over inputs."""
    shares = kept.energies(model, text, title=title)
    return sum(float(share[-1]) for share in shares) / len(shares)


def _counts(config, kept: KeptDirections, model, texts, title) -> list[int] | None:
    """How many directions of each input are taken; `None` for all that were found."""
    if config.protect == "networks":
        return None
    if not config.is_share:
        return [min(each.basis.shape[1], LEADING + config.leading_of(each.width)) for each in kept.inputs]
    mixed = [torch.zeros(each.basis.shape[1], dtype=torch.float64) for each in kept.inputs]
    for text, _ in texts.values():
        for sum_of, shares in zip(mixed, kept.energies(model, text, title=title), strict=True):
            sum_of += text.share * shares
    short = [
        each.modules[0] for each, curve in zip(kept.inputs, mixed, strict=True) if curve[-1] < config.protect_dims
    ]
    if short:
        logger.warning(
            f"at {len(short)} inputs, that of {short[0]} first, {MOST_LEADING} leading directions hold less than "
            f"{config.protect_dims:.1%} of the energy (protect_dims); all of these are protected there"
        )
    return [max(LEADING, min(int((curve < config.protect_dims).sum()) + 1, len(curve))) for curve in mixed]


def _count(config: ProtectionConfig, each: InputDirections) -> int:
    """How many stored directions of an input are taken."""
    has = each.basis.shape[1]
    if config.protect_dims is None:
        return has
    wanted = config.leading + LEADING
    if has < min(wanted, each.width):
        raise FNSFTError(
            f"protect_dims is {config.leading}, and protect_basis holds {max(0, has - LEADING)} leading directions of "
            f"the input of {each.modules[0]}; ask for fewer, or find more (ica_store_basis)"
        )
    return min(has, wanted)


def _of_modules(stored: KeptDirections, modules: Sequence[str], model: nn.Module) -> KeptDirections:
    """Stored directions of the inputs of some modules."""
    of = {name: each for each in stored.inputs for name in each.modules}
    if missing := [name for name in modules if name not in of]:
        raise FNSFTError(
            f"{missing[0]} trains, and protect_basis holds no directions of its input; give protect_datasets in its "
            "place, or leave the module out of the targets"
        )
    kept: dict[int, tuple[InputDirections, list[str]]] = {}
    for name in modules:
        width = linear_shape(module_named(model, name))[0]
        if of[name].width != width:
            raise FNSFTError(
                f"protect_basis has directions of {of[name].width} channels for {name}, whose input has {width}; it "
                "is of another model"
            )
        kept.setdefault(id(of[name]), (of[name], []))[1].append(name)
    return KeptDirections(tuple(replace(each, modules=tuple(names)) for each, names in kept.values()), stored.sinks)


def _empty(config: ProtectionConfig, model: nn.Module, modules: Sequence[str]) -> KeptDirections:
    """Inputs without directions, of the shape of those that are asked for."""
    found = []
    for group in shared_inputs(model, modules, _PROBE):
        width = linear_shape(module_named(model, group[0]))[0]
        count = 0 if config.protect == "networks" else LEADING + config.leading_of(width)
        empty = torch.zeros(width, min(count, width), dtype=torch.float64)
        found.append(InputDirections(group, empty, torch.zeros(width, dtype=torch.float64)))
    return KeptDirections(tuple(found))


def _of_networks(
    config: ProtectionConfig, kept: KeptDirections, model: nn.Module, template: FunctionalNetworkTemplate
) -> tuple[KeptDirections, str]:
    """Directions of networks after position 0 and the mean; at other inputs than their site's, these two alone."""
    count = len(template.components)
    asked = "all" if config.protect_component_ids is None else config.protect_component_ids
    numbers = parse_ranges(asked, count, what="network")
    at_site = directions_of_modules(template, model, numbers)
    inputs = []
    for each in kept.inputs:
        rows = [at_site[name].T for name in each.modules if name in at_site]
        basis = orthonormal(each.basis[:, :LEADING], *rows)
        if not basis.shape[1]:
            raise FNSFTError(
                f"{each.modules[0]} trains, and networks have no directions of its input; give protect_datasets, of "
                "which position 0 and the mean are protected there, or train down projections alone"
            )
        inputs.append(replace(each, basis=basis))
    if not any(name in at_site for each in inputs for name in each.modules):
        raise FNSFTError(
            "none of the modules that train reads the neurons of the template's networks, so protect=networks would "
            "protect none of them; train down projections"
        )
    return replace(kept, inputs=tuple(inputs)), f"networks {format_ranges(numbers)} of {count}"


def as_json(found: ProtectedBases) -> dict[str, Any]:
    """What is known of the directions, for files."""
    counts = [each.basis.shape[1] for each in found.kept.inputs]
    return {
        "what": found.what,
        "inputs": len(counts),
        "modules": sum(len(each.modules) for each in found.kept.inputs),
        "fewest": min(counts),
        "most": max(counts),
        "energy": found.energy,
        "tokens": found.tokens,
        "sinks": found.sinks,
    }
