"""The recipes of `recipes/probes/smollm2` as they were run, as the tables, sentences and pictures of `docs/probes.md`.

What the tables need of the runs is in `results/probes/`.

    python benchmarks/probes.py --take output/probes/smollm2/one_by_one  # a run into the results
    python benchmarks/probes.py --write                                  # the results into the page
"""

import argparse
import json
import textwrap
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from pathlib import Path
from statistics import correlation, fmean, stdev
from typing import Any

from fnsft_trl.probes.config import SELECTORS
from fnsft_trl.report.charts import line_chart, strip_chart


RESULTS = Path(__file__).parent / "results" / "probes"
PAGE = Path(__file__).parents[1] / "docs" / "probes.md"
IMAGES = PAGE.parent / "images"
DATA = "wiki"
KEPT = {"preserved": 10, "preserved_64": 64, "preserved_128": 128, "preserved_256": 256, "preserved_512": 512}
MATCHED = ("random", "rms_matched")  # by which verdicts are told
FEW = (*MATCHED, "activation_rms", "weight_norm")  # controls of all curves
GOAL = 1.6  # times as fast by a shared prefix

Results = dict[str, dict[str, Any]]


def take(run: Path, device: str) -> dict[str, Any]:
    """What the tables need of a run."""
    results = json.loads((run / "results.json").read_text())
    if "networks" in results:  # of `fnsft compare --per_sample`
        hits = sum(any(iou > 0.2 for _, iou in sample) for sample in results["samples"])
        kept = {name: results[name] for name in ("networks", "tokens", "left_out")}
        return {"device": device, **kept, "texts": len(results["samples"]), "texts_with_a_network": hits}
    part = results["data"][DATA]
    template = json.loads((run.parent / Path(results["template"]).name / "config.json").read_text())
    networks = [
        {"neurons": each["neurons"], "first_layer": min(map(int, each["layers"])), "layers": len(each["layers"])}
        for each in template["components"]
    ]
    drawn: dict[str, dict[str, list[float]]] = {}
    for line in map(json.loads, (run / "conditions.jsonl").read_text().splitlines()):
        if line["curve"] == "lesion":
            drawn.setdefault(line["selector"], {}).setdefault(line["network"], []).append(line["cross_entropy"])
    names = ("selector", "point", "draw", "cross_entropy")
    curves = {name: [{n: each[n] for n in names} for each in points] for name, points in part["curves"].items()}
    files = run.glob("passes-*.jsonl")  # one of each process
    passes = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    found = {"settings": results["settings"], "neurons": sum(template["widths"].values()), "networks": networks}
    found |= {name: part[name] for name in ("tokens", "sequences", "intact", "full", "verdicts")}
    found |= {"curves": curves, "drawn": drawn, "cost": results["cost"]}
    return {"device": device, **found, "batches": len({line["batch"] for line in passes if "batch" in line})}


