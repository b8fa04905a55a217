"""One value, one meaning: an option's type decides what is meant, wherever and however its value is written."""

import json
from dataclasses import replace
from functools import cache

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from test_options_of_verbs import each_verb, options_of

from fnsft_trl.cli import VERBS
from fnsft_trl.cli.options.parse import parse_options, training_options
from fnsft_trl.cli.options.schema import TRL, Option, by_name
from fnsft_trl.cli.options.sources import read_sources
from fnsft_trl.cli.options.translate import RENAMED, original_options
from fnsft_trl.errors import FNSFTError


# What YAML 1.1 takes for something else than the text that stands there, and what looks like it.
SPELLINGS = [
    *("0", "1", "2", "10", "-1", "+5", "007", "010", "0123456", "08", "1_000", "2024_01", "0x1F", "0o10", "0b11"),
    *("1:4", "1:30", "12:30:45", "2024-01-02", "2024-01-02 10:00:00", "1e5", "1e-4", "1E-4", "1234567e8", ".5", "5."),
    *("0.1", "1.0", "1.10", "1.2.3", "1,5", ".inf", "-.inf", ".nan", "inf", "nan", "1e999", "9" * 25, "9" * 400),
    *("yes", "no", "on", "off", "y", "n", "true", "false", "True", "FALSE", "No", "OFF", "none", "None", "nil"),
    *(
        "auto",
        "all",
        "0-5",
        "0:4,9",
        "5:",
        "a b",
        "a/b",
        "a=b",
        "a:b",
        "é",
        "x" * 300,
        "~/x",
        "a#b",
        "(a)",
        "a'b",
        'a"b',
    ),
]
WHOLE = {"0": 0, "1": 1, "2": 2, "10": 10, "-1": -1, "+5": 5, "1_000": 1000}
DECIMAL = WHOLE | {"1e5": 1e5, "1e-4": 1e-4, "1E-4": 1e-4, "1234567e8": 1234567e8, ".5": 0.5, "5.": 5.0, "0.1": 0.1}
DECIMAL |= {"1.0": 1.0, "1.10": 1.1, "9" * 25: float("9" * 25)}
TRUE, FALSE = ("yes", "on", "true", "True"), ("no", "off", "false", "FALSE", "No", "OFF")


def outcome(words: list[str], known: dict[str, Option]):
    """What the last source says; an error in words."""
    try:
        (*_, found) = [given for given in read_sources(words, known).values() if given] or [{}]
    except FNSFTError as error:
        return str(error)
    return [(name, value, type(value)) for name, value in found.items()]


def in_yaml(file, text: str, known: dict[str, Option]):
    file.write_text(text, encoding="utf-8")
    return outcome(["--config", str(file)], known)


def can_be_plain(text: str) -> bool:
    """Whether a text is a plain scalar of YAML, and not null."""
    try:
        node = yaml.compose(f"x: {text}", Loader=yaml.BaseLoader).value[0][1]
    except (yaml.YAMLError, AttributeError):
        return False
    return (
        isinstance(node, yaml.ScalarNode)
        and node.style is None
        and node.value == text not in ("~", "null", "Null", "NULL")
    )


def ways(option: Option, text: str, file, known) -> list:
    """The same text: plain and quoted in YAML, and as a word of its own or behind its flag."""
    name = option.name
    plain = [in_yaml(file, f"{name}: {text}", known)] if text[0] in "[{" or can_be_plain(text) else []
    found = [*plain, in_yaml(file, f"{name}: {json.dumps(text)}", known), outcome([f"--{name}={text}"], known)]
    if option.kind == "bool" and any(other.positional for other in known.values()):
        return found  # a word after a switch can be one that has no flag
    return [*found, outcome([f"--{name}", text], known)]


def known_of(verb: str) -> dict[str, Option]:
    return by_name(options_of(verb)) | (original_options(training_options()) if verb == "train" else {})


