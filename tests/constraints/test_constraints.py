import pytest
import torch
from helpers import VOCABULARY, changed_entries, state, tiny_model
from peft import LoraConfig, get_peft_model

from fnsft_trl import FNSFTError, NeuronMask, constrain_full, constrain_lora, find_neuron_sites
from fnsft_trl.constraints import set_lora_targets, trainable_neurons


def mask(share=0.3, seed=0, site="mlp_intermediate", family="llama"):
    generator = torch.Generator().manual_seed(seed)
    sites = find_neuron_sites(tiny_model(family), kind=site)
    return NeuronMask({s.layer: torch.rand(s.width, generator=generator) < share for s in sites}, site)


def test_a_change_that_half_precision_cannot_multiply_is_one():
    """Entries of 2e-5, whose products are 0 in float16, though not in a model that computes in float32."""
    lora = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["up_proj"])
    model = get_peft_model(tiny_model("llama").half(), lora, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.dtype == torch.float16
            parameter.data.fill_(2e-5)
    with pytest.raises(FNSFTError, match="already changes neurons"):
        constrain_lora(model, mask())


def batch():
    return torch.randint(3, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(2))


OPTIMIZERS = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.3),
    "sgd with momentum": lambda params: torch.optim.SGD(params, lr=1e-1, momentum=0.9, weight_decay=0.1),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=1e-1, weight_decay=0.1),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=1e-2, weight_decay=0.1),
    "nadam": lambda params: torch.optim.NAdam(params, lr=1e-2, weight_decay=0.1),
    "lion-like sign": lambda params: torch.optim.Rprop(params, lr=1e-2),
    "adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-1, weight_decay=0.1),
}


def frozen_entries(model, trainable):
    """Parameter name -> bool tensor of the entries that must not change."""
    frozen = {}
    for site in find_neuron_sites(model, kind=trainable.site):
        for part in site.layout.slices:
            name = f"{part.module_name}.{part.parameter}"
            entries = torch.zeros_like(model.get_parameter(name), dtype=torch.bool)
            frozen[name] = entries.index_fill_(part.dim, part.indices((~trainable).indices(site.layer)), True)
    return frozen


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_full_training_holds_under_every_optimizer(family, optimizer):
    model = tiny_model(family)
    trainable = mask(family=family)
    held = constrain_full(model, trainable, train_other=True)
    before = state(model)
    optimizer = OPTIMIZERS[optimizer](list(model.parameters()))
    held.attach(optimizer)
    for _ in range(4):
        for _ in range(2):  # accumulation
            model(input_ids=batch(), labels=batch()).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    changed = changed_entries(before, state(model))
    for name, frozen in frozen_entries(tiny_model(family), trainable).items():
        assert not (changed[name] & frozen).any()
        assert changed[name][~frozen].any()


def test_frozen_gradients_do_not_count_in_the_norm():
    model = tiny_model("llama")
    trainable = mask()
    constrain_full(model, trainable, train_other=False)
    model(input_ids=batch(), labels=batch()).loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])

    plain = tiny_model("llama")
    plain(input_ids=batch(), labels=batch()).loss.backward()
    squares = 0
    for name, frozen in frozen_entries(plain, trainable).items():
        squares += plain.get_parameter(name).grad[~frozen].square().sum()
    assert norm == pytest.approx(float(squares) ** 0.5, rel=1e-5)


def test_restoring_is_what_holds_against_weight_decay():
    """The control: with masked gradients alone, weight decay moves the frozen slices."""
    model = tiny_model("llama")
    constrain_full(model, mask(), train_other=False)
    before = state(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.3)
    model(input_ids=batch(), labels=batch()).loss.backward()
    optimizer.step()
    frozen = frozen_entries(tiny_model("llama"), mask())["model.layers.0.mlp.up_proj.weight"]
    changed = changed_entries(before, state(model))["model.layers.0.mlp.up_proj.weight"]
    assert (changed & frozen).any()


