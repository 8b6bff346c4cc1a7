"""Seeds as jobs of submitit's (the extra `cluster`), on SLURM or on this machine: `make farm`, or some of its lines:

    make pending COMMANDS=1 | grep segma | python -m common.farm --engine slurm --jobs 50 --time 240

A line is a job, and runs this commit in a git worktree under runs/farm. On SIGTERM (preempted, or out of time) a
training saves and its job is queued again. What else SLURM is asked for is in its own variables: SBATCH_PARTITION=long.
"""

import argparse
import errno
import fcntl
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import IO

from common import run
from common.diff import as_text
from common.run import Count, RunFailed, UserError, check_value

JOBS = {"local": ["ps", "-A", "-o", "pid=,args="], "slurm": ["squeue", "--noheader", "--array", "--format=%i %T"]}
PROBE = '[ -e "$0" ] && ! flock --nonblock "$0" true || exit 73'  # on a node, of a file that is locked here

OTHERS = ("submitit", "srun", "slurmstepd", "Traceback", " ")  # lines of a log that are not a command's


class Seed:
    """What submitit calls for a line, and again after a preemption: its commands, one after the other."""

    process = None

    def __call__(self, commands: list[list[str]]) -> None:
        for command in commands:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
            if (code := self.process.wait()) in (-signal.SIGTERM, 128 + signal.SIGTERM):
                signal.raise_signal(signal.SIGTERM)  # the command may have had it alone
            if code:
                sys.exit(code)

    def checkpoint(self, commands: list[list[str]]) -> object:
        """Submitit calls this on SIGTERM, and queues again what it returns; None: nothing."""
        from submitit.helpers import DelayedSubmission

        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # SLURM sends it again while the job leaves the node
        if self.process and self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)  # until it has saved
        state = ["squeue", "--noheader", "--format=%T", "--jobs", job := os.environ.get("SLURM_JOB_ID", "")]
        cancelled = job and b"COMPLETING" in subprocess.run(state, capture_output=True).stdout
        return None if cancelled else DelayedSubmission(Seed(), commands)  # by a scancel without --signal


def table(folder: Path, kind: type) -> dict[str, list[str]]:
    """Of each seed's last job: queued, running, done or failed; the seed; the last line of its log; the log."""
    listed, rows = subprocess.run(JOBS[folder.name], capture_output=True, text=True).stdout.splitlines(), {}
    states = dict(line.split(maxsplit=1) for line in listed if folder.name == "slurm" or "submitit" in line)
    for path in sorted(folder.glob("*_submitted.pkl"), key=lambda path: path.stat().st_mtime):
        job = kind(folder, path.name.removesuffix("_submitted.pkl"))
        ended = "done" if job.paths.result_pickle.exists() and not job.exception() else "failed"
        state = {"": ended, "PENDING": "queued"}.get(states.get(job.job_id, ""), "running")
        lines = [x for x in (job.stdout() or "").splitlines() if x and not x.startswith(OTHERS)]
        seed = " ".join(job.submission().args[0][0][2:6])
        rows[seed] = [state, seed, "".join(lines[-1:]), job.paths.stdout.name]
    return rows


