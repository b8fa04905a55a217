"""What a full fine-tune has changed beside its base model, taken back in part."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import Conv1D, PreTrainedModel

from ..errors import FNSFTError
from ..finite import largest
from ..interventions.restoring import Restoration, RowsChange
from ..neurons.sites import linear_shape
from .restored import Places, check_changed, check_layers, copy_beside, layer_of


_WEIGHTS = ("config.json", "generation_config.json", "model.safetensors.index.json", "pytorch_model.bin")


@dataclass(frozen=True)
class _Linear:
    """A linear module whose weight was trained."""

    name: str
    is_transposed: bool


class ModelChanges:
    """
    What a full fine-tune changes.

    Weights of linear layers are projected. Norms, embeddings and whatever else has no input of vectors, or only a
    scale, gets its base value back where anything is projected.

    Args:
        base: the base model, which becomes the restored one in turn.
        tuned: the fine-tuned model, in the same precision; its weights are held on the CPU.
        layers: the layers that are restored; all by default.

    Attributes:
        modules (`list[str]`): the linear modules that are restored.
        others (`list[str]`): the other parameters that are.

    Raises:
        FNSFTError: the two are not of one architecture, or are equal; a weight is quantised, holds experts, or is NaN
            or infinite; or no such layer.
    """

    def __init__(self, base: PreTrainedModel, tuned: PreTrainedModel, *, layers: Sequence[int] | None = None) -> None:
        before, after = dict(base.named_parameters()), dict(tuned.named_parameters())
        _check_same(before, after)
        self._config, self._generation = tuned.config, tuned.generation_config
        changed = [name for name in before if not torch.equal(before[name].cpu(), after[name].cpu())]
        if not changed:
            raise FNSFTError("the fine-tuned model equals its base in every weight; there is nothing to restore")
        for name in changed:
            for of, values in (("base", before), ("fine-tuned", after)):
                check_changed(values[name], f"the {of} model holds {name}")
        self.layers = None if layers is None else frozenset(layers)
        check_layers(self.layers, dict.fromkeys(changed))
        self._before = {name: before[name].detach().cpu().clone() for name in changed}
        self._after = {name: after[name].detach().cpu() for name in changed}
        self._linears = list(_linears(base, changed))
        of_linears = {f"{each.name}.{part}" for each in self._linears for part in ("weight", "bias")}
        self.others = [name for name in changed if name not in of_linears and self._is_restored(name)]
        if experts := next((name for name in self.others if before[name].dim() > 2), None):
            raise FNSFTError(
                f"{experts} was trained and holds experts or filters, whose inputs have no directions here; give the "
                "weights of linear layers alone"
            )
        self.modules = [each.name for each in self._linears if self._is_restored(f"{each.name}.weight")]

    def _is_restored(self, parameter: str) -> bool:
        return self.layers is None or layer_of(parameter) in self.layers

    def apply(self, model: PreTrainedModel, how: Restoration, places: Places) -> float:
        """Give a model the values that are left; see [`~fnsft_trl.export.restored.AdapterChanges.apply`]."""
        ratios: list[float] = []
        is_projected = bool(how.directions or how.networks)
        self._write(model, self._after)
        for each in self._linears:
            if each.name in self.modules:
                left = places.left(each.name, self._change(each, self._after), how)
                self._write(model, self._parameters(each, left))
                values = dict(model.get_submodule(each.name).named_parameters(recurse=False))
                written = self._change(each, {f"{each.name}.{name}": value for name, value in values.items()})
                ratios.append(places.ratio(each.name, written, how))
        scale = 1.0 if how.neurons else 0.0 if is_projected else how.scale
        for name in self.others:
            before, after = self._before[name].double(), self._after[name].double()
            self._write(model, {name: before + scale * (after - before)})
        return largest(ratios)

    def clear(self, model: PreTrainedModel) -> None:
        """Give a model the values of the base."""
        self._write(model, self._before)

    def save(self, model: PreTrainedModel, how: Restoration, places: Places, output_dir: str | os.PathLike) -> None:
        """Write the restored model, with what lies beside the fine-tuned one.

        Args:
            model: the model, which gets these values.
            how, places: as for [`apply`].
            output_dir: a directory, made if it does not exist.
        """
        self.apply(model, how, places)
        output_dir = Path(output_dir)
        source = Path(self._config.name_or_path)
        weights = {path.name for path in source.glob("*.safetensors")} | {path.name for path in source.glob("*.bin")}
        output_dir.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            copy_beside(source, output_dir, {*weights, *_WEIGHTS})
        model.config, model.generation_config = self._config, self._generation
        model.to(self._config.dtype or model.dtype).save_pretrained(output_dir)

    @torch.no_grad()
    def _write(self, model: nn.Module, values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            model.get_parameter(name).copy_(value)

    def _change(self, linear: _Linear, values: dict[str, torch.Tensor]) -> RowsChange:
        """All rows of D, in float64, between the base and some values."""
        weight, bias = f"{linear.name}.weight", f"{linear.name}.bias"
        found = {
            name: values[name].detach().cpu().double() - self._before[name].double()
            for name in (weight, bias)
            if name in self._before
        }
        rows = found[weight].T if linear.is_transposed else found[weight]
        return RowsChange(rows, found.get(bias))

    def _parameters(self, linear: _Linear, change: RowsChange) -> dict[str, torch.Tensor]:
        """The values of a linear module, of what is left of its change."""
        weight, bias = f"{linear.name}.weight", f"{linear.name}.bias"
        rows = change.rows.T if linear.is_transposed else change.rows
        found = {weight: self._before[weight].double() + rows}
        if change.bias is not None:
            found[bias] = self._before[bias].double() + change.bias
        return found


def _check_same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    for name, value in before.items():
        if name not in after or after[name].shape != value.shape:
            raise FNSFTError(
                f"the fine-tuned model has no {name} of the shape {tuple(value.shape)}, which its base has; give the "
                "model that it was trained from (base)"
            )
        if not value.is_floating_point():
            raise FNSFTError(f"{name} is quantised; a full fine-tune is restored in full precision")


def _linears(model: nn.Module, changed: Sequence[str]) -> Iterator[_Linear]:
    """The linear modules that have changed, but those whose weight is an embedding's too."""
    embedding = model.get_input_embeddings().weight
    for name in dict.fromkeys(parameter.rpartition(".")[0] for parameter in changed):
        module = model.get_submodule(name)
        if linear_shape(module) is None or module.weight is embedding or f"{name}.weight" not in changed:
            continue
        yield _Linear(name, isinstance(module, Conv1D))
