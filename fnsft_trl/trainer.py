"""FNSFTTrainer: SFTTrainer, with the trainable neurons and the forward mask of a FunctionalNetworkConfig."""

import copy
import json
import os
from contextlib import contextmanager, nullcontext
from pathlib import Path

from accelerate.utils import set_seed
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoProcessor, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.training_args import OptimizerNames
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import create_model_from_path, get_config_model_id

from .callbacks import FrozenNeuronGuard
from .config import FunctionalNetworkConfig
from .constraints import (
    FrozenSlices,
    check_lora_config,
    check_optimizer_name,
    constrain_full,
    constrain_lora,
    trainable_neurons,
)
from .data import load_data
from .discovery import discover_networks
from .errors import FNSFTError
from .masking import lesion, preserve
from .selection import NeuronMask, select_neurons
from .template import FunctionalNetworkTemplate
from .tuner import NeuronDeltaLayer, NeuronTunerConfig


logger = logging.get_logger(__name__)

NETWORK_DIR = "functional_networks"
SELECTION_FILE = "selection.json"


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
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained, as in [`~trl.SFTTrainer`].
        args ([`~trl.SFTConfig`], *optional*):
            Configuration for this trainer.
        *positional, **kwargs:
            All other arguments of [`~trl.SFTTrainer`].
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization of a model given by name.
        peft_config ([`~peft.LoraConfig`], *optional*):
            With one, the trainable neurons are trained by LoRA. Without targets it gets those of the MLPs. Without a
            `peft_config`, neuron deltas are trained, or all weights with `train_method="full"`.
        network_config ([`FunctionalNetworkConfig`], *optional*):
            What to select, train and mask.
        network_template ([`FunctionalNetworkTemplate`] or `str`, *optional*):
            The networks, or a directory of them; overrides `network_config.ica_template_path`. Without either, they
            are discovered on `network_config.ica_datasets` or on the training data.

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
        model,
        args: SFTConfig | TrainingArguments | None = None,
        *positional,
        quantization_config=None,
        peft_config=None,
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
            super().__init__(
                model, args, *positional, quantization_config=quantization_config, peft_config=peft_config, **kwargs
            )
            return

        given = model.active_peft_config if isinstance(model, PeftModel) else peft_config
        is_lora = isinstance(given, LoraConfig)
        self.plan = plan = network_config.plan(lora_config=is_lora)
        if given is not None and not is_lora:
            raise FNSFTError(
                f"the model is to be trained with a {type(given).__name__}, which cannot be held to a set of neurons; "
                "use a LoraConfig, or a plain model without peft_config for neuron deltas"
            )
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = SFTConfig(f"{name.rstrip('/').split('/')[-1]}-FNSFT")
        if plan.method == "full":
            check_optimizer_name(OptimizerNames(args.optim).value)

        # The networks must be known before PEFT wraps the model, so what SFTTrainer does first is done here: seed,
        # model, tokenizer.
        set_seed(args.seed)
        model_init_kwargs = args.model_init_kwargs if isinstance(args, SFTConfig) else None
        if isinstance(model, str):
            model = _load_model(model, args, model_init_kwargs, quantization_config)
            quantization_config = None
        processing_class = kwargs.pop("processing_class", None)
        if processing_class is None:
            processing_class = AutoProcessor.from_pretrained(
                get_config_model_id(model.config),
                revision=(model_init_kwargs or {}).get("revision"),
                trust_remote_code=getattr(args, "trust_remote_code", False),
            )
        self.network_template = self._find_template(
            model, processing_class, network_template, kwargs.get("train_dataset"), kwargs.get("formatting_func")
        )
        self.neuron_mask = _select(self.network_template, network_config)
        self.trainable_neurons = trainable_neurons(model, self.neuron_mask, plan.train)
        logger.info(f"selected {self.neuron_mask}; trainable {self.trainable_neurons}; method {plan.method}")

        if plan.method == "neuron_delta":
            peft_config = NeuronTunerConfig(
                neurons=self.trainable_neurons.to_ranges(), site=self.neuron_mask.site, task_type="CAUSAL_LM"
            )
        elif plan.method == "lora" and peft_config is not None:
            peft_config = copy.deepcopy(peft_config)
            if plan.train != "all":
                check_lora_config(peft_config, model, self.trainable_neurons)
        elif plan.method == "full":
            train_other = {"selected": False, "unselected": network_config.train_other, "all": True}[plan.train]
            self._frozen_slices = constrain_full(model, self.trainable_neurons, train_other=train_other)
            if not train_other:
                # Reentrant checkpointing gives no gradients at all when its inputs require none.
                model.enable_input_require_grads()

        self._tag_names = [*self._tag_names, "fnsft", "functional-networks"]
        with _without_model_init_kwargs(args):
            super().__init__(
                model,
                args,
                *positional,
                quantization_config=quantization_config,
                peft_config=peft_config,
                processing_class=processing_class,
                **kwargs,
            )
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if sharded and plan.method == "full":
            raise FNSFTError(
                "full fine-tuning held to neurons does not run sharded (FSDP, DeepSpeed) yet; use "
                "train_method=neuron_delta, or plain data parallelism"
            )
        for module in self.model.modules():
            if isinstance(module, NeuronDeltaLayer):
                module.float_deltas()  # SFTTrainer casts every adapter on a quantised base to bfloat16
        if plan.method == "lora" and plan.train != "all":
            constrain_lora(self.model, self.trainable_neurons)
        if plan.mask_mode is not None:
            intervene = lesion if plan.mask_mode == "lesion" else preserve
            self.mask_handle = intervene(self.model, self.neuron_mask)
        if network_config.frozen_guard and not sharded:
            self.add_callback(FrozenNeuronGuard(self.model, self.trainable_neurons))

    def _find_template(self, model, processing_class, given, train_dataset, formatting_func):
        """The template that was given or named, or one that is discovered now."""
        config = self.network_config
        given = given if given is not None else config.ica_template_path
        if given is None:
            tokenizer = getattr(processing_class, "tokenizer", processing_class)
            if config.ica_datasets:
                sources = config.ica_datasets
                parts = [load_data(name, split="train") for name in sources]
                texts = (row for part in parts for row in part)
            else:
                if not isinstance(train_dataset, Dataset) or len(train_dataset) == 0:
                    raise FNSFTError(
                        "there is no training data to discover networks on; give a train_dataset with rows, "
                        "ica_datasets, or a template"
                    )
                sources = ["the training data"]
                texts = (formatting_func(row) if formatting_func else row for row in train_dataset)
            return discover_networks(model, tokenizer, texts, config, sources=sources)
        template = given if isinstance(given, FunctionalNetworkTemplate) else None
        template = template or FunctionalNetworkTemplate.from_pretrained(given)
        template.check_model(model)
        if config.ica_percentile is not None:
            template = template.at_percentile(config.ica_percentile)
        return template

    def create_optimizer(self, *args, **kwargs):
        """As the parent's; frozen neurons are put back after every step of full fine-tuning."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self._frozen_slices is not None and optimizer is not self._held_optimizer:
            self._frozen_slices.attach(optimizer)
            self._held_optimizer = optimizer
        return optimizer

    @contextmanager
    def _mask_off(self):
        self.mask_handle.disable()
        try:
            yield
        finally:
            self.mask_handle.enable()

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """As the parent's; with `mask_eval=False` a forward mask is switched off meanwhile."""
        unmasked = self.mask_handle is not None and not self.network_config.mask_eval
        with self._mask_off() if unmasked else nullcontext():
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
            super().evaluate(metric_key_prefix="eval_masked")
            with self._mask_off():
                super().evaluate(metric_key_prefix="eval_unmasked")
        return result

    def create_model_card(self, *args, **kwargs) -> None:
        """As the parent's, with a section on what was trained, what was frozen and how to load the result."""
        super().create_model_card(*args, **kwargs)
        if self.network_config is None or not self.is_world_process_zero():
            return
        trained, template = self.trainable_neurons, self.network_template
        lines = [
            "\n## Functional networks\n",
            f"Trained with `fnsft_trl`, method `{self.plan.method}`: {trained.count} neurons "
            f"({trained.fraction:.1%} of the MLP neurons) could change, all other neurons are bit-identical to the "
            f"base model. The networks were found on {template.calibration['tokens']} tokens of "
            f"{', '.join(template.calibration['sources'])}; they are in `{NETWORK_DIR}/`.",
        ]
        if self.plan.train == "all":
            lines[1] = f"Trained with `fnsft_trl`, method `{self.plan.method}`; every neuron could change."
        if self.plan.mask_mode is not None:
            lines.append(
                f"\nDuring training the forward pass ran with a `{self.plan.mask_mode}` of the "
                f"{self.neuron_mask.count} selected neurons. The mask is not part of these weights."
            )
        if self.plan.method == "neuron_delta":
            lines.append(
                "\nThe adapter is of a PEFT method of its own: `import fnsft_trl.tuner` before "
                "`PeftModel.from_pretrained`."
            )
        with open(Path(self.args.output_dir) / "README.md", "a", encoding="utf-8") as card:
            card.write("\n".join(lines) + "\n")

    def _check_checkpoint(self, checkpoint: str | bool) -> None:
        directory = get_last_checkpoint(self.args.output_dir) if checkpoint is True else checkpoint
        file = Path(directory or "") / NETWORK_DIR / SELECTION_FILE
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
            "train_method": self.plan.method,
            "train_neurons": self.plan.train,
            "mask_mode": self.plan.mask_mode,
            "selected": {"count": self.neuron_mask.count, "sha256": self.neuron_mask.sha256},
            "trainable": {"count": self.trainable_neurons.count, "sha256": self.trainable_neurons.sha256},
            "neurons": self.neuron_mask.to_ranges(),
        }
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


def _select(template: FunctionalNetworkTemplate, config: FunctionalNetworkConfig) -> NeuronMask:
    return select_neurons(
        template,
        config.ica_component_ids,
        selector=config.ica_select,
        fraction=config.ica_fraction,
        rank=config.ica_rank_by,
        seed=config.ica_seed,
    )
