"""What is built installs in an environment that has nothing of the checkout, and works there."""

import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT

import fnsft_trl


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel, made from the sdist, and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def fresh(built, tmp_path_factory):
    """An environment with the wheel; its dependencies are those that the tests have."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, str(built[0])], check=True)
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    own, outer = (
        Path(subprocess.run([each, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
        for each in (str(python), sys.executable)
    )
    (own / "dependencies.pth").write_text(f"{outer}\n")
    return python


def call(python, *words, cwd, module="fnsft_trl.cli"):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python), "-m", module, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_package_and_the_recipes(built):
    names = set(zipfile.ZipFile(built[0]).namelist())
    for path in (ROOT / "fnsft_trl").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert path.relative_to(ROOT).as_posix() in names
    for path in (ROOT / "recipes").rglob("*"):
        if path.is_file():
            assert f"fnsft_trl/{path.relative_to(ROOT).as_posix()}" in names
    assert not [name for name in names if not name.startswith(("fnsft_trl/", "fnsft_trl-"))]
    assert f"-{fnsft_trl.__version__}-" in built[0].name


def test_the_sdist_holds_what_a_wheel_and_the_tests_need(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "constraints.txt", "tests/conftest.py"} <= names
    assert {"recipes/quickstart.yaml", "docs/training.md", "fnsft_trl/py.typed"} <= names


def test_the_readme_on_the_package_index_leads_only_to_addresses(built):
    with zipfile.ZipFile(built[0]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        text = wheel.read(name).decode("utf-8").partition("\n\n")[2]
    assert text.startswith("# fnsft_trl\n")
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert links
    assert all(link.startswith("https://") for link in links)
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    files = re.findall(r"`([\w./-]+\.(?:md|py|cff))`", text)
    assert len(files) > 20
    assert set(files) <= names


def test_what_is_installed_lists_recipes_shows_a_template_and_trains(fresh, model_dir, templates, rows, tmp_path):
    assert "usage" in call(fresh, "demo", "--help", cwd=tmp_path)
    assert "quickstart.yaml" in call(fresh, "recipes", cwd=tmp_path)
    call(fresh, "recipes", "quickstart", cwd=tmp_path)
    assert (tmp_path / "recipes" / "data" / "opposites.jsonl").is_file()
    templates["llama"].save_pretrained(tmp_path / "template")
    assert "3 functional networks" in call(fresh, "inspect", "template", cwd=tmp_path)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["--model_name_or_path", model_dir, "--dataset_name", "rows.jsonl", "--ica_template_path", "template"]
    words += ["--max_steps", "1", "--use_cpu", "--bf16", "false", "--report_to", "none", "--output_dir", "out"]
    call(fresh, "train", *words, cwd=tmp_path)
    assert (tmp_path / "out" / "adapter_config.json").is_file()
