"""One process of a distributed run, for tests/training/test_distributed.py.

    python distributed_run.py PROCESSES KIND FOLDER

Trains a small model by each method, in float64 (so that the order of additions does not show), and writes what this
process holds at the end to FOLDER/METHOD-RANK.safetensors.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from datasets import Dataset
from helpers import medium_experts, medium_model, random_mask, sft_config, tiny_rows, tiny_tokenizer
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fnsft_trl import (
    AnchorConfig,
    FNSFTError,
    FNSFTTrainer,
    FunctionalNetworkConfig,
    NeuronTunerConfig,
    ProtectionConfig,
    ReplayConfig,
    RetentionCallback,
    constrain_full,
    constrain_lora,
)
from fnsft_trl.constraints import FrozenSlices, set_lora_targets


METHODS = ("neuron_delta", "lora", "full")
EXPERTS = " experts"  # at the end of a method's name: on a mixture of experts


def medium(method: str) -> torch.nn.Module:
    """The model that a method trains."""
    return (medium_experts if method.endswith(EXPERTS) else medium_model)(torch.float64)


def whole(model) -> dict[str, torch.Tensor]:
    """The weights as this process sees them, gathered where they are sharded."""
    weights = {}
    for name, value in model.state_dict().items():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        weights[name.removeprefix("module.")] = value.detach().clone().contiguous()
    return weights


def shard_on_cpu() -> None:
    """Let accelerate shard on a CPU, which it keeps for accelerators: it would take DDP instead."""
    own = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs) -> None:
        own(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
        if "fsdp_plugin" in vars(self):  # a later call copies the type of PartialState
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = init


def merged(method: str, weights: dict[str, torch.Tensor], config: PeftConfig | None) -> dict[str, torch.Tensor]:
    """Gathered weights, an adapter's merged by this process alone, as after a training on many devices."""
    if config is None:
        return weights
    model = get_peft_model(medium(method), config)
    model.load_state_dict(weights)
    return whole(model.merge_and_unload())


def kept_near(path: Path, batch_size: int) -> dict[str, object]:
    """Rows to replay, and general text on which to stay near the base, all of one length."""
    path.write_text("".join(json.dumps({"text": f"{number} is {number}"}) + "\n" for number in range(1000, 1012)))
    anchor = AnchorConfig(kl_to_base=0.5, kl_datasets=[f"text={path}"], kl_batch_size=batch_size)
    return {"replay": ReplayConfig(replay_datasets=[f"text={path}"], replay_share=0.25), "anchor": anchor}


def run_trainer(
    method: str, folder: Path, rank: int, processes: int, *, can_shard: bool = False
) -> dict[str, torch.Tensor]:
    """FNSFTTrainer under DDP, with protection, replay and KL to the base, or where it can shard under FSDP2, without;
    deltas train under a forward mask. With several processes, a batch is split over them."""

    is_sharded = can_shard and processes > 1
    is_bare = can_shard or method.endswith(EXPERTS)
    args = sft_config(
        folder / f"{method}-out-{rank}",
        per_device_train_batch_size=4 // processes,
        gradient_accumulation_steps=2,
        max_grad_norm=0.1,
        learning_rate=1e-3,
        save_strategy="steps",
        save_steps=2,
        # Routers compute in float32; where a gradient is next to nothing, AdamW would make whole steps of rounding.
        adam_epsilon=1e-3 if method.endswith(EXPERTS) else 1e-8,
        **({"fsdp": True, "fsdp_config": {"version": 2}} if is_sharded else {}),
    )
    assert args.world_size == processes
    trainer = FNSFTTrainer(
        model=medium(method),
        args=args,
        train_dataset=Dataset.from_list(tiny_rows()),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=4) if method.startswith("lora") else None,
        network_config=FunctionalNetworkConfig(
            train_method=method.removesuffix(EXPERTS),
            ica_components=2,
            ica_rank=8,
            ica_max_tokens=200,
            ica_max_length=32,
            ica_select="random",  # the same neurons however the discovery is shared among processes
            ica_fraction=0.5,
            **({"mask_mode": "lesion", "train_neurons": "unselected"} if method == "neuron_delta" else {}),
        ),
        protection=None if is_bare else ProtectionConfig(protect="random", protect_dims=8),
        **({} if is_bare else kept_near(folder / f"kept-{rank}.jsonl", 4 // processes)),
    )
    trainer.network_template.save_pretrained(folder / f"{method}-template-{rank}")
    trainer.add_callback(RetentionCallback(trainer, ["9876543210 is it"] * 5, max_tokens=50, batch_size=2))
    trainer.train()
    trainer.save_model()
    if is_sharded:
        assert any(isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in trainer.model.parameters())
        config = None if method == "full" else trainer.model.peft_config["default"]
        weights = merged(method, whole(trainer.model), config)
    else:
        assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel) == (processes > 1)
        weights = whole(trainer.model if method == "full" else trainer.model.merge_and_unload())
    for layer, members in trainer.trainable_neurons.layers.items():
        weights[f"trainable.{layer}"] = members
    measured = [entry for entry in trainer.state.log_history if "retention/kl" in entry]
    names = ("retention/cross_entropy", "retention/rise", "retention/kl")
    values = [[entry[name] for name in names] for entry in measured]
    weights["retention"] = torch.tensor(values, dtype=torch.float64)  # (measurements, names)
    return weights


