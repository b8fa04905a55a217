"""JSON of others: what is no JSON, or no number that could be written again, is a ValueError."""

import json

import pytest

from fnsft_trl.json_text import from_json


@pytest.mark.parametrize("number", ["1e309", "-1e309", "1E+400", "9" * 310 + ".0", "1.5e999"])
@pytest.mark.parametrize("text", ["{}", "[1, {}]", '{{"a": {{"b": {}}}}}'])
@pytest.mark.parametrize("kind", [str, bytes])
def test_a_number_beyond_float64_is_refused_wherever_it_stands(number, text, kind):
    written = text.format(number)
    with pytest.raises(ValueError, match="too large"):
        from_json(written if kind is str else written.encode())


@pytest.mark.parametrize(
    "number", ["1e308", "-1.7976931348623157e308", "1e-999", "0e999", "9" * 400, "12e100", "1e007"]
)
def test_any_other_number_is_what_it_says(number):
    assert from_json(f"[{number}]") == json.loads(f"[{number}]")
    assert from_json(f'{{"1e999": "1e999", "a": {number}}}')["1e999"] == "1e999"


def test_what_is_nested_without_end_is_refused():
    with pytest.raises(ValueError, match="nested too deeply"):
        from_json("[" * 100_000)
