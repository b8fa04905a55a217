import os
import signal
import stat

import pytest

from fnsft_trl.writing import files_written_whole, write_text_whole, written_whole


forks = pytest.mark.skipif(os.name != "posix", reason="there are no such processes and locks")


class Failed(BaseException):
    pass


def test_a_file_is_the_old_one_until_it_is_the_new_one(tmp_path):
    path = tmp_path / "new folder" / "file"
    for text in ("old", "new"):
        before = path.read_text() if path.exists() else None
        with written_whole(path) as scratch:
            scratch.write_text(text)
            assert (path.read_text() if path.exists() else None) == before
        assert path.read_text() == text
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("error", [OSError, Failed])
def test_whatever_fails_the_old_one_stays_and_nothing_beside_it(tmp_path, error, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*_):
        raise error

    def write(scratch):
        scratch.write_text("half")

    def write_and_fail(scratch):
        write(scratch)
        fail()

    for body, broken in ((write_and_fail, None), (write, "fsync"), (write, "replace")):
        with monkeypatch.context() as patch:
            if broken:
                patch.setattr(os, broken, fail)
            with pytest.raises(error), written_whole(path) as scratch:
                body(scratch)
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["file"]


def test_a_folder_does_not_take_the_place_of_another(tmp_path):
    for name in ("first", "second"):
        try:
            with written_whole(tmp_path / "folder") as scratch:
                scratch.mkdir()
                (scratch / name).write_text(name)
        except OSError:
            assert name == "second"
    assert os.listdir(tmp_path) == ["folder"]
    assert os.listdir(tmp_path / "folder") == ["first"]


@pytest.mark.posix
def test_all_is_on_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: [done.append(os.fstat(number).st_ino), fsync(number)])
    monkeypatch.setattr(os, "replace", lambda *paths: [done.append("renamed"), replace(*paths)])
    with written_whole(tmp_path / "folder") as scratch:
        for name in ("a", "b/c"):
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            (scratch / name).write_text(name)
    numbers = {(tmp_path / "folder" / name).stat().st_ino for name in ("", "a", "b", "b/c")}
    assert (set(done[:4]), done[4:]) == (numbers, ["renamed", tmp_path.stat().st_ino])


@pytest.mark.posix
def test_others_may_read_what_the_user_lets_them_read(tmp_path):
    (tmp_path / "plain").write_text("")
    with written_whole(tmp_path / "whole") as scratch:
        scratch.write_text("")
    with written_whole(tmp_path / "folder") as scratch:
        scratch.mkdir()
    plain, whole, folder = (stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "whole", "folder"))
    assert plain == whole == folder & 0o666


def killed_while(writes, tmp_path):
    """Let a process die in the middle of a writing, and give what is hidden then."""
    child = os.fork()
    if child == 0:
        with writes as scratch:
            (scratch / "half" if scratch.is_dir() else scratch).write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    return [name for name in os.listdir(tmp_path) if name.startswith(".") and not name.endswith(".lock")]


@forks
def test_what_a_killed_writer_left_goes_with_the_next_write_and_a_living_ones_stays(tmp_path):
    file = tmp_path / "file[1].json"
    (left,) = killed_while(written_whole(file), tmp_path)
    assert (tmp_path / left / file.name).read_text() == "half"
    with written_whole(file) as living:
        living.write_text("living")
        assert not (tmp_path / left).exists()
        write_text_whole(file, "meanwhile")
        assert file.read_text() == "meanwhile"
        assert living.read_text() == "living"
    assert file.read_text() == "living"
    assert os.listdir(tmp_path) == [file.name]


@forks
def test_what_a_killed_writer_of_a_new_folder_left_goes_with_the_next_one(tmp_path):
    assert len(killed_while(files_written_whole(tmp_path / "folder"), tmp_path)) == 1
    with files_written_whole(tmp_path / "folder") as scratch:
        (scratch / "whole").write_text("whole")
    assert os.listdir(tmp_path) == ["folder"]
    assert os.listdir(tmp_path / "folder") == ["whole"]


@forks
def test_nothing_of_others_is_taken_for_a_leftover(tmp_path):
    others = tmp_path / ".file.json.d", tmp_path / ".file.json.abcdefgh", tmp_path / "away"
    for folder in others:
        folder.mkdir()
    (others[1] / "mine").write_text("of the user")
    (tmp_path / ".file.json.12345678").symlink_to(others[2])
    write_text_whole(tmp_path / "file.json", "whole")
    assert all(folder.is_dir() for folder in others)
    assert (tmp_path / ".file.json.12345678").is_symlink()
