"""A file that is too large for one piece has the rows that it would have in one."""

import json

import pytest
from helpers import ROOT

from fnsft_trl import FNSFTError
from fnsft_trl.data import long_lines
from fnsft_trl.data.sources import load_data


CATALOGUE = [json.loads(line) for line in (ROOT / "tests" / "rows" / "catalogue.jsonl").read_text().splitlines()]


@pytest.fixture
def in_pieces(monkeypatch):
    """Every file is long, and read by two rows."""
    monkeypatch.setattr(long_lines, "LONG", 0)
    monkeypatch.setattr(long_lines, "_ROWS", 2)


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows_of(name):
    return load_data(name)["train"].to_list()


def spelled(rows):
    return json.dumps(without_nulls(rows))  # in which NaN is NaN


def without_nulls(value):
    """What Arrow fills in, and what is read as a key that is missing."""
    if isinstance(value, dict):
        return {key: without_nulls(held) for key, held in value.items() if held is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


@pytest.mark.slow
def test_published_rows_are_those_of_the_file_in_one_piece(tmp_path, monkeypatch):
    for number, entry in enumerate(CATALOGUE):
        if entry.get("in_tables", True):
            file = write(tmp_path / f"{number}.jsonl", [entry["row"]] * 3)
            whole = spelled(rows_of(file))
            with monkeypatch.context() as patch:
                patch.setattr(long_lines, "LONG", 0)
                patch.setattr(long_lines, "_ROWS", 2)
                assert spelled(rows_of(file)) == whole, entry["set"]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"a": "x"}] * 5 + [{"a": "y", "b": {"c": 1}}], [{"a": "x", "b": None}] * 5 + [{"a": "y", "b": {"c": 1}}]),
        (
            [{"a": {"b": 1}}] * 3 + [{"a": {"d": "x"}}],
            [{"a": {"b": 1, "d": None}}] * 3 + [{"a": {"b": None, "d": "x"}}],
        ),
        ([{"a": 1}] * 3 + [{"a": 1.5}], [{"a": 1.0}] * 3 + [{"a": 1.5}]),
        ([{"a": None}] * 3 + [{"a": "x"}], [{"a": None}] * 3 + [{"a": "x"}]),
        ([{"a": "2024-01-01T00:00:00"}] * 3, [{"a": "2024-01-01T00:00:00"}] * 3),
        ([{"a": "one\u2028two\x85three"}] * 3, [{"a": "one\u2028two\x85three"}] * 3),
        ([{"a": [{"b": "x"}]}] * 3 + [{"a": []}], [{"a": [{"b": "x"}]}] * 3 + [{"a": []}]),
    ],
)
def test_columns_are_those_of_all_rows(rows, expected, tmp_path, in_pieces):
    assert rows_of(write(tmp_path / "rows.jsonl", rows)) == expected


def test_a_text_may_hold_what_other_programs_end_lines_with(tmp_path):
    """In one piece too: beside a date, rows are read by Python."""
    row = {"a": "one\u2028two\x85three", "b": "2024-01-01T00:00:00"}
    assert rows_of(write(tmp_path / "rows.jsonl", [row])) == [row]


def test_rows_with_half_a_surrogate_pair_are_counted(tmp_path, in_pieces, log):
    (tmp_path / "rows.jsonl").write_text('{"a": "x"}\n\n{"a": "\\ud800"}\n{"a": "y"}\n')
    assert rows_of(str(tmp_path / "rows.jsonl")) == [{"a": "x"}, {"a": "y"}]
    assert "1 of 3 rows" in log.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n{"a": 1}\n{"a": "x"}\n', "not of one type"),
        ('{"a": 1}\n{"a": "x"}\n', "not of one type"),
        ('{"a": 1}\n[1]\n', "line 2 of .* is list; expected one object a line"),
        ('{"a": 1}\n{"a": \n', "line 2 of .* is no JSON"),
        ('{"a": "\\ud800"}\n', "half a surrogate pair"),
    ],
)
def test_what_is_no_table_is_one_line(text, message, tmp_path, in_pieces):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(FNSFTError, match=message):
        load_data(str(tmp_path / "rows.jsonl"))


def test_an_array_and_a_short_file_are_read_in_one_piece(tmp_path, monkeypatch):
    write(tmp_path / "rows.jsonl", [{"a": 1}])
    (tmp_path / "rows.json").write_text('\n[{"a": 1}]')
    assert not long_lines.is_long(tmp_path / "rows.jsonl")
    monkeypatch.setattr(long_lines, "LONG", 0)
    assert long_lines.is_long(tmp_path / "rows.jsonl")
    assert not long_lines.is_long(tmp_path / "rows.json")
