"""What does not reach the model as it is written is said, and nothing else."""

import copy

import pytest
from datasets import Dataset

from fnsft_trl import to_trl_format
from fnsft_trl.data.notes import say_marks, say_thoughts


FORGETS = (
    "{% for m in messages %}{{ m['role'] }}: {{ (m['content'].split('</think>') | last) }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
THINKS = [
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>\nhm\n</think>\na"}]},
    {
        "prompt": [{"role": "user", "content": "q"}],
        "completion": [{"role": "assistant", "content": "<think>hm</think>a"}],
    },
]


@pytest.mark.parametrize("row", THINKS, ids=["messages", "prompt"])
def test_thoughts_that_a_template_leaves_out_are_named(row, tokenizer, log):
    rows = Dataset.from_list([row] * 3)
    say_thoughts(rows, tokenizer, assistant_only_loss=False)
    assert "think" not in log.text
    forgetful = copy.deepcopy(tokenizer)
    forgetful.chat_template = FORGETS
    say_thoughts(rows, forgetful, assistant_only_loss=False)
    assert "leaves out what 3 of 3 last answers think" in log.text


def test_an_answer_without_thoughts_is_no_reason_to_speak(tokenizer, log):
    plain = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>\n\n</think>\na"}]
    forgetful = copy.deepcopy(tokenizer)
    forgetful.chat_template = FORGETS
    say_thoughts(Dataset.from_list([{"messages": plain}]), forgetful, assistant_only_loss=False)
    assert not log.text
    reasoned = [plain[0], {"role": "assistant", "content": "a", "reasoning_content": "hm"}]
    say_thoughts(to_trl_format([{"messages": reasoned}]), tokenizer, assistant_only_loss=False)
    assert "what 1 of 1 last answers think" in log.text


def test_marks_that_are_no_tokens_are_named(tokenizer, log):
    rows = Dataset.from_dict({"text": ["<|im_start|>user\nq<|im_end|>", "a < b | c"]})
    say_marks(rows, tokenizer, "text")
    assert "texts hold <|im_end|>, <|im_start|>, which the tokenizer has no token for" in log.text
    log.clear()
    knowing = copy.deepcopy(tokenizer)
    knowing.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    say_marks(rows, knowing, "text")
    assert not log.text
