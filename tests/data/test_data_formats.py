"""Every format of the table, with what can be wrong with a row."""

import copy
import math
import subprocess
import sys

import pytest
from helpers import ROOT
from hypothesis import example, given
from hypothesis import strategies as st

from fnsft_trl import FNSFTError
from fnsft_trl.data.cells import UnusableRow
from fnsft_trl.data.formats import FORMATS, MESSAGES, TEXT, TOKENS, convert_row, find_formats, parse_columns


DOCS = ROOT / "docs" / "data.md"
LONG = "long " * 50_000
UNICODE = "日本語 ñ 🙂 \u202e\x00 {braces} <|im_end|>"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def turns(question, answer, *before):
    return {"prompt": [*before, user(question)], "completion": [assistant(answer)]}


SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
MULTI = [system("s"), user("q"), assistant("a"), user("q2"), assistant("a2")]
SQUAD = {"text": ["a", "b"], "answer_start": [0, 3]}

CASES = [
    ({"instruction": "q", "response": "a"}, turns("q", "a")),
    ({"instruction": "q", "output": "a"}, turns("q", "a")),
    ({"instruction": "q", "context": "c", "response": "a"}, turns("q\n\nc", "a")),
    ({"instruction": "q", "context": "", "response": "a", "category": "x"}, turns("q", "a")),
    ({"instruction": "q", "context": None, "response": "a"}, turns("q", "a")),
    ({"instruction": "q", "input": "i", "output": "a"}, turns("q\n\ni", "a")),
    ({"instruction": "q", "input": " \n", "output": "a", "text": "all of it"}, turns("q", "a")),
    ({"question": "q", "answer": "a"}, turns("q", "a")),
    ({"question": "q", "response": "a"}, turns("q", "a")),
    ({"system_prompt": "s", "question": "q", "response": "a"}, turns("q", "a", system("s"))),
    ({"system_prompt": "", "question": "q", "response": "a"}, turns("q", "a")),
    ({"prompt": "q", "completion": "a"}, turns("q", "a")),
    ({"prompt": MULTI[:2], "completion": [assistant("a")]}, turns("q", "a", system("s"))),
    ({"prompt": [user("q")], "completion": "a"}, turns("q", "a")),
    ({"prompt": "q", "response": "a"}, turns("q", "a")),
    ({"context": "c", "question": "q", "answer": "a"}, turns("c\n\nq", "a")),
    ({"id": "1", "title": "t", "context": "c", "question": "q", "answers": SQUAD}, turns("c\n\nq", "a")),
    ({"context": "q", "response": "a"}, turns("q", "a")),
    ({"Context": "q", "Response": "a"}, turns("q", "a")),
    ({"QUESTION": "q", "Answer": "a"}, turns("q", "a")),
    ({"input": "q", "output": "a"}, turns("q", "a")),
    ({"system": "s", "user": "q", "assistant": "a"}, turns("q", "a", system("s"))),
    ({"system": None, "user": "q", "assistant": "a"}, turns("q", "a")),
    ({"message_1": "q", "message_2": "a"}, turns("q", "a")),
    ({"role_1": "Physicist", "topic;": "t", "sub_topic": "u", "message_1": "q", "message_2": "a"}, turns("q", "a")),
    ({"topic": "t", "message_1": "q", "message_2": "a"}, turns("q", "a")),
    ({"messages": MULTI}, {"messages": MULTI}),
    ({"prompt_id": "1", "prompt": "q", "messages": MULTI}, {"messages": MULTI}),
    ({"messages": MULTI[1:3], "system": "s"}, {"messages": MULTI[:3]}),
    ({"messages": MULTI, "system": "another"}, {"messages": MULTI}),
    ({"conversations": SHAREGPT}, {"messages": [user("q"), assistant("a")]}),
    (
        {"conversations": [{"from": "system", "value": "s"}, *SHAREGPT * 2]},
        {"messages": [system("s"), *MULTI[1:3] * 2]},
    ),
    ({"conversations": {"from": ["human", "gpt"], "value": ["q", "a"]}}, {"messages": [user("q"), assistant("a")]}),
    ({"conversations": MULTI}, {"messages": MULTI}),
    ({"conversation": [{"input": "q", "output": "a"}, {"input": "q2", "output": "a2"}]}, {"messages": MULTI[1:]}),
    ({"dialog": ["q", "a", "q2", "a2"]}, {"messages": MULTI[1:]}),
    ({"dialogue": '[{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]'}, {"messages": MULTI[1:3]}),
    ({"system": "SYSTEM: s\n", "chat": "USER: q\n\n\nASSISTANT: a <|endoftext|>\n"}, {"messages": MULTI[:3]}),
    ({"query": "q", "response": "a"}, turns("q", "a")),
    ({"query": "q", "answer": "a"}, turns("q", "a")),
    ({"query": "q", "answers": "a"}, turns("q", "a")),
    ({"definition": "d", "inputs": "q", "targets": "a"}, turns("d\n\nq", "a")),
    ({"input": "q", "target": "a"}, turns("q", "a")),
    ({"inputs": "q", "targets": "a"}, turns("q", "a")),
    ({"inputs": [3], "inputs_pretokenized": "q", "targets": [4], "targets_pretokenized": " a"}, turns("q", " a")),
    ({"problem": "q", "solution": "a", "answer": "other"}, turns("q", "a")),
    ({"problem": "q", "solution": "a", "messages": MULTI[1:3]}, {"messages": MULTI[1:3]}),
    ({"\ufeffprompt": "q", " completion": "a", "Prompt": "other"}, turns("q", "a")),
    ({"text": "t"}, {"text": "t"}),
    ({"Text": "t", "label": 3}, {"text": "t"}),
    ({"input_ids": [1, 2], "labels": [1, 2]}, {}),
    ({"question": UNICODE, "answer": UNICODE}, turns(UNICODE, UNICODE)),
    ({"question": LONG, "answer": LONG}, turns(LONG, LONG)),
    ({"question": "  q\n", "answer": " a "}, turns("  q\n", " a ")),
    ({"question": "6 * 7?", "answer": 42}, turns("6 * 7?", "42")),
    ({"question": "true?", "answer": False}, turns("true?", "False")),
    # two formats match: the one with more columns, then the one further up in the table
    ({"question": "q", "answer": "a", "response": "other"}, turns("q", "a")),
    ({"instruction": "q", "input": "i", "output": "a", "response": "other"}, turns("q\n\ni", "a")),
    # rows of a dataset of several formats, whose other columns are null
    ({"question": None, "answer": None, "instruction": "q", "output": "a"}, turns("q", "a")),
    ({"question": "q", "answer": None, "response": "a"}, turns("q", "a")),
    ({"question": "", "answer": "", "text": "t"}, {"text": "t"}),
    # two shapes in one row: the one that goes further, or holds an answer at all
    ({"instruction": "q", "response": "a", "conversations": MULTI}, {"messages": MULTI}),
    ({"prompt": "q", "completion": "a", "messages": MULTI[1:3]}, turns("q", "a")),
    ({"prompt": MULTI[:4], "completion": "a2", "messages": MULTI[1:3]},
     {"prompt": MULTI[:4], "completion": [assistant("a2")]}),
    ({"prompt": "q", "completion": None, "messages": MULTI[1:3]}, {"messages": MULTI[1:3]}),
    ({"prompt": "q", "completion": "a", "messages": MULTI[1:2]}, turns("q", "a")),
    ({"messages": MULTI[1:2], "conversations": SHAREGPT}, {"messages": MULTI[1:3]}),
]  # fmt: skip


