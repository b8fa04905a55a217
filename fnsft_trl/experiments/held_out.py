"""HeldOut: rows that were held out of the training, scored as they are trained."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from torch import nn

from ..data.cells import UnusableRow
from ..errors import FNSFTError
from ..evaluation.generation import generate_answers, text_measures
from ..evaluation.metrics import RowScores, score_rows
from ..evaluation.rows import EvaluationRow, RowReader


@dataclass
class HeldOut:
    """Rows as a trainer has prepared them to evaluate on: in its prompt format, cut where it cuts.

    Attributes:
        rows (`list[EvaluationRow]`): the rows.
        left_out (`int`): rows of which no token is learnt.
        sha256 (`str`): hash of their token ids, and of which of these are learnt.
        has_answers (`bool`): whether all are prompts with answers; if not, every token counts alike.
    """

    rows: list[EvaluationRow]
    left_out: int
    sha256: str
    has_answers: bool

    @classmethod
    def of(cls, dataset: Any, tokenizer) -> "HeldOut":
        """Take the rows of a prepared dataset.

        Args:
            dataset: with `input_ids` and perhaps `labels`.
            tokenizer: that they were tokenised with.

        Raises:
            FNSFTError: there are none, they are not tokenised, or they teach nothing.
        """
        if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:
            raise FNSFTError(
                "an arm has no evaluation dataset of rows that its trainer has tokenised; give it an eval_dataset of "
                "rows"
            )
        reader, rows, digest = RowReader(tokenizer), [], hashlib.sha256()
        for number, row in enumerate(dataset):
            try:
                found = reader.read(row, number)
            except UnusableRow:
                continue
            rows.append(found)
            digest.update(repr((found.ids, found.learnt)).encode())
        if not rows:
            raise FNSFTError(f"none of the {len(dataset)} rows to score holds a token that is learnt; give others")
        has_answers = all(row.answer is not None for row in rows)
        return cls(rows, len(dataset) - len(rows), digest.hexdigest(), has_answers)

    def score(self, model: nn.Module, *, batch_size: int) -> list[RowScores]:
        """Score the rows under a model, which is left in the mode that it was in.

        Args:
            model: a causal language model.
            batch_size: rows per forward pass.
        """
        return score_rows(model, self.rows, batch_size=batch_size)

    def nll(self, scores: Sequence[RowScores]) -> list[float]:
        """What is learnt of each row: negative log-likelihood of its answer, or of a text for each token, in nats."""
        return [row.answer_nll if self.has_answers else row.nll / row.tokens for row in scores]

    def summary(self, scores: Sequence[RowScores]) -> dict[str, float | None]:
        """`nll` (mean over rows of what is learnt of each), `perplexity` of all tokens that are learnt, and of answers
        `exact_match`: the share that is the greedy answer as a whole, its end included."""
        nll, count = self.nll(scores), len(scores)
        mean = math.fsum(row.nll for row in scores) / sum(row.tokens for row in scores)
        return {
            "nll": math.fsum(nll) / count,
            "perplexity": math.exp(min(mean, 700)),
            "exact_match": sum(row.is_exact for row in scores) / count if self.has_answers else None,
        }

    def answers(self, model: nn.Module, tokenizer, *, max_new_tokens: int, batch_size: int) -> dict[str, float]:
        """Let a model answer, and compare with the answers that are expected: BLEU, ROUGE and exact match.

        Raises:
            FNSFTError: the rows have no answers.
        """
        if not self.has_answers:
            raise FNSFTError(
                "the rows to score have no answers to generate; give prompts with answers, or drop generate"
            )
        answers = generate_answers(
            model,
            tokenizer,
            [row.prompt for row in self.rows],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
        numbers = [row.number for row in self.rows]
        found = text_measures([answer.text for answer in answers], [row.reference for row in self.rows], numbers)
        return {name: measure.value for name, measure in found.items()}
