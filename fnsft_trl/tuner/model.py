"""NeuronTunerModel: puts a NeuronDeltaLayer around every linear layer that holds a part of a selected neuron."""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..neurons import WeightSlice, check_modules_to_save, find_neuron_sites
from ..selection import NeuronMask
from .config import NeuronTunerConfig
from .layer import NeuronDeltaLayer


class NeuronTunerModel(BaseTuner):
    """A model with neuron deltas.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model to adapt.
        config ([`NeuronTunerConfig`]): which neurons.
        adapter_name (`str`): name of the adapter.

    Raises:
        FNSFTError: the selected neurons do not exist in the model, or `modules_to_save` holds a part of an MLP.
    """

    prefix: str = "neuron_delta_"
    tuner_layer_cls = NeuronDeltaLayer

    def _prepare_adapter_config(self, peft_config: NeuronTunerConfig, model_config: dict) -> NeuronTunerConfig:
        sites = find_neuron_sites(self.model, kind=peft_config.site)
        widths = {site.layer: site.width for site in sites}
        mask = NeuronMask.from_ranges(peft_config.neurons, widths, peft_config.site)
        # module name -> (the neurons it holds a part of, where)
        self._parts: dict[str, tuple[torch.Tensor, list[WeightSlice]]] = {}
        for site in sites:
            neurons = mask.indices(site.layer)
            if len(neurons):
                site.check_no_experts("a neuron delta")
                for name in site.layout.modules():
                    slices = [part for part in site.layout.slices if part.module_name == name]
                    self._parts[name] = (neurons, slices)
        check_modules_to_save(peft_config.modules_to_save, list(self._parts))
        peft_config.target_modules = sorted(self._parts)
        return peft_config

    def _create_and_replace(
        self,
        peft_config: NeuronTunerConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        neurons, slices = self._parts[current_key]
        layer = target if isinstance(target, NeuronDeltaLayer) else NeuronDeltaLayer(target)
        layer.update_layer(adapter_name, slices, neurons, inference_mode=peft_config.inference_mode)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)  # an additional adapter is not trained until it is made active
            self._replace_module(parent, target_name, layer, target)
