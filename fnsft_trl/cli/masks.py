"""Which neurons a mask silences, as the verbs that put one on a model are told: the options, and the neurons."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from ..config import MEASURED_SELECTORS, FunctionalNetworkConfig
from ..errors import FNSFTError
from .options.arguments import Arguments
from .options.schema import Option, describe


if TYPE_CHECKING:
    from torch import nn

    from ..neurons.mask import NeuronMask


# Fields of FunctionalNetworkConfig that say which neurons a mask silences.
MASK_FIELDS = (
    *("ica_template_path", "ica_template_revision", "mask_mode", "mask_factor", "ica_component_ids"),
    "ica_min_reliability",
    *("ica_layers", "ica_site", "ica_threshold", "ica_percentile", "ica_zscore", "ica_select", "ica_fraction"),
    *("ica_rank_by", "ica_seed"),
)


def mask_options(group: str) -> list[Option]:
    """The options, under a title of the help."""
    found = {option.name: option for option in describe(FunctionalNetworkConfig)}
    return [replace(found[name], group=group) for name in MASK_FIELDS]


def mask_config(args: Arguments) -> FunctionalNetworkConfig | None:
    """What is asked for; `None` where no mask is."""
    if not args.mask_mode:
        return None
    return FunctionalNetworkConfig(**{name: vars(args)[name] for name in MASK_FIELDS if name in args.given})


def check_mask_options(args: Arguments, instead: str) -> None:
    """See that the options of a mask are given together, and name neurons that a template alone can select.

    Args:
        instead: what to do in the place of a selector that is measured on rows.

    Raises:
        FNSFTError: they have no effect, or need the rows of a training.
    """
    refuse_idle(args, "mask_mode", (name for name in MASK_FIELDS if name != "mask_mode"))
    refuse_idle(args, "ica_template_path", ("mask_mode",))
    if args.ica_select in MEASURED_SELECTORS:
        raise FNSFTError(
            f"ica_select={args.ica_select} is measured on the rows of a training, which are not here; take another "
            f"selector, or {instead}"
        )


def refuse_idle(args: Arguments, name: str, dependent: Iterable[str]) -> None:
    """Refuse options that were given without the one that they belong to.

    Raises:
        FNSFTError: naming them.
    """
    idle = [each for each in dependent if each in args.given]
    if idle and not vars(args)[name]:
        raise FNSFTError(f"{', '.join(idle)}: no effect without {name}; give it, or drop them")


def configured_mask(config: FunctionalNetworkConfig, model: nn.Module) -> NeuronMask:
    """The neurons that a config selects in a model, as in a training.

    Raises:
        FNSFTError: the template is of another model, or a network or layer is not in it.
    """
    from ..training.loaded import check_settings, chosen_layers, given_template, select_as_configured

    template = given_template(config, None)
    if template.threshold is None and template.site != config.ica_site:
        config = replace(config, ica_site=template.site)  # as in training: the original's templates name no site
    template = check_settings(config, template)
    template.check_model(model)
    return select_as_configured(config, template, chosen_layers(config, model, template))
