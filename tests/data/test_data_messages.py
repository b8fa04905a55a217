"""However a conversation is spelt, it is read as what it says; what is no text is in no text."""

import copy
import json

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from fnsft_trl import FNSFTError, to_trl_format
from fnsft_trl.data.cells import UnusableRow
from fnsft_trl.data.conversion import convert
from fnsft_trl.data.dialects import dialect_of
from fnsft_trl.data.formats import convert_row, find_formats
from fnsft_trl.data.messages import ROLES, TURN_KEYS, Dialect, read_messages, unread_keys


TEXT = st.text("ab \n{}'\"é", min_size=1, max_size=6).filter(str.strip)
SPELT = {role: [name for name, known in ROLES.items() if known == role] for role in set(ROLES.values())}
PRIVATE = ("hashed_ip", "country", "header", "weight", "timestamp")
ARGUMENTS = st.dictionaries(st.sampled_from(["city", "day", "unit"]), TEXT | st.integers(0, 9), min_size=1, max_size=3)


def call(arguments):
    return {"type": "function", "function": {"name": "f", "arguments": arguments}}


@st.composite
def conversations(draw):
    """Turns as they shall be read: text everywhere, except beside a call."""
    turns = [{"role": "system", "content": draw(TEXT)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns.append({"role": "user", "content": draw(TEXT)})
        if draw(st.booleans()):
            turns.append({"role": "assistant", "content": "", "tool_calls": [call(draw(ARGUMENTS))]})
            turns.append({"role": "tool", "content": draw(TEXT), "name": "f"})
        thought = {"reasoning_content": draw(TEXT)} if draw(st.booleans()) else {}
        turns.append({"role": "assistant", "content": draw(TEXT), **thought})
    return turns


def in_parts(text: str) -> list[dict]:
    half = len(text) // 2
    return [{"type": "text", "text": text[:half], "image_url": None}, {"type": "text", "text": text[half:]}]


@st.composite
def dressed(draw, turns):
    """The same turns as datasets write them."""
    names = draw(st.sampled_from([("role", "content"), ("from", "value")]))
    parts = draw(st.booleans())
    result = []
    for turn in turns:
        if draw(st.integers(0, 4)) == 0:
            result.append({names[0]: "system", names[1]: draw(st.sampled_from([None, "", " "]))})
        rest = {key: item for key, item in turn.items() if key not in ("role", "content")}
        content = turn["content"] or draw(st.sampled_from([None, "", " ", []]))
        if parts and isinstance(content, str) and content.strip():
            content = in_parts(content)
        nulls = dict.fromkeys(draw(st.sets(st.sampled_from([*TURN_KEYS, "audio"]))))
        private = dict.fromkeys(draw(st.sets(st.sampled_from(PRIVATE))), "SECRET")
        empty = {"tool_calls": []} if draw(st.booleans()) else {}
        role = draw(st.sampled_from(SPELT[turn["role"]]))
        result.append({**nulls, **private, **empty, names[0]: role, names[1]: content, **rest})
    return result


@given(st.data())
def test_a_conversation_is_the_same_however_it_is_spelt(data):
    turns = data.draw(conversations())
    spelt = data.draw(dressed(turns))
    assert read_messages(spelt, "messages") == turns
    of_template = Dialect(keys=TURN_KEYS | {"role", "content", "from", "value", "upper"})  # whatever a template names
    assert read_messages(spelt, "messages", of_template) == turns
    assert convert_row({"conversations": spelt}, find_formats(["conversations"])) == {"messages": turns}
    columns = {key: [turn.get(key) for turn in spelt] for key in dict.fromkeys(key for turn in spelt for key in turn)}
    assert read_messages(columns, "messages") == turns


@given(st.lists(conversations(), min_size=1, max_size=4))
@settings(max_examples=40)
def test_a_null_that_a_table_fills_in_is_no_key(rows):
    """In turns, in calls and their arguments, in tools and in what is set for the template."""
    tools = [
        [
            {
                "type": "function",
                "function": {"name": "f", "parameters": {"properties": {f"p{number}": {"type": "string"}}}},
            }
        ]
        for number in range(len(rows))
    ]
    table = Dataset.from_list(
        [
            {"messages": turns, "tools": own, "chat_template_kwargs": {f"k{number % 2}": True}}
            for number, (turns, own) in enumerate(zip(rows, tools, strict=True))
        ],
        on_mixed_types="use_json",
    )
    converted = to_trl_format(table)
    assert [row["messages"] for row in converted] == rows
    assert [json.loads(row["tools"]) for row in converted] == tools
    assert [row["chat_template_kwargs"] for row in converted] == [{f"k{n % 2}": True} for n in range(len(rows))]
    again = to_trl_format(converted)
    assert [row["messages"] for row in again] == rows


@pytest.mark.parametrize(
    "nothing", [None, "", " \n", [], [{"type": "text", "text": None}], [{"type": "text", "text": " "}]]
)
@pytest.mark.parametrize("role", ["user", "human", "assistant", "gpt"])
def test_a_turn_without_text_makes_its_row_unusable(role, nothing):
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": role, "content": nothing},
    ]
    turns += [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(UnusableRow, match="without text"):
        read_messages(turns, "messages")
    assert read_messages([turn | {"content": "x"} for turn in turns], "messages")[2]["content"] == "x"


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "text", "image", "q"]), inner, max_size=3)
        | st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "image_url"]), "text": inner}), max_size=2)
    ),
    max_leaves=6,
)


