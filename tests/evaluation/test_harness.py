"""lm-evaluation-harness: its tasks give what the same rows give here, with adapters and masks as they are."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, logits, random_mask, tiny_model
from lm_eval.api.registry import get_model, model_registry
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_tasks import questions, write_tasks
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from fnsft_trl import FNSFTError, NeuronTunerConfig, lesion
from fnsft_trl.data.choices import find_choice_format, read_choices
from fnsft_trl.evaluation.choices import choice_measures, score_choices
from fnsft_trl.evaluation.evaluation import EvaluationData, evaluate_model
from fnsft_trl.evaluation.harness import Tasks, _register
from fnsft_trl.evaluation.settings import EvaluationConfig


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory):
    """A folder with one task of lm-eval's, of 200 multiple-choice questions, and one of text."""
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return folder


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama").eval()


@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True])
def test_multiple_choice_is_that_of_lm_eval_on_200_rows(chat, model, tokenizer, tasks_dir):
    expected = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
        tasks=["syllables"],
        task_manager=TaskManager(include_path=str(tasks_dir), include_defaults=False),
        bootstrap_iters=0,
        apply_chat_template=chat,
    )
    rows = questions()
    read, _ = read_choices(rows, find_choice_format(rows[0]))
    likelihoods = score_choices(model, tokenizer, read, apply_chat_template=chat, batch_size=16)
    measures = choice_measures(read, likelihoods)
    samples = sorted(expected["samples"]["syllables"], key=lambda sample: sample["doc_id"])
    for sample, values in zip(samples, likelihoods, strict=True):
        assert [response[0] for response in sample["filtered_resps"]] == pytest.approx(values, abs=1e-4)
    for name in ("acc", "acc_norm", "acc_bytes"):
        assert measures[name].per_row == [sample[name] for sample in samples]
        assert measures[name].value == pytest.approx(expected["results"]["syllables"][f"{name},none"], abs=1e-12)
    assert len({tuple(measure.per_row) for measure in measures.values()}) == 3  # or the lengths would say nothing
    found = Tasks(["syllables"], str(tasks_dir)).run(model, tokenizer, apply_chat_template=chat)
    for name, measure in measures.items():
        assert torch.equal(found.measures[f"syllables/{name}"].rows, measure.rows)
        assert found.measures[f"syllables/{name}"].numbers == measure.numbers
    config = EvaluationConfig(apply_chat_template=chat)
    scores = evaluate_model(model, tokenizer, [EvaluationData("own", rows)], config)
    assert scores.measures["own/acc_norm"].value == measures["acc_norm"].value


def test_values_that_are_no_means_are_lm_evals_own(model, tokenizer, tasks_dir):
    found = Tasks(["sounds", "syllables"], str(tasks_dir)).run(model, tokenizer, limit=10)
    assert found.others["sounds/bits_per_byte"] > 0
    assert len(found.measures["syllables/acc"].numbers) == 10
    assert found.about["syllables"] == {"version": 1.0, "rows": 10, "num_fewshot": 0}
    with_examples = Tasks(["syllables"], str(tasks_dir)).run(model, tokenizer, limit=10, num_fewshot=2)
    assert with_examples.about["syllables"]["num_fewshot"] == 2


@pytest.mark.parametrize("task", ["syllables", "sounds", "said"])
def test_a_model_that_gives_no_numbers_has_no_scores(task, tokenizer, tasks_dir):
    model = tiny_model("llama")
    model.lm_head.weight.data[5] = torch.nan
    with pytest.raises(FNSFTError, match="one is nan, which says nothing"):
        Tasks([task], str(tasks_dir)).run(model, tokenizer, limit=2)


