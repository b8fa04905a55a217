"""What cells say of an arm in an order, by hand, and the report of it."""

import json

import pytest
from helpers import tiny_rows

from fnsft_trl.continual import Plan, Task, TaskConfig, Way
from fnsft_trl.continual.outcome import outcomes, spread
from fnsft_trl.continual.reporting import report_study


def scores(**found):
    return {"tasks": {name: {"score": value} for name, value in found.items()}}


def cell(arm, seed, nll, base_nll, **found):
    """Of general text with 4 and 6 tokens."""
    text = {"sequence_tokens": [4, 6], "base_nll": base_nll, "nll": nll, "sha256": "x"}
    also = scores(**found) | (
        {"free": FREE} if arm == "grows/a" else {"overlap": 0.25 + seed} if arm == "grows/a-b" else {}
    )
    prompts = {**text, "sha256": arm}  # of each stage's own task
    return {"arm": arm, "seed": seed, "also": also, "retention": {"wiki": text, "task": prompts}}


FREE = {"fewest": 3, "of": 10, "share": 0.3, "module": "m", "scarce": 0, "inputs": 2, "added": 2}
BASE = scores(a=0.1, b=0.2)


@pytest.fixture
def found():
    plan = Plan(("a", "b"), {"forth": ("a", "b")}, {"grows": Way(), "all": Way(multitask=True)})
    cells = []
    for seed, end in ((0, 0.4), (1, 0.6)):
        cells += [
            cell("grows/a", seed, [9.0, 12.0], [8.0, 12.0], a=0.8, b=0.3),
            cell("grows/b", seed, [8.0, 12.0], [8.0, 12.0], a=0.1, b=0.5),
            cell("grows/a-b", seed, [11.0, 13.0], [9.0, 12.0], a=end, b=0.7),
            cell("all/a+b", seed, [8.0, 13.0], [8.0, 12.0], a=0.9, b=0.7),
        ]
    return outcomes(plan, BASE, cells, [0, 1])


def test_matrices_transfer_and_what_general_text_has_lost(found):
    grows, every = found
    assert grows.matrices[1] == [[0.1, 0.2], [0.8, 0.3], [0.6, 0.7]]
    assert grows.mean()[2] == pytest.approx([0.5, 0.7])
    assert grows.of_seeds("average") == pytest.approx([0.55, 0.65])
    assert grows.of_seeds("backward") == pytest.approx([-0.4, -0.2])
    assert grows.of_seeds("forward_to_single") == pytest.approx([(0.0 + 0.2) / 2] * 2)
    assert grows.of_seeds("forward_to_base") == pytest.approx([0.1] * 2)
    assert grows.retention == {"wiki": [pytest.approx([0.1, 0.4])] * 2}  # from the first stage's base, and no prompts
    assert grows.lost("wiki") == pytest.approx([0.4, 0.4])
    assert grows.free == [FREE]
    assert (grows.overlap, every.overlap) == ([[0.25], [1.25]], [[], []])
    assert (every.of_seeds("average"), every.of_seeds("backward")) == (pytest.approx([0.8, 0.8]), [])
    assert spread([0.5, 0.7]) == "0.600 ± 0.141"
    assert (spread([]), spread([0.5])) == ("-", "0.500")


def test_the_report_shows_all_of_it_and_is_the_same_for_the_same_cells(found, tmp_path):
    config = TaskConfig(dataset="rows.jsonl")
    tasks = [Task(name, config, tiny_rows(3), tiny_rows(2), ()) for name in ("a", "b")]
    for place in ("one", "two"):
        given = {"model": "tiny", "seeds": [0, 1], "settings": {"grows": {"lr": 1}, "all": {}}}
        printed = report_study(found, tasks, tmp_path / place, **given)
    assert "forth: a, b" in printed
    assert "0.600 ± 0.071" in printed
    page = (tmp_path / "one" / "report.md").read_text()
    for part in (
        "matrix-forth.png",
        "average-forth.png",
        "retention-wiki-forth.png",
        "3 of 10",
        "30%",
        "+0.400",
        "0.750 ± 0.707",
    ):
        assert part in page
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    assert results["outcomes"][0]["mean"][1] == [0.8, 0.3]
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)
