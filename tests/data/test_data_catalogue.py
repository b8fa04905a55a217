"""Every row of the catalogue of published shapes does what the catalogue says, however it is stored."""

import itertools
import json
import math

import pytest
from datasets import Dataset
from helpers import ROOT

from fnsft_trl import FNSFTError, to_trl_format
from fnsft_trl.data.sources import load_data
from fnsft_trl.data.together import put_together


DOCS = ROOT / "docs" / "data.md"
CATALOGUE = [json.loads(line) for line in (ROOT / "tests" / "rows" / "catalogue.jsonl").read_text().splitlines()]
READ = [entry for entry in CATALOGUE if "becomes" in entry]
REFUSED = [entry for entry in CATALOGUE if "refused" in entry]


def stored(entry: dict, directory):
    """The row of an entry in every way that a user may have it."""
    row = entry["row"]
    yield "list", [row]
    file = directory / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    yield "jsonl", file
    if entry.get("in_tables", True):
        yield "from_list", Dataset.from_list([row])
        Dataset.from_list([row]).to_parquet(directory / "rows.parquet")
        yield "parquet", directory / "rows.parquet"


def read(data, **options):
    return to_trl_format(load_data(str(data))["train"] if not isinstance(data, list | Dataset) else data, **options)


@pytest.mark.slow
@pytest.mark.parametrize("entry", CATALOGUE, ids=lambda entry: entry["set"])
def test_a_row_does_what_the_catalogue_says(entry, tmp_path, log):
    for way, data in stored(entry, tmp_path):
        log.clear()
        if "becomes" not in entry:
            wanted = [f"no row to (train on|read): .*{entry['left_out']}"] if "left_out" in entry else entry["refused"]
            for words in wanted:
                with pytest.raises(FNSFTError, match=words):
                    read(data)
            continue
        assert read(data).to_list() == [entry["becomes"]], way
        for name in entry.get("unused", ()):
            assert name in log.text.partition("not used: ")[2].splitlines()[0].split(", "), way
        for name in entry.get("unread", ()):
            assert name in log.text.partition("keys of its messages that are not used: ")[2].splitlines()[0], way
    for columns, becomes in entry.get("choices", {}).items():
        for way, data in stored(entry, tmp_path):
            assert read(data, columns=columns).to_list() == [becomes], (columns, way)


def test_what_is_refused_or_left_out_is_read_where_that_can_be_asked_for():
    named = {entry["set"] for entry in REFUSED if any("--columns" in words for words in entry["refused"])}
    assert named <= {entry["set"] for entry in REFUSED if entry.get("choices")}
    assert not any(value != value for entry in READ for value in entry["row"].values() if isinstance(value, float))
    assert any(math.isnan(entry["row"].get("answer") or 0) for entry in CATALOGUE if "left_out" in entry)


def test_any_two_conversational_shapes_are_trained_together():
    shapes = {}
    for entry in READ:
        if "text" not in entry["becomes"]:
            data = to_trl_format(Dataset.from_list([entry["row"]]))
            shapes.setdefault((tuple(sorted(data.column_names)), str(data.features)), (entry["becomes"], data))
    assert len(shapes) > 5
    for (one, first), (other, second) in itertools.combinations(shapes.values(), 2):
        both = put_together([first, second]).to_list()
        alike = one.keys() >= {"prompt"} and other.keys() >= {"prompt"}
        for row, becomes in zip(both, (one, other), strict=True):
            rest = {name: value for name, value in becomes.items() if name not in ("prompt", "completion")}
            whole = becomes if alike or "prompt" not in becomes else conversation(becomes) | rest
            assert {name: value for name, value in row.items() if value} == whole


def test_any_two_conversations_may_stand_in_one_file():
    conversations = [entry for entry in READ if "messages" in entry["becomes"]]
    assert len(conversations) > 15
    for first, second in itertools.combinations(conversations, 2):
        both = to_trl_format([first["row"], second["row"]])
        assert both["messages"] == [first["becomes"]["messages"], second["becomes"]["messages"]]


def conversation(row: dict) -> dict:
    return {"messages": row["prompt"] + row["completion"]}


def catalogue_table() -> str:
    """The catalogue as a table, one line for each set."""
    lines = ["| set | columns | becomes | |", "|---|---|---|---|"]
    for entry in CATALOGUE:
        columns = ", ".join(f"`{name.removeprefix(chr(0xFEFF))}`" for name in list(entry["row"])[:4])
        more = ", ..." if len(entry["row"]) > 4 else ""
        if "becomes" in entry:
            becomes = ", ".join(f"`{name}`" for name in entry["becomes"])
        elif "left_out" in entry:
            becomes = f"left out: {entry['left_out']}"
        else:
            becomes = "an error"
        choices = "; ".join(f"`--columns {columns}`" for columns in entry.get("choices", {}))
        notes = "; ".join(part for part in (choices, entry.get("note", "")) if part)
        lines.append(f"| {entry['set']} | {columns}{more} | {becomes} | {notes} |".replace("|  |", "| |"))
    return "\n".join(dict.fromkeys(lines))


def test_the_table_in_the_docs_is_the_catalogue():
    assert catalogue_table() in DOCS.read_text()
