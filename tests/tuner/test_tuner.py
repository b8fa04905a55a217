import copy

import pytest
import torch
from helpers import VOCABULARY, changed_entries, state, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from fnsft_trl import FNSFTError, NeuronTunerConfig, find_neuron_sites
from fnsft_trl.neurons.sites import SITES
from fnsft_trl.tuner.held import HeldWeights


NEURONS = {"0": "0-4,9", "2": "3"}


@pytest.fixture
def ids():
    return torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


def wrap(family, site="mlp_intermediate", neurons=NEURONS):
    return get_peft_model(tiny_model(family), NeuronTunerConfig(neurons=neurons, site=site, task_type="CAUSAL_LM"))


def fit(model, ids, steps=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("site", SITES)
def test_untrained_deltas_change_nothing(family, site, ids):
    assert torch.equal(logits(wrap(family, site).eval(), ids), logits(tiny_model(family), ids))


@pytest.mark.parametrize("site", SITES)
def test_trained_parameters_are_the_selected_neurons_and_no_more(family, site):
    model = wrap(family, site)
    expected = 0
    for s in find_neuron_sites(tiny_model(family), kind=site):
        count = {0: 6, 2: 1}.get(s.layer, 0)
        for part in s.layout.slices:
            parameter = getattr(tiny_model(family).get_submodule(part.module_name), part.parameter)
            expected += count * len(part.offsets) * parameter.numel() // parameter.shape[part.dim]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


@pytest.mark.parametrize("site", SITES)
def test_merge_equals_forward_and_unmerge_restores_every_bit(family, site, ids):
    model = fit(wrap(family, site), ids)
    before = state(model)
    adapted = logits(model, ids)
    assert not torch.allclose(adapted, logits(tiny_model(family), ids), atol=1e-3)
    model.merge_adapter(safe_merge=True)
    assert torch.allclose(logits(model, ids), adapted, atol=1e-5)
    model.unmerge_adapter()
    assert changed_entries(before, state(model)) == {}
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged, ids), adapted, atol=1e-5)
    assert changed_entries(state(tiny_model(family)), state(merged))


def test_disabled_adapter_is_the_base_model_even_when_merged(family, ids):
    model = fit(wrap(family), ids)
    base = logits(tiny_model(family), ids)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), base)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), base)


@pytest.mark.parametrize("site", SITES)
def test_save_and_load(family, site, ids, tmp_path):
    model = fit(wrap(family, site), ids)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(family), tmp_path).eval()
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert loaded.peft_config["default"].neurons == NEURONS
    assert not any(p.requires_grad for p in loaded.parameters())
    trainable = PeftModel.from_pretrained(tiny_model(family), tmp_path, is_trainable=True)
    assert any(p.requires_grad for p in trainable.parameters())