@pytest.mark.parametrize("name", ["hf", "fnsft"])
def test_nor_has_it_any_by_the_command_of_lm_eval(name, tokenizer, tasks_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(model_registry, "_objs", dict(model_registry._objs))
    _register()
    for where, value in (("a weight", torch.nan), ("one logit", torch.inf)):
        model = tiny_model("llama")
        model.lm_head.weight.data[5, : 1 if value == torch.inf else None] = value
        model.save_pretrained(tmp_path / where)
        tokenizer.save_pretrained(tmp_path / where)
        lm = get_model(name)(pretrained=str(tmp_path / where), device="cpu")
        manager = TaskManager(include_path=str(tasks_dir), include_defaults=False)
        for task in ("syllables", "sounds", "said"):
            with pytest.raises(FNSFTError, match="which says nothing"):
                simple_evaluate(model=lm, tasks=[task], task_manager=manager, limit=1, bootstrap_iters=0)


def test_a_token_that_a_model_rules_out_has_no_probability(tokenizer, tasks_dir):
    model, tasks = tiny_model("llama"), Tasks(["sounds"], str(tasks_dir))
    ids = set(tokenizer("".join(json.loads(line)["text"] for line in (tasks_dir / "texts.jsonl").open())).input_ids)
    ruled_out = torch.tensor([min(set(range(len(tokenizer))) - ids)])
    model.lm_head.register_forward_hook(lambda head, args, logits: logits.index_fill(-1, ruled_out, -torch.inf))
    assert 0 < tasks.run(model, tokenizer).others["sounds/bits_per_byte"] < torch.inf
    ruled_out[0] = max(ids)
    assert tasks.run(model, tokenizer).others["sounds/bits_per_byte"] == torch.inf


def test_a_mask_and_an_adapter_count(model, tokenizer, tasks_dir):
    tasks = Tasks(["sounds"], str(tasks_dir))
    plain = tasks.run(model, tokenizer).others["sounds/bits_per_byte"]
    with lesion(model, random_mask(model, "mlp_intermediate")):
        assert tasks.run(model, tokenizer).others["sounds/bits_per_byte"] != plain
    assert tasks.run(model, tokenizer).others["sounds/bits_per_byte"] == plain
    tuned = get_peft_model(tiny_model("llama"), NeuronTunerConfig(neurons={"0": "0-9"}, task_type="CAUSAL_LM"))
    assert tasks.run(tuned, tokenizer).others["sounds/bits_per_byte"] == pytest.approx(plain)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "neuron_delta" in name:
                parameter.normal_()
    assert tasks.run(tuned, tokenizer).others["sounds/bits_per_byte"] != pytest.approx(plain)


def test_a_copy_of_a_tied_head_that_an_adapter_trains_stays_one(tokenizer, tasks_dir):
    config = tiny_model("llama").config
    config.tie_word_embeddings = True
    options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "task_type": "CAUSAL_LM"}
    tuned = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, **options)).eval()
    with torch.no_grad():
        tuned.get_output_embeddings().weight.normal_()
    before = logits(tuned, torch.arange(3, 9)[None])
    Tasks(["sounds"], str(tasks_dir)).run(tuned, tokenizer, limit=2)
    assert torch.equal(logits(tuned, torch.arange(3, 9)[None]), before)


def test_a_folder_that_is_not_there_is_named():
    with pytest.raises(FNSFTError, match="include_path is nowhere, and there is no such folder"):
        Tasks(["syllables"], "nowhere")


WITHOUT = """
import json, os, runpy, sys
from lm_eval.__main__ import cli_evaluate
from lm_eval.models.huggingface import HFLM
from peft import AutoPeftModelForCausalLM
base, adapter, of_peft, of_run = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
of_lm_eval = lambda: HFLM(pretrained=base, peft=adapter, device="cpu")  # what the command makes
for load in (lambda: AutoPeftModelForCausalLM.from_pretrained(adapter), of_lm_eval):
    try:
        load()
    except (KeyError, ValueError) as error:
        print("refused:", error)
sys.stdout.flush()
if os.fork() == 0:  # the command that needs no import, in a process that has made none
    sys.argv = ["harness", *of_run]
    runpy.run_module("fnsft_trl.evaluation.harness", run_name="__main__")
    sys.exit()
if os.wait()[1]:
    sys.exit("the command failed")
import fnsft_trl.tuner
AutoPeftModelForCausalLM.from_pretrained(adapter)
sys.argv = ["lm_eval", *of_peft]
cli_evaluate()
"""


@pytest.mark.slow
def test_what_finds_the_deltas_and_what_does_not(model_dir, tokenizer, tasks_dir, tmp_path):
    """lm-eval's own command and AutoPeftModel: not without an import; with it, and by the command that needs none."""
    adapter = tmp_path / "adapter"
    tuned = get_peft_model(tiny_model("llama"), NeuronTunerConfig(neurons={"0": "0-9"}, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "neuron_delta" in name:
                parameter.normal_()
    tuned.peft_config["default"].base_model_name_or_path = str(model_dir)
    tuned.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    expected = Tasks(["sounds"], str(tasks_dir)).run(tuned.eval(), tokenizer).others["sounds/bits_per_byte"]
    common = ["--tasks", "sounds", "--include_path", str(tasks_dir), "--device", "cpu", "--output_path"]
    of_peft = ["--model", "hf", "--model_args", f"pretrained={model_dir},peft={adapter}"]
    of_run = ["--model", "fnsft", "--model_args", f"pretrained={adapter}"]
    both = [json.dumps([*words, *common, str(tmp_path / to)]) for to, words in (("peft", of_peft), ("run", of_run))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # a forked process cannot use the threads of its parent
    words = [sys.executable, "-c", WITHOUT, str(model_dir), str(adapter), *both]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("refused: 'NEURON_DELTA'") == 2
    for folder in ("peft", "run"):
        (file,) = (tmp_path / folder).rglob("results_*.json")
        found = json.loads(file.read_text())["results"]["sounds"]["bits_per_byte,none"]
        assert found == pytest.approx(expected, rel=1e-5)
