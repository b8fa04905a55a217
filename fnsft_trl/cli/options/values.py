"""What was written for an option, on the command line or in YAML -> its value, checked. Free of torch."""

import difflib
import json
import math
from pathlib import Path
from typing import Any

from ...errors import FNSFTError
from .schema import TRL, Option


TRUTH = {
    **dict.fromkeys(("true", "yes", "on", "t", "y", "1"), True),
    **dict.fromkeys(("false", "no", "off", "f", "n", "0"), False),
}

_EXPECTED = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "mapping": "a mapping (on the command line as JSON, for instance '{\"key\": 1}')",
    "datasets": "a list of mappings with a path each",
}


def read_value(option: Option, written: Any, spelt: str) -> Any:
    """The value of an option.

    Args:
        option: what it may be.
        written: a tuple of words from the command line, or a value from YAML.
        spelt: the option's name as it was written.

    Raises:
        FNSFTError: it is no value of this option; with what it may be.
    """
    if isinstance(written, tuple):
        written = _from_words(option, written, spelt)
    value = _convert(option, written, spelt)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and option.lowest is not None:
        highest = math.inf if option.highest is None else option.highest
        if not option.lowest <= value <= highest:
            allowed = f"at least {option.lowest}" if highest == math.inf else f"from {option.lowest} to {highest}"
            raise FNSFTError(f"{spelt} is {value}; it must be {allowed}")
    return value


def _from_words(option: Option, words: tuple[str, ...], spelt: str) -> Any:
    """Words as YAML would have given them: a list, or one string."""
    if not words:
        if option.kind == "bool" or option.switch:
            return True
        raise FNSFTError(f"{spelt} is given without a value; it must be {_expected(option)}")
    line = " ".join(words)
    is_bracketed = line.startswith("[") and line.endswith("]") and "{" not in line
    if option.many and is_bracketed:  # [0,1,2], also when the shell has split it
        return [item.strip().strip("\"'") for item in line[1:-1].split(",") if item.strip()]
    if option.many and len(words) > 1:
        return list(words)
    if len(words) > 1 and not is_bracketed and option.kind != "mapping":
        shown = "" if option.name.endswith("token") else f": {line}"
        raise FNSFTError(f"{spelt} takes one value, {len(words)} were given{shown}")
    return line


def _convert(option: Option, value: Any, spelt: str) -> Any:
    if value is None or (isinstance(value, str) and option.nullable and _is_null(option, value)):
        if not option.nullable:
            raise FNSFTError(f"{spelt} is null; it must be {_expected(option)}, or be left out")
        return None
    if option.kind == "datasets":
        return [_dataset(option, item, spelt) for item in (value if isinstance(value, list) else [value])]
    if isinstance(value, list):
        if not option.many:
            raise FNSFTError(f"{spelt} is a list; it must be {_expected(option)}")
        return [_scalar(option, item, spelt) for item in value]
    if option.many and not option.text:
        return [_scalar(option, value, spelt)]
    if option.many and option.kind != "str":  # a list of numbers, or a text such as 0-5
        try:
            return [_scalar(option, value, spelt)]
        except FNSFTError:
            if isinstance(value, str):
                return value
            raise
    return _scalar(option, value, spelt)


def _is_null(option: Option, word: str) -> bool:
    """Whether a word means null. `none` is a value of its own for some of TRL's options that are text."""
    return word == "null" or (word.lower() in ("none", "null") and (option.kind != "str" or option.group not in TRL))


def _scalar(option: Option, value: Any, spelt: str) -> Any:
    kind = option.kind
    if option.switch and (isinstance(value, bool) or str(value).lower() in ("true", "false")):
        return value if isinstance(value, bool) else str(value).lower() == "true"
    if value is False and "no" in option.choices:  # YAML reads a bare no as false
        return "no"
    if isinstance(value, bool) and kind != "bool":
        raise FNSFTError(f"{spelt} is {str(value).lower()}; it must be {_expected(option)}")
    if kind == "mapping":
        return _mapping(option, value, spelt)
    if isinstance(value, (dict, list)):
        found = "a mapping" if isinstance(value, dict) else "a list"
        raise FNSFTError(f"{spelt} is {found}; it must be {_expected(option)}")
    text = str(value)
    if kind == "str":
        return _choice(option, text, spelt)
    if kind == "bool":
        if text.lower() not in TRUTH:
            raise FNSFTError(f"{spelt} is {text!r}; it must be {_expected(option)}")
        return TRUTH[text.lower()]
    try:
        number = int(text) if kind == "int" else float(text)
    except ValueError:
        if option.text and not option.many:
            return text
        raise FNSFTError(f"{spelt} is {text!r}; it must be {_expected(option)}") from None
    if not math.isfinite(number):
        raise FNSFTError(f"{spelt} is {text}; it must be a finite number")
    return number


def _choice(option: Option, text: str, spelt: str) -> str:
    if not option.choices or text in option.choices:
        return text
    near = difflib.get_close_matches(text, option.choices, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise FNSFTError(f"{spelt} is {text!r}; it must be {_expected(option)}{hint}")


def _mapping(option: Option, value: Any, spelt: str) -> Any:
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            return json.loads(value)
        except ValueError as error:
            raise FNSFTError(f"{spelt} is no valid JSON ({error}): {value}") from error
    if isinstance(value, dict):
        return value
    if not isinstance(value, str) or not option.text or option.name.endswith("_kwargs"):  # which have no file
        raise FNSFTError(f"{spelt} is {value!r}; it must be {_expected(option)}")
    if not Path(value).is_file():
        raise FNSFTError(f"{spelt} is {value!r}, which is no file; it must be {_expected(option)}, or a file with one")
    return value


def _dataset(option: Option, value: Any, spelt: str) -> dict:
    """One part of a mixture. `option.choices` are the names that it may have."""
    if isinstance(value, str):
        return {"path": value}
    if not isinstance(value, dict) or "path" not in value:
        raise FNSFTError(f"{spelt} holds {value!r}; it must be {_expected(option)}")
    for name in value:
        if name not in option.choices:
            near = difflib.get_close_matches(str(name), option.choices, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise FNSFTError(f"{spelt}: there is no {name!r}{hint} (there are {', '.join(option.choices)})")
    return value


def _expected(option: Option) -> str:
    is_ours = option.group not in TRL
    if option.kind == "str" and option.choices:
        names_null = option.nullable and is_ours and "null" not in option.choices
        expected = "one of: " + ", ".join(("null",) * names_null + option.choices)
    elif option.many and option.kind != "datasets":
        expected = f"a list, each {_EXPECTED[option.kind]}"
    else:
        expected = _EXPECTED[option.kind]
    return expected + (", or null" if option.nullable and not is_ours else "")
