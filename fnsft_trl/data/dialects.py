"""What the chat template of a tokenizer reads of messages, found out from the template."""

import re

from .messages import PLAIN, TURN_KEYS, Dialect
from .rendering import RENDER_ERRORS, rendering


_PROBE, _KEY = "probe_of_a_call", "probe_of_a_key"
_ARGUMENTS = {dict: {_KEY: "a"}, str: f'{{"{_KEY}": "a"}}'}


def dialect_of(tokenizer) -> Dialect:
    """What a tokenizer's chat template reads; the plain dialect where it has none.

    Args:
        tokenizer: a tokenizer or a processor.
    """
    if tokenizer.chat_template is None:
        return PLAIN
    named = re.findall(r"""["'](\w+)["']|\.(\w+)""", str(tokenizer.chat_template))
    clear = {kind: _call(tokenizer, arguments) for kind, arguments in _ARGUMENTS.items()}
    taken = [kind for kind, rendered in clear.items() if _is_plain(rendered)]
    return Dialect(
        keys=TURN_KEYS | {quoted or attribute for quoted, attribute in named},
        writes_calls=any(_PROBE in rendered for rendered in clear.values()),
        arguments=taken[0] if len(taken) == 1 else None,
    )


def _call(tokenizer, arguments: dict | str) -> str:
    """A call of a tool as the chat template writes it; nothing where it refuses it."""
    call = {"id": "123456789", "type": "function", "function": {"name": _PROBE, "arguments": arguments}}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    with rendering():
        try:
            return tokenizer.apply_chat_template(turns, tokenize=False)
        except RENDER_ERRORS:
            return ""


def _is_plain(rendered: str) -> bool:
    """Whether the arguments of a call stand there, not as text within JSON and not as Python spells them."""
    return _KEY in rendered and f'\\"{_KEY}' not in rendered and f"'{_KEY}'" not in rendered
