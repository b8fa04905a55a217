"""fnsft_trl: functional networks of language models, for TRL.

Public names are loaded on first use, so that `import fnsft_trl` (and every command that needs no model) stays free of
torch.
"""

from .lazy import lazy_names


__version__ = "0.1.0"

_HOMES = {
    "FNSFTError": "errors",
    "FunctionalNetworkConfig": "config",
    "ThresholdRule": "config",
    "DataConfig": "data",
    "to_trl_format": "data",
    "NeuronSite": "neurons",
    "NeuronLayout": "neurons",
    "find_neuron_sites": "neurons",
    "discover_networks": "discovery",
    "FunctionalNetworkTemplate": "template",
    "NeuronMask": "neurons",
    "select_neurons": "selection",
    "lesion": "interventions",
    "preserve": "interventions",
    "amplify": "interventions",
    "bake_amplification": "interventions",
    "bake_lesion": "interventions",
    "keep_neurons": "interventions",
    "unbake": "interventions",
    "NeuronTunerConfig": "tuner",
    "NeuronTunerModel": "tuner",
    "constrain_lora": "constraints",
    "constrain_full": "constraints",
    "EvaluationConfig": "evaluation",
    "EvaluationData": "evaluation",
    "evaluate_model": "evaluation",
    "FrozenNeuronGuard": "training",
    "MaskPhase": "training",
    "MaskScheduleCallback": "training",
    "ProtectionConfig": "training",
    "RetentionCallback": "training",
    "RetentionConfig": "evaluation",
    "ReplayConfig": "training",
    "PenaltyConfig": "training",
    "AnchorConfig": "training",
    "SelectorEvidence": "selection",
    "ProbeConfig": "probes",
    "ProbeData": "probes",
    "probe_networks": "probes",
    "FNSFTTrainer": "training",
    "with_networks": "training",
    "to_baked": "export",
    "to_merged": "export",
    "to_plain_lora": "export",
    "to_smaller": "export",
    "verify_export": "export",
    "verify_merge": "export",
}

__getattr__, __dir__, __all__ = lazy_names(__name__, _HOMES)
