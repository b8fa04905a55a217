"""A cache of tokenised datasets on disk, keyed by everything that they are made from."""

import hashlib
import inspect
import json
import os
import re
import shutil
from collections.abc import Mapping
from datetime import date, datetime
from importlib.metadata import version
from pathlib import Path
from pickle import PicklingError

from accelerate.utils import gather_object
from datasets import Dataset, load_from_disk
from datasets.fingerprint import Hasher
from pyarrow import ArrowInvalid
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging
from trl import SFTConfig

from ..cache import cache_dir, make_private
from ..compat.datasets import fingerprint
from ..compat.trl import PREPARATION_SETTINGS
from ..json_text import from_json
from ..writing import one_writer, remove_leftovers, written_whole


logger = logging.get_logger(__name__)

_ROWS = 1000  # hashed at a time
_PACKAGES = ("trl", "transformers", "tokenizers", "datasets", "jinja2", "pyarrow")
_CHECKSUMS = "sha256.json"  # in an entry: its files and their SHA-256
# Attributes of a tokenizer, and what it was made with, that no token follows from. All others count: what is not known
# here makes an entry anew, and none wrong.
_NO_PART = frozenset(
    [
        *("_tokenizer", "init_kwargs", "init_inputs", "name_or_path", "files_loaded", "verbose", "cache"),
        *("deprecation_warnings", "_in_target_context_manager", "_processor_class", "processor_class"),
        *("padding_side", "truncation_side", "model_max_length", "_should_update_post_processor"),
        *("tokenizer_file", "vocab_file", "merges_file", "cache_dir", "token", "is_local", "local_files_only"),
        *("_commit_hash", "tokenizer_class", "backend", "tokenizer_object", "response_template"),
    ]
)


def preparation_settings(args: SFTConfig, packing: bool = False) -> dict:
    """The arguments that a prepared dataset depends on."""
    settings = {name: getattr(args, name) for name in PREPARATION_SETTINGS}
    settings["seed"] = args.seed if args.shuffle_dataset else None
    settings["dataset_num_proc"] = args.dataset_num_proc if packing else None  # each process packs rows of its own
    return settings


def made_with(tokenizer, settings: Mapping) -> str:
    """What tokens follow from beside the rows, as JSON: settings, versions, the tokenizer, the clock if it is read.

    Args:
        tokenizer: a tokenizer or processor; one that is not fast is described by its chat template only.
        settings: of the preparation.
    """
    about = dict(settings) | {package: version(package) for package in _PACKAGES}
    template = _templates(tokenizer, settings.get("chat_template"))
    if "strftime_now" in template:
        about["date"] = date.today().isoformat()
        about["clock"] = _clock(template)
    about["chat_template"] = template
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        about["tokenizer"] = _tokenizer_state(tokenizer)
    return json.dumps(about, sort_keys=True, default=_described)


def rekeyed(dataset: Dataset, made: str) -> Dataset:
    """The same rows under another fingerprint, by which the cache of `datasets` goes: it knows no versions, no clock.

    Args:
        dataset: the rows.
        made: of [`made_with`].
    """
    key = Hasher.hash([fingerprint(dataset), made])
    return dataset.select_columns(dataset.column_names, new_fingerprint=key)


def key_of(dataset: Dataset, made: str) -> str:
    """The name of the entry for the rows of a dataset and what [`made_with`] says of the rest."""
    digest = hashlib.sha256(made.encode())
    digest.update(json.dumps([dataset.features.to_dict(), dataset.format], sort_keys=True, default=repr).encode())
    for table in dataset.with_format("arrow").iter(batch_size=_ROWS):
        digest.update(json.dumps(table.to_pylist(), default=repr).encode())
    return digest.hexdigest()


