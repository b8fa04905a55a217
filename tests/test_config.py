import itertools

import pytest

from fnsft_trl import FNSFTError, FunctionalNetworkConfig
from fnsft_trl.config import ANTI_DRIFT_ERRORS, COMBINATIONS, ThresholdRule


def test_every_combination_of_switches_has_an_outcome():
    for mask_mode, train_neurons in itertools.product(
        (None, "lesion", "preserve", "amplify"), ("auto", "all", "selected", "unselected")
    ):
        outcome, reason = COMBINATIONS[mask_mode, train_neurons]
        asked = {"mask_mode": mask_mode, "train_neurons": train_neurons}
        asked |= {"mask_factor": 2.0} if mask_mode == "amplify" else {}
        if outcome is None:
            with pytest.raises(FNSFTError, match=reason[:20]):
                FunctionalNetworkConfig(**asked)
        else:
            config = FunctionalNetworkConfig(**asked)
            assert config.plan(lora_config=False).train == outcome


@pytest.mark.parametrize(("mask_mode", "held"), [("lesion", "unselected"), ("preserve", "selected")])
def test_auto_is_held_exactly_unless_anti_drift_is_off(mask_mode, held):
    assert FunctionalNetworkConfig(mask_mode=mask_mode).plan(lora_config=True).train == held
    loose = FunctionalNetworkConfig(mask_mode=mask_mode, anti_drift_row_param=False)
    assert loose.plan(lora_config=True).train == "all"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"mask_mode": "amplify"}, "needs mask_factor"),
        ({"mask_mode": "amplify", "mask_factor": 1}, "changes no activation"),
        ({"mask_mode": "amplify", "mask_factor": 0.0}, "mask_factor is 0.0"),
        ({"mask_mode": "lesion", "mask_factor": 2}, "only with mask_mode=amplify"),
        ({"mask_mode": "amplify", "mask_factor": 2, "anti_drift_row_param": False}, "anti_drift_row_param=false"),
    ],
)
def test_a_factor_goes_with_amplify_alone(asked, said):
    with pytest.raises(FNSFTError, match=said):
        FunctionalNetworkConfig(**asked)
    assert FunctionalNetworkConfig(mask_mode="amplify", mask_factor=2).plan(lora_config=False).mask_factor == 2


@pytest.mark.parametrize("method", ["neuron_delta", "lora", "full"])
@pytest.mark.parametrize("apply_to", ["auto", "lora", "base", "both"])
def test_anti_drift_applies_to_what_trains(method, apply_to):
    config = FunctionalNetworkConfig(train_method=method, anti_drift_apply_to=apply_to)
    if (method, apply_to) in ANTI_DRIFT_ERRORS:
        with pytest.raises(FNSFTError, match="anti_drift_apply_to"):
            config.plan(lora_config=method == "lora")
    else:
        assert config.plan(lora_config=method == "lora").method == method


