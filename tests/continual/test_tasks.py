"""Tasks: the rows that a description of columns and labels gives, and what is said of a wrong one."""

import json
from types import SimpleNamespace

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from torch import nn

from fnsft_trl.continual import Task, TaskConfig
from fnsft_trl.continual.scorers import score_task
from fnsft_trl.errors import FNSFTError


@pytest.fixture
def data(tmp_path):
    rows = [{"title": f"t{n}", "body": f"text {n} {'long ' * 20}", "label": n % 3} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "rows.jsonl")


def config(data, **changes):
    given = {"dataset": data, "test_split": "train", "prompt": "{title}: {body}\nTopic:", "answer": "{label}"}
    return TaskConfig(**{**given, "labels": {"0": "A", "1": "B", "2": "C"}, **changes})


def test_rows_are_what_their_columns_say(data, tmp_path):
    task = Task.read("topics", config(data, max_characters=8, test_rows=5))
    assert (len(task.train), len(task.test), task.answers) == (15, 5, ("A", "B", "C"))
    assert not {row["prompt"] for row in task.train} & {row["prompt"] for row in task.test}
    row = next(row for row in task.train + task.test if row["prompt"].startswith("t7:"))
    assert row == {"prompt": "t7: text 7 l\nTopic:", "completion": " B"}
    assert Task.read("topics", config(data, max_characters=8, test_rows=5)) == task
    train, test = task.write(tmp_path / "out")
    assert [json.loads(line) for line in train.read_text().splitlines()] == task.train
    assert len(test.read_text().splitlines()) == 5


def test_the_first_rows_of_a_sorted_dataset_are_of_all_labels(data, tmp_path):
    """Replay, Fisher information and directions are of the first rows of a task."""
    rows = [{"title": f"t{n}", "body": "x", "label": n // 20} for n in range(60)]
    (tmp_path / "sorted.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = Task.read("topics", config(str(tmp_path / "sorted.jsonl"), test_rows=6))
    assert {row["completion"] for row in task.train[:12]} == {" A", " B", " C"}


def test_labels_that_the_data_names_are_taken(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    rows = Dataset.from_dict({"text": ["x", "y", "z", "w"], "label": [0, 1, 1, 0]}, features=features)
    rows.save_to_disk(tmp_path / "saved")
    given = {"test_split": "train", "prompt": "{text} ", "answer": "{label}"}
    task = Task.read("a", TaskConfig(dataset=str(tmp_path / "saved"), **given))
    assert {(row["prompt"], row["completion"]) for row in task.train + task.test} == {
        *(("x ", "bad"), ("y ", "good"), ("z ", "good"), ("w ", "bad")),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "{titel}"}, "task a: .*no column 'titel' .*did you mean 'title'"),
        ({"answer": "{lable}"}, "no column 'lable'"),
        ({"train_split": "training"}, "no split 'training'; it has train"),
        ({"labels": {"0": "A", "1": "B"}}, "is labelled '2', which labels does not name"),
        ({"labels": None, "scorer": "choice"}, "does not name the labels in {label}; give labels"),
        ({"dataset": "embedded:nothing"}, "no embedded task 'nothing'"),
        ({"dataset": "missing.jsonl"}, "does not exist"),
    ],
)
def test_a_wrong_task_is_one_line(data, changes, message):
    with pytest.raises(FNSFTError, match=message):
        Task.read("a", config(data, **changes))


@pytest.mark.parametrize("body", ["{body}", "{body}\n"])
def test_the_answer_of_a_row_is_one_of_its_choices(tmp_path, body):
    """Whether or not the prompt of a row, or its template, ends in a space."""
    rows = [{"body": f"text {n}" + " \n"[n % 3 : n % 3 + 1], "label": n % 2} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {"prompt": body, "scorer": "choice", "labels": {"0": "A", "1": "B"}}
    task = Task.read("topics", config(str(tmp_path / "rows.jsonl"), **given))
    assert len({row["prompt"][-1:] for row in task.test}) == (3 if body == "{body}" else 1)
    assert all(row["completion"] in task.choices(row) for row in task.test)


class Likes(nn.Module):
    """A model for which every token but one is alike, whatever it reads."""

    def __init__(self, size, token):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(size))
        self.logits.data[token] = 5.0

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def test_a_choice_is_the_likeliest_of_all_answers(data, tokenizer):
    """All answers are one token after the same space, and the model likes that of B."""
    task = Task.read("topics", config(data, scorer="choice", test_rows=6))
    b = tokenizer("B")["input_ids"][-1]
    found = score_task(Likes(len(tokenizer), b), tokenizer, task, batch_size=4)
    assert found["rows"] == [float(row["completion"] == " B") for row in task.test]
    assert found["score"] == pytest.approx(sum(found["rows"]) / 6)
    assert score_task(Likes(len(tokenizer), b), tokenizer, Task.read("t", config(data)), batch_size=4)["score"] == 0
    with pytest.raises(FNSFTError, match="max_length"):
        score_task(Likes(len(tokenizer), b), tokenizer, task, batch_size=4, max_length=3)
