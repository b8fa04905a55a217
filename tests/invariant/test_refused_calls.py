"""A call that is refused leaves the model as it was, wherever in it the reason lies."""

import copy

import pytest
import torch
import torch.distributed as dist
from architectures import ARCHITECTURES
from datasets import Dataset
from helpers import changed_entries, random_mask, sft_config, state, tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard

from fnsft_trl import (
    FNSFTError,
    FNSFTTrainer,
    FunctionalNetworkConfig,
    MaskPhase,
    MaskScheduleCallback,
    NeuronMask,
    bake_lesion,
    constrain_full,
    constrain_lora,
    find_neuron_sites,
    keep_neurons,
    lesion,
    preserve,
    unbake,
)
from fnsft_trl.constraints import FrozenSlices, freeze_neurons


LAYERS = (0, 1, 2)
TARGETS = ["up_proj", "gate_proj", "down_proj"]
MIXTRAL = next(architecture for architecture in ARCHITECTURES if str(architecture) == "MixtralForCausalLM")


def snapshot(model):
    """All that a call could leave behind in a model."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    modules = dict(model.named_modules(remove_duplicate=False))
    return {
        "values": {
            name: value.detach().clone() for name, value in (parameters | buffers).items() if not value.is_meta
        },
        "tensors": {name: id(value) for name, value in (parameters | buffers).items()},
        "trains": {name: value.requires_grad for name, value in parameters.items()},
        "hooks of parameters": {name: [*(p._post_accumulate_grad_hooks or ())] for name, p in parameters.items()},
        "hooks": {name: [*m._forward_hooks.items(), *m._forward_pre_hooks.items()] for name, m in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "config": copy.deepcopy(vars(model.config)),
        "adapters": copy.deepcopy(getattr(model, "peft_config", None)),
    }


def assert_as_it_was(model, before):
    after = snapshot(model)
    assert after.keys() == before.keys()
    for what, found in after.items():
        if what != "values":
            assert found == before[what], what
    assert after["values"].keys() == before["values"].keys()
    for name, value in before["values"].items():
        assert torch.equal(whole(value), whole(after["values"][name])), name


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor


# Reasons to refuse: what is made of the model, given the layer in which the reason lies, and of the mask.


def as_it_is(model, layer):
    return model


def quantised(model, layer):
    """Integers in the place of weights, as bitsandbytes has them."""
    down = model.model.layers[layer].mlp.down_proj
    down.weight = nn.Parameter(torch.zeros(320, 1, dtype=torch.uint8), requires_grad=False)
    return model


def offloaded(model, layer):
    down = model.model.layers[layer].mlp.down_proj
    down.weight = nn.Parameter(down.weight.to("meta"))
    return model


def adapted(model, layer):
    return get_peft_model(model, LoraConfig(r=2, target_modules=rf".*layers\.{layer}\.mlp\.down_proj"))


def trained_lora(model, layer):
    """LoRA that changes neurons of one layer."""
    model = get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS))
    nn.init.ones_(model.base_model.model.model.layers[layer].mlp.down_proj.lora_B["default"].weight)
    return model


def trained_magnitudes(model, layer):
    model = get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS[:2], use_dora=True))
    mlp = model.base_model.model.model.layers[layer].mlp
    with torch.no_grad():
        mlp.up_proj.lora_magnitude_vector["default"].weight.add_(1)
    return model


def bare_and_quantised(model, layer):
    """LoRA on modules, and in one layer on a bare parameter in whose factors neurons have no entries of their own."""
    others = "|".join(str(other) for other in LAYERS if other != layer)
    config = LoraConfig(
        r=2,
        target_modules=rf".*layers\.({others})\.mlp\.down_proj",
        target_parameters=[f"layers.{layer}.mlp.down_proj.weight"],
    )
    model = get_peft_model(model, config)
    down = model.base_model.model.model.layers[layer].mlp.down_proj.get_base_layer()
    down.weight = nn.Parameter(torch.zeros(320, 1, dtype=torch.uint8), requires_grad=False)
    return model


def lora(model, layer):
    return get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS))


def of_its_neurons(model, layer):
    return random_mask(model, "mlp_intermediate")


def too_narrow(model, layer):
    mask = of_its_neurons(model, layer)
    return NeuronMask(mask.layers | {layer: mask.layers[layer][:-1]})


def of_more_layers(model, layer):
    mask = of_its_neurons(model, layer)
    return NeuronMask(mask.layers | {3 + layer: mask.layers[layer]})


def elsewhere(model, layer):
    """No trainable neuron where the adapter is."""
    mask = of_its_neurons(model, layer)
    return NeuronMask({number: members & (number != layer) for number, members in mask.layers.items()})


def damaged_lesion(model, layer):
    """The config names a neuron that the model has not."""
    model.config.baked_lesion = {"site": "mlp_intermediate", "neurons": {str(layer): "38-40"}}
    return model


def other_lesion(model, layer):
    bake_lesion(model, random_mask(model, "mlp_output"))
    return model


MASK_CALLS = {
    "lesion": lesion,
    "preserve": preserve,
    "bake_lesion": bake_lesion,
    "keep_neurons": keep_neurons,
    "constrain_full": lambda model, mask: constrain_full(model, mask, train_other=True),
    "freeze_neurons": lambda model, mask: freeze_neurons(FrozenSlices(), model, mask),
    "constrain_lora": constrain_lora,
}
WRITERS = ("bake_lesion", "keep_neurons", "constrain_full", "freeze_neurons")
# (calls, what the model is, the mask, what the error says)
REFUSALS = [
    (("lesion", "preserve", "constrain_lora"), lora, too_narrow, "made for another model"),
    (("lesion", "preserve", "constrain_lora"), lora, of_more_layers, "made for another model"),
    (("lesion", "preserve", *WRITERS), as_it_is, too_narrow, "made for another model"),
    (("lesion", "preserve", *WRITERS), as_it_is, of_more_layers, "made for another model"),
    (WRITERS, quantised, of_its_neurons, "is quantised"),
    (WRITERS, offloaded, of_its_neurons, "is offloaded"),
    (("bake_lesion", "keep_neurons", "constrain_full"), adapted, of_its_neurons, "carries an adapter"),
    (("bake_lesion",), damaged_lesion, of_its_neurons, "neuron"),
    (("bake_lesion",), other_lesion, of_its_neurons, "carries a lesion at mlp_output"),
    (("constrain_lora",), as_it_is, of_its_neurons, "no LoRA adapter 'default'"),
    (("constrain_lora",), trained_lora, of_its_neurons, "already changes neurons"),
    (("constrain_lora",), trained_magnitudes, of_its_neurons, "already changes neurons"),
    (("constrain_lora",), bare_and_quantised, of_its_neurons, "cannot be held to a set of neurons"),
    (("constrain_lora",), adapted, elsewhere, "no trainable neuron lies in a layer"),
]  # fmt: skip
CASES = [
    pytest.param(call, model, mask, message, layer, id=f"{call}-{model.__name__}-{mask.__name__}-{layer}")
    for calls, model, mask, message in REFUSALS
    for call in calls
    for layer in LAYERS
]


@pytest.mark.parametrize(("call", "of_model", "of_mask", "message", "layer"), CASES)
def test_the_model_is_as_it_was(call, of_model, of_mask, message, layer):
    model = of_model(tiny_model("llama"), layer)
    plain = tiny_model("llama")
    mask = of_mask(plain, layer)
    before = snapshot(model)
    with pytest.raises(FNSFTError, match=message):
        MASK_CALLS[call](model, mask)
    assert_as_it_was(model, before)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("keep", [bake_lesion, keep_neurons])
def test_weights_that_do_not_fit_are_not_put_back(keep, layer):
    kept = keep(tiny_model("llama"), random_mask(tiny_model("llama"), "mlp_intermediate"))
    narrow = copy.deepcopy(tiny_model("llama").config)
    narrow.intermediate_size = 20
    others = [tiny_model("opt"), tiny_model("llama"), adapted(tiny_model("llama"), layer)]
    others[1].model.layers[layer].mlp = type(others[1].model.layers[layer].mlp)(narrow)
    for model in others:
        before = snapshot(model)
        with pytest.raises(FNSFTError, match="are of another model"):
            unbake(model, kept)
        assert_as_it_was(model, before)


def test_a_lesion_that_is_not_the_last_is_not_taken_out():
    model = tiny_model("llama")
    first = state(model)
    kept = [keep_neurons(model, random_mask(model, "mlp_intermediate", seed=0))]
    kept += [bake_lesion(model, random_mask(model, "mlp_intermediate", seed=seed)) for seed in (1, 2)]
    before = snapshot(model)
    for earlier in kept[:2]:
        with pytest.raises(FNSFTError, match="take the last one out first"):
            unbake(model, earlier)
        assert_as_it_was(model, before)
    for last in reversed(kept):
        unbake(model, last)
    with pytest.raises(FNSFTError, match="take the last one out first"):
        unbake(model, kept[1])
    assert changed_entries(first, state(model)) == {}


@pytest.fixture
def group():
    """This process, alone in a group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("call", ["constrain_full", "freeze_neurons", "constrain_lora"])
