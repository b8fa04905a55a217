"""The functional-network fingerprint of a model: what its networks do on given passages of text, one after the other.

Models whose networks rise and fall together on the same passages are related, whatever their shapes and tokenizers.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from ..data.sequences import TokenSequence, text_token_ids
from ..discovery.activations import ActivationReader
from ..errors import FNSFTError
from ..neurons.sites import find_neuron_sites
from ..template.template import FunctionalNetworkTemplate


_FEWEST = 20  # passages below which a correlation over them means nothing


def split_passages(texts: Iterable, *, count: int = 200, characters: int = 240) -> list[str]:
    """Cut texts, one after the other, into passages of about equal length, at spaces.

    Args:
        texts: strings, or rows of a dataset with a `text`.
        count: largest number of passages.
        characters: largest length of each.

    Raises:
        FNSFTError: fewer than 20 passages come out.
    """
    passages: list[str] = []
    rest = ""
    for text in texts:
        if len(passages) == count:
            break
        rest = f"{rest} {' '.join((text if isinstance(text, str) else text['text']).split())}".lstrip()
        while len(rest) >= characters and len(passages) < count:
            cut = rest.rfind(" ", 1, characters)
            cut = characters if cut < 1 else cut
            passages.append(rest[:cut])
            rest = rest[cut:].lstrip()
    if len(passages) < _FEWEST:
        raise FNSFTError(
            f"the shared text has {len(passages)} passages of {characters} characters; give text for at least "
            f"{_FEWEST}"
        )
    return passages


def network_time_courses(
    model: nn.Module, tokenizer, template: FunctionalNetworkTemplate, passages: Sequence[str]
) -> torch.Tensor:
    """How active each network is in each passage.

    The activity of the networks at a token is a least-squares fit by the loadings of all networks. What is fitted are
    the token's activations less their mean on the calibration text. A passage has the mean of its tokens.

    Args:
        model: the model that the template was made from.
        tokenizer: its tokenizer.
        template: its networks.
        passages: each is read by itself, without its first token.

    Returns:
        Shape (networks, passages).

    Raises:
        FNSFTError: the template is of another model, or was converted and knows no loadings; or there are no passages,
            or one of them is empty.
    """
    if not passages:
        raise FNSFTError("there are no passages to read; give some, as split_passages does")
    template.check_model(model)
    if not template.mean:
        raise FNSFTError(
            "the template was converted from lists of neurons; time courses need loadings: discover again"
        )
    sites = [s for s in find_neuron_sites(model, kind=template.site) if s.layer in template.widths]
    reader = ActivationReader(
        model, sites, batch_size=1, max_length=512, skip_tokens=1, special_ids=tokenizer.all_special_ids
    )
    order = [site.layer for site in sites]
    loadings = torch.cat([template.loadings[layer] for layer in order], 1).double()  # (networks, neurons)
    mean = torch.cat([template.mean[layer] for layer in order]).double()
    fit = torch.linalg.pinv(loadings).float()  # (neurons, networks)
    sums = torch.zeros(len(passages), len(loadings))
    counts = torch.zeros(len(passages))
    ids = [text_token_ids(passage, tokenizer)[:512] for passage in passages]
    sequences = [[TokenSequence(passage, 0)] for passage in ids]
    for block in reader.read(sequences, max_tokens=max(1, *map(len, ids)), description="reading passages"):
        if len(block.parts) == 0:
            continue
        scores = (block.rows.cpu() - mean.float()) @ fit  # (tokens, networks)
        passage = int(block.parts[0]) // 2
        sums[passage] += scores.sum(0)
        counts[passage] += len(scores)
    if (counts == 0).any():
        number = int((counts == 0).nonzero()[0])
        raise FNSFTError(
            f"passage {number} of {len(passages)} has no token but the first and special ones; give longer passages"
        )
    return (sums / counts[:, None]).T.contiguous()
