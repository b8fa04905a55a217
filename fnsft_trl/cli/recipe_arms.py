"""Recipes, the YAML files of `fnsft train`, as the arms of an experiment: all checked before the first is trained."""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import RANDOM_SELECTORS, FunctionalNetworkConfig
from ..data.embedded import EMBEDDED
from ..errors import FNSFTError
from ..template.storage import NETWORK_DIR
from .options.loading import LoadingConfig
from .options.parse import OF_LORA, TrainOptions, parse_recipe


if TYPE_CHECKING:
    from ..experiments.arms import Arm
    from ..training.trainer import FNSFTTrainer


SHARED_FILE = "experiment.yaml"  # in a folder of recipes: the options of the experiment

_ENDINGS = (".yaml", ".yml")
_OF_NETWORKS = tuple(f.name for f in fields(FunctionalNetworkConfig))
# What a run does around its training, and what an experiment does itself.
_PLACELESS = (
    *("push_to_hub", "resume_from_checkpoint", "merge_adapter_with_base", "convert_to_gguf", "ica_template_output"),
    "dataset_streaming",
)
# What changes no number of a cell.
_IDLE = (
    *("output_dir", "seed", "report_to", "run_name", "project", "wandb_project", "disable_tqdm", "logging_steps"),
    *("logging_strategy", "logging_first_step", "logging_dir", "log_level", "save_total_limit", "dataset_num_proc"),
    *("dataloader_num_workers", "tokenized_cache"),
)
# What decides on which rows an arm is scored, where it holds them out itself.
_OF_ROWS = (
    *("dataset_name", "dataset_config", "datasets", "dataset_train_split", "dataset_test_split", "test_split_size"),
    *("eval_fraction", "max_samples", "columns"),
)
_OF_MODEL = ("model_name_or_path", "model_revision")
_OF_RETENTION = ("retention_datasets", "retention_tokens")
# What the activations of a discovery depend on, beside its own settings.
_OF_LOADING = (*_OF_MODEL, "dtype", "load_in_4bit", "load_in_8bit", "attn_implementation", "bnb_4bit_quant_type")
_OF_TEXT = (*_OF_ROWS, "template_format", "prompt_template", "chat_template_path", "dataset_text_field", "eos_token")


def find_recipes(given: Sequence[str]) -> tuple[dict[str, Path], Path | None]:
    """The recipes that folders and files come to.

    Args:
        given: folders, all of whose YAML files are recipes but for `experiment.yaml`, and files.

    Returns:
        Name of each arm -> its file; and `experiment.yaml`, if one folder that was given has it.

    Raises:
        FNSFTError: one does not exist, a folder holds no recipe, two of them have one name, or two folders have an
            `experiment.yaml`.
    """
    files: list[Path] = []
    shared = []
    for name in given:
        path = Path(os.path.expanduser(name))
        if os.path.isdir(path):
            inside = sorted(file for file in path.iterdir() if file.suffix in _ENDINGS and file.is_file())
            shared += [file for file in inside if file.name == SHARED_FILE]
            inside = [file for file in inside if file.name != SHARED_FILE]
            if not inside:
                raise FNSFTError(
                    f"the folder {name} holds no recipe; put a YAML file of fnsft train there for each arm"
                )
            files += inside
        elif os.path.isfile(path):
            files.append(path)
        else:
            raise FNSFTError(
                f"there is no folder or file {name}; give a folder of YAML files of fnsft train, or files"
            )
    if len(shared) > 1:
        raise FNSFTError(f"{shared[0]} and {shared[1]} both say how to run the experiment; name one with --config")
    found: dict[str, Path] = {}
    for file in files:
        if file.stem in found:
            raise FNSFTError(
                f"two arms are named {file.stem!r}: {found[file.stem]} and {file}; the name of its file is that of an "
                "arm, so rename one"
            )
        found[file.stem] = file
    return found, next(iter(shared), None)


