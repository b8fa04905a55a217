"""Plans: which stages there are, what each sets, and what is refused before anything is loaded."""

from pathlib import Path

import pytest
import yaml
from helpers import ROOT
from small_study import LORA, NETWORKS, arms_with_networks, every_arm, make_plan

from fnsft_trl.cli.plans import PlanFile
from fnsft_trl.continual.plan import Plan, Stage, Way
from fnsft_trl.errors import FNSFTError


RECIPES = sorted((ROOT / "recipes" / "continual").glob("*.yaml"))


def test_orders_that_begin_alike_share_their_beginning():
    orders = {"one": ("a", "b", "c"), "two": ("a", "c", "b")}
    plan = Plan(("a", "b", "c"), orders, {"lora": Way(), "all": Way(multitask=True)})
    first, second, third = ([(arm, stage.name) for arm, stage in wave] for wave in plan.waves())
    assert first == [("lora", "a"), ("lora", "b"), ("lora", "c"), ("all", "a+b+c")]
    assert second == [("lora", "a-b"), ("lora", "a-c")]
    assert third == [("lora", "a-b-c"), ("lora", "a-c-b")]
    assert plan.goes_on("lora", Stage((("a",),)))
    assert not plan.goes_on("lora", Stage((("b",),)))
    alone = Plan(("a", "b"), {"one": ("a", "b")}, {"lora": Way()}, single=False)
    assert [[stage.name for _, stage in wave] for wave in alone.waves()] == [["a"], ["a-b"]]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_understood(path):
    file = PlanFile.read(str(path), {})
    assert set(file.plan.tasks) >= set(file.tasks)
    assert all(len(set(names)) == len(names) for names in file.plan.orders.values())
    text = path.read_text()
    assert text.startswith(f"# fnsft continual recipes/continual/{path.name} ")


def test_the_sequences_are_those_of_the_papers():
    standard = PlanFile.read(str(ROOT / "recipes" / "continual" / "standard.yaml"), {}).plan.orders
    assert standard == {
        "order1": ("dbpedia", "amazon", "yahoo", "agnews"),
        "order2": ("dbpedia", "amazon", "agnews", "yahoo"),
        "order3": ("yahoo", "amazon", "agnews", "dbpedia"),
    }
    long = PlanFile.read(str(ROOT / "recipes" / "continual" / "long.yaml"), {}).plan.orders
    assert {len(names) for names in long.values()} == {15}
    assert len({frozenset(names) for names in long.values()}) == 1
    trace = PlanFile.read(str(ROOT / "recipes" / "continual" / "trace.yaml"), {})
    assert len(trace.plan.orders["trace"]) == 8


@pytest.fixture
def options(tmp_path, model_dir):
    """Options of the third stage of an arm."""
    path = make_plan(tmp_path, model_dir, every_arm(tmp_path) | arms_with_networks(tmp_path))
    file = PlanFile.read(str(path), {})
    files = {name: tmp_path / f"{name}.jsonl" for name in file.tasks}

    def options(arm, names=("dbpedia", "amazon", "yahoo")):
        stage = Stage(tuple((name,) for name in names))
        return file.arms[arm].options(stage, lambda each: Path("/") / arm / each.name, files)

    return options


def test_a_stage_goes_on_from_the_one_before(options, tmp_path):
    before = "/dbpedia-amazon"
    assert options("full")["model_name_or_path"] == f"/full{before}"
    lora = options("lora")
    assert lora["adapter_name_or_path"] == f"/lora{before}"
    assert not {"lora_r", "lora_target_modules"} & set(lora)
    assert options("olora")["model_name_or_path"] == f"/olora{before}/merged"
    assert options("olora")["olora_adapters"] == ["/olora/dbpedia", f"/olora{before}"]
    assert options("ewc")["ewc_from"] == f"/ewc{before}"
    replay = options("replay")
    assert replay["replay_datasets"] == [f"{name}={tmp_path / name}.jsonl" for name in ("dbpedia", "amazon")]
    assert replay["replay_share"] == 0.25
    assert options("grows")["protect_basis"] == f"/grows{before}/grown"
    assert not {"protect_datasets", "protect_dims"} & set(options("grows"))
    assert options("once")["ica_template_path"] == "/once/dbpedia"
    assert options("so_far")["ica_datasets"][1:] == [str(tmp_path / f"{name}.jsonl") for name in ("dbpedia", "amazon")]
    assert "ica_datasets" not in options("per_task")
    assert options("per_task")["model_name_or_path"] == f"/per_task{before}/merged"


def test_a_first_stage_has_nothing_to_keep(options):
    for arm in ("ewc", "lwf", "olora", "replay", "lora"):
        first = options(arm, ("dbpedia",))
        kept = {"ewc", "ewc_from", "lwf", "olora", "olora_adapters", "replay_datasets", "adapter_name_or_path"}
        assert not kept & set(first)
    assert options("ewc", ("dbpedia",))["ewc_save"]
    assert options("grows", ("dbpedia",))["protect_datasets"]


# What acts from the second stage on.
SEQUENCED = {
    "replay": {"replay": 0.1},
    "ewc": {"ewc": 1},
    "lwf": {"lwf": 1},
    "olora": {"olora": 1},
    "adapter": {"adapter": "new"},
    "networks": {**NETWORKS, "networks": "once"},
    "protect_grows": {"protect": "subspace", "protect_datasets": ["x=y"], "protect_grows": True},
}
EPOCHS = {"tasks": {f"t{n}": {"dataset": "x", "epochs": n} for n in (1, 2)}, "orders": [["t1", "t2"]]}


