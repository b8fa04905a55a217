import json

import pytest

from fnsft_trl.report.figures import networks_figure, trade_off_figure
from fnsft_trl.report.report import Report, format_table


pytest.importorskip("matplotlib")


def test_report_is_saved_in_three_forms(templates, tmp_path):
    report = Report("A <title>")
    report.heading("Part & one")
    report.text("Some text.")
    report.table(["arm", "score"], [["a", "0.5"], ["<b>", "0.6"]])
    report.figure("networks", networks_figure(templates["llama"]), "The networks.")
    report.figure(
        "trade_off", trade_off_figure([("a", 0.1, 0.2), ("b", 0.3, -0.1)], learning="x", forgetting="y"), "Trade-off."
    )
    report.save(tmp_path, {"score": 0.5})
    markdown, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    assert "| a | 0.5 |" in markdown
    assert "(networks.png)" in markdown
    assert page.count("data:image/png;base64,") == 2
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert "http" not in page
    assert json.loads((tmp_path / "results.json").read_text()) == {"score": 0.5}
    for name in ("networks", "trade_off"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_table_is_aligned():
    lines = format_table(["arm", "n"], [["longer name", "5"], ["x", "1,000"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2].endswith("    5")
