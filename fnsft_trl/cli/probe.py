"""fnsft probe MODEL TEMPLATE --data FILE: which networks matter, beside controls that could prove it chance."""

from dataclasses import replace
from pathlib import Path

from ..errors import FNSFTError
from ..evaluation.settings import EvaluationConfig
from ..occupied import REPORT
from ..probes.config import ProbeConfig
from .endings import command
from .evaluate import check_output, named
from .options.arguments import Arguments, read_arguments
from .options.loading import LoadingConfig, loading_options
from .options.schema import Option, describe, row
from .output import check_writable


ABOUT = (
    "Silence and scale the networks of a template, one by one and together, and score what is left of the model. "
    "Random masks, masks of the same amplitude and other controls stand beside them, and each network gets a "
    "verdict."
)

# Fields of EvaluationConfig that say how rows are read.
_READING = ("columns", "template_format", "prompt_template", "max_samples", "choice_prompt", "apply_chat_template")
ATLAS_FILE = "atlas.html"
_ONE_MASK = ("union", "dose", "preserve", "kept", "prune", "cut")  # curves of which a point is one mask of networks
_FILES = ("results.json", "report.md", "report.html", "conditions.jsonl")


def options() -> list[Option]:
    """The options of the verb."""
    data = (
        "What to score on, as DATASET or NAME=DATASET: a Hub id, directory or file. It may hold text, prompts and "
        "completions, conversations, or multiple-choice questions."
    )
    where = "Directory or Hub id of a template of this model."
    reading = {option.name: option for option in describe(EvaluationConfig)}
    by_place = {"positional": True, "required": True}
    return [
        row("model", "Directory or Hub id of a model, or `embedded`.", metavar="MODEL", **by_place),
        row("template", where, metavar="TEMPLATE", **by_place),
        row("template_revision", "Branch, tag or commit of the template on the Hub."),
        row("data", data, many=True, required=True, metavar="DATASET"),
        row("dataset_split", "Split of the data. By default the one for tests or evaluations, or the only one."),
        row(
            "domains",
            "For a double dissociation: NAME=TEMPLATE for each dataset NAME, the template of its own networks. "
            "`discover` saves such templates in `datasets/`. Their networks are probed instead of those of TEMPLATE.",
            many=True,
            metavar="NAME=TEMPLATE",
        ),
        row(
            "surrogate",
            "A control: the template of networks of activations shifted in time (`discover --ica_surrogate`). By "
            "default they are found on the data.",
            metavar="TEMPLATE",
        ),
        row("output_dir", "Where the report and finished parts go.", "probe", metavar="DIR"),
        *describe(ProbeConfig),
        *(replace(reading[name], group="how rows are read") for name in _READING),
        *loading_options(),
    ]


def main(argv: list[str]) -> None:
    args = read_arguments(argv, options())
    config = ProbeConfig(**args.of(ProbeConfig))
    reading = EvaluationConfig(**{name: vars(args)[name] for name in _READING})
    loading = LoadingConfig(**args.of(LoadingConfig))
    if loading.is_quantized:
        raise FNSFTError("a probe reads the norms of weights, which quantised ones have not; load the model in full")
    data = named(args.data, "data")
    domains = named(args.domains, "domains") if args.domains else None
    output = check_writable(args.output_dir, REPORT, {"the model": args.model, "the template": args.template})
    check_output(output, list(data.values()), _FILES)
    _run(args, config, reading, loading, data, domains, output)


