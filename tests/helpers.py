"""Tiny models, a tiny tokenizer and tiny data, all made here from seeds."""

import copy
import random
import string
import sys
from pathlib import Path

import torch
import transformers as tf
from processes import run_processes as run_processes  # scripts beside the tests take it from here
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from trl import SFTConfig

from fnsft_trl import NeuronMask, find_neuron_sites
from fnsft_trl.export import changed_neurons


TESTS = Path(__file__).parent
ROOT = TESTS.parent
FAMILIES = ("llama", "gpt2", "phi3", "opt")
VOCABULARY = 120


def tiny_model(family: str, *, seed: int = 0) -> torch.nn.Module:
    """A random model of 3 layers; llama has biases in its MLPs."""
    torch.manual_seed(seed)
    common = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    small = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, **common}
    if family == "llama":
        config = tf.LlamaConfig(intermediate_size=40, num_key_value_heads=1, mlp_bias=True, **small)
        model = tf.LlamaForCausalLM(config)
    elif family == "gpt2":
        config = tf.GPT2Config(n_embd=16, n_layer=3, n_head=2, n_inner=40, n_positions=128, **common)
        model = tf.GPT2LMHeadModel(config)
    elif family == "phi3":
        model = tf.Phi3ForCausalLM(tf.Phi3Config(intermediate_size=40, num_key_value_heads=1, **small))
    elif family == "opt":
        config = tf.OPTConfig(
            ffn_dim=40, activation_function="gelu", word_embed_proj_dim=16, max_position_embeddings=128, **small
        )
        model = tf.OPTForCausalLM(config)
    # Dropout would make a resumed run differ by its random numbers; it has its own tests in the libraries.
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if family == "opt":
        for layer in model.model.decoder.layers:
            layer.dropout = 0.0
        model.model.decoder.dropout = 0.0
    with torch.no_grad():  # so that biases count, and activations are not all alike
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif parameter.dim() == 2:
                parameter.mul_(4)
    return model.eval()


def medium_model(dtype=torch.float32) -> torch.nn.Module:
    """A random Llama of 2 layers, wide enough for optimizer state in 8 bits (from 4,096 entries a parameter on)."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    return tf.LlamaForCausalLM(tf.LlamaConfig(mlp_bias=True, **shape, **tokens)).to(dtype).eval()


def medium_experts(dtype=torch.float32) -> torch.nn.Module:
    """A random Mixtral of 2 layers with 3 experts in each, of the widths of [`medium_model`]."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    model = tf.MixtralForCausalLM(tf.MixtralConfig(**shape, **experts, **tokens)).to(dtype).eval()
    model.set_experts_implementation("eager")  # the default one does not compute in float64
    return model


def tiny_tokenizer() -> tf.PreTrainedTokenizerFast:
    """Byte-pair tokens over letters and common endings, with a chat template."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>", "<unk>"],
        initial_alphabet=list(string.ascii_letters + string.digits + " .:?\n"),
        show_progress=False,
    )
    core.train_from_iterator([row["prompt"] + row["completion"] for row in tiny_rows()], trainer)
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return tokenizer


def tiny_rows(count: int = 48, seed: int = 0) -> list[dict]:
    """Prompts of a few syllables and completions that follow from them."""
    draw = random.Random(seed)
    syllables = ["ba", "ko", "ri", "ten", "su", "mo"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(count)]
    return [{"prompt": f"Say {word}:", "completion": f" {word[::-1]}."} for word in words]


def sft_config(directory, **changes) -> SFTConfig:
    """An SFTConfig for a few quick steps on the CPU."""
    settings = {
        "output_dir": str(directory),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_steps": 4,
        "logging_steps": 1,
        "max_length": 32,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 3,
    }
    return SFTConfig(**{**settings, **changes})


def assert_only_these_changed(before: dict, after: dict, sites: list, trainable: NeuronMask) -> None:
    """The neurons that changed are the trainable ones, and no other weight differs in a single bit."""
    changed, others = changed_neurons(sites, before, after)
    assert others == []
    assert changed == trainable


def changed_entries(before: dict, after: dict) -> dict[str, torch.Tensor]:
    """Parameter name -> bool tensor of the entries that differ, for every parameter in which any does."""
    assert before.keys() == after.keys()
    return {name: before[name] != after[name] for name in before if not torch.equal(before[name], after[name])}


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of a model's weights, on the CPU."""
    return {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}


def random_mask(model, kind, share=0.4, seed=0):
    """A random set of neurons of all layers."""
    generator = torch.Generator().manual_seed(seed)
    sites = find_neuron_sites(model, kind=kind)
    return NeuronMask({site.layer: torch.rand(site.width, generator=generator) < share for site in sites}, kind)


@torch.no_grad()
def logits(model, ids):
    """A model's logits."""
    return model(ids).logits


@torch.no_grad()
def zeroed(model, mask):
    """A copy in which the neurons' outgoing weights are zero."""
    model = copy.deepcopy(model)
    for site in find_neuron_sites(model, kind=mask.site):
        for part in site.layout.slices:
            if part.side == "input" or mask.site == "mlp_output":
                parameter = part.tensor(model)
                parameter.masked_fill_(part.mask(mask.indices(site.layer), parameter), 0)
    return model


# A GGUF converter that only notes how it was called.
FAKE_CONVERTER = f"""\
#!{sys.executable}
import json, pathlib, sys
source = pathlib.Path(sys.argv[1])
if (source / "broken").exists():
    sys.exit("INFO: reading\\nModel ThatForCausalLM is not supported")
eos = json.loads((source / "config.json").read_text()).get("eos_token_id")
call = {{"arguments": sys.argv[2:], "files": sorted(path.name for path in source.iterdir()), "eos": eos}}
pathlib.Path(sys.argv[sys.argv.index("--outfile") + 1]).write_text(json.dumps(call))
"""


def write_converter(path) -> None:
    """Put the converter at a path, as a program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(FAKE_CONVERTER)
    path.chmod(0o755)


def instead(words: list[str], *more: str) -> list[str]:
    """A command line with some options in the place of what it gives them, since an option can stand once."""
    flags, kept, is_dropped = {word for word in more if word.startswith("--")}, [], False
    for word in words:
        is_dropped = word in flags if word.startswith("--") else is_dropped
        kept += [] if is_dropped else [word]
    return [*kept, *more]


def offloading(directory: Path) -> dict:
    """Arguments of `from_pretrained` by which layer 1 of the tiny Llama is loaded from the disk for each use."""
    places = ("model.embed_tokens", "model.layers.0", "model.layers.2", "model.norm", "model.rotary_emb", "lm_head")
    device_map = dict.fromkeys(places, "cpu") | {"model.layers.1": "disk"}
    return {"device_map": device_map, "offload_folder": str(directory / "offload")}


def few_energy_tokens(monkeypatch) -> None:
    """Of a real model: measure on little text what the directions hold that a run protects."""
    for module in ("protected_bases", "protection"):
        monkeypatch.setattr(f"fnsft_trl.training.{module}.ENERGY_TOKENS", 64)
