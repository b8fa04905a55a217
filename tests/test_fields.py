"""What a field of a config states is what it takes, what it refuses, and what its documentation says."""

import copy
import inspect
import json
import math
import pickle
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import get_args, get_origin, get_type_hints

import numpy as np
import pytest
from transformers import HfArgumentParser

import fnsft_trl
from fnsft_trl import DataConfig, FNSFTError, FunctionalNetworkConfig
from fnsft_trl.fields import Help, Range, check_fields, checked, documented, fits, option, range_of


FIELDS = [(config, f) for config in (FunctionalNetworkConfig, DataConfig) for f in fields(config)]
# Kind of a field -> values of other kinds.
WRONG = {
    "bool": [0, 1, 1.0, "true", "yes", [True], {}],
    "int": [True, 1.5, 1.0, "1", [1], {}],
    "float": [True, "0.5", [0.5], {}, math.nan, math.inf, -math.inf],
    "str": [True, 1, 1.5, ["a"], [], {}],
    "list[int] | str": [True, 1.5, [True], [1.5], ["a"], [1, None], [], {}],
    "list[str]": [True, 1, 1.5, [1], ["a", None], [], {}],
}
# Every public dataclass of options, with what it cannot be made without.
NEEDED = {
    "RetentionConfig": {"retention_datasets": ["a=b"]},
    "ReplayConfig": {"replay_datasets": ["a=b"]},
    "AnchorConfig": {"kl_to_base": 1.0, "kl_datasets": ["a=b"]},
}
CONFIGS = {
    name: NEEDED.get(name, {})
    for name in fnsft_trl.__all__
    if any(
        isinstance(f.metadata.get("help"), Help)
        for f in vars(getattr(fnsft_trl, name)).get("__dataclass_fields__", {}).values()
    )
}


def kind(field) -> str:
    parts = (field.type,) if get_origin(field.type) is list else get_args(field.type) or (field.type,)
    return " | ".join(str(p) if get_origin(p) else p.__name__ for p in parts if p is not NoneType)


def cases(*keys: str) -> list:
    """The fields that state one of these, choices or a range."""
    stated = [(c, f, {*f.metadata, *(["range"] if range_of(f) else [])}) for c, f in FIELDS]
    return [pytest.param(c, f, id=f.name) for c, f, has in stated if not keys or has & set(keys)]


def edges(field) -> list[tuple[float, float]]:
    """For each bound of a field, the nearest value inside and the nearest outside."""
    step = math.nextafter if kind(field) == "float" else lambda bound, towards: bound + (1 if towards > 0 else -1)
    bounds = range_of(field)
    found = [(bounds.least, None if bounds.least is None else step(bounds.least, -math.inf))]
    found += [(bounds.most, None if bounds.most is None else step(bounds.most, math.inf))]
    found += [(None if bounds.above is None else step(bounds.above, math.inf), bounds.above)]
    found += [(None if bounds.below is None else step(bounds.below, -math.inf), bounds.below)]
    return [(inside, outside) for inside, outside in found if outside is not None]


def with_value(config: type, name: str, value):
    """The defaults with one field set past the rules about several fields."""
    made = config()
    setattr(made, name, value)
    return made


@pytest.mark.parametrize(("config", "field"), cases("range"))
def test_a_range_ends_where_it_says(config, field):
    assert edges(field)
    for inside, outside in edges(field):
        inside, outside = ([v] if kind(field).startswith("list") else v for v in (inside, outside))
        check_fields(with_value(config, field.name, inside))
        with pytest.raises(FNSFTError) as error:
            config(**{field.name: outside})
        assert str(error.value).startswith(f"{field.name} is {outside!r}; it must be ")
        assert str(error.value).endswith(range_of(field).text)


@pytest.mark.parametrize(("config", "field"), cases("choices"))
def test_choices_are_taken_and_nothing_else(config, field):
    choices = field.metadata["choices"]
    for choice in choices:
        check_fields(with_value(config, field.name, None if choice == "null" else choice))
    for other in ("", "something", choices[-1] + "s", choices[-1].upper(), *WRONG["str"]):
        with pytest.raises(FNSFTError) as error:
            config(**{field.name: other})
        assert str(error.value) == f"{field.name} is {other!r}; it must be one of: {', '.join(choices)}"


