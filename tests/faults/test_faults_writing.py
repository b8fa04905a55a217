"""Several files of a folder, and one: the old or the new ones, wherever the disk fails or the process is killed."""

import os
import shutil

import pytest
from faults.injector import HOW, Disk, at_every_step, contents

from fnsft_trl.writing import files_written_whole, written_whole


OLD = {"config.json": b"old", "model-1.safetensors": b"old 1", "model-2.safetensors": b"old 2", "networks/a": b"old"}
NEW = {"config.json": b"new", "model.safetensors": b"new", "networks/b": b"new", "same": b"same"}
OTHERS = {"same": b"same", "mine.txt": b"of the user", "runs/1/log": b"of a tracker"}
OWNED = ("model*.safetensors",)


def put(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def write(folder, files=NEW, **options):
    with files_written_whole(folder, owned=OWNED, **options) as scratch:
        put(scratch, files)


@pytest.mark.slow
@pytest.mark.parametrize("exchanged", [True, False])
@pytest.mark.parametrize("how", HOW)
def test_the_files_of_a_folder_are_the_old_ones_or_the_new_ones(tmp_path, how, exchanged):
    folder, states, steps = tmp_path / "folder", [], 0

    def prepare():
        shutil.rmtree(tmp_path, ignore_errors=True)
        put(folder, OLD | OTHERS)

    for disk in at_every_step(lambda: write(folder, exchanged=exchanged), tmp_path, how, prepare=prepare):
        found = contents(folder)
        is_new = found == OTHERS | NEW
        if how == "killed" and not exchanged and found != OLD | OTHERS and not is_new:
            # Between: not found by what others are found by, and finished by the next writer.
            assert "config.json" not in found, disk.seen[-1]
            assert {name: found.get(name) for name in OTHERS} == OTHERS, disk.seen[-1]
        else:
            assert is_new or found == OLD | OTHERS, disk.seen[-1]
            if how != "killed":
                assert (disk.error is None) == is_new or is_new, disk.seen[-1]
        states.append(is_new)
        steps += 1
        write(folder, NEW | {"config.json": b"newest"}, exchanged=exchanged)
        assert contents(folder) == OTHERS | NEW | {"config.json": b"newest"}, disk.seen[-1]
        hidden = [name for name in (*os.listdir(folder), *os.listdir(tmp_path)) if name.startswith(".")]
        assert not hidden, (disk.seen[-1], hidden)
    assert steps > 15
    assert set(states) == {True, False}
    assert how != "killed" or states == sorted(states)  # from one step on
    assert contents(folder) == OTHERS | NEW


@pytest.mark.parametrize("how", HOW)
def test_a_new_folder_is_there_whole_or_not_at_all(tmp_path, how):
    folder = tmp_path / "way/folder"

    def prepare():
        shutil.rmtree(tmp_path, ignore_errors=True)
        tmp_path.mkdir()

    for disk in at_every_step(lambda: write(folder), tmp_path, how, prepare=prepare):
        assert not folder.exists() or contents(folder) == NEW, disk.seen[-1]
    assert contents(folder) == NEW


@pytest.mark.parametrize("how", HOW)
def test_a_file_is_the_old_one_or_the_new_one(tmp_path, how):
    file = tmp_path / "file"

    def write_file():
        with written_whole(file) as scratch:
            scratch.write_text("new")

    for disk in at_every_step(write_file, tmp_path, how, prepare=lambda: file.write_text("old")):
        assert file.read_text() in (("old", "new") if disk.seen[-1].startswith(("unlink", "rmdir")) else ("old",))
        if how != "killed" and not disk.seen[disk.at].startswith(("unlink", "rmdir")):
            assert os.listdir(tmp_path) == ["file"], disk.seen[-1]
        for left in set(tmp_path.iterdir()) - {file}:
            shutil.rmtree(left)
    assert file.read_text() == "new"


@pytest.mark.parametrize("place", ["in the folder", "in a folder that is not writable"])
def test_a_folder_that_cannot_be_exchanged_is_written_file_by_file(tmp_path, monkeypatch, place):
    folder = tmp_path / "folder"
    put(folder, OLD | OTHERS)
    number = folder.stat().st_ino
    if place == "in the folder":
        monkeypatch.chdir(folder)
        write(".", exchanged=True)
    else:
        monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
        write(folder, exchanged=True)
    assert contents(folder) == OTHERS | NEW
    assert folder.stat().st_ino == number
    assert sorted(os.listdir(folder)) == ["config.json", "mine.txt", "model.safetensors", "networks", "runs", "same"]


def test_two_writers_of_a_folder_take_turns(tmp_path):
    folder = tmp_path / "folder"
    put(folder, OLD)
    from threading import Thread

    with files_written_whole(folder, owned=OWNED, exchanged=True) as scratch:
        other = Thread(target=write, args=(folder, NEW | {"config.json": b"other"}), kwargs={"exchanged": True})
        other.start()
        put(scratch, NEW)
        other.join(0.2)
        assert other.is_alive()
        assert contents(folder) == OLD
    other.join(20)
    assert contents(folder) == NEW | {"config.json": b"other"}


def test_the_injector_counts_and_fails_where_it_is_told(tmp_path):
    def act():
        (tmp_path / "a").write_text("four")
        os.replace(tmp_path / "a", tmp_path / "b")

    disk = Disk(tmp_path)
    with disk.broken():
        act()
    assert disk.seen == ["open a", "write a", "replace b"]
    (tmp_path / "b").unlink()
    half = Disk(tmp_path, 1)
    with half.broken():
        act()
    assert isinstance(half.error, OSError)
    assert (tmp_path / "a").read_text() == "fo"
