"""PEFT's methods against forgetting (EVA, CorDA, OSF): they run beside a forward mask; only EVA is held to neurons."""

import copy

import pytest
import torch
from datasets import Dataset
from helpers import VOCABULARY, logits, random_mask, sft_config, tiny_model, zeroed
from peft import EvaConfig, LoraConfig, OSFConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda

from fnsft_trl import AnchorConfig, FNSFTError, FNSFTTrainer, FunctionalNetworkConfig, ReplayConfig, lesion


TARGETS = ["q_proj", "up_proj", "down_proj"]
IDS = torch.randint(3, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(0))


def corda_config() -> LoraConfig:
    """Knowledge-preserving mode."""
    return LoraConfig(
        r=2, target_modules=TARGETS, init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm")
    )


def made(kind):
    model = tiny_model("llama")
    if kind == "osf":
        return get_peft_model(model, OSFConfig(target_modules=TARGETS, effective_rank=4))
    if kind == "corda":
        config = corda_config()
        preprocess_corda(model, config, run_model=lambda: [logits(model, row[None]) for row in IDS])
        return get_peft_model(model, config)
    config = LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    model = get_peft_model(model, config)
    batches = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}] * 4
    initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    return model


@pytest.mark.parametrize("kind", ["eva", "corda", "osf"])
def test_a_lesion_beside_the_method_is_that_of_the_merged_model_and_it_trains_on(kind):
    model = made(kind)
    mask = random_mask(model.get_base_model(), "mlp_intermediate")
    handle = lesion(model, mask)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    model.eval()
    lesioned = logits(model, IDS)
    handle.remove()
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(merged, IDS), logits(model, IDS), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lesioned, logits(zeroed(merged, mask), IDS), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(lesioned, logits(model, IDS), atol=1e-2)


@pytest.mark.parametrize(("kind", "base"), [("eva", "exact"), ("corda", "top-k"), ("osf", "exact")])
def test_beside_replay_and_kl_to_the_base_the_method_trains_from_its_base_on(kind, base, rows, tokenizer, tmp_path):
    (tmp_path / "wiki.txt").write_text("The red fox went to the sea\n" * 5)
    text = [f"wiki={tmp_path / 'wiki.txt'}"]
    trainer = FNSFTTrainer(
        model=made(kind),
        args=sft_config(tmp_path, max_steps=2),
        train_dataset=Dataset.from_list(rows[:8]),
        processing_class=tokenizer,
        replay=ReplayConfig(replay_datasets=text, replay_share=0.5),
        anchor=AnchorConfig(kl_to_base=1.0, kl_datasets=text, kl_tokens=50),
    )
    trainer.train()
    assert trainer.anchor.kind == base
    kl = [entry["kl_to_base"] for entry in trainer.state.log_history if "kl_to_base" in entry]
    assert kl[0] == pytest.approx(0, abs=1e-4)
    assert kl[1] > 1e-5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OSFConfig(target_modules=TARGETS), "a OSFConfig, which cannot be held to a set of neurons"),
        (corda_config(), "corda"),
    ],
    ids=["osf", "corda"],
)
def test_what_cannot_be_held_to_neurons_is_refused_by_name(config, message, templates, rows, tokenizer, tmp_path):
    with pytest.raises(FNSFTError, match=message):
        FNSFTTrainer(
            model=tiny_model("llama"),
            args=sft_config(tmp_path),
            train_dataset=Dataset.from_list(rows[:4]),
            processing_class=tokenizer,
            peft_config=config,
            network_config=FunctionalNetworkConfig(),
            network_template=templates["llama"],
        )
