"""Networks in any trainer: what FNSFTTrainer promises holds for Trainer and for TRL's other trainers."""

import copy
import json
import math

import pytest
import torch
import transformers as tf
import trl
from datasets import Dataset
from helpers import changed_entries, logits, sft_config, state, tiny_model, tiny_rows, tiny_tokenizer
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback

import fnsft_trl.tuner  # noqa: F401
from fnsft_trl import (
    FNSFTError,
    FNSFTTrainer,
    FrozenNeuronGuard,
    FunctionalNetworkConfig,
    MaskPhase,
    MaskScheduleCallback,
    NeuronTunerConfig,
    RetentionCallback,
    RetentionConfig,
    find_neuron_sites,
    select_neurons,
    with_networks,
)
from fnsft_trl.export import changed_neurons
from fnsft_trl.neurons.sites import base_model


ROWS = tiny_rows(16)
PAIRS = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": r["completion"][::-1]} for r in ROWS]
COMMON = {
    **{"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 2, "logging_steps": 1, "disable_tqdm": True},
    **{"learning_rate": 1e-2, "weight_decay": 0.1, "save_strategy": "no", "gradient_checkpointing": False, "seed": 3},
    **{"per_device_train_batch_size": 4},
}
GENERATED = {"num_generations": 2, "max_completion_length": 6, "temperature": 1.0}
IDS = torch.tensor([[5, 6, 7, 8, 9]])


def tokenized():
    tokenizer = tiny_tokenizer()
    ids = [tokenizer(row["prompt"] + row["completion"])["input_ids"][:12] for row in ROWS]
    ids = [each + [0] * (12 - len(each)) for each in ids]
    return [{"input_ids": each, "labels": each, "attention_mask": [1] * 12} for each in ids]


def by_length(completions, **kwargs):
    """A reward that differs between answers."""
    return [float(len(completion)) for completion in completions]


# name -> (class, its configuration, rows, other arguments of the configuration and of the trainer)
TRAINERS = {
    "Trainer": (Trainer, tf.TrainingArguments, tokenized(), {}, {}),
    "DPO": (trl.DPOTrainer, trl.DPOConfig, PAIRS, {"max_length": 40}, {}),
    "KTO": (
        trl.KTOTrainer,
        trl.KTOConfig,
        [{"prompt": r["prompt"], "completion": r["chosen"], "label": bool(i % 2)} for i, r in enumerate(PAIRS)],
        {"max_length": 40},
        {},
    ),
    "Reward": (trl.RewardTrainer, trl.RewardConfig, PAIRS, {"max_length": 40}, {}),
    "GRPO": (trl.GRPOTrainer, trl.GRPOConfig, PAIRS, {**GENERATED, "beta": 0.1}, {"reward_funcs": by_length}),
    "RLOO": (trl.RLOOTrainer, trl.RLOOConfig, PAIRS, {**GENERATED, "beta": 0.1}, {"reward_funcs": by_length}),
}
WITH_REFERENCE = ("DPO", "KTO", "GRPO", "RLOO")


@pytest.fixture(params=TRAINERS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def reward_dir(tmp_path_factory, tokenizer):
    """A reward model with the neurons of the tiny Llama, on disk."""
    directory = tmp_path_factory.mktemp("model") / "tiny-reward"
    torch.manual_seed(0)
    config = copy.deepcopy(tiny_model("llama").config)
    config.num_labels = 1
    model = tf.LlamaForSequenceClassification(config)
    model.model.load_state_dict(tiny_model("llama").model.state_dict())
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def make(model_dir, reward_dir, templates, tmp_path):
    """A trainer with networks: `make(name, method, model=..., network={...}, **arguments of its configuration)`."""

    def make(name, method="neuron_delta", *, model=None, network=None, retention=None, template=True, **changes):
        trainer_class, config_class, rows, options, more = TRAINERS[name]
        if model is None:
            model = load(model_dir if name != "Reward" else reward_dir, name)
        lora = LoraConfig(r=2, init_lora_weights=True, task_type="SEQ_CLS" if name == "Reward" else "CAUSAL_LM")
        settings = {"output_dir": str(tmp_path / "run"), **COMMON, **options, **changes}
        return with_networks(trainer_class)(
            model=model,
            args=config_class(**settings),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows[:4]),
            processing_class=tiny_tokenizer(),
            **({"peft_config": lora} if method == "lora" and not isinstance(model, PeftModel) else {}),
            network_config=FunctionalNetworkConfig(train_method=method, **(network or {})),
            network_template=templates["llama"] if template else None,
            retention=retention,
            **more,
        )

    return make


def load(directory, name="DPO"):
    kind = tf.LlamaForSequenceClassification if name == "Reward" else tf.LlamaForCausalLM
    return kind.from_pretrained(directory)


def merged_state(model):
    """The weights of a copy into which its adapter is merged."""
    if isinstance(model, PeftModel):
        model = copy.deepcopy(model).merge_and_unload()
    return state(model)


class Firsts(TrainerCallback):
    """Whether the masked neurons were silent, in each forward pass of a model."""

    def __init__(self, model, silenced):
        self.seen = set()
        for site in find_neuron_sites(model):
            site.down.register_forward_pre_hook(self._hook(silenced.layers[site.layer]))

    def _hook(self, silenced):
        return lambda module, args: self.seen.add(not args[0][..., silenced].any())


class Note(TrainerCallback):
    """What was silent in each step."""

    def __init__(self, watched):
        self.watched, self.steps = watched, []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append([each.seen for each in self.watched])
        for each in self.watched:
            each.seen = set()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["neuron_delta", "lora", "full"])
