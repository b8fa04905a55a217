"""Datasets by name: Hub ids and local files, checked for columns that TRL and the discovery can read."""

from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetNotFoundError, DatasetsError

from .embedded import EMBEDDED, wikipedia_passages
from .errors import FNSFTError


_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
_READABLE = ({"text"}, {"messages"}, {"conversations"}, {"prompt", "completion"}, {"input_ids"})


def load_data(name_or_path: str, *, config_name: str | None = None, split: str | None = None) -> Dataset | DatasetDict:
    """Load a dataset.

    Args:
        name_or_path: a Hub id, a directory, a `.json`, `.jsonl`, `.csv`, `.parquet` or `.txt` file, or `embedded`:
            English Wikipedia passages from a package on the Python index.
        config_name: configuration of a Hub dataset.
        split: one split of it; all of them by default.

    Raises:
        FNSFTError: it is not found or cannot be read.
    """
    path = Path(name_or_path).expanduser()
    try:
        if name_or_path == EMBEDDED:
            passages = DatasetDict(train=Dataset.from_dict({"text": wikipedia_passages("discovery")}))
            if split not in (None, "train"):
                raise FNSFTError(f"the embedded text has no split {split!r}; it has train")
            data = passages[split] if split else passages
        elif path.is_file():
            if path.suffix not in _BUILDERS:
                raise FNSFTError(f"the ending of {name_or_path} is not known; expected one of: {', '.join(_BUILDERS)}")
            if path.stat().st_size == 0:
                raise FNSFTError(f"the dataset {name_or_path} is empty; at least one row was expected")
            data = load_dataset(_BUILDERS[path.suffix], data_files=str(path), split=split)
        elif path.suffix in _BUILDERS and not path.exists():
            raise FNSFTError(f"the dataset file {name_or_path} does not exist")
        else:
            data = load_dataset(name_or_path, config_name, split=split)
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        reason = str(error).splitlines()[0]
        raise FNSFTError(f"the dataset {name_or_path!r} was found neither here nor on the Hub ({reason})") from error
    except FNSFTError:
        raise
    except (ValueError, OSError, DatasetsError) as error:
        if "corresponds to no data" in str(error):
            raise FNSFTError(f"the dataset {name_or_path} is empty: its split has no rows") from error
        reason = str(error).splitlines()[0]
        raise FNSFTError(f"the dataset {name_or_path!r} cannot be read: {reason}") from error
    return data


def load_texts(names: Sequence[str], *, split: str = "train") -> dict[str, Dataset]:
    """Several datasets by name, checked before the first is read.

    Raises:
        FNSFTError: as [`load_data`] and [`check_rows`].
    """
    if repeated := [name for number, name in enumerate(names) if name in names[:number]]:
        raise FNSFTError(f"the dataset {repeated[0]} is named twice; name each once")
    parts = [load_data(name, split=split) for name in names]
    for part, name in zip(parts, names, strict=True):
        check_rows(part, name)
    return dict(zip(names, parts, strict=True))


def check_rows(data: Dataset, name: str, *, text_field: str = "text") -> None:
    """Check that a dataset has rows, and columns that can be read.

    Raises:
        FNSFTError: it does not; the message names the columns found.
    """
    if len(data) == 0:
        raise FNSFTError(f"the dataset {name} is empty; at least one row was expected")
    if text_field not in data.column_names and not any(c <= set(data.column_names) for c in _READABLE):
        known = "; ".join(" and ".join(sorted(columns, reverse=True)) for columns in _READABLE)
        raise FNSFTError(
            f"the dataset {name} has the columns {', '.join(data.column_names)}; expected one of: {known}"
        )
