"""Cost of a training step against its peers, on stacks of blocks of SmolLM2-135M's and of Llama-3.2-1B's shape, and on
a whole model of SmolLM2-135M's shape, with its embeddings and head (some of the arms only: floor,
full, lora, delta 10%).

    python benchmarks/training_step.py --output benchmarks/results/training_step.json

Arms, all built in one process and stepped by turns, so that a slow moment of the machine meets all of them:
  floor             forward pass and input gradients, nothing trains
  full              all weights
  full mlp          the weights of gate, up and down
  lora              PEFT's LoRA, rank 16, on gate, up and down
  shira             PEFT's SHiRA of as many weights as that LoRA, on the same modules
  osf               PEFT's OSF on the same modules
  parametrize       the original project's way: torch's parametrize, frozen + mask * delta, 10% of the neurons
  additive          neuron deltas in the additive form, 10% of the neurons
  delta 2%, 10%, 30%  neuron deltas as they are: held in the weight in float32, additive in half precision

A step is a forward pass, a backward pass from a fixed gradient of the output, a step of fused AdamW (the Trainer's
default) and zero_grad, in float32 (or `--dtype`) on one thread. `step`, and `forward_backward` without the optimizer,
are medians of the rounds' ratios to the floor of the same round, in CPU seconds; `quartiles` show the spread of
`step`. `parameters_mib` includes buffers. `saved_mib` is what autograd keeps for the backward pass and is no
parameter, each storage once. `peak_mib` is the highest resident memory during a step, above that of the process before
the arm was built.
"""

import argparse
import copy
import ctypes
import gc
import json
import multiprocessing
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import torch
from peft import LoraConfig, OSFConfig, ShiraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrize
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from fnsft_trl import NeuronMask, NeuronTunerConfig, find_neuron_sites
from fnsft_trl.tuner import NeuronDeltaLayer


SHAPES = {
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
        "num_hidden_layers": 4,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8,
        "num_hidden_layers": 1,
    },
    "smollm2-135m, whole": {
        "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
        "num_hidden_layers": 30, "vocab_size": 49152, "tie_word_embeddings": True,
    },
}  # fmt: skip
MLP = ["gate_proj", "up_proj", "down_proj"]
ROUNDS = {"smollm2-135m": 12, "llama-3.2-1b": 6, "smollm2-135m, whole": 4}
TOKENS = {"smollm2-135m": 768, "llama-3.2-1b": 512, "smollm2-135m, whole": 768}
OF_A_WHOLE_MODEL = ["floor", "full", "lora", "delta 10%"]
SEQUENCE = 256


class _Masked(nn.Module):
    """frozen + mask * delta, as a parametrization of a frozen weight."""

    def __init__(self, weight: torch.Tensor, mask: torch.Tensor) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros_like(weight))
        self.register_buffer("mask", mask)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.mask * self.delta


def random_neurons(model: nn.Module, fraction: float) -> NeuronMask:
    """A random share of the neurons of every layer."""
    draw = torch.Generator().manual_seed(0)
    layers = {}
    for site in find_neuron_sites(model):
        layers[site.layer] = torch.zeros(site.width, dtype=torch.bool)
        layers[site.layer][torch.randperm(site.width, generator=draw)[: round(fraction * site.width)]] = True
    return NeuronMask(layers)


def neuron_deltas(model: nn.Module, fraction: float, *, additive: bool = False) -> nn.Module:
    """Neuron deltas for a random share of the neurons."""
    tuned = get_peft_model(model, NeuronTunerConfig(neurons=random_neurons(model, fraction).to_ranges()))
    if additive:
        for layer in tuned.modules():
            if isinstance(layer, NeuronDeltaLayer):
                layer._can_hold = lambda *args: False
    return tuned


