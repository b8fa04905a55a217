"""One run of `fnsft restore`: directions, every way to restore scored, one chosen and written."""

from dataclasses import replace

import torch
from accelerate import PartialState
from peft import LoraConfig
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from ..config import FunctionalNetworkConfig
from ..data.embedded import resolve_model
from ..data.sequences import token_sequences
from ..discovery.directions import LEADING, KeptDirections, KeptText
from ..discovery.network_directions import network_directions
from ..errors import FNSFTError
from ..evaluation.evaluated import EvaluatedModel
from ..evaluation.metrics import score_rows
from ..evaluation.retention import RetentionText
from ..evaluation.rows import EvaluationRow, RowReader, prompt_format, read_rows
from ..evaluation.series import RetentionSeries
from ..export.restored import AdapterChanges, Places
from ..export.restored_model import ModelChanges
from ..finite import NO_DIFFERENCE, check_finite
from ..interventions.restoring import Positions, Restoration
from ..neurons.sites import check_in_memory, find_neuron_sites
from ..ranges import format_ranges, parse_ranges
from ..selection import select_neurons
from ..template.template import FunctionalNetworkTemplate
from ..training.loaded import given_template
from ..training.preparation import keep_4bit_layers_differentiable
from ..training.retention_texts import RetentionTexts
from ..tuner.saved import SavedAdapter
from ..writing import disk_errors, written_whole
from .evaluation_run import read_data
from .logs import hush_repetitions
from .models import check_loading, loading_arguments, quantization_arguments
from .restoring_asked import Asked
from .restoring_report import print_report, write_report
from .restoring_screen import Limits, Scored, Screen, directions_by_energy, way_named, ways_to_restore


logger = logging.get_logger("fnsft_trl")

