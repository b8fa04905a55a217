"""What was written for an option, on the command line or in YAML -> its value, checked. Free of torch."""

import difflib
import math
import os
import re
from typing import Any

from ...errors import FNSFTError
from .schema import TRL, Option
from .written import NULL, Quoted, core_value, read_json


TRUTH = {
    **dict.fromkeys(("true", "yes", "on", "t", "y", "1"), True),
    **dict.fromkeys(("false", "no", "off", "f", "n", "0"), False),
}

_EXPECTED = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a finite number",
    "str": "text",
    "mapping": "a mapping (on the command line as JSON, for instance '{\"key\": 1}')",
    "datasets": "a list of mappings with a path each",
}
# Without leading zeros, which make a number octal elsewhere.
_WHOLE = r"(0|[1-9][0-9]*|[1-9][0-9]{0,2}(_[0-9]{3})+)"
_INT = re.compile(rf"[-+]?{_WHOLE}")
_FLOAT = re.compile(rf"[-+]?({_WHOLE}(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_DIGITS = re.compile(r"[-+]?[0-9_]+")
_ITEM = re.compile(r"""\s*("[^"]*"|'[^']*'|[^,]*?)\s*(?:,|$)""")


def read_value(option: Option, written: Any, spelt: str) -> Any:
    """The value of an option.

    Args:
        option: what it may be.
        written: a tuple of words from the command line, or what [`~.written.read_yaml`] gives.
        spelt: the option's name as it was written.

    Raises:
        FNSFTError: it is no value of this option; with what it may be.
    """
    if isinstance(written, tuple):
        written = _from_words(option, written, spelt)
    value = _convert(option, written, spelt)
    for number in value if isinstance(value, list) else [value]:
        is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
        if is_number and option.lowest is not None:
            highest = math.inf if option.highest is None else option.highest
            if not option.lowest <= number <= highest:
                allowed = f"at least {option.lowest}" if highest == math.inf else f"from {option.lowest} to {highest}"
                raise FNSFTError(f"{spelt} is {number}; it must be {allowed}")
    return value


def _from_words(option: Option, words: tuple[str, ...], spelt: str) -> Any:
    """Words as YAML would have given them: a list, a mapping, or one string."""
    if not words:
        if option.kind == "bool" or option.switch:
            return True
        raise FNSFTError(f"{spelt} is given without a value; it must be {_expected(option)}")
    line = " ".join(words)
    is_bracketed = line.startswith("[") and line.endswith("]")
    if option.kind == "datasets" and (line.startswith("{") or (is_bracketed and "{" in line)):
        return _json(line, spelt)
    if option.many and is_bracketed:  # [0,1,2], also when the shell has split it
        return [_unquoted(item) for item in _ITEM.findall(line[1:-1]) if item]
    if option.many and len(words) > 1:
        return list(words)
    if len(words) > 1 and option.kind != "mapping":
        shown = "" if option.name.endswith("token") else f": {line}"
        raise FNSFTError(f"{spelt} takes one value, {len(words)} were given{shown}; give one")
    return line


def _unquoted(item: str) -> str | None:
    if item[0] in "\"'":
        return Quoted(item[1:-1])
    return None if item in NULL else item


def _convert(option: Option, value: Any, spelt: str) -> Any:
    if value is None or _is_null(option, value):
        if not option.takes_null:
            raise FNSFTError(f"{spelt} is null; it must be {_expected(option)}, or be left out")
        return None
    if option.kind == "datasets":
        return [_dataset(option, item, spelt) for item in (value if isinstance(value, list) else [value])]
    if isinstance(value, list):
        if not option.many:
            raise FNSFTError(f"{spelt} is a list; it must be {_expected(option)}")
        return [_scalar(option, item, spelt) for item in value]
    found = _scalar(option, value, spelt)
    # A list of numbers, or a text such as 0-5; a list of texts, or one of them.
    return [found] if option.many and not (option.text and isinstance(found, str)) else found


def _is_null(option: Option, value: Any) -> bool:
    """Whether text means null. Where any text is a value, `null` without quotes alone does."""
    if not option.takes_null or not isinstance(value, str):
        return False
    if option.kind == "str" and not option.choices:
        return value in NULL and not isinstance(value, Quoted)
    return value.lower() == "null" or (value.lower() == "none" and value not in option.choices)


def _scalar(option: Option, value: Any, spelt: str) -> Any:
    if option.kind == "mapping":
        return _mapping(option, value, spelt)
    if value is True:  # a switch without a word
        return True
    if not isinstance(value, str):
        found = {dict: "a mapping", list: "a list"}.get(type(value), "null")
        raise FNSFTError(f"{spelt} {'holds' if option.many else 'is'} {found}; it must be {_expected(option)}")
    text = str(value)
    truth = TRUTH.get(text.lower()) if len(text) > 1 or option.kind == "bool" else None
    if truth is not None and (option.switch or option.kind == "bool"):
        return truth
    if option.kind == "str":
        return _text(option, "no" if truth is False and "no" in option.choices else text, spelt)
    number = {"int": _whole, "float": _decimal}[option.kind](text.strip()) if option.kind != "bool" else None
    if number is not None:
        return number
    if option.text and not _DIGITS.fullmatch(text):
        return _text(option, text, spelt)
    is_octal = option.kind != "bool" and _DIGITS.fullmatch(text) and text.lstrip("+-").startswith("0")
    hint = ", without zeros in front" if is_octal else ""
    raise FNSFTError(f"{spelt} is {text!r}; it must be {_expected(option)}{hint}")


def _whole(text: str) -> int | None:
    """A whole number of at most 64 bits, which is what the libraries count with."""
    number = int(text) if _INT.fullmatch(text) and len(text) < 30 else None
    return number if number is not None and -(2**63) <= number < 2**63 else None


def _decimal(text: str) -> float | None:
    number = float(text) if _FLOAT.fullmatch(text) else math.inf
    return number if math.isfinite(number) else None


def _text(option: Option, text: str, spelt: str) -> str:
    if text in option.choices or not option.choices:
        if text or option.group in TRL:
            return text
        raise FNSFTError(f"{spelt} is empty; give a text, or leave it out")
    near = difflib.get_close_matches(text[:100], option.choices, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise FNSFTError(f"{spelt} is {text!r}; it must be {_expected(option)}{hint}")


def _mapping(option: Option, value: Any, spelt: str) -> Any:
    if isinstance(value, dict):
        try:
            return core_value(value)
        except ValueError as error:
            raise FNSFTError(f"{spelt}: {error}; drop one of them") from error
    if isinstance(value, str) and value.lstrip().startswith("{"):
        return _json(value, spelt)
    if not isinstance(value, str) or not option.text or option.name.endswith("_kwargs"):  # which have no file
        raise FNSFTError(f"{spelt} is {value!r}; it must be {_expected(option)}")
    if not os.path.isfile(value):
        raise FNSFTError(f"{spelt} is {value!r}, which is no file; it must be {_expected(option)}, or a file with one")
    return str(value)


def _json(text: str, spelt: str) -> Any:
    try:
        return read_json(text)
    except ValueError as error:
        raise FNSFTError(f"{spelt} is no valid JSON ({error}): {text}") from error


def _dataset(option: Option, value: Any, spelt: str) -> dict[str, Any]:
    """One part of a mixture: its values are text, but for one. `option.choices` are the names that it may have."""
    if isinstance(value, str):
        return {"path": str(value)}
    if not isinstance(value, dict) or not isinstance(value.get("path"), str):
        raise FNSFTError(f"{spelt} holds {value!r}; it must be {_expected(option)}")
    for name in value:
        if name not in option.choices:
            near = difflib.get_close_matches(str(name)[:100], option.choices, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise FNSFTError(f"{spelt}: there is no {name!r}{hint} (there are {', '.join(option.choices)})")
    fraction = Option("fraction", option.group, "float", nullable=True)
    return {
        str(name): _convert(fraction, _texts(item), f"{spelt}: fraction") if name == fraction.name else _texts(item)
        for name, item in value.items()
    }


def _texts(value: Any) -> Any:
    """The same with text for every scalar but null, which a number of JSON is none of."""
    if isinstance(value, dict):
        return {_texts(name): _texts(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_texts(item) for item in value]
    return None if value is None else str(value)


def _expected(option: Option) -> str:
    is_ours = option.group not in TRL
    if option.kind == "str" and option.choices:
        names_null = option.nullable and is_ours and "null" not in option.choices
        expected = "one of: " + ", ".join(("null",) * names_null + option.choices)
    elif option.many and option.kind != "datasets":
        expected = f"a list, each {_EXPECTED[option.kind]}"
    else:
        expected = _EXPECTED[option.kind]
        expected += f" or one of: {', '.join(option.choices)}" if option.kind == "int" and option.choices else ""
    return expected + (", or null" if option.nullable and not is_ours else "")
