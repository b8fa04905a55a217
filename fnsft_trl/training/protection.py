"""Protection: what a ProtectionConfig does in one run, of any trainer, with networks and without."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import PeftModel
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from ..constraints import check_optimizer_name, plain_optimizer
from ..constraints.protection import ProtectedWeights, protect_weights
from ..constraints.trained_maps import TrainedMap, check_adapter, trained_maps
from ..discovery.directions import KeptDirections, KeptText
from ..discovery.inputs import reached_linears
from ..discovery.module_directions import template_basis
from ..discovery.saved_directions import (
    PROTECTION_DIR,
    bits,
    find_directions,
    load_directions,
    save_directions,
)
from ..errors import FNSFTError
from ..hub.card import plain, with_section
from ..hub.names import model_name
from ..neurons.mask import NeuronMask
from ..neurons.sites import base_model
from ..template.storage import CARD_FILE
from ..template.template import FunctionalNetworkTemplate
from ..writing import write_text_whole
from .preparation import keep_4bit_layers_differentiable
from .protected_bases import KeptTexts, ProtectedBases, as_json, find_bases, held, texts_sha256
from .protection_config import ENERGY_TOKENS, EVIDENCE, ProtectionConfig
from .retention_texts import task_prompts


logger = logging.get_logger(__name__)

PROTECTION_SECTION = "## Protected directions"


class Protection:
    """
    One run's protection. Its methods are called in their order.

    Args:
        config ([`ProtectionConfig`]): what is asked for.
        given (`dict`): the arguments of the trainer by name.

    Attributes:
        weights ([`ProtectedWeights`]): what is protected.
        bases ([`ProtectedBases`]): in which directions.
        task_energy (`float` or `None`): the share of the task's energy that they hold.
        untrained (`list[str]`): parameters that do not train because they have no directions.

    Raises:
        FNSFTError: config, adapter and optimizer do not go together, or a text cannot be read.
    """

    weights: ProtectedWeights
    bases: ProtectedBases
    task_energy: float | None = None

    def __init__(self, config: ProtectionConfig, given: dict[str, Any]) -> None:
        self.config = config
        model = given.get("model")
        if model is None:
            raise FNSFTError("protect needs the model itself, and no model_init, which makes others later; give model")
        check_adapter(given.get("peft_config"))
        for adapter in model.peft_config.values() if isinstance(model, PeftModel) else ():
            check_adapter(adapter)
        args = given.get("args")
        if (optimizer := getattr(args, "optim", None)) is not None:
            check_optimizer_name(OptimizerNames(optimizer).value)
        self.template, self.stored, self._found_on = _stored(config)
        self.texts = KeptTexts(config)
        self.untrained: list[str] = []
        self._optimizer: Optimizer | None = None
        self._maps: list[TrainedMap] = []
        self._sha256: dict[str, str] = {}
        self._base = 0  # checksum of the weights that train themselves, before training

    @classmethod
    def of(cls, config: ProtectionConfig | None, given: dict[str, Any]) -> Protection | None:
        """That of a config; `None` where nothing is protected."""
        return cls(config, given) if config is not None and config.is_on else None

    def hold(self, trainer: Trainer, trainable: NeuronMask | None, template: FunctionalNetworkTemplate | None) -> None:
        """Find the directions, and protect what trains in the model that the trainer has wrapped.

        Args:
            trainer: when it is made.
            trainable: of a run held to neurons, those that may change.
            template: its networks.

        Raises:
            FNSFTError: the run trains what has no directions.
        """
        model, config = trainer.model, self.config
        stored, name = self.stored, model_name(base_model(model))
        if self._found_on not in (None, "", name):
            logger.warning(
                f"the directions of protect_basis were found on {self._found_on}, and this model is called "
                f"{name or 'by no name'}: the shapes agree, but other weights have other directions"
            )
        if self.template is not None:
            self.template.check_model(model)
            template, stored = self.template, template_basis(self.template, model)
        if config.protect == "networks" and template is None:
            raise FNSFTError(
                "protect=networks needs a template: give protect_basis, or train with networks (ica_template_path)"
            )
        keep_4bit_layers_differentiable(model)
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        if self.texts.rows and tokenizer is None:
            raise FNSFTError("protect_datasets are texts, and the trainer has no processing_class to read them by")
        texts = self.texts.tokenized(tokenizer)
        self._sha256 = texts_sha256(texts)
        title = "directions to protect" if trainer.is_world_process_zero() else None
        self._maps, self.untrained = trained_maps(model, trainable, reached_linears(model, [1, 2, 3, 4]))
        with _adapters_off(model):
            modules = list(dict.fromkeys(each.module for each in self._maps))
            self.bases = _agreed(
                trainer,
                lambda: find_bases(config, model, modules, texts, stored=stored, template=template, title=title),
            )
            if (task := _task(trainer, tokenizer)) is not None:
                self.task_energy = held(self.bases.kept, model, task, title and "energy of the task")
        self._base = sum(bits(each.parameter) for each in self._maps if each.holds_base) % 2**63
        self._leave_untrained(model)
        self._protect()
        if trainer.is_world_process_zero():
            if config.forgetting is not None:
                logger.warning(f"forgetting={config.forgetting}: {config.chosen()}. {EVIDENCE}")
            logger.warning(f"protected: {self.in_words()}")

    def _leave_untrained(self, model: nn.Module) -> None:
        """Freeze the parameters that have no directions."""
        parameters = dict(base_model(model).named_parameters())
        for name in self.untrained:
            parameters[name].requires_grad_(False)
        if self.untrained:
            # Reentrant checkpointing gives no gradients at all when its inputs require none.
            base_model(model).enable_input_require_grads()

    def _protect(self) -> None:
        bases = {name: each.basis for each in self.bases.kept.inputs for name in each.modules}
        self.weights = protect_weights(self._maps, bases, strength=self.config.protect_strength)

    def attach(self, optimizer: Optimizer) -> None:
        """Have every step of an optimizer followed by the projection; once, however often it is called. What puts
        frozen values back is to be attached after this.

        Raises:
            FNSFTError: it steps other tensors than those that are protected.
        """
        optimizer = plain_optimizer(optimizer)
        if optimizer is not self._optimizer:
            self._check_steps(optimizer)
            # Not those of `weights`, which a resumed run replaces.
            optimizer.register_step_pre_hook(lambda *_: self.weights.before_step())
            optimizer.register_step_post_hook(lambda *_: self.weights.after_step())
            self._optimizer = optimizer

    def _check_steps(self, optimizer: Optimizer) -> None:
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for each in self._maps:
            if each.parameter.requires_grad and id(each.parameter) not in stepped:
                raise FNSFTError(
                    f"the optimizer does not step the tensor of {each.module} that is protected (the model was made "
                    "or wrapped anew since, or the optimizer before); let the trainer make the optimizer"
                )

    def begin(self, asked: str | bool | None, output_dir: str) -> None:
        """Take the directions of a checkpoint that a training goes on from.

        Args:
            asked: as `Trainer.train` takes it.
            output_dir: of the run.

        Raises:
            FNSFTError: it has none, or was written with other ones asked for, or on another base.
        """
        checkpoint = get_last_checkpoint(output_dir) if asked is True else asked
        if not checkpoint:
            return
        directory = Path(checkpoint) / PROTECTION_DIR
        if not directory.is_dir():
            raise FNSFTError(
                f"{checkpoint} was written by a run without protect, and this run has protect={self.config.protect}; "
                "drop protect, or start anew (drop resume_from_checkpoint)"
            )
        kept, about = load_directions(directory)
        now = self._asked()
        other = [name for name in now if about["asked"].get(name) != now[name]]
        if other:
            then = about["asked"].get(other[0])
            raise FNSFTError(
                f"{checkpoint} was written with {other[0]}={then!r}, and this run has {now[other[0]]!r}; resume with "
                "what it had, or start anew (drop resume_from_checkpoint)"
            )
        self.bases.kept = kept
        self._protect()

    def _asked(self) -> dict[str, Any]:
        """What decides what is protected, as JSON values."""
        places = ("protect_datasets", "protect_basis", "protect_basis_revision")
        asked = {name: value for name, value in asdict(self.config).items() if name not in places}
        modules = [each.module for each in self._maps]
        return asked | {"texts": self._sha256, "modules": modules, "base weights": self._base}

    def left(self) -> float:
        """The largest ||D U|| / ||D|| of any module (||W|| where the weights themselves train)."""
        return self.weights.left()

    def to_dict(self) -> dict[str, Any]:
        """What is protected and how well, as JSON values."""
        return {
            "protect": self.config.protect,
            "forgetting": self.config.forgetting,
            "strength": self.config.protect_strength,
            **as_json(self.bases),
            "task_energy": self.task_energy,
            "closed": self.weights.closed,
            "untrained": len(self.untrained),
            "memory": self.weights.memory,
            "left": self.left(),
        }

    def in_words(self) -> str:
        """What is protected, and what that holds."""
        found, strength = as_json(self.bases), self.config.protect_strength
        counts = f"{found['fewest']}" if found["fewest"] == found["most"] else f"{found['fewest']} to {found['most']}"
        told = (
            f"{found['what']}: {counts} directions of each of {found['inputs']} inputs of {found['modules']} modules"
        )
        shares = [f"{share:.1%} of the energy of {name}" for name, share in found["energy"].items()]
        shares += [f"{self.task_energy:.1%} of the task's energy"] if self.task_energy is not None else []
        told += f", which hold {', '.join(shares)}" if shares else ""
        told += f"; strength {strength:g}" if strength < 1 else ""
        told += f"; {self.weights.memory / 2**20:.0f} MiB"
        if sinks := [f"{count} in {name}" for name, count in found["sinks"].items() if count]:
            told += f"; attention sinks beside position 0: {', '.join(sinks)}"
        if closed := self.weights.closed:
            told += f"; nothing is left that could train of {len(closed)} modules, {closed[0]} first"
        if self.untrained:
            told += (
                f"; {len(self.untrained)} parameters without directions (norms, embeddings, biases) stay as they are"
            )
        return told

    def save(self, directory: Path) -> None:
        """Write the directions beside weights, and a section into their model card if there is one."""
        about = {"asked": self._asked(), **as_json(self.bases)}
        save_directions(self.bases.kept, directory / PROTECTION_DIR, about)
        self.extend_card(directory)

    def extend_card(self, directory: Path) -> None:
        """Put a section into the model card of a directory if there is one."""
        card = directory / CARD_FILE
        if card.exists():
            measured = "of its change" if not self.untrained else "of the weight"
            section = (
                f"{PROTECTION_SECTION}\n\nTrained with `fnsft_trl` so that its layers answer as the base model's to "
                f"inputs along {plain(self.in_words())}. At most {self.left():.1e} {measured} lies along them. They "
                f"are in `{PROTECTION_DIR}/`.\n"
            )
            write_text_whole(card, with_section(card.read_text(encoding="utf-8"), section))


def check_unprotected(asked: str | bool | None, output_dir: str) -> None:
    """Refuse a checkpoint of a run with `protect` where a training without it is to go on from it.

    Args:
        asked: as `Trainer.train` takes it.
        output_dir: of this run.
    """
    checkpoint = get_last_checkpoint(output_dir) if asked is True and Path(output_dir).is_dir() else asked
    if checkpoint and checkpoint is not True and (Path(checkpoint) / PROTECTION_DIR).is_dir():
        raise FNSFTError(
            f"{checkpoint} was written by a run with protect, and this run has none; give its options again, or start "
            "anew (drop resume_from_checkpoint)"
        )


def _stored(config: ProtectionConfig) -> tuple[FunctionalNetworkTemplate | None, KeptDirections | None, str | None]:
    """The template or the directions that `protect_basis` names, and the name of the model that these are of.

    Raises:
        FNSFTError: it names neither.
    """
    if config.protect_basis is None:
        return None, None, None
    if (directory := find_directions(config.protect_basis, revision=config.protect_basis_revision)) is not None:
        kept, about = load_directions(directory)
        return None, kept, about.get("base_model")
    template = FunctionalNetworkTemplate.from_pretrained(config.protect_basis, revision=config.protect_basis_revision)
    if not template.basis and config.protect != "networks":
        raise FNSFTError(
            f"protect_basis is {config.protect_basis}, a template without directions of its inputs; discover it again "
            "with ica_store_basis, or find directions alone (fnsft discover --basis_only)"
        )
    return template, None, None


@contextmanager
def _adapters_off(model: nn.Module) -> Iterator[None]:
    with model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
        yield


def _agreed(trainer: Trainer, find) -> ProtectedBases:
    """The same in all processes: what the first one has found."""
    found = [find()]
    if trainer.args.world_size > 1:
        broadcast_object_list(found)
    return found[0]


def _task(trainer: Trainer, tokenizer) -> KeptText | None:
    """Some tokens of the rows that are trained; `None` where their form is not known."""
    dataset, seed = trainer.task_dataset, trainer.args.seed
    if dataset is None:
        return None
    if isinstance(dataset, Dataset):
        order = random.Random(seed).sample(range(len(dataset)), min(len(dataset), ENERGY_TOKENS))
        rows = (dataset[number] for number in order)
    else:
        rows = iter(islice(dataset, ENERGY_TOKENS))
    sequences, found = [], 0
    for row in rows:
        ids = row.get("input_ids") if isinstance(row, dict) else None
        if ids is None:
            prompts = task_prompts(dataset, tokenizer, tokens=ENERGY_TOKENS, seed=seed)
            return None if prompts is None else KeptText(prompts.sequences)
        present = row.get("attention_mask") or [1] * len(ids)
        ids = [number for number, is_there in zip(ids, present, strict=True) if is_there][: ENERGY_TOKENS - found + 1]
        if len(ids) > 1:
            sequences.append(ids)
            found += len(ids) - 1
        if found >= ENERGY_TOKENS:
            break
    return KeptText(sequences) if sequences else None
