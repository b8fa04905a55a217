"""What the switches of a run come to: each combination of masking, training and method, an outcome or an error."""

from dataclasses import dataclass

from .errors import FNSFTError


NETWORK_SELECTORS = ("networks", "layer_shuffled", "surrogate")  # that look at networks


@dataclass(frozen=True)
class TrainingPlan:
    """What one combination of switches comes to.

    Attributes:
        method (`str`): `"neuron_delta"`, `"lora"` or `"full"`.
        train (`str`): `"all"`, `"selected"` or `"unselected"`: which neurons' weights may change.
        mask_mode (`str` or `None`): the forward intervention during training.
        mask_factor (`float` or `None`): of `amplify`: what activations are multiplied by.
    """

    method: str
    train: str
    mask_mode: str | None
    mask_factor: float | None = None


# (mask_mode, train_neurons) -> (what trains, or None with the reason why the combination is an error).
# `by anti-drift`: held exactly when `anti_drift_row_param` is on; by the forward mask alone when it is off.
COMBINATIONS: dict[tuple[str | None, str], tuple[str | None, str]] = {
    (None, "auto"): ("selected", "the selected neurons"),
    (None, "all"): (
        None,
        "no mask and every neuron trainable: the networks would change nothing; drop network_config",
    ),
    (None, "selected"): ("selected", "the selected neurons"),
    (None, "unselected"): ("unselected", "all but the selected neurons"),
    ("lesion", "auto"): ("unselected", "all but the lesioned neurons, by anti-drift"),
    ("lesion", "all"): ("all", "everything; the lesioned neurons get no gradient, but weight decay can move them"),
    ("lesion", "selected"): (None, "lesioned neurons get no gradient, so nothing selected could learn"),
    ("lesion", "unselected"): ("unselected", "all but the lesioned neurons"),
    ("preserve", "auto"): ("selected", "the preserved neurons, by anti-drift"),
    ("preserve", "all"): ("all", "everything; the silenced neurons get no gradient, but weight decay can move them"),
    ("preserve", "selected"): ("selected", "the preserved neurons"),
    ("preserve", "unselected"): (None, "preserve silences all unselected neurons, so none of them could learn"),
    ("amplify", "auto"): ("selected", "the amplified neurons"),
    ("amplify", "all"): ("all", "everything, the amplified neurons too"),
    ("amplify", "selected"): ("selected", "the amplified neurons"),
    ("amplify", "unselected"): ("unselected", "all but the amplified neurons"),
}

# (train_method, anti_drift_apply_to) -> the reason why the combination is an error. Cells not listed are fine.
ANTI_DRIFT_ERRORS: dict[tuple[str, str], str] = {
    ("lora", "base"): "under LoRA the base weights never train, so only the adapter can drift: use lora, both or auto",
    ("full", "lora"): "full fine-tuning has no LoRA weights to hold: use base, both or auto",
    ("neuron_delta", "lora"): "neuron deltas have no LoRA weights to hold: use base, both or auto",
}


def check_combinations(config) -> None:
    """Check that the fields of a config, each valid by itself, have an effect together.

    Args:
        config (`FunctionalNetworkConfig`): the config.

    Raises:
        FNSFTError: they do not, with what to drop.
    """
    if config.ica_template_revision is not None and config.ica_template_path is None:
        raise FNSFTError("ica_template_revision without ica_template_path has no effect; give both or drop it")
    config.threshold_rule()
    ranks = config.ica_select not in NETWORK_SELECTORS
    if config.ica_min_reliability and (config.ica_component_ids is not None or ranks):
        raise FNSFTError("ica_min_reliability chooses networks; drop it, or ica_component_ids and ica_select")
    of_ica = {"ica_variant": "temporal", "ica_contrast": "logcosh", "ica_backend": "torch"}
    given = [name for name, default in of_ica.items() if getattr(config, name) != default]
    if given and config.ica_decomposition != "ica":
        raise FNSFTError(f"{given[0]} has no effect on ica_decomposition={config.ica_decomposition}; drop one of them")
    if config.ica_skip_tokens >= config.ica_max_length:
        raise FNSFTError(
            f"ica_skip_tokens is {config.ica_skip_tokens}, which leaves nothing of sequences of ica_max_length="
            f"{config.ica_max_length} tokens; lower it"
        )
    if config.ica_rank < config.ica_components:
        raise FNSFTError(
            f"ica_rank is {config.ica_rank}, below ica_components ({config.ica_components}): the sketch must hold at "
            "least as many directions as there are components"
        )
    if ranks and config.ica_fraction is None:
        raise FNSFTError(f"ica_select={config.ica_select} needs ica_fraction: the share of every layer to select")
    if config.ica_select == "gradient_conflict" and config.ica_datasets is None:
        raise FNSFTError(
            "ica_select=gradient_conflict compares gradients on the training data with those on general text; "
            "give that text as ica_datasets"
        )
    if ranks and config.ica_component_ids is not None:
        raise FNSFTError(f"ica_select={config.ica_select} takes no networks; drop ica_component_ids or ica_select")
    if config.ica_rank_by == "lowest" and config.ica_fraction is None:
        raise FNSFTError("ica_rank_by=lowest needs ica_fraction: the share of every layer to select")
    if config.ica_rank_by == "lowest" and config.ica_select == "random":
        raise FNSFTError("ica_rank_by=lowest has no effect on ica_select=random, which ranks nothing; drop one")
    if not config.mask_eval and config.mask_mode is None:
        raise FNSFTError("mask_eval=false has no effect without a mask_mode; drop it")
    _check_factor(config)
    if not config.anti_drift_row_param and (config.mask_mode in (None, "amplify") or config.train_neurons != "auto"):
        raise FNSFTError(
            "anti_drift_row_param=false has an effect only with mask_mode=lesion or preserve and train_neurons=auto; "
            "without them the neurons that do not train are always held exactly; drop it"
        )
    outcome, reason = COMBINATIONS[config.mask_mode, config.train_neurons]
    if outcome is None:
        raise FNSFTError(f"mask_mode={config.mask_mode or 'null'} with train_neurons={config.train_neurons}: {reason}")


def _check_factor(config) -> None:
    if config.mask_mode != "amplify":
        if config.mask_factor is not None:
            raise FNSFTError("mask_factor has an effect only with mask_mode=amplify; drop it, or set that")
    elif config.mask_factor is None:
        raise FNSFTError("mask_mode=amplify needs mask_factor: what the activations are multiplied by, for instance 2")
    elif config.mask_factor == 1:
        raise FNSFTError("mask_factor=1 changes no activation; give another factor, or drop mask_mode")
