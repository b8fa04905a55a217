"""A run goes on from a checkpoint only if all that changes the training is as it was."""

import shutil
from dataclasses import fields

import pytest
import torch
from datasets import Dataset
from helpers import changed_entries, sft_config, state, tiny_model, tiny_rows
from peft import LoraConfig
from torch import nn
from trl import SFTConfig

from fnsft_trl import FNSFTError, FNSFTTrainer, FunctionalNetworkConfig
from fnsft_trl.config import ThresholdRule
from fnsft_trl.training.same_run import _argument_settings, check_same


# Argument of a trainer -> another value than it has in `sft_config`; together with those below they are all.
COMPARED = {
    **{"learning_rate": 1e-3, "lr_scheduler_type": "cosine", "warmup_steps": 1, "optim": "sgd", "weight_decay": 0.0},
    **{
        "lr_scheduler_kwargs": {"a": 1},
        "optim_args": "a=1",
        "adam_beta1": 0.8,
        "adam_beta2": 0.9,
        "adam_epsilon": 1e-6,
    },
    **{"optim_target_modules": "all-linear", "average_tokens_across_devices": False, "max_grad_norm": 0.5},
    **{
        "label_smoothing_factor": 0.1,
        "bf16": True,
        "neftune_noise_alpha": 5.0,
        "seed": 4,
        "data_seed": 1,
        "max_steps": 5,
    },
    **{
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "accelerator_config": {"split_batches": True},
    },
    **{
        "dataloader_drop_last": True,
        "dataloader_in_order": False,
        "remove_unused_columns": False,
        "pad_token": "<unk>",
    },
    **{"train_sampling_strategy": "sequential", "length_column_name": "n", "router_aux_loss_coef": 0.1},
    **{"chat_template_path": "x.jinja", "dataset_text_field": "t", "dataset_kwargs": {"a": 1}, "eos_token": "<unk>"},
    **{"max_length": 16, "truncation_mode": "keep_end", "shuffle_dataset": True, "packing": True, "loss_type": "dft"},
    **{"packing_strategy": "wrapped", "padding_free": True, "pad_to_multiple_of": 8, "completion_only_loss": False},
    **{"assistant_only_loss": True},
}
FREE = {
    **{
        "output_dir": "b",
        "logging_steps": 2,
        "logging_strategy": "no",
        "logging_first_step": True,
        "log_level": "error",
    },
    **{"log_on_each_node": False, "log_level_replica": "error", "logging_nan_inf_filter": False, "run_name": "b"},
    **{"include_num_input_tokens_seen": "all", "disable_tqdm": False, "report_to": "tensorboard", "project": "b"},
    **{"trackio_space_id": "b", "trackio_bucket_id": "b", "trackio_static_space_id": "b", "eval_strategy": "epoch"},
    **{"eval_steps": 3, "eval_delay": 1, "per_device_eval_batch_size": 1, "prediction_loss_only": True},
    **{"eval_on_start": True, "eval_do_concat_batches": False, "eval_use_gather_object": True, "eval_packing": True},
    **{"eval_accumulation_steps": 2, "include_for_metrics": ["loss"], "batch_eval_metrics": True},
    **{"save_only_model": True, "save_strategy": "epoch", "save_steps": 3, "save_on_each_node": True},
    **{"save_total_limit": 3, "enable_jit_checkpoint": True, "push_to_hub": True, "hub_token": "b"},
    **{"hub_private_repo": True, "hub_model_id": "b", "hub_strategy": "end", "hub_always_push": True},
    **{"hub_revision": "b", "load_best_model_at_end": True, "metric_for_best_model": "b", "greater_is_better": True},
    **{"ignore_data_skip": True, "restore_callback_states_from_checkpoint": True, "full_determinism": True},
    **{"use_cpu": False, "bf16_full_eval": True, "fp16_full_eval": True, "activation_checkpointing": True},
    **{"activation_checkpointing_kwargs": {"use_reentrant": True}, "gradient_checkpointing": True},
    **{"gradient_checkpointing_kwargs": {"use_reentrant": True}, "torch_compile": True, "torch_compile_backend": "b"},
    **{"torch_compile_mode": "b", "use_liger_kernel": True, "liger_kernel_config": {"a": 1}, "use_cache": True},
    **{"torch_empty_cache_steps": 1, "dataloader_num_workers": 1, "dataloader_pin_memory": True},
    **{"dataloader_persistent_workers": True, "dataloader_prefetch_factor": 2, "dataset_num_proc": 2},
    **{"dataloader_multiprocessing_context": "fork", "label_names": ["labels"], "ddp_find_unused_parameters": True},
    **{"ddp_bucket_cap_mb": 1, "ddp_broadcast_buffers": True, "ddp_static_graph": True, "ddp_backend": "gloo"},
    **{
        "ddp_timeout": 1,
        "fsdp": True,
        "fsdp_config": {},
        "deepspeed": "b",
        "debug": "b",
        "skip_memory_metrics": False,
    },
    **{"do_train": True, "do_eval": True, "do_predict": True, "resume_from_checkpoint": "b", "local_rank": 1},
    **{"model_init_kwargs": {"a": 1}, "trust_remote_code": True, "activation_offloading": True},
    **{"auto_find_batch_size": True, "parallelism_config": "b"},
}
# Refused with these values on a CPU, or without an effect under `max_steps`.
ELSEWHERE = {"fp16", "tf32", "num_train_epochs"}


