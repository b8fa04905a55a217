"""Comparison of templates, neuron by neuron and by time courses."""

import dataclasses
import json

import pytest
import torch
from helpers import tiny_model

from fnsft_trl import FNSFTError, FunctionalNetworkConfig, FunctionalNetworkTemplate, discover_networks
from fnsft_trl.cli import main
from fnsft_trl.comparison.fingerprint import network_time_courses, split_passages
from fnsft_trl.comparison.similarity import compare_templates, compare_time_courses
from fnsft_trl.template.legacy import legacy_bytes


def with_loadings(template, loadings):
    components = [dataclasses.replace(component) for component in template.components]
    return dataclasses.replace(template, loadings=loadings, components=components)


def shuffled(template, seed=0):
    """The same loadings at other neurons."""
    generator = torch.Generator().manual_seed(seed)
    orders = {layer: torch.randperm(width, generator=generator) for layer, width in template.widths.items()}
    return with_loadings(template, {layer: template.loadings[layer][:, order] for layer, order in orders.items()})


def test_a_template_against_itself_is_one(templates):
    template = templates["llama"]
    found = compare_templates(template, template, permutations=49)
    assert [(m.partner, m.nearest) for m in found.matches] == [(0, 0), (1, 1), (2, 2)]
    assert (found.mean("iou"), found.mean("dice"), found.same) == (1, 1, 3)
    assert found.mean("correlation") == pytest.approx(1)
    assert all(m.p_value == pytest.approx(1 / 50) for m in found.matches)
    assert torch.equal(found.iou, found.iou.T)


def test_a_random_template_gives_the_null(templates):
    template = templates["llama"]
    pairs = [compare_templates(template, shuffled(template, seed), permutations=49) for seed in range(12)]
    for name in ("iou", "correlation"):
        mean = sum(found.mean(name) for found in pairs) / len(pairs)
        assert mean == pytest.approx(getattr(pairs[0], f"null_{name}"), rel=0.2)
    p_values = sorted(m.p_value for found in pairs for m in found.matches)
    assert 0.25 < sum(p_values) / len(p_values) < 0.75  # uniform, as under the null
    assert p_values[0] >= 1 / 50 - 1e-6


def test_permutations_stay_within_layers(templates):
    """Networks that only share their layers are not found again."""
    template = templates["llama"]
    loadings = {i: torch.randn(3, 40, generator=torch.Generator().manual_seed(i)) for i in template.widths}
    crowded = {i: values * (10 if i == 1 else 1) for i, values in loadings.items()}
    a, b = with_loadings(template, crowded), with_loadings(template, {**crowded, 1: crowded[1].flip(1)})
    found = compare_templates(a, b, permutations=99)
    assert found.null_iou > 0.2  # the rule of 0.2 alone would call them the same
    assert min(m.p_value for m in found.matches) > 0.05


def test_networks_in_another_order_and_one_that_is_missing(templates):
    template = templates["llama"]
    order = [2, 0]
    part = dataclasses.replace(
        template,
        loadings={i: -values[order] for i, values in template.loadings.items()},
        components=[dataclasses.replace(template.components[c]) for c in order],
    )
    found = compare_templates(template, part, permutations=19)
    assert [m.partner for m in found.matches] == [1, None, 0]
    assert [m.same for m in found.matches] == [True, None, True]
    assert found.matches[1].iou is None
    assert found.mean("iou") == 1
    back = compare_templates(part, template, permutations=19)
    assert [m.partner for m in back.matches] == order
    json.dumps(found.to_dict(), allow_nan=False)


def test_lists_of_neurons_are_the_networks_that_they_list(templates, tmp_path):
    template = templates["llama"]
    file = tmp_path / "lists.json"
    file.write_bytes(legacy_bytes(template.listed(), template.widths, template.site))
    lists = FunctionalNetworkTemplate.from_pretrained(file)
    for a, b in ((template, lists), (lists, template)):
        found = compare_templates(a, b, permutations=19)
        assert [m.partner for m in found.matches] == [m.nearest for m in found.matches] == [0, 1, 2]
        assert found.mean("iou") == 1
        assert found.mean("correlation") == pytest.approx(1)


def test_the_order_in_which_layers_were_written_changes_nothing(templates):
    template = templates["llama"]
    backwards = with_loadings(template, dict(reversed(template.loadings.items())))
    assert compare_templates(template, backwards, permutations=9).mean("correlation") == pytest.approx(1)


def test_split_halves_give_the_reliability(tokenizer, rows):
    """Two discoveries on disjoint text are about as alike as each says its halves are."""
    texts = [row["prompt"] + row["completion"] for row in rows]
    config = FunctionalNetworkConfig(ica_components=3, ica_rank=16, ica_max_length=32, ica_percentile=80)
    model = tiny_model("llama")
    first, second = (discover_networks(model, tokenizer, texts[half::2] * 2, config) for half in (0, 1))
    whole = discover_networks(model, tokenizer, texts, config)
    reliability = sum(c.reliability for c in whole.components) / 3
    assert compare_templates(first, second, permutations=9).mean("correlation") == pytest.approx(reliability, abs=0.25)


