"""Measures of what was learnt and of what was forgotten."""

from ..lazy import lazy_names


__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "RetentionConfig": "config",
        "EvaluationConfig": "settings",
        "EvaluationData": "evaluation",
        "ModelScores": "evaluation",
        "evaluate_model": "evaluation",
        "EvaluatedModel": "evaluated",
    },
)
