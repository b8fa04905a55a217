"""ProbePasses: every condition of a probe on every batch, resumable at any point, split over processes."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from torch import nn
from tqdm.auto import tqdm
from transformers.utils import logging

from ..compat.accelerate import input_device
from ..errors import FNSFTError
from ..evaluation.generation import generate_answers
from ..evaluation.metrics import evaluating, model_inputs
from ..evaluation.share import Share
from ..finite import NO_DIFFERENCE
from ..interventions.replacement import Replacement, Scaled
from .condition import Condition
from .data import Item, ProbeData
from .prefix import SharedPrefix
from .records import INTACT, Records
from .scoring import IntactBatch
from .switch import Change, Switch


logger = logging.get_logger(__name__)

_NEAR = 1e-3  # nats of an item, up to which a pass from the middle is the same as a whole one
_CHECKED = 5  # conditions that are run both ways
_MADE = 24  # tokens that a prompt is continued by


@dataclass(frozen=True)
class Work:
    """How a probe scores.

    Attributes:
        site (`str`): the kind of the sites.
        replacements (`dict[str or None, Replacement]`): what stands in for silenced neurons, by the ablation of a
            condition.
        at_answers (`bool`): whether neurons are changed at the tokens of answers alone.
        batch_size (`int`): sequences in a pass.
        share (`Share`): the part of this process.
    """

    site: str
    replacements: dict[str | None, Replacement]
    at_answers: bool
    batch_size: int
    share: Share


class ProbePasses:
    """Scores a model under conditions.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: its tokenizer.
        data: what it is scored on.
        work: how.
        records: where what is found is kept.

    Attributes:
        shares_prefix (`bool`): whether passes begin in the middle; not where that would compute something else.
    """

    def __init__(self, model: nn.Module, tokenizer, data: Sequence[ProbeData], work: Work, records: Records) -> None:
        self.model, self.tokenizer, self.data = model, tokenizer, list(data)
        self.work, self.records = work, records
        self.shares_prefix = True
        self._unchecked = _CHECKED
        self._changes: dict[str, Change] = {}

    def run(self, conditions: Sequence[Condition]) -> None:
        """Score the intact model and every condition on every batch that is not recorded yet."""
        unique = {condition.key: condition for condition in conditions}
        batches = [
            (part, number, batch)
            for part in self.data
            for number, batch in enumerate(part.batches(self.work.batch_size))
        ]
        own = batches[self.work.share.index :: self.work.share.count]
        missing = [
            (part, number, batch, self.records.missing(part.name, number, [INTACT, *unique]))
            for part, number, batch in own
        ]
        with (
            evaluating(self.model),
            self._switch() as switch,
            SharedPrefix(self.model) as shared,
            self._bar(shared, unique, missing) as bar,
        ):
            for part, number, batch, keys in missing:
                if keys:
                    self._run_batch(part, number, batch, [unique[k] for k in keys if k != INTACT], switch, shared, bar)
        self.records.flush()

    def continue_prompts(self, conditions: Sequence[Condition]) -> None:
        """Let the intact model and the model under conditions continue the prompts, as far as not recorded yet."""
        unique: dict[str, Condition | None] = {INTACT: None}
        unique |= {condition.key: condition for condition in conditions}
        asked = [(part, key) for part in self.data if part.prompts for key in unique]
        own = asked[self.work.share.index :: self.work.share.count]
        own = [(part, key) for part, key in own if not self.records.has_texts(part.name, key)]
        if not own:
            return
        bar = tqdm(total=len(own), desc="continuing prompts", unit="condition", disable=None if self._shows else True)
        with evaluating(self.model), self._switch() as switch, bar:
            for part, key in own:
                self.records.add_texts(part.name, key, self._continued(part, unique[key], switch))
                bar.update()
        self.records.flush()

    @property
    def _shows(self) -> bool:
        return self.work.share.shows

    def _switch(self) -> Switch:
        work = self.work
        return Switch(self.model, work.site, at_answers=work.at_answers, is_placed=work.replacements[None].is_placed)

    def _continued(self, part: ProbeData, condition: Condition | None, switch: Switch) -> list[str]:
        texts = []
        for prompt in part.prompts:  # one by one: padding on the left would move the places of tokens
            if condition is not None:
                switch.set(self._change(condition, switch), len(prompt) - 1 if self.work.at_answers else None)
            (answer,) = generate_answers(self.model, self.tokenizer, [prompt], max_new_tokens=_MADE)
            switch.set(None)
            texts.append(answer.text)
        return texts

    def _change(self, condition: Condition, switch: Switch) -> Change:
        """On the device, where it stays."""
        if condition.key not in self._changes:
            silent = self.work.replacements[condition.ablation]
            replacement = silent if condition.factor is None else Scaled(condition.factor)
            self._changes[condition.key] = switch.prepared(condition.mask, replacement)
        return self._changes[condition.key]

    def _run_batch(
        self,
        part: ProbeData,
        number: int,
        batch: list[Item],
        conditions: list[Condition],
        switch: Switch,
        shared: SharedPrefix,
        bar: tqdm,
    ) -> None:
        """One batch: the intact model, then each condition from the first layer that it changes."""
        inputs = model_inputs([item.ids for item in batch], input_device(self.model))
        first = [item.scored[0] - 1 for item in batch] if self.work.at_answers else None
        switch.set(None)
        before = time.perf_counter()
        logits = shared.whole(inputs)
        intact = IntactBatch.of(batch, inputs["input_ids"], logits)
        scores = intact.scores(logits)
        del logits
        if self.records.missing(part.name, number, [INTACT]):
            self._note(part, number, None, scores, 0, shared, before)
        for condition in conditions:
            change = self._change(condition, switch)
            layer = change.first_layer if self.shares_prefix else 0
            if layer > 0 and self._unchecked:
                self._unchecked -= 1
                layer = self._checked(layer, intact, inputs, change, first, switch, shared)
            before = time.perf_counter()
            switch.set(change, first)
            scores = intact.scores(shared.run_from(layer, inputs))
            self._note(part, number, condition, scores, layer, shared, before)
            bar.update(_cost(batch, shared.layers - layer))
        switch.set(None)

    def _note(self, part, number, condition, scores, layer, shared, before) -> None:
        seconds = time.perf_counter() - before
        if not all(map(math.isfinite, [*scores.nll, *scores.kl])):
            state = "intact" if condition is None else f"under {condition.curve} of {condition.selector}"
            raise FNSFTError(
                f"batch {number} of {part.name}: the model, {state}, predicts nothing that is a number (NaN or an "
                f"infinite loss); its weights are {self.model.dtype}: {NO_DIFFERENCE}"
            )
        key = INTACT if condition is None else condition.key
        self.records.add(part.name, number, key, asdict(scores), seconds=seconds, share=1 - layer / shared.layers)

    def _checked(self, layer, intact, inputs, change, first, switch, shared) -> int:
        """Compare a pass from the middle with a whole one, in scores and in time; 0 where they differ."""
        found = []
        for start in (0, layer):
            switch.set(change, first)
            before = time.perf_counter()
            found.append(intact.scores(shared.run_from(start, inputs)))
            self.records.add_timing(time.perf_counter() - before, 1 - start / shared.layers)
        pairs = zip(found[0].nll, found[1].nll, strict=True)
        if all(abs(whole - begun) <= _NEAR * max(1.0, abs(whole)) for whole, begun in pairs):
            return layer
        logger.warning(
            f"a pass that begins at layer {layer} does not compute what a whole one does, so every pass is whole: "
            "this model hands on more from layer to layer than its blocks give"
        )
        self.shares_prefix = False
        return 0

    def _bar(self, shared: SharedPrefix, unique: dict[str, Condition], missing: Sequence[tuple]) -> tqdm:
        """Of the work that is left: tokens times layers, by which the time left is told."""
        cost: Callable[[str], int] = {
            key: shared.layers - min(layer for layer, members in condition.mask.layers.items() if members.any())
            for key, condition in unique.items()
        }.__getitem__
        total = sum(_cost(batch, cost(key)) for _, _, batch, keys in missing for key in keys if key != INTACT)
        return tqdm(
            total=total, desc="passes", unit=" tokens x layers", unit_scale=True, disable=None if self._shows else True
        )


def _cost(batch: Sequence[Item], layers: int) -> int:
    return len(batch) * max(len(item.ids) for item in batch) * max(1, layers)