def expected(option: Option, text: str):
    """What the type of an option makes of a text; `None` where it is refused."""
    whole_or_text = WHOLE.get(text, text if option.text and not text.strip("+-").replace("_", "").isdigit() else None)
    if option.switch and text in TRUE + FALSE:
        return text in TRUE
    if option.kind == "bool":
        return {"1": True, "y": True, "0": False, "n": False}.get(
            text, True if text in TRUE else None if text not in FALSE else False
        )
    if option.kind in ("int", "float"):
        number = whole_or_text if option.kind == "int" else DECIMAL.get(text, whole_or_text if option.text else None)
        within = not isinstance(number, str) and number is not None and option.lowest is not None
        if within and not option.lowest <= number <= (float("inf") if option.highest is None else option.highest):
            return None
        if isinstance(number, str) and option.choices and number not in option.choices:
            return None
        return number if number is None or isinstance(number, str) or option.kind == "int" else float(number)
    if option.choices:
        text = "no" if "no" in option.choices and text in FALSE else text
        return text if text in option.choices else None
    return text


def form_of(option: Option) -> Option:
    """What decides how the values of an option are read."""
    return replace(option, name="", group=str(option.group in TRL), default=None, help="", aliases=(), metavar="")


@cache
def first_of_each_form() -> set[tuple[str, str]]:
    """Verb and name of one option of each form."""
    found = {}
    for verb in VERBS:
        for option in options_of(verb):
            found.setdefault(form_of(option), (verb, option.name))
    return set(found.values())


@pytest.mark.slow
@each_verb
def test_a_value_means_the_same_however_it_is_written(verb, tmp_path):
    """All spellings for one option of each form, and some for every option."""
    known = known_of(verb)
    for option in options_of(verb):
        if option.kind in ("mapping", "datasets"):
            continue
        is_first = (verb, option.name) in first_of_each_form()
        for text in SPELLINGS if is_first else ("007", "no"):
            first, *others = ways(option, text, tmp_path / "config.yaml", known)
            assert all(other == first for other in others), (option.name, text, first, others)
            is_null = option.takes_null and text in ("none", "None") and (option.kind != "str" or option.choices)
            if is_null and text not in option.choices:
                assert first in ([], [(option.name, None, type(None))]), (option.name, text, first)
                continue
            value = expected(option, text)
            if value is None:
                assert isinstance(first, str), (option.name, text, first)
                assert option.name in first
                continue
            value = [value] if option.many and not (option.text and isinstance(value, str)) else value
            assert first == [(option.name, value, type(value))], (option.name, text)


@each_verb
def test_items_of_a_list_are_read_as_one_value_is(verb, tmp_path):
    known, file = known_of(verb), tmp_path / "config.yaml"
    for option in (
        option for option in options_of(verb) if option.many and option.kind not in ("mapping", "datasets")
    ):
        for text in SPELLINGS if (verb, option.name) in first_of_each_form() else ("007", "no"):
            if not can_be_plain(text) or "," in text:
                continue
            plain = in_yaml(file, f"{option.name}: [{text}, {text}]", known)
            assert plain == in_yaml(file, f"{option.name}:\n- {text}\n- {json.dumps(text)}", known)
            assert plain == outcome([f"--{option.name}", text, text], known)
            assert plain == outcome([f"--{option.name}", f"[{text},", f"{text}]"], known)
            if not set(text) & set("'\""):
                assert plain == outcome([f"--{option.name}=['{text}',\"{text}\"]"], known)
            value = expected(option, text)
            if value is None:
                assert isinstance(plain, str), (option.name, text, plain)
            else:
                assert plain == [(option.name, [value, value], list)]


