"""Forward pass of a model without 30% of its neurons, beside the same model with the lesion baked: as a ratio.

    python benchmarks/smaller_model.py --output benchmarks/results/smaller_model.json

SmolLM2-135M, float32, one thread, 512 tokens. 30% of all neurons are silenced, at random, more of them in some layers
than in others (between 20% and 40%), so that the widest layer keeps 80% and the others are padded; and 30% of every
layer, which needs no padding. `forward` is the median, over rounds in which all arms run by turns, of the CPU seconds
of a pass divided by those of the baked model in the same round; `quartiles` show the spread. `difference` is the
largest difference of the logits from the model under hooks, as a share of the largest logit.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from fnsft_trl import NeuronMask, find_neuron_sites, lesion
from fnsft_trl.data.embedded import embedded_model
from fnsft_trl.export import to_baked, to_smaller


TOKENS = 512


def random_neurons(model: torch.nn.Module, shares: list[float]) -> NeuronMask:
    """A random share of the neurons of each layer."""
    draw, layers = torch.Generator().manual_seed(0), {}
    for site, share in zip(find_neuron_sites(model), shares, strict=True):
        layers[site.layer] = torch.zeros(site.width, dtype=torch.bool)
        layers[site.layer][torch.randperm(site.width, generator=draw)[: round(share * site.width)]] = True
    return NeuronMask(layers)


@torch.no_grad()
def seconds(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """CPU seconds of one forward pass."""
    start = time.process_time()
    model(ids, use_cache=False)
    return time.process_time() - start


@torch.no_grad()
def difference(model: torch.nn.Module, expected: torch.Tensor, ids: torch.Tensor) -> float:
    """The largest difference of the logits, as a share of the largest."""
    return float((model(ids).logits - expected).abs().max() / expected.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    base = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype="float32").eval()
    count = len(find_neuron_sites(base))
    ids = torch.randint(0, base.config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    kinds = {
        "30%, unequal layers": [0.2 + 0.2 * layer / (count - 1) for layer in range(count)],
        "30% of every layer": [0.3] * count,
    }
    results, arms = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (kind, shares) in enumerate(kinds.items()):
            mask = random_neurons(base, shares)
            with lesion(base, mask), torch.no_grad():
                expected = base(ids).logits
            removal = to_smaller(embedded_model(), f"{folder}/small{number}", mask)
            arms[kind] = AutoModelForCausalLM.from_pretrained(f"{folder}/small{number}").eval()
            results[kind] = {
                "parameters": removal.after,
                "of": removal.before,
                "width": removal.width,
                "difference": difference(arms[kind], expected, ids),
            }
        to_baked(embedded_model(), f"{folder}/baked", random_neurons(base, kinds["30%, unequal layers"]))
        arms["baked"] = AutoModelForCausalLM.from_pretrained(f"{folder}/baked").eval()
        taken = {name: [] for name in arms}
        for _ in range(args.rounds + 1):  # the first one warms up
            for name, model in arms.items():
                taken[name].append(seconds(model, ids))
    for kind in kinds:
        ratios = [small / baked for small, baked in zip(taken[kind][1:], taken["baked"][1:], strict=True)]
        results[kind] |= {"forward": statistics.median(ratios), "quartiles": statistics.quantiles(ratios, n=4)[::2]}
    about = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "rounds": args.rounds}
    about["load_average"] = round(os.getloadavg()[0], 1)
    text = json.dumps({"machine": about, "torch": torch.__version__, "results": results}, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
