"""The options of one call of `fnsft train`, from both sources, checked against each other. Free of torch."""

from dataclasses import dataclass, fields, replace
from typing import Any

from ...config import FunctionalNetworkConfig
from ...data.config import DataConfig
from ...errors import FNSFTError
from ...evaluation.config import RetentionConfig
from ...export.gguf import check_outtype, find_converter
from ...training.config import AnchorConfig, ReplayConfig
from ...training.penalty_config import PenaltyConfig
from ...training.protection_config import ProtectionConfig
from ..output import check_writable
from .loading import LoadingConfig
from .run_config import RunConfig
from .schema import Option, by_name, describe
from .sources import COMMAND_LINE, read_sources
from .translate import DISCOVERY_NAMES, NETWORK_NAMES, original_options, translate
from .trl_options import trl_options
from .values import TRUTH


# Options of which one can be given, or be on.
_EXCLUSIVE = (
    *(("load_in_4bit", "load_in_8bit"), ("bf16", "fp16"), ("bf16_full_eval", "fp16_full_eval")),
    ("dataset_name", "datasets"),
)
# Options that LoRA alone reads.
OF_LORA = (
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters"),
    *("lora_modules_to_save", "lora_task_type", "use_rslora", "use_dora"),
)
# Option -> the switch without which it has no effect. A switch that says false may leave its options in place.
_NEEDS = {
    "hub_model_id": "push_to_hub",
    "hub_token": "push_to_hub",
    "hub_commit_message": "push_to_hub",
    "gguf_quantization": "convert_to_gguf",
}


@dataclass
class TrainOptions:
    """What a call of `fnsft train` asks for.

    Attributes:
        values (`dict[str, Any]`): the options that were given, under TRL's names and ours.
        network_config (`FunctionalNetworkConfig` or `None`): `None` is plain fine-tuning.
        retention (`RetentionConfig` or `None`): what is measured of what the model loses.
        protection (`ProtectionConfig` or `None`): the directions in which what trains answers as before.
        replay (`ReplayConfig` or `None`): what is trained beside the task.
        anchor (`AnchorConfig` or `None`): where the model is kept near its base.
        penalties (`PenaltyConfig` or `None`): what is added to the loss to keep earlier tasks.
        notes (`list[str]`): what the user should know of how the options were read.
    """

    values: dict[str, Any]
    network_config: FunctionalNetworkConfig | None
    retention: RetentionConfig | None
    replay: ReplayConfig | None
    anchor: AnchorConfig | None
    penalties: PenaltyConfig | None
    protection: ProtectionConfig | None
    notes: list[str]

    def of(self, kind: type) -> dict[str, Any]:
        """The given values that are fields of a dataclass."""
        return {field.name: self.values[field.name] for field in fields(kind) if field.name in self.values}

    @property
    def has_adapter(self) -> bool:
        """Whether what trains is an adapter, LoRA or neuron deltas, and the model's weights are frozen."""
        lora = bool(self.values.get("use_peft"))
        config = self.network_config
        return lora if config is None else config.plan(lora_config=lora).method != "full"


def training_options() -> dict[str, Option]:
    """All options of `fnsft train`, by name, ours first."""
    ours = [
        option
        for kind in (
            *(FunctionalNetworkConfig, ProtectionConfig, DataConfig),
            *(RetentionConfig, ReplayConfig, AnchorConfig, PenaltyConfig, RunConfig),
        )
        for option in describe(kind)
    ]
    known = by_name([*ours, *trl_options()])
    more = [replace(option, group="ModelConfig") for option in describe(LoadingConfig) if option.name not in known]
    return known | by_name(more)


def parse_options(argv: list[str]) -> TrainOptions:
    """Read and check the arguments of `fnsft train`: the command line over YAML over defaults.

    Raises:
        FNSFTError: a name that is not known, a value that its option cannot have, or options that contradict each
            other.
    """
    options = training_options()
    return _asked(read_sources(argv, options | original_options(options)))


def parse_recipe(path: str, command_line: dict[str, Any]) -> TrainOptions:
    """Read and check a YAML file of `fnsft train`.

    Args:
        path: of the file.
        command_line: option -> its value, over what the file says.

    Raises:
        FNSFTError: as [`parse_options`].
    """
    options = training_options()
    sources = read_sources(["--config", path], options | original_options(options))
    return _asked({**sources, COMMAND_LINE: command_line})


def asked_of(values: dict[str, Any], where: str) -> TrainOptions:
    """What checked values come to.

    Args:
        values: option -> value.
        where: they stand, for messages.

    Raises:
        FNSFTError: as [`parse_options`].
    """
    return _asked({where: values})


