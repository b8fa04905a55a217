"""The base's own answers to chat prompts, made once and kept beside the cells."""

import json
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from fnsft_trl.writing import written_whole

from .texts import chat_prompts


ANSWER = 48  # most tokens of an answer


def make_chat(model_path: str, path: Path, *, tokens: int) -> None:
    """Write answers, as rows with the whole conversation as `text`.

    Args:
        model_path: directory of the base.
        path: of the file.
        tokens: how many the conversations hold together, at least.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="float32").eval()
    rows, count = [], 0
    with tqdm(total=tokens, desc="the base's own answers", unit=" tokens", disable=None) as bar:
        for prompt in chat_prompts():
            turns = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, return_tensors="pt")
            with torch.no_grad():
                found = model.generate(**ids, do_sample=False, max_new_tokens=ANSWER, pad_token_id=0)[0]
            rows.append({"prompt": prompt, "text": tokenizer.decode(found)})
            count += len(found) - 1
            bar.update(len(found) - 1)
            if count >= tokens:
                break
    with written_whole(path) as scratch:
        scratch.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
