"""PlanFile: the YAML file of a continual run: its tasks, orders, arms and seeds, and options that all arms share."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..continual.plan import WAY_NAMES, Plan, Way, orders_of
from ..continual.stages import StagedArm, first_values
from ..continual.task_config import TaskConfig
from ..errors import FNSFTError
from ..training.protection_config import ProtectionConfig
from .options.parse import OF_LORA, TrainOptions, asked_of, training_options
from .options.schema import Option, by_name, describe
from .options.sources import read_mapping
from .options.values import read_value
from .options.written import read_yaml


PLACEHOLDER = "tasks.jsonl"  # in the place of rows that are not written yet

_OWN = ("tasks", "orders", "arms", "seeds", "single")
_NAME = re.compile(r"[A-Za-z0-9_]+")  # of a task, of which the names of folders are made
_ARM = re.compile(r"[A-Za-z0-9_.-]+")
_OF_PROTECTION = tuple(option.name for option in describe(ProtectionConfig) if option.name.startswith("protect_"))
# Switches, and options that hold for the arms that have one of these, where they are given for all.
_SWITCHED = ((("use_peft",), OF_LORA), (("protect", "forgetting"), _OF_PROTECTION))
# What each stage sets itself, or does around its training.
NOT_OF_ARMS = (
    *("dataset_name", "datasets", "dataset_name_or_path", "dataset_config", "seed", "output_dir", "push_to_hub"),
    *("resume_from_checkpoint", "merge_adapter_with_base", "convert_to_gguf", "ica_template_output"),
    *("adapter_name_or_path", "ewc_from", "ewc_save", "ewc_datasets", "olora_adapters"),
    *("dataset_streaming", "hub_token", "max_samples", "columns"),
)


@dataclass(frozen=True)
class PlanFile:
    """What stands in the file of a continual run.

    Attributes:
        path (`Path`): of the file.
        tasks (`dict[str, TaskConfig]`): name -> task, those that any order names.
        plan ([`Plan`]): orders and arms.
        arms (`dict[str, StagedArm]`): name -> arm, with its options.
        shared (`dict[str, Any]`): options of `fnsft train` that hold for all arms.
        seeds (`list[int]`): of the trainings.
    """

    path: Path
    tasks: Mapping[str, TaskConfig]
    plan: Plan
    arms: Mapping[str, StagedArm]
    shared: Mapping[str, Any]
    seeds: Sequence[int]

    @classmethod
    def read(
        cls,
        name: str,
        command_line: Mapping[str, Any],
        *,
        orders: Sequence[str] | None = None,
        arms: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> "PlanFile":
        """Read and check a file.

        Args:
            name: of the file.
            command_line: options of `fnsft train` that hold for all arms, over what the file says.
            orders, arms: names of those that are to be trained; all by default.
            seeds: in the place of those of the file.

        Raises:
            FNSFTError: something in it is not understood, or does not go together; with the file.
        """
        path = Path(os.path.expanduser(name))
        try:
            return cls._read(path, command_line, orders, arms, seeds)
        except FNSFTError as error:
            raise FNSFTError(str(error) if str(path) in str(error) else f"{path}: {error}") from error

    @classmethod
    def _read(cls, path: Path, command_line, orders, arms, seeds) -> "PlanFile":
        written = read_yaml(path)
        own = {name: written.pop(name, None) for name in _OWN}
        known = training_options()
        shared = _options(written, known, "the options of all arms") | dict(command_line)
        every_order = orders_of(own["orders"] or {})
        found_orders = _chosen(every_order, orders, "orders")
        found_arms = own["arms"] or {}
        if not isinstance(found_arms, dict):
            raise FNSFTError("arms is no mapping; write `name: {options of fnsft train}` for each")
        found_arms = _chosen(found_arms, arms, "arms")
        every = _tasks(own["tasks"], path.parent)
        ways = {arm: _way(arm, options or {}) for arm, options in found_arms.items()}
        single = True
        if own["single"] is not None:
            single = read_value(Option("single", "plan", "bool"), own["single"], "single")
        plan = Plan(tuple(every), found_orders, ways, single)
        staged = {
            arm: _staged(arm, ways[arm], options or {}, shared, command_line, known)
            for arm, options in found_arms.items()
        }
        for arm in staged.values():
            _check_sequence(arm, plan)
            _check_later(arm, plan)
            _check_epochs(arm, plan, every)
        for switches, names in _SWITCHED:
            has_any = any(arm.values.get(switch) for arm in staged.values() for switch in switches)
            for name in () if has_any else names:
                if name in command_line:
                    raise FNSFTError(f"{name} has no effect, since no arm has {switches[0]}; drop it")
        if seeds is None:
            seeds = read_value(Option("seeds", "plan", "int", many=True, lowest=0), own["seeds"] or ["0"], "seeds")
        if len(set(seeds)) < len(seeds):
            raise FNSFTError(f"seeds holds {max(seeds, key=list(seeds).count)} twice; give each once")
        # Of all orders, so that a cell is the same whichever of them are trained.
        used = dict.fromkeys(task for names in every_order.values() for task in names if task in every)
        return cls(path, {name: every[name] for name in used}, plan, staged, shared, seeds)


def train_options(values: Mapping[str, Any], where: str) -> TrainOptions:
    """The options of `fnsft train` of an arm, with something in the place of its data and its folder."""
    return asked_of({"dataset_name": PLACEHOLDER, **values}, where)


def _options(written: Mapping[str, Any], known: dict[str, Option], where: str) -> dict[str, Any]:
    if idle := [name for name in written if name in NOT_OF_ARMS]:
        raise FNSFTError(f"{where}: {idle[0]} is set by each stage itself, or has no place in one; drop it")
    return read_mapping(written, known, where)


def _chosen(found: Mapping[str, Any], names: Sequence[str] | None, what: str) -> dict[str, Any]:
    if names is None:
        return dict(found)
    if unknown := [name for name in names if name not in found]:
        raise FNSFTError(f"there is no {unknown[0]!r} among the {what}; there are {', '.join(found)}")
    return {name: found[name] for name in found if name in names}


def _way(arm: str, written: Any) -> Way:
    if not isinstance(written, dict):
        raise FNSFTError(f"arm {arm} is no mapping; write its options as `name: value`")
    if not _ARM.fullmatch(arm):
        raise FNSFTError(f"the arm {arm!r} names a folder; take letters, digits, dots, dashes and underscores")
    known = by_name(describe(Way))
    return Way(**read_mapping({n: v for n, v in written.items() if n in WAY_NAMES}, known, f"arm {arm}"))


def _staged(arm: str, way: Way, written: dict, shared, command_line, known: dict[str, Option]) -> StagedArm:
    """An arm with its own options over those of all arms, but for what was given on the command line."""
    own = _options({name: value for name, value in written.items() if name not in WAY_NAMES}, known, f"arm {arm}")
    values = {**shared, **own, **command_line}
    idle = [name for switches, names in _SWITCHED if not any(map(values.get, switches)) for name in names]
    values = {n: v for n, v in values.items() if v is not None and (n not in idle or n in own)}
    asked = train_options(first_values(values), f"arm {arm}")
    config = asked.network_config
    method = "lora" if values.get("use_peft") else "full"
    if config is not None:
        method = config.plan(lora_config=bool(values.get("use_peft"))).method
    return StagedArm(arm, way, values, method, config is not None)


def _check_sequence(arm: StagedArm, plan: Plan) -> None:
    """What acts from the second stage on needs one."""
    if arm.in_sequence and all(len(names) == 1 for names in plan.orders.values()):
        raise FNSFTError(
            f"arm {arm.name}: {arm.in_sequence[0]} acts from the second stage on, and no order that is trained has "
            "two tasks; name more tasks in an order, or drop it"
        )


def _check_later(arm: StagedArm, plan: Plan) -> None:
    """What the last stage of each order sets must be understood too, before the first one is trained."""
    rows = dict.fromkeys(plan.tasks, Path(PLACEHOLDER))
    for order in plan.orders:
        last = plan.stages(arm.name, order)[-1]
        if last.before is not None:
            train_options(arm.options(last, lambda each: Path(each.name), rows), f"arm {arm.name}")


def _check_epochs(arm: StagedArm, plan: Plan, tasks: Mapping[str, TaskConfig]) -> None:
    """What trains all tasks at once trains all of them for as many epochs."""
    for order, names in plan.orders.items() if arm.way.multitask and (arm.values.get("max_steps") or -1) < 0 else ():
        if len(epochs := {tasks[name].epochs for name in names}) > 1:
            raise FNSFTError(
                f"arm {arm.name} trains the tasks of {order} at once, and their epochs differ ("
                f"{', '.join(map(str, epochs))}); give all of them the same, or the arm max_steps"
            )


def _tasks(written: Any, folder: Path) -> dict[str, TaskConfig]:
    """The tasks of a plan: a mapping of names to tasks, or files with one, beside the plan."""
    if isinstance(written, str):
        written = [written]
    if isinstance(written, list):
        found: dict[str, Any] = {}
        for name in written:
            of_file = read_yaml(folder / os.path.expanduser(str(name)))
            if twice := [task for task in of_file if task in found]:
                raise FNSFTError(f"two files of tasks name {twice[0]}; rename one")
            found |= of_file
        written = found
    if not isinstance(written, dict) or not written:
        raise FNSFTError("the plan has no tasks; give tasks, a mapping of names, or files with one")
    return {name: _task(name, options) for name, options in written.items()}


def _task(name: str, written: Any) -> TaskConfig:
    if not _NAME.fullmatch(name):
        raise FNSFTError(f"the task {name!r} names a folder; take letters, digits and underscores")
    if not isinstance(written, dict):
        raise FNSFTError(f"task {name} must be a mapping of {', '.join(f.name for f in fields(TaskConfig))}")
    labels = written.get("labels")  # text, whatever it looks like
    if isinstance(labels, list):
        labels = {str(number): label for number, label in enumerate(labels)}
    if isinstance(labels, dict):
        labels = {str(value): None if text is None else str(text) for value, text in labels.items()}
    known = by_name(option for option in describe(TaskConfig) if option.name != "labels")
    given = read_mapping({n: v for n, v in written.items() if n != "labels"}, known, f"task {name}")
    try:
        return TaskConfig(**given, labels=labels)
    except FNSFTError as error:
        raise FNSFTError(f"task {name}: {error}") from error
