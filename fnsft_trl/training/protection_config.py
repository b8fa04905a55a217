"""ProtectionConfig: in which directions of their inputs trained layers go on answering as before. Free of torch."""

from dataclasses import dataclass, fields

from ..data.embedded import EMBEDDED
from ..errors import FNSFTError
from ..evaluation.config import RetentionConfig
from ..fields import LARGEST_SEED, check_fields, documented, fits, make_plain, option
from ..ranges import is_open, parse_ranges, ranges_text


DIMS = 200  # leading directions by default, and at most half of the channels of an input
KINDS = ("none", "subspace", "networks", "random")
ENERGY_TOKENS = 1024  # of each text, and of the task, on which it is measured what the directions hold

LOW = "low"
# What stands behind `forgetting: low`; the log and docs/forgetting.md say it.
EVIDENCE = (
    "It rests on one model of 135 million weights and short trainings. In the study of benchmarks/forgetting (two "
    "tasks, five seeds, all linear layers) full fine-tuning with 200 directions protected had, where 90% was learnt, "
    "0.032 [0.017, 0.058] of the KL from the base that LoRA had, and 0.054 [0.036, 0.077] of that with as many random "
    "directions. Of unprotected full fine-tuning it had 0.044 [0.034, 0.059] on one task. On the other that did not "
    "get there at its rate, so by its plan the study leaves the best unprotected way undecided. At half of what can "
    "be learnt the ratio is 0.116 [0.056, 0.222]. Text that nobody protected lost less, but not nothing. LoRA was "
    "protected in fnsft demo only: a rise of +.012 on Wikipedia where it was +.511."
)

_MOST_NETWORKS = 10_000
_OF_TEXT = ("protect_shares", "protect_tokens")
_BESIDE_LOW = ("forgetting", "protect", "protect_datasets", *_OF_TEXT)


