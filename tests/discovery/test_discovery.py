import json

import pytest
import torch
from helpers import tiny_model, tiny_rows
from peft import LoraConfig, get_peft_model
from processes import run_processes

from fnsft_trl import FunctionalNetworkConfig, FunctionalNetworkTemplate, discover_networks
from fnsft_trl.discovery.discovery import discover_group
from fnsft_trl.discovery.matching import match_components, overlap


SMALL = {"ica_components": 3, "ica_rank": 16, "ica_batch_size": 2, "ica_max_length": 32}


def texts(count=48, seed=0):
    return [row["prompt"] + row["completion"] for row in tiny_rows(count, seed)]


def same(a, b):
    return a.components == b.components and all(torch.equal(a.loadings[i], b.loadings[i]) for i in a.loadings)


class Interrupted(Exception):
    pass


@pytest.mark.slow
def test_reading_goes_on_until_the_networks_are_reliable(tokenizer, monkeypatch, caplog):
    monkeypatch.setattr("fnsft_trl.discovery.discovery._FIRST_CHECK", 100)
    model = tiny_model("llama")
    low, high = (
        discover_networks(
            model,
            tokenizer,
            texts(300),
            FunctionalNetworkConfig(**SMALL, ica_max_tokens=2000, ica_until_reliable=target),
        )
        for target in (0.3, 0.9999)
    )
    assert low.calibration["tokens"] < high.calibration["tokens"] == 2000
    assert low.calibration["curve"][-1]["reliability"] >= 0.3
    tokens = [point["tokens"] for point in high.calibration["curve"]]
    assert tokens == sorted(set(tokens))
    assert tokens[-1] == 2000
    assert len(tokens) > 4
    assert high.calibration["curve"][-1]["reliability"] == pytest.approx(
        sum(component.reliability for component in high.components) / 3
    )
    assert "below 0.9999" in caplog.text


def test_several_datasets_give_group_networks_and_their_own(tokenizer, tmp_path):
    model = tiny_model("llama")
    config = FunctionalNetworkConfig(**SMALL, ica_max_tokens=1200)
    datasets = {"a": texts(150, seed=0), "b": texts(150, seed=1)}
    group, each = discover_group(model, tokenizer, datasets, config)
    assert list(each) == ["a", "b"]
    assert group.calibration["sources"] == ["a", "b"]
    assert group.calibration["tokens"] == 1200
    assert {template.calibration["tokens"] for template in each.values()} == {600}
    # a dataset's own networks are those of a discovery on it alone, up to the sample's seed
    alone = discover_networks(
        model, tokenizer, {"a": datasets["a"]}, FunctionalNetworkConfig(**SMALL, ica_max_tokens=600)
    )
    assert alone.calibration["sha256"] == each["a"].calibration["sha256"]
    assert match_components(alone.pooled()[0], each["a"].pooled()[0])[1].min() > 0.98
    for component in group.components:
        assert list(component.recurrence) == ["a", "b"]
        for name, found in component.recurrence.items():
            number = group.components.index(component)
            loadings, members = group.pooled()
            theirs, their_members = each[name].pooled()
            pair = torch.stack([loadings[number], theirs[found["component"]]])
            assert found["correlation"] == pytest.approx(float(torch.corrcoef(pair)[0, 1].abs()), abs=1e-4)
            assert found["iou"] == pytest.approx(
                float(overlap(members[[number]], their_members[[found["component"]]])), abs=1e-6
            )
            assert found["recurs"] == (found["iou"] > 0.2)
    group.save_pretrained(tmp_path)
    assert FunctionalNetworkTemplate.from_pretrained(tmp_path).components == group.components


def test_massive_neurons_can_be_left_out(tokenizer):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[7] *= 300
    plain, without = (
        discover_networks(model, tokenizer, texts(), FunctionalNetworkConfig(**SMALL, ica_drop_massive=ratio))
        for ratio in (None, 30)
    )
    assert plain.loadings[1][:, 7].abs().max() == max(v.abs().max() for v in plain.loadings.values())
    assert not without.loadings[1][:, 7].any()
    assert (torch.cat([v[0] for v in without.loadings.values()]) != 0).sum() == 119
    assert all(c.explained_variance <= 1 for c in without.components)


