"""fnsft inspect TEMPLATE: networks, neurons by layer, reliability, provenance. Needs no torch, except to convert."""

import os
import sys
from pathlib import Path

from ..errors import FNSFTError
from ..hub.names import UNKNOWN
from ..occupied import TEMPLATE
from ..ranges import format_ranges
from ..template.card import format_known
from ..template.naming import name_networks
from ..template.stored import StoredTemplate
from ..writing import disk_errors, write_text_whole
from .options.arguments import Arguments, read_arguments
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
        row("convert", "Save the template in the current format, in this directory.", metavar="DIR"),
        row(
            "html",
            "Write one self-contained page with all that is known of the networks.",
            metavar="FILE",
        ),
        row("probe", "With html: also show the results of a probe, given its output_dir.", metavar="DIR"),
        row(
            "samples",
            "With html: also show in how many single texts each network is found, given the output_dir of "
            "`compare --per_sample`.",
            metavar="DIR",
        ),
        row(
            "name",
            'Name a network in the template, as NUMBER=NAME: 3="dates". An empty name removes it.',
            many=True,
            metavar="NUMBER=NAME",
        ),
    ]


def main(argv: list[str]) -> None:
    args = read_arguments(argv, options())
    asked = [name for name in ("json", "convert", "html", "name") if vars(args)[name]]
    if len(asked) > 1:
        raise FNSFTError(f"{' and '.join(asked)} exclude each other; drop all but one of them")
    for name in ("probe", "samples"):
        if vars(args)[name] and not args.html:
            raise FNSFTError(f"{name} has no effect without html; give it, or drop {name}")
    if args.name:
        _name(args)
        return
    stored = StoredTemplate.open(args.template, revision=args.revision)
    if args.convert:
        from ..template.template import FunctionalNetworkTemplate

        target = check_writable(args.convert, TEMPLATE)
        FunctionalNetworkTemplate.from_pretrained(args.template, revision=args.revision).save_pretrained(target)
        print(f"Template saved to: {target}")
        return
    if args.html:
        _write_page(args, stored)
        return
    try:
        _show(stored, args.json)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads it has enough of it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes at its end


def _name(args: Arguments) -> None:
    """Write names of networks into a template on disk."""
    if not Path(args.template).expanduser().is_dir():
        raise FNSFTError(f"{args.template} is no directory, and names are written into one; give that of a template")
    names = {}
    for text in args.name:
        number, separator, name = text.partition("=")
        if not separator or not number.strip().isdecimal():
            raise FNSFTError(f'name holds {text!r}; write NUMBER=NAME, for instance 3="dates"')
        names[int(number)] = name.strip()
    name_networks(args.template, names)
    for number, name in names.items():
        print(f"network {number} is called {name!r}" if name else f"network {number} has no name")


def _write_page(args: Arguments, stored: StoredTemplate) -> None:
    """Write the atlas of a template: an HTML file."""
    from ..probes.atlas import ProbeResults, atlas_html
    from ..probes.example_file import Examples
    from ..probes.sample_file import SampleResults

    target = Path(args.html).expanduser()
    if target.is_dir():
        raise FNSFTError(f"html is {args.html}, a directory; give the name of a file in it, such as atlas.html")
    check_writable(target.parent)
    found = stored.description
    probe = None if args.probe is None else ProbeResults.read(args.probe)
    networks = len(found.components)
    samples = None if args.samples is None else SampleResults.read(args.samples, networks=networks)
    of_template = {"tensors_sha256": found.tensors_sha256, "networks": networks}
    places = [place for place in (args.template, args.probe) if place is not None]
    read = (Examples.read(Path(place).expanduser(), **of_template) for place in places)
    examples = next((each for each in read if each is not None), None)
    page = atlas_html(found, stored.loadings(), examples=examples, probe=probe, samples=samples)
    with disk_errors(target.parent):
        write_text_whole(target, page)
    print(f"Page: {target}")


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
            + ("" if component.name is None else f"  [{component.name}]")
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
