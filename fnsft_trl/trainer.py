"""FNSFTTrainer: SFTTrainer, with the trainable neurons and the forward mask of a FunctionalNetworkConfig."""

import copy
import os
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from inspect import signature
from pathlib import Path

import torch
from accelerate.utils import set_seed
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoProcessor, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.training_args import OptimizerNames
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import get_config_model_id

from .account import check_upload
from .callbacks import FrozenNeuronGuard, MaskScheduleCallback
from .config import FunctionalNetworkConfig
from .constraints import (
    FrozenSlices,
    check_lora_config,
    check_optimizer_name,
    constrain_full,
    constrain_lora,
    set_lora_targets,
    trainable_neurons,
)
from .credentials import UnsavedToken
from .data.tokenized import TokenizedCache, preparation_settings
from .errors import FNSFTError
from .hub import hub_errors, is_hub_id, prepare_repo
from .masking import lesion, masks_off, preserve
from .preparation import (
    check_template,
    discover_template,
    given_template,
    keep_4bit_layers_differentiable,
    load_base_model,
    tuner_config,
)
from .run_record import RunRecord
from .selection import NeuronMask, select_neurons
from .template import FunctionalNetworkTemplate
from .tuner import NeuronDeltaLayer


logger = logging.get_logger(__name__)