@given(ANYTHING)
def test_a_content_is_its_text_or_its_row_is_unusable(content):
    """Never the spelling of a Python object, whatever stands there."""
    try:
        (turn,) = read_messages([{"role": "assistant", "content": content}], "messages")
    except UnusableRow:
        return
    if isinstance(content, str | bool | int | float):
        assert turn["content"] == str(content)
        return
    parts = [content] if isinstance(content, dict) else content
    texts = (
        parts
        if all(isinstance(part["text"], str | None) for part in parts)
        else [{"text": t} for t in parts[0]["text"]]
    )
    assert turn["content"] == "".join(part["text"] or "" for part in texts)


def test_parts_stay_where_images_belong_between_them():
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A cat."}]
    with pytest.raises(UnusableRow, match="a part of the type 'image', which is no text"):
        read_messages(turns, "messages")
    kept = read_messages(turns, "messages", Dialect(keeps_parts=True))
    assert kept[0]["content"] == [{"type": "image"}, parts[1]]
    row = {"messages": turns, "images": [b"a"]}
    assert to_trl_format([row])[0]["messages"] == kept
    with pytest.raises(FNSFTError, match="has no row to train on: 'messages' has a part of the type 'image'"):
        to_trl_format([{"messages": turns}])


def test_what_no_template_reads_goes_no_further():
    turns = [{"role": role, "content": "x", "hashed_ip": "SECRET", "mood": "sad"} for role in ("user", "assistant")]
    rows = Dataset.from_list([{"messages": turns, "ip": "SECRET"}] * 2)
    assert "SECRET" not in json.dumps(to_trl_format(rows).to_list())
    assert unread_keys(turns, Dialect()) == {"hashed_ip", "mood"}
    reads_mood = Dialect(keys=TURN_KEYS | {"mood"})
    assert convert(rows, name="rows", dialect=reads_mood)[0]["messages"][0] == {
        "role": "user",
        "content": "x",
        "mood": "sad",
    }


def test_half_a_surrogate_pair_is_no_text():
    rows = [{"question": "q", "answer": "a\ud800"}, {"question": "q", "answer": "a\x00b"}]
    assert to_trl_format(rows).to_list()[0]["completion"] == [{"role": "assistant", "content": "a\x00b"}]


CALL = "{% for m in messages %}{% for c in m['tool_calls'] or [] %}{{ ARGUMENTS }}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("written", "kind"),
    [
        ("c['function']['arguments'] | tojson", dict),  # text would be written as text within JSON
        ("c['function']['arguments'].items() | list | string + c['function']['name']", None),  # neither is JSON
        ("c['function']['arguments']", str),  # an object would be written as Python does
        ("c['function']['arguments'] | string + c['function']['arguments']", str),  # an object is refused
        ("c['function']['arguments'] if c['function']['arguments'] is string else c['function']['arguments'] | tojson",
         None),
    ],
)  # fmt: skip
def test_arguments_of_calls_are_what_the_template_reads(written, kind, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CALL.replace("ARGUMENTS", written)
    dialect = dialect_of(tokenizer)
    assert dialect.arguments is kind
    for arguments in ({"city": "Ö"}, '{"city": "Ö"}', "no JSON", "[1]"):
        calls = [call(arguments)]
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": calls}]
        found = read_messages(turns, "messages", dialect)[1]["tool_calls"][0]["function"]["arguments"]
        is_object = arguments in ({"city": "Ö"}, '{"city": "Ö"}')
        wanted = {dict: {"city": "Ö"}, str: '{"city": "Ö"}', None: arguments}[kind] if is_object else arguments
        assert found == wanted


SPELT_TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    "value",
    [
        ["q", "a"],
        [{"input": "q", "output": "a"}],
        {"human": ["q"], "assistant": ["a"]},
        json.dumps(SPELT_TURNS),
        json.dumps([{"user": "q", "assistant": "a"}]),
        "\n\nHuman: q\n\nAssistant: a",
        "USER: q\nASSISTANT: a <|endoftext|>\n",
        "[|Human|]q[|AI|] a\n[|Human|] ",
        "### Human: q### Assistant: a",
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>",
        [{"role": "prompter", "text": "q"}, {"role": "assistant", "text": "a"}],
    ],
    ids=str,
)
def test_every_shape_of_a_conversation_is_read(value):
    assert read_messages(value, "messages") == SPELT_TURNS


@pytest.mark.parametrize("value", ["a text", "[1, 2", "{}", 3, [1], [["q", "a"]], {"a": 1}], ids=str)
def test_what_is_no_conversation_makes_its_row_unusable(value):
    with pytest.raises(UnusableRow, match="expected a list of messages"):
        read_messages(value, "messages")


def test_a_transcript_keeps_what_looks_like_another_speaker():
    """One way of writing speakers in one transcript: what another way would take for one is text."""
    assert read_messages("\n\nHuman: q\n\nAssistant: a\nHuman: b\nUSER: c", "chosen") == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a\nHuman: b\nUSER: c"},
    ]