@pytest.mark.parametrize("site", ["mlp_intermediate", "mlp_output"])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}], ids=str)
def test_lora_held_to_a_mask(family, site, settings):
    trainable = mask(site=site, family=family)
    config = LoraConfig(r=4, **settings)
    base = tiny_model(family)
    set_lora_targets(config, base, trainable)
    model = get_peft_model(base, config)
    before = state(tiny_model(family))
    constrain_lora(model, trainable)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.3)
    for _ in range(4):
        model(input_ids=batch(), labels=batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = changed_entries(before, state(model.merge_and_unload()))
    assert changed
    for name, frozen in frozen_entries(tiny_model(family), trainable).items():
        if name in changed:
            assert not (changed[name] & frozen).any()
            assert changed[name][~frozen].all()


def test_lora_without_the_masks_moves_frozen_neurons():
    trainable = mask()
    config = LoraConfig(r=4)
    base = tiny_model("llama")
    set_lora_targets(config, base, trainable)
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(input_ids=batch(), labels=batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = changed_entries(state(tiny_model("llama")), state(model.merge_and_unload()))
    frozen = frozen_entries(tiny_model("llama"), trainable)
    assert all((changed[name] & frozen[name]).any() for name in changed if name.endswith("weight"))


def test_layers_without_trainable_neurons_get_no_adapter():
    trainable = trainable_neurons(tiny_model("llama"), NeuronMask({1: torch.ones(40, dtype=torch.bool)}), "selected")
    config = LoraConfig(r=2)
    set_lora_targets(config, tiny_model("llama"), trainable)
    assert all(".layers.1." in name for name in config.target_modules)


def test_trainable_neurons_span_all_layers():
    model = tiny_model("llama")
    one = NeuronMask({1: torch.arange(40) < 4})
    assert trainable_neurons(model, one, "selected").count == 4
    assert trainable_neurons(model, one, "unselected").count == 116
    assert trainable_neurons(model, one, "all").count == 120
    empty = NeuronMask({1: torch.zeros(40, dtype=torch.bool)})
    for train in ("selected", "unselected"):
        with pytest.raises(FNSFTError, match="train_neurons"):
            trainable_neurons(model, empty, train)


def test_a_mask_from_another_model_is_refused():
    """One of other widths, and one of more layers."""
    wider = NeuronMask({layer: torch.ones(48, dtype=torch.bool) for layer in range(3)})
    longer = NeuronMask({layer: torch.ones(40, dtype=torch.bool) for layer in range(4)})
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["up_proj"]))
    before = state(adapted)
    for other in (wider, longer):
        for attempt in (
            lambda other=other: trainable_neurons(tiny_model("llama"), other, "selected"),
            lambda other=other: constrain_lora(adapted, other),
            lambda other=other: constrain_full(tiny_model("llama"), other, train_other=False),
        ):
            with pytest.raises(FNSFTError, match="made for another model"):
                attempt()
    assert changed_entries(before, state(adapted)) == {}


def test_an_adapter_in_other_layers_than_the_trainable_neurons_is_refused():
    targets = r".*layers\.0\.mlp\.(up|down)_proj"
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=targets))
    last_layer = NeuronMask({2: torch.ones(40, dtype=torch.bool)})
    with pytest.raises(FNSFTError, match="no trainable neuron lies in a layer that adapter 'default' adapts"):
        constrain_lora(model, last_layer)


def test_quantised_weights_cannot_be_fully_trained():
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj = bnb.nn.Linear4bit(16, 40, quant_type="nf4").to("cpu")
    with pytest.raises(FNSFTError, match=r"layers\.1\.mlp\.up_proj is quantised"):
        constrain_full(model, mask(), train_other=False)


def test_lora_on_a_quantised_base_is_held_too():
    bnb = pytest.importorskip("bitsandbytes")
    base = tiny_model("llama")
    for block in base.model.layers:
        packed = bnb.nn.Linear4bit(16, 40, compute_dtype=torch.float32, quant_type="nf4", bias=False)
        block.mlp.up_proj = packed.to("cpu")
    trainable = mask()
    config = LoraConfig(r=4)
    set_lora_targets(config, base, trainable)
    model = get_peft_model(base, config)
    constrain_lora(model, trainable)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.3)
    for _ in range(3):
        model(input_ids=batch(), labels=batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer, block in enumerate(model.base_model.model.model.layers):
        rows = block.mlp.up_proj.lora_B["default"].weight
        columns = block.mlp.down_proj.lora_A["default"].weight
        assert not rows[(~trainable).indices(layer)].any()
        assert rows[trainable.indices(layer)].any(1).all()
        assert not columns[:, (~trainable).indices(layer)].any()
