"""Seeds as jobs: on this machine, and on a real SLURM where `tests/slurm/up` can start one."""

import json
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_command
from tests.torture import assert_same, state_in

pytest.importorskip("submitit")
SEGMA, GMGAN = "segma.train digits", "gmgan.train digits"


def line(program: str, seed: int, runs: Path, *flags: str) -> str:
    return f"{sys.executable} -m {program} --seed {seed} --runs={runs} --threads=1 {' '.join(flags)}\n"


def farm(lines: str, runs: Path, *flags: str, **other: str) -> tuple[int, str, str]:
    """`python -m common.farm`, with these lines on its standard input."""
    command = [sys.executable, "-m", "common.farm", "--runs", str(runs), *flags]
    environment = os.environ | {"COLUMNS": "400", **other}  # so that no cell is wrapped
    done = subprocess.run(command, cwd=ROOT, input=lines, capture_output=True, text=True, timeout=280, env=environment)
    return done.returncode, done.stdout, done.stderr


def states(out: str) -> dict[str, str]:
    """Of the table that was printed: the state of each seed."""
    return {
        words[1:]: words[0] for words in re.findall(r"^(queued|running|done|failed) +(\S+ \S+) --seed (\d+)", out, re.M)
    }


def tell(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_two_seeds_here_and_a_wrong_flag_that_fails_alone(tmp_path):
    runs = tmp_path / "runs"
    wrong = line(SEGMA, 2, runs, "--epochz", "1")
    code, out, err = farm(wrong + line(SEGMA, 0, runs, "--epochs", "1") + line(SEGMA, 1, runs, "--epochs", "1"), runs)
    assert code == 1 and "1 of 3 jobs" in err and "did you mean --epochs?" in out, out + err
    assert states(out) == {
        ("segma.train digits", "0"): "done",
        ("segma.train digits", "1"): "done",
        ("segma.train digits", "2"): "failed",
    }
    state = state_in(runs / "segma/digits/seed0")
    assert state["epoch"] == 1 and state["sessions"][0]["git_dirty"] is False  # in its worktree
    assert farm("", runs, "--status")[1] == out[out.index("state ") :]


def test_make_farm_trains_and_evaluates_with_the_flags_that_make_was_given(checkout):
    """A seed with other flags is another run, in the same table. The code is the commit's, not what lies there."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=b", "-C", checkout]
    (checkout / ".gitignore").write_text("runs/\n")
    (checkout / "segma/pending.csv").write_text("experiment,seeds,needs,hours\ndigits,1,nothing,0.1\n")
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], check=True)
    (checkout / "segma/train.py").write_text("not Python")
    make = ["make", "farm", f"PYTHON={sys.executable}", "THREADS=1", "EPOCHS=1"]
    environment = {key: value for key, value in os.environ.items() if "MAKE" not in key} | {"COLUMNS": "400"}
    for flags in ("--hidden-dim 32", "--hidden-dim 24"):
        done = subprocess.run([*make, f"FLAGS={flags}"], cwd=checkout, capture_output=True, text=True, env=environment)
        assert done.returncode == 0 and "without your uncommitted changes" in done.stdout, done.stdout + done.stderr
    for size in (24, 32):
        assert re.search(rf"done +segma.train digits --seed 0 --epochs 1 --hidden-dim {size}  ", done.stdout)
        made = json.loads((checkout / f"runs/segma/digits/seed0-hidden-dim-{size}/eval.json").read_text())
        assert (made["config"]["hidden_dim"], made["provenance"]["epochs"]) == (size, 1)
        assert made["provenance"]["git_dirty"] is made["provenance"]["evaluation"]["git_dirty"] is False


@pytest.mark.parametrize(
    ("flags", "lines", "complaint"),
    [
        ((), "", "no commands on standard input"),
        (("--jobs", "0"), "x\n", "--jobs: 0 is out of range"),
        (("--engine", "slurm"), "x\n", "there is no sbatch here"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_queued(tmp_path, flags, lines, complaint):
    code, out, err = farm(lines, tmp_path, *flags, PATH="/nowhere")
    assert code == 2 and err.count("\n") == 1 and complaint in err and not list(tmp_path.rglob("*.pkl"))


def test_without_submitit_it_says_how_to_install_it(tmp_path):
    (tmp_path / "submitit.py").write_text("raise ImportError")
    code, _, err = farm("x\n", tmp_path, PYTHONPATH=str(tmp_path))
    assert code == 2 and err == "error: submitit is not installed; pip install -e '.[cluster]'\n"


def test_a_queue_that_does_not_answer_is_no_empty_queue(tmp_path):
    """Else the jobs that run would be shown as failed, and be queued again."""
    for name in ("sbatch", "squeue"):
        (tmp_path / name).write_text("#!/bin/sh\necho socket timed out >&2; exit 1\n")
        (tmp_path / name).chmod(0o755)
    code, out, err = farm("", tmp_path, "--engine", "slurm", "--status", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert (code, out) == (1, "") and err == "failed: squeue does not say which jobs there are (socket timed out)\n"


def test_a_file_system_without_flock_or_unseen_by_the_nodes(tmp_path, monkeypatch):
    from common import farm as module
    from common.run import UserError

    with open(tmp_path / "lock", "a") as lock:
        monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess((), 73))
        with pytest.raises(UserError, match="a node does not see it"):
            module.checkout_for(lock, True)
        monkeypatch.setattr(module.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(38, "not implemented")))
        with pytest.raises(UserError, match="no flock here"):
            module.checkout_for(lock, True)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A SLURM of one node, stopped when the test ends."""
    folder = tmp_path / "slurm"
    up = subprocess.Popen(
        [ROOT / "tests/slurm/up", folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if up.stdout.readline() != "ready\n":
        pytest.skip(up.stderr.read().strip())
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    yield folder
    up.stdin.close()
    up.wait(60)


def until(wanted, seconds: float = 600.0):
    """What `wanted` returns, once that is true."""
    end = time.monotonic() + seconds
    while not (found := wanted()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


def test_slurm_preempts_and_requeues_and_the_weights_are_the_same(tmp_path, slurm):
    runs, whole, flags = tmp_path / "runs", tmp_path / "whole", ("--epochs", "2")
    lines = [line(program, seed, runs, *flags) for seed in (0, 1, 2) for program in (SEGMA, GMGAN)]
    code, out, err = farm(
        "".join(lines) + line(SEGMA, 3, runs, "--epochz", "2"), runs, "--engine", "slurm", "--jobs", "2"
    )
    assert code == 0 and set(states(out).values()) <= {"queued", "running"} and len(states(out)) == 7, out + err
    logs, told, saved = (
        [runs / f"farm/slurm/{job}_0_log.out" for job in tell("squeue", "-hr", "-o%i").split()],
        {},
        set(),
    )

    def two_were_stopped() -> bool:
        """Signals each of the first jobs that train, until two have saved in the middle of it."""
        for log in (log for log in logs if log.exists() and len(saved) < 2):
            if (begun := (text := log.read_text()).count(" epochs of ")) > told.get(log, 0) and log not in saved:
                scancel = ["scancel", "--quiet", "--signal=TERM", log.name.removesuffix("_0_log.out")]
                with suppress(subprocess.TimeoutExpired):  # while an array starts it tries again and again
                    subprocess.run(scancel, timeout=1)
                told[log] = begun
            saved.update({log} if "SIGTERM: saved after" in text else ())
        return len(saved) == 2

    until(two_were_stopped)
    until(lambda: not tell("squeue", "-h"))
    code, out, err = farm("", runs, "--engine", "slurm", "--status")
    assert list(states(out).values()).count("done") == 6 and states(out)[SEGMA, "3"] == "failed", out
    assert "did you mean --epochs?" in out
    for log in saved:
        program, folder = ("gmgan.train", "gmgan") if "gmgan" in log.read_text() else ("segma.train", "segma")
        assert ", from epoch " in log.read_text()
        seed = re.search(r"digits/seed(\d)", log.read_text())[1]
        assert run_command(program, "digits", "--seed", seed, "--threads", "1", *flags, "--runs", whole)[0] == 0
        assert_same(state_in(runs / folder / f"digits/seed{seed}"), state_in(whole / folder / f"digits/seed{seed}"))
    assert all(len(state_in(folder)["sessions"]) in (1, 2) for folder in runs.glob("*/digits/seed?"))
