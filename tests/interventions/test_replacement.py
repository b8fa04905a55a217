"""What stands in for activations: zero, a factor, the mean, other tokens; at some tokens, and with a cache."""

import copy

import pytest
import torch
from helpers import VOCABULARY, changed_entries, logits, medium_experts, random_mask, state, tiny_model

from fnsft_trl import (
    FNSFTError,
    NeuronMask,
    amplify,
    bake_amplification,
    bake_lesion,
    find_neuron_sites,
    lesion,
    preserve,
    unbake,
)
from fnsft_trl.interventions import Mean, Resampled
from fnsft_trl.interventions.baking import lesion_note


IDS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


def activations(model, ids, kind="mlp_intermediate"):
    """Layer -> activations, shape (tokens, neurons)."""
    found = {}
    handles = []
    for site in find_neuron_sites(model, kind=kind):

        def note(values, neurons, tokens, layer=site.layer):
            found[layer] = values.detach().reshape(-1, values.shape[-1])

        handles += site.tap(note)
    logits(model, ids)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("site", ["mlp_intermediate", "mlp_output"])
def test_the_identities_of_interventions(family, site):
    model = tiny_model(family)
    mask = random_mask(model, site)
    plain = logits(model, IDS)

    def under(handle):
        with handle:
            return logits(model, IDS)

    lesioned = under(lesion(model, mask))
    assert not torch.allclose(lesioned, plain)
    assert torch.equal(under(preserve(model, mask | ~mask)), plain)  # all ones
    assert torch.equal(under(preserve(model, ~mask)), lesioned)
    assert torch.equal(under(amplify(model, mask, 0)), lesioned)
    assert torch.equal(under(amplify(model, mask, 1)), plain)
    assert not torch.allclose(under(amplify(model, mask, 2)), plain)
    zero = Mean({layer: torch.zeros(len(members)) for layer, members in mask.layers.items()})
    assert torch.equal(under(lesion(model, mask, ablation=zero)), lesioned)


@pytest.mark.parametrize("site", ["mlp_intermediate", "mlp_output"])
def test_a_baked_amplification_is_the_amplification_and_comes_out_bit_for_bit(family, site, tmp_path):
    model = tiny_model(family)
    before, mask = state(model), random_mask(model, site)
    with amplify(model, mask, 1.5):
        amplified = logits(model, IDS)
    kept = bake_amplification(model, mask, 1.5)
    torch.testing.assert_close(logits(model, IDS), amplified, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path).eval()
    assert reloaded.config.baked_amplification == {"site": site, "neurons": mask.to_ranges(), "factor": 1.5}
    assert f"{mask.count} neurons" in lesion_note(reloaded)
    assert "multiplied by 1.5" in lesion_note(reloaded)
    for bake in (lambda: bake_lesion(model, mask), lambda: bake_amplification(model, mask, 2)):
        with pytest.raises(FNSFTError, match="amplification"):
            bake()
    unbake(model, kept)
    assert changed_entries(before, state(model)) == {}
    assert lesion_note(model) is None
    for factor in (0, 1, float("inf")):
        with pytest.raises(FNSFTError, match="the factor to bake"):
            bake_amplification(model, mask, factor)


def test_the_mean_of_a_constant_neuron_changes_nothing():
    model = tiny_model("llama")
    site = find_neuron_sites(model)[1]
    with torch.no_grad():  # neuron 3 is silu(bias) * bias, whatever it reads
        for up in site.ups:
            up.weight[3] = 0
            up.bias[3] = 0.7
    found = activations(model, IDS)
    means = Mean({layer: values.mean(0) for layer, values in found.items()})
    mask = NeuronMask({1: torch.arange(site.width) == 3})
    with lesion(model, mask, ablation=means):
        torch.testing.assert_close(logits(model, IDS), plain := logits(copy.deepcopy(model), IDS), rtol=0, atol=1e-6)
    torch.testing.assert_close(plain, logits(model, IDS), rtol=0, atol=1e-6)
    with lesion(model, mask):
        assert not torch.allclose(logits(model, IDS), plain, atol=1e-4)


