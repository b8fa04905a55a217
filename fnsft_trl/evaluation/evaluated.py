"""EvaluatedModel: a model to score, found by its directory or its id: whole, an adapter, or what a run has written."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from ..config import SITES
from ..data.embedded import resolve_model
from ..errors import FNSFTError, library_errors
from ..hub.files import fetch_file, hub_errors, is_hub_id
from ..interventions.baking import lesion_note
from ..interventions.masking import MaskHandle, forward_mask
from ..json_text import WRONG_VALUES, from_json
from ..neurons.mask import NeuronMask
from ..neurons.sites import find_neuron_sites
from ..template.storage import NETWORK_DIR, SELECTION_FILE
from ..template.stored import StoredTemplate
from ..tuner.saved import SavedAdapter, first_line, load_model, model_class


_ADAPTER_CONFIG = "adapter_config.json"
_MASK_MODES = ("lesion", "preserve", "amplify")
_SOURCE = ("revision", "trust_remote_code")


@dataclass(frozen=True)
class EvaluatedModel:
    """
    A model to score.

    Attributes:
        name (`str`): what a report calls it.
        place (`str`): its directory, or its id on the Hub.
        adapter (`SavedAdapter` or `None`): of an adapter, on whose base it is put.
        loading (`dict`): arguments of `from_pretrained`.
        is_base (`bool`): whether what is scored is the base of the adapter, with the adapter's tokenizer.
        record (`dict` or `None`): what the run that made it says that it selected and masked (`selection.json`).
        is_masked (`bool`): whether it is scored under the mask that it trained under.
    """

    name: str
    place: str
    adapter: SavedAdapter | None
    loading: dict[str, Any] = field(default_factory=dict)
    is_base: bool = False
    record: dict[str, Any] | None = None
    is_masked: bool = False

    @classmethod
    def find(cls, place: str, *, name: str | None = None, **loading) -> "EvaluatedModel":
        """Find a model, without reading its weights.

        Args:
            place: a directory (of a checkpoint, an adapter, a run), an id on the Hub, or `embedded`.
            name: what a report calls it; by default the last part of the place.
            loading: arguments of `from_pretrained`; a `revision` is one of this place on the Hub, and the base of an
                adapter is read at the revision that the adapter names.

        Raises:
            FNSFTError: nothing is there, it is no model, or an adapter whose base cannot be had.
        """
        found = _path(place)
        name = name or Path(found).name or place
        record = _read_record(found, loading.get("revision"))
        if (directory := _adapter_directory(found, loading.get("revision"))) is not None:
            adapter = SavedAdapter.read(directory)
            loading = {key: value for key, value in loading.items() if key != "revision"}
            _check_answers(place, adapter.base_config(**_source(loading)), adapter.config)
            return cls(name, place, adapter, loading, record=record)
        _check_answers(place, _model_config(found, place, loading))
        return cls(name, place, None, loading, record=record)

    def base(self) -> "EvaluatedModel | None":
        """The base model of an adapter, with the adapter's tokenizer, so that prompts are the same."""
        if self.adapter is None:
            return None
        return replace(self, name="base", is_base=True, record=None)

    def masked(self) -> "EvaluatedModel | None":
        """The same under the mask that it trained under; `None` where it trained without one."""
        if self.record is None or not self.record.get("mask_mode"):
            return None
        return replace(self, name=f"{self.name} (masked)", is_masked=True)

    def outline(self) -> PreTrainedModel:
        """Its structure without weights (on the device `meta`)."""
        if self.adapter is not None:
            return self.adapter.outline(**_source(self.loading))
        config = _model_config(_path(self.place), self.place, self.loading)
        with torch.device("meta"):
            trusts = self.loading.get("trust_remote_code", False)
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trusts)

    def load_tokenizer(self):
        """Its tokenizer: that beside an adapter, with the prompt format of its training.

        Raises:
            FNSFTError: there is none.
        """
        if self.adapter is not None:
            processor = self.adapter.load_processor(**_source(self.loading))
            return getattr(processor, "tokenizer", processor)
        missing = f"the model {self.place!r} has no tokenizer that can be loaded"
        remedy = "save it there (tokenizer.save_pretrained)"
        with library_errors(lambda error: f"{missing} ({first_line(error)}); {remedy}"):
            tokenizer = AutoTokenizer.from_pretrained(_path(self.place), **_source(self.loading))
        if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of a type without files
            raise FNSFTError(f"{missing} (its vocabulary is empty); {remedy}")
        return tokenizer

    def load(self, device: torch.device | str | None = None) -> PreTrainedModel:
        """Load it, in evaluation mode, under the mask if it is asked for.

        Args:
            device: where to put it; where it is loaded to by default.

        Raises:
            FNSFTError: it cannot be loaded, or its record does not fit it.
        """
        if self.adapter is None:
            model = load_model(_path(self.place), **self.loading)
        else:
            model = self.adapter.load_base(**self.loading)
        if device is not None and "device_map" not in self.loading:
            model.to(device)
        if self.adapter is not None and not self.is_base:
            model = self.adapter.load_onto(model)
        if self.is_masked:
            self._mask(model)
        return model.eval()

    def _mask(self, model: nn.Module) -> MaskHandle:
        """Put the mask on that it trained under."""
        about = self.record
        mask = recorded_neurons(self.place, about, model)
        return forward_mask(model, about["mask_mode"], mask, factor=about.get("mask_factor"))

    def about(self, model: nn.Module) -> dict[str, Any]:
        """What it is, as JSON values.

        Args:
            model: as it was loaded.
        """
        found: dict[str, Any] = {"name": self.name, "place": self.place, "kind": self._kind}
        if self.adapter is not None:
            config = self.adapter.config
            found |= {"base": config.base_model_name_or_path, "revision": config.revision}
            if not self.is_base:
                found["peft_type"] = str(getattr(config.peft_type, "value", config.peft_type))
        elif self.loading.get("revision"):
            found["revision"] = self.loading["revision"]
        commit = getattr(model.config, "_commit_hash", None)
        found |= {"commit": commit} if commit else {}
        found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        if note := lesion_note(model):
            found["baked"] = " ".join(note.split())
        return found | {"mask": self.record["mask_mode"] if self.is_masked else None}

    @property
    def _kind(self) -> str:
        if self.is_base:
            return "base model"
        return "model" if self.adapter is None else "adapter"


