"""Run: what one run selects, trains and masks, in steps before and after PEFT wraps its model."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate.utils import set_seed
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from ..config import FunctionalNetworkConfig
from ..constraints import trainable_neurons
from ..errors import FNSFTError
from ..hub.account import check_upload
from ..interventions import MaskHandle, lesion, preserve
from ..neurons.mask import NeuronMask
from ..ranges import format_ranges
from ..selection import select_neurons
from ..template.template import FunctionalNetworkTemplate
from .checkpoints import find_checkpoint
from .guard import FrozenNeuronGuard
from .loaded import check_template, chosen_layers, given_template
from .preparation import (
    discover_template,
    keep_4bit_layers_differentiable,
    load_base_model,
    load_processing_class,
)
from .same_run import networks_text
from .ways import WAYS, Way, is_sharded


logger = logging.get_logger(__name__)


class Run:
    """One training run by a FunctionalNetworkConfig. Its methods are its steps, in their order.

    Args:
        config (`FunctionalNetworkConfig`): what is asked for.
        model (`str`, `PreTrainedModel` or `PeftModel`): the model, or its name.
        peft_config (`PeftConfig`, *optional*): the adapter to train.
        args (`SFTConfig` or `TrainingArguments`, *optional*): the training arguments.

    Attributes:
        config (`FunctionalNetworkConfig`): as given, at the site of the template.
        plan (`TrainingPlan`): what the config comes to.
        way (`Way`): how the neurons are trained.
        args: the training arguments.
        checkpoint (`Path` or `None`): what the run goes on from, as far as the arguments say so.
        guard (`FrozenNeuronGuard` or `None`): what watches the frozen weights.
        template (`FunctionalNetworkTemplate`): the networks.
        layers (`list[int]` or `None`): the layers to select in; all of the template's by default.
        selected (`NeuronMask`): the selected neurons, over these layers.
        trainable (`NeuronMask`): the neurons whose weights may change, over all layers.

    Raises:
        FNSFTError: config, model, adapter and arguments do not go together.
    """

    template: FunctionalNetworkTemplate
    layers: list[int] | None = None
    selected: NeuronMask
    trainable: NeuronMask

    def __init__(
        self,
        config: FunctionalNetworkConfig,
        model: str | PreTrainedModel | PeftModel,
        peft_config: PeftConfig | None,
        args: SFTConfig | TrainingArguments | None,
    ) -> None:
        self.config = config
        self.adapter = model.active_peft_config if isinstance(model, PeftModel) else peft_config
        self.plan = config.plan(lora_config=isinstance(self.adapter, LoraConfig))
        if self.adapter is not None and not isinstance(self.adapter, LoraConfig):
            raise FNSFTError(
                f"the model is to be trained with a {type(self.adapter).__name__}, which cannot be held to a set of "
                "neurons; use a LoraConfig, or a plain model without peft_config for neuron deltas"
            )
        if args is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            args = SFTConfig(f"{name.rstrip('/').split('/')[-1]}-FNSFT")
        self.args = args
        self.way: Way = WAYS[self.plan.method](self.plan, site=config.ica_site, train_other=config.train_other)
        self.way.check(model, args)
        if args.push_to_hub and args.process_index == 0:
            is_proposal = (args.hub_revision or "").startswith("refs/pr/")
            check_upload(args.hub_token, None if is_proposal else args.hub_model_id)
        self.guard: FrozenNeuronGuard | None = None
        if getattr(args, "activation_offloading", False) and not torch.accelerator.is_available():
            raise FNSFTError("activation_offloading moves activations from an accelerator, and there is none; drop it")
        self.checkpoint = find_checkpoint(args.resume_from_checkpoint, args, has_mark=True)

    @property
    def _model_init_kwargs(self) -> dict | None:
        return self.args.model_init_kwargs if isinstance(self.args, SFTConfig) else None

    def load(self, model: str | PreTrainedModel | PeftModel, processing_class, quantization_config):
        """Load what was given by name: networks must be known before PEFT wraps the model.

        Returns:
            The model, its tokenizer or processor, and the quantization config if it was not used.
        """
        set_seed(self.args.seed)  # as SFTTrainer does before it loads a model
        if isinstance(model, str):
            model = load_base_model(model, self.args, self._model_init_kwargs, quantization_config)
            quantization_config = None
        keep_4bit_layers_differentiable(model)
        if processing_class is None:
            processing_class = load_processing_class(model, self.args, self._model_init_kwargs)
        return model, processing_class, quantization_config

    def find_networks(
        self,
        given: FunctionalNetworkTemplate | str | os.PathLike | None,
        model: PreTrainedModel | PeftModel,
        processing_class,
        train_dataset: Dataset | IterableDataset | None,
        formatting_func: Callable | None,
    ) -> None:
        """Take the template of the checkpoint, or the one that was given or named, or discover one.

        Raises:
            FNSFTError: it is of another model, or the model cannot be trained in this way; or the checkpoint has
                another one than was given.
        """
        template = given_template(self.config, given)
        if self.checkpoint is not None:
            template = self._checkpoint_template(template)
        if template is not None and template.threshold is None and template.site != self.config.ica_site:
            # The original's commands name no site: their templates are of the MLPs' outputs.
            logger.warning(f"ica_site is {template.site}, the site of the converted template")
            self.config = replace(self.config, ica_site=template.site)
            self.way.site = template.site
        self.way.check_model(model, self.adapter)
        if template is not None:
            self.template = check_template(self.config, model, template)
            self.layers = chosen_layers(self.config, model, template)
            return
        self.template = discover_template(
            self.config, model, processing_class, self.args, train_dataset, formatting_func
        )

    def _checkpoint_template(self, given: FunctionalNetworkTemplate | None) -> FunctionalNetworkTemplate:
        template = FunctionalNetworkTemplate.from_pretrained(self.checkpoint)
        if given is not None and networks_text(given) != networks_text(template):
            raise FNSFTError(
                f"{self.checkpoint} was written with {networks_text(template)}, this run is given "
                f"{networks_text(given)}; drop the template, since that of the checkpoint is taken, or start anew "
                "(drop resume_from_checkpoint)"
            )
        return template

    def select(self, model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None) -> PeftConfig | None:
        """Select the neurons.

        Returns:
            What PEFT is to wrap the model with.
        """
        config = self.config
        self.selected = select_neurons(
            self.template,
            config.ica_component_ids,
            selector=config.ica_select,
            fraction=config.ica_fraction,
            rank=config.ica_rank_by,
            min_reliability=config.ica_min_reliability,
            seed=config.ica_seed,
            layers=self.layers,
        )
        self.trainable = trainable_neurons(model, self.selected, self.plan.train)
        logger.info(f"selected {self.selected}; to be trained {self.trainable}; method {self.plan.method}")
        peft_config = self.way.peft_config(model, self.trainable, peft_config)
        if peft_config is not None and peft_config.revision is None:
            peft_config.revision = (self._model_init_kwargs or {}).get("revision")  # which export loads again
        return peft_config

    @contextmanager
    def loaded_model(self) -> Iterator[None]:
        """Hide `model_init_kwargs` from SFTTrainer, which would warn that a loaded model ignores them."""
        kept = getattr(self.args, "model_init_kwargs", None)
        if kept is not None:
            self.args.model_init_kwargs = None
        try:
            yield
        finally:
            if kept is not None:
                self.args.model_init_kwargs = kept

    def hold(self, trainer: SFTTrainer) -> MaskHandle | None:
        """Freeze, mask and guard the neurons of the model that SFTTrainer has wrapped.

        Returns:
            The forward mask.

        Raises:
            FNSFTError: the run is sharded, and asks for what does not go with that.
        """
        if is_sharded(trainer) and (trainer.args.bf16_full_eval or trainer.args.fp16_full_eval):
            raise FNSFTError(
                "bf16_full_eval and fp16_full_eval cast the weights for evaluations after the training, and sharded "
                "ones (FSDP, DeepSpeed) could not be put back; drop the option"
            )
        trainer.keeps_weights = True
        self.way.hold(trainer, self.trainable)
        self._leave_out_unreached(trainer.model)
        handle = None
        if self.plan.mask_mode is not None:
            intervene = lesion if self.plan.mask_mode == "lesion" else preserve
            handle = intervene(trainer.model, self.selected)
        if self.config.frozen_guard:
            if is_sharded(trainer) and not trainer.accelerator.is_fsdp2:
                logger.warning("frozen_guard is off: it cannot read weights that DeepSpeed or FSDP1 has sharded")
            else:
                self.guard = FrozenNeuronGuard(trainer.model, self.trainable)
                trainer.add_callback(self.guard)
        return handle

    def _leave_out_unreached(self, model: PreTrainedModel | PeftModel) -> None:
        """Count as trainable what can train, and say what else was asked for."""
        reached = self.way.reached(model, self.trainable)
        missed = self.trainable & ~reached
        if missed.count:
            layers = format_ranges([layer for layer, members in missed.layers.items() if members.any()])
            logger.warning(
                f"{missed.count} of the {self.trainable.count} neurons that should train, in layers {layers}, have no "
                f"weight among the LoRA targets and stay as they are: {reached.count} train; name more targets, or "
                "leave target_modules out"
            )
        self.trainable = reached
