"""Sets of indices as text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fnsft_trl import FNSFTError
from fnsft_trl.ranges import format_ranges, parse_ranges


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("all", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ("0-5", [0, 1, 2, 3, 4, 5]),
        ("0:4,9", [0, 1, 2, 3, 9]),
        ("[0, 2, 4]", [0, 2, 4]),
        ([4, 2, 0, 2], [0, 2, 4]),
        (7, [7]),
        ("8:", [8, 9]),
        (" 1 - 2 , 5", [1, 2, 5]),
        (["0-2", 5, "8:"], [0, 1, 2, 5, 8, 9]),
    ],
)
def test_parse_ranges_reads_every_documented_form(spec, expected):
    assert parse_ranges(spec, 10) == expected


@pytest.mark.parametrize(
    "spec", ["10", "0-10", "5-3", "x", "", "[]", "-1", "2:2", "1.5", [11], "007", "0-07", "٣", "9" * 5000]
)
def test_parse_ranges_refuses_what_is_out_of_range_or_not_understood(spec):
    with pytest.raises(FNSFTError, match="layer specification"):
        parse_ranges(spec, 10)


@st.composite
def chosen_of_size(draw):
    """Some of the indices below a size, ascending; and the size."""
    size = draw(st.integers(1, 200))
    return sorted(draw(st.sets(st.integers(0, size - 1), min_size=1))), size


@given(chosen_of_size())
def test_format_ranges_is_the_inverse_of_parse_ranges(drawn):
    chosen, size = drawn
    text = format_ranges(chosen)
    assert parse_ranges(text, size) == parse_ranges(f"[{text}]", size) == parse_ranges(chosen, size) == chosen


@given(chosen_of_size(), st.randoms())
def test_order_repeats_and_spaces_of_the_items_do_not_matter(drawn, random):
    chosen, size = drawn
    items = [*chosen, *random.choices(chosen, k=3)]
    random.shuffle(items)
    assert parse_ranges(" , ".join(map(str, items)), size) == parse_ranges(items, size) == chosen


@given(chosen_of_size())
def test_no_shorter_text_says_the_same(drawn):
    """As many items as there are runs of neighbours."""
    chosen, _ = drawn
    runs = sum(index - 1 not in chosen for index in chosen)
    assert format_ranges(chosen).count(",") == runs - 1


@given(chosen_of_size(), st.integers(0, 50))
def test_whatever_is_out_of_range_is_refused(drawn, beyond):
    chosen, size = drawn
    for spec in (
        f"{size + beyond}",
        f"{chosen[0]}-{size + beyond}",
        f"0:{size + 1 + beyond}",
        [*chosen, size + beyond],
    ):
        with pytest.raises(FNSFTError, match="outside"):
            parse_ranges(spec, size)


@given(st.text("0123456789-:,[] al", max_size=12) | st.text(max_size=6), st.integers(1, 30))
def test_any_text_gives_indices_in_range_or_an_error(text, size):
    try:
        found = parse_ranges(text, size)
    except FNSFTError:
        return
    assert found == sorted(set(found))
    assert found
    assert set(found) <= set(range(size))
