"""The cache gives back what would have been made, and nothing else."""

import copy
import datetime
import json
import logging
import multiprocessing
import os
import signal
import tempfile
from pathlib import Path

import pytest
from datasets import Dataset, config
from helpers import TESTS, sft_config, tiny_model, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from processes import run_processes
from transformers import PreTrainedTokenizerBase
from trl import SFTTrainer

from fnsft_trl import FNSFTError, FNSFTTrainer, to_trl_format
from fnsft_trl.data import tokenized
from fnsft_trl.data.sources import load_data
from fnsft_trl.data.tokenized import TokenizedCache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenized, "cache_dir", lambda: tmp_path / "cache")
    return TokenizedCache()


@pytest.fixture
def made(monkeypatch):
    """The names of the datasets that TRL prepared."""
    names = []
    prepare = SFTTrainer._prepare_dataset

    def counted(self, *args):
        names.append(args[-1])
        return prepare(self, *args)

    monkeypatch.setattr(SFTTrainer, "_prepare_dataset", counted)
    return names


def rows(path):
    return to_trl_format(load_data(str(path), split="train"))


def trained(path, tmp_path, tokenizer=None, **settings):
    """The prepared data of a trainer with the cache."""
    return FNSFTTrainer(
        tiny_model("llama"),
        sft_config(tmp_path, **settings),
        train_dataset=rows(path),
        processing_class=tokenizer or tiny_tokenizer(),
        tokenized_cache=True,
    ).train_dataset


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"question": f"Say {i}", "answer": f"{i}{i}"}) for i in range(8)))
    return path


def test_the_same_data_are_prepared_once_whatever_their_path_and_date(file, tmp_path, cache, made):
    first = trained(file, tmp_path)
    copied = tmp_path / "elsewhere.jsonl"
    copied.write_bytes(file.read_bytes())
    os.utime(copied, (1, 1))
    again = trained(copied, tmp_path)
    assert made == ["train"]
    assert again.to_list() == first.to_list()
    assert again.features == first.features
    assert [path.name for path in cache.directory.iterdir() if path.name.startswith(".")] == []


def test_it_is_what_the_trainer_without_a_cache_makes(file, tmp_path, cache):
    trained(file, tmp_path, packing=True, per_device_train_batch_size=2, max_length=64)
    cached = trained(file, tmp_path, packing=True, per_device_train_batch_size=2, max_length=64)
    args = sft_config(tmp_path, packing=True, per_device_train_batch_size=2, max_length=64)
    plain = SFTTrainer(tiny_model("llama"), args, train_dataset=rows(file), processing_class=tiny_tokenizer())
    assert cached.to_list() == plain.train_dataset.to_list()


