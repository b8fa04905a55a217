"""What a trained model's card says of the run."""

import re
from dataclasses import replace

import pytest
from helpers import tiny_model

from fnsft_trl import FunctionalNetworkConfig, select_neurons
from fnsft_trl.training.run_record import RunRecord


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "the neurons of all 3 networks."),
        ({"ica_component_ids": [2, 0, 1]}, "the neurons of networks 0-2 of 3."),
        ({"ica_min_reliability": 0.1}, "the neurons of all 3 networks with a reliability above null of 0.1 or more."),
        (
            {"ica_component_ids": [1], "ica_fraction": 0.1, "ica_rank_by": "lowest"},
            "10.0% of the neurons of every layer, those that rank lowest in networks 1 of 3.",
        ),
        (
            {"ica_select": "random", "ica_fraction": 0.25},
            "25.0% of the neurons of every layer, drawn at random: a control.",
        ),
        (
            {"ica_select": "activation", "ica_fraction": 0.1},
            "10.0% of the neurons of every layer, those with the highest activity: a control.",
        ),
    ],
)
def test_the_card_says_which_neurons_were_selected(templates, tmp_path, options, told):
    config, template = FunctionalNetworkConfig(**options), templates["llama"]
    mask = select_neurons(template)
    record = RunRecord(config, config.plan(lora_config=False), template, mask, mask, [])
    (tmp_path / "README.md").write_text("# A model\n")
    record.save(tmp_path, tiny_model("llama"))
    assert f"Selected were {told} The networks" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    "text", ["<img src=x onerror=alert(1)>", "[the fixed weights](https://evil.example/x) **now**", "a | b\n\n# c"]
)
def test_names_of_datasets_are_shown_as_they_are_called(templates, tmp_path, text):
    template = templates["llama"]
    hostile = replace(template, calibration={**template.calibration, "sources": [text]})
    config, mask = FunctionalNetworkConfig(), select_neurons(template)
    record = RunRecord(config, config.plan(lora_config=False), hostile, mask, mask, [])
    (tmp_path / "README.md").write_text("# A model\n")
    record.extend_card(tmp_path, tiny_model("llama"))
    card = (tmp_path / "README.md").read_text()
    assert text not in card
    assert not re.search(r"<\w|\]\(|\*\*|^# c", card, flags=re.MULTILINE)
