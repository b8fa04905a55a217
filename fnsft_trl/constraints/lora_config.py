"""Which LoRA can be held to a set of neurons exactly, and which modules it trains."""

from dataclasses import fields

from peft import LoraConfig
from torch import nn

from ..compat.peft import check_target_module_exists
from ..errors import FNSFTError
from ..neurons.mask import NeuronMask
from ..neurons.sites import check_modules_to_save, find_neuron_sites


# LoraConfig field -> why the frozen neurons could not be held exactly when it is set.
REFUSED_LORA_FIELDS = {
    "lora_bias": "the bias of lora_B changes every output neuron",
    "use_qalora": "QALoRA pools the inputs of lora_A over neurons",
    "use_bdlora": "block-diagonal LoRA stores A and B in a shape of its own",
    "velora_config": "VeLoRA replaces the input of lora_A by a projection",
    "kasa_config": "KaSA truncates the base weight",
    "monteclora_config": "MonteCLoRA samples the weights of lora_A",
    "arrow_config": "Arrow mixes several adapters per token",
    "alora_invocation_tokens": "an activated LoRA does not merge",
    "layer_replication": "replicated layers share their base weights",
    "megatron_config": "Megatron layers shard their neurons",
}
# Fields that leave B A as the weight change of the MLPs, and those that belong to another field or to the file.
HELD_LORA_FIELDS = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias"),
    *("use_dora", "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "trainable_token_indices", "ensure_weight_tying"),
    *("qalora_group_size", "megatron_core", "runtime_config", "inference_mode"),
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
}
# Under these the weight change B A is zero at the start, and the base weights are left alone.
EXACT_INITS = (True, "gaussian", "eva", "orthogonal", "mica")
# Those that PEFT has for bare parameters.
BARE_INITS = (True, "gaussian")
# init_lora_weights -> why it is refused. Values that continue one of these (pissa_niter_4) are refused with it.
REFUSED_INITS = {
    False: "it starts from a random weight change",
    "olora": "it changes the base weights",
    "pissa": "it changes the base weights",
    "corda": "it changes the base weights",
    "lora_ga": "it changes the base weights",
    "loftq": "it quantises the base weights",
}


def check_lora_config(config: LoraConfig, model: nn.Module, site: str) -> None:
    """Check that LoRA with this configuration can be held to a set of neurons exactly.

    Raises:
        FNSFTError: a variant that cannot be exact, with the reason.
    """
    plain = LoraConfig()
    for name in (field.name for field in fields(config)):
        if name not in HELD_LORA_FIELDS and getattr(config, name) != getattr(plain, name):
            reason = REFUSED_LORA_FIELDS.get(name, "this version of fnsft_trl does not know it")
            raise FNSFTError(
                f"LoRA with {name} cannot be held to a set of neurons: {reason}; drop {name}, or use "
                "train_method=neuron_delta"
            )
    init = config.init_lora_weights
    if init not in EXACT_INITS:
        known = (why for name, why in REFUSED_INITS.items() if init == name or str(init).startswith(f"{name}_"))
        raise FNSFTError(
            f"init_lora_weights={init!r} cannot be held to a set of neurons: "
            f"{next(known, 'this version of fnsft_trl does not know it')}; use one of: "
            f"{', '.join(map(str, EXACT_INITS))}"
        )
    if config.bias != "none":
        raise FNSFTError(f"LoRA with bias={config.bias!r} trains biases of frozen neurons; use bias='none'")
    parts = [part for s in find_neuron_sites(model, kind=site) for part in s.layout.slices]
    if config.use_dora:
        _check_dora(config, [part.module_name for part in parts if part.side == "input"])
    names = [part.module_name for part in parts]
    check_modules_to_save(config.modules_to_save, names)


def set_lora_targets(config: LoraConfig, model: nn.Module, trainable: NeuronMask) -> None:
    """Give LoRA without targets those of the layers with trainable neurons: up, gate and down projections.

    In a model with experts, all of them become `target_parameters`: experts have no linear layers, and PEFT takes the
    names of other MLP layers for those that experts had in older checkpoints.

    Args:
        config: changed in place.
        model: the base model.
        trainable: the neurons that may change.

    Raises:
        FNSFTError: the configuration names targets, but no MLP module of such a layer; or it asks of experts what
            PEFT cannot do on bare parameters.
    """
    everywhere = find_neuron_sites(model, kind=trainable.site)
    sites = [s for s in everywhere if trainable.layers[s.layer].any()]
    names = [name for site in sites for name in site.layout.modules()]
    targets = config.target_modules
    has_targets = targets is not None or bool(config.target_parameters)
    if any(site.experts for site in everywhere):
        parts = [part for site in sites for part in site.layout.slices if not part.parameter.endswith("bias")]
        if not has_targets or config.target_parameters:
            _check_bare_targets(config)
        if not has_targets:
            quantised = [part.full_name for part in parts if not part.tensor(model).is_floating_point()]
            if quantised:
                raise FNSFTError(
                    f"{quantised[0]} is quantised, so PEFT cannot adapt it as it does the experts beside it; name "
                    "target_parameters (those of the experts), or use train_method=neuron_delta"
                )
            config.target_modules, config.target_parameters = [], sorted(part.full_name for part in parts)
    elif not has_targets:
        config.target_modules = sorted(names)
    elif (
        targets != "all-linear"
        and not config.target_parameters
        and not any(check_target_module_exists(config, name) for name in names)
    ):
        listed = targets if isinstance(targets, str) else ", ".join(sorted(targets))
        raise FNSFTError(
            f"the LoRA targets ({listed}) hold no MLP module, so no neuron could train; name some of "
            f"{', '.join(sorted({name.rpartition('.')[2] for name in names}))}, or leave target_modules out"
        )


def _check_dora(config: LoraConfig, inputs: list[str]) -> None:
    """Refuse DoRA on modules of which neurons are inputs."""
    everything = config.target_modules is None or config.target_modules == "all-linear"
    name = next((n for n in inputs if everything or check_target_module_exists(config, n)), None)
    if name is not None or config.target_parameters:
        raise FNSFTError(
            f"DoRA rescales every row of {name or 'the bare parameters'}, in which all neurons have entries, so no "
            "neuron could be held; name other target_modules (of this model's MLPs the up and gate projections), or "
            "drop use_dora"
        )


def _check_bare_targets(config: LoraConfig) -> None:
    """Refuse what PEFT cannot do where LoRA adapts bare parameters."""
    if config.lora_dropout:
        raise FNSFTError(
            f"lora_dropout is {config.lora_dropout}, and PEFT has no dropout on the weights of experts; use "
            "lora_dropout=0"
        )
    if config.init_lora_weights not in BARE_INITS:
        raise FNSFTError(
            f"init_lora_weights={config.init_lora_weights!r} does not exist on the weights of experts; use one of: "
            f"{', '.join(map(str, BARE_INITS))}"
        )