def test_an_edited_file_is_not_served_stale(file, tmp_path, cache, made):
    before = file.stat()
    first = trained(file, tmp_path)
    file.write_text(file.read_text().replace("Say 3", "Say 4"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    again = trained(file, tmp_path)
    assert made == ["train", "train"]
    assert sum(a != b for a, b in zip(first["input_ids"], again["input_ids"], strict=True)) == 1


def test_another_tokenizer_of_the_same_name_is_another_entry(file, tmp_path, cache, made):
    trained(file, tmp_path)
    other = tiny_tokenizer()
    core = json.loads(other.backend_tokenizer.to_str())
    vocabulary = core["model"]["vocab"]
    vocabulary["S"], vocabulary["a"] = vocabulary["a"], vocabulary["S"]
    swapped = type(other)(
        tokenizer_object=type(other.backend_tokenizer).from_str(json.dumps(core)),
        eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", chat_template=other.chat_template,
    )  # fmt: skip
    assert (swapped.name_or_path, len(swapped)) == (other.name_or_path, len(other))
    assert trained(file, tmp_path, swapped)["input_ids"][0] != trained(file, tmp_path)["input_ids"][0]
    assert made == ["train", "train"]


def _with(tokenizer, **changes):
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer": _with(tiny_tokenizer(), chat_template=tiny_tokenizer().chat_template.replace(": ", " "))},
        {"tokenizer": _with(tiny_tokenizer(), eos_token="<unk>")},
        {"max_length": 24},
        {"truncation_mode": "keep_end"},
        {"packing": True},
        {"shuffle_dataset": True},
        {"completion_only_loss": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_the_result_changes_the_entry(file, tmp_path, cache, made, change):
    trained(file, tmp_path)
    trained(file, tmp_path, **change)
    assert made == ["train", "train"]


def test_the_seed_counts_where_rows_are_shuffled(file, tmp_path, cache, made):
    first, second = (trained(file, tmp_path, shuffle_dataset=True, seed=seed) for seed in (1, 2))
    assert first.to_list() != second.to_list()
    assert made == ["train"] * 2
    for seed in (1, 2):
        trained(file, tmp_path, seed=seed)
    assert made == ["train"] * 3


def test_a_new_version_of_a_library_is_another_entry(cache, monkeypatch):
    data, tokenizer = Dataset.from_list([{"text": "a"}]), tiny_tokenizer()
    key = cache.key(data, tokenizer, {})
    monkeypatch.setattr(tokenized, "version", lambda package: "99")
    assert cache.key(data, tokenizer, {}) != key


def test_a_template_that_writes_the_day_is_another_entry_on_another_day(cache, monkeypatch):
    class Tomorrow(tokenized.date):
        @classmethod
        def today(cls):
            return cls(2099, 1, 1)

    data, tokenizer = Dataset.from_list([{"text": "a"}]), tiny_tokenizer()
    dated = _with(copy.deepcopy(tokenizer), chat_template="{{ strftime_now('%d') }}")
    keys = [cache.key(data, each, {}) for each in (tokenizer, dated)]
    monkeypatch.setattr(tokenized, "date", Tomorrow)
    later = [cache.key(data, each, {}) for each in (tokenizer, dated)]
    assert later[0] == keys[0]
    assert later[1] != keys[1]


def test_whatever_is_set_on_a_tokenizer_changes_the_entry_but_what_no_token_follows_from(cache):
    """Every attribute, known or not: one that a later version or a class of its own reads counts too."""

    class Own(type(tiny_tokenizer())):
        pass

    data, tokenizer = Dataset.from_list([{"text": "a"}]), tiny_tokenizer()
    key = cache.key(data, tokenizer, {})
    for name in vars(tokenizer).keys() - {"_tokenizer", "init_kwargs"} | {"some_rule"}:  # those two are taken apart
        changed = copy.deepcopy(tokenizer)
        vars(changed)[name] = ("other", vars(tokenizer).get(name))
        assert (cache.key(data, changed, {}) == key) == (name in tokenized._NO_PART), name
    added, own = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    added.add_tokens(["zzz"])
    own.__class__ = Own
    made = copy.deepcopy(tokenizer)
    made.init_kwargs["rule"] = Own
    assert len({key, *(cache.key(data, each, {}) for each in (added, own, made))}) == 4


class _Rule:
    """What a tokenizer may hold: its state is not in its name."""

    def __init__(self, state):
        self.state = state

    def __repr__(self):
        return "rule"


def test_what_a_tokenizer_holds_counts_by_its_state_and_not_by_its_place(cache):
    data = Dataset.from_list([{"text": "a"}])
    keys = [cache.key(data, _with(tiny_tokenizer(), rule=_Rule(state)), {}) for state in (1, 1, 2)]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize("settings", [{"dataset_num_proc": 2}, {"packing_strategy": "wrapped"}])
def test_settings_that_only_packing_reads(tmp_path, settings):
    plain, changed = sft_config(tmp_path), sft_config(tmp_path, **settings)
    assert tokenized.preparation_settings(plain, True) != tokenized.preparation_settings(changed, True)
    if "dataset_num_proc" in settings:
        assert tokenized.preparation_settings(plain) == tokenized.preparation_settings(changed)


class _Later(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.datetime(2099, 1, 1, 12, 30)


@pytest.mark.parametrize(
    ("template", "follows"),
    [
        ("{{ strftime_now('%d %b') }}", True),
        ('{% if strftime_now is defined %}{{ strftime_now("%H:%M") }}{% endif %}', True),
        ("{%- set form = '%H' %}{{ strftime_now(form) }}", False),
        ("{% set now = strftime_now %}{{ now('%H') }}", False),
    ],
)
def test_what_a_template_reads_of_the_clock_is_in_the_key_or_is_not_kept(cache, monkeypatch, template, follows):
    data, tokenizer = Dataset.from_list([{"text": "a"}]), _with(tiny_tokenizer(), chat_template=template)
    assert cache.takes(data, tokenizer) == follows
    assert cache.takes(data, tiny_tokenizer(), template) == follows
    key = cache.key(data, tokenizer, {})
    monkeypatch.setattr(tokenized, "datetime", _Later)
    assert cache.key(data, tokenizer, {}) != key or not follows


DATED = "{% for m in messages %}{{ strftime_now('%Y') }}{{ m['content'] }}<eos>{% endfor %}"


@pytest.mark.parametrize("keeps", [True, False])
def test_what_datasets_keeps_of_a_preparation_is_not_served_later(file, tmp_path, cache, monkeypatch, keeps):
    """Rows of a file lie in its cache, and its own keys know neither the clock nor another version."""

    def ids():
        trainer = FNSFTTrainer(
            tiny_model("llama"), sft_config(tmp_path), train_dataset=data, processing_class=tokenizer,
            tokenized_cache=keeps,
        )  # fmt: skip
        return list(trainer.train_dataset["input_ids"])

    data, tokenizer = rows(file), _with(tiny_tokenizer(), chat_template=DATED)
    assert data.cache_files
    first = ids()
    assert ids() == first
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", _Later)
    monkeypatch.setattr(tokenized, "datetime", _Later)
    later = ids()
    assert later != first
    apply = PreTrainedTokenizerBase.apply_chat_template

    def apply_with_another_end(*args, **kwargs):
        rendered = apply(*args, **kwargs)
        return {"input_ids": [*rendered["input_ids"], 9]}

    monkeypatch.setattr(PreTrainedTokenizerBase, "apply_chat_template", apply_with_another_end)
    assert ids() == later  # of the same version
    monkeypatch.setattr(tokenized, "version", lambda package: "99")
    assert ids() == [[*row, 9] for row in later]


def test_the_key_is_of_the_rows_and_not_of_how_they_lie(cache):
    tokenizer = tiny_tokenizer()
    values = [{"prompt": [{"role": "user", "content": f"{i}"}], "n": None if i % 3 else i} for i in range(2500)]
    whole = Dataset.from_list(values)
    assert cache.key(whole, tokenizer, {}) == cache.key(Dataset.from_list(values), tokenizer, {})
    shuffled = Dataset.from_list(values[::-1]).select(range(2499, -1, -1))
    assert cache.key(whole, tokenizer, {}) == cache.key(shuffled, tokenizer, {})
    for changed in (values[:-1], values[1:] + values[:1], [*values[:-1], values[0]]):
        assert cache.key(whole, tokenizer, {}) != cache.key(Dataset.from_list(changed), tokenizer, {})


def test_the_same_rows_are_the_same_entry_to_the_byte_whatever_their_fingerprint(tmp_path):
    """That of `datasets` is random where a request to end comes while it is made, and is swallowed."""
    entries = []
    for name in ("one", "other"):
        kept = Dataset.from_dict({"input_ids": [[1, 2], [3]]})
        kept = kept.select_columns(["input_ids"], new_fingerprint=name)
        TokenizedCache(tmp_path / name).save("key", kept)
        entries.append({file.name: file.read_bytes() for file in (tmp_path / name / "key").iterdir()})
    assert entries[0] == entries[1] != {}


def test_what_a_tokenizer_was_used_for_before_does_not_count(cache):
    data, tokenizer = Dataset.from_list([{"text": "a"}]), tiny_tokenizer()
    key = cache.key(data, tokenizer, {})
    tokenizer(["ba", "bako"], padding=True, truncation=True, max_length=2)
    truncation = tokenizer.backend_tokenizer.truncation
    assert truncation is not None
    assert cache.key(data, tokenizer, {}) == key
    assert tokenizer.backend_tokenizer.truncation == truncation


def test_a_broken_entry_is_made_again(file, tmp_path, cache, made):
    first = trained(file, tmp_path)
    (entry,) = cache.directory.iterdir()
    next(entry.glob("*.arrow")).write_bytes(b"broken")
    assert trained(file, tmp_path).to_list() == first.to_list()
    (entry / "state.json").write_text("{")
    assert trained(file, tmp_path).to_list() == first.to_list()
    assert trained(file, tmp_path).to_list() == first.to_list()
    assert made == ["train"] * 3


@given(st.integers(0, 10**9), st.integers(0, 7))
def test_one_flipped_bit_of_an_entry_is_never_read(place, bit):
    """In any of its files: the entry is made again, in the place of the damaged one."""
    with tempfile.TemporaryDirectory() as folder:
        cache, data = TokenizedCache(folder), Dataset.from_list([{"input_ids": [i, i + 1]} for i in range(9)])
        cache.save("key", data)
        files = sorted((cache.directory / "key").iterdir())
        sizes = [file.stat().st_size for file in files]
        place %= sum(sizes)
        while place >= sizes[0]:
            place, sizes, files = place - sizes[0], sizes[1:], files[1:]
        content = bytearray(files[0].read_bytes())
        content[place] ^= 1 << bit
        files[0].write_bytes(content)
        assert cache.load("key") is None
        cache.save("key", data)
        assert cache.load("key").to_list() == data.to_list()


@pytest.mark.parametrize("damage", ["missing", "more", "cut", "empty"])
def test_an_entry_that_is_not_whole_is_never_read(tmp_path, damage):
    cache, data = TokenizedCache(tmp_path), Dataset.from_list([{"input_ids": [1]}])
    for number in range(4):
        cache.save("key", data)
        file = sorted((tmp_path / "key").iterdir())[number]
        if damage == "missing":
            file.unlink()
        elif damage == "more":
            (tmp_path / "key" / f"{number}.arrow").write_bytes(b"")
        else:
            file.write_bytes(file.read_bytes()[: -1 if damage == "cut" else 0])
        before = sorted(os.listdir(tmp_path / "key"))
        assert cache.load("key") is None
        assert sorted(os.listdir(tmp_path / "key")) == before  # a reader changes nothing
        cache.save("key", data)
        assert cache.load("key").to_list() == data.to_list()


@pytest.mark.posix
def test_only_the_user_can_read_what_is_kept(file, tmp_path, cache):
    before = os.umask(0)
    try:
        trained(file, tmp_path)
    finally:
        os.umask(before)
    kept = [cache.directory, *cache.directory.rglob("*")]
    assert len(kept) > 4
    assert [path for path in kept if path.stat().st_mode & 0o077] == []
    cache.directory.chmod(0o755)
    TokenizedCache().save("key", Dataset.from_list([{"input_ids": [1]}]))
    assert not cache.directory.stat().st_mode & 0o077
    (copies,) = (path for path in Path(config.HF_DATASETS_CACHE).iterdir() if path.name == "fnsft_trl")
    assert not copies.stat().st_mode & 0o077  # of local files


def _write_and_die(directory, key):
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    os.replace = die
    TokenizedCache(directory).save(key, Dataset.from_list([{"input_ids": [1]}] * 9))


def _write_slowly(directory, barrier):
    replace = os.replace

    def wait(*paths):
        barrier.wait()
        barrier.wait()
        replace(*paths)

    os.replace = wait
    TokenizedCache(directory).save("slow", Dataset.from_list([{"input_ids": [1]}] * 9))


@pytest.mark.posix
def test_what_killed_writers_left_is_removed_and_what_others_write_is_not(tmp_path):
    context = multiprocessing.get_context("fork")
    dead = [context.Process(target=_write_and_die, args=(tmp_path, f"dead{number}")) for number in range(2)]
    barrier = context.Barrier(2, timeout=60)
    slow = context.Process(target=_write_slowly, args=(tmp_path, barrier), daemon=True)
    for process in (*dead, slow):
        process.start()
    for process in dead:
        process.join()
        assert process.exitcode == -signal.SIGKILL
    barrier.wait()  # the slow one is writing now
    own = [".git", ".dead0.mine"]  # which a writer did not make
    for name in own:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    assert {name.split(".")[1] for name in os.listdir(tmp_path)} >= {"dead0", "dead1", "slow"}
    TokenizedCache(tmp_path).save("key", Dataset.from_list([{"input_ids": [1]}]))
    left = {name for name in os.listdir(tmp_path) if not name.startswith(".slow.")}
    assert left == {"key", *own}
    barrier.wait()
    slow.join()
    TokenizedCache(tmp_path).save("last", Dataset.from_list([{"input_ids": [1]}]))
    assert set(os.listdir(tmp_path)) == {"key", "slow", "last", *own}


def test_a_directory_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    TokenizedCache(tmp_path / "file" / "cache").save("key", Dataset.from_list([{"text": "a"}]))


def _save(directory, barrier):
    cache = TokenizedCache(directory)
    data = Dataset.from_list([{"input_ids": list(range(50))}] * 200)
    for number in range(10):
        barrier.wait()
        cache.save(f"key{number}", data)
        assert cache.load(f"key{number}").to_list() == data.to_list()


@pytest.mark.posix
def test_two_processes_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    processes = [context.Process(target=_save, args=(tmp_path / "cache", barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == sorted(f"key{i}" for i in range(10))


def test_without_being_asked_for_there_is_no_cache(file, tmp_path, cache):
    FNSFTTrainer(
        tiny_model("llama"), sft_config(tmp_path), train_dataset=rows(file), processing_class=tiny_tokenizer()
    )
    assert not cache.directory.exists()


def test_rows_whose_answer_is_cut_off_are_counted_or_an_error(file, tmp_path, cache, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("fnsft_trl"), "propagate", True)
    long = tmp_path / "long.jsonl"
    long.write_text(file.read_text() + json.dumps({"question": "Say " * 40, "answer": "no"}))
    for _ in range(2):  # made, and read from the cache
        assert len(trained(long, tmp_path)) == 8
        assert caplog.text.count("1 of 9 rows of the train data are left out: their answer begins after") == 1
        caplog.clear()
    with pytest.raises(FNSFTError, match="every row of the train data begins after max_length=4 tokens"):
        trained(file, tmp_path, max_length=4)


_TWO_PROCESSES = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from datasets import Dataset
from helpers import sft_config, tiny_model, tiny_tokenizer
from trl import SFTTrainer
from fnsft_trl import FNSFTTrainer, to_trl_format
from fnsft_trl.data import tokenized

folder, rank = Path(sys.argv[2]), os.environ["RANK"]
tokenized.cache_dir = lambda: folder / "cache"
prepare, load, made, ids = SFTTrainer._prepare_dataset, tokenized.TokenizedCache.load, [], []
SFTTrainer._prepare_dataset = lambda *args: made.append(args[-1]) or prepare(*args)
rows = to_trl_format([{"question": f"Say {i}", "answer": f"{i}{i}"} for i in range(8)])
for turn in range(3):
    if turn == 2 and rank == "0":  # an entry that only some of the processes can read
        tokenized.TokenizedCache.load = lambda self, key: None
    trainer = FNSFTTrainer(tiny_model("llama"), sft_config(folder / f"out-{rank}"), train_dataset=rows,
                           processing_class=tiny_tokenizer(), tokenized_cache=True)
    ids.append(trainer.train_dataset["input_ids"][:])
tokenizer = tiny_tokenizer()  # one that refuses rows, in both processes alike
refuses = "{% if '3' in messages[0].content %}{{ raise_exception('no') }}{% endif %}"
tokenizer.chat_template = refuses + tokenizer.chat_template
trainer = FNSFTTrainer(tiny_model("llama"), sft_config(folder / f"out-{rank}"), train_dataset=rows,
                       processing_class=tokenizer, tokenized_cache=True)
print(len(made) - 1, ids[0] == ids[1] == ids[2], trainer.args.world_size, len(trainer.train_dataset))
"""


@pytest.mark.slow
def test_processes_of_one_run_all_read_or_all_prepare(tmp_path):
    printed = run_processes(2, "-c", _TWO_PROCESSES, TESTS, tmp_path)
    assert [text.split() for text in printed] == [["2", "True", "2", "7"]] * 2
    assert len(list((tmp_path / "cache" / "tokenized").iterdir())) == 1
