"""Protection while training: D U = 0 for every way of training and every kind of directions, whatever the run does."""

import copy
import json
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from helpers import changed_entries, offloading, sft_config, state, tiny_model, tiny_rows, tiny_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, LlamaForCausalLM, Trainer, TrainingArguments

from fnsft_trl import (
    FNSFTError,
    FNSFTTrainer,
    FunctionalNetworkConfig,
    FunctionalNetworkTemplate,
    ProtectionConfig,
    discover_networks,
    find_neuron_sites,
    with_networks,
)
from fnsft_trl.constraints.protection import ProtectedWeights
from fnsft_trl.discovery.decomposition import IcaSettings, decompose
from fnsft_trl.discovery.module_directions import directions_of_modules, template_basis
from fnsft_trl.discovery.saved_directions import load_directions
from fnsft_trl.discovery.sketch import ActivationSketch
from fnsft_trl.export import changed_neurons, to_merged, to_plain_lora
from fnsft_trl.export.restored import AdapterChanges
from fnsft_trl.neurons.sites import linear_shape
from fnsft_trl.training.protection import PROTECTION_DIR
from fnsft_trl.training.protection_config import EVIDENCE
from fnsft_trl.tuner.saved import SavedAdapter


ROWS = Dataset.from_list(tiny_rows())
EXACT = 1e-6  # ||D U|| / ||D|| in float32
MERGED = 2.0**-23  # ||(W' - W) U|| / ||W|| after a merge in float32
SOME = {"ica_fraction": 0.6, "train_neurons": "selected"}
LORA = {"r": 4, "target_modules": ["q_proj", "up_proj", "down_proj"]}
# way -> arguments of the trainer
WAYS = {
    "full": {},
    "full, some neurons": {"network_config": {**SOME, "train_method": "full"}},
    "LoRA": {"peft_config": LORA},
    "LoRA, some neurons": {"peft_config": {"r": 4}, "network_config": SOME},
    "neuron deltas": {"network_config": {**SOME, "train_method": "neuron_delta"}},
}
KINDS = ("subspace", "networks", "random")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "kept.txt"
    path.write_text("\n".join(row["completion"] * 12 for row in tiny_rows(60, seed=5)))
    return str(path)


@pytest.fixture(scope="module")
def template(text, tmp_path_factory):
    """A template with directions of its inputs, and the directory that it is saved in."""
    config = FunctionalNetworkConfig(ica_components=3, ica_rank=8, ica_store_basis=5)
    found = discover_networks(tiny_model("llama"), tiny_tokenizer(), Path(text).read_text().splitlines(), config)
    directory = tmp_path_factory.mktemp("template")
    found.save_pretrained(directory)
    return found, str(directory)


def protection(text, kind="subspace", **changes):
    settings = {"protect": kind, "protect_datasets": [f"kept={text}"], "protect_tokens": 256}
    settings |= {} if kind == "networks" else {"protect_dims": 4}
    return ProtectionConfig(**settings | changes)


def trainer_of(way, directory, protection, template=None, model=None, **changes):
    arguments = copy.deepcopy(WAYS[way])
    if "network_config" in arguments:
        arguments["network_config"] = FunctionalNetworkConfig(**arguments["network_config"])
        arguments["network_template"] = template[0]
    if "peft_config" in arguments:
        arguments["peft_config"] = LoraConfig(**arguments["peft_config"])
    return FNSFTTrainer(
        model=tiny_model("llama") if model is None else model,
        args=sft_config(directory, **changes),
        train_dataset=ROWS,
        processing_class=tiny_tokenizer(),
        protection=protection,
        **arguments,
    )


