"""On SmolLM2-135M-Instruct: what tiny random models cannot show."""

import json
import re

import numpy as np
import pytest
from helpers import ROOT, few_energy_tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

from fnsft_trl import FunctionalNetworkConfig, discover_networks, lesion, preserve, select_neurons
from fnsft_trl.cli import main
from fnsft_trl.cli.options.parse import parse_options
from fnsft_trl.data.embedded import embedded_model, question_routing, wikipedia_passages
from fnsft_trl.evaluation.retention import RetentionText


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(embedded_model(), dtype="float32").eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_model())


@pytest.fixture(scope="module")
def template(model, tokenizer):
    config = FunctionalNetworkConfig(ica_max_tokens=6000, ica_max_length=256, ica_standardize="zscore")
    return discover_networks(model, tokenizer, wikipedia_passages("discovery"), config)


def test_the_embedded_model_speaks(model, tokenizer):
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0][prompt["input_ids"].shape[1] :])


def test_a_second_call_finds_the_converted_model():
    before = (embedded_model() / "model.safetensors").stat().st_mtime_ns
    assert (embedded_model() / "model.safetensors").stat().st_mtime_ns == before
    assert not list(embedded_model().parent.glob(".converting-*"))


def test_discovery_and_retention_texts_share_nothing():
    discovery, retention = (wikipedia_passages(split) for split in ("discovery", "retention"))
    assert len(discovery) > 3000 < len(retention)
    assert not set(discovery) & set(retention)
    titles = [{p.partition(" -- ")[0] for p in texts} for texts in (discovery, retention)]
    assert not titles[0] & titles[1]


def test_the_new_task_has_disjoint_rows_of_all_desks():
    train, test = question_routing(480, 120)
    assert (len(train), len(test)) == (480, 120)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    assert {row["completion"] for row in train} == {row["completion"] for row in test}
    assert len({row["completion"] for row in train}) == 6


def test_networks_of_a_real_model_replicate_in_part(template):
    reliability = [component.reliability for component in template.components]
    assert np.mean(reliability) > 0.3
    assert max(reliability) > 0.6


def test_lesioning_networks_hurts_more_than_random_neurons(model, tokenizer, template):
    """The first finding of the paper, beside its control: the same number of random neurons in every layer."""
    text = RetentionText.from_texts(wikipedia_passages("retention"), tokenizer, max_tokens=400)
    base = text.cross_entropy(model)
    networks = select_neurons(template, fraction=0.02)
    rises = {}
    for name, mask in (
        ("networks", networks),
        ("random", select_neurons(template, selector="random", like=networks)),
    ):
        with lesion(model, mask):
            rises[name] = text.cross_entropy(model) - base
        with preserve(model, ~mask):
            assert text.cross_entropy(model) - base == pytest.approx(rises[name], abs=1e-6)
    assert rises["networks"] > rises["random"] + 0.5
    assert text.cross_entropy(model) == base


def test_the_demo_runs_to_its_report(tmp_path, capsys, monkeypatch, forked):
    """All of `fnsft demo` with little data: too little to learn from, enough to see every part work."""
    sizes = ["--discovery_tokens", "800", "--components", "2", "--train_rows", "16", "--test_rows", "8"]
    sizes += ["--retention_tokens", "100", "--keep_tokens", "100"]
    few_energy_tokens(monkeypatch)
    assert main(["demo", "--output_dir", str(tmp_path / "demo"), *sizes]) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert [arm["arm"] for arm in results["arms"]] == ["lora", "outside", "protected", "restored"]
    also = [cell["also"] for cell in results["cells"]]
    assert [found["frozen_bit_identical"] for found in also] == [None, True, None, None]
    assert also[1]["neurons_changed"] == f"{154 * 30:,} of {1536 * 30:,}"
    assert printed.count("largest difference of the logits 0\n") == 4
    discovery, retention = results["networks"][0]["sha256"], results["retention"]["wiki"]["sha256"]
    assert discovery != retention
    page = (tmp_path / "demo" / "report.html").read_text()
    for text in (discovery, retention, "proves nothing", "Forgot least"):
        assert text in page
        assert text in (tmp_path / "demo" / "report.md").read_text()
    for arm in results["arms"]:
        assert re.search(rf"{arm['arm']} .*{arm['trained']['parameters']:,}", printed)
    assert (tmp_path / "demo" / results["networks"][0]["directory"] / "config.json").exists()
    for name in ("lora", "outside", "protected"):  # recipes that run alone
        assert parse_options(["--config", str(tmp_path / "demo" / "recipes" / f"{name}.yaml")]).notes == []


def test_the_shipped_recipe_data_is_readable():
    from fnsft_trl.data.sources import load_data

    path = ROOT / "recipes" / "data" / "opposites.jsonl"
    assert len(load_data(str(path), split="train")) > 100
