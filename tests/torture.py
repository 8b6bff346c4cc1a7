"""Kills, damaged files and full disks by the hundred: is it as the README promises? `make torture`, or

    python -m tests.torture [--seed 0] [--quick]

Prints a table: what was tried, how often, how much of it was refused in one line, and how much came out otherwise than
promised; exits with 1 where anything did. Everything is drawn from the seed. Each command runs in a process of its own,
forked from this one, which has imported torch and keeps to one thread.
"""

import argparse
import contextlib
import csv
import importlib
import io
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from common import classifier, data, graph, inception, run

SMALL, FOLDER = "segma.train digits --hidden-dim 32 --epochs", Path("segma/digits/seed0-hidden-dim-32")
OWN = "--dataset folder:OWN"  # 60 generated images of three classes
TRAINERS = {  # small but whole runs: several epochs of several steps
    "SeGMA": f"{SMALL} 12",
    "M1+M2": "segma.m1m2 digits --hidden-dim 16 --m1-hidden-dim 16 --m1-epochs 3 --epochs 6",
    "ADGM": "segma.adgm digits --hidden-dim 16 --epochs 5",
    "GM-GAN": "gmgan.train digits --width 2 --batch-real 256 --batch-fake 64 --epochs 5",
    "GM-GAN, toy": "gmgan.train toy --mixture dynamic --epochs 2",
    "AC-GAN": "gmgan.acgan toy --epochs 2",
    "K-means": "gmgan.kmeans digits --batch-real 256 --epochs 3",
    "responsibility": f"gan_responsibility.train digits {OWN} --n-components 2 --latent-dim 4 --batch 8 --epochs 3",
    "its GM-GAN": f"gan_responsibility.gan flowers10-gm-gan {OWN} --n-components 2 --latent-dim 4 --batch 8 --epochs 3",
    "AMM": f"amm.train digits {OWN} --validation 8 --n-components 3 --batch 8 --epochs 2",
    "SAMM": f"amm.train samm-digits {OWN} --validation 8 --n-components 3 --n-labels 20 --batch 8 --epochs 2",
}


@dataclass
class Kind:
    """One kind of fault: what was tried, and what came out otherwise than promised."""

    what: str
    tried: int = 0
    refused: int = 0  # in one line
    failures: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    spoken = time.monotonic()  # when the last line was printed, whatever the kind

    def trial(self) -> None:
        self.tried += 1
        if time.monotonic() - Kind.spoken > 15:
            print(f"  … {self.what}: {self.tried} tried", flush=True)
            Kind.spoken = time.monotonic()

    def check(self, fine: bool, message: str) -> None:
        if not fine:
            self.failures.append(message)

    def ended(self, child: "Child", *codes: int, says: str = "", what: str = "") -> None:
        """The command should end with one of these codes and, where that is not 0, with one line."""
        self.trial()
        child.join()
        code, err = child.exitcode, child.read("err")
        self.refused += code != 0
        fine = code in codes and says in err and (code == 0 or err.count("\n") == 1 and "Traceback" not in err)
        self.check(fine, f"{what}: code {code}: {err.strip()[-300:]}")

    def attempt(self, what: str, function: Callable[[], object]) -> object:
        """What `function` returns, or None where it is refused in one line; anything else is a failure."""
        self.trial()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                return function()
        except run.UserError as error:
            self.refused += 1
            self.check("\n" not in str(error), f"{what}: not one line: {str(error)[:200]!r}")
        except BaseException as error:
            self.failures.append(f"{what}: {type(error).__name__}: {str(error)[:200]}")

    def __str__(self) -> str:
        Kind.spoken = time.monotonic()
        counts = f"{self.tried:>7,}{self.refused:>9,}{len(self.failures):>11,}"
        return f"{self.what:<40}{counts}{time.monotonic() - self.started:>7.0f} s"


