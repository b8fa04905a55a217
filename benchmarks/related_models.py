"""Which networks survive training, and whether the fingerprint tells a model's child from a stranger.

The embedded model's networks are found four times: in the base, in the base on other text, in a child fine-tuned by
LoRA on another task, and in a model of the same shape with random weights. Prints what the comparisons give as JSON.

    python benchmarks/related_models.py --tokens 12000 --steps 40
"""

import argparse
import json
import tempfile

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from fnsft_trl import FunctionalNetworkConfig, discover_networks
from fnsft_trl.comparison.fingerprint import network_time_courses, split_passages
from fnsft_trl.comparison.similarity import compare_templates, compare_time_courses
from fnsft_trl.data.embedded import embedded_model, question_routing, wikipedia_passages
from fnsft_trl.template.weights import weight_difference


def fine_tuned(path: str, tokenizer, steps: int, learning_rate: float):
    """The embedded model after LoRA (rank 16, all linear layers) on the routing task, merged."""
    rows, _ = question_routing(8 * steps, 8)
    with tempfile.TemporaryDirectory() as directory:
        args = SFTConfig(
            output_dir=directory,
            use_cpu=True,
            bf16=False,
            report_to="none",
            per_device_train_batch_size=8,
            max_steps=steps,
            learning_rate=learning_rate,
            max_length=64,
            save_strategy="no",
            gradient_checkpointing=False,
            seed=0,
        )
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(path, dtype="float32"),
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        trainer.train()
        return trainer.model.merge_and_unload().eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=12_000)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--components", type=int, default=10)
    parser.add_argument("--passages", type=int, default=150)
    args = parser.parse_args()
    path = str(embedded_model())
    tokenizer = AutoTokenizer.from_pretrained(path)
    config = FunctionalNetworkConfig(
        ica_components=args.components, ica_max_tokens=args.tokens, ica_max_length=256, ica_standardize="zscore"
    )
    passages = split_passages(wikipedia_passages("retention")[-400:], count=args.passages)
    set_seed(0)
    models = {
        "base": AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval(),
        "child": fine_tuned(path, tokenizer, args.steps, args.learning_rate),
        "stranger": AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).float().eval(),
    }
    texts = wikipedia_passages("discovery")
    templates = {name: discover_networks(model, tokenizer, texts, config) for name, model in models.items()}
    courses = {name: network_time_courses(models[name], tokenizer, t, passages) for name, t in templates.items()}
    other = discover_networks(models["base"], tokenizer, wikipedia_passages("retention")[:-400], config)
    base, child = templates["base"], templates["child"]
    results = {"weights": weight_difference(base.weights, child.weights)}
    results["reliability"] = {n: [c.reliability for c in t.components] for n, t in templates.items()}
    against = {"base": base, "child": child, "base on other text": other, "stranger": templates["stranger"]}
    for name, template in against.items():
        results[f"networks: base, {name}"] = compare_templates(base, template).to_dict()
    for name, values in courses.items():
        results[f"time courses: base, {name}"] = compare_time_courses(courses["base"], values).to_dict()
    for value in results.values():
        if isinstance(value, dict):
            for key in ("iou", "correlation"):
                value.pop(key, None)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
