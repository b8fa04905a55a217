"""fnsft compare A B: which networks of one template are found in another, as table, heat map and results.json."""

from pathlib import Path

from ..errors import FNSFTError
from ..report.figures import check_pyplot, comparison_figure
from ..report.report import Report, format_table
from ..template.template import FunctionalNetworkTemplate
from .arguments import ArgumentParser, check_writable


_HEADER = ["network of A", "partner in B", "IoU", "Dice", "correlation", "same network", "nearest in B", "p"]


def main(argv: list[str]) -> None:
    parser = ArgumentParser(
        prog="fnsft compare",
        description="Compare the networks of two templates: neuron by neuron where both are of one model (or of a "
        "model and its fine-tuned child), or by their time courses on shared text (--texts) where they are not.",
    )
    parser.add_argument("a", help="directory, JSON file or Hub id of a template")
    parser.add_argument("b", help="the same of another one")
    parser.add_argument("--revision_a", help="branch, tag or commit of A on the Hub")
    parser.add_argument("--revision_b", help="branch, tag or commit of B on the Hub")
    parser.add_argument("--texts", nargs="+", metavar="DATASET", help="compare by time courses on this shared text")
    parser.add_argument("--model_a", help="with --texts: model of A; by default the one that its template names")
    parser.add_argument("--model_b", help="with --texts: model of B; by default the one that its template names")
    parser.add_argument("--passages", type=int, default=200, help="with --texts: number of passages")
    parser.add_argument("--permutations", type=int, default=199, help="random permutations for the p-values")
    parser.add_argument("--seed", type=int, default=0, help="of the permutations")
    parser.add_argument("--output_dir", default="comparison", help="where the report goes")
    args = parser.parse_args(argv)
    if args.permutations < 1 or args.passages < 1:
        raise FNSFTError("--permutations and --passages must be at least 1")
    if args.texts is None and (args.model_a or args.model_b):
        raise FNSFTError("--model_a and --model_b are read only with --texts; give it or drop them")
    output = check_writable(args.output_dir)
    check_pyplot()
    a = FunctionalNetworkTemplate.from_pretrained(args.a, revision=args.revision_a)
    b = FunctionalNetworkTemplate.from_pretrained(args.b, revision=args.revision_b)

    from ..comparison.similarity import check_comparable, compare_templates, compare_time_courses

    options = {"permutations": args.permutations, "seed": args.seed}
    if args.texts is None:
        check_comparable(a, b)
        comparison = compare_templates(a, b, **options)
        measure, matrix = "IoU", comparison.iou
    else:
        comparison = compare_time_courses(*_time_courses(args, a, b), **options)
        measure, matrix = "|correlation| of time courses", comparison.correlation
    _write(args, a, b, comparison, measure, matrix, output)


def _time_courses(args, a, b):
    from ..comparison.fingerprint import network_time_courses, split_passages
    from ..data.sources import load_texts
    from .models import load_model_and_tokenizer

    texts = (row for rows in load_texts(args.texts).values() for row in _strings(rows))
    passages = split_passages(texts, count=args.passages)
    courses = []
    for template, name in ((a, args.model_a), (b, args.model_b)):
        model, tokenizer = load_model_and_tokenizer(name or template.base_model)
        courses.append(network_time_courses(model, tokenizer, template, passages))
    return courses


def _strings(rows):
    """The text of every row, without anything that a chat template would add."""
    for row in rows:
        if "input_ids" in row:
            raise FNSFTError("the shared text is token ids of one tokenizer; give text or conversations")
        messages = row.get("messages") or row.get("prompt", []) + row.get("completion", [])
        yield row["text"] if "text" in row else "\n".join(message["content"] or "" for message in messages)


def _known(value, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def _write(args, a, b, comparison, measure: str, matrix, output: Path) -> None:
    marks = {None: "", True: "yes", False: "no"}
    rows = [
        [
            str(m.network),
            _known(m.partner, "d"),
            _known(m.iou),
            _known(m.dice),
            _known(m.correlation),
            marks[m.same],
            str(m.nearest),
            f"{m.p_value:.3f}",
        ]
        for m in comparison.matches
    ]
    pairs = f"mean |correlation| {comparison.mean('correlation'):.2f} (chance {comparison.null_correlation:.2f})"
    if comparison.same is not None:
        pairs = f"mean IoU {comparison.mean('iou'):.2f} (chance {comparison.null_iou:.2f}), {pairs}; "
        pairs += f"{comparison.same} of {len(comparison.matches)} networks are the same (IoU above 0.2)"
    summary = f"One-to-one pairs: {pairs}."
    about = (
        f"A: {args.a}, {len(a.components)} networks of {a.base_model or 'a model without a name'}. B: {args.b}, "
        f"{len(b.components)} networks of {b.base_model or 'a model without a name'}. Chance and p: "
        f"{args.permutations} random permutations of {'passages' if args.texts else 'neurons within their layers'}."
    )
    report = Report("fnsft compare")
    report.text(about)
    report.text(summary)
    report.table(_HEADER, rows)
    report.figure("comparison", comparison_figure(matrix.tolist(), measure), f"{measure} of all pairs of networks.")
    sources = {
        name: {"template": given, "hub_id": t.hub_id, "commit": t.commit, "base_model": t.base_model}
        for name, given, t in (("a", args.a, a), ("b", args.b, b))
    }
    report.save(output, {**sources, "texts": args.texts, "seed": args.seed, **comparison.to_dict()})
    print(f"{about}\n\n{format_table(_HEADER, rows)}\n\n{summary}\n\nReport: {output / 'report.html'}")
