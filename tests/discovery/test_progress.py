"""An interrupted discovery goes on where it was saved, or says why it cannot."""

import random

import pytest
import torch
from faults.injector import at_every_step, file_size_limit
from helpers import tiny_model, tiny_rows
from peft import LoraConfig, get_peft_model

from fnsft_trl import FNSFTError, FunctionalNetworkConfig, discover_networks
from fnsft_trl.discovery.activations import ActivationReader
from fnsft_trl.discovery.progress import DiscoveryProgress, Milestones, clear_progress
from fnsft_trl.template.weights import weights_sha256


SMALL = {"ica_components": 3, "ica_rank": 16, "ica_batch_size": 2, "ica_max_length": 32}


def texts(count=48, seed=0):
    return [row["prompt"] + row["completion"] for row in tiny_rows(count, seed)]


def same(a, b):
    return a.components == b.components and all(torch.equal(a.loadings[i], b.loadings[i]) for i in a.loadings)


class Interrupted(Exception):
    pass


class Number:
    """A part whose state is one number."""

    def __init__(self, value):
        self.value = torch.tensor([value])

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


@pytest.mark.parametrize("settings", [{}, {"ica_standardize": "zscore"}, {"ica_until_reliable": 0.999}], ids=str)
def test_resumed_discovery_is_the_uninterrupted_one(tokenizer, tmp_path, monkeypatch, settings):
    monkeypatch.setattr("fnsft_trl.discovery.discovery._FIRST_CHECK", 300)
    monkeypatch.setattr("fnsft_trl.discovery.progress._LEAST_SAVED", 1)
    config = FunctionalNetworkConfig(**SMALL, ica_max_tokens=1000, ica_reservoir=200, **settings)
    model = tiny_model("llama")
    whole = discover_networks(model, tokenizer, texts(300), config)
    read = ActivationReader.read

    def interrupted(self, *args, **kwargs):
        for block in read(self, *args, **kwargs):
            if block.batch == 20:
                raise Interrupted
            yield block

    with monkeypatch.context() as patched:
        patched.setattr(ActivationReader, "read", interrupted)
        with pytest.raises(Interrupted):
            discover_networks(model, tokenizer, texts(300), config, progress_dir=tmp_path / "p")
    (saved,) = (tmp_path / "p").iterdir()  # the newest alone is kept
    assert int(saved.name.removeprefix("batch-")) > 5
    seen = []
    handle = model.register_forward_pre_hook(lambda *_: seen.append(1))
    inner = model.model.register_forward_pre_hook(lambda *_: seen.append(1))
    resumed = discover_networks(model, tokenizer, texts(300), config, progress_dir=tmp_path / "p", resume=True)
    handle.remove(), inner.remove()
    assert same(resumed, whole)
    assert resumed.calibration == whole.calibration
    assert len(seen) < whole.calibration["tokens"] / 10  # what was read before was not run again
    (saved,) = (tmp_path / "p").iterdir()  # until the template is saved
    (tmp_path / "p/batch-7").write_text("a file of the user's")
    (saved / "notes.txt").write_text("of the user")
    clear_progress(tmp_path / "p")
    assert [path.name for path in (tmp_path / "p").rglob("*") if path.is_file()] == ["batch-7", "notes.txt"]


