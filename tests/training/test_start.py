"""What would end a training at its beginning, or leave it without a step, is refused when the trainer is made."""

import math
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import sft_config, tiny_model
from peft import LoraConfig
from transformers import TrainingArguments

from fnsft_trl import FNSFTError, FNSFTTrainer, FunctionalNetworkConfig
from fnsft_trl.cli.options.trl_options import _RANGES
from fnsft_trl.training import run
from fnsft_trl.training.numbers import TRAINING_RANGES, check_lora_numbers, check_numbers
from fnsft_trl.training.start import check_start


ROWS = [{"prompt": f"Say {n}:", "completion": f" {n}."} for n in range(4)]


def wrong_numbers(name: str) -> list:
    """Values of an argument just outside of its range, and those that no range holds."""
    lowest, highest = TRAINING_RANGES[name]
    draw = random.Random(name)
    outside = [lowest - 1, lowest - draw.random(), -draw.randint(2, 10**9)]
    outside += [] if highest is None else [highest + 1, highest + draw.random()]
    return [*outside, math.nan, math.inf, -math.inf, "1", True, [1], np.float32("nan")]


@pytest.mark.parametrize("name", TRAINING_RANGES)
def test_numbers_end_where_the_command_line_ends_them(name, tmp_path):
    """Set on the arguments when they were made, as a sweep does: their own class checks few of them, and only then."""
    args = sft_config(tmp_path)
    lowest, highest = _RANGES[name]
    for value in (lowest, lowest + 1 if highest is None else highest, np.float32(lowest)):
        setattr(args, name, value)
        check_numbers(args)
    for value in wrong_numbers(name):
        setattr(args, name, value)
        with pytest.raises(FNSFTError, match=f"{name} is .*; it must be a number (at least|from) {lowest}"):
            check_numbers(args)


def test_arguments_of_any_trainer_have_these_numbers(tmp_path):
    check_numbers(TrainingArguments(tmp_path, report_to="none"))


REFUSED = {
    "negative rate": ({"learning_rate": -1.0}, "learning_rate is -1.0"),
    "no clipping": ({"max_grad_norm": None}, "max_grad_norm is None; it must be a number at least 0"),
    "length": ({"max_length": -5}, "max_length is -5"),
    "no step": ({"max_steps": 0}, "max_steps is 0, so that nothing would be trained"),
    "no epoch": ({"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs is 0, so that nothing"),
    "no batch": (
        {"dataloader_drop_last": True, "per_device_train_batch_size": 5},
        "4 rows, a batch has 5, and dataloader_drop_last .* nothing would be trained",
    ),
    "workers": ({"dataloader_persistent_workers": True}, "dataloader_num_workers, which is 0"),
    "package": ({"optim": "adamw_anyprecision"}, "optim=adamw_anyprecision cannot be used: "),
    "optimizer": ({"optim": "rmsprop", "optim_args": "momentum=-1"}, "optim=rmsprop cannot be used: .*momentum"),
    "schedule": ({"lr_scheduler_kwargs": {"foo": 1}}, "lr_scheduler_type=linear does not take"),
    "checkpointing": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrent": False}},
        "gradient_checkpointing_kwargs has 'use_reentrent'; it takes .*use_reentrant",
    ),
    "tracker": ({"report_to": ["neptune"]}, "the tracker neptune of report_to is not installed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_before_a_model_is_loaded(case, tmp_path, tokenizer, monkeypatch):
    settings, message = REFUSED[case]
    monkeypatch.setattr(run, "load_base_model", lambda *args, **options: pytest.fail("a model is loaded"))
    args = sft_config(tmp_path)
    for name, value in settings.items():
        setattr(args, name, value if name != "optim" else type(args.optim)(value))
    with pytest.raises(FNSFTError, match=message):
        FNSFTTrainer(
            "nowhere",
            args,
            train_dataset=Dataset.from_list(ROWS),
            processing_class=tokenizer,
            network_config=FunctionalNetworkConfig(ica_components=2),
        )


def test_an_optimizer_that_is_given_is_no_matter_of_optim(tmp_path):
    args = sft_config(tmp_path, optim="adamw_anyprecision", lr_scheduler_kwargs={"foo": 1})
    check_start(args, {"optimizers": (object(), object())})
    with pytest.raises(FNSFTError, match="lr_scheduler_kwargs"):
        check_start(args, {"optimizer_cls_and_kwargs": (object, {})})


@pytest.mark.parametrize("method", ["neuron_delta", "lora", "full"])
def test_an_optimizer_without_a_weight_that_trains_is_refused(method, templates, tokenizer, tmp_path):
    """One over the weights of the model, as it is before the trainer puts an adapter on it: nothing would train."""
    model = tiny_model("llama")

    def make():
        return FNSFTTrainer(
            model,
            sft_config(tmp_path),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=tokenizer,
            optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None),
            peft_config=LoraConfig(r=2) if method == "lora" else None,
            network_config=FunctionalNetworkConfig(train_method=method, ica_component_ids=[0]),
            network_template=templates["llama"],
        )

    if method == "full":
        assert make().optimizer is not None
    else:
        with pytest.raises(FNSFTError, match="the optimizer that was given holds none of the weights that train"):
            make()


def test_numbers_of_lora_with_which_nothing_trains_are_refused():
    for settings in ({}, {"r": 1, "lora_alpha": 0.5}, {"lora_dropout": 0.99}):
        check_lora_numbers(LoraConfig(**settings))
    wrong = {"r": [0, -1, 2.5, None], "lora_alpha": [0, -2, math.nan, math.inf, None], "lora_dropout": [1, -0.1, None]}
    for name, values in {**wrong, "inference_mode": [True]}.items():
        for value in values:
            config = LoraConfig()
            setattr(config, name, value)
            with pytest.raises(FNSFTError, match=f"{name} of the LoraConfig is {value}, with which nothing trains"):
                check_lora_numbers(config)


OTHERS = [("args", {"output_dir": "x"}), ("args", "x"), ("model", torch.nn.Linear(2, 2)), ("model", 3)]


@pytest.mark.parametrize(("name", "value"), OTHERS)
def test_arguments_of_another_type_are_refused_by_name(name, value, tokenizer, tmp_path):
    arguments = {"model": tiny_model("llama"), "args": sft_config(tmp_path)} | {name: value}
    with pytest.raises(FNSFTError, match=f"{name} is a {type(value).__name__}; expected "):
        FNSFTTrainer(
            **arguments,
            train_dataset=Dataset.from_list(ROWS),
            processing_class=tokenizer,
            network_config=FunctionalNetworkConfig(),
        )


def test_a_model_may_be_given_by_its_path(model_dir, templates, tmp_path):
    trainer = FNSFTTrainer(
        model_dir,
        sft_config(tmp_path),
        train_dataset=Dataset.from_list(ROWS),
        network_config=FunctionalNetworkConfig(),
        network_template=templates["llama"],
    )
    assert trainer.network_template is templates["llama"]
