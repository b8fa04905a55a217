"""SavedAdapter: an adapter on disk, of any PEFT method, and the base model that it was trained on."""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel, load_peft_weights
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

from ..errors import FNSFTError, library_errors


PREFIX = "base_model.model."  # of the names of PEFT's tensors

# Task type of an adapter -> what its base model is loaded with.
_LOADERS = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": transformers.AutoModel,
}
_GENERATING = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
# Parts of the names of tensors that PEFT saves of a module as a whole.
_WRAPPERS = {"token_adapter", "base_layer", "original_module", "modules_to_save"}
# Arguments of `from_pretrained` that say where something lies, for configurations and tokenizers too.
_SOURCE = ("revision", "trust_remote_code", "token", "cache_dir", "local_files_only", "subfolder")


@dataclass(frozen=True)
class SavedAdapter:
    """A saved adapter of any PEFT method.

    Attributes:
        directory (`Path`): where it lies.
        config (`PeftConfig`): its configuration, which names its base model.
    """

    directory: Path
    config: PeftConfig

    @classmethod
    def read(cls, directory: str | os.PathLike) -> "SavedAdapter":
        """Read the configuration of an adapter.

        Raises:
            FNSFTError: there is none in the directory, or it does not name its base model.
        """
        if not (Path(directory) / "adapter_config.json").is_file():
            raise FNSFTError(f"{directory} holds no adapter_config.json, as a saved adapter does; give its directory")
        with library_errors(
            lambda error: (
                f"{directory}/adapter_config.json cannot be read ({first_line(error)}); save the adapter again"
            )
        ):
            config = PeftConfig.from_pretrained(str(directory))
        if not config.base_model_name_or_path:
            raise FNSFTError(
                f"{directory}/adapter_config.json does not name its base model; write it there "
                "(base_model_name_or_path)"
            )
        return cls(Path(directory), config)

    @cached_property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The tensors of its file, by their names there."""
        with library_errors(
            lambda error: (
                f"the weights of the adapter {self.directory} cannot be read ({first_line(error)}); save it again"
            )
        ):
            return load_peft_weights(str(self.directory), device="cpu")

    @cached_property
    def whole(self) -> dict[str, torch.Tensor]:
        """Parameter of the base model -> its whole value, where the adapter holds that: heads, embeddings."""
        found = {}
        for key, tensor in self.tensors.items():
            if "neuron_delta_" not in key and ".lora_" not in key and not key.endswith("_tokens_delta"):
                parts = key.removeprefix(PREFIX).split(".")
                found[".".join(part for part in parts if part not in _WRAPPERS)] = tensor
        return found

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer lies beside the adapter."""
        return (self.directory / "tokenizer_config.json").is_file()

    def source(self, base: str | os.PathLike | None = None, **loading) -> tuple[str, dict[str, Any]]:
        """Where the base model is: its name, and the arguments of `from_pretrained` that say which.

        Args:
            base: another place of the base model.
            loading: arguments of `from_pretrained`; `revision` is by default the one in the adapter's configuration.
        """
        name = self.config.base_model_name_or_path
        loading = {"trust_remote_code": False, **loading}  # without, transformers asks at the terminal
        if base is None or str(base) == name:
            loading = {"revision": self.config.revision, **loading}
        return str(base or name), {key: loading[key] for key in _SOURCE if loading.get(key) is not None}

    def load_processor(self, *, of_base: bool = False, **loading):
        """The tokenizer or processor that lies beside the adapter, or else that of the base model.

        Args:
            of_base: take that of the base model in any case.
            loading: arguments of `from_pretrained` that say which the base model is.

        Raises:
            FNSFTError: there is none, or it does not load.
        """
        name, source = self.source(**loading)
        if self.has_tokenizer and not of_base:
            name, source = str(self.directory), {key: source[key] for key in source if key == "trust_remote_code"}
        with suppress(FNSFTError), library_errors(first_line):
            return AutoProcessor.from_pretrained(name, **source)
        with library_errors(  # of a processor no more may be there than its tokenizer
            lambda error: (
                f"no tokenizer can be loaded from {name} ({first_line(error)}); save the one that was trained with "
                f"into {self.directory} (tokenizer.save_pretrained)"
            )
        ):
            return AutoTokenizer.from_pretrained(name, **source)

    def base_config(self, base: str | os.PathLike | None = None, **loading) -> PretrainedConfig:
        """The configuration of the base model.

        Args:
            base: another place of the base model.
            loading: arguments of `from_pretrained` that say which it is.

        Raises:
            FNSFTError: it cannot be loaded, or is an adapter.
        """
        name, source = self.source(base, **loading)
        if (Path(name) / "adapter_config.json").is_file():
            raise FNSFTError(
                f"the base model {name} is an adapter itself (adapter_config.json); merge that first, and name the "
                f"result in base_model_name_or_path of {self.directory}/adapter_config.json"
            )
        with _loading_errors(name, self.directory):
            return AutoConfig.from_pretrained(name, **source)

    def outline(self, base: str | os.PathLike | None = None, **loading) -> PreTrainedModel:
        """The base model's structure without weights (on the device `meta`), with labels as many as the adapter has.

        Args:
            base: another place of the base model.
            loading: arguments of `from_pretrained` that say which it is.

        Raises:
            FNSFTError: its configuration cannot be loaded, or no model of the adapter's task can be made of it.
        """
        name, source = self.source(base, **loading)
        config = self.base_config(base, **loading)
        kind = model_class(config, self.config)
        with _loading_errors(name, self.directory):
            made = _outline(kind, config, source)
            labels = self._labels(made)
            if labels is None:
                return made
            config.num_labels = labels
            return _outline(kind, config, source)

    def load_base(
        self, base: str | os.PathLike | None = None, *, dtype: str | torch.dtype = "auto", **loading
    ) -> PreTrainedModel:
        """Load the base model as it was when the adapter was trained: with its head, and as many labels and tokens.

        Rows of embeddings that the base has not are the adapter's, and so is a head that it has not.

        Args:
            base: another place of the base model.
            dtype: precision; `"auto"` is that of its checkpoint.
            loading: further arguments of `from_pretrained`; `revision` is by default the adapter's.

        Raises:
            FNSFTError: it cannot be loaded, or has weights that neither the checkpoint nor the adapter holds.
        """
        name, source = self.source(base, **loading)
        outline = self.outline(base, **loading)
        loading = {key: value for key, value in loading.items() if key not in _SOURCE} | source
        with _loading_errors(name, self.directory):
            model, found = model_class(outline.config, self.config).from_pretrained(
                name,
                config=outline.config,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **loading,
            )
        random = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])} - self.whole.keys()
        if random:
            raise FNSFTError(
                f"neither {name} nor {self.directory} holds {min(random)}, which a {type(model).__name__} has, so it "
                "would be random; save the adapter with it (modules_to_save), or name the base model that it was "
                "trained on"
            )
        self._resize(model, name)
        return model

    def load_onto(self, base: PreTrainedModel, *, trains: bool = False) -> PeftModel:
        """Put the adapter on its base model.

        Args:
            base: the model.
            trains: whether the adapter is to be trained on.

        Raises:
            FNSFTError: the adapter's tensors are not those that the base model has a place for, or parts of it are
                offloaded to the disk.
        """
        if "disk" in (getattr(base, "hf_device_map", None) or {}).values():  # PEFT would copy weights to other files
            raise FNSFTError(
                f"{self.config.base_model_name_or_path} is partly offloaded to the disk (device_map), and no adapter "
                "can be put on such weights; leave device_map out: they are read from their files as they are used"
            )
        self.tensors  # noqa: B018 (read, so that a damaged file is not taken for a model that does not fit)
        with library_errors(lambda error: str(self._does_not_fit(base, str(error)))):
            model = PeftModel.from_pretrained(base, str(self.directory), is_trainable=trains)
            found = model.load_adapter(str(self.directory), model.active_adapter, is_trainable=trains)
        left = [key for key in found.unexpected_keys if not _WRAPPERS & set(key.split("."))]
        if found.missing_keys or left:
            raise self._does_not_fit(base, min([*found.missing_keys, *left]))
        return model

    def _does_not_fit(self, base: nn.Module, what: str) -> FNSFTError:
        return FNSFTError(
            f"the adapter {self.directory} does not fit {self.config.base_model_name_or_path}, loaded as "
            f"{type(base).__name__}: {what}; name the base model that it was trained on"
        )

    def _labels(self, outline: PreTrainedModel) -> int | None:
        """How many labels the head has that the adapter holds; `None` where they are as many as the base has."""
        shapes = {name: p.shape for name, p in outline.named_parameters() if name not in _embeddings(outline)}
        for name, tensor in self.whole.items():
            there = shapes.get(name, tensor.shape)
            if there != tensor.shape and there[:1] == (outline.config.num_labels,):
                return len(tensor)
        return None

    def _resize(self, model: PreTrainedModel, name: str) -> None:
        """Give the embeddings as many rows as the adapter was trained with."""
        names = _embeddings(model)
        if not names:
            return
        rows = len(model.get_input_embeddings().weight)
        held = self._rows_held(names, rows)
        wanted = max((max(numbers) + 1 for numbers in held.values()), default=rows)
        if wanted == rows:
            return
        model.resize_token_embeddings(wanted, mean_resizing=False)
        if _is_tied(model):
            copied = self.config.to_dict().get("modules_to_save") or ()
            shared = [held[key] for key in held if not any(_names_layer(layer, key) for layer in copied)]
            held = {key: set().union(held.get(key, ()), *shared) for key in names}
        for key in names:
            if missing := set(range(rows, wanted)) - held.get(key, set()):
                raise FNSFTError(
                    f"{name} has {rows} tokens and {self.directory} was trained with {wanted}, but it does not hold "
                    f"row {min(missing)} of {key}, which would be random; save the adapter with "
                    "save_embedding_layers=True"
                )

    def _rows_held(self, names: list[str], rows: int) -> dict[str, set[int]]:
        """Name of an embedding's weight -> its rows of which the values are those of the base or in the adapter."""
        held = {key: set(range(len(self.whole[key]))) for key in names if key in self.whole}
        trained = self.config.to_dict().get("trainable_token_indices") or {}
        for layer, numbers in (trained if isinstance(trained, dict) else {names[0]: trained}).items():
            held |= {key: {*range(rows), *numbers} for key in names if key not in held and _names_layer(layer, key)}
        return held


