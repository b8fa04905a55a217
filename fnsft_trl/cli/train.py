"""fnsft train: TRL's SFT with a FunctionalNetworkConfig. Also `python -m fnsft_trl.cli.train` under accelerate."""

import sys

from . import run_verb
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


if __name__ == "__main__":
    sys.exit(run_verb("train", sys.argv[1:]))
