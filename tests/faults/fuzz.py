"""Files of people one does not know: every mutation is read whole, or refused by an FNSFTError, within seconds.

    python tests/faults/fuzz.py --executions 100000 --seed 0

Each target has valid inputs. They are changed at the level of bytes (a bit, a piece that is dropped, doubled or put in
from another input, a token that parsers trip over), and of JSON (a value in the place of another). What ends in any
other exception, or takes longer, is written below `--found`, with its target and traceback.
"""

import argparse
import copy
import json
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


TESTS = Path(__file__).parent.parent
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))

from fnsft_trl.errors import FNSFTError  # noqa: E402


SECONDS = 10  # for one input, after which it hangs
TOKENS = [
    *(b"null", b"NaN", b"-Infinity", b"1e999", b"-0", b"9" * 400, b"\xff\xfe", b"\x00", b"\\ud800", b'"', b"{", b"}"),
    *(b"[" * 3000, b'{"a":' * 3000, b"!!python/object:os.system", b"&a [*a]", b"<<: *x", b"../../x", b"\n", b"\r"),
    *(b"\xe2\x80\xa8", b"true", b"0x10", b"1_0", b"01", b"%n", b": ", b"- ", b"#", b"1:2:3", b"{{ 7 * 7 }}", b"~"),
]
VALUES = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", " ", "x" * 5000, "\ud800", "\x00", "../..", "1:4", "0-5,9", "null", [], {}, [[]], [None], {"": None}),
    *({"a": {"a": {}}}, ["x"] * 50, "<script>alert(1)</script>", "${HOME}", "{% for x in y %}"),
]


class Hangs(BaseException):
    """An input took too long."""


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


@dataclass(frozen=True)
class Target:
    """
    Something that reads what others have written.

    Attributes:
        seeds (`list[bytes]`): valid inputs.
        read (`Callable`): reads one input, given as bytes and a folder to put it into.
        is_json (`bool`): whether inputs are JSON, and are changed as such half of the time.
    """

    seeds: list[bytes]
    read: Callable[[bytes, Path], object]
    is_json: bool = True

    def input(self, draw: random.Random) -> bytes:
        """A changed input."""
        data = draw.choice(self.seeds)
        if self.is_json and draw.random() < 0.5:
            return json.dumps(with_another_value(json.loads(data), draw)).encode("utf-8", "surrogatepass")
        return mutated(data, self.seeds, draw)


