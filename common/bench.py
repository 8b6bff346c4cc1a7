"""How fast a training step is, how near to what the machine can do, and how much faster than the usual way of writing it.

    python -m common.bench segma mnist --steps 100

Runs the paper's own loop on generated images of the right shape, each time in a new process, in turn: in fp32, in bf16, on a GPU in both
with `--graph`, and as a *textbook* would have it (`as_a_textbook`). Operations are counted as they are dispatched (a multiplication and an
addition are two); the ceilings are a large matrix product and a pass over a large vector in the same process.
"""

import contextlib
import importlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from common import run
from common.data import Dataset, described
from common.diff import as_text, papers

COUNTED = 2  # the step whose operations are counted; later ones may be replays, which dispatch nothing
WARM_UP = 7  # steps before the clock starts
IMAGES = 20_000  # generated training images; some experiments hold 10,000 out
BATCH = ("batch", "batch_real", "batch_unlabelled")  # what a config calls the images of a step
ROUNDS = 3  # in which the variants take turns; of the rounds' medians the best is reported: others can only slow a step down
LONGEST = 30.0  # seconds that the steps of one round may take
SIDE = {"cpu": 2_048, "cuda": 8_192}  # of the matrices whose product is the ceiling
LENGTH = 2**26  # of the vectors whose sum tells the bandwidth of the memory
ADAM_BYTES = 28  # that one step of Adam moves for a parameter: itself, its gradient and two moments read, all but the gradient written
VARIANTS = {
    "textbook": ["--precision", "fp32"],
    "fp32": ["--precision", "fp32"],
    "bf16": ["--precision", "bf16"],
    "fp32, graph": ["--precision", "fp32", "--graph"],
    "bf16, graph": ["--precision", "bf16", "--graph"],
}


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
    """A data set of noise, IMAGES to train on and 10,000 to test with."""
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, *shape), dtype=torch.uint8, generator=g)
    labels, test = torch.arange(IMAGES) % classes, 10_000
    names = tuple(map(str, range(classes)))
    return Dataset("generated", images, labels, images[:test], labels[:test], names, "0" * 16, False)


# ------------------------------------------------------------------------------------------------------------- a textbook


