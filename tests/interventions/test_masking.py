import copy
import io
import pickle
import warnings
from contextlib import ExitStack

import pytest
import torch
from architectures import ARCHITECTURES
from helpers import VOCABULARY, logits, random_mask, state, tiny_model, zeroed
from hypothesis import given, settings
from hypothesis import strategies as st
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
    select_neurons,
)
from fnsft_trl.constraints import trainable_neurons
from fnsft_trl.interventions import masks_of, masks_off
from fnsft_trl.neurons.sites import SITES
from fnsft_trl.neurons.taps import tapping


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
        assert handle.neurons.count == 40
    with lesion(model, NeuronMask({1: torch.ones(40, dtype=torch.bool)})):
        assert torch.equal(logits(model, ids), one_layer)


class Life:
    """A handle beside what is expected of it."""

    def __init__(self):
        self.model = tiny_model("llama")
        self.ids = torch.randint(3, VOCABULARY, (1, 4), generator=torch.Generator().manual_seed(1))
        self.mask = random_mask(self.model, "mlp_intermediate")
        self.plain = logits(self.model, self.ids)
        self.handle = lesion(self.model, self.mask)
        self.masked = logits(self.model, self.ids)
        self.on, self.registered = True, True
        self.blocks = []

    def enable(self):
        self.handle.enable()
        self.on = self.registered = True

    def disable(self):
        self.handle.disable()
        self.on = False

    def remove(self):
        self.handle.remove()
        self.on = self.registered = False

    def enter(self):
        block = ExitStack()
        assert block.enter_context(self.handle) is self.handle
        self.blocks.append(block)
        self.on = self.registered = True

    def leave(self):
        if self.blocks:
            self.blocks.pop().close()
            if not self.blocks:
                self.on = self.registered = False

    def off_for_a_while(self, inside=lambda: None):
        with masks_off(self.model):
            assert not self.handle.enabled
            assert torch.equal(logits(self.model, self.ids), self.plain)
            inside()

    def removed_while_off(self):
        self.off_for_a_while(self.handle.remove)
        self.on = self.registered = False

    def check(self):
        assert self.handle.enabled == self.on
        assert torch.equal(logits(self.model, self.ids), self.masked if self.on else self.plain)
        assert masks_of(self.model) == ([self.handle] if self.registered else [])
        assert self.registered == any(module._forward_pre_hooks for module in self.model.modules())


ACTIONS = ("enable", "disable", "remove", "enter", "leave", "off_for_a_while", "removed_while_off")


@settings(max_examples=60)
@given(st.lists(st.sampled_from(ACTIONS), max_size=7))
def test_a_handle_does_what_it_is_told_whatever_it_was_told_before(actions):
    life = Life()
    for action in actions:
        getattr(life, action)()
        life.check()


def test_a_removed_mask_is_put_on_the_model_as_it_is_then(ids):
    """Wrapped meanwhile, it covers the adapter; of another width, or gone, it is refused."""
    model = tiny_model("llama")
    mask = random_mask(model, "mlp_intermediate")
    handle = lesion(model, mask)
    handle.remove()
    wrapped = get_peft_model(model, LoraConfig(target_modules=["down_proj"], init_lora_weights=False)).eval()
    with handle:
        masked = logits(wrapped, ids)
    assert torch.allclose(logits(zeroed(wrapped.merge_and_unload(), mask), ids), masked, atol=1e-5)

    handle = lesion(model := tiny_model("llama"), mask)
    handle.remove()
    narrow = copy.deepcopy(model.config)
    narrow.intermediate_size = 39
    model.model.layers[2].mlp = type(model.model.layers[2].mlp)(narrow)
    with pytest.raises(FNSFTError, match="40 neurons in layer 2, the model 39"):
        handle.enable()
    assert not handle.enabled
    assert not any(module._forward_pre_hooks for module in model.modules())
    del model
    with pytest.raises(FNSFTError, match="make a new one"):
        handle.enable()


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def lora(model):
    names = {name for site in find_neuron_sites(model) for name in site.layout.modules()}
    return get_peft_model(model, LoraConfig(r=2, target_modules=sorted(names))).eval()


MIXTRAL = next(architecture for architecture in ARCHITECTURES if str(architecture) == "MixtralForCausalLM")
MODELS = {"llama": lambda: tiny_model("llama"), "mixtral": MIXTRAL.model, "lora": lambda: lora(tiny_model("llama"))}


@pytest.mark.parametrize("kind", SITES)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_torch_save],
                         ids=["deepcopy", "pickle", "torch.save"])  # fmt: skip
