"""What is particular to mixtures of experts: the way to the activations of routed experts."""

import copy

import pytest
import torch
import transformers as tf
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from architectures import ARCHITECTURES
from datasets import Dataset
from helpers import changed_entries, logits, medium_experts, random_mask, sft_config, state, zeroed
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from fnsft_trl import (
    FNSFTError,
    FNSFTTrainer,
    FrozenNeuronGuard,
    FunctionalNetworkConfig,
    NeuronTunerConfig,
    constrain_full,
    discover_networks,
    find_neuron_sites,
    lesion,
    to_plain_lora,
    verify_merge,
)
from fnsft_trl.data.sequences import TokenSequence
from fnsft_trl.discovery.activations import ActivationReader
from fnsft_trl.evaluation.reload import check_reload, last_logits
from fnsft_trl.export import changed_neurons, to_merged
from fnsft_trl.interventions import masks_of, masks_off
from fnsft_trl.training.engines import Engine
from fnsft_trl.training.guard import FrozenNeuronMoved


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


def test_masks_are_found_and_removed_under_hooks_of_accelerate(mixtral, ids):
    """Which set a forward of their own, before the masks or after them."""
    plain = logits(mixtral, ids)
    masks = [random_mask(mixtral, "mlp_intermediate", share=0.3, seed=seed) for seed in (0, 1)]
    pristine = copy.deepcopy(mixtral)
    first = lesion(mixtral, masks[0])
    for block in mixtral.model.layers:
        add_hook_to_module(block.mlp.experts, AlignDevicesHook("cpu"))
    second = lesion(mixtral, masks[1])
    both = logits(zeroed(pristine, masks[0] | masks[1]), ids)
    assert torch.allclose(logits(mixtral, ids), both, atol=1e-6)
    assert set(masks_of(mixtral)) == {first, second}
    with masks_off(mixtral):
        assert torch.equal(logits(mixtral, ids), plain)
    first.remove()
    assert torch.allclose(logits(mixtral, ids), logits(zeroed(pristine, masks[1]), ids), atol=1e-6)
    second.remove()
    assert masks_of(mixtral) == []
    assert torch.equal(logits(mixtral, ids), plain)


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


def trainer_of(base, rows, tokenizer, directory, method, template=None, **settings):
    config = {"ica_components": 2, "ica_rank": 8, "ica_max_tokens": 200, "ica_max_length": 16, "ica_percentile": 70}
    args = {"save_strategy": "steps", "save_steps": 2, **settings.pop("args", {})}
    return FNSFTTrainer(
        model=base,
        args=sft_config(directory, **args),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, task_type="CAUSAL_LM") if method == "lora" else None,
        network_config=FunctionalNetworkConfig(**config, ica_component_ids=[0], train_method=method, **settings),
        network_template=template,
    )


@pytest.mark.parametrize("site", ["mlp_intermediate", "mlp_output"])
@pytest.mark.parametrize("method", ["neuron_delta", "lora", "full"])
def test_a_mixture_of_experts_is_trained_by_the_trainer(mixtral, rows, tokenizer, tmp_path, site, method):
    """Discovery, selection, training under weight decay and clipping, and the guard."""
    before = state(mixtral)
    trainer = trainer_of(mixtral, rows, tokenizer, tmp_path, method, ica_site=site)
    trainer.train()
    trained = trainer.model if method == "full" else trainer.model.merge_and_unload()
    changed, others = changed_neurons(find_neuron_sites(trained, kind=site), before, state(trained))
    assert others == []
    assert changed == trainer.trainable_neurons


FEATURES = {
    "accumulation and clipping": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
    "packing": {"packing": True},
    "checkpointing, not reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "checkpointing, reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "bf16": {"bf16": True},
    # Experts are traced anew for every choice of experts: two steps of batches of one length are enough.
    "torch_compile": {
        **{"torch_compile": True, "torch_compile_backend": "aot_eager"},
        **{"max_steps": 2, "pad_to_multiple_of": 64},
    },
    "adamw_8bit": {"optim": "adamw_8bit"},
}


