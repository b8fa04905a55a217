"""A model of images and text trains end to end: its language MLPs are masked and trained, and nothing else."""

import copy

import pytest
import transformers as tf
from architectures import ARCHITECTURES
from datasets import Dataset
from helpers import sft_config, state
from peft import LoraConfig, PeftModel

from fnsft_trl import (
    FNSFTError,
    FNSFTTrainer,
    FunctionalNetworkConfig,
    discover_networks,
    find_neuron_sites,
    to_trl_format,
)
from fnsft_trl.cli import main
from fnsft_trl.export import changed_neurons


LLAVA = next(architecture for architecture in ARCHITECTURES if str(architecture) == "LlavaForConditionalGeneration")
IMAGE = "<image>"
DISCOVERY = {"ica_components": 2, "ica_rank": 8, "ica_max_tokens": 200, "ica_max_length": 32, "ica_percentile": 80}


@pytest.fixture(scope="module")
def processor(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    template = (
        "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for part in m['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
        "{% endif %}<eos>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    images = tf.CLIPImageProcessor(size={"height": 8, "width": 8}, crop_size={"height": 8, "width": 8})
    return tf.LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


@pytest.fixture(scope="module")
def model(processor):
    model = LLAVA.model()
    model.resize_token_embeddings(len(processor.tokenizer))
    model.config.image_token_id = processor.tokenizer.convert_tokens_to_ids(IMAGE)
    return model.eval()


@pytest.fixture(scope="module")
def seen():
    """Rows as they are published: an image each, a question in parts, an answer."""
    from PIL import Image

    return [
        {
            "image": Image.new("RGB", (8, 8), (20 * n, 90, 9)),
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": f"A b{n}."}]},
            ],
        }
        for n in range(8)
    ]


@pytest.fixture(scope="module")
def template(model, processor, rows):
    texts = [row["prompt"] + row["completion"] for row in rows]
    return discover_networks(model, processor.tokenizer, texts, FunctionalNetworkConfig(**DISCOVERY))


def make(directory, model, processor, data, template=None, peft_config=None, **config):
    return FNSFTTrainer(
        model=copy.deepcopy(model),
        args=sft_config(directory, max_length=None, max_steps=2),
        train_dataset=to_trl_format(Dataset.from_list(data)),
        processing_class=processor,
        peft_config=peft_config,
        network_config=FunctionalNetworkConfig(**config),
        network_template=template,
    )


@pytest.mark.parametrize("method", ["neuron_delta", "lora", "full"])
def test_a_model_of_images_trains_under_a_mask(method, model, processor, seen, template, tmp_path):
    config = {"train_method": method, "mask_mode": "lesion", "train_neurons": "unselected"}
    config |= {"train_other": False} if method == "full" else {}
    peft_config = LoraConfig(r=2) if method == "lora" else None
    trainer = make(tmp_path, model, processor, seen, template, peft_config, **config)
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["pixel_values"].shape[0], "input_ids" in batch) == (4, True)
    assert (batch["input_ids"] == model.config.image_token_id).sum(1).tolist() == [4] * 4
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses
    assert min(losses) > 0
    trainer.save_model()
    if method == "full":
        trained = tf.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    else:
        trained = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).merge_and_unload()
    changed, others = changed_neurons(find_neuron_sites(model), state(model), state(trained))
    assert changed.count
    assert not (changed & ~trainer.trainable_neurons).count
    assert not others


def test_the_command_line_trains_it_too(model, processor, seen, template, tmp_path, capsys):
    model.save_pretrained(tmp_path / "llava")
    processor.save_pretrained(tmp_path / "llava")
    template.save_pretrained(tmp_path / "template")
    Dataset.from_list(seen).to_parquet(tmp_path / "seen.parquet")
    words = (
        f"--model_name_or_path {tmp_path}/llava --dataset_name {tmp_path}/seen.parquet --output_dir {tmp_path}/out "
    )
    words += f"--ica_template_path {tmp_path}/template --ica_component_ids 0 --max_steps 2 --report_to none "
    words += "--max_length null --use_cpu true --per_device_train_batch_size 4 --dtype float32"
    assert main(["train", *words.split()]) == 0
    trained = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "out").merge_and_unload()
    changed, others = changed_neurons(find_neuron_sites(model), state(model), state(trained))
    assert (changed.count > 0, others) == (True, [])


def test_networks_are_not_discovered_on_images(model, processor, seen, tmp_path):
    with pytest.raises(FNSFTError, match=r"hold images.*ica_datasets.*template"):
        make(tmp_path, model, processor, seen, **DISCOVERY)


def test_images_need_a_processor(model, processor, seen, template, tmp_path):
    with pytest.raises(FNSFTError, match=r"column 'image'.*reads text alone; take the processor"):
        make(tmp_path, model, processor.tokenizer, seen, template)
