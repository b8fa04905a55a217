"""The shapes that datasets hold a conversation in -> a list of messages, as they came."""

import re
from collections.abc import Mapping

from ..json_text import from_json


# The two columns of one exchange, in sets that hold a list of these.
_EXCHANGES = (
    *(("input", "output"), ("user", "assistant"), ("human", "assistant"), ("human", "gpt"), ("user", "bot")),
    *(("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("instruction", "response")),
)
# How one text holds several turns: what stands before each of them.
_TRANSCRIPTS = tuple(
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        r"<\|im_start\|>(system|user|assistant|tool)\n",
        r"\[\|(Human|AI|System)\|\]",
        r"### ?(System|Human|User|Assistant):",
        r"(?:\A|\n\n)(System|Human|Assistant):",
        r"^(SYSTEM|USER|ASSISTANT|FUNCTION RESPONSE):",
    )
)
_SPEAKERS = {"function response": "tool"}
_ENDS = ("<|im_end|>", "<|endoftext|>", "</s>")  # of a turn, which the chat template writes itself


def by_turns(value):
    """The messages of a conversation; what has none of these shapes is given back as it is.

    Args:
        value: a list of messages, or a struct of its columns. A list of texts that take turns, the user's first. A
            list of exchanges (`input` and `output`, ...). A JSON text of one of these. Or a transcript with the
            speaker before each turn.
    """
    if isinstance(value, str):
        value = _read(value)
    value = by_rows(value)
    if not isinstance(value, list) or not value:
        return value
    if all(isinstance(item, str | None) for item in value):
        return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(value)]
    if all(isinstance(item, Mapping) and not item.keys() & {"role", "from"} for item in value):
        for question, answer in _EXCHANGES:
            if all(question in item and answer in item for item in value):
                both = ((("user", item[question]), ("assistant", item[answer])) for item in value)
                return [{"role": role, "content": text} for exchange in both for role, text in exchange]
    return value


def by_rows(value):
    """A list of structs, of one that is a struct of lists."""
    if not isinstance(value, Mapping) or not all(isinstance(cells, list) for cells in value.values()):
        return value
    if len({len(cells) for cells in value.values()}) == 1:
        return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
    return value


def _read(text: str):
    if text.lstrip()[:1] in ("[", "{"):
        try:
            return from_json(text)
        except ValueError:
            pass  # [|Human|] begins like a list
    return _transcript(text)


def _transcript(text: str):
    """The turns of a transcript, whose first words may be those of nobody; the text itself if it is none."""
    found = [(match.start(), style) for style in _TRANSCRIPTS if (match := style.search(text))]
    if not found:
        return text
    before, *parts = min(found, key=lambda item: item[0])[1].split(text)
    turns = [("system", before), *zip(parts[::2], parts[1::2], strict=True)]
    said = [
        {"role": _SPEAKERS.get(speaker.lower(), speaker.lower()), "content": _without_end(content)}
        for speaker, content in turns
    ]
    return said[:-1] if not said[-1]["content"] else said  # the speaker alone, for whose words it was cut


def _without_end(content: str) -> str:
    content = content.strip()
    while end := next((end for end in _ENDS if content.endswith(end)), None):
        content = content.removesuffix(end).strip()
    return content
