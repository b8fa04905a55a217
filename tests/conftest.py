import functools
import gc
import importlib.metadata
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile

from hub import ALICE, HUB


# All tests, and the processes they start, talk to this Hub. huggingface_hub reads these names when it is imported.
os.environ["HF_ENDPOINT"] = HUB.endpoint
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-home-")
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "0"
os.environ.pop("HF_TOKEN", None)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave their core to others

import hypothesis
import pytest
import torch
from helpers import FAMILIES, medium_model, tiny_model, tiny_rows, tiny_tokenizer
from processes import run_python

from fnsft_trl import FunctionalNetworkConfig, discover_networks
from fnsft_trl.neurons.sites import SITES


# Faults are those of POSIX: limits of a process, signals that end it, a folder that is brought to the disk.
collect_ignore = ["faults"] if os.name == "nt" else []

# The same examples in every run, so that a change alone can turn a test red.
hypothesis.settings.register_profile("stable", derandomize=True, deadline=None, max_examples=100)
hypothesis.settings.load_profile("stable")

# What is installed stays so: libraries that ask for a version at every call do not read its file each time.
for name in ("metadata", "version"):
    setattr(importlib.metadata, name, functools.cache(getattr(importlib.metadata, name)))

# In the background of a script, tests and the processes that they start would ignore interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Threads that wait for each other make tiny models many times slower on a busy machine: OMP_NUM_THREADS=1 is heeded.
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(2)


def pytest_collection_modifyitems(items):
    """On Windows, leave out what only POSIX has; the converter of the tests is a script there."""
    for item in items if os.name == "nt" else []:
        if item.get_closest_marker("posix") or "converter" in item.fixturenames:
            item.add_marker(pytest.mark.skip(reason="not on Windows"))


@pytest.fixture(scope="session", autouse=True)
def hub_home():
    yield
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def kept_aside():
    """Every training has all garbage collected. What was imported stays, and is not looked through each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_environment():
    """Some arguments of a Trainer (`fsdp`) set variables, which would reach later tests and their processes."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def forked(monkeypatch):
    """The fresh processes in which the package reloads what was saved need not import everything anew.

    tests/export/test_verification.py and test_merged.py start some from nothing.
    """
    run = subprocess.run

    def fork(command, *args, **settings):
        return run_python(*command[1:]) if command[0] == sys.executable else run(command, *args, **settings)

    monkeypatch.setattr(subprocess, "run", fork)


@pytest.fixture
def log(caplog, monkeypatch):
    """What the package logs."""
    monkeypatch.setattr(logging.getLogger("fnsft_trl"), "propagate", True)
    caplog.set_level("WARNING")
    return caplog


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Tokenised data of the tests stay out of the user's cache."""
    directory = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fnsft_trl.data.tokenized.cache_dir", lambda: directory)
        yield


@pytest.fixture
def hub(monkeypatch):
    """The loopback Hub, empty, with the token of a user who may write to repositories under `alice/`."""
    HUB.repos.clear()
    HUB.requests.clear()
    HUB.cut, HUB.sent, HUB.down = 0, 0.5, 0
    monkeypatch.setenv("HF_TOKEN", ALICE)
    return HUB


@pytest.fixture
def no_token(monkeypatch, tmp_path):
    """An empty working directory, and no token anywhere."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, "so that it is put back")
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    return tmp_path


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="session")
def rows():
    return tiny_rows()


def _discover(site, tokenizer, rows):
    config = FunctionalNetworkConfig(
        ica_components=3,
        ica_rank=16,
        ica_max_tokens=250,
        ica_batch_size=2,
        ica_max_length=32,
        ica_percentile=80,
        ica_site=site,
    )
    texts = [row["prompt"] + row["completion"] for row in rows]
    return {name: discover_networks(tiny_model(name), tokenizer, texts, config) for name in FAMILIES}


@pytest.fixture(scope="session")
def site_templates(tokenizer, rows):
    """site -> family -> template."""
    return {site: _discover(site, tokenizer, rows) for site in SITES}


@pytest.fixture(scope="session")
def templates(site_templates):
    """Networks of neurons: family -> template."""
    return site_templates["mlp_intermediate"]


@pytest.fixture(scope="session")
def medium_template(tokenizer, rows):
    """Networks of `medium_model`."""
    config = FunctionalNetworkConfig(ica_components=2, ica_rank=8, ica_max_tokens=200, ica_max_length=32)
    texts = [row["prompt"] + row["completion"] for row in rows]
    return discover_networks(medium_model(), tokenizer, texts, config)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, tokenizer):
    """A tiny Llama with its tokenizer, on disk."""
    directory = tmp_path_factory.mktemp("model") / "tiny-llama"
    tiny_model("llama").save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
