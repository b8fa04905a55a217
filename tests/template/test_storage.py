"""Files that are no template: two hundred of them, each refused with one line, with nothing written or loaded."""

import hashlib
import json
import random
import re
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from golden.make import GOLDEN, template_content
from helpers import tiny_model
from safetensors.torch import load, save

from fnsft_trl import FNSFTError, FunctionalNetworkTemplate, ThresholdRule
from fnsft_trl.cli import main
from fnsft_trl.template.schema import FORMAT, FORMAT_VERSION, PLAIN_VERSION


COUNT = 200
METADATA = {FORMAT: str(PLAIN_VERSION)}
PATHS = (
    "../../etc/passwd",
    "/etc/passwd",
    "..",
    "a/../b",
    "C:\\models",
    "file:///etc/passwd",
    "a/b/c",
    "~/x/y",
    "x\n# y",
)
SOURCE_PATHS = ("../../etc/passwd", "/etc/passwd", "..", "a/../b", "C:\\texts", "~/texts.jsonl", "x\n# y")


PROBED = {"norm": 1, "probes": [0] * 16}


def put(config, path, value):
    """Change a value, as someone who knows of the checksum."""
    config.pop("config_sha256", None)
    *parents, last = path
    for key in parents:
        config = config[key]
    config[last] = value


BAD_VALUES = [
    (["format_version"], [0, -1, True, "2", 2.0, None, [], 10**30]),
    (["format"], ["", None, "fnsft_trl.other", {}]),
    (["site"], ["mlp", None, 3, "../mlp_output"]),
    (["architecture"], [None, "", 5, "A\x1b[31m", "a" * 600, "../Model", "Llama ForCausalLM"]),
    (["widths"], [{}, [], None, {"0": 40, "1": -3, "2": 40}, {"0": 40.0, "1": 40, "2": 40}, {"00": 40}]),
    (["widths", "1"], [0, 39, 10**9, "40", None, True]),
    (["statistics"], [None, 1, "yes"]),
    (
        ["threshold"],
        [{"rule": "percentile"}, {"rule": "no", "value": 3}, {"rule": "percentile", "value": 100}],
    ),
    (["threshold", "value"], ["98", None, -1, 1e400, [98]]),
    (["calibration"], [None, [], "text"]),
    (["calibration", "tokens"], [-1, 2.5, "250", None]),
    (["calibration", "sources"], ["text", [1], [""], ["a\nb"], None]),
    (["calibration", "sha256"], ["", "xyz", 7, "g" * 64]),
    (["settings"], [None, [], {"ica_rank": {"deep": 1}}, {"ica_rank": [1]}]),
    (["null"], [1, {"reliability": "high", "jaccard": 0}, {}, {"reliability": 1.5, "jaccard": 0}]),
    (["null", "highest"], [2, -0.1, None, "0.5"]),
    (["weights"], [1, [], {"0": 3}, {"x": PROBED}, {"0": PROBED}, {str(i): PROBED for i in range(4)}]),
    (["weights", "1"], [{"norm": 1, "probes": [0] * 15}, {"norm": "1", "probes": [0] * 16}, {"norm": 1}]),
    (["components"], [[], None, {}, [1], [{}]]),
    (["components", 0, "reliability"], [1.5, -0.1, "high", True, [0.5]]),
    (["components", 1, "jaccard"], [2, -1, "0.5"]),
    (["components", 2, "explained_variance"], [-0.5, 7, {}]),
    (["components", 0, "layers"], [{"9": 1}, {"0": 41}, {"0": -1}, [], None]),
    (["components", 0, "neurons"], [10**6, -1, "24", None]),
    (
        ["components", 0, "recurrence"],
        [[], {"x": 1}, {"x\n": {}}, {"x": {"component": 0, "correlation": 2, "iou": 0.5, "recurs": True}}],
    ),
    (["license"], [3, "", "mit\nbase_model: other", []]),
    (["tensors_sha256"], ["", "0" * 64, 5]),
]


def bad_value(draw, config, tensors):
    path, values = draw.choice(BAD_VALUES)
    put(config, path, draw.choice(values))


def missing_key(draw, config, tensors):
    del config[draw.choice(["base_model", "architecture", "site", "widths", "threshold", "settings", "components"])]


def path_trick(draw, config, tensors):
    place = draw.choice(["base_model", "sources", "recurrence"])
    if place == "base_model":
        config["base_model"] = draw.choice(PATHS)
    elif place == "sources":
        config["calibration"]["sources"] = ["org/corpus", draw.choice(SOURCE_PATHS)]
    else:
        found = {"component": 0, "correlation": 0.5, "iou": 0.5, "recurs": True}
        config["components"][1]["recurrence"] = {draw.choice(SOURCE_PATHS): found}


def newer_version(draw, config, tensors):
    config["format_version"] = draw.randint(FORMAT_VERSION + 1, 10**6)


