import json
import re

import pytest

from fnsft_trl.report.figures import comparison_figure, curves_figure
from fnsft_trl.report.report import Report, format_table
from fnsft_trl.template.description import TemplateDescription
from fnsft_trl.template.figure import networks_svg


pytest.importorskip("matplotlib")


def test_report_is_saved_in_three_forms(templates, tmp_path):
    report = Report("A <title>")
    report.heading("Part & one")
    report.text("Some text.")
    report.table(["arm", "score"], [["a", "0.5"], ["<b>", "0.6"], ["x|y\nz", ""]])
    svg = networks_svg(TemplateDescription.of(templates["llama"], "0" * 64))
    report.figure("networks", svg.encode(), "The networks.")
    report.figure(
        "curves",
        curves_figure({"a": [[(0.3, 0.1), (0.1, 0.2)]], "b": [[(0.3, -0.1)]]}, learning="x", forgetting="y"),
        "Trade-off.",
    )
    report.figure("comparison", comparison_figure([[0.1, 0.9]], "IoU"), "All <pairs>.")
    report.save(tmp_path, {"score": 0.5})
    markdown, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    assert "| a | 0.5 |" in markdown
    assert "| x\\|y z |" in markdown
    assert re.findall(r"\]\((.*?)\)", markdown) == ["networks.svg", "curves.png", "comparison.png"]
    assert page.count("data:image/png;base64,") == 2
    assert f"<figure>{svg}<figcaption>The networks." in page
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert "<pairs>" not in page
    assert "http" not in page.replace('xmlns="http://www.w3.org/2000/svg"', "")  # nothing is fetched
    assert json.loads((tmp_path / "results.json").read_text()) == {"score": 0.5}
    assert (tmp_path / "networks.svg").read_text() == svg
    for name in ("curves", "comparison"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_code_is_code_wherever_it_stands(tmp_path):
    report = Report("a report")
    report.text("with `mask_mode`, and `<script>`")
    report.table(["`name`"], [["`lora_r`"]])
    report.save(tmp_path, {})
    page = (tmp_path / "report.html").read_text()
    codes = re.findall("<code>(.*?)</code>", page)
    assert codes == ["mask_mode", "&lt;script&gt;", "name", "lora_r"]
    assert "`" not in page


def test_a_picture_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="neither PNG nor SVG"):
        Report("title").figure("photo", b"\xff\xd8\xff", "A photo.")


def test_table_is_aligned():
    lines = format_table(["arm", "n"], [["longer name", "5"], ["x", "1,000"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2].endswith("    5")


def test_a_page_fits_a_narrow_screen(tmp_path):
    report = Report("a report")
    report.text("sha256 " + "0" * 64)
    report.table(["name", "value"], [["long", "1" * 200]])
    report.save(tmp_path, {})
    page = (tmp_path / "report.html").read_text()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    for part in ("table", "h1, h2, p, figcaption", "code"):
        (rule,) = re.findall(rf"^{part} {{(.*)}}$", page, flags=re.MULTILINE)
        assert "overflow-x: auto" in rule or "overflow-wrap: anywhere" in rule


def test_a_sentence_in_a_table_gets_room(tmp_path):
    report = Report("a report")
    report.table(["name", "value", "verdict"], [["x", "1.5", "stronger than random neurons of the same layers"]])
    report.save(tmp_path, {})
    assert re.findall('<td class="words">(.*?)</td>', (tmp_path / "report.html").read_text()) == [
        "stronger than random neurons of the same layers"
    ]
