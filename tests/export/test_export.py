import json
import subprocess
import sys

import pytest
import torch
from helpers import FAMILIES, VOCABULARY, logits, state, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from fnsft_trl import FNSFTError, NeuronMask, NeuronTunerConfig, find_neuron_sites, to_plain_lora, verify_merge
from fnsft_trl.cli import main
from fnsft_trl.neurons.sites import SITES


NEURONS = {"0": "0-4,9", "2": "3"}
EXTRAS = {
    "lora": {"lora": {"r": 4, "lora_alpha": 12, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]}},
    "tokens": {"trainable_token_indices": {"embed_tokens": [5, 6]}, "modules_to_save": ["lm_head"]},
}
RELOAD = """
import json, sys, torch
from pathlib import Path
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

root, expected, results = Path(sys.argv[1]), load_file(sys.argv[1] + "/expected.safetensors"), {}
ids = expected.pop("ids")
for name, logits in expected.items():
    base = AutoModelForCausalLM.from_pretrained(root / name.split(".")[0])
    model = PeftModel.from_pretrained(base, root / (name + ".plain")).eval()
    with torch.no_grad():
        apart = model(ids).logits
        with model.disable_adapter():
            change = float((apart - model(ids).logits).abs().max())
        merged = model.merge_and_unload()(ids).logits
    results[name] = [float((apart - logits).abs().max()), float((merged - logits).abs().max()), change]
assert "fnsft_trl" not in sys.modules
print(json.dumps(results))
"""