def merged(model):
    model = copy.deepcopy(model)
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def left_of(before, model, kept):
    """The largest ||(W' - W) U|| / ||W|| over the modules that changed, and their names."""
    found = {}
    for name, module in model.named_modules():
        if linear_shape(module) is None or f"{name}.weight" not in before:
            continue
        base = before[f"{name}.weight"].double()
        change = module.weight.detach().double() - base
        if change.any():
            found[name] = float((change @ kept.of(name).basis).norm() / base.norm())
    return max(found.values()), set(found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_nothing_of_the_change_lies_along_the_directions(way, kind, text, template, tmp_path):
    """The table in docs/forgetting.md."""
    before = state(tiny_model("llama"))
    config = protection(text, kind, **({"protect_basis": template[1]} if kind == "networks" else {}))
    trainer = trainer_of(way, tmp_path, config, template, gradient_accumulation_steps=2, max_grad_norm=0.1)
    trainer.train()
    assert trainer.protection.left() <= (MERGED if way.startswith("full") else EXACT)
    trainer.save_model()
    kept, _ = load_directions(tmp_path / PROTECTION_DIR)
    model = merged(trainer.model)
    left, changed = left_of(before, model, kept)
    assert left <= MERGED
    assert {"model.layers.0.mlp.up_proj", "model.layers.2.mlp.down_proj"} <= changed
    if kind == "networks":
        for name, rows in directions_of_modules(template[0], model, [0, 1, 2]).items():
            base, rows = before[f"{name}.weight"].double(), rows / rows.norm(dim=1, keepdim=True)
            change = model.get_submodule(name).weight.detach().double() - base
            assert (change @ rows.T).norm() / base.norm() < 4 * MERGED
    told = json.loads((tmp_path / "results.json").read_text())["protection"]
    assert told["protect"] == kind
    assert 0 < told["energy"]["kept"] <= 1
    assert 0 < told["task_energy"] <= 1
    if "some" in way or "deltas" in way:
        after = state(model)
        same = changed_neurons(find_neuron_sites(model), before, after)[0]
        assert not (same & ~trainer.trainable_neurons).count
        assert trainer._run.guard.checked == 4


@pytest.fixture
def is_projected(request, monkeypatch):
    """Whether steps are projected; else a control."""
    for name in () if request.param else ("after_step", "settle"):
        monkeypatch.setattr(ProtectedWeights, name, lambda self: None)
    return request.param


@pytest.mark.parametrize("is_projected", [False], indirect=True, ids=["control"])
def test_without_the_projection_the_same_check_fails(is_projected, text, tmp_path):
    before = state(tiny_model("llama"))
    for way in ("full", "LoRA"):
        trainer = trainer_of(way, tmp_path / way, protection(text))
        trainer.train()
        assert trainer.protection.left() > 1000 * EXACT
        kept = trainer.protection.bases.kept
        assert left_of(before, merged(trainer.model), kept)[0] > 1000 * MERGED


@pytest.mark.slow
@pytest.mark.parametrize("way", ["full", "LoRA", "neuron deltas"])
@pytest.mark.parametrize("strength", [1.0, 0.8])
def test_a_resumed_run_equals_the_uninterrupted_one(way, strength, text, template, tmp_path):
    def make(directory, **changes):
        config = protection(text, protect_strength=strength, **changes)
        settings = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
        return trainer_of(way, directory, config, template, **settings)

    whole = make(tmp_path / "whole")
    whole.train()
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    resumed = make(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=checkpoint)
    assert changed_entries(state(whole.model), state(resumed.model)) == {}
    assert strength < 1 or resumed.protection.left() <= (MERGED if way == "full" else EXACT)
    if strength == 1 and way == "LoRA":
        with pytest.raises(FNSFTError, match="protect_dims=4, and this run has 3"):
            make(tmp_path / "other", protect_dims=3).train(resume_from_checkpoint=checkpoint)
        with pytest.raises(FNSFTError, match="written by a run with protect, and this run has none"):
            trainer_of(way, tmp_path / "other", None).train(resume_from_checkpoint=checkpoint)
    if strength == 1 and way == "full":
        moved = tiny_model("llama", seed=1)
        other = trainer_of(way, tmp_path / "other", protection(text), model=moved)
        with pytest.raises(FNSFTError, match="base weights"):
            other.train(resume_from_checkpoint=checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["full", "LoRA", "neuron deltas"])
def test_protect_none_is_the_run_without_it(way, template, tmp_path):
    plain = trainer_of(way, tmp_path / "plain", None, template)
    none = trainer_of(way, tmp_path / "none", ProtectionConfig(), template)
    for trainer in (plain, none):
        trainer.train()
    assert changed_entries(state(plain.model), state(none.model)) == {}
    none.save_model()
    assert not (tmp_path / "none" / PROTECTION_DIR).exists()


@pytest.mark.parametrize("way", ["LoRA", "LoRA, some neurons"])
def test_the_card_says_what_is_protected_and_names_no_file_that_lies_here(way, text, template, tmp_path):
    trainer = trainer_of(way, tmp_path, protection(text), template)
    trainer.train()
    trainer.save_model()
    (tmp_path / "rows.jsonl").touch()
    trainer.create_model_card(dataset_name=str(tmp_path / "rows.jsonl"))
    card = (tmp_path / "README.md").read_text()
    assert "## Protected directions" in card
    assert f"At most {trainer.protection.left():.1e}" in card
    assert str(tmp_path / "rows.jsonl") not in card


@pytest.mark.slow
def test_checkpointing_and_accumulation_change_nothing(text, tmp_path):
    found = []
    for changes in (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {},
    ):
        trainer = trainer_of("full", tmp_path, protection(text), **changes)
        trainer.train()
        assert trainer.protection.left() <= MERGED
        found.append(state(trainer.model))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[2][name], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found[1][name], found[2][name], rtol=5e-2, atol=5e-3)