def not_finite(draw, config, tensors):
    name = draw.choice(sorted(tensors))
    tensors[name].view(-1)[draw.randrange(tensors[name].numel())] = draw.choice([float("nan"), float("inf")])


def out_of_range(draw, config, tensors):
    tensors[f"layers.{draw.randrange(3)}.rms"].mul_(draw.choice([-1.0, 0.0, 1e-3]))


def swapped_statistics(draw, config, tensors):
    layer = draw.randrange(3)
    a, b = f"layers.{layer}.mean", f"layers.{layer}.rms"
    tensors[a], tensors[b] = tensors[b], tensors[a]


def other_shape(draw, config, tensors):
    name = draw.choice(sorted(tensors))
    tensors[name] = draw.choice([tensors[name][..., :-1], tensors[name][None], torch.zeros(0)]).contiguous()


def other_type(draw, config, tensors):
    name = draw.choice(sorted(tensors))
    tensors[name] = tensors[name].to(
        draw.choice([torch.int64, torch.bool, torch.complex64, torch.float16, torch.int8])
    )


def other_names(draw, config, tensors):
    name = draw.choice(sorted(tensors))
    renamed = name.replace("layers", "../layers") if draw.random() < 0.5 else name + ".weight"
    tensors[renamed] = tensors.pop(name)


def one_more_tensor(draw, config, tensors):
    tensors[draw.choice(["extra", "layers.7.loadings", "__class__"])] = torch.zeros(2)


def other_model(draw, config, tensors):
    """Well-formed, of another model: refused when it meets this one."""
    if draw.random() < 0.5:
        config["architecture"] = draw.choice(["OPTForCausalLM", "GPT2LMHeadModel"])
        return
    layer = draw.randrange(3)
    config["widths"][str(layer)] += 8
    for name in list(tensors):
        if name.startswith(f"layers.{layer}."):
            tensors[name] = torch.cat([tensors[name], tensors[name][..., :8]], -1)


PARTS = [bad_value, bad_value, bad_value, missing_key, path_trick, newer_version, not_finite, out_of_range]
PARTS += [swapped_statistics, other_shape, other_type, other_names, one_more_tensor, other_model]


def header(length, content=b""):
    return lambda draw, data: struct.pack("<Q", length) + content + data


def nested_json(draw, data):
    depth = draw.choice([10**4, 10**5])
    return b"[" * depth + b"]" * depth


TENSOR_BYTES = {
    "truncated": lambda draw, data: data[: draw.randrange(len(data))],
    "huge header": header(2**63 - 1),
    "long header": header(2**27),
    "header beyond the file": lambda draw, data: struct.pack("<Q", len(data) * 2) + data[8:],
    "header is no mapping": header(4, b"null"),
    "nested header": lambda draw, data: struct.pack("<Q", 2 * 10**5) + b"[" * 10**5 + b"]" * 10**5,
    "pickle": lambda draw, data: b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.",
    "appended": lambda draw, data: data + b"\0" * draw.randint(1, 99),
    "swapped names": lambda draw, data: data.replace(b"layers.0", b"layers.X").replace(b"layers.1", b"layers.0"),
    "flipped byte": lambda draw, data: data[:-9] + bytes([data[-9] ^ 255]) + data[-8:],
    "empty": lambda draw, data: b"",
}
CONFIG_BYTES = {
    "truncated": lambda draw, data: data[: draw.randrange(len(data) - 2)],
    "nested": nested_json,
    "not a number": lambda draw, data: data.replace(b'"kurtosis": ', b'"kurtosis": NaN, "x": ', 1),
    "no text": lambda draw, data: b"\xff\xfe" + data,
    "long number": lambda draw, data: data.replace(b'"format_version": ', b'"format_version": ' + b"9" * 5000),
    "empty": lambda draw, data: b"",
}


def malformed(seed: int, files: dict[str, bytes]) -> tuple[str, dict[str, bytes]]:
    """A name of what is wrong, and the files."""
    draw, files = random.Random(seed), dict(files)
    kind = draw.choice(["parts", "parts", "parts", "tensors", "config"])
    if kind == "tensors":
        name = draw.choice(sorted(TENSOR_BYTES))
        files["template.safetensors"] = TENSOR_BYTES[name](draw, files["template.safetensors"])
    elif kind == "config":
        name = draw.choice(sorted(CONFIG_BYTES))
        files["config.json"] = CONFIG_BYTES[name](draw, files["config.json"])
    else:
        part = draw.choice(PARTS)
        name, config, tensors = part.__name__, json.loads(files["config.json"]), load(files["template.safetensors"])
        before = config["tensors_sha256"]
        part(draw, config, tensors)
        data = save(tensors, metadata=METADATA)
        if config.get("tensors_sha256") == before:  # whoever forges tensors can forge their hash
            config["tensors_sha256"] = hashlib.sha256(data).hexdigest()
        files |= {"template.safetensors": data, "config.json": json.dumps(config).encode()}
    return f"{kind}: {name}", files


