"""fnsft restore ADAPTER --keep NAME=TEXT...: take a fine-tune back where it touches text that is to be kept."""

from dataclasses import replace

from ..config import FunctionalNetworkConfig
from ..evaluation.settings import EvaluationConfig
from .options.arguments import read_arguments
from .options.loading import loading_options
from .options.schema import Option, describe, row
from .restoring_asked import OF_EVALUATION, OF_NETWORKS, asked_for


ABOUT = (
    "Take a fine-tune back where it touches text that is to be kept, without training: its change is projected off "
    "the directions of these texts, or scaled; every way is scored, and the chosen one written as the same kind of "
    "artefact. For any PEFT LoRA, for neuron deltas, and for a fine-tuned model beside its base."
)


def options() -> list[Option]:
    """The options of the verb."""
    adapter = "Directory or Hub id of a LoRA or of neuron deltas; or a fine-tuned model, with base."
    keep = "Texts to keep: NAME=SOURCE, a file, directory or Hub id, or `embedded` (English Wikipedia)."
    shares = "How much each text counts, in their order; all alike by default."
    choose = "The way to write, by its name in the table, instead of the one that the rule chooses."
    energy = "Without task: as many directions are taken out as hold this share of the texts' energy."
    found = {option.name: option for option in describe(EvaluationConfig)}
    of_networks = {option.name: option for option in describe(FunctionalNetworkConfig)}
    return [
        row("adapter", adapter, positional=True, required=True, aliases=("model",), metavar="ADAPTER"),
        row("keep", keep, many=True, required=True, metavar="NAME=TEXT"),
        row("keep_shares", shares, many=True, kind="float", metavar="SHARE"),
        row("task", "Held-out rows of what was trained, by whose loss is judged what is lost.", metavar="FILE"),
        row("dataset_split", "Split of the task; by default that for tests or evaluations, or the only one."),
        row("output_dir", "Where the restored one and the report go.", "restored", metavar="DIR"),
        row("base", "The base of a fine-tuned model, or another place of that of an adapter.", metavar="MODEL"),
        row("tolerance", "Share of the task's gain that may be lost.", 0.05, kind="float", lowest=0, highest=1),
        row("energy", energy, 0.3, lowest=0, highest=1),
        row("choose", choose, metavar="WAY"),
        row("leading", "Numbers of leading directions that are tried: 2 8 32 100 by default.", many=True, kind="int"),
        row("scales", "Factors on the change that are tried: 0.7 0.5 by default.", many=True, kind="float"),
        row("layers", "Layers to restore, such as 0-9,20; in all others the change stays."),
        row("keep_tokens", "Tokens of each text that its directions are found from.", 4096, lowest=16),
        row("score_tokens", "Tokens of each text, others than these, that ways are scored on.", 2048, lowest=16),
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
