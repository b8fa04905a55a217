"""What processes leave that are killed, and what files of others come to: a part of `make faults`."""

from pathlib import Path

import fuzz
import kills
import pytest


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
        for _ in range(max(20, round(1000 * target.share))):
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
