"""What `fnsft train` keeps out of its log: the same line from every process, and from every call of every layer."""

import logging


_REPEATING = "bitsandbytes.autograd._functions"  # which says in every call of an 8-bit layer that it casts the input


class _Once(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether this message has not been logged yet."""
        message = record.getMessage()
        is_new = message not in self.said
        self.said.add(message)
        return is_new


def hush_repetitions(process_index: int) -> None:
    """Let this package warn in the first process only, and bitsandbytes say each thing once.

    Args:
        process_index: of this process.
    """
    if process_index > 0:
        logging.getLogger("fnsft_trl").setLevel(logging.ERROR)
    repeating = logging.getLogger(_REPEATING)
    if not any(isinstance(kept, _Once) for kept in repeating.filters):
        repeating.addFilter(_Once())
