"""docs/trl_options.md, the options of `fnsft train` that are TRL's, made from its dataclasses.

python tests/trl_options_page.py
"""

from importlib.metadata import version
from pathlib import Path

from fnsft_trl.cli.options.parse import training_options
from fnsft_trl.cli.options.schema import TRL, Option


PAGE = Path(__file__).parent.parent / "docs" / "trl_options.md"

_KINDS = {"bool": "switch", "int": "whole number", "float": "number", "str": "text", "datasets": "mappings"}


def trl_options_page() -> str:
    """The page, for the versions that are installed."""
    lines = [
        "# TRL's options\n",
        f"`fnsft train` has every option of these dataclasses of TRL {version('trl')} and transformers "
        f"{version('transformers')}.",
        "Their documentation says what each means, and `fnsft train --help` shows it too.",
    ]
    options = training_options().values()
    for group in TRL:
        lines += [f"\n## {group}\n", "| option | value | default |", "|---|---|---|"]
        lines += [_row(option) for option in options if option.group == group]
    return "\n".join(lines) + "\n"


def _row(option: Option) -> str:
    kind = _KINDS.get(option.kind, option.kind)
    value = ", ".join(f"`{choice}`" for choice in option.choices) if option.kind == "str" and option.choices else kind
    if option.many:
        value = f"list: {value}"
    default = str(option.default).lower() if isinstance(option.default, bool) else option.default
    default = "" if default is None else f"`{default}`"
    return f"| `{option.name}` | {value} | {default} |"


if __name__ == "__main__":
    PAGE.write_text(trl_options_page(), encoding="utf-8")
