"""The options of `fnsft train`: their schema, their values, the two sources, and the original project's names."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import trl
import yaml
from helpers import ROOT

from fnsft_trl.cli import main, train
from fnsft_trl.cli.options import trl_options
from fnsft_trl.cli.options.help import format_help
from fnsft_trl.cli.options.parse import parse_options, training_options
from fnsft_trl.cli.options.schema import TRL, describe
from fnsft_trl.cli.options.sources import read_sources
from fnsft_trl.cli.options.translate import (
    DEVICE_DTYPE,
    DROPPED,
    INSTRUCTION,
    NETWORK_NAMES,
    RENAMED,
    SWITCHES,
    original_options,
)
from fnsft_trl.config import FunctionalNetworkConfig
from fnsft_trl.errors import FNSFTError


BASE = ["--model_name_or_path", "m", "--dataset_name", "d.jsonl"]
ORIGINAL = ["--model_name_or_path", "m", "--dataset_name_or_path", "d.jsonl"]


@pytest.fixture(scope="module")
def options():
    return training_options()


def parsed(*words, base=BASE):
    return parse_options([*base, *words])


def from_yaml(tmp_path, settings, *words, base=BASE):
    path = tmp_path / "config.yaml"
    path.write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings))
    return parse_options(["--config", str(path), *base, *words])


# --- the schema


def test_every_field_of_every_dataclass_is_an_option(options):
    for name in TRL:
        for field in dataclasses.fields(getattr(trl, name)):
            if field.name != "parallelism_config":  # an object of accelerate, which no text can express
                assert options[field.name].group == name
    assert set(FunctionalNetworkConfig.field_names()) <= set(options)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("learning_rate", {"kind": "float", "many": False, "nullable": False}),
        ("max_length", {"kind": "int", "nullable": True}),
        ("bf16", {"kind": "bool", "nullable": True}),
        ("report_to", {"kind": "str", "many": True, "text": True}),
        ("lora_target_modules", {"kind": "str", "many": True, "text": False}),
        ("model_init_kwargs", {"kind": "mapping", "text": True}),
        ("datasets", {"kind": "datasets", "many": True}),
        ("fsdp", {"kind": "str", "switch": True}),
        ("ica_component_ids", {"kind": "int", "many": True, "text": True, "nullable": True}),
        ("ica_layers", {"kind": "int", "many": True, "text": True}),
        ("pad_to_multiple_of", {"kind": "int"}),
    ],
)
def test_types_are_read_from_the_dataclasses(options, name, expected):
    assert {key: getattr(options[name], key) for key in expected} == expected


def test_choices_are_those_of_enums_literals_and_trackers(options):
    assert "cosine" in options["lr_scheduler_type"].choices
    assert "adamw_torch" in options["optim"].choices
    assert options["eval_strategy"].choices == ("no", "steps", "epoch")
    assert {"trackio", "wandb", "tensorboard", "mlflow", "none"} <= set(options["report_to"].choices)
    assert "path" in options["datasets"].choices


def test_the_schema_is_kept_and_equals_what_the_dataclasses_say(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FNSFT_CACHE", str(tmp_path))
    made = training_options()
    assert "once" in capsys.readouterr().err
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["options"]
    assert training_options() == made
    assert capsys.readouterr().err == ""
    direct = [option for name in TRL for option in describe(getattr(trl, name))]
    for option in direct:
        assert made[option.name].kind == option.kind


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"sha256": "0", "options": []}', "cut", "changed", "binary"])
def test_a_damaged_schema_is_made_anew(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("FNSFT_CACHE", str(tmp_path))
    made = training_options()
    (file,) = tmp_path.iterdir()
    whole = file.read_text()
    damaged = {"cut": whole[:-40], "changed": whole.replace('"float"', '"int"', 1), "binary": "\0\1"}
    file.write_text(damaged.get(damage, damage))
    assert training_options() == made
    assert file.read_text() == whole


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FNSFT_CACHE", str(tmp_path / "file" / "cache"))
    assert "learning_rate" in training_options()


def test_other_versions_have_a_schema_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("FNSFT_CACHE", str(tmp_path))
    training_options()
    monkeypatch.setattr(trl_options, "version", lambda package: "0.0.1")
    training_options()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["train", "--help"], 0),
        (["train", "--lerning_rate", "1"], 2),
        (["train", *BASE, "--optim", "adam"], 2),
        (["train", *BASE, "--config", "{yaml}"], 2),
        (["train", *BASE, "--mask_mode", "lesions"], 2),
        (["train", *BASE, "--use_4bit", "--use_8bit"], 2),
        (["discover", "--help"], 0),
        (["inspect", "--help"], 0),
        (["compare", "--help"], 0),
        (["export", "--help"], 0),
        (["demo", "--help"], 0),
        (["env", "--help"], 0),
        (["auth", "--help"], 0),
        (["discover", "m", "d", "--lerning_rate", "1"], 2),
        (["compare", "a", "b", "--config", "{yaml}"], 2),
        (["export", "a", "--to", "merged", "--output_dir", "o", "--load_in_4bit"], 2),
        (["env", "--config", "{yaml}"], 2),
    ],
    ids=str,
)
def test_help_and_refusals_import_nothing_heavy(arguments, status, tmp_path, options):
    (tmp_path / "bad.yaml").write_text("lerning_rate: 1\n")
    arguments = [word.replace("{yaml}", str(tmp_path / "bad.yaml")) for word in arguments]
    code = (
        "import sys; from fnsft_trl.cli import main\n"
        f"try: status = main({arguments!r})\nexcept SystemExit as e: status = e.code or 0\n"
        f"assert status == {status}, status\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'accelerate', 'numpy', 'pandas', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_help_shows_every_option_ours_first(options, capsys):
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.strip() == format_help("train", train.ABOUT, train.options())
    assert all(f"  --{name}" in text for name in options)
    titles = ["functional networks:", "data (TRL):", "model, LoRA and quantisation (TRL):", "training (TRL):"]
    places = [text.index(title) for title in titles]
    assert places == sorted(places)
    assert "One of: linear, cosine" in text
    assert not re.search(r"^\w*(Config|Arguments):$", text, flags=re.MULTILINE)  # every group has a title
    assert "%%" not in text


# --- values


@pytest.mark.parametrize(
    ("words", "name", "expected"),
    [
        (["--ica_component_ids", "0", "1", "2"], "ica_component_ids", [0, 1, 2]),
        (["--ica_component_ids", "[0,1,2]"], "ica_component_ids", [0, 1, 2]),
        (["--ica_component_ids", "[0,", "1,", "2]"], "ica_component_ids", [0, 1, 2]),
        (["--ica_component_ids=[0]"], "ica_component_ids", [0]),
        (["--ica-component-ids", "3"], "ica_component_ids", [3]),
        (["--ica_component_ids", "0-2,5"], "ica_component_ids", "0-2,5"),
        (["--ica_layers", "0:4,9", "--train_neurons", "selected"], "ica_layers", "0:4,9"),
        (["--ica_layers", "[0,", "2]", "--train_neurons", "selected"], "ica_layers", [0, 2]),
        (["--learning_rate", "1e-4"], "learning_rate", 1e-4),
        (["--learning-rate=2e-4"], "learning_rate", 2e-4),
        (["--max_steps", "-1"], "max_steps", -1),
        (["--max_length", "null"], "max_length", None),
        (["--packing"], "packing", True),
        (["--packing", "false"], "packing", False),
        (["--no_packing"], "packing", False),
        (["--no-packing"], "packing", False),
        (["--bf16=False"], "bf16", False),
        (["--report_to", "none"], "report_to", "none"),
        (["--report_to", "wandb", "mlflow"], "report_to", ["wandb", "mlflow"]),
        (["--model_init_kwargs", '{"use_cache": false}'], "model_init_kwargs", {"use_cache": False}),
        (["--fsdp"], "fsdp", True),
        (["--fsdp", "full_shard auto_wrap"], "fsdp", "full_shard auto_wrap"),
        (["--use_peft", "--lora_target_modules", "q_proj", "v_proj"], "lora_target_modules", ["q_proj", "v_proj"]),
        (["--use_peft", "--lora_target_modules", '["q_proj"]'], "lora_target_modules", ["q_proj"]),
        (["--pad_to_multiple_of", "8"], "pad_to_multiple_of", 8),
        (["--run_name", "2024"], "run_name", "2024"),
    ],
    ids=str,
)
def test_values_from_the_command_line(words, name, expected):
    value = parsed(*words).values[name]
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("settings", "name", "expected"),
    [
        ("learning_rate: 1e-4", "learning_rate", 1e-4),  # which YAML 1.1 reads as text
        ("max_length: null", "max_length", None),
        ("eval_strategy: no", "eval_strategy", "no"),  # which YAML 1.1 reads as false
        ("ica_component_ids: [0, 1]", "ica_component_ids", [0, 1]),
        ("ica_component_ids: 0-3", "ica_component_ids", "0-3"),
        ("ica_layers: 3\ntrain_neurons: selected", "ica_layers", [3]),
        ("bf16: 'true'", "bf16", True),
        ("report_to: [wandb]", "report_to", ["wandb"]),
        ("model_init_kwargs: {a: 1}", "model_init_kwargs", {"a": 1}),
        ("fsdp: true", "fsdp", True),
        ("warmup_steps: 5", "warmup_steps", 5.0),
    ],
)
def test_values_from_yaml(tmp_path, settings, name, expected):
    value = from_yaml(tmp_path, settings).values[name]
    assert value == expected
    assert type(value) is type(expected)


def test_a_mixture_of_datasets(tmp_path):
    settings = {"datasets": [{"path": "a.jsonl", "split": "train"}, "b"]}
    assert from_yaml(tmp_path, settings, base=BASE[:2]).values["datasets"] == [settings["datasets"][0], {"path": "b"}]
    assert parsed("--datasets", "a", "b", base=BASE[:2]).values["datasets"] == [{"path": "a"}, {"path": "b"}]
    with pytest.raises(FNSFTError, match="no 'pth'; did you mean 'path'"):
        from_yaml(tmp_path, {"datasets": [{"path": "a", "pth": "b"}]}, base=BASE[:2])


@pytest.mark.parametrize("name", [n for n, o in training_options().items() if o.kind == "bool" and n != "use_peft"])
def test_every_boolean_can_be_negated(options, name):
    sources = (["--" + name, "false"], [f"--no_{name}"], [f"--no-{name.replace('_', '-')}"], [f"--{name}=False"])
    for words in sources:
        assert list(read_sources(words, options).values()) == [{name: False}]
    assert list(read_sources([f"--{name}"], options).values()) == [{name: True}]


# --- the two sources


def test_command_line_over_yaml_over_defaults(tmp_path):
    found = from_yaml(tmp_path, {"seed": 1, "max_steps": 7}, "--seed", "2").values
    assert (found["seed"], found["max_steps"], found.get("learning_rate")) == (2, 7, None)
    original = from_yaml(tmp_path, {"max_seq_length": 64}, "--max_length", "32").values
    assert original["max_length"] == 32
    assert from_yaml(tmp_path, {"max_length": 64}, "--max_seq_length=32").values["max_length"] == 32


def test_a_switch_of_the_command_line_overrules_what_it_contradicts_in_the_file(tmp_path):
    settings = {"use_4bit": True, "use_peft": True, "bf16": True}
    found = from_yaml(tmp_path, settings, "--use_8bit", "--fp16")
    assert (found.values["load_in_8bit"], found.values["fp16"]) == (True, True)
    assert not {"load_in_4bit", "bf16"} & set(found.values)
    assert sum("overruled" in note for note in found.notes) == 2
    mixture = from_yaml(tmp_path, {"dataset_name": "a"}, "--datasets", "b", base=BASE[:2]).values
    assert "dataset_name" not in mixture
    settings = {"use_peft": True, "lora_r": 8, "merge_adapter_with_base": True}
    found = from_yaml(tmp_path, settings, "--no_peft")
    assert found.values["use_peft"] is False
    assert not {"lora_r", "merge_adapter_with_base"} & set(found.values)


def test_a_file_with_no_peft_may_keep_the_options_of_lora(tmp_path):
    settings = {"no_peft": True, "lora_r": 8, "lora_dropout": 0.0, "merge_adapter_with_base": True}
    found = from_yaml(tmp_path, settings, base=ORIGINAL)
    assert found.values["use_peft"] is False
    assert not settings.keys() & set(found.values)
    assert "lora_r, lora_dropout, merge_adapter_with_base of the config file: no effect with no_peft" in found.notes
    kept = from_yaml(tmp_path, settings, "--no_peft", "false", base=ORIGINAL).values
    assert (kept["use_peft"], kept["lora_r"], kept["merge_adapter_with_base"]) == (True, 8, True)
    with pytest.raises(FNSFTError, match="lora_r has no effect without LoRA"):
        from_yaml(tmp_path, settings, "--lora_r", "4", base=ORIGINAL)


def test_what_a_template_overrules_is_a_note_in_a_command_of_the_original(tmp_path):
    settings = {"mask_mode": "lesion", "ica_template_path": "t", "ica_layers": "0-3", "ica_percentile": 95.0}
    idle = {"ica_components": 7, "ica_pca_preprocessing_components": 64, "ica_build_templates_from": ["a"]}
    found = from_yaml(tmp_path, settings | idle, base=ORIGINAL)
    assert "no effect with ica_template_path, as in the original project: " in (note := found.notes[-1])
    assert set(note.partition(": ")[2].split(", ")) == {"ica_components", "ica_rank", "ica_datasets"}
    config = found.network_config
    assert (config.ica_components, config.ica_rank, config.ica_datasets) == (10, 128, None)
    assert (config.ica_layers, config.ica_percentile) == ("0-3", 95.0)
    assert from_yaml(tmp_path, settings | idle).network_config.ica_components == 7  # refused with the template


def test_a_push_without_a_repository_is_the_original_s_error_and_trl_s_default():
    assert parsed("--push_to_hub").values.get("hub_model_id") is None
    assert any("named as the output_dir" in note for note in parsed("--push_to_hub").notes)
    with pytest.raises(FNSFTError, match="push_to_hub needs hub_repo_id"):
        parsed("--push_to_hub", base=ORIGINAL)


def test_an_evaluation_that_is_described_and_not_asked_for_is_noted():
    assert (
        "eval_fraction, eval_steps: no effect without"
        in parsed("--eval_fraction", "0.3", "--eval_steps", "5").notes[0]
    )
    assert parsed("--eval_fraction", "0.3", "--eval_strategy", "epoch").notes == []


# --- the original project's names


@pytest.mark.parametrize(
    ("words", "name", "expected"),
    [
        ([], "dataset_name", "d.jsonl"),
        (["--max_seq_length", "64"], "max_length", 64),
        (["--torch_dtype", "bfloat16"], "dtype", "bfloat16"),
        (["--torch_dtype", "auto"], "dtype", DEVICE_DTYPE),
        (["--use_4bit"], "load_in_4bit", True),
        (["--use_8bit", "true"], "load_in_8bit", True),
        (["--push_to_hub", "--hub_repo_id", "a/b", "--hub_token", "t"], "hub_model_id", "a/b"),
        (["--use_wandb"], "report_to", ["wandb"]),
        (["--use_wandb", "--report_to", "mlflow"], "report_to", ["mlflow", "wandb"]),
        (["--no_peft"], "use_peft", False),
        (["--no_peft", "false"], "use_peft", True),
        (["--no_use_peft"], "use_peft", False),
        ([], "use_peft", True),
        (["--warmup_ratio", "0.1"], "warmup_steps", 0.1),
        (["--evaluation_strategy", "steps"], "eval_strategy", "steps"),
        (["--lora_target_modules", "q_proj"], "lora_target_modules", ["q_proj"]),
        (["--merge_adapter_with_base"], "merge_adapter_with_base", True),
        (["--wandb_run_name", "a7"], "run_name", "a7"),
        (["--instruction_template", "alpaca"], "template_format", "alpaca"),
        (["--instruction_template", "Q {instruction}\\nA "], "prompt_template", "Q {instruction}\\nA {response}"),
        (["--instruction_template", "Q {instruction} A {response}"], "template_format", "basic"),
        (["--pretokenize", "--pretokenize_num_proc", "4", "--pretokenize_dir=x"], "use_peft", True),
        (["--use_existing_splits", "--anti_drift_unwrap_on_save", "true"], "use_peft", True),
    ],
    ids=str,
)
def test_names_of_the_original(words, name, expected):
    found = parsed(*words, base=ORIGINAL)
    assert found.values[name] == expected
    assert not {*RENAMED, *SWITCHES, *DROPPED, INSTRUCTION} & set(found.values)
    assert all(word[2:].partition("=")[0] in str(found.notes) for word in words if word.startswith("--pretok"))
    assert "dataset_name_or_path -> dataset_name" in found.notes[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_existing_splits": False}, r"write datasets: \[\{path: NAME, split: train\}\]"),
        ({"anti_drift_unwrap_on_save": False}, "weights that only this training could load: drop it"),
        ({"instruction_template": "Q {input}"}, "write template_format: basic and prompt_template"),
        ({"instruction_template": "alpaca", "template_format": "chatml"}, "drop instruction_template"),
        ({"pretokenise": True}, "did you mean 'pretokenize'"),
    ],
    ids=str,
)
def test_what_the_original_has_and_this_has_not_says_what_to_write(tmp_path, settings, message):
    with pytest.raises(FNSFTError, match=message):
        from_yaml(tmp_path, settings, base=ORIGINAL)


def test_a_family_of_names_is_known_in_a_file_too(tmp_path):
    found = from_yaml(
        tmp_path, {"pretokenize": True, "pretokenize_batch_size": 100, "pretokenize_x": ["a"]}, base=ORIGINAL
    )
    assert found.notes[0].count("tokenized_cache") == 1
    assert not any("pretokenize" in name for name in found.values)


def test_networks_of_the_original():
    words = ["--mask_mode", "preserve", "--ica_component_ids", "[0]", "--anti_drift_row_param", "true"]
    words += ["--anti_drift_apply_to", "both", "--ica_mask_layers", "0-2", "--ica_pca_preprocessing_components", "200"]
    words += ["--ica_template_samples_per_ds", "9", "--ica_build_templates_from", "a", "b"]
    config = parsed(*words, base=ORIGINAL).network_config
    assert (config.mask_mode, config.ica_component_ids, config.anti_drift_apply_to) == ("preserve", [0], "both")
    assert (config.ica_layers, config.ica_rank, config.ica_datasets) == ("0-2", 200, ["a", "b"])
    assert config.anti_drift_row_param is True
    assert parsed("--mask_mode", "lesion", "--no_anti_drift_row_param").network_config.anti_drift_row_param is False


def test_the_baseline_of_the_original_is_plain_lora(tmp_path):
    settings = {
        **{"mask_mode": None, "anti_drift_row_param": False, "anti_drift_apply_to": "auto", "ica_template_path": None},
        **{"ica_components": 10, "ica_percentile": 98.0, "ica_component_ids": [0], "ica_layers": None},
        **{"lora_r": 8, "lora_target_modules": None, "use_4bit": False, "attn_implementation": "auto"},
        **{"use_auth_token": True, "convert_to_gguf": False, "gguf_quantization": "q4_0", "push_to_hub": False},
        **{"hub_repo_id": "a/b", "hub_token": None, "resume_from_checkpoint": None},
    }
    found = from_yaml(tmp_path, settings, base=ORIGINAL)
    assert found.network_config is None
    assert found.values["use_peft"] is True
    assert "attn_implementation" not in found.values
    assert any("without a mask_mode" in note and "anti_drift_row_param" in note for note in found.notes)
    asked = from_yaml(tmp_path, settings, "--mask_mode", "lesion", base=ORIGINAL).network_config
    assert (asked.mask_mode, asked.anti_drift_row_param) == ("lesion", False)
    ours = {key: settings[key] for key in ("mask_mode", "ica_component_ids")}
    assert from_yaml(tmp_path, ours).network_config is not None  # TRL's and our names keep their meaning
    with pytest.raises(FNSFTError, match="anti_drift_row_param=false has an effect only"):
        from_yaml(tmp_path, {"mask_mode": None, "anti_drift_row_param": False})


@pytest.mark.parametrize("word", ["null", "none", "None"])
def test_no_mask_is_no_mask_however_it_is_spelt(tmp_path, word):
    assert parsed("--mask_mode", word).network_config is None
    assert from_yaml(tmp_path, {"mask_mode": word, "ica_components": 3}, base=ORIGINAL).network_config is None
    assert from_yaml(tmp_path, {"mask_mode": "lesion"}, "--mask_mode", word, base=ORIGINAL).network_config is None


def test_lora_is_the_default_of_the_original_only():
    assert parsed("--mask_mode", "lesion").values.get("use_peft") is None
    assert parsed("--mask_mode", "lesion", base=ORIGINAL).values["use_peft"] is True
    assert parsed("--train_method", "full", base=ORIGINAL).values.get("use_peft") is None
    assert parsed("--use_peft", "false", base=ORIGINAL).values["use_peft"] is False
    full = parsed("--no_peft", "--mask_mode", "lesion", base=ORIGINAL)
    assert full.network_config.train_method == "full"
    assert parsed("--ica_fraction", "0.1", base=ORIGINAL).network_config.ica_fraction == 0.1


def test_notes_name_each_new_name_once(tmp_path):
    first, *_ = from_yaml(tmp_path, {"max_seq_length": 8}, "--max_seq_length", "9", base=ORIGINAL).notes
    assert first.count("max_seq_length -> max_length") == first.count("dataset_name_or_path -> dataset_name") == 1
    assert parsed("--max_length", "9").notes == []


def test_the_guide_has_every_name_beside_what_it_is_here():
    page = (ROOT / "docs" / "migration.md").read_text()
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| `")]
    for old, new in (
        RENAMED | SWITCHES | dict.fromkeys(DROPPED, "not needed") | {INSTRUCTION: "prompt_template"}
    ).items():
        assert any(f"`{old}`" in row[1] and new in row[2] for row in rows), old
    for name in NETWORK_NAMES - {"ica_rank", "ica_datasets"}:
        assert any(f"`{name}`" in row[1] and "the same" in row[2] for row in rows), name


def test_no_name_of_the_original_is_an_option_here(options):
    assert not {*RENAMED, *SWITCHES, *DROPPED, INSTRUCTION} & set(options)
    assert {*RENAMED, *SWITCHES, *DROPPED, INSTRUCTION} == set(original_options(options))


# --- refusals


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lerning_rate", "1"], "no option --lerning_rate; did you mean 'learning_rate'"),
        (["--dataset_name_or_pth", "x"], "did you mean 'dataset_name_or_path'"),
        (["--model", "x"], "no option --model; did you mean 'model_name_or_path' or "),
        (["--epochs", "1"], "no option --epochs; did you mean 'num_train_epochs'?"),
        (["--batch_size", "1"], "or 'per_device_train_batch_size'"),
        (["--config", "nowhere.yaml"], "there is no config file 'nowhere.yaml'; give the path of one that exists"),
        (["--lora", "8"], "no option --lora"),
        (["stray"], "dataset_name takes one value, 2 were given: d.jsonl stray"),
        (["--packing", "-x"], "packing is '-x'; it must be true or false"),
        (["--learning_rate"], "learning_rate is given without a value"),
        (["--learning_rate", "fast"], "learning_rate is 'fast'; it must be a finite number"),
        (["--learning_rate", "nan"], "finite"),
        (["--max_seq_length", "many"], "max_seq_length is 'many'; it must be a whole number"),
        (["--max_steps", "1.5"], "max_steps is '1.5'; it must be a whole number"),
        (["--seed", "1", "2"], "seed takes one value, 2 were given"),
        (["--seed", "null"], "seed is 'null'; it must be a whole number"),
        (["--bf16", "perhaps"], "bf16 is 'perhaps'; it must be true or false"),
        (["--no_bf16", "true"], "takes no value"),
        (["--lr_scheduler_type", "cosin"], "did you mean 'cosine'"),
        (["--optim", "adam"], "it must be one of"),
        (["--report_to", "wandbb"], "did you mean 'wandb'"),
        (["--torch_dtype", "bf16"], "torch_dtype is 'bf16'; it must be one of: auto, bfloat16"),
        (["--model_init_kwargs", "{a"], "no valid JSON"),
        (["--model_init_kwargs", "file.json"], "model_init_kwargs is 'file.json'; it must be a mapping"),
        (["--deepspeed", "nowhere.json"], "'nowhere.json', which is no file"),
        (["--use_peft", "--lora_r", "0"], "lora_r is 0; it must be at least 1"),
        (["--use_peft", "--lora_dropout", "1"], "from 0 to 0.999"),
        (["--per_device_train_batch_size", "0"], "at least 1"),
        (["--lora_r", "8"], "lora_r has no effect without LoRA; add use_peft"),
        (["--no_peft", "--lora_r", "8"], "lora_r has no effect without LoRA"),
        (["--no_peft", "--use_peft"], "no_peft and use_peft are two names of one option"),
        (["--no_peft", "--ica_fraction", "0.1", "--train_method", "neuron_delta"], "no_peft and train_method"),
        (["--dataset_name_or_path", "e"], "dataset_name_or_path and dataset_name are two names of one option"),
        (["--use_4bit", "--use_8bit"], "exclude each other"),
        (["--use_4bit"], "load_in_4bit freezes the model's weights"),
        (["--bf16", "--fp16"], "exclude each other"),
        (["--hub_repo_id", "a/b"], "hub_model_id has no effect without push_to_hub"),
        (["--hub_token", "t"], "hub_token has no effect without push_to_hub"),
        (["--use_wandb", "--report_to", "none"], "contradict each other"),
        (["--merge_adapter_with_base"], "nothing to merge"),
        (["--ica_template_output", "t"], "no template to save"),
        (["--gguf_quantization", "f16"], "no effect without convert_to_gguf"),
        (["--convert_to_gguf", "--gguf_quantization", "q4_0"], "llama-quantize"),
        (["--datasets", "a"], "dataset_name and datasets exclude each other"),
        (["--config", "a", "--config", "b"], "--config takes one YAML file"),
        (["--config"], "--config takes one YAML file"),
        (["--parallelism_config", "x"], "no option --parallelism_config"),
        (["--mask_mode", "lesions"], "must be one of: null, lesion, preserve"),
        (["--train_method", "lora"], "use_peft"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(words, message):
    with pytest.raises(FNSFTError, match=message):
        parsed(*words)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("training: {learning_rate: 1}", "options are not nested"),
        ("1: 2", "no option '1'"),
        ("seed: null", "seed is null; it must be a whole number, or be left out"),
        ("seed: [1]", "seed is a list"),
        ("seed: {a: 1}", "seed is a mapping"),
        ("seed: true", "seed is 'true'; it must be a whole number"),
        ("learning_rate: .nan", "finite"),
        ("no_packing: true", "did you mean"),
        ("a: [", "not valid YAML"),
        ("- a", "must hold a mapping"),
        ("", "must hold a mapping"),
        ("use_4bit: true\nuse_8bit: true", "exclude each other"),
        ("use_peft: false\nlora_r: 8", "lora_r has no effect without LoRA"),
        ("max_length: 8\nmax_seq_length: 9", "two names of one option"),
        ("datasets: [[a]]", r"datasets holds \['a'\]"),
    ],
)
def test_what_a_file_cannot_say_is_refused(tmp_path, settings, message):
    with pytest.raises(FNSFTError, match=message):
        from_yaml(tmp_path, settings)


def test_a_token_is_never_shown():
    for words in (["--hub_token", "hf_secret", "x"], ["--hub_token", "hf_secret"]):
        with pytest.raises(FNSFTError) as caught:
            parsed(*words)
        assert "secret" not in str(caught.value)


def test_what_is_missing_is_named():
    with pytest.raises(FNSFTError, match="model_name_or_path is missing"):
        parse_options(BASE[2:])
    with pytest.raises(FNSFTError, match="there is no dataset"):
        parse_options(BASE[:2])
