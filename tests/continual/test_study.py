"""A continual run: every method through order 1, killed and resumed, and what it says where something is wrong."""

import json
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from small_experiment import killed_after
from small_study import LORA, SHARED, TASKS, arms_with_networks, every_arm, make_plan, report, run
from transformers import AutoModelForCausalLM

from fnsft_trl.cli import main
from fnsft_trl.cli.continual import _study
from fnsft_trl.cli.plans import PlanFile
from fnsft_trl.continual import Task
from fnsft_trl.continual.finishing import StageWork, finish_stage
from fnsft_trl.continual.plan import Stage
from fnsft_trl.continual.stages import stage_seed
from fnsft_trl.continual.study import folder_of
from fnsft_trl.training.orthogonal import lora_factors


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
    for penalised, plain in (("replay", "lora"), ("ewc", "lora"), ("olora", "new"), ("lwf", "full")):
        last = [next((tmp_path / "out" / "arms" / arm).glob("*-agnews/seed-0")) for arm in (penalised, plain)]
        (weights,) = (path.name for path in last[0].glob("*model.safetensors"))
        assert (last[0] / weights).read_bytes() != (last[1] / weights).read_bytes(), penalised
        if penalised != "replay":
            assert list(json.loads((last[0] / "results.json").read_text())["penalties"]) == [penalised]
    overlap = next(each["overlap"] for each in found if each["arm"] == "olora")
    assert [len(of_seed) for of_seed in overlap] == [len(TASKS) - 1]
    assert all(0 < value < 0.99 for value in overlap[0])
    free = next(each["free"] for each in found if each["arm"] == "grows")
    assert [stage["fewest"] for stage in free] == sorted([stage["fewest"] for stage in free], reverse=True)
    assert len(free) == len(TASKS) - 1
    assert free[0]["fewest"] < free[0]["of"]
    assert log.text.count("are free for later stages") == 2 * (len(TASKS) - 1)  # of two arms that grow


@pytest.mark.slow
def test_networks_are_found_once_for_each_task_or_on_what_was_learnt(tmp_path, model_dir):
    plan = make_plan(tmp_path, model_dir, arms_with_networks(tmp_path), orders=[["dbpedia", "agnews"]], single=False)
    assert run(plan, tmp_path / "out") == 0
    cells = [json.loads(line) for line in (tmp_path / "out" / "cells.jsonl").open()]
    networks = {cell["arm"]: cell["networks"] for cell in cells}
    assert networks["once/dbpedia"] == networks["once/dbpedia-agnews"] == networks["so_far/dbpedia"]
    others = [networks[f"{arm}/dbpedia-agnews"] for arm in ("once", "per_task", "so_far")]
    assert len({*others, networks["per_task/dbpedia"]}) == 4
    assert all(cell["trained"]["method"] == "neuron_delta" for cell in cells)


@pytest.mark.slow
def test_a_run_that_is_killed_at_three_points_gives_the_same_matrix(tmp_path, model_dir):
    arms = {name: every_arm(tmp_path)[name] for name in ("ewc", "grows_lora")}
    plan = make_plan(tmp_path, model_dir, arms, orders=[["dbpedia", "amazon"]], max_steps=1)
    assert run(plan, tmp_path / "whole") == 0
    finished = []
    for events in (8, 60, 110, 160, 210):
        if len(finished) >= 3 and 0 < finished[-1] < 6:
            break
        assert killed_after(events, plan, tmp_path / "killed", start=run), events
        cells = tmp_path / "killed" / "cells.jsonl"
        finished.append(len(cells.read_text().splitlines()) if cells.exists() else 0)
    assert finished == sorted(finished)  # nothing that was finished is lost
    assert 0 < finished[-1] < 6
    assert run(plan, tmp_path / "killed") == 0
    assert report(tmp_path / "killed") == report(tmp_path / "whole")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_dir):
    """A plan of two stages, done."""
    place = tmp_path_factory.mktemp("study")
    plan = make_plan(place, model_dir, {"full": {"learning_rate": 1e-3}}, orders=[["dbpedia", "amazon"]], max_steps=1)
    assert run(plan, place / "out") == 0
    return place


@pytest.mark.slow
def test_what_is_finished_is_not_done_again_and_models_that_are_done_with_go(finished, monkeypatch):
    before = report(finished / "out")
    arms = finished / "out" / "arms" / "full"
    assert sorted(path.name for path in arms.iterdir()) == ["amazon", "dbpedia", "dbpedia-amazon"]
    kept = {path.parent.parent.name for path in arms.rglob("model.safetensors")}
    assert kept == {"dbpedia-amazon"}
    with monkeypatch.context() as patch:
        patch.setattr("fnsft_trl.experiments.runner.train_and_score", None)
        assert run(finished / "plan.yaml", finished / "out") == 0
    assert report(finished / "out") == before
    cells = finished / "out" / "cells.jsonl"
    cells.write_text("".join(line for line in cells.open() if '"full/dbpedia-amazon"' not in line))
    assert run(finished / "plan.yaml", finished / "out") == 0  # for which the first stage is trained again
    assert report(finished / "out") == before


@pytest.mark.slow
def test_a_plan_that_has_changed_is_refused_or_trained_anew(finished, capsys):
    plan, out = finished / "plan.yaml", finished / "out"
    assert run(plan, out, "--max_length", "40") == 2
    assert "max_length was 48 and is now 40" in capsys.readouterr().err
    rows = (finished / "amazon-train.jsonl").read_text()
    (finished / "amazon-train.jsonl").write_text(rows.replace("am Say", "am Tell"))
    assert run(plan, out) == 2
    assert "amazon-train.jsonl is not what it was" in capsys.readouterr().err
    (finished / "amazon-train.jsonl").write_text(rows)
    assert run(plan, out, "--restart") == 0


