"""Plan: what a continual run is to do: tasks, orders in which they are trained, and ways to train them. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..errors import FNSFTError
from ..fields import check_fields, documented, option


ADAPTERS = ("same", "new")
NETWORKS = ("once", "per_task", "so_far")


@documented
@dataclass
class Way:
    """
    What an arm does from stage to stage, beside its options of `fnsft train`.

    Raises:
        FNSFTError: a value that its field does not take.
    """

    multitask: bool = option(
        False, "Train all tasks of an order at once, in one stage: what a sequence could reach at best."
    )
    replay: float | None = option(
        None, "The share of each batch that are rows of earlier tasks, from the second stage on.", above=0, below=1
    )
    adapter: str | None = option(
        None,
        "Of LoRA: `same`, one adapter that is trained on, or `new`, one for each stage, on the model with the earlier "
        "ones merged. By default `same`, and `new` with `olora`, `protect_grows` and networks.",
        choices=ADAPTERS,
    )
    networks: str | None = option(
        None,
        "Of an arm with networks, where these are found: `once`, in the first stage; `per_task`, on the rows of each "
        "task, in the model as it is by then; `so_far`, on `ica_datasets` and the rows of all earlier tasks.",
        choices=NETWORKS,
    )
    protect_grows: bool = option(
        False,
        "With `protect: subspace`: after each stage, the directions of its task are added to what is protected.",
    )

    def __post_init__(self) -> None:
        check_fields(self)


WAY_NAMES = tuple(f.name for f in fields(Way))


@dataclass(frozen=True)
class Stage:
    """One stage of a sequence, by all that was trained up to it.

    Attributes:
        trained (`tuple[tuple[str, ...], ...]`): the tasks of each stage, this one last; several at once in multitask.
    """

    trained: tuple[tuple[str, ...], ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """What this stage trains."""
        return self.trained[-1]

    @property
    def earlier(self) -> tuple[str, ...]:
        """The tasks of the stages before it, in their order."""
        return tuple(name for tasks in self.trained[:-1] for name in tasks)

    @property
    def before(self) -> "Stage | None":
        """The stage that it goes on from; `None` where that is the model before training."""
        return Stage(self.trained[:-1]) if len(self.trained) > 1 else None

    @property
    def first(self) -> "Stage":
        """The stage that its sequence began with."""
        return Stage(self.trained[:1])

    @property
    def number(self) -> int:
        """Of the stage, from 1."""
        return len(self.trained)

    @property
    def name(self) -> str:
        """That of its folder."""
        return "-".join("+".join(tasks) for tasks in self.trained)


@dataclass(frozen=True)
class Plan:
    """
    What a continual run is to do.

    Attributes:
        tasks (`tuple[str, ...]`): names of all tasks that an order names.
        orders (`dict[str, tuple[str, ...]]`): name -> tasks in their order.
        ways (`dict[str, Way]`): name of an arm -> what it does from stage to stage.
        single (`bool`): whether each task is trained alone, too.

    Raises:
        FNSFTError: there is no order, one with a task that is not there or stands twice, or no arm.
    """

    tasks: tuple[str, ...]
    orders: Mapping[str, tuple[str, ...]]
    ways: Mapping[str, Way]
    single: bool = True

    def __post_init__(self) -> None:
        if not self.orders:
            raise FNSFTError("the plan has no orders; give orders, names with lists of tasks")
        if not self.ways:
            raise FNSFTError("the plan has no arms; give arms, names with options of fnsft train")
        for order, names in self.orders.items():
            if not names:
                raise FNSFTError(f"order {order} holds no task; give a list of names")
            for name in names:
                if name not in self.tasks:
                    raise FNSFTError(f"order {order} names the task {name!r}; there are {', '.join(self.tasks)}")
                if names.count(name) > 1:
                    raise FNSFTError(f"order {order} names the task {name} twice; name each once")

    def stages(self, arm: str, order: str) -> list[Stage]:
        """The stages of an arm in an order."""
        names = self.orders[order]
        if self.ways[arm].multitask:
            return [Stage((tuple(sorted(names)),))]
        return [Stage(tuple((name,) for name in names[: end + 1])) for end in range(len(names))]

    def waves(self) -> list[list[tuple[str, Stage]]]:
        """All stages of all arms: first those that go on from the model before training, then those that go on from
        these, and so on. Each is there once, for orders that begin alike share their beginning."""
        found: dict[tuple[str, Stage], None] = {}
        for arm, way in self.ways.items():
            for order, names in self.orders.items():
                found |= dict.fromkeys((arm, stage) for stage in self.stages(arm, order))
                if self.single and not way.multitask:
                    found |= dict.fromkeys((arm, Stage(((name,),))) for name in names)
        count = max(stage.number for _, stage in found)
        return [[each for each in found if each[1].number == number] for number in range(1, count + 1)]

    def goes_on(self, arm: str, stage: Stage) -> bool:
        """Whether any stage of an arm goes on from a stage."""
        every = [each for order in self.orders for each in self.stages(arm, order)]
        return any(each.before == stage for each in every)


def orders_of(given: Any) -> dict[str, tuple[str, ...]]:
    """Orders as a file gives them: a mapping of names to lists, or lists, which are named by their numbers.

    Raises:
        FNSFTError: something else.
    """
    if isinstance(given, Sequence) and not isinstance(given, str):
        given = {f"order{number}": names for number, names in enumerate(given, 1)}
    is_mapping = isinstance(given, Mapping) and all(isinstance(names, list) for names in given.values())
    if not is_mapping or not all(isinstance(name, str) for names in given.values() for name in names):
        raise FNSFTError("orders must be lists of tasks, or a mapping of names to such lists")
    return {str(name): tuple(map(str, names)) for name, names in given.items()}
