"""One table of options for all verbs: each option of each verb is read by the same rules."""

from functools import cache
from importlib import import_module

import pytest
import yaml

from fnsft_trl.cli import VERBS, main
from fnsft_trl.cli.options.arguments import Arguments, read_arguments
from fnsft_trl.cli.options.schema import TRL, Option, by_name, row
from fnsft_trl.cli.options.values import TRUTH
from fnsft_trl.errors import FNSFTError


@cache
def options_of(verb: str) -> list[Option]:
    return import_module(f"fnsft_trl.cli.{verb}").options()


@cache
def new_options(verb: str) -> list[Option]:
    """Its options but for those that a verb before it has: what several have is tried in one of them."""
    verbs = list(VERBS)
    earlier = [option for other in verbs[: verbs.index(verb)] for option in options_of(other)]
    return [option for option in options_of(verb) if option not in earlier]


each_verb = pytest.mark.parametrize("verb", VERBS)


def words_for(verb: str, *but: Option) -> list[str]:
    """The required options of a verb, but for some."""
    required = [option for option in options_of(verb) if option.required and option not in but]
    return [word for option in required for word in (f"--{option.name}", *samples(option)[0][0])]


def samples(option: Option) -> list[tuple[list[str], object]]:
    """Two values of an option: the words of the command line, and what YAML says."""
    if option.kind == "bool":
        return [(["true"], True), (["false"], False)]
    if option.kind == "mapping":
        return [(['{"a": 1}'], {"a": 1}), (['{"b": [2]}'], {"b": [2]})]
    if option.kind == "datasets":
        return [(["x", "y"], ["x", "y"]), (["z"], ["z"])]
    if option.kind in ("int", "float"):
        lowest = option.lowest or 0
        highest = lowest + 2 if option.highest is None else option.highest
        numbers = [lowest + 1, lowest + 2] if highest >= lowest + 2 else [highest / 2, highest / 4]
        numbers = [float(n) if option.kind == "float" else int(n) for n in numbers]
        texts = [str(number) for number in numbers]
    else:
        numbers = texts = list(option.choices[-2:]) or ["first/word", "other.txt"]
    if option.many:
        one = numbers[0] if option.text else numbers[:1]
        return [(texts, numbers), (texts[:1], one)]
    return [([text], number) for text, number in zip(texts, numbers, strict=True)]


def read(verb: str, *words: str) -> Arguments:
    return read_arguments(list(words), options_of(verb))


def read_yaml(verb: str, directory, settings, *words: str) -> Arguments:
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return read(verb, "--config", str(path), *words)


@each_verb
def test_an_option_is_read_the_same_however_it_is_written(verb, tmp_path):
    for option in options_of(verb):
        others = words_for(verb, option)
        for name in (option.name, *option.aliases):
            for words, value in samples(option):
                found = read(verb, f"--{name}", *words, *others)
                assert (option.name in found.given) == (words != ["null"])  # as if it were not there
                assert found == read(verb, f"--{name.replace('_', '-')}", *words, *others)
                assert found == read_yaml(verb, tmp_path, {name: value}, *others)
                if len(words) == 1:
                    assert found == read(verb, f"--{name}={words[0]}", *others)
                    assert found == read(verb, f"--{name.replace('_', '-')}={words[0]}", *others)
                if option.many and option.kind != "datasets" and isinstance(value, list):
                    assert found == read(verb, f"--{name}", f"[{','.join(words)}]", *others)


@each_verb
def test_the_command_line_is_over_yaml_over_the_default(verb, tmp_path):
    for option in options_of(verb):
        others = words_for(verb, option)
        (words, _), (other_words, other_value) = samples(option)
        of_words = vars(read(verb, f"--{option.name}", *words, *others))[option.name]
        of_others = vars(read(verb, f"--{option.name}", *other_words, *others))[option.name]
        assert of_words != of_others
        assert vars(read_yaml(verb, tmp_path, {option.name: other_value}, *others))[option.name] == of_others
        both = read_yaml(verb, tmp_path, {option.name: other_value}, f"--{option.name}", *words, *others)
        assert vars(both)[option.name] == of_words
        if not option.required:
            plain = read(verb, *others)
            assert vars(plain)[option.name] == option.default
            assert option.name not in plain.given


