"""NetworkedTrainer: a Trainer with the trainable neurons and the forward mask of a FunctionalNetworkConfig."""

import filecmp
import inspect
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.utils import logging

from ..compat.trl import evaluation_metrics
from ..config import FunctionalNetworkConfig, TrainingPlan
from ..errors import FNSFTError
from ..evaluation.config import RetentionConfig
from ..fields import checked
from ..hub.card import named_card
from ..hub.names import is_dataset_id, model_name
from ..interventions.masking import MaskHandle, masks_off
from ..neurons.mask import NeuronMask
from ..neurons.sites import base_model, check_in_memory
from ..ranks import Ranks
from ..template.storage import CARD_FILE, NETWORK_DIR
from ..template.template import FunctionalNetworkTemplate
from ..writing import disk_errors, files_written_whole, write_text_whole
from .anchor import KLToBase
from .budget import RetentionBudgetExceeded
from .checkpoints import MARKER_FILE
from .config import AnchorConfig, ReplayConfig
from .elastic import EWC_DIR
from .engines import Engine, check_engine
from .kinds import TrainerKind
from .learning_rate import warn_of_high_rate
from .penalties import Penalties
from .penalty_config import PenaltyConfig
from .protecting import ProtectingTrainer
from .protection import PROTECTION_DIR, Protection
from .protection_config import ProtectionConfig
from .replay import Replay
from .results import RESULTS_FILE, RunResults, forget_results
from .resumption import Resumption, check_plain
from .retention_texts import RetentionTexts
from .run import Run
from .run_record import RunRecord
from .same_run import fsdp_form
from .schedule import MaskScheduleCallback


logger = logging.get_logger(__name__)

# What may be given to a trainer in the place of its own optimizer, loss or data.
_OWN = ("data_collator", "compute_loss_func", "optimizers", "optimizer_cls_and_kwargs", "reward_funcs", "rollout_func")


# Of an older run: what must not stay beside the weights of another one.
_OWNED = (
    "model*.safetensors",
    "model*.safetensors.index.json",
    "adapter_model*",
    NETWORK_DIR,
    PROTECTION_DIR,
    EWC_DIR,
    RESULTS_FILE,
)


def _checked(*configs: Any) -> list[Any]:
    """The other configs of a run, in the order of the names here, checked again."""
    names = ("retention", "protection", "anchor", "replay", "penalties")
    kinds = (RetentionConfig, ProtectionConfig, AnchorConfig, ReplayConfig, PenaltyConfig)
    return [checked(*each) for each in zip(configs, kinds, names, strict=True)]


def _asked(
    retention: RetentionConfig | None,
    protection: ProtectionConfig | None,
    anchor: AnchorConfig | None,
    penalties: PenaltyConfig | None,
) -> list[str]:
    """What is asked of an engine that shards the model, with networks and without, keys of `REFUSALS`."""
    rolls_back = retention is not None and retention.retention_budget is not None
    asked = {
        "protect": protection is not None and protection.is_on,
        "kl_to_base": anchor is not None,
        "penalties": penalties is not None,
        "rollback": rolls_back and retention.retention_on_budget in (None, "rollback"),
    }
    return [key for key, is_asked in asked.items() if is_asked]