def _asked(sources: dict[str, dict[str, Any]]) -> TrainOptions:
    """What the sources come to, the weakest first."""
    values: dict[str, Any] = {}
    notes: list[str] = []
    used: dict[str, str] = {}
    for source, given in sources.items():
        translated, names = translate(given)
        _check_contradictions(translated, lora=source == COMMAND_LINE or not given.get("no_peft"))
        if source == COMMAND_LINE:
            notes += _drop_overruled(values, translated)
        values |= translated
        used |= names
    if used:
        notes.insert(0, "names of the original project: " + "; ".join(f"{old} -> {new}" for old, new in used.items()))
    notes += _switch_words(values)
    _check_presence(values)

    networks = _network_options(values, sources, notes)
    notes += _drop_idle(values, sources)
    for name in OF_LORA:
        if values.get(name) is not None and not values.get("use_peft"):
            raise FNSFTError(f"{name} has no effect without LoRA; add use_peft, or drop it")
    config = FunctionalNetworkConfig(**networks) if networks else None
    if config is not None:
        config.plan(lora_config=bool(values.get("use_peft")))
        if config.ica_template_path is None:
            config.check_named_networks()
    kept = (_given(kind, values) for kind in (RetentionConfig, ReplayConfig, AnchorConfig, PenaltyConfig))
    result = TrainOptions(values, config, *kept, _protection(values, config), notes)
    _check_effects(result)
    if values.get("push_to_hub") and not values.get("hub_model_id"):
        if _is_original(sources):
            raise FNSFTError("push_to_hub needs hub_repo_id, the repository to push to (org/name)")
        notes.append("push_to_hub without hub_model_id pushes to a repository of your account named as the output_dir")
    if values.get("eval_strategy") in (None, "no"):
        idle = [name for name in ("eval_fraction", "eval_steps") if values.get(name) is not None]
        notes += [f"{', '.join(idle)}: no effect without an eval_strategy (steps or epoch)"] if idle else []
    check_writable(values.get("output_dir") or "trainer_output")
    return result


def _check_contradictions(values: dict[str, Any], *, lora: bool) -> None:
    """What one source says must go together; `lora`: the options of LoRA with whether it trains, too."""
    for a, b in _EXCLUSIVE:
        if values.get(a) and values.get(b):
            raise FNSFTError(f"{a} and {b} exclude each other; drop one of them")
    idle = [name for name in OF_LORA if values.get(name) is not None]
    if lora and values.get("use_peft") is False and idle:
        raise FNSFTError(f"{idle[0]} has no effect without LoRA (no_peft, or use_peft: false); drop one of them")


def _drop_overruled(values: dict[str, Any], command_line: dict[str, Any]) -> list[str]:
    """Drop the values of the file that contradict a switch of the command line, and say so."""
    losers = [b for pair in _EXCLUSIVE for a, b in (pair, pair[::-1]) if command_line.get(a) and values.get(b)]
    if command_line.get("use_peft") is False:
        losers += [name for name in OF_LORA if values.get(name) is not None]
        losers += ["merge_adapter_with_base"] if values.get("merge_adapter_with_base") else []
    for name in losers:
        del values[name]
    return [f"{name} of the config file is overruled by the command line" for name in losers]


def _drop_idle(values: dict[str, Any], sources: dict[str, dict[str, Any]]) -> list[str]:
    """Drop the options of LoRA from a file that says no_peft, as the original's files may, and say so."""
    files = [given for source, given in sources.items() if source != COMMAND_LINE]
    if values.get("use_peft") or not any(given.get("no_peft") for given in files):
        return []
    idle = [name for name in OF_LORA if values.get(name) is not None]
    idle += ["merge_adapter_with_base"] if values.get("merge_adapter_with_base") else []
    idle = [name for name in idle if name not in sources[COMMAND_LINE]]
    for name in idle:
        del values[name]
    return [f"{', '.join(idle)} of the config file: no effect with no_peft"] if idle else []


def _switch_words(values: dict[str, Any]) -> list[str]:
    """Notes on words in mappings that are text there, and that an option would read as true or false."""
    notes = []
    for name, value in values.items():
        waiting = [value] if isinstance(value, dict) else []
        while waiting:
            value = waiting.pop()
            if isinstance(value, (dict, list)):
                waiting += value.values() if isinstance(value, dict) else value
            elif isinstance(value, str) and len(value) > 1 and value.lower() in TRUTH:
                notes.append(f"{name}: {value!r} is text in a mapping; a switch there is true or false")
    return notes


def _given(kind: type, values: dict[str, Any]) -> Any:
    """A config of this kind; `None` where no option of it is given."""
    given = {f.name: values[f.name] for f in fields(kind) if values.get(f.name) is not None}
    return kind(**given) if given else None