def assert_same(a: object, b: object, path: str = "") -> None:
    """The contents of two checkpoints are equal bit for bit, wall-clock values aside."""
    assert type(a) is type(b), path
    if isinstance(a, dict | list):
        a, b = (dict(enumerate(x) if isinstance(x, list) else x) for x in (a, b))
        assert a.keys() == b.keys(), path
        for key in a.keys() - {"seconds", "epoch_seconds", "sessions"}:
            assert_same(a[key], b[key], f"{path}/{key}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, path


class Child(multiprocessing.get_context("fork").Process):
    """This function in a process of its own, which ends as a command would. place: a folder for its output."""

    def __init__(self, place: Path, function: Callable[[], object]):
        super().__init__()
        self.function, self.folder = function, Path(tempfile.mkdtemp(dir=place))
        self.start()

    def run(self) -> None:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(self.folder / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
        run.exit_with(self.function)

    def read(self, name: str) -> str:
        return (self.folder / name).read_text(errors="replace") if (self.folder / name).exists() else ""

    def says(self, words: str) -> "Child":
        """Itself, once its output has these words, or it has ended."""
        while self.is_alive() and words not in self.read("out"):
            time.sleep(0.005)
        return self


def start(place: Path, line: str, *more: object, first: Callable[[], object] = lambda: None) -> Child:
    """`python -m <line> <more>` on one thread of the CPU. first: what the child does to itself before."""
    own = place / "own"
    for i in range(0 if own.exists() or OWN not in line else 60):
        (own / "abc"[i % 3]).mkdir(parents=True, exist_ok=True)
        Image.frombytes("L", (28, 28), random.Random(i).randbytes(784)).save(own / "abc"[i % 3] / f"{i}.png")
    program, *words = line.replace("folder:OWN", f"folder:{own}").split()
    words += [*map(str, more), "--threads", "1", "--device", "cpu"]
    return Child(place, lambda: (first(), importlib.import_module(program).main(words)))


def state_in(folder: Path) -> dict:
    return run.load_checkpoint(folder / "checkpoint.pt") or {"total_steps": 0, "epoch": 0, "step": 0}


def rows_of(folder: Path) -> list[dict]:
    """log.csv without the clock and without what is empty, as a later phase's columns are."""
    text = (folder / "log.csv").read_text() if (folder / "log.csv").exists() else ""
    rows = csv.DictReader(text.splitlines(), strict=True)
    return [{key: value for key, value in row.items() if key != "seconds" and value} for row in rows]


def kills(place: Path, rng: random.Random, quick: bool) -> Iterator[Kind]:
    """SIGKILL, SIGTERM and Ctrl-C at random moments of every trainer; then to the end: the same bits."""
    for name in ("SeGMA",) if quick else TRAINERS:
        kind, line = Kind(f"killed and resumed: {name}"), TRAINERS[name]
        whole, runs = place / f"whole {name}", place / f"killed {name}"
        child, begun = start(place, line, "--runs", whole).says(" epochs of "), time.monotonic()
        kind.ended(child, 0, what="the whole run")
        lasts, folder = time.monotonic() - begun, next(whole.glob("*/*/seed0*")).relative_to(whole)
        rows = rows_of(whole / folder)
        signals = [signal.SIGTERM, signal.SIGINT] + [signal.SIGKILL] * (4 if quick else 20 if name == "SeGMA" else 8)
        for number in rng.sample(signals, len(signals)):
            if state_in(runs / folder)["epoch"] == len(rows):
                shutil.rmtree(runs)  # complete: begin again
            before = state_in(runs / folder)
            child = start(place, line, "--runs", runs, "--save-every", rng.choice([0, 0, 0, 0.05, 60]))
            if rng.random() < 0.8 or number != signal.SIGKILL:  # else it may still be starting
                child.says(" epochs of ")
            time.sleep(rng.uniform(0, lasts) / 3)
            if child.is_alive():
                os.kill(child.pid, number)
            child.join()
            after = state_in(runs / folder)
            kind.check(after["total_steps"] >= before["total_steps"], "a checkpoint went back")
            if number == signal.SIGKILL or after["epoch"] == len(rows):
                kind.trial()
            else:
                says = f"saved after epoch {after['epoch']}, step {after['step']};"
                kind.ended(child, 128 + number, says=says, what=number.name)
            log = rows_of(runs / folder)
            kind.check(log == rows[: len(log)], "log.csv is not the beginning of the whole run's")
        kind.ended(start(place, line, "--runs", runs), 0, what="the last resumption")
        kind.attempt("the same bits", lambda f=folder, r=runs, w=whole: assert_same(state_in(r / f), state_in(w / f)))
        left = [str(path) for path in runs.rglob("*.part")]
        kind.check(rows_of(runs / folder) == rows and not left, f"log.csv is another one, or parts are left: {left}")
        yield kind


def numbers(place: Path, rng: random.Random, quick: bool) -> Iterator[Kind]:
    """A NaN in a batch stops the run and names the step; the last good checkpoint is kept."""
    kind = Kind("a NaN in a batch")
    for name in ("SeGMA",) if quick else TRAINERS:
        at, every, runs = rng.randrange(2, 5), rng.choice([0, 60]), place / f"nan {name}"

        def poisoned(step: Callable, *_: object, at: int = at) -> Callable:
            taken = iter(range(1, 1000))

            def with_nan(batch):
                if next(taken) == at:  # the fourth image, or point
                    images = batch[0].index_fill(0, torch.tensor([3]), float("nan"))
                    batch = batch._replace(**{batch._fields[0]: images})
                return step(batch)

            return with_nan

        words = (TRAINERS[name], "--runs", runs, "--save-every", every)
        child = start(place, *words, first=lambda p=poisoned: setattr(graph, "replayed", p))
        kept = "nothing was saved" if every else "the last good checkpoint is kept"
        kind.ended(child, 1, says=f"not finite, first at step {at}; {kept}", what=name)
        steps = [state_in(folder)["total_steps"] for folder in runs.glob("*/*/seed0*")]
        kind.check(steps == [0 if every else at - 1], f"{name}: {steps} steps are saved")
    yield kind


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The content with one thing wrong."""
    size, changed, ends = len(content), bytearray(content), min(len(content), 2000)  # where a zip file has its headers
    at = rng.choice([rng.randrange(size), rng.randrange(ends), size - 1 - rng.randrange(ends)])
    changed[at] ^= 1 << rng.randrange(8)
    others = [
        b"",
        content[:at],
        content + content[at:],
        bytes(size),
        rng.randbytes(size),
        b"<html>404 Not Found</html>",
    ]
    return rng.choice(others) if rng.random() < 0.5 else bytes(changed)


def files(place: Path, rng: random.Random, quick: bool) -> Iterator[Kind]:
    """A damaged checkpoint is refused in one line and never misread; a damaged cache is made anew."""
    kind, n, runs = Kind("a damaged checkpoint"), 45 if quick else 150, place / "damaged"
    start(place, SMALL, 2, "--runs", runs).join()
    path = runs / FOLDER / "checkpoint.pt"
    content, good = path.read_bytes(), run.load_checkpoint(path)
    for i in range(n):
        path.write_bytes(damaged(content, rng))
        found = kind.attempt("loaded", lambda: run.load_checkpoint(path))
        if found is not None:  # some bytes of a zip file say nothing
            kind.attempt("misread", lambda found=found: assert_same(found, good))
        elif i % 15 == 0:
            for line in (f"{SMALL} 3", "segma.eval digits --hidden-dim 32"):
                kind.ended(start(place, line, "--runs", runs), 2, says="damaged", what=line)
    yield kind

    kind, cache, network = Kind("a damaged cache"), place / "cache", torch.nn.Linear(3 * 8, 5)
    network.forward = lambda x: [x.flatten(1).float() @ network.weight.T]  # in the place of the Inception network
    images, labels = torch.arange(160, dtype=torch.uint8).view(20, 1, 2, 4), torch.arange(20) % 2
    few = data.Dataset("few", images, labels, images, labels, ("a", "b"), "0" * 16, False)
    makers = {
        "classifier": lambda: classifier.digest(classifier.trained(few, cache, "cpu")[0]),
        "inception": lambda: list(inception.cached_moments(network, images, cache, "x")),
    }
    for name, make in makers.items():
        good = kind.attempt(name, make)
        (path,) = cache.glob(f"{name}*.pt")
        content = path.read_bytes()
        for _ in range(n // 2):
            path.write_bytes(damaged(content, rng))
            kind.attempt(name, lambda make=make, good=good: assert_same(make(), good))
            kind.check(kind.attempt(name, lambda path=path: run.load_checkpoint(path)) is not None, f"{name}: kept")
    yield kind


def disk(place: Path, rng: random.Random, quick: bool) -> Iterator[Kind]:
    """Files that cannot grow, as on a full disk: what stood there stays whole; once there is room, the run goes on."""
    begun, whole, runs = place / "two epochs", place / "six epochs", place / "small"
    for epochs, folder in ((2, begun), (6, whole)):
        start(place, SMALL, epochs, "--runs", folder).join()
    size, rows, kind = (begun / FOLDER / "checkpoint.pt").stat().st_size, rows_of(whole / FOLDER), Kind("a full disk")
    for _ in range(1 if quick else 10):
        shutil.rmtree(runs, ignore_errors=True)
        shutil.copytree(begun, runs)
        room = rng.choice([4096, rng.randrange(4096, size), int(size * 1.2)])  # the child's own output is short
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (room, room))
        kind.ended(
            start(place, SMALL, 6, "--save-every", 0, "--runs", runs, first=limit), 0, 1, what=f"room for {room}"
        )
        kind.check(state_in(runs / FOLDER)["total_steps"] >= 28, f"room for {room}: the checkpoint is lost")
        found = rows_of(runs / FOLDER)
        kind.check(found == rows[: len(found)] and not list(runs.rglob("*.part")), f"{room}: a torn log, or a part")
        kind.ended(start(place, SMALL, 6, "--runs", runs), 0, what="once there is room")
        kind.attempt("the same bits", lambda: assert_same(state_in(runs / FOLDER), state_in(whole / FOLDER)))
    yield kind


def two(place: Path, rng: random.Random, quick: bool) -> Iterator[Kind]:
    """Two processes on one run: the second is refused."""
    kind, alone = Kind("two on one run"), place / "alone"
    start(place, SMALL, 6, "--runs", alone).join()
    for i in range(1 if quick else 5):
        runs = place / f"two {i}"
        pair = [start(place, SMALL, 6, "--save-every", 0, "--runs", runs) for _ in range(2)]
        for child in pair:
            child.join()
            kind.ended(child, 0, 2, says="another process trains this run" if child.exitcode else "")
        kind.check(any(child.exitcode == 0 for child in pair), "both were refused")
        kind.attempt("the same bits", lambda r=runs: assert_same(state_in(r / FOLDER), state_in(alone / FOLDER)))
    yield kind


VALUES = [
    *("", "null", "~", "[]", "{}", "-1", "0", "1e400", ".nan", "nan", "-.inf", "true", "'text'", "3e-4", "0x10"),
    *("1:30", "2026-11-21", "[1, 2]", "{a: 1}", "&a [*a]", "1.5", '"\\0"', "65537", "none", "random", "2", "010"),
    *("1e-300", "folder:/nonexistent", "cuda:7", "--epochs", "a: b: c", "\t", "é" * 50, "!!python/name:os.system"),
]


def shuffled(content: bytes, rng: random.Random) -> bytes:
    """A text one of whose lines was dropped, doubled or given another value."""
    lines = content.decode(errors="replace").splitlines(keepends=True) or ["a: 1\n"]
    at = rng.randrange(len(lines))
    head, colon, rest = lines[at].partition(":")
    other = f"{head}{colon} {rng.choice(VALUES)}{',' if rest.rstrip().endswith(',') else ''}\n"
    lines[at : at + 1] = rng.choice([[], 2 * [lines[at]], [other], [other]])
    return "".join(lines).encode()


def texts(place: Path, rng: random.Random, quick: bool) -> Iterator[Kind]:
    """Random YAML documents and command lines: a valid config, or one line."""
    documents, lines, path = Kind("random YAML documents"), Kind("random command lines"), place / "mine.yaml"
    known = sorted((path.parts[-3], path.stem) for path in run.ROOT.glob("*/configs/*.yaml"))
    for _ in range(60 if quick else 2500):
        paper, name = rng.choice(known)
        content, cls = (run.ROOT / paper / "configs" / f"{name}.yaml").read_bytes(), run.config_class(paper, name)
        for _ in range(rng.randrange(1, 4)):
            content = shuffled(content, rng) if rng.random() < 0.8 else damaged(content or b"-", rng)
        path.write_bytes(content)
        documents.attempt(f"{name}: {content!r}", lambda cls=cls: run.make_config(cls, run.read_yaml(path), "it"))
        flags = [field.name.replace("_", "-") for of in (cls, run.Options) for field in fields(of)]
        words = [name if rng.random() < 0.9 else rng.choice(["", "-", "mnits", "--", "../digits", "digits.yaml", "\0"])]
        for _ in range(rng.randrange(4)):
            flag, value = "--" + rng.choice(flags)[: rng.choice([99, 99, 99, -1])], rng.choice(VALUES)
            words += rng.choice([[flag, value], [f"{flag}={value}"], [flag], [value]])
        program = f"{paper}.{run.module_of(paper, name)}"
        lines.attempt(f"{program} {words}", lambda p=program, c=cls, w=words: run.parse(p, c, w))
    yield documents
    yield lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="the slice that `make test` runs")
    asked = parser.parse_args()
    torch.set_num_threads(1)  # a fork would wait for a pool of threads that it does not have
    classifier.LEAST_STEPS = classifier.MOST_STEPS = 3  # what judges is of no matter here
    programs = {line.split()[0] for line in TRAINERS.values()}
    for name in ("matplotlib.pyplot", "sklearn.model_selection", "torch._dynamo", "torchvision", *programs):
        importlib.import_module(name)  # once for every fork, not in each
    kinds, begun = [], time.monotonic()
    print(f"{'':<40}{'tried':>7}{'refused':>9}{'otherwise':>11}", flush=True)
    for part in (kills, numbers, files, disk, two, texts):
        with tempfile.TemporaryDirectory(prefix="torture-") as place:
            for kind in part(Path(place), random.Random(f"{asked.seed} {part.__name__}"), asked.quick):
                print(kind, *(f"    {failure[:1000]}" for failure in kind.failures[:10]), sep="\n", flush=True)
                kinds.append(kind)
    tried, failures = sum(kind.tried for kind in kinds), sum(len(kind.failures) for kind in kinds)
    print(f"seed {asked.seed}: {tried:,} tried, {failures} otherwise than promised, {time.monotonic() - begun:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
