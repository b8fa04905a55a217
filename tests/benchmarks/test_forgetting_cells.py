"""Cells of the study of forgetting, trained on a tiny model."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import tiny_model, tiny_rows, tiny_tokenizer
from study.arms import Place, Setting, make_arm, targets_of, way_of
from study.bases import linear_modules
from study.learnt import scaled
from study.pausing import Pause
from study.plan import EVERYWHERE
from study.running import Study
from study.screening import chosen_networks, index

from fnsft_trl.discovery.directions import KeptDirections, KeptText
from fnsft_trl.errors import FNSFTError
from fnsft_trl.evaluation.retention import RetentionText


DEVICE = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


class TinyBases:
    """Directions of a tiny model on tiny rows."""

    def __init__(self, path, model, tokenizer):
        self.file = path / "kept.jsonl"
        self.file.write_text("".join(json.dumps({"text": row["prompt"]}) + "\n" for row in tiny_rows(30, seed=9)))
        sequences = [tokenizer(row["prompt"])["input_ids"] for row in tiny_rows(30, seed=9)]
        names = linear_modules(model)
        self.kept = KeptDirections.find(model, names, {"kept": KeptText(sequences)}, leading=4, title=None)
        self.names = names

    def pieces_file(self):
        return self.file

    def subspace(self, seed):
        return {name: self.kept.of(name).basis for name in self.names}

    def networks(self, directions):
        return self.subspace(0)

    def random(self, seed):
        generator = torch.Generator().manual_seed(seed)
        drawn = {
            each.modules: torch.randn(each.basis.shape, generator=generator).double() for each in self.kept.inputs
        }
        return {name: torch.linalg.qr(drawn[self.kept.of(name).modules]).Q for name in self.names}

    def of_domain(self, kind, domain, directions):
        half = slice(0, 3) if domain == "wikipedia" else slice(3, 6)
        return {name: basis[:, half] for name, basis in self.subspace(0).items() if name.endswith("down_proj")}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    rows = [row["prompt"] for row in tiny_rows(20, seed=5)]
    parts = (("wikipedia", rows[:8]), ("questions", rows[8:14]), ("docs", rows[14:]))
    texts = {name: RetentionText.from_texts(part, tokenizer) for name, part in parts}
    return Place(str(path), texts, (), TinyBases(path, model, tokenizer), steps=4, scored=(1, 2, 4), device=DEVICE)


@pytest.fixture
def study(place, tmp_path):
    study = Study(tmp_path / "cells.jsonl", tmp_path / "work", Pause(None, say=print), print, model=place.model)
    study.place = lambda part: place
    return study


def setting(arm, **changes):
    return replace(Setting("german", arm, 1e-2, 0, "gate", "choose"), **changes)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["full", "lora", "replay", "subspace", "random", "networks 3"])
def test_a_cell_has_what_was_learnt_and_lost_on_both_paths(arm, study):
    cell = json.loads(json.dumps(study.cell(setting(arm))))
    assert [point["step"] for point in cell["points"]] == [0, 1, 2, 4]
    assert [point["scale"] for point in cell["also"]["interpolated"]] == [0.5, 0.7]
    assert (cell["task"], cell["arm"], cell["learning_rate"], cell["seed"]) == ("german", arm, 1e-2, 0)
    assert (cell["stage"], cell["part"]) == ("gate", "choose")
    assert cell["versions"]["torch"]
    assert cell["device"] == DEVICE
    for name, text in cell["retention"].items():
        assert text["kl"] == "exact"
        assert text["sha256"]
        base, *middle, last = cell["points"]
        assert base["retention"][name]["kl"] == 0
        for point in (*middle, last, *cell["also"]["interpolated"]):
            assert sum(point["kl_sums"][name]) / text["tokens"] == pytest.approx(
                point["retention"][name]["kl"], rel=1e-4
            )
        assert last["retention"][name]["kl"] > cell["also"]["interpolated"][0]["retention"][name]["kl"] > 0
    assert not list(study.work.glob("cell"))


@pytest.mark.slow
def test_a_confirming_cell_is_scored_on_its_path_alone(study, monkeypatch):
    monkeypatch.setattr("study.running.capability", lambda trainer: {"acc_norm": 0.5})
    cells = [study.cell(setting("lora", part="confirm", path=path)) for path in ("steps", "scales")]
    assert [[point["step"] for point in cell["points"]] for cell in cells] == [[0, 1, 2, 4], [0, 4]]
    assert [len(cell["also"].get("interpolated", ())) for cell in cells] == [0, 2]
    assert cells[0]["points"][-1] == cells[1]["points"][-1]
    assert [cell["also"]["capability"] for cell in cells] == [{"acc_norm": 0.5}] * 2


@pytest.mark.slow
def test_a_cell_is_the_same_again_and_a_line_each_in_the_file(study):
    wanted = [setting("full"), setting("base", learning_rate=0.0)]
    study.run(lambda found: wanted)
    first = study.file.read_bytes()
    study.file.unlink()
    study.run(lambda found: wanted)
    assert study.file.read_bytes() == first
    assert len(first.splitlines()) == 2
    base = study.cells()["choose", "german", "base", 0.0, 0]
    assert base["demonstrated"] != base["points"][0]["learning"]
    trained = study.cells()["choose", "german", "full", 1e-2, 0]
    assert trained["points"][0]["learning"] == pytest.approx(base["points"][0]["learning"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arm", "task"),
    [
        *(("subspace", "german"), ("random", "german"), ("networks of docs 3", "german"), ("full", "german")),
        ("subspace", f"german{EVERYWHERE}"),
    ],
)
def test_what_is_protected_does_not_change_and_nothing_but_the_shifts_layers_train(arm, task, place, tmp_path):
    chosen = setting(arm, task=task)
    trainer = make_arm(chosen, place).make_trainer(0, tmp_path, None)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    change = {name: (p.detach() - before[name]).cpu() for name, p in trainer.model.named_parameters()}
    bases = {"subspace": place.bases.subspace(0), "random": place.bases.random(0), "full": {}}
    basis = bases.get(arm) or place.bases.of_domain("networks", "docs", 3)
    changed = {name for name, d in change.items() if d.any()}
    trained = {name for name in linear_modules(trainer.model) if name.endswith(targets_of(task))}
    trained &= set(basis) if arm != "full" else trained
    assert changed == {f"{name}.weight" for name in trained}
    along = place.bases.subspace(0) if arm == "full" else basis
    along = {name: directions for name, directions in along.items() if name in trained}
    ratios = [
        float((change[f"{n}.weight"].double() @ u).norm() / change[f"{n}.weight"].norm()) for n, u in along.items()
    ]
    assert (max(ratios) < 1e-5) == (arm != "full")


@pytest.mark.slow
def test_half_of_a_change_is_half_of_it(place, tmp_path):
    for arm in ("full", "lora"):
        trainer = make_arm(setting(arm), place).make_trainer(0, tmp_path / arm, None)
        trainer.train()
        start = next(c.weights for c in trainer.callback_handler.callbacks if type(c).__name__ == "Start")
        whole = merged(trainer.model)
        with scaled(trainer.model, start, 0.5):
            half = merged(trainer.model)
        with scaled(trainer.model, start, 0.0):
            base = merged(trainer.model)
        assert all(torch.equal(whole[name], value) for name, value in merged(trainer.model).items())
        reference = tiny_model("llama").get_parameter("model.layers.0.mlp.up_proj.weight")
        assert torch.allclose(base["model.layers.0.mlp.up_proj.weight"], reference, atol=1e-6)
        for name in whole:
            assert torch.allclose(half[name], (whole[name] + base[name]) / 2, atol=1e-6)


def merged(model) -> dict:
    """Weights of the MLPs as they act."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = {}
    for name, module in base.named_modules():
        if name.endswith(("gate_proj", "up_proj", "down_proj")):
            delta = module.get_delta_weight("default") if hasattr(module, "get_delta_weight") else 0
            weight = module.base_layer.weight if hasattr(module, "base_layer") else module.weight
            found[f"{name}.weight"] = (weight + delta).detach().cpu().clone()
    return found


@pytest.mark.slow
def test_the_screen_takes_directions_out_of_a_trained_model_and_leaves_it_as_it_was(study):
    cell = study.cell(setting("screen", part="screen", stage="screen"))
    ways = {way["way"]: way for way in cell["also"]["screen"]}
    assert len(ways) == 2 + 3 + 1 + 3 * 2 * 4
    kl = {name: way["retention"]["wikipedia"]["kl"] for name, way in ways.items()}
    assert 0 < kl["subspace"] < kl["random"] < cell["points"][-1]["retention"]["wikipedia"]["kl"]
    assert 0 < kl["down alone"] < cell["points"][-1]["retention"]["wikipedia"]["kl"]
    assert kl["ceiling of docs 8"] != kl["ceiling of wikipedia 8"]
    assert chosen_networks(cell) in (32, 64, 128)
    assert index(cell, "ceiling", 8) == index(cell, "pca", 8)  # the tiny bases are the same of every kind


def test_an_arm_that_is_not_known_is_refused():
    with pytest.raises(FNSFTError, match="no arm 'rest'"):
        way_of("rest")
