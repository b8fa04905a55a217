import itertools
import json
import logging
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import trl
from datasets import Dataset, enable_caching
from helpers import sft_config, tiny_model, tiny_tokenizer
from test_data_prompts import CHATML, pad_is_eos, plain, tokenizer_of, with_bos
from tokenizers import processors
from transformers import AutoTokenizer
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    get_training_chat_template,
)

from fnsft_trl import DataConfig, FNSFTError, FNSFTTrainer, FunctionalNetworkConfig, FunctionalNetworkTemplate
from fnsft_trl.cli import main
from fnsft_trl.data.training import load_training_data


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def questions(count, name=""):
    return [{"question": f"{name}q{i}", "answer": f"{name}a{i}"} for i in range(count)]


@pytest.fixture
def load(tmp_path):
    def load(name=None, *, script=None, mixture=None, tokenizer=None, data=None, **training):
        return load_training_data(
            ScriptArguments(dataset_name=None if name is None else str(name), **(script or {})),
            sft_config(tmp_path, **training),
            DatasetMixtureConfig(**(mixture or {})),
            DataConfig(**(data or {})),
            tokenizer or tiny_tokenizer(),
        )

    return load


def asked(rows) -> list[str]:
    return [row["prompt"][-1]["content"] for row in rows]


STEPS = {"eval_strategy": "steps", "eval_steps": 1}


def test_field_names_collide_with_none_of_trl():
    taken = {f.name for kind in (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig) for f in fields(kind)}
    assert not {f.name for f in fields(DataConfig)} & (taken | set(FunctionalNetworkConfig.field_names()))
    assert all(f.metadata["help"] for f in fields(DataConfig))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template_format": "alpaka"}, "must be one of: auto, chat, alpaca, chatml, basic"),
        ({"prompt_template": "{instruction}{response}"}, "no effect with template_format=auto"),
        ({"template_format": "basic", "prompt_template": "{instruction}"}, "must hold {instruction} and {response}"),
        ({"columns": "title"}, "write prompt=COLUMN"),
        ({"max_samples": 0}, "max_samples is 0"),
        ({"max_samples": 2.5}, "max_samples is 2.5"),
        ({"eval_fraction": 1.0}, "between 0 and 1"),
        ({"eval_fraction": "much"}, "between 0 and 1"),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(FNSFTError) as error:
        DataConfig(**options)
    assert message in str(error.value)


def test_without_evaluation_all_rows_are_trained(load, tmp_path):
    data = load(write(tmp_path / "a.jsonl", questions(20)))
    assert asked(data.train) == [f"q{i}" for i in range(20)]
    assert data.eval is None


def test_rows_to_evaluate_on_are_held_out_by_the_seed(load, tmp_path):
    path = write(tmp_path / "a.jsonl", questions(20))
    first, second, other = load(path, **STEPS), load(path, **STEPS), load(path, **STEPS, seed=9)
    assert len(first.eval) == 2
    assert asked(first.eval) == asked(second.eval) != asked(other.eval)
    assert sorted(asked(first.train) + asked(first.eval)) == sorted(f"q{i}" for i in range(20))
    assert len(load(path, **STEPS, data={"eval_fraction": 0.25}).eval) == 5
    with pytest.raises(FNSFTError, match="too few"):
        load(write(tmp_path / "b.jsonl", questions(1)), **STEPS)


@pytest.mark.parametrize("split", ["validation", "test", "dev"])
def test_an_existing_split_is_evaluated_on(load, tmp_path, split):
    (tmp_path / "many").mkdir()
    write(tmp_path / "many" / "train.jsonl", questions(6))
    write(tmp_path / "many" / f"{split}.jsonl", questions(3, "other "))
    data = load(tmp_path / "many", **STEPS)
    assert asked(data.train) == [f"q{i}" for i in range(6)]
    assert asked(data.eval) == [f"other q{i}" for i in range(3)]


def test_the_named_split_comes_before_the_others(load, tmp_path):
    (tmp_path / "many").mkdir()
    for split in ("train", "validation", "test"):
        write(tmp_path / "many" / f"{split}.jsonl", questions(2, split))
    assert asked(load(tmp_path / "many", **STEPS).eval) == ["testq0", "testq1"]
    named = load(tmp_path / "many", **STEPS, script={"dataset_test_split": "validation"})
    assert asked(named.eval) == ["validationq0", "validationq1"]
    with pytest.raises(FNSFTError, match=r"no split 'held'; it has .*; set dataset_test_split"):
        load(tmp_path / "many", **STEPS, script={"dataset_test_split": "held"})
    with pytest.raises(FNSFTError, match=r"no split 'trian'; it has .*; set dataset_train_split"):
        load(tmp_path / "many", script={"dataset_train_split": "trian"})