def test_a_copy_of_a_masked_model_has_masks_of_its_own(ids, kind, make, copied):
    model = make()
    masks = [random_mask(model, kind, share=0.3, seed=seed) for seed in (0, 1)]
    plain = logits(model, ids)
    handles = [lesion(model, masks[0]), lesion(model, masks[1])]
    handles[1].disable()
    first = logits(model, ids)
    other = copied(model)
    own = {handle.neurons: handle for handle in masks_of(other)}
    assert own.keys() == set(masks)
    assert not {*own.values()} & {*handles}
    assert [own[mask].enabled for mask in masks] == [True, False]
    assert torch.equal(logits(other, ids), first)

    for handle in handles:  # what happens to the model does not reach its copy
        handle.remove()
    assert torch.equal(logits(model, ids), plain)
    assert torch.equal(logits(other, ids), first)
    with masks_off(other):
        assert torch.equal(logits(other, ids), plain)
    own[masks[1]].enable()
    assert not torch.equal(logits(other, ids), first)
    assert torch.equal(logits(model, ids), plain)

    with own[masks[1]]:
        pass
    assert torch.equal(logits(other, ids), first)
    own[masks[0]].remove()
    assert torch.equal(logits(other, ids), plain)
    assert masks_of(other) == []
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in other.modules())
    with pytest.raises(FNSFTError, match="that of a copy never does"):
        own[masks[0]].enable()
    assert torch.equal(logits(other, ids), plain)


def test_copying_a_layer_copies_no_other_layer():
    masked = tiny_model("llama")
    lesion(masked, random_mask(masked, "mlp_intermediate"))
    size, of_masked = (len(pickle.dumps(model.model.layers[0])) for model in (tiny_model("llama"), masked))
    assert of_masked - size < size / 2


def test_an_adapter_that_is_put_around_a_masked_layer_is_refused_until_the_mask_is_put_on_again(family, ids):
    """The mask would reach what goes into the layer, and not what goes into the adapter."""
    for kind in SITES:
        model = tiny_model(family)
        mask = random_mask(model, kind)
        handle = lesion(model, mask)
        wrapped = lora(model)
        with pytest.raises(FNSFTError, match=r"an adapter was put around .* after a mask"):
            logits(wrapped, ids)
        with masks_off(wrapped):
            plain = logits(wrapped, ids)
        handle.remove()
        assert torch.equal(logits(wrapped, ids), plain)
        with handle:
            masked = logits(wrapped, ids)
        assert not torch.equal(masked, plain)
        assert torch.allclose(logits(zeroed(wrapped.merge_and_unload(), mask), ids), masked, atol=1e-5)


@pytest.mark.parametrize("kind", SITES)
def test_a_replica_of_a_wrapped_layer_is_none_that_was_put_around_it(kind, ids):
    """As DataParallel makes them, in every forward pass."""
    model = lora(tiny_model("llama"))
    mask = random_mask(model, kind)
    with lesion(model, mask):
        masked = logits(model, ids)
        for block in model.base_model.model.model.layers:
            block.mlp.down_proj = copy.copy(block.mlp.down_proj)
        assert torch.equal(logits(model, ids), masked)


@pytest.mark.parametrize("kind", SITES)
def test_a_layer_that_was_unwrapped_and_wrapped_anew_is_refused(kind, ids):
    model = lora(tiny_model("llama"))
    handle = lesion(model, random_mask(model, kind))
    again = lora(model.unload())
    with pytest.raises(FNSFTError, match="after a mask"):
        logits(again, ids)
    assert masks_of(again) == [handle]
    with masks_off(again):
        logits(again, ids)
    masks_of(again)[0].remove()
    logits(again, ids)


@pytest.mark.parametrize("kind", SITES)
def test_a_mask_that_went_with_a_merged_adapter_is_said_to_be_gone_and_comes_back(kind, ids):
    model = lora(tiny_model("llama"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    mask = random_mask(model, kind)
    handle = lesion(model, mask)
    merged = model.merge_and_unload()
    expected = logits(zeroed(merged, mask), ids)
    with pytest.warns(UserWarning, match="went with it when that was merged or unloaded: the model runs without it"):
        plain = logits(merged, ids)
    assert masks_of(merged) == [handle]
    handle.disable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(logits(merged, ids), plain)
        handle.enable()
        assert torch.allclose(logits(merged, ids), expected, atol=1e-5)
        handle.remove()
        assert torch.equal(logits(merged, ids), plain)


def test_a_mask_is_moved_once_to_where_its_model_is(templates):
    model = tiny_model("llama")
    lesion(model, select_neurons(templates["llama"], component_ids=[0]))
    silence = next(f for f in tapping(model) if f.members.any())
    values, places = torch.zeros(1, 2, len(silence.members), device="meta"), []
    for _ in range(2):
        silence(values, slice(None), None)
        places.append(silence.members)
    assert places[0].device == values.device
    assert places[0] is places[1]
