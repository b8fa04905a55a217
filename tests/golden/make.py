"""Makes the golden files from seeds: what the package of its day wrote, and every later one must read.

Run by hand, from the top of the repository; each name is a folder that it fills:

    PYTHONPATH=tests python tests/golden/make.py base templates runs adapters exports expected

A folder that exists is refused, for golden files are never written again: files of a later day get a maker and a
folder of their own. What the tests need to go on with a run (`trainer`) and to compare (`template_content`,
`SELECTIONS`, `THRESHOLDS`) stands here once, and uses public names of the package only.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import torch
import transformers as tf
from datasets import Dataset
from helpers import VOCABULARY, logits, tiny_rows, tiny_tokenizer
from peft import LoraConfig, PeftModel
from safetensors.torch import load, save, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from fnsft_trl import (
    FNSFTTrainer,
    FunctionalNetworkConfig,
    FunctionalNetworkTemplate,
    ThresholdRule,
    bake_lesion,
    discover_networks,
    select_neurons,
    to_merged,
    to_plain_lora,
)


GOLDEN = Path(__file__).parent  # names of base models are relative to it, so no file holds a path of a machine

# run -> (LoRA, arguments of the FunctionalNetworkConfig)
RUNS = {
    "deltas": (None, {}),
    "lora": ({"r": 2, "lora_alpha": 4}, {}),
    "full": (None, {"train_method": "full"}),
    "full-lesion": (None, {"train_method": "full", "mask_mode": "lesion"}),
}
# adapter -> (base model, LoRA, arguments of the FunctionalNetworkConfig)
ADAPTERS = {
    "deltas-output": ("llama", None, {"ica_site": "mlp_output"}),
    "deltas-beside-lora": ("llama", {"r": 2, "target_modules": ["q_proj"]}, {"train_method": "neuron_delta"}),
    "deltas-phi3": ("phi3", None, {}),
    "deltas-gpt2": ("gpt2", None, {}),
    "deltas-mixtral": ("mixtral", None, {}),
    "lora-mixtral": ("mixtral", {"r": 2, "lora_alpha": 4}, {}),
}
SELECTIONS = {
    "all networks": {},
    "two networks": {"component_ids": [1, 2]},
    "reliable": {"component_ids": [0, 2]},  # of a bare reliability of 0.7 or more; what counts is that above null
    "highest": {"fraction": 0.25},
    "lowest": {"fraction": 0.25, "rank": "lowest"},
    "pooled": {"fraction": 0.25, "per_layer": False},
    "random": {"fraction": 0.25, "selector": "random", "seed": 5},
    "activation": {"fraction": 0.25, "selector": "activation"},
}
THRESHOLDS = {"percentile": 90.0, "layer_percentile": 60.0, "zscore": 1.5, "zscore_positive": 1.0}
# What lies beside saved weights and is read by people, is empty, or lies in base/llama too.
BESIDE = ("README.md", "networks.svg", "generation_config.json", "tokenizer*.json", "chat_template.jinja")


def rows() -> list[dict]:
    """The training data."""
    return [json.loads(line) for line in (GOLDEN / "base" / "rows.jsonl").read_text().splitlines()]


def trainer(output_dir, base="llama", *, lora=None, template=None, **config) -> FNSFTTrainer:
    """The trainer of a run of 4 steps, saved after the second. The working directory must be that of the golden files.

    Args:
        output_dir: where it saves.
        base: which base model.
        lora: arguments of a LoraConfig.
        template: the networks, or where they are.
        config: of the FunctionalNetworkConfig.
    """
    args = SFTConfig(
        output_dir=str(output_dir),
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=4,
        gradient_checkpointing=False,
        optim="adamw_torch",
        adam_epsilon=1e-4,  # Adam would make steps of the noise in the smallest gradients, which is each machine's own
        learning_rate=1e-2,
        lr_scheduler_type="linear",
        warmup_steps=0,
        weight_decay=0.1,
        max_steps=4,
        logging_steps=1,
        save_strategy="steps",
        save_steps=2,
        max_length=32,
        seed=3,
    )
    return FNSFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(f"base/{base}"),
        args=args,
        train_dataset=Dataset.from_list(rows()),
        processing_class=AutoTokenizer.from_pretrained("base/llama"),
        peft_config=LoraConfig(**lora) if lora else None,
        network_config=FunctionalNetworkConfig(ica_component_ids=[0, 2], **config),
        network_template=template,
    )


def template_content(template: FunctionalNetworkTemplate) -> dict:
    """All that a template says, as JSON values; tensors as the SHA-256 of their bytes."""
    known = ("explained_variance", "kurtosis", "reliability", "jaccard", "neurons", "layers", "recurrence")
    plain = ("base_model", "revision", "architecture", "site", "license", "settings", "calibration", "null", "weights")
    content = {name: getattr(template, name) for name in plain}
    content["threshold"] = asdict(template.threshold) if template.threshold else None
    content["components"] = [{name: getattr(component, name) for name in known} for component in template.components]
    content["networks"] = template.listed()
    for name in ("loadings", "mean", "rms"):
        tensors = getattr(template, name)
        content[name] = {i: sha256(values.contiguous().numpy().tobytes()).hexdigest() for i, values in tensors.items()}
    return json.loads(json.dumps(content))


def mask_content(mask) -> dict:
    """A set of neurons as JSON values."""
    return {"site": mask.site, "count": mask.count, "sha256": mask.sha256, "neurons": mask.to_ranges()}


def make_base(directory: Path) -> None:
    """Untrained models of 2 layers, and the data of all runs."""
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    small = {**tokens, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    small |= {"intermediate_size": 12, "max_position_embeddings": 64}
    gpt2 = {**tokens, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_inner": 12, "n_positions": 64}
    gpt2 |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    configs = {
        "llama": tf.LlamaConfig(mlp_bias=True, **small),
        "phi3": tf.Phi3Config(**small),
        "gpt2": tf.GPT2Config(**gpt2),
        "mixtral": tf.MixtralConfig(num_local_experts=3, num_experts_per_tok=2, **small),
    }
    for name, config in configs.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter.dim() > 1 or parameter_name.endswith("bias"):
                    parameter.normal_(0, 0.3)
        model.save_pretrained(directory / name)
    _without(directory, BESIDE)
    tiny_tokenizer().save_pretrained(directory / "llama")
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(16)))


def discover(base: str, *, sources=("a/rows.jsonl", "b/rows.jsonl"), **changes) -> FunctionalNetworkTemplate:
    """Three networks of a base model, found on two halves of the data."""
    settings = {"ica_components": 3, "ica_rank": 6, "ica_max_tokens": 160, "ica_max_length": 32, "ica_percentile": 75}
    texts = [row["prompt"] + row["completion"] for row in rows()]
    datasets = {source: texts[number :: len(sources)] * 2 for number, source in enumerate(sources)}
    model = AutoModelForCausalLM.from_pretrained(f"base/{base}").eval()
    tokenizer = AutoTokenizer.from_pretrained("base/llama")
    return discover_networks(model, tokenizer, datasets, FunctionalNetworkConfig(**{**settings, **changes}))


def make_templates(directory: Path) -> None:
    """Of every format version, and the original's lists."""
    template = discover("llama", ica_until_reliable=0.99)
    template.license = "mit"
    template.save_pretrained(directory / "3")
    zscore = {"ica_percentile": None, "ica_threshold": "zscore", "ica_zscore": 1.0}
    discover("llama", ica_site="mlp_output", sources=["rows"], **zscore).save_pretrained(directory / "3-output")
    _write_older(directory / "3", directory / "2", version=2, without=())
    unknown = ("license", "statistics", "weights", "tensors_sha256")
    _write_older(directory / "3", directory / "1", version=1, without=unknown)
    networks = {"0": {"0": [1, 5, 7]}, "1": {"0": [0], "1": [6, 2]}}
    lists = {
        "name": "global_templates_v1",
        "layout": {"captured_layers_sorted": [0, 1], "hidden_size": 8},
        "templates": networks,
    }
    (directory / "original.json").write_text(json.dumps(lists) + "\n")
    neurons = {"site": "mlp_intermediate", "layout": {"captured_layers_sorted": [0, 1], "hidden_size": 12}}
    (directory / "original-neurons.json").write_text(json.dumps({**lists, **neurons}) + "\n")
    FunctionalNetworkTemplate.from_pretrained(directory / "original.json").save_pretrained(directory / "3-lists")


