"""A slice of `make torture`: a few faults of each kind."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize("part", ["kills", "files", "disk", "two", "numbers", "fuzz", "results"])
def test_a_slice_of_the_torture(part):
    """In a process of its own, which computes nothing itself: it forks."""
    done = subprocess.run([sys.executable, "-m", "tests.torture", "--small", part], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and " 0 failures" in done.stdout.splitlines()[-1], done.stdout + done.stderr
