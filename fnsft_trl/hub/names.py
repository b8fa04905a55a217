"""What models and datasets are called in a template: names that say nothing of the machine it was made on."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any


UNKNOWN = "unknown"  # what a template does not say

_LONGEST = 500  # characters


def is_text(value: Any) -> bool:
    """Whether a value is text that can be shown on one line."""
    return isinstance(value, str) and 0 < len(value) <= _LONGEST and value.isprintable()


def is_model_name(value: Any) -> bool:
    """Whether a value is a name that stays a name wherever it is shown: no absolute path, no way up, no address."""
    if value == "":  # a model made in memory
        return True
    is_name = is_text(value) and not re.search(r"[\\:<>|`\[\](){}]", value) and value.count("/") <= 1
    return is_name and all(part.strip(". ") for part in value.split("/"))


def clean_model_name(name: str) -> str:
    """A model's name: its last parts, other characters replaced."""
    if is_model_name(name):
        return name
    cleaned = re.sub(r"[^\w. -]", "-", name.strip("/").split("/")[-1])[:200]
    return cleaned if is_model_name(cleaned) else UNKNOWN


def model_name(model) -> str:
    """The id of a model, or the name of the directory it was loaded from; empty when it was made in memory."""
    name = model.config.name_or_path
    return clean_model_name(Path(name).name if Path(name).exists() else name)


def is_source_name(value: Any) -> bool:
    """Whether a value is the name of a dataset, and no path that leads anywhere by itself."""
    return is_text(value) and not _is_path(value)


def source_names(sources: Sequence[str]) -> list[str]:
    """Names of datasets: those of the Hub as they are, files and directories without the way to them.

    Where two files are called the same, as many of the folders above them go along as tell them apart; the same file
    again is numbered.

    Args:
        sources: what each was called. Taken for a path is what is absolute, or has `..`, `.`, `~` or backslashes; see
            [`absolute_sources`]. A path that ends in `/` is a directory, and its name ends so, too.
    """
    sources = [one_line(source) for source in sources]
    parts = [_parts(source) if _is_path(source) else (source,) for source in sources]
    names: list[str] = []
    for source, own in zip(sources, parts, strict=True):
        name = source
        if _is_path(source):
            others = [other for other in parts if other != own]
            tails = ("/".join(own[-n:]) for n in range(1, len(own)))
            enough = (n for n, t in enumerate(tails, 1) if all("/".join(o[-n:]) != t for o in others))
            name = "/".join(own[-next(enough, len(own)) :]).lstrip("~/")
            name += "/" * (name != "" and source.endswith("/"))
        name = name[:_LONGEST].strip()
        plain = name = name if is_source_name(name) else UNKNOWN
        number = 1
        while name in names:
            number += 1
            name = f"{plain[: _LONGEST - 9]} ({number})"
        names.append(name)
    return names


def absolute_sources(sources: Sequence[str]) -> list[str]:
    """What datasets were called, the files and directories among them as absolute paths."""
    found = []
    for source in sources:
        path = os.path.expanduser(source)
        found.append(os.path.abspath(path) + "/" * os.path.isdir(path) if os.path.exists(path) else source)
    return found


# Datasets that the Hub knows by a name without an owner.
_CANONICAL = """
ag_news aeslc amazon_polarity billsum blimp bookcorpus boolq c4 cnn_dailymail commonsense_qa conll2003 daily_dialog
dbpedia_14 drop eli5 emotion glue gsm8k hans hellaswag hotpot_qa imdb lambada math_qa mbpp mc4 ms_marco multi_news
multi_nli natural_questions openai_humaneval openbookqa openwebtext opus100 opus_books oscar paws pg19 piqa
ptb_text_only quac quail race rotten_tomatoes samsum sciq scitail snli squad squad_v2 sst sst2 super_glue swag
tiny_shakespeare trec trivia_qa truthful_qa tweet_eval web_questions wikihow wikipedia wikitext winogrande wmt14 wmt16
wmt19 xnli xsum yahoo_answers_topics yelp_polarity yelp_review_full
"""


def is_dataset_id(name: str) -> bool:
    """Whether a name is that of a dataset on the Hub, which a card may link: `org/name`, or one without an owner."""
    has_owner = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name, re.ASCII) is not None
    return name in _CANONICAL.split() or (has_owner and not os.path.splitext(name)[1])


def one_line(text: str) -> str:
    """Text with blanks in the place of line breaks and of all else that is not shown."""
    return "".join(char if char.isprintable() else " " for char in text).strip()


def _is_path(source: str) -> bool:
    leads_up = any(part in (".", "..") for part in source.split("/"))
    return source.startswith("/") or (source.startswith("~") and "/" in source) or "\\" in source or leads_up


def _parts(source: str) -> tuple[str, ...]:
    return tuple(part for part in re.split(r"[/\\]", source) if part not in ("", ".", ".."))