def _write_older(current: Path, directory: Path, *, version: int, without: tuple[str, ...]) -> None:
    """A template as an older version had it: datasets named by the paths they were read from, and less said."""
    config = json.loads((current / "config.json").read_text())
    tensors = load((current / "template.safetensors").read_bytes())
    data = save(tensors, metadata={config["format"]: str(version)})
    config |= {"format_version": version, "tensors_sha256": sha256(data).hexdigest()}
    calibration, components = config["calibration"], config["components"]
    calibration["sources"] = [f"/home/someone/{source}" for source in calibration["sources"]]
    for component in components:
        component["recurrence"] = {f"/home/someone/{name}": v for name, v in component["recurrence"].items()}
    directory.mkdir()
    for name in without:
        del config[name]
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "template.safetensors").write_bytes(data)


def make_runs(directory: Path) -> None:
    """What a run leaves, with the checkpoint of its second step."""
    for name, (lora, config) in RUNS.items():
        run = trainer(directory / name, lora=lora, template="templates/3", **config)
        run.train()
        run.save_model(str(directory / name))
        shutil.rmtree(directory / name / "checkpoint-4")
    # The last is a pickle of TRL's class, with the path of the output; no resume reads it.
    _without(directory, [*BESIDE, "training_args.bin"])


def make_adapters(directory: Path) -> None:
    """Adapters by themselves, trained."""
    for name, (base, lora, config) in ADAPTERS.items():
        site = config.get("ica_site", "mlp_intermediate")
        with tempfile.TemporaryDirectory() as scratch:
            run = trainer(scratch, base, lora=lora, template=discover(base, sources=["rows"], ica_site=site), **config)
            run.train()
        run.model.save_pretrained(str(directory / name))
        _without(directory / name, BESIDE)
        (directory / name / "neurons.json").write_text(json.dumps(mask_content(run.trainable_neurons)) + "\n")