def test_transformers_loads_the_adapter_by_itself(ids, tmp_path):
    """AutoModel loads a directory with an adapter; it asks PEFT for the method's name."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, NeuronTunerConfig(neurons=NEURONS, task_type="CAUSAL_LM"))
    fit(model, ids).save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.allclose(logits(loaded, ids), logits(model, ids), atol=1e-6)


def test_two_adapters_of_other_neurons_on_one_model(ids):
    model = wrap("llama", neurons={"0": "0-4"})
    model.add_adapter("other", NeuronTunerConfig(neurons={"1": "7"}, task_type="CAUSAL_LM"))
    fit(model, ids)
    first = logits(model, ids)
    model.set_adapter("other")
    assert torch.equal(logits(model, ids), logits(tiny_model("llama"), ids))
    fit(model, ids)
    assert not torch.equal(logits(model, ids), logits(tiny_model("llama"), ids))
    model.set_adapter("default")
    assert torch.equal(logits(model, ids), first)


def test_a_bfloat16_base_keeps_float32_deltas(ids):
    base = tiny_model("llama").to(torch.bfloat16)
    before = state(base)
    model = fit(get_peft_model(base, NeuronTunerConfig(neurons=NEURONS, task_type="CAUSAL_LM")), ids)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert logits(model, ids).dtype == torch.bfloat16
    after = {name.replace(".base_layer", ""): value for name, value in state(model.get_base_model()).items()}
    assert changed_entries(before, {name: after[name] for name in before}) == {}


def test_a_quantised_base_is_not_touched_and_not_merged(ids):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(mlp_bias=True, vocab_size=VOCABULARY, **shape)).eval()
    for block in base.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            layer = getattr(block.mlp, name)
            packed = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, compute_dtype=torch.float32, quant_type="nf4"
            )
            packed.weight = bnb.nn.Params4bit(layer.weight.data.clone(), requires_grad=False, quant_type="nf4")
            packed.bias = torch.nn.Parameter(layer.bias.data.clone())
            setattr(block.mlp, name, packed.to("cpu"))
    # In inference the 4-bit kernel repacks the weights and rounds differently: compare in training mode throughout.
    plain = logits(base.train(), ids)
    model = get_peft_model(base, NeuronTunerConfig(neurons=NEURONS, task_type="CAUSAL_LM"))
    fit(model, ids).train()
    assert not torch.allclose(logits(model, ids), plain, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), plain)
    with pytest.raises(FNSFTError, match="cannot be merged into a Linear4bit"):
        model.merge_adapter()


def test_an_eight_bit_base_is_not_touched_and_not_merged(ids):
    bnb = pytest.importorskip("bitsandbytes")
    base = tiny_model("llama")
    for block in base.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            layer = getattr(block.mlp, name)
            packed = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
            packed.load_state_dict(layer.state_dict())
            setattr(block.mlp, name, packed.to("cpu"))
    plain = logits(base.train(), ids)  # the 8-bit kernel, too, rounds otherwise in inference
    before = parameters_of(base)
    model = get_peft_model(base, NeuronTunerConfig(neurons=NEURONS, task_type="CAUSAL_LM"))
    fit(model, ids).train()
    assert not torch.allclose(logits(model, ids), plain, atol=1e-3)
    assert changed_entries(before, base_values(model)) == {}
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), plain)
    with pytest.raises(FNSFTError, match="cannot be merged into a Linear8bitLt"):
        model.merge_adapter()


def test_safe_merge_refuses_broken_deltas_and_leaves_the_weights(ids):
    model = wrap("llama")
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
    before = state(model.get_base_model())
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(safe_merge=True)
    after = state(model.get_base_model())
    base = {name: value for name, value in before.items() if "neuron_delta" not in name}
    assert changed_entries(base, {name: after[name] for name in base}) == {}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"neurons": {}}, "selects no neuron"),
        ({"neurons": {"9": "0"}}, "layers are 0-2"),
        ({"neurons": {"0": "40"}}, "outside 0-39"),
        ({"neurons": NEURONS, "modules_to_save": ["mlp"]}, "its neurons would all train"),
        ({"neurons": NEURONS, "modules_to_save": ["down_proj"]}, "its neurons would all train"),
    ],
)
def test_configs_that_cannot_be_carried_out(config, message):
    with pytest.raises(FNSFTError, match=message):
        get_peft_model(tiny_model("llama"), NeuronTunerConfig(**config))


def test_added_tokens_and_the_head_may_train_beside_the_neurons(ids, tmp_path):
    config = NeuronTunerConfig(
        neurons=NEURONS,
        modules_to_save=["lm_head"],
        trainable_token_indices={"embed_tokens": [5, 6]},
        task_type="CAUSAL_LM",
    )
    model = fit(get_peft_model(tiny_model("llama"), config), ids)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_deepcopy_is_independent(ids):
    model = wrap("llama")
    twin = copy.deepcopy(model)
    fit(model, ids)
    assert torch.equal(logits(twin.eval(), ids), logits(tiny_model("llama"), ids))


def test_lora_on_the_same_model_type_is_unaffected(ids):
    """The tables of PEFT keep their own entries."""
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"])).eval()
    assert torch.equal(logits(model, ids), logits(tiny_model("llama"), ids))


# The two forms: deltas held in the base weight for one product, and deltas added to the output.


def randomize(model, seed=0):
    """Deltas as after training, and every other adapter weight too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "neuron_delta" in name or "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def base_values(model):
    """The base model's parameters as they lie in memory, under their names without adapters."""
    parameters = model.get_base_model().named_parameters()
    values = {name: p.detach().clone() for name, p in parameters if "neuron_delta" not in name and "lora_" not in name}
    return {name.replace(".base_layer", ""): value for name, value in values.items()}


