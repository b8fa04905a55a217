"""One run of `fnsft restore`: directions, every way to restore scored, one chosen and written."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from ..data.embedded import resolve_model
from ..data.sequences import token_sequences
from ..discovery.directions import LEADING, KeptDirections, KeptText
from ..discovery.scale import activation_scale
from ..errors import FNSFTError
from ..evaluation.evaluated import EvaluatedModel
from ..evaluation.metrics import score_rows
from ..evaluation.retention import RetentionText
from ..evaluation.rows import EvaluationRow, RowReader, prompt_format, read_rows
from ..evaluation.series import RetentionSeries
from ..export.restored import AdapterChanges
from ..export.restored_model import ModelChanges
from ..interventions.restoring import Restoration
from ..neurons.sites import find_neuron_sites
from ..ranges import format_ranges, parse_ranges
from ..template.template import FunctionalNetworkTemplate
from ..training.loaded import check_template, given_template
from ..training.retention_texts import RetentionTexts
from ..tuner.saved import SavedAdapter
from .evaluation_run import read_data
from .logs import hush_repetitions
from .models import check_loading, loading_arguments, quantization_arguments
from .restoring_asked import Asked
from .restoring_report import write_report


logger = logging.get_logger("fnsft_trl")

_PASSAGE = 256  # tokens of a sequence
_SHORT = 32  # of a text that is a single passage otherwise
_LONGEST = 2048  # tokens of a row of the task


@dataclass
class Scored:
    """
    What one way to restore gives.

    Attributes:
        how (`Restoration`): the way.
        kl (`dict[str, float]`): name of a text to keep -> KL of the base to the restored model, nats per token.
        rise (`dict[str, float]`): the same for the rise of the cross-entropy.
        mean_kl (`float`): over the texts, by their shares.
        residual (`float`): the largest ||D U|| / ||D|| of any module.
        loss (`float`, *optional*): of the task, nats per token that counts.
        exact (`float`, *optional*): share of the task's rows that are answered exactly, if they have answers.
    """

    how: Restoration
    kl: dict[str, float] = field(default_factory=dict)
    rise: dict[str, float] = field(default_factory=dict)
    mean_kl: float = 0.0
    residual: float = 0.0
    loss: float | None = None
    exact: float | None = None


@dataclass
class Screen:
    """All that a run found.

    Attributes:
        base (`Scored`): the base model.
        ways (`list[Scored]`): the fine-tune as it was trained, and every way to restore it.
        chosen (`Scored`): the one that is written.
        rule (`str`): why, in words.
        limit (`float`, *optional*): the most that the task's loss may be.
        directions (`dict[str, KeptDirections]`): networks, or none -> the directions.
        energy (`dict[str, dict[int, float]]`): name of a text, or the task -> directions -> share of its energy.
        texts (`dict[str, tuple]`): name -> the passages of the directions, and those that are scored.
        sinks (`dict[str, dict]`): name of a text -> attention sinks beside position 0.
        rows (`int`): of the task.
    """

    base: Scored
    ways: list[Scored]
    chosen: Scored
    rule: str
    limit: float | None
    energy: dict[str, dict[int, float]]
    texts: dict[str, tuple[KeptText, RetentionText]]
    sinks: dict[str, dict]
    rows: int
    modules: int
    others: int


def restore(asked: Asked) -> None:
    """Find directions, score every way, choose one, write it and the report.

    Args:
        asked: what the call asks for.

    Raises:
        FNSFTError: something that is asked for cannot be done.
    """
    state = PartialState()
    if state.num_processes > 1:
        raise FNSFTError("fnsft restore runs in one process; start it without accelerate (device_map spreads a model)")
    hush_repetitions(0)
    check_loading(asked.loading, state.device.type)
    run = _Run(asked, state.device)
    run.load()
    screen = run.screen()
    run.write(screen)


class _Run:
    """One run, its parts in their order."""

    def __init__(self, asked: Asked, device: torch.device) -> None:
        self.asked, self.args, self.device = asked, asked.args, device
        self.loading = loading_arguments(asked.loading) | quantization_arguments(asked.loading, device)
        self.found = EvaluatedModel.find(self.args.adapter, **self.loading)
        self.is_adapter = self.found.adapter is not None
        if not self.is_adapter and self.args.base is None:
            raise FNSFTError(
                f"{self.args.adapter} is a whole model and no adapter; give the model it was tuned from (base)"
            )
        if not self.is_adapter and asked.loading.is_quantized:
            raise FNSFTError("a fine-tuned model is restored in full precision, not in few bits; drop load_in_...")
        _check_beside(asked.output, is_adapter=self.is_adapter)
        self.tokenizer = self.found.load_tokenizer()
        rows = RetentionTexts(asked.keep).texts
        self.texts = {name: split_text(rows[name], self.tokenizer, asked, name) for name in rows}
        self.rows = self._task_rows()
        self.template = None if asked.networks is None else given_template(asked.networks, None)

    def _task_rows(self) -> list[EvaluationRow]:
        if self.args.task is None:
            return []
        settings = self.asked.settings
        part = read_data("task", self.args.task, self.args.dataset_split, settings)
        part = part.sampled(settings.max_samples, settings.seed)
        tokenizer = prompt_format(self.tokenizer, settings.template_format, settings.prompt_template)
        longest = settings.max_length or _LONGEST
        reader = RowReader(tokenizer, assistant_only_loss=settings.assistant_only_loss, max_length=longest)
        return read_rows(part.rows, reader, columns=settings.columns, name=f"the task {self.args.task}")[0]

    def load(self) -> None:
        """Load the models, and find the directions of the base's inputs."""
        asked, layers = self.asked, self.asked.layers
        if self.is_adapter:
            saved: SavedAdapter = self.found.adapter
            loading = self.found.loading
            source = {key: loading[key] for key in ("trust_remote_code",) if key in loading}
            place = self.args.base and resolve_model(self.args.base)
            self.changes = AdapterChanges.read(saved, layers=layers, base=place, **source)
            self.model = self._placed(saved.load_base(place, **loading))
        else:
            base = EvaluatedModel.find(self.args.base, **self.loading)
            self.model: PreTrainedModel = base.load(self.device)
            self.changes = ModelChanges(self.model, self.found.load("cpu"), layers=layers)
        self.model.eval()
        kept_texts = {name: replace(kept, share=asked.shares[name]) for name, (kept, _) in self.texts.items()}
        modules = self.changes.modules
        batch = asked.settings.batch_size
        most = max(asked.leading)
        kept = KeptDirections.find(self.model, modules, kept_texts, leading=most, batch_size=batch)
        self.kept = {"": kept}
        if self.template is not None:
            self._add_networks(kept)
        self.counts = [1, LEADING, *(LEADING + m for m in asked.leading)]
        self.energy = {name: self._energy(name, KeptText(text.sequences)) for name, (_, text) in self.texts.items()}
        if self.rows:
            self.energy["task"] = self._energy("task", KeptText([row.ids for row in self.rows if len(row.ids) > 1]))
        if self.is_adapter:
            self.model = self.found.adapter.load_onto(self.model).eval()
            self.model.base_model.set_adapter(self.model.active_adapter, inference_mode=False)

    def _placed(self, model: PreTrainedModel) -> PreTrainedModel:
        is_placed = "device_map" in self.found.loading or self.asked.loading.is_quantized
        return model if is_placed else model.to(self.device)

    def _add_networks(self, kept: KeptDirections) -> None:
        """The networks' directions at the inputs of the down projections, in the place of leading ones."""
        config = self.asked.networks
        template: FunctionalNetworkTemplate = check_template(config, self.model, self.template)
        if template.site != "mlp_intermediate":
            raise FNSFTError(f"the template is of {template.site}; one of neurons (mlp_intermediate) is needed")
        numbers = network_numbers(config, template)
        leading = {}
        for site in find_neuron_sites(self.model):
            if site.layer in template.loadings and site.down_name in self.changes.modules:
                leading[site.down_name] = directions_of(template, site.layer, numbers)
        if not leading:
            raise FNSFTError("none of the modules that were trained reads the neurons of the template's networks")
        self.kept[format_ranges(numbers)] = kept.with_leading(leading)

    def _energy(self, name: str, text: KeptText) -> dict[int, float]:
        batch = self.asked.settings.batch_size
        return self.kept[""].energy(self.model, text, self.counts, batch_size=batch, title=f"energy: {name}")

    def screen(self) -> Screen:
        """Score every way, and choose one."""
        self.series = {}
        self.changes.clear(self.model)
        for name, (_, text) in self.texts.items():
            series = RetentionSeries(text, name=name, batch_size=self.asked.settings.batch_size)
            series.begin(self.model, title=f"base: {name}")
            self.series[name] = series
        base = Scored(Restoration(scale=0.0))
        base.kl = base.rise = dict.fromkeys(self.texts, 0.0)
        self._score_task(base)
        first = list(self._ways())
        ways = [self._score(how) for how in tqdm(first, "ways to restore")]
        limit = None
        if self.rows:
            gain = base.loss - ways[0].loss
            if gain <= 0:
                raise FNSFTError(
                    f"on {self.args.task} the fine-tune has a loss of {ways[0].loss:.4f}, its base {base.loss:.4f}: "
                    "nothing was learnt that could be kept; give rows of what was trained, in its prompt format"
                )
            limit = ways[0].loss + self.args.tolerance * gain
        best, _ = self._choose(ways, limit)
        if best.how.directions:
            scaled = [replace(best.how, scale=scale) for scale in self.asked.scales]
            ways += [self._score(how) for how in tqdm(scaled, "the best, scaled")]
        chosen, rule = self._choose(ways, limit)
        others = 0 if self.is_adapter else len(self.changes.others)
        return Screen(
            base,
            ways,
            chosen,
            rule,
            limit,
            self.energy,
            self.texts,
            self._sinks(),
            len(self.rows),
            len(self.changes.modules),
            others,
        )

    def _ways(self) -> Iterator[Restoration]:
        yield Restoration()
        yield from (Restoration(scale=scale) for scale in self.asked.scales)
        yield from (Restoration(count) for count in self.counts)
        if self.changes.is_lora:
            yield Restoration(1, is_centred=True)
        for networks in filter(None, self.kept):
            yield Restoration(LEADING, networks=networks)

    def _score(self, how: Restoration) -> Scored:
        found = Scored(how)
        found.residual = self.changes.apply(self.model, self.kept[how.networks], how)
        for name, series in self.series.items():
            values = series.measure(self.model, title=f"{how.name}: {name}")
            found.kl[name], found.rise[name] = values["kl"], values["rise"]
        found.mean_kl = sum(self.asked.shares[name] * kl for name, kl in found.kl.items())
        self._score_task(found)
        return found

    def _score_task(self, found: Scored) -> None:
        if not self.rows:
            return
        settings = self.asked.settings
        longest = settings.max_length or _LONGEST
        scores = score_rows(
            self.model, self.rows, max_length=longest, batch_size=settings.batch_size, name=f"{found.how.name}: task"
        )
        found.loss = sum(score.nll for score in scores) / sum(score.tokens for score in scores)
        exact = [score.is_exact for score, row in zip(scores, self.rows, strict=True) if row.answer is not None]
        found.exact = sum(exact) / len(exact) if exact else None

    def _choose(self, ways: list[Scored], limit: float | None) -> tuple[Scored, str]:
        """The way that is written, and the rule in words."""
        name = self.args.choose
        if name is not None:
            chosen = next((way for way in ways if way.how.name == name), None)
            if chosen is None:
                raise FNSFTError(f"choose is {name!r}; the ways are: {'; or '.join(repr(w.how.name) for w in ways)}")
            return chosen, "the way that was asked for (choose)"
        plain = [way for way in ways if not way.how.is_centred]  # which merges only where the base has biases
        if limit is not None:
            within = [way for way in plain if way.loss <= limit]
            return min(
                within, key=lambda way: way.mean_kl
            ), f"the least KL within {self.args.tolerance:.0%} of the gain"
        held = {m: sum(self.asked.shares[name] * self.energy[name][m] for name in self.texts) for m in self.counts}
        enough = next((m for m in self.counts if held[m] >= self.args.energy), self.counts[-1])
        chosen = next(way for way in plain if way.how == Restoration(enough))
        rule = (
            f"the fewest directions that hold {self.args.energy:.0%} of the kept texts' energy ({held[enough]:.1%}); "
            "nothing was measured on the task, so how much of it was lost is not known"
        )
        return chosen, rule

    def _sinks(self) -> dict[str, dict]:
        found = {}
        for name, sinks in self.kept[""].sinks.items():
            often = {repr(self.tokenizer.decode([token])): count for token, count in list(sinks.ids.items())[:5]}
            found[name] = {"count": sinks.count, "tokens": sinks.tokens, "most": often}
        return found

    def write(self, screen: Screen) -> None:
        """Write the restored one, and the report."""
        how = screen.chosen.how
        if how != Restoration():
            self.changes.save(self.model, self.kept[how.networks], how, self.asked.output)
            if not (self.asked.output / "tokenizer_config.json").is_file() and not self.is_adapter:
                self.tokenizer.save_pretrained(self.asked.output)
        write_report(screen, self.asked)
        if how == Restoration():
            raise FNSFTError(
                f"no way takes anything back within {self.args.tolerance:.0%} of the task's gain, so nothing but the "
                f"report was written to {self.asked.output}; raise tolerance, or choose a way of its table"
            )