def read(directory: Path = RESULTS) -> Results:
    """Name of a run -> what was taken of it."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def effects(points: Sequence[dict[str, Any]], selector: str, point: float | None = None) -> list[float]:
    """The rises of a control, at one point of a curve."""
    return [p["cross_entropy"] for p in points if p["selector"] == selector and point in (None, p["point"])]


def beside(points: Sequence[dict[str, Any]], point: float | None = None) -> list[str]:
    """The cells of a row: the networks, and the mean and the range of each control."""
    cells = []
    for selector in ("networks", *FEW):
        values = effects(points, selector, point)
        spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
        cells.append(f"{fmean(values):.2f}{spread}")
    return cells


def standardised(value: float, draws: Sequence[float]) -> float:
    """A value over the deviation of a difference from the mean of draws."""
    return (value - fmean(draws)) / (stdev(draws) * (1 + 1 / len(draws)) ** 0.5)


def short(results: Results) -> str:
    """What the lesions come to."""
    verdicts = results["one_by_one"]["verdicts"]
    count = len(verdicts)
    random, matched = (sum(e["controls"][name]["stronger"] for e in verdicts) for name in MATCHED)
    loudest = sum(e["effect"]["value"] > e["controls"]["activation_rms"]["highest"] for e in verdicts)
    draws = results["one_by_one"]["settings"]["draws"]
    lines = [
        f"{random} of {count} networks do more damage than random neurons of the same layers.",
        f"For {count - matched} of {count}, neurons of the same amplitude do as much. What looks like a network's "
        "importance may be its loudness.",
        f"{matched} of {count} {'stands' if matched == 1 else 'stand'} out beside both"
        + (f", at the edge of what {draws} draws can tell." if matched else "."),
        f"{loudest} of {count} matter as much as the loudest neurons of their layers.",
    ]
    return "\n".join(textwrap.fill(line, 119, initial_indent="- ", subsequent_indent="  ") for line in lines)


def lesions(results: Results) -> str:
    """Networks one by one."""
    run = results["one_by_one"]
    header = ["network", "rise (nats)", "random: mean (highest), p", "same amplitude: mean (highest), p"]
    header += ["surrogate networks: mean (highest)", "largest weights", "loudest", "verdict"]
    rows = []
    for each in run["verdicts"]:
        controls = each["controls"]
        value = each["effect"]
        row = [each["network"], f"{value['value']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"]
        for name in ("random", "rms_matched"):
            found = controls[name]
            row.append(f"{found['mean']:.2f} ({found['highest']:.2f}), {found['adjusted']:.2f}")
        row.append(f"{controls['surrogate']['mean']:.2f} ({controls['surrogate']['highest']:.2f})")
        row += [f"{controls[name]['mean']:.2f}" for name in ("weight_norm", "activation_rms")]
        stronger = [controls[name]["stronger"] for name in ("random", "rms_matched")]
        row.append("may be chance" if not stronger[0] else "stronger than both" if stronger[1] else "may be loudness")
        rows.append(row)
    return f"{_lesions_in_words(run)}\n\n{table(header, rows)}"


def _lesions_in_words(run: dict[str, Any]) -> str:
    verdicts, count = run["verdicts"], len(run["verdicts"])
    draws = run["settings"]["draws"]

    def of(control: str, key: str) -> list[Any]:
        return [each["controls"][control][key] for each in verdicts]

    effect = [each["effect"]["value"] for each in verdicts]
    beaten = {name: [e["network"] for e in verdicts if e["controls"][name]["stronger"]] for name in MATCHED}
    above = {
        name: sum(value > highest for value, highest in zip(effect, of(name, "highest"), strict=True))
        for name in ("surrogate", "activation_rms", "weight_norm")
    }
    matched = len(beaten["rms_matched"])
    named = f" ({', '.join(beaten['rms_matched'])})" if matched else ""
    return (
        f"Each of the {count} networks is {run['networks'][0]['neurons']} neurons "
        f"({run['networks'][0]['neurons'] / run['neurons']:.1%} of all). On {run['tokens']:,} tokens in "
        f"{run['sequences']} sequences the intact model has a cross-entropy of {run['intact']['cross_entropy']:.2f} "
        f"nats. Without any MLP neuron it rises by {run['full']['cross_entropy']:.2f}.\n\n"
        f"{len(beaten['random'])} of {count} networks do more damage than {draws} draws of "
        f"random neurons (the highest p is {max(of('random', 'adjusted')):.4f}, adjusted by Holm; {draws} draws can't "
        f"give one below {count / (1 + count * draws):.4f}). Stronger than neurons of the same amplitude: "
        f'{matched} of {count}{named}. For {count - matched} the verdict is "it may be loudness". '
        f"{above['surrogate']} of {count} do more than the highest of "
        f"{verdicts[0]['controls']['surrogate']['draws']} surrogate networks, too few for a verdict. The loudest "
        f"neurons of the same layers do {min(of('activation_rms', 'mean')):.1f} to "
        f"{max(of('activation_rms', 'mean')):.1f} nats, more than {count - above['activation_rms']} of {count} "
        f"networks. Those with the largest weights do {min(of('weight_norm', 'mean')):.1f} to "
        f"{max(of('weight_norm', 'mean')):.1f}, more than {count - above['weight_norm']} of {count}."
    )


def edge(results: Results) -> str:
    """How sure the verdicts on amplitude are, and what another run found."""
    run, other = results["one_by_one"], results["one_by_one_float32"]
    drawn = run["drawn"]["rms_matched"]
    own = {e["network"]: standardised(e["effect"]["value"], drawn[e["network"]]) for e in run["verdicts"]}
    label = max(own, key=own.__getitem__)
    (found,) = [each["controls"]["rms_matched"] for each in run["verdicts"] if each["network"] == label]
    null = [
        standardised(value, values[:place] + values[place + 1 :])
        for values in drawn.values()
        for place, value in enumerate(values)
    ]
    p = 1 / (1 + len(drawn[label]))
    pairs = list(zip(run["verdicts"], other["verdicts"], strict=True))
    apart = [abs(a["effect"]["value"] - b["effect"]["value"]) for a, b in pairs]
    same = sum(all(a["controls"][n]["stronger"] == b["controls"][n]["stronger"] for n in MATCHED) for a, b in pairs)
    return (
        f"Network {label} lies furthest above the draws of its amplitude: {own[label]:.2f} deviations. The highest of "
        f"the {len(null)} draws of all networks lies {max(null):.2f} above the others of its network. Its p is "
        f"{found['adjusted']:.4f} after Holm. By its own {len(drawn[label])} draws alone p would be {p:.3f}, and "
        f"{min(1.0, p * len(drawn)):.2f} after Holm. So it is the one to look at with more draws, no more.\n\n"
        f"The table was computed on {run['device']}. The same lesions in float32, on one {other['device']}: "
        f"the rises of networks differ by {max(apart):.3f} nats at most, and {same} of {len(pairs)} verdicts are the "
        "same. Its verdicts are not shown, since its draws came from the same seeds for all networks. So the effects "
        "of two networks' draws of the same amplitude correlate there, by "
        f"{_correlation(other['drawn']['rms_matched']):.2f} (here by {_correlation(drawn):.2f}), and the p values "
        "take them for independent."
    )


def _correlation(drawn: dict[str, list[float]]) -> float:
    """Mean correlation of the draws of two networks."""
    return fmean(correlation(a, b) for a, b in combinations(drawn.values(), 2))


def union(results: Results) -> str:
    """The first m networks together."""
    run = results["ten_and_random"]
    points = run["curves"]["union"]
    last = max(each["point"] for each in points)
    values = {name: effects(points, name, last) for name in ("networks", *FEW, "random_15")}
    (own,), many = values["networks"], fmean(values["random_15"])
    share = results["preserved"]["curves"]["kept"][0]["point"]
    before = effects(points, "networks", last - 1)[0]
    numbers = sorted({each["point"] for each in points})
    ahead = [m for m in numbers if effects(points, "networks", m)[0] > max(effects(points, "rms_matched", m))]
    words = (
        f"The {last:g} networks together are {share:.1%} of all neurons. Their lesion costs {own:.2f} nats, "
        f"{own / many:.1f} times as much as that of 15% of all neurons at random ({many:.2f}, "
        f"{len(values['random_15'])} draws). That is the comparison of the first paper. As many neurons of the same "
        f"amplitude cost {fmean(values['rms_matched']):.2f}, and the loudest {values['activation_rms'][0]:.2f}: "
        f"loudness alone does as much. With {ahead[0]:g} to {ahead[-1]:g} networks they cost "
        f"more than each of {len(values['rms_matched'])} draws of the same amplitude. Damage does not add up: "
        f"silencing the last network too takes it from {before:.2f} to {own:.2f}."
    )
    rows = [[f"{m:g}", *beside(points, m)] for m in numbers]
    return f"{words}\n\n{table(['networks', 'rise (nats)', *(SELECTORS[name] for name in FEW)], rows)}"


def kept(results: Results) -> str:
    """The networks alone."""
    runs = [results[name] for name in KEPT if name in results]
    rows, counts = [], [len(run["networks"]) for run in runs]
    for run in runs:
        points = run["curves"]["kept"]
        rows.append([str(len(run["networks"])), f"{points[0]['point']:.1%}", *beside(points), run["device"]])
    firsts = [effects(run["curves"]["kept"], "networks")[0] for run in runs]
    shares = [run["curves"]["kept"][0]["point"] for run in runs]
    words = (
        f"What counts is the share of neurons that is kept: {counts[0]} networks keep {shares[0]:.1%} of all neurons, "
        f"and {counts[-1]} keep {shares[-1]:.1%}. The rise falls from {firsts[0]:.2f} to {firsts[-1]:.2f} nats."
    )
    called = {"random": "draws of random neurons", "rms_matched": "draws of the same amplitude"}
    for name, said in (called | {"activation_rms": "mask of the loudest neurons"}).items():
        drawn = [effects(run["curves"]["kept"], name) for run in runs]
        stand: dict[str, list[str]] = {}
        for count, own, each in zip(counts, firsts, drawn, strict=True):
            verb = "lose less" if own < min(each) else "lose more" if own > max(each) else "lie among them"
            stand.setdefault(verb, []).append(str(count))
        told = "; ".join(f"{', '.join(numbers)} networks {verb}" for verb, numbers in stand.items())
        words += f" Beside {len(drawn[0])} {said}: {told}."
    header = ["networks", "of all neurons", "alone (nats)", *(SELECTORS[name] for name in FEW), "run on"]
    return f"{words}\n\n{table(header, rows)}"


def pruned(results: Results) -> str:
    """The rule of the pruning paper."""
    run = results["pruned"]
    curves = run["curves"]
    rows = [[name, *beside(curves[curve])] for name, curve in (("with", "prune"), ("without", "cut"))]
    (own,), (bare,) = (effects(curves[curve], "networks") for curve in ("prune", "cut"))
    drawn = effects(curves["prune"], "rms_matched")
    words = (
        f"The networks of |z| above 1.96 have {min(n['neurons'] for n in run['networks']):,} to "
        f"{max(n['neurons'] for n in run['networks']):,} neurons each. {curves['prune'][0]['point']:.1%} of all "
        f"neurons are in none of them and in neither the first nor the last layer. Removing these costs "
        f"{own:.2f} nats with compensation in the bias and {bare:.2f} without: compensation saves "
        f"{1 - own / bare:.0%}. Keeping the networks is better than keeping any of {len(drawn)} draws of the same "
        f"amplitude ({min(drawn):.2f} at best; so few draws are no verdict), and worse than keeping the loudest "
        f"neurons. A model that loses {own:.2f} nats no longer works."
    )
    return f"{words}\n\n{table(['compensation', 'kept: networks', *(SELECTORS[name] for name in FEW)], rows)}"


def samples(results: Results) -> str:
    """Recurrence over single texts."""
    run = results["per_sample"]
    rows = [
        [str(e["network"]), str(e["samples"]), f"{e['null']:.0%}", f"{e['iou']:.2f}"]
        for e in run["networks"]
        if e["samples"]
    ]
    found = len(rows)
    words = (
        f"As many networks were found on each of {run['texts']} texts alone ({run['tokens']:,} tokens in all). "
        f"{run['texts_with_a_network']} texts have one of the template's {len(run['networks'])} networks (IoU above "
        f"0.2). {found} of these networks are found in a text, where chance would give none, and "
        f"{len(run['networks']) - found} in no text. So a network of many texts is seldom one of a single text of "
        f"{run['tokens'] / run['texts']:.0f} tokens."
    )
    return f"{words}\n\n{table(['network', 'texts', 'chance', 'mean IoU'], rows)}"


def first_layers(results: Results) -> str:
    """What a pass takes by the first layer that it changes."""
    seconds = results["first_layers"]["seconds"]
    whole = seconds["0"]
    rows = [
        ["seconds", *(f"{each:.1f}" for each in seconds.values())],
        ["times as fast as a whole pass", "1", *(f"{whole / each:.1f}" for each in list(seconds.values())[1:])],
    ]
    return table(["first layer that is changed", *seconds], rows)


def cost(results: Results) -> str:
    """What ten networks, six controls and twenty draws take."""
    run, cpu = results["one_by_one_float32"], results["first_layers"]
    spent = run["cost"]["seconds"] / run["cost"]["passes"]
    masks, batches = run["cost"]["passes"] // run["batches"], -(-run["tokens"] // cpu["tokens"])
    controls = 10 * 6 * 20
    first = sum(each["first_layer"] == 0 for each in run["networks"])
    both = results["pruned"]["cost"]
    whole = cpu["seconds"]["0"]
    enough = next(layer for layer, seconds in cpu["seconds"].items() if whole / seconds >= GOAL)
    return (
        f"Ten networks with six controls of 20 draws each are {controls:,} masks. On the H200 a pass of one batch "
        f"took {spent:.4f} s (the mean of {run['cost']['passes']:,}: {masks} masks on {run['batches']} batches; "
        f"{run['cost']['seconds'] / 60:.1f} minutes). {controls:,} masks on these {run['tokens']:,} tokens come to "
        f"{controls * run['batches'] * spent / 60:.0f} minutes, on a card that other work used too. On one CPU thread "
        f"they are {controls:,} x {batches} passes of {whole:.1f} s: {controls * batches * whole / 3600:.0f} hours. "
        f"What `one_by_one.yaml` computes takes {masks * batches * whole / 3600:.0f} there.\n\n"
        f"Sharing saved nothing of that. {first} of the {len(run['networks'])} networks have neurons in layer 0, so "
        f"their controls do too, and every pass computed {run['cost']['layers']:.0%} of the layers: 1 times as "
        f"fast, where the goal was {GOAL}. The passes of `pruned.yaml` begin at layer 1, of 30 layers, and were "
        f"run both ways: {both['seconds_whole']:.4f} s whole and {both['seconds_begun']:.4f} s from there, "
        f"{both['saving']:.2f} times as fast. By the table a saving of {GOAL} needs networks that begin at layer "
        f"{enough} or later, as with `ica_layers`. Networks of all layers do not."
    )


PARTS: dict[str, Callable[[Results], str]] = {
    part.__name__: part for part in (short, lesions, edge, union, kept, pruned, samples, first_layers, cost)
}


def wrapped(text: str) -> str:
    """Paragraphs in lines of the page; tables as they are."""
    parts = text.split("\n\n")
    return "\n\n".join(
        part
        if part.startswith(("|", "-"))
        else textwrap.fill(part, 119, break_long_words=False, break_on_hyphens=False)
        for part in parts
    )


def written(page: str, results: Results) -> str:
    """The page with every part as the results say it."""
    for name, part in PARTS.items():
        start, end = f"<!-- generated by benchmarks/probes.py: {name} -->\n", "\n<!-- end -->"
        before, found, after = page.partition(start)
        old, closed, rest = after.partition(end)
        if not (found and closed) or "<!-- generated" in old or start in rest:
            raise ValueError(f"{PAGE} must have one place for {name}")
        page = before + start + wrapped(part(results)) + end + rest
    return page


def pictures(results: Results) -> dict[str, bytes]:
    """Name of a file -> its chart."""
    run = results["one_by_one"]
    drawn = {SELECTORS[name]: run["drawn"][name] for name in ("random", "rms_matched")}
    rows = [
        (e["network"], tuple(e["effect"].values()), {said: values[e["network"]] for said, values in drawn.items()})
        for e in run["verdicts"]
    ]
    points = results["ten_and_random"]["curves"]["union"]
    numbers = sorted({each["point"] for each in points})
    runs = [results[name]["curves"]["kept"] for name in KEPT if name in results]
    rise = "rise (nats)"
    charts = {
        "probe_lesions.svg": strip_chart(rows, x="rise of the cross-entropy (nats per token)"),
        "probe_union.svg": line_chart(
            {SELECTORS[n]: [(m, fmean(effects(points, n, m))) for m in numbers] for n in ("networks", *FEW)},
            x="number of networks",
            y=rise,
        ),
        "probe_kept.svg": line_chart(
            {
                SELECTORS[n]: [(round(r[0]["point"], 2), fmean(effects(r, n))) for r in runs]
                for n in ("networks", *FEW)
            },
            x="share of all neurons that is kept",
            y=rise,
            is_share=True,
        ),
    }
    # A picture of a page does not know the page's colour: it has its own.
    return {name: chart.replace(b"height:auto", b"height:auto;background:#fff", 1) for name, chart in charts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--take", type=Path, nargs="+", default=[], help="output directories of runs")
    parser.add_argument("--device", default="H200", help="what they ran on")
    parser.add_argument("--write", action="store_true", help="write the page and its pictures")
    options = parser.parse_args()
    for run in options.take:
        (RESULTS / f"{run.name}.json").write_text(json.dumps(take(run, options.device), separators=(",", ":")) + "\n")
    if options.write:
        PAGE.write_text(written(PAGE.read_text(), read()))
        for name, picture in pictures(read()).items():
            (IMAGES / name).write_bytes(picture)


if __name__ == "__main__":
    main()
