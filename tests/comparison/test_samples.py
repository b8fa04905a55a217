import json

import pytest
from helpers import tiny_model
from planted import PLANTED, PLANTED_LAYER, planted_model, planted_texts

from fnsft_trl import FNSFTError, FunctionalNetworkConfig, discover_networks
from fnsft_trl.cli import main
from fnsft_trl.comparison.samples import compare_samples


def test_a_planted_network_is_found_in_every_sample(tokenizer):
    model = planted_model()
    settings = {"ica_components": 3, "ica_rank": 24, "ica_percentile": 97, "ica_skip_tokens": 0}
    template = discover_networks(model, tokenizer, planted_texts(40), FunctionalNetworkConfig(**settings))
    samples = planted_texts(5, length=200, seed=7)
    found = compare_samples(model, tokenizer, template, samples, count=4, max_length=200)
    hits = [int(template.members(n)[PLANTED_LAYER][list(PLANTED)].sum()) for n in range(3)]
    number = max(range(3), key=hits.__getitem__)
    assert len(found.samples) == 4
    assert found.networks[number].share == 1
    assert found.networks[number].null < 0.5
    assert found.tokens == 4 * 200
    assert all(0 <= network < 3 and 0 <= iou <= 1 for sample in found.samples for network, iou in sample)


def test_samples_that_are_too_short_are_counted_and_refused(templates, tokenizer):
    with pytest.raises(FNSFTError, match="no sample has more than"):
        compare_samples(tiny_model("llama"), tokenizer, templates["llama"], ["ba", "ko"], count=2)


def test_the_command_writes_its_report(templates, model_dir, tmp_path):
    templates["llama"].save_pretrained(tmp_path / "t")
    rows = [{"text": "Say bakoriten: netirokab. " * 6}] * 3 + [{"text": "ba"}]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["compare", str(tmp_path / "t"), "--texts", str(tmp_path / "texts.jsonl"), "--per_sample"]
    assert main([*words, "--model_a", str(model_dir), "--output_dir", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(found["samples"]) == 3
    assert found["left_out"] == 1
    assert main([*words[:2], "--output_dir", str(tmp_path / "no")]) == 2  # neither B nor per_sample
    assert main([*words, "--b", "x", "--output_dir", str(tmp_path / "no")]) == 2
    assert not (tmp_path / "no").exists()
