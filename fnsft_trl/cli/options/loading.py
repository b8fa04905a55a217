"""LoadingConfig: how a model is loaded, in every verb that loads one."""

from dataclasses import dataclass, field, replace

from ...errors import FNSFTError
from .schema import Option, describe


@dataclass
class LoadingConfig:
    """How a model is loaded, under the names of TRL's ModelConfig where it has them.

    Args:
        dtype (`str`, *optional*, defaults to `"float32"`):
            Precision to hold the weights in: `float32`, `bfloat16`, `float16`, or `auto`, that of the checkpoint.
        device_map (`str`, *optional*):
            Where to put the weights: a device such as `cuda:1`, or `auto` to spread them. By default they are on the
            device that the verb computes on.
        load_in_4bit, load_in_8bit (`bool`, *optional*, defaults to `False`):
            Quantise the weights with bitsandbytes.
        model_revision (`str`, *optional*):
            Branch, tag or commit of a model on the Hub; the newest of `main` by default.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Run the code that a model on the Hub brings.
        attn_implementation (`str`, *optional*):
            Implementation of attention, for instance `eager` or `sdpa`; transformers chooses by default.

    Raises:
        FNSFTError: the weights are to be in 4 and in 8 bits.
    """

    dtype: str = field(
        default="float32",
        metadata={
            "help": "Precision to hold the weights in; auto is that of the checkpoint.",
            "choices": ("auto", "bfloat16", "float16", "float32"),
        },
    )
    device_map: str | None = field(
        default=None, metadata={"help": "Where to put the weights: a device such as cuda:1, or auto to spread them."}
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantise the weights to 8 bits, with bitsandbytes."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantise the weights to 4 bits, with bitsandbytes."})
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the model on the Hub; main by default."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that a model on the Hub brings."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Implementation of attention, such as eager or sdpa; chosen by default."}
    )

    def __post_init__(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise FNSFTError("load_in_4bit and load_in_8bit exclude each other; drop one of them")

    @property
    def is_quantized(self) -> bool:
        """Whether the weights are held in 4 or 8 bits."""
        return self.load_in_4bit or self.load_in_8bit


def loading_options(*, dtype: str = "float32") -> list[Option]:
    """The options of a verb that loads a model.

    Args:
        dtype: the default precision there.
    """
    return [replace(option, default=dtype) if option.name == "dtype" else option for option in describe(LoadingConfig)]
