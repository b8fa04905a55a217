"""TaskConfig: a task of a sequence: its data, what is asked and answered, how that is scored. Free of torch."""

from dataclasses import dataclass, field
from string import Formatter

from ..errors import FNSFTError
from ..fields import check_fields, documented, option


SCORERS = ("exact_match", "choice", "rouge_l", "similarity")


@documented
@dataclass
class TaskConfig:
    """
    One task of a sequence.

    Raises:
        FNSFTError: a value that its field does not take, or one that has no effect beside the others.
    """

    dataset: str = option(
        "",
        "A Hub id, a directory, a file (.json, .jsonl, .csv, .parquet), or `embedded:NAME`, a task of embedded "
        "questions (routing, subjects, units).",
    )
    dataset_config: str | None = option(None, "Configuration of a Hub dataset.")
    data_files: str | None = option(None, "A file of the dataset, or a pattern, that alone is read for training.")
    test_data_files: str | None = option(None, "The same for scoring, where it is another file.")
    train_split: str = option("train", "The split that is trained.")
    test_split: str = option(
        "test", "The split that is scored; the same as `train_split` to score rows of it that are not trained."
    )
    prompt: str = option("{prompt}", "What is asked, with the names of columns in braces.")
    answer: str = option("{completion}", "What is to be answered: a column in braces, or text with columns in it.")
    scorer: str = option(
        "exact_match",
        "`exact_match`: the share of rows of which the greedy answer is the expected one as a whole; `choice`: the "
        "share of which that is the likeliest of all `labels`; `rouge_l` and `similarity` (of characters): how near "
        "the generated answer comes.",
        choices=SCORERS,
    )
    train_rows: int | None = option(None, "Rows that are trained, drawn once; all by default.", least=1)
    test_rows: int = option(500, "Rows that are scored, drawn once.", least=1)
    epochs: float | None = option(
        None, "Epochs of the stage that trains it alone, in the place of `num_train_epochs`.", above=0
    )
    max_characters: int | None = option(None, "Longer texts of a column are cut here in the prompt.", least=1)
    max_new_tokens: int = option(64, "With `rouge_l` and `similarity`: the longest answer in tokens.", least=1)
    labels: dict[str, str] | None = field(
        default=None,
        metadata={"help": "Value in the data -> text of the answer, where the answer is one column."},
    )

    def __post_init__(self) -> None:
        labels = self.labels
        self.labels = None
        check_fields(self)
        if not self.dataset:
            raise FNSFTError("a task has no dataset; give dataset, a Hub id, a file or embedded:NAME")
        for name in ("prompt", "answer"):
            if not self._columns(name):
                raise FNSFTError(
                    f"{name} is {getattr(self, name)!r}, which names no column of the data; write {{COLUMN}} in it"
                )
        if labels is not None:
            self.labels = self._checked(labels)
        if self.scorer == "choice" and self.labels is None and not self.has_plain_answer:
            raise FNSFTError("scorer is choice, and there is nothing to choose from; give labels")

    @property
    def has_plain_answer(self) -> bool:
        """Whether the answer is one column as it is."""
        return self.answer == f"{{{self._columns('answer')[0]}}}"

    @property
    def columns(self) -> list[str]:
        """The columns that are read."""
        return list(dict.fromkeys([*self._columns("prompt"), *self._columns("answer")]))

    def _columns(self, name: str) -> list[str]:
        text = getattr(self, name)
        try:
            parts = list(Formatter().parse(text))
        except ValueError as error:
            raise FNSFTError(f"{name} is {text!r}: {error}; double a brace that is text") from error
        for _, column, form, conversion in parts:
            if column is not None and (not column or form or conversion):
                raise FNSFTError(
                    f"{name} is {text!r}: braces hold the name of a column and nothing else; double a brace that is "
                    "text"
                )
        return [column for _, column, _, _ in parts if column]

    def _checked(self, labels: dict) -> dict[str, str]:
        is_mapping = isinstance(labels, dict) and labels
        if not is_mapping or not all(isinstance(text, str) and text.strip() for text in labels.values()):
            raise FNSFTError(f"labels is {labels!r}; it must be a mapping of values in the data to texts")
        if not self.has_plain_answer:
            raise FNSFTError(f"labels are those of one column, and answer is {self.answer!r}; name a column alone")
        return {str(value): text for value, text in labels.items()}
