"""On SmolLM2: what a LoRA forgot comes back and what it learnt stays, where scaling it down takes both."""

import json
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from fnsft_trl.cli import main
from fnsft_trl.data.embedded import embedded_model, question_routing, wikipedia_passages


STEPS, ROWS = 14, 5
DESKS = (" arithmetic", " science")  # two of them are learnt in so few steps


def trained(directory, rows):
    """A LoRA of plain PEFT, on the MLPs and the attention, after some steps."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    base = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype="float32")
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
    for step in range(STEPS):
        texts = [row["prompt"] + row["completion"] for row in rows[step * ROWS : (step + 1) * ROWS]]
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for row, given in enumerate(rows[step * ROWS : (step + 1) * ROWS]):
            labels[row, : len(tokenizer(given["prompt"])["input_ids"])] = -100
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@pytest.mark.slow
def test_nine_tenths_of_the_kl_go_within_5_percent_of_the_gain_and_scaling_keeps_more_of_it(tmp_path):
    train, test = (
        [row for row in rows if row["completion"] in DESKS] for rows in question_routing(6 * STEPS * ROWS, 30)
    )
    trained(tmp_path / "lora", train[: STEPS * ROWS])
    passages = [{"text": text} for text in wikipedia_passages("discovery")[:60]]
    for name, rows in (("task", test), ("wiki", passages)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["--keep", f"wiki={tmp_path / 'wiki.jsonl'}", "--keep_tokens", "384", "--score_tokens", "192"]
    words += ["--task", str(tmp_path / "task.jsonl"), "--template_format", "basic"]
    words += ["--prompt_template", "{instruction}{response}", "--leading", "8", "--scales", "0.5", "0.25"]
    assert main(["restore", str(tmp_path / "lora"), *words, "--output_dir", str(tmp_path / "restored")]) == 0
    found = json.loads((tmp_path / "restored" / "results.json").read_text())
    ways = {way["name"]: way for way in found["ways"]}
    scaled = [ways[name] for name in ("as trained", "scaled by 0.5", "scaled by 0.25")]
    as_trained, base = scaled[0], found["base"]
    chosen = ways[found["chosen"]]
    gain = base["task_loss"] - as_trained["task_loss"]
    assert gain > 3
    assert as_trained["mean_kl"] > 0.05
    assert chosen["mean_kl"] <= 0.1 * as_trained["mean_kl"]
    assert chosen["task_loss"] <= as_trained["task_loss"] + 0.05 * gain
    # Scaling alone, at the loss of the way that is compared: its ln KL is drawn from the points beside it.
    rival = sorted((way["task_loss"], math.log(way["mean_kl"])) for way in scaled)
    for way in (ways["off position 0, mean"], ways["off position 0, mean, 8 leading"]):
        assert way["task_loss"] < rival[-1][0]
        at_equal_loss = np.interp(way["task_loss"], *zip(*rival, strict=True))
        assert math.log(way["mean_kl"]) < at_equal_loss - math.log(2)
