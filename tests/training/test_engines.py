"""What shards a run is known before anything is loaded, and docs/many_gpus.md says what runs where."""

import os
import re
from types import SimpleNamespace

import pytest
from helpers import ROOT, sft_config
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from fnsft_trl import (
    AnchorConfig,
    FNSFTError,
    FNSFTTrainer,
    FunctionalNetworkConfig,
    PenaltyConfig,
    ProtectionConfig,
    RetentionConfig,
    with_networks,
)
from fnsft_trl.training.engines import REFUSALS, Engine, check_engine


# Row -> where a run of it is compared with that of one process, by test_distributed.py and test_deepspeed.py.
RUNS = {
    "neuron deltas": ("DDP", "FSDP2", "ZeRO-2", "ZeRO-3"),
    "LoRA held to neurons": ("DDP", "FSDP2", "ZeRO-2", "ZeRO-3"),
    "full fine-tuning": ("DDP", "FSDP2"),
    "neuron deltas of experts": ("DDP", "FSDP2", "ZeRO-2"),
    "LoRA on the weights of experts": ("DDP",),
    "discovery within the run": ("DDP", "FSDP2", "ZeRO-2"),
    "a forward mask, retention, the guard": ("DDP", "FSDP2", "ZeRO-2", "ZeRO-3"),
    "checkpoints, whole and sharded, and resuming": ("DDP", "FSDP2", "ZeRO-2", "ZeRO-3"),
    "`protect`": ("DDP",),
    "`kl_to_base`": ("DDP",),
    "`ewc`, `lwf`, `olora`": ("DDP",),
}
NAMES = {"FSDP2": "FSDP2", "ZeRO-2": "DeepSpeed ZeRO-2", "ZeRO-3": "DeepSpeed ZeRO-3"}
# A row of the table -> what is asked for there.
ROWS = {
    "neuron deltas": None,
    "LoRA held to neurons": None,
    "full fine-tuning": "full",
    "neuron deltas of experts": "experts",
    "LoRA on the weights of experts": "expert_lora",
    "DoRA": "dora",
    "LoRA with an 8-bit optimizer": "rounding",
    "adapters with `modules_to_save`": "whole_modules",
    "discovery within the run": "reads",
    "a forward mask, retention, the guard": None,
    "checkpoints, whole and sharded, and resuming": None,
    "`retention_on_budget: rollback`": "rollback",
    "`protect`": "protect",
    "`kl_to_base`": "kl_to_base",
    "`ewc`, `lwf`, `olora`": "penalties",
    "`bf16_full_eval`, `fp16_full_eval`": "full_eval",
}


def with_engine(args, name: str, **config):
    """Arguments as they are made under an engine, which need not be here."""
    if name.startswith("FSDP"):
        args.fsdp_plugin_args = {"fsdp_version": int(name[-1])}
    else:
        args.deepspeed_plugin = SimpleNamespace(zero_stage=int(name[-1]), hf_ds_config=SimpleNamespace(config=config))
    return args


def asked(tmp_path, key: str) -> tuple[dict, dict, dict]:
    """Arguments of SFTConfig, of the trainer, and of the network config that ask for something."""
    text = tmp_path / "text.txt"
    text.write_text("one two three\n")
    on_text = [f"text={text}"]
    return {
        "full": ({}, {}, {"train_method": "full"}),
        "dora": ({}, {"peft_config": LoraConfig(use_dora=True)}, {}),
        "rounding": ({"optim": "adamw_8bit"}, {"peft_config": LoraConfig()}, {}),
        "whole_modules": ({}, {"peft_config": LoraConfig(modules_to_save=["lm_head"])}, {}),
        "rollback": ({}, {"retention": RetentionConfig(on_text, retention_budget=1.0)}, {}),
        "protect": ({}, {"protection": ProtectionConfig(protect="random", protect_dims=8)}, {}),
        "kl_to_base": ({}, {"anchor": AnchorConfig(kl_to_base=1.0, kl_datasets=on_text)}, {}),
        "penalties": ({}, {"penalties": PenaltyConfig(lwf=1.0)}, {}),
        "full_eval": ({"bf16_full_eval": True}, {}, {}),
    }[key]


BEFORE_LOADING = [
    (key, name)
    for key in (
        "full",
        "dora",
        "rounding",
        "whole_modules",
        "rollback",
        "protect",
        "kl_to_base",
        "penalties",
        "full_eval",
    )
    for name in NAMES.values()
    if name.startswith(REFUSALS[key].engines)
]


