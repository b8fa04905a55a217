import pytest
import torch
from helpers import tiny_model
from peft import LoraConfig, get_peft_model

from fnsft_trl import NeuronTunerConfig
from fnsft_trl.evaluation.kl import TopDistributions, divergences, has_switch, switches_kept


def draw(positions: int = 7, vocabulary: int = 300, *, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(positions, vocabulary, generator=torch.Generator().manual_seed(seed))


def test_it_is_the_divergence_of_torch_whatever_the_size_of_the_pieces(monkeypatch):
    base, trained = draw(), draw(seed=1)
    expected = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=x) for x in (base, trained)))
    assert torch.allclose(divergences(base, trained), expected, rtol=1e-5)
    monkeypatch.setattr("fnsft_trl.evaluation.kl._CHUNK", 2 * 300)
    assert torch.equal(divergences(base, base), torch.zeros(7))
    assert torch.allclose(divergences(base, trained), expected, rtol=1e-5)


def test_a_token_that_cannot_be_drawn_counts_nothing():
    base, trained = draw(), draw(seed=1)
    base[:, 5] = trained[:, 5] = -torch.inf
    found = divergences(base, trained)
    keep = torch.arange(300) != 5
    assert torch.allclose(found, divergences(base[:, keep], trained[:, keep]), rtol=1e-5)
    assert torch.allclose(TopDistributions.of(base, 20).divergences(base), torch.zeros(7), atol=1e-6)


def test_stored_tokens_give_a_lower_bound_that_grows_to_the_divergence():
    base, trained = draw(), draw(seed=1)
    exact = divergences(base, trained)
    bounds = [TopDistributions.of(base, k).divergences(trained) for k in (1, 10, 100, 300)]
    for lower, higher in zip(bounds, [*bounds[1:], exact], strict=True):
        assert (lower <= higher + 1e-5).all()
    assert torch.allclose(bounds[-1], exact, rtol=1e-4)
    assert (bounds[0] < exact - 0.1).all()


def test_an_adapter_has_a_switch_unless_weights_of_the_base_train_too():
    assert not has_switch(tiny_model("llama"))
    lora = {"target_modules": ["up_proj"], "r": 2}
    assert has_switch(get_peft_model(tiny_model("llama"), LoraConfig(**lora)))
    assert has_switch(get_peft_model(tiny_model("llama"), LoraConfig(**lora, modules_to_save=["lm_head"])))
    assert has_switch(get_peft_model(tiny_model("llama"), LoraConfig(**lora, trainable_token_indices=[3])))
    assert not has_switch(get_peft_model(tiny_model("llama"), LoraConfig(**lora, bias="lora_only")))
    deltas = get_peft_model(tiny_model("llama"), NeuronTunerConfig(neurons={"0": "1-3"}, task_type="CAUSAL_LM"))
    assert has_switch(deltas)
    deltas.get_base_model().get_input_embeddings().weight.requires_grad_(True)
    assert not has_switch(deltas)


@pytest.mark.parametrize("config", [LoraConfig(target_modules=["up_proj"]), NeuronTunerConfig(neurons={"0": "1-3"})])
def test_what_trains_is_the_same_after_the_adapter_was_off(config):
    model = get_peft_model(tiny_model("llama"), config)
    next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    with switches_kept(model), model.disable_adapter():
        pass
    assert [p.requires_grad for p in model.parameters()] == before
