"""`fnsft train` with retention series: from the command line and YAML, with networks and without, and every misuse."""

import json

import pytest
from safetensors.torch import load_file

from fnsft_trl.cli import fine_tuning, main
from fnsft_trl.cli.options.parse import parse_options


@pytest.fixture
def base(model_dir, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows[:16]))
    (tmp_path / "wiki.txt").write_text("The red fox went to the sea\nSay nothing.\n" * 9)
    (tmp_path / "law.txt").write_text("9876543210 and so on\n" * 9)
    words = ["train", "--model_name_or_path", str(model_dir), "--dataset_name", "data.jsonl", "--max_steps", "3"]
    words += ["--output_dir", "out", "--max_length", "32", "--disable_tqdm", "true", "--use_cpu", "--bf16", "false"]
    return [*words, "--retention_tokens", "60", "--eval_strategy", "steps", "--eval_steps", "1", "--report_to", "none"]


@pytest.fixture
def trainers(monkeypatch):
    """The trainers that are made."""
    found = []

    class Noted(fine_tuning.FNSFTTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            found.append(self)

    monkeypatch.setattr(fine_tuning, "FNSFTTrainer", Noted)
    return found


def test_a_file_and_the_command_line_mean_the_same(tmp_path):
    yaml = "retention_datasets: [wiki=wiki.txt, law.txt]\nretention_budget: 0.05\nretention_on_budget: stop\n"
    (tmp_path / "a.yaml").write_text(yaml)
    words = ["--model_name_or_path", "m", "--dataset_name", "d"]
    line = ["--retention_datasets", "wiki=wiki.txt", "law.txt", "--retention_budget", "0.05"]
    asked = parse_options([*words, *line, "--retention_on_budget", "stop"])
    assert asked.retention == parse_options([*words, "--config", str(tmp_path / "a.yaml")]).retention
    assert asked.retention.sources() == {"wiki": "wiki.txt", "law": "law.txt"}
    assert asked.network_config is None
    assert parse_options(words).retention is None


@pytest.mark.parametrize("networks", [True, False])
def test_series_are_measured_with_networks_and_without(base, templates, tmp_path, trainers, networks):
    templates["llama"].save_pretrained("template")
    more = (
        ["--ica_template_path", "template"]
        if networks
        else ["--use_peft", "--lora_target_modules", "up_proj", "q_proj"]
    )
    more += ["--save_strategy", "steps", "--save_steps", "1", "--load_best_model_at_end"]
    more += ["--metric_for_best_model", "retention/law/kl", "--retention_datasets", "wiki=wiki.txt", "law.txt"]
    assert main([*base, *more]) == 0
    (trainer,) = trainers
    history = [entry for entry in trainer.state.log_history if "retention/law/kl" in entry]
    assert [entry["step"] for entry in history] == [0, 1, 2, 3, 3]
    assert history[-1]["retention/law/kl"] == pytest.approx(min(e["retention/law/kl"] for e in history[1:4]), abs=1e-6)


def test_a_run_that_keeps_to_no_budget_ends_in_an_error_with_the_base_saved(base, tmp_path, capsys):
    more = ["--retention_datasets", "wiki=wiki.txt", "--retention_budget", "0", "--learning_rate", "0.1"]
    more += ["--use_peft", "--lora_target_modules", "up_proj", "q_proj", "--save_strategy", "no"]
    assert main([*base, *more]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fnsft train: error")]
    assert "no measurement of this training is within the retention_budget of 0 nats" in line
    assert "It is saved to out" in line
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert [name for name, value in saved.items() if "lora_B" in name]
    assert all((value == 0).all() for name, value in saved.items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--retention_budget 0.05", "retention_tokens has no effect without retention_datasets"),
        ("--retention_datasets a=wiki.txt a=law.txt", "names 'a' twice"),
        ("--retention_datasets a=nowhere.txt", "the dataset file nowhere.txt does not exist"),
        ("--retention_datasets task=wiki.txt", "give another name"),
        ("--retention_datasets a=wiki.txt --retention_on_budget stop", "no effect without retention_budget"),
        ("--retention_datasets a=wiki.txt --retention_budget x", "retention_budget is 'x'"),
        ("--retention_datasets a=wiki.txt --retention_budget 1 --retention_on_budget stopp", "did you mean 'stop'"),
        (
            "--retention_datasets a=wiki.txt --metric_for_best_model retention/b/kl",
            "retention/a/kl, retention/task/kl",
        ),
    ],
)
def test_a_misuse_is_one_line_before_a_model_is_loaded(base, capsys, monkeypatch, given, message):
    monkeypatch.setattr(fine_tuning.FNSFTTrainer, "train", lambda *a, **k: pytest.fail("trained"))
    monkeypatch.setattr("trl.trainer.sft_trainer.create_model_from_path", lambda *a, **k: pytest.fail("loaded"))
    assert main([*base, *given.split()]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fnsft train: error")]
    assert len(lines) == 1
    assert message in lines[0]
