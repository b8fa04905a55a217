"""FunctionalNetworkConfig: what to discover, what to select, what to mask and what to train. Free of torch."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from .combinations import ANTI_DRIFT_ERRORS, COMBINATIONS, NETWORK_SELECTORS, TrainingPlan, check_combinations
from .errors import FNSFTError
from .fields import LARGEST_SEED, check_fields, documented, fits, make_plain, option
from .ranges import format_ranges, is_open, parse_ranges, ranges_text
from .threshold import THRESHOLD_RULES, ThresholdRule


SITES = ("mlp_intermediate", "mlp_output")
# More than any template has, and few enough to be listed.
_MOST_NETWORKS = 10_000
# Those that look at networks, and those that rank all neurons by something else.
SELECTORS = (*NETWORK_SELECTORS, "random", "activation_rms", "contrast", "gradient_conflict")
SELECTOR_ALIASES = {"activation": "activation_rms"}
RANDOM_SELECTORS = ("random", "layer_shuffled")  # that draw by a seed
MEASURED_SELECTORS = ("surrogate", "contrast", "gradient_conflict")  # that read text of their own


@documented
@dataclass
class FunctionalNetworkConfig:
    """Configuration of functional networks in fine-tuning: discovery, selection, masking, trainable neurons.

    A neuron is unit j of an MLP's intermediate layer (or, at `mlp_output`, channel j of the MLP's output). A network
    is the set of neurons whose absolute loading on one independent component exceeds the template's threshold, a
    [`ThresholdRule`].

    Raises:
        FNSFTError: a value or a combination of values that has no meaning, with what to do instead.
    """

    ica_template_path: str | None = option(
        None,
        "Directory of a saved template, a JSON file of the original project, or `org/name` on the Hub. A training "
        "without it discovers the networks first.",
    )
    ica_template_revision: str | None = option(
        None, "Branch, tag or commit of a template on the Hub. By default the newest of `main`."
    )
    ica_components: int = option(10, "Number of independent components (networks) to discover.", least=1)
    ica_percentile: float | None = option(
        None,
        "Percentile of |loading| that a neuron must exceed to belong to a network. By default 98.0 in a discovery. A "
        "loaded template brings its own threshold.",
        above=0,
        below=100,
    )
    ica_threshold: str | None = option(
        None,
        "The rule of the threshold: `percentile` (pooled over layers, the default), `layer_percentile`, `zscore` "
        "(two-sided) or `zscore_positive` (one-sided).",
        choices=THRESHOLD_RULES,
    )
    ica_zscore: float | None = option(None, "The z of the `zscore` rules; 1.96 by default.", above=0)
    ica_min_reliability: float = option(
        0.0,
        "Select only networks whose reliability above null is at least this. Not with `ica_component_ids`.",
        least=0,
        most=1,
    )
    ica_component_ids: list[int] | str | None = option(
        None,
        "Numbers of the networks to select, as a list or as `0-3,7` (`5:` means from 5 on). By default all networks "
        "of the template.",
        least=0,
    )
    ica_layers: list[int] | str | None = option(
        None,
        "Layers to discover in: `all` (the default), `0-5` (inclusive), `0:4` (end left out), `0:4,9`, or a list. "
        "With a loaded template: the layers to select in.",
    )
    ica_site: str = option(
        "mlp_intermediate",
        "Where activations are read and masked: `mlp_intermediate` (input of the down projection) or `mlp_output`.",
        choices=SITES,
    )
    ica_variant: str = option(
        "temporal",
        "`temporal`: sources independent over tokens. `spatial`: maps independent over neurons.",
        choices=("temporal", "spatial"),
    )
    ica_standardize: str = option(
        "center",
        "`center`: subtract each neuron's mean. `layer`: also divide each layer by its RMS, so that all layers count "
        "alike. `zscore`: also divide each neuron by its standard deviation.",
        choices=("center", "layer", "zscore"),
    )
    ica_decomposition: str = option(
        "ica",
        "How networks are made of the sketch: by `ica` (independent components), or by a control. `pca` gives "
        "principal components. `kmeans` clusters neurons by their loadings on these; a neuron's loading is then its "
        "cosine to the centroid.",
        choices=("ica", "pca", "kmeans"),
    )
    ica_surrogate: bool = option(
        False,
        "Shift each neuron's activations in time by an amount of its own, within the sequences that are read "
        "together (`ica_batch_size`). The networks are then a control: no neurons co-activate.",
    )
    ica_contrast: str = option(
        "logcosh", "FastICA's contrast function: `logcosh`, `cube` or `exp`.", choices=("logcosh", "cube", "exp")
    )
    ica_backend: str = option(
        "torch",
        "Implementation of FastICA: `torch` (ours, on the model's device) or `sklearn` (scikit-learn's, on the CPU).",
        choices=("torch", "sklearn"),
    )
    ica_dtype: str = option(
        "auto",
        "Precision in which activations are accumulated: `float32` (also `auto`) or `float64`.",
        choices=("auto", "float32", "float64"),
    )
    ica_rank: int = option(
        128,
        "Rank of the streaming sketch, at least `ica_components`. Memory is `ica_rank` x neurons for each half.",
        least=1,
    )
    ica_max_tokens: int = option(50_000, "Number of tokens to read, both halves together.", least=1)
    ica_reservoir: int = option(
        16_384, "Largest number of token scores to keep for each half. More tokens are sampled uniformly.", least=1
    )
    ica_until_reliable: float | None = option(
        None,
        "Keep reading until the mean reliability above null reaches this, up to `ica_max_tokens`. The template keeps "
        "the curve of reliability over tokens.",
        above=0,
        below=1,
    )
    ica_template_samples_per_ds: int | None = option(
        None, "Number of rows to take from the start of each dataset. By default as many as the tokens need.", least=1
    )
    ica_skip_tokens: int = option(1, "Tokens to leave out at the start of each sequence (attention sinks).", least=0)
    ica_skip_special: bool = option(True, "Leave out special tokens.")
    ica_drop_massive: float | None = option(
        None,
        "Leave out neurons whose RMS exceeds this multiple of the median of their layer (massive activations). They "
        "get no loading.",
        above=1,
    )
    ica_store_basis: int | None = option(
        None, "Also store this many leading directions of the MLP inputs, for `protect`.", least=1, most=2000
    )
    ica_batch_size: int = option(4, "Sequences per forward pass of the discovery.", least=1)
    ica_max_length: int = option(512, "Longest sequence of the discovery, in tokens.", least=2)
    ica_seed: int = option(
        0, "Seed of the reservoir, of FastICA's start and of random selections.", least=0, most=LARGEST_SEED
    )
    ica_datasets: list[str] | None = option(
        None, "Files or Hub ids of the text to discover on. By default the training data."
    )
    ica_select: str = option(
        "networks",
        "How neurons are selected: by `networks`, or by a control. `random`: drawn with `ica_seed`. "
        "`layer_shuffled`: other neurons, as many in every layer as the networks have there. `surrogate`: networks "
        "of activations shifted in time. `activation_rms` (or `activation`): by RMS on the calibration text. "
        "`contrast`: used by the training data and not by the calibration text. `gradient_conflict`: the gradients "
        "on the training data and on `ica_datasets` oppose each other.",
        choices=(*SELECTORS, *SELECTOR_ALIASES),
    )
    ica_fraction: float | None = option(
        None,
        "Select this fraction of every layer's neurons, instead of those over the threshold.",
        above=0,
        below=1,
    )
    ica_rank_by: str = option(
        "highest",
        "With `ica_fraction`: the neurons that rank `highest` in the chosen networks (or activation), or `lowest` "
        "(the neurons most outside them).",
        choices=("highest", "lowest"),
    )
    mask_mode: str | None = option(
        None,
        "What happens in the forward pass: `lesion` zeroes the selected neurons, `preserve` zeroes all others, "
        "`amplify` multiplies the selected ones by `mask_factor`. By default nothing.",
        choices=("lesion", "preserve", "amplify"),
    )
    mask_factor: float | None = option(
        None, "The factor of `mask_mode: amplify`. Below 1 it inhibits; 0 would be a lesion.", above=0
    )
    mask_eval: bool = option(True, "Whether the mask stays on in evaluations during training.")
    train_neurons: str = option(
        "auto",
        "Neurons whose weights may change: `selected`, `unselected`, `all`, or `auto` (`lesion` trains the "
        "unselected, `preserve` the selected, no mask the selected).",
        choices=("auto", "all", "selected", "unselected"),
    )
    train_method: str = option(
        "auto",
        "`neuron_delta`, `lora` or `full`. `auto`: `lora` when a LoraConfig is given, otherwise `neuron_delta`. With "
        "`neuron_delta`, a LoraConfig adds LoRA on modules outside the MLPs.",
        choices=("auto", "neuron_delta", "lora", "full"),
    )
    train_other: bool = option(
        True, "Whether weights outside the MLP neurons train too, with `full` and `unselected`."
    )
    anti_drift_row_param: bool = option(
        True,
        "With `train_neurons: auto` and a mask: `True` holds the weights of the other neurons exactly. `False` "
        "leaves that to the forward mask, under which they get no gradient.",
    )
    anti_drift_apply_to: str = option(
        "auto",
        "Weights that you expect to be held: `lora`, `base`, `both`, or `auto` (those that the training method "
        "holds). It changes nothing in the training, but a contradiction with `train_method` is an error.",
        choices=("auto", "lora", "base", "both"),
    )
    frozen_guard: bool = option(
        True, "Check at every save and at the end of training that no frozen neuron moved. Stop if one did."
    )

    def __post_init__(self) -> None:
        self._normalise()
        check_fields(self)
        check_combinations(self)

    def _normalise(self) -> None:
        """Bring values that may be written in several ways, as on a command line, into one form."""
        make_plain(self)
        if not fits(self.ica_component_ids, list[int]):
            text = ranges_text(self.ica_component_ids, "ica_component_ids", what="network")
            # With an open end it stays text, until the number of networks is known.
            if isinstance(text, str) and not is_open(text):
                text = parse_ranges(text, _MOST_NETWORKS, what="ica_component_ids: network") if text else None
            self.ica_component_ids = None if text == "all" else text
        self.ica_layers = "all" if self.ica_layers is None else ranges_text(self.ica_layers, "ica_layers")
        if isinstance(self.ica_select, str) and self.ica_select in SELECTOR_ALIASES:
            self.ica_select = SELECTOR_ALIASES[self.ica_select]

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
            raise FNSFTError("train_method=lora needs a LoraConfig; give peft_config, or use_peft on the command line")
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
        return TrainingPlan(method=method, train=train, mask_mode=self.mask_mode, mask_factor=self.mask_factor)

    def check_named_networks(self) -> None:
        """Check that a discovery with these settings will find the networks that are named.

        Raises:
            FNSFTError: it will not.
        """
        named = self.ica_component_ids
        if isinstance(named, str):
            named = parse_ranges(named, self.ica_components, what="network")
        if unknown := [number for number in named or [] if number >= self.ica_components]:
            raise FNSFTError(
                f"ica_component_ids: there will be no network {format_ranges(sorted(unknown))}: ica_components is "
                f"{self.ica_components}, so the networks are 0-{self.ica_components - 1}"
            )

    def discovery_settings(self) -> dict[str, Any]:
        """The settings that a template depends on, as they stand in its `config.json`."""
        kept = (
            "components",
            "layers",
            "variant",
            "standardize",
            "decomposition",
            "surrogate",
            "contrast",
            "backend",
            "dtype",
            "rank",
        )
        kept += ("max_tokens", "until_reliable", "template_samples_per_ds", "reservoir", "skip_tokens", "skip_special")
        kept += ("drop_massive", "batch_size", "max_length", "seed")
        kept += () if self.ica_store_basis is None else ("store_basis",)
        return {f"ica_{name}": getattr(self, f"ica_{name}") for name in kept}

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def field_names(cls) -> list[str]:
        """The names of all fields, in order."""
        return [f.name for f in fields(cls)]
