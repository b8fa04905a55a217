"""The conversion of the embedded model; what it converts to is tested with the real model."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from fnsft_trl.data import embedded
from fnsft_trl.writing import written_whole


@pytest.fixture
def conversions(monkeypatch, tmp_path):
    """The conversions that were made: of a model that is one file and is made in a moment."""
    made = []

    def convert(package, target):
        made.append(target)
        with written_whole(target) as scratch:
            scratch.mkdir()
            time.sleep(0.2)
            (scratch / "config.json").write_text("{}")

    monkeypatch.setattr(embedded, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(embedded, "_package_dir", lambda name: tmp_path)
    monkeypatch.setattr(embedded, "_convert", convert)
    return made


def test_one_of_several_that_need_the_model_converts_it(conversions):
    with ThreadPoolExecutor(3) as pool:
        found = set(pool.map(lambda _: embedded.embedded_model(), range(3)))
    assert [*found] == conversions
    assert os.listdir(found.pop().parent) == ["SmolLM2-135M-Instruct"]


def test_a_conversion_that_fails_leaves_nothing_and_the_next_one_makes_it(conversions, monkeypatch):
    convert = embedded._convert

    def fail(package, target):
        with written_whole(target) as scratch:
            scratch.mkdir()
            raise OSError("no space left")

    monkeypatch.setattr(embedded, "_convert", fail)
    with pytest.raises(OSError, match="no space left"):
        embedded.embedded_model()
    assert os.listdir(embedded.cache_dir()) == []
    monkeypatch.setattr(embedded, "_convert", convert)
    assert (embedded.embedded_model() / "config.json").exists()
