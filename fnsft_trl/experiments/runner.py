"""run_experiment: every arm with every seed, resumable at any point, several at once if asked."""

import gc
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..errors import FNSFTError
from ..template.template import FunctionalNetworkTemplate
from ..writing import one_writer
from .arms import Arm, train_and_score
from .cells import Cells


CELLS_FILE = "cells.jsonl"
TEMPLATES = "templates"
ARMS = "arms"

_LOCK = ".experiment.lock"
_MARK = ".cell"  # in the folder of a cell that was begun: all in it is of this package
_DEVICES = "CUDA_VISIBLE_DEVICES"


def run_experiment(
    arms: Sequence[Arm],
    seeds: Sequence[int],
    directory: str | os.PathLike,
    *,
    jobs: int = 1,
    restart: bool = False,
    also: Callable | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Train and score every arm with every seed; what is finished already is not done again.

    Each finished cell is one line of `cells.jsonl`; models are in `arms/NAME/seed-N`, the templates that arms share in
    `templates`. Killed at any point, the next call goes on where this one was: a cell that was not finished begins
    anew, so that its result is that of an uninterrupted one.

    Args:
        arms: with different names.
        seeds: of the training, each once.
        directory: where all goes; an older experiment in it goes on.
        jobs: processes that train at once, each on an accelerator of its own where there are several.
        restart: throw away the finished cells of arms that have changed, and train these anew.
        also: as [`train_and_score`] takes it; a function of a module where there are several jobs.
        say: is told what is done.

    Returns:
        The cells, arm by arm, seeds in their order.

    Raises:
        FNSFTError: an arm has changed since one of its cells was finished; another process is at work in the
            directory; or some cells failed, after all others were finished.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with one_writer(directory / _LOCK, waits=False):
            return _Experiment(arms, seeds, directory, also, say).run(jobs=jobs, restart=restart)
    except TimeoutError as error:
        raise FNSFTError(
            f"another process runs an experiment in {directory}; wait for it, or choose another output directory"
        ) from error


@dataclass(frozen=True)
class _Task:
    """What one process does at a time: a discovery, or a cell."""

    title: str
    do: Callable[..., Any]
    arguments: tuple

    def __call__(self) -> Any:
        return self.do(*self.arguments)


class _Experiment:
    """One call of `run_experiment`."""

    def __init__(self, arms: Sequence[Arm], seeds: Sequence[int], directory: Path, also, say) -> None:
        self.arms, self.seeds, self.directory, self.also, self.say = arms, seeds, directory, also, say
        self.cells = Cells(directory / CELLS_FILE)

    def run(self, *, jobs: int, restart: bool) -> list[dict[str, Any]]:
        """Do what is not finished, and give all cells."""
        changed = self.cells.changed(self.arms)
        if changed and not restart:
            (name, seed), what = next(iter(changed.items()))
            raise FNSFTError(
                f"{self.cells.path} holds the finished arm {name} (seed {seed}), which has changed since: {what}; put "
                "it back, choose another output directory, or train what has changed anew (restart)"
            )
        if changed:
            self.say(f"trained anew, since they have changed: {', '.join(sorted({name for name, _ in changed}))}")
            self.cells.drop(list(changed))
        every = [(arm, seed) for arm in self.arms for seed in self.seeds]
        waiting = [(arm, seed) for arm, seed in every if (arm.name, seed) not in self.cells.found]
        if len(waiting) < len(every):
            self.say(f"{len(every) - len(waiting)} of {len(every)} cells are finished already")
        discoveries: dict[Path, tuple[Arm, int]] = {}
        for arm, seed in waiting:
            if arm.discover is not None:
                discoveries.setdefault(self._template(arm, seed), (arm, seed))
        missing = [(path, *of) for path, of in discoveries.items() if not _is_template(path)]
        finding = [_Task(f"discovery for {arm.name}", _discover, (arm, seed, path)) for path, arm, seed in missing]
        training = [
            _Task(f"{arm.name}, seed {seed}", _train, (arm, seed, *self._places(arm, seed), self.also))
            for arm, seed in waiting
        ]
        failures = self._do(finding, jobs, "discoveries") or self._do(training, jobs, "cells")
        if failures:
            raise FNSFTError(
                f"{len(failures)} of {len(finding) + len(training)} failed, and what was finished is kept. "
                f"{'; '.join(failures)}"
            )
        return [self.cells.found[arm.name, seed] for arm, seed in every]

    def _do(self, tasks: Sequence[_Task], jobs: int, what: str) -> list[str]:
        """Do tasks, keep the cells that they give, and say which have failed."""
        failures: list[str] = []
        started = time.monotonic()
        with tqdm(total=len(tasks), desc=what, unit=" " + what, disable=not tasks) as bar:
            for number, (task, result) in enumerate(_each(tasks, jobs, self.say), 1):
                bar.update()
                if isinstance(result, FNSFTError):
                    failures.append(f"{task.title}: {result}")
                elif result is not None:
                    self.cells.add(result)
                left = (time.monotonic() - started) / number * (len(tasks) - number)
                self.say(f"{number} of {len(tasks)} {what}: {task.title}; about {_duration(left)} left")
        return failures

    def _template(self, arm: Arm, seed: int) -> Path:
        return self.directory / TEMPLATES / (arm.networks + (f"-seed-{seed}" if arm.networks_by_seed else ""))

    def _places(self, arm: Arm, seed: int) -> tuple[Path, Path | None]:
        template = self._template(arm, seed) if arm.discover is not None else None
        return self.directory / ARMS / arm.name / f"seed-{seed}", template


def _is_template(path: Path) -> bool:
    """Whether a whole template is there."""
    try:
        FunctionalNetworkTemplate.from_pretrained(path)
    except FNSFTError:
        return False
    return True


def _discover(arm: Arm, seed: int, path: Path) -> None:
    arm.discover(seed, path).save_pretrained(path)


def _train(arm: Arm, seed: int, place: Path, template: Path | None, also) -> dict[str, Any]:
    """Train a cell in an empty folder."""
    if place.exists() and any(place.iterdir()) and not (place / _MARK).exists():
        raise FNSFTError(f"{place} holds files that no experiment has written; choose another output directory")
    if place.exists():
        shutil.rmtree(place)
    place.mkdir(parents=True)
    (place / _MARK).touch()
    return train_and_score(arm, seed, place, template=template, also=also)


def _each(tasks: Sequence[_Task], jobs: int, say: Callable[[str], None]) -> Iterator[tuple[_Task, Any]]:
    """The tasks as they are done, each with its result or with the FNSFTError that it ended in."""
    if jobs == 1 or len(tasks) < 2:
        for task in tasks:
            say(f"begins: {task.title}")
            yield task, _result(task)
        return
    context = get_context("spawn")
    numbers = context.Queue()
    for number in range(jobs):
        numbers.put(number)
    threads = max(1, torch.get_num_threads() // jobs)
    heard, held = context.Pipe(duplex=False)
    with ProcessPoolExecutor(jobs, context, initializer=_begin, initargs=(numbers, threads, heard)) as pool:
        with _interrupts_wait():
            running = {pool.submit(_result, task): task for task in tasks}
        try:
            for done in as_completed(running):
                yield running[done], _unbroken(done)
        except BaseException:  # the pool would wait for all tasks, those that have not begun among them
            held.close()
            raise


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Let interrupts wait, in this process till the end and in those that it starts until they [`_begin`]: until then
    one would end them with a traceback."""
    if os.name == "nt":  # which has no masks of signals
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _unbroken(done) -> Any:
    try:
        return done.result()
    except BrokenProcessPool as error:
        raise FNSFTError(
            "a process of the experiment was killed, perhaps for lack of memory; what was finished is kept: run it "
            "again, with fewer jobs"
        ) from error


def _result(task: _Task) -> Any:
    try:
        return task()
    except FNSFTError as error:
        return error
    finally:  # a trainer and its callbacks hold each other
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _begin(numbers, threads: int, heard: connection.Connection) -> None:
    """Give a process its share of the machine, and end it when the one that began it gives up or ends."""
    threading.Thread(target=_end_with, args=(heard,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all processes, and the first one says so
    if os.name != "nt":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    visible = own_device(numbers.get(), os.environ.get(_DEVICES), torch.cuda.device_count())
    if visible is not None:
        os.environ[_DEVICES] = visible
    torch.set_num_threads(threads)


def _end_with(heard: connection.Connection) -> None:
    connection.wait([heard])  # nothing is ever sent
    os.kill(os.getpid(), signal.SIGTERM)


def own_device(number: int, visible: str | None, count: int) -> str | None:
    """Which accelerator a process may see, as `CUDA_VISIBLE_DEVICES` says it.

    Args:
        number: of the process.
        visible: what the variable says now.
        count: of accelerators that are seen.

    Returns:
        One of them in turn; `None` where there are not several.
    """
    if count < 2:
        return None
    names = visible.split(",") if visible else [str(device) for device in range(count)]
    return names[number % len(names)]


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