def arguments(directory, **changes):
    """Arguments that differ from those of `sft_config`, set afterwards so that no combination is refused."""
    args = sft_config(directory)
    for name, value in changes.items():
        current = getattr(args, name)
        if name == "accelerator_config":
            value = type(current)(**value)
        setattr(args, name, type(current)(value) if name == "lr_scheduler_type" else value)
    return args


def test_every_argument_of_a_trainer_is_known_here():
    known = {*COMPARED, *FREE, *ELSEWHERE}
    assert {f.name for f in fields(SFTConfig)} <= known
    assert len(known) == len(COMPARED) + len(FREE) + len(ELSEWHERE)


@pytest.mark.parametrize("name", COMPARED)
def test_an_argument_that_changes_the_training_is_compared(tmp_path, name):
    before, after = (_argument_settings(arguments(tmp_path, **c)) for c in ({}, {name: COMPARED[name]}))
    assert before != after
    assert before.keys() == after.keys()


@pytest.mark.parametrize("name", sorted(FREE))
def test_an_argument_that_does_not_is_free(tmp_path, name):
    before, after = (_argument_settings(arguments(tmp_path, **c)) for c in ({}, {name: FREE[name]}))
    if name == "auto_find_batch_size":
        del before["rows_in_a_step"], before["batches"]
    assert before == after


def test_batches_count_where_rows_are_sampled_by_them(tmp_path):
    """`LengthGroupedSampler` sorts as many rows together as a process reads in a step."""
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    for strategy, counts in (("random", False), ("group_by_length", True), ("batch_rebalance", True)):
        given = {"train_sampling_strategy": strategy}
        whole, dealt = (_argument_settings(arguments(tmp_path, **given, **more)) for more in ({}, halves))
        assert whole["rows_in_a_step"] == dealt["rows_in_a_step"]
        assert {name for name in whole if whole[name] != dealt[name]} - {"batches"} == (
            {"grouped_batches"} if counts else set()
        )


def test_the_length_counts_where_the_learning_rate_depends_on_it(tmp_path):
    for kind, warmup, counts in (
        ("linear", 0, True), ("cosine", 2, True), ("constant", 0, False), ("constant_with_warmup", 2, False),
        ("constant_with_warmup", 0.1, True), ("inverse_sqrt", 3, False),
    ):  # fmt: skip
        ends = []
        for length in ({"max_steps": 4}, {"max_steps": -1, "num_train_epochs": 2.0}, {"max_steps": 9}):
            settings = _argument_settings(arguments(tmp_path, lr_scheduler_type=kind, warmup_steps=warmup, **length))
            ends.append(settings.get("length"))
        assert ends == (["max_steps=4", "num_train_epochs=2", "max_steps=9"] if counts else [None] * 3)
    plateau = [
        _argument_settings(arguments(tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_steps=n)) for n in (1, 2)
    ]
    assert plateau[0] != plateau[1]


def make(directory, template, tokenizer, *, rows=None, model=None, config=None, **more):
    names = {f.name for f in fields(SFTConfig)}
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **{k: more.pop(k) for k in names & set(more)}}
    return FNSFTTrainer(
        model=tiny_model("llama") if model is None else model,
        args=sft_config(directory, **args),
        train_dataset=Dataset.from_list(rows or tiny_rows()),
        processing_class=tokenizer,
        network_config=FunctionalNetworkConfig(**(config or {})),
        network_template=template,
        **more,
    )


def other_loss(outputs, labels, num_items_in_batch=None):
    return outputs.logits.float().logsumexp(-1).mean()


def lora(**changes):
    return {"peft_config": LoraConfig(**{"r": 2, "lora_alpha": 2, **changes})}


