"""discover_networks: a model and texts in, a template out."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from transformers.utils import logging

from .activations import ActivationReader, token_sequences
from .config import FunctionalNetworkConfig, ThresholdRule
from .decomposition import ActivationSketch, NonFiniteActivation, decompose
from .errors import FNSFTError
from .neurons import base_model, find_neuron_sites
from .template import Component, FunctionalNetworkTemplate, model_name


logger = logging.get_logger(__name__)


def discover_networks(
    model: nn.Module,
    tokenizer,
    texts: Iterable,
    config: FunctionalNetworkConfig | None = None,
    *,
    sources: Sequence[str] = ("texts given in memory",),
) -> FunctionalNetworkTemplate:
    """Find the functional networks of a model in one streaming pass over texts.

    The texts are dealt to two halves of equal size; the networks come from both together, their reliability from each
    half alone. First tokens of a sequence, special tokens and padding are left out.

    Args:
        model: a transformers model, plain, quantised or wrapped by PEFT. Left unchanged.
        tokenizer: its tokenizer.
        texts: strings, conversations (lists of messages), or rows of a dataset; see
            [`~fnsft_trl.activations.text_token_ids`].
        config: the `ica_*` fields are used; defaults to `FunctionalNetworkConfig()`.
        sources: names of the texts, for the template's provenance.

    Returns:
        A [`FunctionalNetworkTemplate`]. The same model, texts, settings, threads and versions give the same bytes.

    Raises:
        FNSFTError: no sites, no text, fewer tokens than components, activations that are not finite.
    """
    config = config or FunctionalNetworkConfig()
    sites = find_neuron_sites(model, kind=config.ica_site, layers=config.ica_layers)
    dtype = torch.float64 if config.ica_dtype == "float64" else torch.float32
    reader = ActivationReader(
        model,
        sites,
        batch_size=config.ica_batch_size,
        max_length=config.ica_max_length,
        skip_tokens=config.ica_skip_tokens,
        special_ids=tokenizer.all_special_ids,
        dtype=dtype,
    )
    halves = [
        ActivationSketch(
            reader.width,
            config.ica_rank,
            reservoir=config.ica_reservoir,
            seed=2 * config.ica_seed + half,
            prescale=config.ica_standardize == "zscore",
            dtype=dtype,
            device=reader.device,
        )
        for half in (0, 1)
    ]
    sequences = token_sequences(texts, tokenizer, max_length=config.ica_max_length)
    try:
        for rows, half_of_row in reader.read(
            sequences, max_tokens=config.ica_max_tokens, description="discovering networks"
        ):
            half_of_row = half_of_row.to(rows.device)
            for half, sketch in enumerate(halves):
                sketch.update(rows[half_of_row == half])
        for sketch in halves:
            sketch.finish()
    except NonFiniteActivation as error:
        layer = next(layer for layer, columns in reader.columns.items() if error.column < columns.stop)
        neuron = error.column - reader.columns[layer].start
        raise FNSFTError(
            f"the activation of neuron {neuron} in layer {layer} is NaN or infinite within tokens {error.first} to "
            f"{error.last} of a half; check the model's weights or load it in float32"
        ) from error
    tokens = sum(sketch.count for sketch in halves)
    if tokens == 0:
        raise FNSFTError("the texts for the discovery hold no token to read; give at least some sentences of text")
    if tokens < config.ica_max_tokens:
        logger.warning(f"the texts ended after {tokens} of {config.ica_max_tokens} tokens (ica_max_tokens)")
    result = decompose(
        halves,
        config.ica_components,
        variant=config.ica_variant,
        standardize=config.ica_standardize,
        contrast=config.ica_contrast,
        seed=config.ica_seed,
    )
    if not result.converged:
        logger.warning(
            "FastICA did not reach its tolerance; the weakest networks may not replicate: give more tokens "
            "(ica_max_tokens), or ask for fewer components (ica_components)"
        )
    base = base_model(model)
    return FunctionalNetworkTemplate(
        base_model=model_name(base),
        revision=getattr(base.config, "_commit_hash", None),
        architecture=type(base).__name__,
        site=config.ica_site,
        settings=config.discovery_settings(),
        calibration={"sources": list(sources), "tokens": tokens, "sha256": reader.digest.hexdigest()},
        threshold=config.threshold_rule() or ThresholdRule(),
        components=[
            Component(*values)
            for values in zip(
                result.explained_variance, result.kurtosis, result.reliability, result.jaccard, strict=True
            )
        ],
        loadings={layer: result.loadings[:, columns].clone() for layer, columns in reader.columns.items()},
        mean={layer: result.mean[columns].clone() for layer, columns in reader.columns.items()},
        rms={layer: result.rms[columns].clone() for layer, columns in reader.columns.items()},
    )
