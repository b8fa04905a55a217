"""fnsft discover MODEL DATASET...: find functional networks and save them as a template."""

import re

from ..config import FunctionalNetworkConfig
from .arguments import ArgumentParser, add_config_arguments, check_writable


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


def main(argv: list[str]) -> None:
    parser = ArgumentParser(
        prog="fnsft discover", description="Find the functional networks of a model and save them as a template."
    )
    parser.add_argument("model", help="Hub id or directory of a model, or `embedded`")
    parser.add_argument("datasets", nargs="+", help="Hub ids or files (.json, .jsonl, .csv, .parquet, .txt)")
    parser.add_argument("--output_dir", default="ica_templates", help="where to save the template")
    parser.add_argument("--dataset_split", default="train", help="split of the datasets to read")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted discovery in --output_dir")
    parser.add_argument("--dtype", default="float32", help="precision of the model: float32, bfloat16, float16, auto")
    add_config_arguments(parser, _DISCOVERY_FIELDS)
    args = parser.parse_args(argv)
    config = FunctionalNetworkConfig(**{name: getattr(args, name) for name in _DISCOVERY_FIELDS})
    output_dir = check_writable(args.output_dir)

    from accelerate import PartialState

    from ..data import load_texts
    from ..discovery import discover_group
    from .models import load_model_and_tokenizer

    state = PartialState()
    texts = load_texts(args.datasets, split=args.dataset_split)
    model, tokenizer = load_model_and_tokenizer(args.model, args.dtype)
    template, of_datasets = discover_group(
        model.to(state.device), tokenizer, texts, config, progress_dir=output_dir / ".progress", resume=args.resume
    )
    if not state.is_main_process:
        return
    template.save_pretrained(output_dir)
    for number, (name, part) in enumerate(of_datasets.items()):
        part.save_pretrained(output_dir / "datasets" / f"{number}-{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-')}")
    print(f"Template saved to: {output_dir}")
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
