"""verify_export: what was written is loaded in a fresh process, and computes what was trained."""

import json
import os
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ..errors import FNSFTError
from ..evaluation.reload import last_logits
from ..interventions.masking import amplify, lesion
from ..neurons.mask import NeuronMask
from ..neurons.sites import find_neuron_sites
from ..tuner import NeuronTunerConfig
from .adapter import delta_mask
from .whole import WholeSource


# What the source and the export are given: a few tokens each, since a large model may compute them on a CPU.
PROMPTS = (
    "The capital of France is",
    "def mean(values):\n    return sum(values) /",
    "Question: How many legs do two spiders have?\nAnswer:",
    "Es war einmal ein König, der hatte drei",
    "1, 1, 2, 3, 5, 8, 13,",
)
# Precision of what was written -> the largest difference of two logits that counts as none, as a share of the largest
# logit. Those of GGUF files are `outtype`s; `auto` is a 16-bit float.
TOLERANCES = {
    **{"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2},
    **{"f32": 1e-4, "f16": 1e-2, "bf16": 5e-2, "auto": 5e-2, "q8_0": 1e-1},
}
_SOURCE = ("trust_remote_code", "revision")  # arguments that say which model it is


@dataclass(frozen=True)
class Verification:
    """What a fresh process found in an export.

    Attributes:
        difference (`float`): the largest difference of two logits, as a share of the largest logit.
        tolerance (`float`): up to which it counts as none.
        base (`str`): the model that the weights were compared with: the base of an adapter, or the source itself.
        changed (`NeuronMask` or `None`): the neurons any of whose weights differ from it; of a smaller model those
            that are gone, too. `None` for GGUF files, whose weights are rounded.
        others (`int`): how many parameters differ in entries that belong to no neuron, attention for instance.
    """

    difference: float
    tolerance: float
    base: str
    changed: NeuronMask | None
    others: int

    def __str__(self) -> str:
        told = (
            f"logits of {len(PROMPTS)} prompts differ by {self.difference:.1e} of the largest one (tolerance "
            f"{self.tolerance:g})"
        )
        if self.changed is None:
            return told
        other = f", and {self.others} parameters in entries of no neuron" if self.others else ""
        return f"{told}; {self.changed.count} neurons differ from {self.base}{other}"


def verify_export(
    source_dir: str | os.PathLike,
    written: str | os.PathLike,
    form: str,
    *,
    silenced: NeuronMask | None = None,
    factor: float = 0.0,
    outtype: str = "auto",
    **loading: Any,
) -> Verification:
    """Load an export in a fresh process and compare it with its source.

    Three things are checked on [`PROMPTS`]. The logits after the last token are those of the source, under the mask
    that was baked. The tokenizer makes the same tokens. And no neuron differs from the base model but those that the
    source may have changed: the adapter's (of neuron deltas), the trainable ones (of a run with networks), and those
    of the mask.

    Args:
        source_dir: the adapter or the model that was exported.
        written: the directory, or the GGUF file.
        form: `merged`, `baked`, `lora`, `smaller` or `gguf`.
        silenced: the neurons of the mask that was baked, or that were removed.
        factor: what the mask multiplies their activations by.
        outtype: precision of a GGUF file.
        loading: as in the export.

    Raises:
        FNSFTError: the export does not load, or is not what was exported; with what differs.
    """
    check_verifiable(form, outtype)
    source = WholeSource.read(source_dir)
    model = source.load(**loading).eval()
    prompts = _prompts(source, loading)
    with _masked(model, silenced, factor):
        logits = [last_logits(model, ids) for ids in prompts]
    expected = _expected(source, model, silenced)
    site = expected.site if silenced is None else silenced.site
    widths = {each.layer: each.width for each in find_neuron_sites(model, kind=site)}
    settings = {
        "form": form,
        "place": str(written),
        "source": str(source.directory),
        "site": site,
        "loading": {"trust_remote_code": False, **{key: loading[key] for key in _SOURCE if key in loading}},
        "texts": PROMPTS if form != "lora" or source.adapter.has_tokenizer else (),
        "prompts": len(prompts),
    }
    tolerance = TOLERANCES[outtype if form == "gguf" else str(model.dtype).removeprefix("torch.")]
    del model
    told = _run(settings, prompts, logits)
    changed = None if told["neurons"] is None else NeuronMask.from_ranges(told["neurons"], widths, site)
    found = Verification(
        told["difference"] / max(told["largest"], 1e-12), tolerance, source.base, changed, len(told["others"])
    )
    wrong = _wrong(found, told, expected)
    if wrong is not None:
        raise FNSFTError(f"{written} is not what was exported from {source_dir}: {wrong}; export it again")
    return found


def _masked(model: nn.Module, neurons: NeuronMask | None, factor: float) -> AbstractContextManager:
    """The model as it computes under the mask that was baked."""
    if neurons is None:
        return nullcontext()
    return amplify(model, neurons, factor) if factor else lesion(model, neurons)


def check_verifiable(form: str, outtype: str = "auto") -> None:
    """Check, before anything is exported, that an export can be verified.

    Raises:
        FNSFTError: a GGUF file of three-valued weights, whose logits are others than those of the model.
    """
    if form == "gguf" and outtype not in TOLERANCES:
        raise FNSFTError(
            f"outtype={outtype} rounds weights to three values, so its logits are not the model's; verify one of: "
            "f32, f16, bf16, q8_0"
        )


def _prompts(source: WholeSource, loading: dict[str, Any]) -> list[torch.Tensor]:
    """The token ids of every prompt, shape (1, positions)."""
    processor = source.load_processor(**{key: value for key, value in loading.items() if key != "dtype"})
    tokenizer = getattr(processor, "tokenizer", processor)
    return [torch.tensor([tokenizer(text)["input_ids"]]) for text in PROMPTS]


def _expected(source: WholeSource, model: nn.Module, silenced: NeuronMask | None) -> NeuronMask:
    """The neurons that may differ from the base: all of them where nothing says which were trained."""
    record = source.record
    site = "mlp_intermediate" if record is None else record["network_config"]["ica_site"]
    if source.adapter is not None and isinstance(source.adapter.config, NeuronTunerConfig):
        site = source.adapter.config.site
    sites = find_neuron_sites(model, kind=site)
    everyone = NeuronMask({each.layer: torch.ones(each.width, dtype=torch.bool) for each in sites}, site)
    if source.adapter is None:  # compared with itself
        expected = ~everyone
    elif isinstance(source.adapter.config, NeuronTunerConfig):
        expected = delta_mask(source.adapter.config, sites)
    else:
        expected = everyone
        if record is not None:
            widths = {each.layer: each.width for each in sites}
            selected = NeuronMask.from_ranges(record["neurons"], widths, site)
            trained = [each for each in (selected, ~selected) if each.sha256 == record["trainable"]["sha256"]]
            expected = trained[0] if trained else everyone
    if silenced is None or silenced.site == site:
        return expected if silenced is None else expected | silenced.over({each.layer: each.width for each in sites})
    others = find_neuron_sites(model, kind=silenced.site)  # of another site: every neuron may have a zero now
    return NeuronMask({each.layer: torch.ones(each.width, dtype=torch.bool) for each in others}, silenced.site)


def _run(settings: dict[str, Any], prompts: list[torch.Tensor], logits: list[torch.Tensor]) -> dict[str, Any]:
    """What a fresh process finds; see [`~fnsft_trl.export.reloaded.found`]."""
    tensors = {f"ids.{number}": ids for number, ids in enumerate(prompts)}
    tensors |= {f"logits.{number}": values for number, values in enumerate(logits)}
    with tempfile.TemporaryDirectory(prefix="fnsft-verify-") as folder:
        file = Path(folder) / "expected.safetensors"
        save_file(tensors, file, metadata={"settings": json.dumps(settings)})
        command = [sys.executable, "-m", "fnsft_trl.export.reloaded", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise FNSFTError(f"{settings['place']} does not load in a fresh process: {said}; export it again")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _wrong(found: Verification, told: dict[str, Any], expected: NeuronMask) -> str | None:
    """What differs that should not, in words."""
    if told["tokens"]:
        return f"its tokenizer makes other tokens of {PROMPTS[told['tokens'][0]]!r}"
    if not found.difference <= found.tolerance:  # NaN is no number up to it
        return (
            f"its logits differ by {found.difference:.1e} of the largest one, and up to {found.tolerance:g} counts as "
            "rounding"
        )
    if found.changed is None:
        return None
    for layer, members in found.changed.layers.items():
        extra = (members & ~expected.layers[layer]).nonzero().flatten()
        if len(extra):
            neuron = f"neuron {int(extra[0])} of layer {layer}"
            return f"{neuron} differs from {found.base}, and was neither trained nor masked"
    if told["own"] and told["others"]:
        return f"{told['others'][0]} differs from {found.base}"
    return None
