"""Runs seeds as jobs of submitit (the extra `cluster`), on SLURM or here: `make farm`, or for a selection of the lines

    make pending COMMANDS=1 | grep segma | python -m common.farm --engine slurm --jobs 50 --time 240

Each line is a job. It runs this commit in a git worktree under runs/farm. On SIGTERM (preempted, or out of time) a
training saves its state, and the job is queued again. Other SLURM options are environment variables: SBATCH_PARTITION.
"""

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

try:
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "TERM"  # its USR2 would end a training before it has saved
    import submitit
except ImportError:
    submitit = None

JOBS = {"local": ["ps", "-A", "-o", "pid=,args="], "slurm": ["squeue", "--noheader", "--array", "--format=%i %T"]}
PROBE = '[ -e "$0" ] && ! flock --nonblock "$0" true || exit 73'  # does a node see the lock that we hold?
WHERE = re.compile(r" '?--(data|device|inception|precision|runs|threads)=| && ")  # what precedes it names the seed
OTHERS = ("submitit", "srun", "slurmstepd", "Traceback", " ")  # log lines that our commands did not print begin so


class Seed:
    """The job of one line: run its commands one after the other. After a preemption submitit runs it again."""

    process = None

    def __call__(self, line: str) -> None:
        for command in line.split(" && "):
            self.process = subprocess.Popen(shlex.split(command))
            if (code := self.process.wait()) in (-signal.SIGTERM, 128 + signal.SIGTERM):
                signal.raise_signal(signal.SIGTERM)  # perhaps only the command received it
            if code:
                sys.exit(code)

    def checkpoint(self, line: str) -> object:
        """Submitit calls this on SIGTERM and queues what it returns; None ends the job."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # SLURM repeats it while the job leaves the node
        if self.process and self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)  # wait until it has saved
        state = ["squeue", "--noheader", "--format=%T", "--jobs", job := os.environ.get("SLURM_JOB_ID", "")]
        cancelled = job and b"COMPLETING" in subprocess.run(state, capture_output=True).stdout
        return None if cancelled else submitit.helpers.DelayedSubmission(Seed(), line)  # cancelled: by scancel


def table(folder: Path) -> dict[str, list[str]]:
    """{seed: [queued, running, done or failed; the seed; the last line of its log; the log]}, of its latest job."""
    if (told := subprocess.run(JOBS[folder.name], capture_output=True, text=True)).returncode:
        raise RunFailed(f"{told.args[0]} does not say which jobs there are ({told.stderr.strip()})")
    slurm, rows = folder.name == "slurm", {}
    states = dict(line.split(maxsplit=1) for line in told.stdout.splitlines() if slurm or "submitit" in line)
    for path in sorted(folder.glob("*_submitted.pkl"), key=os.path.getmtime):
        job = submitit.core.utils.JobPaths(folder, path.name.removesuffix("_submitted.pkl"), task_id=0)
        done = job.result_pickle.exists() and submitit.core.utils.pickle_load(job.result_pickle)[0] == "success"
        ended = "done" if done else "failed"
        state = {"": ended, "PENDING": "queued"}.get(states.get(job.job_id, ""), "running")
        log = job.stdout.read_text().splitlines() if job.stdout.exists() else []
        said = [text for text in log if text and not text.startswith(OTHERS)]
        seed = WHERE.split(submitit.core.utils.DelayedSubmission.load(path).args[0])[0]
        rows[seed] = [state, seed.partition(" -m ")[2], "".join(said[-1:]), job.stdout.name]
    return rows


def checkout_for(lock: IO, slurm: bool) -> Path:
    """A checkout of this commit beside the file `lock`. Raises UserError if jobs cannot run there or the lock fails."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{lock.name}: another `make farm` is at work; wait for it") from None
    except OSError as error:
        raise UserError(f"{lock.name}: no flock here ({error.strerror}); name another --runs") from None
    ask = ["srun", "--quiet", "--immediate=60", "--time=1", "--chdir=/", "sh", "-c", PROBE, lock.name]
    if slurm and subprocess.run(ask).returncode == 73:
        raise UserError(f"{lock.name}: a node does not see it, or not that it is locked; name another --runs")
    commit, dirty = run.git_state()
    checkout = Path(lock.name).parent / str(commit)[:12]
    git = ["git", "-C", run.ROOT, "worktree", "add", "--quiet", "--detach", "--force", checkout, str(commit)]
    if not checkout.exists() and (told := subprocess.run(git, capture_output=True, text=True)).returncode:
        raise UserError(f"{checkout}: git made no checkout for the jobs ({told.stderr})")
    print(f"at commit {commit[:7]}{', without your uncommitted changes' if dirty else ''}", flush=True)
    return checkout


