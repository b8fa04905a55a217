"""fnsft export DIR: write what was trained as a merged, baked or smaller model, a plain LoRA or GGUF; verify, push."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FNSFTError
from ..export.gguf import (
    CONVERTER_VARIABLE,
    OUTTYPES,
    check_gguf_target,
    check_outtype,
    final_model,
    find_converter,
    to_gguf,
)
from ..hub.files import push_directory
from ..occupied import EXPORTED_ADAPTER, EXPORTED_MODEL
from .masks import MASK_FIELDS, check_mask_options, configured_mask, mask_config, mask_options
from .options.arguments import Arguments, read_arguments
from .options.loading import LoadingConfig, loading_options
from .options.schema import Option, row
from .output import check_writable
from .pushing import PUSH_OPTIONS, push_arguments


if TYPE_CHECKING:
    from ..export.baked import BakedMask


_WHOLE = ("merged", "baked", "smaller")
_FORMS = (*_WHOLE, "lora", "gguf")
_PARTS = ("adapter", "gguf")
_SAID = {"merged": "Merged model", "baked": "Baked model", "smaller": "Smaller model", "lora": "Plain LoRA"}

ABOUT = "Write what was trained in a form that other tools load without this package, verify it, and push it."

# Option -> the forms that it is for.
_READ_BY = {
    "output_dir": (*_WHOLE, "lora"),
    "output_path": ("gguf",),
    "include": _WHOLE,
    "push_to_hub": (*_WHOLE, "lora"),
    **dict.fromkeys(("dtype", "device_map"), _WHOLE),
    **dict.fromkeys(MASK_FIELDS, ("baked", "smaller")),
}


def options() -> list[Option]:
    """The options of the verb."""
    forms = (
        "The form to write. merged: an ordinary checkpoint. baked: a merged one with a mask in its weights. smaller: "
        "a model without the neurons that a mask silences. lora: neuron deltas as an ordinary PEFT LoRA. gguf: a "
        "file for llama.cpp."
    )
    parts = (
        "merged, baked, smaller: what else goes into the directory, the adapter or a GGUF file. One card "
        "describes all."
    )
    verify = (
        "Load what was written in a fresh process, and compare its logits, tokens and neurons with what was trained."
    )
    converter = f"The GGUF converter. By default {CONVERTER_VARIABLE}."
    subfolder = "With push_to_hub: the folder of the repository to put it into."
    masked = "the mask that is baked (amplify, too) or whose silenced neurons go (smaller); by default that of the run"
    return [
        row(
            "adapter",
            "Directory of a saved adapter or a model.",
            aliases=("model_path",),
            positional=True,
            required=True,
            metavar="DIR",
        ),
        row("to", forms, required=True, choices=_FORMS, metavar="|".join(_FORMS)),
        row("output_dir", "Where to write it (all but gguf).", metavar="DIR"),
        row("output_path", "Where to write it (gguf).", metavar="FILE"),
        row("include", parts, many=True, choices=_PARTS),
        row("verify", verify, False),
        row("outtype", "Precision of a GGUF file; auto by default.", choices=OUTTYPES, aliases=("quantization",)),
        row("converter", converter, metavar="PROGRAM"),
        *PUSH_OPTIONS,
        row("hub_subfolder", subfolder, metavar="FOLDER", group=PUSH_OPTIONS[0].group),
        *mask_options(masked),
        *(_for_some(option) for option in loading_options(dtype="auto")),
    ]


def _for_some(option: Option) -> Option:
    forms = _READ_BY.get(option.name)
    return option if forms is None else replace(option, help=f"{', '.join(forms)}: {option.help}")


def main(argv: list[str]) -> None:
    args = read_arguments(argv, options())
    _check(args)
    push = push_arguments(args, EXPORTED_ADAPTER if args.to == "lora" else EXPORTED_MODEL)
    source = final_model(args.adapter)
    if args.to == "gguf":
        check_writable(Path(args.output_path).expanduser().parent)
        check_gguf_target(args.output_path)
    else:
        output_dir = check_writable(args.output_dir)
    loading = _loading(args)
    if args.to == "gguf":
        loading = {key: value for key, value in loading.items() if key != "dtype"}
        outtype = args.outtype or "auto"
        file = to_gguf(source, args.output_path, outtype=outtype, converter=args.converter, **loading)
        print(f"GGUF file saved to: {file} ({file.stat().st_size / 2**20:.1f} MiB)")
        _verify(args, source, file, "gguf", None, loading)
        return
    masked = _write(args, source, output_dir, loading)
    _verify(args, source, output_dir, args.to, masked, loading)
    if args.include:
        _include(args, source, output_dir, masked, loading)
    if push is not None:
        url = push_directory(output_dir, subfolder=args.hub_subfolder, commit_message=_SAID[args.to], **push)
        print(f"Pushed to: {url}")


def _check(args: Arguments) -> None:
    """What is asked for must be able to have an effect, and the programs that it needs must be there."""
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
    makes_gguf = args.to == "gguf" or "gguf" in (args.include or ())
    for name in ("outtype", "converter"):
        if name in args.given and not makes_gguf:
            raise FNSFTError(f"{name} has no effect with to={args.to}; drop it")
    check_mask_options(args, "export the run that selected so, whose mask is the default")
    if args.mask_mode == "amplify" and args.to == "smaller":
        raise FNSFTError("mask_mode=amplify silences no neuron that could go; give lesion or preserve, or to=baked")
    mask_config(args)
    needed = "output_path" if args.to == "gguf" else "output_dir"
    if vars(args)[needed] is None:
        raise FNSFTError(f"to={args.to} needs {needed}")
    if makes_gguf:
        find_converter(args.converter)
        check_outtype(args.outtype or "auto")
        if args.verify:
            from ..export.verification import check_verifiable

            check_verifiable("gguf", args.outtype or "auto")
    if "adapter" in (args.include or ()) and not (final_model(args.adapter) / "adapter_config.json").is_file():
        raise FNSFTError(f"include: {args.adapter} holds no adapter (adapter_config.json); drop it")


def _loading(args: Arguments) -> dict[str, Any]:
    """The arguments of `from_pretrained`, checked."""
    from .models import check_loading, loading_arguments

    loading = LoadingConfig(**args.of(LoadingConfig))
    check_loading(loading, "cpu")
    return loading_arguments(loading)


def _write(args: Arguments, source: Path, output_dir: Path, loading: dict[str, Any]) -> "BakedMask | None":
    """Write a directory; the mask that is in its weights, if any."""
    from ..export import to_baked, to_plain_lora, to_smaller
    from ..export.baked import BakedMask
    from .refusals import refusals

    if args.to == "merged":
        _merge(source, output_dir, loading)
        return None
    with refusals():
        if args.to == "lora":
            config = to_plain_lora(source, output_dir, **_where(loading))
            told = f"{len(config.target_modules)} modules, rank up to {config.r}"
            print(f"Plain LoRA saved to: {output_dir} ({told})")
            return None
        mask = _mask(args, source, loading)
        if args.to == "baked":
            baked = to_baked(source, output_dir, mask, factor=args.mask_factor, **loading)
            done = f"multiplied by {baked.factor:g}" if baked.factor else "silenced"
            print(f"Baked model saved to: {output_dir} ({baked.neurons.count} neurons are {done})")
            return baked
        removal = to_smaller(source, output_dir, mask, **loading)
    print(f"Smaller model saved to: {output_dir}\n{removal}")
    return BakedMask(removal.removed)


def _where(loading: dict[str, Any]) -> dict[str, Any]:
    return {key: loading[key] for key in ("revision", "trust_remote_code") if key in loading}


def _mask(args: Arguments, source: Path, loading: dict[str, Any]):
    """The neurons of the mask that was asked for, as it is baked; `None` where that of the run is."""
    from ..export.whole import WholeSource

    config = mask_config(args)
    if config is None:
        return None
    mask = configured_mask(config, WholeSource.read(source).outline(**_where(loading)))
    return ~mask if config.mask_mode == "preserve" else mask


def _merge(adapter: Path, output_dir: Path, loading: dict[str, Any]) -> None:
    """Merge an adapter, and compare weights where that is possible: what was read is then what was written."""
    from ..export import to_merged, verify_merge
    from ..tuner import NeuronTunerConfig
    from .refusals import refusals

    with refusals():
        config = to_merged(adapter, output_dir, **loading)
    print(f"Merged model saved to: {output_dir}")
    if isinstance(config, NeuronTunerConfig) and loading["dtype"] == "auto":
        base = config.base_model_name_or_path
        changed = verify_merge(base, output_dir, adapter, **{k: v for k, v in loading.items() if k != "device_map"})
        print(f"Verified: {changed.count} neurons differ from {base}, as the adapter says")


def _verify(
    args: Arguments, source: Path, written: Path, form: str, masked: "BakedMask | None", loading: dict[str, Any]
) -> None:
    if not args.verify:
        return
    from ..export import verify_export

    outtype = args.outtype or "auto"
    of_mask = {} if masked is None else {"silenced": masked.neurons, "factor": masked.factor}
    found = verify_export(source, written, form, outtype=outtype, **of_mask, **loading)
    print(f"Verified in a fresh process: {found}")


def _include(
    args: Arguments, source: Path, output_dir: Path, masked: "BakedMask | None", loading: dict[str, Any]
) -> None:
    """Put the adapter and a GGUF file beside the model."""
    from ..export.parts import add_parts
    from ..export.whole import GGUF_FILE

    add_parts(output_dir, source, args.include, outtype=args.outtype or "auto", converter=args.converter)
    print(f"Beside it: {', '.join(args.include)}")
    if "gguf" in args.include:
        _verify(args, source, output_dir / GGUF_FILE, "gguf", masked, loading)