def targets(folder: Path) -> dict[str, Target]:
    """All of them, with inputs that this version writes and reads."""
    from helpers import ROOT, tiny_model, tiny_rows, tiny_tokenizer

    from fnsft_trl import FunctionalNetworkConfig, discover_networks, to_trl_format
    from fnsft_trl.cli.options.parse import parse_recipe
    from fnsft_trl.experiments.cells import Cells
    from fnsft_trl.ranges import parse_ranges
    from fnsft_trl.template.legacy import LEGACY_FILE
    from fnsft_trl.template.template import FunctionalNetworkTemplate

    config = FunctionalNetworkConfig(ica_components=2, ica_rank=8, ica_max_tokens=200, ica_max_length=32)
    template = discover_networks(tiny_model("llama"), tiny_tokenizer(), [r["prompt"] for r in tiny_rows(50)], config)
    template.save_pretrained(folder / "template")
    golden = ROOT / "tests" / "golden" / "templates"
    configs = [path.read_bytes() for path in (folder / "template" / "config.json", *golden.glob("*/config.json"))]
    tensors = [(folder / "template" / "template.safetensors").read_bytes()]
    legacy = [path.read_bytes() for path in ROOT.glob(f"tests/golden/**/{LEGACY_FILE}")]
    legacy += [b'{"0": [[0, 1], [2]], "1": [[3], [0, 4]]}']
    rows = [line.encode() for line in (ROOT / "tests" / "rows" / "catalogue.jsonl").read_text().splitlines()]
    rows = [json.dumps(json.loads(row)["row"]).encode() for row in rows]
    recipes = [path.read_bytes() for path in (ROOT / "recipes").glob("*.yaml")]
    cells = (ROOT / "benchmarks" / "forgetting" / "cells.jsonl").read_bytes().splitlines()[:3]
    specs = [b"0-5,9", b"1:4", b"all", b"0", b"3-", b":2", b"-1", b"0,2,4", b"1-3,5:9"]

    def read_template(name: str):
        def read(data: bytes, place: Path) -> None:
            for file in (folder / "template").iterdir():
                (place / file.name).write_bytes(data if file.name == name else file.read_bytes())
            FunctionalNetworkTemplate.from_pretrained(place)

        return read

    def read_legacy(data: bytes, place: Path) -> None:
        (place / LEGACY_FILE).write_bytes(data)
        FunctionalNetworkTemplate.from_pretrained(place / LEGACY_FILE)

    def read_recipe(data: bytes, place: Path) -> None:
        (place / "recipe.yaml").write_bytes(data)
        parse_recipe(str(place / "recipe.yaml"), {})

    def read_row(data: bytes, place: Path) -> None:
        try:
            row = json.loads(data)
        except (ValueError, RecursionError):
            return
        if isinstance(row, dict):
            to_trl_format([row])

    def read_cells(data: bytes, place: Path) -> None:
        (place / "cells.jsonl").write_bytes(data + b"\n")
        Cells(place / "cells.jsonl")

    def read_spec(data: bytes, place: Path) -> None:
        parse_ranges(data.decode("utf-8", "replace"), 32)

    return {
        "layers": Target(specs, read_spec, is_json=False),
        "rows": Target(rows, read_row),
        "cells": Target(cells, read_cells),
        "template description": Target(configs, read_template("config.json")),
        "template tensors": Target(tensors, read_template("template.safetensors"), is_json=False),
        "original's templates": Target(legacy, read_legacy),
        "recipes": Target(recipes, read_recipe, is_json=False),
    }


SHARES = {"layers": 0.3, "rows": 0.3, "cells": 0.08, "original's templates": 0.1, "recipes": 0.02}
REST = 0.1


def outcome(target: Target, data: bytes, place: Path) -> str | None:
    """What is wrong with how an input ends; `None` where nothing is."""

    def hangs(number, frame):
        raise Hangs

    signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    try:
        target.read(data, place)
    except FNSFTError as error:
        return None if len(str(error)) < 2100 else f"a message of {len(str(error))} characters"
    except Hangs:
        return f"no end after {SECONDS} s"
    except Exception:
        return traceback.format_exc()
    finally:
        signal.alarm(0)
    return None


def run(executions: int, seed: int, found: Path | None) -> dict[str, Counter]:
    """Target -> how many inputs were tried, and how many ended otherwise than they may."""
    counts: dict[str, Counter] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, target in targets(Path(folder)).items():
            place = Path(folder) / "place"
            place.mkdir(exist_ok=True)
            draw, kinds, began = random.Random(f"{seed} {name}"), set(), time.monotonic()
            counts[name] = Counter(tried=0, wrong=0)
            for number in range(round(executions * SHARES.get(name, REST))):
                data = target.input(draw)
                counts[name]["tried"] += 1
                wrong = outcome(target, data, place)
                if wrong is None:
                    continue
                counts[name]["wrong"] += 1
                kind = "\n".join(wrong.strip().splitlines()[-3:])
                if kind not in kinds and found is not None:
                    kinds.add(kind)
                    found.mkdir(parents=True, exist_ok=True)
                    (found / f"{name.replace(' ', '-')}-{number}").write_bytes(data)
                    (found / f"{name.replace(' ', '-')}-{number}.txt").write_text(wrong)
            sys.stderr.write(f"{name}: {dict(counts[name])} in {time.monotonic() - began:.0f} s\n")
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executions", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--found", type=Path)
    args = parser.parse_args()
    return int(any(each["wrong"] for each in run(args.executions, args.seed, args.found).values()))


if __name__ == "__main__":
    sys.exit(main())
