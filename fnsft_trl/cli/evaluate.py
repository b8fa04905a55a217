"""fnsft evaluate MODEL...: score models on rows, general text and tasks, and compare them row by row."""

import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from ..errors import FNSFTError
from ..evaluation.config import RetentionConfig
from ..evaluation.settings import EvaluationConfig
from .masks import check_mask_options, mask_config, mask_options, refuse_idle
from .options.arguments import Arguments, read_arguments
from .options.loading import LoadingConfig, loading_options
from .options.schema import Option, describe, row
from .output import check_writable


ABOUT = (
    "Score models on rows, general text and tasks. A model may be a base model, an adapter, a merged or baked model, "
    "or what a run has written. Several are compared with the first, row by row."
)

_TASKS, _MASK = "tasks of lm-evaluation-harness", "under a mask"
_RETENTION_FIELDS = ("retention_datasets", "retention_tokens", "retention_batch_size")
_ENDINGS = (".json", ".jsonl", ".csv", ".parquet", ".txt")  # of files of rows
_FILES = ("results.json", "report.md", "report.html", "scores.jsonl")
_OF_MODELS = ("config.json", "adapter_config.json")  # what a directory with a model holds


def options() -> list[Option]:
    """The options of the verb."""
    place = "Directory of a model, an adapter or a run, Hub id, or `embedded`. NAME=MODEL gives it a name of its own."
    data = (
        "Rows to score, as DATASET or NAME=DATASET: a Hub id, directory or file. It may hold prompts and "
        "completions, conversations, text, or multiple-choice questions."
    )
    names = "Names of tasks, groups or tags. Patterns with * are allowed."
    return [
        row("models", place, many=True, positional=True, required=True, metavar="MODEL"),
        row("data", data, many=True, metavar="DATASET"),
        row("dataset_split", "Split of the data. By default the one for tests or evaluations, or the only one."),
        row("output_dir", "Where the report goes.", "evaluation", metavar="DIR"),
        row(
            "base", "Also score the base model of the first adapter, before all others and with its tokenizer.", False
        ),
        row("masked", "Also score each model under the mask that it trained under.", False),
        *describe(EvaluationConfig),
        row("tasks", names, many=True, metavar="TASK", group=_TASKS),
        row("include_path", "Folder with tasks of your own (YAML).", metavar="DIR", group=_TASKS),
        row(
            "num_fewshot",
            "Number of examples before each question. By default what the task says.",
            kind="int",
            group=_TASKS,
        ),
        row(
            "limit",
            "Number of rows to take from the start of each task. By default all.",
            kind="int",
            lowest=1,
            group=_TASKS,
        ),
        *(option for option in describe(RetentionConfig) if option.name in _RETENTION_FIELDS),
        *mask_options(_MASK),
        *loading_options(),
    ]


def main(argv: list[str]) -> None:
    args = read_arguments(argv, options())
    settings = EvaluationConfig(**args.of(EvaluationConfig))
    loading = LoadingConfig(**args.of(LoadingConfig))
    _check(args)
    retention = RetentionConfig(**_given(args, _RETENTION_FIELDS)) if args.retention_datasets else None
    mask = mask_config(args)
    output = check_writable(args.output_dir)
    models = named(args.models, "models")
    data = named(args.data or (), "data")
    check_output(output, [*models.values(), *data.values()], _FILES)

    from .evaluation_run import evaluate

    evaluate(args, settings, loading, retention, mask, models, data, output)


def _given(args: Arguments, names: tuple[str, ...]) -> dict:
    return {name: vars(args)[name] for name in names if name in args.given}


def _check(args: Arguments) -> None:
    """What is asked for must be able to have an effect."""
    if not (args.data or args.tasks or args.retention_datasets):
        raise FNSFTError("there is nothing to score on; give data, tasks or retention_datasets")
    of_data = {field.name for field in fields(EvaluationConfig)} - {
        *("batch_size", "seed", "bootstrap_draws", "max_length", "apply_chat_template")
    }
    needs = {
        "data": (*sorted(of_data), "dataset_split"),
        "tasks": ("include_path", "num_fewshot", "limit"),
        "retention_datasets": _RETENTION_FIELDS[1:],
        "generate": ("max_new_tokens",),
    }
    for name, dependent in needs.items():
        refuse_idle(args, name, dependent)
    check_mask_options(args, "score the run that selected so under its own mask (masked)")
    if args.apply_chat_template and not (args.data or args.tasks):
        raise FNSFTError("apply_chat_template: no effect without data or tasks; drop it")
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise FNSFTError(f"num_fewshot is {args.num_fewshot}; it must be at least 0")


def named(given: list[str], what: str) -> dict[str, str]:
    """Name -> place, of what was given as `NAME=PLACE` or as a place, whose last part is then the name."""
    found: dict[str, str] = {}
    for text in given:
        name, separator, place = text.partition("=")
        if not separator or os.path.exists(os.path.expanduser(text)):
            name, place = "", text
        if not place.strip() or "/" in name:
            raise FNSFTError(f"{what} holds {text!r}; write NAME={'MODEL' if what == 'models' else 'DATASET'}")
        short = Path(place).stem if Path(place).suffix in _ENDINGS else Path(place).name
        name = name.strip() or (short if short and short not in found else place)
        if name in found:
            raise FNSFTError(
                f"{what} names {name!r} twice ({found[name]} and {place}); write NAME=... for one of them"
            )
        found[name] = place
    return found


def check_output(output: Path, sources: list[str], files: Sequence[str]) -> None:
    """Refuse to write files over what is read, or into the directory of a model."""
    target = output.resolve()
    for source in sources:
        path = Path(source).expanduser().resolve()
        if target == path or (path.parent == target and path.name in files):
            raise FNSFTError(f"output_dir is {output}, where {source} is read from; name another directory")
    if held := next((name for name in _OF_MODELS if (output / name).is_file()), None):
        raise FNSFTError(f"output_dir is {output}, which holds a model ({held}); name another directory")
