"""Exports of adapters on every kind of model: what is written is what was trained, with head, labels and tokens."""

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers as tf
from architectures import ARCHITECTURES, BART, GPT2, GROUPED, SMALL, T5
from helpers import VOCABULARY, tiny_tokenizer
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model

from fnsft_trl import FNSFTError, NeuronMask, NeuronTunerConfig, find_neuron_sites, to_plain_lora, verify_merge
from fnsft_trl.export import to_merged
from fnsft_trl.tuner.saved import SavedAdapter


NEURONS = {"0": "0-4,9", "1": "3"}


@dataclass(frozen=True)
class Kind:
    """A class of models that is trained, and the class that its checkpoint was saved as."""

    name: str
    saved_as: str
    task: str | None
    config: dict
    embedding: str
    attention: str = "q_proj"
    head: str | None = None

    @property
    def model_class(self):
        return getattr(tf, self.name)


LLAMA = {"config": GROUPED, "embedding": "embed_tokens"}
KINDS = [
    Kind("LlamaForCausalLM", "LlamaForCausalLM", "CAUSAL_LM", **LLAMA, head="lm_head"),
    Kind("LlamaForCausalLM", "LlamaForCausalLM", None, **LLAMA, head="lm_head"),
    Kind("LlamaForSequenceClassification", "LlamaForCausalLM", "SEQ_CLS", **LLAMA),
    Kind("LlamaForSequenceClassification", "LlamaForSequenceClassification", "SEQ_CLS", **LLAMA),
    Kind("LlamaForSequenceClassification", "LlamaForCausalLM", None, **LLAMA, head="score"),
    Kind("LlamaForTokenClassification", "LlamaForCausalLM", "TOKEN_CLS", **LLAMA),
    Kind("LlamaForQuestionAnswering", "LlamaForQuestionAnswering", "QUESTION_ANS", **LLAMA),
    Kind("LlamaModel", "LlamaForCausalLM", "FEATURE_EXTRACTION", **LLAMA),
    Kind("GPT2ForSequenceClassification", "GPT2LMHeadModel", "SEQ_CLS", GPT2, "wte", "c_attn"),
    Kind("BertForMaskedLM", "BertForMaskedLM", None, SMALL, "word_embeddings", "query"),
    Kind(
        "BertForSequenceClassification", "BertForSequenceClassification", "SEQ_CLS", SMALL, "word_embeddings", "query"
    ),
    Kind("T5ForConditionalGeneration", "T5ForConditionalGeneration", "SEQ_2_SEQ_LM", T5, "shared", "q"),
    Kind("BartForConditionalGeneration", "BartForConditionalGeneration", "SEQ_2_SEQ_LM", BART, "shared"),
    Kind("BartForSequenceClassification", "BartForConditionalGeneration", "SEQ_CLS", BART, "shared"),
    *(
        Kind(found.name, found.name, "CAUSAL_LM", found.config, "embed_tokens", head="lm_head")
        for found in ARCHITECTURES
        if str(found) in ("LlavaForConditionalGeneration", "MixtralForCausalLM", "Qwen3ForCausalLM")
    ),
]


def made(kind: Kind, name: str, *, tied: bool, labels: int = 2):
    """A random model of a class with the config of a kind."""
    torch.manual_seed(0)
    model_class = getattr(tf, name)
    given = copy.deepcopy(kind.config)
    config = model_class.config_class(**given, num_labels=labels)
    config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = tied
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model


def trained(model, config):
    """An adapter with random weights on a base model."""
    model = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@torch.no_grad()
def outputs(model):
    """What a model computes first, be it logits or hidden states."""
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = 1  # of its token, BART's classifier takes the hidden state
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder and "Classification" not in type(getattr(model, "base_model", model)).__name__:
        inputs["decoder_input_ids"] = ids
    return model.eval()(**inputs).to_tuple()[0].clone()


(LLAVA,) = (kind for kind in KINDS if kind.name == "LlavaForConditionalGeneration")
EXTRAS = ("nothing", "lora", "head", "embedding", "tokens")


