"""How fast a training step is, and how near to what the machine can do.

    python -m tests.bench segma mnist --steps 100

Times the paper's own training step (forward, backward, clipping, optimiser) on generated images of the right shape: in
fp32, in bf16 and, on a GPU, in both with `--graph`, in turn, each in a new process. Flags: as in training.
"""

import importlib
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from common import graph, run
from common.data import described

WARM_UP = 6  # steps before the clock starts; with --graph the fourth is recorded
ROUNDS = 3  # in which the variants take turns; the best counts, for others can only slow a step down
LONGEST = 30.0  # seconds that the steps of one round may take
IMAGES = 2_000  # generated ones, from which a batch is drawn
SIDE = {"cpu": 1_536, "cuda": 8_192}  # of the matrices whose product is the ceiling
VARIANTS = {
    "fp32": ["--precision", "fp32"],
    "bf16": ["--precision", "bf16"],
    "fp32, graph": ["--precision", "fp32", "--graph"],
    "bf16, graph": ["--precision", "bf16", "--graph"],
}
TITLES = ("", "ms/step", "steps/s", "images/s", "GFLOP", "TFLOP/s", "ceiling", "share", "memory")
SIZES = {  # of a batch's tensors, by their names there: what the configs call their sizes
    "unlabelled": ("batch_unlabelled",),
    "real": ("batch_real", "batch"),
    "images": ("batch",),
    "labelled": ("labelled_per_batch", "batch"),
    "labels": ("labelled_per_batch", "batch_real", "batch"),
}