def read_arms(
    files: Mapping[str, Path],
    command_line: Mapping[str, Any],
    *,
    data: Sequence[str] | None,
    max_new_tokens: int | None = None,
) -> list["Arm"]:
    """Parse every recipe, and see that they make one experiment.

    Args:
        files: name of each arm -> its file.
        command_line: options of `fnsft train` that hold for all arms, over what their recipes say; those of networks
            and of LoRA for the arms that have any.
        data: datasets to score answers on; by default each arm holds rows out, as its recipe says.
        max_new_tokens: the longest answer that the arms are let generate; none by default.

    Raises:
        FNSFTError: a recipe is not understood, or arms cannot be compared; with the file.
    """
    asked = {name: _parsed(file, command_line) for name, file in files.items()}
    _check_used(asked, command_line)
    _check_comparable(asked, data)
    check_model(next(iter(asked.values())))
    for notes in dict.fromkeys(tuple(options.notes) for options in asked.values()):
        for note in notes:
            print(f"fnsft experiment: note: {note}", file=sys.stderr)
    hashes: dict[str, str] = {}
    arms = [_arm(name, options, data, hashes) for name, options in asked.items()]
    if max_new_tokens is None:
        return arms
    more = {"max_new_tokens": max_new_tokens}
    return [replace(arm, settings=arm.settings | more, **more) for arm in arms]


def _parsed(file: Path, command_line: Mapping[str, Any]) -> TrainOptions:
    try:
        plain = parse_recipe(str(file), {})
        idle = (*(() if plain.network_config else _OF_NETWORKS), *(() if plain.values.get("use_peft") else OF_LORA))
        asked = parse_recipe(str(file), {name: value for name, value in command_line.items() if name not in idle})
        for name in _PLACELESS:
            if asked.values.get(name):
                raise FNSFTError(f"{name} has no place in an experiment, which keeps every model it trains; drop it")
    except FNSFTError as error:
        shown = str(error)
        raise FNSFTError(shown if str(file) in shown else f"{file}: {shown}") from error
    return asked


def _check_used(asked: Mapping[str, TrainOptions], command_line: Mapping[str, Any]) -> None:
    """What is given for all arms must reach one."""
    for name, value in command_line.items():
        has_networks = any(options.network_config for options in asked.values())
        has_lora = any(options.values.get("use_peft") for options in asked.values())
        if (name in _OF_NETWORKS and not has_networks) or (name in OF_LORA and not has_lora):
            what = "networks" if name in _OF_NETWORKS else "LoRA"
            raise FNSFTError(f"{name} ({value}) has no effect, since no arm has {what}; drop it")


def _check_comparable(asked: Mapping[str, TrainOptions], data: Sequence[str] | None) -> None:
    first_name, first = next(iter(asked.items()))
    if first.retention is None:
        raise FNSFTError(
            f"{first_name} measures nothing of what the model loses; give retention_datasets (name=source, for "
            "instance wiki=embedded) in every recipe, or once on the command line"
        )
    alike = {"the model": _OF_MODEL, "the retention texts": _OF_RETENTION}
    if data is None:
        alike["the rows that are held out"] = _OF_ROWS
    for name, options in asked.items():
        for what, keys in alike.items():
            for key in keys:
                here, there = options.values.get(key), first.values.get(key)
                if here != there:
                    raise FNSFTError(
                        f"{first_name} and {name} cannot be compared: {what} must be the same, and {key} is {there!r} "
                        f"in one and {here!r} in the other"
                    )
        if data is None and options.values.get("eval_strategy") in (None, "no"):
            raise FNSFTError(
                f"{name} holds no rows out to score its answers on; give data, a file of such rows, or an "
                "eval_strategy in every recipe"
            )


def check_model(asked: TrainOptions) -> None:
    """Check that the model of all arms is there.

    Raises:
        FNSFTError: it is not.
    """
    from transformers import AutoConfig

    from ..data.embedded import resolve_model
    from .models import model_errors, source_arguments

    name = asked.values["model_name_or_path"]
    with model_errors(name):
        AutoConfig.from_pretrained(resolve_model(name), **source_arguments(LoadingConfig(**asked.of(LoadingConfig))))


def _arm(name: str, asked: TrainOptions, data: Sequence[str] | None, hashes: dict[str, str]) -> "Arm":
    from ..experiments.arms import Arm

    values, config = asked.values, asked.network_config
    asked = replace(asked, notes=[])
    settings = settings_of(values | {"data": data})
    sources = sources_of(asked, data or (), hashes)
    trainer = partial(cell_trainer, asked, data)
    arm = Arm(name, _task(values), trainer, settings, sources)
    if config is None or config.ica_template_path is not None:
        return arm
    depends = {key: values.get(key) for key in _OF_LOADING} | config.discovery_settings() | {"site": config.ica_site}
    depends["datasets"] = config.ica_datasets
    read = [values["model_name_or_path"], *(config.ica_datasets or _names(values))]
    if config.ica_datasets is None:
        depends |= {key: values.get(key) for key in _OF_TEXT} | {"held out": data is None}
    depends["sources"] = {path: sha256 for path, sha256 in sources.items() if path in read}
    digest = hashlib.sha256(json.dumps(_plain(depends), sort_keys=True).encode()).hexdigest()
    draws_text = config.ica_datasets is None and (data is None or values.get("max_samples") is not None)
    return replace(arm, discover=partial(_template, asked, data), networks=digest[:16], networks_by_seed=draws_text)