def beside(**changes):
    return {"peft_config": LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **changes}), "config": DELTA}


FULL, DELTA = {"train_method": "full"}, {"train_method": "neuron_delta"}
SELECTED = {"train_neurons": "selected"}
# name -> (the run, what differs in the one that resumes it, what the error says)
OTHERS = {
    "fraction": ({"config": {"ica_fraction": 0.3}}, {"config": {"ica_fraction": 0.5}}, "trainable was 36 neurons"),
    "train_neurons": (
        {},
        {"config": {"train_neurons": "unselected"}},
        "train_neurons was selected and is now unselec",
    ),
    "mask_mode": (
        {"config": SELECTED},
        {"config": {**SELECTED, "mask_mode": "preserve"}},
        "was None and is now preserve",
    ),
    "full, not deltas": ({}, {"config": FULL}, "train_method was neuron_delta and is now full"),
    "deltas, not full": ({"config": FULL}, {"config": {}}, "train_method was full and is now neuron_delta"),
    "lora, not deltas": ({}, lora(), "train_method was neuron_delta and is now lora"),
    "deltas, not lora": (lora(), {"peft_config": None}, "train_method was lora and is now neuron_delta"),
    "train_other": (
        {"config": {**FULL, "train_neurons": "unselected"}},
        {"config": {**FULL, "train_neurons": "unselected", "train_other": False}},
        "train_other was True and is now False",
    ),
    "rank": (lora(), lora(r=4), r"adapter\.r was 2 and is now 4"),
    "alpha": (lora(), lora(lora_alpha=64), r"adapter\.lora_alpha was 2 and is now 64"),
    "dropout": (lora(), lora(lora_dropout=0.5), r"adapter\.lora_dropout was 0\.0 and is now 0\.5"),
    "rslora": (lora(), lora(use_rslora=True), r"adapter\.use_rslora was False and is now True"),
    "targets": (lora(), lora(target_modules=["up_proj"]), r"adapter\.target_modules was .* and is now"),
    "saved modules": (lora(), lora(modules_to_save=["lm_head"]), r"adapter\.modules_to_save was None"),
    "lora beside": ({}, beside(), r"adapter\.lora was None and is now .*q_proj"),
    "no lora beside": (beside(), {"peft_config": None}, r"adapter\.lora was .*q_proj.* and is now None"),
    "lora elsewhere": (
        beside(),
        beside(target_modules=["v_proj"]),
        r"adapter\.lora was .*q_proj.* and is now .*v_proj",
    ),
    "alpha beside": (beside(), beside(lora_alpha=9), r"adapter\.lora was .* and is now"),
    "precision": ({}, {"model": "bfloat16"}, r"dtype was \['float32'\] and is now \['bfloat16', 'float32'\]"),
    "base model": ({}, {"model": "other"}, "the frozen weights are not those of the run that is resumed"),
    "base of lora": (
        lora(),
        {**lora(), "model": "other"},
        "the frozen weights are not those of the run that is resumed",
    ),
    "rows": ({}, {"rows": tiny_rows(48, seed=1)}, r"train_dataset was 48 rows \(\w+\) and is now 48 rows \(\w+\)"),
    "order of rows": ({}, {"rows": tiny_rows()[::-1]}, "train_dataset was 48 rows"),
    "number of rows": ({}, {"rows": tiny_rows()[:40]}, r"train_dataset was 48 rows \(\w+\) and is now 40 rows"),
    "loss": ({}, {"compute_loss_func": other_loss}, r"compute_loss_func was None and is now .*other_loss"),
    "optimizer class": (
        {},
        {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})},
        "optimizer_cls_and_kwargs was None and is now",
    ),
    "networks": ({}, {"config": {"ica_component_ids": [0]}}, "trainable was .*, its networks among it"),
    "learning rate": ({}, {"learning_rate": 1e-3}, r"learning_rate was 0\.01 and is now 0\.001"),
    "steps": ({}, {"max_steps": 8}, "length was max_steps=4 and is now max_steps=8"),
    "batch": ({}, {"per_device_train_batch_size": 2}, "rows_in_a_step was 4 and is now 2"),
    "optimizer": ({}, {"optim": "sgd"}, "optim was adamw_torch_fused and is now sgd"),
    "seed": ({}, {"seed": 1}, "seed was 3 and is now 1"),
}


