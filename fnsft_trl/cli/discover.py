"""fnsft discover MODEL DATASET...: find functional networks and save them as a template."""

import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import FunctionalNetworkConfig
from ..data.config import DataConfig
from ..errors import FNSFTError
from ..occupied import TEMPLATE
from ..training.protection_config import DIMS
from ..writing import disk_errors, files_written_whole
from .endings import command
from .options.arguments import read_arguments
from .options.loading import LoadingConfig, loading_options
from .options.schema import Option, describe, row
from .output import check_writable
from .pushing import PUSH_OPTIONS, push_arguments


PROGRESS = ".progress"  # in output_dir

ABOUT = "Find the functional networks of a model and save them as a template."

# Fields of FunctionalNetworkConfig that have no part in a discovery.
_OF_SELECTION = (
    *("ica_min_reliability", "ica_template_path", "ica_template_revision", "ica_component_ids", "ica_datasets"),
    *("ica_select", "ica_fraction", "ica_rank_by"),
)
_DATA_FIELDS = ("columns", "template_format", "prompt_template")
# The original project's names.
_OTHER_NAMES = {
    "ica_max_length": "max_seq_length",
    "ica_layers": "ica_mask_layers",
    "ica_rank": "ica_pca_preprocessing_components",
}


def options() -> list[Option]:
    """The options of the verb."""
    datasets = "Hub ids, directories or files (.json, .jsonl, .csv, .parquet, .txt)."
    by_place = {"positional": True, "required": True}
    return [
        row("model_name_or_path", "Hub id or directory of a model, or `embedded`.", metavar="MODEL", **by_place),
        row("datasets", datasets, aliases=("ica_build_templates_from",), many=True, metavar="DATASET", **by_place),
        row(
            "output_dir",
            "Where to save the template.",
            "ica_templates",
            aliases=("ica_template_output",),
            metavar="DIR",
        ),
        row("license", "Id of a license for the model card, such as mit."),
        row("dataset_split", "Split of the datasets to read.", "train"),
        row("resume", "Continue an interrupted discovery in output_dir.", False),
        row(
            "basis_only",
            "Find no networks, only the leading directions of the inputs of all linear layers, for `protect_basis`. "
            f"They are {DIMS} for each input, or as many as ica_store_basis says.",
            False,
        ),
        row(
            "examples",
            "Number of texts to keep for each network, those in which it is most active (examples.json beside the "
            "template).",
            0,
            lowest=0,
        ),
        *PUSH_OPTIONS,
        row(
            "push_examples", "With push_to_hub and examples: push these texts too.", False, group="pushing to the Hub"
        ),
        *(option for option in describe(DataConfig) if option.name in _DATA_FIELDS),
        *loading_options(),
        *_discovery_options(),
    ]


def _discovery_options() -> list[Option]:
    """The fields of FunctionalNetworkConfig that a discovery reads; `ica_` may be left out."""
    found = []
    for option in describe(FunctionalNetworkConfig):
        if option.name.startswith("ica_") and option.name not in _OF_SELECTION:
            aliases = () if option.name == "ica_dtype" else (option.name.removeprefix("ica_"),)  # dtype is the model's
            aliases += (_OTHER_NAMES[option.name],) if option.name in _OTHER_NAMES else ()
            found.append(replace(option, aliases=aliases))
    return found


