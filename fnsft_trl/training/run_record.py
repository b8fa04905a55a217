"""RunRecord: what a run trained, froze and masked, written beside its weights and into its model card."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..config import FunctionalNetworkConfig, TrainingPlan
from ..hub.card import ADAPTER_NOTE, MASK_NOTE, SECTION, plain, publishable_card, with_section
from ..interventions.baking import lesion_note
from ..neurons.mask import NeuronMask
from ..ranges import format_ranges, parse_ranges
from ..template.storage import CARD_FILE, NETWORK_DIR, SELECTION_FILE
from ..template.template import FunctionalNetworkTemplate
from ..writing import write_text_whole


@dataclass(frozen=True)
class RunRecord:
    """What a run trains, freezes and masks.

    Attributes:
        config (`FunctionalNetworkConfig`): what was asked for.
        plan (`TrainingPlan`): what it came to.
        template (`FunctionalNetworkTemplate`): the networks.
        selected (`NeuronMask`): the selected neurons.
        trainable (`NeuronMask`): the neurons whose weights may change, over all layers.
        mask_phases (`list[dict]`): the phases of a `MaskScheduleCallback`, as JSON values.
    """

    config: FunctionalNetworkConfig
    plan: TrainingPlan
    template: FunctionalNetworkTemplate
    selected: NeuronMask
    trainable: NeuronMask
    mask_phases: list[dict]

    def to_dict(self) -> dict[str, Any]:
        """As it stands in `selection.json`."""
        return {
            "network_config": self.config.to_dict(),
            "template": {
                "hub_id": self.template.hub_id,
                "commit": self.template.commit,
                "base_model": self.template.base_model,
            },
            "train_method": self.plan.method,
            "train_neurons": self.plan.train,
            "mask_mode": self.plan.mask_mode,
            "mask_factor": self.plan.mask_factor,
            "mask_phases": self.mask_phases,
            "selected": {"count": self.selected.count, "sha256": self.selected.sha256},
            "trainable": {"count": self.trainable.count, "sha256": self.trainable.sha256},
            "neurons": self.selected.to_ranges(),
        }

    def save(self, directory: Path, model: nn.Module) -> None:
        """Write template and selection beside saved weights, and a section into their model card if there is one.

        Args:
            directory: that of the weights.
            model: the trained model.
        """
        networks = directory / NETWORK_DIR
        self.template.save_pretrained(networks)
        card = directory / CARD_FILE
        if card.exists():  # of PEFT, which names the base model by where it was loaded from
            write_text_whole(card, publishable_card(card.read_text(encoding="utf-8")))
        self.extend_card(directory, model)
        write_text_whole(networks / SELECTION_FILE, json.dumps(self.to_dict(), indent=2) + "\n")

    def extend_card(self, directory: Path, model: nn.Module) -> None:
        """Put the section on functional networks into the model card of a directory if there is one."""
        card = directory / CARD_FILE
        if card.exists():
            write_text_whole(card, with_section(card.read_text(encoding="utf-8"), self._section(model)))

    def _section(self, model: nn.Module) -> str:
        trained, template = self.trainable, self.template
        what = "every neuron could change."
        if trained.fraction < 1:
            what = (
                f"{trained.count} neurons ({trained.fraction:.1%} of the MLP neurons) could change, all other neurons "
                "are bit-identical to the base model."
            )
        origin = "were converted from lists of neurons"
        if sources := plain(", ".join(template.calibration["sources"])):
            origin = f"were found on {template.calibration['tokens']} tokens of {sources}"
        if template.hub_id is not None:
            name = plain(template.hub_id)
            origin += f", come from [{name}](https://huggingface.co/{name}) at commit `{plain(str(template.commit))}`"
        lines = [
            f"\n{SECTION}\n",
            f"Trained with `fnsft_trl`, method `{self.plan.method}`: {what} Selected were {self.selection()}. The "
            f"networks {origin}; they are in `{NETWORK_DIR}/`.",
        ]
        if self.plan.mask_mode is not None:
            factor = f" (x{self.plan.mask_factor:g})" if self.plan.mask_factor else ""
            lines.append(
                f"\nDuring training the forward pass ran with a `{self.plan.mask_mode}`{factor} of the "
                f"{self.selected.count} selected neurons. " + (lesion_note(model) or MASK_NOTE)
            )
        elif note := lesion_note(model):
            lines.append(f"\n{note}")
        if self.plan.method == "neuron_delta":
            lines.append(f"\n{ADAPTER_NOTE}")
        return "\n".join(lines) + "\n"

    def selection(self) -> str:
        """Which neurons were selected, in words."""
        config, count = self.config, len(self.template.components)
        networks = f"all {count} networks"
        if config.ica_component_ids is not None:
            networks = f"networks {format_ranges(parse_ranges(config.ica_component_ids, count))} of {count}"
        elif config.ica_min_reliability:
            networks += f" with a reliability above null of {config.ica_min_reliability:g} or more"
        layers = "every layer"
        if set(self.selected.layers) != set(self.template.loadings):
            layers = f"layers {format_ranges(sorted(self.selected.layers))}"
        selector = config.ica_select
        if selector == "surrogate":
            networks += ", of activations shifted in time (a control)"
        if config.ica_fraction is None:
            where = "" if layers == "every layer" else f", in {layers}"
            if selector == "layer_shuffled":
                return f"as many neurons of every layer as there are in {networks}{where}, shuffled: a control"
            return f"the neurons of {networks}{where}"
        share, rank = f"{config.ica_fraction:.1%} of the neurons of {layers}", config.ica_rank_by
        told = {
            "random": "drawn at random: a control",
            "activation_rms": f"those with the {rank} activity: a control",
            "contrast": f"those that rank {rank} in how much more the task uses them than general text: a control",
            "gradient_conflict": f"those that rank {rank} in how far their gradients on the task and on general text "
            "conflict: a control",
            "layer_shuffled": f"those that rank {rank} in {networks}, the neurons of every layer shuffled: a control",
        }
        return f"{share}, {told.get(selector, f'those that rank {rank} in {networks}')}"
