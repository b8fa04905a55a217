"""fnsft restore: any fine-tune, taken back along the directions of texts to keep, as the same kind of artefact."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from helpers import ROOT, offloading, tiny_rows
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from fnsft_trl import FunctionalNetworkConfig, NeuronTunerConfig, discover_networks, select_neurons
from fnsft_trl.cli import main, restoring_run


MLP = ["gate_proj", "up_proj", "down_proj"]
SMALL = ["--keep_tokens", "200", "--score_tokens", "150", "--leading", "2", "4", "--batch_size", "4"]
TASK = ["--template_format", "basic", "--prompt_template", "{instruction}{response}"]


def written(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def taught(model, tokenizer, steps=40, learning_rate=2e-2):
    """A model after some steps on the rows of the task."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    texts = [row["prompt"] + row["completion"] + "<eos>" for row in tiny_rows(24)]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model.train()
    for _ in range(steps):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def lora(model_dir, **changes):
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": [*MLP, "q_proj", "o_proj"], "task_type": "CAUSAL_LM"}
    return get_peft_model(base, LoraConfig(**{**settings, **changes}))


def saved(model, tokenizer, directory):
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def place(tmp_path_factory, model_dir, tokenizer):
    """A folder with a LoRA that plain PEFT made, neuron deltas and a full fine-tune; the task; and texts to keep."""
    root = tmp_path_factory.mktemp("restore")
    saved(taught(lora(model_dir), tokenizer), tokenizer, root / "lora")
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    neurons = {"0": "0-29", "1": "5-34", "2": "10-39"}
    beside = {"r": 2, "target_modules": ["q_proj"]}
    deltas = get_peft_model(base, NeuronTunerConfig(neurons=neurons, lora=beside, task_type="CAUSAL_LM"))
    saved(taught(deltas, tokenizer), tokenizer, root / "deltas")
    full = AutoModelForCausalLM.from_pretrained(model_dir)
    saved(taught(full, tokenizer, learning_rate=3e-3), tokenizer, root / "full")
    written(root / "task.jsonl", tiny_rows(24))
    for name, seed in (("first", 5), ("second", 6)):
        texts = [{"text": f"{row['prompt']}{row['completion']}\n" * 6} for row in tiny_rows(30, seed=seed)]
        written(root / f"{name}.jsonl", texts)
    return root


def restore(place, *words, output="restored", with_task=True):
    texts = [f"{name}={place / name}.jsonl" for name in ("first", "second")]
    task = ["--task", str(place / "task.jsonl"), *TASK] if with_task else []
    words = [*map(str, words), "--keep", *texts, *task, *SMALL, "--output_dir", str(place / output)]
    assert main(["restore", *words]) == 0
    return json.loads((place / output / "results.json").read_text())


def refused(capsys, *words):
    assert main(["restore", *map(str, words)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    return line


def digests(directory):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.rglob("*")) if p.is_file()}


