"""What the package of an earlier day wrote: still loaded, with the same values; see golden/README.md."""

import json
import shutil
from hashlib import sha256

import pytest
import torch
from golden.make import (
    ADAPTERS,
    GOLDEN,
    RUNS,
    SELECTIONS,
    THRESHOLDS,
    golden_model,
    golden_models,
    mask_content,
    template_content,
    trainer,
)
from helpers import logits, state
from safetensors.torch import load_file

from fnsft_trl import (
    FNSFTError,
    FunctionalNetworkConfig,
    FunctionalNetworkTemplate,
    NeuronMask,
    ThresholdRule,
    bake_lesion,
    find_neuron_sites,
    select_neurons,
    to_merged,
    to_plain_lora,
    verify_merge,
)


TOLERANCE = {"atol": 1e-5, "rtol": 0.0}
LOGITS = load_file(GOLDEN / "expected" / "logits.safetensors")
IDS = LOGITS.pop("ids")
VALUES = json.loads((GOLDEN / "expected" / "values.json").read_text())


@pytest.fixture(autouse=True, scope="module")
def unchanged():
    """Whoever reads golden files leaves them as they are."""
    before = contents()
    yield
    assert contents() == before


@pytest.fixture(autouse=True)
def in_place(monkeypatch):
    monkeypatch.chdir(GOLDEN)  # adapters name their base model relative to it


def contents():
    files = [path for path in GOLDEN.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path: sha256(path.read_bytes()).hexdigest() for path in files}


def close(found, expected):
    """The same names, and values within the tolerance."""
    torch.testing.assert_close(found, expected, **TOLERANCE)


def equal(found, expected):
    """The same names, and the same bits."""
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def mask_of(model, content):
    widths = {site.layer: site.width for site in find_neuron_sites(model, kind=content["site"])}
    return NeuronMask.from_ranges(content["neurons"], widths, content["site"])


def assert_only_these_differ(model, mask, base):
    """The weights of a model without adapters differ from those of a base model in these neurons, and in no other."""
    before = golden_model(f"base/{base}")
    sites = find_neuron_sites(before, kind=mask.site)
    assert verify_merge(state(before), state(model), mask, sites=sites) == mask


def test_every_model_and_adapter_is_among_the_expected():
    assert golden_models() == sorted(LOGITS)
    assert {f"adapters/{name}" for name in ADAPTERS} < set(LOGITS)
    assert {f"runs/{name}" for name in RUNS} < set(LOGITS)


@pytest.mark.parametrize("folder", sorted(LOGITS))
def test_models_and_adapters_compute_what_they_did(folder):
    close(logits(golden_model(folder), IDS)[:, -1], LOGITS[folder])


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_an_adapter_changes_the_neurons_that_it_did(name):
    content = json.loads((GOLDEN / "adapters" / name / "neurons.json").read_text())
    model = golden_model(f"adapters/{name}")
    mask = mask_of(model.get_base_model(), content)
    assert mask_content(mask) == content
    if name.startswith("deltas"):
        assert model.peft_config["default"].neurons == content["neurons"]
    merged = model.merge_and_unload()
    close(logits(merged, IDS)[:, -1], LOGITS[f"adapters/{name}"])
    if name == "deltas-beside-lora":  # which trains attention, too
        before = golden_model("base/llama")
        assert verify_merge(state(before), state(merged), sites=find_neuron_sites(before)) == mask
    else:
        assert_only_these_differ(merged, mask, ADAPTERS[name][0])


@pytest.mark.parametrize("name", sorted(RUNS))
def test_a_run_goes_on_from_its_checkpoint_to_the_weights_of_the_whole_run(name, tmp_path):
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(GOLDEN / "runs" / name / "checkpoint-2", checkpoint)
    lora, config = RUNS[name]
    run = trainer(tmp_path, lora=lora, template=checkpoint, **config)
    selection = json.loads((checkpoint / "functional_networks" / "selection.json").read_text())
    assert FunctionalNetworkConfig(**selection["network_config"]) == run.network_config
    assert selection["neurons"] == run.neuron_mask.to_ranges()
    for key, mask in {"selected": run.neuron_mask, "trainable": run.trainable_neurons}.items():
        assert selection[key] == {"count": mask.count, "sha256": mask.sha256}

    run.train(resume_from_checkpoint=str(checkpoint))
    assert [entry["step"] for entry in run.state.log_history if "loss" in entry] == [1, 2, 3, 4]
    run.save_model(str(tmp_path / "end"))
    file = "model.safetensors" if config else "adapter_model.safetensors"
    expected = load_file(GOLDEN / "runs" / name / file)
    close(load_file(tmp_path / "end" / file), expected)
    apart = [(expected[key] - value).abs().max() for key, value in load_file(checkpoint / file).items()]
    assert max(apart) > 1e-3  # so there was something left to train

    model = run.model if config else run.model.merge_and_unload()
    before = golden_model("base/llama")
    if name == "full-lesion":  # where the weights of no neuron train, too
        assert verify_merge(state(before), state(model), sites=find_neuron_sites(before)) == run.trainable_neurons
    else:
        assert_only_these_differ(model, run.trainable_neurons, "llama")