def submit(lines: list[str], checkout: Path, engine: str, at_once: int, minutes: int) -> None:
    """Queue the lines as an array of SLURM jobs; on this machine run them, `at_once` at a time, and wait."""
    slurm, asked = engine == "slurm", dict(re.findall(r"--(threads|device)=(\w+)", lines[0]))
    cpus, gpus = max(1, int(asked.get("threads", 1))), 1 if asked.get("device") == "cuda" else None
    path = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH")]))
    os.environ |= {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "SRUN_CPUS_PER_TASK": str(cpus)}
    executor = submitit.AutoExecutor(checkout.parent, engine, slurm_max_num_timeout=10**6)
    executor.update_parameters(timeout_min=minutes if slurm else 10**6, cpus_per_task=cpus, gpus_per_node=gpus)
    executor.update_parameters(name="farm", stderr_to_stdout=True, slurm_array_parallelism=at_once)
    executor.update_parameters(slurm_additional_parameters={"requeue": True})
    if slurm:
        try:
            executor.map_array(Seed(), lines)
        except submitit.core.utils.UncompletedJobError as error:
            raise UserError(f"sbatch refused the jobs: {str(error).splitlines()[-1]}") from None
        return
    jobs = []
    while lines or not all(job.done() for job in jobs):
        if lines and sum(not job.done() for job in jobs) < at_once:
            jobs.append(executor.submit(Seed(), lines.pop(0)))
        time.sleep(0.1)


def main(argv: list[str] | None = None) -> None:
    parser = run.Parser(prog="python -m common.farm", allow_abbrev=False)
    parser.add_argument("--engine", choices=("local", "slurm"), default="local")
    parser.add_argument("--runs", type=run.as_path, default=Path("runs"), help="logs and checkouts go to its farm/")
    parser.add_argument("--status", action="store_true", help="queue nothing, only print what became of the jobs")
    for flag, default, text in (("--jobs", 2, "at once"), ("--time", 240, "minutes that SLURM gives a job at once")):
        parser.add_argument(flag, type=partial(check_value, flag, annotation=Count), default=default, help=text)
    options = parser.parse_all(argv)
    if not submitit:
        raise UserError("submitit is not installed; pip install -e '.[cluster]'")
    if options.engine == "slurm" and not shutil.which("sbatch"):
        raise UserError("--engine slurm: there is no sbatch here; log in to the cluster, or take --engine local")
    lines = [] if options.status else sys.stdin.read().splitlines()
    if not lines and not options.status:
        raise UserError("no commands on standard input; expected lines as `make pending COMMANDS=1` prints them")
    folder = (options.runs / "farm" / options.engine).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if lines:
        with open(folder / "lock", "a") as lock:
            checkout = checkout_for(lock, options.engine == "slurm")
            busy = [seed for seed, row in table(folder).items() if row[0] in ("queued", "running")]
            if new := [line for line in lines if WHERE.split(line)[0] not in busy]:
                submit(new, checkout, options.engine, options.jobs, options.time)
    rows = list(table(folder).values())
    print(as_text([["state", "seed", "last line", "log"], *rows]) if rows else "no jobs yet", f"in {folder}", sep="\n")
    if lines and options.engine == "local" and (failed := sum(row[0] == "failed" for row in rows)):
        raise RunFailed(f"{failed} of {len(rows)} jobs; their logs say why")


if __name__ == "__main__":
    run.exit_with(main)
