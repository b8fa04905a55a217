"""The parts of huggingface_hub that have no public name are there, and do what is relied on."""

import subprocess
import sys

import pytest
from huggingface_hub import HfApi, get_token, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import get_session

from fnsft_trl.compat import hub as compat


@pytest.fixture
def repo(hub):
    """A repository with one file."""
    api = HfApi()
    api.create_repo("alice/compat")
    api.upload_file(path_or_fileobj=b"some text", path_in_repo="a.txt", repo_id="alice/compat")
    return "alice/compat"


def told(error: pytest.ExceptionInfo) -> tuple[Exception, str]:
    return error.value, " ".join(str(error.value).split())


def test_hub_http_error_is_what_a_request_without_an_answer_raises():
    with pytest.raises(compat.HTTPError):
        get_session().get("http://127.0.0.1:9/")
    assert issubclass(HfHubHTTPError, compat.HTTPError)


def test_hub_token_file_is_where_a_token_is_read_from(no_token):
    (no_token / "home").mkdir()
    assert compat.token_file() == str(no_token / "home" / "token")
    assert get_token() is None
    (no_token / "home" / "token").write_text("hf_saved")
    assert get_token() == "hf_saved"


def test_hub_allows_saved_login_unless_a_variable_forbids_it(monkeypatch):
    code = "from fnsft_trl.compat.hub import allows_saved_login as allows; print(allows())"
    for value, allowed in (("0", "True"), ("1", "False")):
        monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", value)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == allowed


def test_hub_is_refused_card_knows_its_error(repo):
    with pytest.raises(ValueError) as error:
        HfApi().upload_file(
            path_or_fileobj=b"---\nlicense: Apache License 2.0\n---\n", path_in_repo="README.md", repo_id=repo
        )
    assert compat.is_refused_card(*told(error))
    assert not compat.is_forced_offline(*told(error))


def test_hub_is_forced_offline_knows_its_errors(repo, hub):
    with pytest.raises(ValueError) as error:
        hf_hub_download(repo, "a.txt", force_download=True, local_files_only=True)
    assert compat.is_forced_offline(*told(error))
    hub.down = 500
    with pytest.raises(ValueError) as error:
        hf_hub_download(repo, "a.txt", force_download=True)
    assert compat.is_forced_offline(*told(error))
    assert not compat.is_refused_card(*told(error))


def test_hub_is_broken_download_knows_its_error(repo, hub, tmp_path):
    with (tmp_path / "a.txt").open("wb") as file, pytest.raises(OSError) as error:
        http_get(f"{hub.endpoint}/{repo}/resolve/main/a.txt", file, expected_size=99)
    assert compat.is_broken_download(*told(error))


def test_hub_is_bad_name_knows_its_error(repo, hub, tmp_path):
    hub.put(repo, {"../../evil.txt": b"evil"})
    with pytest.raises(ValueError) as error:
        snapshot_download(repo, cache_dir=tmp_path)
    assert compat.is_bad_name(*told(error))
    assert not compat.is_refused_card(*told(error))
