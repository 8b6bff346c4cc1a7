"""A slice of `make torture`: a few faults of each kind."""

import subprocess
import sys

from tests.conftest import ROOT


def test_a_slice_of_the_torture():
    """In a process of its own, with one thread: it forks."""
    command = [sys.executable, "-m", "tests.torture", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and ", 0 otherwise than promised" in done.stdout, done.stdout + done.stderr