def test_max_samples_takes_rows_by_the_seed_in_their_order(load, tmp_path):
    path = write(tmp_path / "a.jsonl", questions(50))
    first, other = (asked(load(path, data={"max_samples": 10}, seed=seed).train) for seed in (1, 2))
    assert len(set(first)) == 10
    assert first != other
    assert (
        first
        == sorted(first, key=lambda text: int(text[1:]))
        == asked(load(path, data={"max_samples": 10}, seed=1).train)
    )
    assert len(load(path, data={"max_samples": 500}).train) == 50


def test_several_datasets_at_once_each_in_its_own_format(load, tmp_path):
    first = write(tmp_path / "a.jsonl", questions(4))
    second = write(tmp_path / "b.jsonl", [{"instruction": "do", "input": "it", "output": "done"}])
    data = load(f"{first}, {second}")
    assert asked(data.train) == ["q0", "q1", "q2", "q3", "do\n\nit"]
    Dataset.from_list([{"text": "t"}]).to_parquet(tmp_path / "c.parquet")
    with pytest.raises(FNSFTError, match="cannot be trained together"):
        load(f"{first},{tmp_path / 'c.parquet'}")


@pytest.mark.slow
def test_a_mixture_takes_each_dataset_in_its_own_format(load, tmp_path):
    first = write(tmp_path / "a.jsonl", questions(30))
    second = write(tmp_path / "b.jsonl", [{"prompt": f"p{i}", "response": "r"} for i in range(40)])
    parts = [{"path": first, "fraction": 0.75}, {"path": "json", "data_files": second, "fraction": 0.25}]
    data = load(mixture={"datasets": parts})
    assert asked(data.train) == [f"q{i}" for i in range(30)] + [f"p{i}" for i in range(10)]
    split = [load(mixture={"datasets": parts, "test_split_size": 0.5}, **STEPS) for _ in range(2)]
    assert len(split[0].train) == len(split[0].eval) == 20
    assert asked(split[0].eval) == asked(split[1].eval)
    with pytest.raises(FNSFTError, match="fraction must be given for every dataset"):
        load(mixture={"datasets": [{"path": first, "fraction": 1.0}, {"path": second}]})
    with pytest.raises(FNSFTError, match="both given"):
        load(first, mixture={"datasets": parts})
    with pytest.raises(FNSFTError, match=r"neither here nor on the Hub|the Hub cannot be reached"):
        load(mixture={"datasets": [{"path": "json", "data_files": str(tmp_path / "none.jsonl")}]})
    with pytest.raises(FNSFTError, match=r"columns that .* does not have"):
        load(mixture={"datasets": [{"path": first, "columns": ["title"]}]})


def test_conversations_and_questions_are_trained_together(load, tmp_path):
    chat = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    second = write(tmp_path / "b.jsonl", [{"conversations": chat}])
    data = load(f"{write(tmp_path / 'a.jsonl', questions(2))},{second}")
    assert data.train.column_names == ["messages"]
    assert [row["messages"][1]["content"] for row in data.train] == ["a0", "a1", "a"]


def called(name):
    return [{"function": {"name": "f", "arguments": {name: "x"}}}]


SHAPES = {
    "questions": [{"question": "q", "answer": "a"}],
    "plain": [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}],
    "thoughts": [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "thinking": "t"}]}
    ],
    "calls": [
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a", "tool_calls": called(n)},
            ],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {n: 1}}}],
        }
        for n in ("x", "y")
    ],
    "tools as text": [{"prompt": "q", "completion": "a", "tools": "[]"}],
    "settings": [
        {
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
            "chat_template_kwargs": {n: 1},
        }
        for n in ("x", "y")
    ],
}


