"""The examples run as they are, with less of everything; and they are notebooks."""

import re
import subprocess
import sys

import jupytext
import pytest
from helpers import ROOT


pytestmark = pytest.mark.slow

# Constants at the head of an example, and what they are here.
LESS = {
    "less_forgetting.py": "ROWS, TEST_ROWS, STEPS, TOKENS, TOLERANCE = 48, 12, 2, 200, 1.0",
    "look_into_a_network.py": "NETWORKS, TOKENS, READ, SCORED, DRAWS = 3, 1_000, 200, 60, 3",
}


def test_all_examples_are_run():
    assert sorted(path.name for path in (ROOT / "examples").glob("*.py")) == sorted(LESS)


@pytest.mark.parametrize("name", LESS)
def test_an_example_runs(name, tmp_path):
    text, head = (ROOT / "examples" / name).read_text(), LESS[name]
    names = head.partition(" = ")[0]
    text, count = re.subn(rf"^{re.escape(names)} = .*$", head, text, flags=re.MULTILINE)
    assert count == 1
    (tmp_path / name).write_text(text)
    done = subprocess.run([sys.executable, name], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", LESS)
def test_an_example_is_a_notebook_with_text_before_its_code(name):
    cells = jupytext.read(ROOT / "examples" / name).cells
    assert cells[0].cell_type == "markdown"
    assert cells[0].source.startswith("# ")
    assert sum(cell.cell_type == "code" for cell in cells) > 4
