"""What stands in a YAML or JSON text: scalars as they are written, every key once, and one line for all else."""

import json
import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fnsft_trl.cli.options.written import Quoted, core_value, read_json, read_yaml
from fnsft_trl.errors import FNSFTError


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("written") / "config.yaml"


def read(file, text):
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_yaml(file)


def refused(file, text) -> str:
    with pytest.raises(FNSFTError) as caught:
        read(file, text)
    message = str(caught.value)
    assert str(file) in message
    assert len(message) < 2100
    assert len(message.splitlines()) == 1
    return message


SCALARS = ["007", "1:30", "2024_01", "1e-4", "0x1F", "no", "On", "2024-01-02", ".inf", "a b", "a:b", "--", "true", "="]


@pytest.mark.parametrize("text", SCALARS)
def test_a_scalar_is_the_text_that_stands_there(file, text):
    plain, quoted = read(file, f"x: {text}\ny: '{text}'\nz: [{text}, {{a: {text}}}]").values(), text
    assert list(plain) == [text, quoted, [text, {"a": text}]]


@pytest.mark.parametrize("text", ["null", "Null", "NULL", "~", ""])
def test_null_is_null_unless_it_is_quoted(file, text):
    assert read(file, f"x: {text}\ny: '{text}'\nz:\n  - {text}\n") == {"x": None, "y": text, "z": [None]}


def test_quoted_text_is_told_from_plain(file):
    found = read(file, "a: 1\nb: '1'\nc: \"1\"\nd: !!str 1\ne: |\n  1\n")
    assert {key: isinstance(value, Quoted) for key, value in found.items()} == {
        **{"a": False, "b": True, "c": True, "d": True, "e": True},
    }


# --- keys


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a: 1\na: 2", (2, 1)),
        ("a: 1\nb: 2\na: 1", (3, 1)),
        ("a: 1\n'a': 2", (2, 1)),
        ("x:\n  a: 1\n  a: 2", (3, 2)),
        ("x: [{b: 1},\n {b: 1, a: 2,\n  a: 3}]", (3, 2)),
        ("x: {y: {z: {a: 1,\n a: 1}}}", (2, 1)),
        ("a: null\na: ~", (2, 1)),
        ('{"a": 1,\n "a": 1}', (2, 1)),
    ],
)
def test_a_key_that_stands_twice_is_named_with_both_lines(file, text, lines):
    message = refused(file, text)
    assert f"line {lines[0]}: a stands twice, in line {lines[1]} too" in message


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=6), st.integers(0, 3))
def test_keys_are_taken_once_and_no_oftener(file, keys, depth):
    inner = "".join(f"{' ' * depth}{key}: {number}\n" for number, key in enumerate(keys))
    text = "".join(f"{' ' * level}x{level}:\n" for level in range(depth)) + inner
    if len(set(keys)) < len(keys):
        assert "stands twice" in refused(file, text)
        return
    found = read(file, text)
    for level in range(depth):
        found = found[f"x{level}"]
    assert found == {key: str(number) for number, key in enumerate(keys)}


def test_merged_keys_fill_what_is_missing(file):
    text = "a: &a {p: 1, q: 2}\nb: &b {q: 3, r: 4}\nc: {<<: *a, p: 0}\nd: {<<: [*a, *b]}\n<<: {e: 5, a: 6}"
    found = read(file, text)
    assert found["c"] == {"p": "0", "q": "2"}
    assert found["d"] == {"p": "1", "q": "2", "r": "4"}
    assert (found["e"], found["a"]) == ("5", {"p": "1", "q": "2"})
    assert "<<" in refused(file, "a: {<<: 1}")
    assert "stands twice" in refused(file, "a: {<<: {b: 1}, <<: {c: 1}}")
    assert read(file, "a: {'<<': 1}") == {"a": {"<<": "1"}}


# --- what is no mapping of options


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold a mapping"),
        ("# nothing", "must hold a mapping"),
        ("text", "must hold a mapping"),
        ("- a", "must hold a mapping"),
        ("a: 1\n---\nb: 2", "line 2: expected a single document"),
        ("a: [", "line 1"),
        ("\ta: 1", "line 1"),
        ("a:\t1\nb: @x", "line 1"),
        ("a: *nowhere", "line 1: found undefined alias"),
        ("a: &a [*a]", "nested too deeply"),
        ("a: &a {b: *a}", "nested too deeply"),
        ("? [a]\n: 1", "line 1: a key is a list or a mapping"),
        ("? {a: b}\n: 1", "line 1: a key is a list or a mapping"),
        ("a: !!float 1", "line 1: a has the tag tag:yaml.org,2002:float"),
        ("a: [1,\n !!python/object/apply:os.system [ls]]", "line 2: a has the tag"),
        ("a: !!binary aGk=", "a has the tag"),
        ("a: !!set {b}", "a has the tag"),
        ("a: !mine 1", "a has the tag !mine"),
        ("a: '\\ud800'", None),
        ('a: "\\ud800"', "half of a character"),
        ('a: "b\\0c"', "an escape is the character 0"),
        ('a: "\\UFFFFFFFF"', "not valid YAML"),
        ('a: "\\x"', "line 1"),
        (b"a: gr\xfcn", "not valid YAML"),
        (b"a: \x00", "not valid YAML"),
        (b"\x1f\x8b\x08\x00\x00", "not valid YAML"),
        ("%YAML 3.0\n---\na: 1", "line 1"),
        ("%YAML " + "9" * 5000 + ".0\n---\na: 1", "not valid YAML"),
        ("a: " + "[" * 400 + "]" * 400, "line 1: nested too deeply"),
        ("[" * 200_000, "line 1: nested too deeply"),
        ("a: " + "{b: " * 300 + "}" * 300, "nested too deeply"),
        ("a: " + "9" * 2**20, "larger than 1 MiB"),
        ("a: *" + "x" * 100_000, "undefined alias"),
        ("a: !" + "y" * 100_000 + " b", "has the tag"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_cannot_be_read_is_one_line_with_its_place(file, text, message):
    if message is None:
        assert read(file, text) == {"a": "\\ud800"}
    else:
        assert message in refused(file, text)


def test_aliases_that_multiply_are_not_written_out(file):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 20)]
    assert "more than 100000 values" in refused(file, "\n".join(lines))
    assert read(file, "a: &a {b: 1}\nc: *a\nd: [*a, *a]")["d"] == [{"b": "1"}, {"b": "1"}]


