"""`fnsft probe`: rows, text and questions, one report of all, and nothing computed twice."""

import json
from xml.etree import ElementTree

import pytest
from helpers import instead, tiny_rows
from processes import run_processes

from fnsft_trl.cli import main


FILES = ("report.html", "report.md", "results.json", "conditions.jsonl", "atlas.html", "examples.json")


@pytest.fixture
def place(templates, tmp_path):
    """A template, and data of three kinds."""
    templates["llama"].save_pretrained(tmp_path / "template")
    data = {
        "rows": tiny_rows(6),
        "text": [{"text": row["prompt"] + row["completion"]} for row in tiny_rows(6, seed=1)],
        "sky": [{"question": "Sky?", "choices": ["ba", "ko ri"], "answer": n % 2} for n in range(4)],
    }
    for name, rows in data.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def words(place, model_dir, *more, data=("rows", "text", "sky")):
    files = [f"{name}={place / name}.jsonl" for name in data]
    asked = ["probe", str(model_dir), str(place / "template"), "--data", *files, "--output_dir", str(place / "out")]
    return [*asked, "--max_tokens", "60", "--draws", "3", "--batch_size", "8", "--curves", "lesion", *more]


@pytest.mark.slow
def test_a_probe_from_the_command_line(place, model_dir, templates):
    asked = words(place, model_dir, "--prompts", "1", "--neurons", "2", "--networks", "0-1")
    assert main(asked) == 0
    assert all((place / "out" / name).is_file() for name in FILES)
    found = json.loads((place / "out" / "results.json").read_text())
    measures = {"rows": "exact_match", "text": "cross_entropy", "sky": "accuracy"}
    for name, measure in measures.items():
        part = found["data"][name]
        assert measure in part["intact"]
        assert [verdict["network"] for verdict in part["verdicts"]] == ["0", "1"]
        assert len(part["neurons"]) == 2
        for verdict in part["verdicts"]:
            assert {"random", "rms_matched", "layer_shuffled", "surrogate"} <= set(verdict["controls"])
            assert verdict["controls"]["random"]["draws"] == 3
    for chart in (place / "out").glob("*.svg"):
        ElementTree.fromstring(chart.read_text())
    lines = [json.loads(line) for line in (place / "out" / "conditions.jsonl").read_text().splitlines()]
    assert {line["data"] for line in lines} == set(measures)
    before = (place / "out" / "passes-0.jsonl").read_bytes()
    assert main(asked) == 0
    assert (place / "out" / "passes-0.jsonl").read_bytes() == before  # all of it was there
    assert json.loads((place / "out" / "results.json").read_text()) == found


@pytest.mark.slow
def test_two_processes_come_to_the_results_of_one(place, model_dir):
    """The batches are split over them. (Without --surrogate they find that control together, on other shifts.)"""
    more = f"--surrogate {place / 'template'} --prompts 1 --neurons 1 --networks 0 --batch_size 2".split()
    for count in (1, 2):
        asked = instead(words(place, model_dir, data=("rows", "text")), *more, "--output_dir", str(place / str(count)))
        printed = run_processes(count, "-m", "fnsft_trl.cli", *asked)
        assert [bool(each) for each in printed] == [True, *[False] * (count - 1)]  # one of them tells
    one, two = (json.loads((place / str(count) / "results.json").read_text()) for count in (1, 2))
    assert one.pop("cost")["passes"] == two.pop("cost")["passes"]
    assert one == two
    one, two = ((place / str(count) / "conditions.jsonl").read_bytes() for count in (1, 2))
    assert one == two
    assert all((place / "2" / f"passes-{rank}.jsonl").stat().st_size for rank in (0, 1))


def test_resampled_at_answers_and_dissociated(place, model_dir):
    more = ["--tokens", "answer", "--ablation", "resample", "--examples", "0", "--networks", "0"]
    domains = ["--domains", f"rows={place / 'template'}", f"sky={place / 'template'}"]
    assert main([*words(place, model_dir, *more, *domains, data=("rows", "sky"))]) == 0
    found = json.loads((place / "out" / "results.json").read_text())
    assert {verdict["network"] for verdict in found["data"]["rows"]["verdicts"]} == {"rows/0", "sky/0"}


def test_without_lesions_there_are_no_verdicts_and_the_curves_stand_alone(place, model_dir, capsys):
    assert main(instead(words(place, model_dir), "--curves", "kept")) == 0
    printed = capsys.readouterr().out
    assert "kept at " in printed
    assert "network 0" not in printed
    found = json.loads((place / "out" / "results.json").read_text())["data"]["text"]
    assert found["verdicts"] == []
    assert list(found["curves"]) == ["kept"]
    assert not (place / "out" / "surrogate").exists()
    assert "The model on text" in (place / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--tokens", "answer"], "text is text, without answers"),
        (["--networks", "99"], "outside 0-"),
        (["--domains", "code=x"], "no template at x"),
        (["--load_in_8bit"], "norms of weights"),
        (["--draws", "2"], "draws is 2"),
        (["--curves", "dosis"], "curves holds 'dosis'"),
        (["--curves", "kept", "kept"], "curves names one twice"),
    ],
)
def test_what_cannot_be_probed_is_refused(place, model_dir, capsys, more, said):
    assert main(instead(words(place, model_dir), *more)) == 2
    assert said in capsys.readouterr().err
    assert not (place / "out").exists()