@pytest.mark.parametrize(("key", "name"), BEFORE_LOADING)
def test_what_does_not_run_is_refused_in_one_line_before_anything_is_loaded(tmp_path, key, name):
    arguments, given, config = asked(tmp_path, key)
    with pytest.raises(FNSFTError) as error:
        FNSFTTrainer(
            model="no/such-model",
            args=with_engine(sft_config(tmp_path / "out", **arguments), name),
            network_config=FunctionalNetworkConfig(**config),
            network_template="no/such-template",
            **given,
        )
    said = str(error.value)
    assert said.startswith(REFUSALS[key].what)
    assert f"under {name}, {REFUSALS[key].reason}; {REFUSALS[key].remedy}" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("config", "name", "message"),
    [
        ({"train_method": "full"}, "DeepSpeed ZeRO-2", "train_method=full does not run under DeepSpeed ZeRO-2"),
        ({}, "FSDP1", "a run of this package does not run under FSDP1, .* set fsdp_version to 2"),
    ],
)
def test_any_trainer_is_refused_the_same(tmp_path, config, name, message):
    args = with_engine(DPOConfig(str(tmp_path), use_cpu=True, bf16=False), name)
    with pytest.raises(FNSFTError, match=message):
        with_networks(DPOTrainer)(
            model="no/such-model",
            args=args,
            network_config=FunctionalNetworkConfig(**config),
            network_template="no/such-template",
        )


def test_protection_without_networks_is_refused_too(tmp_path):
    _, given, _ = asked(tmp_path, "protect")
    with pytest.raises(FNSFTError, match="protect does not run under FSDP2"):
        FNSFTTrainer(model="no/such-model", args=with_engine(sft_config(tmp_path), "FSDP2"), **given)


def test_what_deepspeed_itself_is_told_is_read(tmp_path):
    args = with_engine(sft_config(tmp_path), "DeepSpeed ZeRO-2", tensor_parallel={"autotp_size": 2})
    with pytest.raises(FNSFTError, match="tensor_parallel does not run under DeepSpeed ZeRO-2"):
        Engine.of_args(args).check([])
    args = with_engine(sft_config(tmp_path), "DeepSpeed ZeRO-2", optimizer={"type": "OneBitAdam"})
    assert Engine.of_args(args).rounds


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({}, None),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP1"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "FSDP2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "DeepSpeed ZeRO-3"),
    ],
)
def test_the_launch_file_of_accelerate_is_heeded(monkeypatch, variables, name):
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    found = Engine.of_args(None)
    assert (found and found.name) == name


def test_arguments_without_an_engine_have_none(tmp_path):
    assert Engine.of_args(sft_config(tmp_path)) is None
    assert not {name for name in os.environ if name.startswith("ACCELERATE_USE_")}


def test_what_was_asked_for_and_is_not_there_is_said(log):
    state = SimpleNamespace()
    trainer = SimpleNamespace(
        is_deepspeed_enabled=False, is_fsdp_enabled=False, accelerator=SimpleNamespace(state=state)
    )
    check_engine(trainer, Engine("FSDP2"), lambda engine: [])
    assert "nothing is sharded: accelerate takes no FSDP2 here" in log.text


def test_processes_that_accelerate_does_not_know_of_are_an_error(monkeypatch):
    """It would give all rows to each of them."""
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    Engine("DeepSpeed ZeRO-2", processes=2).check([])
    with pytest.raises(FNSFTError, match=r"accelerate knows of 1 of the 2 processes .* each would train all rows"):
        Engine("DeepSpeed ZeRO-2", processes=1).check([])


def table() -> dict[str, list[str]]:
    """Row -> its cells, in the table of the page."""
    page = (ROOT / "docs" / "many_gpus.md").read_text()
    rows = re.findall(r"^\| (.+?) \|((?: (?:runs|refused|–) \|)+)$", page, flags=re.MULTILINE)
    return {name: cells.replace("|", " ").split() for name, cells in rows}


def test_the_table_of_the_page_says_what_runs_and_what_is_refused():
    expected = {}
    for row, key in ROWS.items():
        expected[row] = []
        for column, name in {"DDP": "", **NAMES}.items():
            is_refused = name.endswith("3") if key == "reads" else key and name.startswith(REFUSALS[key].engines)
            runs = column in RUNS.get(row, ())
            expected[row].append("refused" if name and is_refused else "runs" if runs else "–")
            assert not (runs and name and is_refused)
    assert table() == expected
