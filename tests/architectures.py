"""Every architecture the package is tested on: a tiny random model of each, and what is expected of it."""

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as tf
from helpers import VOCABULARY


@dataclass(frozen=True)
class Architecture:
    """One model class.

    Attributes:
        name (`str`): class name of the model.
        config (`dict`): of its config class.
        mlp (`str`): form of its MLPs, in words.
        site (`str` or `tuple[str, ...]`): the name expected of its sites, `{}` for the number of the block; several if
            blocks differ.
        widths (`tuple[int, ...]`): the number of neurons expected of each layer.
        experts (`tuple[int, ...]`): how many of them belong to routed experts.
        variant (`str`): tells two entries of one class apart.
    """

    name: str
    config: dict[str, Any] = field(repr=False)
    mlp: str
    site: str | tuple[str, ...]
    widths: tuple[int, ...] = (24, 24)
    experts: tuple[int, ...] = ()
    variant: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.variant}".strip()

    @property
    def dense(self) -> bool:
        """Whether no layer is a mixture of experts."""
        return not any(self.experts)

    def model(self, seed: int = 0) -> torch.nn.Module:
        """A random model, of weights large enough that every neuron counts."""
        torch.manual_seed(seed)
        model_class = getattr(tf, self.name)
        model = model_class(model_class.config_class(**self.config))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(0, 0.1)
                elif parameter.dim() > 1:
                    parameter.normal_(0, 0.1 if "embed" in name else 0.2)
        return model.eval()


