"""Token sequences -> activations: a forward pass, read at the sites, without padding, special tokens and sinks."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.utils import logging

from ..compat.accelerate import input_device
from ..data.sequences import TokenSequence
from ..errors import FNSFTError
from ..neurons.sites import NeuronSite, base_model


logger = logging.get_logger(__name__)

_LARGEST_BLOCK = 4 * 2**30  # bytes
_SORT_WINDOW = 16  # batches whose sequences are sorted by length together, so that little padding is computed


@dataclass
class ActivationBlock:
    """What one forward pass gave.

    Attributes:
        batch (`int`): number of the batch, over all texts.
        rows (`torch.Tensor`): shape (tokens, neurons), valid until the next block is asked for. Empty when the batch
            is another process's, or was read before.
        parts (`torch.Tensor`): shape (tokens,), on the CPU: `2 * text source + half` of each row.
    """

    batch: int
    rows: torch.Tensor
    parts: torch.Tensor


class ActivationReader:
    """Streams the activations of all sites, side by side, over any number of texts.

    Memory is one forward pass and one block of `batch_size * max_length * neurons` numbers, whatever the number of
    texts. Where such a block would be over 4 GiB, fewer sequences are read in a pass, one at least.

    Layers may be on several devices, or be loaded for each use (`device_map`, offloading): what a layer computes is
    copied from where it lives.

    Args:
        model: the transformer. Only its backbone runs; the language-model head is left out.
        sites: the sites to read, in the order of the columns.
        batch_size: sequences per forward pass, at most.
        max_length: longest sequence, in tokens.
        skip_tokens: first tokens of every sequence to leave out.
        special_ids: token ids to leave out.
        dtype: dtype of the rows.

    Attributes:
        columns (`dict[int, slice]`): the columns of each layer.
        digests (`list`): SHA-256 over the ids of the tokens read so far, of each source.
        tokens (`list[int]`): number of tokens read so far, of each source.
        source (`int`): number of the source that is read.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[NeuronSite],
        *,
        batch_size: int,
        max_length: int,
        skip_tokens: int,
        special_ids: Iterable[int],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model = model
        self.sites = list(sites)
        self.skip_tokens = skip_tokens
        self.device = input_device(model)
        self.digests: list = []
        self.tokens: list[int] = []
        self.source = 0
        self.columns: dict[int, slice] = {}
        start = 0
        for site in self.sites:
            self.columns[site.layer] = slice(start, start + site.width)
            start += site.width
        self.width = start
        sequence = max_length * start * dtype.itemsize  # bytes
        self.batch_size = min(batch_size, max(1, _LARGEST_BLOCK // sequence))
        if self.batch_size < batch_size:
            logger.warning(
                f"the activations of {batch_size} sequences of {max_length} tokens at {start} neurons would be "
                f"{batch_size * sequence / 2**30:.1f} GiB: {self.batch_size} are read in a pass, "
                f"{self.batch_size * sequence / 2**30:.1f} GiB"
            )
        self._special_ids = torch.tensor(sorted(special_ids), dtype=torch.long)
        self._block = torch.empty(self.batch_size * max_length, start, dtype=dtype, device=self.device)
        self._kept = torch.empty(0, dtype=torch.long)
        self._row_of = torch.empty(0, dtype=torch.long)
        self._reached: set[int] = set()

    def read(
        self,
        sources: Sequence[Iterable[TokenSequence]],
        *,
        max_tokens: int,
        first_batch: int = 0,
        share: tuple[int, int] = (0, 1),
        description: str = "activations",
    ) -> Iterator[ActivationBlock]:
        """Yield a block for every batch until the sources or `max_tokens` are exhausted.

        Args:
            sources: the sequences of each text source; their batches take turns.
            max_tokens: of each source.
            first_batch: batches before this one are counted and not run.
            share: (i, n): of n processes this is number i, and runs the batches with `batch % n == i`.
            description: of the progress bar.

        Raises:
            FNSFTError: an activation is NaN or infinite; the message names batch, layer and neuron.
        """
        backbone = base_model(self.model).base_model
        was_training = backbone.training
        handles = [handle for site in self.sites for handle in site.tap(self._writer(site))]
        self.tokens = [0] * len(sources)
        self.digests = [hashlib.sha256() for _ in sources]
        index, count = share
        try:
            backbone.eval()
            with tqdm(total=max_tokens * len(sources), unit=" tokens", desc=description, disable=index > 0) as bar:
                for number, (source, batch) in enumerate(self._turns(sources, max_tokens)):
                    ids, present = batch_inputs([sequence.ids for sequence in batch])
                    keep = present.bool() & ~torch.isin(ids, self._special_ids)
                    keep[:, : self.skip_tokens] = False
                    left = max_tokens - self.tokens[source]
                    kept = keep.flatten().nonzero().flatten()[:left]  # (tokens,)
                    self.digests[source].update(ids.flatten()[kept].numpy().tobytes())
                    self.tokens[source] += len(kept)
                    bar.update(len(kept))
                    if number < first_batch or number % count != index or len(kept) == 0:
                        yield ActivationBlock(number, self._block[:0], kept[:0])
                        continue
                    self._prepare(kept, ids.numel())
                    self.source = source
                    inputs = {"input_ids": ids.to(self.device), "attention_mask": present.to(self.device)}
                    if backbone.config.is_encoder_decoder:
                        inputs["decoder_input_ids"] = decoder_ids(self.model, inputs["input_ids"])
                    with torch.no_grad():
                        backbone(**inputs, use_cache=False)
                    self._check_reached()
                    rows = self._block[: len(kept)]
                    self._check_finite(rows, number)
                    half = torch.tensor([sequence.half for sequence in batch])
                    yield ActivationBlock(number, rows, 2 * source + half[kept // ids.shape[1]])
        finally:
            for handle in handles:
                handle.remove()
            backbone.train(was_training)

    def _check_finite(self, rows: torch.Tensor, number: int) -> None:
        finite = torch.isfinite(rows.sum(0))  # (neurons,)
        if finite.all():
            return
        column = int((~finite).nonzero()[0])
        layer = next(layer for layer, columns in self.columns.items() if column < columns.stop)
        raise FNSFTError(
            f"batch {number}: the activation of neuron {column - self.columns[layer].start} in layer {layer} is NaN "
            "or infinite; check the model's weights, or load it in float32"
        )

    def _turns(
        self, sources: Sequence[Iterable[TokenSequence]], max_tokens: int
    ) -> Iterator[tuple[int, list[TokenSequence]]]:
        """(source, batch): a batch of each source in turn, while it has any and its tokens are below the limit."""
        batches = {source: self._batches(sequences) for source, sequences in enumerate(sources)}
        while batches:
            for source in list(batches):
                batch = next(batches[source], None) if self.tokens[source] < max_tokens else None
                if batch is None:
                    del batches[source]
                else:
                    yield source, batch

    def _batches(self, sequences: Iterable[TokenSequence]) -> Iterator[list[TokenSequence]]:
        window: list[TokenSequence] = []
        for sequence in sequences:
            window.append(sequence)
            if len(window) == _SORT_WINDOW * self.batch_size:
                yield from self._sorted_batches(window)
                window = []
        yield from self._sorted_batches(window)

    def _sorted_batches(self, window: list[TokenSequence]) -> Iterator[list[TokenSequence]]:
        ordered = sorted(window, key=lambda sequence: len(sequence.ids))
        for start in range(0, len(ordered), self.batch_size):
            yield ordered[start : start + self.batch_size]

    def _prepare(self, kept: torch.Tensor, positions: int) -> None:
        self._kept = {torch.device("cpu"): kept}  # by device, on which a layer may be
        rows = torch.full((positions,), -1)  # row of the block, for each position of the batch
        rows[kept] = torch.arange(len(kept))
        self._row_of = rows.to(self.device)
        self._reached = set()
        for site in self.sites:
            if site.experts:  # they write the tokens that are routed to them
                self._block[: len(kept), self.columns[site.layer]] = 0

    def _writer(self, site: NeuronSite):
        start = self.columns[site.layer].start

        def write(values: torch.Tensor, neurons: slice, tokens: torch.Tensor | None) -> None:
            self._reached.add(site.layer)
            columns = slice(start + neurons.start, start + neurons.stop)
            values = values.reshape(-1, values.shape[-1])  # (sequences * positions, or tokens; neurons)
            if tokens is None:
                if values.device not in self._kept:
                    self._kept[values.device] = self._kept[torch.device("cpu")].to(values.device)
                kept = values[self._kept[values.device]]
                self._block[: len(kept), columns] = kept.to(self._block)
                return
            rows = self._row_of[tokens.to(self.device)]
            wanted = rows >= 0
            self._block[rows[wanted], columns] = values.to(self._block)[wanted]

        return write

    def _check_reached(self) -> None:
        missing = [site for site in self.sites if site.layer not in self._reached]
        if missing:
            raise FNSFTError(
                f"the forward pass on text did not reach layer {missing[0].layer} ({missing[0].name}); leave such "
                "layers out (ica_layers), or switch off kernels that replace whole MLPs (use_kernels=False)"
            )


def batch_inputs(sequences: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask of sequences, padded on the right, both of shape (sequences, positions)."""
    ids = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.long)
    present = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        present[row, : len(sequence)] = 1
    return ids, present


def decoder_ids(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """What the decoder of an encoder-decoder reads: the ids, moved right by one position.

    Args:
        model: the encoder-decoder, plain or in a `PeftModel`.
        ids: shape (sequences, positions).

    Raises:
        FNSFTError: it has no method that makes it.
    """
    whole = base_model(model)
    shift = getattr(whole, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        raise FNSFTError(
            f"{type(whole).__name__} is an encoder-decoder without a method that makes the decoder's input; load it "
            "with its language-model head (AutoModelForSeq2SeqLM)"
        )
    return shift(labels=ids)
