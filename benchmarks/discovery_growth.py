"""How the cost of a decomposition grows with tokens, components and neurons, on synthetic activations.

    python benchmarks/discovery_growth.py --output benchmarks/results/discovery_growth.json

The stream is made beforehand and read from a ring of blocks, so that only the sketch, FastICA and the replication are
measured. Each arm runs in a process of its own. CPU seconds; memory is the peak above that of the blocks. The largest
arm has the neurons of Llama-3-8B (32 layers of 14,336).
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from discovery import machine, peak_memory


SMOLLM2, LLAMA_8B = 30 * 1536, 32 * 14336
ARMS = [
    *((tokens, 20, SMOLLM2) for tokens in (4_096, 16_384, 65_536)),
    *((16_384, components, SMOLLM2) for components in (10, 64, 128)),
    *((4_096, 20, neurons) for neurons in (SMOLLM2 * 2, SMOLLM2 * 4, LLAMA_8B)),
]


def run_arm(tokens: int, components: int, neurons: int) -> dict:
    """Sketch a stream of so many tokens and decompose it, in this process."""
    import torch

    from fnsft_trl.discovery.decomposition import IcaSettings, decompose
    from fnsft_trl.discovery.sketch import ActivationSketch

    random = torch.Generator().manual_seed(0)
    planted = torch.randn(2 * components, neurons, generator=random)
    rank = max(128, 2 * components)
    block = 1024 if neurons <= SMOLLM2 else 128
    sources = torch.distributions.Laplace(0.0, 1.0)
    torch.manual_seed(0)
    ring = [
        sources.sample((block, 2 * components)) @ planted + 3 * torch.randn(block, neurons, generator=random)
        for _ in range(4)
    ]
    stop, start = peak_memory(), time.process_time()
    halves = [ActivationSketch(neurons, rank, reservoir=16_384, seed=half) for half in (0, 1)]
    for number in range(tokens // block):
        halves[number % 2].update(ring[number % 4])
    for sketch in halves:
        sketch.finish()
    sketched = time.process_time() - start
    decompose([[half] for half in halves], IcaSettings(components))
    return {
        "tokens": tokens,
        "components": components,
        "neurons": neurons,
        "rank": rank,
        "sketch_cpu_seconds": round(sketched, 2),
        "decomposition_cpu_seconds": round(time.process_time() - start - sketched, 2),
        "added_mib": round(stop()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--run-one", nargs=3, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run_one:
        print(json.dumps(run_arm(*args.run_one)))
        return
    results = []
    for arm in ARMS:
        command = [sys.executable, __file__, "--run-one", *map(str, arm)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        results.append(json.loads(done.stdout.strip().splitlines()[-1]))
        print(results[-1], flush=True)
    if args.output:
        args.output.write_text(json.dumps({"machine": machine(), "arms": results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
