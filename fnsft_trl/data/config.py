"""DataConfig: how datasets are read and rendered. Free of torch."""

from dataclasses import dataclass, field

from ..errors import FNSFTError
from .formats import parse_columns
from .prompts import TEMPLATE_FORMATS, parse_prompt_template


@dataclass
class DataConfig:
    """
    How the rows of a dataset are read, rendered, split and cached.

    Args:
        columns (`str`, *optional*):
            Which columns to read, as `prompt=...,completion=...` (and `system=...`), `text=...` or `messages=...`. By
            default they are recognised by their names.
        template_format (`str`, *optional*, defaults to `"auto"`):
            How conversations are rendered: `"chat"` by the tokenizer's chat template, `"alpaca"`, `"chatml"`,
            `"basic"` by `prompt_template`, `"auto"` by the chat template where there is one and else as `"basic"`.
        prompt_template (`str`, *optional*):
            With `template_format="basic"`: the template, with the placeholders `{instruction}` and `{response}`, and
            `{system}` on a line above them if wanted.
        max_samples (`int`, *optional*):
            Rows taken of each split of each dataset, at random by the seed of the training, in their order.
        eval_fraction (`float`, *optional*, defaults to `0.1`):
            Share of the training rows held out when there is an evaluation but no split for it, by the seed.
        tokenized_cache (`bool`, *optional*, defaults to `True`):
            Keep tokenised data in the user's cache and read it again when nothing has changed.

    Raises:
        FNSFTError: a value is not understood, or two contradict each other.
    """

    columns: str | None = field(
        default=None,
        metadata={"help": "Columns to read: prompt=...,completion=... or text=... or messages=..., with system=..."},
    )
    template_format: str = field(
        default="auto", metadata={"help": f"How conversations are rendered: {', '.join(TEMPLATE_FORMATS)}."}
    )
    prompt_template: str | None = field(
        default=None,
        metadata={"help": "The template of template_format=basic, with {instruction}, {response} and maybe {system}."},
    )
    max_samples: int | None = field(
        default=None, metadata={"help": "Rows taken of each split of each dataset, at random; all by default."}
    )
    eval_fraction: float = field(
        default=0.1, metadata={"help": "Share of the training rows to evaluate on where no split is there for it."}
    )
    tokenized_cache: bool = field(
        default=True, metadata={"help": "Keep tokenised data in the user's cache, and read it when nothing changed."}
    )

    def __post_init__(self) -> None:
        if self.columns is not None:
            parse_columns(self.columns)
        if self.template_format not in TEMPLATE_FORMATS:
            raise FNSFTError(
                f"template_format is {self.template_format!r}; it must be one of: {', '.join(TEMPLATE_FORMATS)}"
            )
        if self.prompt_template is not None:
            if self.template_format != "basic":
                raise FNSFTError(
                    f"prompt_template has no effect with template_format={self.template_format}; set "
                    "template_format=basic, or drop it"
                )
            parse_prompt_template(self.prompt_template)
        if self.max_samples is not None and (not isinstance(self.max_samples, int) or self.max_samples < 1):
            raise FNSFTError(f"max_samples is {self.max_samples!r}; it must be a whole number of at least 1")
        if not isinstance(self.eval_fraction, int | float) or not 0 < self.eval_fraction < 1:
            raise FNSFTError(f"eval_fraction is {self.eval_fraction!r}; it must be between 0 and 1")
