"""Datasets by name: Hub ids, local files and directories, read afresh whenever their content has changed."""

import csv
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from glob import glob
from importlib.metadata import version
from itertools import chain, count
from pathlib import Path
from textwrap import shorten

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    Value,
    config,
    get_dataset_config_names,
    get_dataset_default_config_name,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError, DatasetsError
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from ..cache import make_private
from ..errors import FNSFTError
from ..json_text import from_json
from .conversion import to_trl_format
from .embedded import EMBEDDED, wikipedia_passages
from .left_out import LeftOut
from .long_lines import is_encodable, is_long, json_lines, load_lines


_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".so", ".pyc"}  # which hold no rows, and are large
_LONGEST_CELL = 2**31 - 1  # characters; the limit of Python's CSV reader is 131,072
_READERS = ("datasets", "pandas", "pyarrow")
_SAVED = ("state.json", "dataset_dict.json")  # what marks a directory written by `save_to_disk`


def load_data(
    name_or_path: str,
    *,
    config_name: str | None = None,
    split: str | None = None,
    data_dir: str | None = None,
    data_files: str | Sequence[str] | Mapping[str, str | Sequence[str]] | None = None,
    streaming: bool = False,
) -> Dataset | DatasetDict | IterableDataset:
    """Load a dataset as it is.

    What `datasets` makes of local files is kept in its cache under the hash of their content, so that an edited file
    is read again whatever its path, size and date say.

    Args:
        name_or_path: a Hub id, a directory, a `.json`, `.jsonl`, `.csv`, `.parquet` or `.txt` file (one row a line),
            or `embedded`: English Wikipedia passages from a package on the Python index.
        config_name: configuration of a Hub dataset.
        split: one split of it; all of them by default.
        data_dir: of [`~datasets.load_dataset`].
        data_files: of [`~datasets.load_dataset`].
        streaming: read a Hub dataset row by row, without downloading the rest. What is local is loaded as a whole.

    Raises:
        FNSFTError: it is not found or cannot be read.
    """
    with _read_errors(name_or_path):
        if name_or_path == EMBEDDED:
            return _of_splits(DatasetDict(train=Dataset.from_dict({"text": wikipedia_passages("discovery")})), split)
        path = Path(os.path.expanduser(name_or_path))
        is_saved = any((path / file).exists() for file in _SAVED)
        if config_name is not None and (path.is_file() or is_saved):
            raise FNSFTError(
                f"{name_or_path} has no configurations, but {config_name!r} is asked for; drop dataset_config (in a "
                "mixture: name)"
            )
        if data_dir is not None or data_files is not None:
            files = _local_files(path if path.is_dir() else Path(), data_dir, data_files)
            where = {"data_dir": data_dir, "data_files": data_files, "cache_dir": _cache_of(files) if files else None}
            if path.is_dir() or name_or_path in _BUILDERS.values():
                where |= _options(files)
            return load_dataset(name_or_path, config_name, split=split, **where)
        if path.is_file():
            return _load_file(path, split)
        if path.suffix in _BUILDERS and not path.exists():
            raise FNSFTError(f"the dataset file {name_or_path} does not exist; give the path of one that does")
        if is_saved:
            saved = load_from_disk(str(path))
            return _of_splits(saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved), split)
        if path.is_dir():
            if config_name is None and get_dataset_default_config_name(str(path)) is None:
                raise _of_configurations(name_or_path, ", ".join(map(repr, get_dataset_config_names(str(path)))))
            files = [file for file in sorted(path.rglob("*")) if _may_hold_rows(file, path)]
            return load_dataset(str(path), config_name, split=split, cache_dir=_cache_of(files), **_options(files))
        return load_dataset(name_or_path, config_name, split=split, streaming=streaming)


