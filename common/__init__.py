"""What no paper is about: data sets, metrics, and what a run is on disk."""

import ctypes
import os

# OpenMP's threads wait for each other by spinning. Beside another busy process that starves them, so they spin briefly
# and then sleep. OpenMP reads this when torch is first imported. A person's own setting stays.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# glibc returns large blocks to the system when they are freed, and the next training step asks for them again, page by
# page. Kept instead, a step of AMM on a CPU takes 13 % less time (amm/NOTES.md).
mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
if mallopt and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    mallopt(-3, 2**31 - 1)  # M_MMAP_THRESHOLD
