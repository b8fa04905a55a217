"""fnsft discover MODEL DATASET...: find functional networks and save them as a template."""

import re
from argparse import SUPPRESS
from dataclasses import fields

from ..config import FunctionalNetworkConfig
from ..data.config import DataConfig
from ..errors import FNSFTError
from .arguments import ArgumentParser, add_config_arguments, check_writable
from .pushing import add_push_arguments, push_options


_DISCOVERY_FIELDS = [
    name
    for name in FunctionalNetworkConfig.field_names()
    if name.startswith("ica_")
    and name
    not in (
        "ica_min_reliability",
        "ica_template_path",
        "ica_template_revision",
        "ica_component_ids",
        "ica_datasets",
        "ica_select",
        "ica_fraction",
        "ica_rank_by",
    )
]

_DATA_FIELDS = ("columns", "template_format", "prompt_template")
_DTYPES = ("float32", "bfloat16", "float16", "auto")
# The original project's names.
_OTHER_NAMES = {
    "max_seq_length": "ica_max_length",
    "ica_mask_layers": "ica_layers",
    "ica_pca_preprocessing_components": "ica_rank",
}


def main(argv: list[str]) -> None:
    parser = ArgumentParser(
        prog="fnsft discover", description="Find the functional networks of a model and save them as a template."
    )
    parser.add_argument("model", nargs="?", help="Hub id or directory of a model, or `embedded`")
    parser.add_argument(
        "datasets", nargs="*", help="Hub ids, directories or files (.json, .jsonl, .csv, .parquet, .txt)"
    )
    parser.add_argument("--model_name_or_path", metavar="MODEL", help="the model, by name")
    parser.add_argument(
        "--ica_build_templates_from", nargs="+", default=[], metavar="DATASET", help="the datasets, by name"
    )
    parser.add_argument(
        "--output_dir", "--ica_template_output", default="ica_templates", help="where to save the template"
    )
    add_push_arguments(parser)
    parser.add_argument("--license", help="id of a license for the model card, for instance mit")
    parser.add_argument("--dataset_split", default="train", help="split of the datasets to read")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted discovery in --output_dir")
    for field in fields(DataConfig):
        if field.name in _DATA_FIELDS:
            parser.add_argument(f"--{field.name}", default=field.default, help=field.metadata["help"])
    parser.add_argument("--dtype", default="float32", choices=_DTYPES, help="precision of the model")
    add_config_arguments(parser, _DISCOVERY_FIELDS)
    for old, name in _OTHER_NAMES.items():
        kind = str if name == "ica_layers" else int
        parser.add_argument(f"--{old}", type=kind, dest=name, default=SUPPRESS, help=f"another name of --{name}")
    args = parser.parse_args(argv)
    named = [args.model_name_or_path] if args.model_name_or_path else []
    model_name, *datasets = [*named, *([args.model] if args.model else []), *args.datasets] or [None]
    datasets += args.ica_build_templates_from
    if model_name is None or not datasets:
        raise FNSFTError("a model and at least one dataset are needed: fnsft discover MODEL DATASET...")
    config = FunctionalNetworkConfig(**{name: getattr(args, name) for name in _DISCOVERY_FIELDS})
    data_config = DataConfig(**{name: getattr(args, name) for name in _DATA_FIELDS})
    output_dir = check_writable(args.output_dir)
    push = push_options(args)

    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    from ..data.prompts import set_chat_template
    from ..data.sources import load_texts
    from ..discovery.discovery import discover_group
    from .models import load_model_and_tokenizer
    from .templates import save_template

    # Without the flag, processes on a machine without an accelerator would not know of each other.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    texts = load_texts(datasets, split=args.dataset_split, columns=data_config.columns)
    columns = [rows.column_names for rows in texts.values()]  # None of a stream whose columns are not known yet
    is_rendered = any(names is None or {"prompt", "messages"} & set(names) for names in columns)
    if not is_rendered and data_config.template_format != "auto":
        raise FNSFTError(
            f"template_format={data_config.template_format} has no effect on rows of text, which are read as "
            "they are; drop it"
        )
    model, tokenizer = load_model_and_tokenizer(model_name, args.dtype)
    set_chat_template(tokenizer, data_config.template_format, data_config.prompt_template)
    template, of_datasets = discover_group(
        model.to(state.device), tokenizer, texts, config, progress_dir=output_dir / ".progress", resume=args.resume
    )
    # Nothing is exchanged from here on, and a process that ends in a group it has not left can abort.
    state.wait_for_everyone()
    state.destroy_process_group()
    if not state.is_main_process:
        return
    template.license = args.license
    for number, (name, part) in enumerate(of_datasets.items()):
        part.save_pretrained(output_dir / "datasets" / f"{number}-{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-')}")
    save_template(template, output_dir)
    print(f"Number of components: {len(template.components)}\n")
    print("Component Coverage Summary:")
    for number, component in enumerate(template.components):
        print(
            f"  Component {number}: {component.neurons} neurons across {len(component.layers)} layers, "
            f"reliability {component.reliability:.2f}"
            + "".join(f"; {'also' if r['recurs'] else 'not'} in {n}" for n, r in component.recurrence.items())
        )
    print(
        f"\nShuffled in time, as many components have reliability {template.null['reliability']:.2f} and overlap "
        f"{template.null['jaccard']:.2f} (see docs/discovery.md)"
    )
    if push is not None:
        url = template.push_to_hub(**push)
        print(f"Pushed to: {url}")
