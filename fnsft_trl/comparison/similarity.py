"""How alike networks are: overlap of their neurons, correlation of their loadings, and how much of it chance gives."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..discovery.matching import SAME_NETWORK, correlation, dice, match_rows, overlap
from ..errors import FNSFTError
from ..template.template import FunctionalNetworkTemplate


@dataclass
class NetworkMatch:
    """Where a network of one template is found in another.

    Attributes:
        network (`int`): its number.
        partner (`int` or `None`): the network that one-to-one matching gives it; `None` when the other has too few.
        iou, dice, correlation (`float` or `None`): how alike the two are; `iou` and `dice` only in one model.
        same (`bool` or `None`): whether the IoU is above 0.2, the rule by which two networks count as the same.
        nearest (`int`): the network most like it, which several may share; by IoU, or by correlation.
        p_value (`float`): share of random permutations in which some network is as much like it as `nearest`.
    """

    network: int
    partner: int | None
    iou: float | None
    dice: float | None
    correlation: float | None
    same: bool | None
    nearest: int
    p_value: float


@dataclass
class TemplateComparison:
    """All networks of a template `a` compared with all of `b`.

    Attributes:
        iou (`torch.Tensor` or `None`): shape (networks of a, networks of b), in [0, 1].
        correlation (`torch.Tensor`): of the loadings, or of the time courses; of the same shape, in [0, 1].
        matches (`list[NetworkMatch]`): one for each network of `a`.
        null_correlation (`float`): mean |correlation| of one-to-one pairs after a random permutation.
        null_iou (`float` or `None`): mean IoU of the same.
    """

    iou: torch.Tensor | None
    correlation: torch.Tensor
    matches: list[NetworkMatch]
    null_correlation: float
    null_iou: float | None

    def mean(self, name: str) -> float | None:
        """Mean `"iou"`, `"dice"` or `"correlation"` of the one-to-one pairs; `None` where it is not known."""
        values = [getattr(match, name) for match in self.matches if match.partner is not None]
        return None if values[0] is None else sum(values) / len(values)

    @property
    def same(self) -> int | None:
        """How many networks of `a` are the same in `b`."""
        known = [match.same for match in self.matches if match.same is not None]
        return sum(known) if known else None

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            "mean_iou": self.mean("iou"),
            "mean_dice": self.mean("dice"),
            "mean_correlation": self.mean("correlation"),
            "same_networks": self.same,
            "null_iou": self.null_iou,
            "null_correlation": self.null_correlation,
            "matches": [asdict(match) for match in self.matches],
            "iou": None if self.iou is None else self.iou.tolist(),
            "correlation": self.correlation.tolist(),
        }


def check_comparable(a: FunctionalNetworkTemplate, b: FunctionalNetworkTemplate) -> None:
    """Check that two templates are of the same neurons.

    Raises:
        FNSFTError: site, layers or widths differ.
    """
    if (a.site, a.widths) != (b.site, b.widths):
        sizes = [
            f"{t.base_model or 'no name'}: {t.site}, {len(t.widths)} layers, {sum(t.widths.values())} neurons"
            for t in (a, b)
        ]
        raise FNSFTError(
            f"the templates are of different neurons ({sizes[0]}; {sizes[1]}); compare the networks of different "
            "models by their time courses on shared text (fnsft compare A B --texts FILE)"
        )


def compare_templates(
    a: FunctionalNetworkTemplate, b: FunctionalNetworkTemplate, *, permutations: int = 199, seed: int = 0
) -> TemplateComparison:
    """Compare the networks of two templates of the same neurons: of one model, or of a model and its fine-tuned child.

    Pairs are matched one to one by the correlation of their loadings. In the permutations the neurons of `b` change
    places within their layers, so that networks which merely crowd into the same layers gain nothing.

    A template that was converted from lists of neurons knows no loadings. Where one of the two is such a template, the
    correlation is that of the memberships (0 or 1) of both.

    Args:
        a, b: the templates.
        permutations: how many; the least p-value is one in `permutations + 1`.
        seed: of the permutations.

    Raises:
        FNSFTError: the templates are of different neurons.
    """
    check_comparable(a, b)
    (loadings, members), (other, other_members) = a.pooled(), b.pooled()
    if a.threshold is None or b.threshold is None:
        loadings, other = members.float(), other_members.float()
    layers = [a.widths[layer] for layer in sorted(a.widths)]

    def permuted(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        starts = torch.tensor([0, *layers]).cumsum(0)
        spans = zip(starts, layers, strict=False)
        places = torch.cat([start + torch.randperm(width, generator=generator) for start, width in spans])
        return correlation(loadings, other[:, places]), overlap(members, other_members[:, places])

    null = [permuted(torch.Generator().manual_seed(seed * 1_000_003 + i)) for i in range(permutations)]
    return _compare(correlation(loadings, other), overlap(members, other_members), null)


def compare_time_courses(
    a: torch.Tensor, b: torch.Tensor, *, permutations: int = 199, seed: int = 0
) -> TemplateComparison:
    """Compare networks by what they do on the same passages of text; the models may differ.

    Args:
        a, b: shapes (networks, passages), see [`~fnsft_trl.comparison.fingerprint.network_time_courses`].
        permutations: how often the passages of `b` are permuted.
        seed: of the permutations.

    Raises:
        FNSFTError: the numbers of passages differ.
    """
    if a.shape[1] != b.shape[1]:
        raise FNSFTError(f"time courses of {a.shape[1]} and {b.shape[1]} passages; they must be of the same text")
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(b.shape[1], generator=generator) for _ in range(permutations)]
    return _compare(correlation(a, b), None, [(correlation(a, b[:, order]), None) for order in orders])


def _compare(values: torch.Tensor, iou: torch.Tensor | None, null: list) -> TemplateComparison:
    measure = values if iou is None else iou
    best, nearest = measure.max(1)
    null_best = torch.stack([(c if o is None else o).max(1).values for c, o in null])  # (permutations, networks of a)
    p_values = (1 + (null_best >= best - 1e-9).sum(0)).double() / (1 + len(null))
    matches = []
    for network, partner in enumerate(match_rows(values).tolist()):
        matched = partner >= 0
        found = float(iou[network, partner]) if matched and iou is not None else None
        matches.append(
            NetworkMatch(
                network=network,
                partner=partner if matched else None,
                iou=found,
                dice=None if found is None else dice(found),
                correlation=float(values[network, partner]) if matched else None,
                same=None if found is None else found > SAME_NETWORK,
                nearest=int(nearest[network]),
                p_value=float(p_values[network]),
            )
        )
    pairs = [_pairs(c) for c, _ in null]
    null_iou = None
    if iou is not None:
        null_iou = float(torch.cat([o[pair] for (_, o), pair in zip(null, pairs, strict=True)]).mean())
    return TemplateComparison(
        iou=iou,
        correlation=values,
        matches=matches,
        null_correlation=float(torch.cat([c[pair] for (c, _), pair in zip(null, pairs, strict=True)]).mean()),
        null_iou=null_iou,
    )


def _pairs(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns that one-to-one matching gives each other."""
    partner = match_rows(values)
    rows = (partner >= 0).nonzero().flatten()
    return rows, partner[rows]
