"""Training: FNSFTTrainer and any other trainer with networks, what one run does, and the callbacks that watch it."""

from ..lazy import lazy_names


__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "AnchorConfig": "config",
        "ReplayConfig": "config",
        "DivergenceGuard": "divergence",
        "FNSFTTrainer": "trainer",
        "FrozenNeuronGuard": "guard",
        "FrozenNeuronMoved": "guard",
        "PenaltyConfig": "penalty_config",
        "MaskPhase": "schedule",
        "MaskScheduleCallback": "schedule",
        "ProtectionConfig": "protection_config",
        "RetentionBudgetExceeded": "budget",
        "RetentionCallback": "retention",
        "TrainingDiverged": "divergence",
        "with_networks": "any_trainer",
    },
)
