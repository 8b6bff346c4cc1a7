"""Faults by the thousand, and what they cost: the proof of what the README promises. `make torture`, or

    python -m tests.torture [--seed 0] [--small] [kills files disk two numbers fuzz results]

Everything is drawn from the seed. Prints one line per kind of fault and exits with 1 if anything was lost, wrong or a traceback.
Every command line runs in a process of its own, forked from this one, which has imported torch and keeps to one thread.
"""

import argparse
import contextlib
import csv
import dataclasses
import importlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from PIL import Image

from common import classifier, data, diff, inception, run
from tests import test_common_data as formats

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 60.0  # that a refusal may take
OWNED = Path(tempfile.gettempdir(), f"torture-owned-{os.getpid()}")  # what a file that carries code would leave

TRAINERS = {  # small but whole runs: several epochs of several steps, every network of its own; OWN: a folder of 60 images, three classes
    "SeGMA": ("segma", "digits", "--hidden-dim 32 --epochs 30"),
    "M1+M2": ("segma", "digits-m1m2", "--hidden-dim 16 --m1-hidden-dim 16 --m1-epochs 6 --epochs 14"),
    "ADGM": ("segma", "digits-adgm", "--hidden-dim 16 --epochs 8"),
    "GM-GAN": ("gmgan", "digits", "--width 2 --batch-real 256 --batch-fake 64 --epochs 8"),
    "GM-GAN, supervised, dynamic": (
        "gmgan",
        "digits",
        "--supervised true --mixture dynamic --width 2 --latent-dim 8 --batch-real 256 --batch-fake 64 --epochs 8",
    ),
    "AC-GAN": ("gmgan", "toy-acgan", "--epochs 3"),
    "responsibility": ("gan_responsibility", "digits", "--dataset folder:OWN --n-components 2 --latent-dim 4 --batch 8 --epochs 3"),
    "AMM": ("amm", "digits", "--dataset folder:OWN --validation 8 --n-components 3 --batch 8 --epochs 4"),
    "SAMM": ("amm", "samm-digits", "--dataset folder:OWN --validation 8 --n-components 3 --n-labels 20 --batch 8 --epochs 4"),
}


# ------------------------------------------------------------------------------------------------------- the account


@dataclass
class Account:
    """What was tried of one kind, and what went wrong."""

    what: str
    tried: int = 0
    refused: int = 0  # with one clear line
    remarks: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def check(self, fine: bool, message: str) -> None:
        if not fine:
            self.failures.append(message)

    def note(self, remark: str) -> None:
        self.remarks[remark] = self.remarks.get(remark, 0) + 1

    def __str__(self) -> str:
        more = [f"{self.refused:,} refused"] * bool(self.refused) + [f"{n:,} {remark}" for remark, n in self.remarks.items()]
        told = f" ({', '.join(more)})" if more else ""
        return f"{self.what:<44}{self.tried:>7,} tried{told}, {len(self.failures)} failures, {time.monotonic() - self.started:.0f} s"


# ------------------------------------------------------------------------------------------- command lines, in forks


@dataclass
class Child:
    """A command line in a process of its own."""

    pid: int
    folder: Path
    code: int | None = None

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self, limit: float = 200.0) -> int:
        end = time.monotonic() + limit
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"no end after {limit:.0f} s")
            time.sleep(0.005)
        return self.code

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text(errors="replace")

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text(errors="replace")


def fork(place: Path, function: Callable[[], object]) -> Child:
    """This function in a process of its own, which ends as a command line would. place: a folder for its output."""
    folder = Path(tempfile.mkdtemp(dir=place))
    for name in ("out", "err"):
        (folder / name).touch()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Child(pid, folder)
    code = 70
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / name, os.O_WRONLY), number)
        sys.stdin = open(os.devnull)
        run.exit_with(function)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def start(place: Path, program: str, *arguments: object, prepare: Callable[[], object] = lambda: None) -> Child:
    """`python -m program arguments`. prepare: what the child does to itself first."""

    def command() -> None:
        prepare()
        importlib.import_module(program).main([str(a) for a in arguments])

    return fork(place, command)


def finish(place: Path, program: str, *arguments: object, **kwargs) -> Child:
    """The same, to its end."""
    child = start(place, program, *arguments, **kwargs)
    child.wait()
    return child


def one_line(child: Child, *codes: int) -> bool:
    """Whether it ended with one of these codes and one line, and no traceback."""
    return child.code in codes and child.err.count("\n") == 1 and "Traceback" not in child.err


def small_run(place: Path, name: str) -> tuple[str, str, list[object]]:
    """Paper, experiment and the other arguments of a trainer's small run."""
    paper, experiment, flags = TRAINERS[name]
    own = place / "own"
    if "OWN" in flags and not own.exists():
        for kind in "abc":
            formats.write_images(own / kind, 20)
    return paper, experiment, [*flags.replace("OWN", str(own)).split(), "--threads", 1, "--device", "cpu"]


def await_training(child: Child) -> None:
    """Until it says that it begins, or ends."""
    while "steps an epoch" not in child.out and child.poll() is None:
        time.sleep(0.005)


def assert_same(a: object, b: object, path: str = "") -> None:
    """Two checkpoints' contents, equal bit for bit, wall-clock values aside."""
    if isinstance(a, dict):
        assert isinstance(b, dict) and a.keys() == b.keys(), path
        for key in a.keys() - {"seconds", "epoch_seconds", "sessions"}:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def rows_of(log: Path) -> list[dict]:
    """log.csv without the clock and what is empty, as a later phase's columns are. Raises where a row is torn."""
    with open(log, newline="") as file:
        rows = list(csv.DictReader(file, strict=True))
    assert all(None not in row and None not in row.values() for row in rows), f"{log}: a torn row"
    return [{key: value for key, value in row.items() if key != "seconds" and value != ""} for row in rows]


