"""The structure that the design asks for, read from the source."""

import ast
import inspect
import re
import tomllib
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

import fnsft_trl
from fnsft_trl.compat.methods import PRIVATE_METHODS


PACKAGE = Path(fnsft_trl.__file__).parent
TESTS = Path(__file__).parent
ROOT = TESTS.parent
# The way of the data. A package imports only from packages before it, and a module of it only from those before that.
# A module that starts a line of its own stands at the top level.
ORDER = {
    "lazy": [],
    "errors": [],
    "json_text": [],
    "compat": [
        *(
            "torch",
            "transformers",
            "peft",
            "trl",
            "accelerate",
            "datasets",
            "hub",
            "bitsandbytes",
            "deepspeed",
            "lm_eval",
            "methods",
        ),
    ],
    "writing": [],
    "occupied": [],
    "ranks": [],
    "cache": [],
    "ranges": [],
    "fields": [],
    "finite": [],
    "threshold": [],
    "combinations": [],
    "config": [],
    "hub": ["names", "credentials", "files", "account", "card"],
    "data": [
        *(
            "cells",
            "turns",
            "messages",
            "formats",
            "left_out",
            "long_lines",
            "choices",
            "rendering",
            "notes",
            "dialects",
            "prompts",
            "config",
            "conversion",
        ),
        *("together", "embedded", "sources", "sequences", "tokenized", "labels", "preparation"),
        "training",
    ],
    "neurons": ["layout", "experts", "taps", "sites", "mask"],
    "template": [
        *("membership", "schema", "description", "storage", "legacy", "stored", "figure", "card", "naming", "weights"),
        *("tensors", "template"),
    ],
    "discovery": [
        *("activations", "moments", "units", "sketch", "ica", "matching", "components", "decomposition", "null"),
        *("recurrence", "inputs", "sinks", "directions", "basis", "progress", "surrogate", "discovery", "scale"),
        *("saved_directions", "network_directions", "module_directions"),
    ],
    "selection": ["evidence", "select"],
    "interventions": ["replacement", "places", "masking", "baking", "restoring"],
    "tuner": ["config", "held", "changes", "hooks", "merged", "layer", "linear", "experts", "model", "saved"],
    "constraints": ["neurons", "momentum", "frozen", "full", "lora_config", "lora", "trained_maps", "protection"],
    "comparison": ["similarity", "fingerprint", "samples"],
    "evaluation": [
        *("config", "settings", "share", "bootstrap", "measures", "rows", "metrics", "reload", "retention", "kl"),
        *("series", "overlap", "general", "generation", "choices", "demonstrations", "equal_learning", "paired"),
        *("evaluated", "harness", "evaluation"),
    ],
    "training": [
        *(
            "config",
            "engines",
            "learning_rate",
            "numbers",
            "start",
            "replay",
            "preparation",
            "loaded",
            "divergence",
            "batches",
            "full_eval",
            "hub",
        ),
        *(
            "watched",
            "ways",
            "guard",
            "run_record",
            "checkpoints",
            "same_run",
            "reference",
            "kinds",
            "given_rows",
            "refused",
        ),
        *("run", "resumption", "schedule", "budget"),
        *(
            "retention_run",
            "retention",
            "retention_texts",
            "anchor",
            "anchored",
            "penalty_config",
            "elastic",
            "earlier_answers",
            "orthogonal",
            "penalties",
            "penalized",
            "retained",
            "protection_config",
            "protected_bases",
            "protection",
            "protecting",
            "results",
            "networked",
            "trainer",
            "any_trainer",
        ),
    ],
    "export": [
        *("adapter", "plain_lora", "on_disk", "whole", "written", "merged", "baked", "smaller", "difference"),
        *("reloaded", "verification", "gguf", "parts", "restored", "restored_model"),
    ],
    "report": ["report", "figures", "charts"],
    "probes": [
        *(
            "config",
            "condition",
            "data",
            "scoring",
            "prefix",
            "switch",
            "records",
            "passes",
            "controls",
            "plan",
            "pool",
        ),
        *("statistics", "found", "dissociation", "singles", "probe", "report", "example_file"),
        *("examples", "sample_file", "atlas"),
    ],
    "experiments": ["held_out", "arms", "cells", "runner", "summary", "comparison"],
    "continual": [
        *("transfer", "task_config", "tasks", "plan", "stages", "scorers", "growth", "finishing", "study", "outcome"),
        "reporting",
    ],
    "cli": [
        *(
            "endings",
            "output",
            "precision",
            "refusals",
            "logs",
            "templates",
            "options",
            "masks",
            "pushing",
            "models",
            "checks",
        ),
        *("auth", "inspect", "env", "compare", "export", "basis", "discover", "evaluation_report", "evaluation_run"),
        *("evaluate", "restoring_asked", "restoring_screen", "restoring_report", "restoring_run", "restore"),
        "probe",
        *("fine_tuning", "train"),
        *("recipe_arms", "experiment", "plans", "continual", "demo", "recipes"),
        "__main__",
    ],
}
# The same inside a package of a package.
INNER = {
    "cli.options": [
        *(
            "schema",
            "run_config",
            "trl_options",
            "written",
            "values",
            "sources",
            "loading",
            "help",
            "arguments",
            "translate",
        ),
        "parse",
    ],
}
# What other libraries do not document: only `compat` imports it, where a test holds each name.
PRIVATE = (
    *("peft.config", "peft.mapping", "peft.tuners", "peft.utils", "trl.data_utils", "trl.trainer"),
    *("transformers.integrations", "transformers.modeling_utils", "transformers.pytorch_utils"),
    *("transformers.trainer", "accelerate.utils.environment", "accelerate.utils.parse_flag_from_env", "bitsandbytes"),
    *("huggingface_hub.constants", "huggingface_hub.errors.HTTPError"),
)
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


