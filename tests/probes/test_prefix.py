"""A pass from the middle is the whole pass, on every architecture; and the model is as it was afterwards."""

import pytest
import torch
from architectures import ARCHITECTURES
from helpers import VOCABULARY, logits, random_mask, tiny_model

from fnsft_trl import NeuronMask, lesion
from fnsft_trl.evaluation.metrics import model_inputs
from fnsft_trl.interventions import Zero
from fnsft_trl.neurons.sites import find_neuron_sites
from fnsft_trl.probes.prefix import SharedPrefix
from fnsft_trl.probes.switch import Switch


ROWS = [[5, 9, 30, 44, 7, 18], [8, 60, 33]]
CAUSAL = [a for a in ARCHITECTURES if "ForCausalLM" in a.name or "LMHead" in a.name]


@pytest.mark.parametrize("architecture", CAUSAL, ids=str)
def test_a_pass_from_the_middle_is_the_whole_pass(architecture):
    model = architecture.model()
    inputs = model_inputs(ROWS, torch.device("cpu"))
    sites = find_neuron_sites(model)
    last = sites[-1]
    mask = NeuronMask({last.layer: torch.arange(last.width) < last.width // 2})
    with torch.no_grad():
        plain = model(**inputs).logits
        with lesion(model, mask):
            expected = model(**inputs).logits
        forwards = [vars(block).get("forward") for block in SharedPrefix(model)._blocks]
        with Switch(model, "mlp_intermediate") as switch, SharedPrefix(model) as shared:
            assert torch.equal(shared.whole(inputs), plain)
            switch.set(switch.prepared(mask, Zero()))
            assert torch.equal(shared.run_from(last.layer, inputs), expected)
            assert torch.equal(shared.run_from(0, inputs), expected)
            switch.set(None)
            assert torch.equal(shared.run_from(shared.layers - 1, inputs), plain)
        assert [vars(block).get("forward") for block in SharedPrefix(model)._blocks] == forwards
        assert torch.equal(model(**inputs).logits, plain)
    assert not torch.equal(plain, expected)


def test_blocks_before_the_first_layer_do_not_compute():
    model = tiny_model("llama")
    called = []
    for number, block in enumerate(model.model.layers):
        block.mlp.register_forward_pre_hook(lambda module, args, number=number: called.append(number))
    inputs = model_inputs(ROWS, torch.device("cpu"))
    with torch.no_grad(), SharedPrefix(model) as shared:
        shared.whole(inputs)
        del called[:]
        shared.run_from(2, inputs)
    assert called == [2]


@pytest.mark.parametrize("site", ["mlp_intermediate", "mlp_output"])
def test_a_switch_does_what_a_lesion_does(site):
    model = tiny_model("gpt2")
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    masks = [random_mask(model, site, seed=seed) for seed in (0, 1)]
    plain = logits(model, ids)
    expected = []
    for mask in masks:
        with lesion(model, mask):
            expected.append(logits(model, ids))
    with Switch(model, site, at_answers=True) as switch:
        changes = [switch.prepared(mask, Zero()) for mask in masks]
        for change, wanted in zip(changes, expected, strict=True):
            switch.set(change)
            assert torch.equal(logits(model, ids), wanted)
        switch.set(changes[0], [4, 6])
        part = logits(model, ids)
        switch.set(None)
        assert torch.equal(logits(model, ids), plain)
    assert torch.equal(part[0, :4], plain[0, :4])
    assert torch.equal(part[1, :6], plain[1, :6])
    assert not torch.allclose(part[0, 4:], plain[0, 4:])
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
