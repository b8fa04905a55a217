"""What a model to score is found by, and what is said where there is none."""

import json

import pytest
import torch
from helpers import logits, tiny_model
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from transformers import T5Config, T5ForConditionalGeneration

from fnsft_trl import FNSFTError, NeuronTunerConfig
from fnsft_trl.evaluation.evaluated import EvaluatedModel


IDS = torch.arange(3, 15)[None]


@pytest.fixture(params=[NeuronTunerConfig, LoraConfig], ids=["deltas", "lora"])
def adapter(request, tmp_path, model_dir, tokenizer):
    """The directory of an adapter, and its model."""
    options = {"neurons": {"1": "0-9"}} if request.param is NeuronTunerConfig else {"target_modules": ["up_proj"]}
    tuned = get_peft_model(tiny_model("llama"), request.param(task_type="CAUSAL_LM", **options)).eval()
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    tuned.peft_config["default"].base_model_name_or_path = str(model_dir)
    tuned.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned", tuned


def test_an_adapter_is_found_in_a_directory_and_on_the_hub(adapter, hub):
    directory, tuned = adapter
    api, repo = HfApi(), f"alice/{tuned.peft_config['default'].peft_type.value}"
    api.create_repo(repo)
    api.upload_folder(repo_id=repo, folder_path=directory)
    api.create_repo("alice/whole")
    tiny_model("gpt2").save_pretrained(directory.parent / "whole")
    api.upload_folder(repo_id="alice/whole", folder_path=directory.parent / "whole")
    for place in (str(directory), repo):
        found = EvaluatedModel.find(place, name="tuned")
        assert torch.equal(logits(found.load(), IDS), logits(tuned, IDS))
        assert found.load_tokenizer().chat_template
        assert torch.equal(logits(found.base().load(), IDS), logits(tiny_model("llama"), IDS))
        assert (found.name, found.masked()) == ("tuned", None)
        assert found.about(found.load())["kind"] == "adapter"
    whole = EvaluatedModel.find("alice/whole", name="gpt", revision="main")
    assert torch.equal(logits(whole.load(), IDS), logits(tiny_model("gpt2"), IDS))
    assert (whole.base(), whole.about(whole.load())["kind"], whole.name) == (None, "model", "gpt")
    with pytest.raises(FNSFTError, match="the model 'alice/whole' has no tokenizer that can be loaded"):
        whole.load_tokenizer()


def test_an_outline_has_the_structure_and_no_weights(adapter, model_dir):
    for place in (adapter[0], model_dir):
        outline = EvaluatedModel.find(str(place)).outline()
        assert outline.state_dict().keys() == tiny_model("llama").state_dict().keys()
        assert all(parameter.is_meta for parameter in outline.parameters())


def test_what_continues_no_text_is_refused(tmp_path, adapter):
    small = {"vocab_size": 50, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(**small)).save_pretrained(tmp_path / "t5")
    with pytest.raises(FNSFTError, match="t5 is a T5ForConditionalGeneration, which has no generation config or"):
        EvaluatedModel.find(str(tmp_path / "t5"))
    file = adapter[0] / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"task_type": "SEQ_CLS"}))
    with pytest.raises(FNSFTError, match="tuned is a AutoModelForSequenceClassification, which"):
        EvaluatedModel.find(str(adapter[0]))


def test_a_record_that_was_changed_is_noticed(tmp_path, model_dir, templates):
    tiny_model("llama").save_pretrained(tmp_path)
    templates["llama"].save_pretrained(tmp_path / "functional_networks")
    record = {"network_config": {"ica_layers": "all", "ica_site": "mlp_intermediate"}, "mask_mode": "lesion"}
    record |= {"neurons": {"0": "1-3"}, "selected": {"sha256": "0" * 64}, "trainable": {"sha256": "0" * 64}}
    (tmp_path / "functional_networks" / "selection.json").write_text(json.dumps(record))
    found = EvaluatedModel.find(str(tmp_path)).masked()
    with pytest.raises(FNSFTError, match=r"do not have the SHA-256 that stands there"):
        found.load()
    (tmp_path / "functional_networks" / "selection.json").write_text("{")
    with pytest.raises(FNSFTError, match=r"selection.json cannot be read"):
        EvaluatedModel.find(str(tmp_path))
