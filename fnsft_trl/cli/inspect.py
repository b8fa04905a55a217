"""fnsft inspect TEMPLATE: networks, neurons by layer, reliability, provenance. Needs no torch, except to convert."""

import os
import sys

from ..errors import FNSFTError
from ..hub.names import UNKNOWN
from ..occupied import TEMPLATE
from ..ranges import format_ranges
from ..template.card import format_known
from ..template.stored import StoredTemplate
from .options.arguments import read_arguments
from .options.schema import Option, row
from .output import check_writable


ABOUT = "Show what a template of functional networks holds."


def options() -> list[Option]:
    """The options of the verb."""
    where = "Directory, JSON file of the original project, or org/name on the Hub."
    return [
        row("template", where, positional=True, required=True, metavar="TEMPLATE"),
        row("revision", "Branch, tag or commit on the Hub."),
        row("json", "Print the template's config.json as it is.", False),
        row("convert", "Save the template there in the current format.", metavar="DIR"),
    ]


def main(argv: list[str]) -> None:
    args = read_arguments(argv, options())
    if args.json and args.convert:
        raise FNSFTError("json and convert exclude each other; drop one of them")
    stored = StoredTemplate.open(args.template, revision=args.revision)
    if args.convert:
        from ..template.template import FunctionalNetworkTemplate

        target = check_writable(args.convert, TEMPLATE)
        FunctionalNetworkTemplate.from_pretrained(args.template, revision=args.revision).save_pretrained(target)
        print(f"Template saved to: {target}")
        return
    try:
        _show(stored, args.json)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads it has enough of it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes at its end


def _show(stored: StoredTemplate, as_json: bool) -> None:
    found = stored.description
    if as_json:
        print(found.to_bytes().decode(), end="")
        return
    if stored.hub_id:
        print(f"{stored.hub_id} at commit {stored.commit}")
    widths = found.widths
    print(f"{len(found.components)} functional networks of {found.base_model or UNKNOWN} ({found.architecture})")
    print(f"  site          {found.site}: {sum(widths.values())} neurons, layers {format_ranges(sorted(widths))}")
    print(f"  calibration   {found.calibration_in_words()}")
    print(f"  tokens sha256 {found.calibration.sha256 or UNKNOWN}")
    print(f"  method        {found.method_in_words()}")
    print(f"  threshold     {found.threshold_in_words()}")
    print()
    print("network  neurons  layers  variance  kurtosis  reliability  above null  overlap  most neurons in layers")
    for number, component in enumerate(found.components):
        by_layer = sorted(component.layers.items(), key=lambda item: -item[1])
        strongest = ", ".join(f"{layer} ({count})" for layer, count in by_layer[:4])
        print(
            f"{number:>7}  {component.neurons:>7}  {len(by_layer):>6}  "
            f"{format_known(component.explained_variance, '.4f'):>8}  "
            f"{format_known(component.kurtosis, '.1f'):>8}  {format_known(component.reliability, '.2f'):>11}  "
            f"{format_known(found.reliability_above_null(number), '.2f'):>10}  "
            f"{format_known(component.jaccard, '.2f'):>7}  {strongest}"
        )
    if null := found.null:
        highest = "" if null.highest is None else f", at most {null.highest:.2f}"
        print(f"without co-activation: reliability {null.reliability:.2f}{highest}; overlap {null.jaccard:.2f}")
    else:
        print("without co-activation: unknown, it was not measured")
    if curve := found.calibration.curve:
        points = ", ".join(
            f"{format_known(point.above_null, '.2f')} ({point.reliability:.2f}) at {point.tokens}" for point in curve
        )
        print(f"mean reliability above null (and bare) over tokens: {points}")
    for number, component in enumerate(found.components):
        for name, other in component.recurrence.items():
            verdict = "recurs" if other["recurs"] else "does not recur"
            print(
                f"network {number} {verdict} in {name}: its network {other['component']}, IoU {other['iou']:.2f}, "
                f"correlation {other['correlation']:.2f}"
            )