def first_inputs(model, module, tokenizer, place):
    """The inputs of a module at position 0, of the texts to keep."""
    found = []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda _, args: found.append(args[0][0, 0]))
    for name in ("first", "second"):
        for line in (place / f"{name}.jsonl").read_text().splitlines():
            with torch.no_grad():
                model(torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"][:4]]))
    handle.remove()
    return torch.stack(found)


def test_the_ways_are_scored_and_the_one_of_least_kl_within_the_tolerance_is_written(place, capsys):
    before = digests(place / "lora")
    found = restore(place, place / "lora", "--tolerance", "0.3")
    ways = {way["name"]: way for way in found["ways"]}
    names = ["as trained", "scaled by 0.7", "scaled by 0.5", "off position 0", "off position 0, mean"]
    names += ["off position 0, mean, 2 leading", "off position 0, mean, 4 leading", "off position 0, centred"]
    assert list(ways)[:8] == names
    trained, base = ways["as trained"], found["base"]
    assert base["mean_kl"] == 0
    assert base["task_loss"] > trained["task_loss"] + 0.5
    assert min(trained["kl"].values()) > 0.01
    limit = trained["task_loss"] + 0.3 * (base["task_loss"] - trained["task_loss"])
    assert found["limits"]["loss"] == pytest.approx(limit)
    within = [way for way in ways.values() if way["task_loss"] <= limit and not way["is_centred"]]
    exact = found["limits"]["exact"] or 2
    within = [way for way in within if way["exact_match"] >= exact and way is not trained] or within
    assert found["chosen"] == min(within, key=lambda way: way["mean_kl"])["name"] != "as trained"
    for way in ways.values():
        assert way["mean_kl"] == pytest.approx(sum(way["kl"].values()) / 2)
        if way["directions"]:
            assert way["residual"] <= 1e-6
    assert all(0 < share < 1 for shares in found["energy"].values() for share in shares.values())
    assert set(found["energy"]) == {"first", "second", "task"}
    assert {"report.md", "report.html", "tradeoff.png"} <= {path.name for path in (place / "restored").iterdir()}
    assert digests(place / "lora") == before
    printed = capsys.readouterr().out
    assert f"Chosen: {found['chosen']} (the least KL within 30% of the gain: task loss at most {limit:.4f}" in printed


@pytest.mark.slow
def test_a_restored_lora_is_a_plain_one_of_the_same_rank_that_answers_position_0_no_more(place, model_dir, tokenizer):
    restore(place, place / "lora", "--choose", "off position 0", output="sink")
    code = (
        "import sys, torch; from peft import PeftModel; from transformers import AutoModelForCausalLM as M\n"
        f"model = PeftModel.from_pretrained(M.from_pretrained({str(model_dir)!r}), {str(place / 'sink')!r})\n"
        "assert 'fnsft_trl' not in sys.modules\n"
        "print(model(torch.arange(2, 12)[None]).logits.double().sum().item())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    vectors = {
        name: first_inputs(base, name, tokenizer, place).mean(0)
        for name in ("model.layers.1.mlp.down_proj", "model.layers.2.self_attn.q_proj")
    }
    models = [
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), place / name)
        for name in ("sink", "lora")
    ]
    with torch.no_grad():
        assert float(printed) == pytest.approx(models[0](torch.arange(2, 12)[None]).logits.double().sum().item())
    for name, vector in vectors.items():
        restored, trained = (model.get_base_model().get_submodule(name) for model in models)
        assert restored.r == trained.r
        sizes = [
            float((layer.lora_B["default"].weight @ layer.lora_A["default"].weight @ vector).norm())
            for layer in (restored, trained)
        ]
        assert sizes[0] < 1e-5 * sizes[1]  # all texts begin with one token, so all passages give the same vector


@pytest.mark.parametrize("kind", ["deltas", "full"])
def test_deltas_and_full_fine_tunes_are_written_as_what_they_are(place, model_dir, tokenizer, kind):
    more = ["--base", model_dir] if kind == "full" else []
    found = restore(place, place / kind, *more, "--choose", "off position 0, mean, 2 leading", output=f"off-{kind}")
    way = next(way for way in found["ways"] if way["name"] == found["chosen"])
    trained = found["ways"][0]
    assert way["residual"] <= 1e-6
    assert way["mean_kl"] < trained["mean_kl"]
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    ids = torch.tensor([[5, 9, 30, 2, 17, 44]])
    if kind == "deltas":
        model = PeftModel.from_pretrained(base, place / "off-deltas")
        assert isinstance(model.peft_config["default"], NeuronTunerConfig)
    else:
        model = AutoModelForCausalLM.from_pretrained(place / "off-full")
        assert torch.equal(model.model.norm.weight, base.model.norm.weight)
        name = "model.layers.1.mlp.down_proj"
        weights = [each.get_submodule(name).weight.detach().double() for each in (base, model)]
        vector = first_inputs(base, name, tokenizer, place).mean(0).double()
        along = (weights[1] - weights[0]) @ (vector / vector.norm())
        assert along.norm() <= 2.0**-23 * weights[0].norm()
        assert (weights[1] - weights[0]).norm() > 1e-3 * weights[0].norm()
        assert found["base_values"] > 0
        assert AutoTokenizer.from_pretrained(place / "off-full").chat_template
    with torch.no_grad():
        original = AutoModelForCausalLM.from_pretrained(model_dir)(ids).logits
        assert not torch.allclose(model(ids).logits, original, atol=1e-3)


def test_without_a_task_the_energy_chooses_and_it_is_said_that_nothing_was_measured(place, capsys):
    found = restore(place, place / "lora", "--energy", "0.5", output="energy", with_task=False)
    shares = {m: sum(text[m] for text in found["energy"].values()) / 2 for m in found["energy"]["first"]}
    enough = next(m for m, share in shares.items() if share >= 0.5)
    chosen = next(way for way in found["ways"] if way["name"] == found["chosen"])
    assert str(chosen["directions"]) == enough
    assert found["nothing_measured_on_task"]
    assert "Nothing was measured on the task" in capsys.readouterr().out
    assert "Nothing was measured on the task" in (place / "energy" / "report.md").read_text()


