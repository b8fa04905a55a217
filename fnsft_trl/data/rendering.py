"""What a chat template is given of a row beside its messages, and what may come of it."""

import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from jinja2 import TemplateError
from transformers import ProcessorMixin

from ..errors import FNSFTError
from ..json_text import from_json
from .cells import UnusableRow, is_empty, without_nulls


# A template raises the first of these to refuse a row; the others come of what it does with values it is not made for.
RENDER_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


_LONGEST = 30.0  # seconds that a conversation may take


class _TooLong(BaseException):  # which nobody takes for a row that the template refuses
    pass


@contextmanager
def rendering() -> Iterator[None]:
    """Bound the time of a chat template, which may loop for hours; where that can be done, in the main thread.

    Raises:
        FNSFTError: it takes too long.
    """
    is_here = threading.current_thread() is threading.main_thread() and os.name == "posix"
    if not is_here or signal.getsignal(signal.SIGALRM) not in (signal.SIG_DFL, None):
        yield
        return

    def stop(number, frame):
        raise _TooLong

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, _LONGEST)
    try:
        yield
    except _TooLong as error:
        raise FNSFTError(
            f"the chat template took more than {_LONGEST:g} s for one conversation; it may loop without end: set "
            "another one (template_format, prompt_template)"
        ) from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def tools_of(value) -> str | None:
    """The tools of a row as JSON, which TRL reads: in a table, each of them would have the keys of all.

    Raises:
        UnusableRow: they are a text that is no JSON.
    """
    if not isinstance(value, str):
        return None if value is None else json.dumps(without_nulls(value), ensure_ascii=False)
    if is_empty(value):
        return None
    _json(value, "tools")
    return value


def kwargs_of(value) -> dict:
    """What a row sets for the chat template.

    Raises:
        UnusableRow: it is no struct, and no JSON of one.
    """
    if isinstance(value, str) and not is_empty(value):
        value = _json(value, "chat_template_kwargs")
    if not is_empty(value) and not isinstance(value, Mapping):
        raise UnusableRow(f"'chat_template_kwargs' holds a {type(value).__name__}; expected a struct")
    return without_nulls(value or {})


def _json(text: str, name: str):
    try:
        return from_json(text)
    except ValueError as error:
        raise UnusableRow(f"{name!r} is no JSON") from error


def template_arguments(row: Mapping) -> dict:
    """What `apply_chat_template` is given for a row beside its messages, as SFTTrainer does."""
    tools = tools_of(row.get("tools"))
    return {"tools": None if tools is None else from_json(tools), **kwargs_of(row.get("chat_template_kwargs"))}


def answers_template(processing_class) -> str | None:
    """The chat template that TRL trains answers alone with (`assistant_only_loss`), where it is another one than that
    of the tokenizer, which does not mark them.

    Args:
        processing_class: a tokenizer or a processor.

    Raises:
        FNSFTError: it does not mark them, and TRL knows none that does.
    """
    from trl import get_training_chat_template

    if "endgeneration" in str(processing_class.chat_template):
        return None
    try:
        return get_training_chat_template(processing_class)
    except ValueError as error:
        raise FNSFTError(
            "assistant_only_loss needs a chat template that marks the answers (by generation), and neither the "
            "tokenizer nor TRL has one; set template_format to alpaca, chatml or basic, give such a template with "
            "chat_template_path, or drop assistant_only_loss"
        ) from error


def refusal(row: Mapping, processing_class, chat_template: str | None = None) -> str | None:
    """Why the chat template cannot render a row, as SFTTrainer gives it; `None` if it can.

    Args:
        row: with `messages`, or with `prompt` and `completion`, as lists of messages; text is not rendered.
        processing_class: a tokenizer; a processor is given contents in parts, and is not asked.
        chat_template: another chat template than its own.
    """
    whole, prompt = row.get("messages"), row.get("prompt")
    if "prompt" in row:
        whole = prompt + row["completion"] if isinstance(prompt, list) else None
    if not isinstance(whole, list) or isinstance(processing_class, ProcessorMixin):
        return None
    with rendering():
        try:
            arguments = {"tokenize": False, "chat_template": chat_template, **template_arguments(row)}
            if "prompt" in row:
                processing_class.apply_chat_template(prompt, add_generation_prompt=True, **arguments)
            processing_class.apply_chat_template(whole, **arguments)
        except RENDER_ERRORS as error:
            return f"the chat template refuses the conversation ({error})"
    return None
