"""ActivationSketch: a stream of activations in memory that does not grow with it.

The streaming truncated singular value decomposition with mean update of Ross et al. (2008), "Incremental Learning for
Robust Visual Tracking", section 3, computed through Gram matrices since blocks are short and wide. Scores of a sample
of tokens are carried along in the sketch's coordinates, for temporal ICA needs them and the basis is known only at the
end.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .moments import Moments, strip_width
from .units import Units


_FRESH_ROWS = 2048  # newest scores that are rotated one by one; older ones wait for the product of the rotations
_STALE = 4  # times the divisor so far: a neuron that varies so much more gets a new one at once


def eigh_descending(gram: torch.Tensor, count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular values and left vectors of a matrix, from its Gram matrix; in float64 on the CPU.

    Args:
        gram: shape (rows, rows).
        count: the largest this many are given; fewer, where the matrix has fewer directions above the rounding noise.
        dtype: of the coarsest Gram matrix that the rows went through, which says what is noise.

    Returns:
        Singular values, descending, shape (r,); vectors, shape (rows, r).
    """
    values, vectors = torch.linalg.eigh(gram.cpu().double())
    order = torch.arange(len(values) - 1, -1, -1)[:count]
    singular = values[order].clamp_min(0).sqrt()
    # Below this, a direction is rounding noise of the Gram matrix and not a direction of the data.
    noise = torch.finfo(dtype).eps ** 0.5 * float(values[-1].clamp_min(0).sqrt())
    rank = int((singular > noise).sum())
    return singular[:rank], vectors[:, order[:rank]]


