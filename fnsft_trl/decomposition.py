"""Streaming decomposition: activations in, independent components out. Pure tensors, memory independent of tokens.

The sketch is the streaming truncated singular value decomposition with mean update of Ross et al. (2008), "Incremental
Learning for Robust Visual Tracking", section 3, computed through Gram matrices since blocks are short and wide. Scores
of a sample of tokens are carried along in the sketch's coordinates, for temporal ICA needs them and the basis is
known only at the end. ICA is FastICA (Hyvärinen, 1999) as scikit-learn has it.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from .errors import FNSFTError


_FRESH_ROWS = 2048  # newest scores that are rotated one by one; older ones wait for the product of the rotations


def _eigh_descending(gram: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest `count` singular values and left vectors of a matrix with this Gram matrix; in float64 on the CPU."""
    values, vectors = torch.linalg.eigh(gram.to("cpu", torch.float64))
    order = torch.arange(len(values) - 1, -1, -1)[:count]
    singular = values[order].clamp_min(0).sqrt()
    # Below this, a direction is rounding noise of the Gram matrix and not a direction of the data.
    noise = torch.finfo(gram.dtype).eps ** 0.5 * float(values[-1].clamp_min(0).sqrt())
    rank = int((singular > noise).sum())
    return singular[:rank], vectors[:, order[:rank]]