@pytest.mark.slow
@each_verb
def test_a_boolean_is_read_by_one_table(verb, tmp_path):
    for option in (option for option in options_of(verb) if option.kind == "bool"):
        others = words_for(verb)
        for word, truth in TRUTH.items():
            for written in (word, word.upper()):
                assert vars(read(verb, f"--{option.name}", written, *others))[option.name] is truth
                assert vars(read(verb, *others, f"--{option.name}={written}"))[option.name] is truth
                assert vars(read_yaml(verb, tmp_path, {option.name: written}, *others))[option.name] is truth
        assert vars(read(verb, f"--{option.name}", *others))[option.name] is True
        for negated in (f"--no_{option.name}", f"--no-{option.name.replace('_', '-')}"):
            assert vars(read(verb, negated, *others))[option.name] is False
        for wrong in ("perhaps", "2"):
            with pytest.raises(FNSFTError, match=f"{option.name} is '{wrong}'; it must be true or false"):
                read(verb, f"--{option.name}={wrong}", *others)


def test_the_truth_table_has_the_words_that_people_write():
    assert {word for word, truth in TRUTH.items() if truth} >= {"true", "yes", "on", "1"}
    assert {word for word, truth in TRUTH.items() if not truth} >= {"false", "no", "off", "0"}


@each_verb
def test_null_is_the_default_or_a_value_of_trl(verb, tmp_path):
    for option in options_of(verb):
        if option.required:
            with pytest.raises(FNSFTError, match=f"{option.name} is missing"):
                read_yaml(verb, tmp_path, {option.name: None}, *words_for(verb, option))
            continue
        others = words_for(verb)
        if option.nullable or option.group not in TRL:
            _, (_, other_value) = samples(option)
            for found in (
                read_yaml(verb, tmp_path, {option.name: None}, *others),
                read(verb, f"--{option.name}", "null", *others),
                read_yaml(verb, tmp_path, {option.name: other_value}, f"--{option.name}", "null", *others),
            ):
                assert vars(found)[option.name] == option.default
                assert option.name not in found.given
        else:
            if option.kind in ("bool", "int", "float") and not option.text:
                with pytest.raises(FNSFTError, match=f"{option.name} is 'null'"):
                    read(verb, f"--{option.name}=null", *others)
            with pytest.raises(FNSFTError, match=f"{option.name} is null; it must be"):
                read_yaml(verb, tmp_path, {option.name: None}, *others)


def refused(capsys, *words: str) -> str:
    assert main(list(words)) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert (out, line.startswith(f"fnsft {words[0]}: error: ")) == ("", True)
    return line


@pytest.mark.slow
@each_verb
def test_a_name_that_is_not_known_is_one_line_with_the_nearest(verb, tmp_path, capsys):
    names = list(by_name(options_of(verb)))
    config = tmp_path / "config.yaml"
    for name in by_name(new_options(verb)) or names[:1]:
        near = [f"did you mean '{other}'" for other in names if other.startswith(name[:2])]
        config.write_text(f"{name}x: 1\n")
        for line in (refused(capsys, verb, f"--{name}x", "1"), refused(capsys, verb, "--config", str(config))):
            assert f"{name}x" in line
            assert any(hint in line for hint in near), line
    config.write_text("nested: {a: 1}\n")
    assert "options are not nested" in refused(capsys, verb, "--config", str(config))
    assert "there is no option --" in refused(capsys, verb, "--")


@each_verb
def test_no_abbreviation_is_taken(verb, capsys):
    names = by_name(options_of(verb))
    for name in by_name(new_options(verb)):
        if len(name) > 1 and name[:-1] not in names:
            assert f"there is no option --{name[:-1]}" in refused(capsys, verb, f"--{name[:-1]}", "1")


@each_verb
def test_a_config_file_that_cannot_be_used_is_one_line(verb, tmp_path, capsys):
    assert "there is no config file" in refused(capsys, verb, "--config", str(tmp_path / "nowhere.yaml"))
    assert "takes one YAML file" in refused(capsys, verb, "--config")
    for text, message in (("- a", "must hold a mapping"), ("a: [", "not valid YAML")):
        (tmp_path / "config.yaml").write_text(text)
        assert message in refused(capsys, verb, "--config", str(tmp_path / "config.yaml"))


