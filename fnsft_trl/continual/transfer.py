"""ScoreMatrix: the score on every task after every stage, and what it says of learning, transfer and forgetting."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean

from ..errors import FNSFTError
from ..finite import check_entries


@dataclass(frozen=True)
class Transfer:
    """
    What became of the tasks of a sequence; a is the score on task i after stage t, stage 0 the model before training.

    Attributes:
        average (`float`): average accuracy (AA), mean over i of a[i, T].
        backward (`float` or `None`): backward transfer (BWT), mean over i < T of a[i, T] - a[i, i] (Lopez-Paz and
            Ranzato 2017, "Gradient Episodic Memory", eq. 3). Negative where later tasks hurt earlier ones; `None` of
            one stage.
        forward_to_single (`float` or `None`): mean over i of a[i, i] - single[i], what the stages before task i gave
            beside training on it alone; `None` without those scores.
        forward_to_base (`float` or `None`): mean over i > 1 of a[i, i - 1] - a[i, 0], what the stages before task i
            gave before it was trained (the same paper, eq. 4, with the model before training in place of a random
            one); `None` of one stage.
        forgetting (`float` or `None`): mean over i < T of max over t of a[i, t], less a[i, T] (Chaudhry et al. 2018,
            "Riemannian Walk", eq. 3, the model before training counted among the t); never negative, `None` of one
            stage.
    """

    average: float
    backward: float | None
    forward_to_single: float | None
    forward_to_base: float | None
    forgetting: float | None

    def to_dict(self) -> dict[str, float | None]:
        """As JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class ScoreMatrix:
    """
    Scores on every task of a sequence after every stage; higher is better.

    Args:
        tasks (`Sequence[str]`): in the order in which they are trained: stage i trains task i.
        scores (`Sequence[Sequence[float]]`): `scores[t][i]` on task i after stage t; `scores[0]` before training.
        single (`Mapping[str, float]`, *optional*): the score on a task of a model that was trained on it alone.

    Raises:
        FNSFTError: no task, one that stands twice, or scores that are not one number for each stage and task.
    """

    tasks: Sequence[str]
    scores: Sequence[Sequence[float]] = field(repr=False)
    single: Mapping[str, float] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        count = len(self.tasks)
        if not count:
            raise FNSFTError("a sequence holds no task; give at least one")
        twice = {name for name in self.tasks if list(self.tasks).count(name) > 1}
        if twice:
            raise FNSFTError(f"the task {min(twice)} stands twice in a sequence; give each another name")
        rows = [len(row) for row in self.scores]
        if rows != [count] * (count + 1):
            raise FNSFTError(
                f"a sequence of {count} tasks needs {count + 1} rows of {count} scores (before training, and after "
                f"each stage), and has rows of {rows}"
            )
        missing = [name for name in self.tasks if self.single is not None and name not in self.single]
        if missing:
            raise FNSFTError(f"the scores of single tasks lack {', '.join(missing)}; give all of them or none")

        scores = {"sequence": [list(row) for row in self.scores], "single": dict(self.single or {})}
        check_entries(scores, "scores of tasks", "score the models again")

    def transfer(self) -> Transfer:
        """Average accuracy, backward and forward transfer, forgetting."""
        count = len(self.tasks)
        last = self.scores[count]
        when_learnt = [self.scores[i + 1][i] for i in range(count)]
        earlier = range(count - 1)
        several = count > 1
        return Transfer(
            average=fmean(last),
            backward=fmean(last[i] - when_learnt[i] for i in earlier) if several else None,
            forward_to_single=None
            if self.single is None
            else fmean(score - self.single[name] for name, score in zip(self.tasks, when_learnt, strict=True)),
            forward_to_base=fmean(self.scores[i][i] - self.scores[0][i] for i in range(1, count)) if several else None,
            forgetting=fmean(max(row[i] for row in self.scores) - last[i] for i in earlier) if several else None,
        )
