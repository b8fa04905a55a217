"""On SmolLM2: a run from YAML is held to its budget, and what its log says is what the reloaded adapter has."""

import json
from pydoc_data.topics import topics

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fnsft_trl.cli import fine_tuning, main
from fnsft_trl.data.embedded import embedded_model, question_routing, wikipedia_passages
from fnsft_trl.evaluation.retention import RetentionText


CONFIG = """\
model_name_or_path: embedded
dataset_name: train.jsonl
output_dir: out
use_peft: true
lora_r: 8
learning_rate: 2e-3
lr_scheduler_type: constant
per_device_train_batch_size: 2
max_steps: 12
eval_strategy: steps
eval_steps: 1
save_strategy: "no"
use_cpu: true
bf16: false
max_length: 64
disable_tqdm: true
report_to: none
retention_datasets: [wiki=embedded, docs=docs.jsonl]
retention_tokens: 100
retention_budget: 0.05
"""


@pytest.mark.slow
def test_a_run_is_rolled_back_and_the_reloaded_adapter_has_the_rise_of_the_log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train, test = question_routing(48, 6)
    docs = [topics[name] for name in sorted(topics)[:20]]
    for name, rows in (("train", [*train, *test]), ("docs", [{"text": text} for text in docs])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "run.yaml").write_text(CONFIG)
    trainers = []

    class Noted(fine_tuning.FNSFTTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            trainers.append(self)

    monkeypatch.setattr(fine_tuning, "FNSFTTrainer", Noted)
    assert main(["train", "--config", "run.yaml"]) == 0
    history = [entry for entry in trainers[0].state.log_history if "retention/wiki/rise" in entry]
    over = history[-2]  # the last is that of the state that came back
    assert max(over["retention/wiki/rise"], over["retention/docs/rise"]) > 0.05
    assert trainers[0].state.global_step == over["step"] < 12

    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    base = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype="float32")
    texts = {
        name: RetentionText.from_texts(passages, tokenizer, max_tokens=100)
        for name, passages in (("wiki", wikipedia_passages("retention")), ("docs", docs))
    }
    before = {name: text.cross_entropy(base) for name, text in texts.items()}
    model = PeftModel.from_pretrained(base, tmp_path / "out")
    for name, text in texts.items():
        rise = text.cross_entropy(model) - before[name]
        assert history[-1][f"retention/{name}/rise"] == pytest.approx(rise, abs=1e-6)
        assert rise <= 0.05
        assert history[-1][f"retention/{name}/kl"] > 0
