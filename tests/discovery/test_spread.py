"""Networks of models that do not lie in one place, and of models that are wide."""

import pytest
import torch
from accelerate import cpu_offload
from helpers import tiny_model
from transformers import AutoModelForCausalLM

from fnsft_trl import FNSFTError, FunctionalNetworkConfig, discover_networks, find_neuron_sites
from fnsft_trl.data.sequences import TokenSequence
from fnsft_trl.discovery import activations
from fnsft_trl.discovery.activations import ActivationReader
from fnsft_trl.selection.evidence import SelectorEvidence


CONFIG = FunctionalNetworkConfig(ica_components=2, ica_rank=8, ica_max_tokens=200, ica_max_length=32)
PLACES = ("model.embed_tokens", "model.layers.0", "model.layers.2", "model.norm", "model.rotary_emb", "lm_head")


def offloaded(directory, _):
    """Every weight is fetched for each use."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    return cpu_offload(model, execution_device=torch.device("cpu"))


def split(directory, folder):
    """A device map in which one layer stands for a device of its own: its weights come from the disk."""
    device_map = dict.fromkeys(PLACES, "cpu") | {"model.layers.1": "disk"}
    return AutoModelForCausalLM.from_pretrained(directory, device_map=device_map, offload_folder=str(folder))


@pytest.mark.parametrize("spread", [offloaded, split])
def test_a_model_in_several_places_has_the_networks_of_one_in_memory(spread, model_dir, tokenizer, rows, tmp_path):
    texts = [row["prompt"] + row["completion"] for row in rows]
    whole = discover_networks(AutoModelForCausalLM.from_pretrained(model_dir), tokenizer, texts, CONFIG)
    model = spread(model_dir, tmp_path / "offload")
    assert any(parameter.is_meta for parameter in model.parameters())
    found = discover_networks(model, tokenizer, texts, CONFIG)
    for layer, loadings in whole.loadings.items():
        assert torch.equal(found.loadings[layer], loadings)
    assert any(parameter.is_meta for parameter in model.parameters())  # it is left as it was


def read(model, batch_size):
    reader = ActivationReader(
        model, find_neuron_sites(model), batch_size=batch_size, max_length=16, skip_tokens=1, special_ids=()
    )
    sequences = [TokenSequence(list(range(5, 15 + i)), i % 2) for i in range(6)]
    blocks = [block.rows.clone() for block in reader.read([sequences], max_tokens=1000)]
    return reader, blocks


@pytest.mark.parametrize(("largest", "expected"), [(4 * 2**30, 4), (2 * 16 * 120 * 4 + 1, 2), (1, 1)])
def test_the_block_of_activations_is_bounded(largest, expected, monkeypatch, log):
    """One sequence of 16 tokens at 3 layers of 40 neurons is 16 * 120 * 4 bytes."""
    model = tiny_model("llama")
    monkeypatch.setattr(activations, "_LARGEST_BLOCK", largest)
    reader, blocks = read(model, 4)
    assert reader.batch_size == expected
    assert max(map(len, blocks)) <= expected * 16
    assert ("are read in a pass" in log.text) == (expected < 4)
    monkeypatch.undo()
    assert torch.allclose(torch.cat(blocks), torch.cat(read(model, expected)[1]))
    assert len(torch.cat(blocks)) == len(torch.cat(read(model, 4)[1]))


def test_a_model_that_is_sharded_already_is_refused_with_what_to_do(tokenizer):
    """Each pass would wait for the other processes, which read other texts."""
    model = tiny_model("llama")
    model.lm_head.weight.ds_id = 0  # as ZeRO-3 marks a parameter
    with pytest.raises(FNSFTError, match=r"a discovery reads .* and lm_head\.weight is sharded .*device_map"):
        discover_networks(model, tokenizer, ["some text"], CONFIG)
    evidence = SelectorEvidence(model, tokenizer, task=["some text"])
    with pytest.raises(FNSFTError, match="selector='contrast' reads"):
        evidence.contrast(None)
