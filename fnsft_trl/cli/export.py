"""fnsft export ADAPTER: write a trained adapter as a merged model or as a plain LoRA."""

from .arguments import ArgumentParser, check_writable


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
    args = parser.parse_args(argv)
    output_dir = check_writable(args.output_dir)

    from ..export import to_merged, to_plain_lora, verify_merge
    from ..tuner import NeuronTunerConfig

    if args.to == "lora":
        config = to_plain_lora(args.adapter, output_dir)
        print(f"Plain LoRA saved to: {output_dir} ({len(config.target_modules)} modules, rank up to {config.r})")
        return
    config = to_merged(args.adapter, output_dir, dtype=args.dtype)
    print(f"Merged model saved to: {output_dir}")
    if isinstance(config, NeuronTunerConfig) and args.dtype == "auto":
        changed = verify_merge(config.base_model_name_or_path, output_dir, args.adapter)
        print(f"Verified: {changed.count} neurons differ from {config.base_model_name_or_path}, as the adapter says")
