"""One process of a measurement, for tests/evaluation/test_series.py: prints the values of a series as JSON.

python series_run.py
"""

import json
import sys

import torch
from accelerate import PartialState
from helpers import tiny_model, tiny_rows, tiny_tokenizer
from peft import get_peft_model

from fnsft_trl import NeuronTunerConfig
from fnsft_trl.evaluation.retention import RetentionText
from fnsft_trl.evaluation.series import RetentionSeries


if __name__ == "__main__":
    torch.set_num_threads(1)
    PartialState(cpu=True)
    text = RetentionText.from_texts(
        [row["prompt"] * (1 + n % 3) for n, row in enumerate(tiny_rows(21))], tiny_tokenizer()
    )
    deltas = NeuronTunerConfig(neurons={"0": "0-9"}, task_type="CAUSAL_LM")
    found = []
    for model in (get_peft_model(tiny_model("llama"), deltas), tiny_model("llama")):
        series = RetentionSeries(text, batch_size=5)
        series.begin(model)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05)
        found.append([series.kl_kind, series.base, series.measure(model), len(series.tensors().get("lengths", ()))])
    sys.stdout.write(json.dumps(found))
