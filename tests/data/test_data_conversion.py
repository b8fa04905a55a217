import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from fnsft_trl import FNSFTError, to_trl_format
from fnsft_trl.data import conversion


QUESTIONS = [{"question": f"q{i}", "answer": "" if i % 4 == 1 else f"a{i}"} for i in range(12)]
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def contents(rows) -> list[str]:
    return [row["completion"][0]["content"] for row in rows]


@pytest.mark.parametrize("kind", [list, Dataset.from_list, lambda rows: IterableDataset.from_generator(rows.__iter__)])
def test_rows_without_an_answer_are_left_out_and_counted(kind, log):
    rows = to_trl_format(kind(QUESTIONS), name="trivia")
    assert contents(rows) == [f"a{i}" for i in range(12) if i % 4 != 1]
    if not isinstance(rows, IterableDataset):
        assert "trivia: 3 of 12 rows are left out" in log.text
    assert "the first is row 1" in log.text


@pytest.mark.parametrize("kind", [list, Dataset.from_list, lambda rows: IterableDataset.from_generator(rows.__iter__)])
def test_nothing_to_read_is_an_error(kind):
    for rows in ([], [{"question": "q", "answer": " "}] * 3):
        if rows or kind is list:
            with pytest.raises(FNSFTError, match=r"is empty|no row to train on"):
                list(to_trl_format(kind(rows)))


def test_every_reason_for_leaving_rows_out_is_said(log):
    def chat(*turns):
        return {"conversations": [{"from": role, "value": text} for role, text in turns]}

    rows = [chat(("human", "q"), ("gpt", f"a{i}")) for i in range(20)]
    rows[3] = chat(("human", "q"), ("bing", "a"))
    rows[5] = rows[9] = chat(("human", None), ("gpt", "a"))
    rows[7] = {"conversations": []}
    rows[11] = chat(("human", "q"))
    for data in (rows, Dataset.from_list(rows)):
        log.clear()
        assert len(to_trl_format(data, name="chats")) == 15
        assert "chats: 5 of 20 rows are left out: 2 where 'conversations' has a turn of the user without" in log.text
        for reason in ("role 'bing'", "'conversations' is empty", "'conversations' has no answer"):
            assert (
                f"1 where {reason}" in log.text or f"1 where 'conversations' has a message of the {reason}" in log.text
            )
        assert "(the first is row 5)" in log.text
    log.clear()
    stream = to_trl_format(IterableDataset.from_generator(rows.__iter__), name="chats")
    assert len(list(stream)) == 15
    assert "chats: rows are left out where 'conversations' is empty; the first is row 7" in log.text
    for reason in range(20):
        rows[reason] = chat(("human", "q"), (f"bot{reason}", "a"))
    with pytest.raises(
        FNSFTError, match=r"chats has no row to train on: .* has a message of the role 'bot0'.* in row 0"
    ):
        to_trl_format(rows, name="chats")


def test_what_trl_reads_is_left_alone():
    for rows in ([{"text": "t"}], [{"messages": CHAT, "tools": "[]"}], [{"prompt": CHAT[:1], "completion": CHAT[1:]}]):
        data = Dataset.from_list(rows)
        assert to_trl_format(data).to_list() == rows
        assert to_trl_format(data).features == data.features
    tokens = Dataset.from_list([{"input_ids": [1], "labels": [1], "source": "x"}])
    assert to_trl_format(tokens).column_names == ["input_ids", "labels"]


def test_columns_that_trl_would_take_for_a_format_are_left_out():
    rows = [{"prompt": "q", "prompt_id": "1", "messages": CHAT}]
    assert to_trl_format(Dataset.from_list(rows)).to_list() == [{"messages": CHAT}]


def test_the_log_names_what_is_read_and_what_is_not(log):
    to_trl_format([{"passage": "p", "question": "q", "answer": True}], name="BoolQ")
    assert "BoolQ is read as question, answer; not used: passage" in log.text
    to_trl_format([{"instruction": "q", "input": "", "output": "a", "system": "s"}], name="one")
    assert "one is read as instruction, input, output and system (system)\n" in log.text
    rows = [{"instruction": "q", "output": "a"}, {"question": "q", "answer": "a"}]
    to_trl_format(rows, name="two")
    assert "two is read as instruction, output; rows in which these are empty: as question, answer\n" in log.text


def test_rows_of_several_formats_become_one(log):
    rows = [
        {"question": "q", "answer": "a"},
        {"instruction": "q", "input": "i", "output": "a"},
        {"prompt": "q", "completion": "a"},
    ]
    from_list = to_trl_format(rows)
    assert [row["prompt"][0]["content"] for row in from_list] == ["q", "q\n\ni", "q"]
    keys = dict.fromkeys(key for row in rows for key in row)
    table = Dataset.from_list([{key: row.get(key) for key in keys} for row in rows])
    assert to_trl_format(table).to_list() == from_list.to_list()


def test_conversations_beside_questions_become_conversations(log):
    rows = [{"question": "q", "answer": "a", "messages": None}, {"question": None, "answer": None, "messages": CHAT}]
    for data in (rows, Dataset.from_list(rows)):
        assert to_trl_format(data).to_list() == [{"messages": CHAT}] * 2
    assert "1 rows of prompt and completion beside 1 conversations" in log.text or "all become messages" in log.text