class NetworkedTrainer(ProtectingTrainer):
    """What networks add to a trainer. It goes in front of the class of the trainer: see [`with_networks`].

    Args:
        args, kwargs:
            The arguments of the trainer, by position or by name, and `peft_config` where it takes none itself.
        network_config ([`FunctionalNetworkConfig`], *optional*):
            What to select, train and mask.
        network_template ([`FunctionalNetworkTemplate`] or `str`, *optional*):
            The networks, their directory or their Hub id; overrides `network_config.ica_template_path`. Without
            either, they are discovered on `network_config.ica_datasets` or on the training data.
        retention ([`RetentionConfig`], *optional*):
            The general texts on which it is measured what the model loses, with networks and without, and a budget.
        protection ([`ProtectionConfig`], *optional*):
            In which directions of their inputs the layers that train go on answering as before, with networks and
            without.
        anchor ([`AnchorConfig`], *optional*):
            The general texts on which the model is kept near its base, with networks and without, and how much.
        replay ([`ReplayConfig`], *optional*):
            The rows that are trained beside the task; of [`FNSFTTrainer`] alone.
        penalties ([`PenaltyConfig`], *optional*):
            EWC, LwF and O-LoRA beside the loss of the task, with networks and without.

    Attributes: those of [`FNSFTTrainer`].

    Raises:
        FNSFTError: the config, the template, the model and the PEFT config do not go together.
    """

    mask_handle: MaskHandle | None = None
    replay: Replay | None = None
    _trainer_class: type[Trainer] = Trainer
    _replays = False
    _run: Run | None = None
    _resumption: Resumption | None = None
    _results: RunResults | None = None
    _evaluation_name: str | None = None

    def __init__(
        self,
        *args,
        network_config: FunctionalNetworkConfig | None = None,
        network_template: FunctionalNetworkTemplate | str | os.PathLike | None = None,
        retention: RetentionConfig | None = None,
        protection: ProtectionConfig | None = None,
        anchor: AnchorConfig | None = None,
        replay: ReplayConfig | None = None,
        penalties: PenaltyConfig | None = None,
        **kwargs,
    ) -> None:
        network_config = checked(network_config, FunctionalNetworkConfig, "network_config")
        retention, protection, anchor, replay, penalties = _checked(retention, protection, anchor, replay, penalties)
        kind = TrainerKind(self._trainer_class)
        given = kind.by_name(args, kwargs)
        for name, asked in (("retention is", retention), ("kl_to_base is", anchor)):
            if asked is not None and kind.scores:
                raise FNSFTError(f"{name} measured by the next token, which a reward model does not predict; drop it")
        engine, asked = Engine.of_args(given.get("args")), _asked(retention, protection, anchor, penalties)
        if engine is not None:
            engine.check(asked)
        if replay is not None:
            self.replay = Replay.of(replay, given, self._trainer_class.__name__, is_read=self._replays)
        if penalties is not None:
            penalties.check_protection(is_protected=protection is not None and protection.is_on)
        kept = None if anchor is None else KLToBase(anchor)
        added = None if penalties is None else Penalties(penalties, given.get("args"))
        read = ("args", "train_dataset", "processing_class", "formatting_func")
        retained = RetentionTexts.of(retention, *(given.get(name) for name in read))
        own = {name: given[name] for name in _OWN if name in given}
        self._protection = Protection.of(protection, given)
        if network_config is not None:
            self._run = Run(network_config, given, kind)
            self._run.prepare(network_template)
            self._evaluate_masked = network_config.mask_eval
            self._tag_names = [*getattr(self, "_tag_names", ()), "fnsft", "functional-networks"]
        elif network_template is not None:
            raise FNSFTError("network_template without network_config has no effect; give a network_config too")
        with self._run.loaded_model() if self._run else nullcontext():
            super().__init__(**given, retention=retained, anchor=kept, penalties=added)
        check_engine(self, engine, lambda found: [*asked, *(self._run.asked(found) if self._run else ())])
        if self._run is not None or self._protection is not None:
            check_in_memory(self.model, "training with networks or protect")
        if self.replay is not None and self.replay.task is None:
            raise FNSFTError("replay_datasets have no effect, since the training data was not prepared; drop them")
        if self._run is not None:
            self.mask_handle = self._run.hold(self)
            self._resumption = Resumption(self, self._run, own)
        if self._protection is not None:
            self._protection.hold(self, *((self._run.trainable, self._run.template) if self._run else (None, None)))
        warn_of_high_rate(self, self.plan and self.plan.method)

    @property
    def network_config(self) -> FunctionalNetworkConfig | None:
        """What was asked for."""
        return self._run and self._run.config

    @property
    def network_template(self) -> FunctionalNetworkTemplate | None:
        """The networks."""
        return self._run and self._run.template

    @property
    def neuron_mask(self) -> NeuronMask | None:
        """The selected neurons."""
        return self._run and self._run.selected

    @property
    def trainable_neurons(self) -> NeuronMask | None:
        """The neurons whose weights may change, over all layers."""
        return self._run and self._run.trainable

    @property
    def plan(self) -> TrainingPlan | None:
        """What is trained and masked."""
        return self._run and self._run.plan

    @property
    def masks_reference(self) -> bool:
        """Whether forward masks are on the reference model too; one that was given stays as it is."""
        return self._run is not None and self._run.masks_reference

    def create_optimizer(self, *args, **kwargs):
        """As the parent's; frozen slices of weights or LoRA factors are put back after every step."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self._run is not None:
            self._run.way.attach(optimizer)
        return optimizer

    def get_batch_samples(self, *args, **kwargs):
        """As the parent's; none for a run that is resumed at its end, which would make one step too many."""
        if self._run is not None and self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """As the parent's; with `mask_eval=False` a forward mask is switched off meanwhile."""
        with self._evaluation_masks():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args, **kwargs):
        """As the parent's; with `mask_eval=False` a forward mask is switched off meanwhile."""
        with self._evaluation_masks():
            return super().predict(*args, **kwargs)

    def _evaluation_masks(self):
        unmasked = self.mask_handle is not None and not self._evaluate_masked
        return masks_off(self.model) if unmasked else nullcontext()

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """As the parent's; the evaluations with and without a mask have names of their own in it."""
        if self._evaluation_name is not None:
            metrics = evaluation_metrics(self)
            named = {f"{self._evaluation_name}_{name}": values for name, values in metrics.items()}
            metrics.clear()
            metrics.update(named)
        super().log(logs, *args, **kwargs)

    def _evaluate_with_and_without_mask(self) -> None:
        try:
            for name, self._evaluate_masked in (("masked", True), ("unmasked", False)):
                self._evaluation_name = name
                self.evaluate(metric_key_prefix=f"eval_{name}")
        finally:
            self._evaluation_name = None
            self._evaluate_masked = self.network_config.mask_eval

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As the parent's; with a forward mask, ends with one evaluation under it and one without it. With networks or
        retention, a table of what was trained, learnt and lost is logged, which [`save_model`] writes beside the
        weights as `results.json`.

        Args:
            resume_from_checkpoint: a checkpoint, or `True` for the newest complete one. `None`: that of
                `args.resume_from_checkpoint`, from which the networks were taken when the trainer was made.
            args, kwargs: the other arguments of the parent's.

        Raises:
            FNSFTError: the checkpoint is not complete, or was written by a run that differs from this one.
        """
        if self._resumption is None:
            check_plain(resume_from_checkpoint, self.args.output_dir)
        else:
            resume_from_checkpoint = self._resumption.begin(resume_from_checkpoint, self._record.mask_phases)
        self._results = None
        try:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
            if self.mask_handle is not None and self.eval_dataset is not None:
                self._evaluate_with_and_without_mask()
        except RetentionBudgetExceeded:  # in order, with the model as it was before
            self._conclude()
            raise
        self._conclude()
        return result

    def _conclude(self) -> None:
        """Say at the end of a training what came of it."""
        record, guard = (self._record, self._run.guard) if self._run is not None else (None, None)
        self._results = RunResults.of(self, record, guard, self._protection)
        if self._results is not None and self.is_world_process_zero():
            logger.warning(f"the run in short:\n{self._results.table()}")

    def create_model_card(self, *args, **kwargs) -> None:
        """As the parent's, with a section on what was trained, what was frozen and how to load the result.

        The Hub refuses cards that name a local file as their dataset, so such a name is left out. What the parent's
        has no name for (a base model that is here, a repository) is called by its directory.
        """
        call = inspect.signature(super().create_model_card).bind(*args, **kwargs)
        dataset, directory = call.arguments.get("dataset_name"), Path(self.args.output_dir)
        if dataset is not None and (not is_dataset_id(dataset) or Path(dataset).exists()):
            call.arguments["dataset_name"] = None
        if "model_name" in inspect.signature(super().create_model_card).parameters:
            call.arguments["model_name"] = call.arguments.get("model_name") or self._card_name
        super().create_model_card(*call.args, **call.kwargs)
        if self.is_world_process_zero() and (directory / CARD_FILE).is_file():
            card = (directory / CARD_FILE).read_text(encoding="utf-8")
            base = model_name(base_model(self.model)) or "a model made in memory"
            write_text_whole(directory / CARD_FILE, named_card(card, self._card_name, base))
        if self._run is not None and self.is_world_process_zero():
            self._record.extend_card(directory, self.model)
        self._extend_card_with_protection()
        if self._results is not None and self.is_world_process_zero():
            self._results.extend_card(directory)

    @property
    def _card_name(self) -> str:
        return (self.hub_model_id or os.path.abspath(self.args.output_dir)).rstrip("/").rsplit("/", 1)[-1]

    @property
    def _record(self) -> RunRecord:
        schedules = [c for c in self.callback_handler.callbacks if isinstance(c, MaskScheduleCallback)]
        phases = [phase for schedule in schedules for phase in schedule.to_dict()]
        run = self._run
        return RunRecord(run.config, run.plan, run.template, run.selected, run.trainable, phases)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the parent's, with the template, what was selected, and after a training its results beside the weights.

        Where FSDP keeps them sharded in checkpoints, what is saved elsewhere is whole all the same. Over an older run
        in the same directory, all of it is the new one's or none.

        Raises:
            FNSFTError: the disk does not take it.
        """
        directory = Path(output_dir or self.args.output_dir)
        if self._run is None:
            super().save_model(output_dir, _internal_call)
            self._save_results(directory)
            return
        ranks = Ranks()
        with ranks.together():
            self._save_whole(directory)
        ranks.meet()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_whole(self, directory: Path) -> None:
        # A checkpoint counts when it is marked, and what DeepSpeed shards is written by every process.
        if self._resumption.is_writing or self.is_deepspeed_enabled or not self.args.should_save:
            self._save_all(directory)
            return
        with disk_errors(directory), files_written_whole(directory, owned=_OWNED) as scratch:
            for name in (CARD_FILE, RESULTS_FILE):  # which are changed
                if (directory / name).is_file():
                    shutil.copyfile(directory / name, scratch / name)
            self._save_all(scratch)

    def _save_all(self, directory: Path) -> None:
        super().save_model(str(directory), _internal_call=True)
        self._save_networks(str(directory))
        self._save_results(directory)

    def _save_results(self, directory: Path) -> None:
        self._save_protection(directory)
        if self._results is not None and self.args.should_save:
            self._results.save(directory)
        elif self.args.should_save:
            forget_results(directory)

    def _save_networks(self, output_dir: str | None) -> None:
        if self.is_fsdp_enabled and not self._resumption.is_writing and "FULL" not in fsdp_form(self):
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        if self.args.should_save:
            self._record.save(Path(output_dir or self.args.output_dir), self.model)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        networks, pushed = Path(checkpoint_folder) / NETWORK_DIR, Path(self.args.output_dir)
        if self._run is not None and self.is_world_process_zero() and networks.is_dir():  # as the card says
            names = set(os.listdir(networks)) - {MARKER_FILE}
            same, *_ = filecmp.cmpfiles(networks, pushed / NETWORK_DIR, names, shallow=False)
            if names != set(same):  # or an upload that is under way would see files come and go
                with files_written_whole(pushed) as scratch:
                    shutil.copytree(networks, scratch / NETWORK_DIR, ignore=shutil.ignore_patterns(MARKER_FILE))
        super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model, trial) -> None:
        # A search over hyperparameters writes elsewhere.
        with self._resumption.writing(self._record.mask_phases) if self._run and trial is None else nullcontext():
            super()._save_checkpoint(model, trial)
