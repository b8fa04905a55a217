"""FNSFTTrainer: SFTTrainer, with the trainable neurons and the forward mask of a FunctionalNetworkConfig."""

import copy
import json
import os
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from inspect import signature
from pathlib import Path

import torch
from accelerate.utils import set_seed
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoProcessor
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import get_last_checkpoint
from transformers.training_args import OptimizerNames
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import create_model_from_path, get_config_model_id

from .baking import lesion_note
from .callbacks import FrozenNeuronGuard
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
from .data import load_texts
from .discovery import discover_networks
from .errors import FNSFTError
from .hub import UnsavedToken
from .masking import lesion, masks_off, preserve
from .selection import NeuronMask, select_neurons
from .template import FunctionalNetworkTemplate
from .tuner import NeuronDeltaLayer, NeuronTunerConfig


logger = logging.get_logger(__name__)

NETWORK_DIR = "functional_networks"
SELECTION_FILE = "selection.json"
_CARD_HEADING = "## Functional networks"


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
            `peft_config`, neuron deltas are trained, or all weights with `train_method="full"`.
        network_config ([`FunctionalNetworkConfig`], *optional*):
            What to select, train and mask.
        network_template ([`FunctionalNetworkTemplate`] or `str`, *optional*):
            The networks, their directory or their Hub id; overrides `network_config.ica_template_path`. Without
            either, they are discovered on `network_config.ica_datasets` or on the training data.

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
        **kwargs,
    ) -> None:
        self.network_config = network_config
        self.network_template: FunctionalNetworkTemplate | None = None
        self.neuron_mask: NeuronMask | None = None
        self.trainable_neurons: NeuronMask | None = None
        self.mask_handle = None
        self._frozen_slices: FrozenSlices | None = None
        self._held_optimizer = None
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
        if adapter is not None and plan.method != "lora":
            raise FNSFTError(
                f"the model is to be trained with a {type(adapter).__name__}, which cannot be held to a set of "
                "neurons; use a LoraConfig, or a plain model without peft_config for neuron deltas"
            )
        if train_args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            train_args = SFTConfig(f"{name.rstrip('/').split('/')[-1]}-FNSFT")
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
            model = _load_model(model, train_args, model_init_kwargs, given.pop("quantization_config", None))
        _keep_4bit_layers_differentiable(model)
        processing_class = given.get("processing_class")
        if processing_class is None:
            processing_class = AutoProcessor.from_pretrained(
                get_config_model_id(model.config),
                revision=(model_init_kwargs or {}).get("revision"),
                trust_remote_code=getattr(train_args, "trust_remote_code", False),
            )
        is_held = plan.train != "all"
        template = _given_template(network_config, network_template)
        if template is not None and template.threshold is None and template.site != network_config.ica_site:
            # The original's commands name no site: their templates are of the MLPs' outputs.
            logger.warning(f"ica_site is {template.site}, the site of the converted template")
            self.network_config = network_config = replace(network_config, ica_site=template.site)
        if plan.method == "lora" and is_held:
            check_lora_config(adapter, model, network_config.ica_site)

        if template is None:
            template = _discover(network_config, model, processing_class, train_args, given)
        else:
            template = _check_template(network_config, model, template)
        self.network_template = template
        self.neuron_mask = _select(template, network_config)
        self.trainable_neurons = trainable_neurons(model, self.neuron_mask, plan.train)
        logger.info(f"selected {self.neuron_mask}; trainable {self.trainable_neurons}; method {plan.method}")
        if plan.method == "neuron_delta":
            peft_config = NeuronTunerConfig(
                neurons=self.trainable_neurons.to_ranges(), site=self.neuron_mask.site, task_type="CAUSAL_LM"
            )
        elif plan.method == "lora" and peft_config is not None:
            peft_config = copy.deepcopy(peft_config)
            set_lora_targets(peft_config, model, self.trainable_neurons)

        self._tag_names = [*self._tag_names, "fnsft", "functional-networks"]
        given.update(model=model, args=train_args, processing_class=processing_class, peft_config=peft_config)
        with _without_model_init_kwargs(train_args):
            super().__init__(**given)
        self._keep_token_unsaved()

        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if plan.method == "full":
            if sharded:
                raise FNSFTError(
                    "full fine-tuning held to neurons does not run sharded (FSDP, DeepSpeed) yet; use "
                    "train_method=neuron_delta, or plain data parallelism"
                )
            train_other = {"selected": False, "unselected": network_config.train_other, "all": True}[plan.train]
            self._frozen_slices = constrain_full(self.model, self.trainable_neurons, train_other=train_other)
            if not train_other:
                # Reentrant checkpointing gives no gradients at all when its inputs require none.
                self.model.enable_input_require_grads()
        for module in self.model.modules():
            if isinstance(module, NeuronDeltaLayer):
                module.float_deltas()  # SFTTrainer casts every adapter on a quantised base to bfloat16
        if plan.method == "lora" and is_held:
            held = constrain_lora(self.model, self.trainable_neurons, adapter_name=_only_adapter(self.model))
            if sharded and held.masks_gradients:
                raise FNSFTError(
                    "LoRA on the weights of experts, held to neurons, does not run sharded (FSDP, DeepSpeed); use "
                    "plain data parallelism, or train_method=neuron_delta"
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
            if sharded:
                logger.warning("frozen_guard is off: it cannot read sharded weights (FSDP, DeepSpeed) yet")
            else:
                self.add_callback(FrozenNeuronGuard(self.model, self.trainable_neurons))

    def _keep_token_unsaved(self) -> None:
        if self.args.hub_token is not None:
            self.args.hub_token = UnsavedToken(self.args.hub_token)

    def create_optimizer(self, *args, **kwargs):
        """As the parent's; frozen slices of weights or LoRA factors are put back after every step."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self._frozen_slices is not None and optimizer is not self._held_optimizer:
            self._frozen_slices.attach(optimizer)
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
            FNSFTError: the checkpoint to resume from was written with other trainable neurons.
        """
        if self.network_config is not None and resume_from_checkpoint:
            self._check_checkpoint(resume_from_checkpoint)
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.mask_handle is not None and self.eval_dataset is not None:
            self._evaluate_masked = True
            self.evaluate(metric_key_prefix="eval_masked")
            self._evaluate_masked = False
            self.evaluate(metric_key_prefix="eval_unmasked")
            self._evaluate_masked = self.network_config.mask_eval
        return result

    def create_model_card(self, *args, **kwargs) -> None:
        """As the parent's, with a section on what was trained, what was frozen and how to load the result."""
        super().create_model_card(*args, **kwargs)
        if self.network_config is not None and self.is_world_process_zero():
            self._extend_card(Path(self.args.output_dir))

    def _extend_card(self, directory: Path) -> None:
        card = directory / "README.md"
        if not card.exists() or _CARD_HEADING in card.read_text(encoding="utf-8"):
            return
        trained, template = self.trainable_neurons, self.network_template
        what = "every neuron could change."
        if self.plan.train != "all":
            what = (
                f"{trained.count} neurons ({trained.fraction:.1%} of the MLP neurons) could change, all other neurons "
                "are bit-identical to the base model."
            )
        origin = "were converted from lists of neurons"
        if sources := ", ".join(template.calibration["sources"]):
            origin = f"were found on {template.calibration['tokens']} tokens of {sources}"
        if template.hub_id is not None:
            origin += f", come from [{template.hub_id}](https://huggingface.co/{template.hub_id}) at commit "
            origin += f"`{template.commit}`"
        lines = [
            f"\n{_CARD_HEADING}\n",
            f"Trained with `fnsft_trl`, method `{self.plan.method}`: {what} The networks {origin}; they are in "
            f"`{NETWORK_DIR}/`.",
        ]
        if self.plan.mask_mode is not None:
            lines.append(
                f"\nDuring training the forward pass ran with a `{self.plan.mask_mode}` of the "
                f"{self.neuron_mask.count} selected neurons. "
                + (lesion_note(self.model) or "The mask is not part of these weights.")
            )
        elif note := lesion_note(self.model):
            lines.append(f"\n{note}")
        if self.plan.method == "neuron_delta":
            lines.append(
                "\nThe adapter is of a PEFT method of its own: `import fnsft_trl.tuner` before "
                "`PeftModel.from_pretrained`."
            )
        with card.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")

    def _check_checkpoint(self, checkpoint: str | bool) -> None:
        directory = get_last_checkpoint(self.args.output_dir) if checkpoint is True else checkpoint
        if directory is None:
            raise FNSFTError(f"there is no checkpoint in {self.args.output_dir} to resume from")
        file = Path(directory) / NETWORK_DIR / SELECTION_FILE
        if not file.is_file():
            raise FNSFTError(f"{directory} holds no {NETWORK_DIR}/{SELECTION_FILE}: not a checkpoint of this trainer")
        written = json.loads(file.read_text(encoding="utf-8"))["trainable"]
        if written["sha256"] != self.trainable_neurons.sha256:
            raise FNSFTError(
                f"{directory} was written with {written['count']} trainable neurons, this run has another set of "
                f"{self.trainable_neurons.count}; resume with the same network_config and template"
            )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.network_config is None or not self.args.should_save:
            return
        directory = Path(output_dir or self.args.output_dir) / NETWORK_DIR
        self.network_template.save_pretrained(directory)
        selection = {
            "network_config": self.network_config.to_dict(),
            "template": {
                "hub_id": self.network_template.hub_id,
                "commit": self.network_template.commit,
                "base_model": self.network_template.base_model,
            },
            "train_method": self.plan.method,
            "train_neurons": self.plan.train,
            "mask_mode": self.plan.mask_mode,
            "selected": {"count": self.neuron_mask.count, "sha256": self.neuron_mask.sha256},
            "trainable": {"count": self.trainable_neurons.count, "sha256": self.trainable_neurons.sha256},
            "neurons": self.neuron_mask.to_ranges(),
        }
        self._extend_card(directory.parent)
        (directory / SELECTION_FILE).write_text(json.dumps(selection, indent=2) + "\n", encoding="utf-8")


def _load_model(name: str, args, model_init_kwargs: dict | None, quantization_config):
    """Load a model as SFTTrainer does."""
    options = dict(model_init_kwargs or {})
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ["MULTI_GPU", "DEEPSPEED"]:
        options["device_map"] = None
    options.setdefault("trust_remote_code", getattr(args, "trust_remote_code", False))
    return create_model_from_path(name, **options)


def _keep_4bit_layers_differentiable(model) -> None:
    """Keep bitsandbytes from packing 4-bit weights for inference on a CPU.

    It does so in the first forward pass of a discovery or an evaluation and does not undo it in training, where no
    gradient passes through a packed layer.
    """
    for name, module in model.named_modules():
        if "support_avx512bf16_for_cpu" not in vars(module):
            continue
        quant_state = module.weight.quant_state
        if quant_state is not None and vars(quant_state).get("packing_format_for_cpu"):
            raise FNSFTError(
                f"the 4-bit weights of {name} are packed for inference on a CPU, and no gradient would pass through "
                "them; load the model anew, and train it before any inference"
            )
        module.support_avx512bf16_for_cpu = False


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


def _given_template(config: FunctionalNetworkConfig, given) -> FunctionalNetworkTemplate | None:
    """The template that was given to the trainer or named in its config, if any."""
    if isinstance(given, FunctionalNetworkTemplate):
        return given
    reference = given if given is not None else config.ica_template_path
    if reference is None:
        return None
    return FunctionalNetworkTemplate.from_pretrained(reference, revision=config.ica_template_revision)


def _check_template(config: FunctionalNetworkConfig, model, template: FunctionalNetworkTemplate):
    """The template, checked against model and config, with the threshold that the config asks for."""
    if template.site != config.ica_site:
        raise FNSFTError(f"the template was made at {template.site}; set ica_site={template.site}")
    template.check_model(model)
    rule = config.threshold_rule()
    if rule is not None and template.threshold is None:
        logger.warning(
            "the template lists its neurons, so ica_threshold, ica_percentile and ica_zscore have no effect"
        )
        return template
    return template if rule is None else template.with_threshold(rule)


def _discover(config: FunctionalNetworkConfig, model, processing_class, args, given: dict):
    """Discover the networks on `ica_datasets` or on the training data."""
    unknown = [number for number in config.ica_component_ids or [] if number >= config.ica_components]
    if unknown:
        raise FNSFTError(
            f"there will be no network {', '.join(map(str, unknown))}: ica_components is {config.ica_components}, so "
            f"the networks are 0-{config.ica_components - 1}"
        )
    if is_deepspeed_zero3_enabled():
        raise FNSFTError(
            "networks cannot be discovered on weights that ZeRO-3 has sharded; run fnsft discover first, and give "
            "ica_template_path"
        )
    if config.ica_datasets:
        datasets = load_texts(config.ica_datasets)
    else:
        texts = given.get("train_dataset")
        if texts is None or (isinstance(texts, Dataset) and len(texts) == 0):
            raise FNSFTError(
                "there is no training data to discover networks on; give a train_dataset with rows, ica_datasets, or "
                "a template"
            )
        formatting_func, field = given.get("formatting_func"), getattr(args, "dataset_text_field", "text")
        if formatting_func is not None:
            texts = map(formatting_func, texts)
        else:
            texts = (row.get(field, row) for row in texts)
        datasets = {"the training data": texts}
    if args.place_model_on_device and not hasattr(model, "hf_device_map"):
        model.to(args.device)  # where the parent would place it later; discovery is slow on another one
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    return discover_networks(model, tokenizer, datasets, config)


def _select(template: FunctionalNetworkTemplate, config: FunctionalNetworkConfig) -> NeuronMask:
    return select_neurons(
        template,
        config.ica_component_ids,
        selector=config.ica_select,
        fraction=config.ica_fraction,
        rank=config.ica_rank_by,
        min_reliability=config.ica_min_reliability,
        seed=config.ica_seed,
    )
