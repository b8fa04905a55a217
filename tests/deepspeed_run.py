"""Runs under DeepSpeed, for tests/training/test_deepspeed.py: in two processes on a CPU, and in one without it.

    python deepspeed_run.py FOLDER

Imports all libraries once, DeepSpeed among them, and forks. Each process trains the cells, one after the other. Beside
each cell it writes what came of it: FOLDER/CELL-RANK.safetensors, of one process FOLDER/METHOD-0.safetensors.
"""

import json
import os
import socket
import sys
import traceback
from pathlib import Path


os.environ |= {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import deepspeed
import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from helpers import medium_experts, medium_model, sft_config, tiny_rows, tiny_tokenizer
from peft import LoraConfig
from safetensors.torch import save_file
from trl import DPOConfig, DPOTrainer

from fnsft_trl import (
    AnchorConfig,
    FNSFTError,
    FNSFTTrainer,
    FunctionalNetworkConfig,
    PenaltyConfig,
    ProtectionConfig,
    RetentionConfig,
    discover_networks,
    with_networks,
)
from fnsft_trl.compat.deepspeed import is_partitioned
from fnsft_trl.neurons.layout import whole_values


METHODS = ("neuron_delta", "lora", "neuron_delta experts")
STAGES = (2, 3)
DISCOVERY = {"ica_components": 2, "ica_rank": 8, "ica_max_tokens": 200, "ica_max_length": 32}


def cells() -> dict[str, tuple[int, str]]:
    """Name -> stage, method."""
    plain = {f"zero{stage} {method}": (stage, method) for stage in STAGES for method in METHODS[:2]}
    return plain | {"zero2 neuron_delta experts": (2, METHODS[2])}


def split_on_cpu() -> None:
    """Let accelerate know of the other process on a CPU under DeepSpeed, where it finds no backend: each process would
    count as the only one, and train all rows."""
    own = PartialState._prepare_backend

    def prepare_backend(self, *args, **kwargs) -> tuple:
        backend, kind = own(self, *args, **kwargs)
        return (backend or "gloo" if "RANK" in os.environ else backend), kind

    PartialState._prepare_backend = prepare_backend


def config_of(stage: int) -> dict:
    """A DeepSpeed config. With the usual thresholds, weights as few as these would stay whole in every process."""
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    names = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
    zero = {"stage": stage, **{f"stage3_{name}": 0 for name in names}}
    return {"zero_optimization": zero, "zero_allow_untested_optimizer": True, **dict.fromkeys(sizes, "auto")}


def asked_of(folder: Path, name: str, stage: int, processes: int, **more) -> dict:
    """The arguments of a trainer, but for its networks."""
    args = sft_config(
        folder / name,
        per_device_train_batch_size=4 // processes,
        per_device_eval_batch_size=1,  # the mean over batches is then that over rows
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        max_grad_norm=0.1,
        adam_epsilon=1e-4,  # where a gradient is next to nothing, AdamW would make whole steps of rounding
        save_strategy="steps",
        save_steps=2,
        # use_cpu would take plain data parallelism instead; without it DS_ACCELERATOR says where to compute.
        **({"deepspeed": config_of(stage), "use_cpu": False} if stage else {}),
        **more,
    )
    rows = Dataset.from_list(tiny_rows())
    data = {"train_dataset": rows, "eval_dataset": rows.select(range(8))}
    return {"args": args, **data, "processing_class": tiny_tokenizer()}


def trainer_of(folder: Path, name: str, stage: int, method: str, processes: int, **more) -> FNSFTTrainer:
    """A trainer with a forward mask, a guard and retention, of a model that is loaded by name."""
    kind = "experts" if method.endswith("experts") else "model"
    discovers = name == "zero2 lora"
    return FNSFTTrainer(
        model=str(folder / kind),
        **asked_of(folder, name, stage, processes, **more),
        peft_config=LoraConfig(r=4) if method == "lora" else None,
        network_template=None if discovers else str(folder / f"{kind}-template"),
        network_config=FunctionalNetworkConfig(
            ica_select="random",  # the same neurons, whoever has discovered the networks
            ica_fraction=0.5,
            mask_mode="lesion",
            train_neurons="unselected",
            **(DISCOVERY if discovers else {}),
        ),
        retention=RetentionConfig([f"text={folder / 'text.txt'}"], retention_tokens=50, retention_batch_size=2),
    )


def outcome(trainer: FNSFTTrainer) -> dict[str, torch.Tensor]:
    """What a run has made of its model: losses, retention, and the weights, which are gathered."""
    found = {name: whole_values(p).clone().contiguous() for name, p in trainer.model.named_parameters()}
    names = ("loss", "eval_masked_loss", "eval_unmasked_loss", "retention/text/rise", "retention/text/kl")
    for name in names:
        found[f"log.{name}"] = torch.tensor([entry[name] for entry in trainer.state.log_history if name in entry])
    for layer, members in trainer.trainable_neurons.layers.items():
        found[f"trainable.{layer}"] = members
    found["guarded"] = torch.tensor([trainer._run.guard.neurons, trainer._run.guard.others])
    return found


def run(folder: Path, name: str, stage: int, method: str, rank: int, processes: int) -> None:
    """A run, and one that goes on from its checkpoint in the middle."""
    first = trainer_of(folder, name, stage, method, processes)
    first.train()
    first.save_model()
    assert first.is_deepspeed_enabled == (processes > 1)
    assert first.args.world_size == processes
    if stage == 3:
        assert all(is_partitioned(p) and p.numel() == 0 for p in first.model.parameters())
    expected = outcome(first)
    save_file(expected, folder / f"{name}-{rank}.safetensors")
    if processes == 1:
        return
    if rank == 0:
        (folder / name / "checkpoint-4" / "trainer_state.json").unlink()
    torch.distributed.barrier()
    second = trainer_of(folder, name, stage, method, processes, resume_from_checkpoint="true")
    second.train()
    found = outcome(second)
    weights = [key for key in expected if not key.startswith(("log.", "guarded"))]
    assert [key for key in weights if not torch.equal(found[key], expected[key])] == []
    if method in METHODS[:2]:
        other = trainer_of(folder, name, 5 - stage, method, processes, resume_from_checkpoint="true")
        with pytest.raises(FNSFTError, match=r"deepspeed was DeepSpeed ZeRO-\d, 2 processes and is now "):
            other.train()


def refused(folder: Path) -> dict[str, str]:
    """What is said of what does not run, by cell; nothing is loaded before."""
    said = {}
    template = str(folder / "model-template")
    on_text = [f"text={folder / 'text.txt'}"]
    more = {
        "full": ({}, {"train_method": "full"}),
        "protect": ({"protection": ProtectionConfig(protect="random", protect_dims=8)}, {}),
        "kl_to_base": ({"anchor": AnchorConfig(kl_to_base=1.0, kl_datasets=on_text)}, {}),
        "penalties": ({"penalties": PenaltyConfig(lwf=1.0)}, {}),
        "rollback": ({"retention": RetentionConfig(on_text, retention_budget=1.0)}, {}),
    }
    for stage in STAGES:
        for name, (given, config) in more.items():
            with pytest.raises(FNSFTError) as error:
                FNSFTTrainer(
                    model=str(folder / "no such model"), **asked_of(folder, "refused", stage, 2), **given,
                    network_template=template, network_config=FunctionalNetworkConfig(**config),
                )  # fmt: skip
            said[f"zero{stage} {name}"] = str(error.value)
        config = DPOConfig(str(folder / "refused"), bf16=False, deepspeed=config_of(stage))
        with pytest.raises(FNSFTError) as error:
            with_networks(DPOTrainer)(
                model=str(folder / "no such model"), args=config, network_template=template,
                network_config=FunctionalNetworkConfig(train_method="full"),
            )  # fmt: skip
        said[f"zero{stage} DPO full"] = str(error.value)
    with pytest.raises(FNSFTError) as error:
        FNSFTTrainer(
            model=str(folder / "no such model"), **asked_of(folder, "refused", 3, 2),
            network_config=FunctionalNetworkConfig(**DISCOVERY),
        )  # fmt: skip
    said["zero3 discovery"] = str(error.value)
    with pytest.raises(FNSFTError) as error:
        trainer_of(folder, "refused", 3, METHODS[2], 2)
    said["zero3 neuron_delta experts"] = str(error.value)
    return said


def main(folder: Path, rank: int, processes: int) -> None:
    """What one process does."""
    if processes == 1:
        for method in METHODS:
            run(folder, method, 0, method, rank, processes)
        return
    for name, (stage, method) in cells().items():
        run(folder, name, stage, method, rank, processes)
    said = refused(folder)
    if rank == 0:
        (folder / "refused.json").write_text(json.dumps(said))


def prepare(folder: Path) -> None:
    """What all processes read."""
    texts = [row["prompt"] + row["completion"] for row in tiny_rows()]
    (folder / "text.txt").write_text("\n".join(["9876543210 is it"] * 5))
    for kind, model in (("model", medium_model()), ("experts", medium_experts())):
        model.save_pretrained(folder / kind)
        tiny_tokenizer().save_pretrained(folder / kind)
        template = discover_networks(model, tiny_tokenizer(), texts, FunctionalNetworkConfig(**DISCOVERY))
        template.save_pretrained(folder / f"{kind}-template")


def forked(folder: Path) -> list[int]:
    """Run the two processes, and the one beside them; their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank, processes in ((0, 2), (1, 2), (0, 1)):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                if processes > 1:
                    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
                    os.environ |= together | {"LOCAL_WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
                main(folder, rank, processes)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        started.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in started]


if __name__ == "__main__":
    torch.set_num_threads(1)
    split_on_cpu()
    # Its own way for processes of one machine to talk would be compiled here; gloo needs no compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    prepare(Path(sys.argv[1]))
    sys.exit(max(map(abs, forked(Path(sys.argv[1])))))
