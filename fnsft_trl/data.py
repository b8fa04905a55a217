"""Datasets by name: Hub ids and local files, checked for columns that TRL and the discovery can read."""

from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetNotFoundError, DatasetsError

from .embedded import EMBEDDED, wikipedia_passages
from .errors import FNSFTError


_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
_READABLE = ({"text"}, {"messages"}, {"prompt", "completion"}, {"input_ids"})


def load_data(name_or_path: str, *, config_name: str | None = None, split: str | None = None) -> Dataset | DatasetDict:
    """Load a dataset.

    Args:
        name_or_path: a Hub id, a directory, a `.json`, `.jsonl`, `.csv`, `.parquet` or `.txt` file, or `embedded`:
            English Wikipedia passages from a package on the Python index.
        config_name: configuration of a Hub dataset.
        split: one split of it; all of them by default.

    Raises:
        FNSFTError: it is not found, cannot be read, or has no rows.
    """
    path = Path(name_or_path).expanduser()
    try:
        if name_or_path == EMBEDDED:
            passages = DatasetDict(train=Dataset.from_dict({"text": wikipedia_passages("discovery")}))
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
    for part in data.values() if isinstance(data, DatasetDict) else [data]:
        check_rows(part, name_or_path)
    return data


def check_rows(data: Dataset, name: str) -> None:
    """Check that a dataset has rows, and columns that can be read.

    Raises:
        FNSFTError: it does not; the message names the columns found.
    """
    if len(data) == 0:
        raise FNSFTError(f"the dataset {name} is empty; at least one row was expected")
    if not any(columns <= set(data.column_names) for columns in _READABLE):
        known = "; ".join(" and ".join(sorted(columns, reverse=True)) for columns in _READABLE)
        raise FNSFTError(
            f"the dataset {name} has the columns {', '.join(data.column_names)}; expected one of: {known}"
        )