def run_sharded(method: str, folder: Path, rank: int, form: str | None) -> None:
    """A run, and one that goes on from its checkpoint, under FSDP2 (with checkpoints of a form) or DDP: the same."""
    sharding = {} if form is None else {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": form}}

    def make(asked: str | None) -> FNSFTTrainer:
        return FNSFTTrainer(
            model=medium(method),
            args=sft_config(
                folder / method, per_device_train_batch_size=2, save_strategy="steps", save_steps=2,
                resume_from_checkpoint=asked, **sharding,
            ),
            train_dataset=Dataset.from_list(tiny_rows()),
            processing_class=tiny_tokenizer(),
            peft_config=LoraConfig(r=4) if method == "lora" else None,
            network_config=FunctionalNetworkConfig(
                train_method=method, ica_select="random", ica_fraction=0.5, ica_components=2, ica_rank=8,
                ica_max_tokens=200, ica_max_length=32,
            ),
        )  # fmt: skip

    first = make(None)
    first.train()
    first.save_model(str(folder / f"{method}-end"))
    expected = whole(first.model)
    if rank == 0:
        (folder / method / "checkpoint-4" / "trainer_state.json").unlink()
    dist.barrier()
    second = make("true")
    second.train()
    assert second.network_template.calibration == first.network_template.calibration
    found = whole(second.model)
    assert {name for name, value in expected.items() if not torch.equal(value, found[name])} == set()
    dist.barrier()
    if rank == 0:
        saved = load_file(next((folder / f"{method}-end").glob("*model.safetensors")))
        live = {name.replace(".default.values", "").replace(".default", ""): value for name, value in expected.items()}
        assert all(torch.equal(value, live[name]) for name, value in saved.items())
        assert saved.keys() == {name for name in live if method == "full" or "lora_" in name or "delta_" in name}
    other = make("true")
    other.args.learning_rate = 1e-3
    with pytest.raises(FNSFTError, match=r"learning_rate was 0\.01 and is now 0\.001"):
        other.train()


def run_fsdp2(method: str, processes: int) -> dict[str, torch.Tensor]:
    """A plain loop over a model sharded by `fully_shard`."""
    base = medium(method)
    mask = random_mask(base, "mlp_intermediate")
    torch.manual_seed(1)
    if method.startswith("neuron_delta"):
        model = get_peft_model(base, NeuronTunerConfig(neurons=mask.to_ranges()))
    elif method == "lora":
        config = LoraConfig(r=4)
        set_lora_targets(config, base, mask)
        model = get_peft_model(base, config)
        constrain_lora(model, mask)
    else:
        model = base
    if processes > 1:
        inner = base.model
        for block in inner.layers:
            fully_shard(block)
        fully_shard(model)
        assert any(isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in model.parameters())
    held = constrain_full(model, mask, train_other=False) if method == "full" else FrozenSlices()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.1)
    held.attach(optimizer)
    rank = dist.get_rank() if processes > 1 else 0
    rows = torch.randint(3, 120, (5, 4, 9), generator=torch.Generator().manual_seed(0))
    for batch in rows:
        batch = batch.chunk(processes)[rank]
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.1)
        optimizer.step()
        optimizer.zero_grad()
    weights = merged(method, whole(model), None if method == "full" else model.peft_config["default"])
    for layer, members in mask.layers.items():
        weights[f"trainable.{layer}"] = members
    return weights


def main(processes: str, kind: str, folder: str) -> None:
    """Train by each method, and write the results."""
    rank = os.environ.get("RANK", "0")
    if kind == "accelerate":
        shard_on_cpu()
    if int(processes) > 1 and kind == "fsdp2":
        dist.init_process_group("gloo")
    with_experts = ["neuron_delta", "lora"] if kind == "ddp" else ["neuron_delta"]
    if kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT", "none"):
        shard_on_cpu()
        for method in METHODS:
            run_sharded(method, Path(folder), int(rank), None if kind == "none" else kind)
        dist.destroy_process_group()
        return
    for method in [*METHODS, *(f"{method}{EXPERTS}" for method in with_experts)]:
        if kind == "fsdp2":
            weights = run_fsdp2(method, int(processes))
        else:
            can_shard = kind == "accelerate"
            weights = run_trainer(method, Path(folder), int(rank), int(processes), can_shard=can_shard)
        save_file(weights, Path(folder) / f"{method}-{rank}.safetensors")
    if int(processes) > 1:
        assert dist.get_backend() == "gloo"
        assert dist.get_world_size() == int(processes)
        dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    main(*sys.argv[1:])