def test_special_tokens_and_rows_of_a_dataset_can_be_limited(tokenizer):
    model = tiny_model("llama")
    special = [text + "<eos>" for text in texts()]

    def tokens(**settings):
        return discover_networks(model, tokenizer, special, FunctionalNetworkConfig(**SMALL, **settings)).calibration[
            "tokens"
        ]

    assert tokens(ica_skip_special=False) == tokens() + len(special)
    assert tokens(ica_template_samples_per_ds=12) < tokens() / 3


def test_null_of_shuffled_activations_is_far_below(tokenizer):
    model = tiny_model("llama")
    config = FunctionalNetworkConfig(**SMALL, ica_standardize="zscore", ica_max_tokens=4000)
    template = discover_networks(model, tokenizer, texts(800), config)
    found = sum(component.reliability for component in template.components) / 3
    assert template.null["reliability"] < found - 0.3


DISTRIBUTED = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, "tests")
from helpers import tiny_model, tiny_rows, tiny_tokenizer
from fnsft_trl import FunctionalNetworkConfig
from fnsft_trl.discovery.discovery import discover_group
out, processes = sys.argv[1], int(sys.argv[2])
if processes > 1:
    dist.init_process_group("gloo")
    assert dist.get_world_size() == processes
rank = dist.get_rank() if processes > 1 else 0
config = FunctionalNetworkConfig(
    ica_components=3, ica_rank=24, ica_batch_size=2, ica_max_length=32, ica_max_tokens=3000, ica_until_reliable=0.9999
)
data = {s: [r["prompt"] + r["completion"] for r in tiny_rows(400, seed)] for seed, s in enumerate("ab")}
template, each = discover_group(tiny_model("llama"), tiny_tokenizer(), data, config, progress_dir=out + "/progress")
template.save_pretrained(f"{out}/{rank}")
each["b"].save_pretrained(f"{out}/{rank}b")
if processes > 1:
    dist.barrier()
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_find_the_networks_of_one(tmp_path):
    """Each reads half of the batches; both get the same template."""
    for processes in (1, 2):
        run_processes(processes, "-c", DISTRIBUTED, tmp_path / str(processes), processes)
    for name in ("", "b"):
        one = FunctionalNetworkTemplate.from_pretrained(tmp_path / f"1/0{name}")
        two = FunctionalNetworkTemplate.from_pretrained(tmp_path / f"2/0{name}")
        for file in ("config.json", "template.safetensors"):
            assert (tmp_path / f"2/0{name}" / file).read_bytes() == (tmp_path / f"2/1{name}" / file).read_bytes()
        assert one.calibration["sha256"] == two.calibration["sha256"]
        assert one.calibration["tokens"] == two.calibration["tokens"] == (3000 if not name else 1500)
        assert match_components(one.pooled()[0], two.pooled()[0])[1].min() >= 0.999
        for layer in one.mean:
            assert torch.allclose(one.mean[layer], two.mean[layer], atol=1e-5)
    assert not (tmp_path / "2" / "progress").exists()


def test_a_wrapped_model_gives_the_template_of_the_plain_one(tokenizer):
    config = FunctionalNetworkConfig(**SMALL)
    plain = discover_networks(tiny_model("llama"), tokenizer, texts(), config)
    wrapped = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["down_proj"]))
    found = discover_networks(wrapped, tokenizer, texts(), config)
    assert found.components == plain.components
    assert found.weights == plain.weights
    found.check_model(wrapped)


@pytest.mark.slow
def test_the_command_shares_the_work_and_one_process_writes(model_dir, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in tiny_rows(100)))
    arguments = ["-m", "fnsft_trl.cli", "discover", model_dir, data, "--components", "3", "--rank", "16"]
    first, second = run_processes(2, *arguments, "--max_tokens", "400", "--output_dir", tmp_path / "made")
    assert "Template saved to" in first
    assert second == ""
    assert len(FunctionalNetworkTemplate.from_pretrained(tmp_path / "made").components) == 3
