"""RunConfig: what `fnsft train` does around the training itself."""

from dataclasses import dataclass

from ...fields import check_fields, documented, option


@documented
@dataclass
class RunConfig:
    """Options of `fnsft train` that belong to no trainer.

    Raises:
        FNSFTError: a value that its field does not take.
    """

    adapter_name_or_path: str | None = option(
        None,
        "Directory of an adapter of this model, LoRA or neuron deltas. It is trained further, in place of a new one.",
    )
    merge_adapter_with_base: bool = option(
        False,
        "After training, merge the adapter into its base model and save the result in `merged/` of the output "
        "directory.",
    )
    convert_to_gguf: bool = option(
        False,
        "After training, convert the model (an adapter is merged first) to `model.gguf` in the output directory.",
    )
    gguf_quantization: str = option(
        "auto", "With `convert_to_gguf`: precision of the file, one that the converter offers (f16, q8_0, ...)."
    )
    ica_template_output: str | None = option(
        None, "Directory in which to save the template of the networks, before training."
    )
    hub_commit_message: str | None = option(None, "With `push_to_hub`: message of the last commit of the training.")
    wandb_project: str | None = option(None, "With `report_to: wandb`: name of the project; WANDB_PROJECT by default.")

    def __post_init__(self) -> None:
        check_fields(self)
