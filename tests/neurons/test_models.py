"""The whole way on every architecture: sites, layout, masks, activations, networks, training."""

import copy

import pytest
import torch
from architectures import ARCHITECTURES, HIDDEN
from helpers import random_mask, state, zeroed
from peft import LoraConfig, get_peft_model

from fnsft_trl import (
    FunctionalNetworkConfig,
    NeuronTunerConfig,
    constrain_full,
    constrain_lora,
    discover_networks,
    find_neuron_sites,
    lesion,
    preserve,
    select_neurons,
)
from fnsft_trl.constraints import set_lora_targets
from fnsft_trl.data.sequences import TokenSequence
from fnsft_trl.discovery.activations import ActivationReader
from fnsft_trl.export import changed_neurons
from fnsft_trl.neurons.sites import SITES


@pytest.fixture(params=ARCHITECTURES, ids=str)
def architecture(request):
    return request.param


def batch(model, ids=None):
    """Inputs of one forward pass: 24 tokens, of the decoder too if there is one."""
    if ids is None:
        ids = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(1))
    shifted = {}
    if model.config.is_encoder_decoder:
        shifted = {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=ids)}
    return {"input_ids": ids, **shifted}


@torch.no_grad()
def logits(model):
    return model(**batch(model)).logits


def fit(model, parameters=None, held=None, steps=3):
    """A few steps of AdamW with weight decay, towards random logits."""
    optimizer = torch.optim.AdamW(
        [p for p in parameters or model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1
    )
    if held:
        held.attach(optimizer)
    inputs = batch(model)
    for _ in range(steps):
        out = model(**inputs).logits
        (out - torch.randn(out.shape, generator=torch.Generator().manual_seed(0))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_one_site_per_block(architecture):
    sites = find_neuron_sites(architecture.model())
    names = (architecture.site,) if isinstance(architecture.site, str) else architecture.site
    per_name = len(sites) // len(names)
    assert [site.name for site in sites] == [name.format(i) for name in names for i in range(per_name)]
    assert [site.layer for site in sites] == list(range(len(sites)))
    assert tuple(site.width for site in sites) == architecture.widths
    assert tuple(site.experts.width if site.experts else 0 for site in sites) == (
        architecture.experts or (0,) * len(sites)
    )
    outputs = find_neuron_sites(architecture.model(), kind="mlp_output")
    assert [site.name for site in outputs] == [site.name for site in sites]
    assert {site.width for site in outputs} == {HIDDEN}


def test_layout_is_what_a_neurons_gradient_touches(architecture):
    """With every other neuron's way out cut, a layer's up weights get a gradient exactly where the layout says."""
    plain = architecture.model()
    for site in find_neuron_sites(plain):
        for j in (0, site.width // 2 + 1, site.width - 1):
            model = copy.deepcopy(plain)
            others = torch.arange(site.width) != j
            for part in site.layout.slices:
                if part.side == "input":
                    weight = part.tensor(model)
                    weight.data.masked_fill_(part.mask(others.nonzero().flatten(), weight), 0)
            (model(**batch(model)).logits.square().sum() * 10).backward()
            for part in site.layout.slices:
                if part.side == "output":
                    parameter = part.tensor(model)
                    expected = part.mask(torch.tensor([j]), parameter).expand_as(parameter)
                    assert torch.equal(parameter.grad != 0, expected), (site.name, part.parameter, j)


@pytest.mark.parametrize("kind", SITES)
def test_lesion_is_zeroed_weights_and_leaves_no_trace(architecture, kind):
    model = architecture.model()
    mask = random_mask(model, kind)
    plain = logits(model)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    with lesion(model, mask) as handle:
        lesioned = logits(model)
        handle.disable()
        assert torch.equal(logits(model), plain)
    with preserve(model, ~mask):
        assert torch.equal(logits(model), lesioned)
    assert torch.allclose(logits(zeroed(model, mask)), lesioned, atol=1e-6)
    assert not torch.allclose(plain, lesioned, atol=1e-3)
    assert torch.equal(logits(model), plain)
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}


def direct(model, ids, kind):
    """Activations of one sequence, all layers side by side, computed by other means than the sites'."""
    parts = {}  # (layer, whether shared) -> (tokens, neurons)
    hooks = []

    def keep(layer, values, shared=False):  # a copy: some models add to it in place
        parts[layer, shared] = values.reshape(len(ids), -1).clone()

    def keep_input(layer, shared=False):
        return lambda module, args: keep(layer, args[0], shared)

    for site in find_neuron_sites(model, kind=kind):
        module = model.get_submodule(site.name)

        def on_output(module, args, output, layer=site.layer):
            keep(layer, output[0] if isinstance(output, tuple) else output)

        def on_experts(module, args, layer=site.layer):
            hidden, chosen, _ = args
            up, down = module.gate_up_proj, module.down_proj
            if module.is_transposed:
                up, down = up.transpose(1, 2), down.transpose(1, 2)
            out = torch.einsum("th,eih->tei", hidden, up)
            out = out + module.gate_up_proj_bias if module.has_bias else out
            is_chosen = torch.stack([(chosen == expert).any(1) for expert in range(len(up))], 1)  # (tokens, experts)
            keep(layer, module._apply_gate(out) * is_chosen[..., None])

        if kind == "mlp_output":
            hooks.append(module.register_forward_hook(on_output))
        elif not site.experts:
            hooks.append(module.register_forward_pre_hook(keep_input(site.layer)))
        else:
            hooks.append(module.experts.register_forward_pre_hook(on_experts))
            if site.down_name:
                shared = model.get_submodule(site.down_name)
                hooks.append(shared.register_forward_pre_hook(keep_input(site.layer, shared=True)))
    with torch.no_grad():
        model(**batch(model, torch.tensor([ids])))
    for hook in hooks:
        hook.remove()
    return torch.cat([parts[key] for key in sorted(parts)], 1)


@pytest.mark.parametrize("kind", SITES)
def test_activations_are_streamed_as_they_are(architecture, kind):
    model = architecture.model()
    sequences = [TokenSequence([5, 6, 7, 8, 9, 41, 42], 0), TokenSequence([10, 2, 11, 12], 1)]
    reader = ActivationReader(
        model, find_neuron_sites(model, kind=kind), batch_size=2, max_length=8, skip_tokens=1, special_ids=[2]
    )
    reader._block.fill_(float("nan"))
    ((rows, half),) = [(block.rows.clone(), block.parts) for block in reader.read([sequences], max_tokens=100)]
    for sequence in sequences:
        kept = [i for i, token in enumerate(sequence.ids) if i >= 1 and token != 2]
        expected = direct(model, sequence.ids, kind)[kept]
        assert torch.allclose(rows[half == sequence.half], expected, atol=1e-5)
    assert not any("forward" in vars(module) for module in model.modules())


class Tokenizer:
    all_special_ids, chat_template = (0, 1), None

    def __call__(self, *texts, **options):
        raise AssertionError("the rows are token ids")


@pytest.mark.slow
@pytest.mark.parametrize("kind", SITES)
def test_networks_are_discovered(architecture, kind):
    generator = torch.Generator().manual_seed(0)
    texts = [{"input_ids": torch.randint(3, 100, (16,), generator=generator).tolist()} for _ in range(16)]
    config = FunctionalNetworkConfig(
        ica_components=2, ica_rank=8, ica_max_tokens=200, ica_max_length=16, ica_percentile=80, ica_site=kind
    )
    model = architecture.model()
    template = discover_networks(model, Tokenizer(), texts, config)
    assert template.architecture == architecture.name
    assert tuple(template.widths.values()) == (
        architecture.widths if kind == SITES[0] else (HIDDEN,) * len(template.widths)
    )
    mask = select_neurons(template, [0])
    assert 0 < mask.fraction < 0.5
    lesion(model, mask).remove()


@pytest.mark.parametrize("kind", SITES)
def test_full_fine_tuning_changes_the_selected_neurons_and_no_more(architecture, kind):
    model = architecture.model()
    mask = random_mask(model, kind)
    before = state(model)
    held = constrain_full(model, mask, train_other=False)
    fit(model, held=held)
    changed, others = changed_neurons(find_neuron_sites(model, kind=kind), before, state(model))
    assert others == []
    assert changed == mask


def test_full_fine_tuning_of_all_but_the_selected_neurons(architecture):
    model = architecture.model()
    mask = random_mask(model, SITES[0])
    before = state(model)
    held = constrain_full(model, ~mask, train_other=True)
    fit(model, held=held)
    changed, others = changed_neurons(find_neuron_sites(model), before, state(model))
    assert others
    assert changed == ~mask


@pytest.mark.parametrize("kind", SITES)
@pytest.mark.parametrize("method", ["neuron_delta", "lora"])
def test_adapters_change_the_selected_neurons_and_no_more(architecture, method, kind):
    base = architecture.model()
    mask = random_mask(base, kind)
    before = state(base)
    model = adapted(base, mask, method)
    fit(model)
    merged = model.merge_and_unload()
    changed, others = changed_neurons(find_neuron_sites(merged, kind=kind), before, state(merged))
    assert others == []
    assert changed == mask


def adapted(base, mask, method, *, is_held=True):
    """The model with an adapter held to the neurons."""
    if method == "neuron_delta":
        model = get_peft_model(base, NeuronTunerConfig(neurons=mask.to_ranges(), site=mask.site))
        return model.eval()
    config = LoraConfig(r=2)
    set_lora_targets(config, base, mask)
    model = get_peft_model(base, config)
    if is_held:
        constrain_lora(model, mask)
    return model.eval()


@pytest.mark.parametrize("method", ["neuron_delta", "lora", "full"])
def test_not_held_more_would_change(architecture, method):
    """The control of the tests above, with what holds the frozen weights switched off."""
    model = architecture.model()
    mask = random_mask(model, SITES[0])
    before = state(model)
    if method != "full":
        model = adapted(model, mask, method, is_held=False)
    if method == "neuron_delta":  # nothing but the frozen base holds them
        model.requires_grad_(True)
    fit(model, steps=1)
    if method != "full":
        model = model.merge_and_unload()
    changed, others = changed_neurons(find_neuron_sites(model), before, state(model))
    assert changed != mask or others
