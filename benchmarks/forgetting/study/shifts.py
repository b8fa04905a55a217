"""Shifts: tasks that the embedded model has not learnt, out of what lies on this disk."""

import random
import unicodedata
from collections.abc import Callable
from pathlib import Path

from fnsft_trl.data.embedded import question_routing
from fnsft_trl.errors import FNSFTError

from .plan import EVERYWHERE, TEST_ROWS, TRAIN_ROWS


_VERBS = Path(__file__).parent / "german_verbs.txt"
_SCRIPTS = ("LATIN", "GREEK", "CYRILLIC", "ARMENIAN", "HEBREW", "ARABIC", "DEVANAGARI", "THAI")


def shift(name: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Rows to train and to test on, with `prompt` and `completion`; no row is in both, and no prompt twice.

    Raises:
        FNSFTError: there is no shift of that name.
    """
    rows = _SHIFTS.get(name.removesuffix(EVERYWHERE))
    if rows is None:
        raise FNSFTError(f"there is no shift {name!r}; there are: {', '.join(_SHIFTS)}")
    return rows()


def _routing() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The desk that a question belongs to."""
    return question_routing(TRAIN_ROWS, TEST_ROWS)


def _german() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Past tense and perfect of a German verb."""
    lines = [line.split() for line in _VERBS.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    forms = {verb: f" er {past}, er {auxiliary} {perfect}" for verb, past, auxiliary, perfect in lines}
    return _split([{"prompt": f"{verb}:", "completion": answer} for verb, answer in sorted(forms.items())])


def _characters() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The name of a character, of Unicode 3.2, which is the same in every Python."""
    names = {}
    for code in range(0xA1, 0x2600):
        name = unicodedata.ucd_3_2_0.name(chr(code), "")
        if name.startswith(_SCRIPTS) and len(name) <= 48:
            names[chr(code)] = name
    draw = random.Random(0)
    chosen = sorted(draw.sample(sorted(names), TRAIN_ROWS + TEST_ROWS))
    return _split([{"prompt": f"{each}:", "completion": f" {names[each]}"} for each in chosen])


_ONES = ("null", "ein", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn", "elf", "zwölf")
_TENS = ("zwanzig", "dreißig", "vierzig", "fünfzig", "sechzig", "siebzig", "achtzig", "neunzig")


def in_german(number: int) -> str:
    """A number in German words.

    Args:
        number: from 1 to 9,999.
    """
    if number >= 1000:
        return _ONES[number // 1000] + "tausend" + (in_german(number % 1000) if number % 1000 else "")
    if number >= 100:
        return _ONES[number // 100] + "hundert" + (in_german(number % 100) if number % 100 else "")
    if number >= 20:
        ones = _ONES[number % 10] + "und" if number % 10 else ""
        return ones + _TENS[number // 10 - 2]
    if number > 12:
        return {16: "sech", 17: "sieb"}.get(number, _ONES[number - 10]) + "zehn"
    return "eins" if number == 1 else _ONES[number]


def _numbers() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """A number in German words."""
    chosen = random.Random(0).sample(range(100, 10000), TRAIN_ROWS + TEST_ROWS)
    return _split([{"prompt": f"{number}:", "completion": f" {in_german(number)}"} for number in chosen])


def _split(rows: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    rows = random.Random(0).sample(rows, len(rows))
    if len(rows) < TRAIN_ROWS + TEST_ROWS:
        raise FNSFTError(f"a shift has {len(rows)} rows; {TRAIN_ROWS + TEST_ROWS} are needed")
    return rows[:TRAIN_ROWS], rows[TRAIN_ROWS : TRAIN_ROWS + TEST_ROWS]


_SHIFTS: dict[str, Callable[[], tuple[list[dict[str, str]], list[dict[str, str]]]]] = {
    "routing": _routing,
    "german": _german,
    "characters": _characters,
    "numbers": _numbers,
}
