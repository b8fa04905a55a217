"""WholeSource: what an export writes as a whole model, from a saved adapter or from a model that was trained whole."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import AutoProcessor, AutoTokenizer, PretrainedConfig, PreTrainedModel

from ..errors import FNSFTError, library_errors
from ..evaluation.evaluated import read_record
from ..hub.card import TAGS, card_text, merged_card
from ..hub.files import check_links
from ..template.storage import CARD_FILE, NETWORK_DIR, SELECTION_FILE
from ..template.template import FunctionalNetworkTemplate
from ..tuner.saved import SavedAdapter, first_line, load_model, load_outline


ADAPTER_DIR, GGUF_FILE = "adapter", "model.gguf"  # what may lie beside an exported model


@dataclass(frozen=True)
class WholeSource:
    """A saved adapter with its base model, or a model that was saved whole.

    Attributes:
        directory (`Path`): where it lies.
        adapter (`SavedAdapter` or `None`): of an adapter.
    """

    directory: Path
    adapter: SavedAdapter | None

    @classmethod
    def read(cls, directory: str | os.PathLike) -> "WholeSource":
        """Find what lies in a directory, without reading weights.

        Raises:
            FNSFTError: neither an adapter nor a model, an adapter that merges into no weights, or a card or networks
                that are links to elsewhere.
        """
        path = Path(directory).expanduser()
        check_links(path, (CARD_FILE, f"{NETWORK_DIR}/**/*"))
        if (path / "adapter_config.json").is_file():
            adapter = SavedAdapter.read(path)
            if adapter.config.is_prompt_learning:
                raise FNSFTError(
                    f"{directory} holds an adapter of type {adapter.config.peft_type}, which is part of the input and "
                    "merges into no weights; load it with PEFT"
                )
            return cls(path, adapter)
        if not (path / "config.json").is_file():
            raise FNSFTError(f"{directory} holds neither a model (config.json) nor an adapter (adapter_config.json)")
        return cls(path, None)

    @property
    def places(self) -> dict[str, str | os.PathLike]:
        """What is read, in words -> its place."""
        if self.adapter is None:
            return {"the model": self.directory}
        return {"the adapter": self.directory, "its base model": self.adapter.config.base_model_name_or_path}

    @property
    def base(self) -> str:
        """The model whose weights the exported ones are compared with: that of an adapter, or itself."""
        return str(self.directory) if self.adapter is None else self.adapter.config.base_model_name_or_path

    @cached_property
    def record(self) -> dict[str, Any] | None:
        """What the run that made it says that it selected, trained and masked; `None` without networks."""
        file = self.directory / NETWORK_DIR / SELECTION_FILE
        return read_record(file) if file.is_file() else None

    def outline(self, **loading) -> PreTrainedModel:
        """Its structure without weights (on the device `meta`)."""
        return load_outline(self.directory, **loading) if self.adapter is None else self.adapter.outline(**loading)

    def load_processor(self, **loading):
        """Its tokenizer or processor.

        Raises:
            FNSFTError: there is none, or it does not load.
        """
        if self.adapter is not None:
            return self.adapter.load_processor(**loading)
        trusts = {"trust_remote_code": loading.get("trust_remote_code", False)}
        with library_errors(
            lambda error: f"no tokenizer can be loaded from {self.directory} ({first_line(error)}); save it there"
        ):
            try:
                return AutoProcessor.from_pretrained(self.directory, **trusts)
            except ValueError:  # a model of text has no more than a tokenizer
                return AutoTokenizer.from_pretrained(self.directory, **trusts)

    def load(self, *, dtype: str = "auto", **loading) -> PreTrainedModel | PeftModel:
        """The model as it was trained: whole, or the base with the adapter on it.

        Args:
            dtype: precision; `"auto"` is that of the checkpoint.
            loading: further arguments of `from_pretrained`.
        """
        if self.adapter is None:
            loading = {key: value for key, value in loading.items() if key != "revision"}
            return load_model(str(self.directory), dtype=dtype, **loading)
        return self.adapter.load_onto(self._load_base(dtype, loading))

    def _load_base(self, dtype: str, loading: dict) -> PreTrainedModel:
        base = self.adapter.load_base(dtype=dtype, **loading)
        self._check_precision(base.config)
        if (self.directory / NETWORK_DIR).is_dir():  # warns where a branch of the base model has moved on
            FunctionalNetworkTemplate.from_pretrained(self.directory / NETWORK_DIR).check_model(base)
        return base

    def check_base(self, loading: dict) -> None:
        """See, before anything is loaded, that the base model of an adapter is there and not quantised."""
        if self.adapter is not None and "quantization_config" not in loading:
            self._check_precision(self.adapter.base_config(**loading))

    def _check_precision(self, config: PretrainedConfig) -> None:
        """Refuse a quantised base, whatever the adapter: its frozen neurons would be quantised anew."""
        if getattr(config, "quantization_config", None) is not None:
            raise FNSFTError(
                f"the base model {self.base} is quantised, and a merge would quantise all of it anew, frozen neurons "
                "included; name the same model in full precision in base_model_name_or_path of "
                f"{self.directory}/adapter_config.json, or export a plain LoRA"
            )

    def check_tokens(self, tokenizer, model: nn.Module, loading: dict) -> None:
        """Refuse tokens that were added for the training of an adapter and have no rows."""
        rows = len(model.get_input_embeddings().weight)
        if self.adapter is None or not self.adapter.has_tokenizer or len(tokenizer) <= rows:
            return
        of_base = self.adapter.load_processor(of_base=True, **loading)
        if len(tokenizer) > len(
            getattr(of_base, "tokenizer", of_base)
        ):  # some models have rows for fewer from the start
            raise FNSFTError(
                f"the tokenizer in {self.directory} has {len(tokenizer)} tokens and the model {rows} rows for them: "
                "the adapter was saved without the rows of those that were added; save it with "
                "save_embedding_layers=True"
            )

    def card(self, pipeline: str | None) -> str:
        """The README of a whole model made of it."""
        file = self.directory / CARD_FILE
        own = file.read_text(encoding="utf-8") if file.is_file() else None
        if self.adapter is not None:
            return merged_card(self.base, own, pipeline=pipeline)
        if own is not None:
            return own
        metadata = {"library_name": "transformers", "pipeline_tag": pipeline, "tags": sorted(TAGS[:2])}
        return card_text(metadata, f"\n# {self.directory.resolve().name}\n")
