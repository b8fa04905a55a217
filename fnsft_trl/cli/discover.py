"""fnsft discover MODEL DATASET...: find functional networks and save them as a template."""

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
    parser.add_argument("--dtype", default="float32", help="precision of the model: float32, bfloat16, float16, auto")
    add_config_arguments(parser, _DISCOVERY_FIELDS)
    args = parser.parse_args(argv)
    config = FunctionalNetworkConfig(**{name: getattr(args, name) for name in _DISCOVERY_FIELDS})
    output_dir = check_writable(args.output_dir)

    from ..data import load_texts
    from ..discovery import discover_networks
    from .models import load_model_and_tokenizer

    texts = load_texts(args.datasets, split=args.dataset_split)
    model, tokenizer = load_model_and_tokenizer(args.model, args.dtype)
    template = discover_networks(model, tokenizer, texts, config, sources=args.datasets)
    template.save_pretrained(output_dir)
    print(f"Template saved to: {output_dir}")
    print(f"Number of components: {len(template.components)}\n")
    print("Component Coverage Summary:")
    for number, component in enumerate(template.components):
        print(
            f"  Component {number}: {component.neurons} neurons across {len(component.layers)} layers, "
            f"reliability {component.reliability:.2f}"
        )
