"""A cache of tokenised datasets on disk, keyed by everything that they are made from."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path

from accelerate.utils import gather_object
from datasets import Dataset, load_from_disk
from pyarrow import ArrowInvalid
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging
from trl import SFTConfig

from ..cache import cache_dir
from ..compat.trl import PREPARATION_SETTINGS
from ..writing import written_whole


logger = logging.get_logger(__name__)

_ROWS = 1000  # hashed at a time
_PACKAGES = ("trl", "transformers", "tokenizers", "datasets", "jinja2")


def preparation_settings(args: SFTConfig) -> dict:
    """The arguments that a prepared dataset depends on."""
    settings = {name: getattr(args, name) for name in PREPARATION_SETTINGS}
    return settings | {"seed": args.seed if args.shuffle_dataset else None}


class TokenizedCache:
    """
    Tokenised datasets, each in a directory named by the SHA-256 of the rows, the tokenizer, the settings and the
    versions that it came from.

    What is read back is therefore never stale: another row, another token of the vocabulary, another chat template or
    another length give another name, and paths and dates have no part in it. An entry is written under a temporary
    name and renamed, so that several processes may work on it at once.

    Args:
        directory (`str`, *optional*):
            Where the entries are; by default `tokenized/` in the user's cache (`$FNSFT_CACHE`, or `fnsft_trl` in
            `$XDG_CACHE_HOME` or `~/.cache`). It can be deleted at any time.
    """

    def __init__(self, directory: str | os.PathLike | None = None) -> None:
        self.directory = cache_dir() / "tokenized" if directory is None else Path(directory)

    def takes(self, dataset, tokenizer) -> bool:
        """Whether the tokens can be kept: of rows that are all there and not yet tokenised, by a fast tokenizer."""
        return (
            isinstance(dataset, Dataset)
            and dataset.format["type"] != "custom"
            and "input_ids" not in dataset.column_names
            and isinstance(tokenizer, PreTrainedTokenizerFast)
        )

    def read_or_make(self, key: str, make: Callable[[], Dataset], *, writes: bool) -> Dataset:
        """The entry of this name, or what `make` gives, which is then kept if this process `writes`."""
        found = self.load(key)
        # All processes or none: those that make the data wait for each other while they do.
        if all(gather_object([found is not None])):
            logger.info(f"tokenised data are read from {self.directory / key}")
            return found
        made = make()
        if writes:
            self.save(key, made)
        return made

    def key(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, settings: Mapping) -> str:
        """The name of the entry for a dataset, a fast tokenizer, and the settings it is tokenised with."""
        about = dict(settings) | {package: version(package) for package in _PACKAGES}
        template = f"{tokenizer.chat_template}{settings.get('chat_template')}"
        if "strftime_now" in template:  # the template writes the day
            about["date"] = date.today().isoformat()
        digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
        digest.update(_tokenizer_state(tokenizer).encode())
        _update_with_rows(digest, dataset)
        return digest.hexdigest()

    def load(self, key: str) -> Dataset | None:
        """The entry of this name, if there is one that can be read."""
        path = self.directory / key
        if not path.is_dir():
            return None
        try:
            return load_from_disk(str(path))
        except (OSError, ValueError, KeyError, ArrowInvalid) as error:
            logger.warning(f"the cached data in {path} cannot be read and are made again ({error})")
            shutil.rmtree(path, ignore_errors=True)
            return None

    def save(self, key: str, dataset: Dataset) -> None:
        """Keep a dataset under this name; a disk that cannot take it is a warning."""
        try:
            with written_whole(self.directory / key) as scratch:
                dataset.save_to_disk(str(scratch))
        except OSError as error:
            if not (self.directory / key).is_dir():  # another process may have finished first
                logger.warning(f"the tokenised data are not kept in {self.directory} ({error})")


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> str:
    """All that decides which ids a text gets: vocabulary, rules, special tokens and chat template."""
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
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    about = [type(tokenizer).__name__, rules, special, tokenizer.chat_template]
    return json.dumps(about, sort_keys=True)


def _update_with_rows(digest, dataset: Dataset) -> None:
    digest.update(json.dumps(dataset.features.to_dict(), sort_keys=True).encode())
    for table in dataset.with_format("arrow").iter(batch_size=_ROWS):
        digest.update(json.dumps(table.to_pylist(), default=repr).encode())
