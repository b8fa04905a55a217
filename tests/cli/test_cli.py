import json
import re
import subprocess
import sys

import pytest
import yaml
from helpers import ROOT, instead, tiny_model
from processes import run_python
from safetensors.torch import load_file

from fnsft_trl import FunctionalNetworkTemplate
from fnsft_trl.cli import VERBS, main
from fnsft_trl.config import ThresholdRule
from fnsft_trl.template.legacy import LEGACY_FILE
from fnsft_trl.template.storage import FILES


RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture
def data(tmp_path, rows):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture
def template(tmp_path, templates):
    templates["llama"].save_pretrained(tmp_path / "template")
    return tmp_path / "template"


@pytest.fixture
def train_args(model_dir, data, template, tmp_path):
    return [
        "--model_name_or_path", str(model_dir), "--dataset_name", str(data), "--ica_template_path", str(template),
        "--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--use_cpu", "--bf16", "false", "--report_to",
        "none", "--max_length", "32", "--disable_tqdm", "true", "--save_strategy", "no",
    ]  # fmt: skip


def test_help_and_inspect_start_without_torch(template):
    for arguments in (["--help"], ["inspect", str(template)], ["inspect", "--help"], ["--version"]):
        code = (
            "import sys; from fnsft_trl.cli import main\n"
            f"try: main({arguments!r})\nexcept SystemExit as e: assert not e.code\n"
            "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout


def test_help_names_every_verb(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in VERBS)


def test_inspect_shows_networks_reliability_and_provenance(template, capsys):
    assert main(["inspect", str(template)]) == 0
    text = capsys.readouterr().out
    assert "3 functional networks" in text
    assert "120 neurons, layers 0-2" in text
    assert "reliability" in text
    assert main(["inspect", str(template), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "fnsft_trl.template"


def test_whoever_reads_no_further_ends_inspect_without_a_traceback(template):
    code = "import sys; from fnsft_trl.cli import main; sys.exit(main(['inspect', sys.argv[1]]))"
    command = [sys.executable, "-c", code, str(template)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


def test_discover_saves_a_template(model_dir, data, tmp_path, capsys):
    arguments = ["--ica_components", "2", "--ica_rank", "8", "--ica_max_tokens", "200", "--ica_percentile", "80"]
    target = tmp_path / "made"
    assert main(["discover", str(model_dir), str(data), "--output_dir", str(target), *arguments]) == 0
    text = capsys.readouterr().out
    assert "Component 1: 24 neurons across" in text
    assert "Null: without co-activation" in text
    template = FunctionalNetworkTemplate.from_pretrained(target)
    assert template.calibration["sources"] == ["data.jsonl"]
    assert template.threshold == ThresholdRule("percentile", 80)
    assert {path.name for path in target.iterdir()} == {*FILES, LEGACY_FILE}


def test_discover_goes_on_until_reliable_and_over_several_datasets(model_dir, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fnsft_trl.discovery.discovery._FIRST_CHECK", 100)
    other = tmp_path / "other rows.jsonl"
    other.write_text(data.read_text().replace("Say", "Tell"))
    target = tmp_path / "made"
    arguments = ["--components", "2", "--ica_rank", "8", "--max_tokens", "600", "--until-reliable", "0.99"]
    arguments += ["--ica-skip-special", "false", "--output_dir", str(target)]
    assert main(["discover", str(model_dir), str(data), str(other), *arguments]) == 0
    assert "in other rows.jsonl" in capsys.readouterr().out
    template = FunctionalNetworkTemplate.from_pretrained(target)
    assert template.settings["ica_until_reliable"] == 0.99
    assert template.settings["ica_skip_special"] is False
    assert len(template.calibration["curve"]) > 1
    assert template.calibration["sources"] == ["data.jsonl", "other rows.jsonl"]
    assert [path.name for path in sorted((target / "datasets").iterdir())][1].endswith("other-rows-jsonl")
    for directory in (target / "datasets").iterdir():
        assert len(FunctionalNetworkTemplate.from_pretrained(directory).components) == 2
    assert main(["inspect", str(target)]) == 0
    text = capsys.readouterr().out
    assert "mean reliability above null (and bare) over tokens: " in text
    assert "without co-activation: reliability" in text
    assert "recur in other rows.jsonl" in text or "recurs in other rows.jsonl" in text


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--resume"], "no interrupted discovery"),
        (["--until-reliable", "1.5"], "ica_until_reliable is 1.5; it must be between 0 and 1"),
        (["--skip_special", "perhaps"], "skip_special is 'perhaps'; it must be true or false"),
        (["--drop_massive", "0.5"], "ica_drop_massive is 0.5; it must be above 1"),
        (["--dtype", "foo"], "dtype is 'foo'; it must be one of: auto, bfloat16"),
    ],
    ids=str,
)
def test_discover_refuses(model_dir, data, tmp_path, capsys, extra, message):
    assert message in refused(
        ["discover", str(model_dir), str(data), "--output_dir", str(tmp_path / "t"), *extra], capsys, tmp_path
    )


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--use_peft", "--lora_r", "2"],
        ["--train_method", "full"],
        ["--mask_mode", "lesion", "--ica_component_ids", "[0,1]", "--eval_strategy", "no"],
        ["--ica_component_ids", "0", "1", "--mask_mode", "null"],
        ["--ica_component_ids=[2]"],
    ],
    ids=" ".join,
)
def test_train_runs_and_saves(train_args, extra, tmp_path, capsys):
    assert main(["train", *train_args, *extra]) == 0
    assert "Model saved to" in capsys.readouterr().out
    selection = json.loads((tmp_path / "out" / "functional_networks" / "selection.json").read_text())
    if "--ica_component_ids" in extra:
        assert selection["network_config"]["ica_component_ids"] == [0, 1]
    weights = load_file(next((tmp_path / "out").glob("*.safetensors")))
    assert weights


def test_a_first_argument_that_is_an_option_means_train(train_args, tmp_path):
    assert main(train_args) == 0
    assert (tmp_path / "out" / "adapter_config.json").exists()


def test_command_line_wins_over_yaml_wins_over_defaults(train_args, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        yaml.safe_dump({"ica_fraction": 0.2, "frozen_guard": False, "ica_component_ids": [1], "weight_decay": 0.1})
    )
    assert main(["train", f"--config={config}", *train_args, "--ica_fraction", "0.3"]) == 0
    used = json.loads((tmp_path / "out" / "functional_networks" / "selection.json").read_text())["network_config"]
    assert (used["ica_fraction"], used["frozen_guard"], used["ica_component_ids"]) == (0.3, False, [1])
    assert used["train_neurons"] == "auto"


def test_without_any_network_option_it_is_plain_fine_tuning(model_dir, data, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"mask_mode": None, "use_peft": True, "lora_r": 2}))
    arguments = ["--model_name_or_path", str(model_dir), "--dataset_name", str(data), "--max_steps", "1", "--use_cpu"]
    arguments += ["--bf16", "false", "--report_to", "none", "--output_dir", str(tmp_path / "out")]
    assert main(["train", "--config", str(config), *arguments]) == 0
    assert (tmp_path / "out" / "adapter_config.json").exists()
    assert not (tmp_path / "out" / "functional_networks").exists()


