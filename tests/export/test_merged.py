"""What a merge reads and writes: special tokens, the revision, and what it refuses before anything is written."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import transformers as tf
from architectures import ARCHITECTURES
from datasets import Dataset
from helpers import VOCABULARY, logits, sft_config, state, tiny_model, tiny_tokenizer, write_converter
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from fnsft_trl import (
    FNSFTError,
    FNSFTTrainer,
    FunctionalNetworkConfig,
    NeuronTunerConfig,
    find_neuron_sites,
    to_plain_lora,
    verify_merge,
)
from fnsft_trl.cli import main
from fnsft_trl.evaluation.reload import check_reload, last_logits
from fnsft_trl.export import to_merged
from fnsft_trl.export.gguf import CONVERTER_VARIABLE, to_gguf


IDS = torch.arange(3, 21).view(2, 9)
LORA = LoraConfig(r=2, target_modules=["up_proj", "down_proj"], task_type="CAUSAL_LM")
DELTAS = NeuronTunerConfig(neurons={"0": "0-4,9", "2": "3"}, task_type="CAUSAL_LM")
MADE_UP = {"bits": 4, "group_size": 128}


def save_adapter(base: Path, directory: Path, config, *, tokenizer=None):
    """A saved adapter with random weights, and the model that it was saved from."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    return model


