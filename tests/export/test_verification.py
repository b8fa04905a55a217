"""Every export of every way to train, loaded in another process: it computes what was trained, or is refused."""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from fnsft_trl import FNSFTError
from fnsft_trl.cli import main
from fnsft_trl.export import to_baked, to_merged, to_plain_lora, to_smaller, verify_export


pytestmark = pytest.mark.slow

FORMS = {"merged": to_merged, "lora": to_plain_lora, "baked": to_baked, "smaller": to_smaller}
# A whole model is merged already, and LoRA is one already.
CASES = [
    *(("neuron_delta", form) for form in FORMS),
    *(("lora", form) for form in ("merged", "baked", "smaller")),
    *(("full", form) for form in ("baked", "smaller")),
    ("baked", "smaller"),
]


@pytest.fixture(scope="module")
def exports(trained):
    """(way, form) -> (its place, the neurons that are silenced in it)."""
    found = {}
    for way, form in CASES:
        made = FORMS[form](trained / way, trained / f"{way}.{form}")
        attribute = {"baked": "neurons", "smaller": "removed"}.get(form)
        silenced = None if attribute is None else getattr(made, attribute)
        found[way, form] = (trained / f"{way}.{form}", silenced)
    return found


@pytest.mark.parametrize(("way", "form"), CASES)
def test_every_export_computes_what_was_trained(way, form, trained, exports, forked):
    place, silenced = exports[way, form]
    found = verify_export(trained / way, place, form, silenced=silenced)
    assert found.difference < 1e-5
    assert found.changed.count > 0
    record = json.loads((trained / way / "functional_networks" / "selection.json").read_text())
    if silenced is not None:
        assert silenced.count == record["selected"]["count"]
    if way in ("full", "baked"):  # compared with what was trained: nothing but the lesion
        assert found.others == 0
        assert found.changed.count <= silenced.count


