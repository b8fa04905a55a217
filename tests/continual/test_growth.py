"""Growing protection: what stages have learnt, and general text, is what later changes are orthogonal to."""

import pytest
import torch
from datasets import Dataset
from helpers import sft_config, tiny_model, tiny_rows

from fnsft_trl import FNSFTError, FNSFTTrainer, ProtectionConfig
from fnsft_trl.continual.growth import GrowingDirections, free_directions, say_free, text_of
from fnsft_trl.discovery.directions import LEADING, InputDirections, KeptDirections
from fnsft_trl.discovery.inputs import module_named


@pytest.fixture
def general(tmp_path):
    (tmp_path / "general.txt").write_text("".join(f"The red fox went {n} times to the sea\n" for n in range(20)))
    return f"general={tmp_path / 'general.txt'}"


@pytest.mark.parametrize("dims", [2, 0.8])
def test_the_third_stage_is_orthogonal_to_both_tasks_before_it_and_to_general_text(tokenizer, tmp_path, general, dims):
    model, bases, counts = tiny_model("llama"), [], []
    for stage in (1, 2, 3):
        given = {"protect_datasets": [general], "protect_dims": dims, "protect_tokens": 60}
        if stage > 1:
            given = {"protect_basis": str(tmp_path / f"{stage - 1}" / "grown")}
        trainer = FNSFTTrainer(
            model=model,
            args=sft_config(tmp_path / f"{stage}", learning_rate=1e-2, seed=stage),
            train_dataset=Dataset.from_list(tiny_rows(8, seed=stage)),
            processing_class=tokenizer,
            protection=ProtectionConfig(protect="subspace", **given),
        )
        start = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
        trainer.train()
        kept, text = trainer.protection.bases.kept, text_of(trainer.task_dataset, 40)
        assert text.tokens == 40
        for before in bases:  # general text, and each task before this one
            for each in before.inputs:
                weight = module_named(trainer.model, each.modules[0]).weight
                change = (weight - start[f"{each.modules[0]}.weight"]).detach().double()
                assert change.norm() > 0
                assert (change @ each.basis).norm() < 1e-4 * change.norm()
        grown = GrowingDirections.after(kept, trainer.model, text, dims=dims, title=None)
        modules = [each.modules[0] for each in kept.inputs]
        own = KeptDirections.find(trainer.model, modules, {"task": text}, leading=2, title=None)
        bases += [kept, own if dims == 2 else grown.kept]
        grown.save(tmp_path / f"{stage}")
        counts.append([each.basis.shape[1] for each in grown.kept.inputs])
        for each in grown.kept.inputs:
            torch.testing.assert_close(each.basis.T @ each.basis, torch.eye(each.basis.shape[1], dtype=torch.float64))
    assert all(first <= second <= third for first, second, third in zip(*counts, strict=True))
    assert sum(counts[0]) < sum(counts[2])


def test_by_default_half_of_a_narrow_input_is_added_and_a_full_one_is_refused(tokenizer):
    model = tiny_model("llama")
    name = "model.layers.0.mlp.up_proj"
    width = module_named(model, name).in_features
    text = text_of([{"input_ids": list(range(5, 60))}] * 4, 200)
    protected = KeptDirections((InputDirections((name,), torch.zeros(width, 0).double(), torch.zeros(width)),))
    grown = GrowingDirections.after(protected, model, text, title=None)
    assert grown.added <= LEADING + width // 2
    with pytest.raises(FNSFTError, match="a later one could learn nothing"):
        GrowingDirections.after(protected, model, text, dims=width, title=None)


def test_what_is_left_is_counted_and_said_where_it_is_little(log):
    def kept(*counts):
        each = [InputDirections((f"m{n}",), torch.eye(20)[:, :n].double(), torch.zeros(20)) for n in counts]
        return KeptDirections(tuple(each))

    free = free_directions(kept(5, 19))
    assert free == {"fewest": 1, "of": 20, "share": pytest.approx(0.05), "module": "m19", "scarce": 1, "inputs": 2}
    say_free(free)
    assert "1 of 20 directions (5%) are free" in log.text
    assert "under a tenth of the directions are free at 1 of 2 inputs" in log.text
    log.clear()
    say_free(free_directions(kept(5, 18)))
    assert "2 of 20 directions (10%)" in log.text
    assert "under a tenth" not in log.text