def adapter_config(kind: Kind, method: str, extra: str, added: int):
    more = {}
    if extra == "head":
        more["modules_to_save"] = [kind.head]
    elif extra == "embedding":
        more["modules_to_save"] = [kind.embedding]
    elif extra == "tokens":
        more["trainable_token_indices"] = {kind.embedding: [5, *range(VOCABULARY, VOCABULARY + added)]}
    if method == "lora":
        return LoraConfig(r=2, target_modules=[kind.attention], task_type=kind.task, **more)
    if extra == "lora":
        more["lora"] = {"r": 2, "target_modules": [kind.attention]}
    return NeuronTunerConfig(neurons=NEURONS, task_type=kind.task, **more)


def is_lost(kind: Kind, extra: str, added: int, tied: bool) -> bool:
    """Whether the adapter's file lacks something that was trained with, so that an export would make it up."""
    if kind.name == "LlamaForSequenceClassification" and kind.task is None:
        return extra != "head"  # a new head, which PEFT saves by itself where it is told the task
    if kind.name == "BartForSequenceClassification":
        return True  # and where its name is one of two
    if kind.model_class.config_class().is_encoder_decoder and extra == "embedding":
        return True  # the encoder and the decoder go on with the weight that was copied
    # PEFT sees that there are new tokens, and saves the embeddings, only where all of the model is for text.
    return kind.name == "LlavaForConditionalGeneration" and added > 0 and (extra != "tokens" or not tied)


@pytest.mark.slow
@settings(max_examples=80)
@given(
    kind=st.sampled_from(KINDS),
    method=st.sampled_from(["neuron_delta", "lora"]),
    extra=st.sampled_from(EXTRAS),
    added=st.sampled_from([0, 2]),
    tied=st.booleans(),
    labels=st.integers(1, 4),
)
@example(LLAVA, "neuron_delta", "embedding", 2, True, 2)
@example(LLAVA, "lora", "head", 2, True, 2)
@example(LLAVA, "neuron_delta", "tokens", 2, True, 2)
@example(KINDS[0], "lora", "embedding", 0, True, 2)
def test_what_is_exported_computes_what_was_trained(kind, method, extra, added, tied, labels):
    assume(extra != "head" or kind.head)
    assume(tied or not kind.model_class.config_class().is_encoder_decoder)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        made(kind, kind.saved_as, tied=tied).save_pretrained(root / "base")
        tokenizer = tiny_tokenizer()
        tokenizer.save_pretrained(root / "base")
        tokenizer.add_tokens([f"<new {i}>" for i in range(added)])

        def base():
            torch.manual_seed(1)  # of the head and of new rows
            model = kind.model_class.from_pretrained(root / "base", num_labels=labels, ignore_mismatched_sizes=True)
            if added:
                model.resize_token_embeddings(VOCABULARY + added)
            return model

        model = trained(base(), adapter_config(kind, method, extra, added))
        expected = outputs(model)
        model.save_pretrained(root / "adapter")
        tokenizer.save_pretrained(root / "adapter")
        if is_lost(kind, extra, added, tied):
            with pytest.raises(FNSFTError):
                to_merged(root / "adapter", root / "merged")
            assert not (root / "merged").exists()
            return

        to_merged(root / "adapter", root / "merged")
        merged = kind.model_class.from_pretrained(root / "merged")
        torch.testing.assert_close(outputs(merged), expected, atol=1e-5, rtol=1e-4)
        saved = SavedAdapter.read(root / "adapter")
        assert torch.equal(outputs(saved.load_onto(saved.load_base())), expected)
        if method == "lora":
            return
        widths = {site.layer: site.width for site in find_neuron_sites(merged)}
        neurons = NeuronMask.from_ranges(NEURONS, widths, "mlp_intermediate")
        assert verify_merge(root / "base", root / "merged", root / "adapter") == neurons

        to_plain_lora(root / "adapter", root / "plain")
        plain = PeftModel.from_pretrained(base(), root / "plain")
        torch.testing.assert_close(outputs(plain), expected, atol=1e-5, rtol=1e-4)
        assert len(tf.AutoTokenizer.from_pretrained(root / "plain")) == len(tokenizer)
