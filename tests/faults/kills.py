"""Processes that are killed or asked to end at random moments: what they leave goes on to what would have been.

    python tests/faults/kills.py --tries 5 --output kills.json

An operation runs to its end once. Then it runs again and again in an empty folder, gets a signal at a moment drawn
evenly from the time that the first run took, and runs once more, as its message says, until it ends by itself. Every
file that counts must be the same, bit for bit. Processes are forked from one that has imported the libraries.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


TESTS = Path(__file__).parent.parent
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))

from processes import Started  # noqa: E402


SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM}
ENDED = 143  # the status of a command that was asked to end


@dataclass(frozen=True)
class Operation:
    """
    Something that takes a while and is written in the end.

    Attributes:
        call (`Callable`): given a folder with the inputs and one for the outcome, a command of `fnsft`.
        again (`Callable`): given the folder of the outcome, what is added to the command to go on from there.
        counts (`tuple[str, ...]`): patterns of the files that must be equal.
    """

    call: Callable[[Path, Path], list[str]]
    counts: tuple[str, ...]
    again: Callable[[Path], list[str]] = field(default=lambda out: [])


def _training(method: str) -> Operation:
    more = ["--use_peft", "--lora_r", "4"] if method == "lora" else ["--train_method", method]

    def call(inputs: Path, out: Path) -> list[str]:
        return [
            *("train", "--model_name_or_path", f"{inputs}/model", "--dataset_name", f"{inputs}/rows.jsonl"),
            *("--ica_template_path", f"{inputs}/template", "--output_dir", str(out), "--max_steps", "24"),
            *(
                "--save_strategy",
                "steps",
                "--save_steps",
                "4",
                "--save_total_limit",
                "2",
                "--use_cpu",
                "--bf16",
                "false",
            ),
            *("--report_to", "none", "--max_length", "32", "--disable_tqdm", "true", "--learning_rate", "0.01", *more),
        ]

    def again(out: Path) -> list[str]:
        return ["--resume_from_checkpoint", "true"] if any(out.glob("checkpoint-*/trainer_state.json")) else []

    weights = "model*.safetensors" if method == "full" else "adapter_model.safetensors"
    return Operation(call, (weights, "functional_networks/template.safetensors"), again)


def _discovery(inputs: Path, out: Path) -> list[str]:
    return [
        *("discover", f"{inputs}/model", f"{inputs}/rows.jsonl", "--output_dir", str(out)),
        *("--ica_components", "3", "--ica_rank", "16", "--ica_max_tokens", "3000", "--ica_max_length", "32"),
        *("--ica_batch_size", "1"),
    ]


def _discovery_again(out: Path) -> list[str]:
    return ["--resume"] if any((out / ".progress").glob("batch-*/process-0.safetensors")) else []


def _experiment(inputs: Path, out: Path) -> list[str]:
    return ["experiment", f"{inputs}/recipes", "--output_dir", str(out)]


def _merge(inputs: Path, out: Path) -> list[str]:
    return ["export", f"{inputs}/adapter", "--to", "merged", "--output_dir", str(out)]


OPERATIONS = {
    "discovery": Operation(_discovery, ("config.json", "template.safetensors"), _discovery_again),
    "training, neuron deltas": _training("neuron_delta"),
    "training, LoRA": _training("lora"),
    "training, full": _training("full"),
    "merged export": Operation(_merge, ("*.safetensors", "config.json")),
    "experiment": Operation(_experiment, ("cells.jsonl", "report.md", "report.html", "results.json")),
}


def prepare(folder: Path) -> Path:
    """Write what all operations read: a tiny model, rows, a template, an adapter, recipes."""
    from helpers import tiny_model, tiny_rows, tiny_tokenizer
    from small_experiment import make_folder

    from fnsft_trl import FunctionalNetworkConfig, discover_networks

    model, tokenizer, rows = tiny_model("llama"), tiny_tokenizer(), tiny_rows(200)
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = FunctionalNetworkConfig(ica_components=3, ica_rank=16, ica_max_tokens=250, ica_max_length=32)
    discover_networks(model, tokenizer, [row["prompt"] for row in rows], config).save_pretrained(folder / "template")
    make_folder(folder, folder / "model")
    words = OPERATIONS["training, neuron deltas"].call(folder, folder / "adapter")
    _ended(_started(words))
    return folder


def _started(words: list[str]) -> Started:
    code = "import sys; from fnsft_trl.cli import main; sys.exit(main(sys.argv[1:]))"
    return Started("-c", code, *words)


def _ended(started: Started) -> None:
    done = started.end()
    if done.returncode:
        raise AssertionError(f"{' '.join(started.words[2:])}: status {done.returncode}\n{done.stderr[-2000:]}")


@dataclass
class Trial:
    """An operation with what an uninterrupted run of it gives."""

    operation: Operation
    inputs: Path
    out: Path
    seconds: float = 0.0
    expected: dict[str, str] = field(default_factory=dict)

    def measure(self) -> None:
        """Run it to its end."""
        began = time.monotonic()
        self._run(())
        self.seconds = time.monotonic() - began
        self.expected = self._found()

    def interrupted(self, number: int, moment: float) -> str:
        """Run it, send a signal, and go on.

        Args:
            number: of the signal.
            moment: when, as a share of the time that the whole takes.

        Returns:
            `survived`, or `over` where it had ended before the signal came.

        Raises:
            AssertionError: the outcome is another, or going on fails.
        """
        shutil.rmtree(self.out, ignore_errors=True)
        started = _started(self.operation.call(self.inputs, self.out))
        time.sleep(moment * self.seconds)
        if started.process.exitcode is None:
            os.kill(started.process.pid, number)
        done = started.end()
        if done.returncode == 0:
            assert self._found() == self.expected
            return "over"
        if number == signal.SIGTERM:  # which comes too early for any message only before Python has begun
            assert done.returncode in (ENDED, -number), done.stderr[-2000:]
            assert "Traceback" not in done.stderr, done.stderr[-2000:]
        self._run(self.operation.again(self.out))
        found = self._found()
        wrong = [name for name in self.expected.keys() | found if self.expected.get(name) != found.get(name)]
        assert not wrong, f"{wrong} differ after a signal at {moment:.3f} of {self.seconds:.1f} s"
        return "survived"

    def _run(self, more) -> None:
        _ended(_started([*self.operation.call(self.inputs, self.out), *more]))

    def _found(self) -> dict[str, str]:
        files = [path for pattern in self.operation.counts for path in self.out.glob(pattern)]
        assert files, f"{self.out} holds nothing of {self.operation.counts}"
        return {str(p.relative_to(self.out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def run(tries: int, seed: int, folder: Path) -> dict[str, dict[str, int]]:
    """Operation and signal -> how many tries survived, were over before the signal, or lost something."""
    inputs = prepare(folder / "inputs")
    found = {}
    for name, operation in OPERATIONS.items():
        trial = Trial(operation, inputs, folder / "out")
        shutil.rmtree(trial.out, ignore_errors=True)
        trial.measure()
        for title, number in SIGNALS.items():
            draw, counts = random.Random(f"{seed} {name} {title}"), Counter(survived=0, over=0, lost=0)
            while counts["survived"] + counts["lost"] < tries:
                try:
                    counts[trial.interrupted(number, draw.random())] += 1
                except AssertionError as error:
                    counts["lost"] += 1
                    sys.stderr.write(f"{name}, {title}: {error}\n")
            found[f"{name}, {title}"] = dict(counts)
            sys.stderr.write(f"{name}, {title}: {dict(counts)}\n")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "inputs").mkdir()
        found = run(args.tries, args.seed, Path(folder))
    if args.output:
        args.output.write_text(json.dumps({"seed": args.seed, "tries": args.tries, "found": found}, indent=2) + "\n")
    return int(any(counts["lost"] for counts in found.values()))


if __name__ == "__main__":
    sys.exit(main())