def test_method_follows_from_the_peft_config():
    assert FunctionalNetworkConfig().plan(lora_config=True).method == "lora"
    assert FunctionalNetworkConfig().plan(lora_config=False).method == "neuron_delta"
    with pytest.raises(FNSFTError, match="needs a LoraConfig"):
        FunctionalNetworkConfig(train_method="lora").plan(lora_config=False)
    with pytest.raises(FNSFTError, match="drop peft_config"):
        FunctionalNetworkConfig(train_method="full").plan(lora_config=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"ica_components": 0},
        {"ica_components": True},
        {"ica_components": 2.5},
        {"ica_percentile": 100},
        {"ica_threshold": "median"},
        {"ica_zscore": 0},
        {"ica_min_reliability": 1.5},
        {"ica_fraction": 0},
        {"ica_fraction": 1.0},
        {"ica_component_ids": []},
        {"ica_component_ids": [-1]},
        {"ica_component_ids": ["a"]},
        {"ica_rank": 5},
        {"ica_site": "mlp"},
        {"ica_select": "random"},
        {"ica_rank_by": "lowest"},
        {"ica_select": "random", "ica_fraction": 0.1, "ica_component_ids": [0]},
        {"mask_mode": "lesions"},
        {"train_neurons": "none"},
        {"ica_max_length": 1},
        {"ica_layers": "x"},
        {"ica_layers": "010"},
        {"ica_layers": ["0:4", "y"]},
        {"ica_component_ids": "007"},
        {"ica_component_ids": "0-99999"},
        {"mask_eval": False},
        {"anti_drift_row_param": False},
        {"anti_drift_row_param": False, "mask_mode": "lesion", "train_neurons": "unselected"},
    ],
)
def test_values_without_a_meaning_are_refused_by_name(changes):
    with pytest.raises(FNSFTError, match=next(iter(changes))):
        FunctionalNetworkConfig(**changes)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"ica_percentile": 95}, ThresholdRule("percentile", 95)),
        ({"ica_threshold": "layer_percentile"}, ThresholdRule("layer_percentile", 98.0)),
        ({"ica_threshold": "zscore_positive"}, ThresholdRule("zscore_positive", 1.96)),
        ({"ica_zscore": 3}, ThresholdRule("zscore", 3)),
    ],
)
def test_threshold_fields_make_one_rule(fields, expected):
    assert FunctionalNetworkConfig(**fields).threshold_rule() == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"ica_percentile": 95, "ica_zscore": 2},
        {"ica_threshold": "zscore", "ica_percentile": 95},
        {"ica_threshold": "percentile", "ica_zscore": 2},
        {"ica_min_reliability": 0.5, "ica_component_ids": [0]},
        {"ica_select": "random", "ica_fraction": 0.1, "ica_rank_by": "lowest"},
    ],
)
def test_selections_that_contradict_themselves_are_refused(fields):
    with pytest.raises(FNSFTError, match="drop"):
        FunctionalNetworkConfig(**fields)


def test_train_other_is_refused_where_it_would_do_nothing():
    with pytest.raises(FNSFTError, match="train_other"):
        FunctionalNetworkConfig(train_other=False).plan(lora_config=False)
    config = FunctionalNetworkConfig(train_other=False, train_method="full", train_neurons="unselected")
    assert config.plan(lora_config=False).train == "unselected"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"mask_mode": "null"}, None),
        ({"mask_mode": "none"}, None),
        ({"ica_zscore": "None"}, None),
        ({"ica_component_ids": "all"}, None),
        ({"ica_component_ids": ""}, None),
        ({"ica_component_ids": "[0,1,2]"}, [0, 1, 2]),
        ({"ica_component_ids": "5,0-2"}, [0, 1, 2, 5]),
        ({"ica_component_ids": (3, 1)}, [3, 1]),
        ({"ica_component_ids": 0}, [0]),
        ({"ica_layers": [0, 2, 4]}, "0,2,4"),
        ({"ica_layers": (3,)}, "3"),
        ({"ica_layers": 0}, "0"),
        ({"ica_layers": "0-5"}, "0-5"),
        ({"ica_layers": ["0:4", 9]}, "0:4,9"),
        ({"ica_component_ids": ["0-2", 7]}, [0, 1, 2, 7]),
        ({"ica_component_ids": "2:"}, "2:"),
        ({"ica_template_path": "none"}, "none"),
        ({"ica_datasets": "rows.jsonl"}, ["rows.jsonl"]),
    ],
    ids=str,
)
def test_values_may_be_written_as_on_a_command_line(fields, expected):
    ((name, _),) = fields.items()
    assert getattr(FunctionalNetworkConfig(**fields), name) == expected


def test_a_config_made_of_the_fields_of_another_equals_it():
    config = FunctionalNetworkConfig(ica_layers=[0, 2], ica_component_ids="0-3", mask_mode="lesion", ica_datasets="a")
    assert FunctionalNetworkConfig(**config.to_dict()) == config
