"""The controls of the decomposition: on the same sketch, what numpy and scikit-learn find on the activations."""

import pytest
import torch
from test_decomposition import halves, planted

from fnsft_trl import FNSFTError, FunctionalNetworkConfig
from fnsft_trl.discovery.decomposition import IcaSettings, decompose
from fnsft_trl.discovery.matching import correlation
from fnsft_trl.discovery.units import Units


def test_principal_components_are_those_of_the_covariance():
    data, _ = planted()
    found = decompose(halves(data), IcaSettings(4, decomposition="pca"))
    centred = (data - data.mean(0)).double()
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(data))
    expected = (vectors[:, -4:] * values[-4:].sqrt()).T.flip(0)  # one standard deviation of each
    signs = (expected * found.loadings).sum(1, keepdim=True).sign()
    torch.testing.assert_close(found.loadings.double(), expected * signs, rtol=0, atol=2e-3)
    torch.testing.assert_close(torch.tensor(found.explained_variance).double(), values[-4:].flip(0) / values.sum())
    assert found.converged
    assert (found.loadings.gather(1, found.loadings.abs().argmax(1, keepdim=True)) > 0).all()


def test_clusters_are_the_planted_groups_and_loadings_the_cosines_to_their_centroids():
    """80 neurons in four groups; a single source each, so that all cosines inside are near one, and none outside."""
    data, loadings = planted(neurons=80)
    found = decompose(halves(data), IcaSettings(4, decomposition="kmeans"), Units("zscore"))
    assert found.loadings.abs().max() <= 1 + 1e-6
    match = correlation(found.loadings, (loadings != 0).float()).argmax(1)
    assert sorted(match.tolist()) == [0, 1, 2, 3]
    for number, group in enumerate(match.tolist()):
        inside = loadings[group] != 0
        assert found.loadings[number][inside].min() > 0.9
        assert found.loadings[number][~inside].abs().max() < 0.5
    assert sum(found.explained_variance) == pytest.approx(0.94, abs=0.06)  # of the principal directions
    assert min(found.reliability) > 0.99
    assert min(found.kurtosis) > 1  # of Laplacian sources


@pytest.mark.parametrize("decomposition", ["pca", "kmeans"])
def test_a_control_replicates_less_on_less_text_and_is_the_same_twice(decomposition):
    data, _ = planted(tokens=120, noise=3.0)
    settings = IcaSettings(4, decomposition=decomposition)
    few, again = (decompose(halves(data), settings) for _ in range(2))
    assert torch.equal(few.loadings, again.loadings)
    assert sum(few.reliability) / 4 < 0.95


def test_more_clusters_than_neurons_that_vary_is_an_error():
    data, _ = planted(neurons=80)
    data[:, 8:] = 1.0
    with pytest.raises(FNSFTError, match="span 8 directions, fewer than ica_components=9"):
        decompose(halves(data), IcaSettings(9, decomposition="kmeans"))


def test_what_is_of_ica_has_no_effect_on_the_others():
    for given in ({"ica_variant": "spatial"}, {"ica_contrast": "cube"}, {"ica_backend": "sklearn"}):
        with pytest.raises(FNSFTError, match=f"{next(iter(given))} has no effect on ica_decomposition=kmeans"):
            FunctionalNetworkConfig(ica_decomposition="kmeans", **given)