class ActivationSketch:
    """A rank-r sketch, exact moments and a sample of token scores, of a stream of activations.

    With X the centred activations in the units of the sketch (tokens, neurons), B = `rows` satisfies
    B.T @ B ~ X.T @ X, and its rows are orthogonal.

    Args:
        width: number of neurons F.
        rank: r, number of rows kept; also the number of tokens absorbed at a time.
        reservoir: largest number of token scores kept.
        seed: seed of the sample.
        units: what activations are divided by, from the moments so far;
            [`~fnsft_trl.discovery.decomposition.decompose`] replaces it by the final divisor.
        dtype, device: of the sketch.

    Attributes:
        moments (`Moments`): of the tokens absorbed.
        divisor (`torch.Tensor`): shape (neurons,), float64: what the rows are divided by.
        singular (`torch.Tensor`): shape (<= rank,), float64, norms of the rows.
        scores (`torch.Tensor`): shape (sampled tokens, rows), float32: coordinates along the rows' directions. Valid
            after [`finish`].
        priority (`torch.Tensor`): shape (sampled tokens,): each token draws one in [0, 1), the lowest stay.
    """

    _STATE = ("divisor", "singular", "scores", "priority", "_fresh", "_fresh_priority", "_turn", "_shift")

    def __init__(
        self,
        width: int,
        rank: int,
        *,
        reservoir: int,
        seed: int,
        units: Units | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.width, self.rank, self.reservoir, self.units = width, rank, reservoir, units or Units()
        self.moments = Moments.empty(width, device)
        self.divisor = torch.ones_like(self.moments.mean)
        self.singular = torch.zeros(0, dtype=torch.float64)
        # The rows, then the tokens that wait, then one row for the move of the mean: one matrix, so that products with
        # all of them are one product.
        self._buffer = torch.empty(2 * rank + 1, width, dtype=dtype, device=device)
        self._waiting = 0
        self._next_rescale = 1
        self._random = torch.Generator().manual_seed(seed)
        self.scores, self.priority = torch.zeros(0, 0), torch.zeros(0, dtype=torch.float64)
        self._fresh, self._fresh_priority = torch.zeros(0, 0, dtype=torch.float64), self.priority
        self._turn, self._shift = torch.zeros(0, 0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)

    @classmethod
    def of_few_neurons(
        cls, blocks: Iterable[torch.Tensor], width: int, rank: int, *, reservoir: int
    ) -> ActivationSketch:
        """A finished sketch of activations in float32, through their covariance.

        Args:
            blocks: shape (tokens, neurons), independent of each other: the first tokens are the sample.
            width: number of neurons, so few that a square matrix of them is small.
            rank: largest number of rows.
            reservoir: largest number of token scores kept.
        """
        sketch = cls(width, rank, reservoir=reservoir, seed=0)
        count, total, second, sample = 0, torch.zeros(width).double(), torch.zeros(width, width).double(), []
        for block in blocks:
            if count < reservoir:
                sample.append(block[: reservoir - count])
            count += len(block)
            total += block.sum(0)
            second += block.T @ block
        mean = total / count
        second -= count * mean[:, None] * mean
        sketch.moments = Moments(count, mean, second.diag().clamp_min(0))
        sketch.singular, vectors = eigh_descending(second, rank, sketch.dtype)
        sketch.rows[:] = vectors.T * sketch.singular[:, None]
        sketch.scores = torch.cat([(part - mean.float()) @ vectors.float() for part in sample])
        sketch.priority = torch.arange(1, len(sketch.scores) + 1).double() / count
        return sketch

    @property
    def count(self) -> int:
        """Tokens absorbed."""
        return self.moments.count

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows."""
        return self._buffer.dtype

    @property
    def rows(self) -> torch.Tensor:
        """B, shape (<= rank, neurons)."""
        return self._buffer[: len(self.singular)]

    @property
    def sampling_rate(self) -> float:
        """Share of the tokens whose scores are kept: those with a priority up to this."""
        return float(self.priority.max()) if self.count > self.reservoir else 1.0

    def update(self, rows: torch.Tensor, chosen: torch.Tensor | None = None) -> None:
        """Add activations.

        Args:
            rows: shape (tokens, neurons), finite, of the sketch's dtype.
            chosen: indices of the rows to add; all of them by default.
        """
        if chosen is None:
            chosen = torch.arange(len(rows), device=rows.device)
        while len(chosen):
            taken = min(len(chosen), self.rank - self._waiting)
            first = len(self.singular) + self._waiting
            torch.index_select(rows, 0, chosen[:taken], out=self._buffer[first : first + taken])
            self._waiting += taken
            chosen = chosen[taken:]
            if self._waiting == self.rank:
                self._absorb()

    def finish(self) -> None:
        """Absorb what is left of the stream. Further updates are allowed."""
        if self._waiting:
            self._absorb()
        self._merge_scores()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All that is needed to go on with the stream later; see [`load_state_dict`]."""
        state = {name: getattr(self, name).contiguous() for name in self._STATE}
        state |= {"mean": self.moments.mean, "m2": self.moments.m2}
        state["buffer"] = self._buffer[: len(self.singular) + self._waiting]
        state["counters"] = torch.tensor([self.count, self._waiting, self._next_rescale])
        state["random"] = self._random.get_state()
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over the state of a sketch of the same width, rank and dtype."""
        for name in self._STATE:
            setattr(self, name, state[name].to(getattr(self, name).device))
        count, self._waiting, self._next_rescale = state["counters"].tolist()
        self.moments = Moments(count, state["mean"].to(self.divisor.device), state["m2"].to(self.divisor.device))
        self._buffer[: len(state["buffer"])] = state["buffer"]
        self._random.set_state(state["random"])

    def _absorb(self) -> None:
        r, c, n = len(self.singular), self._waiting, self.count
        self._waiting = 0
        block = self._buffer[r : r + c]  # (c, neurons)
        added = Moments.centring(block)
        # The old mean enters as one more row, so that the sketch stays centred (Ross et al. 2008, eq. 9).
        weight = (n * c / (n + c)) ** 0.5
        if n:
            self._buffer[r + c] = (self.moments.mean - added.mean) * weight
        self.moments.add(added)
        gram = self._rescaled()  # (r, r)
        stack = self._buffer[: r + c + bool(n)]  # (r + added, neurons)
        self._divide(stack[r:])

        products = (stack[r:] @ stack.T).cpu().double()  # (added, r + added)
        gram = torch.cat([torch.cat([gram, products[:, :r].T], 1), products])
        singular, vectors = eigh_descending(gram, self.rank, self.dtype)  # (new r,), (r + added, new r)
        _rotate(stack, vectors.T)

        # Coordinates along the new rows: of the new tokens straight from the Gram matrix, of the old ones by rotation.
        rotation = (gram[:r] @ vectors / self.singular[:, None] / singular).T  # (new r, r)
        coordinates = gram[r:] @ vectors / singular  # (added, new r)
        self.singular = singular
        moved = coordinates[-1] / weight if n else torch.zeros_like(singular)  # of (old mean - block mean)
        self._carry(rotation, moved * (c / (n + c)))
        fresh = coordinates[:c] - moved * (n / (n + c))
        self._fresh = torch.cat([self._fresh, fresh]) if len(self._fresh) else fresh
        self._fresh_priority = torch.cat(
            [self._fresh_priority, torch.rand(c, generator=self._random, dtype=torch.float64)]
        )
        if len(self._fresh) >= _FRESH_ROWS:
            self._merge_scores()

    def _rescaled(self) -> torch.Tensor:
        """Bring the rows to the units known by now, and give their Gram matrix.

        All of them when the tokens have doubled. Those of a neuron that varies far more than it did at once, before
        its activations enter: whatever is small beside them would be lost.
        """
        divisor = self.units.running_divisor(self.moments)
        if self.count < self._next_rescale:
            divisor = torch.where(divisor > _STALE * self.divisor, divisor, self.divisor)
        else:
            self._next_rescale = 2 * self.count
        changed = (divisor != self.divisor).nonzero().flatten()
        rows, gram = self.rows, self.singular.square().diag()
        for columns in changed.split(strip_width(rows.device)) if len(rows) else ():
            old = rows[:, columns.to(rows.device)]
            new = old * (self.divisor / divisor)[columns].to(old)
            gram += (new @ new.T).to(gram) - (old @ old.T).to(gram)
            rows[:, columns.to(rows.device)] = new
        self.divisor = divisor
        return gram

    def _divide(self, rows: torch.Tensor) -> None:
        """Bring activations into the units, in place."""
        divided = (self.divisor != 1).nonzero().flatten()
        if 2 * len(divided) > self.width:
            rows.div_(self.divisor.to(rows))
        elif len(divided):
            columns = divided.to(rows.device)
            rows[:, columns] = rows[:, columns] / self.divisor[divided].to(rows)

    def _carry(self, rotation: torch.Tensor, shift: torch.Tensor) -> None:
        """Move stored scores into the new coordinates: s -> rotation @ s + shift."""
        if len(self.scores):
            self._turn, self._shift = rotation @ self._turn, rotation @ self._shift + shift
        if len(self._fresh):
            self._fresh = self._fresh @ rotation.T + shift

    def _merge_scores(self) -> None:
        """Bring all scores to one frame and keep the `reservoir` tokens of lowest random priority."""
        if len(self.scores):
            self.scores = (self.scores @ self._turn.T.float()).add_(self._shift.float())
        fresh = self._fresh.float()
        scores = torch.cat([self.scores, fresh]) if len(self.scores) else fresh
        priority = torch.cat([self.priority, self._fresh_priority])
        if len(scores) > self.reservoir:
            kept = priority.argsort()[: self.reservoir].sort().values
            scores, priority = scores[kept], priority[kept]
        self.scores, self.priority = scores, priority
        self._fresh, self._fresh_priority = self._fresh[:0], priority[:0]
        self._turn = torch.eye(scores.shape[1], dtype=torch.float64)
        self._shift = torch.zeros(scores.shape[1], dtype=torch.float64)


def _rotate(matrix: torch.Tensor, turn: torch.Tensor) -> None:
    """Write turn @ matrix over the first rows of the matrix, a strip of columns at a time."""
    turn = turn.to(matrix)
    for strip in matrix.split(strip_width(matrix.device), 1):
        strip[: len(turn)] = turn @ strip
