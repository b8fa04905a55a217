"""What a run goes on from: networks and options of its checkpoint, and a mark that comes before older ones go."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from helpers import changed_entries, instead, sft_config, state, tiny_model
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTTrainer

from fnsft_trl import FNSFTError, FNSFTTrainer, FunctionalNetworkConfig, FunctionalNetworkTemplate
from fnsft_trl.cli import main
from fnsft_trl.training.checkpoints import damage, mark, marked


DISCOVERY = {"ica_components": 2, "ica_rank": 8, "ica_max_tokens": 200, "ica_max_length": 32, "ica_percentile": 80}


def make(directory, rows, tokenizer, template=None, *, config=None, peft_config=None, model=None, **args):
    return FNSFTTrainer(
        model=model or tiny_model("llama"),
        args=sft_config(directory, **{"save_strategy": "steps", "save_steps": 2, **args}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_config,
        network_config=FunctionalNetworkConfig(**(config or {})),
        network_template=template,
    )


@pytest.fixture
def no_discovery(monkeypatch):
    """Called, it makes every discovery from then on a failure."""
    name = "fnsft_trl.training.preparation.discover_networks"
    return lambda: monkeypatch.setattr(name, lambda *a, **k: pytest.fail("networks are discovered anew"))


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["true", "True", True, "checkpoint-2"])
def test_networks_are_taken_from_the_checkpoint(rows, tokenizer, tmp_path, no_discovery, asked):
    whole = make(tmp_path, rows, tokenizer, config=DISCOVERY)
    whole.train()
    no_discovery()
    shutil.rmtree(tmp_path / "checkpoint-4")
    asked = asked if asked in ("true", "True", True) else str(tmp_path / asked)
    resumed = make(tmp_path, rows, tokenizer, config=DISCOVERY, resume_from_checkpoint=asked)
    for layer, loadings in whole.network_template.loadings.items():
        assert torch.equal(resumed.network_template.loadings[layer], loadings)
    resumed.train()
    assert resumed.state.global_step == 4
    assert changed_entries(state(whole.model), state(resumed.model)) == {}
    steps = [entry["step"] for entry in resumed.state.log_history if "loss" in entry]
    assert steps == [1, 2, 3, 4]


@pytest.mark.slow
def test_the_same_checkpoint_may_be_named_again_or_none_be_taken(templates, rows, tokenizer, tmp_path):
    make(tmp_path, rows, tokenizer, templates["llama"]).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    for asked, first in ((None, 3), (checkpoint, 3), (False, 1)):
        trainer = make(tmp_path / "out", rows, tokenizer, resume_from_checkpoint=checkpoint)
        trainer.train(resume_from_checkpoint=asked)
        steps = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(steps) == 4
        assert trainer.state.global_step == 4
        weights = state(trainer.model)
        trainer.train()  # goes on from its own weights, not from the checkpoint again
        assert changed_entries(weights, state(trainer.model))
        assert first in steps


def test_a_template_beside_that_of_the_checkpoint_must_be_the_same(
    templates, site_templates, rows, tokenizer, tmp_path
):
    make(tmp_path, rows, tokenizer, templates["llama"]).train()
    asked = {"resume_from_checkpoint": "true"}
    templates["llama"].save_pretrained(tmp_path / "same")
    config = {"ica_template_path": str(tmp_path / "same")}
    assert make(tmp_path, rows, tokenizer, config=config, **asked).network_template is not None
    other = FunctionalNetworkTemplate.from_pretrained(tmp_path / "same")
    other.loadings = {layer: -values for layer, values in other.loadings.items()}
    with pytest.raises(
        FNSFTError, match=r"was written with 3 networks at mlp_intermediate \(\w+\), this run is given 3"
    ):
        make(tmp_path, rows, tokenizer, other, **asked)


def test_networks_that_were_discovered_anew_are_told_how_to_be_had(rows, tokenizer, tmp_path):
    make(tmp_path, rows, tokenizer, config=DISCOVERY).train()
    other = make(tmp_path, rows[::-1] * 2, tokenizer, config=DISCOVERY)
    with pytest.raises(
        FNSFTError, match=r"networks was .* and is now .*with SFTConfig\(resume_from_checkpoint=\.\.\.\)"
    ):
        other.train(resume_from_checkpoint=True)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["neuron_delta", "lora", "full"])
def test_a_run_that_was_at_its_end_makes_no_further_step(templates, rows, tokenizer, tmp_path, method):
    lora = LoraConfig(r=2) if method == "lora" else None
    config = {"train_method": method}
    whole = make(tmp_path, rows, tokenizer, templates["llama"], config=config, peft_config=lora, max_steps=5)
    whole.train()
    resumed = make(
        tmp_path, rows, tokenizer, config=config, peft_config=lora, max_steps=5, resume_from_checkpoint="true"
    )
    resumed.train()
    assert resumed.state.global_step == 5
    assert changed_entries(state(whole.model), state(resumed.model)) == {}
    resumed.save_model()
    weights = [
        path.read_bytes() for folder in ("", "checkpoint-5") for path in (tmp_path / folder).glob("*model.safe*")
    ]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_a_checkpoint_is_marked_before_an_older_one_is_deleted(templates, rows, tokenizer, tmp_path, monkeypatch):
    trainer = make(tmp_path, rows, tokenizer, templates["llama"], save_total_limit=1, save_steps=1)

    def interrupted(directory, about):
        if directory.name == "checkpoint-3":
            raise KeyboardInterrupt
        return mark(directory, about)

    monkeypatch.setattr("fnsft_trl.training.resumption.mark", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    left = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert left == {"checkpoint-2", "checkpoint-3"}
    assert damage(tmp_path / "checkpoint-2") is None
    assert marked(tmp_path / "checkpoint-3") is None
    assert trainer.args.save_total_limit == 1
    monkeypatch.undo()
    resumed = make(tmp_path, rows, tokenizer, save_total_limit=1, save_steps=1, resume_from_checkpoint="true")
    resumed.train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-4"}
    whole = make(tmp_path / "whole", rows, tokenizer, templates["llama"])
    whole.train()
    assert changed_entries(state(whole.model), state(resumed.model)) == {}


def test_a_save_that_fails_takes_no_mark_from_an_older_checkpoint(templates, rows, tokenizer, tmp_path):
    make(tmp_path, rows, tokenizer, templates["llama"]).train()

    class Vandal(TrainerCallback):
        @torch.no_grad()
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                next(p for p in model.parameters() if p.requires_grad).fill_(torch.nan)

    again = make(tmp_path, rows, tokenizer, templates["llama"])
    again.add_callback(Vandal())
    with pytest.raises(FNSFTError, match="is not finite"):
        again.train()
    assert damage(tmp_path / "checkpoint-2") is None
    assert marked(tmp_path / "checkpoint-2") is not None


@pytest.mark.slow
def test_runs_with_and_without_networks_do_not_go_on_from_each_other(templates, rows, tokenizer, tmp_path):
    def plain(name, **args):
        return FNSFTTrainer(
            tiny_model("llama"), sft_config(tmp_path / name, save_strategy="steps", save_steps=2, **args),
            train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        )  # fmt: skip

    make(tmp_path / "networks", rows, tokenizer, templates["llama"], config={"train_method": "full"}).train()
    plain("plain").train()
    for asked in (True, str(tmp_path / "networks" / "checkpoint-2")):
        with pytest.raises(FNSFTError, match="written by a run with functional networks, and this run has none"):
            plain("networks").train(resume_from_checkpoint=asked)
    trainer = make(tmp_path / "x", rows, tokenizer, templates["llama"], config={"train_method": "full"})
    with pytest.raises(FNSFTError, match=r"holds no functional_networks/selection\.json"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-2"))
    resumed = plain("plain")  # which is as SFTTrainer does it
    resumed.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-2"))
    theirs = SFTTrainer(
        tiny_model("llama"), sft_config(tmp_path / "theirs"), train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    theirs.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-2"))
    assert changed_entries(state(theirs.model), state(resumed.model)) == {}


@pytest.mark.parametrize("option", ["save_only_model", "fp16"])
def test_a_checkpoint_without_all_states_is_refused(templates, rows, tokenizer, tmp_path, option):
    args = {"save_only_model": True} if option == "save_only_model" else {}
    make(tmp_path, rows, tokenizer, templates["llama"], **args).train()
    trainer = make(tmp_path, rows, tokenizer, templates["llama"])
    if option == "fp16":
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(FNSFTError, match=r"holds no state of the (optimizer|gradient scaler)"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.fixture
def command(templates, model_dir, rows, tmp_path):
    templates["llama"].save_pretrained(tmp_path / "template")
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    words = ["train", "--model_name_or_path", str(model_dir), "--dataset_name", str(tmp_path / "data.jsonl")]
    words += ["--output_dir", str(tmp_path / "out"), "--max_length", "32", "--max_steps", "4", "--save_steps", "1"]
    return [*words, "--use_cpu", "--report_to", "none", "--disable_tqdm", "true", "--learning_rate", "1e-2"]


@pytest.mark.slow
@pytest.mark.parametrize("with_networks", [True, False])
def test_the_command_goes_on_from_the_newest_complete_checkpoint(command, tmp_path, capsys, with_networks):
    """Whatever the broken ones lack; the end is that of the whole run."""
    command += ["--ica_template_path", str(tmp_path / "template")] if with_networks else []
    assert main(command) == 0
    (file,) = (tmp_path / "out").glob("*model.safetensors")
    expected = file.read_bytes()
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    (tmp_path / "out" / "checkpoint-3" / "trainer_state.json").unlink()
    scheduler = tmp_path / "out" / "checkpoint-2" / "scheduler.pt"
    scheduler.write_bytes(scheduler.read_bytes()[:-40])
    file.unlink()
    assert main([*command, "--resume_from_checkpoint", "true"]) == 0
    assert file.read_bytes() == expected
    scheduler.write_bytes(b"")
    capsys.readouterr()
    assert main([*command, "--resume_from_checkpoint", str(scheduler.parent)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "fnsft train: error:" in line
    assert "checkpoint-2 cannot be resumed from: scheduler.pt" in line


@pytest.mark.slow
def test_the_command_discovers_nothing_anew_and_compares(command, tmp_path, capsys, no_discovery):
    networks = ["--ica_components", "2", "--ica_rank", "8", "--ica_max_tokens", "200", "--ica_percentile", "80"]
    assert main([*command, *networks]) == 0
    no_discovery()
    (file,) = (tmp_path / "out").glob("*model.safetensors")
    expected = file.read_bytes()
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    assert main([*command, *networks, "--resume_from_checkpoint", "true"]) == 0
    assert file.read_bytes() == expected
    for other, message in (
        (["--learning_rate", "1e-3"], "learning_rate was 0.01 and is now 0.001"),
        (["--use_peft"], "train_method was neuron_delta and is now lora"),
        (["--ica_components", "3"], "ica_components is 3, but the template was made with 2"),
    ):
        capsys.readouterr()
        assert main([*instead([*command, *networks], *other), "--resume_from_checkpoint", "true"]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    capsys.readouterr()
    assert main([*command, "--use_peft", "--resume_from_checkpoint", "true"]) == 2
    assert "written by a run with functional networks" in capsys.readouterr().err.splitlines()[-1]
