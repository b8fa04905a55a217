"""The report of `fnsft restore`: every way to restore with what it costs and gives, and the one that was written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..hub.card import with_section
from ..interventions.restoring import Restoration
from ..report import Report, format_table
from ..report.figures import tradeoff_figure
from ..template.storage import CARD_FILE
from .evaluation_report import versions
from .restoring_asked import Asked
from .restoring_screen import Scored, Screen


_SECTION = "## Restored"
_LEGEND = (
    "off: removed from the change of every linear layer is its effect on these inputs: the mean at position 0 (the "
    "first token of a text), the mean of all other inputs, and the leading directions of these."
)
_NOTE = (
    "KL: from the base to the restored model, in nats per token, on passages that gave no directions. Left along U: "
    "the largest ||D U|| / ||D|| of any module, as stored. The way was chosen on these texts and rows, so its numbers "
    "are slightly optimistic."
)


def write_report(screen: Screen, asked: Asked, directory: Path) -> None:
    """Write the report and the section of the card.

    Args:
        screen: what was found.
        asked: what was asked for.
        directory: where to write it.
    """
    report = Report(f"fnsft restore: {Path(asked.args.adapter).name}")
    report.text(_summary(screen, asked))
    report.heading("Ways to restore")
    report.table(*_table(screen))
    report.text(_LEGEND)
    report.figure("tradeoff", _figure(screen), "What each way leaves of the forgetting, and what it costs.")
    report.text(_NOTE)
    report.heading("What the directions hold")
    report.text("Share of the energy (squared norm of the inputs, all tokens but the first), the mean over inputs.")
    report.table(*_energy_table(screen))
    report.heading("Texts")
    report.table(*_texts_table(screen, asked.shares))
    report.save(directory, _content(screen, asked))
    card = directory / CARD_FILE
    if card.is_file():
        section = f"{_SECTION}\n\n{_summary(screen, asked, is_public=True)}"
        card.write_text(with_section(card.read_text(encoding="utf-8"), section), encoding="utf-8")


def print_report(screen: Screen, asked: Asked) -> None:
    """Print what matters of it.

    Args:
        screen, asked: as for [`write_report`].
    """
    energy = format_table(*_energy_table(screen))
    print(
        "\n\n".join(
            [
                format_table(*_table(screen, is_short=True)),
                _LEGEND,
                f"Share of the energy of each text that lies in the directions:\n{energy}",
                _summary(screen, asked),
                f"Report: {asked.output / 'report.html'} (also report.md, results.json)",
            ]
        )
    )


def _summary(screen: Screen, asked: Asked, *, is_public: bool = False) -> str:
    """What was chosen, and what it does; a card names no local path."""
    trained, chosen = screen.ways[0], screen.chosen
    sentences = [] if is_public else [f"Chosen: {chosen.how.name} ({screen.rule})."]
    kept = (
        f"{screen.modules} linear layers, {chosen.how.name}, to keep what the base makes of {', '.join(screen.texts)}."
    )
    kl = (
        f"There the KL of the base to this model is {chosen.mean_kl:.4f} nats per token, and was {trained.mean_kl:.4f}"
    )
    if trained.mean_kl > 0:
        kl += f" ({1 - chosen.mean_kl / trained.mean_kl:.1%} less)"
    sentences += [f"Restored: {kept}", f"{kl}."]
    if screen.base.loss is None:
        sentences.append("Nothing was measured on the task, so how much of it was lost is not known.")
    else:
        text = f"On {screen.rows} rows of the task the loss is {chosen.loss:.4f}, was {trained.loss:.4f}, and "
        text += f"{screen.base.loss:.4f} in the base: {_gain(chosen, screen):.1%} of the gain is kept"
        if screen.base.exact is not None:
            text += f"; {chosen.exact:.1%} of them are answered exactly, and {trained.exact:.1%} were"
        sentences.append(f"{text}.")
    if screen.others:
        sentences.append(
            f"{screen.others} other parameters that were trained (norms, embeddings, biases alone) have their base "
            "values again where anything is projected: their inputs have no directions."
        )
    return " ".join(sentences)


def _gain(way: Scored, screen: Screen) -> float:
    """The share of the task's gain that a way keeps."""
    return (screen.base.loss - way.loss) / (screen.base.loss - screen.ways[0].loss)


