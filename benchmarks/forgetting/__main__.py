"""python benchmarks/forgetting: see README.md."""

import os
import sys


# Before torch is imported: one thread, so that a cell gives the same numbers on any machine that is busy or not.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from study.command import main


if __name__ == "__main__":
    sys.exit(main())
