"""Texts -> token sequences: what discovery and measures of language modelling read."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..errors import FNSFTError
from .formats import UnusableRow, convert_row, find_formats, read_messages


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


def text_token_ids(text, tokenizer) -> list[int]:
    """Token ids of one text.

    Args:
        text: a string; a conversation (list of messages with `role` and `content`, put through the chat template); or
            a row of a dataset in one of the formats of [`~fnsft_trl.data.formats`].
        tokenizer: the model's tokenizer.

    Raises:
        FNSFTError: the text has none of these forms.
    """
    if isinstance(text, str):
        return tokenizer(text)["input_ids"]
    if isinstance(text, Sequence) and text and all(isinstance(message, dict) for message in text):
        if tokenizer.chat_template is None:
            raise FNSFTError("the texts are conversations, but the tokenizer has no chat template; set one on it")
        return tokenizer.apply_chat_template(list(text), return_dict=True)["input_ids"]
    if isinstance(text, dict):
        if "input_ids" in text:
            return list(text["input_ids"])
        if (turns := text.get("messages") or text.get("conversations")) is not None:
            return text_token_ids(read_messages(turns, "a row for the discovery"), tokenizer)
        if "prompt" in text and "completion" in text:
            return text_token_ids(text["prompt"] + text["completion"], tokenizer)  # as TRL trains them
        if "text" in text:
            return text_token_ids(text["text"], tokenizer)
        try:
            row = convert_row(text, find_formats(text))
        except UnusableRow as missing:
            raise FNSFTError(f"a row for the discovery has nothing in {missing.args[0]!r}; leave it out") from missing
        except FNSFTError as error:
            raise FNSFTError(f"a row for the discovery {error}") from error
        return text_token_ids(row["prompt"] + row["completion"], tokenizer)
    raise FNSFTError(
        f"a text of type {type(text).__name__} is not understood; expected a string or a list of messages"
    )


def token_sequences(texts: Iterable, tokenizer, *, max_length: int) -> Iterator[TokenSequence]:
    """Tokenise texts, cutting long ones into sequences of at most `max_length` tokens.

    Each text, or each run of four sequences of a long one, goes as a whole to the half that has fewer tokens so far:
    the halves stay equally large and share no passage.
    """
    tokens = [0, 0]
    for text in texts:
        ids = text_token_ids(text, tokenizer)
        for first in range(0, len(ids), _RUN * max_length):
            run = ids[first : first + _RUN * max_length]
            half = int(tokens[1] < tokens[0])
            tokens[half] += len(run)
            for start in range(0, len(run), max_length):
                yield TokenSequence(run[start : start + max_length], half)