def edit(path, **changes):
    plan = yaml.safe_load(path.read_text()) | changes
    path.write_text(yaml.safe_dump(plan, sort_keys=False))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"orders": {}}, "has no orders"),
        ({"orders": [["dbpedia", "nothing"]]}, "names the task 'nothing'"),
        ({"orders": [["dbpedia", "dbpedia"]]}, "names the task dbpedia twice"),
        ({"arms": {}}, "has no arms"),
        ({"arms": {"a": {"lora_rank": 3}}}, "no option 'lora_rank'"),
        ({"arms": {"a": {"seed": 3}}}, "seed is set by each stage itself"),
        ({"arms": {"a": {"adapter": "new"}}}, "adapter has no effect, since the arm trains full"),
        ({"arms": {"a": {**LORA, "olora": 1, "adapter": "same"}}}, "olora needs a new adapter"),
        ({"arms": {"a": {"olora": 1}}}, "olora compares adapters of plain LoRA"),
        ({"arms": {"a": {**NETWORKS, "ewc": 1}}}, "each stage has new ones"),
        ({"arms": {"a": {"networks": "once"}}}, "networks has no effect"),
        ({"arms": {"a": {**NETWORKS, "networks": "so_far"}}}, "give ica_datasets"),
        ({"arms": {"a": {"protect_grows": True}}}, "give protect: subspace"),
        ({"arms": {"a": {"multitask": True, "replay": 0.1}}}, "replay has no effect with multitask"),
        ({"arms": {"a": {"multitask": True, "lwf_temperature": 3.0}}}, "lwf_temperature has no effect with multitask"),
        ({"arms": {"a": {**LORA, "ewc": 0}}}, "ewc is 0"),
        ({"arms": {"a": {**LORA, "ewc": "big"}}}, "ewc is 'big'; it must be a number above 0"),
        ({"arms": {"a": {"lwf": -1}}}, "lwf is -1"),
        ({"arms": {"a": {"lwf_temperature": 3.0}}}, "lwf_temperature has no effect without lwf"),
        ({"arms": {"a": {**LORA, "olora": "big"}}}, "olora is 'big'"),
        ({"arms": {"a": {"replay": 0.2, "replay_datasets": ["dbpedia=a.jsonl"]}}}, "dbpedia"),
        ({"arms": {"a": {"lwf": 1, "packing": True}}}, "lwf reads rows one by one, and packing joins them"),
        ({"arms": {"a": {"ewc": 1, "packing": True}}}, "ewc_save reads rows one by one, and packing joins them"),
        (
            {"arms": {"a": {"replay": 0.2, "train_sampling_strategy": "group_by_length"}}},
            "drop train_sampling_strategy",
        ),
        ({"arms": {"a": {"replay": 0.2, "replay_datasets": ["x=y"], "replay_share": 0.3}}}, "drop replay_share"),
        (
            {"arms": {"a": {**LORA, "olora": "inf", "protect": "subspace", "protect_datasets": ["x=y"]}}},
            "undo one another",
        ),
        ({"arms": {"a": {"multitask": True, "max_steps": -1}}, **EPOCHS}, "their epochs differ"),
        *[
            ({"arms": {"a": {**LORA, **options}}, "orders": [["dbpedia"], ["agnews"]]}, f"{name} acts from the second")
            for name, options in SEQUENCED.items()
        ],
        ({"arms": {"a/b": {}}}, "names a folder"),
        ({"seeds": [1, 1]}, "seeds holds 1 twice"),
        ({"lora_r": 8, "arms": {"a": {"lora_r": 4}}}, "lora_r has no effect without LoRA"),
        ({"lerning_rate": 1}, "did you mean 'learning_rate'"),
        ({"tasks": {"a-b": {}}}, "names a folder"),
        ({"tasks": {"a": {"dataset": "x", "prompt": "none"}}}, "names no column"),
        ({"tasks": {"a": {"dataset": "x", "labels": {"0": "A"}, "answer": "{a} {b}"}}}, "name a column alone"),
        ({"tasks": {"a": {"datset": "x"}}}, "did you mean 'dataset'"),
    ],
)
def test_a_plan_that_is_none_is_one_line(tmp_path, model_dir, changes, message):
    path = make_plan(tmp_path, model_dir, {"lora": LORA})
    edit(path, **changes)
    with pytest.raises(FNSFTError, match=message) as error:
        PlanFile.read(str(path), {})
    assert str(path) in str(error.value)


def test_the_command_line_holds_for_all_arms_that_it_can_hold_for(tmp_path, model_dir):
    path = make_plan(tmp_path, model_dir, {"lora": LORA, "full": {}})
    arms = every_arm(tmp_path)
    edit(path, arms={"lora": LORA, "full": {}, "grows": arms["grows"]})
    given = {"lora_r": 5, "max_steps": 7, "protect_dims": 3.0}
    file = PlanFile.read(str(path), given, arms=["full", "lora", "grows"], seeds=[4])
    assert (file.arms["lora"].values["lora_r"], file.arms["full"].values["max_steps"]) == (5, 7)
    assert not {"lora_r", "protect_dims"} & set(file.arms["full"].values)
    assert file.arms["grows"].values["protect_dims"] == 3
    assert file.seeds == [4]
    with pytest.raises(FNSFTError, match="lora_r has no effect, since no arm has use_peft"):
        PlanFile.read(str(path), {"lora_r": 5}, arms=["full"])
    with pytest.raises(FNSFTError, match="no 'other' among the arms"):
        PlanFile.read(str(path), {}, arms=["other"])
