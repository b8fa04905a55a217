"""EvaluationRow: a row of a dataset as it is trained, and what a model is asked to answer in it."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..data.cells import UnusableRow, is_empty
from ..data.dialects import dialect_of
from ..data.formats import convert_row, find_formats
from ..data.left_out import LeftOut
from ..data.prompts import adds_bos, set_chat_template, teach_end, without_bos
from ..data.rendering import RENDER_ERRORS, answers_template, kwargs_of, template_arguments, tools_of
from ..errors import FNSFTError


@dataclass(frozen=True)
class EvaluationRow:
    """
    A row as SFTTrainer trains it.

    Attributes:
        number (`int`): of the row in its dataset.
        ids (`list[int]`): its token ids.
        learnt (`list[bool]`): which of them count in the loss.
        answer (`tuple[int, int]` or `None`): where the last answer begins and ends in them; `None` for text.
        prompt (`list[int]`): token ids that the model is given to answer; empty for text.
        reference (`str`): the answer that is expected, or the text.
    """

    number: int
    ids: list[int]
    learnt: list[bool]
    answer: tuple[int, int] | None
    prompt: list[int]
    reference: str

    @property
    def first(self) -> int:
        """The first token that is scored: the first that counts, but for the very first, which nothing precedes."""
        starts = [self.learnt.index(True)] if any(self.learnt) else []
        starts += [self.answer[0]] if self.answer is not None else []
        return max(1, min(starts, default=1))


class RowReader:
    """
    Reads rows of SFTTrainer's formats, by the tokenizer that they are trained with.

    Args:
        tokenizer: of the model, with the chat template that renders its rows; it is not changed.
        text_field (`str`): the column that text is read from.
        assistant_only_loss (`bool`): of conversations, whether only answers count.
        max_length (`int`, *optional*): rows of more tokens cannot be used.

    Raises:
        FNSFTError: the chat template does not mark the answers, and TRL knows none that does.
    """

    def __init__(
        self, tokenizer, *, text_field: str = "text", assistant_only_loss: bool = False, max_length: int | None = None
    ) -> None:
        self.tokenizer, self.text_field, self.max_length = tokenizer, text_field, max_length
        self.assistant_only_loss = assistant_only_loss
        self._bos = tokenizer.bos_token if adds_bos(tokenizer) else None
        self._chat_template = answers_template(tokenizer) if assistant_only_loss else None

    def read(self, row: Mapping, number: int = 0) -> EvaluationRow:
        """One row, as the trainer is given it.

        Args:
            row: with `prompt` and `completion` as text or messages, `messages`, text, or `input_ids` with `labels` or
                masks.
            number: of the row.

        Raises:
            UnusableRow: the chat template refuses it, it is too long, or nothing in it is scored.
            FNSFTError: it has no known form, or the tokenizer has no chat template for it.
        """
        if "input_ids" in row:
            found = self._of_tokens(row, number)
        elif "prompt" in row:
            found = self._prompted(row, number)
        elif "messages" in row:
            found = self._conversation(row, number)
        elif isinstance(row.get(self.text_field), str):
            found = self._text(row[self.text_field], number)
        else:
            raise FNSFTError(
                f"a row has the columns {', '.join(map(repr, row))}; expected prompt and completion, messages, "
                f"{self.text_field} or input_ids"
            )
        if self.max_length is not None and found.answer is not None and len(found.ids) > self.max_length:
            raise UnusableRow(f"a row is longer than {self.max_length} tokens (max_length)")
        if not any(found.learnt[1:]):
            raise UnusableRow("a row has no token to score after its first")
        return found

    def _rendered(self, messages: Sequence[Mapping], row: Mapping, **options) -> Mapping:
        if self.tokenizer.chat_template is None:
            raise FNSFTError("the rows are conversations, but the tokenizer has no chat template; set one on it")
        arguments = {"chat_template": self._chat_template, **template_arguments(row), **options}
        try:
            return self.tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=True, **arguments)
        except RENDER_ERRORS as error:
            raise UnusableRow(f"the chat template refuses the conversation ({error})") from error

    def _ids_of(self, text: str) -> list[int]:
        return list(self.tokenizer(text=text)["input_ids"])

    def _with_eos(self, text: str) -> str:
        eos = self.tokenizer.eos_token
        if eos is None:
            raise FNSFTError("the tokenizer has no EOS token, with which a text ends in training; set one on it")
        return text if text.endswith(eos) else text + eos

    def _prompted(self, row: Mapping, number: int) -> EvaluationRow:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str):
            before = self._ids_of(prompt)
            whole, masks = self._ids_of(prompt + self._with_eos(completion)), None
            reference = completion
        else:
            before = list(self._rendered(prompt, row, add_generation_prompt=True)["input_ids"])
            found = self._rendered([*prompt, *completion], row, return_assistant_tokens_mask=self.assistant_only_loss)
            whole, masks = list(found["input_ids"]), found.get("assistant_masks")
            reference = _content(completion[0]) if len(completion) == 1 else None
        start = common_prefix(before, whole)
        learnt = [place >= start and (masks is None or bool(masks[place])) for place in range(len(whole))]
        return EvaluationRow(
            number, whole, learnt, (start, len(whole)), before, self._text_of(reference, whole[start:])
        )

    def _conversation(self, row: Mapping, number: int) -> EvaluationRow:
        messages = row["messages"]
        found = self._rendered(messages, row, return_assistant_tokens_mask=self.assistant_only_loss)
        whole, masks = list(found["input_ids"]), found.get("assistant_masks")
        learnt = [True] * len(whole) if masks is None else [bool(mark) for mark in masks]
        last = max((place for place, message in enumerate(messages) if message["role"] == "assistant"), default=None)
        if not last:  # none, or nothing before it
            return EvaluationRow(number, whole, learnt, None, [], self.tokenizer.decode(whole))
        before = list(self._rendered(messages[:last], row, add_generation_prompt=True)["input_ids"])
        start, end = common_prefix(before, whole), len(whole)
        if last + 1 < len(messages):
            end = common_prefix(list(self._rendered(messages[: last + 1], row)["input_ids"]), whole)
        reference = self._text_of(_content(messages[last]), whole[start:end])
        return EvaluationRow(number, whole, learnt, (start, end), before, reference)

    def _text(self, text: str, number: int) -> EvaluationRow:
        text = without_bos(text, self._bos) if self._bos else text
        if is_empty(text):
            raise UnusableRow(f"{self.text_field!r} is empty")
        ids = self._ids_of(self._with_eos(text))
        return EvaluationRow(number, ids, [True] * len(ids), None, [], text)

    def _of_tokens(self, row: Mapping, number: int) -> EvaluationRow:
        ids = list(row["input_ids"])
        if row.get("labels") is not None:
            learnt = [label != -100 for label in row["labels"]]
        else:
            masks = [row[name] for name in ("completion_mask", "assistant_masks") if row.get(name) is not None]
            learnt = [all(marks) for marks in zip(*masks, strict=True)] if masks else [True] * len(ids)
        if all(learnt) or not any(learnt):
            return EvaluationRow(number, ids, learnt, None, [], self.tokenizer.decode(ids))
        end = len(learnt) - learnt[::-1].index(True)
        start = end
        while start > 0 and learnt[start - 1]:
            start -= 1
        return EvaluationRow(number, ids, learnt, (start, end), ids[:start], self._text_of(None, ids[start:end]))

    def _text_of(self, reference: str | None, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True) if reference is None else reference


def common_prefix(prompt: Sequence[int], whole: Sequence[int]) -> int:
    """How many tokens at the beginning are the same: the completion may change how the prompt's end is tokenised."""
    length = min(len(prompt), len(whole))
    return next((i for i in range(length) if prompt[i] != whole[i]), length)