def spoil(directory: Path, change) -> None:
    """Write one tensor of a checkpoint otherwise."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def add(name: str, *index: int, by: float):
    def change(tensors):
        tensors[name][index] += by

    return change


def swap(one: str, other: str):
    def change(tensors):
        tensors[one], tensors[other] = tensors[other], tensors[one]

    return change


@dataclass(frozen=True)
class Broken:
    """What is wrong with an export, and what is said of it."""

    form: str
    change: object
    message: str


DOWN = "model.layers.{}.mlp.down_proj.weight"
BROKEN = {
    "a layer in another's place": Broken("merged", swap(DOWN.format(0), DOWN.format(1)), "its logits differ by"),
    "one weight that was not trained": Broken(
        "merged", add(DOWN.format(2), 3, 39, by=1e-6), "neuron 39 of layer 2 differs from .*neither trained nor"
    ),
    "a lesion that is none": Broken("baked", add(DOWN.format(1), slice(None), by=0.5), "its logits differ by"),
    "a weight of no neuron": Broken(
        "baked-full", add("model.layers.0.self_attn.q_proj.weight", 0, 0, by=1e-7), "q_proj.weight differs from"
    ),
    "a kept neuron at another place": Broken(
        "smaller", lambda tensors: tensors.update({DOWN.format(0): tensors[DOWN.format(0)].flip(1)}), "its logits"
    ),
    "NaN": Broken("merged", add(DOWN.format(0), 0, 0, by=float("nan")), "its logits differ by nan"),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_broken_export_is_refused(broken, trained, exports, tmp_path, forked):
    form, _, way = broken.form.partition("-")
    place, silenced = exports[way or "neuron_delta", form]
    shutil.copytree(place, tmp_path / "broken")
    spoil(tmp_path / "broken", broken.change)
    with pytest.raises(FNSFTError, match=broken.message):
        verify_export(trained / (way or "neuron_delta"), tmp_path / "broken", form, silenced=silenced)


def test_an_export_that_does_not_load_or_reads_other_tokens_is_refused(trained, exports, tmp_path, forked):
    shutil.copytree(exports["neuron_delta", "merged"][0], tmp_path / "broken")
    file = tmp_path / "broken" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["merges"] = content["model"]["merges"][:1]
    file.write_text(json.dumps(content))
    with pytest.raises(FNSFTError, match="its tokenizer makes other tokens of"):
        verify_export(trained / "neuron_delta", tmp_path / "broken", "merged")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"")
    with pytest.raises(FNSFTError, match="does not load in a fresh process"):
        verify_export(trained / "neuron_delta", tmp_path / "broken", "merged")


def test_the_command_line_verifies_in_a_process_of_its_own(trained, tmp_path, capsys):
    words = ["export", str(trained / "lora"), "--to", "smaller", "--output_dir", str(tmp_path / "out"), "--verify"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "Verified in a fresh process: logits of 5 prompts differ by" in printed
    assert "neurons were removed" not in printed.splitlines()[0]


def test_what_was_baked_is_said_in_the_card(trained, exports):
    card = (exports["neuron_delta", "baked"][0] / "README.md").read_text()
    assert "The weights carry a lesion" in card
    assert "is not part of these weights" not in card
    assert "The mask is not part of these weights" in (trained / "neuron_delta" / "README.md").read_text()


@pytest.mark.parametrize(
    ("way", "words", "message"),
    [
        ("full", ["--to", "merged"], "holds a whole model (config.json), which needs no merge"),
        ("base", ["--to", "baked"], "was not trained under a mask"),
        ("base", ["--to", "smaller"], "was not trained under a mask"),
        ("lora", ["--to", "lora"], "one of neuron deltas was expected"),
        ("lora", ["--to", "merged", "--ica_fraction", "0.1"], "ica_fraction has no effect with to=merged"),
        ("lora", ["--to", "baked", "--ica_fraction", "0.1"], "ica_fraction: no effect without mask_mode"),
        ("lora", ["--to", "merged", "--outtype", "f16"], "outtype has no effect with to=merged"),
        ("full", ["--to", "baked", "--include", "adapter"], "holds no adapter"),
    ],
)
def test_what_cannot_be_exported_is_refused_on_one_line(way, words, message, trained, tmp_path, capsys):
    assert main(["export", str(trained / way), *words, "--output_dir", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_run_under_an_amplification_bakes_it_and_leaves_no_smaller_model(trained, tmp_path, capsys, forked):
    shutil.copytree(trained / "lora", tmp_path / "run")
    file = tmp_path / "run" / "functional_networks" / "selection.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"mask_mode": "amplify", "mask_factor": 3.0}))
    words = ["export", str(tmp_path / "run"), "--output_dir", str(tmp_path / "out"), "--verify", "--to"]
    assert main([*words, "smaller"]) == 2
    assert "trained under mask_mode=amplify, which silences no neuron" in capsys.readouterr().err
    assert main([*words, "baked"]) == 0
    printed = capsys.readouterr().out
    assert f"({record['selected']['count']} neurons are multiplied by 3)" in printed
    assert "Verified in a fresh process" in printed
    silenced = to_baked(tmp_path / "run", tmp_path / "other").neurons
    with pytest.raises(FNSFTError, match="its logits differ by"):  # the mask counts: it is no lesion
        verify_export(tmp_path / "run", tmp_path / "out", "baked", silenced=silenced)


def test_ternary_files_are_not_verified(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FNSFT_GGUF_CONVERTER", sys.executable)
    words = ["--to", "gguf", "--output_path", str(tmp_path / "o.gguf"), "--outtype", "tq1_0", "--verify"]
    assert main(["export", str(trained / "full"), *words]) == 2
    assert "rounds weights to three values" in capsys.readouterr().err


def test_a_mask_can_be_named(trained, templates, tmp_path, forked):
    templates["llama"].save_pretrained(tmp_path / "template")
    mask = ["--ica_template_path", str(tmp_path / "template"), "--mask_mode", "preserve", "--ica_fraction", "0.5"]
    words = ["export", str(trained / "lora"), "--to", "baked", "--output_dir", str(tmp_path / "out"), "--verify"]
    assert main([*words, *mask]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    silenced = load_file(tmp_path / "out" / "model.safetensors")
    assert config["baked_lesion"]["neurons"]
    zeros = sum(int((silenced[DOWN.format(layer)] == 0).all(0).sum()) for layer in range(3))
    assert zeros == 60  # half of 3 layers of 40