@pytest.mark.parametrize(("one", "two"), itertools.combinations(SHAPES, 2))
def test_datasets_are_trained_together_whatever_their_turns_have_beside_the_text(load, tmp_path, one, two):
    """And each row is given what it was given alone."""
    paths = [write(tmp_path / f"{number}.jsonl", SHAPES[name]) for number, name in enumerate((one, two))]

    def rows(data):
        given = [
            row | {"tools": row.get("tools"), "chat_template_kwargs": row.get("chat_template_kwargs", {})}
            for row in data
        ]
        turns = [row.pop("messages", None) or row.pop("prompt") + row.pop("completion") for row in given]
        return [(turn, row["tools"], row["chat_template_kwargs"]) for turn, row in zip(turns, given, strict=True)]

    alone = [row for path in paths for row in rows(load(path).train)]
    assert rows(load(",".join(paths)).train) == alone


def refusing(template):
    tokenizer = pad_is_eos()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'tool' or 'bad' in m['content'] %}"
        "{{ raise_exception('no such turns') }}{% endif %}{% endfor %}" + template
    )
    return tokenizer


@pytest.mark.parametrize("source", ["questions", "conversations"])
def test_rows_that_the_chat_template_refuses_are_left_out_and_counted(load, tmp_path, source, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("fnsft_trl"), "propagate", True)

    def row(text):
        if source == "questions":
            return {"question": text, "answer": "a"}
        return {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "a"}]}

    path = write(tmp_path / "a.jsonl", [row("bad" if number in (2, 5) else f"q{number}") for number in range(8)])
    tokenizer = refusing(CHATML)
    data = load(path, tokenizer=tokenizer)
    for cached in (False, True, True):  # and the count is right of what was kept
        caplog.clear()
        trainer = FNSFTTrainer(
            tiny_model("llama"), sft_config(tmp_path, max_length=None), train_dataset=data.train,
            processing_class=tokenizer, tokenized_cache=cached,
        )  # fmt: skip
        assert len(trainer.train_dataset) == 6
        assert (
            "the train data: 2 of 8 rows are left out: 2 where the chat template refuses the conversation"
            in caplog.text
        )
        assert "no such turns" in caplog.text
        assert "max_length" not in caplog.text
    with pytest.raises(FNSFTError, match=r"no row can be trained on: .*no such turns"):
        load(write(tmp_path / "b.jsonl", [row("bad")] * 3), tokenizer=refusing(CHATML))
    with pytest.raises(FNSFTError, match=r"the train data has no row to train on: .*no such turns"):
        FNSFTTrainer(
            tiny_model("llama"),
            sft_config(tmp_path),
            train_dataset=data.train.select([2, 5]),
            processing_class=tokenizer,
        )


def test_assistant_only_loss_needs_a_template_that_marks_the_answers(load, tmp_path):
    """Of its own, or of TRL's, which must still know the template."""
    path = write(tmp_path / "a.jsonl", SHAPES["plain"])
    with pytest.raises(FNSFTError, match="assistant_only_loss needs a chat template that marks the answers"):
        load(path, tokenizer=pad_is_eos(), assistant_only_loss=True)
    load(path, tokenizer=pad_is_eos(), assistant_only_loss=True, data={"template_format": "chatml"})
    folder = Path(trl.__file__).parent / "chat_templates"
    of_processors = ("idefics3", "llava_next", "smolvlm")  # which read contents in parts only
    trained = {path.name.removesuffix("_training.jinja") for path in folder.glob("*_training.jinja")}
    assert trained > {"qwen3", "glm4moe", "llama3"}
    for name in sorted(trained.difference(of_processors)):
        tokenizer = tokenizer_of(["<|endoftext|>", "<s>"], bos_token="<s>", eos_token="<|endoftext|>")
        tokenizer.chat_template = (folder / f"{name}.jinja").read_text()
        load(path, tokenizer=tokenizer, assistant_only_loss=True)
        assert "generation" in (get_training_chat_template(tokenizer) or tokenizer.chat_template), name


def test_keys_of_turns_that_the_chat_template_reads_are_kept(load, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("fnsft_trl"), "propagate", True)
    turns = [{"role": role, "content": "x", "mood": "sad", "hashed_ip": "SECRET"} for role in ("user", "assistant")]
    path = write(tmp_path / "a.jsonl", [{"messages": turns}])
    tokenizer = pad_is_eos()
    tokenizer.chat_template = "{% for m in messages %}{{ m.mood }}{{ m['content'] }}<|im_end|>{% endfor %}"
    for reads, script in ((tokenizer, {}), (pad_is_eos(), {})):
        data = load(path, tokenizer=reads, script=script)
        assert ("mood" in data.train[0]["messages"][0]) == (reads is tokenizer)
        assert "SECRET" not in json.dumps(data.train.to_list())
        assert "keys of its messages that are not used: hashed_ip" in caplog.text
    (tmp_path / "a.jinja").write_text(tokenizer.chat_template)
    data = load(path, tokenizer=pad_is_eos(), chat_template_path=str(tmp_path / "a.jinja"))
    assert data.train[0]["messages"][0]["mood"] == "sad"