def test_text_beside_questions_is_an_error():
    rows = [{"question": "q", "answer": "a", "text": None}, {"question": None, "answer": None, "text": "t"}]
    for data in (rows, Dataset.from_list(rows)):
        with pytest.raises(FNSFTError, match="mixes rows that cannot be trained together"):
            to_trl_format(data)
    with pytest.raises(FNSFTError, match="text after rows that become prompt, completion"):
        list(to_trl_format(IterableDataset.from_generator(rows.__iter__)))


def test_errors_name_the_dataset_and_the_row():
    with pytest.raises(FNSFTError, match="nq has no row to train on: 'answer' holds a list; expected text in row 0"):
        to_trl_format([{"question": "q", "answer": ["a"]}] * 2, name="nq")
    assert len(to_trl_format([{"question": "q", "answer": "a"}, {"question": "q", "answer": ["a"]}])) == 1
    with pytest.raises(FNSFTError, match="nli has the columns 'premise'"):
        to_trl_format([{"premise": "p"}], name="nli")


def test_a_large_dataset_keeps_its_order():
    rows = [{"question": f"q{i}", "answer": i} for i in range(3500)]
    assert contents(to_trl_format(Dataset.from_list(rows))) == [str(i) for i in range(3500)]


def test_columns_beside_the_text_that_trl_reads_are_kept():
    rows = [{"question": "q", "answer": "a", "tools": "[]", "labels": 3}]
    for data in (rows, Dataset.from_list(rows), IterableDataset.from_generator(rows.__iter__)):
        assert [sorted(row) for row in to_trl_format(data)] == [["completion", "prompt", "tools"]]


def test_every_split_is_converted():
    data = DatasetDict(train=Dataset.from_list(QUESTIONS), test=Dataset.from_list([{"text": "t"}]))
    converted = to_trl_format(data)
    assert {name: rows.column_names for name, rows in converted.items()} == {
        "train": ["prompt", "completion"],
        "test": ["text"],
    }


def test_another_version_of_the_table_is_not_mixed_up_in_the_cache_of_datasets(monkeypatch):
    data = Dataset.from_list(QUESTIONS)
    first, again = to_trl_format(data)._fingerprint, to_trl_format(data)._fingerprint
    monkeypatch.setattr(conversion, "_code", lambda: b"of another version")
    assert first == again != to_trl_format(data)._fingerprint


def test_what_messages_hold_beside_role_and_content_is_kept():
    """Also where it begins only behind the rows that are converted first, and beside rows of another format."""
    call = [{"name": "f"}]
    plain = [{"from": "human", "value": "q", "tool_calls": None}, {"from": "gpt", "value": "a", "tool_calls": None}]
    calling = [plain[0], {"from": "gpt", "value": None, "tool_calls": call}]
    rows = [{"conversations": each, "question": None, "answer": None} for each in [plain] * 1200 + [calling]]
    rows.append({"conversations": None, "question": "q", "answer": "a"})
    converted = to_trl_format(Dataset.from_list(rows))
    assert len(converted) == 1202
    assert converted[1200]["messages"][1] == {"role": "assistant", "content": "", "tool_calls": call}
    assert converted[1201]["messages"][1] == {"role": "assistant", "content": "a"}


def test_squad_becomes_prompts_and_completions():
    answers = [{"text": ["a", "b"], "answer_start": [1, 2]}, {"text": [], "answer_start": []}]
    rows = [{"id": "1", "context": "c", "question": "q", "answers": each} for each in answers]
    converted = to_trl_format(Dataset.from_list(rows))
    assert converted.to_list() == [
        {"prompt": [{"role": "user", "content": "c\n\nq"}], "completion": [{"role": "assistant", "content": "a"}]}
    ]


ROW = {"prompt": "a", "completion": "b"}
NO_ROWS = [None, "rows.jsonl", b"a", 3, ROW, {"train": [ROW]}, {"prompt": ["a"], "completion": ["b"]}]
NO_ROW = [None, "text", 3, ["a", "b"], [ROW], {1: "a"}, {None: "a", **ROW}]


@pytest.mark.parametrize("number", range(len(NO_ROWS)))
def test_what_is_no_list_of_rows_is_an_error_by_its_type(number):
    with pytest.raises(FNSFTError, match=f"^mine is a {type(NO_ROWS[number]).__name__}; expected a Dataset or a list"):
        to_trl_format(NO_ROWS[number], name="mine")


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("number", range(len(NO_ROW)))
def test_what_is_no_row_is_an_error_with_its_number(number, place):
    rows = [ROW, ROW, ROW]
    rows[place] = NO_ROW[number]
    with pytest.raises(FNSFTError, match=f"^row {place} of mine (is a|has a column called)"):
        to_trl_format(iter(rows), name="mine")


@pytest.mark.parametrize(
    "columns",
    [
        3,
        [],
        ["prompt"],
        {"a": "b"},
        {"prompt": None, "completion": "completion"},
        "",
        "=",
        True,
        "prompt=a,completion=a",
    ],
)
def test_columns_that_choose_nothing_are_an_error(columns):
    with pytest.raises(FNSFTError, match=r"^columns is .*; write prompt=COLUMN"):
        to_trl_format([ROW], columns)
