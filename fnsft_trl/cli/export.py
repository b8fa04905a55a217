"""fnsft export ADAPTER: write an adapter as a merged model or a plain LoRA, or any model as GGUF, and push it."""

from dataclasses import replace
from pathlib import Path

from ..errors import FNSFTError
from ..export.gguf import CONVERTER_VARIABLE, OUTTYPES, check_gguf_target, find_converter, to_gguf
from ..hub.files import push_directory
from ..occupied import EXPORTED_ADAPTER, EXPORTED_MODEL
from .options.arguments import Arguments, read_arguments
from .options.loading import LoadingConfig, loading_options
from .options.schema import Option, row
from .output import check_writable
from .pushing import PUSH_OPTIONS, push_arguments


_FORMS = ("merged", "lora", "gguf")

ABOUT = "Write a trained adapter in a form that other tools load without this package."

# Option -> the forms that it is for.
_READ_BY = {
    "output_dir": ("merged", "lora"),
    "output_path": ("gguf",),
    "outtype": ("gguf",),
    "converter": ("gguf",),
    "push_to_hub": ("merged", "lora"),
    **dict.fromkeys(("dtype", "device_map", "model_revision", "trust_remote_code"), ("merged",)),
}


def options() -> list[Option]:
    """The options of the verb."""
    forms = "merged: an ordinary checkpoint; lora: neuron deltas as an ordinary PEFT LoRA; gguf: for llama.cpp."
    converter = f"gguf: the converter; {CONVERTER_VARIABLE} by default."
    subfolder = "With push_to_hub: the folder of the repository to put it into."
    return [
        row(
            "adapter",
            "Directory of a saved adapter (gguf: or of a model).",
            aliases=("model_path",),
            positional=True,
            required=True,
            metavar="DIR",
        ),
        row("to", forms, required=True, choices=_FORMS, metavar="|".join(_FORMS)),
        row("output_dir", "Where to write it (merged, lora).", metavar="DIR"),
        row("output_path", "Where to write it (gguf).", metavar="FILE"),
        row("outtype", "gguf: precision; auto by default.", choices=OUTTYPES, aliases=("quantization",)),
        row("converter", converter, metavar="PROGRAM"),
        *PUSH_OPTIONS,
        row("hub_subfolder", subfolder, metavar="FOLDER", group=PUSH_OPTIONS[0].group),
        *(replace(option, help=f"merged: {option.help}") for option in loading_options(dtype="auto")),
    ]


def main(argv: list[str]) -> None:
    args = read_arguments(argv, options())
    _check(args)
    push = push_arguments(args, EXPORTED_ADAPTER if args.to == "lora" else EXPORTED_MODEL)
    if args.to == "gguf":
        find_converter(args.converter)
        check_writable(Path(args.output_path).expanduser().parent)
        check_gguf_target(args.output_path)
        file = to_gguf(args.adapter, args.output_path, outtype=args.outtype or "auto", converter=args.converter)
        print(f"GGUF file saved to: {file} ({file.stat().st_size / 2**20:.1f} MiB)")
        return
    output_dir = check_writable(args.output_dir)
    if args.to == "lora":
        from ..export import to_plain_lora

        config = to_plain_lora(args.adapter, output_dir)
        print(f"Plain LoRA saved to: {output_dir} ({len(config.target_modules)} modules, rank up to {config.r})")
    else:
        _merge(args.adapter, output_dir, LoadingConfig(**args.of(LoadingConfig)))
    if push is not None:
        message = "Merged model" if args.to == "merged" else "Plain LoRA"
        url = push_directory(output_dir, subfolder=args.hub_subfolder, commit_message=message, **push)
        print(f"Pushed to: {url}")


def _check(args: Arguments) -> None:
    """What is asked for must be able to have an effect."""
    if args.hub_subfolder and args.push_to_hub is None:
        raise FNSFTError("hub_subfolder goes with push_to_hub; give it or drop it")
    for name in ("load_in_4bit", "load_in_8bit"):
        if vars(args)[name]:
            raise FNSFTError(f"{name}: an adapter is merged into weights of full precision, not of few bits; drop it")
    if "attn_implementation" in args.given:
        raise FNSFTError("attn_implementation has no effect on what is exported; drop it")
    for name, forms in _READ_BY.items():
        if name in args.given and args.to not in forms:
            raise FNSFTError(f"{name} has no effect with to={args.to}; drop it")
    needed = "output_path" if args.to == "gguf" else "output_dir"
    if vars(args)[needed] is None:
        raise FNSFTError(f"to={args.to} needs {needed}")


def _merge(adapter: str, output_dir: Path, loading: LoadingConfig) -> None:
    """Merge an adapter, and verify the result where that is possible: what was read is then what was written."""
    from ..export import to_merged, verify_merge
    from ..tuner import NeuronTunerConfig
    from .models import check_loading, loading_arguments
    from .refusals import refusals

    check_loading(loading, "cpu")
    with refusals():
        config = to_merged(adapter, output_dir, **loading_arguments(loading))
    print(f"Merged model saved to: {output_dir}")
    if isinstance(config, NeuronTunerConfig) and loading.dtype == "auto":
        base = config.base_model_name_or_path
        changed = verify_merge(base, output_dir, adapter, **loading_arguments(replace(loading, device_map=None)))
        print(f"Verified: {changed.count} neurons differ from {base}, as the adapter says")
