"""The answers to Q1 and Q2, by the rules of the plan, in plain words."""

from __future__ import annotations

from dataclasses import dataclass, field

from fnsft_trl.evaluation.paired import Ratio, holm

from .comparing import Comparison, paired
from .dissociating import Dissociation, dissociations
from .paths import Found
from .plan import DOMAINS, GOAL, GOOD, NO_DIFFERENCE, SHARE, UNPROTECTED
from .stages import confirmation, dissociation, is_tuned, kept_shifts, networks_arm, rival, third, tuned_shifts


LEVEL = 0.05
PROTECTED = "subspace"


@dataclass(frozen=True)
class Answer:
    """
    An answer.

    Attributes:
        question (`str`): Q1 or Q2.
        word (`str`): `open` until all cells are there; else as the plan has it.
        text (`str`): in plain words, with the numbers.
        comparisons (`dict[str, Comparison]`): what it stands on, by name; of Q1.
        adjusted (`dict[str, float]`): name -> p after Holm.
        dissociations (`dict[str, Dissociation]`): of Q2, by basis.
    """

    question: str
    word: str
    text: str
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    adjusted: dict[str, float] = field(default_factory=dict)
    dissociations: dict[str, Dissociation] = field(default_factory=dict)


def shown(ratio: Ratio) -> str:
    """A ratio with its interval."""
    return f"{ratio.value:.3f} [{ratio.interval[0]:.3f}, {ratio.interval[1]:.3f}]"


def answer_q1(found: Found, *, share: float = SHARE) -> Answer:
    """Does protection beat the best unprotected way at equal learning?"""
    wanted = confirmation(found)
    missing = sum(each.key not in found for each in wanted)
    if not is_tuned(found):
        return Answer("Q1", "open", "Not decided: the tuning is not finished.")
    if missing:
        return Answer("Q1", "open", f"Not decided: {missing} of {len(wanted)} confirming cells are not there yet.")
    tasks = tuned_shifts(found)
    rivals = {task: rival(found, task) for task in tasks}
    comparisons = {"the rival": paired(found, PROTECTED, rivals, share)}
    for arm in (*UNPROTECTED, "random"):
        comparisons[arm] = paired(found, PROTECTED, dict.fromkeys(tasks, arm), share)
    comparisons["networks"] = paired(found, PROTECTED, {task: networks_arm(found, task) for task in tasks}, share)
    adjusted = holm({name: each.p for name, each in comparisons.items() if name != "the rival"})
    main = comparisons["the rival"]
    # Of a rival that differs between shifts, the p is its own, held to the largest of what it is made of.
    p = max(main.p, *(adjusted[arm] for arm in set(rivals.values())))
    word = _q1_word(main, p)
    text = _q1_text(word, main, p, rivals)
    text += _control_text(comparisons["random"]) + _third_text(found, word, share)
    return Answer("Q1", word, text, comparisons, adjusted)


def _q1_word(main: Comparison, p: float) -> str:
    if main.missed[0] > main.missed[1]:
        return "no"
    if not main.has_enough:
        return "undecided"
    low, high = main.ratio.interval
    if high < 1 and main.ratio.value <= GOOD and p < LEVEL:
        return "yes"
    if main.ratio.is_equivalent:
        return "no difference"
    if low > 1:
        return "no"
    return "less, but not by half" if high < 1 and main.ratio.value > GOOD else "undecided"


def _q1_text(word: str, main: Comparison, p: float, rivals: dict[str, str]) -> str:
    said = {
        "yes": "Protection forgets less than the best unprotected way at equal learning.",
        "less, but not by half": "Protection forgets less than the best unprotected way, but more than half of it.",
        "no difference": "Protection and the best unprotected way forget alike at equal learning.",
        "no": "Protection does not forget less than the best unprotected way at equal learning.",
        "undecided": "The cells do not decide whether protection forgets less than the best unprotected way.",
    }[word]
    against = ", ".join(f"{arm} on {task}" for task, arm in rivals.items())
    text = f"**{word}**. {said} Compared with {against}"
    if main.ratio is None:
        text += ": no pair of cells reaches the target on both sides."
    else:
        text += f": ratio of KL {shown(main.ratio)} (95%), over {len(main.differences)} pairs, p {p:.4f}."
        if word == "yes":
            text += f" The goal of {GOAL:g} is {'' if main.ratio.value <= GOAL else 'not '}reached."
    if any(main.missed):
        text += f" The target was never reached in {main.missed[0]} (protection) and {main.missed[1]} of {main.pairs}."
    return text


def _control_text(random: Comparison) -> str:
    if random.ratio is None:
        return ""
    same = "; they are equivalent, so which directions are protected does not matter" * random.ratio.is_equivalent
    return f" Against as many random directions: {shown(random.ratio)}{same}."


def _third_text(found: Found, word: str, share: float) -> str:
    wanted = third(found)
    if not wanted:
        return " No third shift passed the gate."
    if any(each.key not in found for each in wanted):
        return " The third shift is not finished."
    first, task = tuned_shifts(found)[0], kept_shifts(found)[2]
    found_there = paired(found, PROTECTED, {task: rival(found, first)}, share, like=first)
    if found_there.ratio is None:
        return f" On the third shift ({task}) no pair reaches the target."
    limit = " so the answer is limited to the first two." if word == "yes" and found_there.ratio.value >= 1 else ""
    end = f";{limit}" if limit else "."
    return f" On the third shift ({task}), on which nothing was chosen: {shown(found_there.ratio)}{end}"


def answer_q2(found: Found) -> Answer:
    """Do networks protect their own domain better than principal components by the same rule?"""
    wanted = dissociation(found)
    missing = sum(each.key not in found for each in wanted)
    if not wanted:
        return Answer("Q2", "open", "Not decided: the cells that it is chosen by are not finished.")
    if missing:
        return Answer("Q2", "open", f"Not decided: {missing} of {len(wanted)} cells are not there yet.")
    of = dissociations(found)
    networks, components, ceiling = of["networks"], of["pca"], of["ceiling"]
    gain = of["networks - pca"]
    if networks.interval[0] > 0 and gain.interval[0] > 0:
        word, said = "yes", "Networks protect their own domain, and better than principal components."
    elif gain.interval[1] < 0 or max(map(abs, gain.narrow)) <= NO_DIFFERENCE:
        word, said = "no", "Networks do not protect their own domain better than principal components do."
    else:
        word, said = "undecided", "The cells do not decide whether networks add anything to principal components."
    text = f"**{word}**. {said} I of networks {networks.shown}, of principal components {components.shown}, of the "
    text += f"supervised ceiling {ceiling.shown}; networks less components {gain.shown} (95%)."
    if ceiling.interval[0] <= 0 <= ceiling.interval[1]:
        text += f" The ceiling does not dissociate either: {' and '.join(DOMAINS)} cannot be told apart in this way."
    return Answer("Q2", word, text, dissociations=of)
