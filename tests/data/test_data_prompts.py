"""Prompt formats through TRL's own preparation and collator: what is read, what is learnt, where it ends."""

import pytest
import torch
from datasets import Dataset
from helpers import sft_config, tiny_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from trl import SFTTrainer

from fnsft_trl import FNSFTError, to_trl_format
from fnsft_trl.data.prompts import ALPACA, BASIC, parse_prompt_template, set_chat_template, teach_end


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


def tokenizer_of(specials: list[str], **names) -> PreTrainedTokenizerFast:
    """Bytes and four merges, so that ids do not depend on a training: id 0 to 2, then the printable ASCII letters."""
    letters = [*sorted(c for c in pre_tokenizers.ByteLevel.alphabet() if c.isascii()), "Ġ", "Ċ"]
    merges = [("b", "l"), ("u", "e"), ("bl", "ue"), ("Ġ", "blue")]
    vocabulary = {token: i for i, token in enumerate([*specials, *letters, *("".join(pair) for pair in merges)])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in specials])
    if "bos_token" in names:
        bos = names["bos_token"]
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def plain():
    """No chat template, an EOS and a pad token."""
    return tokenizer_of(["<pad>", "</s>"], eos_token="</s>", pad_token="<pad>")


def with_bos():
    """A BOS token in front of every text, and a chat template that writes it itself."""
    tokenizer = tokenizer_of(["<pad>", "</s>", "<s>"], bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = INST
    return tokenizer


def pad_is_eos():
    """ChatML, and one token for padding and for the end."""
    tokenizer = tokenizer_of(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


TOKENIZERS = [plain, with_bos, pad_is_eos]
ROWS = [
    {"instruction": "Sky?", "input": "At noon.", "output": "blue"},
    {"instruction": "Hi", "input": None, "output": "Yo."},
]
# what is read and what is learnt of the first row, in words
RENDERED = {
    (plain, "auto"): ("Instruction:\nSky?\n\nAt noon.\n\nResponse:\nblue</s>", "blue</s>"),
    (plain, "basic"): ("Instruction:\nSky?\n\nAt noon.\n\nResponse:\nblue</s>", "blue</s>"),
    (plain, "alpaca"): ("### Instruction:\nSky?\n\nAt noon.\n\n### Response:\nblue</s>", "blue</s>"),
    (plain, "chatml"): (
        "<|im_start|>user\nSky?\n\nAt noon.<|im_end|>\n<|im_start|>assistant\nblue<|im_end|></s>",
        "blue<|im_end|></s>",
    ),
    (with_bos, "auto"): ("<s>[INST] Sky?\n\nAt noon. [/INST] blue</s>", " blue</s>"),
    (with_bos, "chat"): ("<s>[INST] Sky?\n\nAt noon. [/INST] blue</s>", " blue</s>"),
    (with_bos, "basic"): ("<s>Instruction:\nSky?\n\nAt noon.\n\nResponse:\nblue</s>", "blue</s>"),
    (with_bos, "alpaca"): ("<s>### Instruction:\nSky?\n\nAt noon.\n\n### Response:\nblue</s>", "blue</s>"),
    (pad_is_eos, "auto"): (
        "<|im_start|>user\nSky?\n\nAt noon.<|im_end|>\n<|im_start|>assistant\nblue<|im_end|>\n",
        "blue<|im_end|>\n",
    ),
    (pad_is_eos, "chatml"): (
        "<|im_start|>user\nSky?\n\nAt noon.<|im_end|>\n<|im_start|>assistant\nblue<|im_end|>",
        "blue<|im_end|>",
    ),
    (pad_is_eos, "alpaca"): ("### Instruction:\nSky?\n\nAt noon.\n\n### Response:\nblue<|im_end|>", "blue<|im_end|>"),
}
# ids of the first row under `auto`, and the labels after the part that is not learnt
GOLDEN = {
    plain: (
        [42, 79, 84, 85, 83, 86, 68, 85, 74, 80, 79, 27, 97, 52, 76, 90, 32, 97, 97, 34, 85, 96, 79, 80, 80, 79, 15,
         97, 97, 51, 70, 84, 81, 80, 79, 84, 70, 27, 97, 100, 1],
        [100, 1],
    ),
    with_bos: (
        [2, 61, 43, 48, 53, 54, 63, 97, 53, 77, 91, 33, 98, 98, 35, 86, 97, 80, 81, 81, 80, 16, 97, 61, 17, 43, 48, 53,
         54, 63, 102, 1],
        [102, 1],
    ),
    pad_is_eos: (
        [1, 87, 85, 71, 84, 98, 53, 77, 91, 33, 98, 98, 35, 86, 97, 80, 81, 81, 80, 16, 2, 98, 1, 67, 85, 85, 75, 85,
         86, 67, 80, 86, 98, 101, 2, 98],
        [101, 2, 98],
    ),
}  # fmt: skip


def prepared(tokenizer, rows, tmp_path, template_format="auto", prompt_template=None, **settings) -> SFTTrainer:
    """TRL's trainer on rows in any format; its `train_dataset` is what TRL made of them."""
    set_chat_template(tokenizer, template_format, prompt_template)
    teach_end(tokenizer)
    args = sft_config(tmp_path, max_length=None, shuffle_dataset=False, **settings)
    data = to_trl_format(Dataset.from_list(rows))
    return SFTTrainer(tiny_model("llama"), args=args, train_dataset=data, processing_class=tokenizer)


def learnt(row) -> list[int]:
    return [label for label in row["labels"] if label != -100]


@pytest.mark.parametrize(("make", "template_format"), RENDERED, ids=lambda value: getattr(value, "__name__", value))
def test_what_is_read_and_learnt(make, template_format, tmp_path):
    tokenizer = make()
    trainer = prepared(tokenizer, ROWS, tmp_path, template_format)
    for number, row in enumerate(trainer.train_dataset):
        if number == 0:
            assert (tokenizer.decode(row["input_ids"]), tokenizer.decode(learnt(row))) == RENDERED[
                make, template_format
            ]
        labels = learnt(row)
        assert labels.count(tokenizer.eos_token_id) == 1
        assert row["labels"][-len(labels) :] == labels == row["input_ids"][-len(labels) :]
        if tokenizer.bos_token_id is not None:
            assert row["input_ids"].count(tokenizer.bos_token_id) == 1
            assert row["input_ids"][0] == tokenizer.bos_token_id
        question = {k: v for k, v in trainer.train_dataset[number].items() if k == "prompt"}["prompt"]
        at_inference = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)
        assert row["input_ids"][: len(row["input_ids"]) - len(labels)] == at_inference["input_ids"]


@pytest.mark.parametrize("make", TOKENIZERS)
def test_golden_ids_and_labels(make, tmp_path):
    row = prepared(make(), ROWS, tmp_path).train_dataset[0]
    ids, labels = GOLDEN[make]
    assert row["input_ids"] == ids
    assert row["labels"] == [-100] * (len(ids) - len(labels)) + labels


@pytest.mark.parametrize("make", TOKENIZERS)
def test_a_batch_learns_the_end_and_no_padding(make, tmp_path):
    tokenizer = make()
    trainer = prepared(tokenizer, ROWS, tmp_path)
    rows = list(trainer.train_dataset)
    batch = trainer.data_collator([{k: row[k] for k in ("input_ids", "labels")} for row in rows])
    lengths = [len(row["input_ids"]) for row in rows]
    assert lengths[0] != lengths[1]
    for number, length in enumerate(lengths):
        labels = batch["labels"][number]
        assert (labels[length:] == -100).all()
        assert (labels == tokenizer.eos_token_id).sum() == 1
        assert batch["attention_mask"][number].sum() == length
    assert torch.equal(batch["input_ids"][1, lengths[1] :].unique(), torch.tensor([tokenizer.pad_token_id]))


@pytest.mark.parametrize("make", TOKENIZERS)
@pytest.mark.parametrize("template_format", ["alpaca", "chatml", "basic"])
def test_every_answer_of_a_conversation_is_learnt_with_its_end(make, template_format, tmp_path):
    tokenizer = make()
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Sky?"},
        {"role": "assistant", "content": "blue"},
        {"role": "user", "content": "Sea?"},
        {"role": "assistant", "content": "Also."},
    ]
    trainer = prepared(tokenizer, [{"messages": messages}], tmp_path, template_format, assistant_only_loss=True)
    (row,) = trainer.train_dataset
    end = tokenizer.eos_token if template_format != "chatml" or make is pad_is_eos else "<|im_end|></s>"
    assert tokenizer.decode(learnt(row)) == f"blue{end}Also.{end}"
    text = tokenizer.decode(row["input_ids"])
    assert text.count("Be brief.") == text.count("Sea?") == 1
    assert row["input_ids"].count(tokenizer.bos_token_id) == (make is with_bos)


