"""Files of people one does not know: every mutation is read whole, or refused by an FNSFTError, within seconds.

    python tests/faults/fuzz.py --executions 100000 --seed 0

Each target has valid inputs. They are changed at the level of bytes (a bit, a piece that is dropped, doubled or put in
from another input, a token that parsers trip over), and of JSON (a value in the place of another). What ends in any
other exception, or takes longer, is written below `--found`, with its target and traceback.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path


TESTS = Path(__file__).parent.parent
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))

from faults.targets import Target, targets  # noqa: E402

from fnsft_trl.errors import FNSFTError  # noqa: E402


SECONDS = 10  # for one input, after which it hangs


class Hangs(BaseException):
    """An input took too long."""


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
        found_targets = targets(Path(folder))
        whole = sum(target.share for target in found_targets.values())
        for name, target in found_targets.items():
            place = Path(folder) / "places" / name.replace(" ", "-")
            place.mkdir(parents=True)
            draw, kinds, began = random.Random(f"{seed} {name}"), set(), time.monotonic()
            counts[name] = Counter(tried=0, wrong=0)
            for number in range(round(executions * target.share / whole)):
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
