"""Generated answers, greedy and in batches, and how near they come to the expected ones: exact match, BLEU, ROUGE."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessor

from ..compat.accelerate import input_device
from ..errors import FNSFTError
from ..finite import check_finite
from .measures import Measure
from .metrics import evaluating
from .share import ALONE, Share


ROUGE = ("rouge1", "rouge2", "rougeL")

# Settings under which the most likely token is taken, whatever the model's own configuration says.
_GREEDY = {
    **{"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0},
    **{"encoder_no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0, "num_return_sequences": 1},
    **{"temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0, "use_cache": True},
    **{"renormalize_logits": False, "remove_invalid_values": False, "diversity_penalty": 0.0},
}


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    Attributes:
        text (`str`): without special tokens.
        is_cut (`bool`): whether it did not end by itself.
    """

    text: str
    is_cut: bool


class OnlyNumbers(LogitsProcessor):
    """Refuses scores of a next token without a largest one, of which decoding would take any.

    Raises:
        FNSFTError: the largest score is NaN or infinite.
    """

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        check_finite(scores.amax(-1).tolist(), "scores of the next token of an answer")
        return scores


def check_scores_of_text() -> None:
    """Check that generated answers can be scored.

    Raises:
        FNSFTError: sacrebleu or rouge-score is not installed.
    """
    for module, package in (("sacrebleu", "sacrebleu"), ("rouge_score", "rouge-score")):
        if find_spec(module) is None:
            raise FNSFTError(f"generated answers need {package}; run: python -m pip install 'fnsft-trl[eval]'")


def check_generates(model: nn.Module, tokenizer, name: str = "the model") -> None:
    """Check that a model can answer.

    Raises:
        FNSFTError: it generates no text, or nothing would end an answer.
    """
    if not model.can_generate() or model.generation_config is None:
        raise FNSFTError(
            f"{name} has no generation config: a {type(model).__name__} generates no text; give a causal language "
            "model, or drop generate"
        )
    if not _ends(model, tokenizer):
        raise FNSFTError(
            f"{name} has no EOS token, in its generation config or its tokenizer, so no answer would end; set "
            "eos_token_id in its generation_config.json, or drop generate"
        )


def _ends(model: nn.Module, tokenizer) -> list[int]:
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return sorted({token for token in (*own, tokenizer.eos_token_id) if token is not None})


def generate_answers(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    share: Share = ALONE,
    name: str = "answers",
) -> list[Answer]:
    """Answer prompts by greedy decoding, in batches padded on the left.

    An answer ends at the EOS token of the tokenizer, with which training ends it, or at one of the model's own.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompts: token ids.
        max_new_tokens: the longest answer.
        batch_size: prompts in a batch.
        share: the part of this process.
        name: of the work, beside the progress.

    Raises:
        FNSFTError: the model generates no text, or nothing would end an answer; or it predicts NaN.
    """
    check_generates(model, tokenizer)
    ends = _ends(model, tokenizer)
    padding = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    config = GenerationConfig(
        **_GREEDY, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=padding, bos_token_id=None
    )
    device = input_device(model)

    def work(numbers: list[int]) -> list[Answer]:
        batch = [prompts[number] for number in numbers]
        width = max(map(len, batch))
        ids = torch.tensor([[padding] * (width - len(prompt)) + list(prompt) for prompt in batch], device=device)
        present = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch], device=device)
        made = model.generate(
            input_ids=ids, attention_mask=present, generation_config=config, logits_processor=[OnlyNumbers()]
        )
        return [_answer(tokens, ends, tokenizer) for tokens in made[:, width:].tolist()]

    with evaluating(model):
        lengths = [len(prompt) for prompt in prompts]
        return share.in_batches(work, lengths, batch_size=batch_size, name=name)


def _answer(tokens: list[int], ends: list[int], tokenizer) -> Answer:
    place = next((place for place, token in enumerate(tokens) if token in ends), None)
    return Answer(tokenizer.decode(tokens[:place], skip_special_tokens=True), place is None)


def text_measures(answers: Sequence[str], references: Sequence[str], numbers: Sequence[int]) -> dict[str, Measure]:
    """How near answers come to the expected ones.

    Both are compared without white space around them. `generated_exact_match` is the share of equal ones. `bleu` is
    that of a corpus as sacrebleu has it by default, from 0 to 100. `rouge1`, `rouge2` and `rougeL` are F-measures of
    rouge-score with its stemmer, means over rows, from 0 to 1.

    Args:
        answers: what the model answered, one for each row.
        references: what was expected.
        numbers: of the rows.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    pairs = [(answer.strip(), reference.strip()) for answer, reference in zip(answers, references, strict=True)]
    bleu, rouge = BLEU(), RougeScorer(list(ROUGE), use_stemmer=True)
    counts, f_measures = [], {name: [] for name in ROUGE}
    for answer, reference in pairs:
        of_row = bleu.corpus_score([answer], [[reference]])
        counts.append([*of_row.counts, *of_row.totals, of_row.sys_len, of_row.ref_len])
        for name, score in rouge.score(reference, answer).items():
            f_measures[name].append(score.fmeasure)
    measures = {
        "generated_exact_match": Measure.of_rows([float(a == b) for a, b in pairs], numbers, rises=True),
        "bleu": Measure("bleu", torch.tensor(counts, dtype=torch.float64), tuple(numbers), rises=True),
    }
    return measures | {name: Measure.of_rows(values, numbers, rises=True) for name, values in f_measures.items()}
