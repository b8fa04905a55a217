"""Penalties and earlier adapters as options of `fnsft train`."""

import pytest

from fnsft_trl.cli.options.parse import parse_options
from fnsft_trl.errors import FNSFTError


def asked(*words):
    return parse_options(["--model_name_or_path", "m", "--dataset_name", "d.jsonl", *words])


def test_weights_are_numbers_or_infinite():
    assert asked().penalties is None
    ewc = asked("--ewc", "inf", "--ewc_datasets", "old=old.jsonl").penalties
    assert (ewc.ewc_weight, ewc.sources()) == (float("inf"), {"old": "old.jsonl"})
    both = asked("--use_peft", "--lwf", "0.5", "--olora", "1e-2", "--olora_adapters", "one", "two").penalties
    assert (both.lwf, both.olora_weight, both.olora_adapters) == (0.5, 0.01, ["one", "two"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ewc", "0", "--ewc_from", "x"], "ewc is 0"),
        (["--ewc", "much", "--ewc_from", "x"], "a number above 0, or inf"),
        (["--ewc", "1"], "without rows of earlier tasks"),
        (["--lwf", "-1"], "lwf is -1"),
        (["--adapter_name_or_path", "x"], "no adapter trains"),
        (["--adapter_name_or_path", "x", "--use_peft", "--lora_r", "4"], "which has its own"),
    ],
)
def test_what_has_no_effect_is_one_line(words, message):
    with pytest.raises(FNSFTError, match=message):
        asked(*words)