def cell_trainer(
    asked: TrainOptions, data: Sequence[str] | None, seed: int, directory: Path, template: Path | None
) -> "FNSFTTrainer":
    """The trainer of a cell of an experiment.

    Args:
        asked: its options.
        data: datasets to score answers on.
        seed: of the training, and of random neurons.
        directory: to write into.
        template: the directory of its networks.
    """
    from .fine_tuning import make_trainer
    from .logs import hush_libraries

    hush_libraries()
    given = {"seed": seed, "output_dir": str(directory)}
    if asked.values.get("packing"):
        given["eval_packing"] = False  # rows are scored one by one
    config = asked.network_config
    if config is not None and config.ica_select in RANDOM_SELECTORS and "ica_seed" not in asked.values:
        config = replace(config, ica_seed=seed)  # of the random neurons; the template is there
    asked = replace(asked, values=asked.values | given, network_config=config)
    return make_trainer(asked, template=template, held_out=data)


def _template(asked: TrainOptions, data: Sequence[str] | None, seed: int, directory: Path):
    """The networks that arms share: each applies its own threshold to them."""
    plain = replace(
        asked.network_config, ica_threshold=None, ica_percentile=None, ica_zscore=None, ica_select="networks"
    )
    asked = replace(asked, network_config=plain, protection=None)
    return cell_trainer(asked, data, seed, directory, None).network_template


def settings_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options on which the numbers of a cell depend, as JSON gives them back."""
    return _plain({key: value for key, value in values.items() if key not in _IDLE})


def _plain(value: Any) -> Any:
    """Options as JSON gives them back."""
    return json.loads(json.dumps(value, default=str))


def _names(values: Mapping[str, Any]) -> list[str]:
    """The datasets that are trained on."""
    if values.get("datasets"):
        return [part["path"] for part in values["datasets"]]
    name = values["dataset_name"]
    return [name] if os.path.exists(os.path.expanduser(name)) else [part.strip() for part in name.split(",")]


def _task(values: Mapping[str, Any]) -> str:
    return ", ".join(Path(name).stem or name for name in _names(values))


def sources_of(asked: TrainOptions, data: Iterable[str], hashes: dict[str, str]) -> dict[str, str]:
    """The local files and folders that an arm reads, with the hash of what is in them.

    Args:
        asked: its options.
        data: further files that it reads.
        hashes: those that are known, which more are added to.
    """
    values, config, retention = asked.values, asked.network_config, asked.retention
    kept = (retention, asked.replay, asked.anchor, asked.penalties, asked.protection)
    read = [config for config in kept if config is not None]
    names = [values["model_name_or_path"], *_names(values), *data]
    names += [source for config in read for source in config.sources().values()]
    names += [values[name] for name in ("chat_template_path", "protect_basis") if values.get(name)]
    if config is not None:
        names += [*(config.ica_datasets or ()), *([config.ica_template_path] if config.ica_template_path else [])]
    found = {}
    for name in dict.fromkeys(names):
        path = os.path.expanduser(name)
        if name != EMBEDDED and os.path.exists(path):  # is false for a name that is no path at all
            hashes[name] = hashes.get(name) or _content_hash(Path(path))
            found[name] = hashes[name]
    return found


def _content_hash(path: Path) -> str:
    """SHA-256 of a file, or of the files of a folder with their names; of a model's, without what lies beside it."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    is_model = any((path / name).is_file() for name in ("config.json", "adapter_config.json"))
    files = [*path.glob("*"), *path.glob(f"{NETWORK_DIR}/*")] if is_model else path.rglob("*")
    for file in sorted(files):
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts):
            digest.update(f"{file.relative_to(path).as_posix()}\0{_content_hash(file)}\n".encode())
    return digest.hexdigest()
