"""What the switches of a run come to: each combination of masking, training and method, an outcome or an error."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingPlan:
    """What one combination of switches comes to.

    Attributes:
        method (`str`): `"neuron_delta"`, `"lora"` or `"full"`.
        train (`str`): `"all"`, `"selected"` or `"unselected"`: which neurons' weights may change.
        mask_mode (`str` or `None`): the forward intervention during training.
    """

    method: str
    train: str
    mask_mode: str | None


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
}

# (train_method, anti_drift_apply_to) -> the reason why the combination is an error. Cells not listed are fine.
ANTI_DRIFT_ERRORS: dict[tuple[str, str], str] = {
    ("lora", "base"): "under LoRA the base weights never train, so only the adapter can drift: use lora, both or auto",
    ("full", "lora"): "full fine-tuning has no LoRA weights to hold: use base, both or auto",
    ("neuron_delta", "lora"): "neuron deltas have no LoRA weights to hold: use base, both or auto",
}