def test_templates_of_other_neurons_are_refused(templates):
    found = templates["llama"]
    fewer = {part: {i: v[..., :30] for i, v in getattr(found, part).items()} for part in ("loadings", "mean", "rms")}
    other = dataclasses.replace(found, **fewer)
    with pytest.raises(FNSFTError, match=r"different neurons.*--texts"):
        compare_templates(templates["llama"], other)


@pytest.fixture(scope="module")
def passages(rows):
    return split_passages([" ".join(row["prompt"] + row["completion"] for row in rows)] * 8, count=60, characters=80)


def child(model):
    """The model after training that moved its weights a little."""
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.003 * weight.std(correction=0) * torch.randn_like(weight))
    return model


def test_passages_are_cut_at_spaces_and_have_about_one_length(passages):
    assert len(passages) == 60
    assert all(60 < len(passage) <= 80 and passage == passage.strip() for passage in passages)
    with pytest.raises(FNSFTError, match="at least 20"):
        split_passages(["too short"])


def test_passages_without_tokens_are_one_line(templates, tokenizer):
    model = tiny_model("llama")
    for given, message in (
        ([], "no passages"),
        (["the red fox went", "x"], "passage 1 of 2"),
        ([""], "passage 0|empty"),
    ):
        with pytest.raises(FNSFTError, match=message):
            network_time_courses(model, tokenizer, templates["llama"], given)


def test_the_fingerprint_tells_a_child_from_strangers(tokenizer, rows, passages):
    texts = [row["prompt"] + row["completion"] for row in rows]
    config = FunctionalNetworkConfig(ica_components=3, ica_rank=16, ica_max_tokens=600, ica_max_length=32)

    def fingerprint(model):
        return network_time_courses(model, tokenizer, discover_networks(model, tokenizer, texts, config), passages)

    base = fingerprint(tiny_model("llama"))
    assert base.shape == (3, 60)
    assert compare_time_courses(base, base).mean("correlation") == pytest.approx(1)
    related = compare_time_courses(base, fingerprint(child(tiny_model("llama"))))
    assert related.mean("correlation") > 0.9
    assert all(m.p_value == pytest.approx(1 / 200) for m in related.matches)
    assert (related.iou, related.same) == (None, None)
    for stranger in (tiny_model("llama", seed=1), tiny_model("gpt2"), tiny_model("opt")):
        assert compare_time_courses(base, fingerprint(stranger)).mean("correlation") < 0.5


def test_time_courses_are_the_activities_that_made_the_activations(tokenizer, templates, passages):
    """With loadings on one neuron each, a network's time course is that neuron's mean activation, up to scale."""
    from fnsft_trl import find_neuron_sites

    template, model = templates["llama"], tiny_model("llama")
    loadings = {i: torch.zeros(3, 40) for i in template.widths}
    for number in range(3):
        loadings[number][number, 7] = 2.0
    single = with_loadings(template, loadings)
    courses = network_time_courses(model, tokenizer, single, passages[:4])
    ids = tokenizer(passages[1], return_tensors="pt")["input_ids"]
    seen = {}
    handles = [h for s in find_neuron_sites(model) for h in s.tap(lambda v, n, t, i=s.layer: seen.update({i: v}))]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    for number in range(3):
        expected = (seen[number][0, 1:, 7].mean() - template.mean[number][7]) / 2
        assert courses[number, 1] == pytest.approx(float(expected), rel=1e-4, abs=1e-5)


def test_compare_writes_table_heat_map_and_results(templates, tmp_path, capsys):
    templates["llama"].save_pretrained(tmp_path / "a")
    shuffled(templates["llama"]).save_pretrained(tmp_path / "b")
    arguments = ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--output_dir", str(tmp_path / "out")]
    assert main([*arguments, "--permutations", "19"]) == 0
    text = capsys.readouterr().out
    assert "One-to-one pairs: mean IoU" in text
    assert "network of A" in text
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["matches"]) == len(results["iou"]) == 3
    assert results["mean_iou"] < 1
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "comparison.png" in (tmp_path / "out" / "report.md").read_text()


def test_compare_by_shared_text_of_different_models(templates, model_dir, tokenizer, rows, tmp_path, capsys):
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    templates["llama"].save_pretrained(tmp_path / "a")
    templates["gpt2"].save_pretrained(tmp_path / "b")
    text = " ".join(row["prompt"] + row["completion"] for row in rows)
    (tmp_path / "shared.jsonl").write_text(json.dumps({"text": text * 10}))
    arguments = ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--output_dir", str(tmp_path / "out")]
    shared = ["--texts", str(tmp_path / "shared.jsonl"), "--model_a", str(model_dir)]
    shared += ["--model_b", str(tmp_path / "gpt2")]
    assert main([*arguments, *shared, "--passages", "30", "--permutations", "19"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["iou"] is None
    assert 0 <= results["mean_correlation"] <= 1
    capsys.readouterr()
    for extra, message in ((["--permutations", "0"], "at least 1"), (["--model_a", "x"], "only with texts")):
        assert main([*arguments, *extra]) == 2
        assert message in capsys.readouterr().err
