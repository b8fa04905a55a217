"""Whatever is killed while it writes a template leaves the old one or the new one, and a reader only reads."""

import dataclasses
import os
import subprocess
import sys

import pytest

from fnsft_trl import FunctionalNetworkTemplate
from fnsft_trl.template.storage import FILES, write_files


# What every process here starts with. A process is killed by forbidding it all further changes to the disk.
PROCESS = """
import hashlib, json, os, sys
from pathlib import Path
from fnsft_trl.template.schema import signed
from fnsft_trl.template.storage import write_files
from fnsft_trl.template.stored import StoredTemplate

scratch = Path(sys.argv[1])
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.chmod", "shutil.rmtree")
left = None  # changes that may still be made


class Killed(OSError):
    pass


def hook(event, arguments):
    global left
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if left is None or not (writes or event in CHANGES):
        return
    left -= 1
    if left < 0:
        raise Killed(event)


def files(name):
    return {path.name: path.read_bytes() for path in (scratch / name).iterdir()}


def listing(directory):
    found = sorted(path for path in [directory, *directory.rglob("*")])
    return [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in found]


def read(directory):
    stored, tensors = StoredTemplate.load(directory)
    return stored.description.base_model
"""
KILLS = """
import shutil

read(scratch / "one")  # what is imported on first use is imported now
sys.addaudithook(hook)
os.fsync = lambda number: None  # matters only where the machine loses power, and takes most of the time
one, two, three = (files(name) for name in ("one", "two", "three"))
directory = scratch / "template"


def save(new, changes):
    global left
    left = changes
    try:
        write_files(directory, new)
        return True
    except Killed:
        return False
    finally:
        left = None


def unchanged_by_reading():
    global left
    before, left = listing(directory), 0  # as where nothing may be written
    found = read(directory)
    left = None
    assert listing(directory) == before
    return found


pairs = 0
for first in range(100):
    write_files(directory, one)
    finished = save(two, first)
    found = unchanged_by_reading()
    assert found == "two" if finished else found in ("one", "two"), (first, found)
    shutil.copytree(directory, scratch / "left")
    for second in range(first % 2, 100, 2):  # every second step, by turns
        shutil.rmtree(directory)
        shutil.copytree(scratch / "left", directory)
        again = save(three, second)
        last = unchanged_by_reading()
        assert last == "three" if again else last in (found, "three"), (first, second, found, last)
        pairs += 1
        if again:
            assert files("template") == three  # and nothing else is there
            break
    shutil.rmtree(scratch / "left")
    if finished:
        break
print(first, second, pairs)
"""
WRITER = """
for number in range(30):
    for name in sys.argv[2:]:
        new = files(name)
        config = json.loads(new["config.json"]) | {"revision": f"{os.getpid()} {number}"}  # no two are the same
        write_files(scratch / "template", new | {"config.json": json.dumps(signed(config)).encode()})
"""


@pytest.fixture
def three(templates, tmp_path):
    """A folder with three templates, each named as its base model is, of as many networks."""
    for number, name in enumerate(("one", "two", "three"), 1):
        template = dataclasses.replace(templates["llama"], base_model=name)
        template.loadings = {layer: values + number for layer, values in template.loadings.items()}
        template.save_pretrained(tmp_path / name)
    return tmp_path


def started(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS + code, *map(str, arguments)], text=True, stdout=-1, stderr=-1
    )


@pytest.mark.slow
def test_writers_killed_at_every_step_one_after_the_other(three):
    """Every pair of steps: the second writer finds what the first one left."""
    process = started(KILLS, three)
    out, err = process.communicate()
    assert process.returncode == 0, err
    first, second, pairs = map(int, out.split())
    assert first - 1 <= second <= first + 1  # steps of one save, the lock's included
    assert first > 15
    assert pairs > first * second / 2


def test_two_writers_and_a_reader_at_once(three):
    """Each save is whole, and so is each template that is read, whichever of the writers was the last."""
    target = three / "template"
    write_files(target, {name: (three / "one" / name).read_bytes() for name in FILES})
    writers = [started(WRITER, three, *names) for names in (("one", "two"), ("three",))]
    seen, count = set(), 0
    while any(writer.poll() is None for writer in writers):
        template = FunctionalNetworkTemplate.from_pretrained(target)
        shift = {"one": 1, "two": 2, "three": 3}[template.base_model]
        assert float(template.loadings[0].mean()) == pytest.approx(shift, abs=0.3)
        seen.add(template.base_model)
        count += 1
    assert [writer.communicate()[1] for writer in writers] == ["", ""]
    assert seen == {"one", "two", "three"}
    assert count > 20
    assert sorted(os.listdir(target)) == sorted(FILES)