@pytest.mark.parametrize(("config", "field"), cases())
def test_a_value_of_another_type_is_refused_by_name(config, field):
    for value in [*WRONG[kind(field)], *([] if field.default is None else [None])]:
        with pytest.raises(FNSFTError) as error:
            config(**{field.name: value})
        assert str(error.value).startswith(f"{field.name} is "), value
        assert "; it must be " in str(error.value)


@pytest.mark.parametrize(("config", "field"), cases())
def test_null_is_taken_where_it_is_the_default_only(config, field):
    assert (NoneType in get_args(field.type)) == (field.default is None)


@pytest.mark.parametrize(("config", "field"), cases())
def test_the_documentation_says_what_the_field_states(config, field):
    text = field.metadata["help"]
    assert text.endswith(".")
    assert "%" not in text  # which argparse would read
    for choice in field.metadata.get("choices", ()):
        assert choice == "null" or f"`{choice}`" in text
    if bounds := range_of(field):
        assert text.endswith(f" {bounds.text.capitalize()}.")
    documentation = " ".join(config.__doc__.split())
    kinds = " or ".join(f"`{part}`" for part in kind(field).split(" | "))
    default = f'"{field.default}"' if isinstance(field.default, str) else field.default
    shown = "" if default is None else f", defaults to `{default}`"
    assert f"{field.name} ({kinds}, *optional*{shown}): {text}" in documentation


@pytest.mark.parametrize("config", [FunctionalNetworkConfig, DataConfig])
def test_the_arguments_stand_between_the_summary_and_the_errors(config):
    text = config.__doc__
    assert text == inspect.cleandoc(text)
    assert 0 < text.index("\n\nArgs:\n    ") < text.index("\n\nRaises:\n    FNSFTError")
    assert max(map(len, text.splitlines())) <= 119


def test_a_docstring_without_errors_ends_with_the_arguments():
    @documented
    @dataclass
    class Small:
        """One number."""

        size: int = option(3, "How large.", least=1)

    assert Small.__doc__ == (
        "One number.\n\nArgs:\n    size (`int`, *optional*, defaults to `3`):\n        How large. At least 1."
    )


@pytest.mark.parametrize(
    ("bounds", "text", "inside", "outside"),
    [
        (Range(least=1), "at least 1", [1, 2, 1e9], [0, 0.999]),
        (Range(above=1), "above 1", [1.001, 2], [1, 0]),
        (Range(most=3), "at most 3", [3, -5], [4]),
        (Range(below=3), "below 3", [2.9, -5], [3, 4]),
        (Range(least=0, most=1), "from 0 to 1", [0, 0.5, 1], [-0.1, 1.1]),
        (Range(above=0, below=1), "between 0 and 1", [0.1, 0.9], [0, 1]),
        (Range(least=0, below=1), "at least 0 and below 1", [0, 0.9], [-0.1, 1]),
        (Range(above=0, most=1), "above 0 and at most 1", [0.1, 1], [0, 1.1]),
    ],
    ids=lambda value: value.text if isinstance(value, Range) else None,
)
def test_a_range_reads_as_it_acts(bounds, text, inside, outside):
    assert bounds.text == text
    assert all(value in bounds for value in inside)
    assert not any(value in bounds for value in [*outside, math.nan])


def test_a_truth_value_is_no_number_and_a_whole_number_is_a_number():
    assert fits(True, bool)
    assert fits(1, float)
    assert fits(10**400, float)
    assert not fits(True, int)
    assert not fits(True, float)
    assert not fits([True], list[int])
    assert not fits((1,), list[int])


# --- in scripts of others


