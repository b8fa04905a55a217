"""LeftOut: rows that cannot be used, counted with their reasons."""

from transformers.utils import logging

from ..errors import FNSFTError


logger = logging.get_logger(__name__)

_SHOWN = 4  # reasons


class LeftOut:
    """
    The rows of a dataset that are left out, and why.

    Args:
        name (`str`): what messages call the dataset.
        use (`str`, *optional*, defaults to `"train on"`): what its rows are for.
    """

    def __init__(self, name: str, use: str = "train on") -> None:
        self.name, self.use = name, use
        self.count = 0
        self._reasons: dict[str, list[int]] = {}  # reason -> first row, number of rows

    def add(self, row: int, reason: object) -> None:
        """Leave a row out."""
        self.count += 1
        self._reasons.setdefault(str(reason), [row, 0])[1] += 1

    def add_and_say(self, row: int, reason: object) -> None:
        """The same of a stream, whose end nobody may see: the first row of each reason is named at once."""
        if str(reason) not in self._reasons and len(self._reasons) < _SHOWN:
            logger.warning(f"{self.name}: rows are left out where {reason}; the first is row {row}")
        self.add(row, reason)

    @property
    def reasons(self) -> dict[str, int]:
        """Why rows are left out -> how many."""
        return {reason: count for reason, (_, count) in self._reasons.items()}

    def check(self, rows: int) -> None:
        """Say how many of so many rows are left out.

        Raises:
            FNSFTError: all of them.
        """
        if not self.count:
            return
        reasons = sorted(self._reasons.items(), key=lambda item: -item[1][1])
        if self.count == rows:
            reason, (first, _) = reasons[0]
            raise FNSFTError(f"{self.name} has no row to {self.use}: {reason} in row {first}")
        parts = [f"{count} where {reason} (the first is row {first})" for reason, (first, count) in reasons[:_SHOWN]]
        if len(reasons) > _SHOWN:
            parts.append(f"{sum(count for _, (_, count) in reasons[_SHOWN:])} for other reasons")
        logger.warning(f"{self.name}: {self.count} of {rows} rows are left out: {'; '.join(parts)}")
