"""The null of reliability: what it is for activations without co-activation."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from .decomposition import IcaSettings, decompose
from .sketch import ActivationSketch


class ShuffledNull:
    """What reliability would be without co-activation: the same, on activations shuffled in time.

    Keeps a sample of tokens of some neurons for each half. Each neuron's values are then permuted over the tokens by
    themselves, which keeps what every neuron does and destroys what they do together.

    Args:
        width: number of neurons of the stream.
        columns_seed: seed of the choice of neurons; the same for samples that belong together.
        seed: seed of the choice of tokens.
        neurons: number of neurons taken.
        tokens: largest number of tokens kept.
    """

    def __init__(self, width: int, *, columns_seed: int, seed: int, neurons: int = 512, tokens: int = 2048) -> None:
        shuffle = torch.Generator().manual_seed(columns_seed)
        self.columns = torch.randperm(width, generator=shuffle)[:neurons].sort().values
        self.tokens = tokens
        self.values = torch.empty(0, len(self.columns))
        self.priority = torch.empty(0)
        self._random = torch.Generator().manual_seed(seed)

    def update(self, rows: torch.Tensor, chosen: torch.Tensor) -> None:
        """Add those rows of (tokens, neurons) activations whose indices are given."""
        values = rows[:, self.columns.to(rows.device)][chosen].to("cpu", torch.float32)
        self.values = torch.cat([self.values, values])
        self.priority = torch.cat([self.priority, torch.rand(len(values), generator=self._random)])
        if len(self.values) > self.tokens:
            kept = self.priority.argsort()[: self.tokens].sort().values
            self.values, self.priority = self.values[kept], self.priority[kept]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All that is needed to go on later."""
        return {"values": self.values, "priority": self.priority, "random": self._random.get_state()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over the state of a sample of the same neurons."""
        self.values, self.priority = state["values"], state["priority"]
        self._random.set_state(state["random"])


def null_reliability(nulls: Sequence[Sequence[ShuffledNull]], settings: IcaSettings, *, rank: int) -> dict[str, float]:
    """Mean reliability and Jaccard overlap of as many components of activations that were shuffled in time.

    Args:
        nulls: two lists, one for each half.
        settings: as of the networks themselves; a single start of few iterations is enough here.
        rank: of the sketches.

    Returns:
        `reliability` and `jaccard`, both in [0, 1]. Of z-scored activations both are near zero. Of centred ones a few
        neurons can carry most of the variance; each of these is then a component by itself and returns without any
        co-activation, so that the correlation is high and only the overlap is near zero.

    Raises:
        FNSFTError: as [`decompose`].
    """
    random = torch.Generator().manual_seed(settings.seed)
    halves = []
    for half in nulls:
        values = torch.cat([null.values for null in half])  # (tokens, neurons taken)
        shuffled = values.gather(0, torch.rand(values.shape, generator=random).argsort(0))
        sketch = ActivationSketch(
            values.shape[1],
            rank,
            reservoir=len(values),
            seed=settings.seed,
            prescale=settings.standardize == "zscore",
        )
        sketch.update(shuffled)
        sketch.finish()
        halves.append([sketch])
    result = decompose(halves, replace(settings, restarts=1, max_iterations=50))
    k = settings.components
    return {"reliability": sum(result.reliability) / k, "jaccard": sum(result.jaccard) / k}
