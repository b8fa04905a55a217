"""Baked models: without hooks, what the mask does with them, by any factor."""

import json
import math

import pytest
import torch
from helpers import FAMILIES, VOCABULARY, changed_entries, logits, random_mask, state, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from fnsft_trl import FNSFTError, NeuronMask, amplify
from fnsft_trl.cli import main
from fnsft_trl.export import to_baked


IDS = torch.arange(3, 21).view(2, 9) % VOCABULARY


def saved(family, directory):
    tiny_model(family).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def loaded(directory):
    return AutoModelForCausalLM.from_pretrained(directory).eval()


@pytest.mark.parametrize("site", ["mlp_intermediate", "mlp_output"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_baked_amplification_computes_what_the_hooked_model_does(family, site, tmp_path):
    model = tiny_model(family)
    mask = random_mask(model, site)
    baked = to_baked(saved(family, tmp_path / "model"), tmp_path / "baked", mask, factor=1.7)
    assert (baked.neurons, baked.factor) == (mask, 1.7)
    with amplify(model, mask, 1.7):
        expected = logits(model, IDS)
    found = loaded(tmp_path / "baked")
    largest = expected.abs().max()
    assert (logits(found, IDS) - expected).abs().max() < 1e-6 * largest
    assert (expected - logits(model, IDS)).abs().max() > 1e-3 * largest
    said = {"site": site, "neurons": mask.to_ranges(), "factor": 1.7}  # of all layers, though they are baked in turn
    assert found.config.baked_amplification == said
    card = (tmp_path / "baked" / "README.md").read_text()
    assert "## Amplification" in card
    assert f"of {mask.count} neurons" in card
    assert "multiplied by 1.7" in card


def test_a_factor_of_0_is_the_lesion_bit_for_bit(tmp_path):
    source = saved("llama", tmp_path / "model")
    mask = random_mask(tiny_model("llama"), "mlp_intermediate")
    to_baked(source, tmp_path / "lesion", mask)
    to_baked(source, tmp_path / "zero", mask, factor=0.0)
    lesioned, zero = (loaded(tmp_path / name) for name in ("lesion", "zero"))
    assert changed_entries(state(lesioned), state(zero)) == {}
    assert zero.config.baked_lesion == lesioned.config.baked_lesion
    assert (tmp_path / "zero" / "README.md").read_text() == (tmp_path / "lesion" / "README.md").read_text()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"factor": 1.0}, "other than 1, which changes nothing"),
        ({"factor": math.inf}, "must be finite"),
        ({"factor": math.nan}, "must be finite"),
        ({"factor": 2.0, "mask": None}, "factor is what a given mask multiplies by"),
        ({"factor": 2.0, "mask": NeuronMask({0: torch.zeros(40, dtype=torch.bool)})}, "has no neuron"),
        ({"factor": 2.0, "mask": NeuronMask({7: torch.ones(40, dtype=torch.bool)})}, "made for another model"),
    ],
)
def test_a_factor_that_changes_nothing_is_refused_and_nothing_is_written(asked, message, tmp_path):
    source = saved("llama", tmp_path / "model")
    mask = random_mask(tiny_model("llama"), "mlp_intermediate")
    with pytest.raises(FNSFTError, match=message):
        to_baked(source, tmp_path / "out", **({"mask": mask} | asked))
    assert not (tmp_path / "out").exists()


def test_further_neurons_are_amplified_by_the_same_factor_only(tmp_path):
    source = saved("llama", tmp_path / "model")
    mask = random_mask(tiny_model("llama"), "mlp_intermediate")
    to_baked(source, tmp_path / "once", mask, factor=2.0)
    for others, factor in ((mask, 2.0), (~mask, 3.0), (~mask, 0.0)):
        with pytest.raises(FNSFTError, match=r"carries an? (baked_)?amplification"):
            to_baked(tmp_path / "once", tmp_path / "twice", others, factor=factor)
        assert not (tmp_path / "twice").exists()
    to_baked(tmp_path / "once", tmp_path / "twice", ~mask, factor=2.0)
    to_baked(source, tmp_path / "all", mask | ~mask, factor=2.0)
    assert changed_entries(state(loaded(tmp_path / "twice")), state(loaded(tmp_path / "all"))) == {}
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("twice", "all")]
    assert configs[0]["baked_amplification"] == configs[1]["baked_amplification"]


def test_the_command_line_bakes_a_factor(templates, tmp_path, capsys):
    templates["llama"].save_pretrained(tmp_path / "template")
    source = saved("llama", tmp_path / "model")
    words = ["export", str(source), "--output_dir", str(tmp_path / "out"), "--mask_mode", "amplify"]
    words += ["--ica_template_path", str(tmp_path / "template"), "--ica_fraction", "0.25"]
    for form, more, said in (
        ("smaller", ["--mask_factor", "2"], "silences no neuron that could go"),
        ("baked", [], "mask_mode=amplify needs mask_factor"),
        ("baked", ["--mask_factor", "1"], "mask_factor=1 changes no activation"),
        ("baked", ["--mask_factor", "0"], "mask_factor is 0"),
    ):
        assert main([*words, "--to", form, *more]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    assert main([*words, "--to", "baked", "--mask_factor", "0.5"]) == 0
    assert "30 neurons are multiplied by 0.5" in capsys.readouterr().out
    config = loaded(tmp_path / "out").config
    mask = NeuronMask.from_ranges(
        config.baked_amplification["neurons"], dict.fromkeys(range(3), 40), "mlp_intermediate"
    )
    model = tiny_model("llama")
    with amplify(model, mask, 0.5):
        expected = logits(model, IDS)
    assert (logits(loaded(tmp_path / "out"), IDS) - expected).abs().max() < 1e-6 * expected.abs().max()
