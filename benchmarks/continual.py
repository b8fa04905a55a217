"""The committed run of `fnsft continual recipes/continual/embedded.yaml`, as the tables and the picture of its page.

The cells are in `results/continual/`; a run of one's own is shown with `--run DIR`.

    python benchmarks/continual.py --picture docs/images/continual.png
"""

import argparse
from pathlib import Path
from statistics import fmean

from fnsft_trl.cli.plans import PlanFile
from fnsft_trl.continual.outcome import Outcome, outcomes
from fnsft_trl.continual.reporting import transfer_table
from fnsft_trl.continual.study import BASE, BASE_FILE
from fnsft_trl.experiments.cells import Cells
from fnsft_trl.experiments.runner import CELLS_FILE
from fnsft_trl.report.figures import stages_figure


PLAN = Path(__file__).parents[1] / "recipes" / "continual" / "embedded.yaml"
RUN = Path(__file__).parent / "results" / "continual"
TEXT = "wiki"  # the general text of the plan


def read(run: Path = RUN) -> list[Outcome]:
    """What a run of the plan gave, order by order."""
    file = PlanFile.read(str(PLAN), {})
    base, cells = Cells(run / BASE_FILE).found[BASE, 0], list(Cells(run / CELLS_FILE).found.values())
    return outcomes(file.plan, base, cells, file.seeds)


def markdown(found: list[Outcome]) -> str:
    """A table of each order."""
    parts = []
    for order in dict.fromkeys(each.order for each in found):
        of_order = [each for each in found if each.order == order]
        header, rows = transfer_table(of_order)
        parts.append(f"{', then '.join(of_order[0].tasks)}:")
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *([f"`{row[0]}`", *row[1:]] for row in rows)]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts)


def picture(found: list[Outcome]) -> bytes:
    """What general text has lost from stage to stage, the mean over orders and seeds."""
    curves = {}
    for arm in dict.fromkeys(each.arm for each in found):
        rises = [each.retention[TEXT] for each in found if each.arm == arm]
        curves[arm] = [0.0, *map(fmean, zip(*(of_seed for seeds in rises for of_seed in seeds), strict=True))]
    return stages_figure(curves, measure="rise on Wikipedia, nats per token")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=RUN, help="the output directory of a run of the plan")
    parser.add_argument("--picture", type=Path, help="where the picture goes")
    options = parser.parse_args()
    found = read(options.run)
    if options.picture is not None:
        options.picture.write_bytes(picture(found))
    print(markdown(found))


if __name__ == "__main__":
    main()