@pytest.fixture
def base(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


# Special tokens

TOKENS = st.integers(0, VOCABULARY - 1)
DECLARED = st.none() | TOKENS | st.lists(TOKENS, min_size=1, max_size=3, unique=True)


def ends(given) -> set[int]:
    return set(given) if isinstance(given, list) else {given} - {None}


def eos_of(directory: Path) -> tuple:
    """The EOS ids in the configuration and in the generation configuration of a saved model."""
    names = ("config.json", "generation_config.json")
    return tuple(json.loads((directory / name).read_text()).get("eos_token_id") for name in names)


@pytest.mark.slow
@settings(max_examples=25)
@given(
    config=DECLARED,
    generation=DECLARED,
    eos=st.none() | TOKENS,
    beside=st.booleans(),
    tuner=st.sampled_from([DELTAS, LORA]),
    subclass=st.sampled_from(["llama", "gpt2"]),
)
def test_a_merged_model_stops_where_its_tokenizer_does(config, generation, eos, beside, tuner, subclass):
    if subclass == "gpt2" and tuner is LORA:
        tuner = LoraConfig(r=2, target_modules=["c_fc", "mlp.c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        model = tiny_model(subclass)
        model.config.eos_token_id, model.generation_config.eos_token_id = config, generation
        model.save_pretrained(root / "base")
        tokenizer = tiny_tokenizer()
        tokenizer.eos_token = None if eos is None else tokenizer.convert_ids_to_tokens(eos)
        if beside:
            tiny_tokenizer().save_pretrained(root / "base")
        else:
            tokenizer.save_pretrained(root / "base")
        save_adapter(root / "base", root / "adapter", tuner, tokenizer=tokenizer if beside else None)
        declared = eos_of(root / "base")
        to_merged(root / "adapter", root / "merged")
        found = eos_of(root / "merged")
        if eos is None:
            assert found == declared  # a tokenizer without EOS says nothing
            return
        assert all(eos in ends(given) for given in found)
        assert ends(found[1]) == {eos, *ends(declared[1])}  # what else ends an answer still does
        if isinstance(declared[0], list):
            assert ends(found[0]) == {eos, *declared[0]}
        else:
            assert found[0] == eos


@pytest.mark.parametrize("declared", [5, [5, 6]], ids=str)
def test_all_of_a_model_of_images_and_text_stops_where_its_tokenizer_does(declared, tokenizer, tmp_path):
    (architecture,) = (a for a in ARCHITECTURES if str(a) == "LlavaForConditionalGeneration")
    model = architecture.model()
    model.config.eos_token_id = model.config.text_config.eos_token_id = declared
    model.save_pretrained(tmp_path / "base")
    wrapped = get_peft_model(model, NeuronTunerConfig(neurons={"0": "0-4"}, task_type="CAUSAL_LM"))
    wrapped.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    wrapped.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    to_merged(tmp_path / "adapter", tmp_path / "merged")
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    eos = tokenizer.eos_token_id
    expected = [eos, 5, 6] if isinstance(declared, list) else eos
    assert written["eos_token_id"] == written["text_config"]["eos_token_id"] == expected


@pytest.mark.posix
@pytest.mark.parametrize("method", ["neuron_delta", "lora", "full"])
def test_what_is_trained_with_another_eos_stops_there(method, rows, templates, tmp_path, monkeypatch):
    write_converter(tmp_path / "convert")
    monkeypatch.setenv(CONVERTER_VARIABLE, str(tmp_path / "convert"))
    tokenizer = tiny_tokenizer()
    eos = tokenizer.eos_token_id
    model = tiny_model("llama")
    model.config.eos_token_id = model.generation_config.eos_token_id = 5
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    trainer = FNSFTTrainer(
        str(tmp_path / "base"),
        sft_config(tmp_path / "out", max_steps=1),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2) if method == "lora" else None,
        network_config=FunctionalNetworkConfig(train_method=method),
        network_template=templates["llama"],
    )
    trainer.train()
    trainer.save_model()
    written = tmp_path / "out"
    if method != "full":
        written = tmp_path / "merged"
        to_merged(tmp_path / "out", written)
    assert eos_of(written) == (eos, [eos, 5])
    gguf = to_gguf(tmp_path / "out", tmp_path / "model.gguf")
    assert json.loads(gguf.read_text())["eos"] == eos


# Revisions


@pytest.mark.slow
def test_every_export_reads_the_revision_that_was_trained(hub, tmp_path, monkeypatch):
    write_converter(tmp_path / "convert")
    monkeypatch.setenv(CONVERTER_VARIABLE, str(tmp_path / "convert"))
    first, tokenizer = tiny_model("llama"), tiny_tokenizer()
    other = tf.LlamaForCausalLM(tf.LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    for branch, model in (("v1", first), ("main", other)):  # of another shape: whoever reads it fails
        model.save_pretrained(tmp_path / branch)
        tokenizer.save_pretrained(tmp_path / branch)
        files = {path.name: path.read_bytes() for path in (tmp_path / branch).iterdir()}
        hub.put("alice/exported", files, revision=branch)
    save_adapter(tmp_path / "v1", tmp_path / "adapter", DELTAS)
    file = tmp_path / "adapter" / "adapter_config.json"
    written = json.loads(file.read_text()) | {"base_model_name_or_path": "alice/exported", "revision": "v1"}
    file.write_text(json.dumps(written))

    to_merged(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert verify_merge("alice/exported", tmp_path / "merged", tmp_path / "adapter").count == 7
    assert verify_merge(state(first), state(merged), tmp_path / "adapter", sites=find_neuron_sites(first)).count == 7
    assert len(tf.AutoTokenizer.from_pretrained(tmp_path / "merged")) == len(tokenizer)
    lora = to_plain_lora(tmp_path / "adapter", tmp_path / "plain")
    assert (lora.base_model_name_or_path, lora.revision) == ("alice/exported", "v1")
    expected = {"adapter": last_logits(merged, IDS)}
    (difference,) = check_reload("alice/exported", {"adapter": tmp_path / "adapter"}, IDS, expected).values()
    assert difference < 1e-5
    assert to_gguf(tmp_path / "adapter", tmp_path / "model.gguf").is_file()
    with pytest.raises(FNSFTError, match="the layers are 0"):
        to_merged(tmp_path / "adapter", tmp_path / "of main", revision="main")


@pytest.mark.parametrize("method", ["neuron_delta", "lora"])
def test_a_base_that_has_moved_on_since_the_training_is_told(
    method, hub, rows, templates, tokenizer, tmp_path, caplog
):
    tiny_model("llama").save_pretrained(tmp_path / "first")
    tokenizer.save_pretrained(tmp_path / "first")
    hub.put(f"alice/moved-{method}", contents(tmp_path / "first"))
    trainer = FNSFTTrainer(
        AutoModelForCausalLM.from_pretrained(f"alice/moved-{method}"),  # which does not know its revision
        sft_config(tmp_path / "out", max_steps=1),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2) if method == "lora" else None,
        network_config=FunctionalNetworkConfig(train_method=method),
        network_template=templates["llama"],
    )
    trainer.train()
    trainer.save_model()
    told = "the MLP weights of the model differ from those by"
    to_merged(tmp_path / "out", tmp_path / "merged")
    assert told not in caplog.text
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "second")
    hub.put(f"alice/moved-{method}", contents(tmp_path / "second"))
    to_merged(tmp_path / "out", tmp_path / "merged")
    assert told in caplog.text


# What is refused


def contents(directory: Path) -> dict[str, bytes]:
    found = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


@pytest.mark.parametrize("tuner", [DELTAS, LORA], ids=["deltas", "lora"])
@pytest.mark.parametrize(
    "quantised",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "gptq", **MADE_UP},
        {"quant_method": "awq", **MADE_UP},
        {"quant_method": "mxfp4"},
        {"quant_method": "fp8"},
        {"quant_method": "of tomorrow"},
    ],
    ids=lambda given: "-".join(map(str, given.values())),
)
def test_nothing_is_merged_into_a_quantised_base(quantised, tuner, base, tmp_path, capsys):
    save_adapter(base, tmp_path / "adapter", tuner)
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantised}))
    before = contents(tmp_path)
    words = ["export", str(tmp_path / "adapter"), "--to", "merged", "--output_dir", str(tmp_path / "out")]
    assert main(words) == 2
    assert "is quantised, and a merge would quantise all of it anew" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_nothing_is_merged_into_a_base_that_is_quantised_as_it_is_loaded(base, tmp_path):
    save_adapter(base, tmp_path / "adapter", LORA)
    given = {"quantization_config": tf.BitsAndBytesConfig(load_in_4bit=True)}
    with pytest.raises(FNSFTError, match="is quantised"):
        to_merged(tmp_path / "adapter", tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["merged", "lora"])
