"""Directions of the inputs of modules: what they are, and what a change off them does, on every architecture."""

import re

import pytest
import torch
from architectures import ARCHITECTURES
from helpers import VOCABULARY, tiny_model

from fnsft_trl.discovery.directions import LEADING, InputSums, KeptDirections, KeptText, orthonormal
from fnsft_trl.discovery.inputs import batches_of, shared_inputs
from fnsft_trl.errors import FNSFTError
from fnsft_trl.neurons.sites import find_neuron_sites, linear_shape


def sequences(count=6, seed=0, shortest=5):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, 14, (count,), generator=generator).tolist()
    return [torch.randint(2, VOCABULARY - 10, (length,), generator=generator).tolist() for length in lengths]


def linears(model):
    """All linear modules of the text model's blocks that text reaches."""
    blocks = {re.match(r".*?\.\d+(?=\.)", site.name)[0] for site in find_neuron_sites(model)}
    return sorted(
        {
            name
            for name, module in model.named_modules()
            if linear_shape(module) and any(name.startswith(f"{block}.") for block in blocks)
        }
    )


def inputs_of(model, module, texts):
    """What a module is given, one sequence at a time: first tokens and all others."""
    found = []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda _, args: found.append(args[0][0]))
    with torch.no_grad():
        for ids in texts:
            model(torch.tensor([ids]))
    handle.remove()
    return torch.stack([rows[0] for rows in found]).double(), [rows[1:].double() for rows in found]


