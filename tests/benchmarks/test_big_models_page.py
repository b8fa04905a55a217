"""The tables of big models: the page says what the results say, whichever of them are there."""

import importlib.util
import json

import pytest
from helpers import ROOT


BLOCKS = {
    "machine": {"torch": "9.9"},
    "shapes": {
        "1B": {
            "measured": {"sketch_share": 0.0521},
            "computed": {
                "discovery_core_minutes": 61.2, "discovery_gib": 3.61, "lora_core_minutes": 2.5, "lora_gib": 3.0,
                "delta_core_minutes": 2.4, "delta_gib": 4123.4,
            },
        }
    },
}  # fmt: skip
SECONDS = {"forward": 1.0, "reading": 1.5, "sketch": 12.0, "ica": 2.0, "null": 0.5, "whole": 16.0}
WHOLE = {
    "machine": {"device": "Card", "torch": "9.9", "cuda": "13.0"},
    "shapes": {
        "1B": {
            "building": {"seconds": 1.0, "parameters": 10},
            "masked": {"over_plain": 1.02, "milliseconds": 20.0, "rounds": 9},
            "discovery": {"tokens": 50_000, "over_forward": 16.0, "peak_gib": 4.5, "seconds": SECONDS},
            "training of 1,024 tokens": {
                "tokens": 1024,
                "arms": {
                    "lora": {"milliseconds": 40.0, "over_lora": 1.0, "peak_gib": 8.0},
                    "lora protected": {"milliseconds": 44.0, "over_plain": 1.1, "peak_gib": 8.25},
                    "delta 10%": {"milliseconds": 30.0, "over_lora": 0.75, "peak_gib": 9.0},
                },
            },
        },
        "8B": {"building": {"seconds": 1.0, "parameters": 10}},  # cut short
    },
}


@pytest.fixture(scope="module")
def module():
    spec = importlib.util.spec_from_file_location("big_models_page", ROOT / "benchmarks" / "big_models_page.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_the_page_has_the_tables_of_the_results(module):
    text = module.PAGE.read_text()
    assert text.count(module.START) == text.count(module.END) == 1
    assert module.page(text, module.markdown()) == text


def test_each_result_makes_its_table(module, tmp_path):
    assert module.markdown(tmp_path) == ""
    (tmp_path / module.BLOCKS).write_text(json.dumps(BLOCKS))
    of_blocks = module.markdown(tmp_path)
    assert "| 1B | 5.2% | 61.2 | 3.61 | 2.50 | 3.00 | 2.40 | 4,123 |" in of_blocks
    (tmp_path / module.WHOLE).write_text(json.dumps(WHOLE))
    both = module.markdown(tmp_path)
    assert both.startswith(of_blocks)
    assert "on one Card (torch 9.9, CUDA 13.0)" in both
    assert "| 1B | 50,000 | 1.00 | 1.50 | 12 | 2.00 | 0.50 | 16 | 16 | 4.50 |" in both
    assert "| 1B, LoRA r16 on the MLPs | 1,024 | 40 | 1.00 | 8.00 | 1.10 | 8.25 |" in both
    assert "| 1B, neuron deltas, 10% | 1,024 | 30 | 0.75 | 9.00 |  |  |" in both  # its protected arm failed
    assert "over a plain one: 1.02 (1B)." in both
    assert "8B" not in both.removeprefix(of_blocks)


def test_writing_the_page_changes_nothing_but_the_tables(module):
    text = f"before\n{module.START}\nold\n{module.END}\nafter\n"
    assert module.page(text, "new") == f"before\n{module.START}\n\nnew\n\n{module.END}\nafter\n"
    assert module.page(module.page(text, "new"), "") == f"before\n{module.START}\n{module.END}\nafter\n"
