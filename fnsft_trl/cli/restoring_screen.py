"""What `fnsft restore` found of every way to restore, and which of them it chooses."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..discovery.directions import LEADING, KeptText
from ..errors import FNSFTError
from ..evaluation.retention import RetentionText
from ..interventions.restoring import Restoration


@dataclass
class Scored:
    """
    What one way to restore gives.

    Attributes:
        how (`Restoration`): the way.
        kl (`dict[str, float]`): name of a text to keep -> KL of the base to the restored model, nats per token.
        rise (`dict[str, float]`): the same for the rise of the cross-entropy.
        mean_kl (`float`): over the texts, by their shares.
        residual (`float`): the largest ||D U|| / ||D|| of any module.
        loss (`float`, *optional*): of the task, nats per token that counts.
        exact (`float`, *optional*): share of the task's rows that are answered exactly, if they have answers.
    """

    how: Restoration
    kl: dict[str, float] = field(default_factory=dict)
    rise: dict[str, float] = field(default_factory=dict)
    mean_kl: float = 0.0
    residual: float = 0.0
    loss: float | None = None
    exact: float | None = None


@dataclass(frozen=True)
class Limits:
    """
    How much of what was learnt on the task may be lost.

    Attributes:
        loss (`float`): the most that the task's loss may be.
        exact (`float`, *optional*): the least share of its rows that should be answered exactly; `None` where the rows
            have no answers, or too few were learnt to tell so small a share of them.
    """

    loss: float
    exact: float | None = None

    @classmethod
    def of(cls, base: Scored, trained: Scored, tolerance: float, rows: int) -> "Limits":
        """Those of a share of the gain.

        Args:
            base, trained: the scores of the base and of the fine-tune.
            tolerance: the share that may be lost.
            rows: of the task.
        """
        loss = trained.loss + tolerance * (base.loss - trained.loss)
        if trained.exact is None or tolerance * (trained.exact - base.exact) * rows < 1:
            return cls(loss)
        return cls(loss, trained.exact - tolerance * (trained.exact - base.exact))

    def text(self, chosen: Scored) -> str:
        """Within which of them a way is, in words."""
        exact = "" if self.exact is None or chosen.exact < self.exact else f", exact match at least {self.exact:.3f}"
        return f"task loss at most {self.loss:.4f}{exact}"

    def best(self, ways: Iterable[Scored]) -> Scored:
        """The way of least KL within the limits; within that of the loss, where nothing is within both.

        A centred LoRA, which merges only where the base has biases, is none of them.
        """
        allowed = [way for way in ways if way.loss <= self.loss and not way.how.is_centred]
        both = [way for way in allowed if self.exact is not None and way.exact >= self.exact]
        restored = [way for way in both if way.how != Restoration()]
        return min(restored or allowed, key=lambda way: way.mean_kl)


@dataclass
class Screen:
    """
    All that a run found.

    Attributes:
        base (`Scored`): the base model.
        ways (`list[Scored]`): the fine-tune as it was trained, and every way to restore it.
        chosen (`Scored`): the one that is written.
        rule (`str`): why, in words.
        limits (`Limits`, *optional*): how much of the task may be lost.
        energy (`dict[str, dict[int, float]]`): name of a text, or the task -> directions -> share of its energy.
        texts (`dict[str, tuple]`): name -> the passages of the directions, and those that are scored.
        sinks (`dict[str, dict]`): name of a text -> attention sinks beside position 0.
        rows (`int`): of the task.
        modules (`int`): linear modules that are restored.
        others (`int`): other parameters that are.
    """

    base: Scored
    ways: list[Scored]
    chosen: Scored
    rule: str
    limits: Limits | None
    energy: dict[str, dict[int, float]]
    texts: dict[str, tuple[KeptText, RetentionText]]
    sinks: dict[str, dict]
    rows: int
    modules: int
    others: int


def ways_to_restore(
    counts: Iterable[int], scales: Iterable[float], *, networks: str = "", is_lora: bool = True
) -> list[Restoration]:
    """The ways that are tried.

    Args:
        counts: of directions.
        scales: factors on the change.
        networks: those of a template, if there is one.
        is_lora: whether what is restored can be centred.
    """
    scales = list(scales)
    ways = [Restoration(), *(Restoration(scale=scale) for scale in scales), *map(Restoration, counts)]
    if is_lora:
        ways.append(Restoration(1, is_centred=True))
    if networks:
        ways.append(Restoration(LEADING, networks=networks))
        ways += [Restoration(scale=scale, neurons=networks) for scale in scales]
    return ways


def directions_by_energy(
    energy: Mapping[str, Mapping[int, float]], shares: Mapping[str, float], enough: float
) -> tuple[int, float]:
    """The fewest directions that hold a share of the energy of all texts to keep, or else all of them.

    Args:
        energy: name of a text -> number of directions -> share of its energy.
        shares: how much each text counts.
        enough: the share that is asked for.

    Returns:
        Their number, and the share that they hold.
    """
    counts = sorted(next(iter(energy.values())))
    held = {count: sum(share * energy[name][count] for name, share in shares.items()) for count in counts}
    count = next((count for count in counts if held[count] >= enough), counts[-1])
    return count, held[count]


def way_named(name: str, ways: list[Restoration], scales: Iterable[float]) -> Restoration:
    """The way that a name of the table stands for.

    Args:
        name: of one of the ways, or of one of those that take out directions, scaled.
        ways: that are tried.
        scales: factors on the change.

    Raises:
        FNSFTError: there is none of that name.
    """
    scaled = [Restoration(way.directions, scale, networks=way.networks) for way in ways for scale in scales]
    for way in (*ways[1:], *scaled):
        if way.name == name:
            return way
    raise FNSFTError(f"choose is {name!r}; the ways are: {' | '.join(way.name for way in ways[1:])}")
