"""Rows after demonstrations: what a model makes of a task that it is shown and not trained on."""

import random
from collections.abc import Sequence
from dataclasses import replace

from ..errors import FNSFTError
from .rows import EvaluationRow


def with_demonstrations(
    rows: Sequence[EvaluationRow], demonstrations: Sequence[EvaluationRow], *, count: int = 5, seed: int = 0
) -> list[EvaluationRow]:
    """Rows that follow some others in one sequence, each as it is trained, its end included.

    Only the tokens of the row itself are scored, so that the loss is that of the same tokens without demonstrations.

    Args:
        rows: to be scored.
        demonstrations: rows to draw from, anew for each row, without replacement; no row is shown before itself.
        count: how many precede a row.
        seed: of the draws.

    Raises:
        FNSFTError: there are too few.
    """
    draw, found = random.Random(seed), []
    for row in rows:
        others = [shown for shown in demonstrations if shown.ids != row.ids]
        if len(others) < count:
            raise FNSFTError(f"{count} demonstrations are drawn, and there are {len(others)} rows; give more rows")
        before = [token for shown in draw.sample(others, count) for token in shown.ids]
        answer = None if row.answer is None else (row.answer[0] + len(before), row.answer[1] + len(before))
        found.append(
            replace(
                row,
                ids=before + row.ids,
                learnt=[False] * len(before) + row.learnt,
                answer=answer,
                prompt=before + row.prompt,
            )
        )
    return found