@pytest.fixture
def files(templates, tmp_path):
    templates["llama"].save_pretrained(tmp_path / "whole")
    return {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}


def refusal(directory, model=None) -> str:
    try:
        template = FunctionalNetworkTemplate.from_pretrained(directory)
        if model is not None:
            template.check_model(model)
    except FNSFTError as error:
        return str(error)
    return ""


def test_two_hundred_malformed_templates_are_refused(files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = tiny_model("llama")
    directory = tmp_path / "template"
    directory.mkdir()
    seen = set()
    for seed in range(COUNT):
        what, damaged = malformed(seed, files)
        seen.add(what)
        for name, content in damaged.items():
            (directory / name).write_bytes(content)
        message = refusal(directory, model)
        assert message, f"seed {seed} was loaded: {what}"
        assert "\n" not in message, (seed, what)
        assert message.isprintable(), (seed, what)
        assert len(message) < 1500, (seed, what)
        if "other_model" not in what:  # whose files are those of a template
            assert main(["inspect", str(directory), "--convert", "converted"]) == 2, (seed, what)
            printed = capsys.readouterr()
            assert printed.err == f"fnsft inspect: error: {message}\n", (seed, what)
            assert printed.out == "", (seed, what)
        assert {path.name: path.read_bytes() for path in directory.iterdir()} == damaged, (seed, what)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["template", "whole"]
    assert len(seen) >= 28


def test_every_value_that_has_no_meaning_is_refused(files, tmp_path):
    (tmp_path / "template.safetensors").write_bytes(files["template.safetensors"])
    for path, values in BAD_VALUES:
        for value in values:
            config = json.loads(files["config.json"])
            put(config, path, value)
            (tmp_path / "config.json").write_text(json.dumps(config))
            assert refusal(tmp_path), f"{path} = {value} was loaded"


def test_what_is_not_malformed_is_loaded(files, tmp_path):
    """The generator's own way of writing gives a template that is accepted."""
    config, tensors = json.loads(files["config.json"]), load(files["template.safetensors"])
    data = save(tensors, metadata=METADATA)
    config["tensors_sha256"] = hashlib.sha256(data).hexdigest()
    (tmp_path / "template.safetensors").write_bytes(data)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert len(FunctionalNetworkTemplate.from_pretrained(tmp_path).components) == 3


def test_the_second_version_is_read_without_the_paths_that_it_holds(files, tmp_path):
    config = json.loads(files["config.json"])
    config["format_version"] = 2
    config["calibration"]["sources"] = ["/home/me/a/data.jsonl", "/home/me/b/data.jsonl", "org/corpus"]
    found = {"component": 0, "correlation": 0.5, "iou": 0.5, "recurs": True}
    config["components"][1]["recurrence"] = dict.fromkeys(config["calibration"]["sources"], found)
    data = save(load(files["template.safetensors"]), metadata={FORMAT: "2"})
    config["tensors_sha256"] = hashlib.sha256(data).hexdigest()
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "template.safetensors").write_bytes(data)
    names = ["a/data.jsonl", "b/data.jsonl", "org/corpus"]
    for directory in (tmp_path, tmp_path / "new"):
        old = FunctionalNetworkTemplate.from_pretrained(directory)
        assert old.calibration["sources"] == names
        assert list(old.components[1].recurrence) == names
        old.save_pretrained(tmp_path / "new")
    saved = json.loads((tmp_path / "new" / "config.json").read_text())
    assert saved["format_version"] == PLAIN_VERSION
    assert (tmp_path / "new" / "template.safetensors").read_bytes() == files["template.safetensors"]
    assert b"/home" not in b"".join(path.read_bytes() for path in (tmp_path / "new").iterdir())


