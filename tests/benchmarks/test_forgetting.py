"""The study of forgetting: its plan, its rules and its report, on cells that were made up."""

import json
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from study import plan, texts
from study.afterwards import afterwards, beside_other_rate, learning_rate, left_open
from study.arms import ATTENTION, KEY, TARGETS, targets_of
from study.command import HOME
from study.paths import Levels, Path, at_target
from study.pausing import Pause
from study.reporting import write_report
from study.running import Study
from study.shifts import in_german, shift
from study.stages import (
    best_of,
    confirmation,
    dissociation,
    forgetting,
    gate,
    kept_shifts,
    networks_arm,
    proposed,
    rival,
    third,
    tuning,
)
from study.verdict import answer_q1, answer_q2
from synthetic import BASE_LOSS, BEST, DEMONSTRATED, synthetic, whole_study

from fnsft_trl.errors import FNSFTError
from fnsft_trl.experiments.cells import Cells


@pytest.fixture(scope="module")
def found():
    return whole_study()


@pytest.mark.slow
def test_the_plan_has_the_cells_that_it_says(found):
    stages = Counter(cell["stage"] for cell in found.values())
    assert stages["gate"] == 4 * 3 + 4  # and the base of each shift
    assert len(tuning(found)) == 2 * 5 * 3 + _edges(found)  # of these, 2 * 3 are of the gate
    assert stages["confirmation"] == len(confirmation(found)) == 2 * 6 * 5
    assert stages["third"] == len(third(found)) == 3 * 5
    assert stages["dissociation"] == len(dissociation(found)) == 3 * 2 * 5
    assert {key[1] for key, cell in found.items() if cell["stage"] == "third"} == {plan.SHIFTS[2]}


def _edges(found) -> int:
    """Arms whose best rate is at an edge: made-up cells do not depend on their rate, so only ties decide."""
    return sum(
        best_of(found, task, arm, rates=rates).learning_rate in (rates[0], rates[-1])
        for task in plan.SHIFTS[:2]
        for arm, rates in plan.TUNING.items()
    )


def test_nothing_that_confirms_is_among_what_chose(found):
    chose = {key for key, cell in found.items() if cell["stage"] in ("gate", "tuning", "screen", "networks")}
    assert {key[4] for key in chose} == {plan.TUNING_SEED}
    assert not {key[4] for key in set(found) - chose} & {plan.TUNING_SEED}
    assert {key[0] for key in chose} & {"confirm", "dissociation"} == set()


def test_an_arm_whose_best_rate_is_at_an_edge_is_tried_beyond_it(found):
    few = whole_study(stages=("gate",))
    assert {each.learning_rate for each in tuning(few) if each.arm == "lora"} == set(plan.TUNING["lora"])
    seen = Counter()
    for task in plan.SHIFTS[:2]:
        for arm, rates in plan.TUNING.items():
            place = plan.LADDER.index(best_of(found, task, arm, rates=rates).learning_rate)
            beyond = {0: plan.LADDER[place - 1], 1: None, 2: plan.LADDER[place + 1]}[rates.index(plan.LADDER[place])]
            tried = {each.learning_rate for each in tuning(found) if (each.task, each.arm) == (task, arm)}
            assert tried - set(rates) == {beyond} - {None}
            seen[beyond is None] += 1
    assert len(seen) == 2  # both happened


def test_targets_are_shares_of_what_only_training_teaches(found):
    levels = Levels.of(found, "routing")
    assert levels == Levels(BASE_LOSS, DEMONSTRATED, BEST)
    assert levels.target(0.9) == pytest.approx(8 - 0.9 * 7)


def test_a_path_is_read_as_it_was_worked_out_by_hand(found):
    setting = next(each for each in gate(found) if each.arm == "full")
    cell = found[setting.key]
    # The loss 1.7 lies between the last two steps, at 2.9 and 1: ln KL is linear, .9^2 and 1 of the KL at the end.
    share = (2.9 - 1.7) / 1.9
    steps = at_target(cell, plan.BY_STEPS, 1.7)
    scales = at_target(cell, plan.BY_SCALES, 1.7)
    ends = cell["points"][-1]["kl_sums"]["wikipedia"]
    end = sum(ends) / (100 * len(ends))
    assert steps.kl["wikipedia"] == pytest.approx(end * math.exp((1 - share) * math.log(0.81)))
    share = (6.7 - 1.7) / 5.7  # from .7, at 6.7
    assert scales.kl["wikipedia"] == pytest.approx(end * math.exp((1 - share) * math.log(0.49)))
    assert at_target(cell, plan.BY_STEPS, 0.5).kl is None
    assert at_target(cell, plan.BY_STEPS, 0.5).mean == math.inf
    assert Path.of(cell, plan.BY_STEPS).losses == (20.0, 10.5, pytest.approx(2.9), 1.0)


