"""What processes leave that are killed, and what files of others come to: a part of `make faults`."""

from pathlib import Path

import fuzz
import kills
import pytest
from helpers import ROOT


pytestmark = pytest.mark.slow

FOUND = sorted((Path(__file__).parent / "found").iterdir())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return kills.prepare(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("name", ["discovery", "training, neuron deltas"])
def test_what_a_killed_process_leaves_goes_on_to_the_same(name, inputs, tmp_path):
    trial = kills.Trial(kills.OPERATIONS[name], inputs, tmp_path / "out")
    trial.measure()
    for number in kills.SIGNALS.values():
        assert trial.interrupted(number, 0.5) in ("survived", "over")


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    return fuzz.targets(tmp_path_factory.mktemp("targets"))


def test_files_that_were_changed_are_read_or_refused(targets, tmp_path):
    for name, target in targets.items():
        draw, place = fuzz.random.Random(f"quick {name}"), tmp_path / name
        place.mkdir()
        for _ in range(max(40, round(1000 * target.share))):
            data = target.input(draw)
            assert fuzz.outcome(target, data, place) is None, (name, data)


@pytest.mark.parametrize("path", FOUND, ids=lambda path: path.name)
def test_what_was_found_once_is_read_or_refused(path, targets, tmp_path):
    target = targets[path.name.partition("-")[0].replace("_", " ")]
    assert fuzz.outcome(target, path.read_bytes(), tmp_path) is None


def test_a_defect_a_loop_and_a_long_message_are_told(tmp_path, monkeypatch):
    def defect(data, place):
        raise KeyError(data)

    def loop(data, place):
        while True:
            pass

    monkeypatch.setattr(fuzz, "SECONDS", 1)
    assert "KeyError" in fuzz.outcome(fuzz.Target([], defect), b"", tmp_path)
    assert "no end" in fuzz.outcome(fuzz.Target([], loop), b"", tmp_path)


KILLS = Path(__file__).parent / "kills.jsonl"


def test_the_table_of_the_page_is_what_the_tries_were_and_none_lost_anything():
    lines = kills.read_lines(KILLS)
    assert kills.table(lines) in (ROOT / "docs" / "reliability.md").read_text()
    keys = [(line["operation"], line["signal"], line["seed"], line["try"]) for line in lines]
    assert len(keys) == len(set(keys))
    for line in lines:
        name = f"{line['seed']} {line['operation']} {line['signal']} {line['try']}"
        assert line["moment"] == round(kills.random.Random(name).random(), 4)
        assert line["outcome"] in (kills.SURVIVED, kills.OVER)


def test_tries_go_on_where_they_were(tmp_path):
    lines = kills.Lines(tmp_path / "kills.jsonl", 0)
    lines.add("discovery", "SIGKILL", 0, 0.5, kills.SURVIVED, None)
    lines.add("discovery", "SIGKILL", 1, 0.99, kills.OVER, None)
    lines.add("discovery", "SIGTERM", 0, 0.5, kills.LOST, "why")
    with (tmp_path / "kills.jsonl").open("a") as file:
        file.write('{"operation": "disc')  # the process was killed while it wrote this one
    again = kills.Lines(tmp_path / "kills.jsonl", 0)
    assert again.found == lines.found
    asked = list(kills.missing(2, again, ["discovery", "probe"]))
    assert asked.count(("discovery", "SIGKILL")) == asked.count(("discovery", "SIGTERM")) == 1
    assert asked.count(("probe", "SIGKILL")) == 2
    assert kills.counts(again.found)["discovery", "SIGKILL"] == {kills.SURVIVED: 1, kills.OVER: 1}
    assert list(kills.missing(2, kills.Lines(tmp_path / "kills.jsonl", 1), ["discovery"])) != []
    assert "| discovery | SIGKILL | 1 | 1 | 0 |" in kills.table(again.found)
    assert "| discovery | SIGTERM | 1 | 0 | 1 |" in kills.table(again.found)


def test_a_trial_tells_what_differs_and_what_is_left_hidden(tmp_path):
    place = tmp_path / "place"
    out = place / "out"

    def call(inputs, out):
        return []

    trial = kills.Trial(kills.Operation(call, ("*.json",)), tmp_path, place)
    trial._begin()
    out.mkdir()
    (out / "a.json").write_text("1")
    trial.expected = trial._found()
    trial._compare("now")
    for name, text in (("a.json", "2"), ("b.json", "1"), (".b.json.left", "")):
        (out / name).write_text(text)
        with pytest.raises(AssertionError, match=name):
            trial._compare("then")
        (out / name).unlink()
        (out / "a.json").write_text("1")
