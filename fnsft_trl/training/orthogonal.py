"""OrthogonalFactors: LoRA in directions in which no earlier adapter reads.

Wang et al. (2023), "Orthogonal Subspace Learning for Language Model Continual Learning" (O-LoRA), EMNLP Findings,
equations 5 to 7. A task t trains a LoRA of its own, D = B_t A_t, on the model with all earlier ones merged. With the
earlier A_i, shape (r_i, in), and A_t, shape (r, in), of every module

    L = L_task + w sum over i of || A_i A_t^T ||^2  (the sum of the squared entries).

The paper's scripts sum the absolute values instead, with a weight of 0.5. Entries of a fresh A lie evenly between
-1 / sqrt(in) and 1 / sqrt(in), so that two rows have a product of about 1 / (3 sqrt(in)), and w = 0.75 sqrt(in) begins
with the gradient of the scripts.

With an infinite weight, A_t is projected off the span of the earlier rows at its start and after each step, which is
where a growing weight leads.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from ..compat.torch import exact
from ..errors import FNSFTError
from ..finite import largest
from ..tuner.saved import SavedAdapter
from .elastic import add_to_gradient
from .penalty_config import PenaltyConfig


_FACTOR = ".lora_A."
_RANK = 1e-6  # of singular values beside the largest


class OrthogonalFactors:
    """The factors A of earlier adapters, by module.

    Args:
        config ([`PenaltyConfig`]): what is asked for.

    Attributes:
        earlier (`dict[str, torch.Tensor]`): name of a module -> rows of all earlier A, shape (rows, in), float32.

    Raises:
        FNSFTError: a directory holds no LoRA adapter.
    """

    def __init__(self, config: PenaltyConfig) -> None:
        self.weight = config.olora_weight
        rows: dict[str, list[torch.Tensor]] = {}
        for directory in config.olora_adapters or ():
            for name, factor in _factors(directory).items():
                rows.setdefault(name, []).append(factor)
        self.earlier = {name: torch.cat(parts) for name, parts in rows.items()}
        self._bases: dict[str, torch.Tensor] = {}  # orthonormal columns of the same span, shape (in, rank)

    def begin(self, model: nn.Module) -> None:
        """Take the model that is to be trained.

        Raises:
            FNSFTError: none of its modules has a LoRA that earlier adapters have too, or theirs leave it no direction.
        """
        trained = lora_factors(model)
        common = [name for name in trained if name in self.earlier]
        if not common:
            raise FNSFTError(
                "olora compares the factors A of LoRA with those of earlier adapters, and none of the modules that "
                "train has one in olora_adapters; train LoRA (use_peft) on the same modules"
            )
        self.earlier = {name: self.earlier[name].to(trained[name].device) for name in common}
        for name in common:
            if self.earlier[name].shape[1] != trained[name].shape[1]:
                raise FNSFTError(
                    f"olora_adapters read {self.earlier[name].shape[1]} channels at {name}, and the model has "
                    f"{trained[name].shape[1]}; they are of another model"
                )
        if math.isinf(self.weight):
            for name in common:
                _, singular, right = torch.linalg.svd(exact(self.earlier[name]), full_matrices=False)
                self._bases[name] = right[singular > _RANK * singular[0]].T.contiguous()
                width, rank = self._bases[name].shape
                if rank == width:
                    raise FNSFTError(
                        f"the earlier adapters read in all {width} directions of the input of {name}, so olora=inf "
                        "leaves none to train; give a finite weight, or a smaller lora_r"
                    )
            self.project(model)

    def add_gradient(self, model: nn.Module, scale: float) -> float:
        """Add that of the penalty, 2 w (A_t A_i^T) A_i, times a scale; gives the penalty itself, in nats."""
        if math.isinf(self.weight):
            return 0.0
        penalty = 0.0
        for name, factor in lora_factors(model).items():
            if name in self.earlier:
                products = factor.detach().float() @ self.earlier[name].T  # (r, rows)
                penalty += self.weight * float(products.square().sum())
                add_to_gradient(factor, 2 * self.weight * (products @ self.earlier[name]), scale)
        return penalty

    def attach(self, optimizer: Optimizer, model: nn.Module) -> None:
        """With an infinite weight: project after each step."""
        if math.isinf(self.weight):
            optimizer.register_step_post_hook(lambda *_: self.project(model))

    @torch.no_grad()
    def project(self, model: nn.Module) -> None:
        """Take out of each A what lies in the span of earlier rows."""
        for name, factor in lora_factors(model).items():
            if name in self._bases:
                basis, values = self._bases[name], exact(factor)
                factor.copy_(values - (values @ basis) @ basis.T)

    def overlap(self, model: nn.Module) -> float:
        """The largest |A_i A_t^T| of any module, as a share of the norms of the two rows."""
        found = []
        for name, factor in lora_factors(model).items():
            if name in self.earlier:
                rows, others = (nn.functional.normalize(exact(f.detach())) for f in (factor, self.earlier[name]))
                found.append(float((rows @ others.T).abs().max()))
        return largest(found)


def lora_factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name of a module -> the factor A of its LoRA that trains, shape (r, in)."""
    return {_module_of(name): p for name, p in model.named_parameters() if p.requires_grad and _FACTOR in name}


def _module_of(name: str) -> str:
    return name.partition(_FACTOR)[0].removeprefix("base_model.model.")


def _factors(directory: str) -> Mapping[str, torch.Tensor]:
    tensors = SavedAdapter.read(Path(directory).expanduser()).tensors
    found = {_module_of(name): t.float() for name, t in tensors.items() if _FACTOR in name and t.dim() == 2}
    if not found:
        raise FNSFTError(f"olora_adapters names {directory}, which holds no factors of LoRA; name LoRA adapters")
    return found
