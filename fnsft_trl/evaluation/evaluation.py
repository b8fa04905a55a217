"""evaluate_model: the scores of one model on rows, with what each row gives to them."""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.cells import UnusableRow
from ..data.choices import ChoiceFormat, check_choices, chosen_choice_format, find_choice_format, read_choices
from ..data.left_out import LeftOut
from ..errors import FNSFTError
from ..fields import checked
from ..neurons.sites import base_model
from .choices import choice_measures, score_choices
from .generation import check_generates, check_scores_of_text, generate_answers, text_measures
from .measures import Measure
from .metrics import score_rows, scored_bytes
from .rows import EvaluationRow, RowReader, check_rows, prompt_format, read_rows
from .settings import EvaluationConfig
from .share import ALONE, Share


_LONGEST = 2048
_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx")


@dataclass(frozen=True)
class EvaluationData:
    """
    Rows to score.

    Attributes:
        name (`str`): of the data.
        rows (`Sequence[Mapping]`): a dataset, or a list, in any format that `fnsft train` reads, or of multiple-choice
            questions.
        is_converted (`bool`): whether they are as SFTTrainer is given them in Python, where a prompt of text is no
            turn of a conversation.
        numbers (`Sequence[int]`, *optional*): of the rows in their dataset; from 0 by default.
    """

    name: str
    rows: Sequence[Mapping]
    is_converted: bool = False
    numbers: Sequence[int] | None = None

    def sampled(self, count: int | None, seed: int) -> "EvaluationData":
        """So many of the rows, by a seed, in their order."""
        if count is None or count >= len(self.rows):
            return self
        numbers = sorted(random.Random(seed).sample(range(len(self.rows)), count))
        return EvaluationData(self.name, [self.rows[number] for number in numbers], self.is_converted, numbers)

    @property
    def columns(self) -> list[str]:
        """The names of all columns."""
        if isinstance(self.rows, Dataset):
            return self.rows.column_names
        return list(dict.fromkeys(column for row in self.rows for column in row))

    @property
    def sha256(self) -> str:
        """SHA-256 of the rows."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps(dict(row), sort_keys=True, default=str).encode() + b"\n")
        return digest.hexdigest()

    def choice_format(self, config: EvaluationConfig) -> ChoiceFormat | None:
        """How multiple-choice questions are named in the rows; `None` if they hold none.

        Raises:
            FNSFTError: the columns that are asked for are not there.
        """
        if config.columns is not None:
            return chosen_choice_format(config.columns, self.columns)
        return None if self.is_converted else find_choice_format(self.columns)


@dataclass
class ModelScores:
    """
    The scores of one model.

    Attributes:
        measures (`dict[str, Measure]`): `data/measure` -> score.
        about (`dict[str, dict]`): name of the data -> rows, tokens and what was left out, as JSON values.
        rows (`dict[str, list[dict]]`): name of the data -> for each row its number, its scores and the answer.
    """

    measures: dict[str, Measure] = field(default_factory=dict)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Values and counts, as JSON values."""
        return {"scores": {name: measure.to_dict() for name, measure in self.measures.items()}, "data": self.about}


def evaluate_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: Sequence[EvaluationData],
    config: EvaluationConfig | None = None,
    *,
    share: Share = ALONE,
) -> ModelScores:
    """
    Score a model on rows, as they were trained: rendered by its chat template and tokenised as SFTTrainer does it.

    Forward masks that are on the model stay on.

    Args:
        model: a causal language model, plain or with an adapter.
        tokenizer: its tokenizer; it is not changed.
        data: the rows.
        config: how they are read and scored.
        share: the part of this process, if there are several.

    Returns:
        Of text: `perplexity` and `bits_per_byte`. Of rows with answers: `exact_match` (the whole answer, its end
        included, is the greedy one), `nll` (of the answer, nats) and `perplexity` (of the tokens that count in
        training). With `generate` also `generated_exact_match`, `bleu`, `rouge1`, `rouge2`, `rougeL`. Of
        multiple-choice questions: `acc`, `acc_norm`, `acc_bytes`.

    Raises:
        FNSFTError: rows that cannot be read, none that can be scored, or a model that cannot answer.
    """
    config = checked(config, EvaluationConfig, "config") or EvaluationConfig()
    _check_given(model, tokenizer, data)
    scores = ModelScores()
    if config.generate:
        check_scores_of_text()
        check_generates(model, tokenizer)
    length = config.max_length or min(_positions(model), _LONGEST)
    for part in data:
        part = part.sampled(config.max_samples, config.seed)
        if (form := part.choice_format(config)) is not None:
            _score_choices(model, tokenizer, part, form, config, length, share, scores)
        else:
            _score_rows(model, tokenizer, part, config, length, share, scores)
    return scores


def _check_given(model, tokenizer, data) -> None:
    if not isinstance(base_model(model), PreTrainedModel):
        raise FNSFTError(f"the model is a {type(model).__name__}; expected one of transformers")
    if not callable(tokenizer):
        raise FNSFTError(f"the tokenizer is a {type(tokenizer).__name__}; expected that of the model, loaded")
    parts = data if isinstance(data, Sequence) else [data]
    if wrong := [part for part in parts if not isinstance(part, EvaluationData)]:
        raise FNSFTError(
            f"data holds a {type(wrong[0]).__name__}; expected a list of EvaluationData, each with a name and its rows"
        )
    if not isinstance(data, Sequence):
        raise FNSFTError("data is one EvaluationData; expected a list of them")