def split_text(rows: list, tokenizer, asked: Asked, name: str) -> tuple[KeptText, RetentionText]:
    """The passages of a text from which its directions are found, and others, on which ways are scored.

    Args:
        rows: of the text.
        tokenizer: of the model.
        asked: how many tokens each has.
        name: of the text.

    Raises:
        FNSFTError: it is too short to be split.
    """
    for length in (_PASSAGE, _SHORT):
        halves: tuple[list[list[int]], list[list[int]]] = ([], [])
        wanted = (asked.args.keep_tokens, asked.args.score_tokens)
        for sequence in token_sequences(rows, tokenizer, max_length=length, name=f"the text {name}"):
            half = halves[sequence.half]
            left = wanted[sequence.half] - sum(len(ids) - 1 for ids in half)
            if len(sequence.ids) > 1 and left > 0:
                half.append(sequence.ids[: left + 1])
        if all(halves):
            break
    else:
        raise FNSFTError(
            f"the text {name} is too short: one part of it gives directions and another one is scored; give some "
            "paragraphs"
        )
    for half, count, what in zip(halves, wanted, ("directions come from", "ways are scored on"), strict=True):
        tokens = sum(len(ids) - 1 for ids in half)
        if tokens < count:
            logger.warning(f"of the text {name}, {what} {tokens} tokens, not the {count} asked for")
    return KeptText(halves[0]), RetentionText.of_sequences(halves[1])


def network_numbers(config, template: FunctionalNetworkTemplate) -> list[int]:
    """The networks that are asked for; all by default."""
    count = len(template.components)
    return parse_ranges("all" if config.ica_component_ids is None else config.ica_component_ids, count, what="network")


def directions_of(template: FunctionalNetworkTemplate, layer: int, numbers: list[int]) -> torch.Tensor:
    """The directions of networks among a layer's activations, shape (networks, neurons)."""
    return template.loadings[layer][numbers].double() * activation_scale(template)[layer]


def _check_beside(output: Path, *, is_adapter: bool) -> None:
    """Refuse a directory that holds the other kind, beside which what is written would not be loaded."""
    other = "config.json" if is_adapter else "adapter_config.json"
    if (output / other).is_file():
        raise FNSFTError(f"output_dir is {output}, which holds {other}, beside which the restored one would not load")