def checkout_for(lock: IO, slurm: bool) -> str:
    """A checkout of this commit, beside `lock`. Raises UserError where jobs cannot run there, or not be kept apart."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        taken = error.errno == errno.EWOULDBLOCK
        why = "another `make farm` is at work" if taken else "no flock here; name another --runs"
        raise UserError(f"{lock.name}: {why} ({error.strerror})") from None
    if slurm:
        ask = ["srun", "--quiet", "--immediate=60", "--time=1", "--chdir=/", "sh", "-c", PROBE, lock.name]
        if subprocess.run(ask).returncode == 73:
            raise UserError(f"{lock.name}: a node does not see it, or not that it is locked; name another --runs")
    commit, dirty = run.git_state()
    checkout = Path(lock.name).parent / str(commit)[:12]
    git = ["git", "-C", run.ROOT, "worktree", "add", "--quiet", "--detach", "--force", checkout, str(commit)]
    if not checkout.exists() and (told := subprocess.run(git, capture_output=True, text=True)).returncode:
        raise UserError(f"{checkout}: git made no checkout for the jobs ({told.stderr})")
    print(f"at commit {commit[:7]}{', without your uncommitted changes' if dirty else ''}", flush=True)
    return str(checkout)


def submit(submitit, lines: list[str], options: argparse.Namespace, lock: IO, busy: list[str]) -> None:
    """Queue the lines whose seeds are not in `busy`; on this machine, run and await them."""
    slurm, checkout = options.engine == "slurm", checkout_for(lock, options.engine == "slurm")
    asked = dict(re.findall(r"--(threads|device)=(\w+)", lines[0]))
    cpus, gpus = max(1, int(asked.get("threads", 1))), 1 if asked.get("device") == "cuda" else None
    most = {"slurm_max_num_timeout": 10**6, "local_max_num_timeout": 10**6}
    executor = submitit.AutoExecutor(Path(lock.name).parent, options.engine, **most)
    executor.update_parameters(timeout_min=options.time if slurm else 10**6, cpus_per_task=cpus, gpus_per_node=gpus)
    executor.update_parameters(stderr_to_stdout=True, slurm_additional_parameters={"requeue": True}, name="farm")
    executor.update_parameters(slurm_array_parallelism=options.jobs)
    seeds = [[shlex.split(command) for command in line.split(" && ")] for line in lines]
    seeds = [seed for seed in seeds if " ".join(seed[0][2:6]) not in busy]
    path = os.pathsep.join(filter(None, [checkout, os.environ.get("PYTHONPATH")]))
    with submitit.helpers.environment_variables(PYTHONPATH=path, PYTHONSAFEPATH=1, SRUN_CPUS_PER_TASK=cpus):
        if slurm:
            try:
                executor.map_array(Seed(), seeds)
            except submitit.core.core.utils.UncompletedJobError as error:
                raise UserError(f"sbatch refused the jobs: {str(error).splitlines()[-1]}") from None
            return
        jobs = []
        for seed in seeds:
            while sum(not job.done() for job in jobs) >= options.jobs:
                time.sleep(0.2)
            jobs.append(executor.submit(Seed(), seed))
        for job in jobs:
            job.wait()


def main(argv: list[str] | None = None) -> None:
    parser = run.Parser(prog="python -m common.farm", allow_abbrev=False)
    parser.add_argument("--engine", choices=("local", "slurm"), default="local")
    parser.add_argument("--runs", type=run.as_path, default=Path("runs"), help="logs and checkouts go to its farm/")
    parser.add_argument("--status", action="store_true", help="queue nothing, only print what became of the jobs")
    for flag, default, text in (("--jobs", 2, "at once"), ("--time", 240, "minutes that SLURM gives a job at once")):
        parser.add_argument(flag, type=partial(check_value, flag, annotation=Count), default=default, help=text)
    options = parser.parse_all(argv)
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "TERM"  # its USR2 would end a training before it has saved
    try:
        import submitit
    except ImportError:
        raise UserError("submitit is not installed; pip install -e '.[cluster]'") from None
    if options.engine == "slurm" and not shutil.which("sbatch"):
        raise UserError("--engine slurm: there is no sbatch here; log in to the cluster, or take --engine local")
    lines = [] if options.status else [line for line in sys.stdin if line.strip()]
    if not lines and not options.status:
        raise UserError("no commands on standard input; expected lines as `make pending COMMANDS=1` prints them")
    folder = (options.runs / "farm" / options.engine).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    read = partial(table, folder, submitit.SlurmJob if options.engine == "slurm" else submitit.LocalJob)
    if lines:
        with open(folder / "lock", "a") as lock:
            busy = [seed for seed, row in read().items() if row[0] in ("queued", "running")]
            submit(submitit, lines, options, lock, busy)
    rows = list(read().values())
    print(as_text([["state", "seed", "last line", "log"], *rows]) if rows else "no jobs yet", f"in {folder}", sep="\n")
    failed = sum(row[0] == "failed" for row in rows)
    if lines and options.engine == "local" and failed:
        raise RunFailed(f"{failed} of {len(rows)} jobs; their logs say why")


if __name__ == "__main__":
    run.exit_with(main)