def trained(base, **config):
    """An adapter with random weights on a base model."""
    model = get_peft_model(base, NeuronTunerConfig(neurons=NEURONS, task_type="CAUSAL_LM", **config)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Base models, adapters on each, and what they compute; `NAME.FAMILY` holds an adapter, `.plain` its export."""
    root = tmp_path_factory.mktemp("export")
    expected = {"ids": torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))}
    cases = [(family, site, {"site": site}) for family in FAMILIES for site in SITES]
    gpt2 = {"lora": {**EXTRAS["lora"]["lora"], "target_modules": ["c_attn"]}}
    cases += [("gpt2", "lora", gpt2), ("llama", "tokens", EXTRAS["tokens"])]
    for family, name, config in cases:
        if not (root / family).exists():
            tiny_model(family).save_pretrained(root / family)
        base = type(tiny_model(family)).from_pretrained(root / family)
        model = trained(base, **config)
        expected[f"{family}.{name}"] = logits(model, expected["ids"]).clone()
        model.save_pretrained(root / f"{family}.{name}")
        to_plain_lora(root / f"{family}.{name}", root / f"{family}.{name}.plain")
    save_file(expected, root / "expected.safetensors")
    return root


@pytest.mark.slow
def test_plain_lora_loads_in_a_process_without_this_package(root):
    done = subprocess.run([sys.executable, "-c", RELOAD, str(root)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(results) == 2 * len(FAMILIES) + len(EXTRAS)
    for name, (apart, merged, change) in results.items():
        assert apart < 1e-5, name
        assert merged < 1e-5, name
        assert change > 1e-2, name


def test_export_of_a_model_and_of_its_directory_are_the_same(root, tmp_path):
    model = PeftModel.from_pretrained(type(tiny_model("gpt2")).from_pretrained(root / "gpt2"), root / "gpt2.lora")
    logits(model.eval(), torch.ones(1, 3, dtype=torch.long))
    to_plain_lora(model, tmp_path)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / file).read_bytes() == (root / "gpt2.lora.plain" / file).read_bytes()


def test_ranks_are_the_numbers_of_positions(root):
    config = json.loads((root / "phi3.mlp_intermediate.plain" / "adapter_config.json").read_text())
    tensors = load_file(root / "phi3.mlp_intermediate.plain" / "adapter_model.safetensors")
    ranks = {name.split(".layers.")[1]: len(t) for name, t in tensors.items() if "lora_A" in name}
    # 6 and 1 neurons; up and gate of Phi-3 are one matrix
    expected = {"0.mlp.gate_up_proj": 12, "0.mlp.down_proj": 6, "2.mlp.gate_up_proj": 2, "2.mlp.down_proj": 1}
    assert ranks == {f"{name}.lora_A.weight": rank for name, rank in expected.items()}
    assert config["r"] == config["lora_alpha"] == 12
    assert config["rank_pattern"] == config["alpha_pattern"]


@pytest.mark.parametrize(
    ("lora", "message"),
    [({"use_dora": True}, "has use_dora"), ({"lora_bias": True}, "has lora_bias")],
)
def test_lora_variants_that_cannot_go_along(lora, message, tmp_path):
    model = trained(tiny_model("opt"), lora={"r": 2, "target_modules": ["q_proj"], **lora})
    with pytest.raises(FNSFTError, match=message):
        to_plain_lora(model, tmp_path)


def test_only_neuron_deltas_are_exported_as_lora(tmp_path):
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(FNSFTError, match="not one of neuron deltas"):
        to_plain_lora(model, tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.raises(FNSFTError, match="does not name its base model"):
        to_plain_lora(tmp_path, tmp_path / "out")
    with pytest.raises(FNSFTError, match=r"holds no adapter_config\.json"):
        to_plain_lora(tmp_path / "nothing", tmp_path / "out")


# verify_merge


@pytest.fixture
def checkpoints(root):
    """(sites, weights before, weights after a merge)."""
    model = tiny_model("llama")
    adapter = PeftModel.from_pretrained(tiny_model("llama"), root / "llama.mlp_intermediate")
    return find_neuron_sites(model), state(model), state(adapter.merge_and_unload())


def selected(sites, neurons=NEURONS):
    return NeuronMask.from_ranges(neurons, {site.layer: site.width for site in sites}, "mlp_intermediate")


def test_a_faithful_merge_passes_and_gives_the_neurons(checkpoints, root):
    sites, before, after = checkpoints
    for adapter in (root / "llama.mlp_intermediate", selected(sites), None):
        assert verify_merge(before, after, adapter, sites=sites) == selected(sites)


@pytest.mark.parametrize(
    ("name", "index", "by_mask", "by_adapter"),
    [
        ("model.layers.1.mlp.up_proj.weight", (7, 2), "layer 1 .* neuron 7", "layer 1 .* neuron 7"),
        ("model.layers.2.mlp.down_proj.weight", (4, 11), "layer 2 .* neuron 11", "layer 2 .* neuron 11"),
        ("model.layers.0.mlp.gate_proj.bias", (9,), None, "gate_proj.bias of neuron 9"),
        ("model.layers.0.mlp.down_proj.weight", (0, 2), None, r"down_proj.weight of neuron 2 \(layer 0\)"),
        ("model.layers.0.self_attn.q_proj.weight", (0, 0), "q_proj.weight differs", "q_proj.weight differs"),
        ("model.layers.0.mlp.down_proj.bias", (0,), "down_proj.bias differs", "down_proj.bias differs"),
    ],
)
def test_one_wrong_weight_is_named(name, index, by_mask, by_adapter, checkpoints, root):
    sites, before, after = checkpoints
    after[name][index] = after[name][index] + 1e-6
    with pytest.raises(FNSFTError, match=by_adapter):
        verify_merge(before, after, root / "llama.mlp_intermediate", sites=sites)
    if by_mask:
        with pytest.raises(FNSFTError, match=by_mask):
            verify_merge(before, after, selected(sites), sites=sites)
    else:  # a mask says which neurons differ, and not what they hold
        assert verify_merge(before, after, selected(sites), sites=sites) == selected(sites)


def test_a_neuron_that_did_not_change_is_named(checkpoints):
    sites, before, after = checkpoints
    with pytest.raises(FNSFTError, match=r"neuron 8 of layer 1 .* should differ"):
        verify_merge(before, after, selected(sites, {**NEURONS, "1": "8"}), sites=sites)


def test_checkpoints_that_cannot_be_compared(checkpoints):
    sites, before, after = checkpoints
    with pytest.raises(FNSFTError, match="give sites"):
        verify_merge(before, after)
    with pytest.raises(FNSFTError, match="use one precision"):
        verify_merge(before, {name: value.double() for name, value in after.items()}, sites=sites)
    del after["model.norm.weight"]
    with pytest.raises(FNSFTError, match=r"model.norm.weight is missing"):
        verify_merge(before, after, sites=sites)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("extra", [{}, *EXTRAS.values()], ids=["neurons", *EXTRAS])
def test_export_merged_is_verified_and_loads_alone(extra, dtype, tokenizer, tmp_path, capsys):
    base = tiny_model("llama").to(dtype)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = trained(type(base).from_pretrained(tmp_path / "base"), **extra)
    model.save_pretrained(tmp_path / "adapter")
    assert main(["export", str(tmp_path / "adapter"), "--to", "merged", "--output_dir", str(tmp_path / "out")]) == 0
    assert "Verified: 7 neurons differ" in capsys.readouterr().out
    merged = type(base).from_pretrained(tmp_path / "out").eval()
    assert merged.dtype == dtype
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(logits(merged, ids), logits(model, ids), atol=1e-5 if dtype == torch.float32 else 0.1)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_export_lora_on_the_command_line(root, tmp_path, capsys):
    adapter = root / "gpt2.mlp_intermediate"
    assert main(["export", str(adapter), "--to", "lora", "--output_dir", str(tmp_path / "out")]) == 0
    assert "4 modules, rank up to 6" in capsys.readouterr().out
    file = "adapter_model.safetensors"
    assert (tmp_path / "out" / file).read_bytes() == (root / "gpt2.mlp_intermediate.plain" / file).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "onnx"], "to is 'onnx'; it must be one of: merged, baked, smaller, lora, gguf"),
        (["--to", "lora"], "adapter of type"),
        (["--to", "merged", "nowhere"], "to takes one value, 2 were given"),
        ([], "to is missing; give DIR --to merged|baked|smaller|lora|gguf"),
    ],
)
def test_export_refuses_on_one_line(arguments, message, root, tmp_path, capsys):
    adapter = str(root / "llama.mlp_intermediate.plain")
    assert main(["export", adapter, "--output_dir", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
