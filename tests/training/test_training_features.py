"""Every training feature of SFTTrainer with each of the three ways to train, and the artefacts in a fresh process."""

import json
from dataclasses import dataclass, field
from importlib.util import find_spec

import pytest
import torch
from datasets import Dataset
from helpers import ROOT, assert_only_these_changed, medium_model, sft_config, state, tiny_tokenizer
from peft import LoraConfig
from processes import run_python

from fnsft_trl import FNSFTError, FNSFTTrainer, FunctionalNetworkConfig, find_neuron_sites
from fnsft_trl.constraints import FrozenSlices
from fnsft_trl.constraints.frozen import FrozenSlice
from fnsft_trl.tuner import NeuronTunerConfig


METHODS = ("neuron_delta", "lora", "full")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<eos>"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)
QUICK = ("prompt and completion", "`packing`, `bfd`", "weights in bfloat16")
COMPILED = {"torch_compile": True, "pad_to_multiple_of": 32}  # batches of one length are compiled once
EVALUATION = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


@dataclass
class Feature:
    """One row of the table: arguments of SFTConfig, and what else the run needs."""

    args: dict = field(default_factory=dict)
    data: str = "prompts"
    dtype: torch.dtype = torch.float32
    network: dict = field(default_factory=dict)
    needs: str | None = None
    resume: bool = False
    control: bool = False


FEATURES = {
    "prompt and completion": Feature(control=True),
    "text": Feature(data="text"),
    "streamed data": Feature(data="streamed"),
    "`packing`, `bfd`": Feature({"packing": True, "packing_strategy": "bfd", "max_length": 48}, control=True),
    "`packing`, `bfd_split`": Feature({"packing": True, "packing_strategy": "bfd_split", "max_length": 48}),
    "`packing`, `wrapped`": Feature({"packing": True, "packing_strategy": "wrapped", "max_length": 48}),
    "`padding_free`": Feature({"padding_free": True, "max_length": None}, control=True),
    "`completion_only_loss: false`": Feature({"completion_only_loss": False}),
    "`assistant_only_loss`": Feature({"assistant_only_loss": True, "max_length": 64}, data="chats", control=True),
    "`loss_type: dft`": Feature({"loss_type": "dft"}),
    "accumulation and clipping": Feature({"gradient_accumulation_steps": 2, "max_grad_norm": 0.1}),
    "`gradient_checkpointing`, not reentrant": Feature(
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}, control=True
    ),
    "`gradient_checkpointing`, reentrant": Feature(
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, control=True
    ),
    "`torch_compile`, `aot_eager`": Feature({**COMPILED, "torch_compile_backend": "aot_eager"}),
    "`torch_compile`, `inductor`": Feature(
        {**COMPILED, "torch_compile_backend": "inductor"}, network={"mask_mode": "preserve"}
    ),
    "`bf16`": Feature({"bf16": True}),
    "weights in bfloat16": Feature({"bf16": True}, dtype=torch.bfloat16, control=True),
    "`neftune_noise_alpha`": Feature({"neftune_noise_alpha": 5}),
    "`optim: adamw_8bit`": Feature({"optim": "adamw_8bit"}, needs="bitsandbytes", control=True),
    "`optim: paged_adamw_8bit`": Feature({"optim": "paged_adamw_8bit"}, needs="bitsandbytes"),
    "`activation_offloading`": Feature({"activation_offloading": True}),
    "`mask_mode: preserve`": Feature(network={"mask_mode": "preserve"}, control=True),
    "`mask_mode: amplify`": Feature(network={"mask_mode": "amplify", "mask_factor": 2.0}),
    "`eval_strategy`": Feature({"eval_strategy": "steps", "eval_steps": 1}),
    "`load_best_model_at_end`": Feature({**EVALUATION, "load_best_model_at_end": True}, control=True),
    "resume": Feature({"save_strategy": "steps", "save_steps": 1}, resume=True),
    "`use_liger_kernel`": Feature({"use_liger_kernel": True}, needs="liger_kernel"),
}
# (feature, method) -> the reason why it cannot be, on a machine with a CPU only.
REFUSED = {
    ("`activation_offloading`", method): "it moves activations from an accelerator, and there is none"
    for method in METHODS
}
# (feature, method) -> what is tested in its place: all else is every feature with every method.
INSTEAD = {("`torch_compile`, `inductor`", method): "tested with `aot_eager`" for method in ("lora", "full")}