# ------------------------------------------------------------------------------------------------------ 1. kill anywhere


def kills(place: Path, rng: random.Random, n: dict[str, int]) -> Iterator[Account]:
    """SIGKILL at random moments of every trainer, n times each, then SIGTERM and Ctrl-C; then on to the end: the same bits.

    One kill in five falls anywhere, the start included, the others after it, most with a checkpoint after every step.
    """
    for name in TRAINERS:
        account = Account(f"kills: {name}")
        paper, experiment, arguments = small_run(place, name)
        arguments = [f"{paper}.train", experiment, *arguments]
        where = Path(paper, experiment, "seed0")
        whole = place / f"whole-{name}"
        child = start(place, *arguments, "--runs", whole)
        await_training(child)
        begun = time.monotonic()
        child.wait()
        lasts = time.monotonic() - begun
        account.check(child.code == 0, f"the whole run ended with {child.code}: {child.err}")
        rows = rows_of(whole / where / "log.csv")
        runs = place / f"killed-{name}"
        for number in [signal.SIGKILL] * n.get(name, n["others"]) + [signal.SIGTERM, signal.SIGINT] * n["signals"]:
            account.tried += 1
            before = run.load_checkpoint(runs / where / "checkpoint.pt")
            done = before["total_steps"] if before else 0
            saving = rng.choice([0, 0, 0, 0.05, 60])
            child = start(place, *arguments, "--runs", runs, "--save-every", saving)
            if rng.random() < 0.8:
                await_training(child)
            time.sleep(rng.uniform(0, lasts) / (1 if saving else 4))
            child.kill(number)
            child.wait()
            if number != signal.SIGKILL:
                told = child.code in (0, 130 if number == signal.SIGINT else 143) and "Traceback" not in child.err
                early = child.code == -signal.SIGTERM and "resuming" not in child.out  # while it was starting
                account.check(told or early, f"{number.name}: code {child.code}: {child.err[-300:]}")
                if child.code in (130, 143) and told:
                    at = run.load_checkpoint(runs / where / "checkpoint.pt")
                    said = f"saved after epoch {at['epoch']}, step {at['step']};" in child.err
                    account.check(said, f"{number.name}: not saved where it says")
            if list((runs / where).glob(".checkpoint*.part")):
                account.note("inside the writing of a checkpoint")
            state = run.load_checkpoint(runs / where / "checkpoint.pt")
            account.check((state["total_steps"] if state else 0) >= done, "a checkpoint went back")
            log = runs / where / "log.csv"
            if log.exists():
                found = rows_of(log)
                account.check(found == rows[: len(found)], "log.csv is not the beginning of the whole run's")
        child = finish(place, *arguments, "--runs", runs)
        account.check(child.code == 0, f"the last resumption ended with {child.code}: {child.err[-300:]}")
        try:
            assert_same(*(run.load_checkpoint(r / where / "checkpoint.pt") for r in (runs, whole)))
            assert rows_of(runs / where / "log.csv") == rows, "log.csv"
            assert (runs / where / "config.yaml").read_text() == (whole / where / "config.yaml").read_text(), "config.yaml"
        except AssertionError as error:
            account.failures.append(f"not the same bits: {error}")
        yield account


# ------------------------------------------------------------------------------------------------------ 2. hostile files


