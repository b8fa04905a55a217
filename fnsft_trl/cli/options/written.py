"""What stands in a YAML or JSON text, as it is written: no scalar is guessed at, and no key may stand twice."""

import math
import os
import re
from typing import Any

import yaml

from ...errors import FNSFTError
from ...json_text import from_json


_LARGEST = 2**20  # bytes of a file, which a mapping of options is far from
_MOST = 100_000  # values, aliases written out
_DEEPEST = 50  # mappings and lists inside each other
_PLAIN = "plain"  # the tag of a scalar without quotes
_TAGS = (_PLAIN, *(f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")))
NULL = ("null", "Null", "NULL")
_NULL = ("", "~", *NULL)
_MERGE = "<<"

# Numbers of the core schema of YAML 1.2, those whose decimal digits say what they are.
_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,299})")
_FLOAT = re.compile(r"[-+]?(\.[0-9]{1,300}|(0|[1-9][0-9]{0,299})(\.[0-9]{0,300})?)([eE][-+]?[0-9]{1,4})?")
_WORDS = {
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys(_NULL),
    **{f"{sign}.{word}": float(f"{sign}inf") for sign in ("", "+", "-") for word in ("inf", "Inf", "INF")},
    **{f".{word}": math.nan for word in ("nan", "NaN", "NAN")},
}


class Quoted(str):
    """Text in quotes, which is text whatever its letters are."""


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """Read a YAML file that holds one mapping.

    Args:
        path: of the file.

    Returns:
        Key -> value: `None`, a list, a mapping, and of all other scalars the text, [`Quoted`] if it is in quotes.

    Raises:
        FNSFTError: it cannot be read, is not YAML, holds no mapping, or says a key twice; with the line.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_LARGEST + 1)
    except FileNotFoundError as error:
        raise FNSFTError(
            f"there is no config file {str(path)!r}; give the path of one that exists (`fnsft recipes` copies those "
            "of the package)"
        ) from error
    except OSError as error:
        raise FNSFTError(
            f"the config file {str(path)!r} cannot be read ({error.strerror}); give one that can be read"
        ) from error
    if len(data) > _LARGEST:
        raise FNSFTError(
            f"the config file {path} is larger than 1 MiB; it must hold a mapping, `name: value` for each option"
        )
    try:
        root = _Loader(data).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = ", ".join(filter(None, (error.context, error.problem)))
        raise FNSFTError(f"the config file {path} is not valid YAML: line {mark.line + 1}: {said}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # of bytes, escapes and directives
        raise FNSFTError(f"the config file {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(root, yaml.MappingNode):
        raise FNSFTError(
            f"the config file {path} holds something else; it must hold a mapping, `name: value` for each option"
        )
    return _Values(path).of(root)


def read_json(text: str) -> Any:
    """Read JSON.

    Raises:
        ValueError: it is none, is nested too deeply, or says a key twice.
    """
    return from_json(text, object_pairs_hook=_once)


def core_value(written: Any) -> Any:
    """What a value means that belongs to no option, so that only its own form can say it.

    That is the core schema of YAML 1.2 without octal and hexadecimal numbers. It knows `true`, `false`, `null`, and
    decimal numbers such as `8`, `0.5` and `1e-4`. All else is text, `007` and `1:30` among it.

    Args:
        written: what [`read_yaml`] gives.

    Raises:
        ValueError: two keys of a mapping mean the same.
    """
    if isinstance(written, dict):
        return _once([(core_value(key), core_value(value)) for key, value in written.items()])
    if isinstance(written, list):
        return [core_value(value) for value in written]
    if written is None or isinstance(written, Quoted):
        return written and str(written)
    if written in _WORDS:
        return _WORDS[written]
    if _INT.fullmatch(written):
        return int(written)
    number = float(written) if _FLOAT.fullmatch(written) else math.inf
    return number if math.isfinite(number) else written


def _once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands twice; keep one")
        found[key] = value
    return found


class _Loader(yaml.BaseLoader):
    """Text -> nodes, with scalars that are in quotes told from those that are not."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._depth = 0

    def resolve(self, kind, value, implicit):
        """The tag of a node; of a scalar without quotes it is not looked up by its letters."""
        return _PLAIN if kind is yaml.ScalarNode and implicit[0] else super().resolve(kind, value, implicit)

    def compose_node(self, parent, index):
        """The next node, with all that is in it."""
        self._depth += 1
        if self._depth > _DEEPEST:
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


class _Values:
    """Nodes of a file -> values."""

    def __init__(self, path: str | os.PathLike) -> None:
        self._path = path
        self._count = 0

    def of(self, node: yaml.Node, name: str = "", depth: int = 1) -> Any:
        """The value of a node, `name` being the option that it belongs to."""
        self._count += 1
        if depth > _DEEPEST or self._count > _MOST:  # by aliases
            raise self._refusal(node, f"{name} is nested too deeply, or holds more than {_MOST} values")
        if node.tag not in _TAGS:
            raise self._refusal(
                node, f"{name} has the tag {node.tag}, and values have the type of their option; drop it"
            )
        if isinstance(node, yaml.SequenceNode):
            return [self.of(item, name, depth + 1) for item in node.value]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, name, depth)
        return None if node.tag == _PLAIN and node.value in _NULL else self._text(node)

    def _mapping(self, node: yaml.MappingNode, name: str, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        lines: dict[str, int] = {}
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._refusal(key_node, "a key is a list or a mapping; it must be text")
            key = self._text(key_node)
            if key in lines:
                raise self._refusal(key_node, f"{key} stands twice, in line {lines[key]} too; drop one of them")
            lines[key] = key_node.start_mark.line + 1
            if key == _MERGE and key_node.tag == _PLAIN:
                merged += value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
            else:
                found[key] = self.of(value_node, name or key, depth + 1)
        for other in merged:
            if not isinstance(other, yaml.MappingNode):
                raise self._refusal(other, f"{_MERGE} takes a mapping, or a list of mappings")
            found = self.of(other, name, depth + 1) | found
        return found

    def _text(self, node: yaml.ScalarNode) -> str:
        try:  # escapes as JSON has them can be two halves of one character
            text = node.value.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError as error:
            raise self._refusal(node, "an escape is half of a character; write the character itself") from error
        if "\0" in text:
            raise self._refusal(node, "an escape is the character 0, which no text has; drop it")
        return text if node.tag == _PLAIN else Quoted(text)

    def _refusal(self, node: yaml.Node, message: str) -> FNSFTError:
        return FNSFTError(f"the config file {self._path}, line {node.start_mark.line + 1}: {message}")
