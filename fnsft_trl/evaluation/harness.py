"""Tasks of lm-evaluation-harness, by name or from a folder, with adapters and masks as they are on the model.

    python -m fnsft_trl.evaluation.harness --model hf --model_args pretrained=MODEL,peft=ADAPTER --tasks TASK

is lm-eval's own command after `import fnsft_trl.tuner`, without which PEFT knows no neuron deltas. A model that gives
no numbers (NaN) is an error there and here.
"""

import copy
import difflib
import logging
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets.exceptions import DatasetsError
from torch import nn

from ..compat.lm_eval import replace_own_model, sandbox_templates
from ..errors import FNSFTError
from ..finite import check_finite
from ..tuner.saved import first_line
from .evaluated import EvaluatedModel
from .generation import OnlyNumbers
from .measures import Measure
from .share import ALONE, Share


@dataclass(frozen=True)
class TaskScores:
    """
    The scores of tasks.

    Attributes:
        measures (`dict[str, Measure]`): `task/metric` -> score, of metrics that are means of one value for each row.
        others (`dict[str, float]`): `task/metric` -> value of all other metrics, and of groups of tasks.
        about (`dict[str, dict]`): task -> version, number of rows, few-shot examples, as JSON values.
    """

    measures: dict[str, Measure]
    others: dict[str, float]
    about: dict[str, dict[str, Any]]


def _check_no_code(folder: Path) -> None:
    """See that tasks are data: that no file has tags, with which lm-eval runs code, or includes one of elsewhere.

    Raises:
        FNSFTError: one has.
    """
    for path in folder.rglob("*.yaml"):
        try:
            with path.open("rb") as file:
                events = list(yaml.parse(file, Loader=yaml.BaseLoader))
        except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
            raise FNSFTError(f"{path} is no YAML ({first_line(error)}); take it out of include_path") from error
        said = [event.value for event in events if isinstance(event, yaml.ScalarEvent)]
        places = [(path.parent / text).resolve() for text in said if text.endswith((".yaml", ".yml"))]
        is_outside = "include" in said and not all(place.is_relative_to(folder.resolve()) for place in places)
        if is_outside or any(getattr(event, "tag", None) for event in events):
            raise FNSFTError(
                f"{path} brings code of its own (a tag such as !function, or a file of another folder), which runs "
                "only if that is asked for: trust_remote_code"
            )


def check_harness() -> None:
    """Check that tasks can be run.

    Raises:
        FNSFTError: lm-eval is not installed.
    """
    if find_spec("lm_eval") is None:
        raise FNSFTError("tasks need lm-eval; run: python -m pip install 'fnsft-trl[eval]'")


class Tasks:
    """
    Tasks of lm-evaluation-harness, found but not yet loaded.

    Args:
        names (`Sequence[str]`): of tasks, groups and tags; patterns with `*` are allowed.
        include_path (`str`, *optional*): folder with tasks of one's own (YAML), which come before lm-eval's.
        trusts (`bool`, *optional*, defaults to `False`): whether these may bring code of their own (`!function`).

    Raises:
        FNSFTError: a name that is not known, a folder that is not there, or one whose tasks bring code.
    """

    def __init__(self, names: Sequence[str], include_path: str | None = None, *, trusts: bool = False) -> None:
        check_harness()
        from lm_eval.tasks import TaskManager

        sandbox_templates()

        folder = None if include_path is None else Path(include_path).expanduser()
        if folder is not None and not folder.is_dir():
            raise FNSFTError(f"include_path is {include_path}, and there is no such folder; give one with YAML files")
        if folder is not None and not trusts:
            _check_no_code(folder)
        own = [] if folder is None else TaskManager(include_path=str(folder), include_defaults=False).all_tasks
        # The index of lm-eval's own thousands of tasks takes seconds.
        defaults = not set(names) <= set(own)
        self._manager = TaskManager(include_path=folder and str(folder), include_defaults=defaults)
        self.names = [found for name in names for found in self._found(name)]

    def _found(self, name: str) -> list[str]:
        known = self._manager.all_tasks
        found = self._manager.match_tasks([name]) if "*" in name else [name] if name in known else []
        if not found:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise FNSFTError(
                f"lm-eval knows no task {name!r}{hint} `lm-eval ls tasks` lists them, and include_path adds a folder "
                "with your own"
            )
        return sorted(found)

    def run(
        self,
        model: nn.Module,
        tokenizer,
        *,
        num_fewshot: int | None = None,
        limit: int | None = None,
        apply_chat_template: bool = False,
        batch_size: int = 8,
        max_length: int | None = None,
        seed: int = 0,
        share: Share = ALONE,
    ) -> TaskScores:
        """Score a model, with the masks that are on it.

        Args:
            model: a causal language model, plain or with an adapter.
            tokenizer: its tokenizer.
            num_fewshot: examples before each question; as many as the task says by default.
            limit: rows of each task, from its start; all by default.
            apply_chat_template: put questions into the chat template.
            batch_size: requests in a forward pass.
            max_length: longest sequence; that of the model by default.
            seed: of the few-shot examples and of all random numbers.
            share: the part of this process.

        Raises:
            FNSFTError: a task cannot be loaded or run.
        """
        from lm_eval.evaluator import evaluate

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        lm = _shared_model(model, tokenizer, share, batch_size=batch_size, max_length=max_length)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        loaded = self._load(num_fewshot, seed)
        try:
            found = evaluate(
                lm=lm,
                task_dict=loaded,
                limit=limit,
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=apply_chat_template,
                fewshot_as_multiturn=apply_chat_template,
            )
        except (ValueError, ImportError) as error:
            raise self._refused(error) from error
        return _scores(found)

    def _load(self, num_fewshot: int | None, seed: int) -> dict[str, Any]:
        """The tasks with their data, as `lm_eval.simple_evaluate` prepares them."""
        try:
            loaded = self._manager.load(list(self.names))
        except (DatasetsError, ValueError, OSError, KeyError, TypeError, ImportError) as error:
            raise self._refused(error) from error
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            elif num_fewshot is not None and task.get_config("num_fewshot") == 0:
                continue  # a task that says so itself takes no examples
            if num_fewshot is not None:
                task.set_config(key="num_fewshot", value=num_fewshot)
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed=seed)
        return loaded

    def _refused(self, error: Exception) -> FNSFTError:
        return FNSFTError(f"lm-eval cannot run {', '.join(self.names)}: {first_line(error)}")


