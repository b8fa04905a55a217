"""What a resumed run must share with the run that wrote its checkpoint, so that it equals the uninterrupted one."""

import hashlib
import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import FunctionType
from typing import Any

import pyarrow as pa
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import TrainingArguments
from transformers.utils import ADAPTER_CONFIG_NAME, logging
from trl import SFTTrainer

from ..errors import FNSFTError
from ..json_text import WRONG_VALUES, from_json
from ..template.storage import NETWORK_DIR
from ..template.template import FunctionalNetworkTemplate
from .checkpoints import marked
from .engines import Engine
from .run_record import SELECTION_FILE


logger = logging.get_logger(__name__)

# Arguments of a trainer that change no weight that it trains, by their beginnings and by their names. All others are
# compared, those of later versions too.
_FREE_BEGINNINGS = (
    *("logging_", "log_", "trackio_", "eval_", "save_", "hub_", "ddp_", "fsdp", "deepspeed", "torch_compile"),
    *("activation_checkpointing", "gradient_checkpointing", "liger_", "do_", "metric_for_", "include_"),
)
_FREE = {
    *("output_dir", "run_name", "project", "report_to", "disable_tqdm", "debug", "skip_memory_metrics", "use_cpu"),
    *("per_device_eval_batch_size", "prediction_loss_only", "batch_eval_metrics", "greater_is_better"),
    *("load_best_model_at_end", "bf16_full_eval", "fp16_full_eval", "enable_jit_checkpoint", "push_to_hub"),
    *("ignore_data_skip", "restore_callback_states_from_checkpoint", "full_determinism", "resume_from_checkpoint"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataset_num_proc"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "local_rank", "model_init_kwargs"),
    *("trust_remote_code", "use_cache", "use_liger_kernel", "activation_offloading", "torch_empty_cache_steps"),
    *("auto_find_batch_size", "parallelism_config", "label_names"),
    # Compared together, or below.
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps"),
}
# With these, the learning rate at a step depends on neither the number of steps nor the evaluations.
_OPEN_ENDED = ("constant", "constant_with_warmup", "inverse_sqrt")
_ROW_BY_ROW = ("random", "sequential")  # strategies of sampling under which batches do not decide the order of rows
_BY_EVALUATION = ("reduce_lr_on_plateau", "greedy")
# Of an adapter's configuration: where it came from, and what is not trained by.
_FREE_OF_ADAPTER = {
    *("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "task_type"),
    *("runtime_config", "peft_type"),
}
_REPR = reprlib.Repr()
_REPR.maxlist = _REPR.maxdict = 3
_TOKENS = ("input_ids", "labels", "seq_lengths")  # what SFTTrainer reads of its prepared data


def run_settings(trainer, *, given: Mapping[str, Any], mask_phases: list[dict]) -> dict[str, Any]:
    """All that decides what a run makes of its model, as short JSON values.

    Args:
        trainer ([`NetworkedTrainer`]): with a network config.
        given: name -> what was given to the trainer in the place of its own optimizer, loss or collator.
        mask_phases: of its `MaskScheduleCallback`.
    """
    plan = trainer.plan
    settings = {
        "train_method": plan.method,
        "train_neurons": plan.train,
        "mask_mode": plan.mask_mode,
        "mask_factor": plan.mask_factor,
        "trainable": _mask_text(trainer.trainable_neurons.count, trainer.trainable_neurons.sha256),
        "selected": _mask_text(trainer.neuron_mask.count, trainer.neuron_mask.sha256),
        "train_other": trainer.network_config.train_other,
        "mask_phases": mask_phases,
        "networks": networks_text(trainer.network_template),
        "dtype": sorted({str(p.dtype).removeprefix("torch.") for p in trainer.model.parameters()}),
        "train_dataset": data_text(trainer.train_dataset, _TOKENS if isinstance(trainer, SFTTrainer) else None),
        "fsdp": fsdp_form(trainer),
        "deepspeed": _deepspeed_form(trainer),
        "replay": trainer.replay and trainer.replay.settings(),
        "kl_to_base": trainer.anchor and trainer.anchor.settings(),
        "kl_sequences_in_a_step": trainer.anchor and trainer.anchor.in_a_step(trainer.args),
        "penalties": trainer.penalties and trainer.penalties.settings(),
        **{name: _name(value) for name, value in given.items()},
        **_argument_settings(trainer.args),
    }
    if isinstance(trainer.model, PeftModel):
        settings |= _adapter_settings(trainer.model.peft_config[trainer.model.active_adapters[0]].to_dict())
    if any(isinstance(phase["start"], float) for phase in mask_phases):
        settings["length"] = _length(trainer.args)
    return json.loads(json.dumps(settings, default=_plain))


def check_same(checkpoint: Path, now: Mapping[str, Any]) -> None:
    """Check that a run may go on from a checkpoint.

    Args:
        checkpoint: complete.
        now: the settings of this run.

    Raises:
        FNSFTError: something that changes the training is not as it was; the message names both values.
    """
    then = marked(checkpoint)
    if then is None:
        then = _unmarked_settings(checkpoint)
        logger.warning(
            f"{checkpoint} does not say all that its run was asked for; neurons, masks and adapter are compared, see "
            "that the arguments of the training are the same"
        )
    other = [name for name in then if name in now and then[name] != now[name]]
    if other == ["batches"]:
        logger.warning(
            f"the batches of {checkpoint} were {then['batches']}, now they are {now['batches']}: the same rows, but "
            "dropout draws other numbers, and several processes fill up the last step of an epoch with its first rows"
        )
        return
    if "train_method" in other:  # of which much else follows
        other = ["train_method"]
    elif "trainable" in other:
        other = [name for name in other if name != "selected" and not name.startswith("adapter.")]
    if other:
        told = [
            f"{name} was {_short(then[name])} and is now {_short(now[name])}" for name in other if name != "batches"
        ]
        more = f" and {len(told) - 4} more" if told[4:] else ""
        raise FNSFTError(
            f"{checkpoint} was written by a run that differs from this one: {'; '.join(told[:4])}{more}; resume with "
            f"what it had{_hint(other)}, or start anew (drop resume_from_checkpoint)"
        )


def _hint(other: list[str]) -> str:
    """How the networks of the checkpoint are had: the trainer takes them from there if it knows of it in time."""
    if not {"networks", "selected", "trainable"} & set(other):
        return ""
    return ", its networks among it (they are taken from there with SFTConfig(resume_from_checkpoint=...))"


def _unmarked_settings(checkpoint: Path) -> dict[str, Any]:
    """What the files say that every checkpoint of a run with networks holds."""
    file = checkpoint / NETWORK_DIR / SELECTION_FILE
    if not file.is_file():
        raise FNSFTError(f"{checkpoint} holds no {NETWORK_DIR}/{SELECTION_FILE}: not a checkpoint of this trainer")
    try:
        written = from_json(file.read_text(encoding="utf-8"))
        settings = {name: written[name] for name in ("train_method", "train_neurons", "mask_mode")}
        settings |= {name: _mask_text(**written[name]) for name in ("trainable", "selected")}
        settings["train_other"] = written["network_config"]["train_other"]
        settings["mask_phases"] = written.get("mask_phases", [])
        adapter = checkpoint / ADAPTER_CONFIG_NAME
        if adapter.is_file():
            settings |= _adapter_settings(from_json(adapter.read_text(encoding="utf-8")))
    except (OSError, *WRONG_VALUES) as error:
        raise FNSFTError(f"{checkpoint} cannot be read ({error}); name another checkpoint") from error
    return json.loads(json.dumps(settings, default=_plain))


def _argument_settings(args: TrainingArguments) -> dict[str, Any]:
    """The arguments of a trainer that change what it trains."""
    names = [f.name for f in fields(args) if f.name not in _FREE and not f.name.startswith(_FREE_BEGINNINGS)]
    settings = {name: getattr(args, name) for name in names}
    schedule = args.lr_scheduler_type.value
    if schedule not in _OPEN_ENDED or 0 < args.warmup_steps < 1:
        settings["length"] = _length(args)
    if schedule in _BY_EVALUATION:
        settings |= {name: getattr(args, name) for name in ("eval_strategy", "eval_steps", "metric_for_best_model")}
    settings["grouped_batches"] = None
    if not args.auto_find_batch_size:  # which finds it anew
        batch, steps, processes = args.train_batch_size, args.gradient_accumulation_steps, args.world_size
        settings["rows_in_a_step"] = batch * steps * processes
        settings["batches"] = f"{batch} rows x {steps} x {processes} processes"
        if args.train_sampling_strategy not in _ROW_BY_ROW:
            settings["grouped_batches"] = settings["batches"]
    return settings


def _length(args: TrainingArguments) -> str:
    """How long the run is, as it was asked for."""
    return f"max_steps={args.max_steps}" if args.max_steps > 0 else f"num_train_epochs={args.num_train_epochs:g}"


def _adapter_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What an adapter's configuration says, with lists of names, which are sets, in order."""
    kept = {name: value for name, value in config.items() if name not in _FREE_OF_ADAPTER}
    if isinstance(kept.get("lora"), Mapping):
        kept["lora"] = _adapter_settings(kept["lora"])
    return {
        name if "." in name else f"adapter.{name}": sorted(value, key=str) if isinstance(value, (set, list)) else value
        for name, value in kept.items()
    }


def fsdp_form(trainer) -> str | None:
    """The name of the form in which FSDP writes checkpoints; `None` without FSDP."""
    return trainer.accelerator.state.fsdp_plugin.state_dict_type.name if trainer.is_fsdp_enabled else None


def _deepspeed_form(trainer) -> str | bool:
    """What the checkpoints of DeepSpeed are of, which loads no others; `False` without it."""
    engine = Engine.of_trainer(trainer)
    return f"{engine.name}, {trainer.args.world_size} processes" if trainer.is_deepspeed_enabled else False


def _mask_text(count: int, sha256: str) -> str:
    return f"{count} neurons ({sha256[:16]})"


def networks_text(template: FunctionalNetworkTemplate) -> str:
    """The networks of a template in a few words, in which any other loading shows."""
    digest = hashlib.sha256()
    for layer, loadings in sorted(template.loadings.items()):
        digest.update(f"{layer}:".encode() + loadings.contiguous().numpy().tobytes())
    return f"{len(template.components)} networks at {template.site} ({digest.hexdigest()[:16]})"


def data_text(dataset: Dataset | IterableDataset, columns: Sequence[str] | None) -> str | None:
    """What is in some columns of prepared data (`None`: in all), in the order of the rows; `None` of a stream."""
    if not isinstance(dataset, Dataset):
        return None
    names = [name for name in columns or sorted(dataset.column_names) if name in dataset.column_names]
    digest = hashlib.sha256()
    for table in dataset.select_columns(names).with_format("arrow").iter(batch_size=1000) if names else ():
        table = table.combine_chunks().replace_schema_metadata()  # which tells of files
        with pa.ipc.new_stream(sink := pa.BufferOutputStream(), table.schema) as stream:
            stream.write_table(table)
        digest.update(sink.getvalue())
    return f"{len(dataset)} rows ({digest.hexdigest()[:16]})"


def _name(value: Any) -> Any:
    """Of what class or function something is; of several things, each."""
    if isinstance(value, (tuple, list)):
        return [_name(item) for item in value]
    if value is None or isinstance(value, (dict, str)):
        return value
    named = value if isinstance(value, (type, FunctionType)) else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _plain(value: Any) -> Any:
    """A value that JSON does not know, as one that it knows."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return asdict(value) if is_dataclass(value) else str(value)


def _short(value: Any) -> str:
    return value if isinstance(value, str) else _REPR.repr(value)
