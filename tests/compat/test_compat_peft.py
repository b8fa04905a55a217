"""The parts of PEFT that have no public name are there, and do what is relied on."""

import inspect

import pytest
import torch
import transformers
from helpers import medium_experts, tiny_model
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import transformers_weight_conversion as conversion
from torch import nn
from transformers.core_model_loading import WeightRenaming, rename_source_key

from fnsft_trl.compat import peft as compat


def lora(**settings) -> PeftModel:
    return get_peft_model(tiny_model("llama"), LoraConfig(**{"r": 2, "target_modules": ["up_proj"], **settings}))


@pytest.fixture
def tables():
    """PEFT's tables, put back afterwards."""
    kept = [
        (table, dict(table))
        for table in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)
    ]
    yield
    for table, entries in kept:
        table.clear()
        table.update(entries)


def test_peft_finds_a_method_that_add_method_has_added(tables, tmp_path):
    class OtherConfig(LoraConfig):
        def __post_init__(self) -> None:
            super().__post_init__()
            self.peft_type = "OTHER_LORA"

    class OtherModel(type(lora().base_model)):
        pass

    compat.add_method("OTHER_LORA", OtherConfig, OtherModel)
    model = get_peft_model(tiny_model("llama"), OtherConfig(r=2, target_modules=["up_proj"]))
    assert type(model.base_model) is OtherModel
    model.save_pretrained(tmp_path)
    assert type(PeftConfig.from_pretrained(str(tmp_path))) is OtherConfig
    assert type(PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path)).base_model) is OtherModel


def test_transformers_loader_asks_peft_how_names_of_files_become_names_of_a_model(tables, monkeypatch):
    class OtherModel(type(lora().base_model)):
        prefix = "other_"

    mapping = "peft.utils.transformers_weight_conversion.build_peft_weight_mapping"
    monkeypatch.setattr(mapping, conversion.build_peft_weight_mapping)  # put back afterwards
    compat.add_method("OTHER", LoraConfig, OtherModel, ending=".values")
    assert "import build_peft_weight_mapping" in inspect.getsource(transformers.PreTrainedModel.load_adapter)
    config = LoraConfig()
    names = ["base_model.model.x.other_weight", "base_model.model.x.lora_A.weight", "base_model.model.other.weight"]
    own = [WeightRenaming("nothing", "nothing")]
    found = {}
    for kind in ("OTHER", "LORA"):
        config.peft_type = kind
        renamings = conversion.build_peft_weight_mapping(own, "name", peft_config=config)
        found[kind] = [rename_source_key(name, renamings, [])[0] for name in names]
    assert found["OTHER"] == ["x.other_weight.name.values", "x.lora_A.name.weight", "other.weight"]
    assert found["LORA"] == ["x.other_weight", "x.lora_A.name.weight", "other.weight"]


def test_peft_buffer_dict_moves_with_its_module_and_is_not_saved():
    module = nn.Module()
    module.positions = compat.BufferDict({}, persistent=False)
    module.positions["default"] = torch.arange(3)
    assert module.to("meta").positions["default"].device.type == "meta"
    assert module.state_dict() == {}


def test_peft_lora_layer_has_its_factors_by_adapter():
    layer = lora().get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    assert isinstance(layer, compat.LoraLayer)
    assert layer.lora_A["default"].weight.shape == (2, 16)
    assert layer.lora_B["default"].weight.shape == (40, 2)


def test_peft_lora_layer_has_magnitudes_of_dora_that_tell_a_norm():
    layer = lora(use_dora=True).get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    weight = layer.get_base_layer().weight
    dora = layer.lora_magnitude_vector["default"]
    assert torch.equal(dora.get_weight_norm(weight, torch.zeros_like(weight), 1), dora.weight)


def test_peft_param_wrapper_wraps_a_parameter_of_experts():
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj", "experts.gate_up_proj"])
    outer = get_peft_model(medium_experts(), config).get_submodule("base_model.model.model.layers.0.mlp.experts")
    inner = outer.base_layer
    assert isinstance(outer, compat.ParamWrapper)
    assert isinstance(inner, compat.ParamWrapper)
    assert {outer.parameter_name, inner.parameter_name} == {"down_proj", "gate_up_proj"}
    assert outer.num_experts == 3
    assert outer.get_base_layer() is inner.base_layer
    down = outer if outer.parameter_name == "down_proj" else inner
    assert down.lora_A["default"].weight.shape == (2 * 3, 32)
    assert down.lora_B["default"].weight.shape == (64, 2 * 3)


def test_peft_base_tuner_is_a_method_and_base_tuner_layer_one_of_its_layers():
    model = lora()
    assert isinstance(model.base_model, compat.BaseTuner)
    assert isinstance(model.get_submodule("base_model.model.model.layers.0.mlp.up_proj"), compat.BaseTunerLayer)


def test_peft_check_adapters_to_merge_names_those_that_are_not_merged():
    layer = lora().get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    assert compat.check_adapters_to_merge(layer, None) == ["default"]
    layer.merge()
    assert compat.check_adapters_to_merge(layer, ["default"]) == []


def test_peft_check_target_module_exists_matches_the_ends_of_names():
    config = LoraConfig(target_modules=["up_proj"])
    assert compat.check_target_module_exists(config, "model.layers.0.mlp.up_proj")
    assert not compat.check_target_module_exists(config, "model.layers.0.mlp.down_proj")


def test_peft_inject_beside_leaves_what_is_noted_on_the_model():
    model = tiny_model("llama")
    config = LoraConfig(r=2, target_modules=["q_proj"])
    compat.inject_beside(config, model, "default")
    assert "peft_config" not in vars(model)
    assert isinstance(model.get_submodule("model.layers.0.self_attn.q_proj"), compat.LoraLayer)
    model.peft_config = noted = {"default": "of another method"}
    compat.inject_beside(config, model, "second")
    assert model.peft_config is noted == {"default": "of another method"}
    assert set(model.get_submodule("model.layers.0.self_attn.q_proj").lora_A) == {"default", "second"}
    with pytest.raises(ValueError, match="not found"):
        compat.inject_beside(LoraConfig(target_modules=["no_such"]), model, "third")
    assert model.peft_config is noted


def test_peft_has_lora_targets_for_llama():
    assert compat.has_lora_targets("llama")
    assert not compat.has_lora_targets("no such model")


def test_peft_dequantize_module_weight_returns_a_plain_weight_as_it_is():
    layer = nn.Linear(2, 2)
    assert compat.dequantize_module_weight(layer) is layer.weight


def test_peft_dequantize_module_weight_unpacks_four_bits():
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 32, bias=False, quant_type="nf4").to("cpu")
    weight = compat.dequantize_module_weight(layer)
    assert weight.shape == (32, 64)
    assert weight.is_floating_point()


def test_peft_get_pattern_key_finds_the_entry_of_a_module():
    assert compat.get_pattern_key({"v_proj": 4, "q_proj": 8}, "model.layers.0.self_attn.q_proj") == "q_proj"
    assert compat.get_pattern_key({"v_proj": 4}, "model.layers.0.mlp.up_proj") == "model.layers.0.mlp.up_proj"
