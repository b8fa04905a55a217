import pytest
import torch
import transformers as tf
from helpers import FAMILIES, VOCABULARY, tiny_model
from peft import LoraConfig, get_peft_model

from fnsft_trl import FNSFTError, find_neuron_sites
from fnsft_trl.neurons.sites import SITES, base_model


EXPECTED = {
    "llama": ("model.layers.{}.mlp.down_proj", ["gate_proj", "up_proj"]),
    "gpt2": ("transformer.h.{}.mlp.c_proj", ["c_fc"]),
    "phi3": ("model.layers.{}.mlp.down_proj", ["gate_up_proj"]),
    "opt": ("model.decoder.layers.{}.fc2", ["fc1"]),
}


def test_one_site_per_layer_with_its_projections(family):
    sites = find_neuron_sites(tiny_model(family))
    name, ups = EXPECTED[family]
    assert [site.name for site in sites] == [name.format(i) for i in range(3)]
    assert [site.layer for site in sites] == [0, 1, 2]
    assert {site.width for site in sites} == {40}
    assert [up.rpartition(".")[2] for up in sites[0].up_names] == ups


def test_output_site_counts_hidden_channels(family):
    assert {site.width for site in find_neuron_sites(tiny_model(family), kind="mlp_output")} == {16}


def test_layout_is_what_the_gradient_of_a_neuron_touches(family):
    """The activation of neuron j depends on exactly the rows of up and gate that the layout names."""
    model = tiny_model(family).train()
    site = find_neuron_sites(model)[1]
    for j in (0, 17, 39):
        seen = []
        hook = site.down.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        model(torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(j)))
        hook.remove()
        model.zero_grad()
        seen[0][..., j].sum().backward()
        for part in site.layout.slices:
            gradient = getattr(model.get_submodule(part.module_name), part.parameter).grad
            if part.side == "input":
                assert gradient is None or not gradient.any()  # the column of the down projection comes after it
                continue
            positions = gradient.movedim(part.dim, 0).flatten(1).any(1) if gradient.dim() > 1 else gradient != 0
            assert positions.nonzero().flatten().tolist() == sorted(part.indices(torch.tensor([j])).tolist())


def test_layout_of_the_down_projection_is_the_neurons_column(family):
    model = tiny_model(family)
    site = find_neuron_sites(model)[0]
    (part,) = [part for part in site.layout.slices if part.side == "input"]
    x = torch.zeros(1, 40)
    x[0, 7] = 1
    with torch.no_grad():
        column = site.down(x) - site.down(torch.zeros(1, 40))
        weight = site.down.weight.select(part.dim, 7)
    assert torch.allclose(column[0], weight, atol=1e-6)


@pytest.mark.parametrize("kind", SITES)
def test_sites_of_a_wrapped_model_are_its_own_under_other_names(family, kind):
    plain = find_neuron_sites(tiny_model(family), kind=kind)
    targets = {name for site in plain for name in site.layout.modules()}
    wrapped = find_neuron_sites(get_peft_model(tiny_model(family), LoraConfig(target_modules=targets)), kind=kind)
    assert [(s.layer, s.width) for s in wrapped] == [(s.layer, s.width) for s in plain]
    assert [s.name for s in wrapped] == [f"base_model.model.{s.name}" for s in plain]
    assert [s.layout.slices[-1].dim for s in wrapped] == [s.layout.slices[-1].dim for s in plain]
    assert all(hasattr(site.down, "lora_A") for site in wrapped)


def test_quantised_layers_are_read_by_their_attributes():
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny_model("llama")
    for block in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            layer = getattr(block.mlp, name)
            packed = bnb.nn.Linear4bit(layer.in_features, layer.out_features, quant_type="nf4")
            setattr(block.mlp, name, packed.to("cpu"))
    assert model.model.layers[0].mlp.down_proj.weight.shape != (16, 40)
    assert [site.width for site in find_neuron_sites(model)] == [40, 40, 40]


def test_equal_intermediate_and_hidden_size_is_understood():
    config = tf.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=9
    )
    sites = find_neuron_sites(tf.LlamaForCausalLM(config))
    assert [site.name.rpartition(".")[2] for site in sites] == ["down_proj", "down_proj"]
    assert [name.rpartition(".")[2] for name in sites[0].up_names] == ["gate_proj", "up_proj"]


def test_attention_output_is_no_site_even_when_heads_are_wider_than_the_model():
    config = tf.LlamaConfig(
        hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, head_dim=8, vocab_size=9
    )
    sites = find_neuron_sites(tf.LlamaForCausalLM(config))
    assert [site.name.rpartition(".")[2] for site in sites] == ["down_proj", "down_proj"]


@pytest.mark.parametrize("layers", ["0-1", [0, 1], "0:2"])
def test_layers_restrict_the_sites(layers):
    assert [site.layer for site in find_neuron_sites(tiny_model("llama"), layers=layers)] == [0, 1]


def test_what_is_not_understood_is_an_error_that_says_so():
    with pytest.raises(FNSFTError, match=r"'3' is outside 0-2"):
        find_neuron_sites(tiny_model("llama"), layers="3")
    with pytest.raises(FNSFTError, match="must be one of"):
        find_neuron_sites(tiny_model("llama"), kind="attention")
    with pytest.raises(FNSFTError, match="no MLP site found in ResNetModel"):
        find_neuron_sites(tf.ResNetModel(tf.ResNetConfig(hidden_sizes=[8, 8], depths=[1, 1], embedding_size=8)))
    with pytest.raises(FNSFTError, match="has no config"):
        find_neuron_sites(torch.nn.Linear(2, 2))
    moe = tf.MixtralConfig(
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=9,
        num_local_experts=2,
    )
    model = tf.MixtralForCausalLM(moe)
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj.to(torch.int8), requires_grad=False)
    with pytest.raises(FNSFTError, match=r"experts model\.layers\.0\.mlp\.experts .*: the module is quantised"):
        find_neuron_sites(model)
    del experts.is_concatenated
    with pytest.raises(FNSFTError, match="is not of the form that transformers' experts interface describes"):
        find_neuron_sites(model)


def test_a_block_without_its_mlp_is_an_error():
    model = tiny_model("llama")
    model.model.layers[1].mlp = torch.nn.Identity()
    with pytest.raises(FNSFTError, match=r"no MLP site found in block model\.layers\.1"):
        find_neuron_sites(model)


def test_blocks_without_attention_count_too():
    """In a hybrid model every block has an MLP, and layer numbers are block numbers."""
    model = tiny_model("llama")
    model.model.layers[1].self_attn = torch.nn.Conv1d(16, 16, 3)
    assert [site.name for site in find_neuron_sites(model)] == [f"model.layers.{i}.mlp.down_proj" for i in range(3)]


def test_a_model_with_an_adapter_loaded_by_transformers_is_read():
    model = tiny_model("llama")
    model.add_adapter(LoraConfig(target_modules=["up_proj"]))
    assert len(find_neuron_sites(model)) == 3
    assert base_model(model) is model


def test_families_are_all_here():
    assert set(EXPECTED) == set(FAMILIES)


@pytest.mark.parametrize("shared", ["mlp", "mlp.down_proj.weight", "mlp.up_proj.weight"])
def test_layers_that_share_weights_are_refused(shared):
    model = tiny_model("llama")
    holder, _, name = shared.rpartition(".")
    first, third = (layer.get_submodule(holder) for layer in (model.model.layers[0], model.model.layers[2]))
    setattr(third, name, getattr(first, name))
    with pytest.raises(FNSFTError, match="layers 0 and 2 share a weight"):
        find_neuron_sites(model)
