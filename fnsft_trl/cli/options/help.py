"""The help of a verb, from the table of its options."""

import shutil
import textwrap
from collections.abc import Sequence

from .schema import TRL, Option


_COMMON = (
    "The command line overrides the YAML file, which overrides the defaults. Every switch can be negated: --no_x, or "
    "--x false. Dashes and underscores mean the same. Lists are written as 0 1 2 or [0,1,2]."
)
# Dataclass -> title of its options.
_TITLES = {
    "FunctionalNetworkConfig": "functional networks",
    "DataConfig": "data",
    "RetentionConfig": "retention: what the model loses",
    "ReplayConfig": "replay: rows of other texts beside the task",
    "AnchorConfig": "staying near the base model",
    "ProtectionConfig": "protection of what texts or networks use",
    "PenaltyConfig": "penalties that keep earlier tasks: EWC, LwF, O-LoRA",
    "LoadingConfig": "loading the model",
    "EvaluationConfig": "how rows are read and scored",
    "ProbeConfig": "what is probed",
    "RunConfig": "around the training",
    "ScriptArguments": "data (TRL)",
    "DatasetMixtureConfig": "mixtures of datasets (TRL)",
    "ModelConfig": "model, LoRA and quantisation (TRL)",
    "SFTConfig": "training (TRL)",
}


def format_help(verb: str, about: str, options: Sequence[Option]) -> str:
    """What a verb does, and all its options with their help and defaults."""
    width = min(shutil.get_terminal_size().columns, 119)
    call = ("usage: fnsft", verb, usage(options), "[--config FILE.yaml] [options]" if options else "")
    lines = [" ".join(filter(None, call)), "", *textwrap.wrap(about, width)]
    lines += ["", *textwrap.wrap(_COMMON, width)] if options else []
    for group in dict.fromkeys(option.group for option in options):
        lines += ["", f"{_TITLES.get(group, group)}:"]
        for option in options:
            if option.group == group:
                lines.append("  " + _names(option))
                indent = " " * 6
                lines += textwrap.wrap(
                    _help(option), width, initial_indent=indent, subsequent_indent=indent, break_long_words=False
                )
    return "\n".join(lines)


def usage(options: Sequence[Option]) -> str:
    """The options that every call has or can have without their name, as they are written."""
    shown = []
    for option in options:
        if option.positional:
            word = _value(option)
            shown.append(word if option.required else f"[{word}]")
        elif option.required:
            shown.append(f"--{option.name} {_value(option)}")
    return " ".join(shown)


def _value(option: Option) -> str:
    return (option.metavar or "VALUE") + ("..." if option.many else "")


def _names(option: Option) -> str:
    flags = ", ".join(f"--{name}" for name in (option.name, *option.aliases))
    if option.positional:
        return f"{_value(option)}, or {flags} {_value(option)}"
    return flags if option.kind == "bool" else f"{flags} {_value(option)}"


def _help(option: Option) -> str:
    """Our own help says in words what a default of null comes to."""
    default = "null" if option.default is None else str(option.default)
    default = default.lower() if isinstance(option.default, bool) else default
    choices = f" One of: {', '.join(option.choices)}." if option.choices and option.kind == "str" else ""
    help_text = f"{option.help}{choices}"
    is_said = option.required or (option.default is None and option.group not in TRL)
    return help_text if is_said else f"{help_text} (default: {default})"
