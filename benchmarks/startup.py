"""CPU seconds until help or a refusal is there, beside TRL's own command in the same run.

Each call runs in a process of its own, after one call that fills the caches (bytecode, and the schema of TRL's
options). CPU seconds are user and system time of a process and its children; the median of some repeats. Prints JSON.

    python benchmarks/startup.py --repeats 5
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


BASE = ["train", "--model_name_or_path", "m", "--dataset_name", "d.jsonl"]
FNSFT = [sys.executable, "-m", "fnsft_trl.cli"]


def calls(directory: Path) -> dict[str, list[str]]:
    """What is measured: name -> command."""
    config = directory / "bad.yaml"
    config.write_text("lerning_rate: 1\n")
    found = {f"fnsft {verb} --help": [*FNSFT, verb, "--help"] for verb in ("train", "discover", "inspect", "compare")}
    found |= {f"fnsft {verb} --help": [*FNSFT, verb, "--help"] for verb in ("export", "demo", "env", "auth")}
    found["fnsft --help"] = [*FNSFT, "--help"]
    found["fnsft train, misspelt option"] = [*FNSFT, *BASE, "--lerning_rate", "1"]
    found["fnsft train, wrong value"] = [*FNSFT, *BASE, "--lr_scheduler_type", "cosin"]
    found["fnsft train, misspelt YAML key"] = [*FNSFT, *BASE, "--config", str(config)]
    found["trl sft --help"] = [str(Path(sys.executable).with_name("trl")), "sft", "--help"]
    return found


def cpu_seconds(command: list[str]) -> float:
    """User and system time of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        os.environ["FNSFT_CACHE"] = name
        found = calls(Path(name))
        results = {"fnsft train --help, the first time": cpu_seconds(found["fnsft train --help"])}
        for what, command in found.items():
            cpu_seconds(command)
            repeats = 2 if command[0] == found["trl sft --help"][0] else args.repeats
            results[what] = statistics.median(cpu_seconds(command) for _ in range(repeats))
    print(json.dumps({what: round(seconds, 2) for what, seconds in results.items()}, indent=2))


if __name__ == "__main__":
    main()
