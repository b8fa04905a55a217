"""ElasticWeights: elastic weight consolidation, by the diagonal of the Fisher information.

Kirkpatrick et al. (2017), "Overcoming catastrophic forgetting in neural networks", PNAS 114, equation 3: with weights
t and, of each earlier task i, the weights c_i that it ended with and its Fisher information F_i,

    L = L_task + sum over i of (w / 2) sum over j of F_ij (t_j - c_ij)^2.

A sum of such squares is one of them, which is all that is kept: F = sum F_i and c = sum F_i c_i / F, and a constant
that has no gradient. F is measured on rows as they are: the mean over rows of the squared gradient of log p(answer |
prompt), the sum over its tokens (the empirical Fisher information).
"""

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from accelerate.utils import broadcast
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from ..compat.torch import exact
from ..data.cells import UnusableRow
from ..data.sources import load_texts
from ..errors import FNSFTError
from ..evaluation.rows import EvaluationRow, RowReader, read_rows
from ..interventions.masking import masks_off
from ..writing import written_whole
from .penalty_config import PenaltyConfig
from .replay import first_rows


EWC_DIR = "ewc"  # beside the weights of a run that saves it

_FILE = "fisher.safetensors"
_NOTHING = 1e-30  # F of a weight that counts for nothing


class ElasticWeights:
    """The weights that train, each with how much it counts for earlier tasks and where it was.

    Args:
        config ([`PenaltyConfig`]): what is asked for.

    Attributes:
        fisher (`dict[str, torch.Tensor]`): name of a parameter -> F of its entries, not negative; empty before
            [`begin`], and where nothing came before.
        center (`dict[str, torch.Tensor]`): the same -> c.
        measured (`tuple` or `None`): both, with the task of this training, once [`end`] has measured it.

    Raises:
        FNSFTError: a source cannot be read, or holds no row.
    """

    def __init__(self, config: PenaltyConfig) -> None:
        self.config = config
        self.weight = config.ewc_weight
        self.fisher: dict[str, torch.Tensor] = {}
        self.center: dict[str, torch.Tensor] = {}
        self.measured: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] | None = None
        sources = config.sources()
        loaded = load_texts(list(dict.fromkeys(sources.values())))
        self._rows = {name: first_rows(loaded[source], config.ewc_rows) for name, source in sources.items()}
        self._saved = None if config.ewc_from is None else _load(Path(config.ewc_from).expanduser())

    def begin(self, trainer) -> None:
        """Measure what counts for earlier tasks, in a model before it is trained or a checkpoint is loaded.

        Args:
            trainer: with its model.

        Raises:
            FNSFTError: what was saved is of another model or adapter, or the rows of the task cannot be counted.
        """
        if self.config.ewc_save and not isinstance(trainer.task_dataset, Dataset):
            raise FNSFTError("ewc_save reads rows of the training data again, which is streamed; load it, or drop it")
        parameters = trained_parameters(trainer.model)
        if self._saved is not None:
            self._take(parameters)
        for name, rows in self._rows.items():
            read, _ = read_rows(rows, _reader(trainer), name=f"the rows {name} (ewc_datasets)")
            found = _measured(trainer, read, parameters, f"Fisher information of {name}")
            self.fisher, self.center = with_task(self.fisher, self.center, parameters, found)

    def end(self, trainer) -> None:
        """Measure what counts for the task of this training, after it, for [`save`]."""
        rows, reader, read = trainer.task_dataset, _reader(trainer), []
        for row in rows.select(range(min(self.config.ewc_rows, len(rows)))):
            with suppress(UnusableRow):
                read.append(reader.read(row))
        parameters = trained_parameters(trainer.model)
        found = _measured(trainer, read, parameters, "Fisher information of the task")
        self.measured = with_task(self.fisher, self.center, parameters, found)

    def add_gradient(self, model: nn.Module, scale: float) -> float:
        """Add w F (t - c), times a scale, to the gradients of a model; gives the penalty itself, in nats."""
        if not self.fisher or math.isinf(self.weight):
            return 0.0
        penalty = 0.0
        for name, parameter in trained_parameters(model).items():
            # In half precision, F could be 0 that is not, and c another weight.
            center, fisher = (kept[name].to(parameter.device) for kept in (self.center, self.fisher))
            moved = parameter.detach() - center
            gradient = self.weight * fisher * moved
            penalty += float((gradient * moved).sum()) / 2
            add_to_gradient(parameter, gradient, scale)
        return penalty

    def attach(self, optimizer: Optimizer, model: nn.Module) -> None:
        """With an infinite weight: put what counts back after each step."""
        if math.isinf(self.weight):
            optimizer.register_step_post_hook(lambda *_: self.put_back(model))

    @torch.no_grad()
    def put_back(self, model: nn.Module) -> None:
        """Write c where F is not zero."""
        for name, parameter in trained_parameters(model).items() if self.fisher else ():
            counts = self.fisher[name].to(parameter.device) > 0
            parameter.copy_(torch.where(counts, self.center[name].to(parameter), parameter))

    def save(self, directory: Path) -> None:
        """Write F and c, with the task of this training, beside weights, once they were measured."""
        if self.measured is None:
            return
        (directory / EWC_DIR).mkdir(parents=True, exist_ok=True)
        kinds = dict(zip(("fisher", "center"), self.measured, strict=True))
        tensors = {f"{kind}.{name}": t.cpu().contiguous() for kind, of in kinds.items() for name, t in of.items()}
        with written_whole(directory / EWC_DIR / _FILE) as scratch:
            save_file(tensors, scratch, metadata={"format": "pt"})

    def _take(self, parameters: Mapping[str, nn.Parameter]) -> None:
        fisher, center = self._saved
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        if {name: tuple(found.shape) for name, found in fisher.items()} != shapes:
            odd = next((n for n in shapes if n not in fisher), next(iter(fisher.keys() - shapes.keys()), "shapes"))
            raise FNSFTError(
                f"ewc_from is {self.config.ewc_from}, which holds the Fisher information of other weights than those "
                f"that train here ({odd} differs); go on with the same model and the same adapter"
            )
        for found in self._saved:
            _check(found, f"ewc_from is {self.config.ewc_from}: what is saved", "measure it again (ewc_save)")
        self.fisher, self.center = (
            {name: found[name].to(p.device) for name, p in parameters.items()} for found in (fisher, center)
        )


