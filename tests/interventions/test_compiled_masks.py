"""Masks on compiled models: whatever came first, and whichever model was compiled, they act."""

import random

import pytest
import torch
import torch._dynamo
from architectures import ARCHITECTURES
from helpers import VOCABULARY, logits, random_mask, tiny_model, tiny_rows, tiny_tokenizer, zeroed
from peft import LoraConfig, get_peft_model
from transformers import CompileConfig

from fnsft_trl import (
    FunctionalNetworkConfig,
    NeuronMask,
    constrain_lora,
    discover_networks,
    find_neuron_sites,
    lesion,
    preserve,
)
from fnsft_trl.constraints import set_lora_targets


MIXTRAL = next(architecture for architecture in ARCHITECTURES if str(architecture) == "MixtralForCausalLM")
IDS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def torch_as_it_comes():
    """Nothing is compiled yet, and no mask was ever put on."""
    torch.compiler.reset()
    # The limit is reached, so that what comes then is tested.
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True, recompile_limit=4):
        yield
    torch.compiler.reset()


def whole(model):
    return torch.compile(model, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


def blocks(model):
    """Its MLPs and attentions alone, as a regional compilation does it."""
    for site in find_neuron_sites(model):
        model.get_submodule(site.name.rpartition(".")[0]).compile(backend="eager")
    return model


def function(model):
    return torch.compile(lambda ids: model(ids), backend="eager")


def adapted(model):
    targets = sorted({name for site in find_neuron_sites(model) for name in site.layout.modules()})
    return whole(get_peft_model(model, LoraConfig(r=2, target_modules=targets)).eval())


def masked(model, put):
    """A model as it was made, with the masks baked into its weights."""
    for mask in put.values():
        model = zeroed(model, mask)
    return model


def random_life(make, compiled, seed, steps=7):
    """Put masks on two models of one class that are compiled, switch and remove them; yields what is and should be."""
    draw = random.Random(seed)
    models = [make(), make()]
    calls = [compiled(model) for model in models]
    put = [{}, {}]  # handle -> the neurons that it silences
    for step in range(steps):
        number = draw.randrange(2)
        model, on = models[number], {handle: mask for handle, mask in put[number].items() if handle.enabled}
        action = draw.choice(["put", *(["switch", "remove", "enter"] if put[number] else [])])
        if action == "put":
            mask = random_mask(model, draw.choice(["mlp_intermediate", "mlp_output"]), seed=step)
            if draw.random() < 0.5:
                put[number][lesion(model, mask)] = mask
            else:
                put[number][preserve(model, ~mask)] = mask
        else:
            handle = draw.choice(list(put[number]))
            if action == "switch":
                handle.disable() if handle.enabled else handle.enable()
            elif action == "remove":
                handle.remove()
            else:
                with handle:
                    yield calls[number], masked(make(), {**on, handle: put[number][handle]}), f"{step} in a block"
        on = {handle: mask for handle, mask in put[number].items() if handle.enabled}
        yield calls[number], masked(make(), on), f"{step} {action}"
        yield calls[1 - number], masked(make(), {h: m for h, m in put[1 - number].items() if h.enabled}), "the other"


LIVES = [
    *((way, tiny_model, seed) for seed, way in enumerate((whole, in_place, blocks, function))),
    (whole, lambda _: MIXTRAL.model(), 4),
]


@pytest.mark.slow
@pytest.mark.parametrize(("way", "family", "seed"), LIVES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_masks_act_whenever_they_are_put_on_switched_and_removed(way, family, seed):
    for call, right, step in random_life(lambda: family("llama"), way, seed):
        found, expected = logits(call, IDS), logits(right, IDS)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5, msg=lambda text, step=step: f"{step}: {text}")


@pytest.mark.slow
def test_without_the_guards_they_are_ignored(monkeypatch):
    """The control: the same life goes wrong where compiled code does not notice hooks."""
    monkeypatch.setattr("fnsft_trl.neurons.sites.guard_hooks", lambda: None)
    life = random_life(lambda: tiny_model("llama"), whole, seed=0)
    assert any(not torch.allclose(logits(call, IDS), logits(right, IDS), atol=1e-5) for call, right, _ in life)


@pytest.mark.slow
def test_a_mask_of_a_compiled_model_is_that_of_the_plain_one():
    for model in (tiny_model("llama"), get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["down_proj"]))):
        call = whole(model.eval())
        mask = random_mask(model, "mlp_intermediate")
        plain, expected = logits(call, IDS), logits(zeroed(model, mask), IDS)
        handle = lesion(call, mask)
        torch.testing.assert_close(logits(call, IDS), expected)
        torch.testing.assert_close(logits(model, IDS), expected)
        del call
        handle.remove()
        torch.testing.assert_close(logits(model, IDS), plain)
        handle.enable()
        torch.testing.assert_close(logits(whole(model), IDS), expected)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["plain", "masked"])
def test_generation_with_a_static_cache_is_masked_or_not_from_the_first_token_on(first):
    compile_config = CompileConfig(backend="eager", fullgraph=False)
    compile_config._compile_all_devices = True  # as on an accelerator
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    model = tiny_model("llama")
    mask = random_mask(model, "mlp_intermediate", share=0.7)
    prompt = torch.tensor([[5, 6, 7]])
    right = {"plain": model.generate(prompt, **settings), "masked": zeroed(model, mask).generate(prompt, **settings)}
    assert not torch.equal(right["plain"], right["masked"])
    handle = lesion(model, mask)
    for state in ("plain", "masked", "plain", "masked") if first == "plain" else ("masked", "plain", "masked"):
        handle.enable() if state == "masked" else handle.remove()
        found = model.generate(prompt, cache_implementation="static", compile_config=compile_config, **settings)
        assert torch.equal(found, right[state]), state


@pytest.mark.slow
def test_networks_of_a_compiled_model_are_those_of_the_plain_one():
    texts = [row["prompt"] + row["completion"] for row in tiny_rows()]
    config = FunctionalNetworkConfig(
        ica_components=2, ica_rank=8, ica_max_tokens=200, ica_batch_size=2, ica_max_length=32, ica_percentile=80
    )
    plain = discover_networks(tiny_model("llama"), tiny_tokenizer(), texts, config)
    model = tiny_model("llama")
    model.model.compile(backend="eager")
    model(IDS % VOCABULARY)
    found = discover_networks(model, tiny_tokenizer(), texts, config)
    for layer, loadings in plain.loadings.items():
        torch.testing.assert_close(found.loadings[layer], loadings, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_lora_is_held_in_a_model_that_was_compiled_before():
    model = tiny_model("llama")
    trainable = random_mask(model, "mlp_intermediate", 0.3)
    config = LoraConfig(r=4)
    set_lora_targets(config, model, trainable)
    model = get_peft_model(model, config)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(input_ids=IDS, labels=IDS).loss.backward()
    model.zero_grad()
    constrain_lora(model, trainable)
    for _ in range(2):  # B is zero at first, so A has a gradient from the second step on
        compiled(input_ids=IDS, labels=IDS).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
    for site in find_neuron_sites(model):
        frozen = (~NeuronMask(trainable.layers)).indices(site.layer)
        up, down = site.ups[0], site.down
        assert not up.lora_B["default"].weight[frozen].any()
        assert not down.lora_A["default"].weight[:, frozen].any()
        assert up.lora_B["default"].weight.any()
        assert down.lora_A["default"].weight.any()