def test_basic_without_words_is_what_trl_makes_of_strings(tmp_path):
    rows = [{"prompt": "The sky is", "completion": " blue"}]
    ours = prepared(with_bos(), rows, tmp_path, "basic", "{instruction}{response}").train_dataset[0]
    args = sft_config(tmp_path, max_length=None)
    theirs = SFTTrainer(
        tiny_model("llama"), args=args, train_dataset=Dataset.from_list(rows), processing_class=with_bos()
    ).train_dataset[0]
    assert (ours["input_ids"], ours["labels"]) == (theirs["input_ids"], theirs["labels"])


def test_a_template_of_ones_own():
    tokenizer = plain()
    text = "Rules: {system}\n\nQ: {instruction}\\n{{curly}} it's \\ 'quoted'\tA:\n{response} END</s>"
    assert set_chat_template(tokenizer, "basic", text)
    question = [{"role": "user", "content": "{x}"}, {"role": "assistant", "content": "y"}]
    end = "Q: {x}\n{curly} it's \\ 'quoted'\tA:\ny END</s>"
    assert tokenizer.apply_chat_template(question, tokenize=False) == end
    rules = [{"role": "system", "content": "r"}, *question, *question]
    assert tokenizer.apply_chat_template(rules, tokenize=False) == f"Rules: r\n\n{end}{end}"
    blocks = [{"role": "user", "content": [{"type": "text", "text": "{x}"}]}]
    assert tokenizer.apply_chat_template(blocks, tokenize=False) == "Q: {x}"
    with pytest.raises(Exception, match="no turns of the role tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "r"}], tokenize=False)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("no placeholder", "found no placeholder"),
        ("{instruction}", "found instruction"),
        ("{response}{instruction}", "found response, instruction"),
        ("{instruction}{response}{response}", "once and in this order"),
        ("{instruction}{input}{response}", "has the placeholder {input}"),
        ("{}{response}", "has the placeholder {}"),
        ("{instruction!r}{response}", "placeholder with a format"),
        ("{instruction:>3}{response}", "placeholder with a format"),
        ("{instruction{response}", "double the braces"),
        ("{system} {instruction}\n{response}", "on one line"),
        ("{instruction}\n{system}\n{response}", "found instruction, system, response"),
    ],
)
def test_a_template_that_cannot_work_says_why(template, message):
    with pytest.raises(FNSFTError) as error:
        parse_prompt_template(template)
    assert message in str(error.value)