def test_calls_that_the_chat_template_does_not_write_are_said(load, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("fnsft_trl"), "propagate", True)
    path = write(tmp_path / "a.jsonl", SHAPES["calls"])
    load(path, tokenizer=pad_is_eos())
    assert "keys of its messages that are not used: tool_calls" in caplog.text
    caplog.clear()
    tokenizer = pad_is_eos()
    tokenizer.chat_template = CHATML.replace("m['content'] +", "m['content'] + (m['tool_calls'] or '') | string +")
    load(path, tokenizer=tokenizer)
    assert "not used" not in caplog.text


def test_without_a_dataset_it_says_so(load):
    with pytest.raises(FNSFTError, match="there is no dataset"):
        load()
    with pytest.raises(FNSFTError, match="dataset_streaming"):
        load("a.jsonl", script={"dataset_streaming": True})


def test_the_tokenizer_gets_the_prompt_format(load, tmp_path):
    path = write(tmp_path / "a.jsonl", questions(2))
    data = load(
        path, tokenizer=plain(), data={"template_format": "basic", "prompt_template": "{instruction}>{response}"}
    )
    row = data.train[0]
    rendered = data.processing_class.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
    assert rendered == "q0>a0</s>"
    with pytest.raises(FNSFTError, match="drop one"):
        load(path, chat_template_path="a.jinja", data={"template_format": "alpaca"})


def test_a_chat_template_from_a_file_ends_answers_too(load, tmp_path):
    path = write(tmp_path / "a.jsonl", questions(2))
    (tmp_path / "a.jinja").write_text("{% for m in messages %}{{ m['content'] }}|{% endfor %}")
    tokenizer = plain()
    load(path, tokenizer=tokenizer, chat_template_path=str(tmp_path / "a.jinja"))
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "q|a|</s>"
    with pytest.raises(FNSFTError, match="cannot be read"):
        load(path, chat_template_path=str(tmp_path / "none.jinja"))


def test_trl_is_told_of_another_eos_token(load, tmp_path):
    path = write(tmp_path / "a.jsonl", questions(2))
    tokenizer = pad_is_eos()
    tokenizer.eos_token = "<|endoftext|>"
    script, args = ScriptArguments(dataset_name=path), sft_config(tmp_path)
    load_training_data(script, args, DatasetMixtureConfig(), DataConfig(), tokenizer)
    assert args.eos_token == tokenizer.eos_token == "<|im_end|>"
    args, tokenizer = sft_config(tmp_path, eos_token="<|endoftext|>"), pad_is_eos()
    load_training_data(script, args, DatasetMixtureConfig(), DataConfig(), tokenizer)
    assert args.eos_token == tokenizer.eos_token == "<|endoftext|>"
    with pytest.raises(FNSFTError, match="drop one of them"):
        load(path, tokenizer=pad_is_eos(), eos_token="<|endoftext|>", data={"template_format": "chatml"})
    with pytest.raises(FNSFTError, match="no token of the tokenizer"):
        load(path, eos_token="<none>")


def test_text_gets_one_bos_token(load, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "<s>one"}\n{"text": "two"}\n')
    data = load(tmp_path / "a.jsonl", tokenizer=with_bos())
    assert data.train["text"][:] == ["one", "two"]
    assert data.processing_class.chat_template == with_bos().chat_template
    data = load(tmp_path / "a.jsonl", tokenizer=plain())
    assert data.train["text"][:] == ["<s>one", "two"]
    assert data.processing_class.chat_template is None  # nothing was rendered by one
    with pytest.raises(FNSFTError, match="template_format=alpaca has no effect on the columns text"):
        load(tmp_path / "a.jsonl", tokenizer=plain(), data={"template_format": "alpaca"})
    with pytest.raises(FNSFTError, match=r"completion_only_loss has no effect on the columns text.*; drop it"):
        load(tmp_path / "a.jsonl", tokenizer=plain(), completion_only_loss=True)
    with pytest.raises(FNSFTError, match="no EOS token"):
        load(tmp_path / "a.jsonl", tokenizer=tokenizer_of(["<pad>"], pad_token="<pad>"))


