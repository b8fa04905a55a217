"""fnsft restore ADAPTER --keep NAME=TEXT...: mend a fine-tune that forgot, without training."""

from dataclasses import replace

from ..config import FunctionalNetworkConfig
from ..evaluation.settings import EvaluationConfig
from .options.arguments import read_arguments
from .options.loading import loading_options
from .options.schema import Option, describe, row
from .restoring_asked import OF_EVALUATION, OF_NETWORKS, asked_for


ABOUT = (
    "Mend a fine-tune that forgot, without training. Its change is projected off the directions of the texts to "
    "keep, or scaled down. Every way is scored, and the chosen one is written as the same kind of artefact. It takes "
    "any PEFT LoRA, neuron deltas, or a fine-tuned model beside its base."
)


def options() -> list[Option]:
    """The options of the verb."""
    adapter = "Directory or Hub id of a LoRA, of neuron deltas, or (with base) of a fine-tuned model."
    keep = "Texts to keep, each as NAME=SOURCE: a file, directory or Hub id, or `embedded` (English Wikipedia)."
    shares = "Weight of each text, in their order. By default all weigh the same."
    choose = "Way to write, by its name in the table. By default the one that the rule chooses."
    energy = "Without task: remove as many directions as hold this share of the texts' energy."
    found = {option.name: option for option in describe(EvaluationConfig)}
    of_networks = {option.name: option for option in describe(FunctionalNetworkConfig)}
    return [
        row("adapter", adapter, positional=True, required=True, aliases=("model",), metavar="ADAPTER"),
        row("keep", keep, many=True, required=True, metavar="NAME=TEXT"),
        row("keep_shares", shares, many=True, kind="float", metavar="SHARE"),
        row(
            "task",
            "Held-out rows of the task that was trained. Their loss tells what a restoration costs.",
            metavar="FILE",
        ),
        row("dataset_split", "Split of the task. By default the one for tests or evaluations, or the only one."),
        row("output_dir", "Where the restored artefact and the report go.", "restored", metavar="DIR"),
        row("base", "Base of a fine-tuned model, or another location of an adapter's base.", metavar="MODEL"),
        row("tolerance", "Share of the gain on the task that may be lost.", 0.05, kind="float", lowest=0, highest=1),
        row("energy", energy, 0.3, lowest=0, highest=1),
        row("choose", choose, metavar="WAY"),
        row("leading", "Numbers of leading directions to try. By default 2 8 32 100.", many=True, kind="int"),
        row("scales", "Factors on the change to try. By default 0.7 0.5.", many=True, kind="float"),
        row("layers", "Layers to restore, such as 0-9,20. In all others the change stays."),
        row("keep_tokens", "Number of tokens of each text from which its directions are found.", 4096, lowest=16),
        row("score_tokens", "Number of further tokens of each text on which the ways are scored.", 2048, lowest=16),
        *(replace(found[name], group="options") for name in OF_EVALUATION),
        *(replace(of_networks[name], group="networks") for name in OF_NETWORKS),
        *loading_options(),
    ]


def main(argv: list[str]) -> None:
    args = read_arguments(argv, options())
    asked = asked_for(args)

    from ..report.figures import check_pyplot

    check_pyplot()
    from .restoring_run import restore

    restore(asked)