def table() -> str:
    lines = [f"| feature | {' | '.join(f'`{method}`' for method in METHODS)} |", "|---|---|---|---|"]
    for name, feature in FEATURES.items():
        fallback = f"not tested: needs {feature.needs}" if feature.needs not in (None, "bitsandbytes") else "exact"
        refused = [REFUSED.get((name, method)) for method in METHODS]
        cells = [
            f"refused on a CPU: {reason}" if reason else INSTEAD.get((name, method), fallback)
            for method, reason in zip(METHODS, refused, strict=True)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_table_in_the_docs_is_this_one():
    assert table() in (ROOT / "docs" / "combinations.md").read_text()


def dataset(kind, rows):
    if kind == "text":
        return Dataset.from_list([{"text": row["prompt"] + row["completion"]} for row in rows])
    if kind == "chats":
        turns = [
            [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}] for r in rows
        ]
        return Dataset.from_list([{"messages": messages} for messages in turns])
    data = Dataset.from_list(rows)
    return data.to_iterable_dataset() if kind == "streamed" else data


def make(directory, feature, method, rows, tokenizer, template, **network):
    if feature.data == "chats":
        tokenizer.chat_template = CHAT_TEMPLATE
    data = dataset(feature.data, rows)
    return FNSFTTrainer(
        model=medium_model(feature.dtype),
        args=sft_config(directory, **{"max_steps": 3, **feature.args}),
        train_dataset=data,
        eval_dataset=Dataset.from_list(rows[:4]) if "eval_strategy" in feature.args else None,
        processing_class=tokenizer,
        # Of rank 64, factors are wide enough for optimizer state in 8 bits.
        peft_config=LoraConfig(r=64, lora_dropout=0.1) if method == "lora" else None,
        network_config=FunctionalNetworkConfig(
            train_method=method, ica_select="random", ica_fraction=0.5, **feature.network, **network
        ),
        network_template=template,
    )


def cells(chosen=FEATURES):
    for name, feature in chosen.items():
        marks = [] if name in QUICK else [pytest.mark.slow]
        if feature.needs is not None:
            marks.append(pytest.mark.skipif(find_spec(feature.needs) is None, reason=f"needs {feature.needs}"))
        for method in METHODS:
            if (name, method) not in REFUSED | INSTEAD:
                yield pytest.param(name, method, id=f"{name}-{method}", marks=marks)


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory):
    """Where the trained models are saved, and the neurons that each was to change."""
    root = tmp_path_factory.mktemp("features")
    for dtype in ("float32", "bfloat16"):
        medium_model(getattr(torch, dtype)).save_pretrained(root / f"base-{dtype}")
    return root, {}


@pytest.fixture
def a_tokenizer():
    """One of its own for each test, since some change its chat template."""
    return tiny_tokenizer()


@pytest.mark.parametrize(("name", "method"), cells())
def test_what_trains_is_what_was_selected(name, method, artefacts, medium_template, rows, a_tokenizer, tmp_path):
    feature = FEATURES[name]
    trainer = make(tmp_path, feature, method, rows, a_tokenizer, medium_template)
    assert trainer.trainable_neurons.fraction == 0.5
    trainer.train()
    if feature.resume:
        trainer = make(tmp_path, feature, method, rows, a_tokenizer, medium_template)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 3
    assert all(entry["grad_norm"] > 0 for entry in trainer.state.log_history if "grad_norm" in entry)
    if "8bit" in trainer.args.optim:
        states = [value for entries in trainer.optimizer.state.values() for value in entries.values()]
        assert any(value.dtype == torch.uint8 for value in states if torch.is_tensor(value))

    root, saved = artefacts
    trainer.save_model(root / str(len(saved)))
    saved[str(len(saved))] = (f"{name}-{method}", feature.dtype, trainer.trainable_neurons)
    after = state(trainer.model if method == "full" else trainer.model.merge_and_unload())
    base = medium_model(feature.dtype)
    assert_only_these_changed(state(base), after, find_neuron_sites(base), trainer.trainable_neurons)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
