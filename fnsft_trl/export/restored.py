"""What a fine-tune has changed, linear map by linear map, taken back in part: of an adapter, or of a whole model."""

import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from ..constraints.lora_config import HELD_LORA_FIELDS, REFUSED_INITS
from ..discovery.directions import KeptDirections
from ..errors import FNSFTError
from ..finite import largest
from ..interventions.restoring import Change, ColumnsChange, LoraChange, Positions, Restoration, RowsChange
from ..neurons.sites import find_neuron_sites
from ..tuner import NeuronTunerConfig
from ..tuner.saved import PREFIX, SavedAdapter
from .adapter import delta_key, delta_mask


_A, _B, _BIAS = ".lora_A.weight", ".lora_B.weight", ".lora_B.bias"
_WEIGHTS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# What a trainer leaves beside an adapter, which belongs to the run and not to what it made.
_OF_THE_RUN = re.compile(
    r"(optimizer|scheduler|scaler|rng_state|training_args|trainer_state|results|report|complete).*|checkpoint-\d+|runs"
)
# LoraConfig field -> why the change of the weight is not B A, or not the same for every input.
_REFUSED_FIELDS = {
    "use_dora": "DoRA divides by the norm of the changed weight, so its change is not the product of its factors",
    "use_qalora": "QALoRA pools the inputs of lora_A",
    "use_bdlora": "block-diagonal LoRA stores A and B in a shape of its own",
    "velora_config": "VeLoRA replaces the input of lora_A by a projection",
    "kasa_config": "KaSA truncates the base weight",
    "monteclora_config": "MonteCLoRA samples the weights of lora_A",
    "arrow_config": "Arrow mixes several adapters per token",
    "alora_invocation_tokens": "an activated LoRA answers to some tokens only",
    "layer_replication": "replicated layers share their base weights",
    "megatron_config": "Megatron layers are sharded",
    "target_parameters": "experts are given the tokens routed to them, so their inputs have no directions here",
    "modules_to_save": "it holds modules that were trained as a whole, whose inputs may be no vectors",
    "trainable_token_indices": "it holds rows of the embedding, whose inputs are tokens and no vectors",
}
_OF_LORA = HELD_LORA_FIELDS - _REFUSED_FIELDS.keys() | {"lora_bias"}


@dataclass(frozen=True)
class Places:
    """
    Where changes are taken back.

    Attributes:
        kept (`dict[str, KeptDirections]`): networks whose directions take the place of the leading ones, or none (the
            empty string) -> the directions of the inputs of all modules.
        neurons (`dict[str, Positions]`): module -> the neurons of the networks.
    """

    kept: Mapping[str, KeptDirections]
    neurons: Mapping[str, Positions] = field(default_factory=dict)

    def left(self, module: str, change: Change, how: Restoration) -> Change:
        """What is left of the change of a module."""
        if how.neurons:
            return change.scaled(how.scale, self.neurons[module]) if module in self.neurons else change
        return change.restored(self._basis(module, how), self.kept[""].of(module).mean, how)

    def ratio(self, module: str, change: Change, how: Restoration) -> float:
        """||D U|| / ||D|| of what is left of a change; 0 where nothing is."""
        along, whole = change.left_in(self._basis(module, how))
        return along / whole if whole else 0.0

    def _basis(self, module: str, how: Restoration) -> torch.Tensor:
        basis = self.kept[how.networks].of(module).basis
        return basis if how.networks else basis[:, : how.directions]