def test_a_tokenizer_that_appends_its_eos_token_would_end_text_twice(load, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    tokenizer = plain()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    with pytest.raises(FNSFTError, match="TRL appends another"):
        load(tmp_path / "a.jsonl", tokenizer=tokenizer)


def test_a_discovery_reads_any_format_with_a_tokenizer_that_has_no_chat_template(tmp_path):
    path = write(tmp_path / "a.jsonl", questions(60))
    trainer = FNSFTTrainer(
        tiny_model("llama"),
        sft_config(tmp_path),
        train_dataset=Dataset.from_list([{"text": "blue"}] * 8),
        processing_class=plain(),
        network_config=FunctionalNetworkConfig(
            ica_datasets=[path], ica_components=2, ica_rank=8, ica_max_tokens=200, ica_max_length=64
        ),
    )
    assert trainer.network_template.calibration["tokens"] == 200
    assert trainer.processing_class.chat_template is None


@pytest.fixture
def train(tmp_path, model_dir):
    """`fnsft train` on the small model, with a tokenizer of one's choice."""

    def train(tokenizer, *extra):
        shutil.copytree(model_dir, tmp_path / "model", dirs_exist_ok=True)
        for file in (tmp_path / "model").glob("*token*"):
            file.unlink()
        (tmp_path / "model" / "chat_template.jinja").unlink(missing_ok=True)
        tokenizer.save_pretrained(tmp_path / "model")
        arguments = ["train", "--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")]
        arguments += ["--max_steps", "1", "--use_cpu", "--bf16", "false", "--report_to", "none", "--max_length", "96"]
        assert main([*arguments, "--disable_tqdm", "true", *extra]) == 0
        return AutoTokenizer.from_pretrained(tmp_path / "out")

    return train


def test_the_command_trains_any_format_and_saves_the_template_it_rendered_with(train, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"title": f"q{i}", "body": f"a{i}"} for i in range(8)])
    found = ["--ica_components", "2", "--ica_rank", "8", "--ica_max_tokens", "100"]  # on the training data
    saved = train(plain(), "--dataset_name", path, "--columns", "prompt=title,completion=body", *found)
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert saved.apply_chat_template(turns, tokenize=False) == "Instruction:\nq\n\nResponse:\na</s>"


def test_the_command_tells_the_model_of_the_token_that_ends_an_answer(train, tmp_path):
    tokenizer = pad_is_eos()
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    path = write(tmp_path / "a.jsonl", questions(8))
    assert train(tokenizer, "--dataset_name", path, "--train_method", "full").eos_token == "<|im_end|>"
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert 2 in saved["eos_token_id"]


@pytest.mark.slow
def test_the_command_reads_from_the_cache_what_has_not_changed(train, tmp_path, monkeypatch):
    made = []
    prepare = SFTTrainer._prepare_dataset
    monkeypatch.setattr(SFTTrainer, "_prepare_dataset", lambda *args: made.append(args[-1]) or prepare(*args))
    path = write(tmp_path / "a.jsonl", questions(9, "cached "))
    train(plain(), "--dataset_name", path)
    train(plain(), "--dataset_name", path)
    assert made == ["train"]
    train(plain(), "--dataset_name", path, "--template_format", "alpaca")
    assert made == ["train"] * 2
    train(plain(), "--dataset_name", path, "--tokenized_cache", "false")
    enable_caching()
    assert made == ["train"] * 3


def test_the_command_discovers_on_any_format(tmp_path, model_dir):
    path = write(tmp_path / "a.jsonl", [{"title": f"Name {i}", "body": f"Number {i}."} for i in range(60)])
    arguments = [
        "discover",
        str(model_dir),
        path,
        "--ica_components",
        "2",
        "--ica_rank",
        "8",
        "--ica_max_tokens",
        "200",
    ]
    digests = set()
    for number, extra in enumerate([[], ["--template_format", "alpaca"], ["--template_format", "chatml"]]):
        target = tmp_path / str(number)
        choice = ["--columns", "prompt=title,completion=body", "--output_dir", str(target)]
        assert main([*arguments, *choice, *extra]) == 0
        digests.add(FunctionalNetworkTemplate.from_pretrained(target).calibration["sha256"])
    assert len(digests) == 3
