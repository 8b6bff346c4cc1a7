"""What the tests share: the real command lines, a tiny experiment, and the data folder where there is one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--hidden-dim", "32", "--threads", "1"]  # digits in a fraction of a second an epoch
TINY_FOLDER = "segma/digits/seed0-hidden-dim-32"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with the real data sets; tests that need it are skipped where it is not there."""
    root = Path(os.environ.get("DATA", "data"))
    root = root if root.is_absolute() else ROOT / root
    if not (root / "MNIST/raw/train-images-idx3-ubyte").exists():
        pytest.skip(f"no MNIST in {root}; name the folder with DATA=")
    return root


def run_command(*arguments: str, **kwargs) -> tuple[int, str, str]:
    """A real command line to its end: exit code, standard output, standard error."""
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **kwargs)
    return done.returncode, done.stdout, done.stderr


def call(main, *arguments: str, capsys) -> tuple[int, str, str]:
    """The same in this process, for the many cases where a new Python each would take minutes."""
    from common.run import exit_with

    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        exit_with(lambda: main([str(a) for a in arguments]))
    out, err = capsys.readouterr()
    return stopped.value.code, out, err


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A runs folder with a digits run, trained and evaluated by the real command lines."""
    runs = tmp_path_factory.mktemp("trained")
    arguments = ["digits", "--runs", runs, "--seed", "3", "--threads", "1"]
    code, out, err = run_command("segma.train", *arguments, "--epochs", "12")
    assert code == 0, err
    code, out, err = run_command("segma.eval", *arguments)
    assert code == 0, err
    return runs


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of this repository with one paper, SeGMA, and no results. Two seeds of its digits are pending."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    subprocess.run(["cp", "-r", "Makefile", "README.md", "common", "segma", folder], cwd=ROOT, check=True)
    shutil.rmtree(folder / "segma/results")
    (folder / "segma/pending.csv").write_text("experiment,seeds,needs,hours\ndigits,2,nothing,0.1\n")
    return folder


def slope(loss, parameter: torch.Tensor, index: int, step: float = 1e-5) -> float:
    """The derivative of loss() by one entry of a parameter, by finite differences."""
    flat = parameter.data.view(-1)
    value, losses = flat[index].item(), []
    for other in (value + step, value - step, value):
        flat[index] = other
        losses.append(loss().item())
    return (losses[0] - losses[1]) / (2 * step)
