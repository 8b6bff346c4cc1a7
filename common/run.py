"""A run on disk: config, command line, seeds, lock, exact resume, checked checkpoints, log, provenance.

runs/<paper>/<experiment>/seed<k>/ holds config.yaml, log.csv (one row per epoch), samples/, checkpoint.pt and, after evaluation,
eval.json and figures/. The checkpoint is the one truth about how far a run has come; the log is written anew from it.
"""

import argparse
import csv
import dataclasses
import datetime
import difflib
import errno
import fcntl
import hashlib
import importlib
import io
import json
import os
import pickle
import platform
import re
import resource
import signal
import subprocess
import sys
import time
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
LOG_EVERY = 1.0  # seconds between two writings of log.csv, which takes as long as a short epoch on a GPU
SAMPLE_EPOCHS = {1, 2, 5, 10, 20, 50, 100, 200, 300, 400, 500, 1000}  # a grid of samples after these, and after the last


class UserError(Exception):
    """A mistake in usage, configuration or data: one line, exit code 2. A word of it that would fill the screen is cut."""

    def __init__(self, message: str):
        super().__init__(re.sub(r"(\S{80})\S{220,}", r"\1…", message))


class RunFailed(Exception):
    """A run that went wrong while it ran: one line, exit code 1."""


class Stopped(Exception):
    """Ctrl-C or SIGTERM, after the checkpoint was saved. code: 130 or 143."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


def exit_with(main: Callable[[], None]) -> typing.NoReturn:
    """Call `main` and leave with the exit code and the one line that its outcome deserves."""
    try:
        main()
        code, line = 0, None
    except UserError as error:
        code, line = 2, f"error: {error}"
    except RunFailed as error:
        code, line = 1, f"failed: {error}"
    except Stopped as stop:
        code, line = stop.code, str(stop)
    except KeyboardInterrupt:
        code, line = 130, "interrupted"
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code, line = 141, None
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        code, line = 1, f"failed: not enough memory ({' '.join(str(error).split())[:100]}); what was saved before is intact"
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EPERM, errno.EIO):
            raise
        code, line = 1, f"failed: {error.filename or 'a file'}: {error.strerror}; what was saved before is intact"
    if line:
        print(line, file=sys.stderr)
    sys.exit(code)


# ---------------------------------------------------------------------------------------------------------- randomness


def generator(seed: int, *stream: object, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator of its own for one purpose, e.g. generator(seed, "order", epoch): nothing to save, nothing to replay."""
    digest = hashlib.sha256(repr((seed, *stream)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


# ------------------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class Range:
    """What a number in a config may be; stands in the type, as in Annotated[int, Range(1)]."""

    low: float
    open_low: bool = False
    below: float = float("inf")

    def __contains__(self, value: float) -> bool:
        return (value > self.low if self.open_low else value >= self.low) and value < self.below

    def __str__(self) -> str:
        return f"{'>' if self.open_low else '>='} {self.low:g}" + (f" and below {self.below:g}" if self.below < float("inf") else "")


Count = typing.Annotated[int, Range(1)]
Positive = typing.Annotated[float, Range(0, open_low=True)]
NonNegative = typing.Annotated[float, Range(0)]
Decay = typing.Annotated[float, Range(0, below=1)]


def plain_type(annotation: object) -> tuple[object, Range | None, bool]:
    """An annotation taken apart: int, float, bool, str or a Literal; the range; whether None is allowed."""
    optional = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    if optional:
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    if typing.get_origin(annotation) is typing.Annotated:
        return *typing.get_args(annotation), optional
    return annotation, None, optional


def check_value(name: str, value: object, annotation: object) -> object:
    """`value`, if it is what the field's annotation asks for. Raises UserError naming what is allowed."""
    wanted, allowed, optional = plain_type(annotation)
    if value is None and optional:
        return None
    if typing.get_origin(wanted) is typing.Literal:
        if isinstance(value, str) and value in typing.get_args(wanted):
            return value
        raise UserError(f"{name}: {value!r} is not one of {', '.join(typing.get_args(wanted))}")
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted:
        hint = " (write 3.0e-4, not 3e-4: YAML reads the latter as text)" if wanted is float and isinstance(value, str) else ""
        raise UserError(f"{name}: expected {wanted.__name__}, found {value!r}{hint}")
    if isinstance(value, float) and not abs(value) < float("inf"):
        raise UserError(f"{name}: {value} is not a finite number")
    if allowed is not None and value not in allowed:
        raise UserError(f"{name}: {value!r} is out of range; allowed: {allowed}")
    return value


def parse_flag(name: str, text: str, annotation: object) -> object:
    """The text of a flag as the value its field wants."""
    flag = f"--{name.replace('_', '-')}"
    wanted, _, optional = plain_type(annotation)
    if optional and text.lower() in ("none", "null"):
        return None
    value: object = text
    try:
        if wanted is bool:
            value = {"true": True, "false": False}[text.lower()]
        elif wanted in (int, float):
            value = wanted(text)
    except (KeyError, ValueError):
        raise UserError(f"{flag}: expected {'true or false' if wanted is bool else wanted.__name__}, found {text!r}") from None
    return check_value(flag, value, annotation)


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """'; did you mean …?' for the closest of `known`, or the list of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"


def make_config(cls: type, values: dict, where: str) -> typing.Any:
    """The frozen dataclass `cls` from a flat mapping, every key and value checked. where: the file, for the message."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for key in values:
        if key not in hints:
            raise UserError(f"{where}: unknown key {key!r}{nearest(str(key), hints)}")
    try:
        return cls(**{key: check_value(key, value, hints[key]) for key, value in values.items()})
    except (UserError, ValueError) as error:  # a ValueError is the Config's own, on fields that do not fit together
        raise UserError(f"{where}: {error}") from None


def read_yaml(path: Path) -> dict:
    """A flat YAML mapping, loaded safely. Raises UserError where it is missing, malformed or not a mapping."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())[:150]})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, found {type(values).__name__}")
    return values


def experiments(paper: str) -> list[str]:
    """The names of a paper's experiments: its configs/*.yaml."""
    return sorted(path.stem for path in (ROOT / paper / "configs").glob("*.yaml"))


def check_experiment(paper: str, experiment: str) -> None:
    """Raise UserError, naming the nearest and all, where the paper has no such experiment."""
    known = experiments(paper)
    if experiment not in known:
        close = difflib.get_close_matches(experiment, known, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"unknown experiment {experiment!r}; {hint}the experiments are {', '.join(known)}")


def module_of(paper: str, values: dict) -> types.ModuleType:
    """The module that defines a config's Config, networks and training step: the file that its key `module` names, or train.py."""
    name = values.get("module", "train")
    if not (isinstance(name, str) and name.isidentifier() and (ROOT / paper / f"{name}.py").exists()):
        raise UserError(f"module: {paper} has no file {name!r}.py")
    return importlib.import_module(f"{paper}.{name}")


def config_class(paper: str, experiment: str) -> type:
    """The Config of an experiment."""
    return module_of(paper, read_yaml(ROOT / paper / "configs" / f"{experiment}.yaml")).Config


def experiment_config(paper: str, experiment: str, overrides: dict | None = None) -> typing.Any:
    """The config of an experiment, with overrides from the command line."""
    check_experiment(paper, experiment)
    path = ROOT / paper / "configs" / f"{experiment}.yaml"
    cls = config_class(paper, experiment)
    config = make_config(cls, read_yaml(path), str(path.relative_to(ROOT)))
    return make_config(cls, {**dataclasses.asdict(config), **(overrides or {})}, "command line")


def config_hash(config: typing.Any) -> str:
    """12 hex digits over the fields that differ from their defaults, so that a new switch does not disown old runs.

    The number of epochs is left out: it may grow, and a result states it by itself. So are the fields of `without_influence`.
    """
    differing = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in without_influence(config) and getattr(config, field.name) != field.default
    }
    return hashlib.sha256(json.dumps(differing, sort_keys=True).encode()).hexdigest()[:12]


def without_influence(config: typing.Any) -> set[str]:
    """The fields in which two runs of one experiment may differ: epochs, and what the config's class names in NO_INFLUENCE."""
    return {"epochs", *getattr(config, "NO_INFLUENCE", ())}


# -------------------------------------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class Options:
    """Where and how a run is made: provenance, not configuration."""

    experiment: str
    seed: int = 0
    data: Path = Path("data")
    runs: Path = Path("runs")
    device: str = "auto"
    threads: int = 0
    unofficial_data: bool = False
    inception: Path | None = None
    precision: str = "fp32"
    save_every: float = 60.0
    deterministic: bool = False
    graph: bool = False
    describe: bool = False
    json: bool = False

    def __post_init__(self):
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed: {self.seed} is out of range; allowed: 0 … 2^63 - 1")
        if self.threads < 0:
            raise UserError(f"--threads: {self.threads} is out of range; allowed: >= 0")
        if not 0 <= self.save_every < float("inf"):
            raise UserError(f"--save-every: {self.save_every} is out of range; allowed: >= 0")
        if self.json and not self.describe:
            raise UserError("--json: goes with --describe")

    def folder(self, paper: str) -> Path:
        return self.runs / paper / self.experiment / f"seed{self.seed}"


class Parser(argparse.ArgumentParser):
    """argparse that answers a mistake with one line and the nearest valid name."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message} (see --help)")

    def parse_all(self, argv: list[str] | None) -> argparse.Namespace:
        argv = sys.argv[1:] if argv is None else argv
        # --grad_clip_norm is --grad-clip-norm: both the YAML key and the usual spelling are right.
        argv = [a.replace("_", "-", a.partition("=")[0].count("_")) if a.startswith("--") else a for a in argv]
        namespace, unknown = self.parse_known_args(argv)
        if unknown:
            flags = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
            hint = nearest(unknown[0].split("=")[0], flags) if unknown[0].startswith("-") else ""
            raise UserError(f"unknown argument {unknown[0]!r}{hint}")
        return namespace


def parse(paper: str, argv: list[str] | None = None) -> tuple[typing.Any, Options]:
    """The command line of `python -m <paper>.train`: config and options. Every field of the experiment's config is a flag."""
    parser = Parser(prog=f"python -m {paper}.train")
    add_options(parser, paper)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast, on CPU and GPU")
    parser.add_argument("--save-every", type=float, default=60.0, help="seconds between checkpoints")
    parser.add_argument("--deterministic", action="store_true", help="bit-identical repeats on a GPU too, slower")
    parser.add_argument("--graph", action="store_true", help="on a GPU, record a training step once and replay it")
    parser.add_argument("--describe", action="store_true", help="print what would be trained, and stop")
    parser.add_argument("--json", action="store_true", help="with --describe: for programs")
    fields = parser.add_argument_group("fields of the config; default: the experiment's")
    # Which config it is stands in the experiment's file: so first the flags of all of them, then those of the one that is asked for.
    hints = {name: typing.get_type_hints(config_class(paper, name), include_extras=True) for name in experiments(paper)}
    for name in dict.fromkeys(name for fields_of_one in hints.values() for name in fields_of_one):
        fields.add_argument(f"--{name.replace('_', '-')}", dest=f"field_{name}", default=argparse.SUPPRESS, metavar="VALUE")
    namespace = parser.parse_all(argv)
    check_experiment(paper, namespace.experiment)
    known = hints[namespace.experiment]
    overrides = {}
    for key in [key for key in vars(namespace) if key.startswith("field_")]:
        name, text = key.removeprefix("field_"), vars(namespace).pop(key)
        if name not in known:
            raise UserError(f"--{name.replace('_', '-')}: {namespace.experiment} has no such value{nearest(name, known)}")
        overrides[name] = parse_flag(name, text, known[name])
    return experiment_config(paper, namespace.experiment, overrides), Options(**vars(namespace))


def add_options(parser: argparse.ArgumentParser, paper: str) -> None:
    """What train and eval both take."""
    parser.add_argument("experiment", help=f"one of: {', '.join(experiments(paper))}")
    parser.add_argument("--seed", type=int, default=0, help="fixes everything that is random")
    parser.add_argument("--data", type=as_path, default=Path("data"), help="folder that holds MNIST/, FashionMNIST/ …")
    parser.add_argument("--runs", type=as_path, default=Path("runs"), help="folder under which runs are kept")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores")
    parser.add_argument("--inception", type=as_path, help="the Inception weights, where scores need them; default: torch's hub folder")
    parser.add_argument("--unofficial-data", action="store_true", help="read data whose digest is not the official one")


def as_path(text: str) -> Path:
    """A path from the command line; ~ is the home folder also where the shell leaves it alone, as in make DATA=~/data."""
    return Path(text).expanduser()


# --------------------------------------------------------------------------------------------------- machine, provenance


def set_up(options: Options) -> torch.device:
    """Threads, device and the published arithmetic (fp32, TF32 off). Raises UserError where the device is not there."""
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        device = torch.device(options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError:
        raise UserError(f"--device: {options.device!r} is not one of auto, cpu, cuda, cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device: {options.device!r} is not one of auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise UserError(f"--device: {options.device} asked for, but this machine has {found} CUDA devices. Use --device cpu")
    if options.graph and device.type != "cuda":
        raise UserError(f"--graph: it replays CUDA graphs, and the device is {device.type}. Leave it out")
    if device.type == "cuda" and device.index:
        torch.cuda.set_device(device)  # streams and recordings are the current device's
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return device


def git_state() -> tuple[str | None, bool | None]:
    """The commit of this repository and whether tracked or new files differ from it; (None, None) outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return None, None
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def session(device: torch.device) -> dict:
    """Which code runs from now on, on what. A run that was resumed has several."""
    commit, dirty = git_state()
    return {
        "git_commit": commit,
        "git_dirty": dirty,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


# ------------------------------------------------------------------------------------------------------- files, safely


@contextmanager
def atomic(path: Path, mode: str = "w", keep_previous: bool = False) -> Iterator[typing.IO]:
    """Write a file whole or not at all: a temporary file in the same folder, fsynced, then renamed.

    keep_previous: the file that stood there becomes <name>.previous.<suffix>, once the new one is safe on disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": ""})) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep_previous and path.exists():
            os.replace(path, previous(path))
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise
    fsync_folder(path.parent)


@contextmanager
def locked(path: Path, waiting: str) -> Iterator[None]:
    """One process at a time: of two that hold the same lock file the second says `waiting`, and waits. Its folder must be there."""
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(waiting, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def fsync_folder(folder: Path) -> None:
    """A rename survives a power cut only once its folder has been synced."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: object) -> None:
    with atomic(path) as file:
        json.dump(value, file, indent=1, ensure_ascii=False, allow_nan=False)
        file.write("\n")


def save_checkpoint(path: Path, state: dict) -> None:
    """`torch.save`, whole or not at all, with a checksum; the file it replaces becomes <name>.previous.pt."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    # The SHA-256 stands in the zip file's own comment field, so that plain torch.load still opens the file.
    payload = buffer.getvalue()[:-2] + (64).to_bytes(2, "little")
    with atomic(path, "wb", keep_previous=True) as file:
        file.write(payload)
        file.write(hashlib.sha256(payload).hexdigest().encode())


def previous(path: Path) -> Path:
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def load_checkpoint(path: Path) -> dict | None:
    """The state in `path`, on the CPU, or in the one before it where it is damaged (said aloud); None where there is neither.

    A damaged file is set aside as <name>.damaged.pt. Raises UserError where a file cannot be read, or none is whole.
    Loads tensors and plain values only: no code is run.
    """
    damaged = []
    for candidate in (path, previous(path)):
        try:
            content = candidate.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"{candidate}: cannot be read ({error.strerror})") from None
        try:
            if hashlib.sha256(content[:-64]).hexdigest().encode() != content[-64:]:
                raise pickle.UnpicklingError(f"{len(content):,} bytes whose checksum does not match")
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            damaged.append(f"{candidate}: damaged ({str(error).splitlines()[0][:100]})")
            continue
        if damaged:
            aside = path.with_name(f"{path.stem}.damaged{path.suffix}")  # else the next save would make it the previous one
            os.replace(path, aside)
            print(f"{damaged[0]}, set aside as {aside.name}; going on from the one before it, {candidate.name}", file=sys.stderr)
        return state
    if damaged:
        raise UserError(f"{'; '.join(damaged)}. Nothing to resume from: delete the folder {path.parent} to train anew")
    return None


# --------------------------------------------------------------------------------------------------------------- a run


class Run:
    """One run on disk, open for training: its position, its log, its checkpoints.

    with Run(…) as r:
        r.resume(networks, optimizers, steps_per_epoch)
        while r.epoch < config.epochs:
            while r.step < steps_per_epoch:
                r.after_step(train_step(…))
            r.after_epoch()
        r.finish()
    """

    def __init__(self, paper: str, config: typing.Any, options: Options, data: dict, device: torch.device):
        self.folder, self.config, self.options, self.device = options.folder(paper), config, options, device
        self.identity = {"paper": paper, "experiment": options.experiment, "seed": options.seed, "precision": options.precision, **data}
        self.epoch = self.step = self.total_steps = 0
        self.rows: list[dict] = []
        self.sessions: list[dict] = []
        self.names: list[str] = []  # of the losses
        self.sums: Tensor | None = None  # of the losses since the epoch began, on the device
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)  # the first step that was not finite
        self.bad: Tensor | None = None  # and which of its values
        self.seconds = 0.0  # of training, all sessions together
        self.signal = 0

    def __enter__(self) -> "Run":
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / ".lock", "w")
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written ({error.strerror}). Name another place with --runs") from None
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock.close()
            raise UserError(f"{self.folder}: another process is training this run; wait, or choose another --seed or --runs") from None
        for name in ("checkpoint", "log", "config"):  # of a process that was killed while it wrote
            for part in self.folder.glob(f".{name}*.part"):
                part.unlink()
        self.handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self.handlers.items():
            signal.signal(s, handler)
        if hasattr(self, "bar"):
            self.bar.close()
        self.lock.close()

    def _on_signal(self, number: int, _: object) -> None:
        self.signal = number

    @property
    def path(self) -> Path:
        return self.folder / "checkpoint.pt"

    def resume(self, networks: dict[str, torch.nn.Module], optimizers: dict[str, torch.optim.Optimizer], steps: int) -> None:
        """Take up the run where its checkpoint left it, if there is one, and say so. steps: in an epoch, for the progress bar.

        Raises UserError where the folder holds a run of another config, seed, precision or data.
        """
        self.networks, self.optimizers = networks, optimizers
        state = load_checkpoint(self.path)
        if state is not None:
            self._refuse_other(state)
            for name, module in networks.items():
                module.load_state_dict(state["networks"][name])
            for name, optimizer in optimizers.items():
                optimizer.load_state_dict(state["optimizers"][name])
            self.epoch, self.step, self.total_steps = state["epoch"], state["step"], state["total_steps"]
            self.rows, self.seconds, self.sessions = state["rows"], state["seconds"], state["sessions"]
            self.sums = None if state["sums"] is None else state["sums"].to(self.device)
            # The first reference runs' checkpoints are older than the key "names".
            self.names = state["names"] if "names" in state else list(self.rows[-1])[1:6]
            if self.epoch >= self.config.epochs:
                print(f"{self.folder}: complete, {self.epoch} epochs done")
            else:
                print(f"{self.folder}: resuming at epoch {self.epoch + 1} of {self.config.epochs}, step {self.step}", flush=True)
        self.sessions.append(session(self.device))
        self.started = self.saved_at = time.monotonic()
        self.saved_position = (self.epoch, self.step) if state else None
        self.seconds_before = self.seconds
        self.epoch_started = self.started - (state["epoch_seconds"] if state else 0.0)
        with atomic(self.folder / "config.yaml") as file:
            file.write(f"# {self.identity['paper']} {self.options.experiment}, seed {self.options.seed}: as resolved\n")
            yaml.safe_dump(dataclasses.asdict(self.config), file, sort_keys=False)
        self._write_log()
        if self.epoch < self.config.epochs:
            print(f"{self.folder}: {steps} steps an epoch on {self.sessions[-1]['device']}, {self.options.precision}", flush=True)
        # On a terminal one bar with the time left; elsewhere one line per epoch.
        quiet = not sys.stderr.isatty()
        self.bar = tqdm(total=self.config.epochs * steps, initial=self.total_steps, unit="step", disable=quiet, mininterval=0.5)

    def _refuse_other(self, state: dict) -> None:
        ours = {**self.identity, **dataclasses.asdict(self.config)}
        # A field added to Config since has the default that leaves old runs as they were.
        defaults = {f.name: f.default for f in dataclasses.fields(self.config)}
        theirs = {**defaults, **state["identity"], **state["config"]}
        free = without_influence(self.config)
        differing = [f"{k}: {theirs.get(k)!r} there, {v!r} asked for" for k, v in ours.items() if k not in free and theirs.get(k) != v]
        if differing:
            raise UserError(f"{self.folder} holds a run made otherwise ({'; '.join(differing)}). Ask for the same, or use another --runs")
        if state["epoch"] + (state["step"] > 0) > self.config.epochs:
            done = f"{state['epoch']} epochs{' and a part' if state['step'] else ''} are done already"
            raise UserError(f"{self.folder}: {done}, {self.config.epochs} asked for; epochs can only grow. Use another --runs")

    def after_step(self, losses: dict[str, Tensor]) -> None:
        """Count a step: add up its losses (scalars, on the device), save if it is time, stop if asked to."""
        self.names = list(losses)
        values = torch.stack([value.detach().float() for value in losses.values()])
        self.sums = values if self.sums is None else self.sums + values
        self.step += 1
        self.total_steps += 1
        self.bar.update()
        bad = ~torch.isfinite(values)
        first = bad.any() & (self.first_bad < 0)
        self.bad = bad if self.bad is None else torch.where(first, bad, self.bad)
        self.first_bad = torch.where(first, self.total_steps, self.first_bad)
        if self.signal or time.monotonic() - self.saved_at > self.options.save_every:
            self.save()

    def after_epoch(self, **more: float) -> None:
        """Close an epoch: the means of its losses, `more` and its seconds become a row of log.csv."""
        self._check_finite()
        means = dict(zip(self.names, (self.sums / self.step).tolist(), strict=True))
        now = time.monotonic()
        self.rows.append({"epoch": self.epoch + 1, **means, **more, "seconds": round(now - self.epoch_started, 3)})
        self.epoch_started = now
        self.epoch, self.step, self.sums, self.bad = self.epoch + 1, 0, None, None  # the next may have other losses: M1, then M2
        if self.epoch == 1 or now - self.logged_at > LOG_EVERY:
            self._write_log()
        shown = "  ".join(f"{name} {value:.4g}" for name, value in self.rows[-1].items() if name != "epoch")
        if self.bar.disable:
            print(f"epoch {self.epoch}/{self.config.epochs}  {shown}", flush=True)
        else:
            self.bar.set_description(f"epoch {self.epoch}/{self.config.epochs}")
            self.bar.set_postfix_str(shown)

    def sample_path(self) -> Path | None:
        """Where a grid of samples goes after this epoch, or None where none is due."""
        due = self.epoch in SAMPLE_EPOCHS or self.epoch == self.config.epochs
        return self.folder / "samples" / f"epoch{self.epoch:04d}.png" if due else None

    def finish(self) -> None:
        """Save the last epoch's weights, unless the checkpoint has them: a session may have had nothing to do but to close an epoch."""
        if (self.epoch, self.step) != self.saved_position:
            self.save()
            self.bar.close()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
            print(f"trained {self.epoch} epochs in {self.seconds:.0f} s, peak memory {peak:.2f} GiB")
            print(f"log in {self.folder / 'log.csv'}, pictures in {self.folder / 'samples'}")
            where = f"--seed {self.options.seed} --data {self.options.data} --runs {self.options.runs}"
            print(f"next: python -m {self.identity['paper']}.eval {self.options.experiment} {where}", flush=True)

    def save(self) -> None:
        """Write the checkpoint; then stop if asked to. Where a step was not finite the last good one stays, and RunFailed names it."""
        self._check_finite()
        for name, network in self.networks.items():  # what no loss has shown; here alone, as it reads all weights
            if not all(value.isfinite().all() for value in network.state_dict().values() if value.is_floating_point()):
                self._fail(f"weights of {name} are", self.total_steps)
        self.seconds = self.seconds_before + time.monotonic() - self.started
        save_checkpoint(
            self.path,
            {
                "identity": self.identity,
                "config": dataclasses.asdict(self.config),
                "epoch": self.epoch,
                "step": self.step,
                "total_steps": self.total_steps,
                "rows": self.rows,
                "names": self.names,
                "sums": self.sums,
                "seconds": self.seconds,
                "epoch_seconds": time.monotonic() - self.epoch_started,
                "sessions": self.sessions,
                "networks": {name: module.state_dict() for name, module in self.networks.items()},
                "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            },
        )
        self._write_log()
        self.saved_at, self.saved_position = time.monotonic(), (self.epoch, self.step)
        if self.signal:
            name, code = ("Ctrl-C", 130) if self.signal == signal.SIGINT else ("SIGTERM", 143)
            raise Stopped(code, f"{name}: saved after epoch {self.epoch}, step {self.step}; the same command goes on from here")

    def _check_finite(self) -> None:
        if (step := int(self.first_bad)) >= 0:
            names = [name for name, bad in zip(self.names, self.bad.tolist(), strict=True) if bad]
            self._fail(f"{', '.join(names)} {'were' if len(names) > 1 else 'was'}", step)

    def _fail(self, what: str, step: int) -> typing.NoReturn:
        kept = "the last good checkpoint is kept" if self.path.exists() else "nothing was saved"
        raise RunFailed(f"{self.folder}: {what} not finite, first at step {step} (epoch {self.epoch + 1}); {kept}")

    def _write_log(self) -> None:
        self.logged_at = time.monotonic()
        path = self.folder / "log.csv"
        if not self.rows:
            path.unlink(missing_ok=True)  # of epochs that no checkpoint holds
            return
        names = dict.fromkeys(name for row in self.rows for name in row)  # a run may be older than a column
        with atomic(path) as file:
            writer = csv.DictWriter(file, fieldnames=list(names))
            writer.writeheader()
            writer.writerows(self.rows)


def provenance(state: dict) -> dict:
    """Where the weights in a checkpoint come from. What differed between the sessions of a resumed run is a list, in order."""
    sessions = state["sessions"]
    facts = {key: list(dict.fromkeys(s[key] for s in sessions)) for key in sessions[-1]}
    facts = {key: values if len(values) > 1 else values[0] for key, values in facts.items()}
    return {
        **facts,
        "git_commit": sessions[-1]["git_commit"],
        "git_commits": list(dict.fromkeys(s["git_commit"] for s in sessions)),
        "git_dirty": any(s["git_dirty"] is not False for s in sessions),
        **{key: value for key, value in state["identity"].items() if key not in ("paper", "experiment", "seed")},
        "training_seconds": round(state["seconds"], 1),
        "epochs": state["epoch"],
        "steps_beyond": state["step"],  # of an epoch that was not finished
    }


def trained(paper: str, folder: Path, device: torch.device) -> tuple[typing.Any, types.ModuleType, dict[str, torch.nn.Module], dict]:
    """The run in `folder` as far as its last checkpoint: its config, the module that trained it, its networks, and the checkpoint.

    Raises UserError where there is none, or it is damaged.
    """
    state = load_checkpoint(folder / "checkpoint.pt")
    if state is None:
        raise UserError(f"{folder}: no trained run here (no checkpoint.pt)")
    system = module_of(paper, state["config"])
    config = make_config(system.Config, state["config"], str(folder))
    networks = system.build(config)
    for name, network in networks.items():
        network.load_state_dict(state["networks"][name])
        network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    return config, system, networks, state


def check_data(folder: Path, state: dict, data: typing.Any) -> None:
    """Raise UserError where `data` (a Dataset) is not what the run whose checkpoint is `state` was trained on."""
    trained_on = state["identity"]["data_digest"]
    if data.digest != trained_on:
        raise UserError(f"{folder}: trained on {data.name} with digest {trained_on}, found {data.digest}")


def record(options: Options, config: typing.Any, state: dict, metrics: dict, device: torch.device, **judges: str | None) -> dict:
    """What eval.json holds of a run, whose checkpoint is `state`. judges: which networks scored it, for the provenance."""
    return {
        "experiment": options.experiment,
        "seed": options.seed,
        "metrics": metrics,
        "config": dataclasses.asdict(config),
        "config_hash": config_hash(config),
        "provenance": provenance(state) | judges | {"evaluation": session(device)},
    }


def evaluate_from(paper: str, evaluate: Callable[[Options], dict], argv: list[str] | None, shown: Callable[[str], bool] = bool) -> None:
    """The command line of `python -m <paper>.eval`: evaluate one run and print its metrics.

    evaluate: gives what `record` made.  shown: which metrics to print, by name; eval.json has them all.
    """
    parser = Parser(prog=f"python -m {paper}.eval")
    add_options(parser, paper)
    options = Options(**vars(parser.parse_all(argv)))
    check_experiment(paper, options.experiment)
    result = evaluate(options)
    folder = options.folder(paper)
    done, asked = result["provenance"]["epochs"], result["config"]["epochs"]
    print(f"{paper} {options.experiment}, seed {options.seed}, {done} of {asked} epochs on {result['provenance']['data']}:")
    for name in filter(shown, result["metrics"]):
        value = result["metrics"][name]
        print(f"  {name:<34}{value:{'.10g' if float(value).is_integer() else '.4g'}}")
    print(f"numbers in {folder / 'eval.json'}, pictures in {folder / 'figures'}; next: make diff")


# ------------------------------------------------------------------------------------------------------------ describe


def describe(networks: dict[str, torch.nn.Module], inputs: dict[str, typing.Any], config: typing.Any, as_json: bool) -> str:
    """What would be trained: each network layer by layer with output shapes and parameter counts, and the config.

    inputs: an example batch (or several, in a tuple) for each network that is called; the others are described by their parameters.
    """
    described = {}
    for name, network in networks.items():
        layers: list[dict] = []
        if name in inputs:
            _trace(network, inputs[name], layers)
        else:
            layers = [{"layer": k, "output": list(p.shape), "parameters": p.numel()} for k, p in network.named_parameters()]
        described[name] = {"parameters": sum(p.numel() for p in network.parameters()), "layers": layers}
    total = sum(network["parameters"] for network in described.values())
    values = dataclasses.asdict(config)
    if as_json:
        return json.dumps({"networks": described, "parameters": total, "config": values}, indent=1)
    lines = []
    for name, network in described.items():
        lines.append(f"{name}: {network['parameters']:,} parameters")
        for x in network["layers"]:
            output = "×".join(map(str, x["output"])) if x["output"] else "(not called)"
            lines.append(f"  {x['layer']:<24}{output:<14}{x['parameters']:>12,}  {x.get('settings', '')}".rstrip())
    lines += [f"total: {total:,} parameters", "config:"] + [f"  {key}: {value}" for key, value in values.items()]
    return "\n".join(lines)


@torch.no_grad()
def _trace(network: torch.nn.Module, example: Tensor | tuple[Tensor, ...], layers: list[dict]) -> None:
    """Run `example` through `network` and note what each layer without sub-layers gives out, without the batch dimension.

    Layers with parameters that the example does not pass come last, without an output.
    """

    def row(module: torch.nn.Module, output: list[int]) -> dict:
        count = sum(p.numel() for p in module.parameters())
        return {"layer": type(module).__name__, "output": output, "parameters": count, "settings": module.extra_repr()}

    def note(module: torch.nn.Module, _: object, output: Tensor) -> None:
        layers.append(row(module, list(output.shape[1:])))
        waiting.discard(module)

    leaves = [m for m in network.modules() if not list(m.children()) and not isinstance(m, torch.nn.Identity)]
    waiting = {m for m in leaves if list(m.parameters())}
    hooks = [m.register_forward_hook(note) for m in leaves]
    network(*example) if isinstance(example, tuple) else network(example)
    for hook in hooks:
        hook.remove()
    layers += [row(module, []) for module in leaves if module in waiting]