def a_value(field, hint):
    """A value that a field takes by itself, other than its default where that is easy."""
    choices, bounds = field.metadata.get("choices"), range_of(field) or Range()
    if choices:
        return choices[-1]
    number = next(n for n in (7, 2, 0.5, 40, 200) if n in bounds)
    kinds = str(hint)
    return {"bool": not field.default, "int": int(number), "float": number}.get(
        kinds.removesuffix(" | None").removeprefix("<class '").removesuffix("'>"),
        ["a=b"] if kinds.startswith("list[str]") else [number] if kinds.startswith("list[float]") else "3",
    )


def with_one(name, field, value):
    """A config with one field set, or why there is none."""
    try:
        return getattr(fnsft_trl, name)(**CONFIGS[name] | {field: value})
    except FNSFTError as error:
        return str(error)


def test_all_public_configs_are_tried():
    assert {"FunctionalNetworkConfig", "ProtectionConfig", "PenaltyConfig", "ProbeConfig", *NEEDED} <= set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_script_parses_a_config_beside_those_of_trl(name):
    """`HfArgumentParser`, which TrlParser is, gives argparse all metadata and overwrites the types of the fields."""
    cls, hints = getattr(fnsft_trl, name), get_type_hints(getattr(fnsft_trl, name))
    before = {f.name: with_one(name, f.name, a_value(f, hints[f.name])) for f in fields(cls)}
    parser = HfArgumentParser(cls, exit_on_error=False)
    assert f"--{fields(cls)[0].name}" in parser.format_help()

    def words(given: dict) -> list[str]:
        return [word for key, value in given.items() for word in (f"--{key}", *map(str, np.atleast_1d(value)))]

    assert parser.parse_args_into_dataclasses(words(CONFIGS[name])) == (cls(**CONFIGS[name]),)
    for f in fields(cls):
        value = a_value(f, hints[f.name])
        try:
            (found,) = parser.parse_args_into_dataclasses(words(CONFIGS[name] | {f.name: value}))
        except FNSFTError as error:
            found = str(error)
        assert found == before[f.name] == with_one(name, f.name, value), f.name


@pytest.mark.parametrize("name", CONFIGS)
def test_what_other_libraries_make_of_a_value_is_that_value(name):
    """Of a sweep by NumPy, a path, a tuple; null as text; and what a config then holds is what JSON has."""
    cls, hints = getattr(fnsft_trl, name), get_type_hints(getattr(fnsft_trl, name))
    forms = {int: [np.int64, np.int32], float: [np.float32, np.float64], str: [np.str_], list: [tuple, np.array, iter]}
    for f in fields(cls):
        value = a_value(f, hints[f.name])
        plain = with_one(name, f.name, value)
        others = [form(value) for form in forms.get(type(value), ())]
        is_text = "choices" not in f.metadata and hints[f.name] in (str, str | None)
        others += [Path(value)] if is_text else []
        others += [value[0]] if str(hints[f.name]).startswith("list[str]") else []
        for other in others:
            assert with_one(name, f.name, other) == plain, (f.name, other)
        if f.default is None and not is_text:
            assert {str(with_one(name, f.name, null)) for null in (None, "null", "None")} == {
                str(with_one(name, f.name, None))
            }
        if not isinstance(plain, str):
            assert json.loads(json.dumps(asdict(plain))) == asdict(plain)
            assert cls(**asdict(plain)) == pickle.loads(pickle.dumps(plain)) == copy.deepcopy(plain) == plain


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_checked_again_where_it_is_used(name):
    """Its fields can be set after it was made, and something else can be given in its place."""
    cls = getattr(fnsft_trl, name)
    made = cls(**CONFIGS[name])
    assert checked(made, cls, "it") == made
    assert checked(None, cls, "it") is None
    for f in fields(cls):
        changed = copy.copy(made)
        setattr(changed, f.name, object())
        with pytest.raises(FNSFTError, match=f"{f.name} is <object"):
            checked(changed, cls, "it")
    for other in (CONFIGS[name], name, Path(name), cls, 3, option):
        with pytest.raises(FNSFTError, match=f"it is a {type(other).__name__}; it must be a {name}, or None"):
            checked(other, cls, "it")
