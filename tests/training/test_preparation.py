from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers import tiny_model

from fnsft_trl import FNSFTError, FunctionalNetworkConfig
from fnsft_trl.data.sequences import trained_part
from fnsft_trl.training.preparation import discover_template, load_base_model


@pytest.mark.parametrize(
    ("place", "is_placed"), [(True, True), (None, True), (False, False)], ids=["yes", "as the Trainer decides", "no"]
)
def test_a_discovery_runs_where_the_trainer_will_place_the_model(rows, tokenizer, monkeypatch, place, is_placed):
    model, moved = tiny_model("llama"), []
    monkeypatch.setattr(model, "to", moved.append)
    args = SimpleNamespace(place_model_on_device=place, device="the accelerator", dataset_text_field="text")
    config = FunctionalNetworkConfig(ica_components=2, ica_rank=8, ica_max_tokens=200, ica_max_length=32)
    discover_template(config, model, tokenizer, args, Dataset.from_list(rows), trained_part)
    assert moved == ["the accelerator"] * is_placed


def test_a_model_that_fits_on_no_device_is_an_error_that_says_where_to_discover(rows, tokenizer, monkeypatch):
    """As one that is sharded later need not: without a word of it, the error of torch would end the run."""
    model = tiny_model("llama")

    def too_large(device):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(model, "to", too_large)
    args = SimpleNamespace(place_model_on_device=None, device="cuda:0", dataset_text_field="text")
    with pytest.raises(FNSFTError, match=r"does not fit on cuda:0, .*fnsft discover --device_map auto"):
        discover_template(FunctionalNetworkConfig(), model, tokenizer, args, Dataset.from_list(rows), trained_part)


@pytest.mark.parametrize(
    ("device", "frozen", "given", "expected"),
    [
        ("cuda", True, {}, torch.bfloat16),
        ("cuda", True, {"dtype": "auto"}, "auto"),
        ("cuda", False, {}, None),
        ("cpu", True, {}, None),
    ],
)
def test_a_frozen_base_is_loaded_in_what_suits_the_device(monkeypatch, device, frozen, given, expected):
    loaded = []
    monkeypatch.setattr("fnsft_trl.training.preparation.create_model_from_path", lambda name, **o: loaded.append(o))
    state = SimpleNamespace(distributed_type="NO")
    args = SimpleNamespace(bf16=True, device=torch.device(device), distributed_state=state)
    load_base_model("m", args, given, None, frozen=frozen)
    assert loaded[0].get("dtype") == expected
