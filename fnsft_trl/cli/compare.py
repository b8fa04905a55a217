"""fnsft compare A B: which networks of one template are found in another, as table, heat map and results.json."""

from dataclasses import replace
from pathlib import Path

from ..errors import FNSFTError
from ..occupied import REPORT
from ..report import Report, format_table
from ..report.figures import check_pyplot, comparison_figure
from .options.arguments import Arguments, read_arguments
from .options.loading import LoadingConfig, loading_options
from .options.schema import Option, row
from .output import check_writable


ABOUT = (
    "Compare the networks of two templates. Templates of one model are compared neuron by neuron, and so are those "
    "of a model and its fine-tuned child. All others are compared by their time courses on shared text (texts)."
)

_SAMPLE_HEADER = ["network", "texts", "of all", "chance", "mean IoU"]
_HEADER = ["network of A", "partner in B", "IoU", "Dice", "correlation", "same network", "nearest in B", "p"]


def options() -> list[Option]:
    """The options of the verb."""
    template = {"positional": True}
    return [
        row("a", "Directory, JSON file or Hub id of a template.", metavar="A", required=True, **template),
        row("b", "Template to compare it with, given in the same way. Not with per_sample.", metavar="B", **template),
        row("revision_a", "Branch, tag or commit of A on the Hub."),
        row("revision_b", "Branch, tag or commit of B on the Hub."),
        row("texts", "Compare by time courses on this shared text.", many=True, metavar="DATASET"),
        row(
            "per_sample",
            "Find the networks of each text by itself, and say which of A's networks they are.",
            False,
        ),
        row("passages", "With texts: number of passages (with per_sample: of texts).", 200, lowest=1),
        row("permutations", "Number of random permutations for the p-values.", 199, lowest=1),
        row("seed", "Seed of the permutations.", 0),
        row("output_dir", "Where the report goes.", "comparison", metavar="DIR"),
        *_model_options(),
    ]


def _model_options() -> list[Option]:
    """What only time courses need: the two models, and how they are loaded."""
    models = [
        row(f"model_{side}", f"Model of {side.upper()}. By default the one that its template names.") for side in "ab"
    ]
    loading = [option for option in loading_options() if option.name != "model_revision"]  # which would be of one
    revisions = [
        row(f"model_revision_{side}", f"Branch, tag or commit of the model of {side.upper()}.") for side in "ab"
    ]
    return [replace(option, group="with texts: loading the models") for option in (*models, *revisions, *loading)]


def main(argv: list[str]) -> None:
    args = read_arguments(argv, options())
    idle = [option.name for option in _model_options() if option.name in args.given]
    if args.texts is None and idle:
        raise FNSFTError(f"{', '.join(idle)}: read only with texts, the text to load models for; give it or drop them")
    _check(args)
    loading = LoadingConfig(**args.of(LoadingConfig))
    output = check_writable(args.output_dir, REPORT)
    check_pyplot()
    if args.texts is not None:
        from .models import check_loading
        from .precision import Precision

        check_loading(loading, Precision.choose().device)

    from ..comparison.similarity import check_comparable, compare_templates, compare_time_courses
    from ..template import FunctionalNetworkTemplate

    a = FunctionalNetworkTemplate.from_pretrained(args.a, revision=args.revision_a)
    if args.per_sample:
        _compare_samples(args, loading, a, output)
        return
    b = FunctionalNetworkTemplate.from_pretrained(args.b, revision=args.revision_b)
    settings = {"permutations": args.permutations, "seed": args.seed}
    if args.texts is None:
        check_comparable(a, b)
        comparison = compare_templates(a, b, **settings)
        measure, matrix = "IoU", comparison.iou
    else:
        comparison = compare_time_courses(*_time_courses(args, loading, a, b), **settings)
        measure, matrix = "|correlation| of time courses", comparison.correlation
    _write(args, a, b, comparison, measure, matrix, output)


def _check(args: Arguments) -> None:
    """What is asked for must go together."""
    if not args.per_sample:
        if args.b is None:
            raise FNSFTError("b is missing; give a second template, or per_sample")
        return
    of_b = [name for name in ("b", "revision_b", "model_b", "model_revision_b", "permutations") if name in args.given]
    if of_b:
        raise FNSFTError(f"per_sample compares A with the networks of texts; drop {', '.join(of_b)}")
    if args.texts is None:
        raise FNSFTError("per_sample needs texts, whose networks are found one by one; give them")


def _compare_samples(args: Arguments, loading: LoadingConfig, template, output: Path) -> None:
    """Which networks of a template are those of single texts."""
    from ..comparison.samples import compare_samples
    from ..data.sources import load_texts
    from ..discovery.matching import SAME_NETWORK
    from .models import load_model_and_tokenizer

    texts = (row for rows in load_texts(args.texts).values() for row in _strings(rows))
    name = args.model_a or template.base_model
    model, tokenizer = load_model_and_tokenizer(name, replace(loading, model_revision=args.model_revision_a))
    found = compare_samples(model, tokenizer, template, texts, count=args.passages, seed=args.seed)
    rows = [
        [str(each.network), str(each.samples), f"{each.share:.0%}", f"{each.null:.0%}", f"{each.iou:.2f}"]
        for each in found.networks
    ]
    known = [max(value for _, value in sample) > SAME_NETWORK for sample in found.samples]
    about = (
        f"{args.a}: {len(template.components)} networks; {len(found.samples)} texts of {found.tokens} tokens, each "
        f"with as many networks of its own ({found.left_out} texts were too short). A network is found in a text one "
        f"of whose own shares more than {SAME_NETWORK} of their neurons with it (IoU); chance: the neurons of the "
        "text's networks permuted within their layers."
    )
    summary = f"{sum(known)} of {len(known)} texts have a network of the template."
    report = Report("fnsft compare: single texts")
    report.text(about)
    report.text(summary)
    report.table(_SAMPLE_HEADER, rows)
    report.save(output, {"template": args.a, "texts": args.texts, "seed": args.seed, **found.to_dict()})
    print(f"{about}\n\n{format_table(_SAMPLE_HEADER, rows)}\n\n{summary}\n\nReport: {output / 'report.html'}")


def _time_courses(args: Arguments, loading: LoadingConfig, a, b):
    from ..comparison.fingerprint import network_time_courses, split_passages
    from ..data.sources import load_texts
    from .models import load_model_and_tokenizer

    texts = (row for rows in load_texts(args.texts).values() for row in _strings(rows))
    passages = split_passages(texts, count=args.passages)
    courses = []
    sides = ((a, args.model_a, args.model_revision_a), (b, args.model_b, args.model_revision_b))
    for template, name, revision in sides:
        model, tokenizer = load_model_and_tokenizer(
            name or template.base_model, replace(loading, model_revision=revision)
        )
        courses.append(network_time_courses(model, tokenizer, template, passages))
    return courses


def _strings(rows):
    """The text of every row, without anything that a chat template would add."""
    for item in rows:
        if "input_ids" in item:
            raise FNSFTError("the shared text is token ids of one tokenizer; give text or conversations")
        messages = item.get("messages") or item.get("prompt", []) + item.get("completion", [])
        yield item["text"] if "text" in item else "\n".join(message["content"] or "" for message in messages)


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