def place(module: str) -> tuple[int, int, int]:
    room, _, rest = module.partition(".")
    inner, _, last = rest.partition(".")
    return (
        list(ORDER).index(room),
        ORDER[room].index(inner) if inner else -1,
        INNER[f"{room}.{inner}"].index(last) if last else -1,
    )


def test_every_module_has_its_place_and_every_place_its_module():
    assert {name.partition(".")[0] for name in PATHS} == set(ORDER)
    for package, names in (ORDER | INNER).items():
        depth = package.count(".") + 1
        inside = {name.split(".")[depth] for name in PATHS if name.startswith(f"{package}.")}
        assert inside == set(names), package


@pytest.mark.parametrize("module", sorted(PATHS))
def test_a_module_imports_only_from_those_before_it(module):
    for other in imported(module):
        if PATHS[module].name == "__init__.py" and other.startswith(f"{module}."):
            continue  # a package re-exports its modules
        assert place(other) < place(module), f"{module} imports {other}"


OUTSIDE_COMPAT = sorted(name for name in PATHS if name.partition(".")[0] != "compat")


@cache
def nodes_of(module: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(PATHS[module].read_text())))


def is_private(name: str) -> bool:
    """Whether a name with its modules is private: by an underscore, or because nobody documents it."""
    listed = any(f"{name}.".startswith(f"{private}.") for private in PRIVATE)
    return listed or any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


@pytest.mark.parametrize("module", OUTSIDE_COMPAT)
def test_only_compat_imports_what_is_private(module):
    found = []
    for node in nodes_of(module):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    assert not [name for name in found if is_private(name)]


