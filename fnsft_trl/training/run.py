"""Run: what one run selects, trains and masks, in steps before and after PEFT wraps its model."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from accelerate.utils import set_seed
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from ..config import MEASURED_SELECTORS, FunctionalNetworkConfig
from ..constraints import trainable_neurons
from ..data.sequences import compared_part, trained_part
from ..errors import FNSFTError
from ..hub.account import check_upload
from ..interventions import MaskHandle
from ..neurons.experts import Experts
from ..neurons.mask import NeuronMask
from ..occupied import ADAPTER, MODEL, check_target
from ..ranges import format_ranges
from ..template.template import FunctionalNetworkTemplate
from ..tuner import NeuronTunerConfig
from .checkpoints import find_checkpoint
from .engines import Engine
from .given_rows import check_held_out, first_row
from .guard import FrozenNeuronGuard
from .kinds import TrainerKind
from .loaded import check_settings, chosen_layers, given_template, select_as_configured
from .numbers import check_lora_numbers
from .preparation import (
    check_selector,
    check_whole,
    discover_template,
    keep_4bit_layers_differentiable,
    load_base_model,
    load_processing_class,
    selector_evidence,
)
from .reference import check_maskable, copy_for_reference, mask_trainer, match_reference
from .refused import check_refused
from .same_run import networks_text
from .start import check_holds_weights, check_start
from .ways import WAYS, Way


logger = logging.get_logger(__name__)


class Run:
    """One training run by a FunctionalNetworkConfig. Its methods are its steps, in their order.

    Args:
        config (`FunctionalNetworkConfig`): what is asked for.
        given (`dict`): the arguments of the trainer by name, changed by the steps that prepare the model.
        kind (`TrainerKind`): of the trainer.

    Attributes:
        config (`FunctionalNetworkConfig`): as given, at the site of the template.
        plan (`TrainingPlan`): what the config comes to.
        way (`Way`): how the neurons are trained.
        args: the training arguments.
        checkpoint (`Path` or `None`): what the run goes on from, as far as the arguments say so.
        guard (`FrozenNeuronGuard` or `None`): what watches the frozen weights.
        engine (`Engine` or `None`): what shards the model over processes.
        masks_reference (`bool`): whether a forward mask is on the trainer's reference too: not on one that was given.
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
    masks_reference = True

    def __init__(self, config: FunctionalNetworkConfig, given: dict[str, Any], kind: TrainerKind) -> None:
        self.config, self.given, self.kind = config, given, kind
        model, peft_config = kind.model_of(given), given.get("peft_config")
        self.adapter = _adapter(model, peft_config)
        self.plan = config.plan(lora_config=isinstance(self.adapter, LoraConfig))
        self.args = args = given["args"] = kind.args_of(given)
        self.way: Way = WAYS[self.plan.method](self.plan, site=config.ica_site, train_other=config.train_other)
        self.way.check(model, args)
        self.engine = Engine.of_args(args)
        if self.engine is not None:
            self.engine.check(self.asked(self.engine))
        _check_output(args.output_dir, model, is_full=self.plan.method == "full")
        if self.plan.mask_mode is not None:
            check_maskable(args)
        if args.push_to_hub and args.process_index == 0:
            is_proposal = (args.hub_revision or "").startswith("refs/pr/")
            check_upload(args.hub_token, None if is_proposal else args.hub_model_id)
        self.guard: FrozenNeuronGuard | None = None
        check_start(args, given)
        self.checkpoint = find_checkpoint(args.resume_from_checkpoint, args, has_mark=True)

    def asked(self, engine: Engine) -> list[str]:
        """What is asked of the engine that shards the model, as far as it is known before the model is."""
        args, adapter = self.args, self.adapter
        asked = {
            "full_eval": args.bf16_full_eval or args.fp16_full_eval,
            "whole_modules": adapter is not None and _reads_weights(adapter),
        }
        return [*self.way.asked(engine, args, adapter), *(key for key, is_asked in asked.items() if is_asked)]

    def prepare(self, template: FunctionalNetworkTemplate | str | os.PathLike | None) -> None:
        """Load what was given by name, find the networks, select the neurons: all that comes before PEFT wraps the
        model. The arguments of the trainer are then such that it trains what was selected.

        Args:
            template: the networks, or where they are.

        Raises:
            FNSFTError: they are of another model, or the model cannot be trained in this way.
        """
        given = self.given
        has_template = template is not None or self.config.ica_template_path is not None
        has_template = has_template or self.checkpoint is not None
        check_selector(self.config, has_template=has_template)
        check_whole(self.config, has_template=has_template)
        found = self._given_networks(template)
        self._load()
        model = given["model"]
        self._find_networks(found, model)
        adapter = self._select(model, given.get("peft_config"))
        kind, is_full = self.kind, self.plan.method == "full"
        self.masks_reference = given.get("ref_model") is None
        if is_full and kind.takes_reference and given.get("ref_model") is None:
            given["ref_model"] = copy_for_reference(model, self.args)
        has_reference = kind.takes_reference or kind.generates
        self._loads_reference = is_full and has_reference and given.get("ref_model") is None
        if kind.wraps:
            given["peft_config"] = adapter
        else:
            given.pop("peft_config", None)
            given["model"] = kind.wrapped(model, adapter, self.args)

    @property
    def _model_init_kwargs(self) -> dict | None:
        return getattr(self.args, "model_init_kwargs", None)  # plain TrainingArguments have none

    def _load(self) -> None:
        """Load what was given by name: networks must be known before PEFT wraps the model."""
        given, kind = self.given, self.kind
        if given.get("processing_class") is None and kind.is_of_trl:
            given["processing_class"] = self._processing_class()
        if kind.is_sft:
            check_refused(given, self.args)
        elif kind.is_of_trl:
            first_row(given.get("train_dataset"), "train_dataset")
            check_held_out(given.get("eval_dataset"))
        set_seed(self.args.seed)  # as the trainers of TRL do before they load a model
        if isinstance(given["model"], str):
            quantization = given.pop("quantization_config", None)
            given["model"] = load_base_model(
                given["model"],
                self.args,
                self._model_init_kwargs,
                quantization,
                scores=kind.scores,
                frozen=self.plan.method != "full",
            )
        keep_4bit_layers_differentiable(given["model"])

    def _processing_class(self):
        model = self.given["model"]
        name = model if isinstance(model, str) else model.config.name_or_path
        return load_processing_class(name, self.args, self._model_init_kwargs, generates=self.kind.generates)

    def _text_of(self, row):
        """The text of a row of the training data that networks are discovered on."""
        field = getattr(self.args, "dataset_text_field", "text")
        if (function := self.given.get("formatting_func")) is not None:
            return function(row)
        return trained_part(row, field) if self.kind.is_sft else compared_part(row, field)

    def _given_networks(
        self, given: FunctionalNetworkTemplate | str | os.PathLike | None
    ) -> FunctionalNetworkTemplate | None:
        """The template of the checkpoint, or the one that was given or named, if any, checked against the config.

        Raises:
            FNSFTError: the config asks for something else; or the checkpoint has another one than was given.
        """
        template = given_template(self.config, given)
        if self.checkpoint is not None:
            template = self._checkpoint_template(template)
        if template is None:
            return None
        if template.threshold is None and template.site != self.config.ica_site:
            # The original's commands name no site: their templates are of the MLPs' outputs.
            logger.warning(f"ica_site is {template.site}, the site of the converted template")
            self.config = replace(self.config, ica_site=template.site)
            self.way.site = template.site
        return check_settings(self.config, template)

    def _find_networks(self, given: FunctionalNetworkTemplate | None, model: PreTrainedModel | PeftModel) -> None:
        """Take the template that is given, or discover one.

        Raises:
            FNSFTError: it is of another model, or the model cannot be trained in this way.
        """
        if self.engine is not None and any(map(Experts.are_in, model.modules())):
            self.engine.check(["experts"])
        self.way.check_model(model, self.adapter)
        if given is not None:
            given.check_model(model)
            self.template = given
            self.layers = chosen_layers(self.config, model, given)
            return
        self.template = discover_template(self.config, *self._read_with(model))

    def _read_with(self, model: PreTrainedModel | PeftModel) -> tuple:
        """What texts are read with: model, tokenizer or processor, arguments; the rows, and what is read of one."""
        reader = self.given.get("processing_class")
        reader = self._processing_class() if reader is None else reader
        return model, reader, self.args, self.given.get("train_dataset"), self._text_of

    def _checkpoint_template(self, given: FunctionalNetworkTemplate | None) -> FunctionalNetworkTemplate:
        template = FunctionalNetworkTemplate.from_pretrained(self.checkpoint)
        if given is not None and networks_text(given) != networks_text(template):
            raise FNSFTError(
                f"{self.checkpoint} was written with {networks_text(template)}, this run is given "
                f"{networks_text(given)}; drop the template, since that of the checkpoint is taken, or start anew "
                "(drop resume_from_checkpoint)"
            )
        return template

    def _select(self, model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None) -> PeftConfig | None:
        """Select the neurons.

        Returns:
            What PEFT is to wrap the model with.
        """
        config = self.config
        evidence = None
        if config.ica_select in MEASURED_SELECTORS:
            evidence = selector_evidence(config, self.template, *self._read_with(model))
        self.selected = select_as_configured(config, self.template, self.layers, evidence)
        self.trainable = trainable_neurons(model, self.selected, self.plan.train)
        logger.info(f"selected {self.selected}; to be trained {self.trainable}; method {self.plan.method}")
        peft_config = self.way.peft_config(model, self.trainable, peft_config)
        if peft_config is not None and peft_config.revision is None:
            peft_config.revision = (self._model_init_kwargs or {}).get("revision")  # which export loads again
        return peft_config

    @contextmanager
    def loaded_model(self) -> Iterator[None]:
        """Hide `model_init_kwargs` from the trainer, which would warn that a loaded model ignores them; not where it
        loads a reference by them."""
        kept = None if self._loads_reference else self._model_init_kwargs
        if kept is not None:
            self.args.model_init_kwargs = None
        try:
            yield
        finally:
            if kept is not None:
                self.args.model_init_kwargs = kept

    def hold(self, trainer: Trainer) -> MaskHandle | None:
        """Freeze, mask and guard the neurons of the model that the trainer has wrapped.

        Returns:
            The forward mask.

        Raises:
            FNSFTError: the model that was wrapped cannot be trained in this way.
        """
        self.given = {}  # of which the trainer has what it needs
        trainer.keeps_weights = True
        if self._loads_reference:
            match_reference(trainer)
        self.way.hold(trainer, self.trainable)
        check_holds_weights(trainer)
        self._leave_out_unreached(trainer.model)
        handle = None
        if self.plan.mask_mode is not None:
            handle = mask_trainer(trainer, self.plan.mask_mode, self.selected, factor=self.plan.mask_factor)
        if self.config.frozen_guard:
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


