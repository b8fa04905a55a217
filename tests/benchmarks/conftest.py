"""The study of forgetting is no part of the package: its folder is put on the path."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "forgetting"))
