"""Cost of a discovery against its peers, on SmolLM2: CPU seconds and peak memory, each arm in a process of its own.

    python benchmarks/discovery.py --tokens 4096 --components 20 --repeats 1 --output benchmarks/results/discovery.json

Arms, interleaved over the repeats:
  forward          the model's backbone alone, on the same tokens
  ours             one streaming pass at mlp_output or mlp_intermediate: sketch, FastICA of all and of both halves
  original         the original project's pipeline, written with scikit-learn: keep all activations, z-score,
                   PCA(1000), FastICA, back-projection
  pca              keep all activations, centre, PCA(k), FastICA
  incremental_pca  IncrementalPCA(k) over batches, a second pass for the scores, FastICA
  picard           keep all activations, centre, PCA(k), python-picard (when installed)

Times are CPU seconds of the work after the model is loaded; memory is the peak above that of the loaded model. Only
ratios within one run mean anything.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path


ARMS = (
    "forward",
    "ours mlp_output",
    "ours mlp_intermediate",
    "original",
    "pca",
    "incremental_pca",
    "picard",
)


def peak_memory():
    """Start to watch this process's resident memory; returns a function that gives the rise of its peak in MiB."""
    import psutil

    process = psutil.Process()
    start, done = process.memory_info().rss, threading.Event()
    peak = [start]

    def watch():
        while not done.wait(0.02):
            peak[0] = max(peak[0], process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()

    def stop():
        done.set()
        thread.join()
        return (max(peak[0], process.memory_info().rss) - start) / 2**20

    return stop


def machine() -> dict:
    """What the numbers were measured on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    processor = platform.processor() or platform.machine()
    return {"processor": processor, "cores": os.cpu_count(), "memory_gib": round(memory)}


def run_arm(arm: str, tokens: int, components: int) -> dict:
    """Run one arm in this process."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from fnsft_trl import FunctionalNetworkConfig, discover_networks, find_neuron_sites
    from fnsft_trl.data.embedded import embedded_model, wikipedia_passages
    from fnsft_trl.data.sequences import token_sequences
    from fnsft_trl.discovery.activations import ActivationReader

    logging.set_verbosity_error()
    path = embedded_model()
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = wikipedia_passages("discovery")
    name, _, site = arm.partition(" ")
    config = FunctionalNetworkConfig(
        ica_components=components, ica_max_tokens=tokens, ica_max_length=256, ica_site=site or "mlp_output"
    )

    def reader(sites):
        return ActivationReader(
            model, sites, batch_size=config.ica_batch_size, max_length=256, skip_tokens=1,
            special_ids=tokenizer.all_special_ids,
        ).read([token_sequences(texts, tokenizer, max_length=256)], max_tokens=tokens)  # fmt: skip

    def blocks():
        for block in reader(find_neuron_sites(model, kind="mlp_output")):
            yield block.rows.numpy()

    def collected():
        return np.concatenate([block.copy() for block in blocks()])

    reliability = None
    stop, start = peak_memory(), time.process_time()
    if name == "forward":
        # one narrow site keeps the count of tokens; its copy costs nothing
        for _ in reader(find_neuron_sites(model, kind="mlp_output", layers="0")):
            pass
    elif name == "ours":
        template = discover_networks(model, tokenizer, texts, config)
        reliability = statistics.mean(component.reliability for component in template.components)
    elif name == "original":
        from sklearn.decomposition import PCA, FastICA

        data = collected()
        data = (data - data.mean(0)) / (data.std(0) + 1e-6)
        pca = PCA(n_components=min(1000, len(data)), random_state=0)
        ica = FastICA(n_components=components, random_state=0, max_iter=200, whiten="unit-variance")
        ica.fit(pca.fit_transform(data))
        _ = ica.mixing_.T @ pca.components_
    elif name in ("pca", "picard"):
        from sklearn.decomposition import PCA, FastICA

        pca = PCA(n_components=components, random_state=0)
        scores = pca.fit_transform(collected())
        if name == "pca":
            mixing = FastICA(random_state=0, max_iter=400, whiten="unit-variance").fit(scores).mixing_.T
        else:
            from picard import Picard

            mixing = Picard(n_components=components, random_state=0, max_iter=400).fit(scores).mixing_.T
        _ = mixing @ pca.components_
    elif name == "incremental_pca":
        from sklearn.decomposition import FastICA, IncrementalPCA

        pca, kept = IncrementalPCA(n_components=components), []
        for block in blocks():
            kept.append(block.copy())
            if sum(map(len, kept)) >= 5 * components:
                pca.partial_fit(np.concatenate(kept))
                kept = []
        scores = np.concatenate([pca.transform(block) for block in blocks()])
        ica = FastICA(random_state=0, max_iter=400, whiten="unit-variance").fit(scores)
        _ = ica.mixing_.T @ pca.components_
    seconds = time.process_time() - start
    return {
        "cpu_seconds": seconds,
        "added_mib": stop(),
        "reliability": reliability,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--components", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--run-one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run_one:
        print(json.dumps(run_arm(args.run_one, args.tokens, args.components)))
        return

    runs: dict[str, list[dict]] = {arm: [] for arm in args.arms}
    for repeat in range(args.repeats):
        for arm in args.arms:
            command = [sys.executable, __file__, "--run-one", arm, "--tokens", str(args.tokens)]
            command += ["--components", str(args.components)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                print(f"{arm}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                continue
            runs[arm].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(f"{repeat + 1}/{args.repeats} {arm}: {runs[arm][-1]}", flush=True)

    forward = statistics.median(run["cpu_seconds"] for run in runs["forward"]) if runs.get("forward") else None
    summary = {}
    for arm, measured in runs.items():
        if measured:
            seconds = statistics.median(run["cpu_seconds"] for run in measured)
            summary[arm] = {
                "cpu_seconds": round(seconds, 2),
                "over_forward": round(seconds / forward, 3) if forward else None,
                "added_mib": round(statistics.median(run["added_mib"] for run in measured)),
                "runs": len(measured),
            }
    result = {"tokens": args.tokens, "components": args.components, "machine": machine(), "arms": summary}
    result["benchmark_cpu_seconds"] = round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime)
    print(json.dumps(result, indent=2))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
