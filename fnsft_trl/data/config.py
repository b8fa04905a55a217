"""DataConfig: how datasets are read and rendered. Free of torch."""

from dataclasses import dataclass

from ..errors import FNSFTError
from ..fields import check_fields, documented, option
from .formats import parse_columns
from .prompts import TEMPLATE_FORMATS, parse_prompt_template


@documented
@dataclass
class DataConfig:
    """
    How the rows of a dataset are read, rendered, split and cached.

    Raises:
        FNSFTError: a value is not understood, or two contradict each other.
    """

    columns: str | None = option(
        None,
        "Which columns to read, as `prompt=...,completion=...` (and `system=...`), `text=...` or `messages=...`. By "
        "default they are recognised by their names.",
    )
    template_format: str = option(
        "auto",
        "How conversations are rendered: `chat` (the tokenizer's chat template), `alpaca`, `chatml`, `basic` "
        "(`prompt_template`) or `auto`. `auto` takes the chat template if there is one, and else `basic`.",
        choices=TEMPLATE_FORMATS,
    )
    prompt_template: str | None = option(
        None,
        'With `template_format="basic"`: the template, with the placeholders `{instruction}` and `{response}`, and '
        "`{system}` on a line above them if wanted.",
    )
    max_samples: int | None = option(
        None,
        "Number of rows to take of each split of each dataset, drawn by the seed of the training. They keep their "
        "order. By default all rows.",
        least=1,
    )
    eval_fraction: float = option(
        0.1,
        "Share of the training rows to hold out when an evaluation has no split, drawn by the seed.",
        above=0,
        below=1,
    )
    tokenized_cache: bool = option(
        True, "Keep tokenised data in the user's cache and read it again when nothing has changed."
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.columns is not None:
            parse_columns(self.columns)
        if self.prompt_template is not None:
            if self.template_format != "basic":
                raise FNSFTError(
                    f"prompt_template has no effect with template_format={self.template_format}; set "
                    "template_format=basic, or drop it"
                )
            parse_prompt_template(self.prompt_template)
