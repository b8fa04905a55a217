"""FunctionalNetworkConfig: what to discover, what to select, what to mask and what to train. Free of torch."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .errors import FNSFTError
from .ranges import parse_ranges


THRESHOLD_RULES = {"percentile": 98.0, "layer_percentile": 98.0, "zscore": 1.96, "zscore_positive": 1.96}

_CHOICES = {
    "ica_threshold": (None, *THRESHOLD_RULES),
    "ica_site": ("mlp_intermediate", "mlp_output"),
    "ica_variant": ("temporal", "spatial"),
    "ica_standardize": ("center", "zscore"),
    "ica_contrast": ("logcosh", "cube", "exp"),
    "ica_dtype": ("auto", "float32", "float64"),
    "ica_select": ("networks", "random", "activation"),
    "ica_rank_by": ("highest", "lowest"),
    "mask_mode": (None, "lesion", "preserve"),
    "train_neurons": ("auto", "all", "selected", "unselected"),
    "train_method": ("auto", "neuron_delta", "lora", "full"),
    "anti_drift_apply_to": ("auto", "lora", "base", "both"),
}


@dataclass(frozen=True)
class ThresholdRule:
    """Which neurons belong to a network, given its loadings.

    Attributes:
        rule (`str`): `"percentile"`: |loading| over this percentile of all layers together. `"layer_percentile"`: over
            that of the neuron's own layer. `"zscore"`: |z| over the value, with z the loading standardised over all
            layers. `"zscore_positive"`: z over the value, one-sided (Liu et al. 2025, arXiv 2502.20408, use 1.96).
        value (`float`): the percentile, in (0, 100), or the z, at least 0.

    Raises:
        FNSFTError: an unknown rule, or a value out of range.
    """

    rule: str = "percentile"
    value: float = THRESHOLD_RULES["percentile"]

    def __post_init__(self) -> None:
        if self.rule not in THRESHOLD_RULES:
            raise FNSFTError(
                f"threshold rule {self.rule!r} is unknown; it must be one of: {', '.join(THRESHOLD_RULES)}"
            )
        highest = float("inf") if self.rule.startswith("zscore") else 100
        valid = isinstance(self.value, (int, float)) and not isinstance(self.value, bool) and 0 < self.value < highest
        if not valid:
            raise FNSFTError(
                f"the value of threshold rule {self.rule} is {self.value!r}; it must be in (0, {highest})"
            )

    def __str__(self) -> str:
        return {
            "percentile": f"|loading| over percentile {self.value:g}, all layers together",
            "layer_percentile": f"|loading| over percentile {self.value:g} of the neuron's layer",
            "zscore": f"|z-scored loading| over {self.value:g}",
            "zscore_positive": f"z-scored loading over {self.value:g}",
        }[self.rule]


@dataclass(frozen=True)
class TrainingPlan:
    """What one combination of switches comes to.

    Attributes:
        method (`str`): `"neuron_delta"`, `"lora"` or `"full"`.
        train (`str`): `"all"`, `"selected"` or `"unselected"`: which neurons' weights may change.
        mask_mode (`str` or `None`): the forward intervention during training.
    """

    method: str
    train: str
    mask_mode: str | None


# (mask_mode, train_neurons) -> (what trains, or None with the reason why the combination is an error).
# `by anti-drift`: held exactly when `anti_drift_row_param` is on; by the forward mask alone when it is off.
COMBINATIONS: dict[tuple[str | None, str], tuple[str | None, str]] = {
    (None, "auto"): ("selected", "the selected neurons"),
    (None, "all"): (
        None,
        "no mask and every neuron trainable: the networks would change nothing; drop network_config",
    ),
    (None, "selected"): ("selected", "the selected neurons"),
    (None, "unselected"): ("unselected", "all but the selected neurons"),
    ("lesion", "auto"): ("unselected", "all but the lesioned neurons, by anti-drift"),
    ("lesion", "all"): ("all", "everything; the lesioned neurons get no gradient, but weight decay can move them"),
    ("lesion", "selected"): (None, "lesioned neurons get no gradient, so nothing selected could learn"),
    ("lesion", "unselected"): ("unselected", "all but the lesioned neurons"),
    ("preserve", "auto"): ("selected", "the preserved neurons, by anti-drift"),
    ("preserve", "all"): ("all", "everything; the silenced neurons get no gradient, but weight decay can move them"),
    ("preserve", "selected"): ("selected", "the preserved neurons"),
    ("preserve", "unselected"): (None, "preserve silences all unselected neurons, so none of them could learn"),
}

# (train_method, anti_drift_apply_to) -> the reason why the combination is an error. Cells not listed are fine.
ANTI_DRIFT_ERRORS: dict[tuple[str, str], str] = {
    ("lora", "base"): "under LoRA the base weights never train, so only the adapter can drift: use lora, both or auto",
    ("full", "lora"): "full fine-tuning has no LoRA weights to hold: use base, both or auto",
    ("neuron_delta", "lora"): "neuron deltas have no LoRA weights to hold: use base, both or auto",
}


def _help(text: str, default: Any) -> Any:
    metadata = {"help": text}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class FunctionalNetworkConfig:
    """Configuration of functional networks in fine-tuning: discovery, selection, masking, trainable neurons.

    A neuron is unit j of an MLP's intermediate layer (or, at `mlp_output`, channel j of the MLP's output). A network
    is the set of neurons whose absolute loading on one independent component exceeds the template's threshold.

    Args:
        ica_template_path (`str`, *optional*):
            Directory of a saved template, a JSON file of the original project, or `org/name` on the Hub. `None`: the
            networks are discovered before training.
        ica_template_revision (`str`, *optional*):
            Branch, tag or commit of a template on the Hub; the newest of `main` by default.
        ica_components (`int`, *optional*, defaults to `10`):
            Number of independent components k to discover.
        ica_percentile (`float`, *optional*):
            A network holds the neurons whose |loading| exceeds this percentile, in (0, 100). `None`: 98.0 in a
            discovery; the template's own threshold when one is loaded.
        ica_threshold (`str`, *optional*):
            The rule: `percentile` (pooled over layers, the default), `layer_percentile`, `zscore` (two-sided) or
            `zscore_positive` (one-sided). See [`ThresholdRule`].
        ica_zscore (`float`, *optional*):
            The z of the `zscore` rules; 1.96 by default.
        ica_min_reliability (`float`, *optional*, defaults to `0.0`):
            Without `ica_component_ids`: select only networks at least this reliable. In [0, 1].
        ica_component_ids (`list[int]` or `str`, *optional*):
            The networks that make up the selection, as a list or as `0-3,7`. `None`: all networks of the template.
        ica_layers (`str` or `list[int]`, *optional*, defaults to `"all"`):
            Layers to discover in: `all`, `0-5` (inclusive), `0:4` (end left out), `0:4,9`, or a list.
        ica_site (`str`, *optional*, defaults to `"mlp_intermediate"`):
            Where activations are read and masked: `mlp_intermediate` (input of the down projection) or `mlp_output`.
        ica_variant (`str`, *optional*, defaults to `"temporal"`):
            `temporal`: sources independent over tokens. `spatial`: maps independent over neurons.
        ica_standardize (`str`, *optional*, defaults to `"center"`):
            `center`: subtract each neuron's mean. `zscore`: also divide by its standard deviation.
        ica_contrast (`str`, *optional*, defaults to `"logcosh"`):
            FastICA's contrast function: `logcosh`, `cube` or `exp`.
        ica_dtype (`str`, *optional*, defaults to `"auto"`):
            Precision in which activations are accumulated: `float32` (also `auto`) or `float64`.
        ica_rank (`int`, *optional*, defaults to `128`):
            Rank of the streaming sketch; at least `ica_components`. Memory is `ica_rank` x neurons for each half.
        ica_max_tokens (`int`, *optional*, defaults to `50000`):
            Number of tokens to read, both halves together.
        ica_reservoir (`int`, *optional*, defaults to `16384`):
            Largest number of token scores kept for each half; more tokens are sampled uniformly.
        ica_until_reliable (`float`, *optional*):
            Read on until the mean reliability reaches this, at most `ica_max_tokens`; the curve of reliability over
            tokens is kept in the template. In (0, 1).
        ica_template_samples_per_ds (`int`, *optional*):
            Number of rows taken of each dataset, from its start. `None`: as many as the tokens need.
        ica_skip_tokens (`int`, *optional*, defaults to `1`):
            First tokens of every sequence to leave out (attention sinks).
        ica_skip_special (`bool`, *optional*, defaults to `True`):
            Leave special tokens out.
        ica_drop_massive (`float`, *optional*):
            Leave out neurons whose RMS is more than this many times the median of their layer (massive activations);
            they get no loading. Above 1.
        ica_batch_size (`int`, *optional*, defaults to `4`):
            Sequences per forward pass of the discovery.
        ica_max_length (`int`, *optional*, defaults to `512`):
            Longest sequence of the discovery, in tokens.
        ica_seed (`int`, *optional*, defaults to `0`):
            Seed of the reservoir, of FastICA's start and of random selections.
        ica_datasets (`list[str]`, *optional*):
            Files or Hub ids of the text to discover on. `None`: the training data.
        ica_select (`str`, *optional*, defaults to `"networks"`):
            `networks`; or a control: `random`, `activation` (by RMS on the calibration text).
        ica_fraction (`float`, *optional*):
            Select this fraction of the neurons of every layer instead of those over the threshold. In (0, 1).
        ica_rank_by (`str`, *optional*, defaults to `"highest"`):
            With `ica_fraction`: the neurons that rank `highest` in the chosen networks (or activation), or `lowest`
            (the neurons most outside them).
        mask_mode (`str`, *optional*):
            Forward intervention during training: `lesion` zeroes the selected neurons, `preserve` all others.
        mask_eval (`bool`, *optional*, defaults to `True`):
            Whether evaluation during training runs with the mask on.
        train_neurons (`str`, *optional*, defaults to `"auto"`):
            Whose weights may change: `selected`, `unselected`, `all`, or `auto` (`lesion` trains the unselected,
            `preserve` the selected, no mask the selected).
        train_method (`str`, *optional*, defaults to `"auto"`):
            `neuron_delta`, `lora` or `full`. `auto`: `lora` when a LoraConfig is given, otherwise `neuron_delta`. With
            `neuron_delta`, a LoraConfig adds LoRA on modules outside the MLPs.
        train_other (`bool`, *optional*, defaults to `True`):
            With `full` and `unselected`: whether the weights outside the MLP neurons train too.
        anti_drift_row_param (`bool`, *optional*, defaults to `True`):
            With `train_neurons="auto"` and a mask: hold the other neurons' weights exactly (`True`), or leave it to
            the forward mask, under which they get no gradient (`False`).
        anti_drift_apply_to (`str`, *optional*, defaults to `"auto"`):
            Which weights are held: `lora`, `base`, `both`; `auto` follows the training method.
        frozen_guard (`bool`, *optional*, defaults to `True`):
            Check at every save and at the end of training that no frozen neuron moved, and stop if one did.

    Raises:
        FNSFTError: a value or a combination of values that has no meaning, with what to do instead.
    """

    ica_template_path: str | None = _help("Directory, JSON file or Hub id of a template; discovered if none.", None)
    ica_template_revision: str | None = _help("Branch, tag or commit of a template on the Hub.", None)
    ica_components: int = _help("Number of independent components (networks) to discover.", 10)
    ica_percentile: float | None = _help("A network holds the neurons whose |loading| exceeds it (98.0).", None)
    ica_threshold: str | None = _help("percentile, layer_percentile, zscore or zscore_positive.", None)
    ica_zscore: float | None = _help("The z of the zscore rules (1.96).", None)
    ica_min_reliability: float = _help("Without ica_component_ids: only networks at least this reliable.", 0.0)
    ica_component_ids: list[int] | str | None = _help(
        "Networks that make up the selection; all of them by default.", None
    )
    ica_layers: str | list[int] = _help(
        "Layers to discover in: all, 0-5 (inclusive), 0:4 (end left out), 0:4,9.", "all"
    )
    ica_site: str = _help("Where activations are read and masked: mlp_intermediate or mlp_output.", "mlp_intermediate")
    ica_variant: str = _help("temporal (independent over tokens) or spatial (over neurons).", "temporal")
    ica_standardize: str = _help("center, or zscore: also divide by each neuron's standard deviation.", "center")
    ica_contrast: str = _help("Contrast function of FastICA: logcosh, cube or exp.", "logcosh")
    ica_dtype: str = _help("Precision of the accumulation: auto (float32), float32 or float64.", "auto")
    ica_rank: int = _help("Rank of the streaming sketch; at least ica_components.", 128)
    ica_max_tokens: int = _help("Number of tokens to read, both halves together.", 50_000)
    ica_reservoir: int = _help("Largest number of token scores kept for each half.", 16_384)
    ica_until_reliable: float | None = _help("Read on until the mean reliability reaches this.", None)
    ica_template_samples_per_ds: int | None = _help("Rows taken of each dataset; as many as needed by default.", None)
    ica_skip_tokens: int = _help("First tokens of every sequence to leave out (attention sinks).", 1)
    ica_skip_special: bool = _help("Leave special tokens out.", True)
    ica_drop_massive: float | None = _help(
        "Leave out neurons with an RMS of so many times their layer's median.", None
    )
    ica_batch_size: int = _help("Sequences per forward pass of the discovery.", 4)
    ica_max_length: int = _help("Longest sequence of the discovery, in tokens.", 512)
    ica_seed: int = _help("Seed of the reservoir, of FastICA's start and of random selections.", 0)
    ica_datasets: list[str] | None = _help("Files or Hub ids to discover on; the training data by default.", None)
    ica_select: str = _help("networks, or a control: random, activation.", "networks")
    ica_fraction: float | None = _help(
        "Select this fraction of every layer's neurons, not those over threshold.", None
    )
    ica_rank_by: str = _help(
        "With ica_fraction: the highest in the networks, or the lowest (outside them).", "highest"
    )
    mask_mode: str | None = _help("Zero the selected neurons (lesion) or all others (preserve) in training.", None)
    mask_eval: bool = _help("Whether evaluation during training runs with the mask on.", True)
    train_neurons: str = _help("Whose weights may change: auto, selected, unselected or all.", "auto")
    train_method: str = _help("auto, neuron_delta, lora or full.", "auto")
    train_other: bool = _help("With full and unselected: whether weights outside the neurons train too.", True)
    anti_drift_row_param: bool = _help("With a mask and train_neurons=auto: hold the other neurons exactly.", True)
    anti_drift_apply_to: str = _help("Which weights are held: auto, lora, base or both.", "auto")
    frozen_guard: bool = _help("Check that no frozen neuron moved at every save and at the end.", True)

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self) if f.default is None):
            if getattr(self, name) in ("null", "none", "None"):  # as they are written on a command line
                setattr(self, name, None)
        if self.ica_component_ids in ("all", ""):
            self.ica_component_ids = None
        if isinstance(self.ica_component_ids, str):
            self.ica_component_ids = parse_ranges(self.ica_component_ids, 10**6, what="network")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                listed = ", ".join("null" if choice is None else choice for choice in choices)
                raise FNSFTError(f"{name} is {value!r}; it must be one of: {listed}")
        if self.ica_template_revision is not None and self.ica_template_path is None:
            raise FNSFTError("ica_template_revision without ica_template_path has no effect; give both or drop it")
        if isinstance(self.ica_layers, int):
            self.ica_layers = [self.ica_layers]
        if isinstance(self.ica_layers, (list, tuple)):
            self.ica_layers = ",".join(map(str, self.ica_layers))
        if isinstance(self.ica_component_ids, int):
            self.ica_component_ids = [self.ica_component_ids]
        if isinstance(self.ica_datasets, str):
            self.ica_datasets = [self.ica_datasets]
        for name in ("ica_components", "ica_rank", "ica_max_tokens", "ica_reservoir", "ica_batch_size"):
            self._check(name, int, lambda value: value >= 1, "a whole number of at least 1")
        self._check("ica_max_length", int, lambda value: value >= 2, "a whole number of at least 2")
        for name in ("ica_skip_tokens", "ica_seed"):
            self._check(name, int, lambda value: value >= 0, "a whole number of at least 0")
        if self.ica_percentile is not None:
            self._check("ica_percentile", (int, float), lambda value: 0 < value < 100, "between 0 and 100")
        if self.ica_zscore is not None:
            self._check("ica_zscore", (int, float), lambda value: value > 0, "above 0")
        if self.ica_until_reliable is not None:
            self._check("ica_until_reliable", (int, float), lambda value: 0 < value < 1, "between 0 and 1")
        if self.ica_template_samples_per_ds is not None:
            self._check("ica_template_samples_per_ds", int, lambda value: value >= 1, "a whole number of at least 1")
        if self.ica_drop_massive is not None:
            self._check("ica_drop_massive", (int, float), lambda value: value > 1, "above 1")
        self.threshold_rule()
        self._check("ica_min_reliability", (int, float), lambda value: 0 <= value <= 1, "between 0 and 1")
        if self.ica_min_reliability and (self.ica_component_ids is not None or self.ica_select != "networks"):
            raise FNSFTError("ica_min_reliability chooses networks; drop it, or ica_component_ids and ica_select")
        if self.ica_fraction is not None:
            self._check("ica_fraction", (int, float), lambda value: 0 < value < 1, "between 0 and 1")
        if self.ica_component_ids is not None and not (
            isinstance(self.ica_component_ids, (list, tuple))
            and self.ica_component_ids
            and all(isinstance(c, int) and not isinstance(c, bool) and c >= 0 for c in self.ica_component_ids)
        ):
            raise FNSFTError(
                f"ica_component_ids is {self.ica_component_ids!r}; it must be a list of network numbers such as "
                "[0, 3], or null for all networks"
            )
        if self.ica_rank < self.ica_components:
            raise FNSFTError(
                f"ica_rank is {self.ica_rank}, below ica_components ({self.ica_components}): the sketch must hold at "
                "least as many directions as there are components"
            )
        if self.ica_select != "networks" and self.ica_fraction is None:
            raise FNSFTError(f"ica_select={self.ica_select} needs ica_fraction: the share of every layer to select")
        if self.ica_select != "networks" and self.ica_component_ids is not None:
            raise FNSFTError(f"ica_select={self.ica_select} takes no networks; drop ica_component_ids or ica_select")
        if self.ica_rank_by == "lowest" and self.ica_fraction is None:
            raise FNSFTError("ica_rank_by=lowest needs ica_fraction: the share of every layer to select")
        if not isinstance(self.ica_layers, str):
            raise FNSFTError(f"ica_layers is {self.ica_layers!r}; it must be all, or layers such as 0-5 or [0, 2, 4]")
        if not self.mask_eval and self.mask_mode is None:
            raise FNSFTError("mask_eval=false has no effect without a mask_mode; drop it")
        if not self.anti_drift_row_param and (self.mask_mode is None or self.train_neurons != "auto"):
            raise FNSFTError(
                "anti_drift_row_param=false has an effect only with a mask_mode and train_neurons=auto; without them "
                "the neurons that do not train are always held exactly; drop it"
            )
        outcome, reason = COMBINATIONS[self.mask_mode, self.train_neurons]
        if outcome is None:
            raise FNSFTError(f"mask_mode={self.mask_mode or 'null'} with train_neurons={self.train_neurons}: {reason}")

    def _check(self, name, kind, valid, expected: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, kind) or not valid(value):
            raise FNSFTError(f"{name} is {value!r}; it must be {expected}")

    def threshold_rule(self) -> ThresholdRule | None:
        """The rule that the three threshold fields ask for; `None` when none of them is set.

        Raises:
            FNSFTError: they contradict each other.
        """
        if self.ica_threshold is None and self.ica_percentile is None and self.ica_zscore is None:
            return None
        rule = self.ica_threshold or ("percentile" if self.ica_zscore is None else "zscore")
        value, other = self.ica_percentile, self.ica_zscore
        if rule.startswith("zscore"):
            value, other = other, value
        if other is not None:
            raise FNSFTError(f"ica_threshold={rule} takes only one of ica_percentile and ica_zscore; drop the other")
        return ThresholdRule(rule, THRESHOLD_RULES[rule] if value is None else value)

    def plan(self, *, lora_config: bool) -> TrainingPlan:
        """Resolve the switches into what is trained and masked.

        Args:
            lora_config: whether the caller gave a LoraConfig.

        Raises:
            FNSFTError: the training method contradicts the rest.
        """
        method = self.train_method
        if method == "auto":
            method = "lora" if lora_config else "neuron_delta"
        if method == "full" and lora_config:
            raise FNSFTError("train_method=full with a LoraConfig: drop peft_config, or use train_method=lora")
        if method == "lora" and not lora_config:
            raise FNSFTError("train_method=lora needs a LoraConfig (peft_config, or use_peft on the command line)")
        if reason := ANTI_DRIFT_ERRORS.get((method, self.anti_drift_apply_to)):
            raise FNSFTError(f"train_method={method} with anti_drift_apply_to={self.anti_drift_apply_to}: {reason}")
        train, outcome = COMBINATIONS[self.mask_mode, self.train_neurons]
        if not self.train_other and (method, train) != ("full", "unselected"):
            raise FNSFTError(
                f"train_other=false has no effect on train_method={method} training the {train} neurons; it is for "
                "full fine-tuning of the unselected ones"
            )
        if outcome.endswith("by anti-drift") and not self.anti_drift_row_param:
            train = "all"
        return TrainingPlan(method=method, train=train, mask_mode=self.mask_mode)

    def discovery_settings(self) -> dict[str, Any]:
        """The settings that a template depends on, as they stand in its `config.json`."""
        kept = ("components", "layers", "variant", "standardize", "contrast", "dtype", "rank")
        kept += ("max_tokens", "until_reliable", "template_samples_per_ds", "reservoir", "skip_tokens", "skip_special")
        kept += ("drop_massive", "batch_size", "max_length", "seed")
        return {f"ica_{name}": getattr(self, f"ica_{name}") for name in kept}

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def field_names(cls) -> list[str]:
        """The names of all fields, in order."""
        return [f.name for f in fields(cls)]
