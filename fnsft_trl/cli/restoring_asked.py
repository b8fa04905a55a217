"""What a call of `fnsft restore` asks for, checked before anything is loaded. Free of torch."""

from dataclasses import dataclass
from pathlib import Path

from ..config import FunctionalNetworkConfig
from ..errors import FNSFTError
from ..evaluation.config import RetentionConfig
from ..evaluation.settings import EvaluationConfig
from ..ranges import parse_ranges
from .options.arguments import Arguments
from .options.loading import LoadingConfig
from .output import check_writable


LEADING = (2, 8, 32, 100)
SCALES = (0.7, 0.5)

OF_TASK = ("columns", "template_format", "prompt_template", "assistant_only_loss", "max_length", "max_samples")
OF_EVALUATION = (*OF_TASK, "batch_size", "seed")
OF_NETWORKS = ("ica_template_path", "ica_template_revision", "ica_component_ids")
_MOST_LAYERS = 10_000


@dataclass(frozen=True)
class Asked:
    """What a call asks for, checked.

    Attributes:
        args ([`Arguments`]): all of it.
        settings ([`EvaluationConfig`]): how the task's rows are read and scored.
        loading ([`LoadingConfig`]): how the model is loaded.
        keep ([`RetentionConfig`]): the texts to keep.
        shares (`dict[str, float]`): of each text.
        leading (`tuple[int, ...]`), scales (`tuple[float, ...]`): the ways that are tried.
        layers (`tuple[int, ...]`, *optional*): that are restored.
        networks ([`FunctionalNetworkConfig`], *optional*): the template and its networks.
        output (`Path`): where it goes.
    """

    args: Arguments
    settings: EvaluationConfig
    loading: LoadingConfig
    keep: RetentionConfig
    shares: dict[str, float]
    leading: tuple[int, ...]
    scales: tuple[float, ...]
    layers: tuple[int, ...] | None
    networks: FunctionalNetworkConfig | None
    output: Path


def asked_for(args: Arguments) -> Asked:
    """Check what can be checked before anything is loaded.

    Raises:
        FNSFTError: something has no effect, is out of range, or would be written over.
    """
    of_task = (*OF_TASK, "dataset_split", "tolerance")
    if args.task is None and (idle := [name for name in of_task if name in args.given]):
        raise FNSFTError(f"{', '.join(idle)}: no effect without task; give it, or drop them")
    if args.task is not None and "energy" in args.given:
        raise FNSFTError("energy: no effect with task, whose loss decides; drop one of them")
    if args.choose is not None and (idle := [name for name in ("tolerance", "energy") if name in args.given]):
        raise FNSFTError(f"{idle[0]}: no effect with choose, which names the way; drop one of them")
    if args.ica_template_path is None and (idle := [name for name in OF_NETWORKS[1:] if name in args.given]):
        raise FNSFTError(f"{idle[0]}: no effect without ica_template_path; give it, or drop {idle[0]}")
    loading = LoadingConfig(**args.of(LoadingConfig))
    given = {name: vars(args)[name] for name in OF_EVALUATION if name in args.given}
    try:
        keep = RetentionConfig(retention_datasets=args.keep, retention_tokens=args.keep_tokens + args.score_tokens)
    except FNSFTError as error:
        raise FNSFTError(str(error).replace("retention_datasets", "keep")) from error
    names = list(keep.sources())
    leading, scales = tuple(args.leading or LEADING), tuple(args.scales or SCALES)
    if min(leading) < 1 or max(leading) > 1000:
        raise FNSFTError(f"leading is {' '.join(map(str, leading))}; each must be from 1 to 1000")
    if not all(0 <= scale < 1 for scale in scales):
        raise FNSFTError(f"scales is {' '.join(map(str, scales))}; each must be at least 0 and below 1")
    output = check_writable(args.output_dir)
    _check_output(output, [args.adapter, args.base, args.task, args.ica_template_path, *keep.sources().values()])
    return Asked(
        args=args,
        settings=EvaluationConfig(**given),
        loading=loading,
        keep=keep,
        shares=_shares(args.keep_shares, names),
        leading=tuple(sorted(set(leading))),
        scales=tuple(sorted(set(scales), reverse=True)),
        layers=None if args.layers is None else tuple(parse_ranges(args.layers, _MOST_LAYERS)),
        networks=None if args.ica_template_path is None else FunctionalNetworkConfig(**_given(args)),
        output=output,
    )


def _given(args: Arguments) -> dict:
    return {name: vars(args)[name] for name in OF_NETWORKS if name in args.given}


def _shares(given: list[float] | None, names: list[str]) -> dict[str, float]:
    shares = [1.0] * len(names) if given is None else given
    if len(shares) != len(names) or min(shares) <= 0:
        raise FNSFTError(
            f"keep_shares is {' '.join(map(str, shares))}; one number above 0 was expected for each of "
            f"{', '.join(names)}"
        )
    return {name: share / sum(shares) for name, share in zip(names, shares, strict=True)}


def _check_output(output: Path, sources: list[str | None]) -> None:
    """Refuse to write over what is read, or over anything else."""
    target = output.expanduser().resolve()
    for source in filter(None, sources):
        path = Path(source).expanduser().resolve()
        if target == path or target in path.parents or (path.is_dir() and path in target.parents):
            raise FNSFTError(f"output_dir is {output}, where {source} is read from; name another directory")
    if target.is_dir() and any(target.iterdir()):
        raise FNSFTError(f"output_dir is {output}, which holds files already; name a directory that is new or empty")
