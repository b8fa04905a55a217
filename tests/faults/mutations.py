"""Changes of an input: of its bytes, or of a value in its JSON."""

import copy
import random


TOKENS = [
    *(b"null", b"NaN", b"-Infinity", b"1e999", b"-0", b"9" * 400, b"\xff\xfe", b"\x00", b"\\ud800", b'"', b"{", b"}"),
    *(b"[" * 3000, b'{"a":' * 3000, b"!!python/object:os.system", b"&a [*a]", b"<<: *x", b"../../x", b"\n", b"\r"),
    *(b"\xe2\x80\xa8", b"true", b"0x10", b"1_0", b"01", b"%n", b": ", b"- ", b"#", b"1:2:3", b"{{ 7 * 7 }}", b"~"),
    *(b"{text:>999999999}", b"{text.__class__}", b"{text!r}", b"0-999999999999", b"\xff" * 8, b"--", b"="),
]
VALUES = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", " ", "x" * 5000, "\ud800", "\x00", "../..", "1:4", "0-5,9", "null", [], {}, [[]], [None], {"": None}),
    *({"a": {"a": {}}}, ["x"] * 50, "<script>alert(1)</script>", "${HOME}", "{% for x in y %}"),
    *("{text:>999999999}", "{text.__class__}", "0-999999999999", "--output_dir", "--config=/", "1e-4"),
]


def mutated(data: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """A copy with one to four changes."""
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        place = draw.randrange(len(data) + 1)
        end = min(len(data), place + draw.choice((1, 1, 4, 16, 200)))
        kind = draw.randrange(6)
        if kind == 0 and data:
            place = min(place, len(data) - 1)
            data = data[:place] + bytes([data[place] ^ (1 << draw.randrange(8))]) + data[place + 1 :]
        elif kind == 1:
            data = data[:place] + data[end:]
        elif kind == 2:
            data = data[:place] + data[place:end] * 2 + data[end:]
        elif kind == 3:
            other = draw.choice(others)
            start = draw.randrange(len(other) + 1)
            data = data[:place] + other[start : start + end - place] + data[end:]
        elif kind == 4:
            data = data[:place]
        else:
            data = data[:place] + draw.choice(TOKENS) + data[draw.choice((place, end)) :]
    return data


def with_another_value(value, draw: random.Random):
    """A copy of a JSON value in which one part is another, is away, or stands under another key."""
    value = copy.deepcopy(value)
    places = []

    def walk(part) -> None:
        for key in list(part) if isinstance(part, dict) else range(len(part)):
            places.append((part, key))
            if isinstance(part[key], dict | list):
                walk(part[key])

    if not isinstance(value, dict | list) or not value:
        return draw.choice(VALUES)
    walk(value)
    part, key = draw.choice(places)
    kind = draw.randrange(4)
    if kind == 0:
        del part[key]
    elif kind == 1 and isinstance(part, dict):
        part[draw.choice(("", "x", f"{key}s", "0", "-1", "a.b"))] = part.pop(key)
    else:
        other, held = draw.choice(places)
        part[key] = copy.deepcopy(draw.choice((draw.choice(VALUES), other[held] if held in _keys(other) else None)))
    return value


def _keys(part):
    return part if isinstance(part, dict) else range(len(part))