def parameters_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def gradients(model, ids):
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def adapter_of(name):
    """The adapter that a parameter of a delta belongs to."""
    return name.split(".")[-2]


@pytest.fixture
def additive(monkeypatch):
    """Switches all layers to the additive form."""

    def switch():
        monkeypatch.setattr(HeldWeights, "can_hold", lambda *args: False)

    return switch


@pytest.fixture
def held(monkeypatch):
    """The products that are computed in the held form, as they come."""
    hold, products = HeldWeights.hold, []

    def noted(self, writes):
        products.append(len(writes))
        return hold(self, writes)

    monkeypatch.setattr(HeldWeights, "hold", noted)
    return products


@pytest.mark.parametrize("site", SITES)
def test_both_forms_give_the_same_logits_and_gradients(family, site, ids, held, additive):
    model = randomize(wrap(family, site)).train()
    found = logits(model, ids), gradients(model, ids)
    assert held
    model.eval()
    evaluated = logits(model, ids), gradients(model, ids)
    del held[:]
    additive()
    added = logits(model.train(), ids), gradients(model, ids)
    assert not held
    for logits_, gradients_ in (found, evaluated):
        assert torch.allclose(logits_, added[0], atol=1e-4)
        for name, gradient in added[1].items():
            assert torch.allclose(gradients_[name], gradient, atol=1e-4 * gradient.abs().max())


def versions_of(model):
    return {name: p._version for name, p in model.get_base_model().named_parameters() if "neuron_delta" not in name}


@pytest.mark.parametrize("site", SITES)
def test_outside_of_a_product_everyone_finds_the_base_values(family, site, ids, held):
    """Whoever reads bare parameters, at whatever moment: an average of weights, an optimizer, a collective."""
    original = parameters_of(tiny_model(family))
    model = randomize(wrap(family, site)).train()
    versions = versions_of(model)

    def check():
        assert changed_entries(original, base_values(model)) == {}
        assert versions_of(model) == versions

    loss = model(input_ids=ids, labels=ids).loss
    assert held
    check()
    loss.backward()
    check()
    logits(model, ids)
    logits(model.eval(), ids)
    check()
    model.merge_adapter()
    assert changed_entries(original, base_values(model))
    model.unmerge_adapter()
    assert changed_entries(original, base_values(model)) == {}
    assert changed_entries(original, parameters_of(model.unload())) == {}


def test_a_merged_model_computes_what_the_adapter_does(family, ids):
    model = randomize(wrap(family))
    adapted = logits(model.train(), ids), logits(model.eval(), ids)
    model.merge_adapter()
    merged = base_values(model)
    for expected in adapted:
        assert torch.allclose(logits(model, ids), expected, atol=1e-5)
    whole = model.merge_and_unload(safe_merge=True)
    assert changed_entries(merged, parameters_of(whole)) == {}


def test_a_torch_that_does_not_mark_what_fsdp_shards_is_not_written_to(ids, monkeypatch, held):
    """Of several processes, any weight may then be a gathered copy."""
    model = randomize(wrap("llama")).train()
    monkeypatch.setattr("fnsft_trl.compat.torch._fsdp_marks_modules", lambda: False)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    result = logits(model, ids)
    assert not held
    with pytest.raises(FNSFTError, match="cannot be merged into sharded weights"):
        model.merge_adapter()
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    assert torch.allclose(logits(model, ids), result, atol=1e-5)
    assert held


