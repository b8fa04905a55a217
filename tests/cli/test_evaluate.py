"""fnsft evaluate: base, adapter, merged and plain LoRA in one call, and all that stands in its report."""

import json
import random
import shutil

import pytest
import torch
import yaml
from datasets import Dataset
from helpers import instead, sft_config, tiny_model, tiny_rows
from lm_tasks import write_tasks
from peft import LoraConfig, get_peft_model
from processes import run_processes
from transformers import AutoModelForCausalLM, AutoTokenizer

from fnsft_trl import (
    FNSFTTrainer,
    FunctionalNetworkConfig,
    NeuronTunerConfig,
    bake_lesion,
    select_neurons,
    to_merged,
    to_plain_lora,
)
from fnsft_trl.cli import main
from fnsft_trl.data.embedded import _rows, embedded_model, question_routing
from fnsft_trl.evaluation.retention import RetentionText


def written(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory, model_dir, tokenizer, templates):
    """A folder with models and data: a base, an adapter on it, that merged and as a plain LoRA; a masked run."""
    root = tmp_path_factory.mktemp("evaluate")
    shutil.copytree(model_dir, root / "tiny")
    tuned = get_peft_model(
        tiny_model("llama"), NeuronTunerConfig(neurons={"0": "0-9", "2": "5-20"}, task_type="CAUSAL_LM")
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "neuron_delta" in name:
                parameter.normal_(0, 0.5, generator=generator)
    tuned.peft_config["default"].base_model_name_or_path = str(root / "tiny")
    tuned.save_pretrained(root / "adapter")
    tokenizer.save_pretrained(root / "adapter")
    to_merged(root / "adapter", root / "merged")
    to_plain_lora(root / "adapter", root / "lora")
    tokenizer.save_pretrained(root / "lora")
    rows = tiny_rows(24)
    written(root / "qa.jsonl", [{"question": r["prompt"], "answer": r["completion"]} for r in rows])
    turns = [[("user", r["prompt"]), ("assistant", r["completion"])] for r in rows[:9]]
    chats = [{"messages": [{"role": role, "content": text} for role, text in each]} for each in turns]
    written(root / "chat.jsonl", [*chats, {"messages": []}])
    written(root / "text.jsonl", [{"text": r["prompt"] * 3} for r in rows])
    write_tasks(root)
    return root


@pytest.fixture(scope="module")
def masked_run(place, tokenizer, templates):
    """The directory of a run that trained under a lesion."""
    directory = place / "run"
    config = FunctionalNetworkConfig(mask_mode="lesion", ica_component_ids=[0])
    trainer = FNSFTTrainer(
        AutoModelForCausalLM.from_pretrained(place / "tiny"),
        sft_config(directory, max_steps=1),
        train_dataset=Dataset.from_list(tiny_rows(8)),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM"),
        network_config=config,
        network_template=templates["llama"],
    )
    trainer.train()
    trainer.save_model()
    return directory


def evaluate(place, *words, output="report"):
    assert main(["evaluate", *map(str, words), "--output_dir", str(place / output)]) == 0
    return json.loads((place / output / "results.json").read_text())


@pytest.mark.slow
def test_an_adapter_its_merge_and_its_plain_lora_score_the_same_and_the_base_does_not(place, capsys):
    models = [f"base={place / 'tiny'}", place / "adapter", place / "merged", place / "lora"]
    data = [f"{name}={place / name}.jsonl" for name in ("qa", "chat", "text", "questions")]
    more = ["--generate", "--max_new_tokens", 6, "--max_length", 64, "--bootstrap_draws", 200]
    retention = ["--retention_datasets", f"general={place / 'text.jsonl'}", "--retention_tokens", 100]
    tasks = ["--tasks", "syllables", "--include_path", place]
    found = evaluate(place, *models, "--data", *data, *more, *retention, *tasks)

    scores = found["scores"]
    assert list(scores) == ["base", "adapter", "merged", "lora"]
    names = {f"{data}/{name}" for data in ("qa", "chat") for name in ("exact_match", "nll", "perplexity", "bleu")}
    names |= {"qa/generated_exact_match", "qa/rouge1", "qa/rouge2", "qa/rougeL", "text/perplexity"}
    names |= {"text/bits_per_byte", "questions/acc", "questions/acc_norm", "questions/acc_bytes"}
    names |= {"retention/general/cross_entropy", "syllables/acc", "syllables/acc_norm"}
    assert names < scores["base"].keys()
    for name, value in scores["adapter"].items():
        for other in ("merged", "lora"):
            assert scores[other][name]["value"] == pytest.approx(value["value"], rel=1e-5, abs=1e-5), name
            assert scores[other][name]["rows"] == value["rows"]
    for name in (
        "qa/nll",
        "chat/perplexity",
        "text/perplexity",
        "questions/acc_norm",
        "retention/general/cross_entropy",
    ):
        assert abs(scores["base"][name]["value"] - scores["adapter"][name]["value"]) > 1e-3, name
        assert found["differences"]["adapter"][name]["value"] == pytest.approx(
            scores["adapter"][name]["value"] - scores["base"][name]["value"]
        )
    for metric in ("acc", "acc_norm", "acc_bytes"):  # lm-eval on the same rows
        assert scores["adapter"][f"syllables/{metric}"] == scores["adapter"][f"questions/{metric}"]
    kl = scores["adapter"]["retention/general/kl"]
    assert (kl["value"] > 0, "retention/general/kl" in scores["base"]) == (True, False)
    assert kl["low"] <= kl["value"] <= kl["high"]
    assert scores["lora"]["retention/general/kl"]["value"] == pytest.approx(kl["value"], rel=1e-4)

    assert found["data"]["base"]["chat"]["left_out"] == {"'messages' is empty": 1}
    assert (found["data"]["base"]["chat"]["rows"], found["data"]["base"]["chat"]["scored"]) == (10, 9)
    assert len(found["data"]["base"]["qa"]["sha256"]) == 64
    assert found["models"]["adapter"]["base"] == str(place / "tiny")
    assert {"torch", "lm-eval", "sacrebleu", "fnsft-trl"} <= found["versions"].keys()
    assert (found["settings"]["seed"], found["reference"]) == (0, "base")
    page, text = ((place / "report" / name).read_text() for name in ("report.html", "report.md"))
    for shown in ("Differences from base", "retention/general/kl", "1: 'messages' is empty".replace("'", "&#x27;")):
        assert shown in page
    assert "| qa/exact_match | 24 |" in text
    lines = [json.loads(line) for line in (place / "report" / "scores.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line["data"] == "qa" and line["model"] == "merged")
    assert {"row", "nll", "exact_match", "bleu", "expected", "answer"} <= first.keys()
    assert "Differences from base" in capsys.readouterr().out


def test_the_base_has_the_prompts_of_its_adapter(place, tokenizer):
    found = evaluate(place, place / "adapter", "--base", "--data", place / "qa.jsonl", "--template_format", "alpaca")
    assert list(found["scores"]) == ["base", "adapter"]
    alone = evaluate(place, place / "tiny", "--data", place / "qa.jsonl", "--template_format", "alpaca")
    assert found["scores"]["base"] == alone["scores"]["tiny"]
    assert found["models"]["base"]["kind"] == "base model"
    assert found["data"]["base"]["qa"]["tokens"] == found["data"]["adapter"]["qa"]["tokens"]


@pytest.mark.slow
def test_a_run_is_scored_as_it_is_saved_and_under_its_mask(place, masked_run, templates):
    data = ["--data", place / "text.jsonl", "--bootstrap_draws", 100]
    found = evaluate(place, masked_run, "--masked", *data)
    assert list(found["scores"]) == ["run", "run (masked)"]
    assert found["models"]["run (masked)"]["mask"] == "lesion"
    plain, masked = (each["text/perplexity"]["value"] for each in found["scores"].values())
    assert plain != masked
    template = place / "template"
    templates["llama"].save_pretrained(template)
    mask = ["--ica_template_path", template, "--mask_mode", "lesion", "--ica_component_ids", 0]
    given = evaluate(place, masked_run, *data, *mask)
    assert list(given["scores"]) == ["run", "run (lesion)"]
    values = [each["text/perplexity"]["value"] for each in given["scores"].values()]
    assert values == [plain, masked]
    chosen = select_neurons(templates["llama"], [0])
    assert given["models"]["run (lesion)"]["neurons"] == chosen.count
    model = tiny_model("llama")
    bake_lesion(model, chosen)
    model.save_pretrained(place / "baked")
    shutil.copy(place / "tiny" / "tokenizer.json", place / "baked")
    shutil.copy(place / "tiny" / "tokenizer_config.json", place / "baked")
    shutil.copy(place / "tiny" / "chat_template.jinja", place / "baked")
    baked = evaluate(place, place / "tiny", place / "baked", *data, *mask)["scores"]
    assert baked["tiny (lesion)"]["text/perplexity"]["value"] == pytest.approx(
        baked["baked"]["text/perplexity"]["value"], rel=1e-5
    )


def test_what_is_sampled_repeats_with_its_seed(place):
    words = [place / "tiny", "--data", place / "qa.jsonl", "--max_samples", 5, "--bootstrap_draws", 100]
    first = evaluate(place, *words)
    assert first["data"]["tiny"]["qa"]["rows"] == 5
    lines = [json.loads(line) for line in (place / "report" / "scores.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == sorted(random.Random(0).sample(range(24), 5))
    assert evaluate(place, *words) == first
    assert (
        evaluate(place, *words, "--seed", 1)["data"]["tiny"]["qa"]["sha256"] != first["data"]["tiny"]["qa"]["sha256"]
    )


def test_a_yaml_file_says_the_same(place):
    settings = {"models": [str(place / "tiny")], "data": [str(place / "qa.jsonl")], "bootstrap_draws": 100}
    (place / "evaluate.yaml").write_text(yaml.safe_dump(settings))
    of_file = evaluate(place, "--config", place / "evaluate.yaml")
    assert of_file == evaluate(place, place / "tiny", "--data", place / "qa.jsonl", "--bootstrap_draws", 100)


def refused(capsys, *words) -> str:
    assert main(["evaluate", *map(str, words)]) == 2
    (line,) = [each for each in capsys.readouterr().err.splitlines() if "error: " in each]
    return line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tiny"], "there is nothing to score on; give data, tasks or retention_datasets"),
        pytest.param(  # lm-eval reads the thousands of its own tasks
            *(["tiny", "--tasks", "syllable"], "lm-eval knows no task 'syllable'; did you mean 'syllables'"),
            marks=pytest.mark.slow,
        ),
        (["tiny", "--generate", "--tasks", "syllables"], "generate: no effect without data"),
        (["tiny", "--data", "qa.jsonl", "--max_new_tokens", "3"], "max_new_tokens: no effect without generate"),
        (["tiny", "--data", "qa.jsonl", "--limit", "3"], "limit: no effect without tasks"),
        (["tiny", "--data", "qa.jsonl", "--mask_mode", "lesion"], "mask_mode: no effect without ica_template_path"),
        (["tiny", "--data", "qa.jsonl", "--ica_layers", "0"], "ica_layers: no effect without mask_mode"),
        (
            [
                *("tiny", "--data", "qa.jsonl", "--mask_mode", "lesion", "--ica_template_path", "t"),
                *("--ica_fraction", ".1", "--ica_select", "contrast"),
            ],
            "ica_select=contrast is measured on the rows of a training",
        ),
        (["tiny", "--data", "qa.jsonl", "--base"], "base: none of the models is an adapter"),
        (["base=tiny", "adapter", "--data", "qa.jsonl", "--base"], "base: tiny is called so already"),
        (["tiny", "--data", "qa.jsonl", "--masked"], "masked: none of the models was trained under a mask"),
        (["tiny", "--data", "none.jsonl"], "the dataset file none.jsonl does not exist"),
        (["tiny", "--data", "odd.jsonl"], "the dataset odd.jsonl has the columns 'a', 'b', which are no known format"),
        (
            ["weightless", "--data", "empty.jsonl"],  # so that an error about its weights would come first
            "empty has no row to score: 'answer' is empty in row 0",
        ),
        (["tiny", "--data", "qa.jsonl", "--columns", "prompt=quest,completion=answer"], "no column 'quest'"),
        (
            ["tiny", "--data", "qa.jsonl", "--dataset_split", "dev"],
            "has no split 'dev'; it has train; set dataset_split",
        ),
        (["tiny", "tiny=adapter", "--data", "qa.jsonl"], "models names 'tiny' twice"),
        (["nowhere/else", "--data", "qa.jsonl"], "the model 'nowhere/else' cannot be loaded"),
        (["orphan", "--data", "qa.jsonl"], "if it has moved, say where to in base_model_name_or_path of orphan"),
        (["killed", "--data", "qa.jsonl"], "its newest checkpoint is killed/checkpoint-12: give that"),
        (["tiny/config.json", "--data", "qa.jsonl"], "tiny/config.json is a file; give the directory of a model"),
        (["tiny", "--data", "qa.jsonl", "--output_dir", "tiny"], "output_dir is tiny, where tiny is read from"),
        (["adapter", "--data", "qa.jsonl", "--output_dir", "merged"], "output_dir is merged, which holds a model"),
        (["tiny", "--data", "results.json", "--output_dir", "."], "output_dir is ., where results.json is read from"),
        (
            ["weightless", "--data", "qa.jsonl", "--ica_template_path", "other", "--mask_mode", "lesion"],
            "the template was made from a model without a name (GPT2LMHeadModel), but the model is a LlamaForCausalLM",
        ),
        (
            ["tiny", "--data", "qa.jsonl", "--choice_prompt", "Say it"],
            "choice_prompt is 'Say it', the same for every row",
        ),
        (["weightless", "endless", "--data", "qa.jsonl", "--generate"], "has no EOS token"),
        (["headless", "--data", "qa.jsonl"], "headless is a LlamaModel, which has no generation config"),
        (["untold", "--data", "qa.jsonl"], "the model 'untold' has no tokenizer that can be loaded"),
    ],
)
def test_what_cannot_be_done_is_one_line(words, message, place, templates, capsys, monkeypatch):
    monkeypatch.chdir(place)
    written(place / "odd.jsonl", [{"a": 1, "b": 2}])
    written(place / "empty.jsonl", [{"question": "Say", "answer": None}])
    written(place / "results.json", [{"text": "Say ba."}])
    (place / "killed" / "checkpoint-4").mkdir(parents=True, exist_ok=True)
    (place / "killed" / "checkpoint-12").mkdir(exist_ok=True)
    shutil.copytree(place / "adapter", place / "orphan", dirs_exist_ok=True)
    config = json.loads((place / "orphan" / "adapter_config.json").read_text())
    (place / "orphan" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "gone"}))
    if "other" in words:
        templates["gpt2"].save_pretrained(place / "other")
    shutil.copytree(place / "tiny", place / "weightless", dirs_exist_ok=True)
    (place / "weightless" / "model.safetensors").unlink()
    if "endless" in words:
        shutil.copytree(place / "tiny", place / "endless", dirs_exist_ok=True)
        settings = json.loads((place / "endless" / "tokenizer_config.json").read_text())
        settings["eos_token"] = None
        (place / "endless" / "tokenizer_config.json").write_text(json.dumps(settings))
    if "headless" in words:
        tiny_model("llama").model.save_pretrained(place / "headless")
    if "untold" in words:
        tiny_model("llama").save_pretrained(place / "untold")
    more = [] if "--tasks" not in words else ["--include_path", str(place)]
    assert message in refused(capsys, *instead(words, *more))
    assert not (place / "evaluation").exists()


@pytest.mark.slow
def test_two_processes_come_to_the_results_of_one(place, tmp_path):
    words = ["-m", "fnsft_trl.cli", "evaluate", place / "tiny", place / "adapter", "--bootstrap_draws", 100]
    words += ["--data", *(place / f"{name}.jsonl" for name in ("qa", "chat", "text", "questions")), "--generate"]
    words += ["--max_new_tokens", 5, "--max_length", 64, "--retention_datasets", f"general={place / 'text.jsonl'}"]
    words += ["--retention_tokens", 100, "--tasks", "syllables", "sounds", "--include_path", place]
    for count in (1, 2):
        printed = run_processes(count, *words, "--output_dir", tmp_path / str(count))
        assert [bool(each) for each in printed] == [True, *[False] * (count - 1)]  # one of them writes
    one, two = (json.loads((tmp_path / str(count) / "results.json").read_text()) for count in (1, 2))
    of_tasks = {"syllables/acc", "sounds/bits_per_byte"}  # whose batches are lm-eval's
    for model, scores in one["scores"].items():
        for name, value in scores.items():
            if name in of_tasks:
                assert two["scores"][model][name]["value"] == pytest.approx(value["value"], rel=1e-6)
            else:
                assert two["scores"][model][name] == value, name
    assert (tmp_path / "1" / "scores.jsonl").read_bytes() == (tmp_path / "2" / "scores.jsonl").read_bytes()


@pytest.mark.slow
def test_a_real_model_its_adapter_merged_and_exported(tmp_path):
    """On SmolLM2, with questions of OpenBookQA in the shape that its package gives them."""
    base = embedded_model()
    model = AutoModelForCausalLM.from_pretrained(base)
    neurons = {str(layer): "0-63" for layer in range(0, 30, 3)}
    tuned = get_peft_model(model, NeuronTunerConfig(neurons=neurons, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "neuron_delta" in name:
                parameter.normal_(0, 0.02, generator=generator)
    tuned.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "adapter")
    to_merged(tmp_path / "adapter", tmp_path / "merged")
    to_plain_lora(tmp_path / "adapter", tmp_path / "lora")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "lora")
    routing, _ = question_routing(4, 1)
    (tmp_path / "choices.jsonl").write_text("\n".join(map(json.dumps, _rows("OpenBookQA", "test.jsonl")[:3])))
    words = [
        tmp_path / "adapter",
        tmp_path / "merged",
        tmp_path / "lora",
        "--base",
        "--generate",
        "--max_new_tokens",
        4,
    ]
    words += ["--data", written(tmp_path / "routing.jsonl", routing), tmp_path / "choices.jsonl"]
    words += ["--retention_datasets", "embedded", "--retention_tokens", 100]
    scores = evaluate(tmp_path, *words)["scores"]
    for name, value in scores["adapter"].items():
        for other in ("merged", "lora"):
            assert scores[other][name]["value"] == pytest.approx(value["value"], rel=1e-5, abs=1e-5), name
    assert scores["base"]["routing/nll"]["value"] != pytest.approx(scores["adapter"]["routing/nll"]["value"], rel=1e-3)
    assert 2 < scores["base"]["retention/embedded/cross_entropy"]["value"] < 5
    assert scores["adapter"]["retention/embedded/kl"]["value"] > 1e-4


def test_retention_texts_are_cut_as_in_training(place, tokenizer):
    found = evaluate(place, place / "tiny", "--retention_datasets", f"general={place / 'text.jsonl'}")
    texts = [json.loads(line)["text"] for line in (place / "text.jsonl").read_text().splitlines()]
    text = RetentionText.from_texts(texts, tokenizer)
    assert found["retention"]["general"] == {"tokens": text.tokens, "sha256": text.sha256}
    value = found["scores"]["tiny"]["retention/general/cross_entropy"]["value"]
    assert value == pytest.approx(text.cross_entropy(tiny_model("llama")), rel=1e-6)