def load_model(name: str, *, dtype: str | torch.dtype = "auto", **loading) -> PreTrainedModel:
    """Load a model as the class that it was saved as.

    Args:
        name: directory or Hub id.
        dtype: precision; `"auto"` is that of its checkpoint.
        loading: further arguments of `from_pretrained`.

    Raises:
        FNSFTError: it cannot be loaded.
    """
    loading = {"trust_remote_code": False, **loading}
    with _loading_errors(name):
        config = AutoConfig.from_pretrained(name, **{key: loading[key] for key in _SOURCE if key in loading})
        return model_class(config).from_pretrained(name, dtype=dtype, **loading)


def load_outline(name: str, **loading) -> PreTrainedModel:
    """The structure of a model without weights (on the device `meta`), as the class that it was saved as.

    Args:
        name: directory or Hub id.
        loading: arguments of `from_pretrained` that say which it is.

    Raises:
        FNSFTError: its configuration cannot be loaded.
    """
    source = {"trust_remote_code": False, **{key: loading[key] for key in _SOURCE if loading.get(key) is not None}}
    with _loading_errors(name):
        config = AutoConfig.from_pretrained(name, **source)
        return _outline(model_class(config), config, source)


def _loading_errors(name: str, adapter: Path | None = None) -> AbstractContextManager[None]:
    moved = f"base_model_name_or_path of {adapter}/adapter_config.json"
    remedy = "" if adapter is None else f"; if it has moved, say where to in {moved}"
    return library_errors(lambda error: f"the model {name!r} cannot be loaded ({first_line(error)}){remedy}")


