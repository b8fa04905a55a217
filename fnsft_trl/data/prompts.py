"""Prompt formats, as chat templates on the tokenizer: training, discovery and inference then render alike."""

import string
from dataclasses import dataclass

from ..errors import FNSFTError


TEMPLATE_FORMATS = ("auto", "chat", "alpaca", "chatml", "basic")

ALPACA = "### Instruction:\n{instruction}\n\n### Response:\n{response}"
BASIC = "Instruction:\n{instruction}\n\nResponse:\n{response}"

_CHATML_END = "<|im_end|>"
_PLACEHOLDERS = ("system", "instruction", "response")


@dataclass(frozen=True)
class PromptTemplate:
    """What is written around the turns of a conversation.

    Attributes:
        system (`tuple[str, str]`): before and after the system turn.
        user (`str`): before a user's turn.
        assistant (`tuple[str, str]`): before and after an assistant's turn; the EOS token follows.
    """

    system: tuple[str, str]
    user: str
    assistant: tuple[str, str]


def parse_prompt_template(template: str) -> PromptTemplate:
    """Read a template such as `"Q: {instruction}\\nA: {response}"`.

    The placeholders are `{instruction}` and `{response}`, each once and in this order. `{system}` may stand on a line
    above them. The lines up to it, and line breaks after it, are written only for a conversation with a system turn.
    Braces of the text are doubled. A backslash and an n are a line break, as one writes it in a shell.

    Raises:
        FNSFTError: a placeholder is missing, repeated, unknown or out of order.
    """
    template = template.replace("\\n", "\n")
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise FNSFTError(
            f"prompt_template {template!r} cannot be read ({error}); double the braces that are text"
        ) from error
    names = [name for _, name, _, _ in parts if name is not None]
    for name in names:
        if name not in _PLACEHOLDERS:
            raise FNSFTError(
                f"prompt_template has the placeholder {{{name}}}; there are {{instruction}} (with context or input, "
                "if any, after an empty line), {response} and {system}"
            )
    if any(spec or conversion for _, _, spec, conversion in parts):
        raise FNSFTError("prompt_template has a placeholder with a format; write {instruction} and {response} alone")
    if names not in (["instruction", "response"], ["system", "instruction", "response"]):
        raise FNSFTError(
            "prompt_template must hold {instruction} and {response} once and in this order, and {system}, if at all, "
            f"before them; found {', '.join(names) or 'no placeholder'}"
        )
    texts = [""]  # before each placeholder, and after the last
    for text, name, _, _ in parts:
        texts[-1] += text  # a doubled brace ends a part as well
        if name is not None:
            texts.append("")
    system = ("", "\n\n")
    if names[0] == "system":
        above, below = texts.pop(0), texts[0]
        head, line_break, rest = below.partition("\n")
        if not line_break:
            raise FNSFTError(
                "prompt_template has {system} and {instruction} on one line; put {system} on the one above"
            )
        breaks = len(rest) - len(rest.lstrip("\n"))
        system = (above, head + line_break + rest[:breaks])
        texts[0] = rest[breaks:]
    return PromptTemplate(system, texts[0], (texts[1], texts[2]))


def set_chat_template(tokenizer, template_format: str = "auto", prompt_template: str | None = None) -> bool:
    """Give a tokenizer the chat template of a prompt format, in place.

    The templates have generation markers, so that `assistant_only_loss` works with them, end each assistant's turn
    with the EOS token, and begin with the BOS token where the tokenizer begins text with it.

    Args:
        tokenizer: a tokenizer or a processor.
        template_format: one of [`TEMPLATE_FORMATS`]. With `"chatml"` and a vocabulary that has `<|im_end|>`, that
            becomes the EOS token.
        prompt_template: with `"basic"`: the template, as [`parse_prompt_template`] reads it.

    Returns:
        Whether the tokenizer's own chat template was replaced, or it had none.

    Raises:
        FNSFTError: `"chat"`, and the tokenizer has no chat template.
    """
    if template_format == "chat" and tokenizer.chat_template is None:
        raise FNSFTError(
            "template_format is chat, but the tokenizer has no chat template; use auto, alpaca, chatml or basic, or "
            "give chat_template_path"
        )
    if template_format == "chat" or (template_format == "auto" and tokenizer.chat_template is not None):
        return False
    core = getattr(tokenizer, "tokenizer", tokenizer)
    begin = "{{ bos_token }}" if adds_bos(core) else ""
    if template_format == "chatml":
        has_end = _CHATML_END in core.get_vocab()
        if has_end:
            core.eos_token = _CHATML_END
        tokenizer.chat_template = begin + _chatml(has_end)
        return True
    text = ALPACA if template_format == "alpaca" else prompt_template or BASIC
    tokenizer.chat_template = begin + _jinja(parse_prompt_template(text), core.eos_token or "")
    return True