@pytest.mark.parametrize("layer", [0, 1])
def test_experts_that_are_sharded_in_one_layer_are_refused_whole(group, call, layer):
    model = MIXTRAL.model()
    mask = random_mask(model, "mlp_intermediate")
    if call == "constrain_lora":
        names = [part.full_name for site in find_neuron_sites(model) for part in site.layout.slices]
        model = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=names))
    blocks = model.get_submodule("base_model.model.model.layers" if call == "constrain_lora" else "model.layers")
    fully_shard(blocks[layer], mesh=group)
    before = snapshot(model)
    with pytest.raises(FNSFTError, match="sharded"):
        MASK_CALLS[call](model, mask)
    assert_as_it_was(model, before)


@pytest.mark.parametrize("first", ["constrain_full", "constrain_lora"])
def test_what_was_held_before_a_refusal_is_held_after_it(first):
    model = (lora if first == "constrain_lora" else as_it_is)(tiny_model("llama"), 0)
    mask = random_mask(tiny_model("llama"), "mlp_intermediate")
    held = MASK_CALLS[first](model, mask)
    before, slices = snapshot(model), [*held.slices]
    assert slices
    with pytest.raises(FNSFTError, match="made for another model"):
        MASK_CALLS[first](model, too_narrow(tiny_model("llama"), 2))
    assert_as_it_was(model, before)
    assert held.slices == slices


