"""Processes that are killed or asked to end at random moments: what they leave goes on to what would have been.

    python tests/faults/kills.py --tries 5 --output kills.jsonl

An operation runs to its end once. Then it runs again and again in an empty folder, gets a signal at a moment drawn
evenly from the time that the first run took, and runs once more, as its message says, until it ends by itself. Every
file that counts must be the same, bit for bit, and nothing hidden may be left beside them. Processes are forked from
one that has imported the libraries. Each try is a line of the output as soon as it is over; the same call goes on with
those that are missing, for instance after `--minutes`.

    python tests/faults/kills.py --output tests/faults/kills.jsonl --page docs/reliability.md

writes the table of a page from these lines, and tries nothing.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path


TESTS = Path(__file__).parent.parent
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))

from faults.operations import OPERATIONS, Operation, prepare  # noqa: E402
from processes import Started  # noqa: E402


SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM}
SURVIVED, OVER, LOST = "survived", "over", "lost"  # over: it had ended before the signal came
ENDED = 143  # the status of a command that was asked to end
CODE = "import sys; from fnsft_trl.cli import main; sys.exit(main(sys.argv[1:]))"

HEAD = "| operation | signal | tries | survived | lost |"

_starts = threading.Lock()  # a start takes `__main__` away for a moment


@dataclass
class Trial:
    """
    An operation with what an uninterrupted run of it gives.

    Attributes:
        operation ([`Operation`]): what is run.
        inputs (`Path`): what it reads.
        place (`Path`): a folder of its own, in which the outcome is `out`.
        seconds (`float`): that the uninterrupted run took.
        expected (`dict[str, str]`): file -> hash of what it left.
    """

    operation: Operation
    inputs: Path
    place: Path
    seconds: float = 0.0
    expected: dict[str, str] = field(default_factory=dict)
    turn: threading.Lock = field(default_factory=threading.Lock)

    @property
    def out(self) -> Path:
        return self.place / "out"

    def measure(self) -> None:
        """Run it to its end."""
        self._begin()
        began = time.monotonic()
        self._run(())
        self.seconds = time.monotonic() - began
        self.expected = self._found()

    def interrupted(self, number: int, moment: float) -> str:
        """Run it, send a signal, and go on.

        Args:
            number: of the signal.
            moment: when, as a share of the time that the whole takes.

        Returns:
            `survived`, or `over` where it had ended before the signal came.

        Raises:
            AssertionError: the outcome is another, or going on fails.
        """
        self._begin()
        started = self._started(())
        time.sleep(moment * self.seconds)
        if started.process.exitcode is None:
            os.kill(started.process.pid, number)
        done = started.end()
        if done.returncode == 0:
            self._compare(f"undisturbed, in the place of a signal at {moment:.3f}")
            return OVER
        if number == signal.SIGTERM:  # which comes too early for any message only before Python has begun
            assert done.returncode in (ENDED, -number), done.stderr[-2000:]
            assert "Traceback" not in done.stderr, done.stderr[-2000:]
        more = self.operation.again(self.out)
        if more is not None:
            self._run(more)
        self._compare(f"after a signal at {moment:.3f} of {self.seconds:.1f} s")
        return SURVIVED

    def _begin(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(parents=True)
        self.operation.begin(self.inputs, self.out)

    def _started(self, more: Iterable[str]) -> Started:
        words = [*self.operation.call(self.inputs, self.out), *more]
        with _starts:
            return Started("-c", CODE, *words, variables=self.operation.variables(self.inputs, self.out))

    def _run(self, more: Iterable[str]) -> None:
        started = self._started(more)
        done = started.end()
        assert done.returncode == 0, f"{' '.join(started.words[2:])}: {done.returncode}\n{done.stderr[-2000:]}"

    def _found(self) -> dict[str, str]:
        """The files that count by their hashes, and whatever is hidden."""
        files = [path for pattern in self.operation.counts for path in self.out.glob(pattern)]
        assert files, f"{self.out} holds nothing of {self.operation.counts}"
        found = {str(p.relative_to(self.place)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
        return found | {str(path.relative_to(self.place)): "hidden" for path in self.place.rglob(".*")}

    def _compare(self, when: str) -> None:
        found = self._found()
        wrong = [name for name in self.expected.keys() | found if self.expected.get(name) != found.get(name)]
        assert not wrong, f"{sorted(wrong)} differ {when}"


class Lines:
    """
    Tries, one JSON line for each, added as they end.

    Args:
        path (`Path`, *optional*): of the file, which may hold some already.
        seed (`int`): by which moments are drawn; part of every line.
    """

    def __init__(self, path: Path | None, seed: int) -> None:
        self.path, self.seed = path, seed
        self.found = read_lines(path) if path is not None and path.exists() else []
        if self.found:
            path.write_text("".join(json.dumps(line) + "\n" for line in self.found), encoding="utf-8")
        self._turn = threading.Lock()

    def add(self, name: str, title: str, number: int, moment: float, outcome: str, said: str | None) -> None:
        """Note how a try ended."""
        line = {"operation": name, "signal": title, "seed": self.seed, "try": number, "moment": round(moment, 4)}
        line |= {"outcome": outcome} | ({} if said is None else {"said": said})
        with self._turn:
            self.found.append(line)
            if self.path is not None:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
        sys.stderr.write(f"{name}, {title}, try {number}: {outcome}{'' if said is None else f': {said}'}\n")

    def of(self, name: str, title: str) -> list[dict]:
        """The lines of an operation and a signal."""
        asked = (name, title, self.seed)
        with self._turn:
            return [each for each in self.found if (each["operation"], each["signal"], each["seed"]) == asked]

    def next(self, name: str, title: str) -> int:
        """The first number that no line has: that of one which was taken out is tried again, at the same moment."""
        numbers = {line["try"] for line in self.of(name, title)}
        return next(number for number in itertools.count() if number not in numbers)

    def done(self, name: str, title: str) -> int:
        """In how many of them the signal came in time."""
        return sum(line["outcome"] != OVER for line in self.of(name, title))


def read_lines(path: Path) -> list[dict]:
    """The tries that a file holds; a last line that was not written whole is left out."""
    return [
        json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"
    ]


def counts(lines: Sequence[dict]) -> dict[tuple[str, str], Counter]:
    """(operation, signal) -> how often each outcome."""
    found: dict[tuple[str, str], Counter] = {}
    for line in lines:
        found.setdefault((line["operation"], line["signal"]), Counter())[line["outcome"]] += 1
    return found


def table(lines: Sequence[dict]) -> str:
    """What lines come to, as a table of Markdown."""
    rows = [HEAD, "|---|---|---:|---:|---:|"]
    found = counts(lines)
    for name, title in ((name, title) for name in OPERATIONS for title in SIGNALS):
        of = found.get((name, title), Counter())
        rows.append(f"| {name} | {title} | {of[SURVIVED] + of[LOST]} | {of[SURVIVED]} | {of[LOST]} |")
    return "\n".join(rows)


def write_page(page: Path, lines: Sequence[dict]) -> None:
    """Put the table in the place of the one that a page has."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(HEAD, 1)
    page.write_text(before + table(lines) + "\n\n" + rest.split("\n\n", 1)[1], encoding="utf-8")


