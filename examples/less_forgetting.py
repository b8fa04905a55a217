# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Less forgetting in ten minutes
#
# A small model learns a new task by LoRA. We measure what it learns and what it loses on Wikipedia. Then we train the
# same LoRA with `forgetting="low"`, and mend the first one with `fnsft restore`. Model and texts come from packages.
# A CPU is enough.

# %%
import json

from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig

from fnsft_trl import FNSFTTrainer, ProtectionConfig, RetentionConfig
from fnsft_trl.cli import main
from fnsft_trl.data.embedded import embedded_model, question_routing


ROWS, TEST_ROWS, STEPS, TOKENS, KEPT, TOLERANCE = 240, 60, 60, 2000, 4096, 0.05

# %% [markdown]
# The task: name the desk that a question belongs to. The model has never seen these desks.

# %%
train, test = (Dataset.from_list(rows) for rows in question_routing(ROWS, TEST_ROWS))
print(train[0])

# %% [markdown]
# One function trains a LoRA. `RetentionConfig` names the text on which forgetting is measured, at the start and at the
# end of training.


# %%
def fine_tune(name, learning_rate, protection=None):
    trainer = FNSFTTrainer(
        model=str(embedded_model()),
        args=SFTConfig(
            output_dir=f"output/{name}",
            learning_rate=learning_rate,
            max_steps=STEPS,
            per_device_train_batch_size=8,
            max_length=128,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=20,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=train,
        eval_dataset=test,
        peft_config=LoraConfig(
            r=8, target_modules=["gate_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM", lora_dropout=0.0
        ),
        retention=RetentionConfig(retention_datasets=["wikipedia=embedded"], retention_tokens=TOKENS),
        protection=protection,
    )
    trainer.train()
    trainer.save_model()


# %% [markdown]
# ## Plain, and protected
#
# With protection, weights do not change along the leading directions of Wikipedia. That leaves less to change, so the
# learning rate may be higher.

# %%
fine_tune("plain", 6e-4)
fine_tune("low", 2e-3, ProtectionConfig(forgetting="low", protect_tokens=KEPT))

# %% [markdown]
# ## Mended afterwards
#
# `fnsft restore` takes an existing fine-tune, and removes the part of its change that lies along a few directions of
# the text to keep. It trains nothing. It tries several ways, and chooses the one that forgets the least of Wikipedia
# while it keeps 95% of what was learnt. Here it is called as on the command line.


# %%
def fnsft(*words):
    if main([str(word) for word in words]):
        raise SystemExit("see the line above")


with open("output/test.jsonl", "w") as file:
    file.writelines(json.dumps(row) + "\n" for row in test)
keep = ["--keep", "wikipedia=embedded", "--keep_tokens", TOKENS, "--score_tokens", TOKENS, "--leading", 2, 8]
task = ["--task", "output/test.jsonl", "--tolerance", TOLERANCE]
fnsft("restore", "output/plain", *keep, *task, "--output_dir", "output/restored")

# %% [markdown]
# ## What was learnt, what was lost
#
# All three are compared with the model before training, on the same rows and the same text, with intervals.

# %%
models = ["output/plain", "output/low", "output/restored", "--base"]
general = ["--retention_datasets", "wikipedia=embedded", "--retention_tokens", TOKENS]
fnsft("evaluate", *models, "--data", "output/test.jsonl", *general, "--output_dir", "output/scores")
