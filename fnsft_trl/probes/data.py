"""ProbeData: what a probe scores a model on: token sequences with what of them counts."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from ..data.choices import ChoiceRow, read_choices
from ..errors import FNSFTError
from ..evaluation.choices import choice_requests
from ..evaluation.evaluation import EvaluationData, row_reader
from ..evaluation.rows import EvaluationRow, read_rows
from ..evaluation.settings import EvaluationConfig


@dataclass(frozen=True)
class Item:
    """A sequence that is read at once.

    Attributes:
        unit (`int`): what intervals are drawn over: a number of its own, or that of the question that it answers.
        ids (`list[int]`): token ids.
        scored (`tuple[int, int]`): the tokens that count: the first, at least 1, and the end.
        counts (`bool`): whether cross-entropy and KL are taken here (not at a wrong answer of a question).
        is_answer (`bool`): whether what is scored is an answer, which can be met exactly.
        choice (`int` or `None`): which answer of a multiple-choice question it is.
    """

    unit: int
    ids: list[int]
    scored: tuple[int, int]
    counts: bool = True
    is_answer: bool = False
    choice: int | None = None

    @property
    def tokens(self) -> int:
        """How many tokens are scored."""
        return self.scored[1] - self.scored[0]


@dataclass(frozen=True)
class ProbeData:
    """The items of one dataset.

    Attributes:
        name (`str`): of the data.
        items (`tuple[Item, ...]`): what is read.
        questions (`dict[int, ChoiceRow]`): unit -> multiple-choice question.
        prompts (`tuple[list[int], ...]`): token ids that the model is given to continue.
    """

    name: str
    items: tuple[Item, ...]
    questions: dict[int, ChoiceRow]
    prompts: tuple[list[int], ...]

    @classmethod
    def read(
        cls,
        part: EvaluationData,
        tokenizer: PreTrainedTokenizerBase,
        config: EvaluationConfig,
        *,
        max_tokens: int,
        max_length: int,
        prompts: int = 0,
    ) -> "ProbeData":
        """Read rows until so many tokens are there to be scored.

        Args:
            part: text, rows with answers, or multiple-choice questions.
            tokenizer: of the model.
            config: how rows are read.
            max_tokens: number of tokens to score.
            max_length: longest sequence; longer text is read in parts, longer rows are left out.
            prompts: number of prompts to continue: those of rows, or beginnings of text; a question has none.

        Raises:
            FNSFTError: nothing can be scored.
        """
        part = part.sampled(config.max_samples, config.seed)
        questions: dict[int, ChoiceRow] = {}
        if (form := part.choice_format(config)) is not None:
            rows, _ = read_choices(part.rows, form, prompt=config.choice_prompt, name=part.name)
            units = []
            for row in rows:
                units.append(_of_question(row, tokenizer, config, max_length))
                questions[row.number] = row
        else:
            read, _ = read_rows(
                part.rows, row_reader(tokenizer, config, max_length), columns=config.columns, name=part.name
            )
            pieces = [piece for row in read for piece in _of_row(row, max_length)]
            units = [[replace(piece, unit=number)] for number, piece in enumerate(pieces)]
        items, tokens = [], 0
        for unit in units:
            for item in unit:
                if tokens >= max_tokens and not questions:
                    break
                items.append(_cut(item, max_tokens - tokens) if not questions else item)
                tokens += items[-1].tokens if items[-1].counts else 0
            if tokens >= max_tokens:
                break
        kept = {item.unit for item in items}
        questions = {unit: row for unit, row in questions.items() if unit in kept}
        if not items:
            raise FNSFTError(f"{part.name} holds no token to score; give some sentences of text")
        return cls(part.name, tuple(items), questions, tuple(_prompts(items, prompts)))

    @property
    def tokens(self) -> int:
        """Number of tokens that cross-entropy and KL are means over."""
        return sum(item.tokens for item in self.items if item.counts)

    @property
    def has_answers(self) -> bool:
        """Whether there are answers to be met exactly."""
        return any(item.is_answer for item in self.items)

    @property
    def sha256(self) -> str:
        """Hash of all that is scored."""
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(f"{item.unit}:{item.ids}:{item.scored}:{item.choice}".encode())
        return digest.hexdigest()

    def batches(self, size: int) -> list[list[Item]]:
        """Items of similar length together, the longest first."""
        ordered = sorted(self.items, key=lambda item: -len(item.ids))  # stable
        return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def _of_row(row: EvaluationRow, max_length: int):
    """A row with an answer as one item, that scores the answer; text in parts."""
    if row.answer is not None:
        start, end = row.answer
        yield Item(row.number, row.ids[:end], (max(1, start), end), is_answer=True)
        return
    for start in range(0, len(row.ids), max_length):
        ids = row.ids[start : start + max_length]
        if len(ids) > 1:
            yield Item(row.number, ids, (1, len(ids)))


def _of_question(row: ChoiceRow, tokenizer, config: EvaluationConfig, max_length: int) -> list[Item]:
    requests = choice_requests(row, tokenizer, apply_chat_template=config.apply_chat_template, max_length=max_length)
    return [
        Item(row.number, ids, (max(1, len(ids) - answer), len(ids)), counts=choice == row.answer, choice=choice)
        for choice, (ids, answer) in enumerate(requests)
    ]


def _cut(item: Item, most: int) -> Item:
    """An item of text of which no more tokens are scored; an answer stays whole."""
    if item.is_answer or item.tokens <= most:
        return item
    return Item(item.unit, item.ids[: most + 1], (1, most + 1))


def _prompts(items: Sequence[Item], count: int) -> list[list[int]]:
    """What the model is given to continue: the prompt of an answer, or the first half of a text, at most 32 tokens."""
    found, seen = [], set()
    for item in items:
        if len(found) == count:
            break
        if item.unit in seen or (item.choice is not None):
            continue
        seen.add(item.unit)
        end = item.scored[0] if item.is_answer else max(1, min(32, len(item.ids) // 2))
        found.append(item.ids[:end])
    return found
