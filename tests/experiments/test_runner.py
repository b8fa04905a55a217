"""An experiment that is killed goes on where it was, and its report is that of an uninterrupted one."""

import json
import os
import re
import shlex
import shutil
import signal
import time
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain

import psutil
import pytest
import torch
import yaml
from peft import load_peft_weights, set_peft_model_state_dict
from processes import Started
from small_experiment import ARMS, edit, killed_after, make_folder, report, run

from fnsft_trl.cli import main
from fnsft_trl.cli.recipe_arms import find_recipes, read_arms
from fnsft_trl.experiments.arms import train_and_score
from fnsft_trl.experiments.runner import own_device


# Events of a process that writes, after so many of which it is killed: in a discovery, and in trainings.
KILLS = (3, 40)

# A command in a group of processes of its own, as a terminal begins it.
OF_ITS_OWN = "import os, sys; os.setsid(); from fnsft_trl.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A forked process cannot use the threads of its parent."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory, model_dir):
    """Recipes, data, and a finished experiment in `whole`."""
    directory = tmp_path_factory.mktemp("experiment")
    folder = make_folder(directory, model_dir)
    assert run(folder, directory / "whole") == 0
    return directory


@pytest.mark.slow
def test_a_report_after_kills_is_that_of_an_uninterrupted_run(place, tmp_path):
    output = tmp_path / "killed"
    found = []
    for events in chain(KILLS, range(70, 400, 20)):  # further and further, until a cell was finished
        if len(found) >= len(KILLS) and found[-1]:
            break
        assert killed_after(events, place / "recipes", output), events
        found.append(
            len((output / "cells.jsonl").read_text().splitlines()) if (output / "cells.jsonl").exists() else 0
        )
    assert run(place / "recipes", output) == 0
    assert report(output) == report(place / "whole")
    assert found == sorted(found)  # nothing that was finished is lost
    assert 0 < found[-1] < len(ARMS) * 2


def test_a_finished_experiment_trains_nothing_again(place, monkeypatch):
    before = report(place / "whole")
    monkeypatch.setattr("fnsft_trl.experiments.runner.train_and_score", None)
    assert run(place / "recipes", place / "whole") == 0
    assert report(place / "whole") == before


@pytest.fixture
def copied(place, tmp_path):
    """The recipes and the finished experiment, to be changed."""
    shutil.copytree(place / "recipes", tmp_path / "recipes")
    shutil.copytree(place / "whole", tmp_path / "whole")
    return tmp_path


