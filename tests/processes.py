"""Python processes for tests that need some, forked from one that has imported the libraries once.

An import of torch and TRL takes more than most of what such a process does. What has to start from nothing (which
modules are imported, which variables are read at import, how much memory is taken) is run by `subprocess` instead.
"""

import gc
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import types
from pathlib import Path


_CAN_FORK = "forkserver" in multiprocessing.get_all_start_methods()  # not on Windows, where each imports all
_SERVER = multiprocessing.get_context("forkserver" if _CAN_FORK else "spawn")
if _CAN_FORK:
    _SERVER.set_forkserver_preload(["fnsft_trl.cli.train", "fnsft_trl.training.trainer", "trl.trainer.sft_trainer"])


def _become(words: list[str], environment: dict[str, str], folder: str, files: list[str]) -> None:
    """What the forked process does: become `python WORDS`, with what it prints in two files."""
    for descriptor, file in enumerate(files, start=1):
        opened = os.open(file, os.O_WRONLY)
        os.dup2(opened, descriptor)
        os.close(opened)
    gc.freeze()  # what was imported stays: no collection has to look through it
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    first, *others = words
    if first == "-c":
        sys.argv = ["-c", *others[1:]]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(others[0], "<string>", "exec"), vars(sys.modules["__main__"]))
    elif first == "-m":
        sys.argv = others
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")


class Started:
    """A process that runs `python WORDS`, with the environment and the folder of now.

    Args:
        words: as on a command line, `-c CODE`, `-m MODULE` or a file first.
        variables (`dict[str, str]`, *optional*): more of its environment.
    """

    def __init__(self, *words: object, variables: dict[str, str] | None = None) -> None:
        self.words = [str(word) for word in words]
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name) / name for name in ("out", "err")]
        for file in self._files:
            file.touch()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(variables or {})}
        given = (self.words, environment, str(Path.cwd()), [str(file) for file in self._files])
        self.process = _SERVER.Process(target=_become, args=given)
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")  # which multiprocessing would run anew in the process
        try:
            self.process.start()
        finally:
            sys.modules["__main__"] = main

    def end(self, timeout: float = 600) -> subprocess.CompletedProcess:
        """Wait for its end, and give what it printed."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"{self.words[:3]} did not end: {self._files[1].read_text()}")
        printed = [file.read_text() for file in self._files]
        self._folder.cleanup()
        return subprocess.CompletedProcess(self.words, self.process.exitcode, *printed)


def run_python(*words: object, variables: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Run `python WORDS` to its end."""
    return Started(*words, variables=variables).end()


def start_processes(count: int, *words: object) -> list[Started]:
    """Start Python in `count` processes on the CPU that know of each other as under torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    together |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    ranks = [{**together, "RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {} for rank in range(count)]
    return [Started(*words, variables=variables) for variables in ranks]


def run_processes(count: int, *words: object) -> list[str]:
    """Run Python in processes that know of each other to their end; what each printed."""
    ended = [each.end() for each in start_processes(count, *words)]
    for each in ended:
        assert each.returncode == 0, each.stderr
    return [each.stdout for each in ended]
