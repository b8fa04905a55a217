"""What the chat template of a tokenizer reads of messages, found out from the template."""

import re

from .messages import PLAIN, TURN_KEYS, Dialect
from .rendering import RENDER_ERRORS, rendering


_PROBE = "probe_of_a_call"


def dialect_of(tokenizer) -> Dialect:
    """What a tokenizer's chat template reads; the plain dialect where it has none.

    Args:
        tokenizer: a tokenizer or a processor.
    """
    if tokenizer.chat_template is None:
        return PLAIN
    named = re.findall(r"""["'](\w+)["']|\.(\w+)""", str(tokenizer.chat_template))
    return Dialect(
        keys=TURN_KEYS | {quoted or attribute for quoted, attribute in named},
        writes_calls=any(_writes_call(tokenizer, arguments) for arguments in ({}, "{}")),
    )


def _writes_call(tokenizer, arguments: dict | str) -> bool:
    call = {"id": "123456789", "type": "function", "function": {"name": _PROBE, "arguments": arguments}}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    with rendering():
        try:
            return _PROBE in tokenizer.apply_chat_template(turns, tokenize=False)
        except RENDER_ERRORS:
            return False