def prepared(settings):
    """Models are made anew for each run."""
    settings = dict(settings)
    if settings.get("model") == "bfloat16":
        settings["model"] = tiny_model("llama").to(torch.bfloat16)
    elif settings.get("model") == "other":  # one bit of one frozen weight
        settings["model"] = tiny_model("llama")
        settings["model"].lm_head.weight.data.view(torch.int32)[3, 1] ^= 1
    return settings


@pytest.fixture(scope="module")
def plain_run(templates, tokenizer, tmp_path_factory):
    """A run with nothing of its own, with its checkpoints."""
    directory = tmp_path_factory.mktemp("plain") / "run"
    make(directory, templates["llama"], tokenizer).train()
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_a_run_that_differs_is_refused_and_the_error_names_both_values(
    templates, tokenizer, tmp_path, plain_run, name
):
    first, second, message = OTHERS[name]
    if first:
        make(tmp_path, templates["llama"], tokenizer, **first).train()
    else:
        shutil.copytree(plain_run, tmp_path, dirs_exist_ok=True)
    trainer = make(tmp_path, templates["llama"], tokenizer, **{**first, **prepared(second)})
    before = state(trainer.model)
    with pytest.raises(FNSFTError, match=message) as error:
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "\n" not in str(error.value)
    assert trainer.state.global_step in (0, 2)
    if "frozen" not in message:
        assert changed_entries(before, state(trainer.model)) == {}


SAME = {
    "how it is saved and logged": {"save_steps": 1, "logging_steps": 3, "save_total_limit": 2, "report_to": "none"},
    "evaluations": {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": Dataset.from_list(tiny_rows(4))},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "the guard": {"config": {"frozen_guard": False}},
    "the same data, made anew": {"rows": [dict(row) for row in tiny_rows()]},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME)
def test_what_may_change_gives_the_weights_of_the_whole_run(templates, tokenizer, tmp_path, name):
    whole = make(tmp_path / "whole", templates["llama"], tokenizer)
    whole.train()
    resumed = make(tmp_path / "resumed", templates["llama"], tokenizer, **SAME[name])
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert changed_entries(state(whole.model), state(resumed.model)) == {}


@pytest.mark.slow
def test_a_run_with_a_constant_rate_may_be_made_longer(templates, tokenizer, tmp_path):
    def run(name, steps):
        return make(
            tmp_path / name, templates["llama"], tokenizer, max_steps=steps, lr_scheduler_type="constant", save_steps=2
        )

    whole, short = run("whole", 6), run("short", 2)
    for each in (whole, short):
        each.train()
    longer = run("longer", 6)
    longer.train(resume_from_checkpoint=str(tmp_path / "short" / "checkpoint-2"))
    assert changed_entries(state(whole.model), state(longer.model)) == {}


def test_the_same_rows_in_other_batches_are_a_warning(templates, tokenizer, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("fnsft_trl.training.same_run.logger.warning", said.append)
    make(tmp_path, templates["llama"], tokenizer).train()
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = make(tmp_path, templates["llama"], tokenizer, **halves)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    (line,) = said
    assert "were 4 rows x 1 x 1 processes, now they are 2 rows x 2 x 1 processes" in line


def test_streams_have_no_rows_to_compare_and_a_threshold_is_no_network(templates, tokenizer, tmp_path):
    def stream(template, **more):
        trainer = make(tmp_path, template, tokenizer, **more)
        trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
        return trainer

    stream(templates["llama"], config={"ica_select": "random", "ica_fraction": 0.2}).train()
    other = templates["llama"].with_threshold(ThresholdRule("percentile", 60.0))
    resumed = stream(other, config={"ica_select": "random", "ica_fraction": 0.2})
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4


def test_without_a_mark_neurons_masks_and_adapter_are_compared(templates, tokenizer, tmp_path):
    make(tmp_path, templates["llama"], tokenizer, **lora()).train()
    (tmp_path / "checkpoint-2" / "functional_networks" / "complete.json").unlink()
    for other, message in (
        (lora(r=4), r"adapter\.r was 2 and is now 4"),
        (lora(lora_alpha=9), r"adapter\.lora_alpha was 2 and is now 9"),
        ({**lora(), "config": {"ica_fraction": 0.5}}, "trainable was"),
        (
            {**lora(), "config": {"mask_mode": "preserve", "train_neurons": "selected"}},
            "mask_mode was None and is now",
        ),
    ):
        trainer = make(tmp_path, templates["llama"], tokenizer, **other)
        with pytest.raises(FNSFTError, match=message):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(FNSFTError, match="not a checkpoint of this trainer"):
        check_same(tmp_path, {})
    assert isinstance(trainer.model, nn.Module)
