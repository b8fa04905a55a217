import csv
import json
import os
import tempfile
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from datasets.exceptions import DatasetNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st

from fnsft_trl import FNSFTError
from fnsft_trl.cli.compare import _strings
from fnsft_trl.data import sources
from fnsft_trl.data.sources import load_data, load_texts


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps([{"text": "one"}, {"text": "two"}])),
        ("a.jsonl", '{"text": "one"}\n{"text": "two"}\n'),
        ("a.csv", "text\none\ntwo\n"),
        ("a.txt", "one\ntwo\n"),
    ],
)
def test_local_files_load(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert load_data(str(tmp_path / name))["train"]["text"][:] == ["one", "two"]
    assert load_data(str(tmp_path / name), split="train")["text"][:] == ["one", "two"]


def test_parquet_and_directories_load(tmp_path):
    rows = Dataset.from_dict({"text": ["one", "two"]})
    rows.to_parquet(tmp_path / "a.parquet")
    assert load_data(str(tmp_path / "a.parquet"), split="train")["text"][:] == ["one", "two"]
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "train.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "many" / "validation.jsonl").write_text('{"text": "two"}\n')
    data = load_data(str(tmp_path / "many"))
    assert {name: part["text"][:] for name, part in data.items()} == {"train": ["one"], "validation": ["two"]}
    rows.save_to_disk(tmp_path / "saved")
    assert load_data(str(tmp_path / "saved"), split="train")["text"][:] == ["one", "two"]
    DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "splits")
    assert set(load_data(str(tmp_path / "splits"))) == {"train", "test"}
    with pytest.raises(FNSFTError, match="no split 'dev'; it has train, test"):
        load_data(str(tmp_path / "splits"), split="dev")


@pytest.mark.parametrize("name", ["a.jsonl", "many", "json"])
def test_an_edit_in_place_is_seen_whatever_size_and_date_say(tmp_path, name):
    file = tmp_path / "a.jsonl" if name == "a.jsonl" else tmp_path / "many" / "a.jsonl"
    file.parent.mkdir(exist_ok=True)

    def load_data(path, split):
        if name == "json":
            return sources.load_data("json", split=split, data_files={"train": [str(file.parent / "*.jsonl")]})
        return sources.load_data(path, split=split)

    file.write_text('{"text": "one"}\n')
    before = file.stat()
    assert load_data(str(tmp_path / name), split="train")["text"][:] == ["one"]
    file.write_text('{"text": "two"}\n')
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert load_data(str(tmp_path / name), split="train")["text"][:] == ["two"]


def test_cells_of_a_csv_file_stay_as_they_are_written(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\ncode?,007\nwhat?,None\nhow much?,1.50\nnothing?,\n")
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "train.csv").write_text((tmp_path / "a.csv").read_text())
    for rows in load_texts([str(tmp_path / "a.csv"), str(tmp_path / "many")]).values():
        assert [row["completion"][0]["content"] for row in rows] == ["007", "None", "1.50"]


CELL = st.text('ab,;"\n é', max_size=4)


@pytest.mark.slow
@given(
    st.lists(st.sampled_from(["prompt", "completion", "note", ""]), min_size=2, max_size=4, unique=True),
    st.lists(st.lists(CELL, min_size=1, max_size=6), min_size=1, max_size=5),
)
@settings(max_examples=60)
def test_a_cell_of_a_csv_file_is_never_read_under_another_column(header, rows):
    """A row that is longer than the header is an error that says where; of a shorter one the rest is empty."""
    rows = [row for row in rows if any(cell.strip() for cell in row)] or [["a"]]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.csv")
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
        error = None
        try:
            data = load_data(str(path), split="train")
        except FNSFTError as refused:
            error = refused
    if error is not None:
        assert max(map(len, rows)) > len(header)
        assert "line" in str(error)
        return
    assert not any(any(row[len(header) :]) for row in rows)
    names = [name or f"Unnamed: {number}" for number, name in enumerate(header)]
    read = [[(row[name] or "").replace("\r\n", "\n") for name in names] for row in data]
    assert read == [(row + [""] * len(header))[: len(header)] for row in rows]


def test_a_mixture_reads_a_csv_file_by_its_header_too(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\none,two,three\n")
    with pytest.raises(FNSFTError, match="has 2 columns, but 3 cells in the row that ends in line 2"):
        load_data("csv", split="train", data_files=str(tmp_path / "a.csv"))
    (tmp_path / "a.csv").write_text("question,answer\none,007\n" + "x" * 200_000 + ",b\n")
    assert load_data("csv", split="train", data_files=str(tmp_path / "a.csv"))["answer"][:] == ["007", "b"]


def test_what_is_read_by_another_version_is_read_again(tmp_path, monkeypatch):
    files = [tmp_path / "a.csv"]
    files[0].write_text("text\none\n")
    before = sources._cache_of(files)
    assert sources._cache_of(files) == before
    monkeypatch.setattr(sources, "version", lambda package: "99")
    assert sources._cache_of(files) != before


def test_strings_of_a_json_file_stay_as_they_are_written(tmp_path):
    answers = ["2009-01-01", "2009-01-01T00:00:00Z", "12:30", "007", "null", "NaN"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"question": "q", "answer": a}) for a in answers))
    (rows,) = load_texts([str(tmp_path / "a.jsonl")]).values()
    assert [row["completion"][0]["content"] for row in rows] == answers
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"question": "q", "answer": a}) for a in answers[:1] * 3))
    (rows,) = load_texts([str(tmp_path / "b.jsonl")]).values()
    assert rows[0]["completion"][0]["content"] == "2009-01-01"


