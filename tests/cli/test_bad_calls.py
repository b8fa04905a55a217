"""Five hundred wrong calls, made from seeds: each is refused on one line, before anything is loaded."""

import random
import string
import subprocess
import sys

import pytest
import yaml

from fnsft_trl.cli import VERBS, main
from fnsft_trl.cli.options.parse import training_options
from fnsft_trl.cli.options.schema import TRL, Option
from fnsft_trl.cli.options.translate import SWITCHES, original_options


COUNT = 500
OPTIONS = training_options()
KNOWN = OPTIONS | original_options(OPTIONS)
BASE = ["train", "--model_name_or_path", "nowhere/model", "--dataset_name", "rows.jsonl", "--output_dir", "out"]
BOOLEANS = sorted(name for name, option in KNOWN.items() if option.kind == "bool" and name not in SWITCHES)
NUMBERS = sorted(name for name, o in OPTIONS.items() if o.kind in ("int", "float") and not o.text)
CHOSEN = sorted(name for name, o in KNOWN.items() if o.choices and o.kind == "str" and not o.switch)
STRICT = sorted(name for name, o in OPTIONS.items() if not o.nullable and o.group in TRL)

Call = tuple[list[str], str | None, str]  # arguments, text of the YAML file, what the message must name


def misspell(draw: random.Random, word: str, taken) -> str:
    """The word with one letter lost, doubled, changed, or swapped with the next; none of those taken."""
    while True:
        place = draw.randrange(1, len(word))
        kind = draw.choice("ldcs")
        wrong = {
            "l": word[:place] + word[place + 1 :],
            "d": word[:place] + word[place] + word[place:],
            "c": word[:place] + draw.choice(string.ascii_lowercase) + word[place + 1 :],
            "s": word[: place - 1] + word[place] + word[place - 1] + word[place + 1 :],
        }[kind]
        if wrong and wrong not in taken and wrong.removeprefix("no_") not in taken and wrong == wrong.strip("-_= "):
            return wrong


def wrong_value(draw: random.Random, option: Option) -> str:
    """A value of another type."""
    words = {"bool": ["perhaps", "2", "truee", "-1"], "int": ["many", "1.5", "0x", "1,000,0", "inf"]}
    words["float"] = ["fast", "1e", "nan", "1..2", "inf"]
    return draw.choice(words[option.kind])


def misspelt_option(draw) -> Call:
    name = misspell(draw, draw.choice(sorted(KNOWN)), KNOWN)
    return [*BASE, f"--{name}", "1"], None, name


def misspelt_key(draw) -> Call:
    name = misspell(draw, draw.choice(sorted(KNOWN)), KNOWN)
    return BASE, f"{name}: 1\n", name


def misspelt_choice(draw) -> Call:
    name = draw.choice(CHOSEN)
    value = misspell(draw, draw.choice([c for c in KNOWN[name].choices if len(c) > 2]), KNOWN[name].choices)
    if draw.random() < 0.5:
        return [*BASE, f"--{name}={value}"], None, value
    return BASE, yaml.safe_dump({name: value}), value


def wrong_type(draw) -> Call:
    name = draw.choice(BOOLEANS + NUMBERS)
    value = wrong_value(draw, KNOWN[name])
    if draw.random() < 0.5:
        return [*BASE, f"--{name.replace('_', '-')}", value], None, name
    return BASE, yaml.safe_dump({name: value}), name


def wrong_shape(draw) -> Call:
    name = draw.choice([n for n in sorted(OPTIONS) if not OPTIONS[n].many and OPTIONS[n].kind != "mapping"])
    return BASE, yaml.safe_dump({name: draw.choice([[1, 2], {"value": 1}, [[]], {}])}), name


def null(draw) -> Call:
    name = draw.choice(STRICT)
    return BASE, f"{name}: null\n", name


def nested(draw) -> Call:
    section = draw.choice(["training", "model", "lora", "ica", "data", "hub", "peft"])
    name = draw.choice(sorted(OPTIONS))
    return BASE, yaml.safe_dump({section: {name: 1}}), section