def refused(capsys, *words) -> str:
    assert main(["experiment", *map(str, words)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    return line


def test_a_changed_recipe_is_named_with_what_it_was(copied, capsys):
    edit(copied / "recipes" / "lora.yaml", learning_rate=3e-3)
    line = refused(capsys, copied / "recipes", "--output_dir", copied / "whole")
    assert "lora (seed 0)" in line
    assert "learning_rate was 0.01 and is now 0.003" in line


def test_what_changes_no_number_may_change(copied):
    edit(copied / "recipes" / "lora.yaml", logging_steps=1, output_dir="elsewhere")
    before = report(copied / "whole")
    assert run(copied / "recipes", copied / "whole") == 0
    assert report(copied / "whole") == before


def test_changed_data_is_named(copied, place, capsys):
    content = (place / "test.jsonl").read_text()
    (place / "test.jsonl").write_text(content.replace("Say", "Tell"))
    try:
        line = refused(capsys, copied / "recipes", "--output_dir", copied / "whole")
    finally:
        (place / "test.jsonl").write_text(content)
    assert f"the content of {place / 'test.jsonl'} is not what it was" in line


@pytest.mark.slow
def test_restart_trains_anew_what_has_changed_and_nothing_else(copied, monkeypatch):
    edit(copied / "recipes" / "lora.yaml", learning_rate=3e-3)
    cells = {(c["arm"], c["seed"]): c for c in map(json.loads, (copied / "whole" / "cells.jsonl").open())}
    assert run(copied / "recipes", copied / "whole", "--restart") == 0
    for cell in map(json.loads, (copied / "whole" / "cells.jsonl").open()):
        assert (cell == cells[cell["arm"], cell["seed"]]) == (cell["arm"] != "lora")


@pytest.mark.slow
def test_a_cell_that_fails_does_not_keep_the_others_from_being_finished(place, tmp_path, capsys, model_dir):
    folder = make_folder(tmp_path, model_dir)
    (folder / "random.yaml").unlink()
    edit(folder / "deltas.yaml", learning_rate=1e30)
    edit(folder / "experiment.yaml", seeds=[0])
    line = refused(capsys, folder, "--output_dir", tmp_path / "out")
    assert "1 of 3 failed" in line
    assert "deltas, seed 0: " in line
    assert [json.loads(text)["arm"] for text in (tmp_path / "out" / "cells.jsonl").open()] == ["lora"]


def test_an_arm_that_is_held_to_a_budget_is_scored_as_what_it_comes_back_to(tmp_path, model_dir):
    folder = make_folder(tmp_path, model_dir)
    edit(folder / "lora.yaml", retention_budget=0.0, eval_strategy="steps", eval_steps=1, learning_rate=0.1)
    assert run(folder / "lora.yaml", tmp_path / "out", "--data", str(tmp_path / "test.jsonl")) == 0
    (cell,) = [json.loads(line) for line in (tmp_path / "out" / "cells.jsonl").open()]
    assert "the model is again what it was before" in cell["budget"]
    first, last = cell["points"][0], cell["points"][-1]
    assert last["step"] > 0
    assert last["learning"] == pytest.approx(first["learning"], abs=1e-6)
    assert last["retention"]["general"]["rise"] == pytest.approx(0, abs=1e-6)
    assert cell["budget"] in (tmp_path / "out" / "report.md").read_text()


def test_arms_share_one_discovery_and_see_the_same_rows(place):
    cells = [json.loads(line) for line in (place / "whole" / "cells.jsonl").open()]
    assert len(list((place / "whole" / "templates").iterdir())) == 1
    assert len({cell["networks"] for cell in cells if cell["arm"] != "lora"}) == 1
    assert len({cell["eval_data"] for cell in cells}) == 1
    assert len({cell["train_data"] for cell in cells}) == 1
    assert len({cell["points"][0]["learning"] for cell in cells}) == 1  # the model before training
    random = [cell["trained"]["neurons"]["sha256"] for cell in cells if cell["arm"] == "random"]
    outside = [cell["trained"]["neurons"]["sha256"] for cell in cells if cell["arm"] == "deltas"]
    assert len(set(random)) == 2  # other neurons for each seed
    assert len(set(outside)) == 1


def test_a_cell_says_what_was_learnt_and_lost_at_every_evaluation(place):
    cells = [json.loads(line) for line in (place / "whole" / "cells.jsonl").open()]
    for cell in cells:
        steps = [0, 2, 3] if cell["arm"] == "deltas" else [0, 3]
        assert [point["step"] for point in cell["points"]] == steps
        for point in cell["points"]:
            assert set(point["retention"]["general"]) == {"cross_entropy", "rise", "kl"}
        assert cell["points"][0]["retention"]["general"]["rise"] == 0
        assert cell["points"][-1]["learning"] == cell["scores"]["nll"] == sum(cell["rows"]["nll"]) / 8
        text = cell["retention"]["general"]
        rise = (sum(text["nll"]) - sum(text["base_nll"])) / text["tokens"]
        assert rise == pytest.approx(cell["points"][-1]["retention"]["general"]["rise"], abs=1e-9)
        assert {"task", "arm", "learning_rate", "seed", "versions", "sources"} <= set(cell)


def test_an_arm_gives_what_its_recipe_gives_alone(place, tmp_path):
    from safetensors.torch import load_file
    from torch import equal

    alone = ["train", "--config", str(place / "recipes" / "deltas.yaml"), "--seed", "1"]
    assert main([*alone, "--eval_strategy", "no", "--output_dir", str(tmp_path / "alone")]) == 0
    here = load_file(place / "whole" / "arms" / "deltas" / "seed-1" / "adapter_model.safetensors")
    there = load_file(tmp_path / "alone" / "adapter_model.safetensors")
    assert here.keys() == there.keys()
    assert all(equal(here[name], there[name]) for name in here)


def test_an_arm_that_changes_its_model_without_a_training_is_scored_before_and_after(place, tmp_path):
    source = place / "whole" / "arms" / "lora" / "seed-0"

    def take_over(trainer, directory):
        assert directory == tmp_path
        set_peft_model_state_dict(trainer.model, load_peft_weights(str(source)))

    files, _ = find_recipes([str(place / "recipes" / "lora.yaml")])
    (arm,) = read_arms(files, {}, data=[str(place / "test.jsonl")])
    found = train_and_score(replace(arm, name="taken", change=take_over), 0, tmp_path)
    cells = [json.loads(line) for line in (place / "whole" / "cells.jsonl").open()]
    (trained,) = [cell for cell in cells if (cell["arm"], cell["seed"]) == ("lora", 0)]
    assert [point["step"] for point in found["points"]] == [0, 1]
    assert found["points"][0] == trained["points"][0]
    assert found["scores"]["nll"] == pytest.approx(trained["scores"]["nll"], rel=1e-6)
    assert found["retention"]["general"]["nll"] == pytest.approx(trained["retention"]["general"]["nll"], rel=1e-6)
    assert found["rows"]["exact_match"] == trained["rows"]["exact_match"]
    saved = load_peft_weights(str(tmp_path))
    assert all(torch.equal(saved[name], value) for name, value in load_peft_weights(str(source)).items())


def test_a_folder_of_files_that_no_experiment_wrote_is_left_alone(copied, capsys):
    edit(copied / "recipes" / "experiment.yaml", seeds=[5])
    mine = copied / "whole" / "arms" / "lora" / "seed-5" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    for name in ("deltas", "random"):
        (copied / "recipes" / f"{name}.yaml").unlink()
    assert "files that no experiment has written" in refused(
        capsys, copied / "recipes", "--output_dir", copied / "whole"
    )
    assert mine.read_text() == "mine"


def test_a_file_of_cells_that_is_none_is_one_line(copied, capsys):
    (copied / "whole" / "cells.jsonl").write_text("{}\n")
    assert "holds no cells" in refused(capsys, copied / "recipes", "--output_dir", copied / "whole")


def test_the_report_says_what_was_compared_and_on_how_much(place):
    markdown = (place / "whole" / "report.md").read_text()
    results = json.loads((place / "whole" / "results.json").read_text())
    for name in ARMS:
        assert re.search(rf"^\| {name} \| [\d,]+ \| .* \[", markdown, flags=re.MULTILINE)
    assert "| before training |" in markdown
    assert "n = 8 rows that were held out, and 60 tokens of general" in markdown
    assert "over n = 2 seeds" in markdown
    assert "| lora - deltas |" in markdown
    assert "| `lora_r` | - | 2 | - |" in markdown
    assert "learning_rate" not in markdown.partition("What differs")[2].partition("## ")[0]  # it is the same
    for part in results["arms"]:
        assert part["nll"]["over"] == part["retention"]["general"]["rise"]["over"] == "seeds"
    for cell in results["cells"]:
        assert f"{cell['eval_data']}" in markdown
    assert str(place / "whole") not in markdown


def test_one_seed_is_said_to_be_one(copied):
    assert run(copied / "recipes", copied / "whole", "--seeds", "1") == 0
    markdown = (copied / "whole" / "report.md").read_text()
    results = json.loads((copied / "whole" / "results.json").read_text())
    assert "One seed, so nothing is known of what another seed would give" in markdown
    assert results["seeds"] == [1]
    for part in results["arms"]:
        assert part["nll"]["over"] is None
        assert part["retention"]["general"]["rise"]["over"] == "texts"
    assert len((copied / "whole" / "cells.jsonl").read_text().splitlines()) == len(ARMS) * 2  # all are kept


@pytest.mark.slow
def test_several_jobs_give_the_report_of_one_and_end_with_the_process_that_began_them(place, tmp_path):
    output = tmp_path / "two"
    with two_jobs(place, output, both_train) as started:
        children = psutil.Process(started.process.pid).children(recursive=True)
        started.process.kill()
    assert len(children) >= 2
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    assert run(place / "recipes", output, "--jobs", "2") == 0
    assert report(output) == report(place / "whole")


def both_train(started, output):
    return len(list(output.glob("arms/*/*"))) > 1


def both_start(started, output):
    """That is, they import what they need."""
    others = psutil.Process(started.process.pid).children(recursive=True)
    return sum("spawn_main" in " ".join(other.cmdline()) for other in others) > 1


@contextmanager
def two_jobs(place, output, begun):
    """A process that trains in two others, when these have begun; it does not outlive the test."""
    words = ["experiment", str(place / "recipes"), "--output_dir", str(output), "--jobs", "2"]
    started = Started("-c", OF_ITS_OWN, *words)
    try:
        while not begun(started, output):
            assert started.process.exitcode is None, started.end().stderr
            time.sleep(0.05)
        yield started
    finally:
        started.process.kill()
        started.process.join()


@pytest.mark.slow
@pytest.mark.parametrize(("to", "begun"), [("all", both_train), ("the first", both_train), ("all", both_start)])
def test_several_jobs_that_are_interrupted_say_so_once_and_at_once(to, begun, place, tmp_path):
    output = tmp_path / "two"
    with two_jobs(place, output, begun) as started:
        children = psutil.Process(started.process.pid).children(recursive=True)
        (os.killpg if to == "all" else os.kill)(started.process.pid, signal.SIGINT)
        done = started.end(timeout=60)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("fnsft ")]
    asked = shlex.join(["experiment", str(place / "recipes"), "--output_dir", str(output), "--jobs", "2"])
    assert lines == [f"fnsft experiment: interrupted; what was finished is kept, go on with `fnsft {asked}`"]
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    cells = output / "cells.jsonl"
    assert len(cells.read_text().splitlines() if cells.exists() else []) < len(ARMS) * 2


def test_each_process_has_an_accelerator_of_its_own():
    assert own_device(0, None, 1) is None
    assert [own_device(number, None, 2) for number in range(3)] == ["0", "1", "0"]
    assert [own_device(number, "4,6", 2) for number in range(3)] == ["4", "6", "4"]


def test_the_shared_file_is_one_of_the_verb(place):
    assert set(yaml.safe_load((place / "recipes" / "experiment.yaml").read_text())) == {"data", "seeds"}
