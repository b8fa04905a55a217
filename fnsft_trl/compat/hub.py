"""What is needed of huggingface_hub beyond its public interface. Seen in huggingface_hub 2.4.0. Free of torch."""

import re

# Where a login is saved, and whether a saved one may be used unasked.
# https://github.com/huggingface/huggingface_hub/blob/v2.4.0/src/huggingface_hub/constants.py
from huggingface_hub import constants

# What a request without an answer raises (no connection, a timeout). It is of the HTTP library, which has changed
# from one version to the next.
# https://github.com/huggingface/huggingface_hub/blob/v2.4.0/src/huggingface_hub/errors.py
from huggingface_hub.errors import HTTPError


__all__ = [
    "HTTPError",
    "allows_saved_login",
    "is_bad_name",
    "is_broken_download",
    "is_forced_offline",
    "is_refused_card",
    "token_file",
]


def token_file() -> str:
    """Where `hf auth login` saves a token."""
    return constants.HF_TOKEN_PATH


def allows_saved_login() -> bool:
    """Whether a token that nobody gave may be used; `HF_HUB_DISABLE_IMPLICIT_TOKEN` forbids it."""
    return not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN


# These errors have no type of their own, and are told by their first words.


def is_refused_card(error: BaseException, message: str) -> bool:
    """Whether the Hub has refused a model card for its metadata.

    https://github.com/huggingface/huggingface_hub/blob/v2.4.0/src/huggingface_hub/hf_api.py
    """
    return isinstance(error, ValueError) and message.startswith("Invalid metadata")


def is_forced_offline(error: BaseException, message: str) -> bool:
    """Whether `force_download` was asked for where nothing can be downloaded.

    https://github.com/huggingface/huggingface_hub/blob/v2.4.0/src/huggingface_hub/file_download.py
    """
    return isinstance(error, ValueError) and re.search("[Ff]orce.download", message) is not None


def is_bad_name(error: BaseException, message: str) -> bool:
    """Whether the name of a file in a repository leads out of its folder.

    https://github.com/huggingface/huggingface_hub/blob/v2.4.0/src/huggingface_hub/_local_folder.py
    """
    return isinstance(error, ValueError) and message.startswith("Invalid filename")


def is_broken_download(error: BaseException, message: str) -> bool:
    """Whether a download ended before the file was whole.

    https://github.com/huggingface/huggingface_hub/blob/v2.4.0/src/huggingface_hub/file_download.py
    """
    return isinstance(error, OSError) and message.startswith("Consistency check failed")