@pytest.mark.parametrize("ablation", ["zero", "mean", "resample"])
@pytest.mark.parametrize("first", [None, 5])
def test_a_cache_changes_nothing(ablation, first):
    """A pass in pieces, as generation has it, computes what one pass does."""
    model = tiny_model("llama")
    found = activations(model, torch.randint(3, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(4)))
    kinds = {"zero": None, "mean": Mean({i: v.mean(0) for i, v in found.items()}), "resample": Resampled(found)}
    with lesion(model, random_mask(model, "mlp_intermediate"), ablation=kinds[ablation]) as handle:
        if first is not None:
            handle.start_at(first)
        whole = logits(model, IDS)
        with torch.no_grad():
            begun = model(IDS[:, :6], use_cache=True)
            parts, cache = [begun.logits], begun.past_key_values
            for place in range(6, IDS.shape[1]):
                step = model(IDS[:, place : place + 1], past_key_values=cache, use_cache=True)
                parts.append(step.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-4)
    plain = logits(model, IDS)
    assert torch.equal(plain[:, :first], whole[:, :first]) if first else not torch.allclose(plain[:, 0], whole[:, 0])
    assert not torch.allclose(plain[:, 8], whole[:, 8], atol=1e-3)


def test_generation_is_changed_at_answers_alone():
    model = tiny_model("llama")
    mask = random_mask(model, "mlp_intermediate")
    asked = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with lesion(model, mask) as handle:
        handle.start_at(IDS.shape[1] - 1)
        made = {cached: model.generate(IDS, use_cache=cached, **asked) for cached in (True, False)}
        assert torch.equal(made[True], made[False])
        handle.start_at([IDS.shape[1] - 1] * 2)
        assert torch.equal(model.generate(IDS, **asked), made[True])
        with pytest.raises(FNSFTError, match="given for 2 rows, and the pass has 1"):
            model.generate(IDS[:1], **asked)
    assert not torch.equal(model.generate(IDS, **asked), made[True])


def test_what_stands_in_goes_with_a_copy_and_comes_back_with_the_mask():
    model = tiny_model("llama")
    handle = lesion(model, random_mask(model, "mlp_intermediate"), ablation=Resampled(activations(model, IDS)))
    handle.start_at(4)
    masked = logits(model, IDS)
    assert torch.equal(logits(copy.deepcopy(model), IDS), masked)
    handle.remove()
    assert not model._forward_pre_hooks
    handle.enable()
    assert torch.equal(logits(model, IDS), masked)


def test_neurons_of_experts_are_scaled_and_resampled_too():
    model = medium_experts()
    mask = random_mask(model, "mlp_intermediate")
    plain = logits(model, IDS)
    with amplify(model, mask, 3.0):
        amplified = logits(model, IDS)
    assert not torch.allclose(plain, amplified)
    pool = {layer: torch.randn(5, len(members)) for layer, members in mask.layers.items()}
    with lesion(model, mask, ablation=Resampled(pool)) as handle:
        whole = logits(model, IDS)
        handle.start_at(4)
        late = logits(model, IDS)
    assert not torch.allclose(whole, plain)
    assert torch.allclose(late[:, :4], plain[:, :4], atol=1e-6)
    assert not torch.allclose(late[:, 4:], plain[:, 4:])
    bake_amplification(model, mask, 3.0)
    torch.testing.assert_close(logits(model, IDS), amplified, rtol=0, atol=1e-5)


def test_what_does_not_fit_is_refused_before_a_hook_is_on():
    model = tiny_model("llama")
    mask = random_mask(model, "mlp_intermediate")
    for wrong in (Mean({0: torch.zeros(40)}), Mean({layer: torch.zeros(7) for layer in range(3)})):
        with pytest.raises(FNSFTError, match="what stands in for the 40 neurons"):
            lesion(model, mask, ablation=wrong)
    with pytest.raises(FNSFTError, match="no pool to draw from"):
        Resampled({0: torch.zeros(1, 40)})
    with pytest.raises(FNSFTError, match="must be a finite number"):
        amplify(model, mask, float("nan"))
    assert not any(module._forward_pre_hooks for module in model.modules())
