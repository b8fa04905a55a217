"""What the commands keep out of their log: what libraries say to each other, and the same line again and again."""

import logging
import warnings

from ..compat.bitsandbytes import CAST_LOGGER, KERNEL_LOGGER


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


def hush_libraries() -> None:
    """Leave out notices that no user of a command can act on: TRL's own use of old names, an optional kernel."""
    warnings.filterwarnings("ignore", message=".* is deprecated and will be removed in v", category=FutureWarning)
    logging.getLogger(KERNEL_LOGGER).setLevel(logging.ERROR)


def hush_repetitions(process_index: int) -> None:
    """Let this package warn in the first process only, and bitsandbytes say each thing once.

    Args:
        process_index: of this process.
    """
    if process_index > 0:
        logging.getLogger("fnsft_trl").setLevel(logging.ERROR)
    repeating = logging.getLogger(CAST_LOGGER)
    if not any(isinstance(kept, _Once) for kept in repeating.filters):
        repeating.addFilter(_Once())
