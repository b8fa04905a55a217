"""The report of `fnsft demo`."""

from pathlib import Path

from ..report import Report, format_table
from ..report.figures import trade_off_figure
from ..template.storage import FIGURE_FILE


TEMPLATE = "template"  # directory of the networks, within that of the report
_HEADER = [
    *("arm", "trained parameters", "neurons changed", "frozen bit-identical", "exact match", "NLL", "forgetting"),
]
_CAUTION = (
    "This is one seed, one task and one control: it shows how the parts work together and proves nothing about the "
    "method. Learning rates were chosen beforehand on this task so that the arms learn about equally well; arms "
    "that do not cannot be compared by forgetting alone."
)


def _verdict(results: list[dict]) -> str:
    least = min(results, key=lambda result: result["retention_rise"])
    best = min(results, key=lambda result: result["nll"])
    return (
        f"Forgot least: {least['arm']} ({least['retention_rise']:+.4f} nats per token of general text). Learnt best: "
        f"{best['arm']} (NLL {best['nll']:.2f})."
    )


def _rows(summary: dict) -> list[list[str]]:
    """The table of the arms, below the model before training."""
    base = summary["base"]
    rows = [["before training", "", "", "", f"{base['exact_match']:.2f}", f"{base['nll']:.2f}", ""]]
    marks = {None: "does not apply", True: "yes", False: "NO"}
    for arm in summary["arms"]:
        rows.append(
            [
                arm["arm"],
                f"{arm['trained_parameters']:,}",
                f"{arm['changed_neurons']:,} of {arm['neurons']:,}",
                marks[arm["frozen_bit_identical"]],
                f"{arm['exact_match']:.2f}",
                f"{arm['nll']:.2f}",
                "{:+.4f} [{:+.4f}, {:+.4f}]".format(arm["retention_rise"], *arm["retention_interval"]),
            ]
        )
    return rows


def write_report(summary: dict, template, fraction: float, output: Path) -> None:
    """Write the report, and print what matters of it.

    Args:
        summary: the numbers.
        template: the networks.
        fraction: of the neurons of every layer that an arm trains.
        output: directory of the report.
    """
    base, arms, rows = summary["base"], summary["arms"], _rows(summary)
    note = (
        f"n = {summary['test_rows']} test rows and {summary['retention_tokens']} tokens of general text, "
        f"{len(summary['seeds'])} seed, {summary['train_rows']} training rows. Forgetting: rise of cross-entropy on "
        "general text, in nats per token, with its 95% interval over texts (not over seeds). NLL: nats per answer."
    )
    difference = "{:+.4f} [{:+.4f}, {:+.4f}]".format(*summary["random_minus_outside"])
    verdict = f"{_verdict(arms)} Random neurons forgot {difference} more than neurons outside the networks."

    report = Report(f"fnsft demo: {summary['model']}")
    report.text(f"{verdict} {_CAUTION}")
    report.heading("What was learnt and what was forgotten")
    report.table(_HEADER, rows)
    report.text(note)
    points = [(arm["arm"], arm["nll"], arm["retention_rise"]) for arm in arms]
    report.figure(
        "learning_and_forgetting",
        trade_off_figure(
            points,
            learning="NLL of the new task, nats per answer (left: learnt better)",
            forgetting="rise of cross-entropy on general text\nnats per token (down: forgot less)",
        ),
        f"Learning against forgetting, one seed; before training the task's NLL was {base['nll']:.2f}.",
    )
    report.text(
        f"Both kinds of neuron deltas train {fraction:.0%} of the neurons of every layer: those with the lowest "
        "loadings on all networks (outside the functional networks of general text), or as many at random. Every "
        "adapter gave the same logits, bit for bit, after it was loaded in a fresh process."
    )
    _describe_sources(report, summary, template, output)
    report.save(output, summary)

    print(f"\n{format_table(_HEADER, rows)}\n\n{note}\n\n{verdict}\n{_CAUTION}\n")
    print(f"Report: {output / 'report.html'} (also report.md, results.json), {summary['seconds']} s")


def _describe_sources(report: Report, summary: dict, template, output: Path) -> None:
    """The networks, and the data that all was made of."""
    report.heading("The networks")
    report.figure(
        "networks",
        (output / TEMPLATE / FIGURE_FILE).read_bytes(),
        f"{len(template.components)} networks of {template.base_model} from {template.calibration['tokens']} tokens. "
        "Reliability: correlation of a network's loadings between two disjoint halves of the tokens; above null: how "
        "far it is from the highest that components reach without any co-activation "
        f"({template.null['highest']:.2f}) to 1.",
    )
    report.heading("Data")
    report.text(
        f"Discovery text: {', '.join(template.calibration['sources'])}; SHA-256 of its token ids "
        f"{summary['discovery_sha256']}."
    )
    report.text(
        "Retention text: English Wikipedia passages (BoolQ), other articles than those of the discovery; SHA-256 of "
        f"its token ids {summary['retention_sha256']}."
    )
    report.text(
        "New task: name the desk a question belongs to (arithmetic, finance, health, household, science, trivia); "
        "real questions of ASDiv, FiQA, HealthSearchQA, PIQA, OpenBookQA and NQ-open."
    )
