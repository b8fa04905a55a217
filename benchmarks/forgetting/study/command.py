"""The command of the study."""

import argparse
import os
import sys
import time
from pathlib import Path

from fnsft_trl.errors import FNSFTError


HOME = Path(__file__).parents[1]
ABOUT = """\
The study of forgetting (PLAN.md): its cells, its report, its pictures and its verdict.

    python benchmarks/forgetting                       go on with all cells that are missing, then write the report
    python benchmarks/forgetting --stages gate         go on with those of a stage
    python benchmarks/forgetting --report_only         write the report of the cells that are there
"""


def main(argv: list[str] | None = None) -> int:
    """Run the study, or what of it is asked for."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/forgetting", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    from .plan import STAGES

    add = parser.add_argument
    add("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="what is run, in this order")
    add("--cells", type=Path, default=HOME / "cells.jsonl", help="the file of the cells")
    add("--output_dir", type=Path, default=HOME / "results", help="where the report goes")
    add("--work_dir", type=Path, default=Path("forgetting_work"), help="for what a cell needs meanwhile")
    add("--pause_file", type=Path, help="the study waits while this file exists")
    add("--device", default="cpu", help="where cells are trained: cpu, or the type of an accelerator, such as cuda")
    add("--report_only", action="store_true", help="train nothing")
    args = parser.parse_args(argv)
    try:
        if not args.report_only:
            _run(args)
        _report(args)
        return 0
    except FNSFTError as error:
        print(f"forgetting: {error}", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace) -> None:
    """One thread, behind everything else on the machine.

    Raises:
        FNSFTError: there is no such device.
    """
    os.nice(19)
    import torch

    torch.set_num_threads(1)
    devices = ["cpu"]
    if torch.accelerator.is_available():
        devices.append(torch.accelerator.current_accelerator().type)
    if args.device not in devices:
        raise FNSFTError(f"there is no device {args.device!r} on this machine; there is: {', '.join(devices)}")
    from .afterwards import EVERY
    from .pausing import Pause
    from .running import Study

    study = Study(args.cells, args.work_dir, Pause(args.pause_file, say=_say), _say, device=args.device)
    for stage in args.stages:
        study.run(EVERY[stage])


def _report(args: argparse.Namespace) -> None:
    from fnsft_trl.experiments.cells import Cells

    from .arms import KEY
    from .reporting import write_report

    results = write_report(Cells(args.cells, by=KEY).found, args.output_dir)
    for question in ("Q1", "Q2"):
        print(f"{question}: {results[question]['text']}")
    print(f"Report of {results['cells']} cells: {args.output_dir / 'report.html'} (also report.md, results.json)")


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