def not_yaml(draw) -> Call:
    text = draw.choice(
        ["a: [", "a: b: c", "- x\n- y", "", "just words", "5", "{", "\tx: 1", "!!python/name:os.system ''"]
    )
    return BASE, text, "config"


def out_of_range(draw) -> Call:
    name, value = draw.choice(
        [
            *(("per_device_train_batch_size", "0"), ("gradient_accumulation_steps", "-2"), ("learning_rate", "-1")),
            *(("max_seq_length", "0"), ("num_train_epochs", "-1"), ("max_steps", "-5"), ("warmup_ratio", "1")),
            *(("ica_fraction", "0"), ("ica_fraction", "1.5"), ("ica_percentile", "100"), ("ica_components", "0")),
            *(("ica_rank", "-3"), ("ica_seed", "-1"), ("ica_component_ids", "-1"), ("ica_max_length", "1")),
            *(("ica_until_reliable", "2"), ("ica_drop_massive", "0.5"), ("ica_component_ids", "[]")),
        ]
    )
    return [*BASE, f"--{name}", value], None, name


def contradiction(draw) -> Call:
    words, named = draw.choice(
        [
            (["--use_4bit", "--use_8bit"], "load_in_8bit"),
            (["--bf16", "--fp16"], "fp16"),
            (["--no_peft", "--lora_r", "8"], "lora_r"),
            (["--no_peft", "--lora_target_modules", "q_proj"], "lora_target_modules"),
            (["--no_peft", "--use_peft"], "use_peft"),
            (["--lora_alpha", "8"], "lora_alpha"),
            (["--use_dora"], "use_dora"),
            (["--hub_repo_id", "a/b"], "push_to_hub"),
            (["--hub_token", "x"], "push_to_hub"),
            (["--dataset_name_or_path", "other"], "dataset_name"),
            (["--datasets", "other"], "datasets"),
            (["--max_length", "8", "--max_seq_length", "8"], "max_seq_length"),
            (["--use_wandb", "--report_to", "none"], "use_wandb"),
            (["--merge_adapter_with_base"], "merge"),
            (["--load_in_4bit"], "load_in_4bit"),
            (["--mask_mode", "lesion", "--train_neurons", "selected"], "lesion"),
            (["--mask_mode", "preserve", "--train_neurons", "unselected"], "preserve"),
            (["--train_neurons", "all"], "mask"),
            (["--train_method", "lora"], "use_peft"),
            (["--use_peft", "--train_method", "full"], "train_method"),
            (["--ica_select", "random"], "ica_fraction"),
            (["--ica_rank_by", "lowest"], "ica_fraction"),
            (["--anti_drift_row_param", "false"], "anti_drift_row_param"),
            (["--mask_eval", "false"], "mask_eval"),
            (["--ica_template_revision", "main"], "ica_template_path"),
            (["--ica_template_output", "t"], "ica_template_output"),
            (["--convert_to_gguf", "--gguf_quantization", "q4_0"], "q4_0"),
            (["--no_peft", "--train_method", "neuron_delta"], "no_peft"),
        ]
    )
    return [*BASE, *words], None, named


def missing(draw) -> Call:
    words, named = draw.choice(
        [
            (BASE[:1] + BASE[3:], "model_name_or_path"),
            (BASE[:3] + BASE[5:], "dataset"),
            (["train"], "model_name_or_path"),
            ([*BASE, "--learning_rate"], "learning_rate"),
            ([*BASE, "--optim="], "optim"),
            ([*BASE, "--config"], "--config"),
            ([*BASE, "--config", "nowhere.yaml"], "nowhere.yaml"),
            ([*BASE, "--output_dir", "rows.jsonl/out"], "output"),
            ([*BASE, "--ica_component_ids"], "ica_component_ids"),
            ([*BASE[:2], "", *BASE[3:]], "model_name_or_path"),
        ]
    )
    return words, None, named


def stray(draw) -> Call:
    word = draw.choice(["lora", "-x", "-lora_r", "train", "=", "--", "rows.jsonl"])
    return ["train", word, *BASE[1:]], None, word