@pytest.mark.parametrize(("row", "expected"), CASES, ids=lambda value: ", ".join(value)[:60])
def test_a_row_becomes_what_trl_reads(row, expected):
    assert convert_row(row, find_formats(row)) == expected


def test_every_format_of_the_table_has_a_case():
    found = {find_formats(row)[0].format.name for row, _ in CASES}
    assert found == {form.name for form in FORMATS}


@pytest.mark.parametrize("nothing", [None, "", "  \n", math.nan])
@pytest.mark.parametrize("form", [form for form in FORMATS if form.becomes != TOKENS], ids=lambda form: form.name)
def test_a_row_without_a_required_text_is_never_read(form, nothing):
    for missing in form.required:
        rest = {column: "filled" for column in form.columns if column != missing}
        row = rest | {missing: nothing}
        if {"input", "output"} <= rest.keys() or {"context", "response"} <= rest.keys():
            assert convert_row(row, find_formats(row)) == turns("filled", "filled")  # it is a format of its own
            continue
        with pytest.raises(UnusableRow, match=missing):
            convert_row(row, find_formats(row))


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "q", "input": "i", "output": "", "text": "### Instruction:\nq\n\n### Response:\n"},
        {"question": "q", "answer": None, "context": "c", "response": None},
        {"context": "c", "question": "q", "answers": {"text": [], "answer_start": []}},
        {"messages": []},
        {"messages": [user("q")]},
        {"messages": [user("q"), assistant("")]},
        {"messages": [user("q"), assistant("a"), user("q"), assistant(None)]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": " "}]},
        {"prompt": [user("q")], "completion": []},
        {"prompt": [user("q")], "completion": [assistant("")]},
    ],
    ids=str,
)
def test_an_empty_answer_is_not_read_as_something_else(row):
    with pytest.raises(UnusableRow):
        convert_row(row, find_formats(row))


