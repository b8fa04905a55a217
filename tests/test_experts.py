"""What is particular to mixtures of experts: the way to the activations of routed experts."""

import copy

import pytest
import torch
import transformers as tf
from architectures import ARCHITECTURES
from datasets import Dataset
from helpers import logits, random_mask, sft_config, state, zeroed
from peft import LoraConfig, get_peft_model

from fnsft_trl import (
    FNSFTError,
    FNSFTTrainer,
    FrozenNeuronGuard,
    FunctionalNetworkConfig,
    NeuronMask,
    NeuronTunerConfig,
    constrain_full,
    constrain_lora,
    discover_networks,
    find_neuron_sites,
    lesion,
)
from fnsft_trl.activations import ActivationReader, TokenSequence
from fnsft_trl.callbacks import FrozenNeuronMoved
from fnsft_trl.constraints import check_lora_config, set_lora_targets
from fnsft_trl.export import changed_neurons


NAMED = {str(architecture): architecture for architecture in ARCHITECTURES}
MIXED_NAMES = [str(architecture) for architecture in ARCHITECTURES if not architecture.dense]


@pytest.fixture(params=MIXED_NAMES)
def model(request):
    return NAMED[request.param].model()


@pytest.fixture
def mixtral():
    return NAMED["MixtralForCausalLM"].model()


@pytest.fixture
def ids():
    return torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(1))


def test_masks_add_up_and_may_go_in_any_order(model, ids):
    masks = [random_mask(model, "mlp_intermediate", share=0.3, seed=seed) for seed in (0, 1)]
    plain = logits(model, ids)
    both = logits(zeroed(model, masks[0] | masks[1]), ids)
    first, second = (lesion(model, mask) for mask in masks)
    assert torch.allclose(logits(model, ids), both, atol=1e-6)
    first.remove()
    assert torch.allclose(logits(model, ids), logits(zeroed(model, masks[1]), ids), atol=1e-6)
    second.remove()
    second.remove()
    assert torch.equal(logits(model, ids), plain)


def test_masked_activations_read_as_zero(mixtral):
    mask = random_mask(mixtral, "mlp_intermediate")
    sites = find_neuron_sites(mixtral)
    reader = ActivationReader(mixtral, sites, batch_size=1, max_length=8, skip_tokens=0, special_ids=[])
    with lesion(mixtral, mask):
        (rows,) = [block.rows.clone() for block in reader.read([[TokenSequence([5, 6, 7], 0)]], max_tokens=9)]
    for site in sites:
        values = rows[:, reader.columns[site.layer]]
        assert not values[:, mask.indices(site.layer)].any()
        assert values.any()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_gradients_of_zeroed_weights(model, ids, reentrant):
    mask = random_mask(model, "mlp_intermediate")
    reference = zeroed(model, mask)
    reference(ids, labels=ids).loss.backward()
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with lesion(model, mask):
        model(ids, labels=ids).loss.backward()
    for site in find_neuron_sites(model):
        for part in site.layout.slices:
            parameter = part.tensor(model)
            silent = part.mask(mask.indices(site.layer), parameter)
            assert not parameter.grad[silent.expand_as(parameter)].any()
            expected = part.tensor(reference).grad.masked_fill(silent, 0)
            assert torch.allclose(parameter.grad, expected, atol=1e-5)


def test_a_copy_made_under_a_mask_keeps_it(mixtral, ids):
    """As with the hooks on linear layers."""
    plain = logits(mixtral, ids)
    with lesion(mixtral, random_mask(mixtral, "mlp_intermediate")):
        masked = logits(mixtral, ids)
        twin = copy.deepcopy(mixtral)
    assert torch.equal(logits(twin, ids), masked)
    assert torch.equal(logits(mixtral, ids), plain)
    with torch.no_grad():
        for parameter in mixtral.parameters():
            parameter.zero_()
    assert torch.equal(logits(twin, ids), masked)


