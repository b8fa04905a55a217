"""fnsft inspect TEMPLATE: networks, neurons by layer, reliability, provenance. Needs no torch."""

import json

from ..config import ThresholdRule, format_ranges
from ..template import read_template_config
from .arguments import ArgumentParser


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="fnsft inspect", description="Show what a template of functional networks holds.")
    parser.add_argument("template", help="directory of a template")
    parser.add_argument("--json", action="store_true", help="print the template's config.json as it is")
    args = parser.parse_args(argv)
    config = read_template_config(args.template)
    if args.json:
        print(json.dumps(config, indent=2))
        return
    widths = {int(layer): width for layer, width in config["widths"].items()}
    components = config["components"]
    settings, calibration = config["settings"], config["calibration"]
    print(f"{len(components)} functional networks of {config['base_model']} ({config['architecture']})")
    print(f"  site          {config['site']}: {sum(widths.values())} neurons, layers {format_ranges(sorted(widths))}")
    print(f"  calibration   {calibration['tokens']} tokens of {', '.join(calibration['sources'])}")
    print(f"  tokens sha256 {calibration['sha256']}")
    method = f"{settings['ica_variant']} FastICA ({settings['ica_contrast']}), {settings['ica_standardize']}"
    print(f"  method        {method}, rank {settings['ica_rank']}, seed {settings['ica_seed']}")
    print(f"  threshold     {ThresholdRule(**config['threshold'])}")
    print()
    print("network  neurons  layers  variance  kurtosis  reliability  overlap  most neurons in layers")
    for number, component in enumerate(components):
        by_layer = sorted(component["layers"].items(), key=lambda item: -item[1])
        strongest = ", ".join(f"{layer} ({count})" for layer, count in by_layer[:4])
        print(
            f"{number:>7}  {component['neurons']:>7}  {len(by_layer):>6}  {component['explained_variance']:>8.4f}  "
            f"{component['kurtosis']:>8.1f}  {component['reliability']:>11.2f}  {component['jaccard']:>7.2f}  "
            f"{strongest}"
        )
    if null := config.get("null"):
        print(
            f"shuffled in time {null['reliability']:>38.2f}  {null['jaccard']:>7.2f}  (so that nothing co-activates)"
        )
    if curve := calibration.get("curve"):
        points = ", ".join(f"{point['reliability']:.2f} at {point['tokens']}" for point in curve)
        print(f"mean reliability over tokens: {points}")
    for number, component in enumerate(components):
        for name, found in component.get("recurrence", {}).items():
            verdict = "recurs" if found["recurs"] else "does not recur"
            print(
                f"network {number} {verdict} in {name}: its network {found['component']}, IoU {found['iou']:.2f}, "
                f"correlation {found['correlation']:.2f}"
            )