def main(argv: list[str]) -> None:
    args = read_arguments(argv, options())
    config = FunctionalNetworkConfig(**args.of(FunctionalNetworkConfig))
    data_config = DataConfig(**args.of(DataConfig))
    loading = LoadingConfig(**args.of(LoadingConfig))
    read = {f"the dataset {name}": name for name in args.datasets}
    output_dir = check_writable(args.output_dir, TEMPLATE, {"the model": args.model_name_or_path, **read})
    _check(args)
    push = push_arguments(args, TEMPLATE)

    import torch
    from accelerate import PartialState

    from ..compat.accelerate import parse_flag_from_env
    from ..data.prompts import set_chat_template
    from ..data.sources import load_texts
    from ..discovery import clear_progress, discover_group
    from .models import check_loading, load_model_and_tokenizer
    from .templates import save_template

    # Without the flag, processes on a machine without an accelerator would not know of each other.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    check_loading(loading, state.device.type)
    if loading.device_map is not None and state.num_processes > 1:
        raise FNSFTError("device_map places one model, and each of several processes holds its own; drop it")
    texts = load_texts(args.datasets, split=args.dataset_split, columns=data_config.columns)
    columns = [rows.column_names for rows in texts.values()]  # None of a stream whose columns are not known yet
    is_rendered = any(names is None or {"prompt", "messages"} & set(names) for names in columns)
    if not is_rendered and data_config.template_format != "auto":
        raise FNSFTError(
            f"template_format={data_config.template_format} has no effect on rows of text, which are read as "
            "they are; drop it"
        )
    model, tokenizer = load_model_and_tokenizer(args.model_name_or_path, loading, device=state.device)
    set_chat_template(tokenizer, data_config.template_format, data_config.prompt_template)
    if args.basis_only:
        from .basis import find_basis

        find_basis(model, tokenizer, texts, config, output_dir, push=push, is_main=state.is_main_process)
        return
    progress = output_dir / PROGRESS
    template, of_datasets = discover_group(model, tokenizer, texts, config, progress_dir=progress, resume=args.resume)
    # Nothing is exchanged from here on, and a process that ends in a group it has not left can abort.
    state.wait_for_everyone()
    state.destroy_process_group()
    if not state.is_main_process:
        return
    template.license = args.license
    save_template(template, output_dir)
    _save_parts(of_datasets, output_dir / "datasets")
    clear_progress(progress)
    with suppress(OSError):
        progress.rmdir()
    _show(template)
    kept = _save_examples(model, tokenizer, template, texts, args.examples, output_dir) if args.examples else None
    if push is not None:
        beside = {kept.name: kept.read_bytes()} if args.push_examples else None
        url = template.push_to_hub(**push, beside=beside)
        print(f"Pushed to: {url}")


def _check(args) -> None:
    """Refuse what has no effect: without examples, or where no networks are found."""
    if args.push_examples and not (args.examples and args.push_to_hub):
        raise FNSFTError("push_examples has no effect without examples and push_to_hub; give them, or drop it")
    if not args.basis_only:
        return
    read = {"ica_store_basis", "ica_max_tokens", "ica_max_length", "ica_batch_size", "ica_template_samples_per_ds"}
    idle = [name for name in args.given if name.startswith("ica_") and name not in read]
    idle += [name for name in ("resume", "license", "examples") if name in args.given]
    if idle:
        raise FNSFTError(f"{min(idle)} has no effect with basis_only, which finds no networks; drop one of them")


def _save_examples(model, tokenizer, template, texts, count: int, directory: Path) -> Path:
    """Keep the texts in which the networks are most active beside the template."""
    from ..probes.examples import find_examples
    from ..template.stored import StoredTemplate

    of_template = StoredTemplate.open(directory).description.tensors_sha256
    found = find_examples(model, tokenizer, template, texts, count=count, tensors_sha256=of_template)
    path = found.save(directory)
    print(f"Texts in which the networks are most active: {path}")
    return path


def _save_parts(templates: dict[str, Any], directory: Path) -> None:
    """Save the templates of the single datasets, in the place of those of an older discovery."""
    if not templates and not any(directory.glob("[0-9]*-*/template.safetensors")):
        return
    older = ("[0-9]-*", "[0-9][0-9]-*")
    with disk_errors(directory), files_written_whole(directory, owned=older, exchanged=True) as scratch:
        for number, (name, template) in enumerate(templates.items()):
            template.save_pretrained(scratch / f"{number}-{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-')}")


def interrupted(argv: list[str]) -> str:
    """What is saved of a discovery that was interrupted, and how to go on."""
    progress = Path(read_arguments(argv, options()).output_dir).expanduser() / PROGRESS
    if not any(progress.glob("batch-*/process-0.safetensors")):
        return "interrupted; nothing was saved yet"
    return f"interrupted; how far it was is saved, go on with {command('discover', argv, '--resume')}"


def _show(template) -> None:
    print(f"Number of components: {len(template.components)}\n")
    print("Component Coverage Summary:")
    for number, component in enumerate(template.components):
        print(
            f"  Component {number}: {component.neurons} neurons across {len(component.layers)} layers, "
            f"reliability {component.reliability:.2f}, above null {template.reliability_above_null(number):.2f}"
            + "".join(f"; {'also' if r['recurs'] else 'not'} in {n}" for n, r in component.recurrence.items())
        )
    print(
        f"\nNull: without co-activation, as many components have a mean reliability of "
        f"{template.null['reliability']:.2f}, at most {template.null['highest']:.2f}, and an overlap of "
        f"{template.null['jaccard']:.2f} (see docs/discovery.md)"
    )