def _content(message: Mapping) -> str | None:
    """The text of an answer; `None` for one with calls or parts, whose text is how it is rendered."""
    content = message.get("content")
    has_more = any(message.get(name) for name in ("tool_calls", "reasoning_content", "thinking"))
    return content if isinstance(content, str) and content.strip() and not has_more else None


def prompt_format(tokenizer, template_format: str = "auto", prompt_template: str | None = None):
    """A copy of a tokenizer with the prompt format that a training of it has.

    Args:
        tokenizer: of a model; one that was saved by a training has its format already.
        template_format, prompt_template: as in [`~fnsft_trl.data.config.DataConfig`].

    Raises:
        FNSFTError: the chat template cannot render a question and an answer, or there is no EOS token.
    """
    tokenizer = copy.deepcopy(tokenizer)
    set_chat_template(tokenizer, template_format, prompt_template)
    if tokenizer.eos_token is None:
        raise FNSFTError("the tokenizer has no EOS token, with which an answer ends; set one on it and save it")
    teach_end(tokenizer)
    return tokenizer


def read_rows(
    rows: Iterable[Mapping], reader: RowReader, *, columns: str | None = None, name: str = "the data"
) -> tuple[list[EvaluationRow], LeftOut]:
    """Rows of any known format as they are trained, as `fnsft train` converts them.

    Args:
        rows: a dataset, or a list.
        reader: by the tokenizer of the model.
        columns: which to read; recognised by their names by default.
        name: what messages call it.

    Returns:
        The rows that can be scored, and what was left out.

    Raises:
        FNSFTError: no known format, or no row that can be scored.
    """
    rows = list(rows)
    left_out = LeftOut(name, "score")
    converted = list(_converted(rows, reader, columns, left_out))
    scored = list(_read(_of_one_kind(converted), reader, left_out))
    left_out.check(len(rows))
    return scored, left_out