class FlopCounter(TorchDispatchMode):
    """Adds up what PyTorch's flop counter says of each operation; a multiplication and an addition are two.

    FlopCounterMode also follows modules, and fails on a gradient with respect to a leaf, which AMM's penalty takes.
    """

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if count := flop_registry.get(function._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def parse(paper: str, arguments: list[str]) -> tuple:
    """The config and options of a training command. Raises UserError where it is none. arguments: experiment, flags."""
    run.check_experiment(paper, arguments[0])
    program = f"{paper}.{run.module_of(paper, arguments[0])}"
    return run.parse(program, run.config_class(paper, arguments[0]), arguments)


def synchronised_time(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def prepared(paper: str, config, options: run.Options, device: torch.device) -> tuple[Callable[[], object], int]:
    """What takes one training step each time it is called, and the number of images that it takes."""
    loop = importlib.import_module(f"{paper}.train")
    shape, classes = described(config.dataset, loop.SETS)
    images = torch.randint(0, 256, (IMAGES, *shape), dtype=torch.uint8, device=device)
    images = images if len(shape) == 3 else images / 128 - 1  # points
    labels = torch.arange(IMAGES, device=device) % getattr(config, "class_count", classes or 1)
    names = [name for name in loop.Batch._fields if name in SIZES]

    def size(name: str) -> int:
        return next(getattr(config, field) for field in SIZES[name] if hasattr(config, field))

    def batch():
        drawn = {name: torch.randint(IMAGES, (size(name),), device=device) for name in names}
        entries = {name: labels[i] if name == "labels" else loop.as_input(images[i]) for name, i in drawn.items()}
        others = {"noise": run.generator(0, "bench", device=device), "m1_alone": False}
        return loop.Batch(**entries, **{name: x for name, x in others.items() if name in loop.Batch._fields})

    model = config.build().to(device)
    if hasattr(model, "players"):
        model.to(memory_format=torch.channels_last)
        given = {name: torch.optim.Adam(several, fused=True) for name, several in model.players().items()}
    else:  # SeGMA and its baselines have one optimiser
        given = torch.optim.Adam(model.parameters(), fused=True)
    optimizers = given.values() if isinstance(given, dict) else [given]
    train_step = sys.modules[type(config).__module__].train_step
    step = graph.replayed(lambda x: train_step(model, given, x, options.precision), optimizers, options.graph)
    return lambda: step(batch()), size(names[0])


def measure(paper: str, arguments: list[str], steps: int) -> dict:
    """One round in this process: seconds of a step, its operations and images, and the peak of the memory."""
    config, options = parse(paper, arguments)
    device = run.set_up(options)
    step, images = prepared(paper, config, options, device)
    step()
    with FlopCounter() as counter:
        step()
    for _ in range(WARM_UP - 2):
        step()
    times = [begun := synchronised_time(device)]
    while len(times) <= steps and times[-1] - begun < LONGEST:
        step()
        times.append(time.perf_counter())  # on a GPU launches run ahead, as they do in training
    end = synchronised_time(device)
    if device.type == "cuda":
        seconds, peak = (end - begun) / (len(times) - 1), torch.cuda.max_memory_allocated()
    else:
        seconds = statistics.median(b - a for a, b in zip(times, times[1:], strict=False))
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts = {"steps": len(times) - 1, "operations": counter.total, "images": images}
    return {"seconds": seconds, "peak": peak, **counts}


def ceiling(device: torch.device, precision: str) -> float:
    """Operations a second of a large matrix product, the fastest in two seconds after the first one."""
    side, dtype, times = SIDE[device.type], {"fp32": torch.float32, "bf16": torch.bfloat16}[precision], []
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in "ab")
    while len(times) < 2 or sum(times) < 2:
        begun = synchronised_time(device)
        a @ b
        times.append(synchronised_time(device) - begun)
    return 2 * side**3 / min(times[1:])


def one_round(paper: str, arguments: list[str], steps: int) -> dict:
    """`measure` in a new process."""
    command = [sys.executable, "-m", "tests.bench", paper, *arguments, "--steps", str(steps), "--one"]
    done = subprocess.run(command, cwd=run.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise run.RunFailed((done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("error: "))
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> None:
    parser = run.Parser(prog="python -m tests.bench", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("paper")
    parser.add_argument("experiment")
    parser.add_argument("--steps", type=int, default=90, help=f"timed, in {ROUNDS} rounds of at most {LONGEST:g} s")
    parser.add_argument("--one", action="store_true", help="one round in this process, as JSON")
    asked, flags = parser.parse_known_args(argv)
    if asked.steps < 1:
        raise run.UserError(f"--steps: {asked.steps} is out of range; allowed: >= 1")
    arguments = [asked.experiment, *flags]
    if asked.one:
        print(json.dumps(measure(asked.paper, arguments, asked.steps)))
        return
    device = run.set_up(parse(asked.paper, arguments)[1])
    variants = {name: how for name, how in VARIANTS.items() if device.type == "cuda" or "--graph" not in how}
    ceilings = {precision: ceiling(device, precision) for precision in ("fp32", "bf16")}
    rounds = [
        {name: one_round(asked.paper, [*arguments, *how], -(-asked.steps // ROUNDS)) for name, how in variants.items()}
        for _ in range(ROUNDS)
    ]
    print(f"{asked.paper} {asked.experiment} on {run.device_name(device)}, {torch.get_num_threads()} threads")
    print("".join(f"{title:>11}" for title in TITLES))
    for name in variants:
        n = min((results[name] for results in rounds), key=lambda found: found["seconds"])
        rate, most = n["operations"] / n["seconds"], ceilings[name[:4]]
        speed = [f"{1e3 * n['seconds']:.2f}", f"{1 / n['seconds']:.1f}", f"{n['images'] / n['seconds']:,.0f}"]
        work = [f"{n['operations'] / 1e9:.3f}", f"{rate / 1e12:.3f}", f"{most / 1e12:.3f}", f"{rate / most:.0%}"]
        print("".join(f"{cell:>11}" for cell in (name, *speed, *work, f"{n['peak'] / 2**30:.2f} GiB")))
    print(f"{n['steps']} steps, the best of {ROUNDS} rounds; GFLOP: a step's; share: of a large matrix product's rate")


if __name__ == "__main__":
    run.exit_with(main)
