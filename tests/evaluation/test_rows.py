"""A row is scored as it was trained: the same token ids, and the same of them in the loss."""

import json

import pytest
import torch
from datasets import Dataset
from helpers import sft_config, tiny_model, tiny_rows, tiny_tokenizer
from tokenizers import decoders

from fnsft_trl import FNSFTError, FNSFTTrainer, to_trl_format
from fnsft_trl.evaluation.metrics import score_completions, score_rows, scored_bytes
from fnsft_trl.evaluation.rows import EvaluationRow, RowReader, common_prefix, prompt_format, read_rows


TEMPLATE = (
    "{% if tools %}tools: {% for t in tools %}{{ t['function']['name'] }} {% endfor %}{% endif %}"
    "{% if loud %}LOUD {% endif %}"
    "{% for m in messages %}{{ m['role'] }}:"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<eos>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("koba", "riri")]


def turns(*contents: str) -> list[dict]:
    roles = ("user", "assistant")
    return [{"role": roles[place % 2], "content": content} for place, content in enumerate(contents)]


ROWS = tiny_rows(6)
SHAPES = {
    "prompt and completion": [
        {"prompt": turns(r["prompt"]), "completion": turns("", r["completion"])[1:]} for r in ROWS
    ],
    "prompt and completion as text": ROWS,
    "a token at the border": [{"prompt": "Say t", "completion": "en."}],
    "messages": [{"messages": turns(r["prompt"], r["completion"])} for r in ROWS],
    "several turns": [{"messages": turns("Say ba:", "ab", r["prompt"], r["completion"])} for r in ROWS],
    "the last turn has no answer": [{"messages": turns("Say ba:", "ab", r["prompt"])} for r in ROWS],
    "text": [{"text": r["prompt"] + r["completion"]} for r in ROWS],
    "tools": [{"messages": turns(r["prompt"], r["completion"]), "tools": json.dumps(TOOLS)} for r in ROWS],
    "tools beside a prompt": [
        {"prompt": turns(r["prompt"]), "completion": turns("", r["completion"])[1:], "tools": json.dumps(TOOLS)}
        for r in ROWS
    ],
    "settings of the template": [
        {"messages": turns(r["prompt"], r["completion"]), "chat_template_kwargs": {"loud": True}} for r in ROWS
    ],
    "answers only": [{"messages": turns("Say ba:", "ab", r["prompt"], r["completion"])} for r in ROWS],
    "token ids": [{"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9]} for _ in ROWS],
}


@pytest.fixture(scope="module")
def marking():
    """A tokenizer whose chat template writes tools and marks the answers."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def trained(model, tokenizer, rows, directory, **changes):
    """Token ids and labels as the trainer has them."""
    args = sft_config(directory, max_length=None, **changes)
    data = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    prepared = FNSFTTrainer(model, args, train_dataset=data, processing_class=tokenizer).train_dataset
    return [(row["input_ids"], [label != -100 for label in row["labels"]]) for row in prepared]


class Letters:
    """A tokenizer of one token for each letter, after a BOS (0) if there is one, with an EOS (1)."""

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return "".join(chr(number) for number in ids if number > 1)


def test_bytes_of_tokens_that_are_not_scored_do_not_count():
    def size(*ids, **options):
        return scored_bytes(EvaluationRow(0, list(ids), [True] * len(ids), None, [], "éab"), Letters(), **options)

    assert size(0, 233, 97, 98, 1) == 4  # BOS is the token that nothing precedes
    assert size(233, 97, 98, 1) == 2
    assert size(233, 97, 98, 1, max_length=2) == 1  # two parts, of which the second begins with b
    assert size(0, 233, 97, 98, 1, max_length=9) == 4


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_has_the_ids_and_the_loss_of_its_training(shape, marking, model, tmp_path):
    only = shape == "answers only"
    expected = trained(model, marking, SHAPES[shape], tmp_path, assistant_only_loss=only)
    reader = RowReader(marking, assistant_only_loss=only)
    read = [reader.read(row, number) for number, row in enumerate(SHAPES[shape])]
    assert [(row.ids, row.learnt) for row in read] == expected
    assert [row.number for row in read] == list(range(len(read)))
    has_answer = shape != "text"
    assert all((row.answer is not None) == has_answer for row in read)


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ("instruction, input, output", {"instruction": "Say ba", "input": "", "output": "ab."}),
        ("question, answer", {"question": "Say ko:", "answer": "ok."}),
        ("conversations", {"conversations": [{"from": "human", "value": "Say"}, {"from": "gpt", "value": "ri."}]}),
        ("with a system turn", {"system": "Be brief.", "question": "Say su:", "answer": "us."}),
        ("text", {"text": "Say mo and mo."}),
    ],
)
@pytest.mark.parametrize("template_format", ["auto", "alpaca", "basic"])
def test_any_known_format_is_read_as_fnsft_train_converts_it(columns, row, template_format, model, tmp_path):
    tokenizer = tiny_tokenizer()
    before = tokenizer.chat_template
    rendering = prompt_format(tokenizer, template_format)
    assert tokenizer.chat_template == before
    converted = to_trl_format(Dataset.from_list([row] * 2))
    read, left_out = read_rows([row, row], RowReader(rendering))
    assert [(each.ids, each.learnt) for each in read] == trained(model, rendering, converted, tmp_path)
    assert left_out.reasons == {}


def test_prompts_beside_conversations_become_conversations(marking, model, tmp_path):
    rows = [{"prompt": "Say ba:", "completion": "ab.", "messages": None}]
    rows.append({"prompt": None, "completion": None, "messages": turns("Say ko:", "ok.")})
    read, _ = read_rows(rows, RowReader(marking))
    converted = to_trl_format(Dataset.from_list(rows))
    assert [(each.ids, each.learnt) for each in read] == trained(model, marking, converted, tmp_path)


def test_what_is_asked_is_what_stands_before_the_answer(marking):
    reader = RowReader(marking)
    one = reader.read({"messages": turns("Say ba:", "ab", "Say ko:", "ok.")})
    start, end = one.answer
    assert marking.decode(one.prompt) == "user:Say ba:<eos>assistant:ab<eos>user:Say ko:<eos>assistant:"
    assert (start, end) == (len(one.prompt), len(one.ids))
    assert (marking.decode(one.ids[start:end]), one.reference) == ("ok.<eos>", "ok.")
    open_end = reader.read({"messages": turns("Say ba:", "ab", "Say ko:")})
    start, end = open_end.answer
    assert marking.decode(open_end.ids[start:end]) == "ab<eos>"
    called = turns("Say ba:", "ab")
    called[1]["tool_calls"] = [{"function": {"name": "koba", "arguments": {}}}]
    assert reader.read({"messages": called}).reference == "ab"  # as it is rendered
    assert reader.read({"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]}).answer == (1, 3)


def test_rows_that_cannot_be_scored_are_counted_with_their_reasons(marking):
    rows = [
        {"question": "Say ba:", "answer": "ab."},
        {"question": "Say ko:", "answer": ""},
        {"question": None, "answer": "ok."},
        {"question": "Say " * 200, "answer": "ok."},
        {"question": "Say ri:", "answer": None},
    ]
    read, left_out = read_rows(rows, RowReader(marking, max_length=60), name="the test rows")
    assert [row.number for row in read] == [0]
    expected = {"'answer' is empty": 2, "'question' is empty": 1, "a row is longer than 60 tokens (max_length)": 1}
    assert left_out.reasons == expected
    with pytest.raises(FNSFTError, match=r"the test rows has no row to score: 'answer' is empty in row 0"):
        read_rows(rows[1:2], RowReader(marking), name="the test rows")
    with pytest.raises(FNSFTError, match=r"the data has the columns 'a', 'b', which are no known format"):
        read_rows([{"a": "x", "b": "y"}], RowReader(marking))
    with pytest.raises(FNSFTError, match=r"the data has the column 'images'; only text is scored"):
        read_rows([{"prompt": "x", "completion": "y", "images": []}], RowReader(marking))


def test_completions_are_scored_however_they_are_given(marking, model):
    asked = [{"prompt": turns(r["prompt"]), "completion": turns("", r["completion"])[1:]} for r in ROWS]
    talked = [{"messages": turns(r["prompt"], r["completion"])} for r in ROWS]
    scores = score_completions(model, marking, asked)
    assert score_completions(model, marking, talked) == scores
    rendered = [
        {"prompt": f"user:{r['prompt']}<eos>assistant:", "completion": r["completion"] + "<eos>"} for r in ROWS
    ]
    assert score_completions(model, marking, rendered).nll == pytest.approx(scores.nll, rel=1e-5)
    with pytest.raises(FNSFTError, match="row 0 has no answer"):
        score_completions(model, marking, [{"text": "Say ba"}])


def test_long_text_is_read_in_parts_each_by_itself(marking, model):
    (row,), _ = read_rows([{"text": " ".join(r["prompt"] for r in ROWS)}], RowReader(marking, max_length=8))
    (scores,) = score_rows(model, [row], max_length=8)
    nll = tokens = 0
    for start in range(0, len(row.ids), 8):
        ids = torch.tensor([row.ids[start : start + 8]])
        if ids.shape[1] > 1:
            with torch.no_grad():
                nll += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
    assert (scores.nll, scores.tokens) == (pytest.approx(nll, rel=1e-5), tokens)


def test_the_perplexity_of_answers_is_the_loss_of_their_training(marking, model, tmp_path):
    args = sft_config(tmp_path, max_length=None, per_device_eval_batch_size=1)
    rows = SHAPES["several turns"]
    trainer = FNSFTTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=marking)
    read = [RowReader(marking).read(row) for row in rows]
    scores = score_rows(trainer.model, read, batch_size=3)
    for row, score in zip(trainer.train_dataset, scores, strict=True):
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            loss = trainer.model.eval()(ids, labels=labels).loss.item()
        assert score.nll / score.tokens == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(("one", "other", "same"), [([1, 2], [1, 2, 3], 2), ([1, 9], [1, 2], 1), ([], [1], 0)])
def test_a_common_prefix_ends_where_ids_differ(one, other, same):
    assert common_prefix(one, other) == same
