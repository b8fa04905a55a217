"""check_target: nothing is written over what it is made from, nor over a model, an adapter or a template of others."""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import FNSFTError
from .json_text import from_json


EXPORT_FILE = "fnsft_export.json"  # in what an export has written, which alone another export may replace

# What lies in a folder, or is to be written there.
MODEL, ADAPTER, TEMPLATE, REPORT = "a model", "an adapter", "a template", "a report"
EXPORTED_MODEL, EXPORTED_ADAPTER = "an exported model", "an exported adapter"
RUN, LISTS = "the results of a training", "a template of the original project"

# What is to be written -> what it would destroy, or be taken for.
_DESTROYED = {
    TEMPLATE: (MODEL, ADAPTER, EXPORTED_MODEL, EXPORTED_ADAPTER, RUN, LISTS),
    MODEL: (TEMPLATE, ADAPTER, EXPORTED_ADAPTER),
    ADAPTER: (TEMPLATE, MODEL, EXPORTED_MODEL),
    EXPORTED_MODEL: (TEMPLATE, MODEL, ADAPTER, EXPORTED_ADAPTER),
    EXPORTED_ADAPTER: (TEMPLATE, MODEL, ADAPTER, EXPORTED_MODEL),
    REPORT: (MODEL, ADAPTER, EXPORTED_MODEL, EXPORTED_ADAPTER, RUN),
}
_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
_LARGEST = 2**24  # bytes of a description that is looked at


def check_target(directory: str | os.PathLike, kind: str, *, sources: Mapping[str, Any] | None = None) -> None:
    """Check, before anything is read or made, that what is to be written destroys nothing.

    Args:
        directory: where it is to be written.
        kind: what is to be written: `TEMPLATE`, `MODEL`, `ADAPTER`, `EXPORTED_MODEL`, `EXPORTED_ADAPTER` or `REPORT`.
        sources: what is read, in words -> its name or path; names that are no paths don't matter.

    Raises:
        FNSFTError: it is one of those that are read, or holds something of another kind.
    """
    target = Path(directory).expanduser()
    for what, source in (sources or {}).items():
        if source is not None and is_same_place(target, source):
            raise FNSFTError(f"{directory} is the directory of {what}, which {kind} would destroy; name another")
    with suppress(OSError):
        names = os.listdir(target)
        _refuse(str(directory), kind, names, lambda name: _read(target / name))


def is_same_place(target: str | os.PathLike, source: Any) -> bool:
    """Whether two paths, if they are any, lead to the same folder."""
    with suppress(OSError, ValueError):
        return os.path.samefile(os.path.expanduser(target), os.path.expanduser(os.fspath(source)))
    return False


def check_repository(
    repo_id: str, kind: str, *, branch: str | None = None, token: str | None = None, subfolder: str | None = None
) -> None:
    """Check the same of a repository of the Hub. Call it within [`~fnsft_trl.hub.files.hub_errors`].

    Args:
        repo_id: `org/name`; one that does not exist holds nothing.
        kind: what is to be pushed.
        branch: where to; the default branch where it does not exist, from which it would be made.
        token: to read with.
        subfolder: of the repository, into which it is to go.

    Raises:
        FNSFTError: it holds something of another kind.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    api = HfApi(token=token, library_name="fnsft_trl")
    try:
        try:
            names, revision = api.list_repo_files(repo_id, revision=branch), branch
        except RevisionNotFoundError:
            names, revision = api.list_repo_files(repo_id), None
    except RepositoryNotFoundError:
        return
    folder = f"{subfolder.strip('/')}/" if subfolder else ""
    names = [name.removeprefix(folder) for name in names if name.startswith(folder)]

    def read(name: str) -> Any:
        path = api.hf_hub_download(repo_id, folder + name, revision=revision)
        return _read(Path(path))

    _refuse(f"the repository {repo_id}", kind, names, read)


def kind_of(directory: str | os.PathLike) -> str | None:
    """What lies in a directory, if it is something that can be pushed."""
    found = _kinds(set(os.listdir(directory)), lambda name: _read(Path(directory) / name))
    return next((kind for kind, _ in found if kind in _DESTROYED), None)


def write_export_mark(directory: Path, form: str) -> None:
    """Mark what an export has written, so that another one may replace it."""
    content = {"format": "fnsft_trl.export", "format_version": 1, "form": form}
    (directory / EXPORT_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _refuse(where: str, kind: str, names: Iterable[str], read: Callable[[str], Any]) -> None:
    for found, name in _kinds(set(names), read):
        if found in _DESTROYED[kind]:
            raise FNSFTError(
                f"{where} holds {found} ({name}), which {kind} would destroy or be mixed up with; name another place"
            )


def _kinds(names: set[str], read: Callable[[str], Any]) -> Iterable[tuple[str, str]]:
    """What lies under some names, and the name that shows it."""
    is_exported = EXPORT_FILE in names
    if "adapter_config.json" in names:
        yield (EXPORTED_ADAPTER if is_exported else ADAPTER), "adapter_config.json"
    model = EXPORTED_MODEL if is_exported and "adapter_config.json" not in names else MODEL
    has_template = "template.safetensors" in names
    if "config.json" in names:
        content = read("config.json")
        is_template = isinstance(content, dict) and str(content.get("format", "")).startswith("fnsft_trl.")
        if is_template or (content is None and has_template):  # damaged, and still a template
            has_template = True
        else:
            yield model, "config.json"
    elif weights := next((name for name in sorted(names) if _WEIGHTS.fullmatch(name)), None):
        yield model, weights
    if has_template:
        yield TEMPLATE, "template.safetensors"
    elif "global_templates.json" in names:
        yield LISTS, "global_templates.json"
    if "results.json" in names:
        content = read("results.json")
        if isinstance(content, dict) and content.get("format") == "fnsft_trl.run":
            yield RUN, "results.json"


def _read(path: Path) -> Any:
    """What a file of JSON holds; `None` where it is none."""
    with suppress(OSError, ValueError):
        if path.stat().st_size <= _LARGEST:
            return from_json(path.read_text(encoding="utf-8"))
    return None
