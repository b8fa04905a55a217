import pytest
import torch
from datasets import Dataset
from helpers import VOCABULARY, sft_config, tiny_model
from trl import SFTTrainer

from fnsft_trl import FNSFTError
from fnsft_trl.evaluation.metrics import score_completions, score_tokens
from fnsft_trl.evaluation.retention import RetentionText


def test_token_scores_are_the_models_own_loss(family):
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in (9, 4, 12, 7, 5)]
    scores = list(score_tokens(model, sequences, [1] * 5, batch_size=2))
    for ids, score in zip(sequences, scores, strict=True):
        ids = torch.tensor([ids])
        with torch.no_grad():
            out = model(ids, labels=ids)
        assert score.nll.mean() == pytest.approx(out.loss.item(), rel=1e-4)
        assert torch.equal(score.is_top1, out.logits[0, :-1].argmax(-1) == ids[0, 1:])


def test_exact_match_is_greedy_decoding(tokenizer):
    model = tiny_model("llama")
    prompts = ["Say ba:", "Say ko ri:", "Say tensu:", "Say mo:"]
    rows = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
        rows.append({"prompt": ids[0].tolist(), "greedy": out[0].tolist()})
    scored = [(row["greedy"], len(row["prompt"])) for row in rows]
    right = list(score_tokens(model, [ids for ids, _ in scored], [first for _, first in scored]))
    assert all(score.is_top1.all() for score in right)
    wrong = [[*ids[:-1], (ids[-1] + 1) % VOCABULARY] for ids, _ in scored]
    assert not any(score.is_top1.all() for score in score_tokens(model, wrong, [first for _, first in scored]))


def test_completions_count_the_end_of_sequence(tokenizer):
    model = tiny_model("llama")
    rows = [{"prompt": "Say ba:", "completion": " ab."}, {"prompt": "Say ko:", "completion": " ok."}]
    scores = score_completions(model, tokenizer, rows)
    nll = 0
    for row in rows:
        ids = torch.tensor([tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]])
        labels = ids.clone()
        labels[0, : len(tokenizer(row["prompt"])["input_ids"])] = -100
        with torch.no_grad():
            nll += model(ids, labels=labels).loss.item() * int((labels != -100).sum())
    assert scores.nll == pytest.approx(nll / 2, rel=1e-4)
    assert (scores.rows, scores.exact_match) == (2, 0.0)
    with pytest.raises(FNSFTError, match="no rows"):
        score_completions(model, tokenizer, [])


def test_completions_begin_where_the_loss_of_sft_trainer_does(tokenizer, tmp_path):
    model = tiny_model("llama")
    row = {"prompt": "Say t", "completion": "en."}  # one token at their border
    assert (
        tokenizer("Say t")["input_ids"] != tokenizer("Say ten.")["input_ids"][: len(tokenizer("Say t")["input_ids"])]
    )
    data = Dataset.from_list([row])
    trainer = SFTTrainer(model, sft_config(tmp_path), train_dataset=data, processing_class=tokenizer)
    ids, labels = (torch.tensor([trainer.train_dataset[0][column]]) for column in ("input_ids", "labels"))
    with torch.no_grad():
        nll = model.eval()(ids, labels=labels).loss.item() * int((labels != -100).sum())
    assert score_completions(model, tokenizer, [row]).nll == pytest.approx(nll, rel=1e-4)


def test_retention_scores_exactly_max_tokens(tokenizer, rows):
    texts = [row["prompt"] + row["completion"] for row in rows]
    text = RetentionText.from_texts(texts, tokenizer, max_tokens=100, max_length=16)
    assert text.tokens == 100 == sum(len(ids) - 1 for ids in text.sequences)
    model = tiny_model("llama").train()
    value = text.cross_entropy(model, batch_size=3)
    assert model.training
    assert value == pytest.approx(text.cross_entropy(model.eval(), batch_size=50), rel=1e-5)
    before, after = text.sequence_nll(model), text.sequence_nll(tiny_model("llama", seed=1))
    rise, low, high = text.rise(before, after)
    assert rise == pytest.approx(float((after - before).sum()) / 100)
    assert low < rise < high
    assert text.rise(before, before) == (0, 0, 0)
    assert RetentionText.from_texts(texts[1:], tokenizer, max_tokens=100).sha256 != text.sha256
    with pytest.raises(FNSFTError, match="no tokens to score"):
        RetentionText.from_texts(["b"], tokenizer)
