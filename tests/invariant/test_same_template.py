"""Same input, same bytes; memory that does not grow with tokens (invariant 6)."""

import json
import os
import subprocess
import sys

import pytest
from helpers import FAMILIES, tiny_model
from processes import run_python

from fnsft_trl import FunctionalNetworkConfig, discover_networks


FILES = ("config.json", "template.safetensors", "README.md")

DISCOVER = """
import sys, torch
torch.set_num_threads(2)
sys.path.insert(0, "tests")
from helpers import FAMILIES, tiny_model, tiny_rows, tiny_tokenizer
from fnsft_trl import FunctionalNetworkConfig, discover_networks
config = FunctionalNetworkConfig(
    ica_components=3, ica_rank=16, ica_max_length=32, ica_standardize=sys.argv[2], ica_backend=sys.argv[3]
)
texts = [row["prompt"] + row["completion"] for row in tiny_rows()]
for family in FAMILIES:
    discover_networks(tiny_model(family), tiny_tokenizer(), texts, config).save_pretrained(f"{sys.argv[1]}/{family}")
"""

# Real shapes, random weights: the memory of a discovery is rank x neurons and one block of activations.
MEMORY = """
import json, sys, threading, time
import psutil, torch
from transformers import LlamaConfig, LlamaForCausalLM
from fnsft_trl import FunctionalNetworkConfig, discover_networks

class Tokenizer:
    all_special_ids, chat_template, bos_token = [0], None, None
    def __call__(self, text):
        return {"input_ids": [1 + (hash((int(text), i)) % 97) for i in range(128)]}

torch.manual_seed(0)
shape = dict(hidden_size=64, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=4, vocab_size=100)
model = LlamaForCausalLM(LlamaConfig(**shape))
tokens = int(sys.argv[1])
config = FunctionalNetworkConfig(
    ica_max_tokens=tokens, ica_rank=64, ica_components=4, ica_max_length=128, ica_reservoir=2048
)
process, peak, done = psutil.Process(), 0, threading.Event()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.005)
thread = threading.Thread(target=watch, daemon=True)
thread.start()
discover_networks(model, Tokenizer(), (str(i) for i in range(10**9)), config)
done.set(); thread.join()
print(json.dumps({"peak": peak}))
"""


# What is freed goes back to the system at once, so that the size of a process is what it holds.
EXACT_SIZE = {"MALLOC_MMAP_THRESHOLD_": str(2**18), "MALLOC_ARENA_MAX": "1"}


def run(code, *arguments, is_new=True):
    words = ["-c", code, *map(str, arguments)]
    if is_new:
        environment = os.environ | EXACT_SIZE
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, env=environment)
    else:
        done = run_python(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("standardize", "backend"), [("center", "torch"), ("zscore", "torch"), ("center", "sklearn")])
def test_two_processes_write_the_same_bytes(tmp_path, standardize, backend):
    is_new = (standardize, backend) == ("center", "torch")  # which has another seed of Python's hashes
    run(DISCOVER, tmp_path / "one", standardize, backend, is_new=is_new)
    run(DISCOVER, tmp_path / "two", standardize, backend, is_new=False)
    for family in FAMILIES:
        for file in FILES:
            one, two = ((tmp_path / name / family / file).read_bytes() for name in ("one", "two"))
            assert one == two


def test_another_seed_or_text_gives_another_template(tokenizer, rows, tmp_path):
    texts = [row["prompt"] + row["completion"] for row in rows]
    settings = {"ica_components": 3, "ica_rank": 16, "ica_max_length": 32}
    for name, chosen, seed in (("a", texts, 0), ("b", texts[:-1], 0), ("c", texts, 1)):
        config = FunctionalNetworkConfig(ica_seed=seed, ica_reservoir=50, **settings)
        discover_networks(tiny_model("llama"), tokenizer, chosen, config).save_pretrained(tmp_path / name)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in "abc"]
    assert configs[0]["calibration"] != configs[1]["calibration"]
    tensors = {(tmp_path / name / "template.safetensors").read_bytes() for name in "abc"}
    assert len(tensors) == 3


@pytest.mark.slow
def test_peak_memory_at_16000_tokens_is_that_at_4000():
    small, large = (json.loads(run(MEMORY, tokens).splitlines()[-1])["peak"] for tokens in (4_000, 16_000))
    assert large < 1.05 * small
