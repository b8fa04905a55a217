"""A toy transformer in which a known set of neurons carries a known function."""

import torch
import transformers as tf

from fnsft_trl import NeuronMask


CUES = range(10, 18)  # each of these tokens is followed by TARGET; all other tokens are drawn at random
TARGET = 5
TOKENS = range(20, 52)
LAYERS, WIDTH, HIDDEN = 3, 160, 64
PLANTED_LAYER = 1
PLANTED = range(20, 28)  # neurons that know it
LOUD = range(40, 72)  # neurons as loud as they, each at one other token, that nothing depends on


def planted_model(seed: int = 0) -> torch.nn.Module:
    """The planted neurons of one layer see a direction that all cues share, and write the target into the output."""
    torch.manual_seed(seed)
    config = tf.LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    model = tf.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.02)
        directions = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN))[0].T  # rows are orthonormal
        cue, target, *others = directions
        embedding = model.model.embed_tokens.weight
        embedding.copy_(torch.randn(64, HIDDEN) * 0.05)
        for token in CUES:
            embedding[token] += cue
        for token, direction in zip(TOKENS, others, strict=False):
            embedding[token] += direction
        mlp = model.model.layers[PLANTED_LAYER].mlp
        for neuron in PLANTED:
            mlp.gate_proj.weight[neuron] = mlp.up_proj.weight[neuron] = 0.4 * cue
            mlp.down_proj.weight[:, neuron] = 0.25 * target
        for neuron, direction in zip(LOUD, others, strict=False):
            mlp.gate_proj.weight[neuron] = mlp.up_proj.weight[neuron] = 0.8 * direction
            mlp.down_proj.weight[:, neuron] *= 0.05
        model.lm_head.weight[TARGET] = 4 * target
    return model


def planted_texts(count: int = 24, length: int = 64, seed: int = 0) -> list[dict]:
    """Rows of token ids."""
    random = torch.Generator().manual_seed(seed)

    def draw(among: range) -> int:
        return among[int(torch.randint(len(among), (), generator=random))]

    rows = []
    for _ in range(count):
        ids = []
        while len(ids) < length:
            is_cue = float(torch.rand((), generator=random)) < 0.2
            ids += [draw(CUES), TARGET] if is_cue else [draw(TOKENS)]
        rows.append({"input_ids": ids[:length]})
    return rows


def planted_mask() -> NeuronMask:
    """The planted neurons."""
    layers = {layer: torch.zeros(WIDTH, dtype=torch.bool) for layer in range(LAYERS)}
    layers[PLANTED_LAYER][list(PLANTED)] = True
    return NeuronMask(layers)