@pytest.mark.parametrize("name", sorted(VALUES["templates"]))
def test_a_template_says_what_it_did(name, tmp_path):
    template = FunctionalNetworkTemplate.from_pretrained(GOLDEN / "templates" / name)
    expected = VALUES["templates"][name]
    assert template_content(template) == expected
    template.save_pretrained(tmp_path)
    assert template_content(FunctionalNetworkTemplate.from_pretrained(tmp_path)) == expected
    if expected["architecture"] != "unknown":
        template.check_model(golden_model("base/llama"))


@pytest.mark.parametrize("name", ["1", "2", "3"])
def test_the_tensors_of_a_template_are_those_in_its_file(name):
    template = FunctionalNetworkTemplate.from_pretrained(GOLDEN / "templates" / name)
    stored = load_file(GOLDEN / "templates" / name / "template.safetensors")
    found = {
        f"layers.{i}.{part}": v for part in ("loadings", "mean", "rms") for i, v in getattr(template, part).items()
    }
    equal(found, stored)


def test_the_versions_of_one_template_agree():
    one, two, three = (VALUES["templates"][name] for name in ("1", "2", "3"))
    assert two == three
    assert one == {**three, "license": None, "weights": None}
    assert three["license"] == "mit"
    assert three["weights"] is not None


def test_the_networks_are_no_more_reliable_than_their_null():
    template = FunctionalNetworkTemplate.from_pretrained(GOLDEN / "templates" / "3")
    assert [number for number, c in enumerate(template.components) if c.reliability >= 0.7] == [0, 2]
    with pytest.raises(FNSFTError, match=r"no network has a reliability above null of 0\.7"):
        select_neurons(template, min_reliability=0.7)


def test_selections_are_the_same_neurons():
    template = FunctionalNetworkTemplate.from_pretrained(GOLDEN / "templates" / "3")
    found = {name: select_neurons(template, **arguments) for name, arguments in SELECTIONS.items()}
    for rule, value in THRESHOLDS.items():
        found[rule] = select_neurons(template.with_threshold(ThresholdRule(rule, value)))
    assert {name: mask_content(mask) for name, mask in found.items()} == VALUES["selections"]
    assert len(set(found.values())) == len(found)


@pytest.mark.parametrize("name", ["deltas", "lora"])
def test_a_merge_gives_the_same_weights(name, tmp_path):
    to_merged(GOLDEN / "runs" / name, tmp_path)
    same = equal if name == "deltas" else close  # a sum in one order only; a product of matrices has many
    same(load_file(tmp_path / "model.safetensors"), load_file(f"exports/{name}-merged/model.safetensors"))
    close(LOGITS[f"exports/{name}-merged"], LOGITS[f"runs/{name}"])
    template = FunctionalNetworkTemplate.from_pretrained(GOLDEN / "exports" / f"{name}-merged")
    assert template_content(template) == VALUES["templates"]["3"]


@pytest.mark.parametrize(
    ("adapter", "export"),
    [("runs/deltas", "exports/deltas-plain-lora"), ("adapters/deltas-mixtral", "exports/deltas-mixtral-plain-lora")],
)
def test_plain_lora_has_the_same_factors(adapter, export, tmp_path):
    to_plain_lora(GOLDEN / adapter, tmp_path)
    equal(load_file(tmp_path / "adapter_model.safetensors"), load_file(f"{export}/adapter_model.safetensors"))
    close(LOGITS[export], LOGITS[adapter])


def test_a_lesion_in_the_weights_is_known_and_can_be_extended():
    template = FunctionalNetworkTemplate.from_pretrained(GOLDEN / "templates" / "3")
    first, second = (select_neurons(template, [number]) for number in (1, 2))
    stored, base = golden_model("exports/lesion"), golden_model("base/llama")
    assert stored.config.baked_lesion == {"site": "mlp_intermediate", "neurons": first.to_ranges()}
    bake_lesion(base, first)
    equal(state(base), state(stored))
    bake_lesion(stored, second)
    assert stored.config.baked_lesion["neurons"] == (first | second).to_ranges()