@pytest.mark.slow
def test_module_form_for_accelerate_launch(train_args, tmp_path):
    done = run_python("-m", "fnsft_trl.cli.train", *train_args, "--tokenized_cache", "false")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "adapter_config.json").exists()


def refused(arguments, capsys, tmp_path):
    """The one line on standard error of a call that must be refused."""
    before = sorted(tmp_path.rglob("*"))
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("fnsft ")
    assert "error:" in line
    assert sorted(tmp_path.rglob("*")) == before
    return line


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--ica_component_ids", "7"], "no network 7; it has the networks 0-2"),
        (["--ica_componets", "7"], "did you mean 'ica_components'"),
        (["--mask_mode", "lesions"], "must be one of: null, lesion, preserve"),
        (["--mask_mode", "lesion", "--train_neurons", "selected"], "lesioned neurons get no gradient"),
        (["--use_peft", "--use_dora"], "DoRA rescales"),
        (["--use_peft", "--lora_target_modules", "q_proj"], "hold no MLP module"),
        (["--ica_fraction", "1.5"], "between 0 and 1"),
        (["--max_steps", "many"], "must be a whole number"),
        (["--dataset_streaming", "true"], "dataset_streaming"),
        (["--resume_from_checkpoint", "true"], "there is no checkpoint in"),
        (["--model_name_or_path", "nobody/nothing"], "cannot be loaded"),
        (["--mask_eval", "false"], "mask_eval=false has no effect"),
        (["--ica_site", "mlp_output"], "set ica_site=mlp_intermediate"),
        (["--ica_components", "4"], "ica_components is 4, but the template was made with 3"),
        (["--ica_layers", "1-9"], "'1-9' is outside 0-2"),
        (["--train_method", "lora"], "use_peft"),
        (["--dataset_train_split", "trian"], "has no split 'trian'; it has train"),
        (
            ["--eval_strategy", "steps", "--eval_steps", "1", "--dataset_test_split", "held"],
            "no split 'held'; it has train",
        ),
        (["--template_format", "alpaka"], "template_format is 'alpaka'; it must be one of: auto, chat"),
        (["--prompt_template", "{instruction}{response}"], "prompt_template has no effect with template_format=auto"),
        (["--columns", "prompt=title,completion=body"], "no column 'title' (it has 'prompt', 'completion')"),
    ],
)
def test_bad_options_are_one_line_and_status_2(train_args, extra, message, capsys, tmp_path):
    assert message in refused(instead(["train", *train_args], *extra), capsys, tmp_path)


