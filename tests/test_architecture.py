"""The structure that the design asks for, read from the source."""

import ast
from pathlib import Path

import pytest

import fnsft_trl


PACKAGE = Path(fnsft_trl.__file__).parent
# The way of the data: a stage imports only from stages before it.
STAGES = [
    "errors",
    "cache",
    "ranges",
    "config",
    "names",
    "credentials",
    "hub",
    "account",
    "description",
    "storage",
    "legacy",
    "stored",
    "card",
    "figure",
    "embedded",
    "data",
    "layout",
    "experts",
    "neurons",
    "mask",
    "weights",
    "activations",
    "ica",
    "sketch",
    "matching",
    "decomposition",
    "null",
    "template",
    "recurrence",
    "similarity",
    "fingerprint",
    "progress",
    "discovery",
    "selection",
    "masking",
    "baking",
    "tuner",
    "constraints",
    "evaluation",
    "training",
    "export",
    "gguf",
    "report",
    "cli",
]
MODULES = sorted(PACKAGE.rglob("*.py"))


def stage(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_stages(path: Path) -> set[str]:
    depth = len(path.relative_to(PACKAGE).parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            names = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
            found |= {name for name in names if name in STAGES}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_stage_imports_only_from_stages_before_it(path):
    if path.name == "__init__.py" and path.parent == PACKAGE:
        return
    here = stage(path)
    assert here in STAGES
    for other in imported_stages(path) - {here}:
        assert STAGES.index(other) < STAGES.index(here)


def test_every_stage_exists_and_every_public_name_loads():
    assert {stage(path) for path in MODULES} - {"__init__"} == set(STAGES)
    for name in fnsft_trl.__all__:
        assert getattr(fnsft_trl, name).__doc__


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_functions_and_classes_say_what_they_are(path):
    tree = ast.parse(path.read_text())
    nodes = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    for node in list(nodes):
        if isinstance(node, ast.ClassDef):
            nodes += [n for n in node.body if isinstance(n, ast.FunctionDef)]
    inherited = ("forward", "error", "on_", "evaluate", "main", "create_optimizer")
    for node in nodes:
        if not node.name.startswith("_") and not node.name.startswith(inherited):
            assert ast.get_docstring(node), f"{path.name}: {node.name}"