def check_rows(
    rows: Iterable[Mapping], reader: RowReader, *, columns: str | None = None, name: str = "the data"
) -> None:
    """See that one of the rows can be read, as [`read_rows`] does it.

    Raises:
        FNSFTError: no known format, or no row that can be scored.
    """
    rows = list(rows)
    left_out = LeftOut(name, "score")
    if next(_read(_converted(rows, reader, columns, left_out), reader, left_out), None) is None:
        left_out.check(len(rows))


def _converted(
    rows: list[Mapping], reader: RowReader, columns: str | None, left_out: LeftOut
) -> Iterator[tuple[int, dict]]:
    """Numbers and rows as SFTTrainer is given them."""
    name = left_out.name
    names = list(dict.fromkeys(column for row in rows for column in row))
    if not names:
        raise FNSFTError(f"{name} is empty; at least one row was expected")
    if found := [column for column in ("image", "images") if column in names]:
        raise FNSFTError(f"{name} has the column {found[0]!r}; only text is scored; drop it")
    try:
        matches = find_formats(names, chosen=columns, text_field=reader.text_field)
    except FNSFTError as error:
        raise FNSFTError(f"{name} {error}" if str(error).startswith("has ") else str(error)) from error
    dialect = dialect_of(reader.tokenizer)
    for number, row in enumerate(rows):
        try:
            given = {"tools": tools_of(row.get("tools"))}
            given["chat_template_kwargs"] = kwargs_of(row.get("chat_template_kwargs"))
            yield number, (convert_row(row, matches, dialect) or dict(row)) | given
        except UnusableRow as reason:
            left_out.add(number, reason)
        except FNSFTError as error:
            raise FNSFTError(f"{name}, row {number}: {error}") from error


def _read(numbered: Iterable[tuple[int, dict]], reader: RowReader, left_out: LeftOut) -> Iterator[EvaluationRow]:
    for number, row in numbered:
        try:
            yield reader.read(row, number)
        except UnusableRow as reason:
            left_out.add(number, reason)


def _of_one_kind(numbered: list[tuple[int, dict]]) -> list[tuple[int, dict]]:
    """Prompts and completions beside conversations become conversations, as in training."""
    if not any("messages" in row for _, row in numbered):
        return numbered
    return [
        (number, row | {"messages": row.pop("prompt") + row.pop("completion")} if "prompt" in row else row)
        for number, row in numbered
    ]
