"""TokenPlaces: where the tokens of a forward pass stand in their sequences, and which of them are to be changed."""

from collections.abc import Sequence

import torch
from torch import nn

from ..errors import FNSFTError
from ..neurons.sites import base_model


class TokenPlaces:
    """Follows the passes of a causal language model, those with a KV cache too.

    Positions are counted as they stand in the inputs, padding included.

    Args:
        model: the model; it is watched from now on.

    Raises:
        FNSFTError: it is an encoder with a decoder, whose tokens stand in two sequences.
    """

    def __init__(self, model: nn.Module) -> None:
        model = base_model(model)
        if model.config.is_encoder_decoder:
            raise FNSFTError(
                "where a token stands is known of a causal language model only; this one has an encoder: ablate all "
                "tokens, to zero or to their mean"
            )
        self.first: int | Sequence[int] | None = None
        self._past, self._length, self._rows = 0, 0, 0
        self.hook = model.register_forward_pre_hook(_Watch(self), with_kwargs=True)

    def begin(self, rows: int, length: int, past: int) -> None:
        """A pass begins, over so many rows of so many tokens each, after so many that are in the cache."""
        self._rows, self._length, self._past = rows, length, past
        if self.first is not None and not isinstance(self.first, int) and len(self.first) != rows:
            raise FNSFTError(
                f"the first position to change is given for {len(self.first)} rows, and the pass has {rows}"
            )

    def positions(self, values: torch.Tensor, tokens: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Positions of activations, and which of them are to be changed (`None`: all).

        Args:
            values: shape (..., m); without its last dimension, the tokens of the pass row by row, or `tokens` of them.
            tokens: numbers of the tokens, shape (tokens,), or `None` for all of them.
        """
        shape = values.shape[:-1]
        numbers = torch.arange(shape.numel(), device=values.device).view(shape) if tokens is None else tokens
        positions = self._past + numbers % self._length
        if self.first is None:
            return positions, None
        if isinstance(self.first, int):
            return positions, positions >= self.first
        first = torch.tensor(self.first, device=values.device)
        return positions, positions >= first[numbers // self._length]


class _Watch:
    """A pre-hook of the model; an object, so that a copy of the model has a copy of it."""

    def __init__(self, places: TokenPlaces) -> None:
        self.places = places

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs = kwargs.get("input_ids", args[0] if args else None)
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        cache = kwargs.get("past_key_values")
        self.places.begin(inputs.shape[0], inputs.shape[1], 0 if cache is None else cache.get_seq_length())
