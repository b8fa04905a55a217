"""Links and names that lead out of a folder, and files that claim to be larger than they are."""

import json
import os
import resource
import struct

import pytest
from helpers import tiny_model, tiny_tokenizer
from hub import ALICE

from fnsft_trl import FNSFTError, FunctionalNetworkTemplate
from fnsft_trl.discovery.saved_directions import load_directions
from fnsft_trl.evaluation.evaluated import EvaluatedModel
from fnsft_trl.export import to_baked
from fnsft_trl.hub.files import check_links, push_directory
from fnsft_trl.neurons.mask import NeuronMask
from fnsft_trl.ranges import parse_ranges
from fnsft_trl.template.stored import StoredTemplate
from fnsft_trl.tuner.saved import SavedAdapter


@pytest.fixture
def secret(tmp_path):
    """A file of the user that is nobody's business."""
    path = tmp_path / "home" / "id_rsa"
    path.parent.mkdir()
    path.write_text("SECRET")
    return path


@pytest.fixture
def template(templates, tmp_path):
    templates["llama"].save_pretrained(tmp_path / "template")
    return tmp_path / "template"


@pytest.mark.parametrize("name", ["notes.txt", "README.md", "folder"])
def test_a_link_to_elsewhere_is_never_pushed(name, template, secret, hub):
    (template / name).unlink(missing_ok=True)
    (template / name).symlink_to(secret.parent if name == "folder" else secret)
    with pytest.raises(FNSFTError, match=f"{name} in .* is, or lies behind, a link to .*home"):
        push_directory(template, "alice/networks", token=ALICE, commit_message="x")
    assert not hub.repos
    (template / name).unlink()
    (template / name).symlink_to("config.json")  # of the folder itself
    push_directory(template, "alice/networks", token=ALICE, commit_message="x")
    assert hub.files("alice/networks", "main")[name] == (template / "config.json").read_bytes()


def test_what_the_cache_of_the_hub_links_is_a_file(template, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    blobs = tmp_path / "models--a--b" / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    (blobs / "1").write_bytes((template / "config.json").read_bytes())
    (snapshot / "config.json").symlink_to(blobs / "1")
    check_links(snapshot)
    (snapshot / "other").symlink_to(tmp_path / "models--a--b" / "refs")
    with pytest.raises(FNSFTError, match="other in"):
        check_links(snapshot)


@pytest.mark.parametrize("name", ["README.md", "functional_networks/README.md", "functional_networks"])
def test_an_export_carries_no_file_of_elsewhere(name, template, secret, tmp_path):
    source = tmp_path / "run"
    tiny_model("llama").save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    if name.endswith("/README.md"):
        (source / "functional_networks").mkdir()
    (source / name).symlink_to(secret.parent if name == "functional_networks" else secret)
    mask = NeuronMask.from_ranges({"0": "0-3"}, dict.fromkeys(range(3), 40), "mlp_intermediate")
    with pytest.raises(FNSFTError, match=r"a link to .*home"):
        to_baked(source, tmp_path / "out", mask)
    assert not (tmp_path / "out").exists()
    (source / name).unlink()
    to_baked(source, tmp_path / "out", mask)
    assert not any(b"SECRET" in path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["config.json", "template.safetensors"])
@pytest.mark.parametrize("target", ["/dev/zero", "/dev/null", "loop", "folder", "gone"])
def test_a_template_whose_files_are_links_to_no_files_is_refused(name, target, template):
    (template / "folder").mkdir()
    (template / "loop").symlink_to("loop")
    (template / name).unlink()
    (template / name).symlink_to(target)
    with pytest.raises(FNSFTError):
        FunctionalNetworkTemplate.from_pretrained(template)


def test_names_in_a_repository_do_not_lead_out_of_the_cache(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    before = set(tmp_path.rglob("*"))
    config = {"peft_type": "LORA", "base_model_name_or_path": "gone"}
    for name in ("../../../../evil.txt", "a/../../../../../evil.txt", "/evil.txt"):
        hub.repos.clear()
        hub.put("alice/adapter", {"adapter_config.json": json.dumps(config).encode(), name: b"evil"})
        with pytest.raises(FNSFTError):
            EvaluatedModel.find("alice/adapter")
        with pytest.raises(FNSFTError):
            StoredTemplate.open("alice/adapter", cache_dir=tmp_path / "cache")
    written = {path for path in set(tmp_path.rglob("*")) - before if path.name == "evil.txt"}
    assert all(path.is_relative_to(tmp_path / "cache") for path in written)
    assert not os.path.exists("/evil.txt")


def header(tensors: dict, length: int | None = None) -> bytes:
    """A safetensors file without data, of which the first eight bytes say how long its header is."""
    content = json.dumps(tensors).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content


HUGE = {
    "a header of 16 EiB": header({}, 2**64 - 1),
    "a header of 8 EiB": header({}, 2**63),
    "a header longer than the file": header({}, 10**9),
    "a tensor of a PiB": header({"w": {"dtype": "F32", "shape": [2**48], "data_offsets": [0, 2**50]}}),
    "a tensor of more bytes than there are numbers": header(
        {"w": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 2**63]}}
    ),
    "ten thousand tensors of nothing": header(
        {str(number): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(10**4)}
    ),
    "nested without end": struct.pack("<Q", 200_000) + b"[" * 200_000,
}


@pytest.fixture
def little_memory():
    """A process that may take 4 GiB more than it has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 4 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("name", HUGE)
def test_a_file_that_claims_to_be_huge_is_refused_without_the_memory(name, template, tmp_path, little_memory):
    (template / "template.safetensors").write_bytes(HUGE[name])
    with pytest.raises(FNSFTError):
        FunctionalNetworkTemplate.from_pretrained(template)
    (tmp_path / "directions.safetensors").write_bytes(HUGE[name])
    about = {"format": "fnsft_trl.directions", "format_version": 1}
    (tmp_path / "directions.json").write_text(json.dumps(about | {"inputs": [{"modules": [], "width": 1}]}))
    with pytest.raises(FNSFTError):
        load_directions(tmp_path)
    config = {"peft_type": "LORA", "base_model_name_or_path": "gone"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes(HUGE[name])
    if name != "ten thousand tensors of nothing":  # which is an adapter of another model, and is met there
        with pytest.raises(FNSFTError):
            dict(SavedAdapter.read(tmp_path).tensors)


def test_a_description_that_claims_to_be_huge_is_refused_without_the_memory(template, little_memory):
    file = template / "config.json"
    content = json.loads(file.read_text())
    for width in (10**12, 10**18, 10**30):
        file.write_text(json.dumps(content | {"widths": dict.fromkeys(content["widths"], width)}))
        with pytest.raises(FNSFTError):
            FunctionalNetworkTemplate.from_pretrained(template)
    for text in ("0-999999999999", "0:999999999999999999999", "0-" + "9" * 5000):
        with pytest.raises(FNSFTError):
            parse_ranges(text, 32)
        with pytest.raises(FNSFTError):
            NeuronMask.from_ranges({"0": text}, {0: 40}, "mlp_intermediate")