def test_a_shift_is_kept_only_if_both_ways_forget_enough():
    assert kept_shifts(whole_study(stages=("gate",))) == list(plan.SHIFTS)
    little = whole_study({"lora": 0.04}, stages=("gate",))
    assert kept_shifts(little) == []
    assert forgetting(little, "routing")["full"].mean > plan.LEAST_FORGETTING
    assert kept_shifts({}) == []


def test_shifts_are_made_harder_one_by_one_while_fewer_than_three_are_kept():
    enough = whole_study(stages=("gate",))
    assert proposed(enough) == list(plan.SHIFTS)
    assert proposed({}) == list(plan.SHIFTS)  # not before all of them are known
    little = whole_study({"lora": 0.04}, stages=("gate",))
    assert set(proposed(little)) == {*plan.SHIFTS, *plan.HARDER}  # none of which is kept either
    first = {key: cell for key, cell in little.items() if key[1] not in plan.HARDER[1:]}
    assert proposed(first) == [*plan.SHIFTS, *plan.HARDER[:2]]
    mixed = {key: cell for key, cell in enough.items() if key[1] in plan.SHIFTS[:2]}
    mixed |= {key: cell for key, cell in little.items() if key[1] not in plan.SHIFTS[:2]}
    assert kept_shifts(mixed) == list(plan.SHIFTS[:2])
    mixed |= {
        (*key[:1], plan.HARDER[0], *key[2:]): cell | {"task": plan.HARDER[0]}
        for key, cell in enough.items()
        if key[1] == plan.SHIFTS[0]
    }
    mixed = {key: cell for key, cell in mixed.items() if key[1] not in plan.HARDER[1:]}
    assert kept_shifts(mixed) == [*plan.SHIFTS[:2], plan.HARDER[0]]
    assert proposed(mixed) == [*plan.SHIFTS, plan.HARDER[0]]


def test_a_harder_shift_trains_all_linear_layers_on_the_same_rows():
    for plain, harder in zip(plan.SHIFTS, plan.HARDER, strict=True):
        assert shift(plain) == shift(harder)
        assert targets_of(plain) == TARGETS
        assert set(targets_of(harder)) == {*TARGETS, *ATTENTION}


def test_a_way_that_never_learns_enough_spares_nothing():
    found = whole_study(stages=("gate",))

    def slow(arms):
        return {
            key: cell
            | {"points": [p | {"learning": max(p["learning"], 3.0)} for p in cell["points"]]}
            | {"also": {"interpolated": []}}
            if cell["arm"] in arms
            else cell
            for key, cell in found.items()
        }

    assert kept_shifts(slow({"lora"})) == list(plan.SHIFTS)
    assert forgetting(slow({"lora"}), "german")["lora"].kl is None
    assert kept_shifts(slow({"lora", "full"})) == list(plan.SHIFTS)  # then the best is what they reach


@pytest.mark.slow
def test_the_rival_is_the_unprotected_arm_that_forgot_least(found):
    assert rival(found, "routing") == "replay"
    assert rival(whole_study({"lora": 0.1}), "german") == "lora"
    assert networks_arm(found, "german") in {f"networks {m}" for m in plan.SCREENED_NETWORKS}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("subspace", "word"),
    [(0.02, "yes"), (0.2, "less, but not by half"), (0.3, "no difference"), (0.6, "no")],
)
def test_q1_is_answered_by_its_rules(subspace, word):
    answer = answer_q1(whole_study({"subspace": subspace}))
    main = answer.comparisons["the rival"]
    assert answer.word == word
    assert main.ratio.value == pytest.approx(subspace / 0.3, rel=0.1)
    assert main.pairs == len(main.differences) == 10
    assert f"**{word}**" in answer.text
    assert ("The goal of 0.1 is reached" in answer.text) == (subspace == 0.02)


