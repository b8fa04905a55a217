"""Every command line of the original project's documentation, word by word, does here what is said of it there.

Models and datasets of these names lie in the working directory: tiny ones.
"""

import json
import re
import shlex
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, tiny_model, tiny_rows, write_converter
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from fnsft_trl import FunctionalNetworkTemplate
from fnsft_trl.config import ThresholdRule
from fnsft_trl.export import changed_neurons
from fnsft_trl.neurons.mask import NeuronMask
from fnsft_trl.neurons.sites import find_neuron_sites
from fnsft_trl.template.legacy import LEGACY_FILE


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LLAMA, GPT2 = "meta-llama/Llama-3.2-1B-Instruct", "microsoft/DialoGPT-medium"
DATASETS = ("tatsu-lab/alpaca", "databricks/databricks-dolly-15k")
FILES = ("your_dataset.json", "dataset1.json", "dataset2.jsonl", "dataset1", "dataset2")
EXPERIMENT_A = "experiments/peft_vs_peft-ica/experiment_a_peft_only/config/experiment_a_config.yaml"

# The keys that the documentation names, with the values that it gives or recommends.
YAML = {
    "model_name_or_path": LLAMA,
    "dataset_name_or_path": "tatsu-lab/alpaca",
    "output_dir": "./output",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    "max_seq_length": 32,
    "template_format": "auto",
    "torch_dtype": "auto",
    "use_4bit": False,
    "use_8bit": False,
    "gradient_checkpointing": True,
    "lora_r": 8,
    "mask_mode": None,
    "ica_components": 3,
    "ica_percentile": 90.0,
    "ica_pca_preprocessing_components": 16,
    "ica_layers": "all",
    "ica_dtype": "auto",
    "anti_drift_row_param": False,
    "anti_drift_apply_to": "auto",
}
MASKED = {"ica_template_path": "./ica_templates/global_templates.json"}


@pytest.fixture
def workplace(tmp_path, monkeypatch, tokenizer, model_dir, hub):
    """A directory with all that the commands name."""
    monkeypatch.chdir(tmp_path)
    for name, family in ((LLAMA, "llama"), (GPT2, "gpt2"), ("model_name", "llama")):
        tiny_model(family).save_pretrained(name)
        tokenizer.save_pretrained(name)
    for name in (*DATASETS, *FILES):
        path = Path(name)
        if not path.suffix:
            path.mkdir(parents=True)
            path = path / "data.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in tiny_rows(24, seed=len(name))))
    configs = {
        EXPERIMENT_A: YAML,
        "experiment_a_config.yaml": YAML,
        "experiment_config.yaml": YAML,
        "experiment_b_config.yaml": {**YAML, **MASKED, "mask_mode": "lesion", "ica_component_ids": [0, 1]},
        "experiment_c_config.yaml": {
            **{**YAML, **MASKED, "mask_mode": "preserve", "ica_component_ids": [0]},
            **{"anti_drift_row_param": True, "anti_drift_apply_to": "both"},
        },
    }
    for name, settings in configs.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(yaml.safe_dump(settings))
    return tmp_path


def run(command: str, monkeypatch) -> None:
    """Run a command line through the function that its console script is installed for."""
    program, *words = shlex.split(command.replace("\\\n", " "), comments=True)
    module, name = PROJECT["scripts"][program].split(":")
    monkeypatch.setattr(sys, "argv", [program, *words])
    assert getattr(import_module(module), name)() in (0, None)


def the_template(directory, components: int, percentile: float = 98.0) -> FunctionalNetworkTemplate:
    """The template in a directory, checked together with the original's file of the same networks."""
    template = FunctionalNetworkTemplate.from_pretrained(directory)
    listed = FunctionalNetworkTemplate.from_pretrained(Path(directory) / LEGACY_FILE)
    assert len(template.components) == len(listed.components) == components
    assert template.threshold == ThresholdRule("percentile", percentile)
    return template


