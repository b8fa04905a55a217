"""Ranks: of several processes that wait for each other, one that fails tells the others."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from .errors import FNSFTError


_OF_BACKENDS = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "ncclRemoteError")


class Ranks:
    """The processes of a launch, in work that each does by itself between points where all meet.

    At such a point all of them call [`Ranks.meet`]; one that fails on the way calls it too, within [`Ranks.together`],
    so that nobody waits for it.

    Attributes:
        index (`int`), count (`int`): this is process `index` of `count`.
    """

    def __init__(self) -> None:
        is_launch = dist.is_available() and dist.is_initialized()
        self.index, self.count = (dist.get_rank(), dist.get_world_size()) if is_launch else (0, 1)
        self._has_failed = False

    def meet(self, error: Exception | None = None) -> None:
        """Wait for all processes, and raise on all of them what one has failed with.

        Args:
            error: what this one has failed with; it is raised here as it is.

        Raises:
            FNSFTError: another one has failed; with what it said.
        """
        if self.count > 1 and not self._has_failed:
            told: list = [None] * self.count
            dist.all_gather_object(told, error and (isinstance(error, FNSFTError), _in_words(error)))
            first = next((number for number, failed in enumerate(told) if failed), None)
            self._has_failed = first is not None
            if first is not None and error is None:
                is_known, words = told[first]
                raise FNSFTError(words if is_known else f"process {first} of {self.count} failed: {words}")
        if error is not None:
            raise error

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work of this process: what it fails with reaches the others where they meet next."""
        try:
            yield
        except Exception as error:
            self.meet(error)
            raise


@contextmanager
def lost_processes() -> Iterator[None]:
    """Say in one line that another process of the launch is gone, in the place of what the backend says of it.

    Raises:
        FNSFTError: in the place of the error with which a backend ends the wait for a process that was killed.
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or any(words in str(error) for words in _OF_BACKENDS)):
            raise
        raise FNSFTError(
            f"another process of this launch has ended ({first_words(error)}); what it printed says why, or it was "
            "killed, perhaps for lack of memory; start all of them again, and they go on from what was saved"
        ) from error


def first_words(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _in_words(error: Exception) -> str:
    told = " ".join(str(error).split())
    return told if isinstance(error, FNSFTError) else f"{type(error).__name__}: {told}"