def test_protection_that_does_not_learn_enough_is_a_no_however_little_it_forgets(found):
    changed = dict(found)
    for key, cell in found.items():
        if cell["arm"] == "subspace" and cell["stage"] == "confirmation" and cell["seed"] < 3:
            points = [point | {"learning": max(point["learning"], 5.0)} for point in cell["points"]]
            between = [point | {"learning": max(point["learning"], 5.0)} for point in cell["also"]["interpolated"]]
            changed[key] = cell | {"points": points, "also": cell["also"] | {"interpolated": between}}
    answer = answer_q1(changed)
    assert answer.word == "no"
    assert answer.comparisons["the rival"].missed == (4, 0)
    assert "never reached in 4 (protection) and 0 of 10" in answer.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("networks", "word"), [(0.3, "yes"), (0.6, "no"), (0.9, "no")], ids=["better", "alike", "worse"]
)
def test_q2_is_answered_by_its_rules(networks, word):
    answer = answer_q2(whole_study({"networks": networks}))
    assert answer.word == word
    # I is half of -2 ln(keeps) where both domains are kept alike
    assert answer.dissociations["networks"].value == pytest.approx(-math.log(networks), abs=0.1)
    assert answer.dissociations["ceiling"].value == pytest.approx(-math.log(0.2), abs=0.1)


def test_a_question_is_open_until_its_cells_are_there(found):
    assert answer_q1({}).word == answer_q2({}).word == "open"
    fewer = {key: cell for key, cell in found.items() if not (cell["stage"] == "confirmation" and cell["seed"] == 5)}
    assert answer_q1(fewer).text == "Not decided: 12 of 60 confirming cells are not there yet."


@pytest.mark.slow
@pytest.mark.parametrize("stages", [(), ("gate",), None], ids=["none", "gate", "all"])
def test_the_report_is_the_same_bytes_from_the_same_cells(stages, tmp_path):
    found = whole_study() if stages is None else whole_study(stages=stages)
    results = [
        write_report(cells, tmp_path / name) for name, cells in (("a", found), ("b", dict(reversed(found.items()))))
    ]
    assert results[0] == results[1]
    first, second = (sorted((tmp_path / name).iterdir()) for name in "ab")
    assert [path.name for path in first] == [path.name for path in second]
    assert all(one.read_bytes() == other.read_bytes() for one, other in zip(first, second, strict=True))
    text = (tmp_path / "a" / "report.md").read_text()
    if stages is None:
        assert "Q1: **yes**" in text
        assert "confirmation-routing.png" in text
    json.loads((tmp_path / "a" / "results.json").read_text())


class Interrupted(Exception):
    pass


def test_a_killed_study_goes_on_and_loses_no_cell(tmp_path, monkeypatch):
    done = []

    def cell(self, setting):
        if len(done) == 4 and setting not in done:
            done.append(setting)
            raise Interrupted
        done.append(setting)
        return synthetic(setting)

    monkeypatch.setattr(Study, "cell", cell)
    study = Study(tmp_path / "cells.jsonl", tmp_path / "work", Pause(None, say=print), print)
    with pytest.raises(Interrupted):
        study.run(gate)
    assert len(study.cells()) == 4
    study.run(gate)
    assert len(study.cells()) == len(gate({}))
    assert Counter(done)[done[4]] == 2  # begun anew
    assert max(Counter(done[:4]).values()) == 1
    lines = (tmp_path / "cells.jsonl").read_text().splitlines()
    assert {tuple(json.loads(line)[name] for name in KEY) for line in lines} == {each.key for each in gate({})}


def missed(found, tasks):
    """The same, but for the rival on some shifts, which never learns enough."""
    slow = {}
    for key, cell in found.items():
        part, task, arm, *_ = key
        if part == "confirm" and task in tasks and arm == rival(found, task):
            floor = [point | {"learning": max(point["learning"], 3.0)} for point in cell["points"]]
            between = [point | {"learning": max(point["learning"], 3.0)} for point in cell["also"]["interpolated"]]
            cell = cell | {"points": floor, "also": cell["also"] | {"interpolated": between}}
        slow[key] = cell
    return slow


