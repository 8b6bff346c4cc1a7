"""A slice of `make torture`: a few faults of each kind."""

import subprocess
import sys

from tests.conftest import ROOT


def test_a_slice_of_the_torture():
    """In a process of its own, with one thread: it forks."""
    done = subprocess.run([sys.executable, "-m", "tests.torture", "--small"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    last = done.stdout.splitlines()[-1] if done.stdout else ""
    assert done.returncode == 0 and " 0 failures" in last, done.stdout + done.stderr
