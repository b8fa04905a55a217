"""FastICA (Hyvärinen, 1999, "Fast and robust fixed-point algorithms for independent component analysis").

The parallel form with symmetric decorrelation (section IV). Several random starts run at once on a part of the
samples. Their unmixing matrices are stacked, so that each iteration is one matrix product. The start with the largest
contrast goes on with all samples. scikit-learn's FastICA can do the iterations instead, from the same starts.
"""

import warnings
from dataclasses import dataclass

import torch

from ..errors import FNSFTError


TOLERANCE = 1e-4  # of the change of every source's direction
_SCREENED = 4096  # samples on which the starts are compared
_SCREENING_ITERATIONS = 100


@dataclass
class IndependentSources:
    """What [`fast_ica`] found.

    Attributes:
        sources (`torch.Tensor`): shape (samples, k), of mean zero and unit variance.
        mixing (`torch.Tensor`): shape (k, k), float64 on the CPU; `sources @ mixing.T` is the centred data.
        change (`torch.Tensor`): shape (k,), how far from 1 the cosine between each source's last two directions is.
        iterations (`int`): with all samples.
    """

    sources: torch.Tensor
    mixing: torch.Tensor
    change: torch.Tensor
    iterations: int


def _logcosh(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    g = u.tanh()
    return g, 1 - g.square().mean(0)


def _cube(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    square = u.square()
    return square * u, 3 * square.mean(0)


def _exp(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    square = u.square()
    bell = (-square / 2).exp()
    return u * bell, ((1 - square) * bell).mean(0)


# contrast -> (its derivative g with the mean of g', the contrast G itself, E[G] of a standard normal variable)
CONTRASTS = {
    "logcosh": (_logcosh, lambda u: u.abs() + (-2 * u.abs()).exp().log1p() - 0.6931471805599453, 0.3745672075),
    "cube": (_cube, lambda u: u**4 / 4, 0.75),
    "exp": (_exp, lambda u: -(-u.square() / 2).exp(), -(0.5**0.5)),
}


def fast_ica(
    data: torch.Tensor,
    *,
    contrast: str = "logcosh",
    backend: str = "torch",
    seed: int = 0,
    restarts: int = 1,
    needed: int | None = None,
    max_iterations: int = 400,
) -> IndependentSources:
    """Unmix data into independent sources of unit variance.

    Args:
        data: shape (samples, k), with k independent columns.
        contrast: `"logcosh"`, `"cube"` or `"exp"`.
        backend: who iterates: `"torch"`, or `"sklearn"` (scikit-learn's FastICA, on the CPU in float64).
        seed: seed of the random starts.
        restarts: number of random starts.
        needed: stop when this many sources, those of the largest power in the data, have settled; all by default.
            scikit-learn always waits for all of them.
        max_iterations: with all samples.

    Raises:
        FNSFTError: some columns are constant, or follow from the others.
    """
    samples, k = data.shape
    centred = data - data.mean(0)
    covariance = (centred.T @ centred / samples).cpu().double()
    _check_independent(covariance, torch.finfo(data.dtype).eps)
    values, vectors = torch.linalg.eigh(covariance)
    whitening = (vectors / values.sqrt()).T  # (k, k)
    white = centred @ whitening.T.to(data)  # (samples, k)

    generator = torch.Generator().manual_seed(seed)
    starts = _decorrelate(torch.randn(restarts, k, k, generator=generator, dtype=torch.float64))
    needed = needed or k
    iterate = _BACKENDS[backend]
    if restarts > 1:
        few = white[:: -(-samples // _SCREENED)]
        screened, _, _ = iterate(few, starts, contrast, values, needed, _SCREENING_ITERATIONS)
        starts = screened[[int(_gain(few, screened, contrast).argmax())]]
    (rotation,), (change,), iterations = iterate(white, starts, contrast, values, needed, max_iterations)
    return IndependentSources(
        sources=white @ rotation.T.to(white),
        mixing=(vectors * values.sqrt()) @ rotation.T,
        change=change,
        iterations=iterations,
    )


def _check_independent(covariance: torch.Tensor, precision: float) -> None:
    """Refuse columns that span fewer dimensions than they are, for white data cannot be made of them."""
    k = len(covariance)
    scale = covariance.diagonal().clamp(min=0).sqrt()
    correlation = covariance / torch.outer(scale, scale)
    if bool(correlation.isfinite().all()):
        rank = int((torch.linalg.eigvalsh(correlation) > 10 * k * precision).sum())
    else:
        rank = int((scale > 0).sum())
    if rank < k:
        raise FNSFTError(
            f"the {k} columns to be unmixed span only {rank} dimensions (some are constant, or follow from others); "
            "ask for fewer components (ica_components), or give more and more varied text"
        )


def _iterate(
    white: torch.Tensor, unmixing: torch.Tensor, contrast: str, values: torch.Tensor, needed: int, max_iterations: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Fixed-point iterations of all starts, shape (starts, k, k); also the last change, (starts, k), and how many."""
    derivative = CONTRASTS[contrast][0]
    unmixing = unmixing.clone()
    change = torch.full(unmixing.shape[:2], float("inf"), dtype=torch.float64)
    iterations = 0
    for iterations in range(1, max_iterations + 1):
        strongest = (unmixing.square() @ values).topk(needed).indices  # (starts, needed)
        running = (change.gather(1, strongest).amax(1) >= TOLERANCE).nonzero().flatten()
        if len(running) == 0:
            return unmixing, change, iterations - 1
        old = unmixing[running]  # (running, k, k)
        stacked = old.flatten(0, 1)  # (running * k, k)
        g, slope = derivative(white @ stacked.T.to(white))  # (samples, running * k), (running * k,)
        step = (g.T @ white).cpu().double() / len(white) - slope.cpu().double()[:, None] * stacked
        new = _decorrelate(step.view_as(old))
        change[running] = ((new * old).sum(2).abs() - 1).abs()
        unmixing[running] = new
    return unmixing, change, iterations


def _iterate_in_scikit_learn(
    white: torch.Tensor, unmixing: torch.Tensor, contrast: str, values: torch.Tensor, needed: int, max_iterations: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """What [`_iterate`] gives, start by start, from scikit-learn's FastICA."""
    from sklearn.decomposition import FastICA  # loaded only where it is asked for
    from sklearn.exceptions import ConvergenceWarning

    data = white.cpu().double().numpy()

    def run(start: torch.Tensor, most: int) -> tuple[torch.Tensor, int]:
        # The data is white; scikit-learn's own whitening would zero sources where it is exactly so.
        ica = FastICA(fun=contrast, whiten=False, w_init=start.numpy(), tol=TOLERANCE, max_iter=most)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the change says so
            ica.fit(data)
        return torch.from_numpy(ica.components_), ica.n_iter_

    found, changes, iterations = [], [], 0
    for start in unmixing:
        old, count = run(start, max_iterations)
        new, _ = run(old, 1)  # scikit-learn does not tell the change of its last step: that of one more
        found.append(new)
        changes.append(((new * old).sum(1).abs() - 1).abs())
        iterations = max(iterations, count + 1)
    return torch.stack(found), torch.stack(changes), iterations


_BACKENDS = {"torch": _iterate, "sklearn": _iterate_in_scikit_learn}


def _gain(white: torch.Tensor, unmixing: torch.Tensor, contrast: str) -> torch.Tensor:
    """What each start achieves: summed over sources, the squared distance of E[G] from that of a normal variable."""
    _, function, of_normal = CONTRASTS[contrast]
    sources = white @ unmixing.flatten(0, 1).T.to(white)  # (samples, starts * k)
    gain = (function(sources).mean(0).cpu().double() - of_normal).square()
    return gain.view(len(unmixing), -1).sum(1)


def _decorrelate(unmixing: torch.Tensor) -> torch.Tensor:
    """(W W^T)^(-1/2) W of each matrix of shape (restarts, k, k): Hyvärinen (1999), eq. 45."""
    left, _, right = torch.linalg.svd(unmixing)
    return left @ right
