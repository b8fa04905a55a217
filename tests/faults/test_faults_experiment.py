"""The original's experiment on the real model, killed again and again: a part of `make faults`."""

import os

import pytest
import torch
from helpers import ROOT
from small_experiment import killed_after, report, run


# tests/experiments/test_runner.py holds the same on a tiny model, in every run of the tests.
@pytest.mark.slow
@pytest.mark.skipif("FNSFT_REAL_KILLS" not in os.environ, reason="`make faults` runs it, for minutes")
def test_the_originals_experiment_after_three_kills_is_that_of_an_uninterrupted_run(tmp_path, monkeypatch):
    """With little of everything."""
    monkeypatch.chdir(ROOT)
    torch.set_num_threads(1)  # a forked process cannot use the threads of its parent
    rows = (ROOT / "recipes" / "data" / "comprehensions_test.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join(rows[:3]))
    less = ["--data", str(tmp_path / "rows.jsonl"), "--max_steps", "1", "--per_device_train_batch_size", "2"]
    less += ["--ica_max_tokens", "400", "--ica_rank", "16", "--retention_tokens", "60", "--max_new_tokens", "4"]
    folder = ROOT / "recipes" / "peft_vs_peft_ica"
    for events in (4, 40, 45):
        assert killed_after(events, folder, tmp_path / "killed", *less), events
    finished = len((tmp_path / "killed" / "cells.jsonl").read_text().splitlines())
    assert 0 < finished < 3
    for output in ("killed", "whole"):
        assert run(folder, tmp_path / output, *less) == 0
    assert report(tmp_path / "killed") == report(tmp_path / "whole")