@cache
def own_private_names() -> set[str]:
    """Private names that this package gives, or whose place in other libraries `compat` lists."""
    names = {method.name for method in PRIVATE_METHODS} | {"_replace"}  # of every named tuple
    for node in (node for module in PATHS for node in nodes_of(module)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            is_own = isinstance(node.value, ast.Name) and node.value.id == "self"
            names |= {node.attr} if is_own else set()
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


@pytest.mark.parametrize("module", OUTSIDE_COMPAT)
def test_only_compat_reads_or_sets_private_attributes_of_others(module):
    attributes = {node.attr for node in nodes_of(module) if isinstance(node, ast.Attribute)}
    private = {name for name in attributes if name.startswith("_") and not name.startswith("__")}
    assert private <= own_private_names()


@pytest.mark.parametrize("module", sorted(set(PATHS) - set(OUTSIDE_COMPAT) - {"compat"}))
def test_every_name_of_compat_has_a_test_and_a_link(module):
    source, tests = PATHS[module].read_text(), TESTS / "compat" / f"test_{module.replace('.', '_')}.py"
    (names,) = (node.value for node in nodes_of(module) if is_all(node))
    for name in ast.literal_eval(names):
        assert name in tests.read_text(), name
    assert source.count("https://github.com/") > 0


def is_all(node: ast.AST) -> bool:
    return isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__"


@pytest.mark.parametrize("room", INDEPENDENT)
def test_sets_of_neurons_depend_on_neither_template_nor_hub(room):
    waiting, seen = [name for name in PATHS if name.partition(".")[0] == room], set()
    while waiting:
        module = waiting.pop()
        seen.add(module)
        packages = {module.rpartition(".")[0]} & set(PATHS)  # importing a module runs its package first
        waiting += (imported(module) | packages) - seen
    assert not {module for module in seen if module.partition(".")[0] in ("template", "hub", "data")}


@pytest.mark.parametrize(
    "path",
    [
        *(
            "fnsft_trl.tuner:NeuronTunerConfig",
            "fnsft_trl.cli.train:main",
            "fnsft_trl.evaluation.metrics:score_tokens",
        ),
        *("fnsft_trl.evaluation.retention:RetentionText", "fnsft_trl.discovery:discover_group"),
        *("fnsft_trl.template:FunctionalNetworkTemplate", "fnsft_trl.neurons:find_neuron_sites"),
        *("fnsft_trl.hub:fetch_file", "fnsft_trl.export:to_merged", "fnsft_trl.report:Report"),
        *("fnsft_trl.data:to_trl_format", "fnsft_trl.constraints:constrain_lora"),
    ],
)
def test_a_documented_path_stays(path):
    module, _, name = path.partition(":")
    assert callable(getattr(import_module(module), name))


def test_the_map_names_every_package_and_module_of_the_top_level():
    shown = (ROOT / "CONTRIBUTING.md").read_text().partition("## The map")[2].partition("## Words")[0]
    lines = [line.split()[0] for line in shown.splitlines() if line.startswith("      ")]
    expected = [f"{room}/" if names else f"{room}.py" for room, names in ORDER.items()]
    assert [line for line in lines if line in expected] == expected
    folders = {line.split()[0] for line in shown.splitlines() if re.match(r" {4}\w+/", line)}
    built = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["sdist"]
    assert {*folders, "tests/"} == {f"{path[1:]}/" for path in built["include"] if (ROOT / path[1:]).is_dir()}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_classes_and_functions_are_small(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            most = 300 if isinstance(node, ast.ClassDef) else 60
            assert node.end_lineno - node.lineno < most, node.name


def test_no_two_places_share_more_than_eight_lines():
    places: dict[tuple[str, ...], list[str]] = {}
    for path in MODULES:
        lines = [
            (number, line.strip())
            for number, line in enumerate(path.read_text().splitlines(), 1)
            if line.strip() and not line.strip().startswith(("#", "from ", "import "))
        ]
        for start in range(len(lines) - 8):
            window = tuple(line for _, line in lines[start : start + 9])
            places.setdefault(window, []).append(f"{name_of(path)}:{lines[start][0]}")
    assert not [found for found in places.values() if len(found) > 1]


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


def public_callables():
    """Every public function, and of every public class what makes one and its own public methods."""
    for name in fnsft_trl.__all__:
        thing = inspect.unwrap(getattr(fnsft_trl, name))
        if inspect.isfunction(thing):
            yield name, thing
            continue
        for own, value in vars(thing).items():
            function = inspect.unwrap(value.__func__ if isinstance(value, (classmethod, staticmethod)) else value)
            if inspect.isfunction(function) and (own == "__init__" or not own.startswith("_")):
                yield f"{name}.{own}", function


def test_public_names_are_annotated():
    """All that they take and give, so that a type checker of a user sees it (`py.typed`)."""
    bare = set()
    for name, function in public_callables():
        signature = inspect.signature(function)
        bare |= {
            f"{name}({parameter.name})"
            for parameter in signature.parameters.values()
            if parameter.annotation is parameter.empty and parameter.name not in ("self", "cls")
        }
        if signature.return_annotation is signature.empty and not name.endswith("__init__"):
            bare.add(f"{name} ->")
    assert len(dict(public_callables())) > 60
    assert not bare