def test_a_directory_of_the_users_keeps_all_that_is_in_it(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("fnsft_trl.discovery.progress._LEAST_SAVED", 1)
    for name in ("thesis.txt", "batch-1.txt", "batch-x/data", "process-0.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    config = FunctionalNetworkConfig(**SMALL, ica_max_tokens=300)
    discover_networks(tiny_model("llama"), tokenizer, texts(100), config, progress_dir=tmp_path)
    assert {path: path.read_bytes() for path in before} == before
    clear_progress(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_new_discovery_keeps_its_own_save_beside_older_ones(tmp_path):
    progress(tmp_path, about={"a": "older"}).save([Number(1)], batch=50, sha256="x")
    new = progress(tmp_path)
    for batch in (3, 6):
        new.save([Number(batch)], batch=batch, sha256="x")
        part = Number(0)
        progress(tmp_path).resume([part])
        assert int(part.value) == batch
        assert [path.name for path in tmp_path.iterdir()] == [f"batch-{batch}"]


def test_a_save_that_the_disk_refuses_is_a_warning_and_keeps_the_one_before(tmp_path):
    discovery = progress(tmp_path)
    discovery.save([Number(3)], batch=3, sha256="x")
    with file_size_limit(20):
        discovery.save([Number(6)], batch=6, sha256="x")
    part = Number(0)
    progress(tmp_path).resume([part])
    assert int(part.value) == 3
    for disk in at_every_step(
        lambda: discovery.save([Number(9)], batch=9, sha256="x"), tmp_path, "full", prepare=lambda: None
    ):
        assert disk.error is None, disk.seen[-1]
        progress(tmp_path).resume([part])
        assert int(part.value) in (3, 9), disk.seen[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["batch-9"]


def test_resume_refuses_what_it_cannot_go_on_with(tokenizer, tmp_path, monkeypatch):
    config = FunctionalNetworkConfig(**SMALL, ica_max_tokens=1000)
    model = tiny_model("llama")
    with pytest.raises(FNSFTError, match="without a progress_dir"):
        discover_networks(model, tokenizer, texts(), config, resume=True)
    with pytest.raises(FNSFTError, match="no interrupted discovery"):
        discover_networks(model, tokenizer, texts(), config, progress_dir=tmp_path, resume=True)
    monkeypatch.setattr("fnsft_trl.discovery.progress._LEAST_SAVED", 1)
    discover_networks(model, tokenizer, texts(300), config, progress_dir=tmp_path / "p")
    other = FunctionalNetworkConfig(**SMALL, ica_max_tokens=1000, ica_seed=1)
    with pytest.raises(FNSFTError, match=r"ica_seed=0, this one 1"):
        discover_networks(model, tokenizer, texts(300), other, progress_dir=tmp_path / "p", resume=True)
    for others in (texts(300, seed=5), texts(20)):
        with pytest.raises(FNSFTError, match="the texts differ"):
            discover_networks(model, tokenizer, others, config, progress_dir=tmp_path / "p", resume=True)
        assert not any(module._forward_pre_hooks for module in model.modules())
    (file,) = (tmp_path / "p").glob("*/*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(FNSFTError, match="cannot be read"):
        discover_networks(model, tokenizer, texts(300), config, progress_dir=tmp_path / "p", resume=True)


@pytest.fixture
def interrupted(tokenizer, tmp_path, monkeypatch):
    """A discovery of a model that was saved on its way and not cleared: (call it again on a model, where it lies)."""
    monkeypatch.setattr("fnsft_trl.discovery.progress._LEAST_SAVED", 1)
    config = FunctionalNetworkConfig(**SMALL, ica_max_tokens=1000)

    def discover(model, resume=True):
        return discover_networks(model, tokenizer, texts(300), config, progress_dir=tmp_path / "p", resume=resume)

    discover(tiny_model("llama"), resume=False)
    return discover, tmp_path / "p"


def with_lora(model):
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))


def one_step_on(name):
    """The same model with one weight of one parameter moved by the least that its precision knows."""

    def changed(model):
        with torch.no_grad():
            weight = model.get_parameter(name).view(-1)[-1:]
            weight.copy_(torch.nextafter(weight, weight + 1))
        return model

    return changed


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        one_step_on("model.layers.1.mlp.down_proj.weight"),
        one_step_on("model.layers.0.self_attn.q_proj.weight"),
        one_step_on("model.norm.weight"),
        one_step_on("model.embed_tokens.weight"),
        lambda model: tiny_model("llama", seed=5),
        lambda model: model.to(torch.bfloat16),
        with_lora,
    ],
    ids=["mlp", "attention", "norm", "embedding", "another", "precision", "adapter"],
)
def test_a_model_of_the_same_name_with_other_weights_is_refused(interrupted, change):
    discover, directory = interrupted
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    with pytest.raises(FNSFTError, match=r"the weights of the model are not those of the interrupted discovery"):
        discover(change(tiny_model("llama")))
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before
    discover(tiny_model("llama"))


def test_a_trained_adapter_is_a_part_of_the_weights(tokenizer, tmp_path, monkeypatch):
    model = with_lora(tiny_model("llama"))
    before = weights_sha256(model)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).add_(1)
    assert weights_sha256(model) != before
    assert weights_sha256(with_lora(tiny_model("llama")).to("meta")) != before


def test_a_damaged_save_is_refused(interrupted):
    discover, directory = interrupted
    (file,) = directory.glob("*/*.safetensors")
    whole = file.read_bytes()
    draw = random.Random(0)
    places = [draw.randrange(8, len(whole)) for _ in range(30)] + [len(whole) - 1]
    for place in places:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :])
        with pytest.raises(FNSFTError, match=r"cannot be read|interrupted discovery|another version"):
            discover(tiny_model("llama"))
    file.write_bytes(whole)
    discover(tiny_model("llama"))


def test_what_another_version_saved_is_refused(tmp_path):
    progress(tmp_path).save([Number(3)], batch=7, sha256="x")
    with pytest.raises(FNSFTError, match="another version of fnsft-trl"):
        progress(tmp_path).resume([Number(3), Number(4)])


def progress(directory, process=0, processes=1, about=None):
    return DiscoveryProgress(directory, about or {"a": 1}, (process, processes), max_tokens=1000)


def test_a_save_gives_parts_and_notes_back(tmp_path):
    progress(tmp_path).save([Number(3), Number(4)], batch=7, sha256="x", curve=[0.5])
    parts, resumed = [Number(0), Number(0)], progress(tmp_path)
    assert resumed.resume(parts) == {"curve": [0.5]}
    assert [int(part.value) for part in parts] == [3, 4]
    assert resumed.first_batch == 8
    resumed.check_texts("x")
    with pytest.raises(FNSFTError, match="the texts differ"):
        resumed.check_texts("y")


def test_a_save_counts_only_when_every_process_has_written(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.distributed.barrier", lambda: None)
    for batch, process in ((3, 1), (3, 0), (12, 1)):
        progress(tmp_path, process, 2).save([Number(batch)], batch=batch, sha256="x")
    for process in (0, 1):
        part, resumed = Number(0), progress(tmp_path, process, 2)
        resumed.resume([part])
        assert resumed.first_batch == 4
        assert int(part.value) == 3


def test_without_a_directory_nothing_is_saved():
    nowhere = progress(None)
    nowhere.save([Number(3)], batch=7, sha256="x")
    with pytest.raises(FNSFTError, match="without a progress_dir"):
        nowhere.resume([Number(0)])


def test_milestones_are_passed_once_however_often_one_looks():
    often, rarely = (Milestones(10, lambda mark: 2 * mark) for _ in range(2))
    assert [count for count in range(100) if often.passed(count)] == [10, 20, 40, 80]
    assert [count for count in (5, 50, 60, 79, 80, 81) if rarely.passed(count)] == [50, 80]