def test_the_templates_of_this_package_can_be_read():
    for template in (ALPACA, BASIC):
        assert parse_prompt_template(template).system == ("", "\n\n")


def test_chat_needs_a_chat_template():
    with pytest.raises(FNSFTError, match="no chat template; use auto"):
        set_chat_template(plain(), "chat")


def test_a_tokenizer_keeps_its_own_template_unless_another_is_asked_for():
    tokenizer = with_bos()
    assert not set_chat_template(tokenizer)
    assert teach_end(tokenizer) is None
    assert tokenizer.chat_template == INST
    assert set_chat_template(tokenizer, "alpaca")


def test_the_saved_tokenizer_renders_as_in_training(tmp_path):
    tokenizer = with_bos()
    trainer = prepared(tokenizer, ROWS, tmp_path, "alpaca")
    trainer.save_model(str(tmp_path / "saved"))
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved.chat_template == tokenizer.chat_template
    row = trainer.train_dataset[0]
    ids = saved.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]
    assert ids == row["input_ids"]


def test_a_template_that_ends_with_another_special_token_makes_it_the_eos_token():
    tokenizer = pad_is_eos()
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    assert "<|im_end|>, which becomes the EOS token" in teach_end(tokenizer)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.chat_template == CHATML


def test_a_template_that_ends_with_text_gets_the_eos_token(tmp_path):
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}\n"
    tokenizer = plain()
    tokenizer.chat_template = template + "{% if add_generation_prompt %}assistant: {% endif %}"
    (row,) = prepared(tokenizer, ROWS[1:], tmp_path).train_dataset
    assert tokenizer.decode(row["input_ids"]) == "user: Hi\nassistant: Yo.\n</s>"
    assert learnt(row).count(tokenizer.eos_token_id) == 1
    tokenizer = pad_is_eos()
    tokenizer.eos_token = "<|endoftext|>"
    assert "appended" in teach_end(tokenizer, keep_eos=True)
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False).endswith("a<|im_end|>\n<|endoftext|>")
    assert tokenizer.apply_chat_template(messages[:1], tokenize=False).endswith("q<|im_end|>\n")


def test_a_template_that_cannot_render_says_why():
    tokenizer = plain()
    tokenizer.chat_template = "{{ raise_exception('only tools') }}"
    with pytest.raises(FNSFTError, match="cannot render a question and an answer: only tools"):
        teach_end(tokenizer)


@pytest.mark.slow
def test_the_embedded_model_learns_to_stop(tmp_path):
    from fnsft_trl.data.embedded import embedded_model

    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    set_chat_template(tokenizer)
    assert teach_end(tokenizer) is None
    assert tokenizer.pad_token is not None
    rows = to_trl_format(ROWS)
    ids = tokenizer.apply_chat_template(rows[0]["prompt"] + rows[0]["completion"], return_dict=True)["input_ids"]
    assert ids[-2:] == [tokenizer.eos_token_id, tokenizer("\n")["input_ids"][0]]
