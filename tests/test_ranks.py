"""Of processes that wait for each other, one that fails tells the others what it failed with, wherever they wait."""

import json
import signal

import pytest
from helpers import tiny_rows
from processes import run_processes, start_processes

from fnsft_trl import FNSFTError
from fnsft_trl.ranks import Ranks


PROCESS = """
import os, pickle, sys
import torch.distributed as dist
from helpers import tiny_model, tiny_rows, tiny_tokenizer

from fnsft_trl import FNSFTError, FunctionalNetworkConfig, discover_networks
from fnsft_trl.ranks import Ranks

all_sent, first_sent = [], []


def noted(call, sent):
    def called(*args, **kwargs):
        objects = args[1] if call is gather_all else args[0]
        sent.append((len(pickle.dumps(objects)), bytes_of(objects)))
        return call(*args, **kwargs)

    return called


def bytes_of(found):
    if isinstance(found, (list, tuple)):
        return sum(map(bytes_of, found))
    return sum(tensor.nbytes for tensor in found.values()) if isinstance(found, dict) else 0


gather_all, gather_first = dist.all_gather_object, dist.gather_object
dist.all_gather_object, dist.gather_object = noted(gather_all, all_sent), noted(gather_first, first_sent)
dist.init_process_group("gloo")
rank = dist.get_rank()


def outcome(work):
    try:
        work()
        return "nothing"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


for failing, error in ((0, FNSFTError("the disk is full")), (1, ZeroDivisionError("a defect"))):
    ranks = Ranks()

    def work():
        with ranks.together():
            for number in range(3):
                ranks.meet()
                if rank == failing and number == 1:
                    raise error
        ranks.meet()

    print(rank, failing, outcome(work), flush=True)

texts = [row["prompt"] + row["completion"] for row in tiny_rows(100)]
config = FunctionalNetworkConfig(ica_components=2, ica_rank=8, ica_max_tokens=400, ica_max_length=32)
discover_networks(tiny_model("llama"), tiny_tokenizer(), texts, config)
print(rank, "to-all", max(size for size, _ in all_sent), flush=True)
print(rank, "to-first", *first_sent[0], flush=True)

model = tiny_model("llama")
if rank == 1:
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, args: (args[0] * float("nan"),))
print(rank, "discovery", outcome(lambda: discover_networks(model, tiny_tokenizer(), texts, config)), flush=True)
"""


@pytest.mark.slow
def test_an_error_of_one_process_is_that_of_all(tmp_path):
    told = {}
    for out in run_processes(2, "-c", PROCESS):
        for line in out.splitlines():
            rank, what, said = line.split(" ", 2)
            told[rank, what] = said
    assert told["0", "0"] == told["1", "0"] == "FNSFTError: the disk is full"
    assert told["1", "1"] == "ZeroDivisionError: a defect"
    assert told["0", "1"] == "FNSFTError: process 1 of 2 failed: ZeroDivisionError: a defect"
    assert int(told["0", "to-all"]) < 1000  # what one needs alone goes to that one
    size, held = map(int, told["1", "to-first"].split())
    assert held < size < 1.1 * held + 10_000  # and without what tensors are views of
    assert "NaN or infinite" in told["1", "discovery"]
    assert told["0", "discovery"] == told["1", "discovery"]


# A command of which process 1 is killed in its third pass of the model that trains, or that does not.
DYING = """
import os, signal, sys
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import LlamaModel

from fnsft_trl.cli import main

dies_in_training, words, passes = sys.argv[1] == "training", sys.argv[2:], 0


def dies(module, arguments):
    global passes
    passes += isinstance(module, LlamaModel) and module.training == dies_in_training
    if passes == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)


register_module_forward_pre_hook(dies)
sys.exit(main(words))
"""
TRAIN = (
    *("--max_steps", "6", "--use_cpu", "--bf16", "false", "--report_to", "none", "--disable_tqdm", "true"),
    *("--per_device_train_batch_size", "2", "--max_length", "32", "--ica_select", "random", "--ica_fraction", "0.3"),
    *("--retention_tokens", "400", "--retention_batch_size", "1", "--tokenized_cache", "false"),
)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["discovery", "training", "scoring"])
def test_a_process_that_is_killed_ends_all_with_one_line(place, model_dir, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, tiny_rows(60))))
    out = ("--output_dir", str(tmp_path / "out"))
    if place == "discovery":
        small = ("--ica_components", "2", "--ica_rank", "8", "--ica_max_tokens", "400", "--ica_batch_size", "1")
        words = ["discover", str(model_dir), str(rows), *out, *small]
    else:
        data = ("--model_name_or_path", str(model_dir), "--dataset_name", str(rows))
        words = ["train", *data, *out, *TRAIN, "--retention_datasets", f"rows={rows}"]
    first, second = start_processes(2, "-c", DYING, "training" if place == "training" else "scoring", *words)
    killed, other = second.end(120), first.end(120)  # which is far below the half hour that backends wait
    assert killed.returncode == -signal.SIGKILL
    assert other.returncode == 2, other.stderr
    assert f"fnsft {words[0]}: error: another process of this launch has ended" in other.stderr.splitlines()[-1]
    assert "Traceback" not in other.stderr


def test_alone_an_error_stays_what_it_is():
    ranks = Ranks()
    ranks.meet()
    with pytest.raises(ZeroDivisionError), ranks.together():
        raise ZeroDivisionError
    with pytest.raises(FNSFTError, match="one line"):
        ranks.meet(FNSFTError("one line"))
