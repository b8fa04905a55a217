"""Restoring: what a fine-tune has changed in a linear map, taken back along directions of its input.

A change D, shape (out, in), projected off orthonormal directions U, shape (in, m), is D (I - U U^T). What the map
makes of any input along U is then what it made of it before the training. Each kind of change keeps its form.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch


@dataclass(frozen=True)
class Restoration:
    """
    One way to take a change back.

    Attributes:
        directions (`int`): how many directions it is projected off: position 0, the mean, then leading ones.
        scale (`float`): what is left of it is multiplied by this.
        is_centred (`bool`): whether what it makes of the mean input is taken out by a bias.
        networks (`str`): the networks whose directions take the place of the leading ones; empty for none.
        neurons (`str`): the networks whose own neurons alone are scaled; empty for the whole change.
    """

    directions: int = 0
    scale: float = 1.0
    is_centred: bool = False
    networks: str = ""
    neurons: str = ""

    @property
    def name(self) -> str:
        """What a report calls it."""
        off = ["position 0", "mean"][: self.directions]
        if self.is_centred:
            off.append("centred")
        if self.networks:
            off.append(f"networks {self.networks}")
        elif self.directions > 2:
            off.append(f"{self.directions - 2} leading")
        parts = ["off " + ", ".join(off)] if off else []
        scaled = f"neurons of networks {self.neurons} scaled by" if self.neurons else "scaled by"
        parts += [f"{scaled} {self.scale:g}"] if self.scale != 1 else []
        return "; ".join(parts) or "as trained"

    @property
    def removes_bias(self) -> bool:
        """Whether a trained bias, which answers to every text alike, goes with the mean."""
        return self.directions > 1 or self.is_centred


@dataclass(frozen=True)
class Positions:
    """Where some neurons are in one linear map.

    Attributes:
        numbers (`torch.Tensor`): among the outputs or the inputs, shape (positions,).
        side (`str`): `"output"` or `"input"`.
    """

    numbers: torch.Tensor
    side: str

    def factors(self, scale: float, at: torch.Tensor) -> torch.Tensor:
        """`scale` at these and 1 elsewhere, of some positions, shape (at,), float64."""
        ones = torch.ones(len(at), dtype=torch.float64)
        return ones.masked_fill(torch.isin(at, self.numbers), scale)


class Change(Protocol):
    """A change of one linear map."""

    def restored(self, basis: torch.Tensor, mean: torch.Tensor, how: Restoration) -> Change:
        """What is left of it.

        Args:
            basis: orthonormal columns, shape (in, directions), float64: those that it is projected off.
            mean: of the input, shape (in,), float64.
            how: the rest of what is done.
        """

    def scaled(self, scale: float, neurons: Positions) -> Change:
        """The change with what belongs to some neurons multiplied."""

    def left_in(self, basis: torch.Tensor) -> tuple[float, float]:
        """Frobenius norms of D U and of D."""


@dataclass(frozen=True)
class LoraChange:
    """D = B A, and a bias. The rank stays: A is projected.

    Attributes:
        a (`torch.Tensor`): shape (rank, in).
        b (`torch.Tensor`): shape (out, rank).
        bias (`torch.Tensor`, *optional*): shape (out,).
    """

    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None = None

    def restored(self, basis: torch.Tensor, mean: torch.Tensor, how: Restoration) -> LoraChange:
        """As [`Change`] says."""
        a = projected(self.a.double(), basis)
        b = how.scale * self.b.double()
        bias = _biased(self.bias, how)
        if how.is_centred:
            bias = (-b @ (a @ mean)).to(self.b.dtype)
        return LoraChange(a.to(self.a.dtype), b.to(self.b.dtype), bias)

    def scaled(self, scale: float, neurons: Positions) -> LoraChange:
        """As [`Change`] says."""
        if neurons.side == "input":
            return replace(self, a=_times(self.a, neurons.factors(scale, torch.arange(self.a.shape[1]))))
        factors = neurons.factors(scale, torch.arange(len(self.b)))
        bias = None if self.bias is None else _times(self.bias, factors)
        return replace(self, b=_times(self.b, factors[:, None]), bias=bias)

    def left_in(self, basis: torch.Tensor) -> tuple[float, float]:
        """As [`Change`] says."""
        a, b = self.a.double(), self.b.double()
        square = b.T @ b  # (rank, rank): the norm of B X needs no product of the size of the map
        along = a @ basis
        norms = [((square @ x) * x).sum().clamp_min(0).sqrt() for x in (along, a)]  # NaN stays NaN
        return float(norms[0]), float(norms[1])


@dataclass(frozen=True)
class RowsChange:
    """Rows of D, and what they add to the bias.

    Attributes:
        rows (`torch.Tensor`): shape (rows, in).
        bias (`torch.Tensor`, *optional*): shape (rows,).
        positions (`torch.Tensor`, *optional*): of the rows among the outputs, shape (rows,); all of them by default.
    """

    rows: torch.Tensor
    bias: torch.Tensor | None = None
    positions: torch.Tensor | None = None

    def restored(self, basis: torch.Tensor, mean: torch.Tensor, how: Restoration) -> RowsChange:
        """As [`Change`] says."""
        rows = how.scale * projected(self.rows.double(), basis)
        return replace(self, rows=rows.to(self.rows.dtype), bias=_biased(self.bias, how))

    def scaled(self, scale: float, neurons: Positions) -> RowsChange:
        """As [`Change`] says."""
        if neurons.side == "input":
            return replace(self, rows=_times(self.rows, neurons.factors(scale, torch.arange(self.rows.shape[1]))))
        positions = torch.arange(len(self.rows)) if self.positions is None else self.positions
        factors = neurons.factors(scale, positions)
        bias = None if self.bias is None else _times(self.bias, factors)
        return replace(self, rows=_times(self.rows, factors[:, None]), bias=bias)

    def left_in(self, basis: torch.Tensor) -> tuple[float, float]:
        """As [`Change`] says."""
        rows = self.rows.double()
        return float((rows @ basis).norm()), float(rows.norm())


@dataclass(frozen=True)
class ColumnsChange:
    """Columns of D: it answers to the inputs at some positions alone.

    Then D U = C^T U_S, with U_S the rows of U at the positions, so C is projected off the columns of U_S. Where they
    are as many as the positions, nothing is left.

    Attributes:
        columns (`torch.Tensor`): C, shape (positions, out).
        positions (`torch.Tensor`): among the inputs, shape (positions,).
    """

    columns: torch.Tensor
    positions: torch.Tensor

    def restored(self, basis: torch.Tensor, mean: torch.Tensor, how: Restoration) -> ColumnsChange:
        """As [`Change`] says."""
        left, singular, _ = torch.linalg.svd(basis[self.positions], full_matrices=False)
        spanned = left[:, singular > 1e-10]  # (positions, rank); columns of U are of norm 1
        columns = how.scale * projected(self.columns.double().T, spanned).T
        return replace(self, columns=columns.to(self.columns.dtype).contiguous())

    def scaled(self, scale: float, neurons: Positions) -> ColumnsChange:
        """As [`Change`] says."""
        return replace(self, columns=_times(self.columns, neurons.factors(scale, self.positions)[:, None]))

    def left_in(self, basis: torch.Tensor) -> tuple[float, float]:
        """As [`Change`] says."""
        columns = self.columns.double()
        return float((columns.T @ basis[self.positions]).norm()), float(columns.norm())


def projected(rows: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Rows without what they have along directions.

    Args:
        rows: shape (rows, in).
        basis: orthonormal columns, shape (in, directions).
    """
    return rows - (rows @ basis) @ basis.T


def _times(values: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    return (values.double() * factors).to(values.dtype)


def _biased(bias: torch.Tensor | None, how: Restoration) -> torch.Tensor | None:
    if bias is None:
        return None
    return torch.zeros_like(bias) if how.removes_bias else (how.scale * bias.double()).to(bias.dtype)
