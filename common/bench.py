"""How fast a training step is, and how near to what the machine can do.

    python -m common.bench amm mnist svhn-k10 --steps 30

Runs the paper's own loop on generated images of the right shape, in fp32 and bf16 in turn, each time in a new process. Operations are
counted as they are dispatched (a multiplication and an addition are two); the ceiling is a large matrix product in the same process.
"""

import contextlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from common import run
from common.data import Dataset, described
from common.diff import as_text, papers

WARM_UP = 5  # steps before the clock starts
IMAGES = 20_000  # generated training images; some experiments hold 10,000 out
BATCH = ("batch", "batch_real", "batch_unlabelled")  # what a config calls the images of a step
ROUNDS = 3  # in which the precisions take turns; of the rounds' medians the best is reported: others can only slow a step down
SIDE = 4_096  # of the matrices whose product is the ceiling


class Counter(TorchDispatchMode):
    """Counts the operations of what runs under it. PyTorch's own follows modules too, which a gradient for a leaf does not allow."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if count := flop_registry.get(function._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


class Enough(Exception):
    """The steps asked for are done."""


def generated(shape: tuple[int, ...], classes: int) -> Dataset:
    """A data set of noise, IMAGES to train on and 100 to test with."""
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, *shape), dtype=torch.uint8, generator=g)
    labels = torch.arange(IMAGES) % classes
    return Dataset("generated", images, labels, images[:100], labels[:100], tuple(map(str, range(classes))), "0" * 16, False)


def measure(paper: str, arguments: list[str], steps: int) -> dict:
    """Seconds of each of `steps` steps of a training, the operations of one, the images it takes, and the ceiling, in this process."""
    config, options = run.parse(paper, arguments)
    loop = run.module_of(paper, {})
    shape, classes = described(config.dataset, loop.SETS)
    if len(shape) == 3:
        loop.load = lambda *_: generated(shape, classes or 10)
    device = run.set_up(options)
    times, counted, own = [], Counter(), run.Run.after_step

    def after_step(self: run.Run, losses: dict) -> None:
        own(self, losses)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        if len(times) == WARM_UP:
            counted.__enter__()
        if len(times) == WARM_UP + 1:
            counted.__exit__(None, None, None)
        if len(times) == WARM_UP + 2 + steps:
            raise Enough

    run.Run.after_step = after_step
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Enough):
        loop.train(replace(config, epochs=10**6), replace(options, runs=Path(folder), save_every=1e9))
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = [b - a for a, b in zip(times[WARM_UP + 1 :], times[WARM_UP + 2 :], strict=False)]  # after the one that was counted
    return {
        "seconds": statistics.median(seconds),
        "operations": counted.total,
        "images": next(getattr(config, name) for name in BATCH if hasattr(config, name)),
        "peak": peak,
        "ceiling": ceiling(device, torch.bfloat16 if options.precision == "bf16" else torch.float32),
        "device": run.device_name(device),
        "threads": torch.get_num_threads(),
    }


def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product."""
    a, b = (torch.randn(SIDE, SIDE, device=device).to(dtype) for _ in "ab")
    best = float("inf")
    for _ in range(3):
        begun = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return 2 * SIDE**3 / best


def bench(paper: str, experiment: str, flags: list[str], steps: int) -> dict[str, dict]:
    """The best round of each precision."""
    found: dict[str, list[dict]] = {"fp32": [], "bf16": []}
    for _ in range(ROUNDS):
        for precision, several in found.items():
            one = ["--one", paper, experiment, "--steps", str(steps), "--precision", precision, *flags]
            done = subprocess.run([sys.executable, "-m", "common.bench", *one], capture_output=True, text=True)
            if done.returncode:
                raise run.UserError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
            several.append(json.loads(done.stdout.splitlines()[-1]))
    return {precision: min(several, key=lambda one: one["seconds"]) for precision, several in found.items()}


def main(argv: list[str] | None = None) -> None:
    parser = run.Parser(prog="python -m common.bench")
    parser.add_argument("paper")
    parser.add_argument("experiments", nargs="+", help="of that paper")
    parser.add_argument("--steps", type=int, default=30, help="steps that are timed in a round")
    parser.add_argument("--one", action="store_true", help="one measurement in this process, as JSON")
    parser.add_argument("--json", type=run.as_path, help="write the numbers to this file as well")
    options, flags = parser.parse_known_args(argv)
    if options.paper not in papers():
        raise run.UserError(f"unknown paper {options.paper!r}{run.nearest(options.paper, papers())}")
    if options.steps < 1:
        raise run.UserError(f"--steps: {options.steps} is out of range; allowed: >= 1")
    if options.one:
        print(json.dumps(measure(options.paper, [*options.experiments, *flags], options.steps)))
        return
    rows = [["experiment", "precision", "ms a step", "images/s", "GFLOP a step", "GFLOP/s", "ceiling", "share", "peak memory"]]
    numbers = {}
    for experiment in options.experiments:
        run.check_experiment(options.paper, experiment)
        numbers[experiment] = bench(options.paper, experiment, flags, options.steps)
        for precision, n in numbers[experiment].items():
            rate = n["operations"] / n["seconds"]
            rows.append([
                f"{options.paper}-{experiment}", precision, f"{1e3 * n['seconds']:.1f}", f"{n['images'] / n['seconds']:.0f}",
                f"{n['operations'] / 1e9:.2f}", f"{rate / 1e9:.0f}", f"{n['ceiling'] / 1e9:.0f}", f"{100 * rate / n['ceiling']:.0f} %",
                f"{n['peak'] / 2**30:.2f} GiB",
            ])  # fmt: skip
    n = next(iter(next(iter(numbers.values())).values()))
    print(as_text(rows))
    print(f"{n['device']}, {n['threads']} threads; the median of {options.steps} steps, the best of {ROUNDS} rounds in turn")
    if options.json:
        run.write_json(options.json, numbers)


if __name__ == "__main__":
    run.exit_with(main)
