"""The benchmark of whole models: each part of it runs, on a tiny one, and ends in the tables."""

import json
import sys

import pytest
from helpers import ROOT


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of its memory from /proc")
def test_every_part_is_measured_and_makes_its_row(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import big_models_page
    import whole_models

    results = tmp_path / big_models_page.WHOLE
    command = ["--device", "cpu", "--shapes", "tiny", "--tokens", "1100", "--components", "4", "--rounds", "5"]
    monkeypatch.setattr(sys, "argv", ["whole_models.py", *command, "--seconds", "100000", "--output", str(results)])
    monkeypatch.setattr(whole_models, "SIZES", ((1, 16), (2, 16)))
    whole_models.main()
    found = json.loads(results.read_text())
    assert found["failed"] == {}
    sizes = ["training of 16 tokens", "training of 32 tokens"]
    assert list(found["shapes"]["tiny"]) == ["building", "masked", "discovery", *sizes]
    assert found["shapes"]["tiny"]["discovery"]["tokens"] == 1100
    arms = [f"{arm}{held}" for arm in ("lora", "delta 10%", "full") for held in ("", " protected")]
    assert [list(found["shapes"]["tiny"][size]["arms"]) for size in sizes] == [arms, arms]
    results.write_text(json.dumps(found | {"machine": found["machine"] | {"device": "Card", "cuda": "13.0"}}))
    tables = big_models_page.markdown(tmp_path)
    assert sum(line.startswith("| tiny") for line in tables.splitlines()) == 1 + 2 * 3


def test_a_part_that_fails_is_noted_and_ends_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from whole_models import Record

    record = Record({}, tmp_path / "found.json")
    record.keep("tiny", "building", {"seconds": 1.23456})
    assert record.attempt("tiny masked", lambda: 1 / 0) is None
    assert record.attempt("tiny discovery", lambda: 7) == 7
    assert json.loads((tmp_path / "found.json").read_text()) == {
        "machine": {},
        "shapes": {"tiny": {"building": {"seconds": 1.235}}},
        "failed": {"tiny masked": "ZeroDivisionError: division by zero"},
    }
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"shape": "tiny", "part": "building", "seconds": 1.235},
        {"failed": "tiny masked", "error": "ZeroDivisionError: division by zero"},
    ]
