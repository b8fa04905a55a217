"""What frozen slices hold: the values that a step finds, of one set of neurons at a time; and their momentum."""

import copy
import inspect
import itertools

import pytest
import torch
from accelerate import Accelerator
from architectures import ARCHITECTURES
from helpers import changed_entries, random_mask, state, tiny_model
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from fnsft_trl import FNSFTError, constrain_full, constrain_lora, find_neuron_sites
from fnsft_trl.constraints import FrozenSlices
from fnsft_trl.export import changed_neurons


MIXTRAL = next(architecture for architecture in ARCHITECTURES if str(architecture) == "MixtralForCausalLM")
MODELS = {"llama": lambda seed=0: tiny_model("llama", seed=seed), "gpt2": lambda seed=0: tiny_model("gpt2", seed=seed),
          "mixtral": MIXTRAL.model}  # fmt: skip
IDS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(3))


def decaying(model, lr=1e-2):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.5)


def step(model, optimizer):
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


# Ways in which weights come into a model.
LOADS = {
    "load_state_dict": lambda model, new: model.load_state_dict(new),
    "copy_": lambda model, new: [p.copy_(new[n]) for n, p in model.named_parameters()],
    "data.copy_": lambda model, new: [p.data.copy_(new[n]) for n, p in model.named_parameters()],
    "data": lambda model, new: [setattr(p, "data", new[n].clone()) for n, p in model.named_parameters()],
    "arithmetic": lambda model, new: [p.add_(new[n] - p) for n, p in model.named_parameters()],
}
TIMES = ("before attaching", "before training", "between steps", "twice")


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_weights_loaded_at_any_time_are_held_from_then_on(make, load, time):
    model, loaded = make(), state(make(seed=1))
    mask = random_mask(make(), "mlp_intermediate")
    held = constrain_full(model, mask, train_other=False)

    def bring_in(new):
        with torch.no_grad():
            LOADS[load](model, new)

    if time in ("before attaching", "twice"):
        bring_in(loaded)
    optimizer = decaying(model)
    held.attach(optimizer)
    if time == "before training":
        bring_in(loaded)
    if time in ("between steps", "twice"):
        step(model, optimizer)
        bring_in(loaded := state(make(seed=2)))
    start = state(model)
    for _ in range(2):
        step(model, optimizer)
    changed, others = changed_neurons(find_neuron_sites(make()), start, state(model))
    assert changed == mask
    assert others == []


def test_a_step_that_is_broken_off_moves_nothing_frozen():
    """An optimizer that fails between its parameters, as one without memory does, and training that goes on."""
    model = tiny_model("llama")
    before = state(model)
    mask = random_mask(model, "mlp_intermediate")
    held = constrain_full(model, mask, train_other=False)

    class Failing(torch.optim.SGD):
        fails = True

        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    with torch.no_grad():
                        parameter.add_(1e-2)
            if self.fails:
                raise MemoryError

    optimizer = Failing([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    held.attach(optimizer)
    with pytest.raises(MemoryError):
        optimizer.step()
    Failing.fails = False
    optimizer.step()
    changed, others = changed_neurons(find_neuron_sites(tiny_model("llama")), before, state(model))
    assert (changed, others) == (mask, [])


def test_a_parameter_that_is_replaced_is_noticed_before_the_step():
    model = tiny_model("llama")
    held = constrain_full(model, random_mask(model, "mlp_intermediate"), train_other=False)
    optimizer = decaying(model)
    held.attach(optimizer)
    model.load_state_dict(state(tiny_model("llama", seed=1)), assign=True)
    before = state(model)
    with pytest.raises(FNSFTError, match=r"'weight' of a Linear was replaced \(by sharding, or by load_state_dict"):
        optimizer.step()
    assert changed_entries(before, state(model)) == {}


def test_the_optimizer_of_accelerate_is_held_too():
    model = tiny_model("llama")
    before = state(model)
    mask = random_mask(model, "mlp_intermediate")
    held = constrain_full(model, mask, train_other=False)
    optimizer = Accelerator(cpu=True).prepare(decaying(model))
    held.attach(optimizer)
    for _ in range(2):
        step(model, optimizer)
    changed, others = changed_neurons(find_neuron_sites(tiny_model("llama")), before, state(model))
    assert (changed, others) == (mask, [])
    held.clear_momentum(optimizer)


def with_lora(model, **options):
    return get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj", "gate_proj", "down_proj"], **options))


@pytest.mark.parametrize("harmful", [False, True])
@pytest.mark.parametrize("time", ["before training", "between steps"])
def test_lora_loaded_later_is_held_or_refused(time, harmful):
    """A checkpoint of a held run goes on; one that changes frozen neurons is refused, and not taken or undone."""
    mask = random_mask(tiny_model("llama"), "mlp_intermediate")
    trained = with_lora(tiny_model("llama"))
    if not harmful:
        constrain_lora(trained, mask)
    optimizer = decaying(trained)
    for _ in range(2):
        step(trained, optimizer)
    weights = get_peft_model_state_dict(trained)

    model = with_lora(tiny_model("llama"))
    held = constrain_lora(model, mask)
    optimizer = decaying(model)
    held.attach(optimizer)
    if time == "between steps":
        step(model, optimizer)
    set_peft_model_state_dict(model, weights)
    if harmful:
        with pytest.raises(FNSFTError, match="change frozen neurons were loaded after constrain_lora"):
            step(model, optimizer)
        return
    for _ in range(2):
        step(model, optimizer)
    merged = model.merge_and_unload()
    changed, others = changed_neurons(find_neuron_sites(merged), state(tiny_model("llama")), state(merged))
    assert (changed, others) == (mask, [])


def hooks(model):
    """How many hooks there are on modules, and on parameters."""
    return (
        sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()),
        sum(len(parameter._post_accumulate_grad_hooks or ()) for parameter in model.parameters()),
    )


def dora(model):
    return get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj", "gate_proj"], use_dora=True))


def bare(model):
    names = [part.full_name for site in find_neuron_sites(model) for part in site.layout.slices]
    return get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=names))


