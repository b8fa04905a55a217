"""The Hub as templates need it: downloads of named files at one commit, and errors that say what to do. No torch."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from .errors import FNSFTError


_LOG_IN = "log in with `hf auth login` or set HF_TOKEN to a token that may"


class HubFile(NamedTuple):
    """A file of a repository in the local cache.

    Attributes:
        path (`Path`): where it lies.
        commit (`str`): the commit that the revision stood for.
    """

    path: Path
    commit: str


class UnsavedToken(str):
    """A token that is used like any string and pickled as `None`: the Trainer pickles and pushes its arguments."""

    __slots__ = ()

    def __reduce__(self):
        return type(None), ()

    def __deepcopy__(self, memo):
        return self


def is_hub_id(name: str) -> bool:
    """Whether a name has the form `org/name` and is no local path."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) is not None and not name.startswith(".")


def fetch_file(
    repo_id: str,
    name: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> HubFile:
    """Download one file of a repository, or find it in the cache.

    Args:
        repo_id: `org/name`.
        name: the file.
        revision, token, cache_dir, force_download, local_files_only: as for `huggingface_hub.hf_hub_download`; without
            a `token`, that of the environment (`HF_TOKEN`) is used, then the one saved by `hf auth login`.

    Raises:
        FNSFTError: the repository, the revision or the file is not there or not accessible.
    """
    from huggingface_hub import hf_hub_download

    with hub_errors(repo_id, revision):
        path = hf_hub_download(
            repo_id,
            name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            library_name="fnsft_trl",
        )
    return HubFile(Path(path), Path(path).parent.name)


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Say in one line what went wrong between here and the Hub, and what to do.

    Raises:
        FNSFTError: in place of huggingface_hub's errors. No message holds a token.
    """
    from huggingface_hub import errors

    at = f" at revision {revision!r}" if revision else ""
    try:
        yield
    except errors.HFValidationError as error:
        raise FNSFTError(f"{repo_id!r} is no id of a repository on the Hub ({error}); write org/name") from error
    except errors.GatedRepoError as error:
        raise FNSFTError(
            f"access to {repo_id} is restricted: ask for it on the repository's page, then {_LOG_IN} read it"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FNSFTError(
            f"there is no repository {repo_id} on the Hub, or it is private and your token does not open it; check "
            f"the name, and {_LOG_IN} read it"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FNSFTError(
            f"{repo_id} has no revision {revision!r}; give one of its branches, tags or commits"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise FNSFTError(
            f"{repo_id}{at} is not in the local cache, and the Hub was not asked or could not be reached; download it "
            "once with a connection, without local_files_only and HF_HUB_OFFLINE"
        ) from error
    except errors.EntryNotFoundError as error:
        raise FNSFTError(
            f"{repo_id}{at} holds no template of functional networks (a file is missing); push one with "
            "`fnsft discover --push_to_hub`"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise FNSFTError(
                f"the Hub refused access to {repo_id} ({status}): the token is not valid or lacks the right; "
                f"{_LOG_IN} do this"
            ) from error
        raise FNSFTError(f"the Hub answered {status} for {repo_id}{at}; try again later") from error
    except (errors.OfflineModeIsEnabled, errors.HTTPError) as error:  # no connection
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FNSFTError(f"the Hub cannot be reached for {repo_id} ({reason}); try again with a connection") from error
