"""A capability by likelihood: commonsense questions of SIQA, which no text and no shift has."""

import random
from typing import Any

from fnsft_trl.data.choices import ChoiceRow
from fnsft_trl.evaluation.choices import choice_measures, score_choices

from .texts import data_rows


QUESTIONS = 60


def capability(trainer) -> dict[str, Any]:
    """Share of questions of which the right answer is the likeliest, by its likelihood for each character.

    Args:
        trainer: whose model answers.
    """
    rows = questions()
    likelihoods = score_choices(trainer.model, trainer.processing_class, rows)
    return {name: measure.value for name, measure in choice_measures(rows, likelihoods).items() if name == "acc_norm"}


def questions() -> list[ChoiceRow]:
    """Sixty questions, each with three answers."""
    found = []
    for number, row in enumerate(random.Random(0).sample(data_rows("SIQA", "test.jsonl"), QUESTIONS)):
        options = [line.partition(". ")[2] for line in row["options"].splitlines()]
        right = options.index(row["answer"].partition(". ")[2])
        question = f"{row['passage']}\nQuestion: {row['question']}\nAnswer:"
        found.append(ChoiceRow(number=number, question=question, choices=tuple(options), answer=right))
    return found
