"""EvaluationConfig: how rows are read and scored. Free of torch."""

from dataclasses import dataclass

from ..data.config import DataConfig
from ..data.prompts import TEMPLATE_FORMATS
from ..errors import FNSFTError
from ..fields import LARGEST_SEED, check_fields, documented, option


@documented
@dataclass
class EvaluationConfig:
    """
    How the rows of an evaluation are read and scored.

    Raises:
        FNSFTError: a value is not understood, or two contradict each other.
    """

    columns: str | None = option(
        None,
        "Which columns to read, as `prompt=...,completion=...` (and `system=...`), `text=...`, `messages=...` or "
        "`question=...,choices=...,answer=...`. By default they are recognised by their names.",
    )
    template_format: str = option(
        "auto",
        "How conversations are rendered, as in training: `chat`, `alpaca`, `chatml`, `basic`, or `auto`. `auto` "
        "takes the chat template of each model's tokenizer, where a training keeps its format. Without one it takes "
        "`basic`.",
        choices=TEMPLATE_FORMATS,
    )
    prompt_template: str | None = option(
        None, 'With `template_format="basic"`: the template, with `{instruction}` and `{response}`.'
    )
    assistant_only_loss: bool = option(
        False,
        "Take the perplexity of conversations over the assistant's turns only, as a training with this option does.",
    )
    max_length: int | None = option(
        None,
        "Longest row in tokens. Longer rows are left out, and longer text is read in parts. By default what the "
        "model has positions for, at most 2,048.",
        least=2,
    )
    max_samples: int | None = option(
        None,
        "Number of rows to take of each dataset, drawn by the seed. They keep their order. By default all rows.",
        least=1,
    )
    generate: bool = option(False, "Also let the models answer, and score the answers: exact match, BLEU, ROUGE.")
    max_new_tokens: int = option(128, "With `generate`: the longest answer in tokens.", least=1)
    choice_prompt: str | None = option(
        None,
        "Text before the answers of a multiple-choice question, with the names of columns in braces: `Question: "
        "{question}\\nAnswer:`.",
    )
    apply_chat_template: bool = option(
        False, "Put multiple-choice questions, and those of tasks, into the chat template, as a user's turn."
    )
    batch_size: int = option(8, "Rows in a forward pass.", least=1)
    seed: int = option(
        0, "Seed of the rows that are drawn, of the bootstrap and of tasks.", least=0, most=LARGEST_SEED
    )
    bootstrap_draws: int = option(2000, "Number of draws of rows for the intervals.", least=100)

    def __post_init__(self) -> None:
        check_fields(self)
        columns = None if self.reads_choices else self.columns
        DataConfig(columns=columns, template_format=self.template_format, prompt_template=self.prompt_template)
        if self.choice_prompt is not None:
            self.choice_prompt = self.choice_prompt.replace("\\n", "\n")
            if "{" not in self.choice_prompt:
                raise FNSFTError(
                    f"choice_prompt is {self.choice_prompt!r}, the same for every row; name columns in braces, such "
                    "as {question}"
                )

    @property
    def reads_choices(self) -> bool:
        """Whether the choice of columns is one of multiple-choice questions."""
        return self.columns is not None and any(
            item.partition("=")[0].strip() in ("question", "choices", "answer") for item in self.columns.split(",")
        )
