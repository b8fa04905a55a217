"""The one error type whose message is meant for the person who runs the program, and what libraries say as one."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


_LONGEST = 2000
_PACKAGE = Path(__file__).parent


class FNSFTError(ValueError):
    """A request that cannot be carried out: what was found, what was expected, what to do.

    The command line prints the message alone, on one line, and exits with status 2. Anything else that is raised is
    a defect and keeps its traceback.

    Args:
        message: of any length and lines, as a value can make it. It becomes one line, and of more than 2,000
            characters the middle is left out.
    """

    def __init__(self, message: str) -> None:
        message = " ".join(line.strip() for line in message.splitlines()) if "\n" in message else message
        if len(message) > _LONGEST:
            half = _LONGEST // 2
            message = f"{message[:half]} [{len(message) - _LONGEST} characters left out] {message[-half:]}"
        super().__init__(message)


@contextmanager
def library_errors(say: Callable[[Exception], str]) -> Iterator[None]:
    """Turn what a library raises of a file, a value or a package into an error of one line.

    Damaged files come out of the libraries as errors of many types (tokenizers raises `Exception` itself), so the type
    says nothing. What is raised in a line of this package is a defect, and keeps its traceback.

    Args:
        say: what to say of an error.

    Raises:
        FNSFTError: in the place of the library's error.
    """
    try:
        yield
    except FNSFTError:
        raise
    except Exception as error:
        innermost = traceback.extract_tb(error.__traceback__)[-1]
        if _PACKAGE in Path(innermost.filename).parents:
            raise
        raise FNSFTError(" ".join(say(error).split())) from error
