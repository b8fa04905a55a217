"""SelectorEvidence: what a selector must know of a model beyond its template, measured on texts when asked for."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..compat.accelerate import input_device
from ..compat.torch import exact
from ..config import FunctionalNetworkConfig
from ..data.sequences import TokenSequence, token_sequences
from ..discovery.activations import ActivationReader, batch_inputs, decoder_ids
from ..discovery.discovery import discover_networks
from ..discovery.moments import Moments
from ..errors import FNSFTError
from ..neurons.layout import check_whole
from ..neurons.sites import NeuronSite, base_model, find_neuron_sites
from ..template.template import FunctionalNetworkTemplate


class SelectorEvidence:
    """A model with texts of a task and general ones, on which `surrogate`, `contrast` and `gradient_conflict` select.

    Nothing is read before [`select_neurons`] asks for it. Under `torch.distributed` the first process measures for all
    (a discovery is shared among them), so that all select the same neurons.

    Args:
        model (`PreTrainedModel` or `PeftModel`): the model of the template, before training; left unchanged.
        tokenizer: its tokenizer.
        task (iterable, *optional*): texts of the task, as [`discover_networks`] takes them; of `contrast` and
            `gradient_conflict`.
        general (iterable or `dict` of iterables by name, *optional*): general texts: of `gradient_conflict`, and of
            `surrogate` those that the networks were found on.
        max_tokens (`int`, *optional*, defaults to `8192`): of each text that `contrast` and `gradient_conflict` read.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        task: Iterable | None = None,
        general: Iterable | Mapping[str, Iterable] | None = None,
        max_tokens: int = 8192,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.task, self.general = task, general
        self.max_tokens = max_tokens

    def surrogate(self, template: FunctionalNetworkTemplate) -> FunctionalNetworkTemplate:
        """As many networks, found in the same way on the same text, of activations that are shifted in time.

        Raises:
            FNSFTError: there is no general text, or the template does not say how it was made.
        """
        self._need("surrogate", general=True)
        known = {f.name for f in fields(FunctionalNetworkConfig)}
        settings = {name: value for name, value in template.settings.items() if name in known}
        if not settings or template.threshold is None:
            raise FNSFTError(
                "selector='surrogate' finds networks as those of the template were found, which it does not say (it "
                "was converted from lists of neurons); discover the networks again"
            )
        settings |= {"ica_components": len(template.components), "ica_site": template.site}
        config = FunctionalNetworkConfig(**settings | {"ica_surrogate": True, "ica_until_reliable": None})
        texts = self.general if isinstance(self.general, Mapping) else {"texts given in memory": self.general}
        return discover_networks(self.model, self.tokenizer, texts, config).with_threshold(template.threshold)

    def contrast(self, template: FunctionalNetworkTemplate) -> dict[int, torch.Tensor]:
        """How much more a neuron is used by the task than by the text of the template: layer -> shape (neurons,).

        With a and b the mean squares of its activation on the task and on the template's text: a / (a + b), in [0, 1].

        Raises:
            FNSFTError: there is no task, or the template does not know how much its neurons are used.
        """
        self._need("contrast", task=True)
        if not template.rms:
            raise FNSFTError(
                "selector='contrast' needs each neuron's RMS on general text, which this template (converted from "
                "lists of neurons) does not know; discover the networks again"
            )
        rms = self._on_first_process(lambda: self._rms(template))
        return {layer: _share(rms[layer].square(), template.rms[layer].square()) for layer in template.widths}

    def gradient_conflict(self, template: FunctionalNetworkTemplate) -> dict[int, torch.Tensor]:
        """How much the gradients of a neuron's weights on the task and on general text point against each other.

        Minus the cosine of the two gradients of the mean token cross-entropy, in [-1, 1]. Above 0 they conflict (Yu et
        al., 2020, "Gradient Surgery for Multi-Task Learning", arXiv 2001.06782, definition 1). To first order, a small
        step on the task then raises the loss on general text through this neuron.

        Returns:
            Layer -> shape (neurons,).

        Raises:
            FNSFTError: there is no task or no general text, or weights that no gradient reaches.
        """
        self._need("gradient_conflict", task=True, general=True)
        return self._on_first_process(lambda: self._conflict(template))

    def _need(self, selector: str, *, task: bool = False, general: bool = False) -> None:
        check_whole(self.model, f"selector={selector!r}")
        lacking = [name for name, wanted in (("task", task), ("general", general)) if wanted and not self._has(name)]
        if lacking:
            raise FNSFTError(
                f"selector={selector!r} is measured on texts: give {' and '.join(lacking)} to SelectorEvidence"
            )

    def _has(self, name: str) -> bool:
        return getattr(self, name) is not None

    def _on_first_process(self, work: Callable[[], Any]) -> Any:
        """For every process, what the first one measures."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return work()
        outcome: list = [None]
        if dist.get_rank() == 0:
            try:
                outcome = [work()]
            except FNSFTError as error:  # the others wait for an answer
                outcome = [error]
        dist.broadcast_object_list(outcome)
        if isinstance(outcome[0], FNSFTError):
            raise outcome[0]
        return outcome[0]

    def _sites(self, template: FunctionalNetworkTemplate) -> list[NeuronSite]:
        return find_neuron_sites(self.model, kind=template.site, layers=sorted(template.widths))

    def _rms(self, template: FunctionalNetworkTemplate) -> dict[int, torch.Tensor]:
        """The RMS of every neuron on the task, read as the text of the template was: layer -> shape (neurons,)."""
        config = FunctionalNetworkConfig()
        settings = {f.name: template.settings.get(f.name, f.default) for f in fields(config)}
        reader = ActivationReader(
            self.model,
            self._sites(template),
            batch_size=settings["ica_batch_size"],
            max_length=settings["ica_max_length"],
            skip_tokens=settings["ica_skip_tokens"],
            special_ids=self.tokenizer.all_special_ids if settings["ica_skip_special"] else (),
        )
        sequences = token_sequences(
            iter(self.task), self.tokenizer, max_length=settings["ica_max_length"], name="the text of the task"
        )
        moments = Moments.empty(reader.width, reader.device)
        for block in reader.read([sequences], max_tokens=self.max_tokens, description="what the task uses"):
            if len(block.rows):
                moments.add(Moments.centring(block.rows))
        if moments.count == 0:
            raise FNSFTError("selector='contrast': the text of the task holds no token to read; give some rows")
        return {layer: moments.rms[columns].float().cpu() for layer, columns in reader.columns.items()}

    def _conflict(self, template: FunctionalNetworkTemplate) -> dict[int, torch.Tensor]:
        sites = self._sites(template)
        parts = {part.full_name: part for site in sites for part in site.layout.slices}
        weights = {name: part.tensor(self.model) for name, part in parts.items()}
        for name, weight in weights.items():
            if not weight.is_floating_point():
                raise FNSFTError(
                    f"selector='gradient_conflict' needs gradients of the weights, and {name} is quantised; load the "
                    "model in full precision, or take another selector"
                )
        general = self.general
        if isinstance(general, Mapping):
            general = (text for texts in general.values() for text in texts)
        of_task, of_general = (
            self._gradients(list(weights.values()), texts, name)
            for texts, name in ((self.task, "the text of the task"), (general, "the general text"))
        )
        first, second = (dict(zip(weights, found, strict=True)) for found in (of_task, of_general))
        return {site.layer: _conflict_of(site, first, second) for site in sites}

    def _gradients(self, weights: list[torch.Tensor], texts: Iterable, name: str) -> list[torch.Tensor]:
        """The gradient of the mean token cross-entropy on a text, of each weight, in float32."""
        backbone = base_model(self.model)
        before, was_training = [weight.requires_grad for weight in weights], backbone.training
        total, count = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights], 0
        backbone.eval()
        try:
            for weight in weights:
                weight.requires_grad_(True)
            for sequence in self._sequences(texts, name):
                with torch.enable_grad():
                    loss = self._loss(sequence.ids)
                    found = torch.autograd.grad(loss, weights, allow_unused=True)
                for sum_, gradient in zip(total, found, strict=True):
                    if gradient is not None:
                        sum_ += gradient
                count += len(sequence.ids) - 1
        finally:
            backbone.train(was_training)
            for weight, requires_grad in zip(weights, before, strict=True):
                weight.requires_grad_(requires_grad)
        if count == 0:
            raise FNSFTError(f"selector='gradient_conflict': {name} holds no two tokens in a row; give some rows")
        return [sum_ / count for sum_ in total]

    def _sequences(self, texts: Iterable, name: str) -> Iterable[TokenSequence]:
        left = self.max_tokens
        for sequence in token_sequences(iter(texts), self.tokenizer, max_length=256, name=name):
            if left <= 0:
                return
            if len(sequence.ids) > 1:
                left -= len(sequence.ids) - 1
                yield sequence

    def _loss(self, ids: list[int]) -> torch.Tensor:
        """Cross-entropy of a sequence, summed over its tokens."""
        device = input_device(self.model)
        inputs, present = (values.to(device) for values in batch_inputs([ids]))
        more = {}
        if self.model.config.is_encoder_decoder:
            more["decoder_input_ids"] = decoder_ids(self.model, inputs)
        output = self.model(input_ids=inputs, attention_mask=present, **more, use_cache=False)
        if more:  # the decoder reads what stands before each token
            return nn.functional.cross_entropy(output.logits[0].float(), inputs[0], reduction="sum")
        return nn.functional.cross_entropy(output.logits[0, :-1].float(), inputs[0, 1:], reduction="sum")


def _share(task: torch.Tensor, general: torch.Tensor) -> torch.Tensor:
    """a / (a + b); 0 where nothing uses the neuron."""
    return torch.where(task > 0, task.double() / (task + general).double().clamp_min(1e-300), 0)


def _conflict_of(
    site: NeuronSite, first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Minus the cosine of two gradients of each neuron of a site, over all its weights, shape (neurons,)."""
    products = torch.zeros(3, site.layout.width, dtype=torch.float64)  # of first with second, and of each with itself
    for part in site.layout.slices:
        numbers = torch.arange(part.first, part.first + part.count)
        a, b = (
            exact(part.select(found[part.full_name], part.indices(numbers).to(found[part.full_name].device))).reshape(
                len(part.offsets), part.count, -1
            )
            for found in (first, second)
        )
        for row, (left, right) in enumerate(((a, b), (a, a), (b, b))):
            products[row, numbers] += (left * right).sum((0, 2)).cpu()
    dot, of_first, of_second = products
    return -dot / (of_first * of_second).sqrt().clamp_min(1e-300)
