"""The private methods that are overridden or called are there; and no other one is."""

import inspect
import re
from importlib import import_module
from pkgutil import walk_packages
from types import FunctionType

import pytest

import fnsft_trl
from fnsft_trl.compat.methods import PRIVATE_METHODS


LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "huggingface_hub", "bitsandbytes")


def is_code(value) -> bool:
    return isinstance(value, (FunctionType, staticmethod, classmethod, property))


def class_of(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


@pytest.mark.parametrize("method", PRIVATE_METHODS, ids=lambda method: f"{method.owner}.{method.name}")
def test_the_method_is_there_with_its_parameters(method):
    owner, about = class_of(method.owner), f"needed because {method.why}; see {method.link}"
    assert method.name in {*dir(owner), *inspect.get_annotations(owner)}, about
    if method.parameters is not None:
        value = getattr(owner, method.name)
        found = list(inspect.signature(value).parameters)[0 if inspect.ismethod(value) else 1 :]  # without `self`
        assert found[: len(method.parameters)] == list(method.parameters), about


@pytest.fixture(scope="module")
def own_classes():
    names = [found.name for found in walk_packages(fnsft_trl.__path__, "fnsft_trl.")]
    modules = [import_module(name) for name in names if not name.endswith("__main__")]
    classes = {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    return [own for own in classes if own.__module__.startswith("fnsft_trl.")]


def test_every_private_method_that_a_class_overrides_is_listed(own_classes):
    listed = {(class_of(method.owner), method.name) for method in PRIVATE_METHODS}
    for own in own_classes:
        foreign = [base for base in own.__mro__[1:] if base.__module__.partition(".")[0] in LIBRARIES]
        for name in (name for name, value in vars(own).items() if re.match("_(?!_)", name) and is_code(value)):
            owners = [base for base in foreign if name in vars(base)]
            assert not owners or any((base, name) in listed for base in owners), f"{own.__qualname__}.{name}"


@pytest.mark.parametrize("method", PRIVATE_METHODS, ids=lambda method: f"{method.owner}.{method.name}")
def test_what_is_listed_is_overridden_or_called(method, own_classes):
    own = [own for own in own_classes if not own.__module__.startswith("fnsft_trl.compat")]
    modules = {import_module(own.__module__) for own in own}
    assert any(re.search(rf"\b{method.name}\b", inspect.getsource(module)) for module in modules)