# Ways to change deltas of which some leave no trace in the version counters: averages of weights, optimizers.
WRITES = {
    "data, in place": lambda delta: delta.data.mul_(0.5),
    "data, copied": lambda delta: delta.data.copy_(delta.data * 2),
    "data, replaced": lambda delta: setattr(delta, "data", delta.data + 0.1),
    "detached": lambda delta: delta.detach().mul_(0.5),
    "numpy": lambda delta: delta.detach().numpy().__imul__(2),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("how", WRITES)
def test_deltas_are_read_in_every_forward_pass(how, training, ids):
    model = randomize(wrap("llama")).train(training)
    for _ in range(2):
        before = logits(model, ids)
        for parameter in model.parameters():
            if parameter.requires_grad:
                WRITES[how](parameter)
        after = logits(model, ids)
        assert not torch.equal(after, before)
        fresh = wrap("llama").train(training)
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(logits(fresh, ids), after)


@pytest.mark.parametrize("is_before", [True, False])
def test_an_average_of_the_model_is_the_model_with_the_average_of_its_deltas(is_before, ids):
    """torch copies the model, and then averages all parameters as they lie in memory."""
    model = randomize(wrap("llama")).train()
    if not is_before:
        gradients(model, ids)
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        for name, parameter in model.named_parameters():
            sums[name] += parameter.detach() / 3
    twin = wrap("llama").eval()
    twin.load_state_dict({**twin.state_dict(), **sums})
    assert torch.allclose(logits(average.eval(), ids), logits(twin, ids), atol=1e-5)


def _optimizers():
    """Every optimizer of TrainingArguments that can be made here from parameters alone."""
    for name in OptimizerNames:
        try:
            arguments = TrainingArguments(output_dir="unused", optim=name, use_cpu=True, learning_rate=1e-2)
            make, options = Trainer.get_optimizer_cls_and_kwargs(arguments, torch.nn.Linear(1, 1))
            make([torch.nn.Parameter(torch.ones(2, 2))], **options)
        except (ImportError, ValueError, RuntimeError, TypeError):
            continue
        if not options.get("optimizer_dict"):
            yield pytest.param(make, options, id=name.value)


@pytest.mark.parametrize(("make", "options"), _optimizers())
def test_every_step_of_every_optimizer_is_seen_and_moves_nothing_else(make, options, ids):
    """In training mode and in evaluation mode; some optimizers leave no trace in the parameters they change."""
    original = parameters_of(tiny_model("llama"))
    model = randomize(wrap("llama"))
    optimizer = make([p for p in model.parameters() if p.requires_grad], **options)
    twin = wrap("llama")
    for training in (True, False):
        model.train(training)
        before = logits(model, ids)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after = logits(model, ids)
        assert not torch.equal(after, before)
        twin.train(training).load_state_dict(model.state_dict())
        assert torch.equal(logits(twin, ids), after)
    assert changed_entries(original, base_values(model)) == {}


def test_adapters_may_be_switched_off_between_forward_and_backward(ids):
    """The way of a preference loss: the reference model is the same model without its adapter."""
    model = randomize(wrap("llama")).train()
    expected = gradients(model, ids)
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    with model.disable_adapter():
        reference = model(input_ids=ids).logits
    assert torch.equal(reference, logits(tiny_model("llama"), ids))
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert changed_entries(expected, found) == {}


@pytest.mark.parametrize("training", [True, False])
def test_a_gradient_through_the_disabled_model_is_the_base_models(training, ids):
    model = randomize(wrap("llama")).train(training)
    embedded = tiny_model("llama").get_input_embeddings()(ids).detach().requires_grad_(True)
    with model.disable_adapter():
        off = model(inputs_embeds=embedded).logits
    model.train()(inputs_embeds=embedded.detach()).logits.sum().backward()  # writes the deltas into the weights
    (gradient,) = torch.autograd.grad(off.square().sum(), embedded)
    base = tiny_model("llama")
    (expected,) = torch.autograd.grad(base(inputs_embeds=embedded).logits.square().sum(), embedded)
    assert torch.equal(gradient, expected)


def merge(model):
    model.merge_adapter()


@torch.no_grad()
def step(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.mul_(2)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", [merge, step])
def test_weights_or_deltas_changed_between_forward_and_backward_are_an_error(change, training, ids):
    model = randomize(wrap("llama")).train(training)
    loss = model(input_ids=ids, labels=ids).loss
    change(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("names", [["default"], ["other"], ["default", "other"], []])
def test_other_adapters_may_be_active_between_forward_and_backward(names, ids):
    model = several().train()
    model.set_adapter("default")
    expected = gradients(model, ids)
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    model.base_model.set_adapter(names)
    logits(model, ids)
    model.set_adapter("default")
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert changed_entries(expected, found) == {}


def test_copies_of_data_parallel_are_refused():
    layer = wrap("llama").get_base_model().model.layers[0].mlp.up_proj
    with pytest.raises(FNSFTError, match="one process for each device"):
        layer._replicate_for_data_parallel()  # DataParallel calls it on every module


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(family, reentrant, ids):
    model = randomize(wrap(family)).train()
    expected = gradients(model, ids)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert changed_entries(expected, gradients(model, ids)) == {}


@pytest.mark.slow
def test_compiled_without_a_graph_break_and_in_turn_with_the_plain_model(ids):
    model = randomize(wrap("llama")).train()
    expected, expected_gradients = logits(model, ids), gradients(model, ids)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.allclose(logits(compiled, ids), expected, atol=1e-5)
    assert not torch._dynamo.utils.counters["graph_break"]
    for _ in range(2):
        assert torch.equal(logits(model, ids), expected)
        assert torch.allclose(logits(compiled, ids), expected, atol=1e-5)
    for name, gradient in gradients(compiled, ids).items():
        expected_gradient = expected_gradients[name.removeprefix("_orig_mod.")]
        assert torch.allclose(gradient, expected_gradient, atol=1e-4 * expected_gradient.abs().max())


def test_inference_mode_leaves_a_model_that_still_trains(ids):
    model = randomize(wrap("llama")).train()
    expected = gradients(copy.deepcopy(model), ids)
    with torch.inference_mode():
        model(input_ids=ids)
        model.eval()(input_ids=ids)
    assert changed_entries(expected, gradients(model.train(), ids)) == {}


@pytest.mark.parametrize("training", [True, False])
def test_copies_and_casts_of_a_model_that_has_run(training, ids, tmp_path):
    original = parameters_of(tiny_model("llama"))
    model = randomize(wrap("llama")).train(training)
    expected = logits(model, ids)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, ids), expected)
    assert changed_entries(original, base_values(twin)) == {}
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(logits(torch.load(tmp_path / "model.pt", weights_only=False), ids), expected)
    for merged in (False, True):
        twin = copy.deepcopy(model)
        if merged:
            twin.merge_adapter()
        twin.double()
        assert torch.allclose(logits(twin, ids), expected.double(), atol=1e-5)
        twin.unmerge_adapter()
        assert changed_entries({n: v.double() for n, v in original.items()}, base_values(twin)) == {}


def test_new_base_weights_loaded_into_a_model_that_has_run(ids):
    model, other = randomize(wrap("llama")).eval(), tiny_model("llama", seed=5)
    logits(model, ids)
    names = {name.replace(".base_layer", ""): name for name in model.get_base_model().state_dict()}
    values = {names[name]: value for name, value in other.state_dict().items()}
    model.get_base_model().load_state_dict(values, strict=False)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(other, ids))
    expected = get_peft_model(other, NeuronTunerConfig(neurons=NEURONS, task_type="CAUSAL_LM"))
    assert torch.equal(logits(model, ids), logits(randomize(expected).eval(), ids))


