"""The Hub as templates and models need it: files at one commit, pushes, errors that say what to do. No torch.

Which token a request carries is decided in [`~fnsft_trl.hub.credentials`].
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ..errors import FNSFTError
from ..occupied import check_repository, kind_of
from .credentials import check_token, hide_tokens


LOG_IN = "log in with `hf auth login` or set HF_TOKEN to a token that may"


class HubFile(NamedTuple):
    """A file of a repository in the local cache.

    Attributes:
        path (`Path`): where it lies.
        commit (`str`): the commit that the revision stood for.
    """

    path: Path
    commit: str


class MissingFileError(FNSFTError):
    """A repository, or the local cache where the Hub is not asked, does not have a file."""


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
        name: the file, with its folders.
        revision, token, cache_dir, force_download, local_files_only: as for `huggingface_hub.hf_hub_download`; without
            a `token`, that of the environment (`HF_TOKEN`) is used, then the one saved by `hf auth login`.

    Raises:
        MissingFileError: the repository has no such file.
        FNSFTError: the repository or the revision is not there or not accessible, or the download broke off.
    """
    from huggingface_hub import hf_hub_download

    with hub_errors(repo_id, revision, token=token):
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
    return HubFile(Path(path), Path(path).parents[name.count("/")].name)


def prepare_repo(
    repo_id: str, *, private: bool | None = None, token: str | None = None, branch: str | None = None
) -> str:
    """Make a repository and a branch, where they do not exist, and return the repository's full id.

    Call it within [`hub_errors`].
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="fnsft_trl")
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if branch is not None and not branch.startswith("refs/"):
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    return repo_id


def push_directory(
    directory: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    subfolder: str | None = None,
    commit_message: str,
    create_pr: bool = False,
) -> str:
    """Push all files of a directory in one commit, unless the repository holds something of another kind.

    Args:
        directory: what to push.
        repo_id: `org/name`; made where it does not exist.
        private: whether the repository is made private.
        token: to write with; by default `HF_TOKEN`, or the token saved by `hf auth login`.
        branch: where to; made where it does not exist.
        subfolder: folder of the repository to put the files into.
        commit_message: of the commit.
        create_pr: open a pull request instead of committing to the branch.

    Returns:
        The address of the commit.

    Raises:
        FNSFTError: the directory has a link to elsewhere, or the Hub refuses it or cannot be reached; the message
            says what to do.
    """
    from huggingface_hub import HfApi

    check_links(directory)
    with hub_errors(repo_id, branch, token=token):
        if (kind := kind_of(directory)) is not None:
            check_repository(repo_id, kind, branch=branch, token=token, subfolder=subfolder)
        repo_id = prepare_repo(repo_id, private=private, token=token, branch=branch)
        commit = HfApi(token=token, library_name="fnsft_trl").upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            path_in_repo=subfolder,
            revision=branch,
            commit_message=commit_message,
            create_pr=create_pr,
        )
    return str(commit)


def check_links(directory: str | os.PathLike, patterns: Sequence[str] = ("**/*",)) -> None:
    """See that what is published of a directory lies in it: a link in a folder of others may lead to any file.

    Args:
        directory: whose files are copied or pushed. Links of the Hub's cache, into its own `blobs`, are files.
        patterns: of the files that count.

    Raises:
        FNSFTError: one is a link to somewhere else; with both.
    """
    root = Path(os.path.realpath(directory))
    own = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
    for path in (path for pattern in patterns for path in root.glob(pattern)):
        target = Path(os.path.realpath(path))
        if not any(target.is_relative_to(place) for place in own):
            raise FNSFTError(
                f"{path.relative_to(root)} in {directory} is, or lies behind, a link to {target}, which would be "
                "published with it; put the file itself there, or take the link out"
            )


@contextmanager
def hub_errors(what: str, revision: str | None = None, *, token: str | bool | None = None) -> Iterator[None]:
    """Say in one line what went wrong between here and the Hub, and what to do.

    Args:
        what: the repository that is asked for.
        revision: branch, tag or commit of it.
        token: that the requests will carry; one that none can carry is refused first.

    Raises:
        FNSFTError: in place of huggingface_hub's errors. No message holds a token.
    """
    from huggingface_hub import errors

    from ..compat.hub import HTTPError

    check_token(token)
    try:
        yield
    except (HTTPError, ValueError, OSError) as error:
        told = None if isinstance(error, FNSFTError) else explain(error, what, revision)
        if told is None:
            raise
        is_missing = isinstance(error, errors.EntryNotFoundError) and _unreachable(error) is None
        raise (MissingFileError if is_missing else FNSFTError)(told) from error


def _unreachable(error: BaseException) -> BaseException | None:
    """Why the Hub could not be asked for a file that is not in the cache either; `None` if nothing was to be asked."""
    from huggingface_hub import errors

    asked = isinstance(error, errors.LocalEntryNotFoundError)
    return error.__cause__ if asked and not isinstance(error.__cause__, errors.OfflineModeIsEnabled) else None


def explain(error: BaseException, what: str, revision: str | None = None) -> str | None:
    """What an error of huggingface_hub means and what to do, on one line; `None` if it is not one of its errors.

    Args:
        error: the error.
        what, revision: the repository that was asked for.
    """
    from huggingface_hub import errors

    from ..compat.hub import HTTPError, is_bad_name, is_broken_download, is_forced_offline, is_refused_card

    at = f" at revision {revision!r}" if revision else ""
    if isinstance(error, errors.HFValidationError):
        return f"{what!r} is no id of a repository on the Hub ({error}); write org/name"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"{what}{at} was asked for with a token, and there is none; {LOG_IN} read it"
    if isinstance(error, errors.GatedRepoError):
        return f"access to {what} is restricted: ask for it on the repository's page, then {LOG_IN} read it"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no repository {what} on the Hub, or it is private and your token does not open it; check the "
            f"name, and {LOG_IN} read it"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{what} has no revision {revision!r}; give one of its branches, tags or commits"
    if isinstance(error, errors.LocalEntryNotFoundError):
        cause = _unreachable(error)
        return (cause and explain(cause, what, revision)) or (
            f"{what}{at} is not in the local cache, and the Hub was not asked or could not be reached; download it "
            "once with a connection, without local_files_only and HF_HUB_OFFLINE"
        )
    if isinstance(error, errors.EntryNotFoundError):
        return (
            f"{what}{at} holds no template of functional networks (a file is missing); push one with "
            "`fnsft discover --push_to_hub`"
        )
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return (
                f"the Hub refused access to {what} ({status}): the token is not valid or lacks the right; {LOG_IN} "
                "do this"
            )
        return f"the Hub answered {status} for {what}{at}; try again later"
    if isinstance(error, (errors.OfflineModeIsEnabled, HTTPError)):  # no connection
        reason = hide_tokens(str(error).strip().partition("\n")[0]) or type(error).__name__
        return f"the Hub cannot be reached for {what} ({reason}); try again with a connection"
    message = " ".join(str(error).split())
    if is_bad_name(error, message):
        return f"{what}{at} holds a file whose name leads out of its folder ({message}); nothing is read of it"
    if is_refused_card(error, message):
        return f"the Hub refuses the model card for {what} ({message}); correct it, then push again"
    if is_forced_offline(error, message):
        return f"{what}{at} cannot be downloaded anew ({message}); try again with a connection"
    if is_broken_download(error, message):
        return f"the download from {what} broke off; start it again, and it goes on"
    return None
