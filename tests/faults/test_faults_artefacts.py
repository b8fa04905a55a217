"""Each artefact: whatever fails or is killed while it is written, the old one or the new one is there; never both."""

import json
import shutil

import pytest
from datasets import Dataset
from faults.injector import HOW, at_every_step, contents, file_size_limit
from helpers import sft_config, tiny_model, tiny_rows, tiny_tokenizer
from peft import get_peft_model
from safetensors.torch import load_file

from fnsft_trl import FNSFTError, FNSFTTrainer, FunctionalNetworkConfig, FunctionalNetworkTemplate, NeuronTunerConfig
from fnsft_trl.export import to_merged, to_plain_lora
from fnsft_trl.export.gguf import to_gguf
from fnsft_trl.report import Report


def restored(folder, saved):
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A base and two adapters of neuron deltas of it."""
    home = tmp_path_factory.mktemp("adapters")
    tiny_model("llama").save_pretrained(home / "base")
    tiny_tokenizer().save_pretrained(home / "base")
    for number, neurons in enumerate(({"0": "0-3"}, {"1": "2"})):
        peft = get_peft_model(tiny_model("llama"), NeuronTunerConfig(neurons=neurons, task_type="CAUSAL_LM"))
        for name, parameter in peft.named_parameters():
            if "neuron_delta_" in name:
                parameter.data.fill_(0.5)
        peft.peft_config["default"].base_model_name_or_path = str(home / "base")
        peft.save_pretrained(home / str(number))
    return home


def merged(adapters, number, target):
    to_merged(adapters / str(number), target, dtype="auto" if number == 0 else "bfloat16")


def plain(adapters, number, target):
    to_plain_lora(adapters / str(number), target)


@pytest.mark.slow
@pytest.mark.parametrize("export", [merged, plain])
def test_an_export_over_an_older_one(adapters, tmp_path, export):
    """Native writers meet the full disk at half of the weights; Python's own at every step."""
    for number in (0, 1):
        export(adapters, number, tmp_path / f"whole{number}")
    old, new = (contents(tmp_path / f"whole{number}") for number in (0, 1))
    target = tmp_path / "root/export"
    restored(target, tmp_path / "whole0")
    weights = max(len(data) for data in new.values())
    with file_size_limit(weights // 2), pytest.raises(FNSFTError, match="File too large"):
        export(adapters, 1, target)
    assert contents(target) == old
    for disk in at_every_step(
        lambda: export(adapters, 1, target),
        tmp_path / "root",
        "killed",
        prepare=lambda: restored(target, tmp_path / "whole0"),
    ):
        assert contents(target) in (old, new), disk.seen[-1]
    assert contents(target) == new


def test_an_export_into_a_place_of_its_own_is_not_there_before_it_is_whole(adapters, tmp_path):
    with file_size_limit(2000), pytest.raises(FNSFTError, match="cannot be written"):
        merged(adapters, 0, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_report_over_an_older_one(tmp_path):
    def save(number):
        report = Report(f"report {number}")
        report.figure("networks", b"<svg>%d</svg>" % number, "figure")
        report.save(tmp_path / "report", {"number": number}, beside={"scores.jsonl": f"{number}\n"})

    save(0)
    shutil.copytree(tmp_path / "report", tmp_path / "saved")
    old = contents(tmp_path / "report")
    save(1)
    new = contents(tmp_path / "report")
    assert old.keys() == new.keys()
    for how in HOW:
        for disk in at_every_step(
            lambda: save(1),
            tmp_path / "report",
            how,
            prepare=lambda: restored(tmp_path / "report", tmp_path / "saved"),
        ):
            found = contents(tmp_path / "report")
            between = how == "killed" and "results.json" not in found
            assert found in (old, new) or between, (how, disk.seen[-1])


@pytest.mark.parametrize("how", ["full", "killed"])
def test_a_template_with_the_lists_of_the_original(templates, tmp_path, how):
    place = tmp_path / "root/template"
    templates["llama"].save_pretrained(tmp_path / "old", with_lists=True)
    other = FunctionalNetworkTemplate.from_pretrained(tmp_path / "old")
    other.loadings = {layer: -values.roll(3, -1) for layer, values in other.loadings.items()}
    other.save_pretrained(tmp_path / "new", with_lists=True)
    for disk in at_every_step(
        lambda: other.save_pretrained(place, with_lists=True),
        tmp_path / "root",
        how,
        prepare=lambda: restored(place, tmp_path / "old"),
    ):
        found = FunctionalNetworkTemplate.from_pretrained(place)
        is_new = bool((found.loadings[0] == other.loadings[0]).all())
        if how == "full":
            assert contents(place) == contents(tmp_path / ("new" if is_new else "old")), disk.seen[-1]
        if disk.error is None:
            assert is_new, disk.seen[-1]


@pytest.fixture(scope="module")
def trainers(tmp_path_factory, templates):
    """Two trainers of different neurons, of one output directory; the first has saved there."""
    place = tmp_path_factory.mktemp("trainers") / "root/out"

    def trainer(network):
        return FNSFTTrainer(
            model=tiny_model("llama"),
            args=sft_config(place, max_steps=1),
            train_dataset=Dataset.from_list(tiny_rows()),
            processing_class=tiny_tokenizer(),
            network_config=FunctionalNetworkConfig(ica_component_ids=[network]),
            network_template=templates["llama"],
        )

    first, second = trainer(0), trainer(1)
    first.train()
    first.save_model()
    second.train()
    shutil.copytree(place, place.parent.parent / "saved")
    return place, second


def run_of(place):
    """The neurons that each of the files of a saved run is of."""
    neurons = json.loads((place / "adapter_config.json").read_text())["neurons"]
    selection = json.loads((place / "functional_networks/selection.json").read_text())
    results = json.loads((place / "results.json").read_text())
    rows = {len(values) for values in load_file(place / "adapter_model.safetensors").values()}
    sha = results["networks"]["selected"]["sha256"]
    return neurons, selection["neurons"], selection["selected"]["sha256"], sha, tuple(sorted(rows))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["full", "killed"])
def test_a_run_saved_over_an_older_one(trainers, how):
    place, second = trainers
    saved = place.parent.parent / "saved"
    second.save_model(str(place.parent.parent / f"new-{how}"))
    old, new = run_of(saved), run_of(place.parent.parent / f"new-{how}")
    assert all(one != other for one, other in zip(old[:4], new[:4], strict=True))
    steps = 0
    for disk in at_every_step(second.save_model, place.parent, how, prepare=lambda: restored(place, saved)):
        steps += 1
        if how == "killed" and not (place / "adapter_config.json").exists():
            continue  # between: nothing loads it
        assert run_of(place) in (old, new), disk.seen[-1]
        assert disk.error is None or how == "killed" or isinstance(disk.error, FNSFTError), disk.error
    assert run_of(place) == new
    assert steps > 20


def test_a_run_on_a_full_disk_is_one_line(trainers):
    place, second = trainers
    restored(place, place.parent.parent / "saved")
    before = contents(place)
    with file_size_limit(3000), pytest.raises(FNSFTError, match=r"cannot be written .*still is"):
        second.save_model()
    assert contents(place) == before


def test_a_gguf_file_is_there_when_the_converter_has_written_all_of_it(adapters, tmp_path):
    converter = tmp_path / "converter"
    converter.write_text("#!/bin/sh\nprintf GGUFhalf > $3\nexit ${FAILS:-0}\n")
    converter.chmod(0o755)
    target = tmp_path / "out/model.gguf"
    target.parent.mkdir()
    target.write_bytes(b"GGUFold")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAILS", "1")
        with pytest.raises(FNSFTError, match="could not convert"):
            to_gguf(adapters / "base", target, converter=str(converter))
    assert target.read_bytes() == b"GGUFold"
    to_gguf(adapters / "base", target, converter=str(converter))
    assert target.read_bytes() == b"GGUFhalf"
    assert [path.name for path in target.parent.iterdir()] == ["model.gguf"]
    other = adapters / "base/model.safetensors"
    before = other.read_bytes()
    with pytest.raises(FNSFTError, match="file of another kind"):
        to_gguf(adapters / "base", other, converter=str(converter))
    assert other.read_bytes() == before
