"""Tokens of the Hub: which one is used, where it was found, and that it stays out of files and messages. No torch."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import FNSFTError


ENV_FILE = ".env"
TOKEN_HELP = "Every user of the machine can see it in the list of processes, so prefer HF_TOKEN in the environment."
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # the second is huggingface_hub's old name of the first

_LINE = re.compile(rf"\s*(?:export\s+)?({'|'.join(TOKEN_VARIABLES)})\s*=\s*(.*?)\s*")
_LOOKS_LIKE_A_TOKEN = re.compile(r"\b(?:hf|api_org)_(?:[A-Za-z0-9]{16,}|(?:jwt|oauth)_[\w.-]+)")


class UnsavedToken(str):
    """A token that is used like any string and pickled as `None`: the Trainer pickles and pushes its arguments."""

    __slots__ = ()

    def __reduce__(self):
        return type(None), ()

    def __deepcopy__(self, memo):
        return self


@dataclass(frozen=True)
class HubToken:
    """A token, not shown when it is printed.

    Attributes:
        value (`str`): the token.
        source (`str`): where it was found, in words.
    """

    value: str = field(repr=False)
    source: str


def find_token(given: str | None = None) -> HubToken | None:
    """The token that a request to the Hub carries.

    In this order: the one that is given; `HF_TOKEN` in the environment; `HF_TOKEN` in the file `.env` of the working
    directory; the login that `hf auth login` has saved.

    Args:
        given: by an option such as `--hub_token`.
    """
    from huggingface_hub import get_token

    from ..compat.hub import allows_saved_login, token_file

    if given is not None:
        return HubToken(given, "--hub_token")
    if not allows_saved_login():
        return None
    for name, value in _env_file_tokens().items():
        return HubToken(value, f"{name} in the file {ENV_FILE}")
    value = get_token()
    if value is None:
        return None
    for name in TOKEN_VARIABLES:
        if os.environ.get(name, "").strip() == value:
            return HubToken(value, f"{name} in the environment")
    if Path(token_file()).is_file():
        return HubToken(value, f"the saved login ({token_file()})")
    return HubToken(value, "the secrets of this machine's provider")


def use_env_file() -> None:
    """Put the Hub's token from the file `.env` of the working directory into the environment, unless it has one."""
    os.environ.update(_env_file_tokens())


def _env_file_tokens() -> dict[str, str]:
    """Variable -> token of the `.env` file; empty when the environment, which goes before, has any."""
    path = Path(ENV_FILE)
    if any(name in os.environ for name in TOKEN_VARIABLES) or not path.is_file():
        return {}
    found = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if match := _LINE.fullmatch(line):
            name, value = match.groups()
            quoted = re.match(r"(['\"])(.*?)\1", value)
            value = quoted[2] if quoted else re.split(r"\s#", value)[0].strip()
            if value:
                found[name] = value
    return {name: found[name] for name in TOKEN_VARIABLES if name in found}


def check_token(token: str | bool | None) -> None:
    """Refuse a token that no request can carry, before an error of the HTTP library shows it.

    Args:
        token: as huggingface_hub takes it: the token, `None` or `True` for the one of this machine, `False` for none.

    Raises:
        FNSFTError: it holds spaces, line ends or other characters that tokens do not have.
    """
    from huggingface_hub import get_token

    value = token if isinstance(token, str) else None if token is False else get_token()
    if value is not None and not re.fullmatch("[!-~]+", value):
        raise FNSFTError(
            "the Hub's token is empty or holds a space, a line end or another character that no token has; copy it "
            "again from the Hub's settings, whole and without anything else"
        )


def hide_tokens(text: str) -> str:
    """A message with everything that looks like a token of the Hub left out."""
    return _LOOKS_LIKE_A_TOKEN.sub("hf_***", text)
