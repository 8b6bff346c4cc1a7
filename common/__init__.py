"""Shared by all papers: data sets, metrics, and what a run is on disk."""

import ctypes
import os

# OpenMP's threads spin while they wait for each other. Next to another busy process that starves them, so here they
# spin briefly and then sleep. OpenMP reads this when torch is first imported. A setting of the user's is kept.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# glibc returns large freed blocks to the system, and the next training step must ask for them again, page by page. If
# they are kept, a step of AMM on a CPU takes 13 % less time (amm/NOTES.md).
mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
if mallopt and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    mallopt(-3, 2**31 - 1)  # M_MMAP_THRESHOLD
