"""What no paper is about: data sets, metrics, and what a run is on disk."""

import os

# OpenMP's threads wait for each other by spinning. Beside another busy process that starves them, so they spin briefly
# and then sleep. OpenMP reads this when torch is first imported. A person's own setting stays.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
