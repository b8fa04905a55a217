"""The help of `fnsft train`."""

import shutil
import textwrap

from .schema import Option, training_options


_HEAD = """\
usage: fnsft train --model_name_or_path MODEL --dataset_name DATA [--config FILE.yaml] [options]

Supervised fine-tuning with functional networks. The command line overrides the YAML file, which overrides the
defaults. Every switch can be negated: --no_x, or --x false. Dashes and underscores mean the same. Lists are written
as 0 1 2 or [0,1,2]. The original project's names work too; docs/migration.md lists them."""
# Dataclass -> title of its options, in the order of the help.
_TITLES = {
    "FunctionalNetworkConfig": "functional networks",
    "DataConfig": "data",
    "RunConfig": "around the training",
    "ScriptArguments": "data (TRL)",
    "DatasetMixtureConfig": "mixtures of datasets (TRL)",
    "ModelConfig": "model, LoRA and quantisation (TRL)",
    "SFTConfig": "training (TRL)",
}


def format_help() -> str:
    """All options of `fnsft train` with their help and defaults, ours first."""
    width = min(shutil.get_terminal_size().columns, 119)
    lines = [_HEAD]
    options = training_options().values()
    for group, title in _TITLES.items():
        lines += ["", f"{title}:"]
        for option in options:
            if option.group == group:
                lines.append(f"  --{option.name}{_value(option)}")
                indent = " " * 6
                lines += textwrap.wrap(
                    _help(option), width, initial_indent=indent, subsequent_indent=indent, break_long_words=False
                )
    return "\n".join(lines)


def _value(option: Option) -> str:
    return "" if option.kind == "bool" else " VALUE..." if option.many else " VALUE"


def _help(option: Option) -> str:
    default = "null" if option.default is None else str(option.default)
    default = default.lower() if isinstance(option.default, bool) else default
    choices = f" One of: {', '.join(option.choices)}." if option.choices and option.kind == "str" else ""
    return f"{option.help}{choices} (default: {default})"
