"""ThresholdRule: which neurons belong to a network, given its loadings. Free of torch."""

from dataclasses import dataclass

from .errors import FNSFTError


THRESHOLD_RULES = {"percentile": 98.0, "layer_percentile": 98.0, "zscore": 1.96, "zscore_positive": 1.96}


@dataclass(frozen=True)
class ThresholdRule:
    """Which neurons belong to a network, given its loadings.

    Attributes:
        rule (`str`): `"percentile"`: |loading| over this percentile of all layers together. `"layer_percentile"`: over
            that of the neuron's own layer. `"zscore"`: |z| over the value, with z the loading standardised over all
            layers. `"zscore_positive"`: z over the value, one-sided (Liu et al. 2025, arXiv 2502.20408, use 1.96).
        value (`float`): the percentile, in (0, 100), or the z, above 0.

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
