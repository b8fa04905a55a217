"""The atlas: one page, nothing asked for, every text escaped, the same on a phone and on a desk."""

import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers import tiny_model

from fnsft_trl.cli import main
from fnsft_trl.errors import FNSFTError
from fnsft_trl.probes.atlas import ProbeResults, _nearest
from fnsft_trl.probes.example_file import Example, Examples
from fnsft_trl.probes.examples import find_examples
from fnsft_trl.probes.sample_file import SampleResults
from fnsft_trl.template.stored import StoredTemplate


HOSTILE = ['<script>alert("x")</script>', "<img src=x onerror=alert(1)>", '"><svg onload=alert(2)>', "</details>&amp;"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_of_networks_that_are_equally_near_the_first_are_named():
    overlaps = np.array([0.2, 1.0, *[0.5] * 60, 0.7, 0.0])
    assert _nearest(overlaps, 1) == [62, 2, 3]
    assert _nearest(np.array([1.0, 0.0, 0.0]), 0) == []


def results_of(networks):
    control = {"control": "random", "mean": 0.1, "highest": 0.2, "difference": 1.0, "interval": [0.5, 1.5], "p": 0.01}
    verdicts = [
        {
            "network": str(number),
            "effect": {"value": 1.0 + number, "low": 0.5, "high": 1.5 + number},
            "controls": {"random": control, "rms_matched": control},
            "verdict": f"stronger than random neurons {HOSTILE[0]}",
        }
        for number in range(networks)
    ]
    curve = [
        {"selector": selector, "point": point, "cross_entropy": 10 * point * (2 if selector == "networks" else 1)}
        for selector in ("networks", "random")
        for point in (0.001, 0.01, 0.1)
    ]
    part = {"tokens": 100, "intact": {}, "verdicts": verdicts, "curves": {"dose": curve, "amplify": curve}}
    return {"data": {HOSTILE[1]: part}, "settings": {"ablation": "zero", "draws": 20}}


@pytest.fixture(scope="module")
def page(templates, tmp_path_factory):
    """A template with hostile names, examples and results, and its page."""
    place = tmp_path_factory.mktemp("atlas")
    templates["llama"].save_pretrained(place / "template")
    count = len(templates["llama"].components)
    names = [f"{number}={HOSTILE[number % len(HOSTILE)]}" for number in range(count)]
    assert main(["inspect", str(place / "template"), "--name", *names]) == 0
    found = StoredTemplate.open(place / "template").description
    example = Example(tuple(HOSTILE), (0.5, -1.0, 2.0, 0.0), HOSTILE[2])
    Examples(tuple((example,) * 2 for _ in range(count)), 100, found.tensors_sha256).save(place / "template")
    (place / "probe").mkdir()
    (place / "probe" / "results.json").write_text(json.dumps(results_of(count)))
    (place / "samples").mkdir()
    counted = {"null": 0.25, "iou": 0.5}
    found = [{"network": number, "samples": number, "share": number / 8} | counted for number in range(count)]
    (place / "samples" / "results.json").write_text(json.dumps({"networks": found, "samples": [[]] * 8}))
    words = ["inspect", str(place / "template"), "--html", str(place / "atlas.html")]
    assert main([*words, "--probe", str(place / "probe"), "--samples", str(place / "samples")]) == 0
    return place / "atlas.html"


def test_every_text_is_escaped_and_nothing_is_asked_for(page, templates):
    text = page.read_text()
    found = Page(text)
    tags = [tag for tag, _ in found.tags]
    assert tags.count("script") == 1
    assert "img" not in tags
    assert not {"link", "iframe", "object", "embed", "base", "form"} & set(tags)
    for _, attributes in found.tags:
        assert not {name for name in attributes if name.startswith("on")}
        assert attributes.get("href", "#").startswith("#")
        assert "src" not in attributes
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text)
    policy = next(attributes["content"] for tag, attributes in found.tags if attributes.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    for hostile in HOSTILE:  # shown as it is
        assert hostile in found.text
    assert len(text) < 3 * 2**20


def test_effects_curves_and_recurrence_are_shown(page, templates):
    """Of each network, and in its row of the table."""
    text = Page(page.read_text()).text
    for number in range(len(templates["llama"].components)):
        assert f"{1.0 + number:+.3f} nats" in text
        assert f"Found in {number} of 8 texts taken by themselves" in text
        assert f'<td data-value="{number / 8}">{number / 8:.0%}</td>' in page.read_text()
    for caption in ("The lesion of each network", "Dose: ", "Activations of one network multiplied"):
        assert caption in text


def test_the_policy_names_the_script_that_is_there(page):
    import base64
    import hashlib

    script = re.search(r"<script>(.*)</script>", page.read_text(), re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in page.read_text()


def test_the_page_is_made_without_torch(page):
    words = ["inspect", str(page.parent / "template"), "--html", str(page.parent / "again.html")]
    code = f"import sys; from fnsft_trl.cli import main; assert main({words}) == 0; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert "No example texts" not in (page.parent / "again.html").read_text()


def test_names_are_kept_and_the_tensors_stay_as_they_are(templates, tmp_path):
    templates["llama"].save_pretrained(tmp_path / "t")
    before = (tmp_path / "t" / "template.safetensors").read_bytes()
    config = (tmp_path / "t" / "config.json").read_bytes()
    assert main(["inspect", str(tmp_path / "t"), "--name", "0=dates and years"]) == 0
    assert (tmp_path / "t" / "template.safetensors").read_bytes() == before
    loaded = type(templates["llama"]).from_pretrained(tmp_path / "t")
    assert loaded.components[0].name == "dates and years"
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "t" / "config.json").read_bytes()
    assert "0 (dates and years)" in (tmp_path / "t" / "README.md").read_text()
    assert main(["inspect", str(tmp_path / "t"), "--name", "0="]) == 0
    assert (tmp_path / "t" / "config.json").read_bytes() == config
    for wrong in ("99=x", "dates", "0=a\nb"):
        assert main(["inspect", str(tmp_path / "t"), "--name", wrong]) == 2


def test_what_is_not_of_the_template_is_refused(page, templates, tmp_path):
    found = StoredTemplate.open(page.parent / "template").description
    count = len(found.components)
    assert Examples.read(tmp_path, tensors_sha256=None, networks=count) is None
    with pytest.raises(FNSFTError, match="of another template"):
        Examples.read(page.parent / "template", tensors_sha256="0" * 64, networks=count)
    (tmp_path / "examples.json").write_text('{"format": "fnsft_trl.examples", "networks": [[{"tokens": []}]]}')
    with pytest.raises(FNSFTError, match="holds no examples"):
        Examples.read(tmp_path, tensors_sha256=None, networks=1)
    words = ["inspect", str(page.parent / "template"), "--html", str(tmp_path / "a.html"), "--samples"]
    assert main([*words, str(page.parent / "probe")]) == 2
    assert main([*words[:2], *words[4:], str(page.parent / "samples")]) == 2  # without html
    with pytest.raises(FNSFTError, match=f"is of {count} networks, and the template has {count + 1}"):
        SampleResults.read(page.parent / "samples", networks=count + 1)
    (tmp_path / "results.json").write_text('{"data": {"x": {"verdicts": [{"network": "0"}]}}}')
    with pytest.raises(FNSFTError, match="holds no results"):
        ProbeResults.read(tmp_path)


def test_examples_are_the_tokens_of_the_largest_activity(templates, tokenizer, rows):
    texts = [row["prompt"] + row["completion"] for row in rows]
    found = find_examples(tiny_model("llama"), tokenizer, templates["llama"], {"rows": texts}, count=3)
    assert len(found.networks) == len(templates["llama"].components)
    for of_network in found.networks:
        peaks = [example.peak for example in of_network]
        assert len(peaks) == 3
        assert peaks == sorted(peaks, reverse=True)
        assert peaks[0] > 1  # in standard deviations
    whole = "".join("".join(found.networks[0][0].tokens).replace("<eos>", "").replace("\u0120", "").split())
    assert whole
    assert any(whole in "".join(text.split()) for text in texts)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_it_opens_from_disk_without_an_error(page, tmp_path, width):
    """No console error, no element wider than the window, and search and sorting work."""
    probe = (
        "<script>addEventListener('load', () => { const box = document.getElementById('search');"
        "document.querySelectorAll('#table th button')[0].click();"
        "const first = document.querySelector('#table tbody tr').dataset.network;"
        "box.value = 'no such word'; box.dispatchEvent(new Event('input'));"
        "const shown = [...document.querySelectorAll('details')].filter((card) => !card.hidden).length;"
        "const width = document.documentElement.scrollWidth;"
        "parent.document.title = JSON.stringify([width, innerWidth, first, shown]); });</script>"
    )
    text = page.read_text()
    inside = re.sub(r"<meta http-equiv[^>]*>", "", text).replace("</body>", f"{probe}</body>")
    tested = tmp_path / "tested.html"  # in a frame, for a window is never as narrow as a phone
    frame = f'<iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{html.escape(inside)}"></iframe>'
    tested.write_text(f"<!doctype html><title>0</title>{frame}")
    common = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    common += ["--enable-logging=stderr"]
    ran = [
        subprocess.run([*common, *more], capture_output=True, text=True, timeout=120, check=True)
        for more in (
            [f"--window-size={width},900", f"--screenshot={tmp_path / 'shot.png'}", page.as_uri()],
            ["--window-size=1400,900", "--dump-dom", tested.as_uri()],
        )
    ]
    assert (tmp_path / "shot.png").stat().st_size > 10_000
    assert not [line for each in ran for line in each.stderr.splitlines() if "CONSOLE" in line]
    scroll, inner, first, shown = json.loads(
        re.search(r"<title>(.*?)</title>", ran[1].stdout)[1].replace("&quot;", '"')
    )
    assert inner == width
    assert scroll <= inner
    assert first == str(text.count("<details") - 1)
    assert shown == 0
