"""Rows that teach nothing are counted, wherever their labels were lost; where all do, it is an error."""

import pytest
from datasets import Dataset, IterableDataset
from helpers import sft_config, tiny_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from fnsft_trl import FNSFTError, FNSFTTrainer
from fnsft_trl.data.labels import check_labels, watch_labels


class Args:
    truncation_mode = "keep_start"

    def __init__(self, max_length):
        self.max_length = max_length


LABELS = st.lists(st.lists(st.booleans(), max_size=7), min_size=1, max_size=8).filter(any)


@given(LABELS, st.sampled_from([None, "bfd", "wrapped", "bfd_split"]), st.integers(2, 8))
@settings(max_examples=60)
def test_what_is_counted_is_what_the_collator_leaves_to_learn(learnt, packing, max_length):
    rows = Dataset.from_list(
        [{"input_ids": [5] * len(row), "labels": [5 if on else -100 for on in row]} for row in learnt]
    )
    if packing is None:
        prepared = rows.map(lambda row: {name: row[name][:max_length] for name in ("input_ids", "labels")})
        prepared = prepared.filter(lambda row: len(row["input_ids"]) > 0)
    else:
        prepared = pack_dataset(rows, max_length, packing)
    collator = DataCollatorForLanguageModeling(0, padding_free=packing not in (None, "wrapped"))
    to_learn = [int((collator([row])["labels"][0, 1:] != -100).sum()) for row in prepared]
    cut = len(learnt) - len(prepared) if packing is None else 0
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("fnsft_trl.data.labels.logger.warning", lines.append)
        if not sum(to_learn):
            with pytest.raises(FNSFTError, match=f"max_length={max_length}"):
                check_labels(prepared, len(learnt), "train", max_length=max_length, packing=packing)
            return
        check_labels(prepared, len(learnt), "train", max_length=max_length, packing=packing)
    said = " ".join(lines)
    if packing in (None, "bfd"):
        nothing = sum(not any(row[1:max_length]) for row in learnt) - cut
        assert (f"{nothing} of {len(learnt)} rows of the train data teach nothing" in said) == (nothing > 0)
        assert (f"{cut} of {len(learnt)} rows of the train data are left out" in said) == (cut > 0)
    else:
        assert not said


@given(LABELS, st.integers(2, 8), st.sampled_from(["keep_start", "keep_end"]))
@settings(max_examples=60)
def test_of_a_stream_the_first_row_that_teaches_nothing_is_named(learnt, max_length, mode):
    rows = [{"labels": [5 if on else -100 for on in row]} for row in learnt]
    kept = [row[:max_length] if mode == "keep_start" else row[-max_length:] for row in learnt]
    teaches = [any(row[1:]) for row in kept]
    args = Args(max_length)
    args.truncation_mode = mode
    stream = IterableDataset.from_generator(rows.__iter__)
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("fnsft_trl.data.labels.logger.warning", lines.append)
        if not any(teaches):
            with pytest.raises(FNSFTError, match=r"no row of the eval data .* teaches anything"):
                watch_labels(stream, "eval", args, None)
            return
        assert list(watch_labels(stream, "eval", args, None)) == rows
    if all(teaches):
        assert lines == []
    else:
        (line,) = lines
        assert f"the first is row {teaches.index(False)}" in line


GOOD = {"prompt": "Say ba", "completion": "ko"}
CUT = {"prompt": "Say ba" * 20, "completion": "ko"}
KINDS = {
    "cut": (GOOD, CUT),
    "one token": ({"input_ids": [5, 6, 7]}, {"input_ids": [5]}),
    "empty text": ({"text": "Say ba"}, {"text": ""}),
    "no label": (
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [5, 6, 7], "labels": [5, -100, -100]},
    ),
}


def stream(rows):
    return IterableDataset.from_generator(rows.__iter__)


def trainer(tmp_path, rows, cls=FNSFTTrainer, **options):
    args = {name: options.pop(name) for name in list(options) if name != "eval_dataset"}
    return cls(
        tiny_model("llama"),
        sft_config(tmp_path, max_length=32, max_steps=1, **args),
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
        **options,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packing", [{}, {"packing": True}, {"packing": True, "packing_strategy": "bfd_split"}])
@pytest.mark.parametrize("source", [Dataset.from_list, stream])
def test_no_way_of_preparing_hides_them(tmp_path, log, kind, packing, source):
    good, nothing = KINDS[kind]
    keeps_all = packing.get("packing_strategy") == "bfd_split" and kind == "cut"  # what is cut goes into other rows
    if not keeps_all:
        with pytest.raises(FNSFTError, match=r"(answer of every row|no row) of the train data"):
            trainer(tmp_path, source([nothing] * 8), **packing)
    rows = [nothing] * 3 + [good] * 5
    found = trainer(tmp_path, source(rows), **packing)
    plain = trainer(tmp_path, source(rows), SFTTrainer, **packing)
    assert list(found.train_dataset) == list(plain.train_dataset)  # they are counted, and nothing else
    if packing.get("packing_strategy") is None:
        count = "the first is row 0" if source is stream else "3 of 8 rows of the train data"
        assert count in log.text
        assert "teach nothing" in log.text or "are left out: their answer begins after max_length=32" in log.text


@pytest.mark.parametrize("packing", [{}, {"eval_packing": True}])
def test_an_evaluation_without_labels_is_an_error_too(tmp_path, packing):
    good, bad = (Dataset.from_list([row] * 8) for row in (GOOD, CUT))
    with pytest.raises(FNSFTError, match="of the eval data"):
        trainer(tmp_path, good, eval_dataset=bad, eval_strategy="steps", eval_steps=1, **packing)
    with pytest.raises(FNSFTError, match="of the hard data"):
        trainer(tmp_path, good, eval_dataset={"hard": bad}, eval_strategy="steps", eval_steps=1, **packing)
