"""Which networks of a group recur in its datasets."""

import pytest
from helpers import tiny_model, tiny_rows

from fnsft_trl import FNSFTError, FunctionalNetworkConfig
from fnsft_trl.discovery.discovery import discover_group
from fnsft_trl.discovery.matching import match_components
from fnsft_trl.discovery.recurrence import recurrence


def test_a_group_is_matched_once_with_each_dataset_however_many_networks_it_has(tokenizer, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "fnsft_trl.discovery.recurrence.match_components", lambda a, b: calls.append(len(a)) or match_components(a, b)
    )
    datasets = {
        name: [row["prompt"] + row["completion"] for row in tiny_rows(60, seed)] for seed, name in enumerate("ab")
    }
    config = FunctionalNetworkConfig(ica_components=3, ica_rank=16, ica_max_length=32, ica_max_tokens=600)
    group, _ = discover_group(tiny_model("llama"), tokenizer, datasets, config)
    assert calls == [len(group.components)] * 2


def test_a_template_recurs_in_itself(templates):
    template = templates["llama"]
    found = recurrence(template, template)
    assert [entry["component"] for entry in found] == [0, 1, 2]
    assert all(entry["recurs"] and entry["iou"] == 1 and entry["correlation"] > 0.999 for entry in found)


@pytest.mark.parametrize("texts", [[], ["", " "]])
def test_a_dataset_of_a_group_without_tokens_is_named(tokenizer, rows, texts):
    config = FunctionalNetworkConfig(ica_components=2, ica_rank=8, ica_max_tokens=200, ica_max_length=32)
    datasets = {"full": [row["prompt"] for row in rows], "hollow": texts}
    with pytest.raises(FNSFTError, match=r"hollow"):
        discover_group(tiny_model("llama"), tokenizer, datasets, config)