class ActivationSketch:
    """A rank-r sketch, exact moments and a sample of token scores, of a stream of activations.

    With X the centred activations (tokens, neurons), B = `rows` satisfies B.T @ B ~ X.T @ X, and its rows are
    orthogonal.

    Args:
        width: number of neurons F.
        rank: r, number of rows kept; also the number of tokens absorbed at a time.
        reservoir: largest number of token scores kept.
        seed: seed of the sample.
        prescale: divide by the standard deviations of the first block, so that neurons of very different scale are
            sketched alike. For z-scoring; [`decompose`] replaces them by the final ones.
        dtype, device: of the sketch.
    """

    def __init__(
        self,
        width: int,
        rank: int,
        *,
        reservoir: int,
        seed: int,
        prescale: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.width, self.rank, self.reservoir, self.prescale = width, rank, reservoir, prescale
        self.count = 0
        self.mean = torch.zeros(width, dtype=dtype, device=device)  # (neurons,)
        self.m2 = torch.zeros(width, dtype=dtype, device=device)  # (neurons,) sum of squared deviations
        self.scale = torch.ones(width, dtype=dtype, device=device)  # (neurons,)
        self.rows = torch.zeros(0, width, dtype=dtype, device=device)  # (<= rank, neurons) B
        self.singular = torch.zeros(0, dtype=torch.float64)  # (<= rank,)
        self._pending = torch.empty(rank, width, dtype=dtype, device=device)
        self._filled = 0
        self._random = torch.Generator().manual_seed(seed)
        self._old, self._old_priority = torch.zeros(0, 0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
        self._fresh, self._fresh_priority = self._old, self._old_priority
        self._turn, self._shift = torch.zeros(0, 0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)

    def update(self, rows: torch.Tensor) -> None:
        """Add activations, shape (tokens, neurons)."""
        while len(rows):
            taken = min(len(rows), self.rank - self._filled)
            self._pending[self._filled : self._filled + taken] = rows[:taken]
            self._filled += taken
            rows = rows[taken:]
            if self._filled == self.rank:
                self._absorb()

    def finish(self) -> None:
        """Absorb what is left of the stream. Further updates are allowed."""
        if self._filled:
            self._absorb()
        self._merge_scores()

    @property
    def scores(self) -> torch.Tensor:
        """Scores of the sampled tokens, shape (tokens, rank of the sketch): coordinates along the sketch's rows."""
        return self._old

    def _absorb(self) -> None:
        block = self._pending[: self._filled]  # (c, neurons)
        c, n = self._filled, self.count
        self._filled = 0
        block_mean = block.mean(0)
        if not torch.isfinite(block_mean).all():
            bad = int((~torch.isfinite(block_mean)).nonzero()[0])
            raise NonFiniteActivation(bad, n, n + c)
        centred = block.sub_(block_mean)
        block_m2 = centred.square().sum(0)
        if n == 0 and self.prescale:
            deviation = (block_m2 / c).sqrt()
            self.scale = torch.where(deviation > 0, deviation, 1)
        # The old mean enters as one more row, so that the sketch stays centred (Ross et al. 2008, eq. 9).
        weight = (n * c / (n + c)) ** 0.5
        shift = (self.mean - block_mean) * weight
        self.m2 += block_m2 + shift.square()
        self.mean += (block_mean - self.mean) * (c / (n + c))
        self.count += c
        new = torch.cat([centred, shift[None]]) if n else centred
        if self.prescale:
            new = new / self.scale

        old_rank = len(self.rows)
        cross = (new @ self.rows.T).cpu()  # (new, old_rank)
        gram = torch.block_diag(torch.diag(self.singular.square()).to(cross), (new @ new.T).cpu())
        gram[old_rank:, :old_rank] = cross
        gram[:old_rank, old_rank:] = cross.T
        singular, vectors = _eigh_descending(gram, self.rank)  # (r,), (old_rank + new, r)
        cross, gram = cross.double(), gram.double()
        turn = vectors.T.to(self.rows.dtype).to(self.rows.device)
        self.rows = turn[:, :old_rank] @ self.rows + turn[:, old_rank:] @ new  # (r, neurons)

        # Coordinates along the new rows: of the new tokens straight from the Gram matrix, of the old ones by rotation.
        rotation = vectors[:old_rank].T * self.singular + vectors[old_rank:].T @ cross / self.singular
        rotation = rotation / singular[:, None]  # (r, old_rank)
        coordinates = (gram[old_rank:] @ vectors) / singular  # (new, r)
        self.singular = singular
        moved = coordinates[-1] / weight if n else torch.zeros_like(singular)  # of (old mean - block mean)
        fresh = coordinates[:c] - moved * (n / (n + c))
        self._carry(rotation, moved * (c / (n + c)))
        priority = torch.rand(c, generator=self._random, dtype=torch.float64)
        self._fresh = torch.cat([self._fresh, fresh]) if len(self._fresh) else fresh
        self._fresh_priority = torch.cat([self._fresh_priority, priority])
        if len(self._fresh) >= _FRESH_ROWS:
            self._merge_scores()

    def _carry(self, rotation: torch.Tensor, shift: torch.Tensor) -> None:
        """Move stored scores into the new coordinates: s -> rotation @ s + shift."""
        if len(self._old):
            self._turn, self._shift = rotation @ self._turn, rotation @ self._shift + shift
        if len(self._fresh):
            self._fresh = self._fresh @ rotation.T + shift

    def _merge_scores(self) -> None:
        """Bring all scores to one frame and keep the `reservoir` tokens of lowest random priority."""
        if len(self._old):
            self._old = self._old @ self._turn.T + self._shift
        scores = torch.cat([self._old, self._fresh]) if len(self._old) else self._fresh
        priority = torch.cat([self._old_priority, self._fresh_priority])
        if len(scores) > self.reservoir:
            kept = priority.argsort()[: self.reservoir].sort().values
            scores, priority = scores[kept], priority[kept]
        self._old, self._old_priority = scores, priority
        self._fresh, self._fresh_priority = scores[:0], priority[:0]
        self._turn = torch.eye(scores.shape[1], dtype=torch.float64)
        self._shift = torch.zeros(scores.shape[1], dtype=torch.float64)


class NonFiniteActivation(FNSFTError):
    """An activation is NaN or infinite.

    Attributes:
        column (`int`): the neuron's column.
    """

    def __init__(self, column: int, first: int, last: int) -> None:
        super().__init__(f"the activations of column {column} are not finite between tokens {first} and {last}")
        self.column, self.first, self.last = column, first, last


@dataclass
class Decomposition:
    """Independent components of a stream of activations, in canonical order and sign.

    Components are ordered by explained variance, largest first; the largest loading of each is positive.

    Attributes:
        loadings (`torch.Tensor`): shape (components, neurons), float32: what one standard deviation of the component
            adds to the neuron's activation (to its z-score, when z-scored).
        explained_variance (`list[float]`): share of the total variance, per component.
        kurtosis (`list[float]`): excess kurtosis of the component over tokens (temporal) or neurons (spatial).
        reliability (`list[float]`): |correlation| of the component's loadings between two disjoint halves, in [0, 1].
        jaccard (`list[float]`): overlap of its 2% largest |loadings| between the halves.
        converged (`bool`): whether FastICA reached its tolerance in every run.
        count (`int`): tokens read.
        mean, rms (`torch.Tensor`): shape (neurons,), of the activations.
    """

    loadings: torch.Tensor
    explained_variance: list[float]
    kurtosis: list[float]
    reliability: list[float]
    jaccard: list[float]
    converged: bool
    count: int
    mean: torch.Tensor
    rms: torch.Tensor


def decompose(
    halves: Sequence[ActivationSketch],
    components: int,
    *,
    variant: str = "temporal",
    standardize: str = "center",
    contrast: str = "logcosh",
    seed: int = 0,
    max_iterations: int = 400,
) -> Decomposition:
    """Decompose the union of two sketches, and each half alone for the reliability.

    Args:
        halves: two finished sketches of disjoint tokens.
        components: k.
        variant: `"temporal"` or `"spatial"`.
        standardize: `"center"` or `"zscore"`.
        contrast: FastICA's `"logcosh"`, `"cube"` or `"exp"`.
        seed: seed of FastICA's start.
        max_iterations: of FastICA.

    Raises:
        FNSFTError: a half has no more tokens than components, or fewer independent directions.
    """
    for half in halves:
        if half.count <= components:
            raise FNSFTError(
                f"{sum(h.count for h in halves)} tokens were read, {half.count} in one half: more than "
                f"{components} (ica_components) are needed in each; give more text or lower ica_components"
            )
    runs = [
        _components(part, components, variant, standardize, contrast, seed, max_iterations)
        for part in (list(halves), *([half] for half in halves))
    ]
    whole, *split = runs
    moments = _Moments(halves)
    reliability, jaccard = _replication(whole.loadings, *(run.loadings for run in split))
    variance = moments.variance
    total = float((variance > 0).sum()) if standardize == "zscore" else float(variance.sum(dtype=torch.float64))
    power = whole.loadings.square().sum(1, dtype=torch.float64)
    return Decomposition(
        loadings=whole.loadings,
        explained_variance=[float(p) / total for p in power],
        kurtosis=whole.kurtosis,
        reliability=reliability,
        jaccard=jaccard,
        converged=all(run.converged for run in runs),
        count=moments.count,
        mean=moments.mean.float().cpu(),
        rms=(variance + moments.mean.square()).sqrt().float().cpu(),
    )


class _Moments:
    """Exact moments of the union of sketches."""

    def __init__(self, sketches: Sequence[ActivationSketch]) -> None:
        self.count = sum(sketch.count for sketch in sketches)
        self.mean = sum(sketch.mean * (sketch.count / self.count) for sketch in sketches)  # (neurons,)
        m2 = sum(sketch.m2 + sketch.count * (sketch.mean - self.mean).square() for sketch in sketches)
        self.variance = m2 / self.count  # (neurons,)


@dataclass
class _Run:
    loadings: torch.Tensor  # (components, neurons)
    kurtosis: list[float]
    converged: bool


def _components(sketches, k, variant, standardize, contrast, seed, max_iterations) -> _Run:
    moments = _Moments(sketches)
    scale = torch.ones_like(moments.mean)
    if standardize == "zscore":
        deviation = moments.variance.sqrt()
        scale = torch.where(deviation > 0, deviation, 1)
    # Stack the sketches and their mean offsets in the final units, and take the k strongest directions.
    rows = [sketch.rows * (sketch.scale / scale) for sketch in sketches]
    offsets = [(sketch.mean - moments.mean) / scale for sketch in sketches]
    stack = torch.cat([*rows, *(o[None] * s.count**0.5 for o, s in zip(offsets, sketches, strict=True))])
    singular, vectors = _eigh_descending(stack @ stack.T, k)
    if len(singular) < k:
        raise FNSFTError(
            f"the activations span {len(singular)} directions, fewer than ica_components={k}; give more varied text "
            "or lower ica_components"
        )
    basis = (vectors.T.to(stack) @ stack) / singular.to(stack)[:, None]  # (k, neurons), orthonormal rows
    scores = []  # of the sampled tokens along the basis
    for sketch, row, offset in zip(sketches, rows, offsets, strict=True):
        to_basis = (basis @ row.T).to("cpu", torch.float64) / sketch.singular  # (k, rank)
        scores.append(sketch.scores @ to_basis.T + (basis @ offset).to("cpu", torch.float64))
    scores = torch.cat(scores).numpy()  # (tokens, k)

    if variant == "temporal":
        sources, mixing, converged = _fast_ica(scores, contrast, seed, max_iterations)
        loadings = torch.from_numpy(mixing.T).to(basis) @ basis  # (k, neurons)
    else:
        deviations = (singular / moments.count**0.5).to(basis)
        sources, mixing, converged = _fast_ica(
            (basis * deviations[:, None]).T.to("cpu", torch.float64).numpy(), contrast, seed, max_iterations
        )
        # With unit-variance maps the time course of component c is (white scores) @ mixing[:, c].
        power = np.linalg.norm(mixing, axis=0)
        loadings = torch.from_numpy((sources * power).T).to(basis)
    loadings = loadings.float().cpu()
    loadings[:, (moments.variance == 0).cpu()] = 0
    order = loadings.square().sum(1).argsort(descending=True, stable=True)
    loadings = loadings[order]
    peaks = loadings.gather(1, loadings.abs().argmax(1, keepdim=True))  # (k, 1)
    standard = (sources - sources.mean(0)) / sources.std(0)
    kurtosis = (standard**4).mean(0) - 3
    return _Run(loadings * peaks.sign(), [float(kurtosis[c]) for c in order], converged)


def _fast_ica(data: np.ndarray, contrast: str, seed: int, max_iterations: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """FastICA of (samples, k) data: unit-variance sources (samples, k), mixing (k, k), and whether it converged."""
    from sklearn.decomposition import FastICA
    from sklearn.exceptions import ConvergenceWarning

    ica = FastICA(fun=contrast, random_state=seed, max_iter=max_iterations, whiten="unit-variance")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # reported through `converged`, with the remedy
        sources = ica.fit_transform(data)
    return sources, ica.mixing_, ica.n_iter_ < max_iterations


def match_components(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One-to-one matching of components by |correlation| of their loadings (Hungarian algorithm).

    Args:
        a, b: loadings, shape (components, neurons).

    Returns:
        For each component of `a`, the index of its partner in `b`, shape (components,), and their |correlation|.
    """
    a = a - a.mean(1, keepdim=True)
    b = b - b.mean(1, keepdim=True)
    norms = a.norm(dim=1)[:, None] * b.norm(dim=1)[None]
    correlation = (a @ b.T / norms.clamp_min(1e-30)).abs().clamp_max(1)
    first, second = linear_sum_assignment(correlation.numpy(), maximize=True)
    partner = torch.full((len(a),), -1, dtype=torch.long)
    partner[torch.from_numpy(first)] = torch.from_numpy(second)
    return partner, correlation[torch.arange(len(a)), partner]


def _replication(whole: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[list[float], list[float]]:
    """|correlation| and Jaccard overlap of the pair of half components that belongs to each final component.

    The halves are matched with each other first, without a look at the whole, and then the pairs with the whole.
    """
    partner, correlation = match_components(a, b)
    b = b[partner]
    sign = (a * b).sum(1, keepdim=True).sign()
    pair_of, _ = match_components(whole, a + sign * b)
    top = max(1, round(0.02 * whole.shape[1]))
    jaccard = []
    for pair in pair_of:
        first, second = (set(half[pair].abs().topk(top).indices.tolist()) for half in (a, b))
        jaccard.append(len(first & second) / len(first | second))
    return correlation[pair_of].tolist(), jaccard
