"""discover_networks: a model and texts in, a template out.

One pass over the texts. Each dataset has two halves, and each half its own sketch: both together give the networks of
the dataset, all of them the networks of the group. Under `torch.distributed` every process reads its share of the
batches, the first one decomposes, and all get the same template.
"""

import hashlib
import os
import random
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..config import FunctionalNetworkConfig, ThresholdRule
from ..data.sequences import several, token_sequences
from ..errors import FNSFTError
from ..fields import checked
from ..hub.names import absolute_sources, model_name, source_names
from ..neurons.layout import check_whole
from ..neurons.sites import base_model, find_neuron_sites
from ..ranks import Ranks
from ..template.description import NullReliability, reliability_above_null
from ..template.template import Component, FunctionalNetworkTemplate
from ..template.weights import weight_probes, weights_sha256
from .activations import ActivationReader
from .basis import SiteBases
from .decomposition import Decomposition, IcaSettings, decompose
from .moments import Moments
from .null import null_reliability
from .progress import WEIGHTS, DiscoveryProgress, Milestones
from .recurrence import recurrence
from .sketch import ActivationSketch
from .surrogate import shifted_in_time
from .units import Units


logger = logging.get_logger(__name__)

_FIRST_CHECK = 4096  # tokens before the reliability is looked at for the first time,
_CHECK_GROWTH = 1.5  # and how much they grow from one look to the next


def discover_networks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable | Mapping[str, Iterable],
    config: FunctionalNetworkConfig | None = None,
    *,
    progress_dir: str | os.PathLike | None = None,
    resume: bool = False,
) -> FunctionalNetworkTemplate:
    """Find the functional networks of a model in one streaming pass over texts.

    The texts are dealt to two halves of equal size; the networks come from both together, their reliability from each
    half alone. First tokens of a sequence, special tokens and padding are left out.

    Args:
        model: a transformers model, plain, quantised or wrapped by PEFT. Left unchanged.
        tokenizer: its tokenizer.
        texts: strings, conversations (lists of messages), or rows of a dataset (see
            [`~fnsft_trl.data.sequences.text_token_ids`]); or several such datasets by name, see [`discover_group`].
        config: the `ica_*` fields are used; defaults to `FunctionalNetworkConfig()`.
        progress_dir: where to save the sketch ten times on the way. The last save stays there until
            [`~fnsft_trl.discovery.progress.clear_progress`] removes it: call that when the template is saved.
        resume: go on from what an interrupted call left in `progress_dir`; the result is the same, bit for bit.
            Refused for a model with other weights, whatever its name.

    Returns:
        A [`FunctionalNetworkTemplate`], the same in every process. The same model, texts, settings, threads and
        versions give the same bytes.

    Raises:
        FNSFTError: no sites, no text, fewer tokens than components, activations that are not finite, nothing to
            resume from, or other settings or weights than there.
    """
    datasets = texts if isinstance(texts, Mapping) else {"texts given in memory": texts}
    return discover_group(model, tokenizer, datasets, config, progress_dir=progress_dir, resume=resume)[0]


def discover_group(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    datasets: Mapping[str, Iterable],
    config: FunctionalNetworkConfig | None = None,
    *,
    progress_dir: str | os.PathLike | None = None,
    resume: bool = False,
) -> tuple[FunctionalNetworkTemplate, dict[str, FunctionalNetworkTemplate]]:
    """Find the networks of several datasets together, and of each by itself, in one pass.

    Each dataset gets an equal share of `ica_max_tokens`. The components of the group's template say in which datasets
    they recur ([`~fnsft_trl.discovery.recurrence.recurrence`]).

    Args:
        datasets: name -> texts.
        model, tokenizer, config, progress_dir, resume: as for [`discover_networks`].

    Returns:
        The group's template, and name -> template of each dataset; empty where there is only one dataset.

    Raises:
        FNSFTError: as [`discover_networks`].
    """
    config = checked(config, FunctionalNetworkConfig, "config") or FunctionalNetworkConfig()
    return _Discovery(model, tokenizer, datasets, config).run(progress_dir, resume)