@pytest.mark.parametrize("target", ["adapter", "base", "link to the adapter", "other adapter", "other model"])
def test_an_export_does_not_take_the_place_of_what_it_reads(target, form, base, tmp_path, capsys):
    save_adapter(base, tmp_path / "adapter", DELTAS)
    shutil.copytree(tmp_path / "adapter", tmp_path / "other adapter")
    shutil.copytree(base, tmp_path / "other model")
    (tmp_path / "link to the adapter").symlink_to(tmp_path / "adapter")
    before = contents(tmp_path)
    words = ["export", str(tmp_path / "adapter"), "--to", form, "--output_dir", str(tmp_path / target)]
    capsys.readouterr()
    assert main(words) == 2  # an export of before may be written anew, and nothing else
    assert contents(tmp_path) == before
    assert capsys.readouterr().err.count("\n") == 1


def test_a_base_that_is_an_adapter_is_refused(base, tmp_path):
    save_adapter(base, tmp_path / "first", DELTAS)
    save_adapter(base, tmp_path / "second", DELTAS)
    file = tmp_path / "second" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "first")}))
    for export in (to_merged, to_plain_lora):
        with pytest.raises(FNSFTError, match="is an adapter itself"):
            export(tmp_path / "second", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_missing_or_of_another_model_is_refused_before_anything_is_written(base, tmp_path):
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    model = save_adapter(base, adapter, DELTAS)
    shutil.rmtree(base)
    for export in (to_merged, to_plain_lora):
        with pytest.raises(FNSFTError, match=r"cannot be loaded .*if it has moved, say where"):
            export(adapter, out)
    model.get_base_model().config.save_pretrained(base)
    with pytest.raises(FNSFTError, match="no tokenizer can be loaded"):
        to_merged(adapter, out)
    tiny_tokenizer().save_pretrained(base)
    with pytest.raises(FNSFTError, match="cannot be loaded"):  # weights
        to_merged(adapter, out)
    tiny_model("gpt2").save_pretrained(base)
    with pytest.raises(FNSFTError, match=r"does not fit"):
        to_merged(adapter, out)
    assert not out.exists()


def test_a_lora_that_lies_elsewhere_in_another_model_is_not_dropped(base, tmp_path):
    save_adapter(base, tmp_path / "adapter", LORA)
    tiny_model("opt").save_pretrained(base)
    with pytest.raises(FNSFTError, match=r"does not fit .*Target modules"):
        to_merged(tmp_path / "adapter", tmp_path / "out")
    tf.MistralForCausalLM(
        tf.MistralConfig(
            hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, vocab_size=VOCABULARY
        )
    ).save_pretrained(base)
    with pytest.raises(FNSFTError, match="does not fit"):  # it has one layer less
        to_merged(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_new_tokens_without_their_rows_are_refused(base, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    save_adapter(base, tmp_path / "adapter", DELTAS, tokenizer=tokenizer)
    with pytest.raises(FNSFTError, match="has 121 tokens and the model 120 rows"):
        to_merged(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    tokenizer.save_pretrained(base)  # a model whose own tokenizer has more tokens than it is made like that
    model = AutoModelForCausalLM.from_pretrained(base)
    to_merged(tmp_path / "adapter", tmp_path / "out")
    assert logits(model, IDS).shape == logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), IDS).shape