def left_in_file(directory, kept):
    """The largest ||D U|| / ||D|| of any module of a saved adapter."""
    changes = AdapterChanges.read(SavedAdapter.read(directory)).changes
    pairs = [change.left_in(kept.of(name).basis) for name, change in changes.items()]
    assert pairs
    return max(along / whole for along, whole in pairs)


@pytest.mark.parametrize("is_projected", [True, False], indirect=True, ids=["protected", "control"])
@pytest.mark.parametrize("way", ["LoRA", "neuron deltas"])
def test_it_holds_after_saving_loading_merging_and_exporting(way, is_projected, text, template, tmp_path):
    """And does not hold of a run whose steps are not projected."""
    base = tiny_model("llama")
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    base.config._name_or_path = base.name_or_path = str(tmp_path / "base")
    before = state(base)
    trainer = trainer_of(way, tmp_path / "out", protection(text), template, base)
    trainer.train()
    trainer.save_model()
    kept, _ = load_directions(tmp_path / "out" / PROTECTION_DIR)
    to_merged(tmp_path / "out", tmp_path / "merged")
    adapters = [tmp_path / "out"]  # of a LoRA, a plain file of PEFT
    if way == "neuron deltas":
        to_plain_lora(tmp_path / "out", tmp_path / "lora")
        adapters.append(tmp_path / "lora")
    plain = PeftModel.from_pretrained(tiny_model("llama"), adapters[-1])
    for model in (type(base).from_pretrained(tmp_path / "merged"), plain.merge_and_unload()):
        assert (left_of(before, model, kept)[0] <= MERGED) == is_projected
    for directory in adapters:
        assert (left_in_file(directory, kept) <= EXACT) == is_projected


@pytest.mark.parametrize("way", ["full", "full, some neurons"])
def test_whole_weights_hold_it_after_saving_and_loading(way, text, template, tmp_path):
    before = state(tiny_model("llama"))
    trainer = trainer_of(way, tmp_path, protection(text), template)
    trainer.train()
    trainer.save_model()
    model = type(trainer.model).from_pretrained(tmp_path)
    assert left_of(before, model, load_directions(tmp_path / PROTECTION_DIR)[0])[0] <= MERGED


def padded():
    ids = [tiny_tokenizer()(row["prompt"] + row["completion"])["input_ids"][:12] for row in tiny_rows(16)]
    there = [[1] * len(each) + [0] * (12 - len(each)) for each in ids]
    ids = [each + [0] * (12 - len(each)) for each in ids]
    return [{"input_ids": each, "labels": each, "attention_mask": m} for each, m in zip(ids, there, strict=True)]


