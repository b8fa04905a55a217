"""Continual learning: one task after another, and what each did to the others."""

from ..lazy import lazy_names


__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "ContinualStudy": "study",
        "Plan": "plan",
        "ScoreMatrix": "transfer",
        "Stage": "plan",
        "Task": "tasks",
        "TaskConfig": "task_config",
        "Transfer": "transfer",
        "Way": "plan",
    },
)
