"""The messages of a conversation, as published datasets write them -> as chat templates read them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from ..json_text import from_json
from .cells import UnusableRow, is_empty, is_parts, text_of, without_nulls
from .turns import by_rows, by_turns


ROLES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "ai", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "tool_response", "ipython"), "tool"),
} | {role: role for role in ("system", "developer", "user", "assistant", "tool")}
# What chat templates read of a turn beside its role and its content.
TURN_KEYS = frozenset(
    [
        *("name", "tool_calls", "tool_call_id", "tool_plan", "tool_responses", "function_call", "citations"),
        *("reasoning_content", "reasoning", "thinking", "channel", "recipient", "prefix"),
    ]
)

_NAMES = ("role", "from", "content", "value", "text")


@dataclass(frozen=True)
class Dialect:
    """What a chat template reads of a turn.

    Attributes:
        keys (`frozenset[str]`): what is kept beside role and content. Whatever else a dataset says about a turn (who
            wrote it, from where, when) is in no text, and goes no further.
        writes_calls (`bool`): whether calls of tools are written.
        arguments (`type`, *optional*): what the arguments of a call are for it, `dict` or `str` (their JSON); `None`
            where it takes both.
        keeps_parts (`bool`): whether a content in parts stays one, because images belong between them.
    """

    keys: frozenset[str] = TURN_KEYS
    writes_calls: bool = True
    arguments: type | None = None
    keeps_parts: bool = False


PLAIN = Dialect()


def read_messages(value, name: str, dialect: Dialect = PLAIN) -> list[dict]:
    """Messages with role and content, whatever names and roles they came with.

    A key that is null is no key, a content in parts is its text, and a system turn without text is none.

    Args:
        value: in one of the shapes of [`by_turns`].
        name: the column, for messages.
        dialect: what the chat template reads.

    Raises:
        UnusableRow: it is no conversation, a turn of the user or an answer has no text, a content is no text, or a
            role is not known.
    """
    messages = by_turns(value)
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise UnusableRow(
            f"{name!r} holds a {type(value).__name__}; expected a list of messages (role and content), of texts that "
            "take turns, or of exchanges (input and output), a JSON text of one, or a transcript (Human: ..., "
            "Assistant: ...)"
        )
    turns = (_turn(message, name, dialect) for message in messages)
    return [turn for turn in turns if turn is not None]


def turns_to_answer(value) -> int:
    """The number of turns up to the last answer with text or calls; 0 of anything else than such messages."""
    messages = by_turns(value)
    if not isinstance(messages, list):
        return 0
    numbered = ((n, m) for n, m in enumerate(messages, 1) if isinstance(m, Mapping) and role_of(m) == "assistant")
    return max((n for n, message in numbered if message.get("tool_calls") or not is_empty(_said(message))), default=0)


def role_of(message: Mapping) -> str | None:
    """The role of a message by its usual name; `None` of one that has no known role."""
    return ROLES.get(str(message.get("role") or message.get("from")).lower())


def _said(message: Mapping):
    said = (message.get(key) for key in ("content", "value", "text"))
    return next((content for content in said if content is not None), None)


def unread_keys(value, dialect: Dialect) -> set[str]:
    """The keys of messages that are in no text."""
    messages = by_turns(value)
    if not isinstance(messages, list):
        return set()
    filled = {
        key
        for message in messages
        if isinstance(message, Mapping)
        for key, item in message.items()
        if item is not None and item != []
    }
    read = dialect.keys if dialect.writes_calls else dialect.keys - {"tool_calls"}
    return filled - read - set(_NAMES)


def _turn(message: Mapping, name: str, dialect: Dialect) -> dict | None:
    role = role_of(message)
    if role is None:
        said = message.get("role") or message.get("from")
        raise UnusableRow(f"{name!r} has a message of the role {said!r}; expected one of: {', '.join(ROLES)}")
    kept = dialect.keys.difference(_NAMES)
    rest = {key: without_nulls(item) for key, item in message.items() if key in kept and item is not None}
    if not rest.get("tool_calls", True):
        del rest["tool_calls"]
    elif "tool_calls" in rest and dialect.arguments is not None:
        rest["tool_calls"] = _calls(rest["tool_calls"], dialect.arguments)
    content = _content(_said(message), f"{name!r}", dialect)
    if is_empty(content):
        if role in ("system", "developer"):
            return None
        if role == "assistant" and not rest.keys() & {"tool_calls", "function_call"}:
            raise UnusableRow(f"{name!r} has an answer without text")
        if role == "user":
            raise UnusableRow(f"{name!r} has a turn of the user without text")
        content = ""
    return {"role": role, "content": content, **rest}


def _content(value, name: str, dialect: Dialect):
    value = by_rows(value)
    if isinstance(value, Mapping):
        value = [value]  # its only part
    if isinstance(value, list) and value and not is_parts(value):
        raise UnusableRow(f"{name} has a content that is a list or a struct of something else than texts")
    if dialect.keeps_parts and is_parts(value):
        return without_nulls(value)
    return text_of(value, name) if value != [] else ""


def _calls(calls, kind: type):
    """Calls of tools whose arguments are of this kind; what cannot be made so stays as it is."""
    if isinstance(calls, list):
        return [_calls(call, kind) for call in calls]
    if not isinstance(calls, Mapping):
        return calls
    changed = {}
    for key, value in calls.items():
        if key == "function":
            changed[key] = _calls(value, kind)
        elif key == "arguments" and kind is str and isinstance(value, Mapping):
            changed[key] = json.dumps(value, ensure_ascii=False)
        elif key == "arguments" and kind is dict and isinstance(value, str):
            changed[key] = _object(value)
    return {**calls, **changed}


def _object(text: str):
    try:
        value = from_json(text)
    except ValueError:
        return text
    return value if isinstance(value, dict) else text
