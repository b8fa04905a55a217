"""SampleResults: what `fnsft compare --per_sample` has written, as the atlas shows it. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FNSFTError
from ..json_text import WRONG_VALUES, from_json


@dataclass(frozen=True)
class SampleResults:
    """In how many single texts each network of a template is found.

    Attributes:
        networks (`Mapping[int, dict]`): number of a network -> what was counted.
        texts (`int`): that were looked at.
    """

    networks: Mapping[int, dict[str, Any]]
    texts: int

    @classmethod
    def read(cls, directory: str | Path, *, networks: int) -> "SampleResults":
        """The results that lie in the directory of such a comparison.

        Args:
            directory: its `output_dir`.
            networks: that the template has.

        Raises:
            FNSFTError: there are none, or they are of another number of networks.
        """
        path = Path(directory).expanduser() / "results.json"
        try:
            results = from_json(path.read_text(encoding="utf-8"))
            found = cls({each["network"]: each for each in results["networks"]}, len(results["samples"]))
            for number in found.networks:
                found.share(number)
                found.words(number)
        except (OSError, *WRONG_VALUES) as error:
            raise FNSFTError(
                f"{path} holds no results of `fnsft compare --per_sample` ({error}); give its output_dir"
            ) from error
        if set(found.networks) != set(range(networks)):
            raise FNSFTError(
                f"{path} is of {len(found.networks)} networks, and the template has {networks}; give the comparison "
                "of this template"
            )
        return found

    def share(self, number: int) -> float:
        """Of the texts, in which a network is found."""
        return float(self.networks[number]["share"])

    def words(self, number: int) -> str:
        """What was counted of a network."""
        found = self.networks[number]
        return (
            f"Found in {found['samples']:d} of {self.texts} texts taken by themselves: one of the text's own networks "
            f"has an IoU above 0.2 with it (chance: in {found['null']:.0%} of them). The largest IoU is "
            f"{found['iou']:.2f} on average."
        )