@pytest.mark.parametrize(
    "feature", [pytest.param(name, marks=pytest.mark.slow) if "compile" in name else name for name in FEATURES]
)
@pytest.mark.parametrize("method", ["neuron_delta", "lora"])
def test_training_features_are_exact_on_experts(feature, method, rows, tokenizer, tmp_path):
    base = medium_experts()
    before = state(base)
    trainer = trainer_of(base, rows, tokenizer, tmp_path, method, args={"max_length": 64, **FEATURES[feature]})
    trainer.train()
    merged = trainer.model.merge_and_unload()
    changed, others = changed_neurons(find_neuron_sites(merged), before, state(merged))
    torch.compiler.reset()
    assert others == []
    assert changed == trainer.trainable_neurons


def test_lora_on_experts_is_refused_when_sharded(mixtral, rows, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(Engine, "of_trainer", lambda trainer: Engine("FSDP2"))
    with pytest.raises(FNSFTError, match="LoRA on the weights of experts, held to neurons, does not run under FSDP2"):
        trainer_of(mixtral, rows, tokenizer, tmp_path, "lora")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["neuron_delta", "lora"])
@pytest.mark.parametrize("name", ["Qwen2MoeForCausalLM", "GptOssForCausalLM"])
def test_adapters_are_resumed_reloaded_and_exported(name, rows, tokenizer, tmp_path, method, forked):
    NAMED[name].model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")

    def run(directory, template=None, resume=None, **args):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        trainer = trainer_of(base, rows, tokenizer, tmp_path / directory, method, template, args=args)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole")
    whole.save_model(str(tmp_path / "adapter"))
    template = whole.network_template
    resumed = run("resumed", template, resume=str(tmp_path / "whole" / "checkpoint-2"))
    expected = get_peft_model_state_dict(whole.model)
    found = get_peft_model_state_dict(resumed.model)
    assert changed_entries(expected, found) == {}
    ids = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(1))
    last = last_logits(whole.model, ids)
    adapters = {"adapter": tmp_path / "adapter"}
    assert check_reload(str(tmp_path / "base"), adapters, ids, {"adapter": last}) == {"adapter": 0.0}

    to_merged(tmp_path / "adapter", tmp_path / "merged")
    by = whole.trainable_neurons if method == "lora" else tmp_path / "adapter"
    assert verify_merge(tmp_path / "base", tmp_path / "merged", by) == whole.trainable_neurons
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(last_logits(merged, ids), last, atol=1e-4, rtol=1e-4)


def test_deltas_of_experts_as_plain_lora(model, ids, tmp_path):
    """Loaded by PEFT as any LoRA; of one rank for all experts of a layer."""
    for site in ("mlp_intermediate", "mlp_output"):
        base = copy.deepcopy(model)
        base.save_pretrained(tmp_path / "base")
        base = type(model).from_pretrained(tmp_path / "base")
        neurons = random_mask(base, site, share=0.3).to_ranges()
        lora = (
            {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"]}
            if model.config.model_type != "deepseek_v3"
            else None
        )
        wrapped = get_peft_model(
            base, NeuronTunerConfig(neurons=neurons, site=site, task_type="CAUSAL_LM", lora=lora)
        ).eval()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        expected = logits(wrapped, ids)
        wrapped.save_pretrained(tmp_path / "adapter")
        to_plain_lora(tmp_path / "adapter", tmp_path / "plain")
        config = to_plain_lora(wrapped, tmp_path / "live")
        file = "adapter_model.safetensors"
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "live" / file).read_bytes()
        assert any("experts.down_proj" in name for name in config.target_parameters)
        plain = PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "base"), tmp_path / "plain").eval()
        assert not torch.allclose(logits(model, ids), expected, atol=1e-2)
        torch.testing.assert_close(logits(plain, ids), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(logits(plain.merge_and_unload(), ids), expected, atol=1e-5, rtol=1e-4)


def test_the_guard_names_the_expert_neuron_that_moved(model):
    mask = random_mask(model, "mlp_intermediate")
    constrain_full(model, mask, train_other=False)
    guard = FrozenNeuronGuard(model, mask)
    guard.on_train_begin(None, None, None)
    guard.check(step=0)
    site = find_neuron_sites(model)[1]
    neuron = (~mask).indices(1)[-3]
    for part in site.layout.slices:
        if len(part.among(neuron[None])) == 0:
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
