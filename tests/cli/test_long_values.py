"""Values of any size: what is said about them has an end, and no number of networks is made up for them."""

import json

import pytest
from lm_eval.tasks import TaskManager
from test_options_of_verbs import each_verb, new_options, words_for

from fnsft_trl import FNSFTError, FunctionalNetworkConfig, select_neurons
from fnsft_trl.cli import main
from fnsft_trl.cli.options.parse import parse_options
from fnsft_trl.cli.options.schema import TRL, Option
from fnsft_trl.ranges import is_open, parse_ranges


MOST = 2200  # letters of a message, with the name of its verb
LONG = 5000  # more than that, and more digits than Python makes a number of


def values(option: Option) -> list[str]:
    """What to write in YAML: a long text, a path of long names, a long list and a long mapping, deep nesting."""
    long = "9" * LONG if option.kind in ("int", "float") else "x" * LONG
    listed = f"[{', '.join(str(10**20 + n) for n in range(120))}]"
    return [long, f"{'y' * 300}/{'z' * 300}", listed, f"{{a: {listed}, {'k' * 1000}: 1}}", "[" * 45 + "]" * 45]


@pytest.fixture
def workplace(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    own = {"include_defaults": False}  # the thousands of tasks of lm-eval's own take seconds to be read
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **given: TaskManager(**given | own))
    return tmp_path


@pytest.mark.slow
@each_verb
def test_a_value_of_any_size_is_refused_in_few_words_or_taken(verb, workplace, capsys):
    """What is taken is refused with the rest of the call, whose model or template does not exist."""
    seen = set()
    for option in new_options(verb):
        base = ["--model_name_or_path", "no/model", "--dataset_name", "rows.jsonl"]
        base = words_for(verb, option) if verb != "train" else base
        place = base.index(f"--{option.name}") if f"--{option.name}" in base else len(base)
        form = (option.kind, option.many, option.text, option.nullable, bool(option.choices))
        is_like_others = option.group in TRL and form in seen  # read by the same lines, and checked by TRL
        seen.add(form)
        for value in values(option)[: 1 if is_like_others else None]:
            (workplace / "config.yaml").write_text(f"{option.name}: {value}\n")
            assert main([verb, *base[:place], *base[place + 2 :], "--config", "config.yaml"]) == 2, option.name
            out, err = capsys.readouterr()
            assert out == ""
            said = [line for line in err.splitlines() if line.startswith("fnsft ")]
            assert len(said) == 1, (option.name, err[:300])
            assert len(said[0]) < MOST, option.name


def test_a_message_keeps_its_beginning_and_its_end():
    message = str(FNSFTError("beginning " + "x" * 10**6 + " end"))
    assert message.startswith("beginning xxx")
    assert message.endswith("xxx end")
    assert len(message) < MOST
    assert str(FNSFTError("x" * 2000)) == "x" * 2000
    with pytest.raises(FNSFTError, match=r"ica_components is .*characters left out.*; it must be a whole number"):
        FunctionalNetworkConfig(ica_components=["x" * 10**6])


# --- networks with an open end


@pytest.mark.parametrize("text", ["5:", "[5:]", "0:", ":", "0-2,7:", "99999:"])
def test_an_open_end_waits_for_the_number_of_networks(text):
    config = FunctionalNetworkConfig(ica_component_ids=text)
    assert isinstance(config.ica_component_ids, str)
    assert FunctionalNetworkConfig(**json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(("text", "expected"), [("1:", [1, 2]), ("0,2:", [0, 2]), (":", [0, 1, 2]), ("0:2", [0, 1])])
def test_an_open_end_is_the_last_network_of_the_template(text, expected, templates):
    template = templates["llama"]
    config = FunctionalNetworkConfig(ica_component_ids=text)
    assert parse_ranges(config.ica_component_ids, len(template.components)) == expected
    assert select_neurons(template, config.ica_component_ids) == select_neurons(template, expected)
    with pytest.raises(FNSFTError, match="'3:' is outside 0-2"):
        select_neurons(template, "3:")


@pytest.mark.parametrize("text", ["10:", "0-10", "12", "[3, 12]", "99:", "0-9999"])
def test_networks_that_no_discovery_will_find_are_refused_before_it(text):
    base = ["--model_name_or_path", "m", "--dataset_name", "d", "--ica_components", "10"]
    with pytest.raises(FNSFTError, match="0-9") as error:
        parse_options([*base, "--ica_component_ids", text])
    assert len(str(error.value)) < 300
    assert parse_options([*base, "--ica_component_ids", text, "--ica_template_path", "t"]).network_config


@pytest.mark.parametrize("text", ["0-99999999", "99999999", "0:10000000", "9" * 5000, f"0-{'9' * 5000}"])
def test_no_list_is_made_longer_than_there_can_be_networks(text):
    with pytest.raises(FNSFTError, match="ica_component_ids"):
        FunctionalNetworkConfig(ica_component_ids=text)


def test_what_is_open_is_what_reaches_to_the_end():
    assert all(map(is_open, ("all", "0:", ":", "3,5:", "[1:]")))
    assert not any(map(is_open, ("3", "0-5", ":4", "0:4,9", [1, 2], 3)))