def test_they_are_position_0_the_mean_and_the_eigenvectors_of_the_second_moment():
    model, text = tiny_model("llama"), KeptText(sequences())
    found = KeptDirections.find(model, ["model.layers.1.mlp.down_proj"], {"a": text}, leading=3, title=None)
    first, others = inputs_of(model, "model.layers.1.mlp.down_proj", text.sequences)
    others = torch.cat(others)
    (each,) = found.inputs
    assert torch.allclose(each.basis.T @ each.basis, torch.eye(5, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(each.mean, others.mean(0), atol=1e-5)
    assert abs(each.basis[:, 0] @ first.mean(0)) > (1 - 1e-6) * first.mean(0).norm()
    start = orthonormal(first.mean(0)[:, None], others.mean(0)[:, None])
    rest = others - others @ start @ start.T
    values, vectors = torch.linalg.eigh(rest.T @ rest)
    along = (vectors[:, -3:].T @ each.basis[:, LEADING:]).abs()
    assert torch.linalg.svdvals(along).min() > 1 - 1e-4
    assert torch.allclose((rest @ each.basis[:, LEADING:]).square().sum(0), values[-3:].flip(0), rtol=1e-3)


def test_sums_stay_where_they_began_wherever_a_layer_lies():
    """Of a model on several devices; `meta` stands for another one."""
    sums = InputSums(8, leading=2)
    sums.begin("meta")
    sums.add(torch.randn(2, 8), torch.randn(5, 8), 1.0, 1.0)
    assert {each.device.type for each in (sums.first, sums.mean, sums.second)} == {"meta"}


def test_a_text_counts_by_its_share_however_long_it_is():
    model, long, short = tiny_model("llama"), KeptText(sequences(8)), KeptText(sequences(2, seed=1))
    names = ["model.layers.0.mlp.up_proj"]
    both = KeptDirections.find(model, names, {"a": long, "b": short}, leading=2, title=None)
    alone = [KeptDirections.find(model, names, {"a": text}, leading=2, title=None) for text in (long, short)]
    expected = sum(each.inputs[0].mean for each in alone) / 2
    assert torch.allclose(both.inputs[0].mean, expected, atol=1e-6)
    uneven = {"a": KeptText(long.sequences, 3.0), "b": short}
    mean = KeptDirections.find(model, names, uneven, leading=2, title=None).inputs[0].mean
    assert torch.allclose(mean, (3 * alone[0].inputs[0].mean + alone[1].inputs[0].mean) / 4, atol=1e-6)


def test_wide_inputs_are_sketched_and_give_the_same_directions(monkeypatch):
    model, text = tiny_model("llama"), {"a": KeptText(sequences(20))}
    names = [f"model.layers.{layer}.mlp.down_proj" for layer in range(3)]
    whole = KeptDirections.find(model, names, text, leading=4, title=None)
    monkeypatch.setattr("fnsft_trl.discovery.directions._SQUARE", 4)
    sketched = KeptDirections.find(model, names, text, leading=4, title=None)
    for one, other in zip(whole.inputs, sketched.inputs, strict=True):
        assert (
            torch.linalg.svdvals(one.basis[:, :4].T @ other.basis[:, :4]).min() > 0.98
        )  # a stream is cut to its rank at every step


def test_fewer_leading_directions_are_the_first_of_more():
    model, text = tiny_model("gpt2"), {"a": KeptText(sequences())}
    names = ["transformer.h.1.mlp.c_proj"]
    few, many = (KeptDirections.find(model, names, text, leading=m, title=None).inputs[0].basis for m in (2, 9))
    assert torch.allclose(few, many[:, :4], atol=1e-6)


def test_modules_that_read_one_tensor_share_their_directions():
    model = tiny_model("llama")
    names = [name for name in linears(model) if ".1." in name]
    groups = shared_inputs(model, names, sequences()[0])
    assert sorted(map(sorted, groups)) == [
        ["model.layers.1.mlp.down_proj"],
        ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"],
        ["model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"],
        ["model.layers.1.self_attn.o_proj"],
    ]


def test_the_head_is_read_where_it_is_asked_for():
    found = KeptDirections.find(tiny_model("llama"), ["lm_head"], {"a": KeptText(sequences())}, leading=1, title=None)
    assert found.of("lm_head").width == 16


def test_energy_is_the_share_of_squared_norms(capsys):
    model, text = tiny_model("llama"), KeptText(sequences())
    names = ["model.layers.0.mlp.down_proj", "model.layers.2.mlp.gate_proj"]
    kept = KeptDirections.find(model, names, {"a": text}, leading=40, title=None)
    shares = kept.energy(model, text, [0, 1, 4, 100], title=None)
    expected = []
    for each in kept.inputs:
        rows = torch.cat(inputs_of(model, each.modules[0], text.sequences)[1])
        expected.append(float((rows @ each.basis[:, :4]).square().sum() / rows.square().sum()))
    assert shares[4] == pytest.approx(sum(expected) / 2, rel=1e-4)
    assert (shares[0], shares[100]) == (0, pytest.approx(1, abs=1e-5))
    assert shares[1] < shares[4]


def test_sinks_beside_position_0_are_counted_with_their_tokens():
    """Token 7 is given an activation that outgrows all others, as position 0 has it."""
    model = tiny_model("llama")
    texts = [[7, *ids, 7, *ids[:3]] for ids in sequences()]
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = 0
        model.model.embed_tokens.weight[7, 3] = 1e4
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[5] = layer.mlp.gate_proj.weight[5] = 0
            layer.mlp.up_proj.weight[5, 3] = layer.mlp.gate_proj.weight[5, 3] = 30.0
    names = [f"model.layers.{layer}.mlp.down_proj" for layer in range(3)]
    found = KeptDirections.find(model, names, {"a": KeptText(texts)}, leading=1, title=None).sinks["a"]
    assert found.ids == {7: len(texts)}
    assert found.count == len(texts)
    assert found.tokens == sum(len(ids) - 1 for ids in texts)
    calm = KeptDirections.find(tiny_model("llama"), names, {"a": KeptText(texts)}, leading=1, title=None)
    assert calm.sinks["a"].count == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_a_protected_module_answers_vectors_inside_as_before_on_every_architecture(architecture):
    model, text = architecture.model(), KeptText(sequences())
    kept = KeptDirections.find(model, linears(model), {"a": text}, leading=2, title=None)
    assert {name for each in kept.inputs for name in each.modules} == set(linears(model))
    generator = torch.Generator().manual_seed(0)
    for each in kept.inputs:
        inside = each.basis @ torch.randn(each.basis.shape[1], 3, generator=generator).double()
        for name in each.modules:
            n_in, n_out = linear_shape(model.get_submodule(name))
            assert n_in == each.width
            change = torch.randn(n_out, n_in, generator=generator).double()
            protected = change - (change @ each.basis) @ each.basis.T
            assert (protected @ inside).norm() < 1e-9 * (change @ inside).norm()


def test_what_cannot_be_read_is_said():
    model, text = tiny_model("llama"), {"a": KeptText(sequences())}
    with pytest.raises(FNSFTError, match=r"model.norm is a LlamaRMSNorm; only inputs of linear layers"):
        KeptDirections.find(model, ["model.norm"], text, leading=1, title=None)
    with pytest.raises(FNSFTError, match=r"no linear module"):
        KeptDirections.find(model, [], text, leading=1, title=None)
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[0, 0] = torch.nan
    with pytest.raises(FNSFTError, match=r"an input of model.layers.1.mlp.down_proj is NaN"):
        KeptDirections.find(model, ["model.layers.1.mlp.down_proj"], text, leading=1, title=None)


def test_batches_hold_every_sequence_once():
    texts = sequences(7)
    found = batches_of(texts, 3)
    assert [len(first) for _, first, _ in found] == [3, 3, 1]
    assert sum(len(others) for _, _, others in found) == KeptText(texts).tokens
