"""KeptDirections: the directions in which the inputs of linear layers lie on texts that are to be kept.

A change D of a linear layer with D U = 0 does not answer to what the text sends through it along U. Position 0, the
attention sink, comes first: its activations are of a size and direction of their own. The mean of all other tokens is
next, then the leading eigenvectors of their uncentred second moment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from tqdm.auto import tqdm

from ..compat.torch import exact
from ..errors import FNSFTError
from ..neurons.sites import linear_shape
from .inputs import batches_of, module_named, run_taps, shared_inputs
from .moments import Moments
from .sinks import SinkCount, SinkCounter
from .sketch import ActivationSketch


POSITION_0, MEAN = 0, 1  # the first two directions
LEADING = 2  # how many come before the leading ones

_SQUARE = 2048  # widest input of which the whole second moment is kept; wider ones are sketched
_INDEPENDENT = 1e-4  # least share of a vector that lies outside the directions before it


@dataclass(frozen=True)
class KeptText:
    """A text to keep.

    Attributes:
        sequences (`list[list[int]]`): token ids; a sequence begins where the model does, at position 0.
        share (`float`): its weight beside other texts.
    """

    sequences: list[list[int]]
    share: float = 1.0

    @property
    def tokens(self) -> int:
        """All but the first of each sequence."""
        return sum(len(ids) - 1 for ids in self.sequences)


@dataclass(frozen=True)
class InputDirections:
    """The directions of one input.

    Attributes:
        modules (`tuple[str, ...]`): the linear modules that read it.
        basis (`torch.Tensor`): orthonormal columns, shape (width, directions), float64, on the CPU: position 0, the
            mean of the others, then the leading ones.
        mean (`torch.Tensor`): of all tokens but the first of each sequence, shape (width,), float64.
    """

    modules: tuple[str, ...]
    basis: torch.Tensor = field(repr=False)
    mean: torch.Tensor = field(repr=False)

    @property
    def width(self) -> int:
        """Of the input."""
        return len(self.mean)


@dataclass(frozen=True)
class KeptDirections:
    """
    The directions of the inputs of a model's linear modules on texts that are to be kept.

    The first m columns of every basis are what one would have asked for with m: choices are nested.

    Attributes:
        inputs (`tuple[InputDirections, ...]`): each input once, however many modules read it.
        sinks (`dict[str, SinkCount]`): name of a text -> its attention sinks beside position 0.
    """

    inputs: tuple[InputDirections, ...]
    sinks: dict[str, SinkCount] = field(default_factory=dict)

    @classmethod
    def find(
        cls,
        model: nn.Module,
        modules: Sequence[str],
        texts: Mapping[str, KeptText],
        *,
        leading: int,
        batch_size: int = 8,
        title: str | None = "directions",
    ) -> KeptDirections:
        """Read the inputs of linear modules in one pass over texts.

        Only activations are needed: weights may be quantised or spread over devices. Adapters are to be off.

        Args:
            model: a transformers model, plain or in a `PeftModel`.
            modules: names of linear modules in the base model.
            texts: name -> text. Each counts by its share, however long it is.
            leading: how many leading directions are found, beside position 0 and the mean; 0 for none.
            batch_size: sequences in a forward pass.
            title: of the progress bar; `None` for none.

        Raises:
            FNSFTError: a module that is not linear or is not reached, or an activation that is NaN or infinite.
        """
        groups = shared_inputs(model, modules, next(iter(texts.values())).sequences[0])
        sums = {group: InputSums(linear_shape(module_named(model, group[0]))[0], leading) for group in groups}
        total = sum(text.share for text in texts.values())
        sinks = SinkCounter(groups)
        with tqdm(total=sum(len(t.sequences) for t in texts.values()), desc=title, disable=title is None) as bar:
            for name, text in texts.items():
                weight = text.share / total
                shares = (weight / len(text.sequences), weight / max(1, text.tokens))
                for inputs, first, others in batches_of(text.sequences, batch_size):

                    def read(group, rows, first=first, others=others, shares=shares):
                        sinks.add(group, rows[first].norm(dim=-1), rows[others].norm(dim=-1))
                        sums[group].add(rows[first], rows[others], *shares)

                    run_taps(model, groups, inputs, read)
                    sinks.end_batch(name, inputs["input_ids"].flatten()[others.cpu()])
                    bar.update(len(inputs["input_ids"]))
        found = (InputDirections(group, *sums[group].directions(group)) for group in groups)
        return cls(tuple(tqdm(found, f"{title}: bases", total=len(groups), disable=title is None)), sinks.counts())

    def of(self, module: str) -> InputDirections:
        """The input of a module."""
        return next(each for each in self.inputs if module in each.modules)

    def energy(
        self,
        model: nn.Module,
        text: KeptText,
        counts: Sequence[int],
        *,
        batch_size: int = 8,
        title: str | None = "energy",
    ) -> dict[int, float]:
        """How much of a text's energy the directions hold: the share of the squared norm of its inputs.

        Of all tokens but the first of each sequence, whose norm may be a thousand times that of others; the mean over
        inputs.

        Args:
            model: as in [`find`].
            text: any text.
            counts: numbers of directions.
            batch_size, title: as in [`find`].

        Returns:
            Number of directions -> share in [0, 1].
        """
        shares = self.energies(model, text, batch_size=batch_size, title=title)
        return {m: sum(float(s[min(m, len(s)) - 1]) for s in shares) / len(shares) if m else 0.0 for m in counts}

    def energies(
        self, model: nn.Module, text: KeptText, *, batch_size: int = 8, title: str | None = "energy"
    ) -> list[torch.Tensor]:
        """The same of each input: share that its first 1, 2, ... directions hold, shape (directions,).

        Args:
            model, text, batch_size, title: as in [`energy`].
        """
        groups = [each.modules for each in self.inputs]
        held = {each.modules: torch.zeros(each.basis.shape[1], dtype=torch.float64) for each in self.inputs}
        whole = dict.fromkeys(groups, 0.0)
        bases = {each.modules: each.basis for each in self.inputs}
        for inputs, _, others in tqdm(batches_of(text.sequences, batch_size), title, disable=title is None):

            def read(group, rows, others=others):
                rows = rows[others]  # (tokens, width)
                along = rows @ bases[group].to(rows)  # (tokens, directions)
                held[group] += exact(along).square().sum(0).cpu()
                whole[group] += float(exact(rows).square().sum())

            run_taps(model, groups, inputs, read)
        return [held[group].cumsum(0) / max(whole[group], 1e-300) for group in groups]

    def first(self, counts: Sequence[int]) -> KeptDirections:
        """The same with the first directions alone, of each input as many as are named."""
        kept = zip(self.inputs, counts, strict=True)
        return replace(self, inputs=tuple(replace(each, basis=each.basis[:, :count]) for each, count in kept))

    def random(self, *, seed: int) -> KeptDirections:
        """As many directions of each input, drawn at random: a control.

        Args:
            seed: of the draw.
        """
        generator = torch.Generator().manual_seed(seed)
        drawn = []
        for each in self.inputs:
            normal = torch.randn(each.basis.shape, generator=generator, dtype=torch.float64)
            drawn.append(replace(each, basis=torch.linalg.qr(normal).Q))
        return replace(self, inputs=tuple(drawn))

    def with_leading(self, leading: Mapping[str, torch.Tensor]) -> KeptDirections:
        """The same with other directions after position 0 and the mean; where none are given, with these two alone.

        Args:
            leading: name of a module -> directions of its input, shape (directions, width), of any length.
        """
        return replace(
            self,
            inputs=tuple(
                replace(
                    each,
                    basis=orthonormal(
                        each.basis[:, :LEADING],
                        *(rows.T for name, rows in leading.items() if name in each.modules),
                    ),
                )
                for each in self.inputs
            ),
        )


def orthonormal(*parts: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns that span those given, in their order; what adds no direction is left out.

    Args:
        parts: shape (width, columns), in float64.
    """
    columns = torch.cat([part.double() for part in parts], 1)
    found = columns.new_zeros(len(columns), min(columns.shape))
    count = 0
    for column in columns.T:
        norm = column.norm()
        for _ in range(2):  # the second time for what rounding left
            column = column - found[:, :count] @ (found[:, :count].T @ column)
        if count < found.shape[1] and norm > 0 and column.norm() > _INDEPENDENT * norm:
            found[:, count] = column / column.norm()
            count += 1
    return found[:, :count]