_PASSAGE = 256  # tokens of a sequence
_SHORT = 32  # of a text that is a single passage otherwise
_LONGEST = 2048  # tokens of a row of the task


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
        self.tokenizer = self.found.load_tokenizer()
        rows = RetentionTexts(asked.keep).texts
        self.texts = {name: split_text(rows[name], self.tokenizer, asked, name) for name in rows}
        self.rows = self._task_rows()
        self.template = None if asked.networks is None else given_template(asked.networks, None)
        self.numbers = [] if self.template is None else _numbers(asked.networks, self.template)
        if self.template is not None:  # whatever of it is no use here is refused before a model is loaded
            self.directions = network_directions(self.template, self.numbers)
            self.neurons = select_neurons(self.template, self.numbers)
        self.counts = [1, LEADING, *(LEADING + m for m in asked.leading)]
        is_lora = self.is_adapter and isinstance(self.found.adapter.config, LoraConfig)
        self.ways = ways_to_restore(self.counts, asked.scales, networks=format_ranges(self.numbers), is_lora=is_lora)
        self.named = None if self.args.choose is None else way_named(self.args.choose, self.ways, asked.scales)

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
            check_in_memory(self.model, "fnsft restore")
        else:
            base = EvaluatedModel.find(self.args.base, **self.loading)
            self.model: PreTrainedModel = base.load(self.device)
            tuned = self.found.load("cpu")
            for model in (self.model, tuned):
                check_in_memory(model, "fnsft restore")
            self.changes = ModelChanges(self.model, tuned, layers=layers)
        self.model.eval()
        kept_texts = {name: replace(kept, share=asked.shares[name]) for name, (kept, _) in self.texts.items()}
        modules = self.changes.modules
        batch = asked.settings.batch_size
        most = max(asked.leading)
        kept = KeptDirections.find(self.model, modules, kept_texts, leading=most, batch_size=batch)
        self.places = Places({"": kept}) if self.template is None else self._with_networks(kept)
        self.energy = {name: self._energy(name, KeptText(text.sequences)) for name, (_, text) in self.texts.items()}
        if self.rows:
            self.energy["task"] = self._energy("task", KeptText([row.ids for row in self.rows if len(row.ids) > 1]))
        if self.is_adapter:
            self.model = self.found.adapter.load_onto(self.model).eval()
            self.model.base_model.set_adapter(self.model.active_adapter, inference_mode=False)

    def _placed(self, model: PreTrainedModel) -> PreTrainedModel:
        keep_4bit_layers_differentiable(model)  # packed layers refuse some widths
        is_quantized = getattr(model.config, "quantization_config", None) is not None
        return model if "device_map" in self.found.loading or is_quantized else model.to(self.device)

    def _with_networks(self, kept: KeptDirections) -> Places:
        """The networks' directions at the inputs of the down projections, and where their own neurons are."""
        self.template.check_model(self.model)
        leading, own = {}, {}
        for site in find_neuron_sites(self.model):
            if site.layer not in self.directions:
                continue
            leading[site.down_name] = self.directions[site.layer]
            members = self.neurons.indices(site.layer)
            for part in site.layout.slices if len(members) else ():
                own[part.module_name] = Positions(part.indices(members), part.side)
        if not leading.keys() & set(self.changes.modules):
            raise FNSFTError(
                "none of the modules that were trained reads the neurons of the template's networks; drop "
                "ica_template_path"
            )
        return Places({"": kept, format_ranges(self.numbers): kept.with_leading(leading)}, own)

    def _energy(self, name: str, text: KeptText) -> dict[int, float]:
        batch = self.asked.settings.batch_size
        return self.places.kept[""].energy(self.model, text, self.counts, batch_size=batch, title=f"energy: {name}")

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
        ways, limits, (chosen, rule) = self._choice(base)
        return Screen(
            base=base,
            ways=ways,
            chosen=chosen,
            rule=rule,
            limits=limits,
            energy=self.energy,
            texts=self.texts,
            sinks=self._sinks(),
            rows=len(self.rows),
            modules=len(self.changes.modules),
            others=0 if self.is_adapter else len(self.changes.others),
        )

    def _choice(self, base: Scored) -> tuple[list[Scored], Limits | None, tuple[Scored, str]]:
        """Ways with their scores, how much of the task may be lost, the one that is chosen, and why."""
        if self.named is not None:
            ways = [self._score(how) for how in tqdm([Restoration(), self.named], "ways to restore")]
            return ways, self._limits(base, ways[0]), (ways[1], "the way that was asked for")
        ways = [self._score(self.ways[0])]
        limits = self._limits(base, ways[0])
        ways += [self._score(how) for how in tqdm(self.ways[1:], "ways to restore")]
        if limits is None:
            return ways, limits, self._by_energy(ways)
        best = limits.best(ways)
        if best.how.directions:
            scaled = [replace(best.how, scale=scale) for scale in self.asked.scales]
            ways += [self._score(how) for how in tqdm(scaled, "the best, scaled")]
        best = limits.best(ways)
        return ways, limits, (best, f"the least KL within {self.args.tolerance:.0%} of the gain: {limits.text(best)}")

    def _by_energy(self, ways: list[Scored]) -> tuple[Scored, str]:
        """The way that is chosen without a task, and why."""
        count, held = directions_by_energy(self.energy, self.asked.shares, self.args.energy)
        rule = (
            f"the fewest directions that hold {self.args.energy:.0%} of the kept texts' energy; these hold {held:.1%}"
            if held >= self.args.energy
            else f"all {count} directions hold {held:.1%} of the kept texts' energy, less than {self.args.energy:.0%}"
        )
        chosen = next(way for way in ways if way.how == Restoration(count))
        return chosen, f"{rule}; nothing was measured on the task, so how much of it was lost is not known"

    def _limits(self, base: Scored, trained: Scored) -> Limits | None:
        """How much of the task may be lost; `None` without one."""
        if not self.rows:
            return None
        if base.loss <= trained.loss:
            raise FNSFTError(
                f"on {self.args.task} the fine-tune has a loss of {trained.loss:.4f}, its base {base.loss:.4f}: "
                "nothing was learnt that could be kept; give rows of what was trained, in its prompt format"
            )
        return Limits.of(base, trained, self.args.tolerance, len(self.rows))

    def _score(self, how: Restoration) -> Scored:
        found = Scored(how)
        found.residual = self.changes.apply(self.model, how, self.places)
        for name, series in self.series.items():
            values = series.measure(self.model, title=f"{how.name}: {name}")
            found.kl[name], found.rise[name] = values["kl"], values["rise"]
            check_finite(values.values(), f"what {how.name} gives on {name}")
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
        check_finite([found.loss], f"the loss of {found.how.name} on {self.args.task}", NO_DIFFERENCE)
        exact = [score.is_exact for score, row in zip(scores, self.rows, strict=True) if row.answer is not None]
        found.exact = sum(exact) / len(exact) if exact else None

    def _sinks(self) -> dict[str, dict]:
        found = {}
        for name, sinks in self.places.kept[""].sinks.items():
            often = {repr(self.tokenizer.decode([token])): count for token, count in list(sinks.ids.items())[:5]}
            found[name] = {"count": sinks.count, "tokens": sinks.tokens, "most": often}
        return found

    def write(self, screen: Screen) -> None:
        """Write the restored one, and the report."""
        how = screen.chosen.how
        with disk_errors(self.asked.output), written_whole(self.asked.output) as scratch:
            scratch.mkdir()
            if how != Restoration():
                self.changes.save(self.model, how, self.places, scratch)
                if not self.is_adapter and not (scratch / "tokenizer_config.json").is_file():
                    self.tokenizer.save_pretrained(scratch)
            write_report(screen, self.asked, scratch)
        print_report(screen, self.asked)
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


def _numbers(config: FunctionalNetworkConfig, template: FunctionalNetworkTemplate) -> list[int]:
    """The networks that are asked for; all by default."""
    wanted = "all" if config.ica_component_ids is None else config.ica_component_ids
    return parse_ranges(wanted, len(template.components), what="network")
