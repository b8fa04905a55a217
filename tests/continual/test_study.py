"""A continual run: every method through order 1, killed and resumed, and what it says where something is wrong."""

import json

import pytest
import torch
from small_study import TASKS, every_arm, make_plan, run


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A forked process cannot use the threads of its parent."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_order_1_of_the_four_tasks_with_every_method(tmp_path, model_dir, capsys, log):
    arms = every_arm(tmp_path)
    plan = make_plan(tmp_path, model_dir, arms, single=False)
    assert run(plan, tmp_path / "out") == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["outcomes"]
    assert [each["arm"] for each in found] == list(arms)
    printed = capsys.readouterr().out
    for each in found:
        stages = 1 if each["arm"] == "multitask" else len(TASKS)
        assert [len(row) for row in each["mean"]] == [len(TASKS)] * (stages + 1)
        assert each["mean"][0] == found[0]["mean"][0]  # the model before training is one
        assert len(each["retention"]["general"][0]) == stages
        assert each["arm"] in printed
    free = next(each["free"] for each in found if each["arm"] == "grows")
    assert [stage["fewest"] for stage in free] == sorted([stage["fewest"] for stage in free], reverse=True)
    assert len(free) == len(TASKS) - 1
    assert free[0]["fewest"] < free[0]["of"]