def test_a_file_that_is_none_is_one_line(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / ("x" * 300)):
        with pytest.raises(FNSFTError, match=r"cannot be read|there is no config file"):
            read_yaml(path)


@pytest.mark.parametrize(
    "data",
    [
        "\ufeffa: 1".encode(),
        b"a: 1\r\n",
        "a: 1".encode("utf-16"),
        b"%YAML 1.1\n---\na: 1",
        b"%YAML 1.2\n---\na: 1\n...\n",
    ],
)
def test_other_ways_of_writing_a_file_are_read(file, data):
    assert read(file, data) == {"a": "1"}


YAML_MARKS = [
    ": ",
    ":",
    "- ",
    "\n",
    "\n  ",
    " ",
    "[",
    "]",
    "{",
    "}",
    ",",
    "&a ",
    "*a",
    "<<",
    "!",
    "!!str ",
    "? ",
    "|",
    ">",
]
YAML_MARKS += [
    "'",
    '"',
    "\\",
    "#",
    "%",
    "@",
    "`",
    "---\n",
    "...",
    "~",
    "null",
    "\t",
    "0",
    "é",
    "\ufeff",
    "\x85",
    "a",
    "b",
]
YAML_LIKE = st.lists(st.sampled_from(YAML_MARKS), max_size=25).map("".join)


@given(YAML_LIKE | st.text(max_size=30) | st.binary(max_size=30))
def test_whatever_stands_there_is_a_mapping_or_one_line(file, text):
    if isinstance(text, str):
        text = text.encode("utf-8", "surrogatepass")
    try:
        found = read(file, text)
    except FNSFTError:
        assert refused(file, text)
    else:
        assert isinstance(found, dict)
        assert all(isinstance(key, str) for key in found)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=20), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=5), JSON_VALUES, max_size=3), st.booleans())
def test_json_is_read_as_json(file, value, ascii_only):
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert read_json(text) == value
    if ascii_only and "\\u0000" not in text:  # YAML takes no bare control characters
        assert core_value(read(file, text)) == value


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', '{"b": [{"a": 1, "c": 2, "a": 3}]}', '{"a": {}, "a": {}}'])
def test_a_key_of_json_that_stands_twice_is_named(text):
    with pytest.raises(ValueError, match="'a' stands twice"):
        read_json(text)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "{", "nope"])
def test_what_is_no_json_is_a_value_error(text):
    with pytest.raises(ValueError):
        read_json(text)


# --- the core schema


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((word, True) for word in ("true", "True", "TRUE")),
        *((word, False) for word in ("false", "False", "FALSE")),
        *((word, None) for word in ("null", "Null", "NULL", "~")),
        *(
            ("0", 0),
            ("8", 8),
            ("-8", -8),
            ("+8", 8),
            ("123456789012345678901234567890", 123456789012345678901234567890),
        ),
        *(("0.5", 0.5), (".5", 0.5), ("5.", 5.0), ("-1.5", -1.5), ("1e-4", 1e-4), ("1E4", 1e4), ("1.5e+3", 1500.0)),
        *((".inf", math.inf), ("-.inf", -math.inf), ("+.INF", math.inf)),
    ],
)
def test_a_value_of_no_option_is_what_the_core_schema_says(file, text, value):
    found = core_value(read(file, f"a: {text}"))["a"]
    assert (found, type(found)) == (value, type(value))
    assert core_value(read(file, f"a: [{text}]")) == {"a": [value]}
    assert core_value(read(file, f"a: '{text}'")) == {"a": text}


@pytest.mark.parametrize(
    "text",
    [
        *("yes", "no", "on", "off", "y", "n", "Yes", "tRUE", "nULL", "none", "None"),
        *(
            "007",
            "0123456",
            "010",
            "-010",
            "0x1F",
            "0o17",
            "0b1",
            "1_000",
            "1:30",
            "12:30:45",
            "2024-01-02",
            "2024_01",
        ),
        *("1e", "e5", "1.2.3", "1,5", "nan", "inf", ".", "+", "--", "1e99999", "9" * 400, "٣"),
    ],
)
def test_all_else_is_text(file, text):
    assert core_value(read(file, f"a: {text}")) == {"a": text}


def test_nan_is_nan(file):
    assert all(math.isnan(value) for value in core_value(read(file, "a: [.nan, .NaN, .NAN]"))["a"])


def test_keys_follow_the_same_schema_and_stand_once(file):
    assert core_value(read(file, "a: {0: x, '1': y, true: z, 007: w}"))["a"] == {
        0: "x",
        "1": "y",
        True: "z",
        "007": "w",
    }
    with pytest.raises(ValueError, match="stands twice"):
        core_value(read(file, "a: {8: x, +8: y}"))


def test_nothing_of_another_type_is_left(file):
    found = core_value(read(file, "a: 'x'\n'b': [\"y\", z]"))
    assert [type(value) for value in (*found, found["a"], *found["b"])] == [str] * 5
    assert yaml.safe_load(yaml.safe_dump(found)) == found