@pytest.mark.parametrize(("first", "length"), [(10, 30), (200, 100_000)])
def test_rows_of_several_formats_in_one_file(tmp_path, first, length):
    """The second format begins in the first block that is read of the file, or far behind it."""
    with (tmp_path / "a.jsonl").open("w") as file:
        for number in range(first):
            file.write(json.dumps({"question": f"question {number} of many?", "answer": "a" * length}) + "\n")
        file.write(json.dumps({"instruction": "do", "input": "this", "output": "done"}) + "\n")
    (rows,) = load_texts([str(tmp_path / "a.jsonl")]).values()
    assert len(rows) == first + 1
    assert rows[-1]["prompt"] == [{"role": "user", "content": "do\n\nthis"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"premise": "one", "hypothesis": "two"}\n', "has the columns 'premise', 'hypothesis'"),
        ("a.csv", "text\n", "is empty"),
        ("a.csv", "text\n\n", "is empty|no row"),
        ("a.xyz", "text", "ending of"),
        ("a.json", "{broken", "cannot be read"),
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", '{"question": "one", "answer": ""}\n', "no row to train on: 'answer' is empty.* in row 0"),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(FNSFTError, match=message):
        load_texts([str(tmp_path / name)])


def test_a_directory_whose_files_differ_says_why(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\none,two\n")
    (tmp_path / "b.csv").write_text("title,body\none,two\n")
    with pytest.raises(FNSFTError, match=r"cannot be read: .*question"):
        load_data(str(tmp_path))


def test_a_file_has_no_configurations(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\none,two\n")
    with pytest.raises(
        FNSFTError, match=r"a\.csv has no configurations, but 'main' is asked for; drop dataset_config"
    ):
        load_data(str(tmp_path / "a.csv"), config_name="main")


def test_several_datasets_are_each_read_in_their_own_format(tmp_path):
    (tmp_path / "a.txt").write_text("a1\na2\n")
    (tmp_path / "b.jsonl").write_text('{"question": "b1", "answer": "b2"}\n')
    a, b = load_texts([str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]).values()
    assert a["text"][:] == ["a1", "a2"]
    assert b.column_names == ["prompt", "completion"]
    with pytest.raises(FNSFTError, match="named twice"):
        load_texts([str(tmp_path / "a.txt")] * 2)


def test_a_dataset_of_the_hub_is_streamed(monkeypatch):
    """Of an endless corpus, as many rows are made as are read."""
    made = []

    def corpus():
        for number in range(10**9):
            made.append(number)
            yield {"question": f"q{number}", "answer": "" if number % 2 else "a"}

    def load(name, config_name, *, split, streaming):
        assert (name, split, streaming) == ("org/huge", "train", True)
        return IterableDataset.from_generator(corpus)

    monkeypatch.setattr(sources, "load_dataset", load)
    rows = iter(load_texts(["org/huge"])["org/huge"])
    assert [next(rows)["prompt"][0]["content"] for _ in range(3)] == ["q0", "q2", "q4"]
    assert max(made) < 100


def test_what_does_not_exist_says_so():
    with pytest.raises(FNSFTError, match="does not exist"):
        load_data("nowhere.jsonl")
    with pytest.raises(FNSFTError, match=r"neither here nor on the Hub|the Hub cannot be reached"):
        load_data("nobody/nothing")


def test_a_hub_that_does_not_answer_is_not_a_wrong_name(monkeypatch):
    def load(*args, **options):
        raise found

    monkeypatch.setattr(sources, "load_dataset", load)
    found = ConnectionError("Couldn't reach 'a/b' on the Hub")
    with pytest.raises(FNSFTError, match=r"'a/b' is not here, and the Hub cannot be reached.*with a connection"):
        load_data("a/b")
    found = DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub")
    with pytest.raises(FNSFTError, match=r"'a/b' was found neither here nor on the Hub.*the name is right"):
        load_data("a/b")


def test_a_comparison_reads_the_text_of_any_format(tmp_path):
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "b.jsonl").write_text('{"system": "s", "question": "q", "answer": "a"}\n')
    chat = '{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}'
    (tmp_path / "c.jsonl").write_text(chat)
    parts = load_texts([str(tmp_path / name) for name in ("a.txt", "b.jsonl", "c.jsonl")])
    assert [text for rows in parts.values() for text in _strings(rows)] == ["one", "s\nq\na", "q\na"]


def test_one_broken_character_ends_no_run(tmp_path, log):
    rows = [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(5)]
    rows[2]["completion"] = "\ud800"
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_data(str(tmp_path / "a.jsonl"))["train"]["completion"][:] == ["a0", "a1", "a3", "a4"]
    assert "1 of 5 rows are left out: 1 where a text holds half a surrogate pair (the first is row 2)" in log.text


def test_a_dataset_of_several_configurations_names_them(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name}"}}\n')
    files = "\n".join(f"- config_name: {name}\n  data_files: {name}.jsonl" for name in ("one", "two"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{files}\n---\n")
    with pytest.raises(FNSFTError, match="has the configurations 'one', 'two'; name one with dataset_config"):
        load_data(str(tmp_path))
    assert load_data(str(tmp_path), config_name="two")["train"]["text"][:] == ["two"]


def test_a_split_that_is_not_there_names_those_that_are(tmp_path):
    (tmp_path / "train_sft.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train_sft\n    path: train_sft.jsonl\n---\n"
    )
    with pytest.raises(FNSFTError, match="train_sft"):
        load_data(str(tmp_path), split="train")