def _of_numbers() -> type:
    """lm-eval's own class of models, which refuses logits without a largest one.

    A token that the model rules out (a logit of -inf) has a log-likelihood of -inf, as it should.
    """
    from lm_eval.models.huggingface import HFLM

    class Checked(HFLM):
        def _model_call(self, *args, **options):
            logits = super()._model_call(*args, **options)  # (requests, positions, vocabulary)
            largest = logits.amax(-1)
            if not largest.isfinite().all():
                check_finite(largest.flatten().tolist(), f"the largest logits of a model, in {logits.dtype}")
            return logits

        def _model_generate(self, *args, **options):
            return super()._model_generate(*args, logits_processor=[OnlyNumbers()], **options)

    return Checked


def _shared_model(model: nn.Module, tokenizer, share: Share, *, batch_size: int, max_length: int | None):
    """lm-eval's own model around one that is loaded, whose requests are split over the processes.

    To lm-eval it is a single one in every process, so that each comes to the results of all requests.
    """

    class SharedModel(_of_numbers()):
        def loglikelihood(self, requests, disable_tqdm=False):
            parent = super().loglikelihood
            return share.in_parts(lambda own: parent(own, not share.shows), requests)

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            parent = super().loglikelihood_rolling
            return share.in_parts(lambda own: parent(own, not share.shows), requests)

        def generate_until(self, requests, disable_tqdm=False):
            parent = super().generate_until
            return share.in_parts(lambda own: parent(own, not share.shows), requests)

    own = copy.deepcopy(tokenizer)  # which gets a padding token
    # HFLM ties the weights of what it is given once more, and would fail at a copy of them that an adapter trains.
    model.tie_weights = lambda *args, **kwargs: None
    try:
        return SharedModel(pretrained=model, tokenizer=own, batch_size=batch_size, max_length=max_length)
    finally:
        del model.tie_weights


def _scores(found: dict[str, Any]) -> TaskScores:
    measures: dict[str, Measure] = {}
    others: dict[str, float] = {}
    for task, results in found["results"].items():
        rises = found["higher_is_better"].get(task, {})
        samples = sorted(found["samples"].get(task, []), key=lambda sample: sample["doc_id"])
        for key, value in results.items():
            metric, _, kept = key.partition(",")
            if not isinstance(value, int | float) or not kept or metric.endswith("_stderr"):
                continue
            name = f"{task}/{metric}" if kept == "none" else f"{task}/{metric},{kept}"
            of_rows = [sample for sample in samples if sample["filter"] == kept]
            values = [sample.get(metric) for sample in of_rows]
            if values and _is_mean(values, value):
                numbers = [sample["doc_id"] for sample in of_rows]
                measures[name] = Measure.of_rows(
                    list(map(float, values)), numbers, rises=rises.get(metric) is not False
                )
            else:
                others[name] = float(value)
    about = {
        task: {
            "version": found["versions"].get(task),
            "rows": found["n-samples"].get(task, {}).get("effective"),
            "num_fewshot": found["n-shot"].get(task),
        }
        for task in found["results"]
    }
    return TaskScores(measures, others, about)


def _is_mean(values: list, value: float) -> bool:
    """Whether a metric is the mean of one number for each row."""
    if not all(isinstance(each, int | float) for each in values):
        return False
    return abs(sum(values) / len(values) - value) < 1e-9


def _register() -> None:
    """Give lm-eval a model `fnsft`: what a run has written, found by its directory; and have its own one checked."""
    from lm_eval.api.registry import register_model

    checked = _of_numbers()
    replace_own_model(checked)

    @register_model("fnsft")
    class SavedModel(checked):
        def __init__(self, pretrained: str, device: str | None = None, dtype: str = "auto", **options) -> None:
            keys = ("revision", "trust_remote_code")
            given = {key: options.pop(key) for key in keys if options.get(key)}
            found = EvaluatedModel.find(pretrained, dtype=dtype, **given)
            options.setdefault("tokenizer", found.load_tokenizer())
            super().__init__(pretrained=found.load(device), **options)


def main() -> None:
    """lm-eval's own command, to which neuron deltas are known, and a model type `fnsft`.

    A model that gives no numbers ends it, as one of its tasks would give a score of them.
    """
    check_harness()
    from lm_eval.__main__ import cli_evaluate

    from .. import tuner  # noqa: F401, adds neuron deltas to PEFT's tables

    _register()
    try:
        cli_evaluate()
    except FNSFTError as error:
        sys.exit(f"fnsft_trl: {error}")


if __name__ == "__main__":
    main()