def saved_bytes(model, ids):
    """Bytes of all distinct tensors kept for the backward pass that are not parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # keeps it alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, labels=ids).loss.backward()
    return sum(size for size, _ in kept.values())


def test_memory_is_that_of_the_selection(ids):
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **shape))
    ids = ids.repeat(4, 4)
    modules = ["gate_proj", "up_proj", "down_proj"]
    lora = get_peft_model(copy.deepcopy(base), LoraConfig(r=16, target_modules=modules))
    config = NeuronTunerConfig(neurons={"0": "0-15", "1": "7-22"}, task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), config)
    assert saved_bytes(model, ids) < saved_bytes(lora, ids)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    optimizer.step()
    trained = 2 * 16 * 3 * 64 * 4  # layers, neurons, matrices, weights of a neuron in each, bytes
    held = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    held += sum(v.nbytes for entry in optimizer.state.values() for v in entry.values())
    assert held <= 1.05 * 3 * trained


def test_a_second_derivative_is_refused(ids):
    model = wrap("llama")
    loss = model(input_ids=ids, labels=ids).loss
    trained = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(loss, trained, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(g.sum() for g in first).backward()


# Several adapters


def several(family="llama", first=None, second=None, site="mlp_intermediate"):
    """A model with the adapters `default` and `other`, both with random deltas."""
    model = wrap(family, site, neurons=first or {"0": "0-4", "1": "2-9"})
    second = second or {"0": "7", "1": "8-12", "2": "1"}
    model.add_adapter("other", NeuronTunerConfig(neurons=second, site=site, task_type="CAUSAL_LM"))
    return randomize(model).eval()


@pytest.mark.parametrize("site", SITES)
def test_adapters_active_together_add_up(family, site, ids, additive):
    """They share neurons in layer 1, none in layer 0, and only one has any in layer 2."""
    model = several(family, site=site).train()
    model.base_model.set_adapter(["default", "other"])
    together, found = logits(model, ids), gradients(model, ids)
    assert {adapter_of(name) for name in found} == {"default", "other"}
    model.merge_adapter()
    assert torch.allclose(logits(model, ids), together, atol=1e-5)
    model.unmerge_adapter()
    assert changed_entries(parameters_of(tiny_model(family)), base_values(model)) == {}
    additive()
    assert torch.allclose(logits(model, ids), together, atol=1e-4)
    for name, gradient in gradients(model, ids).items():
        assert torch.allclose(found[name], gradient, atol=1e-4 * gradient.abs().max())


def test_merging_one_after_the_other(ids):
    model = several()
    model.base_model.set_adapter(["default", "other"])
    together = logits(model, ids)
    model.merge_adapter(["default"])
    model.merge_adapter(["other"], safe_merge=True)
    assert torch.allclose(logits(model, ids), together, atol=1e-5)
    with torch.no_grad():
        model.get_base_model().model.layers[0].mlp.up_proj.neuron_delta_weight["other"].values.fill_(float("inf"))
    model.unmerge_adapter()
    model.set_adapter("default")
    alone = logits(model, ids)
    model.merge_adapter(["default"])
    with pytest.raises(ValueError, match="adapter other"):
        model.merge_adapter(["other"], safe_merge=True)
    model.unmerge_adapter()
    assert torch.equal(logits(model, ids), alone)


def test_switching_and_deleting_adapters(ids):
    model = several()
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = logits(model, ids)
    assert not torch.equal(alone["default"], alone["other"])
    model.set_adapter("default")
    assert torch.equal(logits(model, ids), alone["default"])
    model.delete_adapter("default")
    assert list(model.peft_config) == ["other"]
    assert torch.equal(logits(model, ids), alone["other"])
    assert not any(".default" in name for name in model.state_dict())
    model.delete_adapter("other")
    assert torch.equal(logits(model.base_model, ids), logits(tiny_model("llama"), ids))


def test_an_inactive_adapter_deleted_leaves_the_active_one(ids):
    model = several()
    before = logits(model, ids)
    model.delete_adapter("other")
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("names", [["default", "other"], ["other"]])
def test_only_active_adapters_train(names, ids):
    model = several()
    model.base_model.set_adapter(names)
    before = parameters_of(model)
    fit(model, ids)
    changed = changed_entries(before, parameters_of(model))
    assert {adapter_of(name) for name in changed} == set(names)


def test_each_adapter_is_saved_alone_and_reloads(ids, tmp_path):
    model = several()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    loaded.load_adapter(tmp_path / "other", "other")
    for name in ("default", "other"):
        model.set_adapter(name)
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded.eval(), ids), logits(model, ids))
    lean = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "other", low_cpu_mem_usage=True)
    assert torch.equal(logits(lean.eval(), ids), logits(model, ids))


def test_weighted_combination(family, ids):
    model = several(family)
    model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "neuron_delta" in name and adapter_of(name) != "sum":
                parameter.mul_(0.5 if adapter_of(name) == "default" else -2.0)
    model.base_model.set_adapter(["default", "other"])
    expected = logits(model, ids)
    model.set_adapter("sum")
    assert torch.allclose(logits(model, ids), expected, atol=1e-5)
    assert model.peft_config["sum"].neurons == {"0": "0-4,7", "1": "2-12", "2": "1"}


def test_a_weighted_combination_on_a_half_precision_base_is_not_rounded():
    base = tiny_model("llama").to(torch.bfloat16)
    model = randomize(get_peft_model(base, NeuronTunerConfig(neurons=NEURONS, task_type="CAUSAL_LM")))
    model.add_weighted_adapter(["default"], [1.0], "same")
    deltas = {name: p for name, p in model.named_parameters() if "neuron_delta" in name}
    for name, delta in deltas.items():
        if adapter_of(name) == "default":
            assert torch.equal(deltas[name.replace(".default.", ".same.")], delta)


def test_one_batch_with_several_adapters_is_refused(ids):
    with pytest.raises(FNSFTError, match="one batch for each adapter"):
        several()(input_ids=ids, adapter_names=["default", "other"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["default"], [1.0, 2.0], "sum"), "one weight for each"),
        ((["default", "nobody"], [1.0, 1.0], "sum"), "no adapter 'nobody'"),
        ((["default"], [1.0], "other"), "already"),
        ((["default"], [1.0], "sum", "svd"), "unknown"),
        ((["default", "tokens"], [1.0, 1.0], "sum"), "'tokens' trains more than neurons"),
    ],
)
def test_combinations_that_cannot_be_carried_out(arguments, message):
    model = several()
    model.add_adapter("tokens", NeuronTunerConfig(neurons=NEURONS, trainable_token_indices={"embed_tokens": [5]}))
    with pytest.raises(FNSFTError, match=message):
        model.add_weighted_adapter(*arguments)


def test_adapters_of_two_sites_are_refused():
    model = wrap("llama")
    with pytest.raises(FNSFTError, match="must have one site"):
        model.add_adapter("other", NeuronTunerConfig(neurons=NEURONS, site="mlp_output"))


# LoRA on attention beside the deltas


ATTENTION = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def with_lora(neurons=NEURONS):
    torch.manual_seed(0)
    config = NeuronTunerConfig(neurons=neurons, lora=ATTENTION, task_type="CAUSAL_LM")
    return get_peft_model(tiny_model("llama"), config)


def test_lora_beside_the_deltas_trains_and_nothing_else_does(ids):
    original = parameters_of(tiny_model("llama"))
    model = fit(with_lora(), ids)
    assert changed_entries(original, base_values(model)) == {}
    adapted = logits(model, ids)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(tiny_model("llama"), ids))
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged, ids), adapted, atol=1e-5)
    changed = {name for name in changed_entries(original, parameters_of(merged)) if ".mlp." not in name}
    assert changed == {f"model.layers.{i}.self_attn.{m}_proj.weight" for i in range(3) for m in "qv"}


def test_lora_beside_the_deltas_is_saved_switched_and_deleted_with_them(ids, tmp_path):
    model = fit(with_lora(), ids)
    adapted = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
    assert torch.equal(logits(loaded, ids), adapted)
    loaded.add_adapter("other", NeuronTunerConfig(neurons={"1": "3"}, task_type="CAUSAL_LM"))
    loaded.set_adapter("other")
    assert torch.equal(logits(loaded, ids), logits(tiny_model("llama"), ids))
    loaded.set_adapter("default")
    assert torch.equal(logits(loaded, ids), adapted)
    loaded.delete_adapter("default")
    assert torch.equal(logits(loaded, ids), logits(tiny_model("llama"), ids))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"r": 4}, "needs target_modules"),
        ({"rank": 4, "target_modules": ["q_proj"]}, "no arguments of a LoraConfig"),
        ({"target_modules": ["q_proj", "up_proj"]}, "up_proj, a part of an MLP"),
        ({"target_modules": "all-linear"}, "needs target_modules by name"),
        ({"target_modules": ["nothing"]}, "match no linear layer"),
        ({"target_modules": ["q_proj"], "bias": "all"}, "sets bias, which reaches beyond"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "sets modules_to_save"),
        ({"target_modules": ["q_proj"], "init_lora_weights": "pissa_niter_4"}, "changes the base weights"),
        ({"target_modules": ["q_proj"], "alora_invocation_tokens": [3]}, "have no effect beside"),
    ],
)
def test_lora_beside_the_deltas_that_is_refused(lora, message):
    with pytest.raises(FNSFTError, match=message):
        get_peft_model(tiny_model("llama"), NeuronTunerConfig(neurons=NEURONS, lora=lora))
