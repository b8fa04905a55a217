"""fnsft export ADAPTER: write an adapter as a merged model or a plain LoRA, or any model as GGUF, and push it."""

from pathlib import Path

from ..errors import FNSFTError
from ..export.gguf import CONVERTER_VARIABLE, OUTTYPES, find_converter, to_gguf
from ..hub.files import push_directory
from .arguments import ArgumentParser, check_writable
from .pushing import add_push_arguments, push_options


# Option -> the forms that it is for.
_READ_BY = {
    "output_dir": ("merged", "lora"),
    "output_path": ("gguf",),
    "dtype": ("merged",),
    "outtype": ("gguf",),
    "converter": ("gguf",),
    "push_to_hub": ("merged", "lora"),
}


def main(argv: list[str]) -> None:
    parser = ArgumentParser(
        prog="fnsft export",
        description="Write a trained adapter in a form that other tools load without this package.",
    )
    parser.add_argument("adapter", nargs="?", help="directory of a saved adapter (gguf: or of a model)")
    parser.add_argument("--model_path", metavar="DIR", help="the same, by name")
    parser.add_argument(
        "--to",
        required=True,
        choices=["merged", "lora", "gguf"],
        help="merged: an ordinary checkpoint; lora: neuron deltas as an ordinary PEFT LoRA; gguf: for llama.cpp",
    )
    parser.add_argument("--output_dir", help="where to write it (merged, lora)")
    parser.add_argument("--output_path", metavar="FILE", help="where to write it (gguf)")
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16", "float16"], help="merged: precision; auto by default"
    )
    parser.add_argument("--outtype", "--quantization", choices=OUTTYPES, help="gguf: precision; auto by default")
    parser.add_argument("--converter", metavar="PROGRAM", help=f"gguf: the converter; {CONVERTER_VARIABLE} by default")
    add_push_arguments(parser)
    parser.add_argument(
        "--hub_subfolder", metavar="FOLDER", help="with --push_to_hub: the folder of the repository to put it into"
    )
    args = parser.parse_args(argv)
    if args.hub_subfolder and args.push_to_hub is None:
        raise FNSFTError("--hub_subfolder goes with --push_to_hub; give it or drop it")
    if (args.adapter is None) == (args.model_path is None):
        raise FNSFTError("one directory is needed: fnsft export DIR, or --model_path DIR")
    source = args.adapter or args.model_path
    for name, forms in _READ_BY.items():
        if getattr(args, name) is not None and args.to not in forms:
            raise FNSFTError(f"--{name} has no effect with --to {args.to}; drop it")
    needed = "output_path" if args.to == "gguf" else "output_dir"
    if getattr(args, needed) is None:
        raise FNSFTError(f"--to {args.to} needs --{needed}")
    push = push_options(args)
    if args.to == "gguf":
        find_converter(args.converter)
        check_writable(Path(args.output_path).expanduser().parent)
        file = to_gguf(source, args.output_path, outtype=args.outtype or "auto", converter=args.converter)
        print(f"GGUF file saved to: {file} ({file.stat().st_size / 2**20:.1f} MiB)")
        return
    output_dir = check_writable(args.output_dir)

    from ..export import to_merged, to_plain_lora, verify_merge
    from ..tuner import NeuronTunerConfig

    if args.to == "lora":
        config = to_plain_lora(source, output_dir)
        print(f"Plain LoRA saved to: {output_dir} ({len(config.target_modules)} modules, rank up to {config.r})")
    else:
        config = to_merged(source, output_dir, dtype=args.dtype or "auto")
        print(f"Merged model saved to: {output_dir}")
        if isinstance(config, NeuronTunerConfig) and args.dtype in (None, "auto"):
            base = config.base_model_name_or_path
            changed = verify_merge(base, output_dir, source)
            print(f"Verified: {changed.count} neurons differ from {base}, as the adapter says")
    if push is not None:
        message = "Merged model" if args.to == "merged" else "Plain LoRA"
        url = push_directory(output_dir, subfolder=args.hub_subfolder, commit_message=message, **push)
        print(f"Pushed to: {url}")