def damaged(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """The content with one thing wrong, and what."""
    size = len(content)
    boundaries = [k for k in (1, 2, 4, 8, 12, 16, 64, 128, 512) if k < size]
    kind = rng.choice(["empty", "head", "half", "short", "cut", "bit", "bit", "byte", "run", "magic", "longer", "zeros", "noise", "text"])
    changed = bytearray(content)
    if kind == "empty":
        return kind, b""
    if kind == "head":
        return kind, content[: rng.choice(boundaries or [0])]
    if kind == "half":
        return kind, content[: size // 2]
    if kind == "short":
        return kind, content[:-1]
    if kind == "cut":
        return kind, content[: rng.randrange(size)]
    if kind == "bit":
        changed[rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        at = rng.randrange(min(size, 256))
        changed[at] = (changed[at] + rng.randrange(1, 256)) % 256
    elif kind == "run":
        at = rng.randrange(size)
        changed[at : at + 16] = bytes(b ^ 0xFF for b in changed[at : at + 16])
    elif kind == "magic":
        changed[:4] = rng.randbytes(4)
    elif kind == "longer":
        changed += rng.randbytes(rng.randrange(1, 300))
    elif kind == "zeros":
        changed[:] = bytes(size)
    elif kind == "noise":
        changed[:] = rng.randbytes(size)
    elif kind == "text":
        changed[:] = b"<html><body>404 Not Found</body></html>\n"
    return kind, bytes(changed)


def write_person(folder: Path) -> None:
    for name in "ab":
        formats.write_images(folder / name, 4)


DATA_SETS = {  # name for load: folder, writer, what makes its digests the official ones
    "mnist": ("MNIST/raw", formats.write_idx, None),
    "svhn": ("SVHN", formats.write_svhn, formats.make_svhn_official),
    "celeba": ("celeba", formats.write_celeba, formats.make_celeba_official),
    "cifar10": ("cifar-10-batches-py", formats.write_cifar, formats.make_cifar_official),
    "stl10": ("stl10_binary", formats.write_stl, formats.make_stl_official),
    "flowers10": ("flowers-102", formats.write_flowers, formats.make_flowers_official),
    "folder": ("own", write_person, None),
}


def outcome(account: Account, label: str, attempt: Callable[[], object]) -> object:
    """What `attempt` returns, or None where it was refused in one line; anything else is a failure."""
    account.tried += 1
    begun = time.monotonic()
    quiet = io.StringIO()
    try:
        with contextlib.redirect_stderr(quiet), contextlib.redirect_stdout(quiet):
            found = attempt()
    except (run.UserError, run.RunFailed) as error:
        account.refused += 1
        account.check("\n" not in str(error) and len(str(error)) < 1000, f"{label}: {str(error)[:200]!r} is not one clear line")
        found = None
    except BaseException as error:
        account.failures.append(f"{label}: {type(error).__name__}: {str(error)[:200]}")
        found = None
    account.check(time.monotonic() - begun < SECONDS, f"{label}: took {time.monotonic() - begun:.0f} s")
    return found


def is_whole(found: data.Dataset) -> bool:
    """Whether what was read is a data set: shapes, types and labels that fit together."""
    for images, labels in ((found.train_images, found.train_labels), (found.test_images, found.test_labels)):
        fits = images.dtype == torch.uint8 and images.dim() == 4 and labels.dtype == torch.int64 and len(images) == len(labels)
        if not (fits and len(labels) and 0 <= labels.min() and labels.max() < found.n_classes):
            return False
    return True


def files(place: Path, rng: random.Random, n: int) -> Iterator[Account]:
    """Every file that is read, damaged n times in some way: refused in one line, or (where it was asked for) read as a whole data set."""
    os.chmod(place, 0o755)  # for the trials as nobody
    for name, (folder, write, make_official) in DATA_SETS.items():
        account = Account(f"files: {name}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(place / f"cache-{name}"))
            patch.setattr("urllib.request.urlopen", no_network)
            root = place / f"data-{name}"
            write(root / folder)
            if name == "mnist":
                digests = {file: data.hashlib.sha256((root / folder / file).read_bytes()).hexdigest() for file in data.SHA256["mnist"]}
                patch.setitem(data.SHA256, "mnist", digests)
            elif make_official:
                make_official(root / folder, patch)
            asked = f"folder:{root / folder}" if name == "folder" else name
            good = quietly(asked, root, name in ("celeba", "flowers10", "folder"))
            victims = sorted(p for p in (root / folder).rglob("*") if p.is_file() and not p.name.startswith("."))
            for _ in range(n):
                path = rng.choice(victims)
                if not path.exists():  # the decoded pixels, taken away below
                    quietly(asked, root, True)
                content = path.read_bytes()
                if rng.random() < 0.5 and path.suffix == ".jpg":  # else a picture's damage hides behind the pixels decoded before it
                    for cached in root.rglob("pixels-*"):
                        cached.unlink()
                how = rng.randrange(20)
                if how == 0:
                    kind = "a folder in its place"
                    path.unlink()
                    path.mkdir()
                elif how == 1:
                    kind = "gone"
                    path.unlink()
                else:
                    kind, changed = damaged(content, rng)
                    path.write_bytes(changed)
                for unofficial in (False, True):
                    label = f"{path.relative_to(root)}, {kind}, unofficial {unofficial}"
                    found = outcome(account, label, lambda asked=asked, root=root, u=unofficial: data.load(asked, root, u))
                    if found is None:
                        continue
                    account.check(is_whole(found), f"{label}: what was read is no data set")
                    same = found.digest == good.digest and all(
                        torch.equal(getattr(found, part), getattr(good, part)) for part in ("train_images", "train_labels", "test_images")
                    )
                    if same:
                        account.note("read the same: bytes that no one looks at")
                    else:  # other bytes: never under the good set's name
                        account.check(found.digest != good.digest, f"{label}: other data under the digest of the good ones")
                        # No digests are published for the images of CelebA and Oxford-102: there the data's own digest tells.
                        told = not found.official or path.suffix == ".jpg"
                        account.check(told, f"{label}: other data called official")
                        account.note("read under another digest" if found.official else "read, and marked unofficial")
                if path.is_dir():
                    path.rmdir()
                path.write_bytes(content)
            quietly(asked, root, True)  # decoded as the files are now: nobody has no place to keep what is decoded
            for path in rng.sample(victims, min(2, len(victims))):
                account.tried += 1
                account.refused += 1
                shutil.rmtree(place / f"cache-{name}", ignore_errors=True)
                path.chmod(0o000)
                child = fork(place, lambda asked=asked, root=root: (nobody(), print(data.load(asked, root, True).digest)))
                child.wait()
                path.chmod(0o644)
                told = one_line(child, 2) and "Permission denied" in child.err
                told = told or child.code == 0 and child.out.split()[-1] == good.digest  # a file that no one looks at, or a cache
                account.check(told, f"{path.name} without rights: {child.code}: {child.err[-300:]}")
        yield account
    yield from other_files(place, rng, n)


def quietly(name: str, root: Path, unofficial: bool) -> data.Dataset:
    """data.load, without its line when it decodes."""
    with contextlib.redirect_stdout(io.StringIO()):
        return data.load(name, root, unofficial)


def no_network(*_: object, **__: object) -> None:
    raise OSError("network is unreachable")


def other_files(place: Path, rng: random.Random, n: int) -> Iterator[Account]:
    """Checkpoints, caches, configs, published numbers and results."""
    account = Account("files: checkpoint")
    path = place / "checkpoints/checkpoint.pt"
    state = {"epoch": 3, "networks": {"a": {"w": torch.arange(50.0)}}, "rows": [{"epoch": 1, "loss": 0.5}]}
    for _ in range(n):
        run.save_checkpoint(path, {**state, "epoch": 2})
        run.save_checkpoint(path, state)
        kind, changed = damaged(path.read_bytes(), rng)
        path.write_bytes(changed)
        both = rng.random() < 0.3
        if both:
            run.previous(path).write_bytes(damaged(run.previous(path).read_bytes(), rng)[1])
        found = outcome(account, f"checkpoint, {kind}", lambda: run.load_checkpoint(path))
        account.check((found is None) == both, f"checkpoint, {kind}: {'read' if both else 'not read'}")
        if found is not None:
            assert_same(found, {**state, "epoch": 2})
            account.note("gone back to the one before")
        shutil.rmtree(path.parent)
    yield account

    account = Account("files: a cached classifier")
    path = place / "caches/classifier-x.pt"
    for _ in range(n):
        run.save_checkpoint(path, {"network": {}, "accuracy": 90.0})
        kind, changed = damaged(path.read_bytes(), rng)
        path.write_bytes(changed)
        found = outcome(account, f"cache, {kind}", lambda: classifier._cached(path))
        account.check(found is None and not path.exists(), f"cache, {kind}: kept")
        account.note("thrown away aloud, to be made anew")
        shutil.rmtree(path.parent)
    yield account

    account = Account("files: cached Inception moments")
    images = torch.arange(60, dtype=torch.uint8).view(10, 1, 2, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "features", lambda network, images: images.flatten(1).double())
        attempt = lambda: inception.cached_moments(None, images, place / "moments", "x")  # noqa: E731
        good = attempt()
        (path,) = (place / "moments").glob("*.pt")
        for _ in range(n):
            kind, changed = damaged(path.read_bytes(), rng)
            path.write_bytes(changed)
            found = outcome(account, f"moments, {kind}", attempt)
            account.check(found is not None and all(map(torch.equal, found, good)), f"moments, {kind}: other moments")
            account.check(all(map(torch.equal, attempt(), good)), f"moments, {kind}: kept")
            account.note("computed anew")
    yield account

    account = Account("files: closed ones, folders in their place")
    keep = place / "kept"
    run.save_checkpoint(keep / "checkpoint.pt", state)
    run.save_checkpoint(keep / "classifier-x.pt", {"network": {}, "accuracy": 90.0})
    run.save_checkpoint(keep / "inception-x.pt", {"mean": torch.zeros(1), "covariance": torch.ones(1, 1)})
    with house(place / "open") as root:
        readers = {  # and whether what cannot be read is made anew
            keep / "checkpoint.pt": (lambda: run.load_checkpoint(keep / "checkpoint.pt"), False),
            keep / "classifier-x.pt": (lambda: classifier._cached(keep / "classifier-x.pt"), True),
            keep / "inception-x.pt": (lambda: inception.cached_moments(None, None, keep, "x"), False),
            root / "segma/configs/digits.yaml": (lambda: run.experiment_config("segma", "digits"), False),
            root / "segma/published.yaml": (lambda: diff.table("segma", None), False),
            root / "segma/results/digits.json": (lambda: diff.table("segma", None), False),
        }
        for path in (place, *keep.rglob("*"), keep, *(place / "open").rglob("*"), place / "open"):
            path.chmod(0o777 if path.is_dir() else 0o666)
        for path, (read, anew) in readers.items():
            content = path.read_bytes()
            if path.name != "inception-x.pt":  # which is computed anew where it is closed: there are no images here
                path.chmod(0o000)
                child = fork(place, lambda read=read: (nobody(), read()))
                child.wait()
                account.tried += 1
                account.check(one_line(child, 0 if anew else 2), f"{path.name}, closed: {child.code}: {child.err[-300:]}")
            path.unlink(missing_ok=True)
            path.mkdir()
            child = fork(place, read)
            child.wait()
            account.tried += 1
            account.refused += 1
            account.check(one_line(child, 2), f"{path.name}, a folder: {child.code}: {child.err[-300:]}")
            path.rmdir()
            path.write_bytes(content)
    yield account

    with house(place / "house") as root:
        for what in ("segma/configs/digits.yaml", "segma/published.yaml", "segma/results/digits.json"):
            account = Account(f"files: {what}")
            path = root / what
            content = path.read_bytes()
            before = outcome(Account(""), "", lambda: diff.table("segma", None))
            for _ in range(n):
                kind, changed = damaged(content, rng) if rng.random() < 0.5 else shuffled(content, rng)
                path.write_bytes(changed)
                label = f"{what}, {kind}: {changed[:80]!r}"
                if what.endswith("digits.yaml"):
                    found = outcome(account, label, lambda: run.experiment_config("segma", "digits"))
                else:
                    read = lambda: [diff.table("segma", None), diff.claims("segma", {}), diff.rankings("segma", {})]  # noqa: E731
                    found = outcome(account, label, read)
                    account.check(found is None or len(found[0]) > 0, f"{label}: an empty table")
                if found is not None:
                    account.note("read as what it says")
            path.write_bytes(content)
            account.check(outcome(Account(""), "", lambda: diff.table("segma", None)) == before, "the table is another one afterwards")
            yield account


def shuffled(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A text whose lines were dropped, doubled, moved or given another value."""
    lines = content.decode().splitlines(keepends=True)
    at, to = rng.randrange(len(lines)), rng.randrange(len(lines))
    kind = rng.choice(["drop", "double", "move", "value", "value"])
    if kind == "drop":
        del lines[at]
    elif kind == "double":
        lines.insert(to, lines[at])
    elif kind == "move":
        lines.insert(to, lines.pop(at))
    else:
        head, colon, rest = lines[at].partition(":")
        ending = "," if rest.rstrip().endswith(",") else ""
        lines[at] = f"{head}{colon} {rng.choice(VALUES)}{ending}\n"
    return f"{kind} line {at + 1}", "".join(lines).encode()


VALUES = [
    "", "null", "~", "[]", "{}", "-1", "0", "1e400", ".nan", "nan", "-.inf", "true", "'text'", "3e-4", "9" * 20, "0x10", "1:30",
    "2026-11-21", "[1, 2]", "{a: 1}", f"!!python/object/apply:os.system ['touch {OWNED}']", "&a [*a]", "1.5", '"\\u0000"', "9" * 5000,
]  # fmt: skip


@contextlib.contextmanager
def house(folder: Path) -> Iterator[Path]:
    """A copy of SeGMA's room and the READMEs, which `diff` and `run` take for the repository while this lasts."""
    shutil.copytree(ROOT / "segma", folder / "segma", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diff, "ROOT", folder)
        patch.setattr(run, "ROOT", folder)
        yield folder


# ------------------------------------------------------------------------------------- 3. full and read-only disks


def disk(place: Path, rng: random.Random, n: int) -> Iterator[Account]:
    """No room, in the middle of whatever is being written; and folders that cannot be written: the files that stood there stay whole."""
    train = ["segma.train", "digits", "--hidden-dim", 32, "--threads", 1, "--device", "cpu"]
    where = Path("segma/digits/seed0")
    first, whole = place / "disk-first", place / "disk-whole"
    assert finish(place, *train, "--runs", first, "--epochs", 2).code == 0
    assert finish(place, *train, "--runs", whole, "--epochs", 6).code == 0
    size = (first / where / "checkpoint.pt").stat().st_size

    def unharmed(runs: Path, account: Account, child: Child, codes: tuple[int, ...] = (1,)) -> None:
        account.check(child.code == 0 or one_line(child, *codes), f"code {child.code}: {child.err[-300:]}")
        account.refused += child.code != 0
        state = run.load_checkpoint(runs / where / "checkpoint.pt")
        account.check(state is not None and state["total_steps"] >= 28, "the checkpoint that stood there is lost")
        account.check(not list((runs / where).glob(".checkpoint*.part")) or child.code == 0, "a part of a file was left")
        rows = rows_of(runs / where / "log.csv")
        account.check(rows == rows_of(whole / where / "log.csv")[: len(rows)], "log.csv is torn")

    account = Account("a disk that fills up: training")
    for i in range(n):
        account.tried += 1
        runs = place / f"full-{i}"
        shutil.copytree(first, runs)
        most = rng.choice([rng.randrange(400), rng.randrange(size), int(size * 1.2)])
        longer = [*train, "--runs", runs, "--epochs", 6]
        unharmed(runs, account, finish(place, *longer, "--save-every", 0, prepare=lambda most=most: no_file_beyond(most)))
        account.check(finish(place, *longer).code == 0, "it does not go on once there is room")
        assert_same(*(run.load_checkpoint(r / where / "checkpoint.pt") for r in (runs, whole)))
        shutil.rmtree(runs)
    yield account

    account = Account("a file system that is full or read-only")
    small = place / "small"
    small.mkdir()
    room = f"size={3 * size // 4096 * 4096 + 65536}"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", room, "tmpfs", small], capture_output=True)
    if mounted.returncode:
        account.note("left out: no file system can be mounted here")
    else:
        try:
            shutil.copytree(first, small / "runs")
            filler = small / "filler"
            for _ in range(-(-n // 2)):
                account.tried += 1
                free = shutil.disk_usage(small).free
                filler.write_bytes(bytes(max(free - rng.randrange(size), 0)))
                unharmed(small / "runs", account, finish(place, *train, "--runs", small / "runs", "--epochs", 6, "--save-every", 0))
                filler.unlink()
            account.tried += 1
            subprocess.run(["mount", "-o", "remount,ro", small], check=True, capture_output=True)
            unharmed(small / "runs", account, finish(place, *train, "--runs", small / "runs", "--epochs", 7), (1, 2))
        finally:
            subprocess.run(["umount", small], check=True)
    yield account

    account = Account("a disk that fills up: evaluation, results")
    evaluate = ["segma.eval", "digits", "--threads", 1, "--device", "cpu", "--runs", whole]
    assert finish(place, *evaluate, prepare=quick_judge).code == 0
    record = whole / where / "eval.json"
    good = json.loads(record.read_text())
    good["provenance"]["evaluation"] = None  # when and where it was made
    with house(place / "house") as root:
        collect = ["common.diff", "collect", "--runs", place / "none"]
        assert finish(place, *collect).code == 0
        before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for _ in range(n):
            account.tried += 2
            most = rng.choice([rng.randrange(5_000), rng.randrange(200_000)])
            shutil.rmtree(whole / "cache", ignore_errors=True)
            child = finish(place, *evaluate, prepare=lambda most=most: (quick_judge(), no_file_beyond(most)))
            account.check(child.code == 0 or one_line(child, 1), f"eval: code {child.code}: {child.err[-300:]}")
            account.refused += child.code != 0
            found = json.loads(record.read_text())
            found["provenance"]["evaluation"] = None
            account.check(found.keys() == good.keys() and found["metrics"].keys() == good["metrics"].keys(), "eval.json is not whole")
            for picture in (whole / where / "figures").glob("*.png"):
                outcome(account, picture.name, lambda picture=picture: Image.open(picture).load())
            child = finish(place, *collect, prepare=lambda most=most: no_file_beyond(most))
            account.check(child.code == 0 or one_line(child, 1), f"collect: code {child.code}: {child.err[-300:]}")
            account.refused += child.code != 0
            for path, content in before.items():
                account.check(path.read_bytes() == content, f"collect: {path.name} was changed")  # nothing new was to be written
            account.check(not list(root.rglob("*.part")), "collect: a part of a file was left")
    yield account

    account = Account("folders of another person")
    os.chmod(place, 0o755)
    for i, victim in enumerate((where, where / "checkpoint.pt", Path("segma/digits"), Path("cache"))):
        for what in ("segma.train", "segma.eval"):
            account.tried += 1
            runs = place / f"foreign-{i}-{what}"
            shutil.copytree(first, runs)
            (runs / "cache").mkdir()
            for path in (runs, *runs.rglob("*")):
                os.chmod(path, 0o777)
            before = {p: p.read_bytes() for p in runs.rglob("*.*") if p.is_file()}
            os.chmod(runs / victim, 0o000 if (runs / victim).is_file() else 0o555)
            flags = ["--epochs", 3, "--hidden-dim", 32] if what == "segma.train" else []
            child = finish(place, what, "digits", "--threads", 1, "--device", "cpu", *flags, "--runs", runs, prepare=nobody)
            account.check(child.code == 0 or one_line(child, 1, 2), f"{victim}, {what}: code {child.code}: {child.err[-300:]}")
            account.refused += child.code != 0
            os.chmod(runs / victim, 0o777)
            for path, content in before.items() if child.code else ():
                account.check(path.exists() and path.read_bytes() == content, f"{victim}, {what}: {path.name} was changed")
    yield account


def no_file_beyond(size: int) -> None:
    """No file of this process may grow beyond so many bytes, as on a disk that fills up: but its own output may."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(size, 4096), max(size, 4096)))


def nobody() -> None:
    """Give up the rights that would open every door."""
    quick_judge()
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


def quick_judge() -> None:
    """A classifier of few steps: who judges is of no matter here."""
    classifier.LEAST_STEPS = classifier.MOST_STEPS = 3


# ------------------------------------------------------------------------------------------------------- 4. two at once


def two(place: Path, rng: random.Random, n: int) -> Iterator[Account]:
    """Two processes on one run, one cache, one first decoding; four makes at once."""
    account = Account("two on one run")
    train = ["segma.train", "digits", "--hidden-dim", 32, "--threads", 1, "--device", "cpu", "--epochs", 12]
    where = Path("segma/digits/seed0/checkpoint.pt")
    assert finish(place, *train, "--runs", place / "alone").code == 0
    for i in range(n):
        account.tried += 1
        runs = place / f"two-{i}"
        pair = [start(place, *train, "--runs", runs, "--save-every", 0)]
        time.sleep(rng.uniform(0, 0.3))
        pair.append(start(place, *train, "--runs", runs, "--save-every", 0))
        codes = sorted(child.wait() for child in pair)
        refused = [child for child in pair if child.code]
        account.refused += len(refused)
        account.check(codes in ([0, 2], [0, 0]), f"codes {codes}: {' '.join(c.err[-200:] for c in pair)}")
        account.check(all(one_line(c, 2) and "another process is training this run" in c.err for c in refused), "refused otherwise")
        assert_same(*(run.load_checkpoint(r / where) for r in (runs, place / "alone")))
    yield account

    account = Account("two on one cache of a classifier")
    digits = data.load("digits", place)
    for i in range(n):
        account.tried += 1
        cache = place / f"cache-{i}"

        def judge(cache=cache) -> None:
            quick_judge()
            print(classifier.digest(classifier.trained(digits, cache, "cpu")[0]))

        pair = [fork(place, judge) for _ in range(2)]
        for child in pair:
            child.wait()
        account.check([c.code for c in pair] == [0, 0], f"codes {[c.code for c in pair]}: {pair[0].err[-200:]} {pair[1].err[-200:]}")
        account.check(sum("training the classifier" in c.out for c in pair) == 1, "not trained exactly once")
        account.check(pair[0].out.split()[-1:] == pair[1].out.split()[-1:], "two different networks")
    yield account

    account = Account("two on one first decoding")
    root = place / "celeba-root"
    formats.write_celeba(root / "celeba")
    for _ in range(n):
        account.tried += 1

        def decode() -> None:
            print(data.load("celeba", root, unofficial=True).digest)

        for cached in root.rglob("pixels-*"):
            cached.unlink()
        pair = [fork(place, decode) for _ in range(2)]
        for child in pair:
            child.wait()
        account.check([c.code for c in pair] == [0, 0], f"codes {[c.code for c in pair]}: {pair[0].err[-200:]}")
        account.check(sum("celeba: decoding" in c.out for c in pair) == 1, "not decoded exactly once")
        account.check(pair[0].out.split()[-1:] == pair[1].out.split()[-1:] != [], "read two things")
    yield account

    account = Account("make -j4, four experiments at once", tried=4)
    targets = ["segma-digits", "gmgan-toy", "amm-digits", "gan_responsibility-digits"]
    small = ["FLAGS=--save-every 0", "EPOCHS=1", "THREADS=1", "DEVICE=cpu", f"RUNS={place / 'make'}", f"PYTHON={sys.executable}"]
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "DATA")}
    if n > 2:
        done = subprocess.run(["make", "-j4", *targets, *small], cwd=ROOT, capture_output=True, text=True, env=environment)
        account.check(done.returncode == 0, f"code {done.returncode}: {done.stderr[-500:]}")
        for target in targets:
            paper, experiment = target.split("-")
            outcome(account, target, lambda p=paper, e=experiment: diff.read_records(place / f"make/{p}/{e}/seed0/eval.json"))
        yield account


# ------------------------------------------------------------------------------------------------ 5. numbers that blow up


def numbers(place: Path, rng: random.Random, n: int) -> Iterator[Account]:
    """NaN or infinity in a batch, a weight or a gradient at a random step: that step is named, nothing of it is kept."""
    for which, name in enumerate(TRAINERS):
        account = Account(f"not finite: {name}")
        paper, experiment, arguments = small_run(place, name)
        arguments = [experiment, *arguments, "--save-every", 0]
        for i in range(n):
            account.tried += 1
            runs, step, kind = place / f"numbers-{name}-{i}", rng.randrange(2, 7), ("batch", "weight", "gradient")[(which + i) % 3]
            value = rng.choice([float("nan"), float("inf"), -float("inf")])
            child = finish(place, f"{paper}.train", *arguments, "--runs", runs, prepare=inject(paper, kind, step, value, rng.random()))
            label = f"{value} in a {kind} at step {step}"
            named = f"not finite, first at step {step} " in child.err
            account.check(one_line(child, 1) and named, f"{label}: code {child.code}: {child.err[-300:]}")
            account.refused += child.code == 1
            state = run.load_checkpoint(runs / paper / experiment / "seed0/checkpoint.pt")
            account.check(state is not None and state["total_steps"] == step - 1, f"{label}: the last good checkpoint is not there")
            tensors = [t for parts in state["networks"].values() for t in parts.values()] if state else []
            account.check(all(t.isfinite().all() for t in tensors if t.is_floating_point()), f"{label}: it was saved")
        yield account


def inject(paper: str, kind: str, step: int, value: float, where: float) -> Callable[[], None]:
    """A `prepare` that makes one number of a trainer not finite at that step, counted from 1."""

    def prepare() -> None:
        taken = 0
        for path in sorted((ROOT / paper).glob("*.py")):
            module = importlib.import_module(f"{paper}.{path.stem}")
            real = getattr(module, "train_step", None)
            if real is None or real.__module__ != module.__name__:
                continue

            def train_step(networks, optimizers, batch, *rest, real=real, **kwargs):
                nonlocal taken
                taken += 1
                if taken != step:
                    return real(networks, optimizers, batch, *rest, **kwargs)
                of = optimizers.values() if isinstance(optimizers, dict) else [optimizers]
                moved = [p for optimizer in of for group in optimizer.param_groups for p in group["params"]]
                parameter = moved[int(where * len(moved))]
                if kind == "weight":
                    parameter.data[(0,) * parameter.dim()] = value
                    return real(networks, optimizers, batch, *rest, **kwargs)
                if kind == "batch":
                    images = next(k for k, v in batch._asdict().items() if isinstance(v, torch.Tensor) and v.is_floating_point())
                    changed = getattr(batch, images).clone()
                    changed.view(-1)[int(where * changed.numel())] = value
                    return real(networks, optimizers, batch._replace(**{images: changed}), *rest, **kwargs)
                spoilt = []  # the first gradient that is taken: not every parameter is moved in every phase

                def spoil(gradient):
                    spoilt.append(True)
                    return torch.full_like(gradient, value) if len(spoilt) == 1 else gradient

                hooks = [p.register_hook(spoil) for p in moved]
                found = real(networks, optimizers, batch, *rest, **kwargs)
                for hook in hooks:
                    hook.remove()
                return found

            module.train_step = train_step

    return prepare


# ---------------------------------------------------------------------------------------------------------- 6. fuzzing


def fuzz(place: Path, rng: random.Random, n: int) -> Iterator[Account]:
    """Random YAML documents and command lines: a valid config or one clear line."""
    account = Account("random YAML documents")
    with house(place / "fuzzed") as root:
        texts = [p.read_bytes() for p in sorted((root / "segma/configs").glob("*.yaml"))]
        path = root / "segma/configs/mine.yaml"
        for _ in range(n):
            content = rng.choice(texts)
            for _ in range(rng.randrange(1, 4)):
                content = shuffled(content or b"a: 1\n", rng)[1]
            if rng.random() < 0.2:
                content = document(rng, 3).encode(errors="replace")
            path.write_bytes(content)
            found = outcome(account, repr(content[:300]), lambda: run.experiment_config("segma", "mine"))
            if found is not None:
                account.note("valid")
                account.check(all(fits(found, f.name) for f in dataclasses.fields(found)), f"{content!r}: a value out of its range")
    account.check(not OWNED.exists(), "a YAML file ran a program")
    yield account

    account = Account("random command lines")
    for _ in range(n):
        paper = rng.choice(diff.papers())
        arguments = command_line(rng, paper)
        found = outcome(account, f"{paper}.train {arguments}", lambda p=paper, a=arguments: parsed(p, a))
        if found is not None:
            account.note("valid")
    yield account


def fits(config: object, name: str) -> bool:
    """Whether a field of a config is of the type and in the range that the config's class states."""
    value, hints = getattr(config, name), typing.get_type_hints(type(config), include_extras=True)
    return run.check_value(name, value, hints[name]) is value


def document(rng: random.Random, depth: int) -> str:
    """Something that may be YAML."""
    if depth == 0 or rng.random() < 0.3:
        return rng.choice([*VALUES, "".join(chr(rng.randrange(1, 300)) for _ in range(rng.randrange(20)))])
    inner = [document(rng, depth - 1) for _ in range(rng.randrange(4))]
    pairs = [f"k{i}: {x}" for i, x in enumerate(inner)]
    return rng.choice(["[" + ", ".join(inner) + "]", "{" + ", ".join(pairs) + "}", "\n".join(pairs)])


def command_line(rng: random.Random, paper: str) -> list[str]:
    """An experiment, or nearly, and some flags, or nearly."""
    experiment = rng.choice(run.experiments(paper))
    names = [*typing.get_type_hints(run.config_class(paper, experiment)), "seed", "threads", "device", "precision", "save-every", "runs"]
    words = [experiment if rng.random() < 0.9 else rng.choice(["", "-", "mnits", "--", "../digits", "digits.yaml", "\0", "é" * 50])]
    for _ in range(rng.randrange(4)):
        name = rng.choice(names).replace("_", "-")
        if rng.random() < 0.1:
            name = name[:-1] + rng.choice("xyz")
        others = ["none", "random", "1", "2", "0.5", "1e-300", "-1", "digits", "folder:/nonexistent", "bf16", "cpu", "cuda:7", "--epochs"]
        value = rng.choice([*VALUES, *others])
        words += rng.choice([[f"--{name}", value], [f"--{name}={value}"], [f"--{name}"], [value]])
    rng.shuffle(words) if rng.random() < 0.2 else None
    return words


def parsed(paper: str, arguments: list[str]) -> object:
    """The config of a command line; its exit is a refusal where it says why in one line."""
    try:
        return run.parse(paper, arguments)
    except SystemExit as stop:
        if stop.code == 0:
            return None  # --help
        raise


# ---------------------------------------------------------------------------------------------- 7. results that cannot lie


def results(place: Path, rng: random.Random, n: int) -> Iterator[Account]:
    """Records whose config, data or epochs are not the experiment's, in any of many ways: none is counted as the experiment's."""
    account = Account("records that say they are what they are not")
    good = json.loads((ROOT / "segma/results/digits.json").read_text())[0]
    config = run.experiment_config("segma", "digits")
    account.check(diff.not_comparable(good, config) is None, "a true record is refused")
    folder = place / "lies/segma/digits/seed0"
    folder.mkdir(parents=True)
    for _ in range(n):
        record = json.loads(json.dumps(good))
        place_of, how = rng.choice(LIES)
        how(record, rng)
        (folder / "eval.json").write_text(json.dumps(record))

        def counted(record=record) -> object:
            found = diff.yours("segma", place / "lies")["digits"]
            return diff.sample(found, config, "test_error").values or None

        found = outcome(account, place_of, counted)
        account.check(found is None, f"{place_of}: counted")
        account.note("marked") if found is None else None
    yield account

    account = Account("runs from a tree with changes", tried=1)
    record = json.loads(json.dumps(good))
    record["provenance"]["git_dirty"] = True
    account.check(diff.unclean(record) is not None, "a dirty tree is not said")
    yield account


def set_config(record: dict, rng: random.Random) -> None:
    key = rng.choice([k for k in record["config"] if k != "epochs"])
    record["config"][key] = "other" if isinstance(record["config"][key], str) else 77


def set_provenance(key: str, *values: object) -> Callable[[dict, random.Random], None]:
    def how(record: dict, rng: random.Random) -> None:
        record["provenance"][key] = rng.choice(values)

    return how


def drop(record: dict, rng: random.Random) -> None:
    inside = rng.choice([record, record["provenance"]])
    needed = diff.RECORD.keys() if inside is record else diff.PROVENANCE
    del inside[rng.choice(sorted(needed))]


LIES = [
    ("another config under the old hash", set_config),
    ("another hash", lambda record, rng: record.update(config_hash=f"{rng.getrandbits(48):012x}")),
    ("fewer epochs", set_provenance("epochs", 0, 1, 149, 151, -1)),
    ("steps beyond", set_provenance("steps_beyond", 1, 13)),
    ("another digest", set_provenance("data_digest", "0" * 16, "", None)),
    ("other counts", set_provenance("train_images", 0, 1436, 60_000)),
    ("other counts of the test set", set_provenance("test_images", 0, 10, 361)),
    ("unofficial data", set_provenance("data_official", False)),
    ("other data", set_provenance("data", "mnist", "svhn", "toy")),
    ("a number that is none", lambda r, rng: r["metrics"].update(test_error=rng.choice([float("nan"), float("inf"), "9", None, [1]]))),
    ("a part is missing", drop),
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- main

PARTS = {
    "kills": lambda place, rng, small: kills(
        place, rng, {"SeGMA": 2, "others": 1, "signals": 0} if small else {"SeGMA": 25, "others": 5, "signals": 1}
    ),
    "files": lambda place, rng, small: files(place, rng, 6 if small else 120),
    "disk": lambda place, rng, small: disk(place, rng, 1 if small else 20),
    "two": lambda place, rng, small: two(place, rng, 1 if small else 8),
    "numbers": lambda place, rng, small: numbers(place, rng, 1 if small else 9),
    "fuzz": lambda place, rng, small: fuzz(place, rng, 150 if small else 3000),
    "results": lambda place, rng, small: results(place, rng, 60 if small else 600),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description="Faults by the thousand, and what they cost.")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[], help="which; all of them where none is named")
    parser.add_argument("--seed", type=int, default=0, help="everything is drawn from it")
    parser.add_argument("--small", action="store_true", help="the slice that `make test` runs")
    options = parser.parse_args()
    torch.set_num_threads(1)  # no pool of threads, which a fork would believe in and wait for
    # Imported once for every fork; as nobody, Python's own files may lie behind a closed door.
    data.load("digits", ".")
    importlib.import_module("matplotlib.pyplot").figure()
    accounts = []
    begun = time.monotonic()
    for name in options.parts or PARTS:
        with tempfile.TemporaryDirectory(prefix="torture-") as place:
            for account in PARTS[name](Path(place), random.Random(f"{options.seed} {name}"), options.small):
                print(account, flush=True)
                for failure in account.failures[:10]:
                    print(f"    {failure}", flush=True)
                accounts.append(account)
    failures = sum(len(account.failures) for account in accounts)
    print(
        f"seed {options.seed}: {sum(a.tried for a in accounts):,} tried, {sum(a.refused for a in accounts):,} refused in one line, "
        f"{failures} failures, {time.monotonic() - begun:.0f} s"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
