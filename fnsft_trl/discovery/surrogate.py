"""Surrogate activations: each neuron's are shifted in time by itself, so that no two neurons do anything together.

Time-shifted surrogates (Andrzejak et al., 2003, "Bivariate surrogate techniques: necessity, strengths, and caveats"):
each neuron keeps its values, their distribution and, but for one seam, their order in time. What is found in them all
the same, every neuron could have made alone.
"""

import torch

from .moments import COLUMNS


def shifted_in_time(rows: torch.Tensor, *, seed: int) -> torch.Tensor:
    """Activations in which every neuron is moved along the tokens, round and round, as far as it draws.

    What is left of a correlation between two neurons is one part in as many as there are tokens, for so often they
    draw the same.

    Args:
        rows: shape (tokens, neurons).
        seed: of the draws.

    Returns:
        The same shape; column j holds the values of column j.
    """
    tokens, neurons = rows.shape
    random = torch.Generator().manual_seed(seed)
    shift = torch.randint(tokens, (neurons,), generator=random).to(rows.device)
    moved = torch.empty_like(rows)
    places = torch.arange(tokens, device=rows.device)[:, None]
    for start in range(0, neurons, COLUMNS):
        columns = slice(start, start + COLUMNS)
        moved[:, columns] = rows[:, columns].gather(0, (places + shift[columns]) % tokens)
    return moved
