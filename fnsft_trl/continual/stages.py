"""stage_options: the options of `fnsft train` with which an arm trains one stage. Free of torch."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FNSFTError
from .plan import Stage, Way


# In the folder of a stage, for the next one: its model as a whole, and the directions that are protected then.
MERGED_DIR, GROWN_DIR = "merged", "grown"

_OF_NEW_ADAPTER = ("lora_", "use_rslora", "use_dora")  # how these begin
# Options without effect in a first stage, which has nothing to keep.
_AFTER_FIRST = ("ewc", "lwf", "lwf_temperature", "olora")

# What has no effect in one stage alone.
_IN_SEQUENCE = ("replay", "protect_grows", "adapter", "networks", *_AFTER_FIRST)
_OF_GENERAL = ("protect_datasets", "protect_shares", "protect_tokens", "protect_dims")


@dataclass(frozen=True)
class StagedArm:
    """An arm of a continual run.

    Attributes:
        name (`str`): of the arm.
        way ([`Way`]): what it does from stage to stage.
        values (`dict[str, Any]`): its options of `fnsft train`, but for data and places.
        method (`str`): `full`, `lora` or `neuron_delta`.
        has_networks (`bool`): whether it trains with networks.

    Raises:
        FNSFTError: an option has no effect, or does not go with another.
    """

    name: str
    way: Way
    values: Mapping[str, Any]
    method: str
    has_networks: bool

    def __post_init__(self) -> None:
        try:
            self._check()
        except FNSFTError as error:
            raise FNSFTError(f"arm {self.name}: {error}") from error

    def _check(self) -> None:
        way, values = self.way, self.values
        if way.adapter is not None and self.method != "lora":
            raise FNSFTError(f"adapter has no effect, since the arm trains {self.method}; drop it")
        needs_new = [name for name in ("olora", "protect_grows") if values.get(name) or getattr(way, name, False)]
        needs_new += ["networks"] if self.has_networks else []
        if way.adapter == "same" and needs_new:
            raise FNSFTError(f"{needs_new[0]} needs a new adapter for each stage; drop adapter, or {needs_new[0]}")
        if way.networks is not None and not self.has_networks:
            raise FNSFTError("networks has no effect, since the arm has none; give it options of networks (ica_...)")
        if way.networks == "per_task" and values.get("ica_datasets"):
            raise FNSFTError("networks: per_task finds them on the rows of each task; drop ica_datasets")
        if way.networks == "so_far" and not values.get("ica_datasets"):
            raise FNSFTError(
                "networks: so_far finds them on general text and all earlier tasks; give ica_datasets, the general "
                "text, which the first stage has alone"
            )
        if way.networks in ("per_task", "so_far") and values.get("ica_template_path"):
            raise FNSFTError(f"networks: {way.networks} finds new ones, and ica_template_path names some; drop one")
        if way.protect_grows and (values.get("protect") != "subspace" or not values.get("protect_datasets")):
            raise FNSFTError(
                "protect_grows adds to the directions of general text; give protect: subspace and protect_datasets"
            )
        if way.replay is not None and values.get("replay_share") is not None:
            raise FNSFTError("replay and replay_share each say what share of a batch is replayed; drop replay_share")
        if values.get("olora") and (self.method != "lora" or self.has_networks):
            raise FNSFTError("olora compares adapters of plain LoRA; give use_peft, and no networks")
        if values.get("ewc") and self.merges:
            raise FNSFTError(
                "ewc keeps the weights that train near where they were, and each stage has new ones here; train one "
                "LoRA (adapter: same, without networks) or all weights"
            )
        if self.merges and (values.get("load_in_4bit") or values.get("load_in_8bit")):
            raise FNSFTError("the adapter of each stage is merged, and quantised weights would be rounded; load in 16")
        if way.multitask and (idle := self.in_sequence):
            raise FNSFTError(f"{idle[0]} has no effect with multitask, which has one stage; drop it")

    @property
    def in_sequence(self) -> list[str]:
        """Those of its options that act from the second stage on."""
        given = {**vars(self.way), **self.values}
        return [name for name in _IN_SEQUENCE if given.get(name) not in (None, False)]

    @property
    def merges(self) -> bool:
        """Whether the adapter of a stage is merged before the next one."""
        if self.method == "full":
            return False
        is_new = self.values.get("olora") or self.way.protect_grows or self.has_networks
        return self.method == "neuron_delta" or self.way.adapter == "new" or bool(is_new)

    def options(self, stage: Stage, folder: Callable[[Stage], Path], files: Mapping[str, Path]) -> dict[str, Any]:
        """The options of one stage.

        Args:
            stage: the stage.
            folder: where a stage of this arm, with this seed, has its model.
            files: name of a task -> its rows to train.
        """
        given = dict(self.values) | {"dataset_name": ",".join(str(files[name]) for name in stage.tasks)}
        given.setdefault("save_strategy", "no")
        earlier = [f"{name}={files[name]}" for name in stage.earlier]
        if stage.before is None:
            return first_values(given)
        before = folder(stage.before)
        if self.method == "full" or self.merges:
            given["model_name_or_path"] = str(before / MERGED_DIR if self.merges else before)
            given.pop("model_revision", None)
        else:
            given["adapter_name_or_path"] = str(before)
            given = {name: value for name, value in given.items() if not name.startswith(_OF_NEW_ADAPTER)}
        if self.way.replay is not None:
            given["replay_datasets"] = [*(given.get("replay_datasets") or ()), *earlier]
            given["replay_share"] = self.way.replay
        if self.values.get("ewc"):
            given |= {"ewc_from": str(before), "ewc_save": True}
        if self.values.get("olora"):
            given["olora_adapters"] = [str(folder(each)) for each in _up_to(stage.before)]
        if self.has_networks and self.way.networks in (None, "once") and not given.get("ica_template_path"):
            given["ica_template_path"] = str(folder(_up_to(stage)[0]))
        if self.way.networks == "so_far":
            given["ica_datasets"] = [*given["ica_datasets"], *(str(files[name]) for name in stage.earlier)]
        if self.way.protect_grows:
            given = {name: value for name, value in given.items() if name not in _OF_GENERAL}
            given["protect_basis"] = str(before / GROWN_DIR)
        return given


def stage_seed(seed: int, stage: Stage) -> int:
    """The seed from which a stage with a new adapter draws it: in the first one that of the sequence, else another.

    With the same one each adapter would begin in the directions of the one before.

    Args:
        seed: of the sequence.
        stage: that is to be trained.
    """
    return seed if stage.before is None else random.Random(f"{seed} {stage.number}").getrandbits(32)


def first_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an arm in a first stage.

    Args:
        values: of all stages.
    """
    given = {name: value for name, value in values.items() if name not in _AFTER_FIRST}
    if not values.get("replay_datasets"):
        given.pop("replay_rows", None)
    return given | ({"ewc_save": True} if values.get("ewc") else {})


def _up_to(stage: Stage) -> list[Stage]:
    """A stage and all before it, the first one first."""
    return [Stage(stage.trained[:end]) for end in range(1, stage.number + 1)]