def _protection(values: dict[str, Any], networks: FunctionalNetworkConfig | None) -> ProtectionConfig | None:
    """The directions in which what trains answers as before; `None` without `protect`."""
    if values.get("forgetting") is not None and values.get("protect") == "none":
        raise FNSFTError(f"forgetting={values['forgetting']} protects, and protect=none does not; drop one of them")
    found = _given(ProtectionConfig, values)
    if found is None or not found.is_on:
        return None
    if found.protect == "networks" and found.protect_basis is None and networks is None:
        raise FNSFTError(
            "protect=networks needs a template: give protect_basis, or train with networks (ica_template_path)"
        )
    return found


def _check_presence(values: dict[str, Any]) -> None:
    if not values.get("model_name_or_path"):
        raise FNSFTError("model_name_or_path is missing; give a Hub id, a directory, or `embedded`")
    if not values.get("dataset_name") and not values.get("datasets"):
        raise FNSFTError("there is no dataset; give dataset_name (a Hub id or a file) or datasets (a mixture)")
    if values.get("output_dir") == "":
        raise FNSFTError("output_dir is empty; name a directory (. is this one), or leave it out")


def _network_options(values: dict[str, Any], sources: dict[str, dict], notes: list[str]) -> dict[str, Any]:
    """The options of FunctionalNetworkConfig, none for plain fine-tuning; settles whether LoRA trains."""
    networks = {name: values[name] for name in FunctionalNetworkConfig.field_names() if values.get(name) is not None}
    if _is_original(sources):
        networks = _read_as_the_original(values, networks, notes)
    no_peft = any(given.get("no_peft") for given in sources.values()) and not values.get("use_peft")
    if not networks or not no_peft:
        return networks
    if networks.get("train_method", "auto") not in ("auto", "full"):
        raise FNSFTError(
            f"no_peft and train_method={networks['train_method']} contradict each other; drop one of them"
        )
    return {**networks, "train_method": "full"}


def _is_original(sources: dict[str, dict[str, Any]]) -> bool:
    """Whether this is a command of the original: the first source that names a dataset does it in its way."""
    for given in sources.values():
        if given.get("dataset_name") or given.get("datasets"):
            return False
        if given.get("dataset_name_or_path"):
            return True
    return False


def _read_as_the_original(values: dict[str, Any], networks: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """LoRA unless something else is asked for, and no networks without a mask. Returns the network options."""
    if values.get("use_peft") is None and networks.get("train_method", "auto") in ("auto", "lora"):
        values["use_peft"] = True
        notes.append("LoRA trains, as in the original project; no_peft switches it off")
    if networks.get("ica_template_path") and (idle := [name for name in DISCOVERY_NAMES if name in networks]):
        notes.append(f"no effect with ica_template_path, as in the original project: {', '.join(idle)}")
        networks = {name: value for name, value in networks.items() if name not in idle}
    if not networks or networks.get("mask_mode") or not set(networks) <= NETWORK_NAMES:
        return networks
    notes.append(
        f"no effect without a mask_mode, as in the original project: {', '.join(networks)}; this is plain "
        "fine-tuning (train_neurons: selected trains networks without a mask)"
    )
    return {}


def _check_effects(options: TrainOptions) -> None:
    """What is asked for must be able to have an effect."""
    values = options.values
    for name in ("load_in_4bit", "load_in_8bit"):
        if values.get(name) and not options.has_adapter:
            raise FNSFTError(f"{name} freezes the model's weights, which are to train; add use_peft, or drop it")
    if values.get("merge_adapter_with_base") and not options.has_adapter:
        raise FNSFTError("merge_adapter_with_base has nothing to merge, since no adapter trains; drop it")
    if values.get("adapter_name_or_path"):
        if not options.has_adapter:
            raise FNSFTError(
                "adapter_name_or_path is to be trained on, and no adapter trains; add use_peft, or drop it"
            )
        if idle := [name for name in OF_LORA if values.get(name) is not None]:
            raise FNSFTError(f"{idle[0]} has no effect on adapter_name_or_path, which has its own; drop one of them")
    if values.get("ica_template_output") and options.network_config is None:
        raise FNSFTError("ica_template_output has no template to save in plain fine-tuning; drop it")
    for name, switch in _NEEDS.items():
        if values.get(name) is not None and values.get(switch) is None:
            raise FNSFTError(f"{name} has no effect without {switch}; add it, or drop {name}")
    if values.get("convert_to_gguf"):
        check_outtype(values.get("gguf_quantization", "auto"))
        find_converter()