def plain(model):
    return model


def full(model, mask):
    return constrain_full(model, mask, train_other=False)


HOLDS = {
    "full": (MODELS["llama"], plain, full),
    "full, experts": (MODELS["mixtral"], plain, full),
    "lora": (MODELS["llama"], with_lora, constrain_lora),
    "dora": (MODELS["llama"], dora, constrain_lora),
    "lora, experts": (MODELS["mixtral"], bare, constrain_lora),
}


@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize(("make", "wrapped", "hold"), HOLDS.values(), ids=HOLDS)
def test_holding_again_takes_the_place_of_the_first(make, wrapped, hold, times):
    """As many hooks as once, and the neurons of the last mask train, whatever was attached before."""
    model, once = wrapped(make()), wrapped(make())
    masks = [random_mask(make(), "mlp_intermediate", 0.4, seed=seed) for seed in range(times)]
    before = state(make())
    held = [hold(model, mask) for mask in masks]
    hold(once, masks[-1])
    assert hooks(model) == hooks(once)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in once.parameters()]
    optimizer = decaying(model)
    for each in held:
        each.attach(optimizer)
    for _ in range(3):
        step(model, optimizer)
    after = state(model if wrapped is plain else model.merge_and_unload())
    changed, others = changed_neurons(find_neuron_sites(make()), before, after)
    assert (changed, others) == (masks[-1], [])


@pytest.mark.parametrize(("make", "wrapped", "hold"), HOLDS.values(), ids=HOLDS)
def test_a_release_takes_all_hooks_away(make, wrapped, hold):
    model = wrapped(make())
    before = hooks(model)
    held = hold(model, random_mask(make(), "mlp_intermediate"))
    assert hooks(model) != before
    held.release()
    assert hooks(model) == before


def test_a_copy_of_held_lora_can_be_held_to_other_neurons():
    masks = [random_mask(tiny_model("llama"), "mlp_intermediate", 0.4, seed=seed) for seed in (0, 1)]
    model = with_lora(tiny_model("llama"))
    constrain_lora(model, masks[0])
    copied = copy.deepcopy(model)
    before = hooks(model)
    held = constrain_lora(copied, masks[1])
    assert hooks(model) == hooks(copied) == before
    for each, mask in ((model, masks[0]), (copied, masks[1])):
        optimizer = decaying(each)
        held.attach(optimizer)
        for _ in range(3):
            step(each, optimizer)
        merged = each.merge_and_unload()
        changed, _ = changed_neurons(find_neuron_sites(merged), state(tiny_model("llama")), state(merged))
        assert changed == mask


# Every optimizer of torch, with each of its switches that brings more state, without what decays weights.
SWITCHES = {"amsgrad": (False, True), "centered": (False, True), "momentum": (0, 0.9), "nesterov": (False, True),
            "maximize": (False,)}  # fmt: skip