def other_verbs(draw) -> Call:
    name = misspell(draw, draw.choice(["ica_components", "output_dir", "ica_percentile", "hub_token"]), KNOWN)
    words, named = draw.choice(
        [
            ([misspell(draw, draw.choice(sorted(VERBS)), VERBS)], "verb"),
            (["discover"], "dataset"),
            (["discover", "m", "d", f"--{name}", "3"], name),
            (["discover", "m", "d", "--ica_components", draw.choice(["x", "0", "1.5"])], "components"),
            (["discover", "m", "d", "--ica_percentile", draw.choice(["x", "0", "101"])], "percentile"),
            (["discover", "m", "d", "--ica_variant", "spatiall"], "ica_variant"),
            (["discover", "m", "d", "--max_seq_length", "long"], "max_seq_length"),
            (["discover", "m", "d", "--push_to_hub", "no-slash"], "push_to_hub"),
            (["inspect"], "template"),
            (["inspect", "nowhere"], "nowhere"),
            (["inspect", "t", f"--{name}"], name),
            (["compare", "a"], "b"),
            (["compare", "a", "b", "--permutations", draw.choice(["0", "x"])], "permutations"),
            (["export"], "--to"),
            (["export", "a", "--to", draw.choice(["merge", "gguff", "ggml"])], "to is"),
            (["export", "a", "--to", "merged"], "output_dir"),
            (["export", "a", "--to", "gguf", "--output_dir", "o"], "output_dir"),
            (["experiment"], "recipes is missing"),
            (["experiment", "nowhere"], "no folder or file nowhere"),
            (["experiment", "rows.jsonl", f"--{name}", "1"], name),
            (["demo", f"--{name}", "1"], name),
            (["demo", "--test_rows", "0"], "at least 1"),
        ]
    )
    return words, None, named


KINDS = [
    *(misspelt_option, misspelt_option, misspelt_key, misspelt_choice, wrong_type, wrong_type, wrong_shape, null),
    *(nested, not_yaml, out_of_range, contradiction, contradiction, missing, stray, other_verbs),
]


def calls() -> list[Call]:
    draw = random.Random(20)
    return [KINDS[number % len(KINDS)](draw) for number in range(COUNT)]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    return tmp_path


def complete(call: Call, directory) -> list[str]:
    arguments, text, _ = call
    if text is None:
        return arguments
    (directory / "config.yaml").write_text(text)
    return [*arguments, "--config", "config.yaml"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", dict.fromkeys(KINDS), ids=lambda kind: kind.__name__)
def test_every_wrong_call_is_one_line_and_status_2(kind, workplace, capsys, monkeypatch):
    def started(*args, **kwargs):
        raise AssertionError("a trainer was made")

    monkeypatch.setattr("fnsft_trl.training.trainer.FNSFTTrainer.__init__", started)
    mine = [call for number, call in enumerate(calls()) if KINDS[number % len(KINDS)] is kind]
    for call in mine:
        arguments = complete(call, workplace)
        before = sorted(workplace.rglob("*"))
        assert main(list(arguments)) == 2, call
        out, err = capsys.readouterr()
        assert len(err.splitlines()) == 1, (call, err)
        assert ": error: " in err, (call, err)
        assert call[2] in err, (call, err)
        assert out == "", call
        assert sorted(workplace.rglob("*")) == before, call


def test_there_are_five_hundred_and_they_differ():
    made = calls()
    assert len(made) == COUNT
    assert len({repr(call) for call in made}) > 0.7 * COUNT


def test_the_call_without_a_fault_gets_as_far_as_its_model(workplace, capsys):
    assert main(list(BASE)) == 2
    assert "the model 'nowhere/model' cannot be loaded" in capsys.readouterr().err


@pytest.mark.parametrize("number", range(0, COUNT, 63))
def test_in_a_process_of_its_own(number, workplace):
    arguments = complete(calls()[number], workplace)
    done = subprocess.run(
        [sys.executable, "-m", "fnsft_trl.cli", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
