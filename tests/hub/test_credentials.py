"""Tokens: which one goes first, and that none is shown or saved."""

import copy
import os
import pickle

import pytest
from hub import ALICE, BOB, FINE, READER, save_login
from huggingface_hub import constants, get_token

from fnsft_trl import FNSFTError
from fnsft_trl.hub.credentials import UnsavedToken, check_token, find_token, hide_tokens, use_env_file


def test_given_before_environment_before_file_before_login(no_token, monkeypatch):
    assert find_token() is None
    assert find_token(FINE) == find_token(FINE)
    assert find_token(FINE).source == "--hub_token"
    save_login(BOB)
    assert find_token().value == BOB
    assert find_token().source == f"the saved login ({constants.HF_TOKEN_PATH})"
    (no_token / ".env").write_text(f"HF_TOKEN={READER}\n")
    assert (find_token().value, find_token().source) == (READER, "HF_TOKEN in the file .env")
    monkeypatch.setenv("HF_TOKEN", ALICE)
    assert (find_token().value, find_token().source) == (ALICE, "HF_TOKEN in the environment")
    assert find_token(FINE).value == FINE


def test_the_old_name_of_the_variable_counts_and_an_empty_one_shuts_the_file_out(no_token, monkeypatch):
    (no_token / ".env").write_text(f"HF_TOKEN={READER}\n")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", BOB)
    assert (find_token().value, find_token().source) == (BOB, "HUGGING_FACE_HUB_TOKEN in the environment")
    use_env_file()
    assert get_token() == BOB
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "")
    assert find_token() is None


def test_without_implicit_tokens_only_a_given_one_is_sent(no_token, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", ALICE)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    assert find_token() is None
    assert find_token(BOB).value == BOB


@pytest.mark.parametrize(
    "line",
    [
        f"HF_TOKEN={ALICE}",
        f"export HF_TOKEN={ALICE}",
        f"  HF_TOKEN = '{ALICE}'  # mine",
        f'HF_TOKEN="{ALICE}"',
        f"HF_TOKEN={ALICE} # mine",
        f"HUGGING_FACE_HUB_TOKEN={ALICE}",
        f"HF_TOKEN={ALICE}\r",
    ],
)
def test_the_env_file_is_read_as_others_read_it_and_for_tokens_alone(no_token, line):
    (no_token / ".env").write_text(f"# settings\nPATH=/nowhere\nNOT_HF_TOKEN=x\n\n{line}\nWANDB_API_KEY=secret\n")
    before = dict(os.environ)
    use_env_file()
    assert get_token() == ALICE
    assert {name for name in os.environ if before.get(name) != os.environ[name]} == {line.split("=")[0].split()[-1]}


@pytest.mark.parametrize("content", ["", "HF_TOKEN=", "HF_TOKEN=''", "#HF_TOKEN=hf_x", "HF_TOKENS=hf_x", "HF_TOKEN"])
def test_an_env_file_without_a_token_changes_nothing(no_token, content):
    (no_token / ".env").write_text(content)
    use_env_file()
    assert get_token() is None
    assert find_token() is None


def test_an_environment_named_env_is_no_file(no_token):
    (no_token / ".env").mkdir()
    use_env_file()
    assert find_token() is None


@pytest.mark.parametrize("token", ["", " ", "hf_two words", "hf_line\n", "hf_é", "hf_\x00"])
def test_a_token_that_no_request_can_carry_is_refused_without_being_shown(no_token, monkeypatch, token):
    with pytest.raises(FNSFTError, match="copy it again") as refused:
        check_token(token)
    assert token.strip() == "" or token.strip() not in str(refused.value)
    check_token(False)
    check_token(None)
    monkeypatch.setenv("HF_TOKEN", "hf_two words")
    for of_this_machine in (None, True):
        with pytest.raises(FNSFTError, match="copy it again"):
            check_token(of_this_machine)
    check_token(ALICE)


def test_what_looks_like_a_token_is_left_out_of_messages():
    text = f"unrecognized arguments: --hub_tokn {ALICE} (Bearer {BOB}) hf_oauth_ab.c-d hf_jwt_eyJ.x.y hf_datasets/name"
    hidden = hide_tokens(text)
    assert "alice" not in hidden
    assert "bob" not in hidden
    assert hidden.count("hf_***") == 4
    assert hidden.endswith("hf_datasets/name")


def test_a_token_is_not_part_of_what_is_printed():
    assert ALICE not in repr(find_token(ALICE))


def test_a_token_is_used_but_not_pickled():
    token = UnsavedToken(ALICE)
    assert token == ALICE
    assert copy.deepcopy([token]) == [ALICE]
    assert pickle.loads(pickle.dumps({"hub_token": token})) == {"hub_token": None}