def parametrized(model: nn.Module, fraction: float) -> nn.Module:
    """The original project's parametrization of the same neurons."""
    mask = random_neurons(model, fraction)
    for site in find_neuron_sites(model):
        for part in site.layout.slices:
            module = model.get_submodule(part.module_name)
            members = torch.zeros_like(module.weight)
            members.index_fill_(part.dim, part.indices(mask.indices(site.layer)), 1)
            parametrize.register_parametrization(module, "weight", _Masked(module.weight, members))
    return model


def mlp_only(model: nn.Module) -> nn.Module:
    """The MLP weights themselves train."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp." in name)
    return model


def shira(model: nn.Module) -> nn.Module:
    """SHiRA with the number of weights of LoRA r16."""
    return get_peft_model(model, ShiraConfig(r=16, target_modules=MLP))


ARMS = {
    "floor": lambda model: model,
    "full": lambda model: model.requires_grad_(True),
    "full mlp": mlp_only,
    "lora": lambda model: get_peft_model(model, LoraConfig(r=16, target_modules=MLP)),
    "shira": shira,
    "osf": lambda model: get_peft_model(model, OSFConfig(target_modules=MLP)),
    "parametrize": lambda model: parametrized(model, 0.1),
    "additive": lambda model: neuron_deltas(model, 0.1, additive=True),
    "delta 2%": lambda model: neuron_deltas(model, 0.02),
    "delta 10%": lambda model: neuron_deltas(model, 0.1),
    "delta 30%": lambda model: neuron_deltas(model, 0.3),
}


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules around the same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


class Arm:
    """One way to train a copy of the model, on embedded (tokens, hidden) or whole numbers of tokens.

    Args:
        build: makes of a copy what trains.
        model, inputs: on one device.
        clock: gives seconds.
        copied: makes the copy.
        on_loss: whether a pass ends in the loss of its tokens, and not in a fixed gradient of the output.
    """

    def __init__(
        self,
        build: Callable[[nn.Module], nn.Module],
        model: nn.Module,
        inputs: torch.Tensor,
        *,
        clock: Callable[[], float] = time.process_time,
        copied: Callable[[nn.Module], nn.Module] = copy.deepcopy,
        on_loss: bool = False,
    ) -> None:
        self.model = build(copied(model)).train()
        self.inputs, self.clock, self.on_loss = inputs, clock, on_loss
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, fused=True) if self.trained else None

    def step(self) -> tuple[float, float]:
        """Seconds of forward and backward pass, and of the whole step."""
        start = self.clock()
        self.forward_backward()
        middle = self.clock()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return middle - start, self.clock() - start

    def forward_backward(self) -> None:
        """The pass through the model and back to its embedded inputs, or to what trains."""
        if self.on_loss:
            self.model(input_ids=self.inputs, labels=self.inputs, use_cache=False).loss.backward()
            return
        embedded = self.inputs.is_floating_point()
        x = self.inputs.clone() if embedded else self.model.get_input_embeddings()(self.inputs)
        if not x.requires_grad:
            x.requires_grad_(True)
        y = self.model(inputs_embeds=x)[0]
        y.backward(torch.full_like(y, 1e-3))

    def memory(self) -> dict[str, float]:
        """MiB of everything that a step holds, by kind."""
        own = {t.untyped_storage().data_ptr() for t in [*self.model.parameters(), *self.model.buffers()]}
        saved: dict[int, tuple[int, torch.Tensor]] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            parts = [tensor] if tensor.layout == torch.strided else [tensor._indices(), tensor._values()]
            for part in parts:
                storage = part.untyped_storage()
                if storage.data_ptr() not in own:
                    saved[storage.data_ptr()] = (storage.nbytes(), part)  # kept alive: an address is one storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.forward_backward()
        states = [] if self.optimizer is None else self.optimizer.state.values()
        held = {
            "parameters": sum(t.nbytes for t in [*self.model.parameters(), *self.model.buffers()]),
            "trained": sum(p.nbytes for p in self.trained),
            "gradients": sum(p.grad.nbytes for p in self.trained if p.grad is not None),
            "optimizer": sum(v.nbytes for state in states for v in state.values()),
            "saved": sum(size for size, _ in saved.values()),
        }
        return {f"{name}_mib": round(size / 2**20, 2) for name, size in held.items()}


def memory_of(make: Callable[[], Arm]) -> dict[str, float]:
    """Memory of one arm, in a process of its own that is forked from this one."""

    def work(pipe) -> None:
        gc.collect()
        libc = ctypes.CDLL("libc.so.6")
        libc.malloc_trim(0)
        before = psutil.Process().memory_info().rss
        arm = make()
        arm.step()
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the highest resident memory starts anew
        arm.step()
        status = Path("/proc/self/status").read_text()
        highest = int(status.partition("VmHWM:")[2].split()[0]) * 1024
        pipe.send({**arm.memory(), "peak_mib": round((highest - before) / 2**20, 1)})

    fork = multiprocessing.get_context("fork")
    mine, theirs = fork.Pipe()
    process = fork.Process(target=work, args=(theirs,))
    process.start()
    result = mine.recv()
    process.join()
    return result


def measure(shape: str, names: list[str], rounds: int, tokens: int, dtype: str) -> dict[str, dict]:
    """Step all arms in a random order, `rounds` times, after one step each that is not counted."""
    torch.manual_seed(0)
    config = LlamaConfig(**{"vocab_size": 8, **SHAPES[shape]})
    size = (max(1, tokens // SEQUENCE), min(SEQUENCE, tokens))
    if "vocab_size" in SHAPES[shape]:
        model, inputs = LlamaForCausalLM(config), torch.randint(config.vocab_size, size)
        names = [name for name in names if name in OF_A_WHOLE_MODEL]
    else:
        model, inputs = LlamaModel(config), torch.randn(*size, config.hidden_size)
    model.to(getattr(torch, dtype)).requires_grad_(False)
    inputs = inputs.to(model.dtype) if inputs.is_floating_point() else inputs
    memory = {name: memory_of(partial(Arm, ARMS[name], model, inputs)) for name in names}
    arms = {}
    for name in names:
        arms[name] = Arm(ARMS[name], model, inputs)
        arms[name].step()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    draw = random.Random(0)
    for _ in range(rounds):
        for name in draw.sample(names, len(names)):  # what runs before an arm shows in its caches and page faults
            seconds[name].append(arms[name].step())
    summary = {}
    for name in names:
        steps = [mine[1] / floor[1] for mine, floor in zip(seconds[name], seconds["floor"], strict=True)]
        passes = [mine[0] / floor[0] for mine, floor in zip(seconds[name], seconds["floor"], strict=True)]
        summary[name] = {
            "step": round(statistics.median(steps), 3),
            "forward_backward": round(statistics.median(passes), 3),
            "quartiles": [round(q, 3) for q in statistics.quantiles(steps, n=4)[::2]] if rounds > 1 else None,
            "cpu_seconds": round(statistics.median(total for _, total in seconds[name]), 3),
            **memory[name],
        }
        print(f"{shape} {name}: {summary[name]}", flush=True)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--rounds", type=int, help="default: 12, 6 and 4")
    parser.add_argument("--tokens", type=int, help="default: 768, 512 and 768")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    names = ["floor", *(name for name in args.arms if name != "floor")]
    result = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30),
            "torch": torch.__version__,
            "load_average": round(os.getloadavg()[0], 1),
        },
        "shapes": {
            shape: {
                "model": SHAPES[shape],
                "dtype": args.dtype,
                "tokens": args.tokens or TOKENS[shape],
                "rounds": args.rounds or ROUNDS[shape],
                "arms": measure(shape, names, args.rounds or ROUNDS[shape], args.tokens or TOKENS[shape], args.dtype),
            }
            for shape in args.shapes
        },
    }
    result["benchmark_cpu_seconds"] = round(time.process_time() - started)
    print(json.dumps(result, indent=2))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
