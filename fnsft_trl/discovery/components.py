"""Components of reduced activations: independent ones, and the controls that they are compared with. Pure tensors.

All start from the same principal directions of the same sketch. FastICA turns them, `pca` takes them as they are, and
`kmeans` (MacQueen, 1967) groups the neurons by how they load on them. It works on the unit sphere as Dhillon & Modha
(2001, "Concept decompositions for large sparse text data using clustering", section 3): a centroid is a mean of unit
vectors, and nearness is the cosine.
"""

from dataclasses import dataclass
from functools import partial

import torch

from ..errors import FNSFTError
from .ica import fast_ica


@dataclass(frozen=True)
class IcaSettings:
    """How activations are decomposed.

    Attributes:
        components (`int`): k.
        variant (`str`): `"temporal"` or `"spatial"`.
        contrast (`str`): FastICA's `"logcosh"`, `"cube"` or `"exp"`.
        backend (`str`): whose FastICA: `"torch"` (our own) or `"sklearn"`.
        seed (`int`): of the starts of FastICA, or of k-means.
        restarts (`int`): of FastICA or k-means; a single start now and then ends in a poor optimum.
        max_iterations (`int`): of FastICA or k-means.
        decomposition (`str`): `"ica"`, `"pca"` or `"kmeans"`; the last two know neither variant nor contrast.
    """

    components: int
    variant: str = "temporal"
    contrast: str = "logcosh"
    backend: str = "torch"
    seed: int = 0
    restarts: int = 4
    max_iterations: int = 400
    decomposition: str = "ica"


@dataclass
class Reduced:
    """The m strongest principal directions of a stream of activations: more than the components that are asked for.

    Attributes:
        deviation: shape (m,), float64: standard deviation along each, over tokens.
        basis: shape (m, neurons), orthonormal: the directions.
        scores: shape (sampled tokens, m): coordinates along them.
    """

    deviation: torch.Tensor
    basis: torch.Tensor
    scores: torch.Tensor


@dataclass
class Components:
    """Components of reduced activations, in no order.

    Attributes:
        loadings: shape (components, neurons): what one standard deviation of a component adds to each activation; of
            clusters, the cosine of each neuron to the centroid.
        power: shape (components,), float64: the variance that each explains, summed over neurons; of clusters, that of
            the neurons in it.
        kurtosis: shape (components,), excess kurtosis over tokens (of a spatial component: over neurons).
        change: shape (components,), how far from 1 the cosine between the last two directions of each is.
    """

    loadings: torch.Tensor
    power: torch.Tensor
    kurtosis: torch.Tensor
    change: torch.Tensor


def components_of(reduced: Reduced, settings: IcaSettings, weights: torch.Tensor | None) -> Components:
    """The components of reduced activations.

    Args:
        reduced: the principal directions.
        settings: how; as many as `components`, or more, weaker ones, of `"ica"` and `"pca"`.
        weights: of neurons that are a sample: how many each stands for, shape (neurons,).

    Raises:
        FNSFTError: there are fewer tokens than directions.
    """
    if settings.decomposition == "kmeans":
        return _clusters(reduced, settings, weights)
    if settings.decomposition == "pca":
        loadings = reduced.basis * reduced.deviation.to(reduced.basis)[:, None]
        return _with_power(loadings, reduced.scores, torch.zeros(len(loadings), dtype=torch.float64))
    return _independent(reduced, settings)


def _independent(reduced: Reduced, settings: IcaSettings) -> Components:
    basis, scores = reduced.basis, reduced.scores
    unmix = partial(
        fast_ica,
        contrast=settings.contrast,
        backend=settings.backend,
        seed=settings.seed,
        restarts=settings.restarts,
        needed=settings.components,
        max_iterations=settings.max_iterations,
    )
    if settings.variant == "temporal":
        if len(scores) <= len(basis):
            raise FNSFTError(f"{len(scores)} tokens were sampled for {len(basis)} directions; raise ica_reservoir")
        ica = unmix(scores)
        loadings = ica.mixing.T.to(basis) @ basis  # (m, neurons)
    else:
        ica = unmix((basis * reduced.deviation.to(basis)[:, None]).T.cpu())
        # With unit-variance maps the time course of component c is (white scores) @ mixing[:, c].
        loadings = (ica.sources * ica.mixing.norm(dim=0).float()).T
    return _with_power(loadings, ica.sources, ica.change)


def _clusters(reduced: Reduced, settings: IcaSettings, weights: torch.Tensor | None) -> Components:
    """Neurons grouped by the direction of their loadings on the principal directions, each as heavy as any other."""
    from sklearn.cluster import KMeans  # loaded only where it is asked for

    loadings = (reduced.basis * reduced.deviation.to(reduced.basis)[:, None]).T.cpu().double()  # (neurons, m)
    norms = loadings.norm(dim=1)
    varying = norms > 1e-9 * norms.max()
    units = torch.where(varying[:, None], loadings / norms.clamp_min(1e-300)[:, None], 0)  # (neurons, m)
    kmeans = KMeans(
        settings.components, n_init=settings.restarts, max_iter=settings.max_iterations, random_state=settings.seed
    )
    kmeans.fit(units[varying].numpy(), sample_weight=None if weights is None else weights[varying].numpy())
    centroids = torch.from_numpy(kmeans.cluster_centers_)
    centroids = centroids / centroids.norm(dim=1, keepdim=True).clamp_min(1e-300)  # (clusters, m)
    members = torch.nn.functional.one_hot(torch.from_numpy(kmeans.labels_).long(), settings.components).double()
    power = norms[varying].square() @ members  # (clusters,)
    courses = (reduced.scores.double() / reduced.deviation.cpu()) @ centroids.T  # (tokens, clusters)
    return Components((centroids @ units.T).float(), power, _kurtosis(courses), torch.zeros_like(power))


def _with_power(loadings: torch.Tensor, sources: torch.Tensor, change: torch.Tensor) -> Components:
    loadings = loadings.float().cpu()
    return Components(loadings, loadings.square().sum(1, dtype=torch.float64), _kurtosis(sources), change)


def _kurtosis(sources: torch.Tensor) -> torch.Tensor:
    """Excess kurtosis of each column."""
    centred = sources.double() - sources.double().mean(0)
    return (centred.pow(4).mean(0) / centred.square().mean(0).square().clamp_min(1e-300) - 3).cpu()