def test_what_trains_is_what_was_selected_and_what_is_saved(make, name, method, model_dir, reward_dir, tmp_path):
    trainer = make(name, method, network={"ica_component_ids": [0]})
    before, sites = merged_state(trainer.model), find_neuron_sites(trainer.model)
    frozen = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    now = dict(trainer.model.named_parameters())
    assert all(torch.equal(value, now[n]) for n, value in frozen.items())
    after = merged_state(trainer.model)
    plain = load_sites(trainer.model) if method != "full" else sites
    changed, others = changed_neurons(plain, before, after)
    assert changed == trainer.trainable_neurons
    assert 0 < changed.count < (~changed).count
    # A reward model has a new head, which PEFT trains with an adapter.
    assert set(others) <= ({"score.weight"} if name == "Reward" and method != "full" else set())
    guards = [c for c in trainer.callback_handler.callbacks if isinstance(c, FrozenNeuronGuard)]
    assert len(guards) == 1

    trainer.save_model(str(tmp_path / "saved"))
    kind, directory = type(base_model(trainer.model)), reward_dir if name == "Reward" else model_dir
    if method == "full":
        loaded = kind.from_pretrained(tmp_path / "saved")
    else:
        loaded = PeftModel.from_pretrained(load(directory, name), tmp_path / "saved")
    assert torch.equal(logits(loaded.eval(), IDS), logits(trainer.model.eval(), IDS))
    assert (tmp_path / "saved" / "functional_networks" / "selection.json").is_file()
    if method != "full":
        assert "## Functional networks" in (tmp_path / "saved" / "README.md").read_text()


def load_sites(model):
    return find_neuron_sites(copy.deepcopy(model).unload())


@pytest.mark.slow
@pytest.mark.parametrize(("method", "mode"), [("neuron_delta", "lesion"), ("full", "preserve")])
def test_the_mask_is_on_when_it_is_asked_for(make, name, method, mode):
    trainer = make(name, method, network={"mask_mode": mode, "ica_component_ids": [0]}, max_steps=1)
    silenced = trainer.neuron_mask if mode == "lesion" else ~trainer.neuron_mask
    models = [trainer.model] + ([trainer.ref_model] if method == "full" and name in WITH_REFERENCE else [])
    note = Note([Firsts(model, silenced) for model in models])
    trainer.add_callback(note)
    trainer.train()
    assert note.steps == [[{True}] * len(models)], "silent in every pass, the reference's too"
    logged = [key for entry in trainer.state.log_history for key in entry]
    assert {"eval_masked_loss", "eval_unmasked_loss"} <= set(logged)


# References


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_REFERENCE)
@pytest.mark.parametrize("method", ["neuron_delta", "lora", "full"])
def test_the_reference_is_the_model_before_training(make, name, method, model_dir):
    """Not the model that lies on disk under its name, where the one in memory has other weights by now."""
    model = load(model_dir)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.add_(0.05)
    expected = logits(model, IDS)
    trainer = make(name, method, model=model)
    trainer.train()
    if method == "full":
        found = logits(trainer.ref_model.eval(), IDS)
    else:
        assert trainer.ref_model is None
        with trainer.model.eval().disable_adapter():
            found = logits(trainer.model, IDS)
    assert torch.equal(found, expected)
    assert not torch.equal(logits(trainer.model.eval(), IDS), expected)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [None, "lesion", "preserve"])
