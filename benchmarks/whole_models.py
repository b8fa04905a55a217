"""What a discovery, a training step and a mask cost on whole models of 1 and 8 billion parameters, on an accelerator.

    python benchmarks/whole_models.py --device cuda --output benchmarks/results/whole_models.json

The models have the shapes of Llama 3, random weights in bfloat16, and are made on the device. Their texts are random
tokens. Seconds are those of the clock, after the device has done all that it was asked. The parts, of each shape:

  discovery   of `--tokens` tokens in sequences of 512, at the package's defaults but for `--components`: `forward` is
              the forward pass alone, `reading` the same with the activations of all neurons copied out, `sketch`
              what the two sketches take, `ica` the decomposition of both and of each, `null` that of its null. `whole`
              is all but `forward`. Random tokens have no networks, so FastICA goes on to its last iteration
  masked      the forward pass with 2% of the neurons silenced, over a plain one
  training    a step (forward pass, loss, backward pass, fused AdamW, zero_grad) of 1,024 and of 4,096 tokens, of the
              arms of benchmarks/training_step.py, each with and without `protect` (200 directions, random ones, which
              cost the same). Protection freezes what has no directions (embeddings, norms). Arms take turns in random
              order; `milliseconds` are medians of the rounds, `over_lora` and `over_plain` those of the ratios to LoRA
              and to the same arm without protection in the same round

GiB are the most that the device held at a time, weights and all; of an arm, as if it were the only one. A part that
fails is said so, and the next begins. Nothing begins after `--seconds`; what is too slow for the rest of them reads
fewer tokens, or steps fewer rounds.
"""

import argparse
import gc
import json
import math
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch
from big_models import SHAPES, Shape
from gauge import GIB, Gauge
from protection import ProtectedArm
from torch import nn
from training_step import ARMS, Arm, random_neurons, shared_copy
from transformers import AutoModelForCausalLM, LlamaConfig

from fnsft_trl import FunctionalNetworkConfig, find_neuron_sites, lesion
from fnsft_trl.data.sequences import TokenSequence
from fnsft_trl.discovery.activations import ActivationReader, batch_inputs
from fnsft_trl.discovery.decomposition import IcaSettings, decompose
from fnsft_trl.discovery.null import null_reliability
from fnsft_trl.discovery.sketch import ActivationSketch
from fnsft_trl.discovery.units import Units


WHOLE = {name: SHAPES[name] for name in ("1B", "8B")}
TINY = {"tiny": Shape(2, 64, 256, 8, 1.5e5, 64, vocabulary=256, ties_head=True)}  # to try the benchmark on
SIZES = ((4, 256), (8, 512))  # sequences and their tokens
LESION, DIRECTIONS = 0.02, 200
TRAINED = ("lora", "delta 10%", "full")
LARGEST_FULL = 2e9  # parameters of a model of which all weights are trained
LEAST_ROUNDS = 5


@dataclass
class Whole:
    """A whole model on a device, and how much is measured of it.

    Attributes:
        name (`str`), shape (`Shape`): its shape.
        model (`nn.Module`): the model, of which nothing trains.
        gauge (`Gauge`): of its device.
        tokens, components (`int`): of the discovery.
        rounds (`int`): of steps and of passes.
        ends (`float`): seconds of the clock after which nothing begins.
        attempt (`Callable`): gives what a function gives, or `None` after noting how it failed.
    """

    name: str
    shape: Shape
    model: nn.Module
    gauge: Gauge
    tokens: int
    components: int
    rounds: int
    ends: float
    attempt: Callable

    def ids(self, sequences: int, length: int) -> torch.Tensor:
        """Random tokens, on the CPU, shape (sequences, length)."""
        drawn = torch.Generator().manual_seed(0)
        return torch.randint(self.model.config.vocab_size, (sequences, length), generator=drawn)

    def taking_turns(self, runs: dict, least: int = LEAST_ROUNDS) -> dict:
        """Seconds of each of some functions, in all rounds; each gives those that it took."""
        seconds, draw, count = {name: [] for name in runs}, random.Random(0), 0
        while count < self.rounds and (count < least or self.gauge.clock() < self.ends):
            for name in draw.sample(list(runs), len(runs)):
                seconds[name].append(runs[name]())
            count += 1
        return seconds


