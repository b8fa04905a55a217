"""fnsft experiment DIR | FILES: every recipe is an arm, trained and scored over seeds, and compared."""

import os
from typing import Any

from ..errors import FNSFTError
from ..occupied import REPORT
from ..report.figures import check_pyplot
from .endings import command
from .options.arguments import read_arguments
from .options.parse import training_options
from .options.schema import Option, by_name, row
from .options.sources import read_sources
from .output import check_writable
from .recipe_arms import find_recipes, read_arms


ABOUT = (
    "Train every recipe (a YAML file of `fnsft train`) with every seed, measure what each learns and forgets, and "
    "compare them. A folder stands for its YAML files. The file `experiment.yaml` in it holds options of this verb. "
    "If the run is killed, the same call continues it. Options of `fnsft train` apply to all arms and override their "
    "recipes."
)
# Options of `fnsft train` that an experiment has under another meaning, or sets itself.
_OWN = ("seed", "output_dir", "resume_from_checkpoint")


def options() -> list[Option]:
    """The options of the verb, and of all arms."""
    by_place = {"positional": True, "required": True, "many": True}
    own = [
        row(
            "recipes",
            "A folder of recipes, or single recipes. The name of a file is that of its arm.",
            metavar="DIR|FILE",
            **by_place,
        ),
        row("output_dir", "Where cells, models, templates and the report go.", "experiment_output", metavar="DIR"),
        row(
            "data",
            "Rows on which answers are scored: files, directories or Hub ids. By default the rows that each recipe "
            "holds out.",
            many=True,
            metavar="DATASET",
        ),
        Option(
            "seeds",
            "options",
            "int",
            many=True,
            default=[0],
            lowest=0,
            highest=2**32 - 1,
            help="Seeds of the training. Each arm is trained with each of them.",
        ),
        row(
            "jobs",
            "Number of cells to train at once, each in a process of its own. If there are several accelerators, each "
            "process gets its own.",
            1,
            lowest=1,
        ),
        row("generate", "Also let the models answer, and score the answers: BLEU, ROUGE, exact match.", False),
        row("max_new_tokens", "With generate: the longest answer in tokens.", 128, lowest=1),
        row("restart", "Discard the finished cells of arms that have changed since, and train them anew.", False),
    ]
    return [*own, *_of_arms().values()]


def _of_arms() -> dict[str, Option]:
    return {name: option for name, option in training_options().items() if name not in _OWN}


def main(argv: list[str]) -> None:
    args = read_arguments(argv, options())
    files, shared = find_recipes(args.recipes)
    if shared is not None and not any(word.partition("=")[0] == "--config" for word in argv):
        argv = [*argv, "--config", str(shared)]
        args = read_arguments(argv, options())
    output = check_writable(args.output_dir, REPORT)
    if repeated := sorted({seed for seed in args.seeds if args.seeds.count(seed) > 1}):
        raise FNSFTError(f"seeds holds {repeated[0]} twice; give each once")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise FNSFTError("an experiment starts its processes itself; run fnsft experiment alone, with jobs")
    check_pyplot()
    if "max_new_tokens" in args.given and not args.generate:
        raise FNSFTError("max_new_tokens has no effect without generate; add it, or drop max_new_tokens")
    longest = args.max_new_tokens if args.generate else None
    arms = read_arms(files, _over_all(argv), data=args.data, max_new_tokens=longest)
    if args.generate:
        from ..evaluation.generation import check_scores_of_text

        check_scores_of_text()

    from ..experiments import compare_arms, run_experiment

    print(f"{len(arms)} arms ({', '.join(arm.name for arm in arms)}), {len(args.seeds)} seeds", flush=True)
    cells = run_experiment(arms, args.seeds, output, jobs=args.jobs, restart=args.restart, say=_say)
    print(compare_arms(arms, cells, output), flush=True)
    print(f"Report: {output / 'report.html'} (also report.md, results.json)")


def interrupted(argv: list[str]) -> str:
    """How to go on with one that was interrupted."""
    return f"interrupted; what was finished is kept, go on with {command('experiment', argv)}"


def _say(text: str) -> None:
    print(f"== {text}", flush=True)


def _over_all(argv: list[str]) -> dict[str, Any]:
    """The options of `fnsft train` that were given for all arms."""
    names, found = _of_arms(), {}
    for given in read_sources(argv, by_name(options())).values():
        found |= {name: value for name, value in given.items() if name in names}
    return found
