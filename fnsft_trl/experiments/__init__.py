"""Experiments: arms that are trained and scored by one function, run over seeds, and compared."""

from ..lazy import lazy_names


__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "Arm": "arms",
        "train_and_score": "arms",
        "run_experiment": "runner",
        "compare_arms": "comparison",
    },
)