class TokenizedCache:
    """
    Tokenised datasets, each in a directory named by the SHA-256 of the rows, the tokenizer, the settings and the
    versions that it came from.

    What is read back is therefore never stale. Another row, another token of the vocabulary, another chat template or
    another length give another name. Paths and dates have no part in it. Nor is it damaged: the files of an entry are
    compared with their SHA-256. An entry is written under a temporary name and renamed, so that several processes may
    work on it at once. Only the user can read what is kept.

    Args:
        directory (`str`, *optional*):
            Where the entries are; by default `tokenized/` in the user's cache (`$FNSFT_CACHE`, or `fnsft_trl` in
            `$XDG_CACHE_HOME` or `~/.cache`). It can be deleted at any time.
    """

    def __init__(self, directory: str | os.PathLike | None = None) -> None:
        self.directory = cache_dir() / "tokenized" if directory is None else Path(directory)

    def takes(self, dataset, tokenizer, chat_template: str | None = None) -> bool:
        """Whether the tokens can be kept: of rows that are all there and not yet tokenised, by a fast tokenizer.

        A chat template that does more with the clock than write it in a fixed form is not followed.
        """
        return (
            isinstance(dataset, Dataset)
            and dataset.format["type"] != "custom"
            and "input_ids" not in dataset.column_names
            and isinstance(tokenizer, PreTrainedTokenizerFast)
            and _clock(_templates(tokenizer, chat_template)) is not None
        )

    def read(self, key: str) -> Dataset | None:
        """The entry of this name in all processes, or in none: those that make the data wait for each other."""
        found = self.load(key)
        if not all(gather_object([found is not None])):
            return None
        logger.info(f"tokenised data are read from {self.directory / key}")
        return found

    def key(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, settings: Mapping) -> str:
        """The name of the entry for a dataset, a fast tokenizer, and the settings it is tokenised with."""
        return key_of(dataset, made_with(tokenizer, settings))

    def load(self, key: str) -> Dataset | None:
        """The entry of this name, if there is one and it is whole."""
        path = self.directory / key
        try:
            if not path.is_dir():
                return None
            if damaged := _damaged_file(path):
                logger.warning(f"the cached data in {path} are damaged ({damaged}) and are made again")
                return None
            return load_from_disk(str(path))
        except (OSError, ValueError, KeyError, ArrowInvalid) as error:
            logger.warning(f"the cached data in {path} cannot be read and are made again ({error})")
            return None

    def save(self, key: str, dataset: Dataset) -> None:
        """Keep a dataset under this name, in the place of a damaged one; a disk that cannot take it is a warning."""
        path = self.directory / key
        try:
            make_private(self.directory)
            with one_writer(self._lock(key)):
                remove_leftovers(path)
                if path.is_dir() and _damaged_file(path) is None:  # another process has made it meanwhile
                    return
                shutil.rmtree(path, ignore_errors=True)
                # One key, one entry: `datasets` gives a random fingerprint where something ends the hashing of one.
                dataset = dataset.select_columns(dataset.column_names, new_fingerprint=key)
                with written_whole(path) as scratch:
                    dataset.save_to_disk(str(scratch))
                    _seal(scratch)
            self._tidy()
        except (OSError, NotImplementedError) as error:  # the latter of a file system without locks
            logger.warning(f"the tokenised data are not kept in {self.directory} ({error})")

    def _lock(self, key: str) -> Path:
        return self.directory / f".{key}.lock"

    def _tidy(self) -> None:
        """Remove what killed writers of any entry left: nobody holds its lock any more."""
        for key in {path.name[1:].rpartition(".")[0] for path in self.directory.glob(".*.*")}:
            try:
                with one_writer(self._lock(key), waits=False):
                    remove_leftovers(self.directory / key)
            except TimeoutError:
                continue


def _seal(entry: Path) -> None:
    """Write down what the files of an entry hold, and let only the user read them."""
    sums = {file.name: _sha256(file) for file in sorted(entry.iterdir())}
    (entry / _CHECKSUMS).write_text(json.dumps(sums))
    for file in entry.iterdir():
        file.chmod(0o600)
    entry.chmod(0o700)


def _damaged_file(entry: Path) -> str | None:
    """The first file of an entry that is not as it was written, or `None`."""
    try:
        sums = from_json((entry / _CHECKSUMS).read_text())
        found = {file.name for file in entry.iterdir()} - {_CHECKSUMS}
        if not isinstance(sums, dict) or found != sums.keys():
            return _CHECKSUMS
    except (OSError, ValueError):
        return _CHECKSUMS
    return next((name for name in sums if _sha256(entry / name) != sums[name]), None)


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _templates(tokenizer, other: str | None) -> str:
    return json.dumps([tokenizer.chat_template, other])


def _clock(template: str) -> list[str] | None:
    """What chat templates write of the clock, as it is now; `None` where it cannot be told from their text."""
    template = template.replace('\\"', '"')
    forms = re.findall(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""", template)
    asked = re.findall(r"strftime_now\s+is\s+(?:not\s+)?defined", template)
    if template.count("strftime_now") > len(forms) + len(asked):
        return None
    return [datetime.now().strftime(form) for _, form in forms]


def _tokenizer_state(tokenizer: PreTrainedTokenizerFast) -> list:
    """All that decides which ids a text gets: vocabulary and rules, every setting, and the code of its class."""
    backend = tokenizer.backend_tokenizer
    truncation, padding = backend.truncation, backend.padding  # left there by an earlier call
    backend.no_truncation()
    backend.no_padding()
    try:
        rules = backend.to_str()
    finally:
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)
    parts = [
        {name: _described(value) for name, value in values.items() if name not in _NO_PART}
        for values in (vars(tokenizer), tokenizer.init_kwargs)
    ]
    return [rules, *parts, [_code(kind) for kind in type(tokenizer).__mro__]]


def _code(kind: type) -> str:
    """A class by its name, or by its source where no version stands for it."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    if kind.__module__.partition(".")[0] in ("transformers", "builtins"):
        return name
    try:
        return f"{name} {inspect.getsource(inspect.getmodule(kind) or kind)}"
    except (OSError, TypeError):
        return f"{name} {Hasher.hash(kind)}"


def _described(value) -> str:
    """A value in words: its whole state, and not where in memory it is."""
    try:
        return json.dumps(value, sort_keys=True)
    except (TypeError, ValueError):
        pass
    try:
        return Hasher.hash(value)
    except (PicklingError, TypeError, AttributeError):  # then no other process has the same
        return f"{value!r} {id(value)}"