def _check_output(directory: str, model: str | PreTrainedModel | PeftModel, *, is_full: bool) -> None:
    """Refuse to save the trained model over the one that it is made from, or over something else.

    Raises:
        FNSFTError: the output directory is that of the model, or holds a template or the other kind of a model.
    """
    name = model if isinstance(model, str) else getattr(model.config, "name_or_path", None)
    check_target(directory, MODEL if is_full else ADAPTER, sources={"the model to train": name or None})


def _reads_weights(adapter: PeftConfig) -> bool:
    """Whether an adapter starts from weights of the base model."""
    started = isinstance(adapter, LoraConfig) and adapter.init_lora_weights not in (True, "gaussian")
    return bool(started or adapter.modules_to_save or adapter.trainable_token_indices)


def _adapter(model: str | PreTrainedModel | PeftModel, given: PeftConfig | None) -> PeftConfig | None:
    """The adapter that a run trains: the one that the model brings, or the one that it is to get.

    Raises:
        FNSFTError: it cannot be trained.
    """
    if not isinstance(model, PeftModel):
        adapter, known = given, LoraConfig
    else:
        if given is not None:
            raise FNSFTError(
                "the model brings an adapter, and peft_config asks for another one; drop peft_config to train that "
                "adapter on, or merge it first (merge_and_unload)"
            )
        adapter, known = model.active_peft_config, (LoraConfig, NeuronTunerConfig)
    if isinstance(given, LoraConfig):
        check_lora_numbers(given)
    if adapter is not None and not isinstance(adapter, known):
        raise FNSFTError(
            f"the model is to be trained with a {type(adapter).__name__}, which cannot be held to a set of "
            "neurons; use a LoraConfig, or a plain model without peft_config for neuron deltas"
        )
    if isinstance(model, PeftModel) and not any(p.requires_grad for p in model.parameters()):
        raise FNSFTError(
            "the adapter of the model was loaded for inference, so nothing of it would train; load it with "
            "PeftModel.from_pretrained(base, DIR, is_trainable=True)"
        )
    return adapter