@pytest.mark.parametrize(("name", "method"), REFUSED)
def test_what_cannot_be_is_refused_before_the_first_step(name, method, medium_template, rows, a_tokenizer, tmp_path):
    with pytest.raises(FNSFTError, match=REFUSED[name, method].removeprefix("it ")):
        make(tmp_path / "out", FEATURES[name], method, rows, a_tokenizer, medium_template)
    assert not (tmp_path / "out").exists()


RELOAD = """
import json, sys
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM
import fnsft_trl.tuner
from fnsft_trl import find_neuron_sites
from fnsft_trl.export import changed_neurons

root, results = Path(sys.argv[1]), {}
for name, dtype in json.loads(sys.argv[2]).items():
    base = AutoModelForCausalLM.from_pretrained(root / f"base-{dtype}", dtype=dtype)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    if (root / name / "adapter_config.json").exists():
        model = PeftModel.from_pretrained(base, root / name).merge_and_unload()
    else:
        model = AutoModelForCausalLM.from_pretrained(root / name, dtype=dtype)
    changed, others = changed_neurons(find_neuron_sites(model), before, model.state_dict())
    results[name] = [changed.sha256, others]
print(json.dumps(results))
"""


@pytest.mark.slow
def test_the_saved_models_hold_the_same_in_a_fresh_process(artefacts):
    root, saved = artefacts
    if not saved:
        pytest.skip("no model was trained in this run")
    dtypes = json.dumps({name: str(dtype).removeprefix("torch.") for name, (_, dtype, _) in saved.items()})
    done = run_python("-c", RELOAD, root, dtypes)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.strip().splitlines()[-1])
    wrong = [cell for name, (cell, _, trainable) in saved.items() if results[name] != [trainable.sha256, []]]
    assert wrong == []


def switch_off(method, monkeypatch):
    """Take away what holds the frozen neurons."""
    if method == "full":
        monkeypatch.setattr(FrozenSlices, "freeze_neurons", lambda *_, **__: None)
    elif method == "lora":
        monkeypatch.setattr("fnsft_trl.training.ways.constrain_lora", lambda *_, **__: None)
    else:
        everything = {"0": "0-127", "1": "0-127"}
        monkeypatch.setattr(
            "fnsft_trl.training.ways.NeuronTunerConfig",
            lambda **given: NeuronTunerConfig(**{**given, "neurons": everything}),
        )


# Under a forward mask the silenced neurons get no gradient, so that there the mask alone can hold them.
CONTROLS = {name: feature for name, feature in FEATURES.items() if feature.control and not feature.network}


@pytest.mark.parametrize(("name", "method"), cells(CONTROLS))
def test_without_the_mechanism_the_same_check_fails(
    name, method, medium_template, rows, a_tokenizer, tmp_path, monkeypatch
):
    switch_off(method, monkeypatch)
    feature = FEATURES[name]
    trainer = make(tmp_path, feature, method, rows, a_tokenizer, medium_template, frozen_guard=False)
    trainer.train()
    after = state(trainer.model if method == "full" else trainer.model.merge_and_unload())
    base = medium_model(feature.dtype)
    with pytest.raises(AssertionError):
        assert_only_these_changed(state(base), after, find_neuron_sites(base), trainer.trainable_neurons)


def test_an_optimizer_in_8_bits_moves_zeros_of_lora_that_are_not_put_back(
    medium_template, rows, a_tokenizer, tmp_path, monkeypatch
):
    """Without a gradient, without weight decay."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(FrozenSlices, "restore", lambda self: None)
    monkeypatch.setattr(FrozenSlice, "note", lambda self: None)  # nor found to be written
    feature = Feature({"optim": "adamw_8bit", "weight_decay": 0.0})
    trainer = make(tmp_path, feature, "lora", rows, a_tokenizer, medium_template, frozen_guard=False)
    frozen = (~trainer.trainable_neurons).indices(0)
    factor = trainer.model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").lora_B["default"].weight
    assert not factor[frozen].any()
    trainer.train()
    assert factor[frozen].any()