class InputSums:
    """Mean of position 0, mean of the others, and what their second moment is found from; of one input.

    Attributes:
        tokens (`int`): all but the first of each sequence.
    """

    def __init__(self, width: int, leading: int) -> None:
        self.width, self.leading = width, leading
        self.first = self.mean = self.second = self.sketch = self.device = None
        self.sequences = self.tokens = 0
        self._rows: list[torch.Tensor] = []  # of the sketches that this was merged from

    def add(self, first: torch.Tensor, others: torch.Tensor, of_first: float, of_other: float) -> None:
        """Add tokens, each by its share; of a model on several devices, they may lie on another one than the sums."""
        if self.first is None:
            self.begin(first.device)
        first, others = first.to(self.device), others.to(self.device)
        self.sequences += len(first)
        self.tokens += len(others)
        self.first += of_first * exact(first.sum(0))
        self.mean += of_other * exact(others.sum(0))
        weighted = others * of_other**0.5
        if self.sketch is None:
            self.second.addmm_(weighted.T, weighted)
        else:
            self.sketch.update(weighted)

    def begin(self, device: torch.device | str) -> None:
        """Of no token yet."""
        self.device = device
        self.first = exact(torch.zeros(self.width, device=device))
        self.mean = torch.zeros_like(self.first)
        if self.width <= _SQUARE:
            self.second = torch.zeros(self.width, self.width, device=device)
        else:
            rank = min(self.width, 2 * self.leading + 8)
            self.sketch = ActivationSketch(self.width, rank, reservoir=0, seed=0, device=device)

    @classmethod
    def merged(cls, texts: Sequence[Sequence[InputSums]]) -> InputSums:
        """The sums of several texts, each of which counts alike; of each, the parts that were added with shares of 1.

        Args:
            texts: of each text its parts, none of them empty.
        """
        one = texts[0][0]
        found = cls(one.width, one.leading)
        found.begin("cpu")
        found.sketch = None
        for parts in texts:
            of_first = 1 / (len(texts) * sum(part.sequences for part in parts))
            of_other = 1 / (len(texts) * max(1, sum(part.tokens for part in parts)))
            for part in parts:
                found.first += of_first * part.first.cpu()
                found.mean += of_other * part.mean.cpu()
                found.tokens += part.tokens
                if part.sketch is None:
                    found.second += of_other * part.second.cpu()
                else:
                    found._rows += [of_other**0.5 * rows for rows in _sketched(part.sketch)]
        return found

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All of it as tensors, once it has begun."""
        state = {"first": self.first, "mean": self.mean, "counts": torch.tensor([self.sequences, self.tokens])}
        if self.sketch is None:
            return state | {"second": self.second}
        return state | {f"sketch.{name}": value for name, value in self.sketch.state_dict().items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what [`state_dict`] gave."""
        self.first, self.mean = (state[name].to(self.first.device) for name in ("first", "mean"))
        self.sequences, self.tokens = state["counts"].tolist()
        if self.sketch is None:
            self.second = state["second"].to(self.second.device)
        else:
            self.sketch.load_state_dict(
                {name.removeprefix("sketch."): value for name, value in state.items() if name.startswith("sketch.")}
            )

    def directions(self, modules: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Basis and mean."""
        mean = self.mean.cpu()
        start = orthonormal(self.first.cpu()[:, None], mean[:, None])
        if not start.shape[1]:
            raise FNSFTError(
                f"all inputs of {modules[0]} are zero on the texts to keep, so they have no direction; give other "
                "texts"
            )
        count = min(self.leading, self.width - start.shape[1])
        return orthonormal(start, *([self._leading(start)[:, :count]] if count else [])), mean

    def _leading(self, start: torch.Tensor) -> torch.Tensor:
        """Eigenvectors of the second moment outside of some directions, descending, shape (width, found)."""
        if self.second is not None:
            outside = start.to(self.second)
            rest = self.second - outside @ (outside.T @ self.second)
            rest = rest - (rest @ outside) @ outside.T
            return torch.linalg.eigh((rest + rest.T) / 2).eigenvectors.flip(1).cpu().double()
        rows = torch.cat(self._rows or _sketched(self.sketch))
        rows = rows - (rows @ start) @ start.T
        return torch.linalg.svd(rows, full_matrices=False).Vh.T


def _sketched(sketch: ActivationSketch) -> list[torch.Tensor]:
    """Rows whose second moment is that of a sketch about zero, in float64 on the CPU."""
    sketch.finish()
    moments: Moments = sketch.moments
    return [sketch.rows.cpu().double(), (moments.count**0.5 * moments.mean[None]).cpu()]