def _halves(parts: list[list[ActivationSketch]]) -> list[list[ActivationSketch]]:
    """The sketches of all datasets and processes, by half."""
    return [[entry for part in parts[half::2] for entry in part] for half in (0, 1)]


def _compact(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same on the CPU without what tensors are views of, which would be sent too."""
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


@dataclass
class _Found:
    """What some sketches hold: their networks, and the null of these."""

    result: Decomposition
    null: dict[str, float]

    @property
    def point(self) -> dict:
        """A point of the curve of reliability over tokens."""
        reliability, null = self.result.reliability, NullReliability(**self.null)
        above = [reliability_above_null(value, null) for value in reliability]
        return {
            "tokens": self.result.moments.count,
            "reliability": sum(reliability) / len(reliability),
            "above_null": sum(above) / len(above),
        }


class _Discovery:
    """One discovery: the reader, the sketch of each part 2 * dataset + half of what it has read, and the templates."""

    def __init__(self, model, tokenizer, datasets: Mapping[str, Iterable], config: FunctionalNetworkConfig) -> None:
        if not callable(tokenizer):
            raise FNSFTError(f"the tokenizer is a {type(tokenizer).__name__}; expected that of the model, loaded")
        self.whole_model, self.config, self.names = model, config, list(datasets)
        self.shown = source_names(absolute_sources(self.names))  # as the template names them
        self.model = base_model(model)
        check_whole(model, "a discovery")
        sites = find_neuron_sites(model, kind=config.ica_site, layers=config.ica_layers)
        self.weights = weight_probes(model, sites)
        self.dtype = torch.float64 if config.ica_dtype == "float64" else torch.float32
        self.reader = ActivationReader(
            model,
            sites,
            batch_size=config.ica_batch_size,
            max_length=config.ica_max_length,
            skip_tokens=config.ica_skip_tokens,
            special_ids=tokenizer.all_special_ids if config.ica_skip_special else (),
            dtype=self.dtype,
        )
        self.sources = [
            token_sequences(
                islice(several(texts, name), config.ica_template_samples_per_ds),
                tokenizer,
                max_length=config.ica_max_length,
                name=name,
            )
            for name, texts in datasets.items()
        ]
        self.units = Units(config.ica_standardize, config.ica_drop_massive, tuple(self.reader.columns.values()))
        self.ranks = Ranks()
        self.share = (self.ranks.index, self.ranks.count)
        self.parts = self._empty(self.share[0])
        self.ica = IcaSettings(
            config.ica_components,
            variant=config.ica_variant,
            contrast=config.ica_contrast,
            backend=config.ica_backend,
            seed=config.ica_seed,
            decomposition=config.ica_decomposition,
        )
        self.curve: list[dict] = []
        leading = config.ica_store_basis
        self.bases = SiteBases(self.reader, sources=len(self.names), leading=leading) if leading else None

    @property
    def _read_so_far(self) -> list:
        """All that has a state to go on with."""
        return [*self.parts, *([self.bases] if self.bases else [])]

    def _empty(self, process: int) -> list[ActivationSketch]:
        """The sketches of a process that has read nothing yet."""
        config, count = self.config, 2 * len(self.names)
        first_seed = count * (process + self.share[1] * config.ica_seed)
        return [
            ActivationSketch(
                self.reader.width,
                config.ica_rank,
                reservoir=config.ica_reservoir,
                seed=seed,
                units=self.units,
                dtype=self.dtype,
                device=self.reader.device,
            )
            for seed in range(first_seed, first_seed + count)
        ]

    def run(
        self, progress_dir: str | os.PathLike | None, resume: bool
    ) -> tuple[FunctionalNetworkTemplate, dict[str, FunctionalNetworkTemplate]]:
        """Read, decompose, and give the group's template and those of the datasets."""
        config = self.config
        about = {"base_model": model_name(self.model), "site": config.ica_site, "datasets": self.names}
        about |= config.discovery_settings() | {"processes": self.share[1]}
        if progress_dir is not None:
            about[WEIGHTS] = weights_sha256(self.whole_model)
        progress = DiscoveryProgress(
            progress_dir, about, self.share, max_tokens=config.ica_max_tokens, meet=self.ranks.meet
        )
        with self.ranks.together():
            if resume:
                self.curve = progress.resume(self._read_so_far)["curve"]
            self._read(progress)
        directions = self.bases.of_all_processes(self.share) if self.bases else {}
        template, of_datasets, point = self._on_first_process(self._templates)
        template.basis = directions
        if config.ica_until_reliable:
            self.curve.append(point)
            template.calibration["curve"] = self.curve
            if point["above_null"] < config.ica_until_reliable:
                logger.warning(self._not_reached(point, template.null))
        return template, of_datasets

    def _not_reached(self, point: dict, null: dict[str, float]) -> str:
        centred = self.config.ica_standardize != "zscore"
        return (
            f"the mean reliability above null is {point['above_null']:.2f} after {sum(self.reader.tokens)} tokens "
            f"(reliability {point['reliability']:.2f}; without co-activation {null['reliability']:.2f}, at most "
            f"{null['highest']:.2f}), below {self.config.ica_until_reliable} (ica_until_reliable): give more text or "
            "a larger ica_max_tokens, or ask for fewer components (ica_components)"
            + (" or for z-scored ones (ica_standardize), whose null is near zero" if centred else "")
        )

    def _read(self, progress: DiscoveryProgress) -> None:
        """Read the texts into the parts, to their end, to `ica_max_tokens`, or until the components are reliable."""
        config, reader = self.config, self.reader
        each = config.ica_max_tokens // len(self.names)
        if each == 0:
            raise FNSFTError(
                f"ica_max_tokens is {config.ica_max_tokens} for {len(self.names)} datasets; give at least one for each"
            )
        checks = Milestones(_FIRST_CHECK, lambda mark: mark * _CHECK_GROWTH)
        blocks = reader.read(
            self.sources,
            max_tokens=each,
            first_batch=progress.first_batch,
            share=self.share,
            description="discovering surrogate networks" if config.ica_surrogate else "discovering networks",
        )
        with closing(blocks), self.bases.reading(self.model) if self.bases else nullcontext():
            if progress.first_batch:  # what was read before the interruption is only counted
                for _ in islice(blocks, progress.first_batch):
                    pass
                progress.check_texts(self._sha256())
                for marks in (checks, progress.marks):
                    marks.passed(sum(reader.tokens))
            for block in blocks:
                for number in block.parts.unique().tolist():
                    chosen = (block.parts == number).nonzero().flatten().to(block.rows.device)
                    if config.ica_surrogate:
                        seed = random.Random(f"{config.ica_seed} {number} {block.batch}").getrandbits(32)
                        self.parts[number].update(shifted_in_time(block.rows[chosen], seed=seed))
                    else:
                        self.parts[number].update(block.rows, chosen)
                tokens = sum(reader.tokens)
                if checks.passed(tokens) and config.ica_until_reliable and self._is_reliable():
                    break
                if progress.marks.passed(tokens):
                    progress.save(self._read_so_far, batch=block.batch, sha256=self._sha256(), curve=self.curve)
        if sum(reader.tokens) == 0:
            raise FNSFTError("the texts for the discovery hold no token to read; give at least some sentences of text")
        for name, count in zip(self.names, reader.tokens, strict=True):
            if count == 0:
                raise FNSFTError(f"the texts of {name} hold no token to read; give others, or leave {name} out")
            if count < each and not config.ica_until_reliable:
                of = "the texts" if len(self.names) == 1 else f"the texts of {name}"
                logger.warning(f"{of} ended after {count} of {each} tokens (ica_max_tokens)")

    def _sha256(self, source: int | None = None) -> str:
        """Of the token ids read so far: of one dataset, or of all."""
        digests = [digest.hexdigest() for digest in self.reader.digests]
        if source is not None or len(digests) == 1:
            return digests[source or 0]
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    def _is_reliable(self) -> bool:
        """Add a point to the curve of reliability over tokens, and say whether it is high enough."""
        self.curve.append(self._on_first_process(lambda parts: self._found(_halves(parts)).point))
        return self.curve[-1]["above_null"] >= self.config.ica_until_reliable

    def _on_first_process(self, work: Callable[[list[list[ActivationSketch]]], Any]) -> Any:
        """For every process, what `work` gives on the first one with the parts of all processes.

        Its argument has one list for each part, with one entry for each process.
        """
        for part in self.parts:
            part.finish()
        if self.share[1] == 1:
            return work([[part] for part in self.parts])
        self.ranks.meet()
        gathered: list | None = [None] * self.share[1] if self.share[0] == 0 else None
        dist.gather_object([_compact(part.state_dict()) for part in self.parts], gathered)
        outcome, failure = [None], None
        if self.share[0] == 0:
            of_processes = []
            for process, states in enumerate(gathered):
                of_processes.append(self._empty(process))
                for part, state in zip(of_processes[-1], states, strict=True):
                    part.load_state_dict(state)
            try:
                outcome = [work([list(entries) for entries in zip(*of_processes, strict=True)])]
            except Exception as error:  # the others wait for an answer
                failure = error
        self.ranks.meet(failure)
        dist.broadcast_object_list(outcome)
        return outcome[0]

    def _found(self, halves: list[list[ActivationSketch]]) -> _Found:
        return _Found(decompose(halves, self.ica, self.units), null_reliability(halves, self.ica, self.units))

    def _templates(self, parts: list[list[ActivationSketch]]):
        """The group's template, those of the datasets, and the last point of the curve."""
        found = self._found(_halves(parts))
        result = found.result
        if not (result.converged or self.config.ica_surrogate):  # without networks there is nothing to converge to
            logger.warning(
                f"FastICA did not reach its tolerance (the last step changed a direction by {result.change:.1g}); the "
                "weakest networks may not replicate: give more tokens (ica_max_tokens), or ask for fewer "
                "components (ica_components)"
            )
        self._warn_of_massive(result.moments)
        template = self._template(found, self.shown, self._sha256())
        if len(self.names) == 1:
            return template, {}, found.point
        of_datasets = {}
        for number, name in enumerate(self.names):
            own = self._found(_halves(parts[2 * number : 2 * number + 2]))
            of_datasets[name] = self._template(own, [self.shown[number]], self._sha256(number))
        for name, other in zip(self.shown, of_datasets.values(), strict=True):
            for component, counterpart in zip(template.components, recurrence(template, other), strict=True):
                component.recurrence[name] = counterpart
        return template, of_datasets, found.point

    def _warn_of_massive(self, moments: Moments) -> None:
        if self.units.drop_massive is not None:
            left_out = int(self.units.excluded(moments).sum())
            logger.warning(f"{left_out} neurons with massive activations are left out (ica_drop_massive)")
        massive = self.units.massive(moments).nonzero().flatten().tolist()
        if massive:
            strongest = max(massive, key=lambda column: float(moments.variance[column]))
            layer = next(layer for layer, columns in self.reader.columns.items() if strongest < columns.stop)
            of_layer = "of their layer " if self.units.standardize == "layer" else ""
            logger.warning(
                f"{len(massive)} neurons are massive (most of all neuron "
                f"{strongest - self.reader.columns[layer].start} of layer {layer}): by themselves they vary more than "
                f"all weaker neurons {of_layer}together, and are counted as varying as much; ica_drop_massive leaves "
                "out neurons so much stronger than their layer"
            )

    def _template(self, found: _Found, names: list[str], sha256: str) -> FunctionalNetworkTemplate:
        config, columns, result = self.config, self.reader.columns, found.result
        statistics = {layer: result.moments.stored(part) for layer, part in columns.items()}
        return FunctionalNetworkTemplate(
            base_model=model_name(self.model),
            revision=getattr(self.model.config, "_commit_hash", None),
            architecture=type(self.model).__name__,
            site=config.ica_site,
            settings=config.discovery_settings(),
            calibration={"sources": list(names), "tokens": result.moments.count, "sha256": sha256},
            threshold=config.threshold_rule() or ThresholdRule(),
            null=found.null,
            components=[
                Component(*values)
                for values in zip(
                    result.explained_variance, result.kurtosis, result.reliability, result.jaccard, strict=True
                )
            ],
            loadings={layer: result.loadings[:, part].clone() for layer, part in columns.items()},
            mean={layer: mean.clone() for layer, (mean, _) in statistics.items()},
            rms={layer: rms.clone() for layer, (_, rms) in statistics.items()},
            weights=self.weights,
        )
