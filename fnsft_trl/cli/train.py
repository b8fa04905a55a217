"""fnsft train: TRL's SFT with a FunctionalNetworkConfig. Also `python -m fnsft_trl.cli.train` under accelerate."""

import sys
from pathlib import Path

from . import run_verb
from .endings import command
from .options.parse import parse_options, training_options
from .options.schema import Option


ABOUT = (
    "Supervised fine-tuning with functional networks. It needs a model (model_name_or_path) and a dataset "
    "(dataset_name, or datasets for a mixture). The original project's names work too; docs/migration.md lists them."
)


def options() -> list[Option]:
    """The options of the verb, ours first."""
    return list(training_options().values())


def main(argv: list[str]) -> None:
    asked = parse_options(argv)

    from .fine_tuning import fine_tune

    fine_tune(asked)


def interrupted(argv: list[str]) -> str:
    """What is saved of a run that was interrupted, and how to go on."""
    asked = parse_options(argv)

    from ..training.checkpoints import newest_complete

    newest = newest_complete(Path(asked.values["output_dir"]), has_mark=asked.network_config is not None)
    if newest is None:
        return "interrupted; no checkpoint was complete yet (save_steps says how often there is one)"
    return f"interrupted; {newest} is saved, go on with {command('train', argv, '--resume_from_checkpoint', 'true')}"


if __name__ == "__main__":
    sys.exit(run_verb("train", sys.argv[1:]))