@each_verb
def test_a_value_of_another_type_is_the_same_error_in_both_sources(verb, tmp_path):
    others = words_for(verb)
    for option in options_of(verb):
        if option.kind in ("int", "float") and not option.many and not option.text:
            messages = []
            for call in (
                lambda name=option.name: read(verb, f"--{name}", "many", *others),
                lambda name=option.name: read_yaml(verb, tmp_path, {name: "many"}, *others),
            ):
                with pytest.raises(FNSFTError, match=f"{option.name} is 'many'; it must be") as caught:
                    call()
                messages.append(str(caught.value))
            assert messages[0] == messages[1]
        if option.lowest is not None:
            with pytest.raises(FNSFTError, match=f"{option.name} is .*; it must be (at least|from)"):
                read(verb, f"--{option.name}", str(int(option.lowest) - 1), *others)
        if not option.many and option.kind != "mapping":
            with pytest.raises(FNSFTError, match=f"{option.name} is a list"):
                read_yaml(verb, tmp_path, {option.name: ["a", "b"]}, *others)


@each_verb
def test_the_help_lists_every_option_with_what_it_does(verb, capsys):
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: fnsft {verb}")
    assert ("[--config FILE.yaml]" in text) == bool(options_of(verb))
    flags = set(text.replace(",", " ").split())
    for option in options_of(verb):
        assert option.help, option.name
        assert {f"--{name}" for name in (option.name, *option.aliases)} <= flags
    assert main([verb, "-h"]) == 0
    assert capsys.readouterr().out == text


# --- options whose name may be left out

PLACES = [
    row("model", "A model.", positional=True, required=True),
    row("data", "Datasets.", positional=True, required=True, many=True),
    row("size", "A number.", 1),
    row("fast", "A switch.", False),
    row("layers", "A list.", many=True),
]


def placed(*words: str) -> Arguments:
    return read_arguments(list(words), PLACES)


@pytest.mark.parametrize(
    "words",
    [
        ["m", "d", "e", "--size", "3", "--fast"],
        ["--size", "3", "--fast", "m", "d", "e"],
        ["--fast", "--size", "3", "m", "d", "e"],
        ["--fast", "on", "--size=3", "m", "d", "e"],
        ["--size", "3", "m", "d", "e", "--fast"],
        ["--model", "m", "d", "e", "--size", "3", "--fast", "yes"],
        ["--fast", "--size", "3", "--model", "m", "--data", "d", "e"],
        ["m", "--data", "d", "e", "--size", "3", "--fast"],
        ["m", "--data", "[d,e]", "--size", "3", "--fast", "true"],
    ],
    ids=" ".join,
)
def test_words_without_a_name_fill_the_places_that_are_left(words):
    found = placed(*words)
    assert (found.model, found.data, found.size, found.fast) == ("m", ["d", "e"], 3, True)


def test_a_place_can_be_filled_in_the_file(tmp_path):
    (tmp_path / "config.yaml").write_text("data: [d, e]\n")
    for words in (["m", "--config"], ["--model=m", "--config"]):
        found = placed(*words, str(tmp_path / "config.yaml"))
        assert (found.model, found.data) == ("m", ["d", "e"])
    assert placed("--config", str(tmp_path / "config.yaml"), "m", "f").data == ["f"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "model and data are missing; give VALUE VALUE..."),
        (["m"], "data is missing"),
        (["m", "d", "--size", "3", "stray"], "size takes one value, 2 were given: 3 stray"),
        (["m", "d", "--fast", "perhaps"], "fast is 'perhaps'; it must be true or false"),
        (["m", "--size=3", "d"], "'d' is no option"),
        (["m", "d", "-x"], "'-x' is no option"),
        (["--no_fast", "m", "d", "--size", "x"], "size is 'x'; it must be a whole number"),
        (["m", "d", "--no_fast", "true"], "--no_fast takes no value"),
        (["x", "y", "--model", "m", "--data", "d"], "'x' is one argument too many: model, data can be given"),
        (["--layers", "1", "m", "d"], "model and data are missing"),
    ],
    ids=str,
)
def test_words_that_have_no_place_are_refused(words, message):
    with pytest.raises(FNSFTError, match=message):
        placed(*words)


def test_an_option_under_two_names_is_refused():
    known = [row("new", "A number.", 1, aliases=("old",))]
    assert read_arguments(["--old", "2"], known).new == 2
    with pytest.raises(FNSFTError, match="old and new are two names of one option; drop old"):
        read_arguments(["--old", "2", "--new", "3"], known)