@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 1, 2])
def test_what_the_verdict_leaves_open_is_trained_afterwards_and_compared_apart(found, count, tmp_path):
    tasks = plan.SHIFTS[:count]
    slow = missed(found, tasks)
    added = afterwards(slow)
    assert left_open(slow) == list(tasks)
    assert Counter((each.task, each.arm) for each in added) == {(task, "replay"): 5 for task in tasks}
    assert {(each.task, each.learning_rate) for each in added} == {
        (task, learning_rate(found, task)) for task in tasks
    }
    decided = answer_q1(slow)
    every = slow | {each.key: synthetic(each) for each in added}
    assert answer_q1(every) == decided
    compared = beside_other_rate(every)
    assert len(write_report(every, tmp_path)["at equal learning"]) == 6 + bool(count)
    if not count:
        assert compared is None
        return
    assert len(compared.differences) == compared.pairs == 10
    assert compared.ratio.value == pytest.approx(0.02 / 0.3, rel=0.1)


def test_nothing_is_added_before_the_verdict_is_there():
    assert afterwards(whole_study(stages=("gate", "tuning"))) == []


def test_two_that_run_one_study_share_its_cells(tmp_path, monkeypatch):
    """As two processes do: each holds other locks on the same files."""
    done, together = [], Barrier(2, timeout=60)

    def cell(self, setting):
        done.append(setting)
        if len(done) <= 2:
            together.wait()  # each has begun a cell before one of them is finished
        return synthetic(setting)

    monkeypatch.setattr(Study, "cell", cell)
    monkeypatch.setattr("study.running._SECONDS", 0.01)
    studies = [Study(tmp_path / "cells.jsonl", tmp_path / str(n), Pause(None, say=print), print) for n in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        for ended in [pool.submit(study.run, gate) for study in studies]:
            ended.result(timeout=60)
    assert max(Counter(done).values()) == 1
    assert set(studies[0].cells()) == {each.key for each in gate({})} == {each.key for each in done}
    assert not list(tmp_path.glob(".*.lock"))


def test_a_pause_lasts_as_long_as_its_file(tmp_path, monkeypatch):
    file, said = tmp_path / "pause", []
    file.touch()
    looks = iter([None, None, file.unlink])
    monkeypatch.setattr("study.pausing.time.sleep", lambda seconds: (next(looks) or (lambda: None))())
    pause = Pause(file, say=said.append)
    pause.on_step_end(None, None, None)
    assert not file.exists()
    assert [text.partition(" ")[0] for text in said] == ["paused", "goes"]
    pause.wait()
    assert len(said) == 2


@pytest.mark.slow
def test_no_text_and_no_row_is_in_two_places():
    """Needs the files of the embedded texts."""
    places = {
        (name, part): texts.articles(name, part)
        for name, parts in (("wikipedia", 3), ("docs", 3), ("questions", 2))
        for part in ("choose", "confirm", "keep")[:parts]
    }
    rows = [article for articles in places.values() for article in articles]
    rows += texts.chat_prompts()
    assert len(rows) == len(set(rows))
    titles = [
        {text.partition(" -- ")[0].split(" (")[0] for text in places["wikipedia", p]}
        for p in ("choose", "confirm", "keep")
    ]
    assert sum(map(len, titles)) == len(set.union(*titles))
    questions = {json.loads(text)["question"] for p in ("choose", "confirm") for text in places["questions", p]}
    for name in plan.SHIFTS:
        train, test = shift(name)
        assert (len(train), len(test)) == (plan.TRAIN_ROWS, plan.TEST_ROWS)
        prompts = [row["prompt"] for row in train + test]
        assert len(set(prompts)) == len(prompts)
        asked = {prompt.removeprefix("Question: ").removesuffix("\nDesk:") for prompt in prompts}
        assert not asked & questions
        assert not asked & set(texts.chat_prompts())


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (1, "eins"),
        (16, "sechzehn"),
        (17, "siebzehn"),
        (20, "zwanzig"),
        (31, "einunddreißig"),
        (101, "einhunderteins"),
        (700, "siebenhundert"),
        (2012, "zweitausendzwölf"),
        (4576, "viertausendfünfhundertsechsundsiebzig"),
    ],
)
def test_numbers_are_said_in_german(number, words):
    assert in_german(number) == words


def test_a_shift_that_does_not_exist_is_refused():
    with pytest.raises(FNSFTError, match="no shift 'x'"):
        shift("x")


@pytest.mark.slow
def test_the_committed_report_is_what_the_committed_cells_give(tmp_path):
    write_report(Cells(HOME / "cells.jsonl", by=KEY).found, tmp_path)
    committed = HOME / "results"
    assert {path.name for path in committed.iterdir()} == {path.name for path in tmp_path.iterdir()}
    for path in sorted(tmp_path.iterdir()):
        assert path.read_bytes() == (committed / path.name).read_bytes(), path.name
