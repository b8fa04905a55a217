"""What datasets are called in a template."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fnsft_trl.hub.names import absolute_sources, clean_model_name, is_model_name, is_source_name, source_names


# Any text, and text of what paths are made of.
NAMES = st.text(max_size=30) | st.text("ab/.~\\ :(2)-\n", max_size=12)


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["org/corpus", "embedded", "the training data"], ["org/corpus", "embedded", "the training data"]),
        (["/home/me/data.jsonl"], ["data.jsonl"]),
        (["/home/me/a/data.jsonl", "/home/me/b/data.jsonl"], ["a/data.jsonl", "b/data.jsonl"]),
        (["/a/x/data.jsonl", "/b/x/data.jsonl", "/c/x/rows.csv"], ["a/x/data.jsonl", "b/x/data.jsonl", "rows.csv"]),
        (["/me/org/corpus", "org/corpus"], ["corpus", "org/corpus"]),
        (["/me/data.jsonl", "/you/me/data.jsonl"], ["me/data.jsonl", "you/me/data.jsonl"]),
        (["/me/data.jsonl", "/me/./data.jsonl", "/me/data.jsonl"], ["data.jsonl", "data.jsonl (2)", "data.jsonl (3)"]),
        (["/me/corpus/"], ["corpus/"]),
        (["/me/a/corpus/", "/me/b/corpus/"], ["a/corpus/", "b/corpus/"]),
        (["../data.jsonl", "~/rows.csv", "C:\\me\\it.json"], ["data.jsonl", "rows.csv", "it.json"]),
        (["/", "..", "", "\n"], ["unknown", "unknown (2)", "unknown (3)", "unknown (4)"]),
        (["lines\nof text", "x" * 900], ["lines of text", "x" * 500]),
        (["\n/etc/passwd", "/~me/~/x"], ["passwd", "x"]),
    ],
    ids=str,
)
def test_names_tell_datasets_apart_and_say_nothing_of_the_machine(sources, names):
    assert source_names(sources) == names
    assert all(map(is_source_name, names))
    assert source_names(names) == names  # saved, loaded and saved again


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../b", "~/x", "C:\\x", "a\nb", "", "x" * 501, None, 3])
def test_a_path_is_no_name(path):
    assert not is_source_name(path)


def test_files_and_directories_of_this_machine_are_made_absolute(tmp_path, monkeypatch):
    (tmp_path / "texts" / "corpus").mkdir(parents=True)
    (tmp_path / "texts" / "data.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    given = ["texts/data.jsonl", "texts/corpus", "~/texts/data.jsonl", "org/corpus", "nowhere.jsonl"]
    found = absolute_sources(given)
    assert found == [f"{tmp_path}/texts/data.jsonl", f"{tmp_path}/texts/corpus/", found[0], *given[3:]]
    assert source_names(found)[:2] == ["data.jsonl", "corpus/"]


@given(NAMES)
@example("x" * 501)
def test_a_cleaned_model_name_is_a_name_and_stays_as_it_is(name):
    cleaned = clean_model_name(name)
    assert is_model_name(cleaned)
    assert clean_model_name(cleaned) == cleaned
    if is_model_name(name):
        assert cleaned == name


@given(st.lists(NAMES, max_size=6))
@example(["x" * 501] * 12)
@example(["x", "x", "x (2)"])
@example(["\\ /", "/~.."])
def test_any_sources_get_names_that_stay_as_they_are(sources):
    names = source_names(sources)
    assert len(names) == len(sources)
    assert all(map(is_source_name, names))
    assert source_names(names) == names
    assert len(set(names)) == len(names)
