"""A verb that is interrupted, or meets a full disk, says so in one line, with the command that goes on."""

import errno
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from helpers import tiny_model, tiny_rows, tiny_tokenizer

from fnsft_trl import FunctionalNetworkTemplate
from fnsft_trl.cli import main, run_verb
from fnsft_trl.cli.endings import command
from fnsft_trl.discovery.activations import ActivationReader
from fnsft_trl.errors import FNSFTError
from fnsft_trl.training.trainer import FNSFTTrainer


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    home = tmp_path_factory.mktemp("files")
    tiny_model("llama").save_pretrained(home / "model")
    tiny_tokenizer().save_pretrained(home / "model")
    rows = (row["prompt"] + row["completion"] for row in tiny_rows(300))
    (home / "rows.txt").write_text("\n".join(rows))
    return home


def small(files, output):
    argv = ["discover", files / "model", files / "rows.txt", "--output_dir", output, "--ica_components", 2]
    argv += ["--ica_rank", 8, "--ica_max_tokens", 1000, "--ica_batch_size", 2, "--ica_max_length", 32]
    return [str(part) for part in argv]


def said(capsys, argv, status):
    assert main(argv) == status
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"fnsft {argv[0]}:")]


def command_in(line):
    return shlex.split(re.search("`fnsft (.*)`", line)[1])


def test_an_interrupted_discovery_goes_on_by_the_command_that_it_says(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fnsft_trl.discovery.progress._LEAST_SAVED", 1)
    read = ActivationReader.read

    def interrupted(self, *args, **kwargs):
        for block in read(self, *args, **kwargs):
            if block.batch == 20:
                raise KeyboardInterrupt
            yield block

    with monkeypatch.context() as patch:
        patch.setattr(ActivationReader, "read", interrupted)
        (line,) = said(capsys, [*small(files, tmp_path / "a b"), "--hub_token", "secret"][:-2], 130)
    argv = command_in(line)
    assert argv == [*small(files, tmp_path / "a b"), "--resume"]
    assert main(argv) == 0
    assert main(small(files, tmp_path / "whole")) == 0
    one, other = (tmp_path / name / "template.safetensors" for name in ("a b", "whole"))
    assert one.read_bytes() == other.read_bytes()
    assert not (tmp_path / "whole/.progress").exists()
    assert not (tmp_path / "a b/.progress").exists()


@pytest.mark.parametrize("fault", ["ends", "is killed"])
def test_a_discovery_whose_template_finds_no_room_goes_on_from_its_last_save(files, tmp_path, capsys, fault):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fnsft_trl.discovery.progress._LEAST_SAVED", 1)
        patch.setattr(os, "replace", refusing(os.replace, ".template.ready"))
        (line,) = said(capsys, small(files, tmp_path), 2)
        assert "No space left on device" in line
        if fault == "ends":
            patch.setattr("fnsft_trl.discovery.progress._LEAST_SAVED", 1)
    forwards = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fnsft_trl.discovery.discovery.Milestones.passed", lambda self, count: forwards.append(count))
        assert main([*small(files, tmp_path), "--resume"]) == 0
    FunctionalNetworkTemplate.from_pretrained(tmp_path)
    assert len(forwards) < 30  # what was read before was not read again


def refusing(replace, name):
    def refused(source, target):
        if os.fspath(target).endswith(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target)
        return replace(source, target)

    return refused


@pytest.mark.slow
def test_an_interrupted_training_goes_on_by_the_command_that_it_says(files, templates, tmp_path, capsys, monkeypatch):
    templates["llama"].save_pretrained(tmp_path / "template")
    argv = ["train", "--model_name_or_path", files / "model", "--dataset_name", files / "rows.txt", "--max_steps", 4]
    argv += ["--save_steps", 1, "--learning_rate", 0.01, "--report_to", "none", "--output_dir", tmp_path / "out"]
    argv += ["--ica_template_path", tmp_path / "template", "--per_device_train_batch_size", 2]
    argv = [str(part) for part in argv]
    step = FNSFTTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == at:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(FNSFTTrainer, "training_step", interrupted)
        at = 0
        (line,) = said(capsys, argv, 130)
        assert "no checkpoint was complete yet" in line
        at = 3
        (line,) = said(capsys, argv, 130)
    assert f"{tmp_path}/out/checkpoint-3 is saved" in line
    again = command_in(line)
    assert again == [*argv, "--resume_from_checkpoint", "true"]
    assert main(again) == 0
    assert (tmp_path / "out/checkpoint-4").is_dir()


@pytest.mark.slow
@pytest.mark.posix
def test_a_conversion_that_is_to_end_leaves_nothing_behind(files, tmp_path):
    converter = tmp_path / "converter"
    converter.write_text(f"#!/bin/sh\necho half > $3\nsleep 600 &\necho $! > {tmp_path}/child\nwait\n")
    converter.chmod(0o755)
    argv = [
        "export",
        files / "model",
        "--to",
        "gguf",
        "--output_path",
        tmp_path / "out/m.gguf",
        "--converter",
        converter,
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "fnsft_trl.cli", *map(str, argv)], stderr=subprocess.PIPE, text=True
    )
    child = tmp_path / "child"
    for _ in range(600):
        if child.is_file() and child.read_text().strip():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143
    assert err.strip().splitlines()[-1] == "fnsft export: interrupted; nothing was left half written"
    assert os.listdir(tmp_path / "out") == []
    assert not is_running(int(child.read_text()))


