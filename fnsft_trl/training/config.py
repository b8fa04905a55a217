"""ReplayConfig and AnchorConfig: what a run does to forget less, whatever it trains. Free of torch."""

from dataclasses import dataclass, fields

from ..errors import FNSFTError
from ..evaluation.config import named_sources
from ..fields import check_fields, documented, option


@documented
@dataclass
class ReplayConfig:
    """
    Rows of other texts among those that are trained: a share of each batch.

    Raises:
        FNSFTError: a value is not understood, a name stands twice, or there is nothing to replay.
    """

    replay_datasets: list[str] | None = option(
        None,
        "Rows to train on beside the task, such as general text or data of older tasks, so that they are not "
        "forgotten. Each is `source` or `name=source`. A source is a Hub id, a directory, a file or `embedded` "
        "(English Wikipedia), in any format that can be trained.",
    )
    replay_share: float = option(
        0.1, "Share of each batch that is replayed. What is left over goes to the next batches.", above=0, below=1
    )
    replay_rows: int = option(
        1000, "Largest number of rows to take from the start of each of these datasets.", least=1
    )

    def __post_init__(self) -> None:
        check_fields(self)
        _check_given(self, "replay_datasets", "the rows to replay; give some, as name=source")
        self.sources()

    def sources(self) -> dict[str, str]:
        """Name -> source.

        Raises:
            FNSFTError: a name that stands twice, or cannot be found.
        """
        return named_sources("replay_datasets", self.replay_datasets or ())

    def check_sampling(self, strategy: str) -> None:
        """Refuse an order of rows (`train_sampling_strategy`) beside that of the replay.

        Raises:
            FNSFTError: it is not random.
        """
        if strategy != "random":
            raise FNSFTError(
                f"replay_datasets draw the rows of each batch themselves; drop train_sampling_strategy={strategy}"
            )


@documented
@dataclass
class AnchorConfig:
    """
    KL divergence to the base model on general text, as a part of the loss.

    Raises:
        FNSFTError: a value is not understood, a name stands twice, or there is no text or no weight.
    """

    kl_to_base: float | None = option(
        None,
        "Weight of the KL divergence of the base to the trained model on `kl_datasets`, in nats per token. It is "
        "added to the loss.",
        above=0,
    )
    kl_datasets: list[str] | None = option(
        None,
        "General texts on which the model is kept near its base, each as `source` or `name=source`, as in "
        "`retention_datasets`. They must be disjoint from those.",
    )
    kl_tokens: int = option(8192, "Number of tokens to read of each of these texts, in turns.", least=1, most=10**8)
    kl_batch_size: int = option(
        2, "Sequences of up to 256 tokens of these texts beside each batch of the training.", least=1
    )

    def __post_init__(self) -> None:
        check_fields(self)
        _check_given(self, "kl_to_base", "the weight of the divergence; give one (1 is a common start)")
        _check_given(
            self, "kl_datasets", "the texts on which the model is kept near its base; give some, as name=source"
        )
        self.sources()

    def sources(self) -> dict[str, str]:
        """Name -> source.

        Raises:
            FNSFTError: a name that stands twice, or cannot be found.
        """
        return named_sources("kl_datasets", self.kl_datasets or ())


def _check_given(config: ReplayConfig | AnchorConfig, name: str, what: str) -> None:
    if getattr(config, name) is None:
        given = [f.name for f in fields(config) if getattr(config, f.name) != f.default]
        lacking = given[0] if given else type(config).__name__
        raise FNSFTError(f"{lacking} has no effect without {name}, {what}")
