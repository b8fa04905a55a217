"""How a verb ends before its time: interrupted, or asked to end. Free of torch."""

import os
import shlex
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class Ended(BaseException):
    """This process was asked to end (SIGTERM)."""


@contextmanager
def ends_in_order() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that what is half written and what was started is taken away with it.

    Not in one of several processes, which wait for each other where no exception reaches them.
    """
    is_here = threading.current_thread() is threading.main_thread() and "RANK" not in os.environ
    if not is_here or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    process = os.getpid()

    def end(number, frame):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getpid() != process:  # a worker that was forked meanwhile
            os.kill(os.getpid(), signal.SIGTERM)
            return
        raise Ended

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def command(verb: str, argv: Sequence[str], *more: str) -> str:
    """A command to go on with, as it can be copied: with some options in the place of what was given of them, and
    without a token."""
    dropped = {"--hub_token", *(part for part in more if part.startswith("--"))}
    kept, is_dropped = [], False
    for part in argv:
        if part.startswith("--"):
            is_dropped = part.partition("=")[0].replace("-", "_").replace("__", "--", 1) in dropped
        if not is_dropped:
            kept.append(part)
    return f"`fnsft {verb} {shlex.join([*kept, *more])}`"