@pytest.mark.parametrize("method", ["neuron_delta", "lora", "full"])
def test_dpo_begins_at_ln_2(make, method, mode):
    """Model and reference are the same one at the start, under a mask too."""
    trainer = make("DPO", method, network={"mask_mode": mode}, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_a_reference_that_is_given_stays_as_it_is(make, model_dir, templates, tmp_path):
    reference = load(model_dir)
    before, hooks = state(reference), [len(m._forward_pre_hooks) for m in reference.modules()]
    trainer = with_networks(trl.DPOTrainer)(
        load(model_dir),
        reference,
        trl.DPOConfig(output_dir=str(tmp_path), max_length=40, **COMMON),
        train_dataset=Dataset.from_list(PAIRS),
        network_config=FunctionalNetworkConfig(train_method="full", mask_mode="preserve"),
        network_template=templates["llama"],
    )
    trainer.train()
    assert trainer.ref_model is reference
    assert trainer.state.log_history[0]["loss"] != pytest.approx(math.log(2), abs=1e-5)
    assert changed_entries(before, state(reference)) == {}
    assert [len(m._forward_pre_hooks) for m in reference.modules()] == hooks


def test_after_sft_the_reference_is_the_tuned_model(make, model_dir, templates, tmp_path):
    sft = FNSFTTrainer(
        model=str(model_dir),
        args=sft_config(tmp_path / "sft"),
        train_dataset=Dataset.from_list(ROWS),
        network_config=FunctionalNetworkConfig(ica_component_ids=[0]),
        network_template=templates["llama"],
    )
    sft.train()
    sft.save_model()
    model = PeftModel.from_pretrained(load(model_dir), tmp_path / "sft", is_trainable=True)
    before, tuned = logits(load(model_dir), IDS), logits(model.eval(), IDS)
    trainer = make("DPO", model=model, network={"ica_component_ids": [0]})
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    model = trainer.model.eval()
    now = logits(model, IDS)
    model.set_adapter("ref")
    assert torch.equal(logits(model, IDS), tuned)
    with model.disable_adapter():
        assert torch.equal(logits(model, IDS), before)
    assert not torch.equal(now, tuned)

    model = PeftModel.from_pretrained(load(model_dir), tmp_path / "sft", is_trainable=True)
    with pytest.raises(FNSFTError, match=r"brings deltas of \d+ neurons .* others at"):
        make("DPO", model=model, network={"ica_component_ids": [1]})
    with pytest.raises(FNSFTError, match="loaded for inference"):
        make("DPO", model=AutoPeftModelForCausalLM.from_pretrained(tmp_path / "sft"))


# What else a run with networks has


def test_a_schedule_switches_the_mask_of_the_reference_too(make):
    trainer = make("DPO", "full")
    trainer.add_callback(MaskScheduleCallback(trainer, [MaskPhase(1, "preserve")]))
    note = Note([Firsts(model, ~trainer.neuron_mask) for model in (trainer.model, trainer.ref_model)])
    trainer.add_callback(note)
    trainer.train()
    assert note.steps == [[{False}, {False}], [{True}, {True}]]
    with pytest.raises(FNSFTError, match="precompute_ref_log_probs"):
        MaskScheduleCallback(make("DPO", precompute_ref_log_probs=True), [MaskPhase(1, "preserve")])
    with pytest.raises(FNSFTError, match="with_networks"):
        MaskScheduleCallback(Trainer(tiny_model("llama")), [MaskPhase(1, "preserve")])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"), [*((name, "neuron_delta") for name in TRAINERS), ("Trainer", "lora"), ("GRPO", "full")]
)
def test_a_resumed_run_is_the_uninterrupted_one(make, name, method, tmp_path):
    def run(directory, **train):
        trainer = make(
            name, method, max_steps=4, save_strategy="steps", save_steps=2, output_dir=str(tmp_path / directory)
        )
        trainer.train(**train)
        return trainer

    whole = run("whole")
    assert (tmp_path / "whole" / "checkpoint-2" / "functional_networks" / "complete.json").is_file()
    resumed = run("resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert changed_entries(state(whole.model), state(resumed.model)) == {}
    with pytest.raises(FNSFTError, match=r"learning_rate was 0\.01 and is now 0\.02"):
        make(name, method, max_steps=4, learning_rate=0.02, output_dir=str(tmp_path / "other")).train(
            resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2")
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Trainer", "DPO", "GRPO"])
@pytest.mark.parametrize("method", ["neuron_delta", "full"])
def test_what_is_lost_is_measured(make, name, method, tmp_path):
    """From the model before training, with the mask off, and with its reference as it is."""
    trainer = make(name, method, network={"mask_mode": "preserve"})
    trainer.add_callback(RetentionCallback(trainer, ["Say bako: okab."] * 4, name="wiki", max_tokens=40))
    trainer.train()
    rises = [entry["retention/wiki/rise"] for entry in trainer.state.log_history if "retention/wiki/rise" in entry]
    assert rises[0] == pytest.approx(0, abs=1e-6)
    assert abs(rises[-1]) > 1e-5
    trainer.save_model()
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["retention"]["series"]["wiki"]["rise"] == rises[-1]
    assert found["networks"]["method"] == method
    assert {"masked", "unmasked"} <= {key for key, values in found["evaluation"].items() if values}


def test_retention_of_a_reward_model_is_refused(make, tmp_path):
    (tmp_path / "wiki.txt").write_text("Say bako: okab.")
    with pytest.raises(FNSFTError, match="next token"):
        RetentionCallback(make("Reward"), ["Say bako: okab."])
    with pytest.raises(FNSFTError, match="next token"):
        make("Reward", retention=RetentionConfig(retention_datasets=[str(tmp_path / "wiki.txt")]))


@pytest.mark.slow
def test_a_run_is_not_resumed_between_two_generations(make, tmp_path):
    def run(directory, **train):
        settings = {"steps_per_generation": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
        trainer = make("GRPO", output_dir=str(tmp_path / directory), **settings)
        trainer.train(**train)
        return trainer

    whole = run("whole")
    with pytest.raises(FNSFTError, match=r"amid the 2 steps .* multiple of 2"):
        run("odd", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    resumed = run("even", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert changed_entries(state(whole.model), state(resumed.model)) == {}


@pytest.mark.slow
def test_a_run_from_an_adapter_is_resumed_with_its_reference(make, templates, model_dir, tmp_path):
    config = NeuronTunerConfig(neurons=select_neurons(templates["llama"]).to_ranges(), task_type="CAUSAL_LM")
    tuned = get_peft_model(load(model_dir), config)
    for name, parameter in tuned.named_parameters():
        if "neuron_delta" in name:
            parameter.data.normal_(0, 0.02, generator=torch.Generator().manual_seed(len(name)))
    tuned.save_pretrained(tmp_path / "tuned")

    def run(directory, **train):
        model = PeftModel.from_pretrained(load(model_dir), tmp_path / "tuned", is_trainable=True)
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        trainer = make("DPO", model=model, output_dir=str(tmp_path / directory), **settings)
        trainer.train(**train)
        return trainer

    whole = run("whole")
    resumed = run("resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert changed_entries(state(whole.model), state(resumed.model)) == {}
    assert whole.model.active_adapters == resumed.model.active_adapters == ["default"]


@pytest.mark.parametrize("name", ["Trainer", "DPO", "GRPO"])
def test_networks_are_discovered_on_what_the_trainer_reads(make, name):
    network = {"ica_components": 2, "ica_rank": 8, "ica_max_tokens": 100, "ica_max_length": 32}
    trainer = make(name, template=False, network=network)
    assert trainer.network_template.calibration["sources"] == ["the training data"]
    assert trainer.neuron_mask.count


def test_a_model_is_given_by_name_as_the_trainer_takes_it(model_dir, reward_dir, templates, tmp_path):
    for name, directory, found in (
        ("Reward", reward_dir, tf.LlamaForSequenceClassification),
        ("GRPO", model_dir, tf.LlamaForCausalLM),
        ("Trainer", model_dir, tf.LlamaForCausalLM),
    ):
        trainer_class, config_class, rows, options, more = TRAINERS[name]
        trainer = with_networks(trainer_class)(
            str(directory),
            args=config_class(output_dir=str(tmp_path), **COMMON, **options),
            train_dataset=Dataset.from_list(rows),
            network_config=FunctionalNetworkConfig(),
            network_template=templates["llama"],
            **more,
        )
        assert type(trainer.model.get_base_model()) is found
        if name == "GRPO":
            assert (trainer.processing_class.padding_side, trainer.processing_class.truncation_side) == ("left",) * 2


def test_without_a_network_config_it_is_the_trainer(model_dir, tmp_path):
    weights = []
    for trainer_class in (trl.DPOTrainer, with_networks(trl.DPOTrainer)):
        trainer = trainer_class(
            str(model_dir),
            args=trl.DPOConfig(output_dir=str(tmp_path / "run"), max_length=40, **COMMON),
            train_dataset=Dataset.from_list(PAIRS),
        )
        trainer.train()
        weights.append(state(trainer.model))
    assert changed_entries(*weights) == {}


def test_one_class_for_one_class():
    assert with_networks(trl.DPOTrainer) is with_networks(trl.DPOTrainer)
    assert issubclass(with_networks(trl.DPOTrainer), trl.DPOTrainer)
    assert with_networks(trl.SFTTrainer) is FNSFTTrainer is with_networks(FNSFTTrainer)
    for wrong in ("DPOTrainer", trl.DPOConfig, None):
        with pytest.raises(FNSFTError, match="takes a class, transformers"):
            with_networks(wrong)


@pytest.mark.parametrize(
    ("name", "method", "changes", "told"),
    [
        ("DPO", "neuron_delta", {"network": {"mask_mode": "lesion"}, "precompute_ref_log_probs": True}, "reference"),
        ("GRPO", "neuron_delta", {"network": {"mask_mode": "lesion"}, "use_vllm": True}, "vLLM"),
        ("KTO", "full", {"optim": "lomo"}, "optim=lomo"),
        ("DPO", "full", {"network": {"ica_component_ids": [7]}}, "network 7"),
    ],
)
def test_a_refusal_comes_before_the_trainer_and_leaves_the_model(make, name, method, changes, told, model_dir):
    model = load(model_dir)
    before = state(model), [p.requires_grad for p in model.parameters()], list(vars(model))
    with pytest.raises(FNSFTError, match=told) as error:
        make(name, method, model=model, **changes)
    assert "\n" not in str(error.value)
    assert changed_entries(before[0], state(model)) == {}
    assert ([p.requires_grad for p in model.parameters()], list(vars(model))) == before[1:]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_is_missing_is_named(model_dir, templates):
    networked = with_networks(trl.DPOTrainer)
    with pytest.raises(FNSFTError, match="no model"):
        networked(None, network_config=FunctionalNetworkConfig())
    with pytest.raises(FNSFTError, match="given no args"):
        networked(str(model_dir), network_config=FunctionalNetworkConfig())
    with pytest.raises(FNSFTError, match="no effect"):
        networked(str(model_dir), network_template=templates["llama"])
    with pytest.raises(TypeError, match="multiple values"):
        networked(str(model_dir), model=str(model_dir))


NO_ROWS = {"a list": [{"prompt": "a"}], "nothing": None, "no row": Dataset.from_list([]), "a dict": {"a": 1}}


@pytest.mark.parametrize("name", [name for name in TRAINERS if name != "Trainer"])
@pytest.mark.parametrize("rows", NO_ROWS)
@pytest.mark.parametrize("place", ["train_dataset", "eval_dataset"])
def test_what_is_no_dataset_is_refused_before_a_model_is_loaded(name, rows, place, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "fnsft_trl.training.run.load_base_model", lambda *args, **more: pytest.fail("a model is loaded")
    )
    trainer_class, config_class, fine, options, more = TRAINERS[name]
    if place == "eval_dataset" and NO_ROWS[rows] is None:
        return
    data = {"train_dataset": Dataset.from_list(fine), "eval_dataset": None} | {place: NO_ROWS[rows]}
    with pytest.raises(FNSFTError, match=f"{place}.* (is a|is missing|has no rows)"):
        with_networks(trainer_class)(
            model="nowhere",
            args=config_class(output_dir=str(tmp_path / "run"), **COMMON, **options),
            processing_class=tokenizer,
            network_config=FunctionalNetworkConfig(),
            **data,
            **more,
        )
