"""ChoiceRow: a question with its possible answers, and the shapes that published sets of such questions have."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..errors import FNSFTError
from .cells import UnusableRow, is_empty, text_of
from .left_out import LeftOut


@dataclass(frozen=True)
class ChoiceRow:
    """
    A question with its possible answers.

    Attributes:
        number (`int`): of the row in its dataset.
        question (`str`): what stands before an answer.
        choices (`tuple[str, ...]`): the answers.
        answer (`int`): number of the right one, from 0.
    """

    number: int
    question: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class ChoiceFormat:
    """
    One way to name the columns of multiple-choice questions.

    Attributes:
        question (`str`): what stands before an answer, with the names of columns in braces.
        choices (`tuple[str, ...]`): columns of the answers: one with all of them (a list, a struct of `text` and
            `label`, a mapping of letters, or text with a letter at the beginning of each line), or one for each.
        answer (`str`): column of the right one: its text, its letter or its number.
        first (`int`): the number of the first answer.
        is_last (`bool`): whether the answer column is itself the last of the answers, and the right one.
    """

    question: str
    choices: tuple[str, ...]
    answer: str
    first: int = 0
    is_last: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns of the format."""
        return (*re.findall(r"\{(\w+)\}", self.question), *self.choices, self.answer)


_QUESTION = "Question: {question}\nAnswer:"
_WITH_CONTEXT = "{context}\nQuestion: {question}\nAnswer:"
_OPTIONS = ("opa", "opb", "opc", "opd")

# The first one whose columns a dataset has is taken.
CHOICE_FORMATS = (
    ChoiceFormat(_QUESTION.replace("question}", "question_stem}"), ("choices",), "answerKey"),
    ChoiceFormat(_QUESTION, ("choices",), "answerKey"),
    ChoiceFormat("{article}\nQuestion: {question}\nAnswer:", ("options",), "answer"),
    ChoiceFormat(_WITH_CONTEXT, ("answerA", "answerB", "answerC"), "label", first=1),
    ChoiceFormat(_WITH_CONTEXT, ("options",), "answer"),
    ChoiceFormat("Question: {goal}\nAnswer:", ("sol1", "sol2"), "label"),
    ChoiceFormat("{ctx}", ("endings",), "label"),
    ChoiceFormat(_QUESTION, _OPTIONS, "cop"),
    ChoiceFormat(
        "{support}\nQuestion: {question}\nAnswer:",
        ("distractor1", "distractor2", "distractor3", "correct_answer"),
        "correct_answer",
        is_last=True,
    ),
    ChoiceFormat(_QUESTION, ("options",), "answer_idx"),
    ChoiceFormat(_QUESTION, ("options",), "answer"),
    ChoiceFormat(_QUESTION, ("choices",), "answer"),
    ChoiceFormat(_QUESTION, ("choices",), "label"),
)


def find_choice_format(columns: Iterable[str]) -> ChoiceFormat | None:
    """The format whose columns a dataset has; `None` if it holds no multiple-choice questions."""
    found = set(columns)
    return next((form for form in CHOICE_FORMATS if set(form.columns) <= found), None)


def chosen_choice_format(columns: str, found: Iterable[str]) -> ChoiceFormat | None:
    """The format that a choice of columns asks for, `question=...,choices=...,answer=...`; `None` if it asks for none.

    Raises:
        FNSFTError: one of the three is missing, or the dataset does not have the column.
    """
    pairs = dict(item.partition("=")[::2] for item in columns.replace(" ", "").split(",") if item)
    if not pairs.keys() & {"question", "choices", "answer"}:
        return None
    if pairs.keys() != {"question", "choices", "answer"}:
        raise FNSFTError(
            f"columns is {columns!r}; of multiple-choice questions write question=COLUMN,choices=COLUMN,answer=COLUMN"
        )
    if missing := [name for name in pairs.values() if name not in set(found)]:
        raise FNSFTError(f"there is no column {missing[0]!r} (there are {', '.join(map(repr, found))})")
    return ChoiceFormat(f"Question: {{{pairs['question']}}}\nAnswer:", (pairs["choices"],), pairs["answer"])


