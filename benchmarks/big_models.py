"""What a discovery and a training step cost on models of 1, 8 and 70 billion parameters, from parts measured here.

    python benchmarks/big_models.py --output benchmarks/results/big_models.json

Measured, on one block of Llama's shape at each size, float32, one thread, medians of the rounds:
  forward       CPU seconds of the block's forward pass on `tokens` tokens
  sketch        CPU seconds in which the sketch (rank 128) takes in the activations of that block; `sketch_share` is
                their share of the forward pass
  lora, delta   CPU seconds of a training step of the block (LoRA r 16 on the MLP; deltas of 10% of the neurons), and
                what autograd keeps for the backward pass
Computed from these, and said to be: core minutes of a discovery of 50,000 tokens and of a training step of 1,024, as
the number of blocks times the block, without embeddings and head, and without the ICA at the end; and GiB with weights
in bfloat16: `discovery` is weights + block of activations + sketches of two halves, `lora` and `delta` are weights +
what trains, its gradients and Adam's state in float32 + what autograd keeps. benchmarks/whole_models.py measures whole
models on an accelerator; benchmarks/big_models_page.py makes the tables of the docs of both.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from training_step import ARMS, Arm
from transformers import LlamaConfig, LlamaModel

from fnsft_trl import find_neuron_sites
from fnsft_trl.discovery.sketch import ActivationSketch


RANK, DISCOVERY_TOKENS, STEP_TOKENS, BATCH, LENGTH = 128, 50_000, 1024, 4, 512
TRAINED = {"lora": "lora", "delta": "delta 10%"}
GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """A Llama of one size.

    Attributes:
        layers, hidden, intermediate, heads (`int`): 8 key-value heads in each.
        parameters (`float`): of the whole model.
        tokens (`int`): of a pass that is measured.
        vocabulary (`int`), ties_head (`bool`): of the whole model.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    parameters: float
    tokens: int
    vocabulary: int = 128_256
    ties_head: bool = False


SHAPES = {
    "1B": Shape(16, 2048, 8192, 32, 1.24e9, 512, ties_head=True),
    "8B": Shape(32, 4096, 14336, 32, 8.03e9, 512),
    "70B": Shape(80, 8192, 28672, 64, 70.6e9, 256),
}


def block_of(shape: Shape) -> LlamaModel:
    """One block, random, without embeddings to speak of."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8, hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=1,
        num_attention_heads=shape.heads, num_key_value_heads=8,
    )  # fmt: skip
    return LlamaModel(config).requires_grad_(False).eval()


@torch.no_grad()
def discovery(model: LlamaModel, shape: Shape, rounds: int) -> dict[str, float]:
    """Seconds of the forward pass and of the sketch, by turns."""
    (site,) = find_neuron_sites(model)
    inputs = torch.randn(1, shape.tokens, shape.hidden)
    rows = torch.empty(shape.tokens, site.width)

    def keep(values: torch.Tensor, neurons: slice, tokens: None) -> None:
        rows.copy_(values[0])

    handles = site.tap(keep)
    sketch = ActivationSketch(site.width, RANK, reservoir=16_384, seed=0)
    seconds: dict[str, list[float]] = {"forward": [], "sketch": []}
    for _ in range(rounds + 1):
        start = time.process_time()
        model(inputs_embeds=inputs, use_cache=False)
        middle = time.process_time()
        sketch.update(rows)
        seconds["forward"].append(middle - start)
        seconds["sketch"].append(time.process_time() - middle)
    for handle in handles:
        handle.remove()
    found = {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first one warms up
    return found | {"sketch_share": found["sketch"] / found["forward"]}


def training(model: LlamaModel, shape: Shape, rounds: int) -> dict[str, dict]:
    """Seconds and memory of a training step, one way after the other."""
    inputs, found = torch.randn(1, shape.tokens, shape.hidden), {}
    for name, arm_name in TRAINED.items():
        arm = Arm(ARMS[arm_name], model, inputs)
        arm.step()
        taken = [arm.step()[1] for _ in range(rounds)]
        found[name] = {"step": statistics.median(taken), **arm.memory()}
        del arm
        gc.collect()
    return found


def computed(shape: Shape, parts: dict) -> dict[str, float]:
    """What the parts come to for the whole model."""
    neurons, scale = shape.layers * shape.intermediate, shape.layers / shape.tokens / 60
    rows = BATCH * LENGTH
    while rows > LENGTH and rows * neurons * 4 > 4 * GIB:  # as the reader bounds it
        rows -= LENGTH
    weights, block, sketches = 2 * shape.parameters, rows * neurons * 4, 2 * (2 * RANK + 1) * neurons * 4
    found = {
        "discovery_core_minutes": scale * DISCOVERY_TOKENS * (parts["forward"] + parts["sketch"]),
        "weights_gib": weights / GIB,
        "block_gib": block / GIB,
        "sketches_gib": sketches / GIB,
        "discovery_gib": (weights + block + sketches) / GIB,
    }
    for name in TRAINED:
        part = parts[name]
        held = shape.layers * (4 * part["trained_mib"] + part["saved_mib"] * STEP_TOKENS / shape.tokens) * 2**20
        found[f"{name}_core_minutes"] = scale * STEP_TOKENS * part["step"]
        found[f"{name}_gib"] = (weights + held) / GIB
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name in args.shapes:
        shape = SHAPES[name]
        model = block_of(shape)
        parts = discovery(model, shape, args.rounds) | training(model, shape, args.rounds)
        results[name] = {"measured": parts, "computed": computed(shape, parts)}
        print(f"{name}: {json.dumps(results[name])}", flush=True)
    about = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "load_average": round(os.getloadavg()[0], 1),
        "rounds": args.rounds,
    }
    text = json.dumps({"machine": about, "shapes": results}, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