def one_try(trial: Trial, name: str, title: str, lines: Lines) -> None:
    """Send a signal once in time, however often the operation has ended before."""
    with trial.turn:
        if not trial.seconds:
            trial.measure()
        outcome = OVER
        while outcome == OVER:
            number = lines.next(name, title)
            moment = random.Random(f"{lines.seed} {name} {title} {number}").random()
            said = None
            try:
                outcome = trial.interrupted(SIGNALS[title], moment)
            except AssertionError as error:
                outcome, said = LOST, str(error)
            lines.add(name, title, number, moment, outcome, said)


def missing(tries: int, lines: Lines, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What is still to be tried, each operation by turns."""
    for turn in range(tries):
        for name in names:
            yield from ((name, title) for title in SIGNALS if lines.done(name, title) <= turn)


def run(tries: int, lines: Lines, folder: Path, *, jobs: int, seconds: float, names: Sequence[str]) -> None:
    """Try what is still to be tried, until the time is over."""
    began = time.monotonic()
    inputs = prepare(folder / "inputs")
    Started("-c", "pass").end()  # the import that all of them share is no part of the time that the first one takes
    trials = {name: Trial(OPERATIONS[name], inputs, folder / name.replace(" ", "-")) for name in names}

    def work(asked: tuple[str, str]) -> None:
        name, title = asked
        if time.monotonic() - began < seconds:
            one_try(trials[name], name, title, lines)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, list(missing(tries, lines, names))))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=5, help="of each operation and signal")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a file of JSON lines, with which a later call goes on")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no try after these")
    parser.add_argument("--jobs", type=int, default=1, help="operations that run at once")
    parser.add_argument("--operations", nargs="+", choices=list(OPERATIONS), default=list(OPERATIONS))
    parser.add_argument("--page", type=Path, help="a page whose table is to be written from the output")
    args = parser.parse_args()
    lines = Lines(args.output, args.seed)
    if args.page is not None:
        write_page(args.page, lines.found)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "inputs").mkdir()
        run(args.tries, lines, Path(folder), jobs=args.jobs, seconds=60 * args.minutes, names=args.operations)
    for (name, title), found in counts(lines.found).items():
        sys.stderr.write(f"{name}, {title}: {dict(found)}\n")
    return int(any(line["outcome"] == LOST for line in lines.found))


if __name__ == "__main__":
    sys.exit(main())
