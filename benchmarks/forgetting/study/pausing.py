"""Pause: a study waits while a file exists, between cells and between the steps of one."""

import time
from collections.abc import Callable
from pathlib import Path

from transformers import TrainerCallback


_SECONDS = 2.0


class Pause(TrainerCallback):
    """Waits while a file exists.

    Args:
        path: the file; `None` never waits.
        say: is told when the waiting begins and ends.
        seconds: between two looks.
    """

    def __init__(self, path: Path | None, *, say: Callable[[str], None], seconds: float = _SECONDS) -> None:
        self.path = path
        self.say = say
        self.seconds = seconds

    def wait(self) -> None:
        """Return when the file is gone."""
        if self.path is None or not self.path.exists():
            return
        self.say(f"paused while {self.path} exists")
        while self.path.exists():
            time.sleep(self.seconds)
        self.say("goes on")

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.wait()

    def on_prediction_step(self, args, state, control, **kwargs) -> None:
        self.wait()