def read_choices(
    rows: Iterable[Mapping], form: ChoiceFormat, *, prompt: str | None = None, name: str = "the data"
) -> tuple[list[ChoiceRow], LeftOut]:
    """Multiple-choice questions of a dataset.

    Args:
        rows: of the dataset.
        form: how its columns are named.
        prompt: what stands before an answer, with the names of columns in braces, instead of that of the format.
        name: what messages call the dataset.

    Returns:
        The questions, and what was left out.

    Raises:
        FNSFTError: no question can be used.
    """
    rows = list(rows)
    left_out = LeftOut(name, "score")
    found = list(_usable(rows, form, prompt, left_out))
    left_out.check(len(rows))
    return found, left_out


def check_choices(
    rows: Iterable[Mapping], form: ChoiceFormat, *, prompt: str | None = None, name: str = "the data"
) -> None:
    """See that one of the questions can be used, as [`read_choices`] does it.

    Raises:
        FNSFTError: none can.
    """
    rows = list(rows)
    left_out = LeftOut(name, "score")
    if next(_usable(rows, form, prompt, left_out), None) is None:
        left_out.check(len(rows))


def _usable(rows: list[Mapping], form: ChoiceFormat, prompt: str | None, left_out: LeftOut) -> Iterator[ChoiceRow]:
    for number, row in enumerate(rows):
        try:
            yield _choice_row(row, number, form, prompt or form.question)
        except UnusableRow as reason:
            left_out.add(number, reason)


def _choice_row(row: Mapping, number: int, form: ChoiceFormat, prompt: str) -> ChoiceRow:
    labels, choices = _labelled(row, form)
    if len(choices) < 2:
        raise UnusableRow(f"{form.choices[0]!r} holds {len(choices)} answers; at least two were expected")
    if any(is_empty(choice) for choice in choices):
        raise UnusableRow(f"an answer of {form.choices[0]!r} is empty")
    names = re.findall(r"\{(\w+)\}", prompt)
    cells = {name: text_of(row.get(name), repr(name)) for name in names}
    if all(is_empty(text) for text in cells.values()):
        raise UnusableRow(f"{names[0]!r} is empty")
    question = re.sub(r"\{(\w+)\}", lambda match: cells[match[1]], prompt)
    return ChoiceRow(number, question, tuple(choices), _answer(row, form, labels, choices))


def _labelled(row: Mapping, form: ChoiceFormat) -> tuple[list[str], list[str]]:
    """The labels of the answers, as far as they have some, and the answers."""
    if len(form.choices) > 1:
        return [], [text_of(row.get(name), repr(name)) for name in form.choices]
    (name,) = form.choices
    value = row.get(name)
    if isinstance(value, str):
        lines = [re.match(r"\s*\(?([A-Z])[.):]\s*(.*\S)\s*$", line) for line in value.splitlines() if line.strip()]
        if not all(lines):
            raise UnusableRow(f"{name!r} is text without a letter at the beginning of each line")
        return [line[1] for line in lines], [line[2] for line in lines]
    if isinstance(value, Mapping) and isinstance(value.get("text"), Sequence):
        return [str(label) for label in value.get("label") or []], [
            text_of(text, repr(name)) for text in value["text"]
        ]
    if isinstance(value, Mapping):
        given = {key: text for key, text in value.items() if text is not None}
        return list(given), [text_of(text, repr(name)) for text in given.values()]
    if isinstance(value, Sequence) and value and all(isinstance(item, Mapping) for item in value):
        texts = [text_of(item.get("text"), repr(name)) for item in value]
        return [str(item["label"]) for item in value if item.get("label") is not None], texts
    if isinstance(value, Sequence):
        return [], [text_of(text, repr(name)) for text in value]
    raise UnusableRow(f"{name!r} holds no answers")


def _answer(row: Mapping, form: ChoiceFormat, labels: list[str], choices: list[str]) -> int:
    """The number of the right answer: by its label, its text, its letter or its number."""
    if form.is_last:
        return len(choices) - 1
    value = row.get(form.answer)
    if is_empty(value):
        raise UnusableRow(f"{form.answer!r} is empty")
    text = text_of(int(value) if isinstance(value, bool) else value, repr(form.answer)).strip()
    letters = [chr(ord("A") + place) for place in range(len(choices))]
    lettered = re.match(r"\(?([A-Z])[.):]\s", text)
    for names, wanted in ((labels, text), (choices, text), (letters, text), (letters, lettered and lettered[1])):
        if wanted in names:
            return names.index(wanted)
    if re.fullmatch(r"-?\d+", text) and 0 <= int(text) - form.first < len(choices):
        return int(text) - form.first
    raise UnusableRow(f"{form.answer!r} is none of the answers")
