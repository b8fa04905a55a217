"""fnsft continual PLAN.yaml: a sequence of tasks, in several orders and by several ways, and what each stage did."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import RANDOM_SELECTORS
from ..errors import FNSFTError
from ..occupied import REPORT
from ..report.figures import check_pyplot
from .endings import command
from .options.arguments import read_arguments
from .options.parse import asked_of, training_options
from .options.schema import Option, by_name, row
from .options.sources import read_sources
from .output import check_writable
from .plans import NOT_OF_ARMS, PlanFile, train_options
from .recipe_arms import cell_trainer, check_model, settings_of, sources_of


if TYPE_CHECKING:
    from ..continual.plan import Stage
    from ..continual.study import ContinualStudy
    from ..continual.tasks import Task
    from ..experiments.arms import Arm


ABOUT = (
    "Train a model on one task after another, in several orders and by several ways. After each stage the model is "
    "scored on all tasks and on general text. The report shows the score matrix, average accuracy, backward and "
    "forward transfer, and what was forgotten. If the run is killed, the same call continues it. Options of `fnsft "
    "train` apply to all arms and override the plan."
)
ROWS = "tasks"  # the folder of the rows, in the output directory

# What a score of the model before training does not depend on.
_OF_TRAINING = (
    *("ica_", "mask_", "protect", "kl_", "replay_", "retention_", "ewc", "lwf", "olora", "lora_", "use_peft"),
    *("use_rslora", "use_dora", "learning_rate", "train_", "anti_drift_", "frozen_guard", "max_steps", "num_train_"),
)


def options() -> list[Option]:
    """The options of the verb, and of all arms."""
    of_numbers = {"many": True, "nullable": True, "lowest": 0, "highest": 2**32 - 1}
    own = [
        row("plan", "The YAML file with tasks, orders and arms.", positional=True, required=True, metavar="FILE"),
        row("output_dir", "Where cells, models, rows and the report go.", "continual_output", metavar="DIR"),
        row("orders", "Orders to train, by name. By default all of the plan.", many=True, metavar="NAME"),
        row("arms", "Arms to train, by name. By default all of the plan.", many=True, metavar="NAME"),
        Option("seeds", "options", "int", help="Seeds of the training. By default those of the plan.", **of_numbers),
        row(
            "jobs",
            "Number of cells to train at once, each in a process of its own. If there are several accelerators, each "
            "process gets its own.",
            1,
            lowest=1,
        ),
        row("restart", "Discard finished stages whose settings have changed since, and train them anew.", False),
        row(
            "keep_models",
            "Keep the whole model of every stage that others go on from. By default only the last ones stay, and all "
            "adapters.",
            False,
        ),
    ]
    return [*own, *_of_arms().values()]


def _of_arms() -> dict[str, Option]:
    return {name: option for name, option in training_options().items() if name not in NOT_OF_ARMS}


def main(argv: list[str]) -> None:
    args = read_arguments(argv, options())
    output = check_writable(args.output_dir, REPORT)
    if "," in str(output):
        raise FNSFTError(f"the output directory {output} has a comma, which separates datasets; name another")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise FNSFTError("a continual run starts its processes itself; run fnsft continual alone, with jobs")
    check_pyplot()
    given = read_sources(argv, by_name(options()))
    over_all = {n: v for of_source in given.values() for n, v in of_source.items() if n in _of_arms()}
    file = PlanFile.read(args.plan, over_all, orders=args.orders, arms=args.arms, seeds=args.seeds)

    from ..continual.outcome import outcomes
    from ..continual.reporting import report_study
    from ..continual.tasks import Task

    tasks = [Task.read(name, config) for name, config in file.tasks.items()]
    _check_rows(file, tasks)
    first = train_options(_plain_values(file), "the plan")
    check_model(first)
    study = _study(file, tasks, output.absolute())
    _say(f"{len(file.arms)} arms, {len(file.plan.orders)} orders, {len(tasks)} tasks, {len(file.seeds)} seeds")
    base, cells = study.run(
        file.seeds, output, jobs=args.jobs, restart=args.restart, keep_models=args.keep_models, say=_say
    )
    found = outcomes(file.plan, base, cells, file.seeds)
    shown = {name: _differing(file, name) for name in file.arms}
    model = str(first.values["model_name_or_path"])
    print(report_study(found, tasks, output, model=model, seeds=file.seeds, settings=shown), flush=True)
    print(f"Report: {output / 'report.html'} (also report.md, results.json)")


def interrupted(argv: list[str]) -> str:
    """How to go on with one that was interrupted."""
    return f"interrupted; what was finished is kept, go on with {command('continual', argv)}"


def _say(text: str) -> None:
    print(f"== {text}", flush=True)


def _check_rows(file: PlanFile, tasks: list["Task"]) -> None:
    """What arms ask for must be possible with the rows there are."""
    from ..continual.finishing import check_scorers
    from ..training.replay import ReplaySampler

    check_scorers(tasks)
    for arm in file.arms.values():
        share = arm.way.replay
        for task in tasks if share is not None else ():
            if ReplaySampler(len(task.train), 1, share=share, seed=0).replays == 0:
                raise FNSFTError(
                    f"arm {arm.name} replays {share:g} of each batch, of which an epoch of the {len(task.train)} rows "
                    f"of {task.name} holds none; raise replay, or train more rows"
                )


def _plain_values(file: PlanFile) -> dict[str, Any]:
    """The options on which scores of the model before training depend."""
    values = {n: v for n, v in file.shared.items() if not n.startswith(_OF_TRAINING) and v is not None}
    if values.get("load_in_4bit") or values.get("load_in_8bit"):
        values["use_peft"] = True
    return values


def _study(file: PlanFile, tasks: list["Task"], output: Path) -> "ContinualStudy":
    from ..continual.finishing import StageWork
    from ..continual.study import ContinualStudy

    files = {task.name: task.write(output / ROWS) for task in tasks}
    scored = [str(test) for _, test in files.values()]
    works = {
        arm.name: StageWork(
            merges=arm.merges,
            grows=arm.way.protect_grows,
            dims=arm.values.get("protect_dims"),
            tokens=arm.values.get("protect_tokens", StageWork.tokens),
        )
        for arm in file.arms.values()
    }
    hashes: dict[str, str] = {}
    base = train_options(_plain_values(file), "the plan")
    scorers = {task.name: task.config.scorer for task in tasks}
    return ContinualStudy(
        plan=file.plan,
        tasks=tasks,
        make_arm=lambda arm, stage: _arm(file, arm, stage, files, scored, scorers, hashes, output),
        works=works,
        score_base=partial(_score_base, _plain_values(file), tasks, files),
        settings=settings_of(_plain_values(file) | {"scorers": scorers}),
        sources=_placed(sources_of(base, scored, hashes), output),
    )


def _arm(file: PlanFile, name: str, stage: "Stage", files, scored, scorers, hashes, output: Path) -> "Arm":
    """What trains a stage of an arm."""
    from ..continual.study import stage_name
    from ..experiments.arms import Arm

    staged = file.arms[name]
    trained = [task for tasks in stage.trained for task in tasks]
    rows = {task: train for task, (train, _) in files.items()}
    epochs = {task: file.tasks[task].epochs for task in trained if file.tasks[task].epochs is not None}
    settings = settings_of({**staged.values, **vars(staged.way), "stage": stage.name, "scorers": scorers})
    first = train_options(staged.options(stage.first, lambda _: output, rows), f"arm {name}")
    own_epochs = epochs.get(stage.tasks[0])  # in multitask, the same of all
    held_out = [str(files[task][1]) for task in stage.tasks]
    return Arm(
        stage_name(name, stage),
        ", ".join(stage.tasks),
        partial(_trainer, staged, stage, rows, held_out, own_epochs, output),
        settings | ({"epochs": epochs} if epochs else {}),
        _placed(sources_of(first, [*(str(rows[task]) for task in trained), *scored], hashes), output),
    )


def _placed(sources: dict[str, str], output: Path) -> dict[str, str]:
    """The same with rows named by where they lie in the output directory, so that this may be moved."""
    return {os.path.relpath(n, output) if Path(n).is_relative_to(output) else n: v for n, v in sources.items()}


def _trainer(staged, stage: "Stage", rows, held_out, epochs, output: Path, seed: int, directory: Path, template):
    """The trainer of a cell."""
    from ..continual.stages import stage_seed
    from ..continual.study import folder_of

    values = staged.options(stage, lambda each: folder_of(output, staged.name, each, seed), rows)
    if (steps := values.get("max_steps") or -1) > 0:
        values["max_steps"] = steps * len(stage.tasks)
    elif epochs is not None:
        values["num_train_epochs"] = epochs
    if staged.merges:
        # Of the new adapter alone: rows and random neurons are drawn as in all stages.
        values.setdefault("data_seed", seed)
        if values.get("ica_select") in RANDOM_SELECTORS:
            values.setdefault("ica_seed", seed)
        seed = stage_seed(seed, stage)
    return cell_trainer(asked_of(values, f"arm {staged.name}"), held_out, seed, directory, template)


def _score_base(values: dict[str, Any], tasks: list["Task"], files) -> dict[str, Any]:
    """The scores of the model before training, as those of a trainer are."""
    from tempfile import TemporaryDirectory

    from ..continual.finishing import score_tasks

    train, test = next(iter(files.values()))
    with TemporaryDirectory() as scratch:
        asked = asked_of(values | {"dataset_name": str(train)}, "the plan")
        trainer = cell_trainer(asked, [str(test)], 0, Path(scratch), None)
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        return score_tasks(trainer.model, tokenizer, tasks, trainer.args)


def _differing(file: PlanFile, name: str) -> dict[str, Any]:
    """What an arm has beyond the options of all arms."""
    arm = file.arms[name]
    own = {n: v for n, v in arm.values.items() if file.shared.get(n) != v}
    return {n: v for n, v in vars(arm.way).items() if v not in (None, False)} | own
