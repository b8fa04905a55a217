"""What `fnsft train` does around the training: device and precision, LoRA targets, exports, uploads, trackers."""

import json
import os
from pathlib import Path

import pytest
import torch
from helpers import instead, tiny_model, write_converter
from hub import ALICE
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fnsft_trl import FunctionalNetworkTemplate, cli
from fnsft_trl.cli import main
from fnsft_trl.cli.models import default_lora_targets
from fnsft_trl.cli.refusals import refusals
from fnsft_trl.errors import FNSFTError
from fnsft_trl.export.gguf import CONVERTER_VARIABLE


@pytest.fixture
def base(model_dir, rows, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows[:16]))
    words = ["train", "--model_name_or_path", str(model_dir), "--dataset_name", str(data), "--max_steps", "1"]
    words += ["--output_dir", str(tmp_path / "out"), "--max_length", "32", "--disable_tqdm", "true"]
    return [*words, "--save_strategy", "no"]


@pytest.fixture
def networks(templates, tmp_path):
    templates["llama"].save_pretrained(tmp_path / "template")
    return ["--ica_template_path", str(tmp_path / "template")]


@pytest.fixture
def log(monkeypatch):
    """What the package logs as a warning."""
    lines = []
    monkeypatch.setattr("logging.Logger.warning", lambda self, message, *a, **k: lines.append(str(message)))
    return lines