HIDDEN = 16
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
BLOCKS = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
SMALL = {**TOKENS, **BLOCKS, "hidden_size": HIDDEN, "intermediate_size": 24}
GROUPED = {**SMALL, "num_key_value_heads": 1}
GPT2 = {**TOKENS, "n_embd": HIDDEN, "n_layer": 2, "n_head": 2, "n_inner": 24, "n_positions": 64}
MIXED = {**GROUPED, "intermediate_size": 8, "num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8}
QWEN_MIXED = {**GROUPED, "moe_intermediate_size": 8, "num_experts": 3, "num_experts_per_tok": 2, "head_dim": 8}
DEEPSEEK = {
    **{**SMALL, "num_hidden_layers": 3, "num_key_value_heads": 2, "first_k_dense_replace": 1},
    **{"moe_intermediate_size": 8, "n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"n_group": 2, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8},
    **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
}
T5 = {
    **{**TOKENS, "d_model": HIDDEN, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2},
    "decoder_start_token_id": 0,
}
BART = {
    **{**TOKENS, "d_model": HIDDEN, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24},
    **{"decoder_ffn_dim": 20, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
    **{"max_position_embeddings": 64, "decoder_start_token_id": 1},
}
VISION = {"hidden_size": HIDDEN, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**VISION, "image_size": 8, "patch_size": 4}

GATED = "gate, up, down"
FUSED = "gate and up in one, down"
PLAIN = "up, down"
BESIDE = "up, down, beside attention"
EXPERTS = "routed experts"

LLAMA_DOWN = "model.layers.{}.mlp.down_proj"
VLM_DOWN = "model.language_model.layers.{}.mlp.down_proj"
T5_DOWN = ("encoder.block.{}.layer.1.DenseReluDense.wo", "decoder.block.{}.layer.2.DenseReluDense.wo")
BART_DOWN = ("model.encoder.layers.{}.fc2", "model.decoder.layers.{}.fc2")

ARCHITECTURES = [
    Architecture("LlamaForCausalLM", GROUPED, GATED, LLAMA_DOWN),
    Architecture("MistralForCausalLM", GROUPED, GATED, LLAMA_DOWN),
    Architecture("Qwen2ForCausalLM", GROUPED, GATED, LLAMA_DOWN),
    Architecture("Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}, GATED, LLAMA_DOWN),
    Architecture("Gemma2ForCausalLM", {**GROUPED, "head_dim": 12, "sliding_window": 8}, GATED, LLAMA_DOWN),
    Architecture("Gemma3ForCausalLM", {**GROUPED, "head_dim": 12, "sliding_window": 8}, GATED, LLAMA_DOWN),
    Architecture("SmolLM3ForCausalLM", GROUPED, GATED, LLAMA_DOWN),
    Architecture("Olmo2ForCausalLM", GROUPED, GATED, LLAMA_DOWN),
    Architecture("Phi3ForCausalLM", GROUPED, FUSED, LLAMA_DOWN),
    Architecture("GPT2LMHeadModel", GPT2, "up, down, stored as (in, out)", "transformer.h.{}.mlp.c_proj"),
    Architecture("Starcoder2ForCausalLM", GROUPED, PLAIN, "model.layers.{}.mlp.c_proj"),
    Architecture(
        "OPTForCausalLM",
        {**SMALL, "ffn_dim": 24, "word_embed_proj_dim": HIDDEN, "activation_function": "gelu"},
        "up, down, directly in the block",
        "model.decoder.layers.{}.fc2",
    ),
    Architecture("PhiForCausalLM", SMALL, BESIDE, "model.layers.{}.mlp.fc2"),
    Architecture("GPTJForCausalLM", {**GPT2, "rotary_dim": 4}, BESIDE, "transformer.h.{}.mlp.fc_out"),
    Architecture("GPTNeoXForCausalLM", SMALL, BESIDE, "gpt_neox.layers.{}.mlp.dense_4h_to_h"),
    Architecture(
        "BloomForCausalLM",
        {**TOKENS, "hidden_size": HIDDEN, "n_layer": 2, "n_head": 2},
        PLAIN,
        "transformer.h.{}.mlp.dense_4h_to_h",
        widths=(64, 64),
    ),
    Architecture("FalconForCausalLM", {**SMALL, "ffn_hidden_size": 24}, BESIDE, "transformer.h.{}.mlp.dense_4h_to_h"),
    Architecture(
        "T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gelu"}, PLAIN, T5_DOWN, widths=(24, 24, 24, 24)
    ),
    Architecture(
        "T5ForConditionalGeneration",
        {**T5, "feed_forward_proj": "gated-gelu"},
        GATED,
        T5_DOWN,
        widths=(24, 24, 24, 24),
        variant="v1.1",
    ),
    Architecture(
        "BartForConditionalGeneration", BART, "up, down, directly in the block", BART_DOWN, widths=(24, 24, 20, 20)
    ),
    Architecture("BertForMaskedLM", SMALL, PLAIN, "bert.encoder.layer.{}.output.dense"),
    Architecture("MixtralForCausalLM", MIXED, EXPERTS, "model.layers.{}.mlp", widths=(24, 24), experts=(24, 24)),
    Architecture(
        "Qwen2MoeForCausalLM",
        {**QWEN_MIXED, "shared_expert_intermediate_size": 12},
        f"{EXPERTS} and a shared one",
        "model.layers.{}.mlp",
        widths=(36, 36),
        experts=(24, 24),
    ),
    Architecture(
        "Qwen3MoeForCausalLM",
        {**QWEN_MIXED, "mlp_only_layers": [0]},
        f"{EXPERTS}; some layers dense",
        ("model.layers.0.mlp.down_proj", "model.layers.1.mlp"),
        widths=(24, 24),
        experts=(0, 24),
    ),
    Architecture(
        "GptOssForCausalLM",
        MIXED,
        f"{EXPERTS}, stored as (in, out), gate and up take turns, biases",
        "model.layers.{}.mlp",
        widths=(24, 24),
        experts=(24, 24),
    ),
    Architecture(
        "DeepseekV3ForCausalLM",
        DEEPSEEK,
        f"{EXPERTS} and a shared one; first layers dense",
        ("model.layers.0.mlp.down_proj", "model.layers.1.mlp", "model.layers.2.mlp"),
        widths=(24, 40, 40),
        experts=(0, 32, 32),
    ),
    Architecture(
        "GraniteMoeForCausalLM",
        MIXED,
        EXPERTS,
        "model.layers.{}.block_sparse_moe",
        widths=(24, 24),
        experts=(24, 24),
    ),
    Architecture(
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**GROUPED, "head_dim": 12, "sliding_window": 8},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": 118,
            "boi_token_index": 117,
            "eoi_token_index": 116,
        },
        f"{GATED} of the text model",
        VLM_DOWN,
    ),
    Architecture(
        "LlavaForConditionalGeneration",
        {
            "text_config": {**GROUPED, "model_type": "llama"},
            "vision_config": {**VISION, "model_type": "clip_vision_model"},
            "image_token_index": 118,
        },
        f"{GATED} of the text model",
        VLM_DOWN,
    ),
    Architecture(
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {**GROUPED, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
            "vision_config": {"depth": 2, "embed_dim": 16, "num_heads": 2, "hidden_size": HIDDEN, "mlp_ratio": 2},
            "image_token_id": 118,
            "video_token_id": 117,
            "vision_start_token_id": 116,
            "vision_end_token_id": 115,
        },
        f"{GATED} of the text model",
        VLM_DOWN,
    ),
]


def architectures_table() -> str:
    """The table of the documentation: what is tested on which model."""
    lines = [
        "| model | MLP | sites | discovery, masks | `neuron_delta` | `lora` | `full` |",
        "|---|---|---|---|---|---|---|",
    ]
    for architecture in ARCHITECTURES:
        names = [architecture.site] if isinstance(architecture.site, str) else architecture.site
        sites = ", ".join(f"`{name.format('N')}`" for name in names)
        lora = "exact" if architecture.dense else "exact, by `target_parameters`"
        lines.append(f"| {architecture} | {architecture.mlp} | {sites} | yes | exact | {lora} | exact |")
    return "\n".join(lines)
