"""The prose of pages, help, docstrings and error messages: short sentences."""

import ast
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from statistics import median

import pytest
from helpers import ROOT

from fnsft_trl.cli import VERBS
from fnsft_trl.cli.options.schema import TRL


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


def pages() -> Iterator[str]:
    for page in PAGES:
        yield page.read_text(encoding="utf-8")


def helps() -> Iterator[str]:
    """What `fnsft VERB --help` says of the verb and of our options; TRL's are its own."""
    for verb, about in VERBS.items():
        module = import_module(f"fnsft_trl.cli.{verb}")
        yield from (about, module.ABOUT, *(option.help for option in module.options() if option.group not in TRL))


def docstrings() -> Iterator[str]:
    """Every one of the package, with a paragraph for each argument."""
    for node in _nodes():
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
            text = re.sub(r"^(Args|Attributes|Returns|Yields|Raises|Example):$", "", text, flags=re.MULTILINE)
            yield re.sub(r"^ {4}(?=\S)", "\n", inspect.cleandoc(text), flags=re.MULTILINE)


def errors() -> Iterator[str]:
    """The messages that stand where an error is raised; what is filled in is a word."""
    for node in _nodes():
        if isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith("Error") and node.args:
            parts = node.args[0].values if isinstance(node.args[0], ast.JoinedStr) else node.args[:1]
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in parts)


def _nodes() -> Iterator[ast.AST]:
    for path in (ROOT / "fnsft_trl").rglob("*.py"):
        yield from ast.walk(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("texts", [pages, helps, docstrings, errors])
def test_sentences_are_short(texts):
    lengths = {sentence: _words(sentence) for text in texts() for sentence in sentences(text)}
    assert len(lengths) > 300
    assert not {sentence: words for sentence, words in lengths.items() if words > LONGEST}
    assert median(lengths.values()) < MEDIAN


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
