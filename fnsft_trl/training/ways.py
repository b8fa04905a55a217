"""The three ways to train a set of neurons, each with its checks, its PEFT configuration and its rule for shards."""

import copy

from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import OptimizerNames

from ..config import TrainingPlan
from ..constraints import (
    FrozenSlices,
    check_lora_config,
    check_optimizer_name,
    constrain_full,
    constrain_lora,
    plain_optimizer,
    reached_neurons,
    set_lora_targets,
)
from ..errors import FNSFTError
from ..neurons.mask import NeuronMask
from ..neurons.sites import base_model, find_neuron_sites
from ..tuner import NeuronDeltaLayer, NeuronTunerConfig


class Way:
    """One way to train neurons; a run calls its methods in this order.

    Args:
        plan (`TrainingPlan`): what the run trains and masks.
        site (`str`): the site of the neurons.
        train_other (`bool`): whether weights that belong to no neuron train, where they can.

    Attributes:
        frozen (`FrozenSlices` or `None`): what is put back after every step of the optimizer.
    """

    def __init__(self, plan: TrainingPlan, *, site: str, train_other: bool) -> None:
        self.plan = plan
        self.site = site
        self.train_other = train_other
        self.frozen: FrozenSlices | None = None
        self._optimizer: Optimizer | None = None

    def check(self, model: str | nn.Module, args: TrainingArguments) -> None:
        """Refuse, before anything is loaded, what cannot be trained in this way.

        Raises:
            FNSFTError: the model has adapters that this way cannot train.
        """
        if isinstance(model, PeftModel):
            raise FNSFTError(
                f"train_method={self.plan.method} needs a model without adapters; merge the adapter first"
            )

    def check_model(self, model: nn.Module, adapter: PeftConfig | None) -> None:
        """Refuse, before networks are discovered, what the loaded model cannot be trained with."""

    def peft_config(self, model: nn.Module, trainable: NeuronMask, given: PeftConfig | None) -> PeftConfig | None:
        """What PEFT wraps the model with: made from what was given, which is not changed.

        Raises:
            FNSFTError: it cannot train the trainable neurons.
        """
        return given

    def hold(self, trainer: Trainer, trainable: NeuronMask) -> None:
        """Freeze all other neurons in the wrapped model.

        Raises:
            FNSFTError: that is not possible in the way the model is sharded.
        """

    def reached(self, model: nn.Module, trainable: NeuronMask) -> NeuronMask:
        """Those of the trainable neurons that the wrapped model can change."""
        return trainable

    def attach(self, optimizer: Optimizer) -> None:
        """Have every step of an optimizer leave frozen values as they are; once, however often it is called."""
        optimizer = plain_optimizer(optimizer)  # it is wrapped from the second call of `train` on
        if self.frozen is not None and optimizer is not self._optimizer:
            # Not `frozen.attach`, since sharding may replace `frozen`.
            optimizer.register_step_pre_hook(lambda *_: self.frozen.before_step())
            optimizer.register_step_post_hook(lambda *_: self.frozen.after_step())
            self._optimizer = optimizer


# The end of a model's class -> what PEFT calls its task, by which it also trains and saves a new head.
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


class NeuronDeltas(Way):
    """Deltas of the trainable neurons alone, a PEFT method; the base model is frozen."""

    def check(self, model: str | nn.Module, args: TrainingArguments) -> None:
        """A model may bring its deltas."""
        if not (isinstance(model, PeftModel) and isinstance(model.active_peft_config, NeuronTunerConfig)):
            super().check(model, args)

    def peft_config(self, model: nn.Module, trainable: NeuronMask, given: PeftConfig | None) -> PeftConfig | None:
        """Deltas for the trainable neurons, with LoRA beside them where that was given.

        Raises:
            FNSFTError: the model brings deltas of other neurons.
        """
        if isinstance(model, PeftModel):
            _check_same_neurons(model, trainable)
            return None
        whole = {}
        lora = copy.deepcopy(given)
        if lora is not None:
            for name in ("modules_to_save", "trainable_token_indices"):  # of the adapter, not of LoRA
                whole[name] = getattr(lora, name)
                setattr(lora, name, None)
        kind = type(base_model(model)).__name__
        task = next((task for ending, task in _TASKS.items() if kind.endswith(ending)), "CAUSAL_LM")
        return NeuronTunerConfig(
            neurons=trainable.to_ranges(), site=trainable.site, task_type=task, lora=lora, **whole
        )

    def hold(self, trainer: Trainer, trainable: NeuronMask) -> None:
        """Nothing but deltas can train; TRL casts those on a quantised base to bfloat16, and they come back."""
        for module in trainer.model.modules():
            if isinstance(module, NeuronDeltaLayer):
                module.float_deltas()