def test_an_answer_may_be_a_call_of_a_tool():
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function"}]}
    row = {"messages": [user("q"), call | {"content": None}, {"role": "tool", "content": "r"}, assistant("a")]}
    assert convert_row(row, find_formats(row)) == {"messages": [user("q"), call, *row["messages"][2:]]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "answer": ["a", "b"]}, "'answer' holds a list; expected text"),
        ({"question": "q", "answer": {"a": "b"}}, "'answer' holds a dict; expected text"),
        ({"messages": "q"}, "'messages' holds a str; expected a list of messages"),
        ({"conversations": [{"from": "narrator", "value": "q"}]}, "role 'narrator'; expected one of: human, prompter"),
        ({"text": {"a": 1}}, "'text' holds a dict"),
    ],
    ids=str,
)
def test_a_cell_that_is_no_text_is_an_error(row, message):
    with pytest.raises(FNSFTError, match=message):
        convert_row(row, find_formats(row))


PAIRS = [form for form in FORMATS if form.completion]


@given(st.sampled_from(PAIRS), st.integers(0, 4), st.integers(0, 2), st.booleans())
def test_of_two_shapes_the_one_that_goes_further_is_read(form, answers, unanswered, has_answer):
    """In turns up to the last answer: what stands behind it teaches nothing."""
    conversation = MULTI[1:3] * answers + [user("and?")] * unanswered
    row = dict.fromkeys(form.required, "filled") | {"messages": conversation}
    if not has_answer:
        row[form.completion] = None
    try:
        converted = convert_row(row, find_formats(row))
    except UnusableRow:
        assert not has_answer
        assert answers == 0
        return
    further = 2 * answers >= 2 * has_answer + (not form.is_short) if answers else False
    expected = "messages" if further or not has_answer else "prompt"
    assert expected in converted
    assert converted.get("messages", conversation) == conversation


ANSWERS = ["code", "solution", "target", "summary", "Reply", *sorted({form.completion for form in PAIRS})]


@pytest.mark.parametrize("beside", [*ANSWERS, "role", "parent_id", "message_tree_id", "Speaker"])
def test_text_beside_an_answer_or_a_place_is_only_read_if_it_is_asked_for(beside):
    row = {"id": 1, "text": "q", beside: "x"}
    with pytest.raises(FNSFTError, match=f"has the column 'text' beside '{beside}'.*text=text"):
        find_formats(row)
    assert convert_row(row, find_formats(row, chosen="text=text")) == {"text": "q"}
    if beside in ANSWERS:
        assert convert_row(row, find_formats(row, chosen=f"prompt=text,completion={beside}")) == turns("q", "x")
    longer = row | {"question": "q", "answer": "a", "messages": None}
    assert find_formats(longer)[0].format.becomes not in (TEXT, MESSAGES)


@pytest.mark.parametrize("beside", ["label", "title", "source", "url", "lang", "prompt", "author"])
def test_text_beside_what_is_about_it_is_read(beside):
    row = {"text": "t", beside: "x"}
    assert convert_row(row, find_formats(row)) == {"text": "t"}


def test_unknown_columns_name_what_was_found_the_nearest_and_the_override():
    with pytest.raises(FNSFTError) as error:
        find_formats(["id", "questions", "answer_text"])
    for part in ("'id', 'questions', 'answer_text'", "question, answer", "--columns prompt=COLUMN,completion=COLUMN"):
        assert part in str(error.value)
    with pytest.raises(FNSFTError, match="no known format"):
        find_formats(["prompt", "chosen", "rejected"])
    with pytest.raises(FNSFTError, match="the nearest are prompt, completion;"):  # nothing is near: the first ones
        find_formats(["title", "body"])


@pytest.mark.parametrize(
    ("columns", "row", "expected"),
    [
        ("prompt=title,completion=body", {"title": "q", "body": "a", "text": "t"}, turns("q", "a")),
        (" prompt = title , completion = body ", {"title": "q", "body": "a"}, turns("q", "a")),
        ({"prompt": "title", "completion": "body", "system": "rules"}, {"title": "q", "body": "a", "rules": "s"},
         turns("q", "a", system("s"))),
        ("text=story", {"story": "t", "question": "q", "answer": "a"}, {"text": "t"}),
        ("messages=dialog,system=rules", {"dialog": SHAREGPT, "rules": "s"}, {"messages": MULTI[:3]}),
    ],
    ids=str,
)  # fmt: skip
def test_columns_can_be_chosen(columns, row, expected):
    assert convert_row(row, find_formats(row, chosen=columns)) == expected