@dataclass(frozen=True)
class AdapterChanges:
    """
    What a saved adapter changes: a LoRA of any origin, or neuron deltas.

    Attributes:
        saved (`SavedAdapter`): the adapter.
        changes (`dict[str, Change]`): module of the base model -> its change.
        layers (`frozenset[int]`, *optional*): the layers that are restored; all by default.
    """

    saved: SavedAdapter
    changes: dict[str, Change] = field(repr=False)
    layers: frozenset[int] | None = None

    @classmethod
    def read(cls, saved: SavedAdapter, *, layers: Sequence[int] | None = None, **loading) -> "AdapterChanges":
        """Read what an adapter changes.

        Args:
            saved: the adapter.
            layers: the layers that are restored; all by default.
            loading: arguments of `from_pretrained` that say which its base model is.

        Raises:
            FNSFTError: a method or a variant whose change has no directions, with the reason; no such layer; or a
                weight that is NaN or infinite.
        """
        config = saved.config
        is_delta = isinstance(config, NeuronTunerConfig)
        if not is_delta and not isinstance(config, LoraConfig):
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise FNSFTError(
                f"{saved.directory} is an adapter of type {kind}; LoRA, neuron deltas "
                "or a full fine-tune can be restored"
            )
        check_lora(LoraConfig(**(config.lora or {})) if is_delta else config, saved.directory)
        if is_delta:
            check_beside(config, saved.directory)
        changes: dict[str, Change] = {}
        names = {key.removeprefix(PREFIX).removesuffix(_A) for key in saved.tensors if key.endswith(_A)}
        for name in sorted(names):
            a, b = (saved.tensors[f"{PREFIX}{name}{part}"] for part in (_A, _B))
            changes[name] = LoraChange(a, b, saved.tensors.get(f"{PREFIX}{name}{_BIAS}"))
        if is_delta:
            changes |= _deltas(saved, **loading)
        for name, tensor in saved.tensors.items():
            check_changed(tensor, f"{saved.directory} holds {name}")
        found = cls(saved, changes, None if layers is None else frozenset(layers))
        left = set(saved.tensors) - set(found._tensors(changes))
        if left:
            raise FNSFTError(f"{saved.directory} holds {min(left)}, which is no change of a linear layer's weight")
        check_layers(found.layers, changes)
        return found

    @property
    def modules(self) -> list[str]:
        """Those that are restored."""
        return [name for name in self.changes if self.layers is None or layer_of(name) in self.layers]

    @property
    def is_lora(self) -> bool:
        """Whether it is a LoRA, which can be centred."""
        return isinstance(self.saved.config, LoraConfig)

    def restored(self, how: Restoration, places: Places) -> dict[str, Change]:
        """What is left of every change; outside of the layers that are restored, all of it."""
        return self.changes | {name: places.left(name, self.changes[name], how) for name in self.modules}

    def apply(self, model: PeftModel, how: Restoration, places: Places) -> float:
        """Give a model with the adapter the values that are left.

        Args:
            model: with the adapter.
            how: what is done.
            places: where, of all `modules`.

        Returns:
            The largest ||D U|| / ||D|| of any module, 0 where nothing is left of any.
        """
        changes = self.restored(how, places)
        self._load_into(model, changes)
        return largest(places.ratio(name, changes[name], how) for name in self.modules)

    def clear(self, model: PeftModel) -> None:
        """Give a model with the adapter values of 0: it then computes what its base does."""
        none = Restoration(scale=0.0)
        empty = {name: _empty(change) for name, change in self.changes.items()}
        self._load_into(model, {name: change.restored(*empty[name], none) for name, change in self.changes.items()})

    def save(self, model: PeftModel, how: Restoration, places: Places, output_dir: str | os.PathLike) -> None:
        """Write what is left as the same kind of adapter, with what lies beside it: tokenizer, card, networks.

        Args:
            model: with the adapter.
            how, places: as for [`apply`].
            output_dir: a directory, made if it does not exist.
        """
        output_dir = Path(output_dir)
        copy_beside(self.saved.directory, output_dir, _WEIGHTS)
        tensors = self._tensors(self.restored(how, places))
        config: PeftConfig = copy(self.saved.config)
        if any(key.endswith(_BIAS) for key in tensors):
            config.lora_bias = True
        config.save_pretrained(str(output_dir))
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, output_dir / "adapter_model.safetensors", metadata={"format": "pt"})

    def _load_into(self, model: PeftModel, changes: Mapping[str, Change]) -> None:
        tensors = self._tensors(changes)
        has_bias = any(key.endswith(_BIAS) for key in tensors)
        for name in self.changes if self.is_lora else ():
            _set_bias(model, name, has_bias)
        set_peft_model_state_dict(model, tensors, adapter_name=model.active_adapter)

    def _tensors(self, changes: Mapping[str, Change]) -> dict[str, torch.Tensor]:
        """As the file of the adapter holds them."""
        found = {}
        has_bias = any(isinstance(change, LoraChange) and change.bias is not None for change in changes.values())
        for name, change in changes.items():
            if isinstance(change, LoraChange):
                found |= {f"{PREFIX}{name}{_A}": change.a, f"{PREFIX}{name}{_B}": change.b}
                if has_bias:  # PEFT gives all modules of an adapter one, or none
                    found[f"{PREFIX}{name}{_BIAS}"] = (
                        torch.zeros_like(change.b[:, 0]) if change.bias is None else change.bias
                    )
            elif isinstance(change, ColumnsChange):
                found[f"{PREFIX}{name}.neuron_delta_weight"] = change.columns
            else:
                found[f"{PREFIX}{name}.neuron_delta_weight"] = change.rows
                if change.bias is not None:
                    found[f"{PREFIX}{name}.neuron_delta_bias"] = change.bias
        return found


