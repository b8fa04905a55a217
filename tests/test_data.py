import json

import pytest

from fnsft_trl import FNSFTError
from fnsft_trl.data import check_rows, load_data, load_texts


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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"question": "one", "answer": "two"}\n', "has the columns question, answer; expected one of"),
        ("a.csv", "text\n", "is empty"),
        ("a.xyz", "text", "ending of"),
        ("a.json", "{broken", "cannot be read"),
        ("a.jsonl", "", "is empty"),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(FNSFTError, match=message):
        load_texts([str(tmp_path / name)])


def test_several_datasets_are_one_stream(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name}1\n{name}2\n")
    rows = [row for part in load_texts([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]).values() for row in part]
    assert [row["text"] for row in rows] == ["a1", "a2", "b1", "b2"]


def test_another_text_column_may_be_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "one"}\n')
    data = load_data(str(tmp_path / "a.jsonl"), split="train")
    check_rows(data, "a", text_field="content")
    with pytest.raises(FNSFTError, match="has the columns content"):
        check_rows(data, "a")


def test_what_does_not_exist_says_so():
    with pytest.raises(FNSFTError, match="does not exist"):
        load_data("nowhere.jsonl")
    with pytest.raises(FNSFTError, match="neither here nor on the Hub"):
        load_data("nobody/nothing")
