"""fnsft_trl: functional networks of language models, for TRL.

Public names are loaded on first use, so that `import fnsft_trl` (and every command that needs no model) stays free of
torch.
"""

from importlib import import_module


__version__ = "0.1.0.dev0"

_HOMES = {
    "FNSFTError": "errors",
    "FunctionalNetworkConfig": "config",
    "ThresholdRule": "config",
    "DataConfig": "data.config",
    "to_trl_format": "data.conversion",
    "NeuronSite": "neurons",
    "NeuronLayout": "neurons",
    "find_neuron_sites": "neurons",
    "discover_networks": "discovery",
    "FunctionalNetworkTemplate": "template",
    "NeuronMask": "mask",
    "select_neurons": "selection",
    "lesion": "masking",
    "preserve": "masking",
    "bake_lesion": "baking",
    "keep_neurons": "baking",
    "unbake": "baking",
    "NeuronTunerConfig": "tuner",
    "NeuronTunerModel": "tuner",
    "constrain_lora": "constraints",
    "constrain_full": "constraints",
    "FrozenNeuronGuard": "training.guard",
    "MaskPhase": "training.schedule",
    "MaskScheduleCallback": "training.schedule",
    "RetentionCallback": "training.retention",
    "FNSFTTrainer": "training.trainer",
    "to_merged": "export",
    "to_plain_lora": "export",
    "verify_merge": "export",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
