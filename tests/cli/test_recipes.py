"""`fnsft recipes`: what it lists is what lies in the folder, and what it copies can be run as it says."""

import re
import shlex
from importlib import import_module

import pytest
import yaml
from helpers import ROOT

from fnsft_trl import FunctionalNetworkConfig
from fnsft_trl.cli import main
from fnsft_trl.cli.options.arguments import read_arguments
from fnsft_trl.cli.options.parse import parse_options, parse_recipe
from fnsft_trl.errors import FNSFTError
from fnsft_trl.probes.config import ProbeConfig


RECIPES = sorted(path.relative_to(ROOT / "recipes").as_posix() for path in (ROOT / "recipes").rglob("*.yaml"))


def test_all_recipes_are_listed_each_with_what_it_does(capsys):
    assert main(["recipes"]) == 0
    listed = [line.split(maxsplit=1) for line in capsys.readouterr().out.partition("\n\n")[0].splitlines()]
    assert [name for name, _ in listed] == RECIPES
    for _, about in listed:
        assert about.endswith(".")
        assert not about.startswith(("fnsft ", "accelerate "))


@pytest.mark.parametrize(
    ("names", "copied", "data"),
    [
        (["quickstart"], ["quickstart.yaml"], ["opposites.jsonl"]),
        (["comprehensions.yaml", "quickstart"], ["comprehensions.yaml", "quickstart.yaml"], None),
        (["accelerate"], [name for name in RECIPES if name.startswith("accelerate/")], []),
        (["continual/standard"], ["continual/standard.yaml", "continual/tasks/standard.yaml"], []),
        (["all"], RECIPES, sorted(path.name for path in (ROOT / "recipes" / "data").iterdir())),
    ],
)
def test_copies_are_whole_and_their_paths_are_those_of_the_copies(names, copied, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", *names, "--output_dir", "here/mine"]) == 0
    place = tmp_path / "here" / "mine"
    assert capsys.readouterr().out.splitlines() == [f"here/mine/{name}" for name in copied]
    assert sorted(path.relative_to(place).as_posix() for path in place.rglob("*.yaml")) == sorted(copied)
    if data is not None:
        assert sorted(path.name for path in place.rglob("*.jsonl")) == data
    for name in copied:
        text = (place / name).read_text()
        assert yaml.safe_load(text.replace("here/mine/", "recipes/")) == yaml.safe_load(
            (ROOT / "recipes" / name).read_text()
        )
        for value in yaml.safe_load(text).values():
            for part in value if isinstance(value, list) else [value]:
                if str(part).startswith("here/mine/"):
                    assert (tmp_path / part).exists() or "/data/" not in part
    if "quickstart.yaml" in copied:
        assert parse_recipe(str(place / "quickstart.yaml"), {}).notes == []


def test_copying_again_changes_nothing_and_no_file_is_overwritten(tmp_path, capsys):
    call = ["recipes", "quickstart", "--output_dir", str(tmp_path / "out")]
    assert main(call) == 0
    assert main(call) == 0
    file = tmp_path / "out" / "quickstart.yaml"
    file.write_text("mine: true\n")
    assert main(call) == 2
    assert f"{file} exists already, with other content" in capsys.readouterr().err
    assert file.read_text() == "mine: true\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quickstrat"], "there is no recipe 'quickstrat'; did you mean 'quickstart'?"),
        (["zzz"], "there is no recipe 'zzz'; `fnsft recipes` lists them"),
        (["--output_dir", "out"], "output_dir without a recipe to copy; name some, or `all`"),
    ],
)
def test_what_cannot_be_is_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []


CONFIGS = {"discover": FunctionalNetworkConfig, "probe": ProbeConfig}


def calls(recipe):
    """The commands in the comments of a recipe; options that the text names are given to the first."""
    lines = [line.lstrip("#").strip() for line in recipe.read_text().splitlines() if line.startswith("#")]
    lines = "\n".join(lines).replace("\\\n", " ").splitlines()
    found = [shlex.split(line) for line in lines if line.startswith(("fnsft ", "accelerate "))]
    prose = " ".join(line for line in lines if not line.startswith(("fnsft ", "accelerate ")))
    named = re.findall(r"--\w+(?: [^\s,;()-][^\s,;()]*)?", prose.replace(". ", " ").rstrip("."))
    return [[*found[0], *(word for option in named for word in option.split())], *found[1:]] if found else []


def check(verb, words):
    if verb == "train":
        parse_options(words)
        return
    args = read_arguments(words, import_module(f"fnsft_trl.cli.{verb}").options())
    if verb in CONFIGS:
        CONFIGS[verb](**args.of(CONFIGS[verb]))


@pytest.mark.parametrize("name", RECIPES)
def test_what_the_comments_of_a_recipe_say_to_call_can_be_called(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in calls(ROOT / "recipes" / name):
        if words[0] == "accelerate":
            module = words.index("-m") + 1
            words = ["fnsft", words[module].removeprefix("fnsft_trl.cli."), *words[module + 1 :]]
        check(words[1], words[2:])


def test_a_comment_that_cannot_be_followed_is_found(tmp_path):
    recipe = tmp_path / "r.yaml"
    settings = "model_name_or_path: embedded\ndatasets: [embedded]\n"
    for comment in ("Or with --ica_components 256.", f"So:\n# fnsft discover --config {recipe} --ica_components 256"):
        recipe.write_text(f"# fnsft discover --config {recipe}\n# {comment}\n{settings}")
        *_, words = calls(recipe)
        with pytest.raises(FNSFTError, match="ica_rank is 128, below ica_components"):
            check(words[1], words[2:])
