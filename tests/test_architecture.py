"""The structure that the design asks for, read from the source."""

import ast
from functools import cache
from pathlib import Path

import pytest

import fnsft_trl


PACKAGE = Path(fnsft_trl.__file__).parent
# The way of the data. A package imports only from packages before it, and a module of it only from those before that.
# A module that starts a line of its own stands at the top level.
ORDER = {
    "lazy": [],
    "errors": [],
    "writing": [],
    "cache": [],
    "ranges": [],
    "fields": [],
    "config": [],
    "hub": ["names", "credentials", "files", "account", "card"],
    "data": [
        *("formats", "prompts", "config", "conversion", "embedded", "sources", "sequences", "tokenized", "training"),
    ],
    "neurons": ["layout", "experts", "sites", "mask"],
    "template": ["schema", "description", "storage", "legacy", "stored", "figure", "card", "weights", "template"],
    "discovery": [
        *("activations", "sketch", "ica", "matching", "decomposition", "null", "recurrence", "progress", "discovery"),
    ],
    "selection": [],
    "interventions": ["masking", "baking"],
    "tuner": ["config", "held", "layer", "linear", "experts", "model"],
    "constraints": ["neurons", "frozen", "full", "lora_config", "lora"],
    "comparison": ["similarity", "fingerprint"],
    "evaluation": ["metrics", "reload", "retention"],
    "training": ["preparation", "ways", "guard", "run", "run_record", "schedule", "retention", "trainer"],
    "export": ["adapter", "plain_lora", "merged", "difference", "gguf"],
    "report": ["report", "figures"],
    "cli": [
        *("arguments", "refusals", "logs", "models", "precision", "pushing", "templates", "run_config", "schema"),
        *("values", "help", "translate", "sources", "options", "checks"),
        *("auth", "inspect", "compare", "discover", "export", "demo", "train", "__main__"),
    ],
}
# Rooms that a set of neurons and a model are enough for.
INDEPENDENT = ("neurons", "interventions", "tuner", "constraints")
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name != "__init__.py")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


PATHS = {name_of(path): path for path in MODULES}


@cache
def imported(module: str) -> set[str]:
    """The modules of the package that a module imports, anywhere in its source; what a package re-exports, too."""
    package = list(PATHS[module].relative_to(PACKAGE).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(PATHS[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = package[: len(package) - node.level + 1]
            source = ".".join([*start, *(node.module.split(".") if node.module else [])])
            for alias in node.names:
                submodule = f"{source}.{alias.name}".removeprefix(".")
                found.add(submodule if submodule in PATHS else source)
    return found - {"", module}


def place(module: str) -> tuple[int, int]:
    room, _, rest = module.partition(".")
    names = [name.partition(".")[0] for name in ORDER[room]]
    return list(ORDER).index(room), names.index(rest.partition(".")[0]) if rest else -1


def test_every_module_has_its_place_and_every_place_its_module():
    rooms = {name.partition(".")[0] for name in PATHS}
    assert rooms == set(ORDER)
    for room, names in ORDER.items():
        inside = {name.split(".")[1] for name in PATHS if name.startswith(f"{room}.")}
        assert inside == set(names), room


@pytest.mark.parametrize("module", sorted(PATHS))
def test_a_module_imports_only_from_those_before_it(module):
    for other in imported(module):
        if PATHS[module].name == "__init__.py" and other.startswith(f"{module}."):
            continue  # a package re-exports its modules
        assert place(other) < place(module), f"{module} imports {other}"


@pytest.mark.parametrize("room", INDEPENDENT)
def test_sets_of_neurons_depend_on_neither_template_nor_hub(room):
    waiting, seen = [name for name in PATHS if name.partition(".")[0] == room], set()
    while waiting:
        module = waiting.pop()
        seen.add(module)
        packages = {module.rpartition(".")[0]} & set(PATHS)  # importing a module runs its package first
        waiting += (imported(module) | packages) - seen
    assert not {module for module in seen if module.partition(".")[0] in ("template", "hub", "data")}


def test_every_public_name_loads():
    for name in fnsft_trl.__all__:
        assert getattr(fnsft_trl, name).__doc__


@pytest.mark.parametrize("path", MODULES, ids=name_of)
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
