"""Every option stands in a page, and the messages that a page shows are those of the code."""

import ast
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib import import_module
from importlib.metadata import version

import pytest
from helpers import ROOT
from peft import PeftConfig
from trl_options_page import PAGE, trl_options_page

import fnsft_trl
from fnsft_trl.cli import VERBS
from fnsft_trl.cli.options.schema import TRL


RENEW = "run: PYTHONPATH=tests python tests/trl_options_page.py"
HAND_WRITTEN = [page for page in sorted((ROOT / "docs").glob("*.md")) if page != PAGE]


@pytest.fixture(scope="module")
def shown() -> set[str]:
    """The words that stand in code in hand-written pages."""
    return {word for page in HAND_WRITTEN for code in _codes(page.read_text()) for word in re.findall(r"\w+", code)}


def _codes(text: str) -> list[str]:
    """The blocks of code of a page, and the code in its lines."""
    fence = re.compile(r"^( *)```.*?^\1```$", flags=re.MULTILINE | re.DOTALL)
    inline = [code for part in re.split(r"\n\s*\n", fence.sub("", text)) for code in re.findall(r"`[^`]+`", part)]
    return inline + [block[0] for block in fence.finditer(text)]


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_of_ours_stands_in_a_page(verb, shown):
    options = import_module(f"fnsft_trl.cli.{verb}").options()
    assert {option.name for option in options if option.group not in TRL} <= shown


def test_every_field_of_a_config_stands_in_a_page(shown):
    configs = [thing for name in fnsft_trl.__all__ if is_dataclass(thing := getattr(fnsft_trl, name))]
    configs = [config for config in configs if config.__name__.endswith("Config")]
    of_peft = {field.name for field in fields(PeftConfig)}
    assert len(configs) >= 5
    assert {field.name for config in configs for field in fields(config)} - of_peft <= shown


def test_the_list_of_trls_options_is_current():
    """Made from the pinned versions; on others the installed options differ."""
    page = PAGE.read_text()
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert f"TRL {pins['trl']} and transformers {pins['transformers']}." in page, RENEW
    if all(version(name) == pins[name] for name in ("trl", "transformers")):
        assert page == trl_options_page(), RENEW


def test_the_messages_of_the_troubleshooting_page_are_those_of_the_code():
    """Between the dots, which stand for what a message names."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = [cell for cell in re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE) if " " in cell]
    ours = [message for message in messages if not message.startswith("KeyError")]
    said = list(_texts())
    assert len(ours) >= 20
    assert not [message for message in ours if not any(_says(text, message) for text in said)]


def _texts() -> Iterator[str]:
    """Every text of the package; what is filled in is a NUL."""
    for path in (ROOT / "fnsft_trl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def _says(text: str, message: str) -> bool:
    parts = [re.escape(part.strip()) for part in message.split("...")]
    return re.search(".*".join(parts), text, flags=re.DOTALL) is not None


@pytest.mark.parametrize("page", HAND_WRITTEN, ids=lambda page: page.name)
def test_every_page_has_an_example_that_runs(page):
    """Those of these languages do, in test_docs.py; the index only points to others."""
    assert page.name == "index.md" or re.search("^```(bash|python|pycon|diff)$", page.read_text(), re.MULTILINE)
