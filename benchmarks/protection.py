"""What `protect` costs in a training step, beside the same step without it, for full fine-tuning, LoRA and deltas.

    python benchmarks/protection.py --output benchmarks/results/protection.json

On blocks of SmolLM2-135M's shape, 4,096 tokens a step, 202 directions (random ones, which cost the same) at the inputs
of all linear layers that train. The arms are those of benchmarks/training_step.py: `full mlp`, `lora` (rank 16 on the
MLPs) and `delta 30%`; each is built with and without protection in one process, and stepped by turns in random order.
`step` is the median over rounds of the ratio of CPU seconds, protected to unprotected, in the same round, with
quartiles. `held_mib` is what the directions and the kept products of the base weights take, `held` its share of
`peak_mib`, the highest resident memory of an unprotected step, and `peak` the ratio of the two peaks. The projection
happens once a step of the optimizer, so accumulation makes it cheaper.
"""

import argparse
import json
import os
import platform
import random
import statistics
from functools import partial
from pathlib import Path

import torch
from torch import nn
from training_step import ARMS, SEQUENCE, SHAPES, Arm, memory_of
from transformers import LlamaConfig, LlamaModel

from fnsft_trl.constraints.protection import protect_weights
from fnsft_trl.constraints.trained_maps import trained_maps
from fnsft_trl.neurons.sites import base_model, linear_shape


NAMES = ("full mlp", "lora", "delta 30%")


class ProtectedArm(Arm):
    """An arm of which each step of the optimizer is followed by the projection."""

    def __init__(self, build, model: nn.Module, inputs: torch.Tensor, directions: int, **settings) -> None:
        super().__init__(lambda copied: self._held(build(copied)), model, inputs, **settings)
        base = base_model(self.model)
        drawn: dict[int, torch.Tensor] = {}  # the same numbers for all layers, each of which has its own copy
        of_inputs: dict[tuple, torch.Tensor] = {}
        bases = {}
        for each in self.maps:
            width = linear_shape(base.get_submodule(each.module))[0]
            if width not in drawn:
                drawn[width] = torch.linalg.qr(torch.randn(width, directions, dtype=torch.float64)).Q
            key = (each.module.rpartition(".")[0], width)  # gate and up read one input
            if key not in of_inputs:
                of_inputs[key] = drawn[width].clone()
            bases[each.module] = of_inputs[key]
        self.protected = protect_weights(self.maps, bases)
        self.protected.attach(self.optimizer)

    def _held(self, model: nn.Module) -> nn.Module:
        """The model, in which nothing trains that has no directions."""
        base = base_model(model)
        linears = {name for name, module in base.named_modules() if linear_shape(module) is not None}
        self.maps, without = trained_maps(model, None, linears)
        for name in without:
            base.get_parameter(name).requires_grad_(False)
        return model


def measure(rounds: int, tokens: int, directions: int) -> dict[str, dict]:
    """Step every arm with and without protection, `rounds` times, after one step each that is not counted."""
    torch.manual_seed(0)
    config = LlamaConfig(**{"vocab_size": 8, **SHAPES["smollm2-135m"]})
    model = LlamaModel(config).requires_grad_(False)
    inputs = torch.randn(max(1, tokens // SEQUENCE), min(SEQUENCE, tokens), config.hidden_size)
    makers = {}
    for name in NAMES:
        makers[name, False] = partial(Arm, ARMS[name], model, inputs)
        makers[name, True] = partial(ProtectedArm, ARMS[name], model, inputs, directions)
    memory = {key: memory_of(make) for key, make in makers.items()}
    arms = {key: make() for key, make in makers.items()}
    for arm in arms.values():
        arm.step()
    seconds: dict[tuple, list[float]] = {key: [] for key in arms}
    draw = random.Random(0)
    for _ in range(rounds):
        for key in draw.sample(list(arms), len(arms)):
            seconds[key].append(arms[key].step()[1])
    found = {}
    for name in NAMES:
        ratios = [on / off for on, off in zip(seconds[name, True], seconds[name, False], strict=True)]
        held = arms[name, True].protected.memory / 2**20
        peaks = [memory[name, is_on]["peak_mib"] for is_on in (True, False)]
        found[name] = {
            "step": round(statistics.median(ratios), 3),
            "quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4)[::2]] if rounds > 1 else None,
            "cpu_seconds": round(statistics.median(seconds[name, False]), 3),
            "held_mib": round(held, 1),
            "held": round(held / peaks[1], 3),
            "peak_mib": peaks[1],
            "peak": round(peaks[0] / peaks[1], 3),
        }
        print(f"{name}: {found[name]}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--directions", type=int, default=202)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "load_average": round(os.getloadavg()[0], 1),
        },
        "tokens": args.tokens,
        "directions": args.directions,
        "rounds": args.rounds,
        "arms": measure(args.rounds, args.tokens, args.directions),
    }
    print(json.dumps(result, indent=2))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
