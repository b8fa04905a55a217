"""The report of the cells: tables, pictures and the verdict, byte for byte the same from the same cells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path as File
from typing import Any

from fnsft_trl.report.figures import learning_figure
from fnsft_trl.report.report import Report

from .afterwards import EVERY, beside_other_rate, learning_rate, left_open, rivals
from .comparing import Comparison, Run, runs
from .paths import At, Cell, Found, Levels, Path, at_target, every_at, of_arm
from .plan import BY_STEPS, GATE, LEAST_FORGETTING, PRIMARY, SHARE, SHARES, TUNING_SEED
from .screening import index
from .stages import (
    CHOOSE,
    CONFIRM,
    arms_of,
    best_of,
    forgetting,
    gate,
    kept_shifts,
    networks_arm,
    proposed,
    rival,
    screen,
    tuned_shifts,
)
from .verdict import Answer, answer_q1, answer_q2, shown


NEVER = "never"


def write_report(found: Found, directory: File) -> dict[str, Any]:
    """Write `report.md`, `report.html`, the pictures and `results.json`.

    Args:
        found: the cells, by their key.
        directory: where they go.

    Returns:
        What `results.json` holds.
    """
    report = Report("Does protection forget less?")
    answers = [answer_q1(found), answer_q2(found)]
    results: dict[str, Any] = {"cells": len(found)}
    report.heading("Verdict")
    for answer in answers:
        report.text(f"{answer.question}: {answer.text}")
        results[answer.question] = _of_answer(answer)
    half = answer_q1(found, share=SHARES[0])
    if half.comparisons:
        report.text(f"At half of what there is to learn (decides nothing): {half.text}")
        results["Q1 at half"] = _of_answer(half)
    _equal(report, found, results, answers[0])
    _stages(report, found, results)
    _gate(report, found, results)
    _tuning(report, found, results)
    _screen(report, found, results)
    _confirmation(report, found, results, answers[0])
    _afterwards(report, found, results)
    report.save(directory, results)
    return results


def _of_answer(answer: Answer) -> dict[str, Any]:
    return {
        "word": answer.word,
        "text": answer.text,
        "comparisons": {name: asdict(each) for name, each in answer.comparisons.items()},
        "adjusted_p": answer.adjusted,
        "dissociations": {name: asdict(each) for name, each in answer.dissociations.items()},
    }


_CALLED = {
    "full": "full fine-tuning",
    "lora": "LoRA r 8",
    "replay": "full, a quarter of each batch from the texts to keep",
    "random": "full, as many random directions protected",
    "networks": "full, directions of networks protected",
    "subspace": "full, leading directions protected (`protect: subspace`)",
}


def _equal(report: Report, found: Found, results: dict[str, Any], answer: Answer) -> None:
    if not answer.comparisons:
        return
    report.heading("At equal learning")
    report.text(
        f"KL from the base in nats per token where {SHARE:.0%} is learnt: geometric mean over {' and '.join(PRIMARY)} "
        "and over the seeds that get there, of five. The last column divides the KL of protection, the last row, by "
        "that of the row itself, over all pairs of seeds in which both get there."
    )
    header, rows = equal_table(found, answer)
    report.table(header, rows)
    results["at equal learning"] = [dict(zip(header, row, strict=True)) for row in rows]


def equal_table(found: Found, answer: Answer) -> tuple[list[str], list[list[str]]]:
    """What each way has forgotten on both shifts where as much is learnt, and that of protection as a part of it.

    Args:
        found: the cells.
        answer: to Q1, from all confirming cells.
    """
    tasks, rows = tuned_shifts(found), []
    for arm, called in _CALLED.items():
        arms = {task: networks_arm(found, task) if arm == "networks" else arm for task in tasks}
        cells = [_reached(runs(found, task, arms[task], SHARE)) for task in tasks]
        beside = answer.comparisons.get(arm)
        rows.append([called, *cells, "" if beside is None else _beside(beside)])
    compared = beside_other_rate(found)
    if compared is not None:
        cells = [_reached(rivals(found, task)) for task in tasks]
        rows.insert(1, ["the same, in german at another rate, added afterwards", *cells, _beside(compared)])
    return ["all linear layers train", *(task.partition(",")[0] for task in tasks), "last row / this row (95%)"], rows


def _reached(found: Sequence[Run]) -> str:
    there = [run for run in found if run.is_reached]
    if not there:
        return f"not reached (0 of {len(found)})"
    kl = math.exp(sum(float(run.log_kl()[0]) for run in there) / len(there))
    return f"{kl:.4f}" + ("" if len(there) == len(found) else f" ({len(there)} of {len(found)})")


def _beside(each: Comparison) -> str:
    if each.ratio is None:
        return f"no pair of {each.pairs}"
    return f"{shown(each.ratio)}, {len(each.differences)} of {each.pairs} pairs"


def _stages(report: Report, found: Found, results: dict[str, Any]) -> None:
    report.heading("Cells")
    rows, results["stages"] = [], {}
    for stage, wanted in EVERY.items():
        settings = wanted(found)
        done = sum(each.key in found for each in settings)
        results["stages"][stage] = {"finished": done, "known": len(settings)}
        rows.append([stage, str(done), str(len(settings)) if settings else "not known yet"])
    report.table(["stage", "finished", "of"], rows)


def _gate(report: Report, found: Found, results: dict[str, Any]) -> None:
    report.heading("Gate")
    report.text(
        f"A shift is kept if full training and LoRA both forget at least {LEAST_FORGETTING:g} nats (mean over "
        f"{' and '.join(PRIMARY)}) where {SHARE:.0%} of what only training teaches is learnt, each with the rate and "
        "the path that forget least; a way that never gets there spares nothing. By validation: what the rate "
        "forgets at its end that the loss on the task alone "
        "would choose."
    )
    rows, results["gate"] = [], {}
    for task in proposed(found):
        best, levels = forgetting(found, task), Levels.of(found, task, rates=GATE)
        if best is None:
            rows.append([task, *[""] * 6, "not finished"])
            continue
        verdict = "kept" if task in kept_shifts(found) else "refused"
        by_validation = {arm: _by_validation(found, task, arm) for arm in GATE}
        rows.append(
            [
                task,
                *(f"{value:.2f}" for value in (levels.base, levels.demonstrated, levels.best)),
                f"{levels.target(SHARE):.2f}",
                *(f"{_mean(at)} ({_how(at)}); by validation {by_validation[arm]}" for arm, at in best.items()),
                verdict,
            ]
        )
        results["gate"][task] = {
            "levels": asdict(levels),
            "target": levels.target(SHARE),
            "least": {arm: _plain(at) for arm, at in best.items()},
            "by_validation": by_validation,
            "verdict": verdict,
        }
    report.table(["shift", "base", "L5", "L*", "target", *GATE, "verdict"], rows)
    for task in proposed(found):
        curves = {}
        for setting in gate(found):
            if setting.task == task and setting.arm in GATE and setting.key in found:
                curves[f"{setting.arm} {setting.learning_rate:g}"] = [_curve(found[setting.key])]
        _picture(
            report,
            f"gate-{_file(task)}",
            curves,
            found,
            task,
            f"The gate of {task}, one seed.",
        )


def _by_validation(found: Found, task: str, arm: str) -> str:
    """What the end of the cell has forgotten that has learnt most at its end."""
    cells = [cell for cell in of_arm(found, task, arm, part=CHOOSE) if cell["learning_rate"] in GATE[arm]]
    best = min(cells, key=lambda cell: cell["points"][-1]["learning"])
    kl = [best["points"][-1]["retention"][name]["kl"] for name in PRIMARY]
    return f"{sum(kl) / len(kl):.3f} at {best['learning_rate']:g}"


def _tuning(report: Report, found: Found, results: dict[str, Any]) -> None:
    report.heading("Tuning")
    rows, results["tuning"] = [], {}
    for task in tuned_shifts(found):
        levels, chosen = Levels.of(found, task), {}
        for arm in arms_of(found, task):
            cells = of_arm(found, task, arm, part=CHOOSE, seed=TUNING_SEED)
            if not cells:
                continue
            best = chosen[arm] = best_of(found, task, arm)
            for cell in cells:
                ats = every_at([cell], levels.target(SHARE))
                at = min(ats, key=lambda each: each.log_mean)
                mark = "chosen" if cell["learning_rate"] == best.learning_rate else ""
                rate, end = f"{cell['learning_rate']:g}", f"{cell['points'][-1]['learning']:.2f}"
                rows.append([f"{task}: {arm}", rate, end, *_texts(at), at.path, mark])
        results["tuning"][task] = {"levels": asdict(levels), "chosen": {a: _plain(at) for a, at in chosen.items()}}
    if not rows:
        report.text("No cell yet.")
        return
    report.text(f"KL in nats per token where {SHARE:.0%} is learnt, on the texts that rates are chosen on; one seed.")
    report.table(["shift: arm", "rate", "NLL at the end", *PRIMARY, "path", ""], rows)


def _screen(report: Report, found: Found, results: dict[str, Any]) -> None:
    cells = [found[each.key] for each in screen(found) if each.key in found]
    if not cells:
        return
    report.heading("Screen")
    report.text("A full fine-tune whose change is projected afterwards: NLL of the task, and KL on the texts.")
    rows = []
    for cell in cells:
        ways = [{"way": "as trained", **cell["points"][-1]}]
        ways += [way for way in cell["also"]["screen"] if _kind(way["way"]) is None]
        names = list(cell["retention"])
        for way in ways:
            kl = [f"{way['retention'][name]['kl']:.4f}" for name in names]
            rows.append([f"{cell['task']}: {way['way']}", f"{way['learning']:.3f}", *kl])
    report.table(["way", "NLL", *names], rows)
    kinds = [(kind, int(m)) for kind, m in sorted({_kind(way["way"]) for way in cells[0]["also"]["screen"]} - {None})]
    table = [[kind, str(m), *(f"{index(cell, kind, m):+.3f}" for cell in cells)] for kind, m in kinds]
    report.table(["I of directions taken out afterwards", "m", *(cell["task"] for cell in cells)], table)
    results["screen"] = {row[0]: row[1:] for row in rows}


def _kind(way: str) -> tuple[str, int] | None:
    """Basis and number of directions of a way that protects a domain."""
    kind, _, rest = way.partition(" of ")
    return (kind, int(rest.split()[1])) if rest else None


def _confirmation(report: Report, found: Found, results: dict[str, Any], answer: Answer) -> None:
    report.heading("Confirmation")
    rows, results["confirmation"] = [], {}
    for task in kept_shifts(found)[:3]:
        arms = sorted({key[2] for key in found if key[:2] == (CONFIRM, task)})
        loss, curves, of_task = Levels.of(found, task).target(SHARE), {}, {}
        like = task if task in tuned_shifts(found) else tuned_shifts(found)[0]
        for arm in arms:
            cells = of_arm(found, task, arm, part=CONFIRM)
            which = best_of(found, like, arm).path
            ats = [at_target(cell, which, loss) for cell in cells]
            there = [at for at in ats if at.kl is not None]
            curves[arm] = [_curve(cell, which) for cell in cells]
            numbers = {name: _geometric([at.kl[name] for at in there]) for name in cells[0]["retention"]}
            exact = [cell["also"]["capability"]["acc_norm"] for cell in cells]
            row = {"seeds": len(cells), "reached": len(there), "kl": numbers, "capability": sum(exact) / len(exact)}
            of_task[arm] = row
            shown_kl = [NEVER if value is None else f"{value:.4f}" for value in numbers.values()]
            rows.append([f"{task}: {arm}", str(len(cells)), str(len(there)), *shown_kl, f"{row['capability']:.2f}"])
        if arms:
            results["confirmation"][task] = of_task
            _picture(
                report, f"confirmation-{_file(task)}", curves, found, task, f"{task}, five seeds that chose nothing."
            )
    if not rows:
        report.text("No cell yet.")
        return
    names = list(next(iter(of_task.values()))["kl"]) if of_task else []
    report.text(f"Geometric mean over seeds of the KL where {SHARE:.0%} is learnt, in nats per token.")
    report.table(["shift: arm", "seeds", "reached", *names, "SIQA"], rows)
    if answer.comparisons:
        report.text("Ratios of KL, protection to others, over seeds of both shifts and articles of both texts.")
        report.table(
            ["protection to", "ratio [95%]", "pairs", "p", "p (Holm)", "equivalent"],
            [_compared(name, each, answer.adjusted) for name, each in answer.comparisons.items()],
        )
        results["rivals"] = {task: rival(found, task) for task in tuned_shifts(found)}


def _afterwards(report: Report, found: Found, results: dict[str, Any]) -> None:
    compared = beside_other_rate(found)
    if compared is None:
        return
    rates = {task: learning_rate(found, task) for task in left_open(found)}
    how = ", ".join(f"{rival(found, task)} at {rate:g} on {task}" for task, rate in rates.items())
    report.heading("Afterwards")
    report.text(
        "Cells that were added when the verdict was known; they decide nothing. The rival is trained at the rate with "
        f"which it learnt most in the tuning, where its own did not reach the target with fresh seeds: {how}."
    )
    row = _compared("the rival at that rate", compared, {})
    missed = f"{compared.missed[0]} and {compared.missed[1]}"
    report.table(["protection to", "ratio [95%]", "pairs", "p", "never reached by either"], [[*row[:4], missed]])
    results["afterwards"] = asdict(compared)


def _compared(name: str, each: Comparison, adjusted: Mapping[str, float]) -> list[str]:
    holm = f"{adjusted[name]:.4f}" if name in adjusted else ""
    if each.ratio is None:
        return [name, NEVER, f"0 of {each.pairs}", "", holm, ""]
    pairs, same = f"{len(each.differences)} of {each.pairs}", "yes" if each.ratio.is_equivalent else "no"
    return [name, shown(each.ratio), pairs, f"{each.p:.4f}", holm, same]


def _picture(report: Report, name: str, curves: Mapping[str, Sequence], found: Found, task: str, caption: str) -> None:
    levels = Levels.of(found, task)
    if not curves or levels is None:
        return
    targets = {"L5": levels.demonstrated, **{f"q = {share:g}": levels.target(share) for share in SHARES}}
    picture = learning_figure(
        curves, loss="NLL of an answer, nats (more is learnt to the right)", divergence="KL, nats", targets=targets
    )
    texts = " and ".join(PRIMARY)
    report.figure(name, picture, f"{caption} KL to the base (geometric mean over {texts}) against the loss.")


def _curve(cell: Cell, which: str = BY_STEPS) -> list[tuple[float, float]]:
    """Loss, and geometric mean of KL over the primary texts, of the points after the base."""
    path = Path.of(cell, which)
    kl = {name: path.kl[name].sum(1) / path.tokens[name].sum() for name in PRIMARY}
    points = range(1, len(path.losses))
    return [(path.losses[i], _geometric([max(kl[name][i], 1e-7) for name in PRIMARY])) for i in points]


def _file(task: str) -> str:
    return task.replace(", ", "-").replace(" ", "-")


def _geometric(values: Sequence[float]) -> float | None:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def _mean(at: At) -> str:
    return NEVER if at.kl is None else f"{at.mean:.3f}"


def _how(at: At) -> str:
    return f"{at.learning_rate:g}, {at.path}"


def _texts(at: At) -> list[str]:
    return [NEVER] * len(PRIMARY) if at.kl is None else [f"{at.kl[name]:.4f}" for name in PRIMARY]


def _plain(at: At) -> dict[str, Any]:
    return asdict(at)
