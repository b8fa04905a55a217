"""The package on whatever accelerator there is, else on the CPU: the same invariants, as no other test uses one.

On a GPU: `CUBLAS_WORKSPACE_CONFIG=:4096:8 python -m pytest tests/test_accelerator.py`.
"""

import copy
import json
import shutil

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import parse_flag_from_env
from datasets import Dataset
from helpers import (
    VOCABULARY,
    assert_only_these_changed,
    changed_entries,
    logits,
    medium_experts,
    medium_model,
    random_mask,
    sft_config,
    state,
    tiny_model,
    tiny_rows,
)
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fnsft_trl import (
    EvaluationConfig,
    EvaluationData,
    FNSFTTrainer,
    FunctionalNetworkConfig,
    NeuronTunerConfig,
    ProbeConfig,
    ProbeData,
    ProtectionConfig,
    amplify,
    discover_networks,
    find_neuron_sites,
    lesion,
    preserve,
    probe_networks,
    to_baked,
    to_merged,
    verify_merge,
)
from fnsft_trl.cli import main
from fnsft_trl.discovery.directions import KeptDirections, KeptText
from fnsft_trl.discovery.matching import match_components
from fnsft_trl.evaluation.metrics import model_inputs
from fnsft_trl.evaluation.retention import RetentionText
from fnsft_trl.evaluation.series import RetentionSeries
from fnsft_trl.export import changed_neurons
from fnsft_trl.interventions import Zero
from fnsft_trl.probes.prefix import SharedPrefix
from fnsft_trl.probes.switch import Switch


ROWS = Dataset.from_list(tiny_rows())
TEXTS = [row["prompt"] + row["completion"] for row in tiny_rows()]
IDS = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
DISCOVERY = FunctionalNetworkConfig(
    ica_components=3, ica_rank=16, ica_max_tokens=250, ica_batch_size=2, ica_max_length=32, ica_percentile=80
)
EXACT = 1e-6  # ||D U|| / ||D|| in float32
MERGED = 2.0**-23  # ||(W' - W) U|| / ||W|| of a weight that trains whole
HALF = {"ica_fraction": 0.5}
SOME = {**HALF, "train_neurons": "selected"}
# way -> what FNSFTTrainer is given
WAYS = {
    "neuron deltas": {"network_config": {**SOME, "train_method": "neuron_delta"}},
    "LoRA": {"network_config": {**SOME, "train_method": "lora"}, "peft_config": {"r": 4}},
    "full, some neurons": {"network_config": {**SOME, "train_method": "full"}},
    "full, under a lesion": {"network_config": {"mask_mode": "lesion", "train_method": "full", **HALF}},
    "full, under a preserve": {"network_config": {"mask_mode": "preserve", "train_method": "full", **HALF}},
}
HELD = ("neuron deltas", "LoRA", "full, some neurons")
MASKS = {
    "lesion": lesion,
    "preserve": preserve,
    "preserve of the rest": lambda model, mask: preserve(model, ~mask),
    "preserve of all": lambda model, mask: preserve(model, mask | ~mask),
    "amplify by 0": lambda model, mask: amplify(model, mask, 0.0),
    "amplify by 1": lambda model, mask: amplify(model, mask, 1.0),
    "amplify": lambda model, mask: amplify(model, mask, 2.5),
}


@pytest.fixture(scope="module")
def device():
    """The accelerator, else the CPU. What tests before have made accelerate use is forgotten, and so is this."""

    def forget():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    forget()
    is_there = torch.accelerator.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    yield torch.accelerator.current_accelerator() if is_there else torch.device("cpu")
    forget()


@pytest.fixture(scope="module")
def on_cpu(tokenizer):
    """Networks that were found on the CPU."""
    return discover_networks(tiny_model("llama"), tokenizer, TEXTS, DISCOVERY)


@pytest.fixture
def as_chosen(monkeypatch):
    """Settings of torch, which are put back."""
    precision, is_deterministic = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    cudnn = torch.backends.cudnn.deterministic
    yield
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(is_deterministic)
    torch.backends.cudnn.deterministic = cudnn


