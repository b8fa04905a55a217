"""A checkpoint is complete or it is none: whatever is lost, cut or changed in it, a run goes on from another one."""

import json
import shutil

import pytest
from datasets import Dataset
from helpers import sft_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from fnsft_trl import FNSFTError, FNSFTTrainer, FunctionalNetworkConfig
from fnsft_trl.template.storage import NETWORK_DIR
from fnsft_trl.training.checkpoints import MARKER_FILE, damage, find_checkpoint, mark, marked


MARKER = f"{NETWORK_DIR}/{MARKER_FILE}"
METHODS = ("neuron_delta", "lora", "full")


@pytest.fixture(scope="module")
def runs(templates, rows, tokenizer, tmp_path_factory):
    """method -> what a run of 3 steps left, with a checkpoint of each."""
    root = tmp_path_factory.mktemp("runs")
    for method in METHODS:
        FNSFTTrainer(
            model=tiny_model("llama"),
            args=sft_config(root / method, max_steps=3, save_strategy="steps", save_steps=1),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=2) if method == "lora" else None,
            network_config=FunctionalNetworkConfig(train_method=method),
            network_template=templates["llama"],
        ).train()
    return root


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


def copied(runs, method, scratch):
    """A copy of a run, in the place of the last one."""
    shutil.rmtree(scratch / method, ignore_errors=True)
    return shutil.copytree(runs / method, scratch / method)


def files(directory):
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())


def needed(directory):
    return [name for name in files(directory) if not name.endswith((".md", ".svg"))]


def find(output_dir, asked=True, *, has_mark=True):
    return find_checkpoint(asked, sft_config(output_dir), has_mark=has_mark)


def delete(path, at):
    path.unlink()


def cut(path, at):
    data = path.read_bytes()
    path.write_bytes(data[: int(at * len(data))])


def lengthen(path, at):
    path.write_bytes(path.read_bytes() + b"\n")


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 1 << int(at * 1000) % 8
    path.write_bytes(data)


def says_the_same(path, other):
    """Whether a damage to JSON shows in no value: another line break, or 1E-8 for 1e-8."""
    try:
        return json.loads(path.read_bytes()) == json.loads(other.read_bytes())
    except ValueError:
        return False


@pytest.mark.slow
def test_whole_checkpoints_are_complete_and_the_newest_is_taken(runs):
    for method in METHODS:
        assert [damage(runs / method / f"checkpoint-{step}") for step in (1, 2, 3)] == [None] * 3
        assert find(runs / method) == runs / method / "checkpoint-3"
        assert find(runs / method, str(runs / method / "checkpoint-1")) == runs / method / "checkpoint-1"
        assert find(runs / method, None) is find(runs / method, False) is find(runs / method, "false") is None


@pytest.mark.slow
@settings(max_examples=150)
@given(
    method=st.sampled_from(METHODS),
    harm=st.sampled_from([delete, cut, lengthen, flip]),
    which=st.integers(0, 99),
    at=st.floats(0, 1, exclude_max=True),
)
def test_any_damage_to_any_file_is_noticed(runs, scratch, method, harm, which, at):
    """In a checkpoint with a mark, whatever is changed in whatever file."""
    run = copied(runs, method, scratch)
    names = needed(run / "checkpoint-3")
    name = names[which % len(names)]
    harm(run / "checkpoint-3" / name, at)
    if name == MARKER and harm is delete:  # then files are checked by their form when it is named
        assert damage(run / "checkpoint-3") is None
    elif name == MARKER and says_the_same(run / "checkpoint-3" / name, runs / method / "checkpoint-3" / name):
        return
    else:
        assert name in damage(run / "checkpoint-3")
        with pytest.raises(FNSFTError, match="checkpoint-3 cannot be resumed from: ") as error:
            find(run, str(run / "checkpoint-3"))
        assert "\n" not in str(error.value)
    assert find(run) == run / "checkpoint-2"