def test_a_template_of_another_model_is_one_line(train_args, templates, capsys, tmp_path):
    templates["opt"].save_pretrained(tmp_path / "other")
    arguments = instead(["train", *train_args], "--ica_template_path", str(tmp_path / "other"))
    assert "OPTForCausalLM" in refused(arguments, capsys, tmp_path)


def test_fewer_tokens_than_components_is_one_line(model_dir, data, capsys, tmp_path):
    arguments = ["discover", str(model_dir), str(data), "--ica_max_tokens", "12", "--output_dir", str(tmp_path / "t")]
    line = refused(arguments, capsys, tmp_path)
    assert "12 tokens were read" in line
    assert "ica_components" in line


def test_a_model_without_sites_is_one_line(data, tokenizer, capsys, tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=120, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    arguments = ["discover", str(tmp_path / "mamba"), str(data), "--output_dir", str(tmp_path / "t")]
    assert "no MLP site found in MambaForCausalLM" in refused(arguments, capsys, tmp_path)


def test_an_unknown_yaml_key_names_the_nearest(train_args, capsys, tmp_path):
    (tmp_path / "config.yaml").write_text("ica_percentil: 95\n")
    arguments = ["train", "--config", str(tmp_path / "config.yaml"), *train_args]
    assert "'ica_percentil'; did you mean 'ica_percentile'?" in refused(arguments, capsys, tmp_path)


@pytest.mark.parametrize(("content", "message"), [("- a\n- b\n", "must hold a mapping"), ("a: [", "not valid YAML")])
def test_yaml_that_is_not_a_mapping_is_one_line(train_args, content, message, capsys, tmp_path):
    (tmp_path / "config.yaml").write_text(content)
    arguments = ["train", "--config", str(tmp_path / "config.yaml"), *train_args]
    assert message in refused(arguments, capsys, tmp_path)


def test_a_selection_that_holds_nothing_is_one_line(train_args, templates, capsys, tmp_path):
    empty = templates["llama"].with_threshold(ThresholdRule())
    empty.loadings = {layer: values.new_ones(values.shape) for layer, values in empty.loadings.items()}
    empty.save_pretrained(tmp_path / "empty")
    arguments = instead(["train", *train_args], "--ica_template_path", str(tmp_path / "empty"))
    assert "holds no neuron" in refused(arguments, capsys, tmp_path)


def test_an_empty_dataset_is_one_line(train_args, capsys, tmp_path):
    (tmp_path / "empty.csv").write_text("prompt,completion\n")
    arguments = instead(["train", *train_args], "--dataset_name", str(tmp_path / "empty.csv"))
    assert "empty" in refused(arguments, capsys, tmp_path)


def test_an_output_directory_that_cannot_be_made_is_one_line(train_args, model_dir, data, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    target = str(tmp_path / "file" / "out")
    assert "is a file" in refused(instead(["train", *train_args], "--output_dir", target), capsys, tmp_path)
    assert "is a file" in refused(["discover", str(model_dir), str(data), "--output_dir", target], capsys, tmp_path)
    assert "is a file" in refused(["demo", "--output_dir", target], capsys, tmp_path)


def test_a_prompt_format_for_rows_of_text_is_refused(model_dir, capsys, tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    call = ["discover", str(model_dir), str(tmp_path / "a.txt"), "--template_format", "alpaca"]
    assert "template_format=alpaca has no effect on rows of text" in refused(call, capsys, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "did you mean 'train'"),
        (["inspect"], "template is missing; give TEMPLATE"),
        (["inspect", "nowhere"], "no template at nowhere"),
        (["discover", "embedded", "embedded", "--dataset_split", "test"], "it has train"),
        (["demo", "--test_rows", "0"], "must be at least 1"),
        (["discover", "nowhere/model", "no_such_file.jsonl"], "does not exist"),
        (["train", "--dataset_name", "x.jsonl", "--use_cpu", "--bf16", "false"], "model_name_or_path is missing"),
        (["train", "--config", "nowhere.yaml"], "there is no config file"),
    ],
)
def test_calls_that_cannot_work_are_one_line(arguments, message, capsys, tmp_path):
    assert message in refused(arguments, capsys, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs_with_its_own_command(recipe, model_dir, data, tmp_path):
    """The command on top of each recipe, with model and data replaced by local ones and two steps."""
    (command,) = re.findall(r"^# (fnsft .*)$", recipe.read_text(), flags=re.MULTILINE)
    program, *arguments = command.split()
    assert (program, arguments[1]) == ("fnsft", "--config")
    assert ROOT / arguments[2] == recipe
    settings = yaml.safe_load(recipe.read_text())
    arguments[2] = str(recipe)
    local = [
        "--model_name_or_path",
        str(model_dir),
        "--dataset_name",
        str(data),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    quick = ["--max_steps", "2", "--ica_max_tokens", "200", "--ica_components", "2", "--use_cpu", "--bf16", "false"]
    quick += ["--max_length", "32", "--disable_tqdm", "true", "--ica_rank", "8", "--packing", "false"]
    if "ica_datasets" in settings:
        quick += ["--ica_datasets", str(data)]
    assert main([*arguments, *local, *quick]) == 0
    selection = json.loads((tmp_path / "out" / "functional_networks" / "selection.json").read_text())
    method = "lora" if settings.get("use_peft") else "neuron_delta"
    assert selection["train_method"] == settings.get("train_method", method)
    expected = ROOT / settings["dataset_name"]
    assert expected.exists() == settings["dataset_name"].endswith(".jsonl")


def test_a_model_is_needed_that_exists(data, capsys, tmp_path):
    arguments = ["discover", str(tmp_path / "nothing"), str(data), "--output_dir", str(tmp_path / "t")]
    assert "cannot be loaded" in refused(arguments, capsys, tmp_path)


def test_families_have_distinct_architectures():
    assert len({type(tiny_model(name)).__name__ for name in ("llama", "gpt2", "phi3", "opt")}) == 4
