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
# same LoRA with `forgetting="low"`, and mend the first one with `fnsft restore`. Model and texts come from packages, so
# nothing is downloaded; a CPU is enough.

# %%
import json

from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig

from fnsft_trl import FNSFTTrainer, ProtectionConfig, RetentionConfig
from fnsft_trl.cli import main
from fnsft_trl.data.embedded import embedded_model, question_routing


ROWS, TEST_ROWS, STEPS, TOKENS, TOLERANCE = 240, 60, 60, 2000, 0.05

# %% [markdown]
# The task: name the desk that a question belongs to. The model has never seen these desks.

# %%
train, test = (Dataset.from_list(rows) for rows in question_routing(ROWS, TEST_ROWS))
print(train[0])

# %% [markdown]
# One function trains a LoRA. `RetentionConfig` names the text on which the loss of ability is measured; what is
# measured comes back from `evaluate`.


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
    found = trainer.evaluate()
    return {"loss": found["eval_loss"], "rise": found["eval_retention/wikipedia/rise"]}


# %% [markdown]
# ## Plain, and protected
#
# Protection keeps every change of a weight off the directions in which Wikipedia runs through the layer. What is left
# to change is less, so the learning rate may be higher.

# %%
table = {"LoRA": fine_tune("plain", 6e-4)}
table["LoRA, forgetting low"] = fine_tune("low", 2e-3, ProtectionConfig(forgetting="low"))

# %% [markdown]
# ## Mended afterwards
#
# `fnsft restore` takes a fine-tune that exists, and removes from its change what runs along a few directions of the text
# to keep. It trains nothing. Of several ways it chooses the one that loses least of Wikipedia within 5% of what was
# learnt.

# %%
with open("output/test.jsonl", "w") as file:
    file.writelines(json.dumps(row) + "\n" for row in test)
words = ["restore", "output/plain", "--keep", "wikipedia=embedded", "--task", "output/test.jsonl", "--leading", "2", "8"]
words += ["--keep_tokens", TOKENS, "--score_tokens", TOKENS, "--tolerance", TOLERANCE, "--output_dir", "output/restored"]
assert main([str(word) for word in words]) == 0

# %% [markdown]
# ## What was learnt, what was lost
#
# Loss of the task and rise of the cross-entropy on Wikipedia, in nats per token: lower is better in both.

# %%
for name, found in table.items():
    print(f"{name:<24} loss {found['loss']:.3f}   Wikipedia {found['rise']:+.4f}")
with open("output/restored/results.json") as file:
    restored = json.load(file)
(way,) = (each for each in restored["ways"] if each["name"] == restored["chosen"])
print(f"{'LoRA, restored':<24} loss of an answer {way['task_loss']:.3f}   Wikipedia {way['rise']['wikipedia']:+.4f}")
