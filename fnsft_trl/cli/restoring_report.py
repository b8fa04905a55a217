"""The report of `fnsft restore`: every way to restore with what it costs and gives, and the one that was written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..hub.card import with_section
from ..report import Report, format_table
from ..report.figures import tradeoff_figure
from ..template.storage import CARD_FILE
from .evaluation_report import versions


_SECTION = "## Restored"
_NOTE = (
    "KL: of the base to the restored model, in nats per token, on passages that gave no directions. What is left "
    "along U: the largest norm of D U over that of D, of any module, as it is stored. The ways were compared on the "
    "very texts and rows that the numbers are of: what was chosen by them looks a little better here than it is."
)


def write_report(screen, asked) -> None:
    """Write the report, the section of the card, and print what matters.

    Args:
        screen: what was found ([`~fnsft_trl.cli.restoring_run.Screen`]).
        asked: what was asked for ([`~fnsft_trl.cli.restore.Asked`]).
    """
    header, rows = _table(screen)
    energy = _energy_table(screen)
    report = Report(f"fnsft restore: {Path(asked.args.adapter).name}")
    report.text(_summary(screen, asked))
    report.heading("Ways to restore")
    report.table(header, rows)
    report.figure("tradeoff", _figure(screen), "What each way leaves of the forgetting, and what it costs.")
    report.text(_NOTE)
    report.heading("What the directions hold")
    report.text("Share of the energy (squared norm of the inputs, all tokens but the first), the mean over inputs.")
    report.table(*energy)
    report.heading("Texts")
    report.table(*_texts_table(screen, asked.shares))
    report.save(asked.output, _content(screen, asked))
    card = asked.output / CARD_FILE
    if card.is_file():
        section = f"{_SECTION}\n\n{_summary(screen, asked, is_public=True)}"
        card.write_text(with_section(card.read_text(encoding="utf-8"), section), encoding="utf-8")
    print(
        "\n\n".join(
            [
                format_table(header, rows),
                "Energy that the directions hold:\n" + format_table(*energy),
                _summary(screen, asked),
                f"Report: {asked.output / 'report.html'} (also report.md, results.json)",
            ]
        )
    )


def _summary(screen, asked, *, is_public: bool = False) -> str:
    """What was chosen, and what it does; a card names no local path."""
    trained, chosen = screen.ways[0], screen.chosen
    kept = ", ".join(screen.texts)
    text = f"Chosen: {chosen.how.name} ({screen.rule}). " if not is_public else ""
    text += (
        f"The change of {screen.modules} linear layers was taken {chosen.how.name}, to keep what the model makes of "
        f"{kept}: there the KL to the base is {chosen.mean_kl:.4f} nats per token, and was {trained.mean_kl:.4f}"
    )
    if trained.mean_kl > 0:
        text += f" ({1 - chosen.mean_kl / trained.mean_kl:.0%} less)"
    if trained.loss is not None:
        gain = (screen.base.loss - chosen.loss) / (screen.base.loss - trained.loss)
        text += (
            f". The loss on {screen.rows} rows of the task is {chosen.loss:.4f}, was {trained.loss:.4f}, and "
            f"{screen.base.loss:.4f} in the base: {gain:.1%} of the gain is kept."
        )
    else:
        text += ". Nothing was measured on the task, so how much of it was lost is not known."
    if screen.others:
        text += (
            f" {screen.others} other parameters that were trained (norms, embeddings, biases alone) have their base "
            "values again where anything is projected: their inputs have no directions."
        )
    return text


def _table(screen) -> tuple[list[str], list[list[str]]]:
    with_task = screen.base.loss is not None
    with_exact = screen.base.exact is not None
    header = ["way", *(f"KL {name}" for name in screen.texts), *(f"rise {name}" for name in screen.texts)]
    header += ["task loss"] if with_task else []
    header += ["gain kept"] if with_task else []
    header += ["exact match"] if with_exact else []
    header.append("left along U")
    rows = [_row("base", screen.base, screen, with_task, with_exact)]
    for way in screen.ways:
        mark = " *" if way is screen.chosen else ""
        rows.append(_row(way.how.name + mark, way, screen, with_task, with_exact))
    return header, rows


def _row(name: str, way, screen, with_task: bool, with_exact: bool) -> list[str]:
    cells = [name, *(f"{kl:.4f}" for kl in way.kl.values()), *(f"{rise:+.4f}" for rise in way.rise.values())]
    if with_task:
        whole = screen.base.loss - screen.ways[0].loss
        cells += [f"{way.loss:.4f}", f"{(screen.base.loss - way.loss) / whole:.1%}"]
    if with_exact:
        cells.append(f"{way.exact:.3f}")
    return [*cells, f"{way.residual:.1e}" if way.how.directions else ""]


def _energy_table(screen) -> tuple[list[str], list[list[str]]]:
    counts = list(next(iter(screen.energy.values())))
    rows = [[name, *(f"{shares[m]:.1%}" for m in counts)] for name, shares in screen.energy.items()]
    return ["text", *(f"{m} directions" if m > 1 else "1 direction" for m in counts)], rows


def _texts_table(screen, shares: Mapping[str, float]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for name, (kept, scored) in screen.texts.items():
        sinks = screen.sinks[name]
        most = ", ".join(f"{token} {count}" for token, count in sinks["most"].items()).replace("|", "\\|")
        cells = [name, f"{shares[name]:.2f}", str(kept.tokens), str(scored.tokens), scored.sha256[:16]]
        rows.append([*cells, f"{sinks['count']} of {sinks['tokens']}", most])
    header = ["text", "share", "tokens of directions", "tokens scored", "SHA-256 of these"]
    return [*header, "attention sinks beside position 0", "most often"], rows


def _kind(how) -> str:
    if how.is_centred:
        return "centred"
    if how.networks:
        return "networks"
    if how.directions:
        return "projected" if how.scale == 1 else "projected and scaled"
    return "scaled"


def _figure(screen) -> bytes:
    points: dict[str, list[tuple[float, float, str]]] = {}
    for number, way in enumerate(screen.ways):
        x = way.loss if way.loss is not None else float(number)
        short = way.how.name.replace("position 0", "0").replace(" leading", "")
        points.setdefault(_kind(way.how), []).append((x, way.mean_kl, short))
    chosen = screen.chosen
    x = chosen.loss if chosen.loss is not None else float(screen.ways.index(chosen))
    return tradeoff_figure(
        points,
        loss="number of the way" if chosen.loss is None else "loss on the task, nats per token",
        divergence="KL of the base to the restored model, nats per token",
        limit=screen.limit,
        chosen=(x, chosen.mean_kl),
    )


def _content(screen, asked) -> dict[str, Any]:
    """All of it as JSON values."""
    names = ("adapter", "base", "task", "tolerance", "energy", "choose", "layers", "keep_tokens", "score_tokens")
    return {
        "format": "fnsft_trl.restoring",
        "format_version": 1,
        "versions": versions(),
        "settings": {name: vars(asked.args)[name] for name in names} | {"seed": asked.settings.seed},
        "keep": {
            name: {
                "source": asked.keep.sources()[name],
                "share": asked.shares[name],
                "tokens": kept.tokens,
                "tokens_scored": scored.tokens,
                "sha256": scored.sha256,
                "sinks": screen.sinks[name],
            }
            for name, (kept, scored) in screen.texts.items()
        },
        "energy": {name: {str(m): share for m, share in shares.items()} for name, shares in screen.energy.items()},
        "modules": screen.modules,
        "base_values": screen.others,
        "task_rows": screen.rows,
        "base": _values(screen.base),
        "limit": screen.limit,
        "ways": [{"name": way.how.name, **vars(way.how), **_values(way)} for way in screen.ways],
        "chosen": screen.chosen.how.name,
        "rule": screen.rule,
        "nothing_measured_on_task": screen.base.loss is None,
    }


def _values(way) -> dict[str, Any]:
    found = {"kl": way.kl, "rise": way.rise, "mean_kl": way.mean_kl, "residual": way.residual}
    return found | {"task_loss": way.loss, "exact_match": way.exact}