@contextmanager
def _read_errors(name_or_path: str) -> Iterator[None]:
    """Say on one line why a dataset is not found or cannot be read."""
    try:
        yield
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        reason = shorten(str(error).splitlines()[0], 200)
        if _is_of_connection(error):
            raise FNSFTError(
                f"the dataset {name_or_path!r} is not here, and the Hub cannot be reached for it ({reason}); check "
                "the path, or try again with a connection and without HF_HUB_OFFLINE"
            ) from error
        raise FNSFTError(
            f"the dataset {name_or_path!r} was found neither here nor on the Hub ({reason}); see that the name is "
            "right"
        ) from error
    except FNSFTError:
        raise
    except (ValueError, OSError, DatasetsError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "scripts are no longer supported" not in str(error):
            raise
        if "Config name is missing" in str(error):
            found = re.search(r"configs: \[(.*)\]", str(error))
            raise _of_configurations(name_or_path, found[1] if found else "of several names") from error
        if "corresponds to no data" in str(error):
            raise FNSFTError(
                f"the dataset {name_or_path} is empty: its split has no rows; name another split"
            ) from error
        if isinstance(error, DatasetGenerationError):  # which only says that it failed
            reason = shorten(str(error.__cause__ or error), 300)
        else:
            reason = str(error).splitlines()[0]
        raise FNSFTError(f"the dataset {name_or_path!r} cannot be read: {reason}") from error


def _is_of_connection(error: BaseException | None) -> bool:
    """Whether the Hub has not answered; `datasets` may say in place of that only that there is no such file."""
    while error is not None:
        if isinstance(error, (ConnectionError, LocalEntryNotFoundError, OfflineModeIsEnabled)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _of_configurations(name: str, found: str) -> FNSFTError:
    return FNSFTError(
        f"the dataset {name} has the configurations {found}; name one with dataset_config (in a mixture: name)"
    )


def _of_splits(data: DatasetDict, split: str | None) -> Dataset | DatasetDict:
    if split is None:
        return data
    if split not in data:
        raise FNSFTError(f"the dataset has no split {split!r}; it has {', '.join(data)}")
    return data[split]


def _load_file(path: Path, split: str | None) -> Dataset | DatasetDict:
    if path.suffix not in _BUILDERS:
        raise FNSFTError(f"the ending of {path} is not known; expected one of: {', '.join(_BUILDERS)}")
    if path.stat().st_size == 0:
        raise FNSFTError(f"the dataset {path} is empty; at least one row was expected")
    if is_long(path):
        return _of_splits(DatasetDict(train=load_lines(path, _cache_of([path]))), split)
    try:
        data = load_dataset(
            _BUILDERS[path.suffix], data_files=str(path), split=split, cache_dir=_cache_of([path]), **_options([path])
        )
    except (ValueError, DatasetsError) as error:
        if "surrogate" not in f"{error} {error.__cause__}":
            raise
        return _of_splits(DatasetDict(train=_encodable(path)), split)
    features = data["train"].features if split is None else data.features
    if path.suffix != ".parquet" and "timestamp" in str(features):
        # Texts that look like dates were taken for dates, and would come back in another spelling.
        return _of_splits(DatasetDict(train=Dataset.from_list(_json_rows(path))), split)
    return data


def _json_rows(path: Path) -> list[dict]:
    text = path.read_text(encoding="utf-8-sig")
    return from_json(text) if text.lstrip().startswith("[") else list(json_lines(path))


def _may_hold_rows(file: Path, root: Path) -> bool:
    """Whether `load_dataset` may read a file of a folder: none that is hidden, and no weights."""
    is_hidden = any(part.startswith((".", "__")) for part in file.relative_to(root).parts)
    return not is_hidden and file.suffix not in _WEIGHTS and file.is_file()


def _encodable(path: Path) -> Dataset:
    """The rows of a JSON file without those that no table can hold: half a surrogate pair is no text."""
    rows, left_out = _json_rows(path), LeftOut(str(path), "read")
    usable = []
    for number, row in enumerate(rows):
        if is_encodable(row):
            usable.append(row)
        else:
            left_out.add(number, "a text holds half a surrogate pair")
    left_out.check(len(rows))
    return Dataset.from_list(usable)


def _options(files: Sequence[Path]) -> dict:
    """How `datasets` is to read files so that their text stays as it is written."""
    files = [file for file in files if file.suffix in _BUILDERS]
    kinds = {_BUILDERS[file.suffix] for file in files}
    if kinds == {"csv"}:
        for file in files:
            _check_first_row(file)
        # 007 is not 7, and an answer "None" is not a missing one. Without index_col=False, a first row that is longer
        # than the header makes all columns but the last come from the cell beside their own.
        features = Features({name: Value("string") for name in _header(files[0])})
        return {"features": features, "keep_default_na": False, "index_col": False}
    if kinds == {"json"}:  # in one piece: a column that begins further down is known from the first row on
        return {"chunksize": max(10 << 20, *(file.stat().st_size + 1 for file in files))}
    return {}


@contextmanager
def _csv_rows(file: Path) -> Iterator:
    """The rows of a CSV file as they are written, whatever their length."""
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            yield csv.reader(lines)
    finally:
        csv.field_size_limit(limit)


def _header(file: Path) -> list[str]:
    """The columns of a CSV file; one without a name, or with that of another, has one as pandas would give it."""
    names: list[str] = []
    with _csv_rows(file) as rows:
        for number, name in enumerate(next(rows, [])):
            name = name or f"Unnamed: {number}"
            repeated = count(1)
            found = name
            while found in names:
                found = f"{name}.{next(repeated)}"
            names.append(found)
    return names


def _check_first_row(file: Path) -> None:
    """See that the first row of a CSV file is not longer than the header.

    Only the first: it is what the parser takes the length of all others from, and a longer one it refuses itself.

    Raises:
        FNSFTError: it is, and not by empty cells in all rows.
    """
    with _csv_rows(file) as rows:
        width = len(next(rows, []))
        first = next((row for row in rows if row), [])
        if len(first) <= width:
            return
        for row in chain([first], rows):
            if any(row[width:]):
                raise FNSFTError(
                    f"{file} has {width} columns, but {len(row)} cells in the row that ends in line {rows.line_num}; "
                    "put text with commas in double quotes"
                )


def _local_files(root: Path, data_dir: str | None, data_files) -> list[Path]:
    """The files here that are meant by what `load_dataset` takes."""
    found = [*(root / data_dir).rglob("*")] if data_dir is not None else []
    groups = data_files.values() if isinstance(data_files, Mapping) else [data_files or []]
    for pattern in (name for group in groups for name in ([group] if isinstance(group, str) else group)):
        found += map(Path, glob(str(root / (data_dir or "") / Path(pattern).expanduser()), recursive=True))
    return sorted(file for file in found if file.is_file())


def _cache_of(files: Sequence[Path]) -> str:
    """A directory in the cache of `datasets` that belongs to the content of files, and to what reads them.

    It is the user's alone, as the files may be.
    """
    digest = hashlib.sha256(json.dumps([version(package) for package in _READERS]).encode())
    for file in files:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    cache = Path(config.HF_DATASETS_CACHE) / "fnsft_trl"
    make_private(cache)
    return str(cache / digest.hexdigest())


def load_texts(
    names: Sequence[str], *, split: str = "train", columns: str | Mapping[str, str] | None = None
) -> dict[str, Dataset | IterableDataset]:
    """Several datasets by name, in TRL's format, checked before the first is read through.

    Datasets of the Hub are streamed, unless the Hub is switched off (`HF_HUB_OFFLINE`): a discovery reads as many rows
    as it needs, and a large corpus is not downloaded.

    Raises:
        FNSFTError: as [`load_data`] and [`~fnsft_trl.data.conversion.to_trl_format`].
    """
    if repeated := [name for number, name in enumerate(names) if name in names[:number]]:
        raise FNSFTError(f"the dataset {repeated[0]} is named twice; name each once")
    parts = [load_data(name, split=split, streaming=not config.HF_HUB_OFFLINE) for name in names]
    return {
        name: to_trl_format(part, columns, name=f"the dataset {name}") for name, part in zip(names, parts, strict=True)
    }
