"""First-order effects of single neurons, in the precision that a model is loaded in."""

import pytest
import torch
from helpers import tiny_model, tiny_rows

from fnsft_trl.evaluation.evaluation import EvaluationConfig, EvaluationData
from fnsft_trl.probes.data import ProbeData
from fnsft_trl.probes.singles import first_order_effects


UNDERFLOW = 2.0**-25  # half of the smallest number of float16: what is smaller is 0 there
SETTINGS = {"site": "mlp_intermediate", "layers": [1], "batch_size": 4}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_effects_too_small_for_half_precision_are_found_in_it(dtype, tokenizer):
    """Activations and gradients of about 1e-4, which float16 holds, have products that it does not."""
    model = tiny_model("llama").eval()
    mlp = model.model.layers[1].mlp
    for weight in (mlp.up_proj.weight, mlp.up_proj.bias, mlp.down_proj.weight):
        weight.data.mul_(1e-3)
    model = model.to(dtype)
    rows = EvaluationData("d", tiny_rows(2))
    data = ProbeData.read(rows, tokenizer, EvaluationConfig(), max_tokens=20, max_length=64)
    found = first_order_effects(model, [data], **SETTINGS)[1]
    exact = first_order_effects(model.float(), [data], **SETTINGS)[1]  # of the same, rounded weights
    assert exact.abs().max() < UNDERFLOW
    assert (found - exact).norm() < (0.02 if dtype == torch.float16 else 0.1) * exact.norm()
