"""How a verb ends before its time: interrupted, or asked to end. Free of torch."""

import os
import shlex
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class Ended(BaseException):
    """This process was asked to end (SIGTERM)."""


# What is raised where a signal comes; and its handler in a process that nobody has told otherwise.
_RAISED = {signal.SIGTERM: Ended, signal.SIGINT: KeyboardInterrupt}
_PLAIN = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}


@contextmanager
def ends_in_order() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that what is half written and what was started is taken away with it.

    Not in one of several processes, which wait for each other where no exception reaches them. Compiled code may put
    an error of its own in the place of the exception, as it does of that of an interrupt; then it is put back. An
    error of what was done to end, such as a full disk, stays one.
    """
    is_here = threading.current_thread() is threading.main_thread() and "RANK" not in os.environ
    taken = [number for number, plain in _PLAIN.items() if is_here and signal.getsignal(number) == plain]
    process, asked = os.getpid(), []

    def end(number, frame):
        signal.signal(number, _PLAIN[number])
        if os.getpid() != process:  # a worker that was forked meanwhile
            os.kill(os.getpid(), number)
            return
        asked.append(number)
        raise _RAISED[number]

    for number in taken:
        signal.signal(number, end)
    try:
        yield
    except Exception as error:
        if asked and not _follows(error, _RAISED[asked[0]]):
            raise _RAISED[asked[0]] from error
        raise
    finally:
        for number in taken:
            signal.signal(number, _PLAIN[number])


def _follows(error: BaseException | None, raised: type[BaseException]) -> bool:
    """Whether an error came up while an exception of a kind was handled."""
    while error is not None and not isinstance(error, raised):
        error = error.__cause__ or error.__context__
    return error is not None


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
