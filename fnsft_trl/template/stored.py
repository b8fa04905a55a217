"""StoredTemplate: a template where it lies, its description checked, its tensors not yet read. No torch until then."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FNSFTError
from ..hub.files import HubFile, MissingFileError, fetch_file, is_hub_id
from .description import TemplateDescription
from .legacy import Members, read_legacy
from .schema import is_description
from .storage import CONFIG_FILE, FILES, NETWORK_DIR, TENSOR_FILE, places, read_arrays, read_description, read_json


if TYPE_CHECKING:
    import numpy as np


@dataclass
class StoredTemplate:
    """A template where it lies.

    Attributes:
        description (`TemplateDescription`): what it says of itself.
        read (`Callable[[], dict[str, np.ndarray]]`): gives the tensors, checked.
        hub_id (`str` or `None`), commit (`str` or `None`): where on the Hub.
    """

    description: TemplateDescription
    read: Callable[[], dict[str, np.ndarray]]
    hub_id: str | None = None
    commit: str | None = None

    @classmethod
    def open(cls, reference: str | os.PathLike, **options) -> StoredTemplate:
        """Find a template by its directory, its JSON file or its id on the Hub.

        A trained model's directory or repository stands for the template that it keeps in `functional_networks/`.

        Args:
            reference: which one.
            options: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only` of
                [`~fnsft_trl.hub.files.fetch_file`].

        Raises:
            FNSFTError: it is not there, or its description is not that of a template.
        """
        if not isinstance(reference, str | os.PathLike):
            raise FNSFTError(
                f"a template is named by a {type(reference).__name__}; expected its directory, its JSON file or its "
                "id on the Hub"
            )
        name = os.fspath(reference)
        path = Path(os.path.expanduser(name))
        if os.path.isfile(path):
            if path.name in FILES:
                raise FNSFTError(f"{name} is one file of a template; give the directory that it is in")
            description, members = read_legacy(path)
            return cls(description, lambda: _membership_arrays(description, members))
        if os.path.exists(path) or not is_hub_id(name):
            if options.get("revision") is not None:
                raise FNSFTError(f"{name} is not on the Hub, so it has no revision {options['revision']!r}; drop one")
            if not os.path.exists(path):
                raise FNSFTError(
                    f"no template at {name}: there is no such directory or file, and it is no id on the Hub "
                    "(org/name); make one with `fnsft discover`"
                )
            directory = path / NETWORK_DIR if (path / NETWORK_DIR).is_dir() and not _is_template(path) else path
            description = read_description(directory)
            return cls(description, lambda: read_arrays(description, *places(directory, TENSOR_FILE)))
        folder, file = _find(name, options)
        description = TemplateDescription.from_json(read_json(file.path), file.path)
        # Of the same commit, whatever happens to the branch meanwhile.
        options = {**options, "revision": file.commit}
        return cls(
            description,
            lambda: read_arrays(description, fetch_file(name, folder + TENSOR_FILE, **options).path),
            name,
            file.commit,
        )

    def loadings(self) -> dict[int, np.ndarray]:
        """Layer -> signed loadings, shape (components, neurons of the layer)."""
        arrays = self.read()
        return {layer: arrays[f"layers.{layer}.loadings"] for layer in self.description.widths}

    @classmethod
    def load(cls, reference: str | os.PathLike, **options) -> tuple[StoredTemplate, dict[str, np.ndarray]]:
        """Find a template and read its tensors; one that another process replaces meanwhile is read again.

        Args:
            reference, options: as for [`~StoredTemplate.open`].

        Raises:
            FNSFTError: it is not there, or its files are not what a template must be.
        """
        stored = cls.open(reference, **options)
        while True:
            try:
                return stored, stored.read()
            except FNSFTError:
                again = cls.open(reference, **options) if stored.hub_id is None else stored  # a commit stays as it is
                if again.description == stored.description:
                    raise
                stored = again


def _is_template(directory: Path) -> bool:
    found = places(directory, CONFIG_FILE)
    return any(place.is_file() for place in found) and is_description(read_json(*found))


def _find(repo_id: str, options: dict[str, Any]) -> tuple[str, HubFile]:
    """The description of a template in a repository, and the folder that it is in."""
    try:
        file = fetch_file(repo_id, CONFIG_FILE, **options)
        if is_description(read_json(file.path)):
            return "", file
    except MissingFileError:  # as in the repository of an adapter
        pass
    folder = f"{NETWORK_DIR}/"
    return folder, fetch_file(repo_id, folder + CONFIG_FILE, **options)


def _membership_arrays(description: TemplateDescription, members: Members) -> dict[str, np.ndarray]:
    import numpy as np

    arrays = {}
    for layer, width in description.widths.items():
        loadings = np.zeros((len(members), width), np.float32)
        for number, of_network in enumerate(members):
            loadings[number, of_network.get(layer, [])] = 1.0
        arrays[f"layers.{layer}.loadings"] = loadings
    return arrays
