"""Cells: a file that one process writes to and any may read."""

from fnsft_trl.experiments.cells import Cells
from fnsft_trl.writing import written_whole


def test_reading_takes_nothing_from_a_writer_and_writing_clears_what_a_killed_one_left(tmp_path):
    path = tmp_path / "cells.jsonl"
    Cells(path).add({"arm": "a", "seed": 0})
    with written_whole(path) as scratch:
        scratch.write_text('{"arm": "b", "seed": 1}\n')
        assert set(Cells(path).found) == {("a", 0)}
        assert scratch.exists()
    found = Cells(path)
    assert set(found.found) == {("b", 1)}
    left = scratch.parent
    left.mkdir(exist_ok=True)
    scratch.write_text("half")
    found.add({"arm": "c", "seed": 2})
    assert not left.exists()
    assert set(Cells(path).found) == {("b", 1), ("c", 2)}