class FNSFTTrainer(SFTTrainer):
    """
    Trainer for Supervised Fine-Tuning with functional networks.

    A drop-in for [`~trl.SFTTrainer`]: with `network_config=None` it is that trainer, bit for bit. With a
    [`FunctionalNetworkConfig`], it loads or discovers the networks of the model, trains only the neurons that the
    config allows and keeps all others bit-identical, and, if asked, masks neurons in the forward pass.

    Example:

    ```python
    >>> from fnsft_trl import FNSFTTrainer, FunctionalNetworkConfig
    >>> from trl import SFTConfig

    >>> trainer = FNSFTTrainer(
    ...     model="meta-llama/Llama-3.2-1B-Instruct",
    ...     args=SFTConfig(output_dir="output"),
    ...     train_dataset=dataset,
    ...     network_config=FunctionalNetworkConfig(ica_component_ids=[0, 3]),
    ... )
    >>> trainer.train()
    ```

    Args:
        *args, **kwargs:
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

    Attributes:
        network_template ([`FunctionalNetworkTemplate`] or `None`): the networks.
        neuron_mask ([`NeuronMask`] or `None`): the selected neurons.
        trainable_neurons ([`NeuronMask`] or `None`): the neurons whose weights may change, over all layers.
        mask_handle ([`~fnsft_trl.masking.MaskHandle`] or `None`): the forward mask.

    Raises:
        FNSFTError: the config, the template, the model and the PEFT config do not go together.
    """

    def __init__(
        self,
        *args,
        network_config: FunctionalNetworkConfig | None = None,
        network_template: FunctionalNetworkTemplate | str | os.PathLike | None = None,
        tokenized_cache: bool = False,
        **kwargs,
    ) -> None:
        self.network_config = network_config
        self.network_template: FunctionalNetworkTemplate | None = None
        self.neuron_mask: NeuronMask | None = None
        self.trainable_neurons: NeuronMask | None = None
        self.mask_handle = None
        self._frozen_slices: FrozenSlices | None = None
        self._held_optimizer = None
        self._tokenized_cache = TokenizedCache() if tokenized_cache else None
        if network_config is None:
            if network_template is not None:
                raise FNSFTError("network_template without network_config has no effect; give a network_config too")
            super().__init__(*args, **kwargs)
            self._keep_token_unsaved()
            return

        given = signature(SFTTrainer.__init__).bind(self, *args, **kwargs).arguments
        given.pop("self")
        model, train_args, peft_config = given["model"], given.get("args"), given.get("peft_config")
        adapter = model.active_peft_config if isinstance(model, PeftModel) else peft_config
        self.plan = plan = network_config.plan(lora_config=isinstance(adapter, LoraConfig))
        self._evaluate_masked = network_config.mask_eval
        if adapter is not None and not isinstance(adapter, LoraConfig):
            raise FNSFTError(
                f"the model is to be trained with a {type(adapter).__name__}, which cannot be held to a set of "
                "neurons; use a LoraConfig, or a plain model without peft_config for neuron deltas"
            )
        if isinstance(model, PeftModel) and plan.method != "lora":
            raise FNSFTError(f"train_method={plan.method} needs a model without adapters; merge the adapter first")
        if train_args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            train_args = SFTConfig(f"{name.rstrip('/').split('/')[-1]}-FNSFT")
        if train_args.push_to_hub and train_args.process_index == 0:
            is_proposal = (train_args.hub_revision or "").startswith("refs/pr/")
            check_upload(train_args.hub_token, None if is_proposal else train_args.hub_model_id)
        optim = OptimizerNames(train_args.optim).value
        if plan.method == "full":
            check_optimizer_name(optim)
        if getattr(train_args, "activation_offloading", False) and not torch.accelerator.is_available():
            raise FNSFTError("activation_offloading moves activations from an accelerator, and there is none; drop it")

        # The networks must be known before PEFT wraps the model, so what SFTTrainer does first is done here: seed,
        # model, tokenizer.
        set_seed(train_args.seed)
        model_init_kwargs = train_args.model_init_kwargs if isinstance(train_args, SFTConfig) else None
        if isinstance(model, str):
            model = load_base_model(model, train_args, model_init_kwargs, given.pop("quantization_config", None))
        keep_4bit_layers_differentiable(model)
        processing_class = given.get("processing_class")
        if processing_class is None:
            processing_class = AutoProcessor.from_pretrained(
                get_config_model_id(model.config),
                revision=(model_init_kwargs or {}).get("revision"),
                trust_remote_code=getattr(train_args, "trust_remote_code", False),
            )
        is_held = plan.train != "all"
        template = given_template(network_config, network_template)
        if template is not None and template.threshold is None and template.site != network_config.ica_site:
            # The original's commands name no site: their templates are of the MLPs' outputs.
            logger.warning(f"ica_site is {template.site}, the site of the converted template")
            self.network_config = network_config = replace(network_config, ica_site=template.site)
        if plan.method == "lora" and is_held:
            check_lora_config(adapter, model, network_config.ica_site)

        if template is None:
            template = discover_template(network_config, model, processing_class, train_args, given)
        else:
            template = check_template(network_config, model, template)
        self.network_template = template
        self.neuron_mask = select_neurons(
            template,
            network_config.ica_component_ids,
            selector=network_config.ica_select,
            fraction=network_config.ica_fraction,
            rank=network_config.ica_rank_by,
            min_reliability=network_config.ica_min_reliability,
            seed=network_config.ica_seed,
        )
        self.trainable_neurons = trainable_neurons(model, self.neuron_mask, plan.train)
        logger.info(f"selected {self.neuron_mask}; trainable {self.trainable_neurons}; method {plan.method}")
        if plan.method == "neuron_delta":
            peft_config = tuner_config(self.trainable_neurons, peft_config)
        elif plan.method == "lora" and peft_config is not None:
            peft_config = copy.deepcopy(peft_config)
            set_lora_targets(peft_config, model, self.trainable_neurons)
        if peft_config is not None and peft_config.revision is None:
            peft_config.revision = (model_init_kwargs or {}).get("revision")  # which export loads again

        self._tag_names = [*self._tag_names, "fnsft", "functional-networks"]
        given.update(model=model, args=train_args, processing_class=processing_class, peft_config=peft_config)
        with _without_model_init_kwargs(train_args):
            super().__init__(**given)
        self._keep_token_unsaved()

        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        is_fsdp2 = self.accelerator.is_fsdp2
        if plan.method == "full":
            if sharded and not is_fsdp2:
                raise FNSFTError(
                    "full fine-tuning held to neurons does not run under DeepSpeed or FSDP1; use FSDP2, plain data "
                    "parallelism, or train_method=neuron_delta"
                )
            self._frozen_slices = self._hold_weights()
            if is_fsdp2:  # sharding puts other tensors in the place of these
                self._frozen_slices.release()
                self.add_callback(_HoldAfterSharding(self))
            if not self._trains_other:
                # Reentrant checkpointing gives no gradients at all when its inputs require none.
                self.model.enable_input_require_grads()
        for module in self.model.modules():
            if isinstance(module, NeuronDeltaLayer):
                module.float_deltas()  # SFTTrainer casts every adapter on a quantised base to bfloat16
        if plan.method == "lora" and is_held:
            held = constrain_lora(self.model, self.trainable_neurons, adapter_name=_only_adapter(self.model))
            if sharded and held.masks_gradients:
                raise FNSFTError(
                    "DoRA, and LoRA on the weights of experts, held to neurons, do not run sharded (FSDP, DeepSpeed); "
                    "use plain data parallelism, or train_method=neuron_delta"
                )
            self._frozen_slices = None if sharded else held  # sharding puts other tensors in the place of these
            if sharded and "8bit" in optim:
                raise FNSFTError(
                    f"LoRA held to neurons does not run sharded (FSDP, DeepSpeed) with optim={optim}, whose "
                    "rounding moves frozen factors; use one with state in 32 bits, such as adamw_torch"
                )
        if plan.mask_mode is not None:
            intervene = lesion if plan.mask_mode == "lesion" else preserve
            self.mask_handle = intervene(self.model, self.neuron_mask)
        if network_config.frozen_guard:
            if sharded and not is_fsdp2:
                logger.warning("frozen_guard is off: it cannot read weights that DeepSpeed or FSDP1 has sharded")
            else:
                self.add_callback(FrozenNeuronGuard(self.model, self.trainable_neurons))

    def _keep_token_unsaved(self) -> None:
        if self.args.hub_token is not None:
            self.args.hub_token = UnsavedToken(self.args.hub_token)

    @property
    def _trains_other(self) -> bool:
        """Whether full fine-tuning trains the weights that belong to no neuron."""
        return {"selected": False, "unselected": self.network_config.train_other, "all": True}[self.plan.train]

    def _hold_weights(self) -> FrozenSlices:
        return constrain_full(self.model, self.trainable_neurons, train_other=self._trains_other)

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        """As the parent's; with `tokenized_cache`, what it made of the same data before is read again.

        Raises:
            FNSFTError: no row has an answer that begins within `max_length`.
        """

        def make():
            return super(FNSFTTrainer, self)._prepare_dataset(
                dataset, processing_class, args, packing, formatting_func, dataset_name
            )

        cache = self._tokenized_cache
        if cache is None or formatting_func is not None or not cache.takes(dataset, processing_class):
            prepared = make()
        else:
            settings = {"packing": packing, "completion_only_loss": self.completion_only_loss}
            settings |= {"chat_template": self.chat_template, **preparation_settings(args)}
            key = cache.key(dataset, processing_class, settings)
            prepared = cache.read_or_make(key, make, writes=args.distributed_state.is_local_main_process)
        if packing or not isinstance(dataset, Dataset) or len(prepared) == len(dataset):
            return prepared
        begins = f"begins after max_length={args.max_length} tokens"
        if len(prepared) == 0:
            raise FNSFTError(f"the answer of every row of the {dataset_name} data {begins}; set a larger max_length")
        logger.warning(
            f"{len(dataset) - len(prepared)} of {len(dataset)} rows of the {dataset_name} data are left out: their "
            f"answer {begins}"
        )
        return prepared

    def create_optimizer(self, *args, **kwargs):
        """As the parent's; frozen slices of weights or LoRA factors are put back after every step."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self._frozen_slices is not None and optimizer is not self._held_optimizer:
            optimizer.register_step_post_hook(lambda *_: self._frozen_slices.restore())
            self._held_optimizer = optimizer
        return optimizer

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """As the parent's; with `mask_eval=False` a forward mask is switched off meanwhile."""
        unmasked = self.mask_handle is not None and not self._evaluate_masked
        with masks_off(self.model) if unmasked else nullcontext():
            return super().evaluate(*args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As the parent's; with a forward mask, ends with one evaluation under it and one without it.

        Raises:
            FNSFTError: the checkpoint to resume from was written with other trainable neurons or mask phases.
        """
        if self.network_config is not None and resume_from_checkpoint:
            checkpoint = resume_from_checkpoint
            if checkpoint is True:
                checkpoint = get_last_checkpoint(self.args.output_dir)
            if checkpoint is None:
                raise FNSFTError(f"there is no checkpoint in {self.args.output_dir} to resume from")
            self._record.check(checkpoint)
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.mask_handle is not None and self.eval_dataset is not None:
            self._evaluate_masked = True
            self.evaluate(metric_key_prefix="eval_masked")
            self._evaluate_masked = False
            self.evaluate(metric_key_prefix="eval_unmasked")
            self._evaluate_masked = self.network_config.mask_eval
        return result

    def init_hf_repo(self, *args, **kwargs) -> None:
        """As the parent's; the branch `hub_revision` is made where it does not exist.

        Raises:
            FNSFTError: the Hub refuses it or cannot be reached; the message says what to do.
        """
        with self._hub_errors():
            super().init_hf_repo(*args, **kwargs)
            if self.hub_model_id is not None and self.args.hub_revision is not None:
                prepare_repo(self.hub_model_id, token=self.args.hub_token, branch=self.args.hub_revision)

    def push_to_hub(self, *args, **kwargs):
        """As the parent's.

        Raises:
            FNSFTError: the Hub refuses it or cannot be reached; the message says what to do.
        """
        with self._hub_errors():
            return super().push_to_hub(*args, **kwargs)

    def _hub_errors(self):
        repo = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        return hub_errors(repo, self.args.hub_revision, token=self.args.hub_token)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """As the parent's, with a section on what was trained, what was frozen and how to load the result.

        The Hub refuses cards that name a local file as their dataset, so such a name is left out.
        """
        if dataset_name is not None and (not is_hub_id(dataset_name) or Path(dataset_name).exists()):
            dataset_name = None
        super().create_model_card(model_name, dataset_name, tags)
        if self.network_config is not None and self.is_world_process_zero():
            self._record.extend_card(Path(self.args.output_dir), self.model)

    @property
    def _record(self) -> RunRecord:
        schedules = [c for c in self.callback_handler.callbacks if isinstance(c, MaskScheduleCallback)]
        return RunRecord(
            config=self.network_config,
            plan=self.plan,
            template=self.network_template,
            selected=self.neuron_mask,
            trainable=self.trainable_neurons,
            mask_phases=[phase for schedule in schedules for phase in schedule.to_dict()],
        )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.network_config is not None and self.args.should_save:
            self._record.save(Path(output_dir or self.args.output_dir), self.model)


class _HoldAfterSharding(TrainerCallback):
    """Holds full fine-tuning to its neurons when the Trainer has sharded the model and loaded a checkpoint."""

    def __init__(self, trainer: FNSFTTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.trainer._frozen_slices.release()
        self.trainer._frozen_slices = self.trainer._hold_weights()


@contextmanager
def _without_model_init_kwargs(args):
    """Hide `model_init_kwargs` from the parent, which would warn that they are ignored."""
    kept = getattr(args, "model_init_kwargs", None)
    if kept is not None:
        args.model_init_kwargs = None
    try:
        yield
    finally:
        if kept is not None:
            args.model_init_kwargs = kept


def _only_adapter(model: PeftModel) -> str:
    if len(model.active_adapters) != 1:
        raise FNSFTError(
            f"the model has {len(model.active_adapters)} active adapters ({', '.join(model.active_adapters)}); "
            "exactly one can be held to a set of neurons: set_adapter one of them"
        )
    return model.active_adapters[0]
