"""PenaltyConfig: what is added to the loss of a task so that earlier ones are kept. Free of torch."""

import math
from dataclasses import dataclass, fields

from ..errors import FNSFTError
from ..evaluation.config import named_sources
from ..fields import check_fields, documented, option


INFINITE = "inf"  # the weight of a penalty that nothing may outweigh

_OF_EWC = ("ewc_datasets", "ewc_from")


@documented
@dataclass
class PenaltyConfig:
    """
    EWC, LwF and O-LoRA: penalties beside the loss of a task, by which what was learnt before it is kept.

    Raises:
        FNSFTError: a value that its field does not take, or one that has no effect beside the others.
    """

    ewc: float | str | None = option(
        None,
        "Weight of elastic weight consolidation. The penalty is half of it times a sum over the weights that train: "
        "the Fisher information of earlier rows, times the squared distance of the weight from where it was. `inf` "
        "keeps every weight that counts for these rows where it was.",
        above=0,
    )
    ewc_datasets: list[str] | None = option(
        None,
        "Rows of earlier tasks, each as `source` or `name=source`, in any format that can be trained. The Fisher "
        "information is measured on them before the training.",
    )
    ewc_from: str | None = option(
        None,
        "Directory of an earlier run with `ewc_save`. It gives its Fisher information and the weights that belong to "
        "it.",
    )
    ewc_save: bool = option(
        False,
        "After the training, measure the Fisher information of its rows. It is saved in `ewc/` of the output "
        "directory, together with what `ewc_from` held, for the `ewc_from` of the next task.",
    )
    ewc_rows: int = option(200, "Number of rows of each source on which the Fisher information is measured.", least=1)
    lwf: float | None = option(
        None,
        "Weight of learning without forgetting. The penalty is the cross-entropy, on the rows of the task, between "
        "what the model answered before this training and what it answers now.",
        above=0,
    )
    lwf_temperature: float = option(2.0, "Temperature of both distributions of `lwf`; 2 as in its paper.", above=0)
    olora: float | str | None = option(
        None,
        "Weight of O-LoRA. The penalty is the sum of squared products of LoRA's factors A with those of "
        "`olora_adapters`. `inf` keeps them exactly orthogonal, by a projection after each step.",
        above=0,
    )
    olora_adapters: list[str] | None = option(
        None, "Directories of the LoRA adapters of earlier tasks. The model in training holds them merged."
    )

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("ewc", "olora"):
            if isinstance(getattr(self, name), str) and getattr(self, name) != INFINITE:
                raise FNSFTError(f"{name} is {getattr(self, name)!r}; it must be a number above 0, or {INFINITE}")
        given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        has_earlier = self.ewc_datasets is not None or self.ewc_from is not None
        if self.ewc is not None and not has_earlier:
            raise FNSFTError("ewc has no effect without rows of earlier tasks: give ewc_datasets or ewc_from")
        idle = [name for name in given if name in _OF_EWC and self.ewc is None]
        if self.ewc is None and not self.ewc_save and "ewc_rows" in given:
            idle.append("ewc_rows")
        if idle and not (idle == ["ewc_from"] and self.ewc_save):
            raise FNSFTError(f"{idle[0]} has no effect without ewc, the weight of the penalty; give one")
        if "lwf_temperature" in given and self.lwf is None:
            raise FNSFTError("lwf_temperature has no effect without lwf, the weight of the penalty; give one")
        if (self.olora is None) != (self.olora_adapters is None):
            lacking = "olora_adapters, the adapters of earlier tasks" if self.olora else "olora, the weight"
            raise FNSFTError(f"{'olora' if self.olora else 'olora_adapters'} has no effect without {lacking}; give it")
        self.sources()

    def check_batches(self, *, packing: bool, padding_free: bool) -> None:
        """Refuse batches that penalties cannot read.

        Args:
            packing: whether rows are joined to fill a length.
            padding_free: whether those of a batch are joined.

        Raises:
            FNSFTError: one that is asked for reads rows one by one.
        """
        if packing and (self.ewc_save or self.lwf is not None):
            name = "ewc_save" if self.ewc_save else "lwf"
            raise FNSFTError(f"{name} reads rows one by one, and packing joins them; drop packing, or {name}")
        if padding_free and self.lwf is not None:
            raise FNSFTError("lwf reads the rows of a batch, and padding_free joins them; drop one of them")

    def check_protection(self, *, is_protected: bool) -> None:
        """Refuse a projection of what trains (`protect`) beside that of an infinite O-LoRA.

        Raises:
            FNSFTError: each of the two would undo the other.
        """
        if is_protected and math.isinf(self.olora_weight):
            raise FNSFTError(
                "olora=inf and protect each project what trains after a step, and undo one another; give olora a "
                "number, or drop one"
            )

    @property
    def ewc_weight(self) -> float:
        """Of EWC; infinite for `inf`."""
        return math.inf if self.ewc == INFINITE else float(self.ewc or 0)

    @property
    def olora_weight(self) -> float:
        """Of O-LoRA; infinite for `inf`."""
        return math.inf if self.olora == INFINITE else float(self.olora or 0)

    def sources(self) -> dict[str, str]:
        """Name -> source of the rows of earlier tasks.

        Raises:
            FNSFTError: a name that stands twice, or cannot be found.
        """
        return named_sources("ewc_datasets", self.ewc_datasets or ())