@settings(max_examples=60)
@given(
    method=st.sampled_from(METHODS),
    harm=st.sampled_from([delete, cut]),
    which=st.integers(0, 99),
    at=st.floats(0, 0.9),
)
def test_what_is_cut_or_lost_is_noticed_without_a_mark(runs, scratch, method, harm, which, at):
    """As of checkpoints that an earlier version wrote: those that cannot be read are no traceback later."""
    run = copied(runs, method, scratch)
    (run / "checkpoint-3" / MARKER).unlink()
    read = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors")
    names = [name for name in needed(run / "checkpoint-3") if name.endswith(read)]
    name = names[which % len(names)]
    harm(run / "checkpoint-3" / name, at)
    assert damage(run / "checkpoint-3") is not None
    assert find(run) == run / "checkpoint-2"


@pytest.mark.parametrize("method", METHODS)
def test_a_save_that_is_broken_off_anywhere_leaves_no_complete_checkpoint(runs, scratch, method):
    """Files are written one after the other, and the mark after all of them."""
    order = sorted(
        needed(runs / method / "checkpoint-3"), key=lambda n: (runs / method / "checkpoint-3" / n).stat().st_mtime_ns
    )
    assert order[-1] == MARKER
    for number in range(len(order)):
        run = copied(runs, method, scratch)
        for name in order[number + 1 :]:
            (run / "checkpoint-3" / name).unlink()
        for harm in (cut, delete):
            harm(run / "checkpoint-3" / order[number], 0.5)
            assert find(run) == run / "checkpoint-2"


def test_skipped_checkpoints_are_named_with_the_reason(runs, scratch, monkeypatch):
    said = []
    monkeypatch.setattr("fnsft_trl.training.checkpoints.logger.warning", said.append)
    run = copied(runs, "lora", scratch)
    (run / "checkpoint-3" / MARKER).unlink()
    (run / "checkpoint-2" / "optimizer.pt").unlink()
    (run / "checkpoint-x").mkdir()
    assert find(run) == run / "checkpoint-1"
    (line,) = said
    assert (
        f"resuming from {run / 'checkpoint-1'}; not from what is newer: checkpoint-3 (not marked as complete" in line
    )
    assert "checkpoint-2 (it holds no state of the optimizer (optimizer.pt))" in line
    assert find(run, has_mark=False) == run / "checkpoint-3"  # a run without networks marks none
    shutil.rmtree(run / "checkpoint-1")
    with pytest.raises(
        FNSFTError, match=r"no checkpoint in .* is complete: checkpoint-3 \(not marked .*; checkpoint-2"
    ):
        find(run)
    with pytest.raises(FNSFTError, match=r"there is no checkpoint in .* to resume from"):
        find(scratch / "nowhere")
    for name in ("nowhere", run):
        with pytest.raises(FNSFTError, match=r"is no checkpoint of a training \(it has no trainer_state\.json"):
            find(run, str(name))


def test_cards_may_change_and_the_mark_gives_back_what_it_was_given(runs, scratch):
    run = copied(runs, "full", scratch)
    for path in (run / "checkpoint-3").rglob("*.md"):
        path.write_text("mine")
    assert damage(run / "checkpoint-3") is None
    about = {"a": [1, None], "b": "ü"}
    mark(run / "checkpoint-3", about)
    assert marked(run / "checkpoint-3") == about
    (run / "checkpoint-3" / MARKER).unlink()
    assert marked(run / "checkpoint-3") is None


def test_weights_in_several_files_are_looked_for(runs, scratch):
    run = copied(runs, "full", scratch)
    directory = run / "checkpoint-3"
    (directory / MARKER).unlink()
    (directory / "model.safetensors").rename(directory / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert damage(directory) == "model.safetensors.index.json names model-2.safetensors, which is missing"
    shutil.copy(directory / "model-1.safetensors", directory / "model-2.safetensors")
    assert damage(directory) is None
