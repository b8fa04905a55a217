"""FNSFTTrainer: SFTTrainer, with the trainable neurons and the forward mask of a FunctionalNetworkConfig."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging
from trl import SFTConfig

from ..compat.trl import evaluation_metrics
from ..config import FunctionalNetworkConfig, TrainingPlan
from ..data.preparation import Preparation
from ..data.tokenized import TokenizedCache
from ..errors import FNSFTError
from ..evaluation.config import RetentionConfig
from ..hub.credentials import UnsavedToken
from ..hub.files import is_hub_id
from ..interventions.masking import MaskHandle, masks_off
from ..neurons.mask import NeuronMask
from ..template.template import FunctionalNetworkTemplate
from .resumption import Resumption, check_plain
from .retained import RetainingTrainer
from .retention_texts import RetentionTexts
from .run import Run
from .run_record import RunRecord
from .same_run import fsdp_form
from .schedule import MaskScheduleCallback


logger = logging.get_logger(__name__)


class FNSFTTrainer(RetainingTrainer):
    """
    Trainer for Supervised Fine-Tuning with functional networks.

    A drop-in for [`~trl.SFTTrainer`]: with `network_config=None` it is that trainer, bit for bit. With a
    [`FunctionalNetworkConfig`], it loads or discovers the networks of the model, trains only the neurons that the
    config allows and keeps all others bit-identical, and, if asked, masks neurons in the forward pass.

    Example:

    ```python
    >>> import torch
    >>> from datasets import load_dataset
    >>> from fnsft_trl import FNSFTTrainer, FunctionalNetworkConfig
    >>> from trl import SFTConfig

    >>> trainer = FNSFTTrainer(
    ...     model="meta-llama/Llama-3.2-1B-Instruct",
    ...     args=SFTConfig(output_dir="output", bf16=torch.accelerator.is_available()),
    ...     train_dataset=load_dataset("trl-lib/Capybara", split="train"),
    ...     network_config=FunctionalNetworkConfig(ica_component_ids=[0, 3]),
    ... )
    >>> trainer.train()
    ```

    Args:
        model, args, data_collator, train_dataset, ...:
            The arguments of [`~trl.SFTTrainer`], by position or by name.
        peft_config ([`~peft.LoraConfig`], *optional*):
            With one, the trainable neurons are trained by LoRA. Without targets it gets those of the MLPs. Without a
            `peft_config`, neuron deltas are trained, or all weights with `train_method="full"`. With
            `train_method="neuron_delta"` it is LoRA beside the deltas, on modules outside the MLPs that it names.
        network_config ([`FunctionalNetworkConfig`], *optional*):
            What to select, train and mask.
        network_template ([`FunctionalNetworkTemplate`] or `str`, *optional*):
            The networks, their directory or their Hub id; overrides `network_config.ica_template_path`. Without
            either, they are discovered on `network_config.ica_datasets` or on the training data.
        tokenized_cache (`bool`, *optional*, defaults to `False`):
            Keep tokenised datasets in the user's cache, and read them from it when rows, tokenizer, chat template,
            lengths and versions are the same.
        retention ([`RetentionConfig`], *optional*):
            The general texts on which it is measured what the model loses, with networks and without, and a budget.

    Attributes:
        network_template ([`FunctionalNetworkTemplate`] or `None`): the networks.
        neuron_mask ([`NeuronMask`] or `None`): the selected neurons.
        trainable_neurons ([`NeuronMask`] or `None`): the neurons whose weights may change, over all layers.
        mask_handle ([`~fnsft_trl.interventions.masking.MaskHandle`] or `None`): the forward mask.

    Raises:
        FNSFTError: the config, the template, the model and the PEFT config do not go together.
    """

    mask_handle: MaskHandle | None = None
    _run: Run | None = None
    _resumption: Resumption | None = None
    _evaluation_name: str | None = None

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: SFTConfig | TrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[[dict], str] | None = None,
        *,
        network_config: FunctionalNetworkConfig | None = None,
        network_template: FunctionalNetworkTemplate | str | os.PathLike | None = None,
        tokenized_cache: bool = False,
        retention: RetentionConfig | None = None,
    ) -> None:
        retained = RetentionTexts.of(retention, args, train_dataset, processing_class, formatting_func)
        self._tokenized_cache = TokenizedCache() if tokenized_cache else None
        if network_config is not None:
            self._run = run = Run(network_config, model, peft_config, args)
            args = run.args
            model, processing_class, quantization_config = run.load(model, processing_class, quantization_config)
            run.find_networks(network_template, model, processing_class, train_dataset, formatting_func)
            peft_config = run.select(model, peft_config)
            self._evaluate_masked = network_config.mask_eval
            self._tag_names = [*self._tag_names, "fnsft", "functional-networks"]
        elif network_template is not None:
            raise FNSFTError("network_template without network_config has no effect; give a network_config too")
        with self._run.loaded_model() if self._run else nullcontext():
            super().__init__(
                model,
                args,
                data_collator,
                train_dataset,
                eval_dataset,
                processing_class,
                compute_loss_func,
                compute_metrics,
                callbacks,
                optimizers,
                optimizer_cls_and_kwargs,
                preprocess_logits_for_metrics,
                quantization_config,
                peft_config,
                formatting_func,
                retention=retained,
            )
        if self.args.hub_token is not None:
            self.args.hub_token = UnsavedToken(self.args.hub_token)
        if self._run is not None:
            self.mask_handle = self._run.hold(self)
            own = {"data_collator": data_collator, "compute_loss_func": compute_loss_func, "optimizers": optimizers}
            own["optimizer_cls_and_kwargs"] = optimizer_cls_and_kwargs
            self._resumption = Resumption(self, self._run, own)

    @property
    def network_config(self) -> FunctionalNetworkConfig | None:
        """What was asked for."""
        return self._run and self._run.config

    @property
    def network_template(self) -> FunctionalNetworkTemplate | None:
        """The networks."""
        return self._run and self._run.template

    @property
    def neuron_mask(self) -> NeuronMask | None:
        """The selected neurons."""
        return self._run and self._run.selected

    @property
    def trainable_neurons(self) -> NeuronMask | None:
        """The neurons whose weights may change, over all layers."""
        return self._run and self._run.trainable

    @property
    def plan(self) -> TrainingPlan | None:
        """What is trained and masked."""
        return self._run and self._run.plan

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        """As the parent's; with `tokenized_cache`, what it made of the same data before is read again.

        Raises:
            FNSFTError: no row teaches anything, or the chat template refuses them all.
        """

        def make(rows, args, packing, is_processed=False):
            function = None if is_processed else formatting_func
            return super(FNSFTTrainer, self)._prepare_dataset(
                rows, processing_class, args, packing, function, dataset_name
            )

        return Preparation(
            make=make,
            args=args,
            packing=packing,
            name=dataset_name,
            processing_class=processing_class,
            chat_template=self.chat_template,
            completion_only_loss=self.completion_only_loss,
            is_formatted=formatting_func is not None,
            cache=self._tokenized_cache,
        ).of(dataset)

    def create_optimizer(self, *args, **kwargs):
        """As the parent's; frozen slices of weights or LoRA factors are put back after every step."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self._run is not None:
            self._run.way.attach(optimizer)
        return optimizer

    def get_batch_samples(self, *args, **kwargs):
        """As the parent's; none for a run that is resumed at its end, which would make one step too many."""
        if self._run is not None and self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """As the parent's; with `mask_eval=False` a forward mask is switched off meanwhile."""
        with self._evaluation_masks():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args, **kwargs):
        """As the parent's; with `mask_eval=False` a forward mask is switched off meanwhile."""
        with self._evaluation_masks():
            return super().predict(*args, **kwargs)

    def _evaluation_masks(self):
        unmasked = self.mask_handle is not None and not self._evaluate_masked
        return masks_off(self.model) if unmasked else nullcontext()

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """As the parent's; the evaluations with and without a mask have names of their own in it."""
        if self._evaluation_name is not None:
            metrics = evaluation_metrics(self)
            named = {f"{self._evaluation_name}_{name}": values for name, values in metrics.items()}
            metrics.clear()
            metrics.update(named)
        super().log(logs, *args, **kwargs)

    def _evaluate_with_and_without_mask(self) -> None:
        found = {}
        try:
            for name, self._evaluate_masked in (("masked", True), ("unmasked", False)):
                self._evaluation_name = name
                found |= self.evaluate(metric_key_prefix=f"eval_{name}")
        finally:
            self._evaluation_name = None
            self._evaluate_masked = self.network_config.mask_eval
        losses = ", ".join(f"{name} {value:.4f}" for name, value in found.items() if name.endswith("_loss"))
        if self.is_world_process_zero():
            logger.warning(f"evaluated with the mask and without it, as the saved model runs: {losses}")

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As the parent's; with a forward mask, ends with one evaluation under it and one without it.

        Args:
            resume_from_checkpoint: a checkpoint, or `True` for the newest complete one. `None`: that of
                `args.resume_from_checkpoint`, from which the networks were taken when the trainer was made.
            args, kwargs: the other arguments of the parent's.

        Raises:
            FNSFTError: the checkpoint is not complete, or was written by a run that differs from this one.
        """
        if self._resumption is None:
            check_plain(resume_from_checkpoint, self.args.output_dir)
        else:
            resume_from_checkpoint = self._resumption.begin(resume_from_checkpoint, self._record.mask_phases)
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.mask_handle is not None and self.eval_dataset is not None:
            self._evaluate_with_and_without_mask()
        return result

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """As the parent's, with a section on what was trained, what was frozen and how to load the result.

        The Hub refuses cards that name a local file as their dataset, so such a name is left out.
        """
        if dataset_name is not None and (not is_hub_id(dataset_name) or Path(dataset_name).exists()):
            dataset_name = None
        super().create_model_card(model_name, dataset_name, tags)
        if self._run is not None and self.is_world_process_zero():
            self._record.extend_card(Path(self.args.output_dir), self.model)

    @property
    def _record(self) -> RunRecord:
        schedules = [c for c in self.callback_handler.callbacks if isinstance(c, MaskScheduleCallback)]
        phases = [phase for schedule in schedules for phase in schedule.to_dict()]
        run = self._run
        return RunRecord(run.config, run.plan, run.template, run.selected, run.trainable, phases)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the parent's, with the template and what was selected beside the weights.

        Where FSDP keeps them sharded in checkpoints, what is saved elsewhere is whole all the same.
        """
        super().save_model(output_dir, _internal_call)
        if self._run is None:
            return
        if self.is_fsdp_enabled and not self._resumption.is_writing and "FULL" not in fsdp_form(self):
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        if self.args.should_save:
            self._record.save(Path(output_dir or self.args.output_dir), self.model)

    def _save_checkpoint(self, model, trial) -> None:
        # A search over hyperparameters writes elsewhere.
        with self._resumption.writing(self._record.mask_phases) if self._run and trial is None else nullcontext():
            super()._save_checkpoint(model, trial)
