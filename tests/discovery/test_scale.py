"""Loadings times their scale are directions of activations, however they were standardised."""

from dataclasses import replace

import pytest
import torch

from fnsft_trl import FNSFTError, FunctionalNetworkConfig, FunctionalNetworkTemplate, discover_networks
from fnsft_trl.discovery.moments import Moments
from fnsft_trl.discovery.scale import activation_scale


def pooled(template, values):
    return torch.cat([values[layer].double() for layer in template.widths], -1)


@pytest.fixture(scope="module")
def found(tokenizer, rows):
    from helpers import tiny_model

    texts = [row["prompt"] + row["completion"] for row in rows]
    settings = {"ica_components": 3, "ica_rank": 16, "ica_max_tokens": 250, "ica_batch_size": 2, "ica_max_length": 32}
    model = tiny_model("llama")

    def discover(**changes):
        return discover_networks(model, tokenizer, texts, FunctionalNetworkConfig(**settings, **changes))

    return {
        name: discover(ica_standardize=standardize, ica_decomposition=decomposition)
        for name, (standardize, decomposition) in {
            "center": ("center", "pca"),
            "layer": ("layer", "pca"),
            "zscore": ("zscore", "pca"),
            "kmeans": ("layer", "kmeans"),
        }.items()
    }


def test_a_layer_is_divided_by_its_rms_and_a_neuron_by_its_deviation(found):
    for name in ("center", "layer", "zscore"):
        template, scale = found[name], activation_scale(found[name])
        for layer in template.widths:
            variance = template.rms[layer].double().square() - template.mean[layer].double().square()
            expected = {
                "center": torch.ones_like(variance),
                "layer": variance.mean().sqrt().expand_as(variance),
                "zscore": variance.sqrt(),
            }[name]
            torch.testing.assert_close(scale[layer], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["center", "layer", "zscore"])
def test_scaled_principal_components_explain_the_variance_that_they_say(found, name):
    """In the units, the squared loadings of a component sum to its share of the total variance; and so scaled ones."""
    template = found[name]
    scale = pooled(template, activation_scale(template))
    variance = pooled(template, template.rms).square() - pooled(template, template.mean).square()
    loadings = pooled(template, template.loadings)
    total = (variance / scale.square()).sum()
    shares = (loadings * scale).square().div(scale.square()).sum(1) / total
    assert shares.tolist() == pytest.approx([c.explained_variance for c in template.components], rel=1e-3)
    # no component adds more to a neuron than the neuron varies
    assert ((loadings * scale).square() <= variance * (1 + 1e-3) + 1e-12).all()


def test_cosines_are_refused_and_lists_have_no_scale(found):
    with pytest.raises(FNSFTError, match=r"kmeans.*cosines"):
        activation_scale(found["kmeans"])
    found["zscore"].settings, kept = {}, found["zscore"].settings
    try:
        assert all((part == 1).all() for part in activation_scale(found["zscore"]).values())
    finally:
        found["zscore"].settings = kept


def test_a_deviation_that_is_small_beside_the_mean_is_kept(found, tmp_path):
    """Of the difference of squares that float32 holds, an eighth would be missing."""
    template, deviation = found["zscore"], torch.linspace(0.5, 2, 40, dtype=torch.float64)
    layer = min(template.widths)
    for ratio in (3, 1000, 1e5):
        count = 1000
        mean = torch.where(torch.arange(40) % 2 == 0, ratio * deviation, 0)
        mean, rms = Moments(count, mean, count * deviation.square()).stored(slice(0, 40))
        assert mean.dtype == rms.dtype == (torch.float32 if ratio == 3 else torch.float64)
        written = replace(template, mean=template.mean | {layer: mean}, rms=template.rms | {layer: rms})
        written.save_pretrained(tmp_path / str(ratio))
        read = FunctionalNetworkTemplate.from_pretrained(tmp_path / str(ratio))
        torch.testing.assert_close(activation_scale(read)[layer], deviation, rtol=1e-4, atol=0)
