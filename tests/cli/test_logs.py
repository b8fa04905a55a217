"""The log of a run says a thing once."""

import logging
import subprocess
import sys

import pytest

from fnsft_trl.cli.logs import hush_repetitions


@pytest.fixture
def package():
    logger = logging.getLogger("fnsft_trl")
    level = logger.level
    yield logger
    logger.setLevel(level)


def test_the_first_process_warns_for_all(package):
    inner = logging.getLogger("fnsft_trl.data.conversion")
    hush_repetitions(0)
    assert inner.isEnabledFor(logging.WARNING)
    hush_repetitions(1)
    assert not inner.isEnabledFor(logging.WARNING)
    assert inner.isEnabledFor(logging.ERROR)


def test_bitsandbytes_says_each_thing_once(package, caplog):
    import bitsandbytes.autograd._functions as functions

    hush_repetitions(0)
    hush_repetitions(0)
    for number in (1, 1, 2, 1):
        functions.logger.warning("cast of layer %s", number)
    assert [record.getMessage() for record in caplog.records] == ["cast of layer 1", "cast of layer 2"]


@pytest.mark.slow
def test_no_library_talks_of_its_own_affairs():
    code = (
        "from fnsft_trl.cli.logs import hush_libraries; hush_libraries()\n"
        "import sys, warnings\n"
        "warnings.warn('`old` is deprecated and will be removed in v6. Use `new` instead.', FutureWarning)\n"
        "warnings.warn('something else', FutureWarning)\n"
        "import bitsandbytes\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "something else" in done.stderr
    assert "deprecated" not in done.stderr
    assert "kernels" not in done.stderr
