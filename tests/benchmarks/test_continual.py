"""The committed run of the continual plan: its page says what its cells say."""

import importlib.util

from helpers import ROOT


def test_the_page_quotes_the_tables_of_the_cells():
    spec = importlib.util.spec_from_file_location("continual_run", ROOT / "benchmarks" / "continual.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.read()
    assert {(each.arm, each.order) for each in found} == {
        (arm, order) for arm in ("lora", "full_low", "replay_10", "olora", "grows") for order in ("forth", "back")
    }
    assert all(len(each.matrices) == 2 for each in found)
    assert module.markdown(found) in (ROOT / "docs" / "continual.md").read_text()