def test_the_first_version_is_read_and_saved_in_the_current_one(files, tmp_path):
    config, tensors = json.loads(files["config.json"]), load(files["template.safetensors"])
    for name in ("license", "weights", "statistics", "tensors_sha256"):
        del config[name]
    config["format_version"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "template.safetensors").write_bytes(save(tensors, metadata={FORMAT: "1"}))
    old = FunctionalNetworkTemplate.from_pretrained(tmp_path)
    assert old.weights is None
    old.check_model(tiny_model("llama"))
    old.save_pretrained(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "config.json").read_text())["format_version"] == PLAIN_VERSION
    assert (tmp_path / "new" / "template.safetensors").read_bytes() == files["template.safetensors"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_a_template_of_an_8b_model_loads_in_less_than_a_gibibyte(tmp_path):
    """32 layers of 14,336 neurons, 20 networks; in a process of its own, torch's own memory included."""
    code = """
import sys, torch
from fnsft_trl import FunctionalNetworkTemplate, ThresholdRule, select_neurons
from fnsft_trl.template.template import Component
if sys.argv[2] == "save":
    loadings = {layer: torch.randn(20, 14336) for layer in range(32)}
    FunctionalNetworkTemplate(
        base_model="org/model", revision=None, architecture="LlamaForCausalLM", site="mlp_intermediate", settings={},
        calibration={"sources": ["text"], "tokens": 1, "sha256": None}, threshold=ThresholdRule(), null=None,
        components=[Component(0.01, 1.0, 0.5, 0.5) for _ in range(20)], loadings=loadings,
        mean={layer: torch.zeros(14336) for layer in loadings}, rms={layer: torch.ones(14336) for layer in loadings},
    ).save_pretrained(sys.argv[1])
else:
    mask = select_neurons(FunctionalNetworkTemplate.from_pretrained(sys.argv[1]), [0])
    # ru_maxrss would start from the size of the process that forked this one
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(mask.count, peak.split()[1])
"""
    for step in ("save", "load"):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path), step], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    count, kibibytes = map(int, done.stdout.split())
    assert count == pytest.approx(0.02 * 32 * 14336, abs=1)
    assert kibibytes < 2**20


def mutants(data: bytes, count: int, seed: int) -> list[bytes]:
    """Copies of which one bit is flipped: all in the numbers that say which neurons are members, and some others."""
    spans = [range(m.start(), m.end()) for m in re.finditer(rb'"(value|neurons|rule)": [^,\n]*', data)]
    spans += [range(m.start(), m.end()) for m in re.finditer(rb'"layers": \{[^}]*\}', data)]
    places = {8 * byte + bit for span in spans for byte in span for bit in range(8)}
    places |= set(random.Random(seed).sample(range(8 * len(data)), count))
    return [data[: p // 8] + bytes([data[p // 8] ^ (1 << p % 8)]) + data[p // 8 + 1 :] for p in sorted(places)]


def outcomes(directory, read, data, count, seed=0) -> list:
    """What is read of each mutant: what `read` gives of the template, or `None` where it is refused."""
    found = []
    for mutant in mutants(data, count, seed):
        (directory / "config.json").write_bytes(mutant)
        try:
            found.append(read(FunctionalNetworkTemplate.from_pretrained(directory)))
        except FNSFTError:
            found.append(None)
    return found


@pytest.mark.parametrize("rule", ["percentile", "layer_percentile", "zscore", "zscore_positive"])
def test_a_flipped_bit_of_a_description_is_refused_or_changes_nothing(templates, tmp_path, rule):
    value = 90.0 if "percentile" in rule else 1.5
    template = templates["llama"].with_threshold(ThresholdRule(rule, value))
    template.save_pretrained(tmp_path)
    data, whole = (tmp_path / "config.json").read_bytes(), template_content(template)
    found = outcomes(tmp_path, template_content, data, 150)
    assert all(content in (None, whole) for content in found)
    assert found.count(None) > 0.9 * len(found)


@pytest.mark.parametrize("version", ["1", "2", "3", "3-output", "3-lists"])
def test_without_a_checksum_a_flipped_bit_selects_no_other_neurons(tmp_path, version):
    """As older versions wrote it: the counts of neurons, which nothing is computed from, say so."""
    shutil.copytree(GOLDEN / "templates" / version, tmp_path / "old")
    template = FunctionalNetworkTemplate.from_pretrained(tmp_path / "old")
    data, listed = (tmp_path / "old" / "config.json").read_bytes(), template.listed()
    found = outcomes(tmp_path / "old", lambda mutant: mutant.listed(), data, 150)
    assert all(networks in (None, listed) for networks in found)


def test_a_threshold_that_the_counts_contradict_is_refused(files, tmp_path):
    (tmp_path / "template.safetensors").write_bytes(files["template.safetensors"])
    config = json.loads(files["config.json"])
    del config["config_sha256"]
    config["threshold"]["value"] -= 10
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = refusal(tmp_path)
    assert "it says that network 0 has" in message
    assert "its loadings and the threshold" in message


def test_a_description_changed_by_hand_is_refused_until_its_checksum_is_taken_out(files, tmp_path):
    (tmp_path / "template.safetensors").write_bytes(files["template.safetensors"])
    config = json.loads(files["config.json"])
    for formed in (json.dumps(config), json.dumps(dict(reversed(config.items())), indent=4)):
        (tmp_path / "config.json").write_text(formed)
        assert refusal(tmp_path) == ""  # spaces and the order of keys are nothing that it says
    config["license"] = "mit"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "not as it was written (config_sha256)" in refusal(tmp_path)
    del config["config_sha256"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert FunctionalNetworkTemplate.from_pretrained(tmp_path).license == "mit"