def the_adapter(rank: int = 16, directory: str = "output") -> dict:
    config = json.loads((Path(directory) / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", rank)
    assert not any("lm_head" in module for module in config["target_modules"])
    with safe_open(Path(directory) / "adapter_model.safetensors", "pt") as file:
        assert any(file.get_tensor(key).any() for key in file.keys() if "lora_B" in key)  # noqa: SIM118
    return config


def is_plain(directory: str = "output") -> bool:
    return not (Path(directory) / "functional_networks").exists()


def the_selection() -> dict:
    return json.loads(Path("output/functional_networks/selection.json").read_text())


def changed(base: str) -> NeuronMask:
    """The neurons that training changed, from the merged model."""
    from fnsft_trl.export import to_merged

    to_merged("output", "merged")
    before, after = (dict(AutoModelForCausalLM.from_pretrained(d).named_parameters()) for d in (base, "merged"))
    return changed_neurons(find_neuron_sites(AutoModelForCausalLM.from_pretrained(base)), before, after)[0]


def basic_training():
    the_adapter()
    assert is_plain()


def experiment_a():
    the_adapter(rank=8)
    assert is_plain()


def lesion_of_three():
    the_adapter(rank=8)
    found = the_selection()
    assert (found["mask_mode"], found["train_neurons"], found["train_method"]) == ("lesion", "all", "lora")
    assert found["network_config"]["ica_component_ids"] == [0, 1, 2]


def preserve_with_anti_drift():
    the_adapter(rank=8)
    found = the_selection()
    assert (found["mask_mode"], found["train_neurons"], found["train_method"]) == ("preserve", "selected", "lora")
    selected = NeuronMask.from_ranges(found["neurons"], dict.fromkeys(range(3), 40), "mlp_intermediate")
    assert selected.count == found["selected"]["count"]
    assert changed(LLAMA) == selected


def lesion_with_a_template():
    the_adapter(rank=8)
    assert the_selection()["network_config"]["ica_component_ids"] == [0, 1]


def lesion_from_the_command_line():
    the_adapter()
    found = the_selection()
    assert (found["mask_mode"], found["train_neurons"]) == ("lesion", "unselected")
    selected = NeuronMask.from_ranges(found["neurons"], dict.fromkeys(range(3), 40), "mlp_intermediate")
    listed = json.loads(Path("ica_templates", LEGACY_FILE).read_text())["templates"]["0"]
    assert {int(layer): neurons for layer, neurons in listed.items()} == {
        layer: selected.indices(layer).tolist() for layer in range(3) if selected.layers[layer].any()
    }
    assert not (changed(GPT2) & selected).count


def gguf():
    assert json.loads(Path("output.gguf").read_text())["arguments"][-1] == "auto"


COMMANDS = {
    # The guide for developers
    r"""fnsft \
    --model_name_or_path meta-llama/Llama-3.2-1B-Instruct \
    --dataset_name_or_path tatsu-lab/alpaca \
    --output_dir ./output \
    --num_train_epochs 2 \
    --use_auth_token""": basic_training,
    f"fnsft --config {EXPERIMENT_A}": experiment_a,
    r"""fnsft \
    --config experiment_config.yaml \
    --mask_mode lesion \
    --ica_component_ids [0,1,2]""": lesion_of_three,
    r"""fnsft \
    --config experiment_config.yaml \
    --mask_mode preserve \
    --ica_component_ids [0] \
    --anti_drift_row_param true \
    --anti_drift_apply_to both""": preserve_with_anti_drift,
    r"""buildtemplates \
    meta-llama/Llama-3.2-1B-Instruct \
    tatsu-lab/alpaca databricks/databricks-dolly-15k""": lambda: the_template("ica_templates", 10),
    r"""buildtemplates \
    microsoft/DialoGPT-medium \
    dataset1.json dataset2.jsonl \
    --ica_template_samples_per_ds 500 \
    --ica_components 20 \
    --ica_percentile 95.0 \
    --ica_template_output ./custom_templates/""": lambda: the_template("custom_templates", 20, 95.0),
    r"""buildtemplates \
    --model_name_or_path meta-llama/Llama-3.2-1B-Instruct \
    --ica_build_templates_from tatsu-lab/alpaca""": lambda: the_template("ica_templates", 10),
    "check-hf-token": lambda: None,
    "convert-gguf --model_path ./output/final_model --output_path ./output.gguf": gguf,
    "fnsft --config experiment_a_config.yaml": experiment_a,
    "buildtemplates model_name dataset1 dataset2": lambda: the_template("ica_templates", 10),
    "fnsft --config experiment_b_config.yaml": lesion_with_a_template,
    "fnsft --config experiment_c_config.yaml": preserve_with_anti_drift,
    # The README
    r"""fnsft \
    --model_name_or_path microsoft/DialoGPT-medium \
    --dataset_name_or_path your_dataset.json \
    --output_dir ./output \
    --num_train_epochs 3 \
    --per_device_train_batch_size 4 \
    --torch_dtype auto \
    --use_auth_token  # Enable authentication for gated models""": basic_training,
    r"""buildtemplates \
    meta-llama/Llama-3.2-1B-Instruct \
    tatsu-lab/alpaca""": lambda: the_template("ica_templates", 10),
    r"""buildtemplates \
    meta-llama/Llama-3.2-1B-Instruct \
    databricks/databricks-dolly-15k \
    tatsu-lab/alpaca""": lambda: the_template("ica_templates", 10),
    r"""buildtemplates \
    meta-llama/Llama-3.2-1B-Instruct \
    dataset1.json dataset2.jsonl \
    --ica_template_samples_per_ds 200 \
    --ica_template_output ./custom/output/ \
    --ica_components 15 \
    --ica_percentile 95.0""": lambda: the_template("custom/output", 15, 95.0),
    r"""fnsft \
    --model_name_or_path microsoft/DialoGPT-medium \
    --dataset_name_or_path your_dataset.json \
    --output_dir ./output \
    --ica_template_path ./ica_templates/global_templates.json \
    --mask_mode lesion \
    --ica_component_ids [0]""": lesion_from_the_command_line,
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: re.sub(r"[\\\s]+", " ", command)[:90])
def test_a_command_of_the_original_runs_as_it_stands(command, workplace, monkeypatch, capsys):
    if command.startswith("convert-gguf"):
        AutoModelForCausalLM.from_pretrained(LLAMA).save_pretrained("output/final_model")
        write_converter(workplace / "converter")
        monkeypatch.setenv("FNSFT_GGUF_CONVERTER", str(workplace / "converter"))
    if "global_templates.json" in command or "experiment_b" in command or "experiment_c" in command:
        model = GPT2 if "DialoGPT" in command else LLAMA
        run(f"buildtemplates {model} tatsu-lab/alpaca --ica_components 3 --ica_percentile 90", monkeypatch)
    run(command, monkeypatch)
    COMMANDS[command]()
    if command.startswith("buildtemplates"):
        assert "Component Coverage Summary:" in capsys.readouterr().out