def _empty(change: Change) -> tuple[torch.Tensor, torch.Tensor]:
    """A basis and a mean that do nothing."""
    if isinstance(change, LoraChange):
        width = change.a.shape[1]
    else:
        width = change.rows.shape[1] if isinstance(change, RowsChange) else int(change.positions.max()) + 1
    return torch.zeros(width, 0, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)


def copy_beside(source: Path, target: Path, weights: Collection[str]) -> None:
    """Copy what lies beside weights, but for what a run left there: tokenizer, card, networks.

    Args:
        source: a directory.
        target: another one, made if it does not exist.
        weights: names of files that are not copied.
    """
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.name in weights or _OF_THE_RUN.fullmatch(path.name) or path.resolve() == target.resolve():
            continue
        if path.is_dir():
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, target / path.name)


def layer_of(module: str) -> int | None:
    """The first number in a module's name; `None` where it is in no layer."""
    found = re.search(r"(?:^|\.)(\d+)\.", module)
    return found and int(found[1])


def check_layers(layers: frozenset[int] | None, modules: Mapping[str, Any]) -> None:
    """See that something was trained in every layer that is to be restored."""
    trained = {layer_of(name) for name in modules}
    if layers is not None and (idle := layers - trained):
        raise FNSFTError(f"layers names {min(idle)}, where nothing was trained; drop it")


def check_changed(tensor: torch.Tensor, what: str) -> None:
    """See that weights that were trained are numbers.

    Raises:
        FNSFTError: one is NaN or infinite.
    """
    if not tensor.isfinite().all():
        raise FNSFTError(f"{what}, which has NaN or infinite entries, so nothing can be restored; train again")


def check_lora(config: LoraConfig, place: Path) -> None:
    """Refuse a LoRA whose change of the weight is not B A, or is not all that the adapter changes.

    Raises:
        FNSFTError: naming the field.
    """
    plain = LoraConfig()
    for name in (each.name for each in fields(config)):
        value = getattr(config, name)
        if name not in _OF_LORA and value and value != getattr(plain, name):
            reason = _REFUSED_FIELDS.get(name, "this version of fnsft_trl does not know it")
            raise FNSFTError(
                f"{place} has {name}, and cannot be restored: {reason}; merge it, and give model and base"
            )
    init = str(config.init_lora_weights)
    for name, why in REFUSED_INITS.items():
        if name and (init == name or init.startswith(f"{name}_")):
            raise FNSFTError(
                f"{place} has init_lora_weights={init!r}, and cannot be restored: {why}; save it with "
                "path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
            )
    if config.bias != "none":
        raise FNSFTError(f"{place} has bias={config.bias!r}, and cannot be restored: it trained biases of the base")


def check_beside(config: NeuronTunerConfig, place: Path) -> None:
    """Refuse neuron deltas beside which embeddings or whole modules were trained."""
    for name in ("modules_to_save", "trainable_token_indices"):
        if getattr(config, name):
            raise FNSFTError(f"{place} has {name}, and cannot be restored: {_REFUSED_FIELDS[name]}")


def _deltas(saved: SavedAdapter, **loading) -> dict[str, Change]:
    """The changes of neuron deltas, by module."""
    config = saved.config
    sites = find_neuron_sites(saved.outline(**loading), kind=config.site)
    mask = delta_mask(config, sites)
    found: dict[str, Change] = {}
    for site in sites:
        for part in site.layout.slices:
            tensor = saved.tensors.get(delta_key(part))
            if tensor is None:
                continue
            if site.experts and part.module_name == site.experts.name:
                raise FNSFTError(
                    f"{saved.directory} holds deltas of experts ({part.module_name}), and cannot be restored: "
                    f"{_REFUSED_FIELDS['target_parameters']}"
                )
            positions = part.indices(mask.indices(site.layer))
            if part.parameter == "bias":
                found[part.module_name] = replace(found[part.module_name], bias=tensor)
            elif part.side == "output":
                found[part.module_name] = RowsChange(tensor, positions=positions)
            else:
                found[part.module_name] = ColumnsChange(tensor, positions)
    return found


def _set_bias(model: PeftModel, name: str, is_there: bool) -> None:
    """Let `lora_B` of a module have a bias, or none."""
    factor = model.get_base_model().get_submodule(name).lora_B[model.active_adapter]
    if is_there and factor.bias is None:
        factor.bias = nn.Parameter(factor.weight.new_zeros(factor.out_features), requires_grad=False)
    elif not is_there:
        factor.bias = None
