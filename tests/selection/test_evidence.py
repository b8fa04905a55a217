"""What selectors are measured on: the same numbers as by hand, and in a run as in Python."""

import pytest
import torch
from datasets import Dataset
from helpers import sft_config, state, tiny_model
from torch import nn

from fnsft_trl import (
    FNSFTError,
    FNSFTTrainer,
    FunctionalNetworkConfig,
    SelectorEvidence,
    select_neurons,
)


GENERAL = ["The red fox went to the sea", "9876543210 is it", "Ten times ten"] * 3


@pytest.fixture(scope="module")
def task(rows):
    return [row["prompt"] + row["completion"] for row in rows[:8]]


@pytest.fixture(scope="module")
def evidence(tokenizer, task):
    return SelectorEvidence(tiny_model("llama"), tokenizer, task=task, general={"general": GENERAL})


@torch.no_grad()
def mean_squares(model, tokenizer, texts, layer):
    """Of the inputs of the down projection, without the first token of each text and special tokens."""
    seen = []
    handle = model.model.layers[layer].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        model(ids)
        keep = [i for i, token in enumerate(ids[0].tolist()) if i > 0 and token not in tokenizer.all_special_ids]
        seen[-1] = seen[-1][keep]
    handle.remove()
    return torch.cat(seen).double().square().mean(0)


def test_contrast_is_the_share_of_the_task_in_the_use_of_a_neuron(templates, evidence, tokenizer, task):
    template = templates["llama"]
    scores = evidence.contrast(template)
    for layer in template.widths:
        a = mean_squares(tiny_model("llama"), tokenizer, task, layer)
        b = template.rms[layer].double().square()
        torch.testing.assert_close(scores[layer].double(), a / (a + b), rtol=1e-3, atol=1e-6)
    mask = select_neurons(template, selector="contrast", fraction=0.2, evidence=evidence)
    for layer, members in mask.layers.items():
        assert scores[layer][members].min() >= scores[layer][~members].max()


def test_gradient_conflict_is_minus_the_cosine_of_the_gradients_of_a_neuron(templates, evidence, tokenizer, task):
    model = tiny_model("llama")

    def gradients(texts):
        model.zero_grad()
        total, count = 0.0, 0
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            total = total + nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
            count += ids.shape[1] - 1
        (total / count).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    first, second = gradients(task), gradients(GENERAL)
    before = state(evidence.model)
    scores = evidence.gradient_conflict(templates["llama"])
    for layer in range(3):
        mlp = f"model.layers.{layer}.mlp"
        rows = [
            torch.cat(
                [
                    found[f"{mlp}.up_proj.weight"],
                    found[f"{mlp}.gate_proj.weight"],
                    found[f"{mlp}.down_proj.weight"].T,
                    found[f"{mlp}.up_proj.bias"][:, None],
                    found[f"{mlp}.gate_proj.bias"][:, None],
                ],
                1,
            ).double()
            for found in (first, second)
        ]
        torch.testing.assert_close(scores[layer], -torch.cosine_similarity(*rows, dim=1), rtol=1e-3, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in evidence.model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in evidence.model.parameters())


def test_the_same_text_is_in_no_conflict_with_itself(templates, tokenizer, task):
    same = SelectorEvidence(tiny_model("llama"), tokenizer, task=task, general=task)
    for values in same.gradient_conflict(templates["llama"]).values():
        torch.testing.assert_close(values[values != 0], torch.full_like(values[values != 0], -1))


def test_shuffled_neurons_are_as_many_in_every_layer_and_others(templates):
    template = templates["llama"]
    networks = select_neurons(template, [0, 2])
    one, same, other = (select_neurons(template, [0, 2], selector="layer_shuffled", seed=seed) for seed in (0, 0, 1))
    assert one == same != other
    counts = [{i: int(m.sum()) for i, m in mask.layers.items()} for mask in (networks, one, other)]
    assert counts[0] == counts[1] == counts[2]
    assert one != networks
    whole = select_neurons(template, selector="layer_shuffled", fraction=0.2, per_layer=False)
    pooled = select_neurons(template, fraction=0.2, per_layer=False)
    assert [int(m.sum()) for m in whole.layers.values()] == [int(m.sum()) for m in pooled.layers.values()]


def test_surrogate_networks_are_those_of_a_discovery_that_shifts(templates, evidence):
    template = templates["llama"]
    found = evidence.surrogate(template)
    assert found.settings == template.settings | {"ica_surrogate": True}
    assert (found.threshold, found.site) == (template.threshold, template.site)
    assert select_neurons(template, [1], selector="surrogate", evidence=evidence) == select_neurons(found, [1])
    like = select_neurons(template, [0])
    control = select_neurons(template, [0], selector="surrogate", like=like, evidence=evidence)
    assert [int(m.sum()) for m in control.layers.values()] == [int(m.sum()) for m in like.layers.values()]


@pytest.mark.parametrize(
    ("selector", "words"),
    [
        ("contrast", "how much more the task uses them"),
        ("gradient_conflict", "their gradients on the task and on general text conflict"),
        ("surrogate", "of activations shifted in time"),
    ],
)
def test_a_run_selects_what_python_does(rows, tokenizer, tmp_path, selector, words):
    (tmp_path / "general.txt").write_text("\n".join(GENERAL))
    settings = {"ica_components": 3, "ica_rank": 16, "ica_max_tokens": 60, "ica_max_length": 32, "ica_percentile": 80}
    config = FunctionalNetworkConfig(
        ica_select=selector, ica_fraction=0.2, ica_datasets=[str(tmp_path / "general.txt")], **settings
    )
    trainer = FNSFTTrainer(
        model=tiny_model("llama"),
        args=sft_config(tmp_path / "out"),
        train_dataset=Dataset.from_list(rows[:8]),
        processing_class=tokenizer,
        network_config=config,
    )
    own = SelectorEvidence(tiny_model("llama"), tokenizer, task=rows[:8], general=GENERAL)
    template = trainer.network_template
    assert trainer.neuron_mask == select_neurons(template, selector=selector, fraction=0.2, evidence=own)
    trainer.save_model()
    assert words in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ica_select": "contrast", "ica_fraction": 0.1}, "would be the training data too; give general text"),
        ({"ica_select": "gradient_conflict", "ica_fraction": 0.1}, "give that text as ica_datasets"),
        ({"ica_select": "contrast"}, "needs ica_fraction"),
        ({"ica_select": "contrast", "ica_fraction": 0.1, "ica_component_ids": [0]}, "takes no networks"),
    ],
)
def test_a_selector_without_its_text_is_refused_before_anything_is_loaded(given, message, tmp_path):
    with pytest.raises(FNSFTError, match=message):
        FNSFTTrainer("no/model", sft_config(tmp_path), network_config=FunctionalNetworkConfig(**given))


def test_one_selector_with_two_names_is_one_config():
    one, other = (FunctionalNetworkConfig(ica_select=f"activation{end}", ica_fraction=0.1) for end in ("", "_rms"))
    assert one == other


def test_evidence_that_is_missing_is_named(templates, tokenizer):
    with pytest.raises(FNSFTError, match="give evidence=SelectorEvidence"):
        select_neurons(templates["llama"], selector="contrast", fraction=0.1)
    bare = SelectorEvidence(tiny_model("llama"), tokenizer)
    with pytest.raises(FNSFTError, match="give task and general to SelectorEvidence"):
        select_neurons(templates["llama"], selector="gradient_conflict", fraction=0.1, evidence=bare)