@pytest.mark.parametrize("verb", VERBS)
def test_null_is_null_and_in_quotes_it_can_be_text(verb, tmp_path):
    known, file = known_of(verb), tmp_path / "config.yaml"
    for option in options_of(verb):
        plain = {str(in_yaml(file, f"{option.name}: {word}", known)) for word in ("null", "Null", "NULL", "~", "")}
        assert len(plain) == 1, option.name
        if option.takes_null:
            assert outcome([f"--{option.name}", "null"], known) == [(option.name, None, type(None))]
        if option.kind == "str" and not option.choices:
            for word in ("null", "~"):
                ((_, value, _),) = in_yaml(file, f"{option.name}: '{word}'", known)
                assert value == ([word] if option.many and not option.text else word)
        elif option.takes_null:
            assert in_yaml(file, f"{option.name}: 'null'", known) in ([], [(option.name, None, type(None))])
        if option.many and option.kind != "datasets":
            assert f"{option.name} holds null" in in_yaml(file, f"{option.name}: [null]", known)
            assert f"{option.name} holds null" in outcome([f"--{option.name}", "[null]"], known)


TEXTS = [
    (verb, option.name)
    for verb in VERBS
    for option in options_of(verb)
    if option.kind == "str" and not option.choices and not option.many and not option.switch
]
WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12) | st.sampled_from(SPELLINGS)


@given(WORDS, st.sampled_from(TEXTS))
def test_text_arrives_as_it_is_written(tmp_path_factory, text, place):
    verb, name = place
    known, file = known_of(verb), tmp_path_factory.getbasetemp() / "text.yaml"
    arrives = [(name, text, str)]
    assert in_yaml(file, f"{name}: {json.dumps(text)}", known) == arrives
    if can_be_plain(text):
        assert in_yaml(file, f"{name}: {text}", known) == arrives
    if text not in ("null", "Null", "NULL"):
        assert outcome([f"--{name}={text}"], known) == arrives


def test_most_texts_are_tried_in_plain_form():
    assert sum(map(can_be_plain, SPELLINGS)) > 0.9 * len(SPELLINGS)


@given(st.integers(-(2**64), 2**64) | st.integers(-200, 200))
def test_a_whole_number_is_read_to_64_bits(tmp_path_factory, number):
    known, file = known_of("train"), tmp_path_factory.getbasetemp() / "number.yaml"
    found = ways(known["ddp_timeout"], str(number), file, known)
    assert len(found) == 4
    assert found == [found[0]] * 4
    if -(2**63) <= number < 2**63:
        assert found[0] == [("ddp_timeout", number, int)]
    else:
        assert "ddp_timeout is" in found[0]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_read_to_its_last_bit(tmp_path_factory, number):
    known, file = known_of("train"), tmp_path_factory.getbasetemp() / "number.yaml"
    for text in (repr(number), f"{number:e}", f"{number:.17g}"):
        assert ways(known["eval_delay"], text, file, known) == [[("eval_delay", float(text), float)]] * 4


# --- values that belong to no option


@pytest.mark.parametrize("name", [n for n, option in training_options().items() if option.kind == "mapping"])
def test_a_mapping_is_the_same_in_both_sources(name, tmp_path):
    value = {"a": 1, "b": [1e-4, True, None, "007", "no"], "c": {"d": "1:30", "e": 0.5}}
    known, text = known_of("train"), json.dumps(value)
    found = ways(known[name], text, tmp_path / "config.yaml", known)
    found += [
        in_yaml(
            tmp_path / "config.yaml",
            f"{name}:\n  a: 1\n  b: [1e-4, true, null, 007, no]\n  c: {{d: 1:30, e: .5}}",
            known,
        )
    ]
    assert found == [[(name, value, dict)]] * 5
    twice = '{"a": 1, "b": {"c": 1, "c": 2}}'
    for message in ways(known[name], twice, tmp_path / "config.yaml", known):
        assert "c" in message
        assert "stands twice" in message