class Decoded(torch.utils.data.Dataset):
    """Images one by one, through PIL and torchvision's ToTensor, as `torchvision.datasets.MNIST` gives them."""

    def __init__(self, data: Dataset):
        self.data = data

    def __len__(self) -> int:
        return len(self.data.train_images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        from torchvision.transforms import functional

        return functional.to_tensor(functional.to_pil_image(self.data.train_images[i])), self.data.train_labels[i].item()


def batches_of(data: Dataset, size: int) -> Iterator[list[torch.Tensor]]:
    while True:
        yield from torch.utils.data.DataLoader(Decoded(data), size, shuffle=True, num_workers=2, drop_last=True)


def as_a_textbook(data: Dataset | None, batch: int) -> Callable[[dict[str, torch.Tensor]], None]:
    """Undo what makes our loop fast, in this process: what most public code does in its place.

    Adam parameter by parameter, PyTorch's own dropout, the memory layout that a network is born with; and each step waits for a batch from
    a DataLoader with two workers and reads every loss with `.item()`. Returns what `measure` calls after a step, with the losses.
    """
    adam, to = torch.optim.Adam, torch.nn.Module.to
    torch.optim.Adam = lambda *args, fused=None, **kwargs: adam(*args, foreach=False, **kwargs)
    torch.nn.Module.to = lambda self, *args, memory_format=None, **kwargs: to(self, *args, **kwargs)
    dropout = importlib.import_module("amm.model").InputDropout
    dropout.forward = lambda self, x: torch.nn.functional.dropout(x, self.p, self.training)
    loader = batches_of(data, batch) if data else None

    def after(losses: dict[str, torch.Tensor]) -> None:
        if loader:
            next(loader)
        for loss in losses.values():
            loss.item()

    return after


# ------------------------------------------------------------------------------------------------------------- measuring


def measure(paper: str, arguments: list[str], steps: int, variant: str, begun: float, evaluation: bool) -> dict:
    """One round in this process: seconds of a step, the operations of one, the images it takes, the ceilings; seconds until the first step.

    begun: when the process was started. evaluation: time that as well, of networks that have seen a few steps.
    """
    config, options = run.parse(paper, [*arguments, *VARIANTS[variant]])
    loop = run.module_of(paper, {})
    evaluator = importlib.import_module(f"{paper}.eval")
    shape, classes = described(config.dataset, loop.SETS)
    data = generated(shape, classes or 10) if len(shape) == 3 else None  # the toy makes its own
    if data:
        for module in (loop, evaluator):
            module.load = lambda *_: data
    batch = next(getattr(config, name) for name in BATCH if hasattr(config, name))
    device = run.set_up(options)
    after = as_a_textbook(data, batch) if variant == "textbook" else lambda losses: None
    times, counted, own, parameters = [], Counter(), run.Run.after_step, 0

    def after_step(self: run.Run, losses: dict) -> None:
        nonlocal parameters
        own(self, losses)
        after(losses)
        if device.type == "cuda" and len(times) < WARM_UP:
            torch.cuda.synchronize()
        times.append(time.time())
        if len(times) == COUNTED - 1:
            counted.__enter__()
        if len(times) == COUNTED:
            counted.__exit__(None, None, None)
        if len(times) > WARM_UP and (len(times) == WARM_UP + steps or times[-1] - times[WARM_UP - 1] > LONGEST):
            if device.type == "cuda":  # between these two steps launches ran ahead, as they do in training
                torch.cuda.synchronize()
                times[-1] = time.time()
            parameters = sum(p.numel() for optimizer in self.optimizers.values() for g in optimizer.param_groups for p in g["params"])
            if evaluation:
                self.save()
            raise Enough

    run.Run.after_step = after_step
    with tempfile.TemporaryDirectory() as folder:
        options = replace(options, runs=Path(folder), save_every=1e9)
        with contextlib.suppress(Enough):
            loop.train(replace(config, epochs=10**6), options)
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        evaluated = None
        if evaluation:
            from_here = time.time()
            evaluator.evaluate(options)
            evaluated = time.time() - from_here
    seconds = [b - a for a, b in zip(times[WARM_UP - 1 :], times[WARM_UP:], strict=False)]
    return {
        "seconds": statistics.mean(seconds) if device.type == "cuda" else statistics.median(seconds),
        "steps": len(seconds),
        "operations": counted.total,
        "images": batch,
        "parameters": parameters,
        "peak": peak,
        "start_up": times[0] - begun,
        "evaluation": evaluated,
        "ceiling": ceiling(device, torch.bfloat16 if options.precision == "bf16" else torch.float32),
        "bandwidth": bandwidth(device),
        "device": run.device_name(device),
        "threads": torch.get_num_threads(),
    }


def best_of_three(device: torch.device, attempt: Callable[[], object]) -> float:
    """Seconds of the fastest of three."""
    best = float("inf")
    for _ in range(3):
        begun = time.perf_counter()
        attempt()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return best


def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product."""
    side = SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in "ab")
    return 2 * side**3 / best_of_three(device, lambda: a @ b)


def bandwidth(device: torch.device) -> float:
    """Bytes a second of a += b for large vectors: two are read, one is written."""
    a, b = (torch.ones(LENGTH, device=device) for _ in "ab")
    return 3 * 4 * LENGTH / best_of_three(device, lambda: a.add_(b))


def bench(paper: str, experiment: str, flags: list[str], steps: int, evaluation: bool) -> dict[str, dict]:
    """The best round of each variant."""
    on_gpu = run.set_up(run.parse(paper, [experiment, *flags])[1]).type == "cuda"
    found: dict[str, list[dict]] = {variant: [] for variant, how in VARIANTS.items() if on_gpu or "--graph" not in how}
    for _ in range(ROUNDS):
        for variant, several in found.items():
            timed = ["--evaluation"] if evaluation and not several and variant == "bf16" else []
            one = ["--one", variant, paper, experiment, "--steps", str(-(-steps // ROUNDS)), *timed, "--begun", str(time.time()), *flags]
            done = subprocess.run([sys.executable, "-m", "common.bench", *one], capture_output=True, text=True)
            if done.returncode:
                raise run.UserError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
            several.append(json.loads(done.stdout.splitlines()[-1]))
    best = {variant: min(several, key=lambda one: one["seconds"]) for variant, several in found.items()}
    for variant, several in found.items():
        best[variant]["evaluation"] = next((one["evaluation"] for one in several if one["evaluation"]), None)
        best[variant]["times_textbook"] = best["textbook"]["seconds"] / best[variant]["seconds"]
    return best


def row_of(name: str, variant: str, n: dict) -> list[str]:
    rate, adam = n["operations"] / n["seconds"], ADAM_BYTES * n["parameters"] / n["bandwidth"]
    return [
        name, variant, f"{1e3 * n['seconds']:.1f}", f"{1 / n['seconds']:.1f}", f"{n['images'] / n['seconds']:.0f}",
        f"{n['times_textbook']:.2f}",
        f"{n['operations'] / 1e9:.2f}", f"{rate / 1e12:.3f}", f"{n['ceiling'] / 1e12:.3f}", f"{100 * rate / n['ceiling']:.0f} %",
        f"{100 * adam / n['seconds']:.0f} %", f"{n['peak'] / 2**30:.2f} GiB", f"{n['start_up']:.1f} s",
        *([f"{n['evaluation']:.0f} s"] if n["evaluation"] else []),
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = run.Parser(prog="python -m common.bench")
    parser.add_argument("paper")
    parser.add_argument("experiments", nargs="+", help="of that paper")
    parser.add_argument("--steps", type=int, default=300, help=f"that are timed, in {ROUNDS} rounds of at most {LONGEST:.0f} s")
    parser.add_argument("--evaluation", action="store_true", help="time one evaluation as well")
    parser.add_argument("--json", type=run.as_path, help="write the numbers to this file as well")
    parser.add_argument("--one", choices=VARIANTS, help="one round in this process, as JSON")
    parser.add_argument("--begun", type=float, default=time.time(), help="with --one: when that was, in seconds since 1970")
    options, flags = parser.parse_known_args(argv)
    if options.paper not in papers():
        raise run.UserError(f"unknown paper {options.paper!r}{run.nearest(options.paper, papers())}")
    if options.steps < 1:
        raise run.UserError(f"--steps: {options.steps} is out of range; allowed: >= 1")
    if options.one:
        arguments = [*options.experiments, *flags]
        print(json.dumps(measure(options.paper, arguments, options.steps, options.one, options.begun, options.evaluation)))
        return
    rows = [[
        "experiment", "", "ms a step", "steps/s", "images/s", "× textbook", "GFLOP a step", "TFLOP/s", "ceiling", "share",
        "Adam's traffic", "peak memory", "start-up", *(["evaluation"] if options.evaluation else []),
    ]]  # fmt: skip
    numbers = {}
    for experiment in options.experiments:
        run.check_experiment(options.paper, experiment)
        numbers[experiment] = bench(options.paper, experiment, flags, options.steps, options.evaluation)
        rows += [row_of(f"{options.paper}-{experiment}", variant, n) for variant, n in numbers[experiment].items()]
    n = next(iter(next(iter(numbers.values())).values()))
    print(as_text(rows))
    print(
        f"{n['device']}, {n['threads']} threads, memory {n['bandwidth'] / 1e9:.0f} GB/s; medians (on a GPU means) of {n['steps']} steps, "
        f"the best of {ROUNDS} rounds in turn\nshare: of a large matrix product in the same precision; Adam's traffic: the least time for "
        "its reading and writing, of the step"
    )
    if options.json:
        run.write_json(options.json, numbers)


if __name__ == "__main__":
    run.exit_with(main)