def model_class(config: PretrainedConfig, adapter: PeftConfig | None = None) -> type:
    """What a model is loaded with: the class that its adapter was trained on, or the one that it was saved as.

    Args:
        config: the model's.
        adapter: that of an adapter on it.

    Raises:
        FNSFTError: the adapter is of a task, or on a class, that transformers does not have.
    """
    own = next(filter(None, map(_class_named, config.architectures or ())), None)
    if adapter is None or (adapter.task_type is None and not adapter.auto_mapping):
        return own or AutoModelForCausalLM
    if adapter.task_type is None:
        name = adapter.auto_mapping["base_model_class"]
        if (found := _class_named(name)) is None:
            raise FNSFTError(
                f"the adapter was trained on a {name}, which is no model of transformers; merge it in Python: load "
                "that model, PeftModel.from_pretrained, merge_and_unload"
            )
        return found
    if adapter.task_type not in _LOADERS:
        raise FNSFTError(f"the adapter is of task {adapter.task_type!r}; it must be one of: {', '.join(_LOADERS)}")
    if adapter.task_type in _GENERATING and own is not None and own.can_generate():
        return own  # as SFTTrainer loads it
    return _LOADERS[adapter.task_type]


def _class_named(name: str) -> type[PreTrainedModel] | None:
    found = getattr(transformers, name, None)
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def first_line(error: Exception) -> str:
    """The first line of what an error says; or that a model's own code was not run, and how it would be."""
    if "trust_remote_code" in str(error):
        return "it brings code of its own, which runs only if that is asked for: trust_remote_code"
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _outline(kind: type, config: PretrainedConfig, source: Mapping[str, Any]) -> PreTrainedModel:
    with torch.device("meta"):
        if issubclass(kind, PreTrainedModel):
            return kind(config)
        return kind.from_config(config, trust_remote_code=source.get("trust_remote_code", False))


def _embeddings(model: PreTrainedModel) -> list[str]:
    """Names of the weights of the input and the output embeddings, which may be one weight."""
    found = []
    modules = {module: name for name, module in model.named_modules()}
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer in modules:
            found.append(f"{modules[layer]}.weight")
    return found


def _is_tied(model: PreTrainedModel) -> bool:
    outputs = model.get_output_embeddings()
    return outputs is not None and outputs.weight is model.get_input_embeddings().weight


def _names_layer(layer: str, parameter: str) -> bool:
    """Whether the name of a layer, or the end of one, is that of a weight."""
    return f".{parameter}".removesuffix(".weight").endswith(f".{layer}".removesuffix(".weight"))