UNSUITED = {"Optimizer", "SparseAdam", "LBFGS"}  # no optimizer, for sparse gradients only, and refused below


def torch_optimizers():
    for name, kind in vars(torch.optim).items():
        if not inspect.isclass(kind) or not issubclass(kind, torch.optim.Optimizer) or name in UNSUITED:
            continue
        parameters = inspect.signature(kind).parameters
        names = [switch for switch in SWITCHES if switch in parameters]
        for values in itertools.product(*(SWITCHES[switch] for switch in names)):
            options = dict(zip(names, values, strict=True))
            if name == "Muon":
                options = {"momentum": 0.9}
            if options.get("nesterov") and not options.get("momentum"):
                continue
            options |= {still: 0.0 for still in ("weight_decay", "lambd") if still in parameters}
            yield pytest.param(kind, options, id=f"{name} {options}")


@pytest.mark.parametrize(("kind", "options"), torch_optimizers())
def test_without_gradients_what_is_frozen_stands_still_once_its_momentum_is_cleared(kind, options):
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(6, 5))
    optimizer = kind([parameter], lr=1e-2, **options)
    for _ in range(3):
        parameter.grad = torch.randn(6, 5) + 1
        optimizer.step()
    frozen = FrozenSlices()
    frozen.freeze(parameter, (0,), torch.tensor([1, 4]))
    squares = {name: value.clone() for name, value in optimizer.state[parameter].items() if torch.is_tensor(value)}
    frozen.clear_momentum(optimizer)
    before = parameter.detach().clone()
    for _ in range(2):
        parameter.grad = torch.zeros(6, 5)
        optimizer.step()  # without anything that puts values back
    assert torch.equal(parameter[[1, 4]], before[[1, 4]])
    has_momentum = squares.keys() & {"exp_avg", "momentum_buffer"}
    assert torch.equal(parameter, before) != bool(has_momentum)


class Custom(torch.optim.Optimizer):
    """An optimizer with a state of some name and size."""

    def __init__(self, parameters, name, shape):
        super().__init__(parameters, {"lr": 1.0})
        self.name, self.shape = name, shape

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter][self.name] = torch.ones(self.shape)


@pytest.mark.parametrize("name", ["velocity", "m", "exp_avg_slow", "master_weights", "momentum_buffers"])
@pytest.mark.parametrize("shape", [(6, 5), (2, 6, 5), (30,)])
def test_state_of_an_unknown_name_is_refused_and_nothing_is_cleared(name, shape):
    known, unknown = (nn.Parameter(torch.zeros(6, 5)) for _ in range(2))
    optimizer = Custom([unknown], name, shape)
    optimizer.step()
    optimizer.state[unknown]["exp_avg"] = torch.ones(6, 5)
    optimizer.state[known]["exp_avg"] = torch.ones(6, 5)
    frozen = FrozenSlices()
    frozen.freeze(known, (0,), torch.tensor([1]))
    frozen.freeze(unknown, (0,), torch.tensor([1]))
    with pytest.raises(FNSFTError, match=f"Custom keeps '{name}'.*it is not known how to clear the momentum"):
        frozen.clear_momentum(optimizer)
    assert all(value.all() for values in optimizer.state.values() for value in values.values())


@pytest.mark.parametrize("shape", [(3, 5), (6, 2), (5, 6)])
def test_momentum_of_another_shape_is_refused(shape):
    """Of GaLore's kind: projected, so that it has no entries of single neurons."""
    parameter = nn.Parameter(torch.zeros(6, 5))
    optimizer = Custom([parameter], "exp_avg", shape)
    optimizer.step()
    frozen = FrozenSlices()
    frozen.freeze(parameter, (0,), torch.tensor([1]))
    with pytest.raises(FNSFTError, match="it is not known how to clear the momentum of single neurons"):
        frozen.clear_momentum(optimizer)


def test_lbfgs_is_refused():
    parameter = nn.Parameter(torch.zeros(6, 5))
    optimizer = torch.optim.LBFGS([parameter])

    def closure():
        parameter.grad = parameter.detach() - 1
        return (parameter - 1).square().sum()

    optimizer.step(closure)
    frozen = FrozenSlices()
    frozen.freeze(parameter, (0,), torch.tensor([1]))
    with pytest.raises(FNSFTError, match="LBFGS keeps"):
        frozen.clear_momentum(optimizer)