def test_only_the_layers_that_are_named_are_restored(place, model_dir):
    way = "off position 0, mean"
    restore(place, place / "lora", "--layers", "1-2", "--choose", way, output="layers", with_task=False)
    states = [
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), place / name).state_dict()
        for name in ("lora", "layers")
    ]
    changed = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    assert changed == {name for name in states[0] if "lora_A" in name and ".layers.0." not in name}


def test_a_centred_lora_loads_in_peft_too(place, model_dir):
    found = restore(place, place / "lora", "--choose", "off position 0, centred", output="centred")
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    model = PeftModel.from_pretrained(base, place / "centred")
    layer = model.get_base_model().get_submodule("model.layers.0.mlp.down_proj")
    assert layer.lora_B["default"].bias.abs().max() > 0
    ways = {way["name"]: way for way in found["ways"]}
    assert ways["off position 0, centred"]["mean_kl"] < ways["as trained"]["mean_kl"]


def test_by_network_their_directions_are_taken_out_or_their_own_neurons_scaled(place, model_dir, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    texts = [json.loads(line)["text"] for line in (place / "first.jsonl").read_text().splitlines()]
    config = FunctionalNetworkConfig(ica_components=3, ica_rank=8, ica_max_tokens=200, ica_max_length=32)
    template = discover_networks(model, tokenizer, texts, config)
    template.save_pretrained(place / "template")
    words = ["--ica_template_path", place / "template", "--ica_component_ids", "0,2"]
    way = "off position 0, mean, networks 0,2"
    found = restore(place, place / "lora", *words, "--choose", way, output="networks", with_task=False)
    assert [each["name"] for each in found["ways"]] == ["as trained", way]
    assert found["ways"][1]["residual"] <= 1e-6
    way = "neurons of networks 0,2 scaled by 0.5"
    restore(place, place / "lora", *words, "--choose", way, output="own", with_task=False)
    trained, off, own = (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), place / name).get_base_model()
        for name in ("lora", "networks", "own")
    )
    mask = select_neurons(template, [0, 2])
    for layer in range(3):
        a = off.model.layers[layer].mlp.down_proj.lora_A["default"].weight
        loadings = template.loadings[layer][[0, 2]]
        assert (loadings @ a.T).norm() < 1e-5 * loadings.norm() * a.norm()
        assert (template.loadings[layer][[1]] @ a.T).norm() > 1e-4 * a.norm() * template.loadings[layer][1].norm()
        factors = 1 - mask.layers[layer].float() / 2
        for name in ("gate_proj", "up_proj", "down_proj"):
            one, other = (
                m.model.layers[layer].mlp.get_submodule(name).get_delta_weight("default") for m in (trained, own)
            )
            assert torch.allclose(other, one * (factors if name == "down_proj" else factors[:, None]), atol=1e-7)
        one, other = (m.model.layers[layer].self_attn.q_proj.get_delta_weight("default") for m in (trained, own))
        assert torch.equal(one, other)


def test_the_lora_of_a_dpo_run(place, model_dir, tokenizer):
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": row["completion"][::-1]}
        for row in tiny_rows(16)
    ]
    arguments = DPOConfig(
        str(place / "dpo"),
        max_steps=4,
        learning_rate=2e-2,
        use_cpu=True,
        bf16=False,
        report_to="none",
        per_device_train_batch_size=4,
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    config = LoraConfig(r=4, target_modules=MLP, task_type="CAUSAL_LM")
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    trainer = DPOTrainer(
        base, args=arguments, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer, peft_config=config
    )
    trainer.train()
    trainer.save_model(str(place / "dpo"))
    found = restore(place, place / "dpo", "--choose", "off position 0, mean", output="off-dpo", with_task=False)
    ways = {way["name"]: way for way in found["ways"]}
    assert ways["off position 0, mean"]["mean_kl"] < ways["as trained"]["mean_kl"]
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), place / "off-dpo")