def make_exports(directory: Path) -> None:
    """Merged models, plain LoRA, a lesion in the weights."""
    for name in ("deltas", "lora"):
        to_merged(f"runs/{name}", directory / f"{name}-merged")
    to_plain_lora("runs/deltas", directory / "deltas-plain-lora")
    to_plain_lora("adapters/deltas-mixtral", directory / "deltas-mixtral-plain-lora")
    model = AutoModelForCausalLM.from_pretrained("base/llama")
    bake_lesion(model, select_neurons(FunctionalNetworkTemplate.from_pretrained("templates/3"), [1]))
    model.save_pretrained(directory / "lesion")
    _without(directory, BESIDE)


def _without(directory: Path, names: Iterable[str]) -> None:
    for name in names:
        for file in directory.rglob(name):
            file.unlink()


def golden_model(folder: str):
    """The model or the adapter in a folder, ready for inference."""
    config = Path(folder) / "adapter_config.json"
    if not config.is_file():
        return AutoModelForCausalLM.from_pretrained(folder).eval()
    base = AutoModelForCausalLM.from_pretrained(json.loads(config.read_text())["base_model_name_or_path"])
    return PeftModel.from_pretrained(base, folder).eval()


def golden_models() -> list[str]:
    """The folders that hold a model or an adapter."""
    names = [f"{kind}/**/{name}.safetensors" for kind in MAKERS for name in ("model", "adapter_model")]
    return sorted(path.parent.relative_to(GOLDEN).as_posix() for name in names for path in GOLDEN.glob(name))


def make_expected(directory: Path) -> None:
    """What all of these compute and say."""
    directory.mkdir()
    ids = torch.randint(3, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(1))
    found = {folder: logits(golden_model(folder), ids)[:, -1].contiguous() for folder in golden_models()}
    save_file({"ids": ids, **found}, directory / "logits.safetensors")
    templates = {
        path.name: FunctionalNetworkTemplate.from_pretrained(path) for path in sorted(Path("templates").iterdir())
    }
    current = templates["3"]
    selected = {name: select_neurons(current, **arguments) for name, arguments in SELECTIONS.items()}
    for rule, value in THRESHOLDS.items():
        selected[rule] = select_neurons(current.with_threshold(ThresholdRule(rule, value)))
    values = {
        "templates": {name: template_content(template) for name, template in templates.items()},
        "selections": {name: mask_content(mask) for name, mask in selected.items()},
    }
    (directory / "values.json").write_text(json.dumps(values, indent=1) + "\n")


MAKERS = {
    "base": make_base,
    "templates": make_templates,
    "runs": make_runs,
    "adapters": make_adapters,
    "exports": make_exports,
    "expected": make_expected,
}


def main(names: list[str]) -> None:
    os.chdir(GOLDEN)
    for name in names:
        if (GOLDEN / name).exists():
            sys.exit(f"{GOLDEN / name} exists; golden files are never written again")
        with tempfile.TemporaryDirectory() as scratch:
            made = Path(scratch) / name
            MAKERS[name](made)
            for file in filter(Path.is_file, made.rglob("*")):
                if any(path.encode() in file.read_bytes() for path in (scratch, str(GOLDEN))):
                    sys.exit(f"{file} holds a path of this machine")
            shutil.copytree(made, GOLDEN / name)


if __name__ == "__main__":
    main(sys.argv[1:])
