import pytest
import torch
from helpers import VOCABULARY, logits, random_mask, state, tiny_model, zeroed
from peft import LoraConfig, get_peft_model

from fnsft_trl import (
    FNSFTError,
    NeuronMask,
    bake_lesion,
    constrain_full,
    constrain_lora,
    find_neuron_sites,
    keep_neurons,
    lesion,
    preserve,
)
from fnsft_trl.constraints import trainable_neurons
from fnsft_trl.interventions.masking import masks_off


@pytest.fixture
def ids():
    return torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


def test_handle_switches_without_touching_the_hooks(ids):
    model = tiny_model("llama")
    plain = logits(model, ids)
    handle = lesion(model, random_mask(model, "mlp_intermediate"))
    masked = logits(model, ids)
    handle.disable()
    assert torch.equal(logits(model, ids), plain)
    handle.enable()
    assert torch.equal(logits(model, ids), masked)
    handle.remove()
    assert torch.equal(logits(model, ids), plain)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_lesion_covers_the_adapter_too(ids):
    model = tiny_model("llama")
    targets = {name for site in find_neuron_sites(model) for name in site.layout.modules()}
    wrapped = get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False)).eval()
    mask = random_mask(wrapped, "mlp_intermediate")
    with lesion(wrapped, mask):
        masked = logits(wrapped, ids)
    merged = wrapped.merge_and_unload()
    assert torch.allclose(logits(zeroed(merged, mask), ids), masked, atol=1e-5)


def test_lesioned_neurons_get_no_gradient():
    model = tiny_model("llama").train()
    mask = random_mask(model, "mlp_intermediate")
    with lesion(model, mask):
        batch = torch.randint(3, VOCABULARY, (2, 9))
        model(batch, labels=batch).loss.backward()
    for site in find_neuron_sites(model):
        for part in site.layout.slices:
            gradient = getattr(model.get_submodule(part.module_name), part.parameter).grad
            gone = part.indices(mask.indices(site.layer))
            kept = part.indices((~mask).indices(site.layer))
            assert not gradient.index_select(part.dim, gone).any()
            assert gradient.index_select(part.dim, kept).any()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    batch = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model("llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with lesion(model, random_mask(model, "mlp_intermediate")):
            model(batch, labels=batch).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_generation_runs_masked():
    model = tiny_model("llama")
    prompt = torch.tensor([[5, 6, 7]])
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = random_mask(model, "mlp_intermediate", share=0.7)
    expected = zeroed(model, mask).generate(prompt, **settings)
    with lesion(model, mask):
        assert torch.equal(model.generate(prompt, **settings), expected)
    assert not torch.equal(model.generate(prompt, **settings), expected)


def of_another_model(model, last):
    """A mask that fits in every layer but one; `last` is what it has there."""
    layers = {site.layer: torch.ones(site.width, dtype=torch.bool) for site in find_neuron_sites(model)}
    return NeuronMask(layers | last)


@pytest.mark.parametrize(
    ("last", "match"),
    [
        ({2: torch.ones(39, dtype=torch.bool)}, "39 neurons in layer 2, the model 40"),
        ({5: torch.ones(40, dtype=torch.bool)}, "no such layer"),
    ],
)
@pytest.mark.parametrize(
    "call",
    [
        lesion,
        preserve,
        bake_lesion,
        keep_neurons,
        lambda model, mask: constrain_full(model, mask, train_other=False),
        lambda model, mask: trainable_neurons(model, mask, "selected"),
        lambda model, mask: constrain_lora(get_peft_model(model, LoraConfig(target_modules=["up_proj"])), mask),
    ],
    ids=["lesion", "preserve", "bake", "keep", "constrain_full", "trainable", "constrain_lora"],
)
def test_a_mask_of_another_model_is_refused_before_anything_is_done(ids, call, last, match):
    model = tiny_model("llama")
    before, plain = state(model), logits(model, ids)
    required = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(FNSFTError, match=match):
        call(model, of_another_model(model, last))
    assert torch.equal(logits(model, ids), plain)
    if "lora" not in " ".join(model.state_dict()):  # PEFT has changed these before the refusal
        assert before.keys() == model.state_dict().keys()
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert required == [parameter.requires_grad for parameter in model.parameters()]


def test_masks_off_restores_each_mask_as_it_was(ids):
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    plain, other_plain = logits(model, ids), logits(other, ids)
    first = lesion(model, random_mask(model, "mlp_intermediate"))
    second = lesion(model, random_mask(model, "mlp_intermediate", seed=1))
    elsewhere = lesion(other, random_mask(other, "mlp_intermediate"))
    second.disable()
    with masks_off(model):
        assert torch.equal(logits(model, ids), plain)
        assert not torch.equal(logits(other, ids), other_plain)
    assert (first.enabled, second.enabled, elsewhere.enabled) == (True, False, True)


def test_layers_that_the_mask_does_not_cover_are_untouched(ids):
    model = tiny_model("llama")
    with preserve(model, NeuronMask({1: torch.zeros(40, dtype=torch.bool)})) as handle:
        one_layer = logits(model, ids)
        assert handle.silenced.count == 40
    with lesion(model, NeuronMask({1: torch.ones(40, dtype=torch.bool)})):
        assert torch.equal(logits(model, ids), one_layer)
