"""Which learning rates are high, and why: Adam moves each entry of a weight by about the rate in every step."""

import pytest
import torch
from helpers import sft_config

from fnsft_trl.training.learning_rate import RATES, high_rate


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_a_step_of_adam_is_as_large_as_the_rate_whatever_the_gradient(scale):
    """By hand: m = (1 - b1) g, v = (1 - b2) g^2, both corrected: g and g^2; so the step is a g / |g| = a."""
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = torch.optim.AdamW([weight], lr=0.01, eps=1e-12, weight_decay=0)
    gradient = scale * torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    for step in range(1, 4):
        weight.grad = gradient.clone()
        optimizer.step()
        torch.testing.assert_close(weight.detach(), -0.01 * step * gradient.sign(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", sorted(RATES))
def test_a_rate_above_the_bound_is_high_and_the_low_one_is_named(tmp_path, method):
    rates = RATES[method]
    assert rates.low < rates.high
    assert high_rate(method, sft_config(tmp_path, learning_rate=rates.high)) is None
    told = high_rate(method, sft_config(tmp_path, learning_rate=3 * rates.high))
    assert f"{rates.low:g}" in told
    assert f"high for {method}" in told
    assert high_rate(method, sft_config(tmp_path, learning_rate=3 * rates.high, optim="sgd")) is None
