"""How a model is loaded: one group of options for every verb that loads one."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from helpers import state, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from trl import ModelConfig, get_quantization_config

from fnsft_trl import FNSFTError, FunctionalNetworkTemplate, verify_merge
from fnsft_trl.cli import main
from fnsft_trl.cli.models import check_loading, load_model, loading_arguments
from fnsft_trl.cli.options.loading import LoadingConfig
from fnsft_trl.cli.options.schema import describe


QUICK = ["--ica_components", "2", "--ica_rank", "8", "--ica_max_tokens", "200", "--ica_percentile", "80"]


@pytest.fixture
def data(tmp_path, rows):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture
def base(hub, tokenizer, tmp_path):
    """A model on the Hub whose branch v1 holds other weights than main: (its id, the weights of v1)."""
    first = tiny_model("llama")
    for branch, model in (("v1", first), ("main", tiny_model("llama", seed=1))):
        directory = tmp_path / branch
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        hub.put("alice/base", {path.name: path.read_bytes() for path in directory.iterdir()}, revision=branch)
    return "alice/base", state(first)


@pytest.fixture
def loads(monkeypatch):
    """The arguments of every model that is loaded."""
    seen = []
    load = AutoModelForCausalLM.from_pretrained

    def noted(name, **arguments):
        seen.append(arguments)
        return load(name, **arguments)

    monkeypatch.setattr("fnsft_trl.cli.models.AutoModelForCausalLM.from_pretrained", noted)
    return seen


def test_a_model_that_does_not_fit_on_a_device_is_an_error_that_says_how_to_spread_it(model_dir, monkeypatch):
    def too_large(model, device):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(LlamaForCausalLM, "to", too_large)
    with pytest.raises(FNSFTError, match=r"does not fit on cuda:0; start one process, .*device_map=auto"):
        load_model(str(model_dir), LoadingConfig(), device="cuda:0")


def test_several_processes_do_not_each_spread_a_model():
    check_loading(LoadingConfig(device_map="auto"), "cpu")
    with pytest.raises(FNSFTError, match="each of these 2 processes holds its own model; start one process"):
        check_loading(LoadingConfig(device_map="auto"), "cpu", processes=2)


def test_the_options_are_those_of_trl_where_it_has_them():
    of_trl = {option.name: option for option in describe(ModelConfig)}
    for option in describe(LoadingConfig):
        if option.name in of_trl:
            assert (option.kind, set(option.choices)) == (
                of_trl[option.name].kind,
                set(of_trl[option.name].choices),
            )
            assert option.name == "model_revision" or option.default == of_trl[option.name].default


@pytest.mark.parametrize("settings", [{"load_in_4bit": True, "dtype": "bfloat16"}, {"load_in_8bit": True}], ids=str)
def test_quantised_weights_are_those_of_trl(settings, model_dir, loads):
    model = load_model(str(model_dir), LoadingConfig(**settings), device="cpu")
    assert model.config.quantization_config.to_dict() == get_quantization_config(ModelConfig(**settings)).to_dict()
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_what_is_not_asked_for_is_not_passed_on():
    assert loading_arguments(LoadingConfig()) == {"dtype": "float32", "trust_remote_code": False}
    asked = LoadingConfig("auto", "cpu", model_revision="v1", trust_remote_code=True, attn_implementation="eager")
    assert loading_arguments(asked) == {
        **{"dtype": "auto", "device_map": "cpu", "revision": "v1", "trust_remote_code": True},
        "attn_implementation": "eager",
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attn_implementation": "flashy"}, "attn_implementation is 'flashy'; it must be one of: eager"),
        ({"device_map": "gpu"}, "device_map is 'gpu'; it must be a device such as cpu or cuda:0, or one of: auto"),
        ({"device_map": "cuda:9"}, "device_map is 'cuda:9', and this machine has no accelerator"),
        ({"load_in_4bit": True}, "bitsandbytes holds no quantised weights on cpu"),
    ],
    ids=str,
)
def test_what_this_machine_cannot_do_is_refused(settings, message, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr("bitsandbytes.supported_torch_devices", {"cuda"})
    with pytest.raises(FNSFTError, match=message):
        check_loading(LoadingConfig(**settings), "cpu")


def test_a_device_must_be_one_of_this_machine(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: SimpleNamespace(type="cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for device_map in (None, "auto", "balanced", "cpu", "cuda", "cuda:1"):
        check_loading(LoadingConfig(device_map=device_map), "cuda")
    for device_map in ("cuda:2", "xpu:0"):
        with pytest.raises(FNSFTError, match="this machine has 2 of type cuda"):
            check_loading(LoadingConfig(device_map=device_map), "cuda")


def test_4_and_8_bits_exclude_each_other(data, capsys):
    with pytest.raises(FNSFTError, match="exclude each other"):
        LoadingConfig(load_in_4bit=True, load_in_8bit=True)
    for words in (["discover", "m", str(data)], ["compare", "a", "b", "--texts", "t"]):
        assert main([*words, "--load_in_4bit", "--load_in_8bit", "on"]) == 2
        assert "load_in_4bit and load_in_8bit exclude each other" in capsys.readouterr().err


def test_discover_loads_as_it_is_told(base, data, loads, tmp_path):
    name, _ = base
    call = ["discover", name, str(data), "--output_dir", str(tmp_path / "t"), *QUICK]
    words = ["--dtype", "bfloat16", "--model-revision", "v1", "--attn_implementation=eager", "--device_map", "cpu"]
    assert main([*call, *words, "--trust_remote_code"]) == 0
    assert loads == [
        {
            **{"dtype": "bfloat16", "device_map": "cpu", "attn_implementation": "eager"},
            **{"revision": "v1", "trust_remote_code": True},
        }
    ]


@pytest.mark.parametrize("option", ["--load_in_4bit", "--load_in_8bit"])
def test_discover_reads_quantised_weights(model_dir, data, tmp_path, option):
    assert main(["discover", str(model_dir), str(data), "--output_dir", str(tmp_path / "t"), *QUICK, option]) == 0
    assert len(FunctionalNetworkTemplate.from_pretrained(tmp_path / "t").components) == 2


def test_compare_loads_two_models_of_their_own_revisions(base, templates, data, loads, rows, tmp_path, capsys):
    name, _ = base
    templates["llama"].save_pretrained(tmp_path / "a")
    (tmp_path / "shared.jsonl").write_text(json.dumps({"text": " ".join(row["completion"] for row in rows) * 20}))
    call = ["compare", str(tmp_path / "a"), str(tmp_path / "a"), "--output_dir", str(tmp_path / "out")]
    words = ["--model_a", name, "--model_b", name, "--model_revision_a", "v1", "--dtype", "auto"]
    assert main([*call, *words]) == 2
    assert "model_revision_a, dtype: read only with texts" in capsys.readouterr().err
    shared = ["--texts", str(tmp_path / "shared.jsonl"), "--passages", "20", "--permutations", "9"]
    assert main([*call, *shared, *words]) == 0
    assert [(seen["dtype"], seen.get("revision")) for seen in loads] == [("auto", "v1"), ("auto", None)]


@pytest.mark.parametrize(
    ("networks", "method"),
    [(True, []), (True, ["--use_peft", "--lora_r", "2"]), (False, ["--use_peft", "--lora_r", "2"])],
    ids=["neuron deltas", "lora", "plain lora"],
)
def test_the_revision_of_the_base_is_kept_and_exported(networks, method, base, data, templates, tmp_path, capsys):
    name, before = base
    templates["llama"].save_pretrained(tmp_path / "template")
    call = ["train", "--model_name_or_path", name, "--model_revision", "v1", "--dataset_name", str(data), "--use_cpu"]
    call += ["--max_steps", "2", "--learning_rate", "0.1", "--max_length", "32", "--disable_tqdm", "on"]
    call += ["--bf16", "off", "--save_strategy", "no", "--output_dir", str(tmp_path / "out"), *method]
    call += ["--ica_template_path", str(tmp_path / "template")] if networks else []
    assert main(call) == 0
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == (name, "v1")

    assert main(["export", str(tmp_path / "out"), "--to", "merged", "--output_dir", str(tmp_path / "merged")]) == 0
    after = state(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    if not method:
        assert "Verified: " in capsys.readouterr().out
        assert verify_merge(name, tmp_path / "merged", tmp_path / "out").count > 0  # by names, as the CLI does
    again = ["export", str(tmp_path / "out"), "--to", "merged", "--output_dir", str(tmp_path / "other")]
    assert main([*again, "--model_revision", "main"]) == 0
    other = state(AutoModelForCausalLM.from_pretrained(tmp_path / "other"))
    assert not torch.equal(other["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_without_a_revision_none_is_kept(model_dir, data, tmp_path):
    call = ["train", "--model_name_or_path", str(model_dir), "--dataset_name", str(data), "--max_steps", "1"]
    call += ["--use_cpu", "--bf16", "off", "--max_length", "32", "--output_dir", str(tmp_path / "out"), "--use_peft"]
    assert main([*call, "--lora_r", "2", "--save_strategy", "no", "--disable_tqdm", "on"]) == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["revision"] is None


@pytest.mark.parametrize(
    ("form", "words", "message"),
    [
        ("merged", ["--load_in_4bit"], "load_in_4bit: an adapter is merged into weights of full precision"),
        ("merged", ["--load_in_8bit"], "load_in_8bit: an adapter is merged into weights of full precision"),
        ("merged", ["--attn_implementation", "eager"], "attn_implementation has no effect on what is exported"),
        ("merged", ["--device_map", "nowhere"], "device_map is 'nowhere'; it must be a device"),
        ("lora", ["--device_map", "cpu"], "device_map has no effect with to=lora"),
        ("gguf", ["--device_map", "cpu"], "device_map has no effect with to=gguf"),
        ("gguf", ["--dtype", "float16"], "dtype has no effect with to=gguf"),
    ],
    ids=str,
)
def test_what_export_cannot_use_is_one_line(form, words, message, tmp_path, loads, capsys):
    target = ["--output_path", str(tmp_path / "o")] if form == "gguf" else ["--output_dir", str(tmp_path / "o")]
    assert main(["export", "nowhere", "--to", form, *target, *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert loads == []


def test_the_fields_are_the_words_of_the_design():
    names = {field.name for field in dataclasses.fields(LoadingConfig)}
    assert names == {
        *("dtype", "device_map", "load_in_4bit", "load_in_8bit", "model_revision", "trust_remote_code"),
        "attn_implementation",
    }


def test_no_verb_asks_whether_to_run_the_code_of_a_model(tmp_path, capsys, monkeypatch):
    """A model that brings code is refused in one line, unless it is asked for."""
    home = tmp_path / "model"
    tiny_tokenizer().save_pretrained(home)
    (home / "code.py").write_text("raise SystemExit('ran')\n")
    about = {"model_type": "own", "auto_map": dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "code.Own")}
    (home / "config.json").write_text(json.dumps(about))
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(home), "task_type": "CAUSAL_LM", "r": 1}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(adapter))
    (tmp_path / "rows.txt").write_text("some text\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    for argv in (
        ["discover", home, tmp_path / "rows.txt", "--output_dir", tmp_path / "out"],
        ["export", tmp_path / "adapter", "--to", "merged", "--output_dir", tmp_path / "out"],
        ["evaluate", home, "--data", tmp_path / "rows.txt", "--output_dir", tmp_path / "out"],
    ):
        assert main([str(part) for part in argv]) == 2, argv
        assert "trust_remote_code" in capsys.readouterr().err