@torch.no_grad()
def with_task(
    fisher: Mapping[str, torch.Tensor],
    center: Mapping[str, torch.Tensor],
    parameters: Mapping[str, nn.Parameter],
    measured: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """F and c of some tasks and one more.

    Args:
        fisher, center: of the tasks before; empty where there are none.
        parameters: with the weights of now, which are those of the task.
        measured: F of the task, by name of a parameter.

    Returns:
        Their F and c, float32. Below 1e-30 F counts as 0, and where it is 0 the weight of now stands as c.
    """
    found: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = {}, {}
    for name, parameter in parameters.items():
        new, now = exact(measured[name]), exact(parameter.detach())
        old, before = (
            exact(kept[name]) if name in kept else zero for kept, zero in ((fisher, 0 * new), (center, now))
        )
        new, old = (torch.where(each < _NOTHING, 0, each) for each in (new, old))
        total = old + new
        # A share of the way from the old centre, so that a weight that has stayed keeps its bits.
        mean = torch.where(total > 0, before + (now - before) * (new / total.clamp(min=_NOTHING)), now)
        for kind, value in zip(found, (total, mean), strict=True):
            kind[name] = value.float().to(parameter.device)
    return found


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def add_to_gradient(parameter: nn.Parameter, gradient: torch.Tensor, scale: float) -> None:
    """Add something, times a scale, to the gradient of a parameter, which may have none yet."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad.add_(gradient.to(parameter.grad), alpha=scale)


def fisher_diagonal(
    model: nn.Module, rows: Iterable[EvaluationRow], parameters: Mapping[str, nn.Parameter]
) -> dict[str, torch.Tensor]:
    """The diagonal of the empirical Fisher information.

    Args:
        model: a causal language model, in the mode that it is to be measured in.
        rows: as they are trained.
        parameters: of the model, by name.

    Returns:
        Name -> mean over rows of the squared gradient of log p of what is learnt of a row, in nats^2 by the square of
        the weight's unit, float32.

    Raises:
        FNSFTError: an entry is NaN or infinite, as where gradients overflow.
    """
    found = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    device, count = next(iter(parameters.values())).device, 0
    for row in rows:
        ids = torch.tensor([row.ids], device=device)
        learnt = torch.tensor(row.learnt[1:], device=device)
        logs = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)  # (tokens - 1, vocabulary)
        log_p = logs.gather(-1, ids[0, 1:, None])[learnt].sum()
        gradients = torch.autograd.grad(log_p, list(parameters.values()), allow_unused=True)
        for sums, gradient in zip(found.values(), gradients, strict=True):
            if gradient is not None:
                sums += gradient.float().square()
        count += 1
    found = {name: sums / max(1, count) for name, sums in found.items()}
    _check(found, "the Fisher information", "train in float32 or bfloat16, or look at the weights")
    return found


def _check(tensors: Mapping[str, torch.Tensor], what: str, do: str) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise FNSFTError(f"{what} of {name} has NaN or infinite entries, which would hold nothing; {do}")


def _measured(trainer, rows: list[EvaluationRow], parameters: dict, title: str) -> dict[str, torch.Tensor]:
    """The same in a trainer's model, which is left in its mode; without forward masks, and the same in all processes,
    whose weights would part by the rounding of their own measurements."""
    model, show = trainer.model, trainer.is_world_process_zero() and not trainer.args.disable_tqdm
    was_training = model.training
    model.eval()
    try:
        with masks_off(model), trainer.compute_loss_context_manager():
            found = fisher_diagonal(model, tqdm(rows, title, leave=False, disable=not show), parameters)
        return broadcast(found)
    finally:
        model.train(was_training)


def _reader(trainer) -> RowReader:
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    args = trainer.args
    return RowReader(
        tokenizer,
        assistant_only_loss=getattr(args, "assistant_only_loss", False),
        max_length=getattr(args, "max_length", None),
    )


def _load(directory: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """F and c that a run has saved."""
    path = directory / EWC_DIR / _FILE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise FNSFTError(
            f"ewc_from is {directory}, and {path} cannot be read ({' '.join(str(error).split())}); name the output "
            "directory of a run with ewc_save"
        ) from error
    kinds = ("fisher.", "center.")
    return tuple({name.removeprefix(k): t for name, t in tensors.items() if name.startswith(k)} for k in kinds)
