"""Option, one row of the table that the command line is read by, and the rows that the fields of a dataclass make."""

import dataclasses
from collections.abc import Iterable
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


# The dataclasses of TRL, by name. Their null is a value; that of an option of this project means its default.
TRL = ("ScriptArguments", "DatasetMixtureConfig", "ModelConfig", "SFTConfig")

_PLAIN = {bool: "bool", int: "int", float: "float", str: "str", dict: "mapping"}


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a verb.

    Attributes:
        name (`str`): as on the command line and in YAML.
        group (`str`): name of the dataclass that it is a field of, or the title over it in the help.
        kind (`str`): of its value or, with `many`, of each of them: `bool`, `int`, `float`, `str`, `mapping` or
            `datasets` (the mappings of a mixture).
        many (`bool`): whether it takes a list.
        text (`bool`): whether it takes a plain string too.
        switch (`bool`): whether it takes true and false, or nothing, too.
        nullable (`bool`): whether null is a value of it.
        choices (`tuple[str, ...]`): the texts it can have, of a number beside it (`datasets`: the keys); empty if
            there is no such list.
        lowest, highest (`float` or `None`): bounds of a number, both allowed.
        default: as JSON.
        help (`str`): one paragraph.
        aliases (`tuple[str, ...]`): its other names.
        positional (`bool`): whether its name may be left out on the command line.
        required (`bool`): whether there is no call without it.
        metavar (`str`): what the help calls its value; empty for `VALUE`.
        family (`bool`): whether every name that begins with its own and an underscore is such an option too.
    """

    name: str
    group: str
    kind: str
    many: bool = False
    text: bool = False
    switch: bool = False
    nullable: bool = False
    choices: tuple[str, ...] = ()
    lowest: float | None = None
    highest: float | None = None
    default: Any = None
    help: str = ""
    aliases: tuple[str, ...] = ()
    positional: bool = False
    required: bool = False
    metavar: str = ""
    family: bool = False

    @property
    def takes_null(self) -> bool:
        """Whether it may be written as null, which is a value of its own or, of an option of ours, its default."""
        return self.nullable or self.group not in TRL


def row(name: str, help: str, default: bool | int | float | str | None = None, **more: Any) -> Option:
    """An option that belongs to no dataclass: of the kind of its default, text if it has none.

    Args:
        more: further fields of [`Option`].
    """
    kind = "str" if default is None else _PLAIN[type(default)]
    settings = {"group": "options", "kind": kind, "nullable": default is None and not more.get("required")} | more
    return Option(name, default=default, help=help, **settings)


def by_name(options: Iterable[Option]) -> dict[str, Option]:
    """The options under each of their names."""
    return {name: option for option in options for name in (option.name, *option.aliases)}


def describe(dataclass: type) -> list[Option]:
    """The options that the fields of a dataclass make; a field that no text can express makes none."""
    hints = get_type_hints(dataclass)
    options = []
    for field in dataclasses.fields(dataclass):
        form = _form(hints[field.name])
        if not field.init or form is None:
            continue
        if field.metadata.get("const") is True:
            form["switch"] = True
        if choices := field.metadata.get("choices"):
            form["choices"] = tuple(str(choice) for choice in choices if choice is not None)
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        default = None if default is dataclasses.MISSING else default
        default = default.value if isinstance(default, Enum) else default
        text = " ".join(field.metadata.get("help", "").replace("%%", "%").split())
        options.append(Option(field.name, dataclass.__name__, default=default, help=text, **form))
    return options


def _form(hint: Any) -> dict[str, Any] | None:
    """What a type hint says of an option's values; `None` for types that no text can express."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    form: dict[str, Any] = {"nullable": NoneType in parts, "text": str in parts}
    kinds = set()
    for part in parts:
        origin = get_origin(part) or part
        if origin is NoneType:
            continue
        if origin is list:
            (item,) = get_args(part) or (str,)
            form["many"] = True
            kinds.add("datasets" if dataclasses.is_dataclass(item) else _PLAIN.get(item, "str"))
            if dataclasses.is_dataclass(item):
                form["choices"] = tuple(field.name for field in dataclasses.fields(item))
        elif origin is Literal:
            kinds.add("bool" if set(get_args(part)) <= {True, False} else "str")
            form["choices"] = tuple(map(str, get_args(part)))
        elif isinstance(part, type) and issubclass(part, Enum):
            kinds.add("str")
            form["choices"] = tuple(str(member.value) for member in part)
        elif origin in _PLAIN:
            kinds.add(_PLAIN[origin])
        else:
            return None
    if len(kinds) > 1:
        form["switch"] = "bool" in kinds
        if "bool" in kinds:
            form.pop("choices", None)
    # Of several kinds, the one that says most: `int | str` is an int or any other text.
    form["kind"] = next(kind for kind in ("datasets", "mapping", "int", "float", "str", "bool") if kind in kinds)
    return form
