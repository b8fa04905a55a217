"""FunctionalNetworkTemplate: all networks of one model, on disk or on the Hub.

This module does not import torch by itself, so that a template's description can be read without it.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub import ModelHubMixin

from ..config import ThresholdRule
from ..errors import FNSFTError
from ..hub.card import TAGS
from ..hub.files import hub_errors, prepare_repo
from ..hub.names import UNKNOWN, model_name
from ..occupied import TEMPLATE, check_repository, check_target
from ..writing import disk_errors
from .card import template_card
from .description import SIDES, Component, NullReliability, TemplateDescription, reliability_above_null, version_of
from .figure import networks_svg
from .legacy import LEGACY_FILE, Members, legacy_bytes
from .membership import members
from .schema import FORMAT
from .storage import CARD_FILE, CONFIG_FILE, FIGURE_FILE, TENSOR_FILE, write_files
from .stored import StoredTemplate
from .tensors import check_tensors


if TYPE_CHECKING:
    import torch
    from torch import nn

_NOTEWORTHY = 1e-3  # relative difference of weights from which on a model counts as another one


@dataclass(eq=False)
class FunctionalNetworkTemplate(ModelHubMixin, library_name="fnsft_trl", tags=list(TAGS)):
    """All networks of one model with their loadings, provenance and reliability.

    Saved, loaded and pushed like a model of the Hub: [`~FunctionalNetworkTemplate.save_pretrained`],
    [`~FunctionalNetworkTemplate.from_pretrained`], [`~FunctionalNetworkTemplate.push_to_hub`].

    Attributes:
        base_model (`str`): the model's id or the name of its directory.
        revision (`str` or `None`): the model's commit on the Hub, when known.
        architecture (`str`): class name of the model.
        site (`str`): `"mlp_intermediate"` or `"mlp_output"`.
        settings (`dict`): every ICA setting that led here.
        calibration (`dict`): `sources`, `tokens` and `sha256` of the token ids.
        threshold (`ThresholdRule` or `None`): which neurons belong to a network. `None`: those with a loading above 0,
            in a template that was converted from lists of neurons.
        null (`dict[str, float]` or `None`): mean `reliability` and `jaccard`, and `highest` reliability, of as many
            components of activations without co-activation, which those of the components are to be compared with.
        components (`list[Component]`): one entry per network.
        loadings (`dict[int, torch.Tensor]`): layer -> signed loadings, shape (components, neurons of the layer).
        mean, rms (`dict[int, torch.Tensor]`): layer -> shape (neurons of the layer,), of the activations on the
            calibration text; float64 in layers where float32 would lose a variance. Empty where they are unknown.
        weights (`dict` or `None`): probes of the base model, see [`~fnsft_trl.template.weights.weight_probes`].
        basis (`dict[int, dict]`): layer -> `basis` of its neurons and `input_basis` of its MLP's input (orthonormal,
            shape (directions, width); position 0, the mean, then leading ones). Empty without `ica_store_basis`.
        license (`str` or `None`): id of a license, for the model card.
        hub_id (`str` or `None`): the repository that the template was loaded from.
        commit (`str` or `None`): the commit there.

    Raises:
        FNSFTError: a tensor is not what the files of a template may hold, see
            [`~fnsft_trl.template.tensors.check_tensors`].
    """

    base_model: str
    revision: str | None
    architecture: str
    site: str
    settings: dict[str, Any]
    calibration: dict[str, Any]
    threshold: ThresholdRule | None
    null: dict[str, float] | None
    components: list[Component]
    loadings: dict[int, torch.Tensor] = field(repr=False)
    mean: dict[int, torch.Tensor] = field(repr=False)
    rms: dict[int, torch.Tensor] = field(repr=False)
    weights: dict[int, dict] | None = field(default=None, repr=False)
    license: str | None = None
    basis: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict, repr=False)
    hub_id: str | None = None
    commit: str | None = None

    _hub_mixin_config: ClassVar[dict] = {}  # the mixin would otherwise describe the template by itself

    def __post_init__(self) -> None:
        check_tensors(self)
        self.components = self.counted()

    def counted(self) -> list[Component]:
        """The components, with the numbers of neurons that the loadings and the threshold give by now."""
        counted = []
        for number, component in enumerate(self.components):
            layers = {layer: int(m.sum()) for layer, m in self.members(number).items() if m.any()}
            counted.append(replace(component, layers=layers, neurons=sum(layers.values())))
        return counted

    @property
    def widths(self) -> dict[int, int]:
        """Number of neurons of each layer."""
        return {layer: values.shape[1] for layer, values in self.loadings.items()}

    def members(self, number: int) -> dict[int, torch.Tensor]:
        """The neurons of network `number`: layer -> bool tensor, shape (neurons of the layer,).

        Raises:
            FNSFTError: there is no such network.
        """
        import torch

        _check_network(number, len(self.components))
        loadings = {layer: values[number].numpy() for layer, values in self.loadings.items()}
        return {layer: torch.from_numpy(found) for layer, found in members(loadings, self.threshold).items()}

    def reliability_above_null(self, number: int) -> float | None:
        """[`~fnsft_trl.template.description.reliability_above_null`] of network `number`; `None` where unknown."""
        null = self.null and NullReliability(**self.null)
        return reliability_above_null(self.components[number].reliability, null)

    def pooled(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Loadings and memberships of all networks, the layers side by side: both of shape (components, neurons)."""
        import torch

        layers = sorted(self.loadings)
        members = [self.members(number) for number in range(len(self.components))]
        stacked = torch.stack([torch.cat([network[layer] for layer in layers]) for network in members])
        return torch.cat([self.loadings[layer] for layer in layers], 1), stacked

    def with_threshold(self, threshold: ThresholdRule) -> FunctionalNetworkTemplate:
        """The same networks with another threshold; no discovery is needed.

        Raises:
            FNSFTError: the template knows which neurons are members, but not how strongly they load.
        """
        if self.threshold is None:
            raise FNSFTError(
                "the template was converted from lists of neurons, so no threshold applies; drop ica_threshold, "
                "ica_percentile and ica_zscore, or discover the networks again"
            )
        return replace(self, threshold=threshold)

    def check_model(self, model: nn.Module) -> None:
        """Refuse a model that this template was not made from; warn of one whose weights have moved away from it.

        A model with another head (a reward model) has the same neurons.

        Raises:
            FNSFTError: the architecture, a layer or a width differs; the message names the first difference.
        """
        from ..neurons.sites import base_model, find_neuron_sites
        from .weights import weight_difference, weight_probes

        base = base_model(model)
        made_from = f"the template was made from {self.base_model or 'a model without a name'} ({self.architecture})"
        if self.architecture not in (UNKNOWN, type(base).__name__) and not _has_same_body(base, self.architecture):
            raise FNSFTError(f"{made_from}, but the model is a {type(base).__name__}; use a template of this model")
        sites = [site for site in find_neuron_sites(model, kind=self.site) if site.layer in self.widths]
        widths = {site.layer: site.width for site in sites}
        for layer, width in self.widths.items():
            if widths.get(layer) != width:
                found = f"{widths[layer]} neurons in layer {layer}" if layer in widths else f"no layer {layer}"
                raise FNSFTError(
                    f"{made_from}, with {width} neurons in layer {layer}, but the model has {found}; use a template "
                    "of this model"
                )
        from transformers.utils import logging

        logger, name = logging.get_logger(__name__), model_name(base)
        probes = weight_probes(model, sites) if self.weights else None
        if probes is not None:
            difference, layer = weight_difference(self.weights, probes)
            if not difference <= _NOTEWORTHY:  # of NaN too
                logger.warning(
                    f"{made_from}; the MLP weights of the model differ from those by {difference:.1%} of their norm, "
                    f"most in layer {layer}: networks move when weights do, see `fnsft compare`"
                )
        elif self.base_model not in ("", UNKNOWN, name):
            logger.warning(
                f"{made_from}, the model is called {name or 'by no name'}: the shapes agree, but other weights have "
                "other networks"
            )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        with_lists: bool = False,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write `config.json`, `template.safetensors`, and the model card `README.md` with its figure `networks.svg`.

        Whoever is interrupted leaves the old template or the new one, whole. The same template gives the same bytes.

        Args:
            save_directory: made where it does not exist.
            repo_id: `org/name`, for `push_to_hub`; defaults to the name of the directory.
            push_to_hub: whether to push as well, with the other arguments of
                [`~FunctionalNetworkTemplate.push_to_hub`].
            model_card_kwargs: `repo_id`, by which the card says to load the template, and `beside`: name -> content of
                further files.
            with_lists: whether to write the networks as the original project has them, too (`global_templates.json`),
                where its form has room for them: all layers of one width.

        Returns:
            The address of the commit on the Hub, or `None`.

        Raises:
            FNSFTError: the directory holds a model, an adapter or the like, or the disk does not take the template.
        """
        push_to_hub_kwargs.pop("config", None)  # what the mixin would write, were it not written here
        check_target(save_directory, TEMPLATE)
        directory = Path(save_directory)
        name = (model_card_kwargs or {}).get("repo_id", self.hub_id)
        with disk_errors(directory):
            beside = (model_card_kwargs or {}).get("beside") or {}
            write_files(directory, {**_files_of(self, name, with_lists=with_lists), **beside})
        return self.push_to_hub(repo_id or directory.name, **push_to_hub_kwargs) if push_to_hub else None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> FunctionalNetworkTemplate:
        """Load a template.

        Args:
            pretrained_model_name_or_path: a directory, the original project's JSON file, or `org/name` on the Hub, of
                which only `config.json` and `template.safetensors` are fetched.
            revision: branch, tag or commit on the Hub; the newest of `main` by default.
            token: for the Hub; by default `HF_TOKEN`, or the token saved by `hf auth login`.
            cache_dir, force_download, local_files_only: as for `huggingface_hub.hf_hub_download`.

        Raises:
            FNSFTError: there is no template, it cannot be had, or its files are not what a template must be.
        """
        import torch

        stored, arrays = StoredTemplate.load(
            pretrained_model_name_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        found, tensors = stored.description, {name: torch.from_numpy(values) for name, values in arrays.items()}
        parts: dict[str, dict[int, torch.Tensor]] = {"loadings": {}, "mean": {}, "rms": {}}
        for layer in found.widths:
            for part in parts if found.statistics else ("loadings",):
                parts[part][layer] = tensors[f"layers.{layer}.{part}"]
        same = ("base_model", "revision", "architecture", "site", "settings", "threshold", "weights", "license")
        template = cls(
            calibration=found.calibration.to_json(),
            null=found.to_json()["null"],
            components=list(found.components),
            hub_id=stored.hub_id,
            commit=stored.commit,
            **{name: getattr(found, name) for name in same},
            **parts,
            basis={layer: {side: tensors[f"layers.{layer}.{side}"] for side in SIDES} for layer in found.basis},
        )
        _check_counts(template, found, pretrained_model_name_or_path)
        return template

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload functional networks",
        create_pr: bool = False,
        beside: dict[str, bytes] | None = None,
        **kwargs: Any,
    ) -> str:
        """Push the template to the Hub: a commit of its four files.

        Args:
            repo_id: `org/name`; made where it does not exist.
            private: whether the repository is made private.
            token: to write with; by default `HF_TOKEN`, or the token saved by `hf auth login`.
            branch: where to; made where it does not exist. `main` by default. `revision` is another name of it.
            commit_message: of the commit.
            create_pr: open a pull request instead of committing to the branch.
            beside: name -> content of files to push with it, such as examples of texts.
            kwargs: further arguments of `huggingface_hub.ModelHubMixin.push_to_hub`.

        Returns:
            The address of the commit.

        Raises:
            FNSFTError: the repository holds a model or an adapter, or the Hub refuses it or cannot be reached; the
                message says what to do.
        """
        branch = branch or revision
        with hub_errors(repo_id, branch, token=token):
            check_repository(repo_id, TEMPLATE, branch=branch, token=token)
            repo_id = prepare_repo(repo_id, private=private, token=token, branch=branch)
            commit = super().push_to_hub(
                repo_id,
                token=token,
                branch=branch,
                commit_message=commit_message,
                create_pr=create_pr,
                model_card_kwargs={"repo_id": repo_id, "beside": beside},
                **kwargs,
            )
        return str(commit)

    def listed(self) -> Members:
        """The neurons of every network as numbers: for each network, layer -> ascending list."""
        networks = []
        for number in range(len(self.components)):
            members = self.members(number).items()
            networks.append({layer: m.nonzero().flatten().tolist() for layer, m in members if m.any()})
        return networks


def _files_of(template: FunctionalNetworkTemplate, name: str | None, *, with_lists: bool) -> dict[str, bytes | None]:
    """What a template is on disk: name of each file -> its content, `None` for one that it has not."""
    from safetensors.torch import save

    tensors = {}
    for layer in template.loadings:
        tensors[f"layers.{layer}.loadings"] = template.loadings[layer].contiguous()
        if template.mean:
            tensors[f"layers.{layer}.mean"] = template.mean[layer].contiguous()
            tensors[f"layers.{layer}.rms"] = template.rms[layer].contiguous()
        tensors |= {f"layers.{layer}.{side}": rows for side, rows in template.basis.get(layer, {}).items()}
    # One pair only: safetensors writes several in a random order, and the same template must be the same bytes.
    data = save(tensors, metadata={FORMAT: str(version_of(template))})
    description = TemplateDescription.of(template, hashlib.sha256(data).hexdigest())
    files: dict[str, bytes | None] = {
        TENSOR_FILE: data,
        CARD_FILE: template_card(description, name).encode(),
        FIGURE_FILE: networks_svg(description).encode(),
        CONFIG_FILE: description.to_bytes(),
    }
    if with_lists:
        has_room = len(set(template.widths.values())) == 1
        files[LEGACY_FILE] = legacy_bytes(template.listed(), template.widths, template.site) if has_room else None
    return files


def _check_counts(template: FunctionalNetworkTemplate, found: TemplateDescription, where: str | os.PathLike) -> None:
    """Check the numbers of neurons that a description states, which nothing is computed from."""
    for number, (stated, counted) in enumerate(zip(found.components, template.components, strict=True)):
        if {layer: count for layer, count in stated.layers.items() if count} != counted.layers:
            raise FNSFTError(
                f"{where} is damaged: it says that network {number} has {stated.neurons} neurons in "
                f"{len(stated.layers)} layers, but its loadings and the threshold ({found.threshold_in_words()}) give "
                f"{counted.neurons} in {len(counted.layers)}, or in others; save or fetch the template again"
            )


def _check_network(number: int, count: int) -> None:
    if not isinstance(number, Integral) or isinstance(number, bool) or not 0 <= number < count:
        raise FNSFTError(f"the template has no network {number!r}; it has the networks 0-{count - 1}")


def _has_same_body(model: nn.Module, architecture: str) -> bool:
    """Whether a model is of a class that differs from another one of transformers by its head alone."""
    import transformers

    other = getattr(transformers, architecture, None)
    return isinstance(other, type) and getattr(other, "config_class", None) is type(model.config)
