"""probe_networks: which networks of a model matter, beside the controls that could prove it chance."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..errors import FNSFTError
from ..evaluation.share import ALONE, Share
from ..fields import checked
from ..interventions.replacement import Mean, Replacement, Resampled, Zero
from ..ranks import Ranks
from ..selection.evidence import SelectorEvidence
from ..template.template import FunctionalNetworkTemplate
from ..template.weights import weights_sha256
from .condition import Condition
from .config import CURVES, ProbeConfig
from .controls import Controls
from .data import ProbeData
from .dissociation import Dissociation, dissociate
from .found import Found
from .passes import ProbePasses, Work
from .plan import Network, networks_of, plan
from .pool import activation_pool
from .records import Records
from .singles import SingleNeuron, first_order_effects, strongest


logger = logging.get_logger(__name__)

SURROGATE = "surrogate"  # in the output directory: the template of the control that is found here


@dataclass
class Probe:
    """What a probe has found.

    Attributes:
        found (`Found`): measures of every condition, verdicts on networks.
        networks (`list[Network]`): that were probed.
        singles (`list[SingleNeuron]`): single neurons, by their first-order effect; a condition of the curve `neuron`
            each.
        dissociation (`Dissociation` or `None`): where networks belong to several datasets.
        config (`ProbeConfig`): how.
        shares_prefix (`bool`): whether passes began in the middle.
    """

    found: Found
    networks: list[Network]
    singles: list[SingleNeuron]
    dissociation: Dissociation | None
    config: ProbeConfig
    shares_prefix: bool


def probe_networks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    template: FunctionalNetworkTemplate,
    data: Sequence[ProbeData],
    config: ProbeConfig | None = None,
    *,
    output_dir: str | os.PathLike,
    domains: Mapping[str, FunctionalNetworkTemplate] | None = None,
    surrogate: FunctionalNetworkTemplate | None = None,
    share: Share = ALONE,
) -> Probe:
    """Silence and scale networks of a model and their controls, and score what is left.

    What is finished is kept in `output_dir` (`passes-*.jsonl`), and is not computed again by a call that asks for the
    same; one that asks for more goes on from there.

    Args:
        model: a causal language model, in which the template was found.
        tokenizer: its tokenizer.
        template: the networks.
        data: what to score on, of different names.
        config: what to do.
        output_dir: where to keep it.
        domains: name of a dataset -> the template of its own networks, for a double dissociation; then these networks
            are probed in the place of those of `template`.
        surrogate: as many networks of activations that were shifted in time (`ica_surrogate`); found on the data, and
            kept in `output_dir`, where it is not given.
        share: the part of this process, if there are several; each holds the whole model, and all make the same call.

    Raises:
        FNSFTError: a template is of another model or site, the data has no answers to change tokens at, or
            `output_dir` holds another probe.
    """
    config = checked(config, ProbeConfig, "config") or ProbeConfig()
    _check(template, data, config, domains)
    template.check_model(model.eval())
    output, ranks = Path(output_dir), Ranks()
    with ranks.together():
        about = _about(model, [template, *(domains or {}).values()], data, config)
        records = Records(output, about, index=share.index)
        shifted = surrogate
        if shifted is None and config.has_lesions:  # no other curve has that control
            shifted = _surrogate(model, tokenizer, template, data, config, output, ranks)
        networks = _networks(model, template, domains, shifted, config)
        replacements = _replacements(model, template, data, config)
        singles = _singles(model, networks, data, config)
    conditions = plan(networks, curves=config.curves or CURVES, draws=config.draws, seed=config.seed)
    conditions += [Condition("neuron", "networks", each.label, 0.0, 0, each.mask) for each in singles]
    work = Work(template.site, replacements, config.tokens == "answer", config.batch_size, share)
    passes = ProbePasses(model, tokenizer, data, work, records)
    ranks.meet()
    with ranks.together():
        passes.run(conditions)
        passes.continue_prompts(_continued(conditions))
    ranks.meet()
    records.read()
    found = Found(data, conditions, records, config.batch_size)
    dissociation = _dissociation(found, networks, config.seed)
    return Probe(found, networks, singles, dissociation, config, passes.shares_prefix)


def _dissociation(found: Found, networks: Sequence[Network], seed: int) -> Dissociation | None:
    own = {network.label: network.domain for network in networks if network.domain is not None}
    if harmless := [name for name in found.data if own and found.full(name) <= 0]:
        logger.warning(
            f"a lesion of all neurons does no damage on {', '.join(harmless)}, of which that of a network could be a "
            "share: no double dissociation"
        )
        return None
    return dissociate(found, own, seed=seed) if own else None


def _about(model, templates, data: Sequence[ProbeData], config: ProbeConfig) -> dict[str, Any]:
    """What records depend on, as JSON values: what is found is of no other probe."""
    digest = hashlib.sha256()
    for template in templates:
        digest.update(f"{template.site}:{template.threshold}".encode())
        for _, values in sorted(template.loadings.items()):
            digest.update(values.numpy().tobytes())
    return {
        "template": digest.hexdigest(),
        "weights": weights_sha256(model),
        "data": {part.name: part.sha256 for part in data},
        "prompts": {part.name: len(part.prompts) for part in data},
        **{name: getattr(config, name) for name in ("batch_size", "max_length", "ablation", "tokens")},
        **({"seed": config.seed} if config.ablation == "resample" else {}),
    }


def _check(template, data, config: ProbeConfig, domains) -> None:
    names = [part.name for part in data]
    if len(set(names)) < len(names) or not names:
        raise FNSFTError(f"the datasets are called {', '.join(names) or '(none)'}; give some, of different names")
    if config.tokens == "answer" and not all(part.has_answers or part.questions for part in data):
        text = next(part.name for part in data if not (part.has_answers or part.questions))
        raise FNSFTError(
            f"tokens=answer: {text} is text, without answers to change neurons at; drop {text}, or tokens=answer"
        )
    if config.ablation == "mean" and not template.mean:
        raise FNSFTError("ablation=mean: the template was converted and knows no means; discover the networks again")
    if domains is None:
        return
    if not config.has_lesions:
        raise FNSFTError(
            f"a double dissociation is one of lesions; curves holds {', '.join(config.curves)}: add lesion"
        )
    if len(names) < 2 or not set(domains) <= set(names):
        raise FNSFTError(
            f"domains are of {', '.join(domains)}, the data of {', '.join(names)}: give data of the same names, and "
            "at least two"
        )
    for name, other in domains.items():
        if other.site != template.site or other.widths != template.widths:
            raise FNSFTError(f"the template of the domain {name} is of other layers or another site than the first")


def _networks(model, template, domains, surrogate, config: ProbeConfig) -> list[Network]:
    if domains is None:
        controls = Controls(model, template, surrogate)
        return networks_of(controls, config.chosen(len(template.components)), fraction=config.fraction)
    found = []
    for name, other in domains.items():
        other.check_model(model)
        controls = Controls(model, other, surrogate)
        ids = config.chosen(len(other.components))
        found += networks_of(controls, ids, fraction=config.fraction, domain=name)
    return found


def _surrogate(model, tokenizer, template, data, config: ProbeConfig, output: Path, ranks: Ranks):
    """The template of the control, found on the data by all processes together; `None` if that is too short."""
    place = output / SURROGATE
    if (place / "config.json").is_file():
        return FunctionalNetworkTemplate.from_pretrained(place)
    if not template.settings or template.threshold is None:
        return None  # converted from lists: its controls are refused with the reason
    rows = [{"input_ids": item.ids} for part in data for item in part.items]
    tokens = min(template.settings.get("ica_max_tokens", config.max_tokens), config.max_tokens * len(data))
    settings = template.settings | {"ica_max_tokens": tokens}
    evidence = SelectorEvidence(model, tokenizer, general={"the data of a probe": rows})
    try:
        found = evidence.surrogate(replace(template, settings=settings))
    except FNSFTError as error:  # as of too short data
        logger.warning(f"there is no control of surrogate networks: {error}")
        return None
    if ranks.index == 0:
        found.save_pretrained(place)
    return found


def _replacements(model, template, data, config: ProbeConfig) -> dict[str | None, Replacement]:
    """What stands in for silenced neurons, by the ablation that a condition names; `None`: it names none."""
    found: dict[str | None, Replacement] = {"zero": Zero(), "mean": Mean(template.mean)}
    if config.ablation == "resample":
        return found | {None: Resampled(activation_pool(model, data, site=template.site), seed=config.seed)}
    return found | {None: found[config.ablation]}


def _singles(model, networks: Sequence[Network], data, config: ProbeConfig) -> list[SingleNeuron]:
    if not config.neurons:
        return []
    mask = networks[0].mask
    effects = first_order_effects(model, data, site=mask.site, layers=list(mask.layers), batch_size=config.batch_size)
    return strongest(effects, config.neurons, mask.site)


def _continued(conditions: Sequence[Condition]) -> list[Condition]:
    """Those under which prompts are continued: networks, unions, all neurons, and one draw of each control."""
    return [
        condition for condition in conditions if condition.curve in ("full", "lesion", "union") and condition.draw == 0
    ]
