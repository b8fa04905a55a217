"""Replay: rows of other texts among those of the task, a share of each batch.

Experience replay (Rolnick et al., 2019, "Experience Replay for Continual Learning", arXiv 1811.11682, section 3; for
language models Scialom et al., 2022, "Fine-tuned Language Models are Continual Learners", arXiv 2205.12393). With a
share r of each batch from kept rows M and the rest from the task T, what is minimised is

    L = (1 - r) L_T + r L_M,

the rows weighted by their learnt tokens as in any batch. Which rows these are depends on the seed and the number of
the epoch alone, so a run can be resumed, and all processes draw the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any

from datasets import Dataset, IterableDataset, concatenate_datasets
from torch.utils.data import Sampler
from transformers.utils import logging

from ..data.sources import load_texts
from ..errors import FNSFTError
from .config import ReplayConfig


logger = logging.get_logger(__name__)

_COLUMNS = ("input_ids", "labels", "seq_lengths")  # what is trained of a prepared row


class Replay:
    """The rows that a run replays, put beside those of its task.

    Args:
        config ([`ReplayConfig`]): what is asked for.

    Attributes:
        rows (`dict[str, Dataset]`): name -> rows, in TRL's format.
        task (`Dataset` or `None`): the prepared rows of the task, once they are known.
        replayed (`int`): how many prepared rows stand behind them.

    Raises:
        FNSFTError: a source cannot be read, or holds no row.
    """

    def __init__(self, config: ReplayConfig) -> None:
        self.config = config
        sources = config.sources()
        loaded = load_texts(list(dict.fromkeys(sources.values())))
        self.rows = {name: first_rows(loaded[source], config.replay_rows) for name, source in sources.items()}
        self.task: Dataset | None = None
        self.replayed = 0

    @classmethod
    def of(cls, config: ReplayConfig, given: Mapping[str, Any], trainer: str, *, is_read: bool) -> Replay:
        """What a trainer is to replay.

        Args:
            config: what is asked for.
            given: the arguments of the trainer.
            trainer: the name of its class.
            is_read: whether it trains rows of next tokens, as [`FNSFTTrainer`] does.

        Raises:
            FNSFTError: it does not, or as [`Replay.check`].
        """
        if not is_read:
            raise FNSFTError(
                f"replay_datasets are rows of next tokens beside those of the task, which FNSFTTrainer trains and "
                f"{trainer} does not; drop them, or keep the model near its base (kl_to_base)"
            )
        replay = cls(config)
        replay.check(given.get("args"), given.get("train_dataset"))
        return replay

    def check(self, args, train_dataset) -> None:
        """Refuse arguments of a trainer under which no share of a batch could be kept.

        Args:
            args: of the trainer.
            train_dataset: as it is given.

        Raises:
            FNSFTError: rows are streamed, sampled in another order, or not prepared by the trainer.
        """
        if isinstance(train_dataset, IterableDataset):
            raise FNSFTError(
                "replay_datasets need rows that can be counted, and the training data is streamed; drop one"
            )
        self.config.check_sampling(getattr(args, "train_sampling_strategy", "random"))
        if (getattr(args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset"):
            raise FNSFTError("replay_datasets are prepared as the training data is; drop skip_prepare_dataset")

    def beside(self, task: Dataset, prepare: Callable[[Dataset, str], Dataset]) -> Dataset:
        """The prepared rows of the task, and those that are replayed after them.

        Args:
            task: the prepared rows of the task.
            prepare: of rows in TRL's format and their name, what is trained of them.

        Raises:
            FNSFTError: the task has rows without tokens (images), or too few of them for the share.
        """
        if "input_ids" not in task.column_names:
            raise FNSFTError(
                f"replay_datasets go beside rows of tokens, and the training data has the columns "
                f"{', '.join(task.column_names)}; drop replay_datasets"
            )
        columns = [name for name in _COLUMNS if name in task.column_names]
        self.task = task.select_columns(columns)
        prepared = [
            prepare(rows, f"replay {name}").select_columns(columns).cast(self.task.features)
            for name, rows in self.rows.items()
        ]
        self.replayed = sum(map(len, prepared))
        shown = ", ".join(f"{name} ({len(rows)})" for name, rows in zip(self.rows, prepared, strict=True))
        share, replays = self.config.replay_share, self.sampler(0).replays
        if replays == 0:
            raise FNSFTError(
                f"replay_share is {share:g}, of which an epoch of {len(task)} rows of the task replays none; raise it"
            )
        logger.warning(
            f"replay: {share:.0%} of each batch are rows of {shown}, each row {replays / self.replayed:.1f} times in "
            f"an epoch of {len(task)} rows of the task"
        )
        return concatenate_datasets([self.task, *prepared])

    def sampler(self, seed: int) -> ReplaySampler:
        """The order in which the rows are trained."""
        return ReplaySampler(len(self.task), self.replayed, share=self.config.replay_share, seed=seed)

    def settings(self) -> dict:
        """What decides which rows are trained when, as JSON values."""
        return {"share": self.config.replay_share, "rows": {name: len(rows) for name, rows in self.rows.items()}}


class ReplaySampler(Sampler[int]):
    """Numbers of rows, task first: an epoch has each row of the task once, and a share of other rows evenly between.

    Of any n rows in a row, a share r, rounded down or up, is replayed; over many batches exactly r. Rows to replay are
    shuffled anew when all had their turn, whether an epoch ends or not.

    Args:
        task: number of rows of the task.
        replayed: number of rows to replay, which stand behind them.
        share: r, in (0, 1).
        seed: of both orders.

    Attributes:
        replays (`int`): how many rows of an epoch are replayed.
    """

    def __init__(self, task: int, replayed: int, *, share: float, seed: int) -> None:
        self.task, self.replayed, self.seed = task, replayed, seed
        self.share = Fraction(str(share))
        total = int(task / (1 - self.share))
        while total - self._until(total) < task:
            total += 1
        self.replays = self._until(total)
        self._total, self._epoch = total, 0

    def __len__(self) -> int:
        return self._total

    def __iter__(self) -> Iterator[int]:
        own = _order(self.task, self.seed, self._epoch)
        first = self._epoch * self.replays
        self._epoch += 1
        cycle, others = -1, []
        for place in range(self._total):
            before = self._until(place)
            if self._until(place + 1) == before:
                yield own[place - before]
                continue
            turn, number = divmod(first + before, self.replayed)
            if turn != cycle:
                cycle, others = turn, _order(self.replayed, self.seed, -1 - turn)
            yield self.task + others[number]

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of this epoch next."""
        self._epoch = epoch

    def _until(self, place: int) -> int:
        """How many of the first rows are replayed, to the nearest number."""
        return int(place * self.share + Fraction(1, 2))


def _order(count: int, seed: int, turn: int) -> list[int]:
    """A permutation that depends on a seed and a turn, which may be negative."""
    order = list(range(count))
    random.Random(f"{seed} {turn}").shuffle(order)  # torch's generator heeds 32 bits of a seed
    return order


def first_rows(rows: Dataset | IterableDataset, count: int) -> Dataset:
    """At most so many rows from the start of a dataset, which may be a stream."""
    if isinstance(rows, IterableDataset):
        rows = Dataset.from_list(list(rows.take(count)))
    return rows.select(range(min(count, len(rows))))
