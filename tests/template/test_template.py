import dataclasses
import json
import re
import shutil

import pytest
import torch
from helpers import tiny_model
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fnsft_trl import FNSFTError, FunctionalNetworkConfig, FunctionalNetworkTemplate, discover_networks
from fnsft_trl.config import ThresholdRule
from fnsft_trl.template.schema import FORMAT_VERSION, PLAIN_VERSION
from fnsft_trl.template.stored import StoredTemplate


@pytest.fixture
def saved(templates, tmp_path):
    templates["llama"].save_pretrained(tmp_path / "template")
    return tmp_path / "template"


def edit(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_save_and_load_give_everything_back_and_the_same_bytes(family, templates, tmp_path):
    template = templates[family]
    template.save_pretrained(tmp_path / "one")
    loaded = FunctionalNetworkTemplate.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    for name in ("config.json", "template.safetensors", "README.md", "networks.svg"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "README.md",
        "config.json",
        "networks.svg",
        "template.safetensors",
    ]
    assert loaded.components == template.components
    for layer in template.loadings:
        assert torch.equal(loaded.loadings[layer], template.loadings[layer])


def test_shapes_thresholds_and_provenance(templates):
    template = templates["llama"]
    assert {values.shape for values in template.loadings.values()} == {(3, 40)}
    assert template.widths == {0: 40, 1: 40, 2: 40}
    assert (template.architecture, template.site) == ("LlamaForCausalLM", "mlp_intermediate")
    assert template.calibration["tokens"] == 250
    assert all(0 <= c.reliability <= 1 for c in template.components)
    for number, component in enumerate(template.components):
        members = template.members(number)
        assert component.neurons == sum(int(m.sum()) for m in members.values()) == 24  # 20% of 120 neurons
        inside = min(template.loadings[i][number].abs()[m].min() for i, m in members.items() if m.any())
        outside = max(template.loadings[i][number].abs()[~m].max() for i, m in members.items())
        assert inside > outside


def test_a_template_is_printed_without_its_numbers_and_compared_by_identity(saved):
    one, other = (FunctionalNetworkTemplate.from_pretrained(saved) for _ in range(2))
    assert "LlamaForCausalLM" in repr(one)
    assert "tensor(" not in repr(one)
    assert "probes" not in repr(one)
    assert one == one
    assert one != other
    assert len({one, other}) == 2


def test_metadata_of_the_tensors_is_format_and_version_alone(saved):
    with safe_open(saved / "template.safetensors", framework="pt") as file:
        assert file.metadata() == {"fnsft_trl.template": str(PLAIN_VERSION)}


def test_thresholds_change_without_discovery(templates, tmp_path):
    template = templates["llama"]
    wider = template.with_threshold(ThresholdRule("percentile", 50))
    assert [c.neurons for c in wider.components] == [60, 60, 60]
    assert [c.neurons for c in template.components] == [24, 24, 24]
    layered = template.with_threshold(ThresholdRule("layer_percentile", 90))
    assert [c.layers for c in layered.components] == [{0: 4, 1: 4, 2: 4}] * 3
    loadings = torch.cat([values[0] for values in template.loadings.values()])
    z = (loadings - loadings.mean()) / loadings.std(correction=0)
    for rule, expected in (("zscore", z.abs() > 1.5), ("zscore_positive", z > 1.5)):
        members = template.with_threshold(ThresholdRule(rule, 1.5)).members(0)
        assert torch.equal(torch.cat(list(members.values())), expected)
    layered.save_pretrained(tmp_path)
    assert FunctionalNetworkTemplate.from_pretrained(tmp_path).components == layered.components


@pytest.mark.parametrize(("rule", "value"), [("percentil", 98), ("percentile", 100), ("zscore", 0), ("zscore", "2")])
def test_thresholds_without_a_meaning_are_refused(rule, value):
    with pytest.raises(FNSFTError, match="threshold rule"):
        ThresholdRule(rule, value)


@pytest.mark.parametrize("other", ["gpt2", "phi3", "opt"])
def test_another_architecture_is_refused(templates, other):
    with pytest.raises(FNSFTError, match=r"LlamaForCausalLM.*but the model is a"):
        templates["llama"].check_model(tiny_model(other))


def test_other_widths_or_fewer_layers_are_refused(templates):
    model = tiny_model("llama")
    templates["llama"].check_model(model)
    model.model.layers = model.model.layers[:2]
    with pytest.raises(FNSFTError, match="no layer 2"):
        templates["llama"].check_model(model)
    narrow = templates["llama"].with_threshold(ThresholdRule())
    narrow.loadings = {layer: values[:, :30] for layer, values in narrow.loadings.items()}
    with pytest.raises(FNSFTError, match="30 neurons in layer 0, but the model has 40"):
        narrow.check_model(tiny_model("llama"))


def test_files_that_are_not_a_template_are_refused(saved, tmp_path):
    with pytest.raises(FNSFTError, match=r"config\.json is missing"):
        StoredTemplate.open(tmp_path)
    edit(saved, format_version=FORMAT_VERSION + 1)
    with pytest.raises(FNSFTError, match="upgrade fnsft-trl"):
        FunctionalNetworkTemplate.from_pretrained(saved)
    edit(saved, format="something else")
    with pytest.raises(FNSFTError, match="does not describe a template"):
        FunctionalNetworkTemplate.from_pretrained(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(FNSFTError, match="not valid JSON"):
        FunctionalNetworkTemplate.from_pretrained(saved)


def test_what_is_asked_for_wrongly_is_told(saved, monkeypatch):
    for name in ("config.json", "template.safetensors", "README.md"):
        with pytest.raises(FNSFTError, match="give the directory"):
            StoredTemplate.open(saved / name)
    for name in ("nowhere", "https://huggingface.co/org/name", "org/name@main"):
        with pytest.raises(FNSFTError, match="no such directory or file"):
            StoredTemplate.open(name)
    monkeypatch.setenv("HOME", str(saved.parent))
    assert StoredTemplate.open("~/template").description.site == "mlp_intermediate"


def test_a_template_goes_before_that_of_a_model_beside_it(templates, tmp_path):
    """As it does in a repository."""
    templates["opt"].save_pretrained(tmp_path / "functional_networks")
    (tmp_path / "config.json").write_text('{"model_type": "opt"}')
    assert StoredTemplate.open(tmp_path).description.architecture == "OPTForCausalLM"
    templates["llama"].save_pretrained(tmp_path / "other")
    shutil.copytree(tmp_path / "other", tmp_path, dirs_exist_ok=True)
    assert StoredTemplate.open(tmp_path).description.architecture == "LlamaForCausalLM"


def test_a_description_that_may_not_be_read_is_one_line(saved, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(FNSFTError, match=r"config\.json cannot be read \(Permission denied\)"):
        StoredTemplate.open(saved)


def test_damaged_tensors_are_refused(saved):
    path = saved / "template.safetensors"
    tensors = load_file(path)
    whole = path.read_bytes()
    save_file({**tensors, "layers.1.loadings": torch.zeros(3, 39)}, path)
    with pytest.raises(FNSFTError, match=r"layers\.1\.loadings should have shape \(3, 40\)"):
        FunctionalNetworkTemplate.from_pretrained(saved)
    del tensors["layers.2.rms"]
    save_file(tensors, path)
    with pytest.raises(FNSFTError, match=r"layers\.2\.rms.*found nothing"):
        FunctionalNetworkTemplate.from_pretrained(saved)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FNSFTError, match="its header asks for"):
        FunctionalNetworkTemplate.from_pretrained(saved)
    path.unlink()
    with pytest.raises(FNSFTError, match="cannot be read"):
        FunctionalNetworkTemplate.from_pretrained(saved)


def test_no_path_of_this_machine_in_a_template(model_dir, tokenizer, rows, tmp_path):
    model = type(tiny_model("llama")).from_pretrained(model_dir)
    config = FunctionalNetworkConfig(ica_components=2, ica_rank=8, ica_max_tokens=200, ica_max_length=32)
    template = discover_networks(model, tokenizer, [row["prompt"] for row in rows], config)
    assert template.base_model == "tiny-llama"
    template.save_pretrained(tmp_path / "template")
    for file in (tmp_path / "template").iterdir():
        assert str(model_dir.parent).encode() not in file.read_bytes()


@pytest.fixture
def warnings(monkeypatch):
    """What `check_model` warns of."""
    from transformers.utils import logging

    said = []
    monkeypatch.setattr(logging.get_logger("fnsft_trl.template.template"), "warning", said.append)
    return said


def test_weights_that_moved_are_a_warning_with_the_measured_difference(templates, warnings):
    for family, template in templates.items():
        template.check_model(tiny_model(family))
        template.check_model(tiny_model(family).to(torch.bfloat16))  # the precision does not count
    assert warnings == []
    for share in (0.01, 0.2):
        model = tiny_model("llama")
        torch.manual_seed(1)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if ".mlp." in name:
                    change = torch.randn_like(weight)
                    weight.add_(change * (share * weight.norm() / change.norm()))
        templates["llama"].check_model(model)
        measured = float(re.search(r"differ from those by ([\d.]+)% of their norm", warnings.pop())[1]) / 100
        assert measured == pytest.approx(share, rel=0.35)  # 3 layers of 16 probes


def test_the_layer_that_moved_most_is_named_and_unreadable_weights_are_left_alone(templates, warnings):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    templates["llama"].check_model(model)
    assert "most in layer 1" in warnings.pop()
    templates["llama"].check_model(model.to("meta"))
    assert warnings == []


def test_a_model_with_adapters_is_measured_by_its_base_weights(templates, tokenizer, rows, warnings):
    peft = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["down_proj", "up_proj"]))
    templates["llama"].check_model(peft)
    assert warnings == []
    config = FunctionalNetworkConfig(ica_components=2, ica_rank=8, ica_max_tokens=200, ica_max_length=32)
    template = discover_networks(peft, tokenizer, [row["prompt"] for row in rows], config)
    assert template.weights == templates["llama"].weights


def test_without_probes_another_name_is_a_warning(templates, warnings):
    nameless = dataclasses.replace(templates["llama"], weights=None, base_model="org/other")
    nameless.check_model(tiny_model("llama"))
    assert "was made from org/other" in warnings.pop()


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("org/model-1.0", "org/model-1.0"),
        ("/home/me/my model (2)", "my model -2-"),
        ("..\\evil\n# heading", "..-evil-- heading"),
        ("..", "unknown"),
    ],
)
def test_whatever_a_model_and_its_text_are_called_the_template_can_be_saved(templates, tmp_path, name, kept):
    source = "lines\n# of text " + "x" * 900
    calibration = {**templates["llama"].calibration, "sources": [source]}
    dataclasses.replace(templates["llama"], base_model=name, calibration=calibration).save_pretrained(tmp_path)
    loaded = FunctionalNetworkTemplate.from_pretrained(tmp_path)
    assert loaded.base_model == kept
    assert loaded.calibration["sources"] == ["lines # of text " + "x" * 484]