def is_running(process):
    """Whether a process is there, and has not ended without anybody to ask how."""
    try:
        return open(f"/proc/{process}/stat").read().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_what_a_disk_refuses_is_one_line(monkeypatch, capsys, number):
    def refuse(argv):
        raise OSError(number, os.strerror(number), "/mnt/full/file")

    monkeypatch.setattr("fnsft_trl.cli.auth.main", refuse)
    (line,) = said(capsys, ["auth"], 2)
    assert f"/mnt/full/file: {os.strerror(number)}" in line


def test_the_command_that_goes_on_has_each_option_once_and_no_token():
    argv = ["m", "--hub_token", "secret", "--hub-token=secret", "--resume-from-checkpoint", "out/a b", "--seed", "1"]
    told = command("train", argv, "--resume_from_checkpoint", "true")
    assert told == "`fnsft train m --seed 1 --resume_from_checkpoint true`"
    assert command("discover", ["m", "--resume", "--seed", "1"], "--resume") == "`fnsft discover m --seed 1 --resume`"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("error", [FNSFTError("a file cannot be read"), RuntimeError("no shape"), OSError(28, "full")])
def test_an_error_that_takes_the_place_of_a_request_to_end_is_one(number, error, monkeypatch, capsys):
    """As compiled code does: it knows that something was raised, and not what."""

    def main(argv):
        with suppress(BaseException):
            signal.raise_signal(number)
        raise error

    before = signal.getsignal(number)
    monkeypatch.setattr("fnsft_trl.cli.env.main", main)
    assert run_verb("env", []) == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    said = capsys.readouterr().err
    assert "interrupted" in said
    assert "error" not in said
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_error_of_what_is_done_to_end_stays_one(number, monkeypatch, capsys):
    """As where a disk has no room for what an interrupted verb saves."""

    def main(argv):
        try:
            signal.raise_signal(number)
        finally:
            raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("fnsft_trl.cli.env.main", main)
    assert run_verb("env", []) == 2
    assert "error: " in capsys.readouterr().err


def test_a_defect_keeps_its_traceback(monkeypatch):
    def fail(argv):
        raise OSError(errno.EBADF, "a defect")

    monkeypatch.setattr("fnsft_trl.cli.auth.main", fail)
    with pytest.raises(OSError, match="a defect"):
        main(["auth"])
