"""FNSFTTrainer: SFTTrainer, with the trainable neurons and the forward mask of a FunctionalNetworkConfig."""

import copy
import os
from collections.abc import Callable
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
from trl import SFTConfig, SFTTrainer

from ..config import FunctionalNetworkConfig
from ..data.preparation import Preparation
from ..data.tokenized import TokenizedCache
from ..evaluation.config import RetentionConfig
from ..template.template import FunctionalNetworkTemplate
from .config import AnchorConfig, ReplayConfig
from .networked import NetworkedTrainer
from .penalty_config import PenaltyConfig
from .protection_config import ProtectionConfig


class FNSFTTrainer(NetworkedTrainer, SFTTrainer):
    """
    Trainer for Supervised Fine-Tuning with functional networks.

    A drop-in for [`~trl.SFTTrainer`]: with `network_config=None` it is that trainer, bit for bit. With a
    [`FunctionalNetworkConfig`], it loads or discovers the networks of the model. It trains only the neurons that the
    config allows, and keeps all others bit-identical. If asked, it masks neurons in the forward pass.

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
        protection ([`ProtectionConfig`], *optional*):
            In which directions of their inputs the layers that train go on answering as before, with networks and
            without.
        replay ([`ReplayConfig`], *optional*):
            Rows of other texts that are trained beside the task, a share of each batch, with networks and without.
        anchor ([`AnchorConfig`], *optional*):
            The general texts on which the model is kept near its base, with networks and without, and how much.
        penalties ([`PenaltyConfig`], *optional*):
            EWC, LwF and O-LoRA beside the loss of the task, with networks and without.

    Attributes:
        network_template ([`FunctionalNetworkTemplate`] or `None`): the networks.
        neuron_mask ([`NeuronMask`] or `None`): the selected neurons.
        trainable_neurons ([`NeuronMask`] or `None`): the neurons whose weights may change, over all layers.
        mask_handle ([`~fnsft_trl.interventions.masking.MaskHandle`] or `None`): the forward mask.

    Raises:
        FNSFTError: the config, the template, the model and the PEFT config do not go together.
    """

    _trainer_class = SFTTrainer
    _replays = True

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
        protection: ProtectionConfig | None = None,
        replay: ReplayConfig | None = None,
        anchor: AnchorConfig | None = None,
        penalties: PenaltyConfig | None = None,
    ) -> None:
        self._tokenized_cache = TokenizedCache() if tokenized_cache else None
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
            network_config=network_config,
            network_template=network_template,
            retention=retention,
            protection=protection,
            replay=replay,
            anchor=anchor,
            penalties=penalties,
        )

    @property
    def task_dataset(self):
        """The rows of the task among those that are trained; the others are replayed."""
        return self.train_dataset if self.replay is None else self.replay.task

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        """As the parent's; with `tokenized_cache`, what it made of the same data before is read again.

        Raises:
            FNSFTError: no row teaches anything, or the chat template refuses them all.
        """

        def prepare(rows, args, function, name):
            def make(rows, args, packing, is_processed=False):
                given = None if is_processed else function
                return super(FNSFTTrainer, self)._prepare_dataset(rows, processing_class, args, packing, given, name)

            return Preparation(
                make=make,
                args=args,
                packing=packing,
                name=name,
                processing_class=processing_class,
                chat_template=self.chat_template,
                completion_only_loss=self.completion_only_loss,
                is_formatted=function is not None,
                cache=self._tokenized_cache,
            ).of(rows)

        prepared = prepare(dataset, args, formatting_func, dataset_name)
        # A text to evaluate on may be named `train` too; it comes later.
        if self.replay is None or self.replay.task is not None or dataset_name != "train":
            return prepared
        of_text = copy.copy(args)
        of_text.dataset_text_field = "text"  # as the rows to replay have it
        return self.replay.beside(prepared, lambda rows, name: prepare(rows, of_text, None, name))

    def _get_train_sampler(self, train_dataset=None):
        """As the parent's; with rows to replay, a share of them in each batch."""
        if self.replay is None:
            return super()._get_train_sampler(train_dataset)
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        return self.replay.sampler(seed)
