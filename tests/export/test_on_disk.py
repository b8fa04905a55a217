"""Merging weight by weight, where the weights are in memory and where they are loaded for each use."""

import pytest
import torch
from accelerate import cpu_offload
from accelerate.utils.modeling import get_state_dict_offloaded_model
from helpers import offloading, tiny_model
from peft import LoraConfig, get_peft_model

from fnsft_trl import FNSFTError, NeuronTunerConfig
from fnsft_trl.export import to_merged
from fnsft_trl.export.on_disk import merge_on_disk


ADAPTERS = {
    "lora": LoraConfig(r=2, target_modules=["up_proj", "down_proj"], task_type="CAUSAL_LM"),
    "deltas": NeuronTunerConfig(neurons={"0": "0-4,9", "2": "3"}, task_type="CAUSAL_LM"),
}


def adapted(name: str, last: float = 0.5):
    """A model with an adapter, of whose last tensor all entries have a value."""
    model = get_peft_model(tiny_model("llama"), ADAPTERS[name])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data.fill_(0.25)
    trained[-1].data.fill_(last)
    return model


def offloaded(model):
    """As a device map leaves it that puts weights on the CPU for an accelerator: loaded for each use."""
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    return model


@pytest.mark.parametrize("name", ADAPTERS)
def test_offloaded_weights_merge_to_what_others_do(name, tmp_path):
    base, expected = tiny_model("llama").state_dict(), merge_on_disk(adapted(name), tmp_path).state_dict()
    found = get_state_dict_offloaded_model(merge_on_disk(offloaded(adapted(name)), tmp_path))
    assert any(not torch.equal(expected[key], base[key]) for key in base)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("place", [adapted, lambda *given: offloaded(adapted(*given))], ids=["memory", "offloaded"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_what_peft_refuses_to_merge_is_told(name, place, tmp_path):
    with pytest.raises(FNSFTError, match=r"the adapter does not merge: .*broken.*; train it again"):
        merge_on_disk(place(name, torch.nan), tmp_path)


def test_no_adapter_is_put_on_weights_that_the_disk_holds(tmp_path, tokenizer, monkeypatch):
    """PEFT would copy them into the working directory."""
    monkeypatch.chdir(tmp_path)
    tiny_model("llama").save_pretrained("base")
    tokenizer.save_pretrained("base")
    model = adapted("lora")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained("adapter")
    before = {path for path in tmp_path.rglob("*") if "offload" not in path.parts}
    with pytest.raises(FNSFTError, match=r"base is partly offloaded to the disk .*; leave device_map out"):
        to_merged(tmp_path / "adapter", tmp_path / "out", **offloading(tmp_path))
    assert {path for path in tmp_path.rglob("*") if "offload" not in path.parts} == before
