"""Each argument of a public function, given something else: an error that says so, and the model is as it was."""

import pytest
import torch
from datasets import Dataset
from helpers import random_mask, state, tiny_model

from fnsft_trl import (
    FNSFTError,
    FunctionalNetworkConfig,
    FunctionalNetworkTemplate,
    NeuronMask,
    amplify,
    bake_amplification,
    bake_lesion,
    constrain_full,
    constrain_lora,
    discover_networks,
    evaluate_model,
    find_neuron_sites,
    keep_neurons,
    lesion,
    preserve,
    select_neurons,
    unbake,
)
from fnsft_trl.training.budget import Budget


MODEL = tiny_model("llama")
MASK = random_mask(MODEL, "mlp_intermediate")
MEMBERS = MASK.layers[0]
TEXTS = ["Say ba:", "Say ko ri:"]
# What can be given by mistake: one of each kind.
THINGS = {
    "None": None,
    "a text": "0.5x",
    "a number": 10**20,
    "not a number": float("nan"),
    "true": True,
    "a list": [object()],
    "a dict": {"a": object()},
    "a tensor": torch.zeros(2, 2),
    "a layer": torch.nn.Linear(2, 2),
    "a mask": MASK,
    "a dataset": Dataset.from_list([{"a": 1}]),
}
# Function -> its arguments, each with the things that are no mistake there.
CALLS = {
    lesion: {"model": (), "mask": ("a mask",)},
    preserve: {"model": (), "mask": ("a mask",)},
    amplify: {"model": (), "mask": ("a mask",), "factor": ("a number", "true")},
    bake_lesion: {"model": (), "mask": ("a mask",)},
    bake_amplification: {"model": (), "mask": ("a mask",), "factor": ("a number", "true")},
    keep_neurons: {"model": (), "mask": ("a mask",)},
    unbake: {"model": (), "kept": ()},
    constrain_full: {"model": (), "trainable": ("a mask",)},
    constrain_lora: {"model": (), "trainable": ("a mask",)},
    find_neuron_sites: {"model": (), "kind": (), "layers": ("None",)},
    NeuronMask: {"layers": (), "site": ()},
    MASK.__or__: {"other": ("a mask",)},
    MASK.__and__: {"other": ("a mask",)},
    MASK.indices: {"layer": ("true",)},
    FunctionalNetworkTemplate.from_pretrained: {"pretrained_model_name_or_path": ()},
    discover_networks: {"model": (), "tokenizer": ("a layer",), "texts": ("a tensor",), "config": ("None",)},
    evaluate_model: {"model": (), "tokenizer": ("a layer",), "data": (), "config": ("None",)},
    Budget: {"nats": ("a number", "true"), "action": ()},
    select_neurons: {
        "template": (),
        "component_ids": ("None",),
        "selector": (),
        "fraction": ("None",),
        "rank": (),
        "seed": ("true",),
        "like": ("None", "a mask"),
        "min_reliability": ("true",),
        "layers": ("None",),
    },
}
GIVEN = {
    "mask": MASK,
    "trainable": MASK,
    "kept": None,
    "factor": 2.0,
    "layers": {0: MEMBERS},
    "kind": "mlp_intermediate",
    "layer": 0,
    "texts": TEXTS,
    "data": [],
    "nats": 0.1,
}
CASES = [
    (call, name, thing)
    for call, names in CALLS.items()
    for name, fine in names.items()
    for thing in THINGS
    if thing not in fine
]


@pytest.mark.slow
@pytest.mark.parametrize(("call", "name", "thing"), CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_it_is_refused(call, name, thing, templates, tokenizer):
    model, before = MODEL, state(MODEL)
    known = {**GIVEN, "model": model, "template": templates["llama"], "tokenizer": tokenizer}
    names = [other for other in CALLS[call] if other in known and (call is not find_neuron_sites or other != "layers")]
    given = {other: known[other] for other in names} | {name: THINGS[thing]}
    if call is select_neurons:
        given = {"template": templates["llama"], "selector": "random", "fraction": 0.5} | {name: THINGS[thing]}
        given |= {"selector": "networks"} if name == "component_ids" else {}
        given |= {"fraction": None} if name in ("like", "component_ids") else {}
    if call is constrain_full:
        given["train_other"] = True
    if call is discover_networks:
        given = {"config": FunctionalNetworkConfig()} | given
    with pytest.raises(FNSFTError) as error:
        call(*given.values()) if call in (MASK.__or__, MASK.__and__) else call(**given)
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in state(model).items())


@pytest.mark.parametrize("number", [-1, 3, 10**20, 0.0, "0", None, True, [0]])
def test_a_network_that_a_template_has_not_is_refused(number, templates):
    with pytest.raises(FNSFTError, match=r"the template has no network .*; it has the networks 0-2"):
        templates["llama"].members(number)
