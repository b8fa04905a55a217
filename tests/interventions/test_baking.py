import copy

import pytest
import torch
from datasets import Dataset
from helpers import VOCABULARY, changed_entries, logits, random_mask, sft_config, state, tiny_model, zeroed
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from fnsft_trl import (
    FNSFTError,
    FNSFTTrainer,
    FunctionalNetworkConfig,
    NeuronMask,
    bake_lesion,
    find_neuron_sites,
    keep_neurons,
    lesion,
    select_neurons,
    unbake,
)
from fnsft_trl.interventions.baking import lesion_note


IDS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("site", ["mlp_intermediate", "mlp_output"])
def test_a_baked_lesion_is_the_lesion_and_comes_out_bit_for_bit(family, site, tmp_path):
    model = tiny_model(family)
    before = state(model)
    mask = random_mask(model, site)
    with lesion(model, mask):
        lesioned = logits(model, IDS)
    kept = bake_lesion(model, mask)
    assert changed_entries(state(zeroed(tiny_model(family), mask)), state(model)) == {}
    torch.testing.assert_close(logits(model, IDS), lesioned, rtol=0, atol=1e-5)

    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(reloaded, IDS), logits(model, IDS))
    assert reloaded.config.baked_lesion == {"site": site, "neurons": mask.to_ranges()}
    assert f"{mask.count} neurons" in lesion_note(reloaded)

    unbake(model, kept)
    assert changed_entries(before, state(model)) == {}
    assert "baked_lesion" not in model.config.to_dict()
    assert lesion_note(model) is None


def test_lesions_add_up_and_come_out_in_turn():
    model = tiny_model("llama")
    before = state(model)
    masks = [random_mask(model, "mlp_intermediate", seed=seed) for seed in (0, 1)]
    first = bake_lesion(model, masks[0])
    once = state(model)
    second = bake_lesion(model, masks[1])
    assert model.config.baked_lesion["neurons"] == (masks[0] | masks[1]).to_ranges()
    unbake(model, second)
    assert changed_entries(once, state(model)) == {}
    assert model.config.baked_lesion["neurons"] == masks[0].to_ranges()
    unbake(model, first)
    assert changed_entries(before, state(model)) == {}


def test_what_cannot_be_baked_is_refused_and_left_as_it_was():
    model = tiny_model("llama")
    mask = random_mask(model, "mlp_intermediate")
    for other in (random_mask(tiny_model("llama"), "mlp_output"), NeuronMask({7: torch.ones(40, dtype=torch.bool)})):
        wrong = NeuronMask(other.layers)  # widths or layers that the site does not have
        with pytest.raises(FNSFTError, match="made for another model"):
            bake_lesion(model, wrong)
    wrapped = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["down_proj"]))
    with pytest.raises(FNSFTError, match="carries an adapter; merge it"):
        bake_lesion(wrapped, mask)
    bnb = pytest.importorskip("bitsandbytes")
    quantised = tiny_model("llama")
    quantised.model.layers[1].mlp.down_proj = bnb.nn.Linear4bit(40, 16, quant_type="nf4").to("cpu")
    with pytest.raises(FNSFTError, match=r"layers\.1\.mlp\.down_proj is quantised"):
        bake_lesion(quantised, mask)
    bake_lesion(model, mask)
    baked = state(model)
    with pytest.raises(FNSFTError, match="carries a lesion at mlp_intermediate"):
        bake_lesion(model, random_mask(model, "mlp_output"))
    assert changed_entries(baked, state(model)) == {}


def make(directory, rows, tokenizer, template, method, **config):
    return FNSFTTrainer(
        model=tiny_model("llama"),
        args=sft_config(directory),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2) if method == "lora" else None,
        network_config=FunctionalNetworkConfig(train_method=method, **config),
        network_template=template,
    )


@pytest.mark.slow
@pytest.mark.parametrize("apply_to", ["auto", "base", "both", "lora"])
@pytest.mark.parametrize("method", ["neuron_delta", "lora", "full"])
def test_training_is_kept_or_discarded_whatever_is_held(templates, rows, tokenizer, tmp_path, method, apply_to):
    """Bake keeps what was trained, and frozen neurons as they were; unbake brings the whole model back."""
    allowed = {"auto", "both", "lora" if method == "lora" else "base"}
    if apply_to not in allowed:
        with pytest.raises(FNSFTError, match=f"anti_drift_apply_to={apply_to}"):
            make(tmp_path, rows, tokenizer, templates["llama"], method, anti_drift_apply_to=apply_to)
        return
    before = state(tiny_model("llama"))
    trainer = make(
        tmp_path, rows, tokenizer, templates["llama"], method, mask_mode="preserve", anti_drift_apply_to=apply_to
    )
    model, trained = trainer.model, trainer.trainable_neurons
    assert trained == trainer.neuron_mask
    kept = keep_neurons(model, trained) if method == "full" else None
    trainer.train()
    if method == "full":
        baked = state(model)
        unbake(model, kept)
    else:
        baked = state(copy.deepcopy(model).merge_and_unload())
        model = model.unload()
    assert changed_entries(before, state(model)) == {}
    changed = changed_entries(before, baked)
    assert changed
    for site in find_neuron_sites(tiny_model("llama")):
        for part in site.layout.slices:
            entries = changed.pop(f"{part.module_name}.{part.parameter}", None)
            if entries is not None:
                assert not entries.index_select(part.dim, (~trained).indices(site.layer)).any()
    assert not changed


def test_the_model_card_names_a_baked_lesion(templates, rows, tokenizer, tmp_path):
    trainer = make(tmp_path, rows, tokenizer, templates["llama"], "full", mask_mode="lesion")
    trainer.train()
    bake_lesion(trainer.model, trainer.neuron_mask)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert f"the outgoing weights of {trainer.neuron_mask.count} neurons" in card
    assert "The mask is not part of these weights" not in card


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_lesion_is_taken_out_of_a_model_that_was_moved(templates, dtype):
    model = tiny_model("llama")
    expected = state(tiny_model("llama").to(dtype))
    kept = bake_lesion(model, select_neurons(templates["llama"], component_ids=[0]))
    unbake(model.to(dtype), kept)
    assert all(torch.equal(value, expected[name]) for name, value in state(model).items())
