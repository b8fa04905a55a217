"""Recipes as arms: everything that keeps them from making one experiment is one line, before anything is trained."""

import pytest
import yaml
from helpers import ROOT
from small_experiment import edit, make_folder

from fnsft_trl.cli import main
from fnsft_trl.cli.options.parse import parse_recipe
from fnsft_trl.cli.recipe_arms import find_recipes, read_arms
from fnsft_trl.errors import FNSFTError
from fnsft_trl.training.learning_rate import RATES


@pytest.fixture
def folder(tmp_path, model_dir):
    return make_folder(tmp_path, model_dir)


@pytest.fixture
def refused(folder, tmp_path, capsys, monkeypatch):
    """Runs the verb on the folder, or on other words, and gives its line; nothing may be made or trained."""

    def call(*words: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        words = words or (str(folder),)
        assert main(["experiment", *words, "--output_dir", str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert sorted(tmp_path.rglob("*")) == before
        return line

    def started(*args, **kwargs):
        raise AssertionError("a trainer was made")

    monkeypatch.setattr("fnsft_trl.training.trainer.FNSFTTrainer.__init__", started)
    return call


def test_a_folder_without_recipes(folder, refused):
    for file in folder.iterdir():
        if file.name != "experiment.yaml":
            file.unlink()
    assert "holds no recipe" in refused()


def test_what_is_not_there(refused):
    assert "there is no folder or file nowhere" in refused("nowhere")


def test_two_arms_of_one_name(folder, refused):
    other = folder / "more" / "lora.yml"
    other.parent.mkdir()
    other.write_text((folder / "lora.yaml").read_text())
    line = refused(str(folder), str(other))
    assert "two arms are named 'lora'" in line
    assert str(other) in line


def test_two_files_that_say_how_to_run_it(folder, refused, tmp_path):
    second = tmp_path / "second"
    second.mkdir()
    for name in ("other.yaml", "experiment.yaml"):
        (second / name).write_text((folder / "lora.yaml").read_text())
    assert "both say how to run the experiment" in refused(str(folder), str(second))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rte": 1}, "did you mean 'learning_rate'"),
        ({"lora_r": "many"}, "lora_r is 'many'"),
        ({"push_to_hub": True, "hub_model_id": "a/b"}, "push_to_hub has no place in an experiment"),
        ({"resume_from_checkpoint": "true"}, "resume_from_checkpoint has no place"),
        ({"merge_adapter_with_base": True}, "merge_adapter_with_base has no place"),
        ({"use_peft": None}, "lora_r has no effect without LoRA"),
    ],
)
def test_a_recipe_that_is_not_understood_is_named(folder, refused, change, message):
    edit(folder / "lora.yaml", **change)
    line = refused()
    assert str(folder / "lora.yaml") in line
    assert message in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_name_or_path": "other"}, "the model must be the same, and model_name_or_path is"),
        ({"retention_tokens": 50}, "the retention texts must be the same, and retention_tokens is 60"),
        ({"retention_datasets": ["other=general.jsonl"]}, "the retention texts must be the same"),
    ],
)
def test_arms_that_cannot_be_compared(folder, refused, change, message):
    edit(folder / "lora.yaml", **change)
    line = refused()
    assert message in line
    assert "deltas and lora cannot be compared" in line


def test_arms_without_retention(folder, refused):
    for name in ("deltas", "lora", "random"):
        edit(folder / f"{name}.yaml", retention_datasets=None, retention_tokens=None)
    assert "measures nothing of what the model loses" in refused()


def test_arms_that_hold_no_rows_out(folder, refused):
    (folder / "experiment.yaml").unlink()
    assert "lora holds no rows out" in refused()
    for name in ("lora", "random"):
        edit(folder / f"{name}.yaml", eval_strategy="epoch")
    edit(folder / "lora.yaml", eval_fraction=0.3)
    assert "the rows that are held out must be the same, and eval_fraction is" in refused()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "1", "1"], "seeds holds 1 twice"),
        (["--seeds", "-1"], "seeds is -1; it must be from 0 to"),
        (["--jobs", "0"], "jobs is 0"),
        (["--max_new_tokens", "5"], "max_new_tokens has no effect without generate"),
        (["--learning_rat", "1"], "did you mean 'learning_rate'"),
        (["--seed", "1"], "did you mean 'seeds'"),
    ],
)
def test_options_that_make_no_sense(folder, refused, words, message):
    assert message in refused(str(folder), *words)


def test_an_option_that_no_arm_could_heed(folder, refused):
    assert "lora_r (4) has no effect, since no arm has LoRA" in refused(str(folder / "deltas.yaml"), "--lora_r", "4")
    assert "ica_max_tokens (9) has no effect, since no arm has networks" in refused(
        str(folder / "lora.yaml"), "--ica_max_tokens", "9"
    )