def test_a_forward_that_others_put_on_the_module_is_kept(mixtral, ids):
    experts = mixtral.model.layers[0].mlp.experts
    own, calls = experts.forward, []

    def counted(*args):
        calls.append(1)
        return own(*args)

    experts.forward = counted
    handle = lesion(mixtral, random_mask(mixtral, "mlp_intermediate"))
    handle.disable()
    logits(mixtral, ids)
    assert len(calls) == 1
    handle.remove()
    assert experts.forward is counted


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_the_experts_implementation_stays_what_it_was(mixtral, ids, implementation):
    mixtral.set_experts_implementation(implementation)
    mask = random_mask(mixtral, "mlp_intermediate")
    with lesion(mixtral, mask):
        assert torch.allclose(logits(mixtral, ids), logits(zeroed(mixtral, mask), ids), atol=1e-6)
        assert mixtral.config._experts_implementation == implementation


def test_generation_runs_masked(mixtral):
    prompt = torch.tensor([[5, 6, 7]])
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = random_mask(mixtral, "mlp_intermediate", share=0.7)
    expected = zeroed(mixtral, mask).generate(prompt, **settings)
    with lesion(mixtral, mask):
        assert torch.equal(mixtral.generate(prompt, **settings), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MixtralForCausalLM", "LlamaForCausalLM"])
def test_compiled_models_run_masked(name, ids):
    model = NAMED[name].model()
    mask = random_mask(model, "mlp_intermediate")
    expected = logits(zeroed(model, mask), ids)
    with lesion(model, mask) as handle:
        compiled = torch.compile(model, backend="eager", fullgraph=name == "LlamaForCausalLM")
        assert torch.allclose(logits(compiled, ids), expected, atol=1e-6)
        handle.disable()
        assert torch.allclose(logits(compiled, ids), logits(model, ids), atol=1e-6)
    torch.compiler.reset()


@pytest.mark.parametrize("site", ["mlp_intermediate", "mlp_output"])
def test_sites_and_masks_reach_through_adapters_on_expert_weights(model, ids, site):
    plain = find_neuron_sites(model, kind=site)
    config = LoraConfig(
        r=2,
        target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        init_lora_weights=False,
    )
    wrapped = get_peft_model(model, config).eval()
    sites = find_neuron_sites(wrapped, kind=site)
    assert [(s.layer, s.width) for s in sites] == [(s.layer, s.width) for s in plain]
    assert [s.name for s in sites] == [f"base_model.model.{s.name}" for s in plain]
    mask = random_mask(wrapped, site)
    with lesion(wrapped, mask):
        masked = logits(wrapped, ids)
    merged = wrapped.merge_and_unload()
    assert torch.allclose(logits(zeroed(merged, mask), ids), masked, atol=1e-5)


def test_adapters_on_experts_are_refused(mixtral):
    mask = random_mask(mixtral, "mlp_intermediate")
    message = r"layer 0 \(.*model\.layers\.0\.mlp\) is a mixture of experts.*use train_method=full"
    with pytest.raises(FNSFTError, match=message):
        get_peft_model(copy.deepcopy(mixtral), NeuronTunerConfig(neurons=mask.to_ranges()))
    outputs = random_mask(mixtral, "mlp_output")
    with pytest.raises(FNSFTError, match=message):
        get_peft_model(copy.deepcopy(mixtral), NeuronTunerConfig(neurons=outputs.to_ranges(), site="mlp_output"))
    with pytest.raises(FNSFTError, match=message):
        set_lora_targets(LoraConfig(), mixtral, mask)
    wrapped = get_peft_model(copy.deepcopy(mixtral), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(FNSFTError, match="target_parameters"):  # PEFT has turned the targets into those of the experts
        constrain_lora(wrapped, mask)
    with pytest.raises(FNSFTError, match="target_parameters"):
        check_lora_config(LoraConfig(target_parameters=["experts.down_proj"]), mixtral, "mlp_intermediate")


def test_neuron_deltas_of_the_dense_layers_beside_experts(ids):
    base = NAMED["DeepseekV3ForCausalLM"].model()
    widths = {site.layer: site.width for site in find_neuron_sites(base)}
    mask = NeuronMask.from_ranges({"0": "0-9"}, widths, "mlp_intermediate")
    before = state(base)
    wrapped = get_peft_model(base, NeuronTunerConfig(neurons=mask.to_ranges()))
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        wrapped(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    merged = wrapped.merge_and_unload()
    assert changed_neurons(find_neuron_sites(merged), before, state(merged)) == (mask, [])


def test_lora_of_the_dense_layers_beside_experts_is_refused():
    """PEFT takes the names of any MLP layers for those of all experts, as older checkpoints named them."""
    base = NAMED["DeepseekV3ForCausalLM"].model()
    widths = {site.layer: site.width for site in find_neuron_sites(base)}
    mask = NeuronMask.from_ranges({"0": "0-9"}, widths, "mlp_intermediate")
    config = LoraConfig(r=2)
    set_lora_targets(config, base, mask)
    wrapped = get_peft_model(base, config)
    with pytest.raises(FNSFTError, match="LoRA with target_parameters cannot be held"):
        constrain_lora(wrapped, mask)


@pytest.mark.parametrize("site", ["mlp_intermediate", "mlp_output"])
def test_a_mixture_of_experts_is_trained_by_the_trainer(mixtral, rows, tokenizer, tmp_path, site):
    """Discovery, selection, full fine-tuning under weight decay and clipping, and the guard."""
    before = state(mixtral)
    config = FunctionalNetworkConfig(
        **{"ica_components": 2, "ica_rank": 8, "ica_max_tokens": 200, "ica_max_length": 16, "ica_percentile": 70},
        **{"ica_site": site, "ica_component_ids": [0], "train_method": "full"},
    )
    trainer = FNSFTTrainer(
        model=mixtral,
        args=sft_config(tmp_path, save_strategy="steps", save_steps=2),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        network_config=config,
    )
    trainer.train()
    changed, others = changed_neurons(find_neuron_sites(mixtral, kind=site), before, state(trainer.model))
    assert others == []
    assert changed == trainer.trainable_neurons


def test_the_guard_names_the_expert_neuron_that_moved(model):
    mask = random_mask(model, "mlp_intermediate")
    constrain_full(model, mask, train_other=False)
    guard = FrozenNeuronGuard(model, mask)
    guard.on_train_begin(None, None, None)
    guard.check(step=0)
    site = find_neuron_sites(model)[1]
    neuron = (~mask).indices(1)[-3]
    for part in site.layout.slices:
        if len(part.held(neuron[None])) == 0:
            continue
        parameter = part.tensor(model)
        kept = parameter.detach().clone()
        parameter.data[part.mask(neuron[None], parameter).expand_as(parameter)] += 1
        with pytest.raises(FrozenNeuronMoved, match=rf"{part.full_name} .*the first is neuron {int(neuron)}"):
            guard.check(step=1)
        parameter.data.copy_(kept)
    guard.check(step=2)


def test_forms_that_are_not_understood_are_errors(mixtral):
    small = {"vocab_size": 9, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    beside = tf.GraniteMoeSharedConfig(**small, intermediate_size=8, shared_intermediate_size=8, num_local_experts=2)
    with pytest.raises(FNSFTError, match=r"and an MLP outside of model\.layers\.0\.block_sparse_moe"):
        find_neuron_sites(tf.GraniteMoeSharedForCausalLM(beside))
    own = tf.Llama4TextConfig(**small, intermediate_size=8, intermediate_size_mlp=8, num_local_experts=2, head_dim=8)
    with pytest.raises(FNSFTError, match=r"Llama4TextExperts\) are not understood"):
        find_neuron_sites(tf.Llama4ForCausalLM(own))
    experts = mixtral.model.layers[0].mlp.experts
    experts.has_post_expert_norm = True
    with pytest.raises(FNSFTError, match="puts a norm"):
        find_neuron_sites(mixtral)


def test_a_layer_that_the_forward_pass_misses_is_an_error(mixtral, tokenizer):
    block = mixtral.model.layers[1]
    block.mlp.forward = lambda hidden_states: hidden_states
    texts = [{"input_ids": list(range(5, 15))}] * 4
    with pytest.raises(FNSFTError, match=r"did not reach layer 1 \(model\.layers\.1\.mlp\)"):
        discover_networks(mixtral, tokenizer, texts, FunctionalNetworkConfig(ica_components=2, ica_max_tokens=20))
