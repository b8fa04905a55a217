"""`fnsft recipes`: what it lists is what lies in the folder, and what it copies can be run as it says."""

import pytest
import yaml
from helpers import ROOT

from fnsft_trl.cli import main
from fnsft_trl.cli.options.parse import parse_recipe


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
    assert f"{file} is there already, and another" in capsys.readouterr().err
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
