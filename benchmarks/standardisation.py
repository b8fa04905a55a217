"""Centred, by layers, z-scored: how networks of SmolLM2 replicate, where they lie, and what their lesions do.

    python benchmarks/standardisation.py --tokens 12000 --components 10

One discovery on Wikipedia text for each standardisation and decomposition that is named. Lesions: the neurons of all
networks that rank highest, 2% of all (over all layers together), silenced; beside as many random ones in each layer,
on Wikipedia text of other articles. Several runs into one file add their rows.
"""

import argparse
import json
import time
from pathlib import Path


ROWS = (
    "center ica",
    "layer ica",
    "zscore ica",
    "center pca",
    "layer pca",
    "zscore pca",
    "layer kmeans",
    "zscore kmeans",
)


def spread(mask) -> dict:
    """In which layers the neurons of a mask lie: their share, and how many layers hold half of them."""
    counts = {layer: int(members.sum()) for layer, members in mask.layers.items()}
    ordered, total, half = sorted(counts.values(), reverse=True), sum(counts.values()), 0
    while sum(ordered[: half + 1]) < total / 2:
        half += 1
    last = max(counts)
    return {
        "share_of_last_layer": counts[last] / len(mask.layers[last]),
        "layers_with_half": half + 1,
        "layers_under_a_fifth_of_their_part": sum(counts[layer] < 0.2 * total / len(counts) for layer in counts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=12_000)
    parser.add_argument("--components", type=int, default=10)
    parser.add_argument("--scored", type=int, default=1_500, help="tokens of held-out text")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS[:3])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/standardisation.json"))
    options = parser.parse_args()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fnsft_trl import FunctionalNetworkConfig, discover_networks, lesion, select_neurons
    from fnsft_trl.data.embedded import embedded_model, wikipedia_passages
    from fnsft_trl.evaluation.retention import RetentionText

    model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    held_out = RetentionText.from_texts(wikipedia_passages("retention"), tokenizer, max_tokens=options.scored)
    results = json.loads(options.output.read_text()) if options.output.exists() else {"rows": {}}
    base = held_out.cross_entropy(model)
    results |= {"tokens": options.tokens, "components": options.components, "scored": held_out.tokens, "base": base}
    for name in options.rows:
        standardize, decomposition = name.split()
        config = FunctionalNetworkConfig(
            ica_components=options.components,
            ica_max_tokens=options.tokens,
            ica_max_length=256,
            ica_standardize=standardize,
            ica_decomposition=decomposition,
        )
        start = time.process_time()
        template = discover_networks(model, tokenizer, wikipedia_passages("discovery"), config)
        seconds = time.process_time() - start
        networks = select_neurons(template, fraction=0.02, per_layer=False)
        random = select_neurons(template, selector="random", like=networks)
        losses = {}
        for kind, mask in (("networks", networks), ("random", random)):
            with lesion(model, mask):
                losses[kind] = held_out.cross_entropy(model) - base
        found = template.components
        results["rows"][name] = {
            "reliability": sum(c.reliability for c in found) / len(found),
            "above_0.7": sum(c.reliability > 0.7 for c in found),
            "jaccard": sum(c.jaccard for c in found) / len(found),
            "null": template.null,
            **spread(networks),
            "lesion": losses,
            "cpu_seconds": seconds,
        }
        print(name, json.dumps(results["rows"][name]), flush=True)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