def recorded_neurons(place: str, record: dict[str, Any], model: nn.Module) -> NeuronMask:
    """The neurons that a run selected, over the layers that its networks cover.

    Args:
        place: directory or id of what the run has written.
        record: its `selection.json`.
        model: of the architecture, with or without weights.

    Raises:
        FNSFTError: the record was changed, or is of another model.
    """
    widths = StoredTemplate.open(place).description.widths
    config = record["network_config"]
    sites = find_neuron_sites(model, kind=config["ica_site"], layers=config["ica_layers"])
    covered = {site.layer: site.width for site in sites if site.layer in widths}
    mask = NeuronMask.from_ranges(record["neurons"], covered, config["ica_site"])
    if mask.sha256 != record["selected"]["sha256"]:
        raise FNSFTError(
            f"{place}: the neurons of {NETWORK_DIR}/{SELECTION_FILE} do not have the SHA-256 that stands there; it "
            "was changed, or belongs to another model"
        )
    return mask


def _source(loading: dict[str, Any]) -> dict[str, Any]:
    given = {key: loading[key] for key in _SOURCE if loading.get(key) is not None}
    return {"trust_remote_code": False} | given  # without, transformers asks at the terminal


def _file(place: str, file: str, revision: str | None) -> Path | None:
    """A file of a directory or of a repository; `None` where it has none."""
    if Path(place).exists() or not is_hub_id(place):
        path = Path(place) / file
        return path if path.is_file() else None
    try:
        return fetch_file(place, file, revision=revision).path
    except FNSFTError:  # which file it is that cannot be had, is said where the model is asked for
        return None


def _read_record(place: str, revision: str | None) -> dict[str, Any] | None:
    file = _file(place, f"{NETWORK_DIR}/{SELECTION_FILE}", revision)
    if file is None:
        return None
    return read_record(file)


def read_record(file: Path) -> dict[str, Any]:
    """What a run has written of its networks (`selection.json`).

    Raises:
        FNSFTError: it is no JSON, or lacks what the neurons and the mask of the run are known by.
    """
    try:
        record = from_json(file.read_text(encoding="utf-8"))
        config, mode = record["network_config"], record["mask_mode"]
        texts = [record[name]["sha256"] for name in ("selected", "trainable")]
        texts += [part for pair in record["neurons"].items() for part in pair]
        is_known = config["ica_site"] in SITES and isinstance(config["ica_layers"], str | list | None)
        if not is_known or mode not in (None, *_MASK_MODES) or not all(isinstance(text, str) for text in texts):
            raise ValueError("the site, the layers, the mask or the neurons are none")
        if mode == "amplify" and not isinstance(record["mask_factor"], int | float):
            raise ValueError("amplify without a factor")
    except (OSError, *WRONG_VALUES) as error:
        raise FNSFTError(f"{file} cannot be read ({error}); it is what a run writes beside its weights") from error
    return record


def _adapter_directory(place: str, revision: str | None) -> Path | None:
    """Where an adapter lies, downloaded if it is on the Hub; `None` for a whole model."""
    file = _file(place, _ADAPTER_CONFIG, revision)
    if file is None or Path(place).exists():
        return file and file.parent
    from huggingface_hub import snapshot_download

    with hub_errors(place, revision):
        return Path(snapshot_download(place, revision=revision, library_name="fnsft_trl"))


def _path(place: str) -> str:
    """Where a model is, for `from_pretrained`."""
    path = Path(place).expanduser()
    return str(path) if path.exists() else resolve_model(place)


def _check_answers(place: str, config: PretrainedConfig, adapter: PeftConfig | None = None) -> None:
    """See that a model is one that continues text, by its configuration."""
    kind = model_class(config, adapter)
    has_head = kind is AutoModelForCausalLM or (issubclass(kind, PreTrainedModel) and kind.can_generate())
    if config.is_encoder_decoder or not has_head:
        raise FNSFTError(
            f"{place} is a {kind.__name__}, which has no generation config or continues no text; only causal language "
            "models are scored"
        )


def _model_config(found: str, place: str, loading: dict[str, Any]) -> PretrainedConfig:
    """The configuration of a whole model."""
    path = Path(found)
    if path.is_dir() and not (path / "config.json").is_file():
        checkpoints = sorted(path.glob("checkpoint-[0-9]*"), key=lambda folder: (len(folder.name), folder.name))
        inner = f"; its newest checkpoint is {checkpoints[-1]}: give that" if checkpoints else ""
        raise FNSFTError(f"{place} holds neither a model (config.json) nor an adapter ({_ADAPTER_CONFIG}){inner}")
    if path.is_file():
        raise FNSFTError(f"{place} is a file; give the directory of a model, an adapter or a run, or an id on the Hub")
    with library_errors(
        lambda error: (
            f"the model {place!r} cannot be loaded ({first_line(error)}); give the directory of a model, an adapter "
            "or a run, an id on the Hub, or `embedded`"
        )
    ):
        return AutoConfig.from_pretrained(found, **_source(loading))
