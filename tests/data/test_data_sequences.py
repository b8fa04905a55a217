"""Discovery and measures of language modelling read a row as it is trained."""

import json
import logging

import pytest
from datasets import Dataset
from helpers import sft_config, tiny_model
from test_data_prompts import INST, pad_is_eos, plain, with_bos
from trl import DatasetMixtureConfig, ScriptArguments, SFTTrainer

from fnsft_trl import DataConfig, FNSFTError
from fnsft_trl.data.dialects import dialect_of
from fnsft_trl.data.sequences import text_token_ids, token_sequences, trained_part
from fnsft_trl.data.sources import load_texts
from fnsft_trl.data.training import load_training_data
from fnsft_trl.evaluation.retention import RetentionText


# Writes all that a template is given.
ALL = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if mood is defined %}{{ mood }}{% endif %}"
    "{% for m in messages %}[{{ m['role'] }}]{% if m['tone'] %}{{ m['tone'] }}{% endif %}{{ m['content'] }}"
    "{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def with_all():
    tokenizer = plain()
    tokenizer.chat_template = ALL
    return tokenizer


def with_bos_and_all():
    tokenizer = with_bos()
    tokenizer.chat_template = "{{ bos_token }}" + ALL
    return tokenizer


def tool(name):
    return {"type": "function", "function": {"name": name, "parameters": {"properties": {name: {"type": "string"}}}}}


def called(name):
    return {"type": "function", "function": {"name": name, "arguments": {name: "x"}}}


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
CALL = {"role": "assistant", "content": None, "tool_calls": [called("f")]}
ROWS = {
    "text": [{"text": "abc"}, {"text": "abcd"}],
    "text with a BOS token": [{"text": "<s>abc"}, {"text": "<s><s>abc"}, {"text": "<s> abc"}, {"text": "abc"}],
    "rendered text": [{"text": "<s>[INST] q [/INST] a</s>"}],
    "questions": [{"question": "q", "answer": "a", "system": "s"}, {"question": "q", "answer": "a", "system": None}],
    "conversations": [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "x": 1}]}],
    "tools": [
        {"messages": [CHAT[0], CALL, {"role": "tool", "content": "r"}, CHAT[1]], "tools": [tool("f"), tool("g")]},
        {"messages": CHAT, "tools": [tool("h")]},
        {"messages": CHAT, "tools": None},
    ],
    "tools as JSON": [{"messages": CHAT, "tools": json.dumps([tool("f")])}, {"messages": CHAT, "tools": ""}],
    "settings of the template": [
        {"messages": CHAT, "chat_template_kwargs": {"mood": "sad"}},
        {"messages": CHAT, "chat_template_kwargs": {"other": True}},
        {"messages": CHAT, "chat_template_kwargs": None},
    ],
    "parts": [{"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in CHAT]}],
}


CASES = [(make, kind) for make in (with_bos, with_bos_and_all, with_all, pad_is_eos) for kind in ROWS]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "kind"), [case for case in CASES if case[0] in (with_all, with_bos_and_all) or case[1] != "tools"]
)
def test_a_row_is_discovered_and_measured_as_it_is_trained(make, kind, tmp_path):
    path, tokenizer, args = tmp_path / "a.jsonl", make(), sft_config(tmp_path, max_length=None)
    path.write_text("\n".join(json.dumps(row) for row in ROWS[kind]))
    script = ScriptArguments(dataset_name=str(path))
    data = load_training_data(script, args, DatasetMixtureConfig(), DataConfig(), tokenizer)
    trainer = SFTTrainer(tiny_model("llama"), args, train_dataset=data.train, processing_class=tokenizer)
    trained = list(trainer.train_dataset["input_ids"])
    ends = [row.get("text", tokenizer.eos_token).endswith(tokenizer.eos_token) for row in data.train]
    trained = [ids if end else ids[:-1] for ids, end in zip(trained, ends, strict=True)]  # the trainer ends text
    (texts,) = load_texts([str(path)]).values()
    assert [text_token_ids(row, tokenizer) for row in texts] == trained
    assert [text_token_ids(trained_part(row), tokenizer) for row in data.train] == trained
    assert [text_token_ids(row, tokenizer) for row in ROWS[kind]] == trained
    if kind != "rendered text":
        assert RetentionText.from_texts(ROWS[kind], tokenizer, max_length=4096).sequences == trained
    bos = tokenizer.bos_token_id
    assert all(ids.count(bos) == (bos is not None) for ids in trained)


def test_of_a_row_with_several_columns_is_read_what_trl_trains():
    for row in ({"messages": CHAT, "text": "t"}, {"prompt": CHAT[:1], "completion": CHAT[1:], "text": "t"}):
        assert trained_part(row) is row
        args = {"train_dataset": Dataset.from_list([row]), "processing_class": with_all()}
        assert text_token_ids(row, with_all()) == _trained(**args)
    assert trained_part({"text": "t", "label": 1}) == "t"
    assert trained_part({"story": "t", "text": "u"}, "story") == "t"
    assert trained_part({"input_ids": [1], "text": "u"})["input_ids"] == [1]


def _trained(**options):
    trainer = SFTTrainer(tiny_model("llama"), sft_config("unused", max_length=None), **options)
    return trainer.train_dataset[0]["input_ids"]


UNUSABLE = {
    "nothing": None,
    "no text": {"text": None},
    "no turn": {"messages": []},
    "a null turn": {"messages": [{"role": "user", "content": None}, CHAT[1]]},
    "an odd role": {"conversations": [{"from": "bing", "value": "a"}]},
    "no answer": {"question": "q", "answer": ""},
    "refused": {"messages": [{"role": "system", "content": "s"}, *CHAT]},
    "no JSON": {"messages": CHAT, "tools": "{"},
    "no text at all": {"question": "q", "answer": {"a": 1}},
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_row_that_cannot_be_read_is_left_out_of_a_discovery_and_said(kind, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("fnsft_trl"), "propagate", True)
    tokenizer = with_bos()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + INST
    )
    good = {"messages": CHAT}
    one = [sequence.ids for sequence in token_sequences([good], tokenizer, max_length=50)]
    with_it = token_sequences([good, UNUSABLE[kind], good], tokenizer, max_length=50, name="wiki")
    assert [sequence.ids for sequence in with_it] == one * 2
    assert "wiki: 1 of 3 rows are left out" in caplog.text
    assert "the first is row 1" in caplog.text
    with pytest.raises(FNSFTError, match=r"wiki has no row to read: .* in row 0"):
        list(token_sequences([UNUSABLE[kind]] * 2, tokenizer, max_length=50, name="wiki"))


@pytest.mark.parametrize("text", [3, {"premise": "p"}])
def test_what_is_no_text_at_all_is_an_error(text):
    with pytest.raises(FNSFTError):
        list(token_sequences(["good", text], with_bos(), max_length=50))


@pytest.mark.parametrize("where", [text_token_ids, lambda turns, tokenizer: dialect_of(tokenizer)])
def test_a_chat_template_that_loops_is_one_line(where, monkeypatch):
    monkeypatch.setattr("fnsft_trl.data.rendering._LONGEST", 0.2)
    tokenizer = plain()
    tokenizer.chat_template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(FNSFTError, match=r"took more than 0\.2 s .*template_format"):
        where([{"role": "user", "content": "a"}], tokenizer)
    tokenizer.chat_template = ALL
    assert text_token_ids([{"role": "user", "content": "a"}], tokenizer)
