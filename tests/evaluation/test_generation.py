"""Generated answers: greedy, the same in a batch as alone, and ended by the right token."""

import pytest
import torch
from helpers import tiny_model, tiny_rows
from transformers import GenerationConfig

from fnsft_trl import FNSFTError
from fnsft_trl.evaluation.generation import check_generates, generate_answers
from fnsft_trl.evaluation.metrics import score_rows
from fnsft_trl.evaluation.rows import EvaluationRow


PROMPTS = [f"Say {' '.join(row['prompt'] for row in tiny_rows(count, seed=count))}" for count in (1, 3, 2, 1, 2)]


def greedy(model, prompt: list[int], ends: list[int], count: int) -> list[int]:
    """The most likely tokens, one after the other."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count:
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_an_answer_in_a_batch_is_the_greedy_one(family, batch_size, tokenizer):
    model = tiny_model(family)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.7, top_k=3, repetition_penalty=1.9, no_repeat_ngram_size=2, min_new_tokens=4
    )
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    with torch.no_grad():
        model.get_output_embeddings().weight[tokenizer.eos_token_id] *= 3  # so that some end by themselves
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens=12, batch_size=batch_size)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = greedy(model, prompt, [tokenizer.eos_token_id], 12)
        is_cut = expected[-1] != tokenizer.eos_token_id
        text = tokenizer.decode(expected if is_cut else expected[:-1], skip_special_tokens=True)
        assert (answer.text, answer.is_cut) == (text, is_cut)


def test_an_exact_match_that_is_scored_is_one_that_is_generated(tokenizer):
    model = tiny_model("llama")
    rows, generated = [], []
    for number, text in enumerate(PROMPTS):
        prompt = tokenizer(text)["input_ids"]
        answer = greedy(model, prompt, [], 4)
        if number % 2:
            answer[number % 4] = (answer[number % 4] + 1) % 100 + 3
        ids = prompt + answer
        rows.append(
            EvaluationRow(number, ids, [False] * len(prompt) + [True] * 4, (len(prompt), len(ids)), prompt, "")
        )
        generated.append(answer == greedy(model, prompt, [], 4))
    assert [score.is_exact for score in score_rows(model, rows, batch_size=2)] == generated
    assert set(generated) == {True, False}


def test_a_model_that_cannot_answer_is_refused(tokenizer):
    model = tiny_model("llama")
    check_generates(model, tokenizer)
    model.generation_config.eos_token_id = None
    check_generates(model, tokenizer)
    tokenizer = type("NoEnd", (), {"eos_token_id": None})()
    with pytest.raises(FNSFTError, match="the model has no EOS token, in its generation config or its tokenizer"):
        check_generates(model, tokenizer)
    with pytest.raises(FNSFTError, match="that has no generation config: a LlamaModel generates no text"):
        check_generates(model.model, tokenizer, "that")