def trainer_of(way, template, directory, tokenizer, device, *, model=None, lora=None, protection=None, **changes):
    arguments = WAYS[way]
    lora = {**arguments.get("peft_config", {}), **(lora or {})}
    settings = {"max_steps": 6, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
    return FNSFTTrainer(
        model=tiny_model("llama") if model is None else model,
        args=sft_config(directory, use_cpu=device.type == "cpu", **settings | changes),
        train_dataset=ROWS,
        processing_class=tokenizer,
        peft_config=LoraConfig(**lora) if lora else None,
        network_config=FunctionalNetworkConfig(**arguments["network_config"]),
        network_template=template,
        protection=protection,
    )


def weights(model):
    """What it comes to without an adapter."""
    if isinstance(model, PeftModel):
        model = copy.deepcopy(model).merge_and_unload()
    return state(model)


def frozen(model):
    """All parameters that do not train, on the CPU."""
    return {name: p.data.to("cpu", copy=True) for name, p in model.named_parameters() if not p.requires_grad}


def train(trainer, device):
    """Train, check what no training may break, and give the weights before and after it."""
    assert trainer.args.optim == "adamw_torch_fused"
    assert {p.device.type for p in trainer.model.parameters()} == {device.type}
    before, kept = weights(trainer.model), frozen(trainer.model)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert changed_entries(kept, frozen(trainer.model)) == {}
    return before, weights(trainer.model)


def near(found, expected, tolerance=1e-4):
    """Whether numbers are the same up to rounding, beside the largest of them."""
    expected = expected.cpu()
    return (found.cpu() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("way", WAYS)
def test_what_is_frozen_keeps_its_bits_and_the_loss_falls(way, device, on_cpu, tokenizer, tmp_path):
    trainer = trainer_of(way, on_cpu, tmp_path, tokenizer, device)
    before, after = train(trainer, device)
    changed, others = changed_neurons(find_neuron_sites(tiny_model("llama")), before, after)
    assert changed == trainer.trainable_neurons
    assert 0 < changed.fraction < 1
    assert bool(others) == (way == "full, under a lesion")  # which trains all but the neurons


@pytest.mark.parametrize("way", HELD)
def test_in_half_precision_and_with_checkpointed_activations_too(way, device, on_cpu, tokenizer, tmp_path):
    trainer = trainer_of(way, on_cpu, tmp_path, tokenizer, device, bf16=True, gradient_checkpointing=True)
    before, after = train(trainer, device)
    changed, others = changed_neurons(find_neuron_sites(tiny_model("llama")), before, after)
    assert others == []
    assert changed.count
    assert not (changed & ~trainer.trainable_neurons).count
    assert trainer._run.guard.checked == 6


@pytest.mark.parametrize("method", ["neuron_delta", "lora"])
def test_neurons_of_experts_train_alone(method, device, tokenizer, tmp_path):
    model = medium_experts()
    template = discover_networks(model.to(device), tokenizer, TEXTS, DISCOVERY)
    way = {"neuron_delta": "neuron deltas", "lora": "LoRA"}[method]
    trainer = trainer_of(way, template, tmp_path, tokenizer, device, model=model)
    before, after = train(trainer, device)
    changed, others = changed_neurons(find_neuron_sites(medium_experts()), before, after)
    assert others == []
    assert changed.count
    assert not (changed & ~trainer.trainable_neurons).count


@pytest.mark.slow
def test_a_compiled_model_trains_the_same_neurons(device, on_cpu, tokenizer, tmp_path):
    """Compiled by inductor where it can be: on a GPU with a C compiler."""
    backend = "inductor" if device.type == "cuda" and shutil.which("cc") else "aot_eager"
    compiled = {"torch_compile": True, "torch_compile_backend": backend, "pad_to_multiple_of": 32}
    trainer = trainer_of("neuron deltas", on_cpu, tmp_path, tokenizer, device, **compiled)
    before, after = train(trainer, device)
    assert_only_these_changed(before, after, find_neuron_sites(tiny_model("llama")), trainer.trainable_neurons)


@pytest.mark.slow
@pytest.mark.parametrize("way", HELD)
def test_a_resumed_run_equals_the_uninterrupted_one(way, device, on_cpu, tokenizer, tmp_path, as_chosen):
    def make(name):
        settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "full_determinism": True}
        lora = {"lora_dropout": 0.1} if way == "LoRA" else {}
        return trainer_of(way, on_cpu, tmp_path / name, tokenizer, device, lora=lora, **settings)

    whole = make("whole")
    whole.train()
    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert changed_entries(state(whole.model), state(resumed.model)) == {}
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (whole, resumed)]
    assert losses[0] == losses[1]
    assert changed_entries(weights(make("fresh").model), weights(whole.model))


