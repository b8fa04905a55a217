"""fnsft export ADAPTER: write a trained adapter as a merged model or as a plain LoRA, and push it if asked."""

from ..errors import FNSFTError
from ..hub import push_directory
from .arguments import ArgumentParser, check_writable
from .pushing import add_push_arguments, push_options


def main(argv: list[str]) -> None:
    parser = ArgumentParser(
        prog="fnsft export",
        description="Write a trained adapter in a form that other tools load without this package.",
    )
    parser.add_argument("adapter", help="directory of a saved adapter")
    parser.add_argument(
        "--to",
        required=True,
        choices=["merged", "lora"],
        help="merged: an ordinary checkpoint; lora: neuron deltas as an ordinary PEFT LoRA",
    )
    parser.add_argument("--output_dir", required=True, help="where to write it")
    parser.add_argument(
        "--dtype", default="auto", help="precision of a merged model: auto, float32, bfloat16, float16"
    )
    add_push_arguments(parser)
    parser.add_argument(
        "--hub_subfolder", metavar="FOLDER", help="with --push_to_hub: the folder of the repository to put it into"
    )
    args = parser.parse_args(argv)
    if args.hub_subfolder and args.push_to_hub is None:
        raise FNSFTError("--hub_subfolder goes with --push_to_hub; give it or drop it")
    output_dir = check_writable(args.output_dir)
    push = push_options(args)

    from ..export import to_merged, to_plain_lora, verify_merge
    from ..tuner import NeuronTunerConfig

    if args.to == "lora":
        config = to_plain_lora(args.adapter, output_dir)
        print(f"Plain LoRA saved to: {output_dir} ({len(config.target_modules)} modules, rank up to {config.r})")
    else:
        config = to_merged(args.adapter, output_dir, dtype=args.dtype)
        print(f"Merged model saved to: {output_dir}")
        if isinstance(config, NeuronTunerConfig) and args.dtype == "auto":
            base = config.base_model_name_or_path
            changed = verify_merge(base, output_dir, args.adapter)
            print(f"Verified: {changed.count} neurons differ from {base}, as the adapter says")
    if push is not None:
        message = "Merged model" if args.to == "merged" else "Plain LoRA"
        url = push_directory(output_dir, subfolder=args.hub_subfolder, commit_message=message, **push)
        print(f"Pushed to: {url}")
