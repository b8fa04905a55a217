"""Cost of a retention series with KL beside the training that it watches, on the embedded model.

    python benchmarks/retention.py --output benchmarks/results/retention.json

One model with an adapter takes training steps, and one series is measured on it, by turns, so that a slow moment of
the machine meets both; in float32 on one thread, in CPU seconds. `share` is what one measurement of 8,192 tokens
costs, as a share of training on 200,000 tokens: medians over the rounds, each with the ratio of its own round.
`forward` are the costs of a scored and of a trained token as multiples of a plain forward pass in that round.

Ways to compare with the base:
  kept     what the base gives to the head is kept, and the head reads it beside that of the trained model
  again    the adapter is switched off for a second pass
  top-k    the 64 most probable tokens of the base are stored
"""

import argparse
import json
import statistics
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from fnsft_trl import NeuronTunerConfig
from fnsft_trl.data.embedded import embedded_model, wikipedia_passages
from fnsft_trl.evaluation.kl import AdapterOff, KeptStates, StoredBase
from fnsft_trl.evaluation.retention import RetentionText
from fnsft_trl.evaluation.series import RetentionSeries


TRAINED, SCORED = 200_000, 8_192  # tokens between two measurements, and of one


def adapter(method: str, layers: int, width: int):
    """LoRA on the MLPs, or deltas of every tenth neuron."""
    if method == "lora":
        return LoraConfig(r=16, target_modules=["gate_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM")
    neurons = ",".join(map(str, range(0, width, 10)))
    return NeuronTunerConfig(neurons={str(layer): neurons for layer in range(layers)}, task_type="CAUSAL_LM")


def seconds(work) -> float:
    """CPU seconds that a call takes."""
    start = time.process_time()
    work()
    return time.process_time() - start


def cost(method: str, *, tokens: int, rounds: int) -> dict:
    """Cost per token of training, of measuring in each way, and of a plain forward pass."""
    path = embedded_model()
    base = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    layers, width = base.config.num_hidden_layers, base.config.intermediate_size
    model = get_peft_model(base, adapter(method, layers, width)).train()
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = RetentionText.from_texts(wikipedia_passages("retention"), tokenizer, max_tokens=tokens)
    batch = torch.tensor([(ids * 256)[:256] for ids in text.sequences[:4]])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def train() -> None:
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def forward() -> None:
        with torch.no_grad():
            model(input_ids=batch, use_cache=False)

    series = {}
    for name, reference in (("kept", KeptStates()), ("again", AdapterOff()), ("top-k", StoredBase())):
        series[name] = RetentionSeries(text)
        series[name]._reference = reference
        series[name].base = series[name]._keep(model, None)
    rows = []
    for _ in range(rounds):
        row = {"train": seconds(train) / batch.numel(), "forward": seconds(forward) / batch.numel()}
        row |= {name: seconds(lambda each=each: each.measure(model)) / text.tokens for name, each in series.items()}
        rows.append(row)
    found = {"train": statistics.median(row["train"] / row["forward"] for row in rows)}
    for name, each in series.items():
        found[name] = {
            "forward": statistics.median(row[name] / row["forward"] for row in rows),
            "share": statistics.median(SCORED * row[name] / (TRAINED * row["train"]) for row in rows),
            "kl": each.values["kl"],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="scored in one measurement here")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output")
    args = parser.parse_args()
    torch.set_num_threads(1)
    methods = {method: cost(method, tokens=args.tokens, rounds=args.rounds) for method in ("lora", "neuron_delta")}
    results = json.dumps({"tokens": args.tokens, "rounds": args.rounds, "methods": methods}, indent=2)
    print(results)
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            file.write(results + "\n")


if __name__ == "__main__":
    main()