def model_of(shape: Shape, device: torch.device) -> nn.Module:
    """A whole model, made on its device."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=8,
        max_position_embeddings=8192, tie_word_embeddings=shape.ties_head,
    )  # fmt: skip
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.requires_grad_(False).eval()


@torch.no_grad()
def discovery(whole: Whole) -> Iterator[tuple[str, dict]]:
    """The parts of a discovery, as `discover_networks` goes through them, with a look at the clock between them."""
    gauge, model = whole.gauge, whole.model
    config = FunctionalNetworkConfig(ica_components=whole.components, ica_max_tokens=whole.tokens)
    reader = ActivationReader(
        model, find_neuron_sites(model, kind=config.ica_site), batch_size=config.ica_batch_size,
        max_length=config.ica_max_length, skip_tokens=config.ica_skip_tokens, special_ids=(),
    )  # fmt: skip
    count = math.ceil(whole.tokens / (config.ica_max_length - config.ica_skip_tokens))
    ids = whole.ids(count, config.ica_max_length).tolist()
    sequences = [TokenSequence(of_one, number % 2) for number, of_one in enumerate(ids)]
    units = Units(config.ica_standardize, config.ica_drop_massive, tuple(reader.columns.values()))

    def sketches() -> list[ActivationSketch]:
        return [
            ActivationSketch(
                reader.width, config.ica_rank, reservoir=config.ica_reservoir, seed=seed, units=units,
                device=reader.device,
            )
            for seed in (0, 1)
        ]  # fmt: skip

    _read(whole, reader, sequences[: 2 * config.ica_batch_size], sketches())  # the first use of each kernel is slow
    gc.collect()
    gauge.restart_peak()
    halves = sketches()
    blocks, seconds = _read(whole, reader, sequences, halves)
    settings = IcaSettings(config.ica_components, seed=config.ica_seed)
    for name, work in {"ica": decompose, "null": null_reliability}.items():
        start = gauge.clock()
        work([[half] for half in halves], settings, units)
        seconds[name] = gauge.clock() - start
    found = {"peak_gib": gauge.peak() / GIB, "tokens": sum(reader.tokens), "components": whole.components}
    seconds["whole"] = sum(seconds.values())
    start = gauge.clock()
    for first in range(0, blocks * reader.batch_size, reader.batch_size):
        tokens, present = (each.to(gauge.device) for each in batch_inputs(ids[first : first + reader.batch_size]))
        model.base_model(input_ids=tokens, attention_mask=present, use_cache=False)
    seconds["forward"] = gauge.clock() - start
    yield "discovery", found | {"over_forward": seconds["whole"] / seconds["forward"], "seconds": seconds}


def _read(
    whole: Whole, reader: ActivationReader, sequences: list[TokenSequence], halves: list[ActivationSketch]
) -> tuple[int, dict[str, float]]:
    """Read sequences into sketches, until the time is over; how many batches, and seconds of both."""
    clock, reading, sketch, blocks = whole.gauge.clock, 0.0, 0.0, 0
    with closing(reader.read([sequences], max_tokens=whole.tokens)) as read:
        end = clock()
        for block in read:
            start, before = clock(), end
            for number, half in enumerate(halves):
                half.update(block.rows, (block.parts == number).nonzero().flatten().to(block.rows.device))
            end = clock()
            reading, sketch, blocks = reading + start - before, sketch + end - start, blocks + 1
            if end > whole.ends:
                break
    start = clock()
    for half in halves:
        half.finish()
    return blocks, {"reading": reading, "sketch": sketch + clock() - start}


@torch.no_grad()
def masked(whole: Whole) -> Iterator[tuple[str, dict]]:
    """A forward pass of 1,024 tokens, silenced and plain by turns."""
    gauge, ids = whole.gauge, whole.ids(*SIZES[0]).to(whole.gauge.device)
    silenced = shared_copy(whole.model)
    lesion(silenced, random_neurons(silenced, LESION))

    def run(model: nn.Module) -> float:
        start = gauge.clock()
        model(input_ids=ids, use_cache=False)
        return gauge.clock() - start

    runs = {"plain": partial(run, whole.model), "masked": partial(run, silenced)}
    for each in runs.values():
        each()
    seconds = whole.taking_turns(runs)
    yield (
        "masked",
        {
            "over_plain": _median_ratio(seconds["masked"], seconds["plain"]),
            "milliseconds": 1000 * statistics.median(seconds["plain"]),
            "rounds": len(seconds["plain"]),
        },
    )


def training(whole: Whole) -> Iterator[tuple[str, dict]]:
    """Steps of all arms by turns, for each size of a step."""
    gauge, makers = whole.gauge, {}
    ids = [whole.ids(*size).to(gauge.device) for size in SIZES]
    for name in TRAINED:
        if name == "full" and whole.shape.parameters > LARGEST_FULL:
            continue
        settings = {"clock": gauge.clock, "on_loss": True} | ({} if name == "full" else {"copied": shared_copy})
        makers[name, False] = partial(Arm, ARMS[name], whole.model, ids[0], **settings)
        directions = min(DIRECTIONS, whole.shape.hidden // 8)
        makers[name, True] = partial(ProtectedArm, ARMS[name], whole.model, ids[0], directions, **settings)
    weights = sum(parameter.nbytes for parameter in whole.model.parameters())
    arms, held = {}, {}
    for key, make in makers.items():
        before = gauge.held()
        arm = whole.attempt(f"{whole.name} {key}", partial(_begun, make))
        gc.collect()
        if arm is not None:
            arms[key] = arm
            held[key] = gauge.held() - before + (0 if key[0] == "full" else weights)  # `full` has its own weights
    for each in ids:
        if gauge.clock() < whole.ends:
            size = f"training of {each.numel():,} tokens"
            found = whole.attempt(f"{whole.name} {size}", partial(_steps, whole, arms, held, each))
            if found is not None:
                yield size, found


def _begun(make: Callable[[], Arm]) -> Arm:
    """An arm after its first step, with the state of its optimizer."""
    arm = make()
    arm.step()
    return arm


def _steps(whole: Whole, arms: dict, held: dict, ids: torch.Tensor) -> dict:
    """Time and memory of steps with some tokens."""
    gauge, peaks = whole.gauge, {}
    for key, arm in arms.items():
        arm.inputs = ids
        arm.step()
        gauge.restart_peak()
        arm.step()
        peaks[key] = held[key] + gauge.peak() - gauge.held()
    seconds = whole.taking_turns({key: lambda arm=arm: arm.step()[1] for key, arm in arms.items()})
    found: dict[str, dict] = {}
    for (name, is_protected), taken in seconds.items():
        ratios = {"over_lora": ("lora", False)} | ({"over_plain": (name, False)} if is_protected else {})
        found[f"{name} protected" if is_protected else name] = {
            "milliseconds": 1000 * statistics.median(taken),
            **{ratio: _median_ratio(taken, seconds[peer]) for ratio, peer in ratios.items() if peer in seconds},
            "quartiles": [1000 * q for q in statistics.quantiles(taken, n=4)[::2]],
            "peak_gib": peaks[name, is_protected] / GIB,
        }
    return {"tokens": ids.numel(), "rounds": len(taken), "arms": found}


def _median_ratio(seconds: list[float], peer: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(seconds, peer, strict=True))


def _rounded(value):
    """The same with all fractions at four digits."""
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


class Record:
    """What was found and what failed, on disk after each part."""

    def __init__(self, about: dict, output: Path | None) -> None:
        self.text = {"machine": about, "shapes": {}, "failed": {}}
        self.output = output

    def keep(self, shape: str, part: str, found: dict) -> None:
        """Note a part, print it and write all."""
        self.text["shapes"].setdefault(shape, {})[part] = _rounded(found)
        print(json.dumps({"shape": shape, "part": part, **_rounded(found)}), flush=True)
        self.write()

    def attempt(self, what: str, work: Callable):
        """What a function gives; `None` after noting how it failed."""
        try:
            return work()
        except Exception as error:  # the other parts are worth their time all the same
            traceback.print_exc(file=sys.stderr)
            self.text["failed"][what] = f"{type(error).__name__}: {error}"[:500]
            print(json.dumps({"failed": what, "error": self.text["failed"][what]}), flush=True)
            self.write()
            return None

    def write(self) -> None:
        """All of it, as far as it is."""
        if self.output is not None:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self.output.write_text(json.dumps(self.text, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    began = time.perf_counter() - (time.time() - psutil.Process().create_time())  # imports count too
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="of torch: cuda, xpu, or cpu to try it with --shapes tiny")
    parser.add_argument("--shapes", nargs="+", default=list(WHOLE), choices=[*TINY, *WHOLE])
    parser.add_argument("--tokens", type=int, default=50_000, help="of the discovery")
    parser.add_argument("--components", type=int, default=20, help="of the discovery")
    parser.add_argument("--rounds", type=int, default=7, help="of steps, five at least")
    parser.add_argument("--seconds", type=float, default=100, help="after which nothing begins")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    gauge = Gauge(args.device)
    record = Record(gauge.about(), args.output)

    def parts_of(part: Callable, whole: Whole) -> None:
        for label, found in part(whole):
            record.keep(whole.name, label, found)

    for name in args.shapes:
        shape = (TINY | WHOLE)[name]
        start = gauge.clock()
        model = record.attempt(f"{name} building", partial(model_of, shape, gauge.device))
        if model is None:
            continue
        weights = sum(p.numel() for p in model.parameters())
        record.keep(name, "building", {"seconds": gauge.clock() - start, "parameters": weights})
        whole = Whole(
            name, shape, model, gauge, args.tokens, args.components, args.rounds, began + args.seconds, record.attempt
        )
        for part in (masked, discovery, training):
            if gauge.clock() < whole.ends:
                record.attempt(f"{name} {part.__name__}", partial(parts_of, part, whole))
            else:
                record.text["failed"][f"{name} {part.__name__}"] = "no time was left"
            gc.collect()
            gauge.release()
        del model, whole
        gc.collect()
        gauge.release()
    record.text["seconds"] = round(gauge.clock() - began, 1)
    record.write()


if __name__ == "__main__":
    main()
