"""NeuronTunerModel: puts a layer with deltas around every module with weights of a selected neuron."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from peft import LoraConfig
from torch import nn

from ..compat.peft import BaseTuner, BaseTunerLayer, LoraLayer, check_target_module_exists, inject_beside
from ..errors import FNSFTError
from ..neurons.experts import Experts
from ..neurons.layout import WeightSlice
from ..neurons.mask import NeuronMask
from ..neurons.sites import NeuronSite, check_modules_to_save, find_neuron_sites, linear_shape
from .config import NeuronTunerConfig
from .experts import ExpertDeltaLayer
from .layer import NeuronDeltaLayer
from .linear import LinearDeltaLayer


class NeuronTunerModel(BaseTuner):
    """A model with neuron deltas, and LoRA on modules outside the MLPs where the configuration asks for it.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model to adapt.
        config ([`NeuronTunerConfig`]): which neurons.
        adapter_name (`str`): name of the adapter.

    Raises:
        FNSFTError: the selected neurons do not exist in the model, `modules_to_save` or the targets of LoRA have
            a part of an MLP, or another adapter of the model has another site.
    """

    prefix: str = "neuron_delta_"
    tuner_layer_cls = (NeuronDeltaLayer, LoraLayer)

    def _check_new_adapter_config(self, config: NeuronTunerConfig) -> None:
        super()._check_new_adapter_config(config)
        sites = sorted({config.site for config in self.peft_config.values()})
        if len(sites) > 1:
            raise FNSFTError(
                f"the adapters of one model must have one site, not {' and '.join(sites)}; load them into models of "
                "their own"
            )

    def _prepare_adapter_config(self, peft_config: NeuronTunerConfig, model_config: dict) -> NeuronTunerConfig:
        sites = find_neuron_sites(self.model, kind=peft_config.site)
        mask = self._mask(peft_config, sites)
        # module name -> (the selected neurons of its site, where in its parameters they are)
        self._slices: dict[str, tuple[torch.Tensor, list[WeightSlice]]] = {}
        for site in sites:
            neurons = mask.indices(site.layer)
            if len(neurons):
                for name in site.layout.modules():
                    slices = [slice_ for slice_ in site.layout.slices if slice_.module_name == name]
                    if len(slices[0].among(neurons)):  # routed experts, or the shared one, may have none of them
                        self._slices[name] = (neurons, slices)
        check_modules_to_save(peft_config.modules_to_save, list(self._slices))
        self._check_shared()
        self._lora_targets = self._find_lora_targets(peft_config.lora, sites) if peft_config.lora else []
        peft_config.target_modules = sorted([*self._slices, *self._lora_targets])
        return peft_config

    def _check_shared(self) -> None:
        """Refuse weights that others have too: a change of one would be a change of the other."""
        owners: dict[int, list[tuple[str, nn.Module]]] = {}  # where a parameter lies -> the modules that have it
        for name, module in self.model.named_modules():
            for parameter in module.parameters(recurse=False):
                if parameter.numel() and not parameter.is_meta:
                    owners.setdefault(parameter.data_ptr(), []).append((name, module))
        for name in self._slices:
            module = self.model.get_submodule(name)
            module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            for parameter in module.parameters(recurse=False):
                others = [other for other, owner in owners.get(parameter.data_ptr(), []) if owner is not module]
                if others:
                    raise FNSFTError(
                        f"{name} shares a weight with {others[0]}, so its neurons cannot have deltas of their own: "
                        "select neurons of other layers, or untie the two"
                    )

    def _prepare_model(self, peft_config: NeuronTunerConfig, model: nn.Module) -> None:
        """Put LoRA where the configuration asks for it."""
        if not peft_config.lora:
            return
        lora = LoraConfig(**peft_config.lora)
        # What else narrows the targets down was heeded in finding them.
        lora.target_modules, lora.exclude_modules, lora.layers_to_transform = set(self._lora_targets), None, None
        # Trainers make a reference from the very configuration of another adapter; the one to be made is the last.
        adapter_name = [name for name, config in self.peft_config.items() if config is peft_config][-1]
        inject_beside(lora, model, adapter_name)

    @staticmethod
    def _mask(peft_config: NeuronTunerConfig, sites: list[NeuronSite]) -> NeuronMask:
        return NeuronMask.from_ranges(
            peft_config.neurons, {site.layer: site.width for site in sites}, peft_config.site
        )

    def _find_lora_targets(self, lora: dict, sites: list[NeuronSite]) -> list[str]:
        """Names of the linear layers that get LoRA."""
        config = LoraConfig(**lora)
        inner = tuple(f"{n}." for n, module in self.model.named_modules() if isinstance(module, BaseTunerLayer))
        targets = [
            name
            for name, module in self.model.named_modules()
            if linear_shape(module) is not None
            and not name.startswith(inner)
            and check_target_module_exists(config, name)
        ]
        of_mlps = {name for site in sites for name in (site.down_name, *site.up_names)}
        taken = next((name for name in targets if name in of_mlps), None)
        if taken:
            raise FNSFTError(
                f"the targets of LoRA include {taken}, a part of an MLP, whose neurons would all change; name "
                "attention modules alone"
            )
        if not targets:
            raise FNSFTError(
                f"the targets of LoRA ({lora['target_modules']}) match no linear layer of the model; name some that do"
            )
        return targets

    def _create_and_replace(
        self,
        peft_config: NeuronTunerConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        if current_key not in self._slices:
            return  # it has its LoRA by now
        neurons, slices = self._slices[current_key]
        layer = target
        if not isinstance(target, NeuronDeltaLayer):
            layer = ExpertDeltaLayer(target) if Experts.are_in(target) else LinearDeltaLayer(target)
        layer.update_layer(adapter_name, slices, neurons, inference_mode=peft_config.inference_mode)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)  # an additional adapter is not trained until it is made active
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # New layers contain the module they replace and have put themselves on its device. The parent's method would
        # also assign the weight of a module with trainable tokens, which is a computed tensor and no parameter.
        setattr(parent, child_name, new_module)

    def _layers(self) -> Iterator[NeuronDeltaLayer]:
        return (module for module in self.model.modules() if isinstance(module, NeuronDeltaLayer))

    def release(self) -> None:
        """Put back base values that an interruption (Ctrl-C, no memory left) of a training step has left changed.

        Whatever reads or runs the model does this by itself, except what reads its bare parameters.
        """
        for layer in self._layers():
            layer.release()

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # `x.neuron_delta_weight.NAME.values` is `x.neuron_delta_weight` in files
        key = key.removesuffix(".values") if cls.prefix in key else key
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise FNSFTError(
                "adapter_names gives each row of a batch an adapter of its own, but neuron deltas change the weights "
                "for all rows; run one batch for each adapter, after set_adapter"
            )
        yield

    def _unload_and_optionally_merge(self, *args, **kwargs) -> nn.Module:
        self.release()
        return super()._unload_and_optionally_merge(*args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If none of the active ones remains, the first of the others becomes active.

        Args:
            adapter_name (`str`): its name.
        """
        active = [name for name in self.active_adapters if name != adapter_name]
        super().delete_adapter(adapter_name)
        # A layer in which only the deleted adapter had neurons knows of no other one: choose for all layers at once.
        self.set_adapter(active or list(self.peft_config)[:1])

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add an adapter that is a weighted sum of others: its neurons are all of theirs, its deltas
        `sum_i weights[i] * delta_i`. The sum is exact, there is no rank to truncate.

        Args:
            adapters (`list[str]`): names of the adapters to combine.
            weights (`list[float]`): their weights, of any sign.
            adapter_name (`str`): name of the new adapter.
            combination_type (`str`, *optional*, defaults to `"linear"`): the only one there is.

        Raises:
            FNSFTError: names, weights or type do not fit, or an adapter trains more than neurons.
        """
        if combination_type != "linear":
            raise FNSFTError(f"combination_type={combination_type!r} is unknown; neuron deltas combine by 'linear'")
        if len(adapters) != len(weights) or not adapters:
            raise FNSFTError(f"{len(adapters)} adapters and {len(weights)} weights were given; one weight for each")
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown or adapter_name in self.peft_config:
            raise FNSFTError(
                f"there is no adapter {unknown[0]!r}" if unknown else f"there is an adapter {adapter_name!r} already"
            )
        configs = [self.peft_config[name] for name in adapters]
        for name, config in zip(adapters, configs, strict=True):
            if config.lora or config.modules_to_save or config.trainable_token_indices:
                raise FNSFTError(
                    f"adapter {name!r} trains more than neurons, which does not combine by a sum; combine others"
                )
        sites = find_neuron_sites(self.model, kind=configs[0].site)
        mask = self._mask(configs[0], sites)
        for config in configs[1:]:
            mask |= self._mask(config, sites)
        self.peft_config[adapter_name] = replace(configs[0], neurons=mask.to_ranges(), target_modules=None)
        self.inject_adapter(self.model, adapter_name)
        for layer in self._layers():
            for name, weight in zip(adapters, weights, strict=True):
                if name in layer.slices:
                    layer.add_scaled(name, weight, to=adapter_name)
        self.set_requires_grad(adapter_name, False)