def check_data(part: EvaluationData, tokenizer, config: EvaluationConfig) -> None:
    """See, without a model, that one of the rows can be scored.

    Raises:
        FNSFTError: none can, or the tokenizer cannot have the prompt format.
    """
    if (form := part.choice_format(config)) is not None:
        check_choices(part.rows, form, prompt=config.choice_prompt, name=part.name)
    else:
        check_rows(part.rows, row_reader(tokenizer, config), columns=config.columns, name=part.name)


def row_reader(tokenizer, config: EvaluationConfig, max_length: int | None = None) -> RowReader:
    """What reads rows by a tokenizer with the prompt format that a config asks for.

    Raises:
        FNSFTError: the tokenizer cannot have it.
    """
    rendering = prompt_format(tokenizer, config.template_format, config.prompt_template)
    return RowReader(rendering, assistant_only_loss=config.assistant_only_loss, max_length=max_length)


def _positions(model: nn.Module) -> int:
    config = model.config.get_text_config()
    return next((config.to_dict()[name] for name in _POSITIONS if config.to_dict().get(name)), _LONGEST)


def _add(
    scores: ModelScores,
    part: EvaluationData,
    measures: dict[str, Measure],
    left_out: LeftOut,
    texts: dict[int, dict[str, str]],
    **about,
) -> None:
    """Note the measures of one part of the data, for all rows and for each, with its texts."""
    scores.measures |= {f"{part.name}/{name}": measure for name, measure in measures.items()}
    counts = {"rows": len(part.rows), "scored": len(part.rows) - left_out.count, "left_out": left_out.reasons}
    scores.about[part.name] = counts | about | {"sha256": part.sha256}
    found: dict[int, dict[str, Any]] = {}
    for name, measure in measures.items():
        for number, value in zip(measure.numbers, measure.per_row, strict=True):
            in_dataset = number if part.numbers is None else part.numbers[number]
            found.setdefault(number, {"row": in_dataset})[name] = value
    scores.rows[part.name] = [found[number] | texts.get(number, {}) for number in sorted(found)]


def _score_rows(model, tokenizer, part, config: EvaluationConfig, length: int, share: Share, scores: ModelScores):
    reader = row_reader(tokenizer, config, length)
    if part.is_converted:
        rows, left_out = _converted(part, reader)
    else:
        rows, left_out = read_rows(part.rows, reader, columns=config.columns, name=part.name)
    of_rows = score_rows(
        model, rows, max_length=length, batch_size=config.batch_size, share=share, name=f"{part.name}: likelihood"
    )
    numbers = tuple(row.number for row in rows)
    nll, tokens = [score.nll for score in of_rows], [score.tokens for score in of_rows]
    measures = {"perplexity": Measure.of_sums(nll, tokens, numbers, rises=False, form="perplexity")}
    answered = [place for place, row in enumerate(rows) if row.answer is not None]
    about = {"tokens": sum(tokens)}
    if answered:
        with_answer = [numbers[place] for place in answered]
        exact = [float(of_rows[place].is_exact) for place in answered]
        of_answers = [of_rows[place].answer_nll for place in answered]
        first = {"exact_match": Measure.of_rows(exact, with_answer, rises=True)}
        first["nll"] = Measure.of_rows(of_answers, with_answer, rises=False)
        measures = first | measures
    else:
        sizes = [scored_bytes(row, reader.tokenizer, length) for row in rows]
        measures["bits_per_byte"] = Measure.of_sums(nll, sizes, numbers, rises=False, form="bits")
    answers = {}
    if config.generate and answered:
        answers = _generate(model, tokenizer, [rows[place] for place in answered], part, config, share)
        texts = [answer.text for answer in answers.values()]
        measures |= text_measures(texts, [rows[place].reference for place in answered], list(answers))
        about["answers_cut"] = sum(answer.is_cut for answer in answers.values())
    texts = {
        row.number: {"expected": row.reference, "answer": answers[row.number].text}
        for row in rows
        if row.number in answers
    }
    _add(scores, part, measures, left_out, texts, **about)


def _converted(part: EvaluationData, reader: RowReader) -> tuple[list[EvaluationRow], LeftOut]:
    left_out, rows = LeftOut(part.name, "score"), []
    for number, row in enumerate(part.rows):
        try:
            rows.append(reader.read(row, number))
        except UnusableRow as reason:
            left_out.add(number, reason)
    left_out.check(len(part.rows))
    return rows, left_out


def _generate(model, tokenizer, rows: list[EvaluationRow], part: EvaluationData, config: EvaluationConfig, share):
    answers = generate_answers(
        model,
        tokenizer,
        [row.prompt for row in rows],
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        share=share,
        name=f"{part.name}: answers",
    )
    return {row.number: answer for row, answer in zip(rows, answers, strict=True)}


def _score_choices(model, tokenizer, part, form, config: EvaluationConfig, length: int, share, scores: ModelScores):
    rows, left_out = read_choices(part.rows, form, prompt=config.choice_prompt, name=part.name)
    likelihoods = score_choices(
        model,
        tokenizer,
        rows,
        apply_chat_template=config.apply_chat_template,
        max_length=length,
        batch_size=config.batch_size,
        share=share,
        name=f"{part.name}: choices",
    )
    _add(scores, part, choice_measures(rows, likelihoods), left_out, {})
