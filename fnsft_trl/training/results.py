"""RunResults: what a run learnt and lost, what it trained, and what was checked: a table, and the same as JSON."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerState

from .. import __version__
from ..hub.card import plain, with_section, without_section
from ..hub.names import one_line
from ..json_text import from_json
from ..template.storage import CARD_FILE
from ..writing import write_text_whole
from .guard import FrozenNeuronGuard
from .protection import Protection
from .retention import retention_of
from .retention_run import RetentionRun
from .run_record import RunRecord


RESULTS_FILE = "results.json"
RESULTS_SECTION = "## Results of the run"

_FORMAT = "fnsft_trl.run"
_LIBRARIES = ("torch", "transformers", "trl", "peft")
_MASKS = {"masked": "under the mask", "unmasked": "without the mask"}
# Of the machine and the moment, and TRL's count of the tokens of the training.
_LEFT_OUT = ("runtime", "samples_per_second", "steps_per_second", "num_tokens")


@dataclass(frozen=True)
class RunResults:
    """The end of a run. A resumed run ends with the same as the uninterrupted one.

    Args:
        content (`dict`): as it stands in `results.json`.
    """

    content: dict[str, Any]

    @classmethod
    def of(
        cls,
        trainer: Trainer,
        record: RunRecord | None,
        guard: FrozenNeuronGuard | None,
        protection: Protection | None = None,
    ) -> "RunResults | None":
        """What the last training of a trainer ended with; `None` where there is nothing to say beyond its log: neither
        networks nor retention, replay, an anchor, penalties or protection.

        Args:
            trainer: after training.
            record: what it trained, of a run with networks.
            guard: what watched the frozen weights, if anything did.
            protection: in which directions its layers were kept.
        """
        retention, state = retention_of(trainer), trainer.state
        replay, anchor = trainer.replay and trainer.replay.settings(), trainer.anchor and trainer.anchor.settings()
        penalties = trainer.penalties and trainer.penalties.settings()
        if not (record or retention or replay or anchor or penalties or protection):
            return None
        if anchor is not None:
            anchor["base"] = trainer.anchor.kind
        best = state.best_global_step if trainer.args.load_best_model_at_end else None
        weights = retention.weights_step if retention is not None else best or state.global_step
        content = {
            "format": _FORMAT,
            "format_version": 1,
            "versions": {"fnsft_trl": __version__, **{name: version(name) for name in _LIBRARIES}},
            "steps": state.global_step,
            "epoch": state.epoch,
            "weights_of_step": weights,
            "networks": record and _networks(record),
            "protection": protection and protection.to_dict() | {"in_words": protection.in_words()},
            "evaluation": _evaluations(
                state, weights, has_mask=record is not None and trainer.mask_handle is not None
            ),
            "replay": replay,
            "kl_to_base": anchor,
            "penalties": penalties or None,
            "retention": retention and _retention(retention),
            "guard": None,
        }
        if guard is not None and guard.checked is not None:
            content["guard"] = {
                "neurons": guard.neurons,
                "other_parameters": guard.others,
                "moved": 0,  # or the run had ended in an error
                "step": guard.checked,
            }
        return cls(_finite(content))

    def rows(self) -> list[tuple[str, str]]:
        """The table: what each row is of, and what it says."""
        found, networks = self.content, self.content["networks"]
        weights = found["weights_of_step"]
        steps = str(found["steps"]) if weights == found["steps"] else f"{found['steps']}; the weights are of {weights}"
        rows = [("steps", steps)]
        if networks is not None:
            selected, trained = networks["selected"], networks["trained"]
            rows.append(("selected", f"{selected['count']:,} neurons: {selected['what']}"))
            others = ", and all weights of no neuron" if networks["other_weights_train"] else ""
            share = f"{trained['count']:,} neurons ({trained['fraction']:.1%})"
            rows.append(("trained", f"{share}, {networks['method']}{others}"))
            if networks["mask_mode"] is not None or networks["mask_phases"]:
                rows.append(("mask", f"{networks['mask_mode'] or 'by phases'}, in training; not part of the weights"))
        rows += [(f"evaluation{where}", told) for where, told in self._evaluated()]
        if (replay := found["replay"]) is not None:
            shown = ", ".join(f"{name} ({count:,})" for name, count in replay["rows"].items())
            rows.append(
                ("replay", f"{replay['share']:.0%} of each batch, of {sum(replay['rows'].values()):,} rows: {shown}")
            )
        if (anchor := found["kl_to_base"]) is not None:
            told = f"weight {anchor['weight']:g}, on {anchor['tokens']:,} tokens of general text ({anchor['base']})"
            rows.append(("KL to the base", told))
        rows += [(name, f"weight {found['penalties'][name]['weight']}") for name in found["penalties"] or ()]
        if found["retention"] is not None:
            rows += [(f"retention {name}".strip(), _lost(s)) for name, s in found["retention"]["series"].items()]
            if found["retention"]["budget"] is not None or weights != found["steps"]:
                rows.append(("done", found["retention"]["done"]))
        if (protected := found["protection"]) is not None:
            rows.append(("protected", f"{protected['in_words']}; left along them {protected['left']:.1e}"))
        if networks is not None:
            rows.append(("guard", self._guarded()))
        return rows

    def _evaluated(self) -> list[tuple[str, str]]:
        """(which evaluation, its values): those at the end with and without the mask, or the last one."""
        found = self.content["evaluation"]
        ended = [(f" {words}", found[name]) for name, words in _MASKS.items() if found[name]]
        if not ended and found["during"]:
            where = "" if found["step"] == self.content["weights_of_step"] else f" at step {found['step']}"
            ended = [(where, found["during"])]
        return [(where, ", ".join(f"{n} {_number(v)}" for n, v in values.items())) for where, values in ended]

    def _guarded(self) -> str:
        guard = self.content["guard"]
        if guard is None:
            return "off: nothing was checked"
        told = f"frozen neurons checked {guard['neurons']:,}, moved {guard['moved']}"
        return f"{told}; other frozen parameters {guard['other_parameters']:,}, moved {guard['moved']}"

    def table(self) -> str:
        """The table as aligned text."""
        rows = self.rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"  {one_line(name).ljust(width)}  {one_line(told)}" for name, told in rows)

    def save(self, directory: Path) -> None:
        """Write `results.json`, and the table into the model card if there is one."""
        write_text_whole(directory / RESULTS_FILE, json.dumps(self.content, indent=2, allow_nan=False) + "\n")
        self.extend_card(directory)

    def extend_card(self, directory: Path) -> None:
        """Put the table into the model card of a directory if there is one."""
        card = directory / CARD_FILE
        if card.exists():
            rows = "\n".join(f"| {plain(name)} | {plain(told)} |" for name, told in self.rows())
            section = f"{RESULTS_SECTION}\n\n| | |\n|---|---|\n{rows}\n"
            write_text_whole(card, with_section(card.read_text(encoding="utf-8"), section))


def forget_results(directory: Path) -> None:
    """Take the results of an earlier run away from weights that they are not of; other files of that name stay."""
    file, card = directory / RESULTS_FILE, directory / CARD_FILE
    try:
        found = from_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if isinstance(found, dict) and found.get("format") == _FORMAT:
        file.unlink()
        if card.exists():
            write_text_whole(card, without_section(card.read_text(encoding="utf-8"), RESULTS_SECTION))


def _networks(record: RunRecord) -> dict[str, Any]:
    """What was selected, trained and masked."""
    trained, about, plan = record.trainable, record.to_dict(), record.plan
    kept = ("mask_mode", "mask_phases", "template")
    selected = {**about["selected"], "fraction": record.selected.fraction, "what": record.selection()}
    return {
        "method": plan.method,
        "train_neurons": plan.train,
        "other_weights_train": plan.method == "full" and plan.train != "selected" and record.config.train_other,
        **{name: about[name] for name in kept},
        "selected": selected,
        "trained": {**about["trainable"], "fraction": trained.fraction},
    }


def _evaluations(state: TrainerState, weights: int, *, has_mask: bool) -> dict[str, Any]:
    """The last values of each evaluation: those at the end with and without the mask, and the one of the weights."""
    found: dict[str, Any] = {"masked": {}, "unmasked": {}, "during": {}, "step": None}
    for entry in state.log_history:
        for name, value in entry.items():
            name = name.removeprefix("eval_") if name.startswith("eval_") else ""
            if not name or name.startswith("retention/") or name.endswith(_LEFT_OUT) or not _is_number(value):
                continue
            mask, _, own = name.partition("_")
            if has_mask and mask in _MASKS:
                found[mask][own] = value
            elif entry["step"] <= weights:
                found["during"][name], found["step"] = value, entry["step"]
    return found


def _retention(run: RetentionRun) -> dict[str, Any]:
    """What was lost, in every series, and what was done about it."""
    series = {
        each.name: {
            **{measure: each.values.get(measure) for measure in each.measures},
            "kl_kind": each.kl_kind,
            "base": each.base if "rise" in each.measures else None,
            "tokens": each.text.tokens,
            "sha256": each.text.sha256,
        }
        for each in run.series
    }
    return {"budget": run.budget and run.budget.nats, "done": run.done, "series": series}


def _lost(series: Mapping[str, Any]) -> str:
    """What one series says, in nats per token."""
    kl = f"KL {_number(series['kl'])} ({series['kl_kind']})"
    tokens = f"nats per token on {series['tokens']:,} tokens"
    if "rise" not in series:
        return f"{kl}, {tokens}"
    of = f"cross-entropy {_number(series['base'])} -> {_number(series['cross_entropy'])}"
    return f"rise {_number(series['rise'], '+.4f')}, {kl}, {of}, {tokens}"


def _number(value: float | str | None, form: str = ".4f") -> str:
    return format(value, form) if _is_number(value) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _finite(value: Any) -> Any:
    """The same without numbers that JSON does not know, which become text."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
