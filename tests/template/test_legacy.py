"""Templates of the original project: read, used, converted, written."""

import json

import pytest
from helpers import tiny_model

from fnsft_trl import FNSFTError, FunctionalNetworkTemplate, select_neurons
from fnsft_trl.cli import main
from fnsft_trl.config import ThresholdRule


@pytest.fixture
def original():
    """As the original's builder writes it, for a model of 3 layers and 16 output channels."""
    return {
        "name": "global_templates_v1",
        "layout": {"captured_layers_sorted": [0, 1, 2], "hidden_size": 16},
        "templates": {"0": {"0": [1, 5, 9], "2": [0]}, "1": {"1": [15, 2]}},
    }


@pytest.fixture
def file(original, tmp_path):
    path = tmp_path / "global_templates.json"
    path.write_text(json.dumps(original))
    return path


def test_networks_and_what_is_unknown(file):
    template = FunctionalNetworkTemplate.from_pretrained(file)
    assert template.site == "mlp_output"
    assert template.listed() == [{0: [1, 5, 9], 2: [0]}, {1: [2, 15]}]
    assert [(c.neurons, c.reliability, c.kurtosis) for c in template.components] == [(4, None, None), (2, None, None)]
    template.check_model(tiny_model("llama"))
    mask = select_neurons(template, [0, 1])
    assert {layer: mask.indices(layer).tolist() for layer in mask.layers} == {0: [1, 5, 9], 1: [2, 15], 2: [0]}
    with pytest.raises(FNSFTError, match="reliability is unknown"):
        select_neurons(template, min_reliability=0.5)
    with pytest.raises(FNSFTError, match="needs each neuron's RMS"):
        select_neurons(template, selector="activation", fraction=0.1)
    with pytest.raises(FNSFTError, match="no threshold applies"):
        template.with_threshold(ThresholdRule())


def test_a_model_of_another_width_is_refused(original, file):
    original["layout"]["hidden_size"] = 17
    file.write_text(json.dumps(original))
    with pytest.raises(FNSFTError, match="17 neurons in layer 0, but the model has 16"):
        FunctionalNetworkTemplate.from_pretrained(file).check_model(tiny_model("llama"))


def test_inspect_shows_and_converts(file, tmp_path, capsys):
    assert main(["inspect", str(file)]) == 0
    text = capsys.readouterr().out
    assert "2 functional networks of unknown" in text
    assert "mlp_output: 48 neurons, layers 0-2" in text
    assert main(["inspect", str(file), "--convert", str(tmp_path / "new")]) == 0
    converted = FunctionalNetworkTemplate.from_pretrained(tmp_path / "new")
    assert converted.listed() == FunctionalNetworkTemplate.from_pretrained(file).listed()
    card = (tmp_path / "new" / "README.md").read_text()
    assert "Reliability is unknown" in card
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["layout"], None),
        (["layout", "hidden_size"], 0),
        (["layout", "hidden_size"], "16"),
        (["layout", "captured_layers_sorted"], [-1]),
        (["layout", "captured_layers_sorted"], []),
        (["site"], "attention"),
        (["templates"], []),
        (["templates"], {}),
        (["templates"], {"1": {}}),
        (["templates", "0"], [1]),
        (["templates", "0"], {"7": [1]}),
        (["templates", "0", "0"], [16]),
        (["templates", "0", "0"], [-1]),
        (["templates", "0", "0"], [1.5]),
        (["templates", "0", "0"], "1"),
        (["templates", "0", "0"], [True]),
    ],
)
def test_lists_that_make_no_sense_are_refused(original, file, path, value):
    *parents, last = path
    place = original
    for key in parents:
        place = place[key]
    place[last] = value
    file.write_text(json.dumps(original))
    with pytest.raises(FNSFTError, match=r"global_templates\.json") as refused:
        FunctionalNetworkTemplate.from_pretrained(file)
    assert "\n" not in str(refused.value)


def test_a_file_of_another_kind_is_refused(file):
    file.write_text('{"some": "thing"}')
    with pytest.raises(FNSFTError, match="no template of the original project"):
        FunctionalNetworkTemplate.from_pretrained(file)
    file.write_text("not JSON")
    with pytest.raises(FNSFTError, match="not valid JSON"):
        FunctionalNetworkTemplate.from_pretrained(file)


def test_the_original_s_build_command_writes_the_original_s_form(model_dir, rows, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    target = tmp_path / "made"
    arguments = ["--model_name_or_path", str(model_dir), "--ica_build_templates_from", str(data)]
    arguments += ["--ica_template_output", str(target), "--ica_components", "2", "--ica_percentile", "80"]
    arguments += ["--ica_max_tokens", "200", "--ica_rank", "8", "--ica_site", "mlp_output", "--max_seq_length", "32"]
    assert main(["discover", *arguments]) == 0
    made = json.loads((target / "global_templates.json").read_text())
    assert made["layout"] == {"captured_layers_sorted": [0, 1, 2], "hidden_size": 16}
    assert sum(len(neurons) for neurons in made["templates"]["0"].values()) == 10  # 20% of 48 channels
    whole = FunctionalNetworkTemplate.from_pretrained(target)
    lists = FunctionalNetworkTemplate.from_pretrained(target / "global_templates.json")
    assert lists.listed() == whole.listed()
    assert lists.site == whole.site == "mlp_output"
    assert whole.settings["ica_max_length"] == 32


def test_the_original_s_training_command_takes_the_file(model_dir, rows, file, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    arguments = ["--model_name_or_path", str(model_dir), "--dataset_name", str(data), "--mask_mode", "lesion"]
    arguments += ["--ica_template_path", str(file), "--ica_component_ids", "[0]", "--ica_percentile", "98.0"]
    arguments += ["--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--use_cpu", "--bf16", "false"]
    arguments += ["--report_to", "none", "--max_length", "32", "--save_strategy", "no", "--disable_tqdm", "true"]
    assert main(arguments) == 0
    selection = json.loads((tmp_path / "out" / "functional_networks" / "selection.json").read_text())
    assert selection["neurons"] == {"0": "1,5,9", "2": "0"}
    assert selection["network_config"]["ica_site"] == "mlp_output"


def test_a_small_file_cannot_ask_for_a_large_memory(tmp_path):
    path = tmp_path / "template.json"
    layout = {"captured_layers_sorted": list(range(16)), "hidden_size": 2**24 - 1}
    path.write_text(json.dumps({"name": "x", "layout": layout, "templates": {"0": {"0": [1]}}}))
    with pytest.raises(FNSFTError, match="hardly any neuron"):
        FunctionalNetworkTemplate.from_pretrained(path)
