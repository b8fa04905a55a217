"""The one error type whose message is meant for the person who runs the program."""


class FNSFTError(ValueError):
    """A request that cannot be carried out: what was found, what was expected, what to do.

    The command line prints the message alone, on one line, and exits with status 2. Anything else that is raised is
    a defect and keeps its traceback.
    """
