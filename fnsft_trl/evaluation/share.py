"""Share: the part of the work on rows that falls to one of several processes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import distributed as dist
from tqdm import tqdm


@dataclass(frozen=True)
class Share:
    """
    The part of the work on rows that falls to one process. Each holds the whole model, and all make the same call.

    Attributes:
        index (`int`): number of the process.
        count (`int`): how many there are.
        shows (`bool`): whether a bar shows the progress, and the time left.
    """

    index: int = 0
    count: int = 1
    shows: bool = False

    @classmethod
    def of_launch(cls) -> "Share":
        """The share of this process in a launch (`accelerate launch`, torchrun), if there is one; it shows progress in
        the first process."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), shows=dist.get_rank() == 0)
        return cls(shows=True)

    def in_batches(
        self, work: Callable[[list[int]], list], lengths: Sequence[int], *, batch_size: int, name: str
    ) -> list:
        """Work on rows in batches of similar length, the longest first.

        What is in a batch does not depend on the number of processes, and so neither does a result.

        Args:
            work: is given the numbers of the rows of a batch, and gives a list with what comes of each.
            lengths: of all rows.
            batch_size: rows in a batch.
            name: of the work, in front of the bar.

        Returns:
            What came of each row, in their order, in every process.
        """
        order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        own = batches[self.index :: self.count]
        done = {}
        with tqdm(total=sum(map(len, own)), desc=name, unit="row", disable=None if self.shows else True) as bar:
            for batch in own:
                done |= dict(zip(batch, work(batch), strict=True))
                bar.update(len(batch))
        done = {number: result for part in self._gathered(done) for number, result in part.items()}
        return [done[number] for number in range(len(lengths))]

    def in_parts(self, work: Callable[[list], list], items: list) -> list:
        """Work on items in one part for each process.

        Args:
            work: is given the items of a part, and gives a list with what comes of each.
            items: all of them.

        Returns:
            What came of each item, in their order, in every process.
        """
        start, end = (len(items) * index // self.count for index in (self.index, self.index + 1))
        own = work(items[start:end]) if end > start else []
        return [result for part in self._gathered(own) for result in part]

    def _gathered(self, own: Any) -> list:
        """What every process has."""
        if self.count == 1:
            return [own]
        gathered: list = [None] * self.count
        dist.all_gather_object(gathered, own)
        return gathered


ALONE = Share()