@pytest.mark.parametrize(
    "columns", ["prompt=a", "title", "prompt=a,completion=", "text=a,prompt=b", "text=a,text=b", "", "answer=a", {}]
)
def test_a_choice_that_is_not_understood_says_how_to_write_one(columns):
    with pytest.raises(FNSFTError, match="write prompt=COLUMN,completion=COLUMN"):
        parse_columns(columns)


def test_a_chosen_column_must_exist():
    with pytest.raises(FNSFTError, match=r"no column 'titel'; did you mean 'title'.*it has 'title', 'body'"):
        find_formats(["title", "body"], chosen="prompt=titel,completion=body")


def test_the_text_field_of_the_trainer_is_read_and_written():
    row = {"content": "t", "question": "q", "answer": "a"}
    assert convert_row(row, find_formats(row, text_field="content")) == {"content": "t"}
    assert convert_row({"text": "t"}, find_formats(["text"], text_field="content")) == {"content": "t"}
    assert convert_row({"x": "t"}, find_formats(["x"], chosen="text=x", text_field="content")) == {"content": "t"}


def test_the_table_needs_no_torch():
    code = "import sys, fnsft_trl.data.config; assert not {'torch', 'datasets', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def formats_table() -> str:
    lines = ["| columns | the user's turn | the answer | may be empty | becomes |", "|---|---|---|---|---|"]
    for form in FORMATS:
        name = ", ".join(f"`{column}`" for column in form.columns if column not in form.labels)
        if form.labels and form.becomes != TOKENS:
            name += f" (with or without {', '.join(f'`{label}`' for label in form.labels)})"
        cells = [
            ", then ".join(f"`{column}`" for column in form.prompt) if form.completion else "",
            f"`{form.completion}`" if form.completion else "",
            ", ".join(f"`{column}`" for column in form.optional),
            ", ".join(f"`{column}`" for column in form.becomes.split(", ")),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |"))
    return "\n".join(lines)


def test_the_table_in_the_docs_is_the_one_in_the_code():
    assert formats_table() in DOCS.read_text()


COLUMNS = sorted({column for form in FORMATS for column in form.columns} | {"system", "tools", "x"})
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
MESSAGE_KEYS = st.sampled_from(["role", "from", "content", "value", "tool_calls", "text", "x"])
ROLES = st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool", "someone"])
CELLS = st.recursive(
    SCALARS | ROLES,
    lambda cells: st.lists(cells, max_size=3) | st.dictionaries(MESSAGE_KEYS, cells, max_size=3),
    max_leaves=6,
)
MESSAGES_OF_ALL_KINDS = st.lists(
    st.fixed_dictionaries({"role": ROLES, "content": SCALARS}, optional={"tool_calls": CELLS}), max_size=4
)


@given(st.dictionaries(st.sampled_from(COLUMNS), CELLS | MESSAGES_OF_ALL_KINDS, min_size=1, max_size=5))
@example({"text": {"text": True}, "answer": []})
@example({"text": {"text": {"role": None}}, "answer": []})
def test_any_row_is_read_left_out_or_refused_and_never_changed(row):
    before = copy.deepcopy(row)
    try:
        converted = convert_row(row, find_formats(row))
    except (UnusableRow, FNSFTError):
        return
    finally:
        assert repr(row) == repr(before)
    assert set(converted) in ({"prompt", "completion"}, {"messages"}, {"text"}, set())
    for turns_of_row in (converted.get(name, ()) for name in ("prompt", "completion", "messages")):
        for message in turns_of_row:
            assert message["role"] in ("system", "developer", "user", "assistant", "tool")


@given(st.text("promtcleinxsyag=, ", max_size=30) | st.text(max_size=10))
def test_any_choice_of_columns_is_read_or_refused(text):
    try:
        chosen = parse_columns(text)
    except FNSFTError:
        return
    assert set(chosen) - {"system"} in ({"prompt", "completion"}, {"messages"}, {"text"})
    assert parse_columns(chosen) == chosen


TARGETS = st.sampled_from([("prompt", "completion"), ("messages",), ("text",), ("system", "completion", "prompt")])


@given(TARGETS, st.lists(st.text("ab c_=", min_size=1).filter(str.strip), min_size=3, max_size=3, unique_by=str.strip))
def test_chosen_columns_come_back_from_their_text(targets, columns):
    chosen = {target: name.strip() for target, name in zip(targets, columns, strict=False)}
    assert parse_columns(" , ".join(f"{target} = {name}" for target, name in chosen.items())) == chosen