@documented
@dataclass
class ProtectionConfig:
    """
    Directions of each trained layer's input along which its change stays zero, so that it answers to them as before.

    With U the directions, the change D of a weight has D U = 0 after every step, in LoRA, neuron deltas and full
    fine-tuning, with networks and without. Weights that no directions can be found for (norms, embeddings, biases) do
    not train in full fine-tuning, and are refused in adapters.

    Raises:
        FNSFTError: a value that its field does not take, or one that has no effect beside the others.
    """

    forgetting: str | None = option(
        None,
        "`low` sets what this project recommends for little forgetting: `protect: subspace` with its defaults. "
        "Without `protect_datasets` it protects `embedded` (English Wikipedia).",
        choices=(LOW,),
    )
    protect: str = option(
        "none",
        "What to protect. `none`: nothing. `subspace`: the directions of texts to keep. `networks`: the directions "
        "of a template's networks, at the inputs of the down projections. `random`: as many random directions, a "
        "control.",
        choices=KINDS,
    )
    protect_datasets: list[str] | None = option(
        None,
        "Texts to keep, such as general text, chat logs or the data of old tasks, each as `name=source`. A source is "
        "a Hub id, a directory, a file (.json, .jsonl, .csv, .parquet, .txt) or `embedded` (English Wikipedia).",
    )
    protect_shares: list[float] | None = option(
        None, "The weight of each text to keep, in their order. By default all weigh the same.", above=0
    )
    protect_tokens: int = option(8192, "Number of tokens to read of each text to keep.", least=16, most=10**8)
    protect_dims: float | None = option(
        None,
        "Leading directions to protect at each input, beside position 0 and the mean: a number of them, or the share "
        "of the texts' energy that they hold together, such as 0.99. By default 200, and at most half of an input's "
        "channels. With `protect_basis`, by default all that it holds.",
        above=0,
    )
    protect_component_ids: list[int] | str | None = option(
        None,
        "Networks to protect with `protect: networks`, as a list or as `0-3,7`. By default all networks of the "
        "template.",
        least=0,
    )
    protect_basis: str | None = option(
        None,
        "Directory or Hub id of saved directions, instead of `protect_datasets`. `fnsft discover --basis_only` saves "
        "them, and so does a discovery with `ica_store_basis`. With `protect: networks` it is also the template, if "
        "the run has none.",
    )
    protect_basis_revision: str | None = option(
        None, "Branch, tag or commit of `protect_basis` on the Hub. By default the newest of `main`."
    )
    protect_strength: float = option(
        1.0,
        "How much of each step is removed along the directions: 1 removes all of it, 0.9 leaves a tenth.",
        above=0,
        most=1,
    )
    protect_seed: int = option(0, "Seed of the directions of `protect: random`.", least=0, most=LARGEST_SEED)

    def __post_init__(self) -> None:
        make_plain(self)
        if self.protect is None:
            self.protect = "none"
        if self.forgetting == LOW:
            self._recommend()
        if not fits(self.protect_component_ids, list[int]):
            text = ranges_text(self.protect_component_ids, "protect_component_ids", what="network")
            if isinstance(text, str) and not is_open(text):
                text = parse_ranges(text, _MOST_NETWORKS, what="protect_component_ids: network") if text else None
            self.protect_component_ids = None if text == "all" else text
        check_fields(self)
        self._check_effects()
        self.sources()

    def _recommend(self) -> None:
        """Fill in what `forgetting: low` stands for."""
        given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        others = [name for name in given if name not in _BESIDE_LOW]
        others += ["protect"] if self.protect not in ("none", "subspace") else []
        if others:
            raise FNSFTError(
                f"forgetting=low chooses {others[0]} itself, and {getattr(self, others[0])} was given; drop "
                f"{others[0]}, or set protect and what belongs to it by hand, without forgetting"
            )
        self.protect = "subspace"
        self.protect_datasets = self.protect_datasets or [EMBEDDED]

    def chosen(self) -> str:
        """What `forgetting` has chosen, in words."""
        return (
            f"protect={self.protect}, protect_datasets={' '.join(self.protect_datasets)}, and of each input {DIMS} "
            "leading directions, at most half of its channels, beside position 0 and the mean (protect_dims); all "
            "else is as it was asked for. retention_datasets measure what it leaves, on other texts than these"
        )

    @property
    def is_on(self) -> bool:
        """Whether anything is protected."""
        return self.protect != "none"

    @property
    def is_share(self) -> bool:
        """Whether `protect_dims` is a share of the energy, and no number."""
        return self.protect_dims is not None and self.protect_dims < 1

    @property
    def leading(self) -> int:
        """The number of leading directions that is asked for, where it is no share."""
        return DIMS if self.protect_dims is None else int(self.protect_dims)

    def leading_of(self, width: int) -> int:
        """The number of leading directions of an input.

        Args:
            width: its channels.
        """
        return default_leading(width) if self.protect_dims is None else self.leading

    def _check_effects(self) -> None:
        given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        if not self.is_on and given:
            raise FNSFTError(f"{given[0]} has no effect without protect (subspace, networks or random); add it")
        if not self.is_share and self.protect_dims != self.leading and self.protect_dims is not None:
            raise FNSFTError(f"protect_dims is {self.protect_dims}; it must be a whole number, or a share below 1")
        has_texts = self.protect_datasets is not None
        if not has_texts and (idle := [name for name in _OF_TEXT if name in given]):
            raise FNSFTError(f"{idle[0]} has no effect without protect_datasets, the texts to keep; give some")
        if has_texts and self.protect_basis is not None and self.protect != "networks":
            raise FNSFTError("protect_datasets and protect_basis each say what the directions are; drop one of them")
        if self.protect_basis_revision is not None and self.protect_basis is None:
            raise FNSFTError("protect_basis_revision has no effect without protect_basis; drop it")
        if self.protect_component_ids is not None and self.protect != "networks":
            raise FNSFTError(f"protect_component_ids has no effect with protect={self.protect}; it names networks")
        if self.protect != "random" and "protect_seed" in given:
            raise FNSFTError(f"protect_seed has no effect with protect={self.protect}; drop it")
        if self.protect == "networks" and "protect_dims" in given:
            raise FNSFTError("protect_dims has no effect with protect=networks, whose number it is; drop it")
        has_source = has_texts or self.protect_basis is not None
        if self.protect == "subspace" and not has_source:
            raise FNSFTError(
                "protect=subspace needs texts to keep: give protect_datasets (name=source, or embedded), or "
                "protect_basis"
            )
        if self.is_share and self.protect_basis is not None:
            raise FNSFTError(
                f"protect_dims is {self.protect_dims}, a share of the energy of texts, which directions found before "
                "don't say; give a number, or protect_datasets in the place of protect_basis"
            )
        if self.protect == "random" and self.is_share and not has_texts:
            raise FNSFTError(
                f"protect_dims is {self.protect_dims}, a share of the energy of texts, and protect=random was given "
                "none; give protect_datasets, or a number of directions"
            )

    def sources(self) -> dict[str, str]:
        """Name of a text to keep -> its source.

        Raises:
            FNSFTError: a name that stands twice or cannot be found, or not one share for each text.
        """
        texts = self.texts()
        found = {} if texts is None else texts.sources()
        if self.protect_shares is not None and len(self.protect_shares) != len(found):
            raise FNSFTError(
                f"protect_shares has {len(self.protect_shares)} numbers for {len(found)} texts "
                f"({', '.join(found)}); give one for each"
            )
        return found

    def texts(self) -> RetentionConfig | None:
        """The texts to keep, as those that retention is measured on are read."""
        if self.protect_datasets is None:
            return None
        try:
            return RetentionConfig(
                retention_datasets=self.protect_datasets, retention_tokens=self.protect_tokens + ENERGY_TOKENS
            )
        except FNSFTError as error:
            raise FNSFTError(str(error).replace("retention_datasets", "protect_datasets")) from error

    def shares(self) -> dict[str, float]:
        """Name of a text to keep -> its weight; they add up to 1."""
        names = list(self.sources())
        shares = self.protect_shares or [1.0] * len(names)
        return {name: share / sum(shares) for name, share in zip(names, shares, strict=True)}


def default_leading(width: int) -> int:
    """How many leading directions of an input are protected where no number is given.

    Args:
        width: its channels.
    """
    return min(DIMS, width // 2)