def test_a_word_in_a_mapping_that_looks_like_a_switch_is_noted(tmp_path):
    base = "model_name_or_path: m\ndataset_name: d\n"
    for word, noted in (("no", True), ("Off", True), ("yes", True), ("true", False), ("sdpa", False), ("n", False)):
        (tmp_path / "config.yaml").write_text(f"{base}gradient_checkpointing_kwargs: {{a: [{{b: {word}}}]}}\n")
        notes = parse_options(["--config", str(tmp_path / "config.yaml")]).notes
        text = f"gradient_checkpointing_kwargs: {word!r} is text in a mapping; a switch there is true or false"
        assert notes == ([text] if noted else [])


def test_the_parts_of_a_mixture_have_types_too(tmp_path):
    known, file = known_of("train"), tmp_path / "config.yaml"
    text = "datasets: [{path: 2024_01, name: 007, split: no, columns: [1:30, on], data_files: {train: 1e5}"
    text += ", fraction: 1e-1}]"
    (part,) = in_yaml(file, text, known)[0][1]
    assert part == {
        **{"path": "2024_01", "name": "007", "split": "no", "columns": ["1:30", "on"]},
        **{"data_files": {"train": "1e5"}, "fraction": 0.1},
    }
    written = json.dumps([part])
    assert (
        outcome(["--datasets", written], known)
        == outcome([f"--datasets={written[1:-1]}"], known)
        == [("datasets", [part], list)]
    )
    assert in_yaml(file, f"datasets: {written}", known) == [("datasets", [part], list)]
    assert in_yaml(file, "datasets: [{path: a, name: null}]", known) == [
        ("datasets", [{"path": "a", "name": None}], list)
    ]
    for wrong in (
        "{path: [a]}",
        "{name: a}",
        "{path: null}",
        "{path: a, fraction: x}",
        "{path: a, paht: b}",
        "{path: a, path: b}",
    ):
        assert isinstance(in_yaml(file, f"datasets: [{wrong}]", known), str), wrong


# --- twice


@each_verb
def test_an_option_that_is_given_twice_is_refused(verb, tmp_path):
    known, file = known_of(verb), tmp_path / "config.yaml"
    for name, option in known.items():
        value = {"mapping": "{}", "bool": "true"}.get(option.kind, option.choices[0] if option.choices else "1")
        flags = [f"--{name}={value}", f"--{name.replace('_', '-')}={value}"]
        flags += [f"--no_{name}"] if option.kind == "bool" and f"no_{name}" not in known else []
        for first in flags:
            for second in flags:
                assert f"{name} is given twice" in outcome([first, second], known)
        message = in_yaml(file, f"{name}: {value}\n{name}: {value}", known)
        assert f"{name} stands twice, in line 1 too" in message


def test_two_names_of_one_option_are_two_values_of_it(tmp_path):
    base = ["--model_name_or_path", "m"]
    for old, new in RENAMED.items():
        option = training_options()[new]
        value = {"bool": "true", "str": option.choices[0] if option.choices else "x", "float": "0.5"}
        value = value.get(option.kind, "1")
        rest = [] if new == "dataset_name" else ["--dataset_name", "d"]
        config = tmp_path / "config.yaml"
        config.write_text(f"{old}: {value}\n{new}: {value}\n")
        for words in ([f"--{old}", value, f"--{new}", value], ["--config", str(config)]):
            with pytest.raises(FNSFTError, match=f"{old} and {new} are two names of one option"):
                parse_options([*base, *rest, *words])
        if option.group not in TRL:
            continue  # whose null is left out
        config.write_text(f"{old}: null\n{new}: {value}\n")
        with pytest.raises(FNSFTError, match="are two names of one option"):
            parse_options([*base, *rest, "--config", str(config)])


def test_both_sources_may_say_it_once(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    found = read_sources(["--config", str(tmp_path / "config.yaml"), "--seed", "2"], known_of("train"))
    assert [given["seed"] for given in found.values()] == [1, 2]


def test_trl_and_this_project_agree_on_what_null_is():
    assert {option.group for option in training_options().values() if option.group in TRL} == set(TRL)