PAIRS = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "no"} for r in tiny_rows(16)]
GENERATED = {"num_generations": 2, "max_completion_length": 6}
TRAINERS = {
    "Trainer": (Trainer, TrainingArguments, padded(), {}, {}),
    "DPO": (trl.DPOTrainer, trl.DPOConfig, PAIRS, {}, {}),
    "GRPO": (
        *(trl.GRPOTrainer, trl.GRPOConfig, PAIRS, {**GENERATED, "per_device_train_batch_size": 4}),
        {"reward_funcs": lambda completions, **kwargs: [float(len(each)) for each in completions]},
    ),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_other_trainers_protect_too(name, text, tmp_path):
    kind, config, rows, settings, arguments = TRAINERS[name]
    model = tiny_model("llama")
    if name == "Trainer":  # which wraps no model
        model = get_peft_model(model, LoraConfig(**LORA))
    else:
        arguments = {**arguments, "peft_config": LoraConfig(**LORA)}
    common = {"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 2, "learning_rate": 1e-2}
    trainer = with_networks(kind)(
        model=model,
        args=config(output_dir=str(tmp_path), **common, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        protection=protection(text),
        **arguments,
    )
    trainer.train()
    assert trainer.protection.left() <= EXACT
    assert trainer.protection.task_energy is not None
    assert left_of(state(tiny_model("llama")), merged(trainer.model), trainer.protection.bases.kept)[0] <= MERGED


def test_chosen_networks_alone_are_protected(template, tmp_path):
    before = state(tiny_model("llama"))
    config = ProtectionConfig(protect="networks", protect_basis=template[1], protect_component_ids="0,2")
    trainer = trainer_of("full, some neurons", tmp_path, config, template)
    trainer.train()
    for name, rows in directions_of_modules(template[0], trainer.model, [0, 1, 2]).items():
        base = before[f"{name}.weight"].double()
        change = trainer.model.get_submodule(name).weight.detach().double() - base
        left = (change @ (rows / rows.norm(dim=1, keepdim=True)).T).norm(dim=0) / base.norm()
        assert left[[0, 1, 3]].max() < 4 * MERGED
        assert left[2] > 1e3 * MERGED


def test_stored_directions_are_those_of_the_text_and_protect_as_they_do(text, template, tmp_path):
    found, directory = template
    loaded = FunctionalNetworkTemplate.from_pretrained(directory)
    assert all(
        torch.equal(loaded.basis[layer][side], rows) for layer, of in found.basis.items() for side, rows in of.items()
    )
    assert json.loads((Path(directory) / "config.json").read_text())["format_version"] == 4
    basis = template_basis(loaded, tiny_model("llama"))
    assert [each.basis.shape for each in basis.inputs][:2] == [(40, 7), (16, 7)]
    for each in basis.inputs:
        torch.testing.assert_close(each.basis.T @ each.basis, torch.eye(7).double(), rtol=0, atol=1e-5)
    config = ProtectionConfig(protect="subspace", protect_basis=directory)
    trainer = trainer_of("full, some neurons", tmp_path, config, template)
    trainer.train()
    assert trainer.protection.left() <= MERGED
    with pytest.raises(FNSFTError, match=r"protect_basis holds 5 leading directions"):
        trainer_of(
            "full, some neurons",
            tmp_path,
            ProtectionConfig(protect="subspace", protect_basis=directory, protect_dims=6),
            template,
        )
    with pytest.raises(FNSFTError, match=r"q_proj trains, and protect_basis holds no directions"):
        trainer_of("LoRA", tmp_path, config)


def test_a_share_of_the_energy_chooses_as_many_directions_as_hold_it(text, tmp_path):
    trainer = trainer_of("LoRA", tmp_path, protection(text, protect_dims=0.9))
    counts = {each.basis.shape[1] for each in trainer.protection.bases.kept.inputs}
    assert trainer.protection.bases.energy["kept"] > 0.7
    assert max(counts) < 16
    wider = trainer_of("LoRA", tmp_path, protection(text, protect_dims=0.6))
    assert wider.protection.bases.energy["kept"] < trainer.protection.bases.energy["kept"]


def test_forgetting_low_protects_and_says_what_it_rests_on(text, tmp_path, log):
    config = ProtectionConfig(forgetting="low", protect_datasets=[f"kept={text}"], protect_tokens=256)
    trainer = trainer_of("LoRA", tmp_path, config)
    trainer.train()
    assert trainer.protection.left() <= EXACT
    assert {each.width: each.basis.shape[1] for each in trainer.protection.bases.kept.inputs} == {16: 10, 40: 22}
    trainer.save_model()
    told = json.loads((tmp_path / "results.json").read_text())["protection"]
    assert (told["protect"], told["forgetting"]) == ("subspace", "low")
    (said,) = (record.getMessage() for record in log.records if "forgetting=low" in record.getMessage())
    assert f"protect_datasets=kept={text}" in said
    assert EVIDENCE in said


def test_all_components_span_the_principal_components_of_the_same_sketch():
    draw = torch.Generator().manual_seed(0)
    mixing = torch.randn(4, 40, generator=draw)
    sketches = []
    for seed in (0, 1):
        sources = torch.randn(600, 4, generator=draw) ** 3
        sketches.append(ActivationSketch(40, 8, reservoir=600, seed=seed))
        sketches[-1].update(sources @ mixing + 1.0)
        sketches[-1].finish()
    found = decompose([[sketches[0]], [sketches[1]]], IcaSettings(4))
    spanned = torch.linalg.qr(found.loadings.double().T).Q
    rows = torch.cat([sketch.rows for sketch in sketches]).double()
    principal = torch.linalg.svd(rows, full_matrices=False).Vh[:4].T
    assert torch.linalg.svdvals(spanned.T @ principal).min() > 1 - 1e-5
    for layer in (slice(0, 15), slice(15, 40)):  # the inputs of one layer's down projection
        ends = [torch.linalg.qr(basis[layer]).Q for basis in (found.loadings.double().T, principal)]
        assert torch.linalg.svdvals(ends[0].T @ ends[1]).min() > 1 - 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protect": "none", "protect_datasets": None}, "protect_dims has no effect without protect"),
        ({"protect_datasets": None}, "protect=subspace needs texts to keep"),
        ({"protect_dims": 3.5}, "whole number, or a share below 1"),
        ({"protect_shares": [1, 2]}, "protect_shares has 2 numbers for 1 texts"),
        ({"protect_component_ids": "0-2"}, "it names networks"),
        ({"protect": "networks"}, "protect_dims has no effect with protect=networks"),
        ({"protect_basis": "x"}, "drop one of them"),
        ({"protect_strength": 0.0}, "protect_strength is 0.0"),
        (
            {"protect_datasets": None, "protect_basis": "x", "protect_dims": 0.9},
            "directions found before don't say",
        ),
        ({"protect_seed": 1}, "protect_seed has no effect with protect=subspace"),
        ({"protect_datasets": ["a=x", "a=y"]}, "protect_datasets names 'a' twice"),
        ({"protect": "random", "protect_datasets": None, "protect_dims": 0.5}, "a share of the energy of texts"),
    ],
)
def test_options_without_effect_are_refused(changes, message):
    with pytest.raises(FNSFTError, match=message):
        ProtectionConfig(**{"protect": "subspace", "protect_datasets": ["a=x"], "protect_dims": 3, **changes})


QUANTISED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("way", ["LoRA", "neuron deltas"])
def test_a_quantised_base_is_protected(way, kind, text, template, base_dir, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = LlamaForCausalLM.from_pretrained(base_dir, quantization_config=BitsAndBytesConfig(**QUANTISED[kind]))
    trainer = trainer_of(way, tmp_path, protection(text), template, model)
    trainer.train()
    trainer.save_model()
    # TRL holds the factors of a LoRA on a quantised base in bfloat16, in which D U = 0 is as near as that is.
    held = {str(p.dtype) for p in trainer.model.parameters() if p.requires_grad}
    assert held == {"torch.bfloat16" if way == "LoRA" else "torch.float32"}
    left = left_in_file(tmp_path, load_directions(tmp_path / PROTECTION_DIR)[0])
    assert left <= (1e-2 if way == "LoRA" else EXACT)
    assert trainer.protection.left() == pytest.approx(left, rel=0.2)


@pytest.mark.parametrize("way", ["full", "LoRA", "neuron deltas"])
def test_a_model_that_device_map_places_is_protected_and_an_offloaded_one_refused(
    way, text, template, base_dir, tmp_path
):
    trainer = trainer_of(
        way, tmp_path, protection(text), template, LlamaForCausalLM.from_pretrained(base_dir, device_map="auto")
    )
    trainer.train()
    assert trainer.protection.left() <= (MERGED if way == "full" else EXACT)
    offloaded = LlamaForCausalLM.from_pretrained(base_dir, **offloading(tmp_path))
    with pytest.raises(FNSFTError, match=r"needs all weights in memory, and .*layers\.1.* is offloaded"):
        trainer_of(way, tmp_path, protection(text), template, offloaded)


def test_an_optimizer_of_other_tensors_is_refused(text, tmp_path):
    trainer = trainer_of("LoRA", tmp_path, protection(text))
    other = torch.optim.SGD(tiny_model("llama").parameters(), lr=0.1)
    with pytest.raises(FNSFTError, match=r"does not step the tensor of .* that is protected"):
        trainer.protection.attach(other)