BAD_PHASES = {
    "of another width": lambda run: MaskPhase(3, "lesion", too_narrow(tiny_model("llama"), 1)),
    "of more layers": lambda run: MaskPhase(3, "preserve", of_more_layers(tiny_model("llama"), 1)),
    "of another site": lambda run: MaskPhase(3, "lesion", random_mask(tiny_model("llama"), "mlp_output")),
    "nothing trains": lambda run: MaskPhase(3, trainable=run & ~run),
    "trains what is frozen": lambda run: MaskPhase(3, trainable=~run),
    "unknown mode": lambda run: MaskPhase(3, "erase"),
}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("bad", BAD_PHASES)
def test_a_schedule_with_a_bad_phase_leaves_the_trainer_as_it_was(templates, rows, tokenizer, tmp_path, bad, place):
    trainer = FNSFTTrainer(
        model=tiny_model("llama"),
        args=sft_config(tmp_path),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        network_config=FunctionalNetworkConfig(train_method="full"),
        network_template=templates["llama"],
    )
    good = random_mask(tiny_model("llama"), "mlp_intermediate", 0.1)
    phases = [MaskPhase(1, "lesion", good), MaskPhase(2, trainable=trainer.trainable_neurons)]
    phases.insert(place, BAD_PHASES[bad](trainer.trainable_neurons))
    before = snapshot(trainer.model)
    with pytest.raises(FNSFTError):
        MaskScheduleCallback(trainer, phases)
    assert_as_it_was(trainer.model, before)
