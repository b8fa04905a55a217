"""Private methods and attributes of classes of other libraries that classes of this package override or call.

They cannot be imported, so they are listed. A method that is renamed is overridden in vain, without an error: the
tests compare this list with the libraries and with the classes of this package.
"""

from typing import NamedTuple


__all__ = ["PRIVATE_METHODS"]

_TORCH = "https://github.com/pytorch/pytorch/blob/v2.13.0/"
_TRANSFORMERS = "https://github.com/huggingface/transformers/blob/v5.23.0/src/"
_PEFT = "https://github.com/huggingface/peft/blob/v0.21.2/src/"
_TRL = "https://github.com/huggingface/trl/blob/v1.16.0/"

_MODULE = ("torch.nn.Module", f"{_TORCH}torch/nn/modules/module.py")
_TUNER = ("peft.tuners.tuners_utils.BaseTuner", f"{_PEFT}peft/tuners/tuners_utils.py")
_LAYER = ("peft.tuners.tuners_utils.BaseTunerLayer", f"{_PEFT}peft/tuners/tuners_utils.py")
_TRAINER = ("transformers.Trainer", f"{_TRANSFORMERS}transformers/trainer.py")
_SFT = ("trl.SFTTrainer", f"{_TRL}trl/trainer/sft_trainer.py")

_HFLM = (
    "lm_eval.models.huggingface.HFLM",
    "https://github.com/EleutherAI/lm-evaluation-harness/blob/v0.4.13/lm_eval/models/huggingface.py",
)


class PrivateMethod(NamedTuple):
    """A method or an attribute of a class of another library.

    Attributes:
        owner (`str`): the class, as it is imported.
        link (`str`): where it is defined, in the version that it was seen in.
        name (`str`): its name.
        parameters (`tuple[str, ...]`, *optional*): those that are relied on, by name or by their order; `None` for an
            attribute.
        why (`str`): what it is needed for.
    """

    owner: str
    link: str
    name: str
    parameters: tuple[str, ...] | None
    why: str


PRIVATE_METHODS = (
    PrivateMethod(*_MODULE, "_apply", ("fn", "recurse"), "base values kept aside move with the weights"),
    PrivateMethod(*_MODULE, "_load_from_state_dict", ("state_dict", "prefix"), "what is loaded is the base weight"),
    PrivateMethod(*_MODULE, "_replicate_for_data_parallel", (), "DataParallel's copies have no parameters: refused"),
    PrivateMethod(*_TUNER, "_check_new_adapter_config", ("config",), "all adapters of one model have one site"),
    PrivateMethod(*_TUNER, "_prepare_adapter_config", ("peft_config", "model_config"), "the neurons name the modules"),
    PrivateMethod(*_TUNER, "_prepare_model", ("peft_config", "model"), "puts LoRA into the model beside the deltas"),
    PrivateMethod(
        *_TUNER,
        "_create_and_replace",
        ("peft_config", "adapter_name", "target", "target_name", "parent", "current_key"),
        "puts a layer with deltas around a module",
    ),
    PrivateMethod(
        *_TUNER,
        "_replace_module",
        ("parent", "child_name", "new_module", "child"),
        "the inherited one assigns a weight that is computed where tokens train",
    ),
    PrivateMethod(
        *_TUNER,
        "_unload_and_optionally_merge",
        ("merge", "progressbar", "safe_merge", "adapter_names"),
        "base values that an interruption left changed are put back before layers are taken apart",
    ),
    PrivateMethod(
        *_TUNER,
        "_remove_adapter_name_from_key",
        ("key", "adapter_name"),
        "files keep the names that deltas had before their parameters got a module of their own",
    ),
    PrivateMethod(*_TUNER, "prefix", None, "the beginning of the deltas' names, by which PEFT finds them"),
    PrivateMethod(
        "peft.PeftModel",
        f"{_PEFT}peft/peft_model.py",
        "_enable_peft_forward_hooks",
        (),
        "sees adapter_names of a mixed batch, which deltas of weights cannot follow: refused",
    ),
    PrivateMethod(
        *_LAYER, "_get_base_layer_device_and_dtype", ("base_layer",), "experts have no `weight` to take them from"
    ),
    PrivateMethod(
        *_LAYER, "_move_adapter_to_device_of_base_layer", ("adapter_name",), "new deltas go where their layer is"
    ),
    PrivateMethod(
        *_LAYER, "merge", ("safe_merge", "adapter_names"), "replaced on layers whose merge would move frozen neurons"
    ),
    PrivateMethod(*_TRAINER, "_save_checkpoint", ("model", "trial"), "a checkpoint is marked when it is whole"),
    PrivateMethod(*_TRAINER, "_get_train_sampler", ("train_dataset",), "rows to replay are a share of each batch"),
    PrivateMethod(
        *_TRAINER, "_push_from_checkpoint", ("checkpoint_folder",), "networks go along with weights that are pushed"
    ),
    PrivateMethod(
        *_TRAINER,
        "_save",
        ("output_dir", "state_dict"),
        "weights that FSDP keeps sharded are gathered, and saved whole at the end",
    ),
    PrivateMethod(
        *_TRAINER,
        "_determine_best_metric",
        ("metrics", "trial"),
        "a state that has lost more than the budget of retention is not the best one",
    ),
    PrivateMethod(
        *_SFT,
        "_prepare_dataset",
        ("dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"),
        "prepared data are kept, and rows that it leaves out are counted",
    ),
    PrivateMethod(*_SFT, "_tag_names", None, "the tags of the model card"),
    PrivateMethod(*_HFLM, "_model_call", ("inps",), "logits that are no numbers are refused"),
    PrivateMethod(
        *_HFLM,
        "_model_generate",
        ("context", "max_length", "stop", "generation_kwargs"),
        "scores of a next token that are no numbers are refused",
    ),
)
