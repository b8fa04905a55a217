"""Whose token it is and what it may do, and `fnsft auth`, which says so."""

import subprocess
import sys
import traceback

import pytest
from helpers import ROOT
from hub import ALICE, BOB, FINE, READER, save_login

from fnsft_trl import FNSFTError
from fnsft_trl.cli import main
from fnsft_trl.hub.account import check_upload, whose_token
from fnsft_trl.hub.credentials import find_token


SECRETS = (ALICE, BOB, FINE, READER)


def shown(capsys, *arguments) -> str:
    assert main(["auth", *arguments]) == 0
    text = capsys.readouterr().out
    assert not any(secret in text for secret in SECRETS)
    return text


def refused(capsys, *arguments) -> str:
    assert main(["auth", *arguments]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.strip().splitlines()
    assert printed.out == ""
    assert line.startswith("fnsft auth: error: ")
    return line


def test_a_write_token(hub):
    account = whose_token(find_token(ALICE))
    assert (account.name, account.kind, account.organisations) == ("alice", "user", ("team",))
    assert (account.role, account.may_write, account.permissions, account.expires) == ("write", True, {}, None)


def test_a_fine_grained_token(hub):
    account = whose_token(find_token(FINE))
    assert account.permissions == {
        "user alice": ("repo.content.read", "repo.write"),
        "org team": ("repo.content.read",),
        "everywhere": ("discussion.write",),
        "gated repositories open to the account": ("read",),
    }
    assert account.may_write
    assert account.expires == "2027-01-31T00:00:00.000Z"


def test_a_token_that_only_reads_is_refused_before_the_work(hub, monkeypatch):
    check_upload(ALICE)
    check_upload(FINE)
    check_upload()
    with pytest.raises(FNSFTError, match=r"from --hub_token \(alice\) may only read"):
        check_upload(READER)
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(FNSFTError, match="from HF_TOKEN in the environment"):
        check_upload()


def test_a_repository_of_others_is_refused_before_the_work(hub):
    for repo_id in ("alice/networks", "team/networks", "networks", None):
        check_upload(ALICE, repo_id)
        check_upload(FINE, repo_id)
    with pytest.raises(FNSFTError, match=r"of alice or team, not to bob/networks; .*pull request"):
        check_upload(ALICE, "bob/networks")


def test_without_a_token_a_person_is_asked_and_a_script_is_told(hub, no_token, monkeypatch):
    with pytest.raises(FNSFTError, match="there is no token to push with; log in with `hf auth login`"):
        check_upload()
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("huggingface_hub.login", lambda: save_login(BOB))
    check_upload()
    assert find_token().value == BOB


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_does_not_answer_is_one_line(hub, status, capsys):
    hub.down = status
    assert f"the Hub answered {status}" in refused(capsys)


def test_no_message_and_no_traceback_holds_a_token(hub):
    for token in (
        "hf_wrongWrongWrongWrong",
        "hf_twoWordsTwoWords x",
        "hf_lineLineLineLine\n",
        "hf_éééééééééééééééééé",
    ):
        with pytest.raises(FNSFTError) as caught:
            whose_token(find_token(token))
        told = "".join(traceback.format_exception(caught.value))
        assert token.strip() not in told
        assert token.split()[0] not in told


def test_auth_says_which_token_is_used_from_where_and_with_which_rights(hub, no_token, capsys, monkeypatch):
    (no_token / ".env").write_text(f"HF_TOKEN={FINE}\n")
    text = shown(capsys)
    assert "for loading and upload: HF_TOKEN in the file .env\n" in text
    assert "account  alice (user)\n  member   team\n  rights   fine-grained\n" in text
    assert "user alice: repo.content.read, repo.write\n" in text
    assert "expires  2027-01-31" in text
    monkeypatch.setenv("HF_TOKEN", READER)
    assert "rights   read; uploads would be refused\n" in shown(capsys)
    text = shown(capsys, "--hub_token", BOB)
    assert "for loading: HF_TOKEN in the environment\n  account  alice (user)" in text
    assert "for upload: --hub_token\n  account  bob (user)\n  rights   read and write\n  expires  not said" in text
    monkeypatch.delenv("HF_TOKEN")
    (no_token / ".env").unlink()
    assert "for loading: no token" in shown(capsys, "--hub_token", BOB)
    save_login(ALICE)
    assert "for loading and upload: the saved login (" in shown(capsys)


def test_auth_without_a_token_or_with_a_wrong_one_is_one_line(hub, no_token, capsys, monkeypatch):
    assert "there is no token of the Hub" in refused(capsys)
    monkeypatch.setenv("HF_TOKEN", "hf_wrongWrongWrongWrong")
    line = refused(capsys)
    assert "does not accept the token from HF_TOKEN in the environment" in line
    assert "Wrong" not in line
    monkeypatch.setenv("HF_TOKEN", ALICE)
    assert "the token from --hub_token" in refused(capsys, "--hub_token", "hf_otherOtherOtherOther")
    assert "Other" not in refused(capsys, "--hub_tokn", "hf_otherOtherOtherOther")
    assert "copy it again" in refused(capsys, "--hub_token", "hf_two words")


def test_a_token_in_the_env_file_is_used_by_every_command(hub, no_token, templates, capsys):
    # What has been downloaded once is read from the cache without a token: a repository of this test alone.
    templates["llama"].push_to_hub("alice/networks-of-the-env-file", private=True, token=ALICE)
    assert main(["inspect", "alice/networks-of-the-env-file"]) == 2
    capsys.readouterr()
    (no_token / ".env").write_text(f"HF_TOKEN={ALICE}\n")
    assert main(["inspect", "alice/networks-of-the-env-file"]) == 0
    assert "3 functional networks" in capsys.readouterr().out


def test_the_command_of_the_original_project_is_installed_and_needs_no_torch(hub):
    project = (ROOT / "pyproject.toml").read_text()
    assert 'check-hf-token = "fnsft_trl.cli:check_hf_token"' in project
    code = (
        "import sys; sys.argv = ['check-hf-token']\n"
        "from fnsft_trl.cli import check_hf_token as command\n"
        "status = command()\nassert 'torch' not in sys.modules and 'transformers' not in sys.modules\nsys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "alice" in done.stdout


def test_whose_token_it_is_is_asked_once(hub):
    for _ in range(3):
        check_upload(ALICE, "alice/any")
    assert sum(path.endswith("/whoami-v2") for _, path in hub.requests) <= 1