class MaskedLora(Way):
    """LoRA whose factors stay zero for all other neurons."""

    def check(self, model: str | nn.Module, args: TrainingArguments) -> None:
        """A model may bring its adapter."""

    def check_model(self, model: nn.Module, adapter: LoraConfig) -> None:
        """Refuse variants of LoRA that cannot be held to neurons exactly."""
        if self.plan.train != "all":
            check_lora_config(adapter, model, self.site)

    def peft_config(self, model: nn.Module, trainable: NeuronMask, given: PeftConfig | None) -> PeftConfig | None:
        """LoRA without targets gets those of the MLPs."""
        given = copy.deepcopy(given)
        if given is not None:  # otherwise the model brings its adapter
            set_lora_targets(given, model, trainable)
        return given

    def hold(self, trainer: Trainer, trainable: NeuronMask) -> None:
        """Mask the factors. Sharded, only masks on inputs and outputs hold, for other tensors take the factors' place.

        Raises:
            FNSFTError: several adapters are active; or, sharded, more than such masks would be needed.
        """
        if self.plan.train == "all":
            return
        sharded = is_sharded(trainer)
        if sharded and "8bit" in (optim := OptimizerNames(trainer.args.optim).value):
            raise FNSFTError(
                f"LoRA held to neurons does not run sharded (FSDP, DeepSpeed) with optim={optim}, whose "
                "rounding moves frozen factors; use one with state in 32 bits, such as adamw_torch"
            )
        frozen = constrain_lora(trainer.model, trainable, adapter_name=_only_adapter(trainer.model))
        if sharded and frozen.masks_gradients:
            frozen.release()
            raise FNSFTError(
                "DoRA, and LoRA on the weights of experts, held to neurons, do not run sharded (FSDP, DeepSpeed); "
                "use plain data parallelism, or train_method=neuron_delta"
            )
        if not sharded:
            self.frozen = frozen

    def reached(self, model: PeftModel, trainable: NeuronMask) -> NeuronMask:
        """Those with a weight among the targets of the adapters."""
        return reached_neurons(model, trainable, model.active_adapters)


class FullWeights(Way):
    """The weights themselves, with those of all other neurons frozen."""

    @property
    def trains_other(self) -> bool:
        """Whether weights that belong to no neuron train too."""
        return {"selected": False, "unselected": self.train_other, "all": True}[self.plan.train]

    def check(self, model: str | nn.Module, args: TrainingArguments) -> None:
        """Refuse adapters, and optimizers that write weights at other times than their step."""
        super().check(model, args)
        check_optimizer_name(OptimizerNames(args.optim).value)

    def hold(self, trainer: Trainer, trainable: NeuronMask) -> None:
        """Freeze the slices; under FSDP2 again when the model is sharded, for that replaces its tensors.

        Raises:
            FNSFTError: under DeepSpeed or FSDP1, which leave no slices to freeze.
        """
        is_fsdp2 = trainer.accelerator.is_fsdp2
        if is_sharded(trainer) and not is_fsdp2:
            raise FNSFTError(
                "full fine-tuning held to neurons does not run under DeepSpeed or FSDP1; use FSDP2, plain data "
                "parallelism, or train_method=neuron_delta"
            )
        self.freeze(trainer.model, trainable)
        if is_fsdp2:
            self.frozen.release()
            trainer.add_callback(_FreezeAfterSharding(self, trainer, trainable))
        if not self.trains_other:
            # Reentrant checkpointing gives no gradients at all when its inputs require none.
            trainer.model.enable_input_require_grads()

    def freeze(self, model: nn.Module, trainable: NeuronMask) -> None:
        """Freeze all but the trainable weights, in the place of what was frozen before."""
        self.frozen = constrain_full(model, trainable, train_other=self.trains_other)


WAYS = {"neuron_delta": NeuronDeltas, "lora": MaskedLora, "full": FullWeights}


def is_sharded(trainer: Trainer) -> bool:
    """Whether the weights are spread over processes."""
    return trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled


class _FreezeAfterSharding(TrainerCallback):
    """Freezes slices of the weights anew when the Trainer has sharded the model and loaded a checkpoint."""

    def __init__(self, way: FullWeights, trainer: Trainer, trainable: NeuronMask) -> None:
        self.way = way
        self.trainer = trainer
        self.trainable = trainable

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.way.freeze(self.trainer.model, self.trainable)


def _check_same_neurons(model: PeftModel, trainable: NeuronMask) -> None:
    """Refuse to train deltas that a model brings where they are not those of the trainable neurons.

    Raises:
        FNSFTError: with both numbers.
    """
    config = model.active_peft_config
    widths = {site.layer: site.width for site in find_neuron_sites(model, kind=config.site)}
    found = NeuronMask.from_ranges(config.neurons, widths, config.site)
    if found != trainable:
        raise FNSFTError(
            f"the model brings deltas of {found.count} neurons at {found.site}, and the config trains "
            f"{trainable.count} others at {trainable.site}; give the template and the selection that lie beside the "
            "adapter's weights, or merge it first (merge_and_unload)"
        )


def _only_adapter(model: PeftModel) -> str:
    if len(model.active_adapters) != 1:
        raise FNSFTError(
            f"the model has {len(model.active_adapters)} active adapters ({', '.join(model.active_adapters)}); "
            "exactly one can be held to a set of neurons: set_adapter one of them"
        )
    return model.active_adapters[0]
