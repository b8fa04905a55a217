"""The prose of the pages: short sentences."""

import re
from statistics import median

import pytest
from helpers import ROOT


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LONGEST, MEDIAN = 40, 15

# What is no prose: code, comments, quotes, tables, headings, pictures.
NO_PROSE = [
    (r"^( *)```.*?^\1```$", ""),
    (r"<!--.*?-->", ""),
    (r"^>.*$", ""),
    (r"(?:(?<=\n\n)|\A)(?: {4}.*\n+)+", "\n"),
    (r"^ *\|.*$", ""),
    (r"^#.*$", ""),
    (r"^!\[.*$", ""),
]
UNIT = re.compile(r"\n\s*\n|^\s*(?:[-*]|\d+\.) +", flags=re.MULTILINE)
SENTENCE = re.compile(r"(?<!\.\.)(?<!et al\.)(?<=[.!?])[*_)\"]*\s+")


def sentences(text: str) -> list[str]:
    """Those of a Markdown text: a paragraph, an item of a list and a full stop end one; code in a line is a word."""
    for pattern, kept in NO_PROSE:
        text = re.sub(pattern, kept, text, flags=re.MULTILINE | re.DOTALL if "```" in pattern else re.MULTILINE)
    text = re.sub(r"`[^`]+`", "code", text)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    parts = [" ".join(part.split()) for unit in UNIT.split(text) for part in SENTENCE.split(unit)]
    return [part for part in parts if _words(part)]


def _words(sentence: str) -> int:
    return sum(bool(re.search(r"\w", word)) for word in sentence.split())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_sentence_is_long(page):
    long = {sentence: _words(sentence) for sentence in sentences(page.read_text()) if _words(sentence) > LONGEST}
    assert not long


def test_sentences_are_short():
    lengths = [_words(sentence) for page in PAGES for sentence in sentences(page.read_text())]
    assert len(lengths) > 500
    assert median(lengths) < MEDIAN


def test_what_counts_as_a_sentence():
    text = (
        "# A title\n\nOne two. Three\nfour `a b`!\n\n- five (six.) Seven\n- eight, ... nine et al. 2025\n\n"
        "| a | table |\n\n```bash\nno prose.\n```\n\n    no prose\n\n[ten eleven](http://x.y/z. A)"
    )
    assert sentences(text) == [
        "One two.",
        "Three four code!",
        "five (six.",
        "Seven",
        "eight, ... nine et al. 2025",
        "ten eleven",
    ]