def test_a_machine_without_an_accelerator_needs_no_options(base, networks, log, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert main([*base, *networks]) == 0
    assert "device: cpu; mixed precision: no; weights held in float32" in log
    args = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
    assert (args.use_cpu, args.bf16, args.fp16) == (True, False, False)


def test_precision_that_is_given_is_kept(base, networks, log, tmp_path):
    assert main([*base, *networks, "--use_cpu", "--bf16", "--dtype", "bfloat16"]) == 0
    assert "device: cpu; mixed precision: bf16; weights held in bfloat16" in log
    assert torch.load(tmp_path / "out" / "training_args.bin", weights_only=False).bf16


@pytest.mark.parametrize(
    ("words", "dtype"),
    [(["--use_peft"], torch.bfloat16), ([], torch.float32), (["--no_peft"], torch.float32)],
    ids=str,
)
def test_the_original_dtype_auto_is_that_of_the_device_for_frozen_weights(base, words, dtype, monkeypatch):
    loaded = []

    def load(name, args, options, quantization_config, **others):
        loaded.append(options["dtype"])
        raise KeyboardInterrupt

    monkeypatch.setattr("fnsft_trl.training.run.load_base_model", load)
    given = ["--torch_dtype", "auto", "--use_cpu", "--bf16", "--mask_mode", "lesion", "--train_method", "full"]
    given = [*given[:-2], *words] if words else given
    assert main([*base, *given]) == 130
    assert loaded == [str(dtype).removeprefix("torch.")]


def test_an_adapter_as_the_model_is_told_to_be_merged_first(base, networks, tmp_path, capsys):
    assert main([*base, *networks]) == 0
    capsys.readouterr()
    again = instead(base, "--model_name_or_path", str(tmp_path / "out"), "--output_dir", str(tmp_path / "again"))
    assert main(again) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"it is an adapter; merge it into its base first: fnsft export {tmp_path / 'out'} --to merged" in line


def test_the_attention_implementation_reaches_the_model(base, networks, monkeypatch):
    loaded = []

    def load(name, args, options, quantization_config, **others):
        loaded.append(options["attn_implementation"])
        raise KeyboardInterrupt

    monkeypatch.setattr("fnsft_trl.training.run.load_base_model", load)
    assert main([*base, *networks, "--attn_implementation", "eager"]) == 130
    assert loaded == ["eager"]


@pytest.mark.parametrize("option", ["--load_in_4bit", "--use_8bit"])
def test_weights_in_few_bits_are_trained_with_lora(base, option, tmp_path):
    assert main([*base, option, "--use_peft", "--lora_r", "2"]) == 0
    assert (tmp_path / "out" / "adapter_config.json").exists()


def test_a_device_without_quantised_weights_is_one_line(base, monkeypatch, capsys):
    monkeypatch.setattr("bitsandbytes.supported_torch_devices", {"cuda"})
    assert main([*base, "--use_cpu", "--load_in_4bit", "--use_peft"]) == 2
    assert "bitsandbytes holds no quantised weights on cpu" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_plain_lora_takes_the_targets_of_peft(family):
    assert default_lora_targets(tiny_model(family).config) is None


def test_plain_lora_on_an_unknown_architecture_takes_the_mlps(monkeypatch):
    monkeypatch.setattr("fnsft_trl.cli.models.has_lora_targets", lambda kind: False)
    targets = default_lora_targets(tiny_model("llama").config)
    assert len(targets) == 9
    assert not any("lm_head" in name or "self_attn" in name for name in targets)
    assert targets == sorted(name for name in targets if name.startswith("model.layers."))


def test_plain_lora_trains_where_peft_knows_no_targets(base, tmp_path, monkeypatch):
    monkeypatch.setattr("fnsft_trl.cli.models.has_lora_targets", lambda kind: False)
    assert main([*base, "--use_peft"]) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert all(".mlp." in name for name in config["target_modules"])


@pytest.mark.posix
@pytest.mark.parametrize("method", [["--use_peft"], []], ids=["lora", "neuron deltas"])
def test_the_adapter_is_merged_and_converted(base, networks, method, model_dir, tmp_path, monkeypatch, capsys):
    write_converter(tmp_path / "bin" / "converter")
    monkeypatch.setenv(CONVERTER_VARIABLE, str(tmp_path / "bin" / "converter"))
    words = [*base, *networks, *method, "--merge_adapter_with_base", "--convert_to_gguf", "--learning_rate", "0.1"]
    assert main([*words, "--gguf_quantization", "f16"]) == 0
    out = tmp_path / "out"
    assert f"Merged model saved to: {out / 'merged'}" in capsys.readouterr().out
    assert json.loads((out / "model.gguf").read_text())["arguments"][-1] == "f16"
    merged = AutoModelForCausalLM.from_pretrained(out / "merged").state_dict()
    plain = AutoModelForCausalLM.from_pretrained(model_dir)
    changed = [name for name, value in plain.state_dict().items() if not torch.equal(value, merged[name])]
    assert changed
    adapted = PeftModel.from_pretrained(plain, out).merge_and_unload().state_dict()
    assert all(torch.equal(value, merged[name]) for name, value in adapted.items())


@pytest.mark.posix
def test_full_fine_tuning_is_converted_as_it_is(base, tmp_path, monkeypatch):
    write_converter(tmp_path / "bin" / "converter")
    monkeypatch.setenv(CONVERTER_VARIABLE, str(tmp_path / "bin" / "converter"))
    assert main([*base, "--convert_to_gguf"]) == 0
    assert "model.safetensors" in json.loads((tmp_path / "out" / "model.gguf").read_text())["files"]


def test_no_peft_with_networks_trains_all_weights(base, networks, tmp_path):
    assert main([*base, *networks, "--no_peft", "--mask_mode", "lesion", "--learning_rate", "0.1"]) == 0
    selection = json.loads((tmp_path / "out" / "functional_networks" / "selection.json").read_text())
    assert selection["train_method"] == "full"
    assert load_file(tmp_path / "out" / "model.safetensors")


def test_the_template_is_saved_where_it_is_asked_for(base, tmp_path):
    words = ["--ica_build_templates_from", base[4], "--ica_template_output", str(tmp_path / "made")]
    words += ["--ica_components", "3", "--ica_rank", "8", "--ica_max_tokens", "200", "--ica_percentile", "80"]
    assert main([*base, *words]) == 0
    assert len(FunctionalNetworkTemplate.from_pretrained(tmp_path / "made").components) == 3
    assert (tmp_path / "made" / "global_templates.json").exists()


def test_the_adapter_and_the_merged_model_are_pushed(base, hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    words = ["--use_peft", "--merge_adapter_with_base", "--push_to_hub", "--hub_repo_id", "alice/made"]
    assert main([*base, *words, "--hub_token", ALICE, "--hub_commit_message", "Made here"]) == 0
    files = set(hub.files("alice/made"))
    assert {"adapter_config.json", "merged/config.json", "merged/model.safetensors"} <= files


def test_notes_stand_on_standard_error_once(base, capsys):
    words = [word.replace("--dataset_name", "--dataset_name_or_path") for word in base]
    assert main([*words, "--use_auth_token"]) == 0
    err = capsys.readouterr().err
    assert err.count("fnsft train: note: names of the original project: use_auth_token -> nothing") == 1
    assert err.count("dataset_name_or_path -> dataset_name") == 1


def test_a_tracker_that_is_not_installed_is_one_line(base, capsys, monkeypatch):
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["mlflow"])
    assert main([*base, "--use_wandb"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the tracker wandb of report_to is not installed" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--attn_implementation", "flashy"], "attn_implementation is 'flashy'; it must be one of: eager"),
        (["--lr_scheduler_type", "reduce_lr_on_plateau"], "requires an eval strategy"),
        (["--fsdp", "full_shard"], "fsdp only works in distributed training"),
        (["--accelerator_config", '{"zz": 1}'], "unexpected keyword argument 'zz'"),
        (["--model_init_kwargs", '{"zz": 1}'], "unexpected keyword argument 'zz'"),
        (["--use_peft", "--lora_target_modules", "zzz"], "Target modules zzz not found"),
        (["--use_peft", "--lora_task_type", "FOO"], "Invalid task type"),
        (["--use_peft", "--load_in_4bit", "--bnb_4bit_quant_storage", "zz"], "bnb_4bit_quant_storage"),
        (["--resume_from_checkpoint", "nowhere"], "which is no checkpoint of a training"),
        (["--optim", "lomo"], "lomo_optim"),
    ],
    ids=str,
)
def test_what_a_library_refuses_is_one_line(base, words, message, capsys, monkeypatch):
    monkeypatch.setattr("transformers.Trainer.train", lambda *args, **kwargs: pytest.fail("it trains"))
    assert main([*base, "--use_cpu", *words]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("fnsft train: error: ")
    assert message in line


def test_a_defect_of_this_package_keeps_its_traceback():
    with pytest.raises(FNSFTError, match="of a library"), refusals():
        raise ValueError("of a library")
    source = Path(cli.__file__).parent / "defect.py"
    code = compile("raise ValueError('no number')", str(source), "exec")
    with pytest.raises(ValueError, match="no number") as caught, refusals():
        exec(code)
    assert not isinstance(caught.value, FNSFTError)


def test_the_project_of_wandb_is_passed_on(base, monkeypatch):
    seen = {}
    monkeypatch.setenv("WANDB_PROJECT", "another")
    monkeypatch.setattr(
        "fnsft_trl.training.trainer.FNSFTTrainer.__init__", lambda *a, **k: seen.update(os.environ) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        main([*base, "--wandb_project", "mine"])
    assert seen["WANDB_PROJECT"] == "mine"
