"""Two processes: frozen weights bit-identical in both, the result that of one process (invariant 7)."""

import json

import pytest
from helpers import TESTS
from processes import run_processes


pytestmark = pytest.mark.slow

WORKER = """
import json, sys
sys.path.insert(0, sys.argv[3])
import torch
import torch.distributed as dist
from helpers import tiny_model, VOCABULARY
from peft import get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from fnsft_trl import NeuronTunerConfig
from fnsft_trl.tuner import NeuronDeltaLayer

way, results = sys.argv[1:3]
dist.init_process_group("gloo")
rank = dist.get_rank()
ids = torch.randint(3, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(1))

def whole(parameters):
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in parameters}

def wrap():
    config = NeuronTunerConfig(neurons={"0": "0-4,9", "2": "3"}, task_type="CAUSAL_LM")
    return get_peft_model(tiny_model("llama"), config)

def fit(model, batch):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

single = wrap()
fit(single, ids)
single.base_model.release()
expected, original = whole(single.named_parameters()), whole(tiny_model("llama").named_parameters())

model = wrap()
layers = [m for m in model.modules() if isinstance(m, NeuronDeltaLayer)]
part = ids.chunk(2)[rank]
if way == "ddp":
    fit(DistributedDataParallel(model), part)
    model.base_model.release()
else:
    if way == "fsdp after a forward pass":
        model(input_ids=part)
    for block in model.get_base_model().model.layers:
        fully_shard(block)
    fully_shard(model)
    fit(model, part)
found = whole(model.named_parameters())
base = {n: v for n, v in found.items() if "neuron_delta" not in n}
clean = {n.removeprefix("base_model.model.").replace(".base_layer", ""): v for n, v in base.items()}
json.dump({
    "frozen": clean.keys() == original.keys() and all(torch.equal(clean[n], original[n]) for n in clean),
    "difference": max(float((found[n] - expected[n]).abs().max()) for n in found),
    "trained": max(float(v.abs().max()) for n, v in found.items() if "neuron_delta" in n),
    "held": [bool(layer.held.can_hold([], torch.zeros(1))) for layer in layers],
}, open(f"{results}.{rank}", "w"))
dist.barrier()  # a process that ends while another still talks to it can abort
dist.destroy_process_group()
"""


def run(way, tmp_path):
    run_processes(2, "-c", WORKER, way, tmp_path / "result", TESTS)
    return [json.loads((tmp_path / f"result.{rank}").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("way", ["ddp", "fsdp", "fsdp after a forward pass"])
def test_two_processes_freeze_and_learn_as_one(way, tmp_path):
    for result in run(way, tmp_path):
        assert result["frozen"]
        assert result["difference"] < 1e-6
        assert result["trained"] > 1e-2
        assert set(result["held"]) == {way == "ddp"}
