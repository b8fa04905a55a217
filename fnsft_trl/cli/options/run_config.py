"""RunConfig: what `fnsft train` does around the training itself."""

from dataclasses import dataclass, field


@dataclass
class RunConfig:
    """Options of `fnsft train` that belong to no trainer.

    Args:
        merge_adapter_with_base (`bool`, *optional*, defaults to `False`):
            After training, merge the adapter into its base model and save the result in `merged/` of the output
            directory.
        convert_to_gguf (`bool`, *optional*, defaults to `False`):
            After training, convert the model (an adapter is merged first) to `model.gguf` in the output directory.
        gguf_quantization (`str`, *optional*, defaults to `"auto"`):
            With `convert_to_gguf`: precision of the file, one that the converter offers.
        ica_template_output (`str`, *optional*):
            Directory to save the template of the networks in, before training.
        hub_commit_message (`str`, *optional*):
            With `push_to_hub`: message of the commit that ends the training.
        wandb_project (`str`, *optional*):
            With `report_to="wandb"`: name of the project; WANDB_PROJECT by default.
    """

    merge_adapter_with_base: bool = field(
        default=False, metadata={"help": "After training, merge the adapter into its base, in OUTPUT_DIR/merged."}
    )
    convert_to_gguf: bool = field(
        default=False, metadata={"help": "After training, convert the merged model to OUTPUT_DIR/model.gguf."}
    )
    gguf_quantization: str = field(
        default="auto", metadata={"help": "With convert_to_gguf: precision of the file (f16, q8_0 and so on)."}
    )
    ica_template_output: str | None = field(
        default=None, metadata={"help": "Directory to save the template of the networks in, before training."}
    )
    hub_commit_message: str | None = field(
        default=None, metadata={"help": "With push_to_hub: message of the commit that ends the training."}
    )
    wandb_project: str | None = field(default=None, metadata={"help": "With report_to: wandb: name of the project."})
