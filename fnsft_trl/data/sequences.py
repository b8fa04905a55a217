"""Texts -> token sequences: what discovery and measures of language modelling read."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..errors import FNSFTError
from .cells import UnusableRow, encodable, is_empty
from .dialects import dialect_of
from .formats import convert_row, find_formats
from .left_out import LeftOut
from .messages import Dialect, read_messages
from .prompts import adds_bos, without_bos
from .rendering import RENDER_ERRORS, rendering, template_arguments


_RUN = 4  # sequences of a long text that stay together in one half


@dataclass
class TokenSequence:
    """One sequence to read.

    Attributes:
        ids (`list[int]`): token ids.
        half (`int`): 0 or 1, the half of the calibration text that it belongs to.
    """

    ids: list[int]
    half: int


def text_token_ids(text, tokenizer, dialect: Dialect | None = None) -> list[int]:
    """Token ids of one text, as a model is trained on it.

    A BOS token that a text begins with is not written twice. A conversation is put through the chat template, with
    the tools and settings of its row.

    Args:
        text: a string; a conversation (list of messages with `role` and `content`, or as [`read_messages`] takes
            them); or a row of a dataset in one of the formats of [`~fnsft_trl.data.formats`].
        tokenizer: the model's tokenizer.
        dialect: of its chat template, found out by default.

    Raises:
        UnusableRow: nothing is in it, or the chat template refuses it.
        FNSFTError: the text has none of these forms, or the tokenizer has no chat template for a conversation.
    """
    if isinstance(text, str):
        return _string_ids(text, tokenizer)
    if isinstance(text, Mapping):
        return _row_ids(text, tokenizer, dialect)
    if isinstance(text, Sequence) and text and all(isinstance(message, Mapping) for message in text):
        return _conversation_ids(list(text), "a conversation", {}, tokenizer, dialect)
    if is_empty(text):
        raise UnusableRow("a text is empty")
    raise FNSFTError(
        f"a text of type {type(text).__name__} is not understood; expected a string or a list of messages"
    )


def trained_part(row: Mapping, text_field: str = "text"):
    """What SFTTrainer trains of a row that it is given: the row itself, or the text in this column of it."""
    has_conversation = any(isinstance(row.get(name), list) for name in ("messages", "conversations"))
    return row if has_conversation or row.keys() & {"input_ids", "prompt"} else row.get(text_field, row)


def compared_part(row: Mapping, text_field: str = "text"):
    """What trainers other than SFTTrainer read of a row. Of preferences it is the prompt with the chosen answer. Of
    prompts that are answered in training it is the prompt. Of any other row it is what SFTTrainer trains."""
    prompt = row.get("prompt")
    if "chosen" in row:
        return row["chosen"] if prompt is None else {"prompt": prompt, "completion": row["chosen"]}
    return prompt if prompt is not None and "completion" not in row else trained_part(row, text_field)


def _string_ids(text: str, tokenizer) -> list[int]:
    bos = tokenizer.bos_token
    if bos and text.startswith(bos) and adds_bos(tokenizer):
        text = without_bos(text, bos)
    return tokenizer(encodable(text, "a text"))["input_ids"]


def _row_ids(row: Mapping, tokenizer, dialect: Dialect | None) -> list[int]:
    """Which column is read first is as in SFTTrainer, which is given such a row."""
    if "input_ids" in row:
        return list(row["input_ids"])
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation_ids(prompt + completion, "a prompt", row, tokenizer, dialect)
    if isinstance(prompt, str) and isinstance(completion, str):
        return _string_ids(prompt + completion, tokenizer)
    for name in ("messages", "conversations"):
        if isinstance(row.get(name), list | Mapping):
            return _conversation_ids(row[name], name, row, tokenizer, dialect)
    if "text" in row:
        return text_token_ids(row["text"], tokenizer)
    try:
        converted = convert_row(row, find_formats(row))
    except UnusableRow:
        raise
    except FNSFTError as error:
        raise FNSFTError(f"a row {error}") from error
    return _row_ids({**row, **converted}, tokenizer, dialect)


def _conversation_ids(messages, name: str, row: Mapping, tokenizer, dialect: Dialect | None) -> list[int]:
    if tokenizer.chat_template is None:
        raise FNSFTError("the texts are conversations, but the tokenizer has no chat template; set one on it")
    messages = read_messages(messages, name, dialect or dialect_of(tokenizer))
    if not messages:
        raise UnusableRow(f"{name!r} has no message")
    arguments = template_arguments(row)
    with rendering():
        try:
            return tokenizer.apply_chat_template(messages, return_dict=True, **arguments)["input_ids"]
        except RENDER_ERRORS as error:
            raise UnusableRow(f"the chat template refuses the conversation ({error})") from error


def several(texts: Iterable, name: str) -> Iterable:
    """Texts as they are.

    Raises:
        FNSFTError: they are one text, of which each character would count as one, or nothing that holds any.
    """
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise FNSFTError(f"{name} is a {type(texts).__name__}; expected several texts, such as a list of them")
    return texts


def token_sequences(texts: Iterable, tokenizer, *, max_length: int, name: str = "the text") -> Iterator[TokenSequence]:
    """Tokenise texts, cutting long ones into sequences of at most `max_length` tokens.

    Each text, or each run of four sequences of a long one, goes as a whole to the half that has fewer tokens so far.
    So the halves stay equally large and share no passage. Texts that cannot be used are left out, and counted.

    Raises:
        FNSFTError: no text can be used, or one is of no known form; or they are one text, or nothing.
    """
    tokens = [0, 0]
    dialect = dialect_of(tokenizer)
    left_out = LeftOut(name, "read")
    number = -1
    for number, text in enumerate(several(texts, name)):
        try:
            ids = text_token_ids(text, tokenizer, dialect)
        except UnusableRow as reason:
            left_out.add_and_say(number, reason)
            continue
        for first in range(0, len(ids), _RUN * max_length):
            run = ids[first : first + _RUN * max_length]
            half = int(tokens[1] < tokens[0])
            tokens[half] += len(run)
            for start in range(0, len(run), max_length):
                yield TokenSequence(run[start : start + max_length], half)
    left_out.check(number + 1)


def two_parts(
    texts: Iterable, tokenizer, wanted: tuple[int, int], *, lengths: Sequence[int] = (256, 32), name: str = "the text"
) -> tuple[list[list[int]], list[list[int]]]:
    """Two disjoint parts of texts, as sequences of more than one token.

    Args:
        texts, tokenizer, name: as for [`token_sequences`].
        wanted: how many tokens of each part, all but the first of each sequence counted.
        lengths: longest sequence; the later ones are for texts that are too short for those before.

    Raises:
        FNSFTError: no text can be used, or it is too short for two parts.
    """
    for length in lengths:
        parts: tuple[list[list[int]], list[list[int]]] = ([], [])
        for sequence in token_sequences(texts, tokenizer, max_length=length, name=name):
            part = parts[sequence.half]
            left = wanted[sequence.half] - sum(len(ids) - 1 for ids in part)
            if len(sequence.ids) > 1 and left > 0:
                part.append(sequence.ids[: left + 1])
        if all(parts):
            return parts
    raise FNSFTError(f"{name} is too short to be split into two parts; give some paragraphs")