def _run(
    args: Arguments,
    config: ProbeConfig,
    reading: EvaluationConfig,
    loading: LoadingConfig,
    data: dict[str, str],
    domains: dict[str, str] | None,
    output: Path,
) -> None:
    import torch
    from accelerate import PartialState

    from ..compat.accelerate import parse_flag_from_env
    from ..evaluation.share import Share
    from ..probes.data import ProbeData
    from ..probes.probe import probe_networks
    from ..probes.report import save_probe
    from ..template import FunctionalNetworkTemplate
    from .logs import hush_repetitions
    from .models import check_loading, load_model_and_tokenizer

    # Without the flag, processes on a machine without an accelerator would not know of each other.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    hush_repetitions(state.process_index)
    check_loading(loading, state.device.type, processes=state.num_processes)
    parts = [_part(name, source, args.dataset_split, reading) for name, source in data.items()]
    load = FunctionalNetworkTemplate.from_pretrained
    template = load(args.template, revision=args.template_revision)
    others = None if domains is None else {name: load(place) for name, place in domains.items()}
    surrogate = None if args.surrogate is None else load(args.surrogate)
    for each in [template] if others is None else others.values():
        config.chosen(len(each.components))
    model, tokenizer = load_model_and_tokenizer(args.model, loading, device=state.device)
    lengths = {"max_tokens": config.max_tokens, "max_length": config.max_length, "prompts": config.prompts}
    read = [ProbeData.read(part, tokenizer, reading, **lengths) for part in parts]
    probe = probe_networks(
        model,
        tokenizer,
        template,
        read,
        config,
        output_dir=output,
        domains=others,
        surrogate=surrogate,
        share=Share.of_launch(),
    )
    state.wait_for_everyone()
    state.destroy_process_group()  # a process that ends in a group it has not left can abort
    if state.is_main_process:
        about = {"model": args.model, "template": args.template, "sources": data}
        save_probe(probe, output, about=about)
        _save_atlas(args, config, model, tokenizer, template, read, output)
        _show(probe)
        print(f"Report: {output / 'report.html'} (also report.md, results.json, conditions.jsonl)")
        print(f"Atlas of the networks: {output / ATLAS_FILE}")


def _part(name: str, source: str, split: str | None, reading: EvaluationConfig):
    """Rows to score on; of the embedded text, the articles that no discovery reads."""
    from ..data.embedded import EMBEDDED, wikipedia_passages
    from ..evaluation.evaluation import EvaluationData
    from .evaluation_run import read_data

    if source == EMBEDDED and split is None:
        return EvaluationData(name, [{"text": passage} for passage in wikipedia_passages("retention")])
    return read_data(name, source, split, reading)


def _save_atlas(args: Arguments, config: ProbeConfig, model, tokenizer, template, data, output: Path) -> None:
    """Write the page of the networks, with examples of the data."""
    from ..probes.atlas import ProbeResults, atlas_html
    from ..probes.examples import find_examples
    from ..template.stored import StoredTemplate
    from ..writing import write_text_whole

    stored = StoredTemplate.open(args.template, revision=args.template_revision)
    examples = None
    if config.examples and template.mean:
        texts = {part.name: [{"input_ids": item.ids} for item in part.items] for part in data}
        examples = find_examples(
            model,
            tokenizer,
            template,
            texts,
            count=config.examples,
            max_tokens=config.max_tokens * len(data),
            tensors_sha256=stored.description.tensors_sha256,
        )
        examples.save(output)
    page = atlas_html(stored.description, stored.loadings(), examples=examples, probe=ProbeResults.read(output))
    write_text_whole(output / ATLAS_FILE, page)


def _show(probe) -> None:
    found = probe.found
    for name in found.data:
        print(f"{name}: {found.data[name].tokens} tokens; a lesion of all neurons: {found.full(name):+.3f} nats")
        for verdict in found.verdicts(name):
            print(
                f"  network {verdict.network}: {verdict.effect.value:+.3f} nats [{verdict.effect.low:+.3f}, "
                f"{verdict.effect.high:+.3f}]: {verdict.words}"
            )
        for curve in _ONE_MASK:
            for condition in found.of(curve, selector="networks")[-1:]:
                drawn = found.of(curve, selector="random", point=condition.point)
                random = sum(found.effect(name, each.key) for each in drawn) / len(drawn)
                print(
                    f"  {curve} at {condition.point:g}: {found.effect(name, condition.key):+.3f} nats; random "
                    f"neurons {random:+.3f}"
                )


def interrupted(argv: list[str]) -> str:
    """What is saved of a probe that was interrupted, and how to go on."""
    output = Path(read_arguments(argv, options()).output_dir).expanduser()
    if not any(output.glob("passes-*.jsonl")):
        return "interrupted; nothing was saved yet"
    return f"interrupted; what is finished is saved, go on with {command('probe', argv)}"