def test_what_cannot_be_restored_is_refused_by_name(place, model_dir, tokenizer, capsys):
    keep = ["--keep", f"first={place / 'first.jsonl'}", "--output_dir", place / "nothing"]
    variants = {
        "use_dora": ({"use_dora": True}, "DoRA divides by the norm"),
        "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules that were trained as a whole"),
        "bias": ({"bias": "lora_only"}, "trained biases of the base"),
    }
    for name, (changes, reason) in variants.items():
        saved(lora(model_dir, **changes), tokenizer, place / name)
        line = refused(capsys, place / name, *keep)
        assert name in line
        assert reason in line
    line = refused(capsys, place / "full", *keep)
    assert "is a whole model and no adapter; give the model it was tuned from (base)" in line
    assert "equals its base" in refused(capsys, model_dir, "--base", model_dir, *keep)
    assert "layers names 7, where nothing was trained" in refused(capsys, place / "lora", *keep, "--layers", "7")
    channels = ROOT / "tests" / "golden" / "templates" / "3-output"
    line = refused(capsys, place / "lora", *keep, "--ica_template_path", channels)
    assert "the template is of mlp_output; one of neurons (mlp_intermediate) is needed" in line
    assert not (place / "nothing").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--output_dir", "{lora}"], "where {lora} is read from"),
        (["--output_dir", "{lora}/../full"], "which holds files already"),
        (["--keep", "first="], "keep holds 'first=', which names no source"),
        (["--keep_shares", "1", "2"], "one number above 0 was expected for each of first"),
        (["--scales", "1.5"], "each must be at least 0 and below 1"),
        (["--leading", "0"], "each must be from 1 to 1000"),
        (["--tolerance", "0.1"], "tolerance: no effect without task"),
        (["--ica_component_ids", "1"], "no effect without ica_template_path"),
    ],
)
def test_a_call_that_cannot_be_meant_is_refused_before_anything_is_loaded(place, capsys, words, expected):
    lora = str(place / "lora")
    words = [word.format(lora=lora) for word in words]
    given = {"--keep": [f"first={place / 'first.jsonl'}"], "--output_dir": [str(place / "nothing")]}
    given |= {words[0]: words[1:]}
    line = refused(capsys, lora, *(word for name, values in given.items() for word in (name, *values)))
    assert expected.format(lora=lora) in line
    assert not (place / "nothing").exists()


@pytest.mark.parametrize("words", [["--device_map", "auto"], ["--load_in_4bit"], ["--load_in_8bit"]], ids=" ".join)
def test_only_activations_of_the_base_are_needed(place, words):
    output = words[0].strip("-")
    found = restore(place, place / "lora", *words, "--choose", "off position 0, mean", output=output, with_task=False)
    trained, restored = found["ways"]
    assert restored["residual"] <= 1e-6
    assert restored["mean_kl"] < trained["mean_kl"]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_an_offloaded_base_is_refused_by_name(place, model_dir, kind, monkeypatch, capsys):
    given = {"dtype": "float32", **offloading(place)}
    monkeypatch.setattr(restoring_run, "loading_arguments", lambda loading: given)
    words = [place / kind, "--keep", f"first={place / 'first.jsonl'}", *SMALL, "--output_dir", place / "nothing"]
    words += ["--base", model_dir] if kind == "full" else []
    assert "layers.1.self_attn.q_proj.weight is offloaded (device_map)" in refused(capsys, *words)


def test_a_write_that_fails_is_one_line_and_leaves_nothing_behind(place, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    before = sorted(place.iterdir())
    monkeypatch.setattr("fnsft_trl.export.restored.save_file", fail)
    words = ["--keep", f"first={place / 'first.jsonl'}", *SMALL, "--output_dir", str(place / "full-disk")]
    assert "No space left" in refused(capsys, place / "lora", *words)
    assert sorted(place.iterdir()) == before


def test_rows_on_which_nothing_was_learnt_are_refused(place, model_dir, tokenizer, capsys):
    saved(lora(model_dir), tokenizer, place / "untrained")
    words = [place / "untrained", "--keep", f"first={place / 'first.jsonl'}", "--task", place / "task.jsonl", *TASK]
    line = refused(capsys, *words, *SMALL, "--output_dir", place / "nothing")
    assert "nothing was learnt that could be kept" in line
    assert not (place / "nothing").exists()


def test_a_text_of_one_passage_is_cut_into_more(place):
    (place / "single.txt").write_text("Say korima: amirok. " * 10)
    words = ["--keep", f"one={place / 'single.txt'}", *SMALL, "--output_dir", str(place / "single")]
    assert main(["restore", str(place / "lora"), *words]) == 0