def _table(screen: Screen, *, is_short: bool = False) -> tuple[list[str], list[list[str]]]:
    """All ways; a short one fits a terminal."""
    header = ["way", *(f"KL {name}" for name in screen.texts)]
    header += [] if is_short else [f"rise {name}" for name in screen.texts]
    header += [] if screen.base.loss is None else ["task loss", "gain kept"]
    header += [] if screen.base.exact is None else ["exact match"]
    header += [] if is_short else ["left along U"]
    ways = [
        ("base", screen.base),
        *((way.how.name + (" *" if way is screen.chosen else ""), way) for way in screen.ways),
    ]
    return header, [_row(name, way, screen, is_short) for name, way in ways]


def _row(name: str, way: Scored, screen: Screen, is_short: bool) -> list[str]:
    cells = [name, *(f"{kl:.4f}" for kl in way.kl.values())]
    cells += [] if is_short else [f"{rise:+.4f}" for rise in way.rise.values()]
    cells += [] if way.loss is None else [f"{way.loss:.4f}", f"{_gain(way, screen):.1%}"]
    cells += [] if way.exact is None else [f"{way.exact:.3f}"]
    return cells if is_short else [*cells, f"{way.residual:.1e}" if way.how.directions else ""]


def _energy_table(screen: Screen) -> tuple[list[str], list[list[str]]]:
    counts = list(next(iter(screen.energy.values())))
    rows = [[name, *(f"{shares[m]:.1%}" for m in counts)] for name, shares in screen.energy.items()]
    return ["text", *(f"{m} directions" if m > 1 else "1 direction" for m in counts)], rows


def _texts_table(screen: Screen, shares: Mapping[str, float]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for name, (kept, scored) in screen.texts.items():
        sinks = screen.sinks[name]
        most = ", ".join(f"{token} {count}" for token, count in sinks["most"].items()).replace("|", "\\|")
        cells = [name, f"{shares[name]:.2f}", str(kept.tokens), str(scored.tokens), scored.sha256[:16]]
        rows.append([*cells, f"{sinks['count']} of {sinks['tokens']}", most])
    header = ["text", "share", "tokens of directions", "tokens scored", "SHA-256 of these"]
    return [*header, "attention sinks beside position 0", "most often"], rows


def _kind(how: Restoration) -> str:
    if how.is_centred:
        return "centred"
    if how.networks or how.neurons:
        return "networks"
    if how.directions:
        return "projected" if how.scale == 1 else "projected and scaled"
    return "scaled"


def _figure(screen: Screen) -> bytes:
    points: dict[str, list[tuple[float, float, str]]] = {}
    for number, way in enumerate(screen.ways):
        x = way.loss if way.loss is not None else float(number)
        short = (
            way.how.name.replace("position", "pos.")
            .replace(" leading", "")
            .replace("scaled by ", "\N{MULTIPLICATION SIGN} ")
        )
        points.setdefault(_kind(way.how), []).append((x, way.mean_kl, short))
    chosen = screen.chosen
    x = chosen.loss if chosen.loss is not None else float(screen.ways.index(chosen))
    return tradeoff_figure(
        points,
        loss="number of the way" if chosen.loss is None else "loss on the task, nats per token",
        divergence="KL of the base to the restored model, nats per token",
        limit=screen.limits and screen.limits.loss,
        chosen=(x, chosen.mean_kl),
    )


def _content(screen: Screen, asked: Asked) -> dict[str, Any]:
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
        "limits": None if screen.limits is None else vars(screen.limits),
        "ways": [{"name": way.how.name, **vars(way.how), **_values(way)} for way in screen.ways],
        "chosen": screen.chosen.how.name,
        "rule": screen.rule,
        "nothing_measured_on_task": screen.base.loss is None,
    }


def _values(way: Scored) -> dict[str, Any]:
    found = {"kl": way.kl, "rise": way.rise, "mean_kl": way.mean_kl, "residual": way.residual}
    return found | {"task_loss": way.loss, "exact_match": way.exact}