def test_under_a_launcher(folder, refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "an experiment starts its processes itself" in refused()


def test_options_of_the_command_line_reach_the_arms_that_have_their_parts(folder):
    files, shared = find_recipes([str(folder)])
    assert shared == folder / "experiment.yaml"
    given = {"max_steps": 1, "ica_max_tokens": 90, "lora_r": 1}
    arms = {arm.name: arm.settings for arm in read_arms(files, given, data=["x"])}
    assert [settings["max_steps"] for settings in arms.values()] == [1, 1, 1]
    assert (arms["deltas"]["ica_max_tokens"], arms["random"]["ica_max_tokens"], arms["lora"]["lora_r"]) == (90, 90, 1)
    assert "ica_max_tokens" not in arms["lora"]
    assert "lora_r" not in arms["deltas"]


def test_arms_share_a_discovery_when_all_that_it_depends_on_is_the_same(folder):
    def networks(**changes):
        edit(folder / "random.yaml", **changes)
        arms = read_arms(find_recipes([str(folder)])[0], {}, data=["x"])
        return [arm.networks for arm in arms if arm.discover is not None]

    first, second = networks(learning_rate=1.0)
    assert first == second
    first, second = networks(ica_max_tokens=90)
    assert first != second
    edit(folder / "random.yaml", ica_max_tokens=200)
    first, second = networks(ica_datasets=None)
    assert first != second


def test_the_content_of_every_text_that_an_arm_reads_is_noted(folder, tmp_path):
    texts = {name: tmp_path / f"{name}.txt" for name in ("kept", "replayed", "anchor")}
    for path in texts.values():
        path.write_text("The red fox went to the sea.\n")
    edit(
        folder / "lora.yaml",
        forgetting="low",
        protect_datasets=[f"kept={texts['kept']}"],
        replay_datasets=[str(texts["replayed"])],
        kl_to_base=1.0,
        kl_datasets=[str(texts["anchor"])],
    )
    (arm,) = read_arms(find_recipes([str(folder / "lora.yaml")])[0], {}, data=["x"])
    assert {str(path) for path in texts.values()} <= set(arm.sources)


def test_networks_of_rows_that_the_seed_draws_are_found_for_each_seed(folder):
    edit(folder / "random.yaml", ica_datasets=None)
    files, _ = find_recipes([str(folder)])
    by_seed = {arm.name: arm.networks_by_seed for arm in read_arms(files, {"max_samples": 5}, data=["x"])}
    assert by_seed == {"deltas": False, "lora": False, "random": True}
    assert not any(arm.networks_by_seed for arm in read_arms(files, {}, data=["x"]))


ORIGINALS = [ROOT / "recipes" / "peft_vs_peft_ica", ROOT / "recipes" / "peft_vs_peft_ica" / "vibethinker-1.5b"]


@pytest.mark.parametrize("directory", ORIGINALS, ids=lambda path: path.name)
def test_the_arms_of_the_originals_experiment_differ_in_their_networks_alone(directory):
    files, shared = find_recipes([str(directory)])
    assert list(files) == ["a_peft", "b_lesion", "c_preserve"]
    assert yaml.safe_load(shared.read_text())["recipes"] == [str(directory.relative_to(ROOT))]
    asked = {name: parse_recipe(str(file), {}) for name, file in files.items()}
    plain, lesion, preserve = (options.values for options in asked.values())
    assert [config and config.mask_mode for config in (o.network_config for o in asked.values())] == [
        None,
        "lesion",
        "preserve",
    ]

    def differing(a, b):
        return {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)} - {"output_dir"}

    assert differing(lesion, preserve) == {"mask_mode"}
    assert all(name.startswith(("ica_", "mask_mode", "anti_drift_")) for name in differing(plain, lesion))


TRAINED = [path for path in (ROOT / "recipes").rglob("*.yaml") if path.read_text().startswith("# fnsft train")]


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.name)
def test_no_recipe_has_a_learning_rate_that_the_log_calls_high(path):
    asked = parse_recipe(str(path), {})
    is_full = asked.network_config is None or asked.network_config.train_method == "full"
    method = "lora" if asked.values.get("use_peft") else "full" if is_full else "neuron_delta"
    assert asked.values["learning_rate"] <= RATES[method].high


def test_the_originals_settings_are_those_of_its_experiment():
    files, _ = find_recipes([str(ORIGINALS[1])])
    values = parse_recipe(str(files["b_lesion"]), {}).values
    known = {"model_name_or_path": "WeiboAI/VibeThinker-1.5B", "dataset_name": "camel-ai/physics", "lora_r": 16}
    known |= {"per_device_train_batch_size": 1, "num_train_epochs": 1, "learning_rate": 2e-4, "lora_dropout": 0}
    known |= {"ica_components": 10, "ica_percentile": 98, "max_length": 10_000, "ica_site": "mlp_output"}
    assert {name: values[name] for name in known} == known


def test_an_error_of_a_library_function_names_no_file_twice(folder):
    edit(folder / "lora.yaml", nonsense=1)
    with pytest.raises(FNSFTError) as error:
        read_arms(find_recipes([str(folder)])[0], {}, data=["x"])
    assert str(error.value).count(str(folder / "lora.yaml")) == 1