def test_a_wrong_column_is_one_line_before_a_model_is_loaded(tmp_path, model_dir, capsys, monkeypatch):
    plan = make_plan(tmp_path, model_dir, {"lora": LORA})
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text(tasks.read_text().replace("{title}", "{titel}", 1))
    monkeypatch.setattr("fnsft_trl.cli.continual.check_model", None)
    assert run(plan, tmp_path / "out") == 2
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if "error:" in line]
    assert "dbpedia-train.jsonl has no column 'titel' (it has title, content, label); did you mean 'title'?" in line
    assert not (tmp_path / "out" / "cells.jsonl").exists()


def test_a_share_that_replays_nothing_is_one_line(tmp_path, model_dir, capsys):
    plan = make_plan(tmp_path, model_dir, {"replay_1": {**LORA, "replay": 0.01}})
    assert run(plan, tmp_path / "out") == 2
    assert "arm replay_1 replays 0.01 of each batch" in capsys.readouterr().err


def test_a_new_adapter_begins_in_other_directions_than_the_one_before(tmp_path, model_dir, monkeypatch):
    monkeypatch.setattr("fnsft_trl.cli.continual.check_model", lambda asked: None)
    plan = make_plan(tmp_path, model_dir, {"new": {**LORA, "adapter": "new"}, "same": LORA})
    file = PlanFile.read(str(plan), {})
    study = _study(file, [Task.read(name, config) for name, config in file.tasks.items()], tmp_path)
    first, second = Stage((("dbpedia",),)), Stage((("dbpedia",), ("amazon",)))
    merged = folder_of(tmp_path, "new", first, 3) / "merged"
    merged.parent.mkdir(parents=True)
    merged.symlink_to(model_dir)
    trainers = [study.make_arm("new", stage).make_trainer(3, tmp_path / stage.name, None) for stage in (first, second)]
    one, two = (torch.cat([a.detach().flatten() for a in lora_factors(t.model).values()]) for t in trainers)
    assert abs(float(torch.cosine_similarity(one, two, dim=0))) < 0.3
    assert [trainer.args.data_seed for trainer in trainers] == [3, 3]
    assert stage_seed(3, second) != stage_seed(4, second)


def test_all_tasks_at_once_take_as_many_steps_as_one_after_another(tmp_path, model_dir, monkeypatch):
    monkeypatch.setattr("fnsft_trl.cli.continual.cell_trainer", lambda asked, *_: asked.values["max_steps"])
    file = PlanFile.read(str(make_plan(tmp_path, model_dir, {"all": {"multitask": True}, "one": {}})), {})
    study = _study(file, [Task.read(name, config) for name, config in file.tasks.items()], tmp_path)
    for arm, tasks in (("all", tuple(TASKS)), ("one", ("dbpedia",))):
        steps = study.make_arm(arm, Stage((tasks,))).make_trainer(0, tmp_path, None)
        assert steps == len(tasks) * SHARED["max_steps"]


def test_a_merge_keeps_what_half_precision_would_round_away(tmp_path, model_dir, tokenizer):
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    for saved in (base, tokenizer):
        saved.save_pretrained(tmp_path / "half")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["up_proj"]))
    for factor in (p for name, p in model.named_parameters() if "lora_B" in name):
        torch.nn.init.constant_(factor, 1e-4)
    place = tmp_path / "arm" / "a" / "seed-0"
    for saved in (model, tokenizer):
        saved.save_pretrained(place)
    args = SimpleNamespace(per_device_eval_batch_size=1, max_length=None)
    trainer = SimpleNamespace(model=model, processing_class=tokenizer, args=args, penalties=None)
    finish_stage([], {"arm/a": StageWork(merges=True)}, trainer, place)
    merged = load_file(place / "merged" / "model.safetensors")
    for name, expected in model.merge_and_unload().state_dict().items():
        if "up_proj" in name:
            torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-8)


@pytest.mark.slow
def test_a_stage_is_the_run_of_fnsft_train_that_its_options_say(tmp_path, model_dir):
    """The second stage of sequential LoRA by hand: the same weights, with a fresh optimizer and schedule."""
    plan = make_plan(tmp_path, model_dir, {"lora": LORA}, orders=[["dbpedia", "amazon"]], single=False)
    assert run(plan, tmp_path / "out") == 0
    folder, rows = tmp_path / "out" / "arms" / "lora", tmp_path / "out" / "tasks"
    words = [
        word for name, value in SHARED.items() for word in (f"--{name}", str(value)) if name != "retention_tokens"
    ]
    words += ["--model_name_or_path", str(model_dir), "--use_peft", "--seed", "0", "--save_strategy", "no"]
    words += ["--adapter_name_or_path", str(folder / "dbpedia" / "seed-0")]
    words += ["--dataset_name", str(rows / "amazon-train.jsonl"), "--output_dir", str(tmp_path / "hand")]
    assert main(["train", *words]) == 0
    file = "adapter_model.safetensors"
    by_hand = (tmp_path / "hand" / file).read_bytes()
    assert by_hand == (folder / "dbpedia-amazon" / "seed-0" / file).read_bytes()
    assert by_hand != (folder / "dbpedia" / "seed-0" / file).read_bytes()
