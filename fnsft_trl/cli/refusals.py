"""What a library says of the options that it was given, told from a defect of this package."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import FNSFTError


_PACKAGE = Path(__file__).parent.parent


@contextmanager
def refusals() -> Iterator[None]:
    """Turn what TRL, PEFT and transformers raise of values and packages into an error of one line.

    What is raised in a line of this package is a defect, and keeps its traceback.
    """
    try:
        yield
    except FNSFTError:
        raise
    except (ValueError, TypeError, ImportError, OSError) as error:
        innermost = traceback.extract_tb(error.__traceback__)[-1]
        if _PACKAGE in Path(innermost.filename).parents:
            raise
        raise FNSFTError(" ".join(str(error).split())) from error