def adds_bos(tokenizer) -> bool:
    """Whether the tokenizer puts a BOS token before text."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def adds_eos(tokenizer) -> bool:
    """Whether the tokenizer puts an EOS token after text."""
    return tokenizer.eos_token_id is not None and tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]


def without_bos(text: str, bos: str) -> str:
    """Text without the BOS tokens that it begins with, for a tokenizer that writes one itself."""
    while text.startswith(bos):
        text = text.removeprefix(bos)
    return text


def _quoted(text: str) -> str:
    """Text as an expression of Jinja."""
    for character, escape in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        text = text.replace(character, escape)
    return f"{{{{ '{text}' }}}}" if text else ""


_CONTENT = (
    "{% set content = m['content'] if m['content'] is string else m['content'] | map(attribute='text') | join %}"
)


def _jinja(template: PromptTemplate, eos_token: str) -> str:
    (above, below), user, (before, after) = template.system, template.user, template.assistant
    after = after.removesuffix(eos_token) if eos_token else after
    return (
        "{% for m in messages %}" + _CONTENT + "{% if m['role'] in ('system', 'developer') %}"
        f"{_quoted(above)}{{{{ content }}}}{_quoted(below)}"
        "{% elif m['role'] == 'user' %}"
        f"{_quoted(user)}{{{{ content }}}}"
        "{% elif m['role'] == 'assistant' %}"
        f"{_quoted(before)}{{% generation %}}{{{{ content }}}}{_quoted(after)}{{{{ eos_token }}}}{{% endgeneration %}}"
        "{% else %}{{ raise_exception('this prompt format has no turns of the role ' + m['role']) }}{% endif %}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{_quoted(before)}{{% endif %}}"
    )


def _chatml(has_end: bool) -> str:
    # Without the token, its letters are plain text, and the EOS token is what ends the turn.
    end = _quoted(_CHATML_END) + ("" if has_end else "{{ eos_token }}")
    return (
        "{% for m in messages %}" + _CONTENT + "{% if not loop.first %}{{ '\\n' }}{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\\n' }}"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ content }}" + end + "{% endgeneration %}"
        "{% else %}{{ content }}" + _quoted(_CHATML_END) + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
    )


def teach_end(tokenizer, *, keep_eos: bool = False, keep_template: bool = False) -> str | None:
    """See to it that an assistant's last turn ends with the EOS token, in place, so that a model learns to stop.

    A chat template that ends it with another special token makes that one the EOS token, unless `keep_eos`; else the
    EOS token is appended to the chat template.

    Args:
        tokenizer: a tokenizer with an EOS token, or its processor.
        keep_eos: leave the EOS token as it is.
        keep_template: leave the chat template as it is.

    Returns:
        What was changed, in words; `None` where nothing was.

    Raises:
        FNSFTError: the chat template cannot render a question and an answer.
    """
    from jinja2 import TemplateError

    core = getattr(tokenizer, "tokenizer", tokenizer)
    if tokenizer.chat_template is None:
        return None
    try:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], tokenize=False
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise FNSFTError(f"the chat template cannot render a question and an answer: {error}") from error
    end = rendered.rstrip()
    if end.endswith(core.eos_token):
        return None
    special = [token for token in core.all_special_tokens if end.endswith(token)]
    special += [str(t) for t in core.added_tokens_decoder.values() if t.special and end.endswith(str(t))]
    if special and not keep_eos:
        was, core.eos_token = core.eos_token, max(special, key=len)
        return f"the chat template ends an answer with {core.eos_token}, which becomes the EOS token (it was {was})"
    if keep_template:
        return None
    if not isinstance(tokenizer.chat_template, str):
        raise FNSFTError(
            "the chat template, one of several that the tokenizer has, does not end an answer with an EOS token; "
            "choose another template_format"
        )
    eos = "{{ eos_token }}"
    if "endgeneration" in tokenizer.chat_template:
        eos = f"{{% generation %}}{eos}{{% endgeneration %}}"
    condition = "{% if messages[-1]['role'] == 'assistant' and not add_generation_prompt %}"
    tokenizer.chat_template = f"{tokenizer.chat_template.removesuffix(chr(10))}{condition}{eos}{{% endif %}}"
    return f"the chat template does not end an answer with {core.eos_token}, which is appended to it"