@pytest.mark.parametrize("way", ["neuron deltas", "LoRA"])
def test_what_was_trained_here_is_the_same_everywhere(way, device, on_cpu, model_dir, tokenizer, tmp_path):
    """Reloaded, merged, and baked; on the device bit for bit where the same is computed."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    trainer = trainer_of(way, on_cpu, tmp_path / "run", tokenizer, device, model=model)
    trainer.train()
    trainer.save_model()
    expected, ids = logits(trainer.model.eval(), IDS.to(device)), IDS.to(device)
    assert not near(logits(AutoModelForCausalLM.from_pretrained(model_dir), IDS), expected, 1e-2)
    for place in (torch.device("cpu"), device):
        base = AutoModelForCausalLM.from_pretrained(model_dir).to(place)
        reloaded = PeftModel.from_pretrained(base, tmp_path / "run").eval()
        found = logits(reloaded, IDS.to(place))
        assert torch.equal(found, expected) if place == device else near(found, expected)
        merged = logits(reloaded.merge_and_unload(), IDS.to(place))
        assert near(merged, expected)
    to_merged(tmp_path / "run", tmp_path / "merged", device_map={"": device})
    checked = tmp_path / "run" if way == "neuron deltas" else trainer.trainable_neurons
    assert near(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").to(device), ids), expected)
    verify_merge(model_dir, tmp_path / "merged", checked, device_map={"": device})
    mask = random_mask(tiny_model("llama"), "mlp_intermediate")
    to_baked(tmp_path / "run", tmp_path / "baked", mask)
    with lesion(trainer.model, mask):
        lesioned = logits(trainer.model, ids)
    assert near(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "baked").to(device), ids), lesioned)
    assert not near(lesioned, expected, 1e-2)


def test_the_networks_are_those_of_the_cpu_and_twice_the_same_bytes(device, on_cpu, tokenizer, tmp_path):
    for name in ("once", "again"):
        found = discover_networks(tiny_model("llama").to(device), tokenizer, TEXTS, DISCOVERY)
        found.save_pretrained(tmp_path / name)
    for file in ("config.json", "template.safetensors", "README.md"):
        assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    here, there = (torch.cat([*template.loadings.values()], 1) for template in (found, on_cpu))
    partner, cosine = match_components(here, there)
    assert sorted(partner.tolist()) == [0, 1, 2]
    assert cosine.min() > 0.99
    for layer, mean in on_cpu.mean.items():
        assert near(found.mean[layer], mean)
        assert near(found.rms[layer], on_cpu.rms[layer])


@pytest.mark.parametrize("kind", ["mlp_intermediate", "mlp_output"])
def test_masks_do_what_they_do_on_the_cpu(kind, device):
    model, other, ids = tiny_model("llama").to(device), tiny_model("llama"), IDS.to(device)
    mask = random_mask(model, kind)
    plain, found = logits(model, ids), {}
    for name, put in MASKS.items():
        with put(model, mask):
            found[name] = logits(model, ids)
        with put(other, mask):
            assert near(found[name], logits(other, IDS))
        assert torch.equal(logits(model, ids), plain)
    assert torch.equal(found["lesion"], found["preserve of the rest"])
    assert torch.equal(found["lesion"], found["amplify by 0"])
    assert torch.equal(found["amplify by 1"], plain)
    assert torch.equal(found["preserve of all"], plain)
    assert not near(found["lesion"], plain, 1e-2)


def test_text_is_generated_under_a_mask(device):
    """Token by token with a cache; each is the most probable of a whole pass over those before."""
    model = tiny_model("llama").to(device)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompt = IDS[:, :4].to(device)
    with lesion(model, random_mask(model, "mlp_intermediate", share=0.7)):
        found = model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=True, **settings)
        assert torch.equal(logits(model, found)[:, 3:-1].argmax(-1), found[:, 4:])
    assert not torch.equal(model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings), found)


def test_a_pass_from_the_middle_is_the_whole_pass(device):
    model = tiny_model("llama").to(device)
    inputs = model_inputs([IDS[0].tolist(), IDS[1, :7].tolist()], device)
    mask = random_mask(model, "mlp_intermediate")
    mask = type(mask)({layer: members & (layer == 2) for layer, members in mask.layers.items()})
    with torch.no_grad():
        plain = model(**inputs).logits
        with lesion(model, mask):
            expected = model(**inputs).logits
        with Switch(model, "mlp_intermediate") as switch, SharedPrefix(model) as shared:
            assert torch.equal(shared.whole(inputs), plain)
            switch.set(switch.prepared(mask, Zero()))
            assert torch.equal(shared.run_from(2, inputs), expected)
    assert not near(expected, plain, 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("ablation", ["zero", "resample"])
def test_a_probe_goes_on_where_it_was(ablation, device, on_cpu, tokenizer, tmp_path, monkeypatch):
    model = tiny_model("llama").to(device)
    data = ProbeData.read(
        EvaluationData("text", tiny_rows(8)), tokenizer, EvaluationConfig(), max_tokens=200, max_length=32
    )
    config = ProbeConfig(curves=["lesion"], draws=3, batch_size=4, ablation=ablation)

    def probe(name):
        return probe_networks(model, tokenizer, on_cpu, [data], config, output_dir=tmp_path / name)

    whole, calls, run_from = probe("whole"), [], SharedPrefix.run_from

    def broken(self, layer, inputs):
        calls.append(layer)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return run_from(self, layer, inputs)

    assert whole.shares_prefix
    monkeypatch.setattr(SharedPrefix, "run_from", broken)
    monkeypatch.setattr("fnsft_trl.probes.records._EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        probe("broken")
    verdicts = [[v.to_dict() for v in each.found.verdicts("text")] for each in (whole, probe("broken"))]
    assert verdicts[0] == verdicts[1]
    there = probe_networks(tiny_model("llama"), tokenizer, on_cpu, [data], config, output_dir=tmp_path / "on the CPU")
    for condition in whole.found.of("lesion", selector="networks"):
        found, expected = (each.found.effect("text", condition.key) for each in (whole, there))
        assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ["deltas", "LoRA", "whole"])
def test_retention_is_that_of_the_cpu(kind, device, tokenizer):
    text, values = RetentionText.from_texts(TEXTS, tokenizer, max_tokens=200), []
    for place in (device, torch.device("cpu")):
        model = tiny_model("llama")
        if kind != "whole":
            deltas = NeuronTunerConfig(neurons={"0": "0-9", "1": "0-39"}, task_type="CAUSAL_LM")
            model = get_peft_model(model, deltas if kind == "deltas" else LoraConfig(target_modules=["up_proj"], r=2))
        model.get_output_embeddings().requires_grad_(False)
        series = RetentionSeries(text, batch_size=3, exact=True)
        series.begin(model.to(place))
        assert series.kl_kind == "exact"
        assert series.values["rise"] == pytest.approx(0, abs=1e-5)
        assert series.values["kl"] == pytest.approx(0, abs=1e-5)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator).to(place), alpha=0.2)
        values.append(series.measure(model))
    assert values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-5)
    assert values[0]["kl"] > 0.01


@pytest.fixture(scope="module")
def kept_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "kept.txt"
    path.write_text("\n".join(row["completion"] * 12 for row in tiny_rows(60, seed=5)))
    return path


def test_directions_are_those_of_the_cpu(device):
    sequences = [row.tolist() for row in torch.randint(2, VOCABULARY, (12, 10), generator=torch.manual_seed(0))]
    names = [f"model.layers.{layer}.mlp.{name}" for layer in range(3) for name in ("up_proj", "down_proj")]
    here, there = (
        KeptDirections.find(tiny_model("llama").to(place), names, {"a": KeptText(sequences)}, leading=3, title=None)
        for place in (device, "cpu")
    )
    for found, expected in zip(here.inputs, there.inputs, strict=True):
        difference = found.basis @ found.basis.T - expected.basis @ expected.basis.T  # of the projectors
        assert difference.norm() < 1e-3
        assert near(found.mean, expected.mean)


@pytest.mark.parametrize("way", HELD)
def test_nothing_of_the_change_lies_along_protected_directions(
    way, device, on_cpu, kept_text, tokenizer, tmp_path, as_chosen
):
    """Also where products may be rounded to TF32, as users allow it."""
    torch.set_float32_matmul_precision("high")
    protection = ProtectionConfig(
        protect="subspace", protect_datasets=[f"kept={kept_text}"], protect_tokens=256, protect_dims=4
    )
    trainer = trainer_of(way, on_cpu, tmp_path, tokenizer, device, protection=protection)
    before = weights(trainer.model)
    trainer.train()
    assert trainer.protection.left() <= (MERGED if way.startswith("full") else EXACT)
    torch.set_float32_matmul_precision("highest")  # the merge of a LoRA is a product too
    after = weights(trainer.model)
    changed, others = changed_neurons(find_neuron_sites(tiny_model("llama")), before, after)
    assert others == []
    assert changed == trainer.trainable_neurons
    left = []
    for name in [f"model.layers.{layer}.mlp.{kind}" for layer in range(3) for kind in ("up_proj", "down_proj")]:
        base = before[f"{name}.weight"].double()
        change = after[f"{name}.weight"].double() - base
        left.append(float((change @ trainer.protection.bases.kept.of(name).basis).norm() / base.norm()))
        assert change.norm() > 1e-3 * base.norm()
    assert max(left) <= MERGED


@pytest.fixture(scope="module")
def spread(device, model_dir, tmp_path_factory):
    """A model of which layer 1 lies beside the device: in the memory of the CPU, or on the disk for a CPU."""
    places = ("model.embed_tokens", "model.layers.0", "model.layers.2", "model.norm", "model.rotary_emb", "lm_head")
    place = "cpu" if device.type == "cpu" else 0
    device_map = dict.fromkeys(places, place) | {"model.layers.1": "disk" if device.type == "cpu" else "cpu"}
    folder = str(tmp_path_factory.mktemp("offload"))
    model = AutoModelForCausalLM.from_pretrained(model_dir, device_map=device_map, offload_folder=folder)
    assert {p.device.type for p in model.parameters()} == {device.type, "meta"}
    return model


def test_a_model_that_is_spread_has_the_networks_masks_and_scores_of_one_in_one_place(
    spread, device, model_dir, tokenizer
):
    model, ids = AutoModelForCausalLM.from_pretrained(model_dir).to(device), IDS.to(device)
    found, expected = (discover_networks(each, tokenizer, TEXTS, DISCOVERY) for each in (spread, model))
    for layer, loadings in expected.loadings.items():
        assert torch.equal(found.loadings[layer], loadings)
    mask = random_mask(model, "mlp_intermediate")
    for put in MASKS.values():
        with put(model, mask), put(spread, mask):
            assert torch.equal(logits(spread, ids), logits(model, ids))
    text = RetentionText.from_texts(TEXTS, tokenizer, max_tokens=200)
    assert text.cross_entropy(spread) == text.cross_entropy(model)


def test_lora_beside_a_spread_base_takes_the_same_step(spread, device, model_dir):
    stepped = []
    for base in (spread, AutoModelForCausalLM.from_pretrained(model_dir).to(device)):
        torch.manual_seed(0)
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["up_proj"], layers_to_transform=[0, 2]))
        with lesion(model, random_mask(model, "mlp_intermediate")):
            model(input_ids=IDS.to(device), labels=IDS.to(device)).loss.backward()
        factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
        torch.optim.AdamW(factors.values(), lr=1e-2, fused=True).step()
        stepped.append({name: p.detach().cpu().clone() for name, p in factors.items()})
        model.unload()
    assert changed_entries(*stepped) == {}
    assert any("layers.2" in name and "lora_B" in name and values.any() for name, values in stepped[0].items())


QUANTISED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"load_in_8bit": True},
}


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("way", ["neuron deltas", "LoRA"])
def test_a_quantised_base_trains_and_keeps_its_bits(way, kind, device, medium_template, tokenizer, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    if device.type not in bnb.supported_torch_devices:
        pytest.skip(f"bitsandbytes holds no quantised weights on {device.type}")
    medium_model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(**QUANTISED[kind]), device_map={"": device}
    )
    trainer = trainer_of(way, medium_template, tmp_path, tokenizer, device, model=model)
    kept = frozen(trainer.model)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert changed_entries(kept, frozen(trainer.model)) == {}
    assert sum(values.dtype in (torch.uint8, torch.int8) for values in kept.values()) >= 14


def test_the_command_says_and_takes_the_device(device, model_dir, on_cpu, tokenizer, tmp_path, capsys, log):
    assert main(["env"]) == 0
    told = dict(line.removeprefix("- ").split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert told["device of training"] == device.type
    if device.type == "cpu":
        assert told["mixed precision"] == "no"
    else:
        assert told["accelerators"].startswith(f"{torch.accelerator.device_count()} of type {device.type}")
    if device.type == "cuda":
        assert torch.cuda.get_device_name(0) in told["accelerators"]
    on_cpu.save_pretrained(tmp_path / "template")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in tiny_rows(24)))
    recipe = {
        "model_name_or_path": str(model_dir),
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "train_method": "neuron_delta",
        "ica_template_path": str(tmp_path / "template"),
        "ica_fraction": 0.5,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "max_length": 32,
        "report_to": "none",
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 0
    assert f"device: {device.type}; mixed precision: {told['mixed precision']};" in log.text
    args = torch.load(tmp_path / "run" / "training_args.bin", weights_only=False)
    assert (args.bf16, args.fp16) == (told["mixed precision"] == "bf16", told["mixed precision"] == "fp16")
    words = ["--data", str(tmp_path / "rows.jsonl"), "--retention_datasets", f"kept={tmp_path / 'rows.jsonl'}"]
    words += ["--bootstrap_draws", "100", "--base", "--output_dir", str(tmp_path / "report")]
    assert main(["evaluate", str(tmp_path / "run"), *words]) == 0
    scores = json.loads((tmp_path / "report" / "results.json").read_text())["scores"]
    assert scores["run"]["rows/nll"]["value"] < scores["base"]["rows/nll"]["value"]
    assert scores["run"]["retention/kept/kl"]["value"] > 0


@pytest.mark.slow
def test_a_lora_of_the_device_is_restored(device, model_dir, kept_text, tokenizer, tmp_path):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_dir),
        LoraConfig(r=4, target_modules=["up_proj", "down_proj", "q_proj"], task_type="CAUSAL_LM"),
    ).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2, fused=True)
    for _ in range(10):
        model(input_ids=IDS.to(device), labels=IDS.to(device)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "lora")
    tokenizer.save_pretrained(tmp_path / "lora")
    words = ["--keep", f"kept={kept_text}", "--keep_tokens", "200", "--score_tokens", "150", "--leading", "2"]
    words += ["--batch_size", "4", "--output_dir", str(tmp_path / "restored")]
    assert main(["restore", str(tmp_path / "lora"), *words]) == 0
    ways = json.loads((tmp_path / "restored" / "results.json").read_text())["ways"]
    assert all(way["residual"] <= EXACT for way in ways if way["directions"])
    assert min(way["mean_kl"] for way in ways) < ways[0]["mean_kl"]
