"""The one error type whose message is meant for the person who runs the program."""

_LONGEST = 2000


class FNSFTError(ValueError):
    """A request that cannot be carried out: what was found, what was expected, what to do.

    The command line prints the message alone, on one line, and exits with status 2. Anything else that is raised is
    a defect and keeps its traceback.

    Args:
        message: of any length; of one over 2,000 characters, as a value can make it, the middle is left out.
    """

    def __init__(self, message: str) -> None:
        if len(message) > _LONGEST:
            half = _LONGEST // 2
            message = f"{message[:half]} [{len(message) - _LONGEST} characters left out] {message[-half:]}"
        super().__init__(message)
