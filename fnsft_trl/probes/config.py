"""ProbeConfig: what a probe silences, on what it scores, and how often its controls are drawn. Free of torch."""

from dataclasses import dataclass

from ..errors import FNSFTError
from ..fields import LARGEST_SEED, check_fields, documented, option
from ..ranges import parse_ranges


CURVES = ("lesion", "union", "dose", "preserve", "amplify", "kept", "prune")
ABLATIONS = ("zero", "mean", "resample")
# What reports call the networks and their controls.
SELECTORS = {
    "networks": "networks",
    "random": "random, same layers",
    "random_15": "random, 15% of all",
    "rms_matched": "same amplitude",
    "layer_shuffled": "layers shuffled",
    "surrogate": "surrogate networks",
    "activation_rms": "loudest",
    "weight_norm": "largest weights",
}


@documented
@dataclass
class ProbeConfig:
    """
    What a probe does.

    Raises:
        FNSFTError: a value has no meaning, or no effect.
    """

    networks: str | None = option(
        None, "Numbers of the networks to probe, as `0-3,7`. By default all of the template."
    )
    fraction: float | None = option(
        None,
        "Share of all neurons that makes up each network, those of its largest |loading|. By default those over the "
        "template's threshold.",
        above=0,
        below=1,
    )
    curves: list[str] | None = option(
        None,
        "Curves to measure. `lesion`: each network by itself beside every control, which gives the verdicts. `union`: "
        "the first m networks together. `dose`: 0.001 to 0.2 of all neurons. `preserve`: 0.05 to 1. `amplify`: "
        "activations halved, doubled, times 4. `kept`: the networks alone. `prune`: neurons of no network set to "
        "their mean, and to zero, in all layers but the first and the last. By default all of them.",
    )
    draws: int = option(
        20,
        "Number of random masks, and of masks of the same amplitude, for each network. Other controls and curves get "
        "a quarter of them. Fewer than 20 give no verdict.",
        least=3,
    )
    max_tokens: int = option(8192, "Number of tokens to score of each dataset.", least=16)
    max_length: int = option(
        256, "Longest sequence in tokens. Longer text is read in parts, and longer rows are left out.", least=2
    )
    batch_size: int = option(4, "Sequences in a forward pass.", least=1)
    ablation: str = option(
        "zero",
        "What replaces the activations of silenced neurons: `zero`, their `mean` on the calibration text (kept in "
        "the template), or `resample`, their activations at other tokens of the data.",
        choices=ABLATIONS,
    )
    tokens: str = option(
        "all",
        "Where neurons are changed: at `all` tokens, or from the last token of the prompt on (`answer`), which "
        "predicts the answer.",
        choices=("all", "answer"),
    )
    prompts: int = option(
        0,
        "Number of prompts of each dataset to continue greedily, for the rate of degenerate outputs; 0 for none.",
        least=0,
    )
    neurons: int = option(
        0,
        "Number of single neurons to rank by their own lesion. A first-order estimate finds the largest effects, "
        "which are then measured exactly.",
        least=0,
    )
    examples: int = option(
        8,
        "Number of texts of the data to show for each network, those in which it is most active; 0 for none.",
        least=0,
    )
    seed: int = option(0, "Seed of the draws.", least=0, most=LARGEST_SEED)

    def __post_init__(self) -> None:
        check_fields(self)
        if unknown := [name for name in self.curves or () if name not in CURVES]:
            raise FNSFTError(f"curves holds {unknown[0]!r}; it must be of: {', '.join(CURVES)}")
        if len(set(self.curves or ())) < len(self.curves or ()):
            raise FNSFTError(f"curves names one twice: {', '.join(self.curves)}; name each once")

    @property
    def has_lesions(self) -> bool:
        """Whether each network is silenced by itself, beside every control."""
        return not self.curves or "lesion" in self.curves

    def chosen(self, count: int) -> list[int]:
        """The numbers of the networks to probe, of so many that a template has.

        Raises:
            FNSFTError: there is no such network.
        """
        return list(range(count)) if self.networks is None else parse_ranges(self.networks, count, what="network")
