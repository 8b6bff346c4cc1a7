"""A run on disk: config, command line, exact resume, log, provenance.

runs/<paper>/<experiment>/seed<k>/ holds config.yaml, log.csv (one row per epoch), samples/, checkpoint.pt and, after
evaluation, eval.json and figures/. The checkpoint alone says how far a run has come; the log is written anew from it.
"""

import argparse
import csv
import difflib
import hashlib
import importlib.util
import inspect
import io
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import IO, Annotated, Any, Literal, NoReturn, get_args, get_origin

import filelock
import torch
import yaml
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
QUIET = 5.0  # at least so many seconds between two printed epochs, and between two writings of log.csv
SILENT = 20.0  # without a terminal: print the position after so many seconds without a line
SAMPLED = {1, 2, 5, 10, 20, 50, 100, 200, 300, 400, 500, 1000}  # draw samples after these epochs and after the last


class Ended(Exception):
    """Ends a command with one line, which begins with `word`, and an exit code: 128 + the number after a signal."""

    code, word = 0, ""

    def __init__(self, message: str, code: int | None = None):
        super().__init__(" ".join(message.split()))
        self.code = code or self.code


class RunFailed(Ended):  # something went wrong while it ran
    code, word = 1, "failed: "


class UserError(Ended):  # a mistake in usage, configuration or data
    code, word = 2, "error: "


def refuse(wrong: dict[str, str]) -> None:
    """Raise one UserError that lists every mistake and the flags that fix them. Without a mistake do nothing.

    wrong: {mistake: the flags that fix it, or "" where no flag can}.
    """
    if wrong:
        fits = f". What fits: {' '.join(wrong.values())}" if all(wrong.values()) else ""
        raise UserError("; ".join(wrong) + fits)


def exit_with(main: Callable[[], None]) -> NoReturn:
    """Call `main`, print one line if it failed, and exit with the right code."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # None after 2>&-
    for stream in (sys.stdout, sys.stderr):  # a terminal without α shows ? instead
        stream.reconfigure(errors="replace")
    code, line = 0, ""
    try:
        main()
    except Ended as end:
        code, line = end.code, f"{end.word}{end}"
    except KeyboardInterrupt:
        code, line = 130, "interrupted"
    except BrokenPipeError:  # the reader of our output is gone, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a full disk, no permission; an error of the network has no file name
        if error.filename is None:
            raise
        code, line = 1, f"failed: {error.filename}: {error.strerror}; what was saved before is intact"
    if line:
        print(line, file=sys.stderr)
    sys.exit(code)


def generator(seed: int, *stream: object, device: str | torch.device = "cpu") -> torch.Generator:
    """A random generator for one purpose, such as generator(seed, "order", epoch). A checkpoint need not hold it."""
    digest = hashlib.sha256(repr((seed, *stream)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


# ---------------------------------------------------------------------------------------- configuration, command line


@dataclass(frozen=True)
class Range:
    """The allowed values of a numeric config field: Annotated[int, Range(1)]."""

    low: float
    above: bool = False  # True: the value must be above `low`; False: at least `low`
    below: float = float("inf")

    def __contains__(self, value: float) -> bool:
        return self.low <= value < self.below and not (self.above and value == self.low)

    def __str__(self) -> str:
        return f"{'>' if self.above else '>='} {self.low:g}" + f" and < {self.below:g}" * (self.below < float("inf"))


Count = Annotated[int, Range(1)]
Positive = Annotated[float, Range(0, above=True)]
NonNegative = Annotated[float, Range(0)]
Decay = Annotated[float, Range(0, below=1)]


def check_value(name: str, value: object, annotation: Any) -> object:
    """Convert `value`, from YAML or from a flag, to the annotated type. Raises UserError that says what is allowed."""
    parts = get_args(annotation)
    if type(None) in parts:  # Count | None
        return None if str(value).lower() in ("none", "null") else check_value(name, value, parts[0])
    if get_origin(annotation) is Literal:
        if value not in parts:
            raise UserError(f"{name}: {value!r} is not one of {', '.join(parts)}")
        return value
    kind, *ranges = parts or [annotation]  # Annotated[int, Range(1)], or int
    if kind is Path:
        return as_path(value)
    try:
        found = {"true": True, "false": False}[str(value).lower()] if kind is bool else kind(str(value))
    except (KeyError, ValueError):
        expected = "true or false" if kind is bool else kind.__name__
        raise UserError(f"{name}: expected {expected}, found {value!r}") from None
    if ranges and found not in ranges[0]:
        raise UserError(f"{name}: {found!r} is out of range; allowed: {ranges[0]}")
    return found


def as_path(text: str) -> Path:
    """A path from the command line. Expands ~, which the shell leaves alone in make DATA=~/data."""
    return Path(os.path.expanduser(text))


def nearest(word: str, known: Iterable[str]) -> str:
    """'; did you mean …?' with the closest of `known`; the whole list where none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"


def make_config(cls: type, values: dict, where: str) -> Any:
    """Make a `cls` of a flat mapping; check every key and value. where: named in the message of a UserError."""
    types = {field.name: field.type for field in fields(cls)}
    try:
        for key in values:
            if key not in types:
                raise UserError(f"unknown key {key!r}{nearest(str(key), types)}")
        return cls(**{key: check_value(key, value, types[key]) for key, value in values.items()})
    except (UserError, ValueError) as error:  # the Config raises ValueError if its fields do not fit together
        raise UserError(f"{where}: {error}") from None


def read_yaml(path: Path) -> dict:
    """{key: its value as text} of a flat YAML file. Raises UserError if it is no mapping or has a key twice."""
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.load(text, yaml.BaseLoader)  # YAML itself would read 010 as 8, and 3e-4 as text
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({str(error)[:150]})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, found {type(values).__name__}")
    keys = re.findall(r"^([^\s#:]+):", text, re.M)
    if twice := [key for key in keys if keys.count(key) > 1]:  # YAML would take the last one
        raise UserError(f"{path}: {twice[0]} appears {len(twice)} times; keep one")
    return values


def module_of(paper: str, experiment: str) -> str:
    """The module that trains an experiment: m1m2 for mnist-m1m2 if the paper has an m1m2.py; otherwise train."""
    dataset, _, last = experiment.rpartition("-")
    return last if dataset and (ROOT / paper / f"{last}.py").exists() else "train"


def experiments(paper: str, module: str | None = None) -> list[str]:
    """The names of a paper's experiments (configs/*.yaml), sorted; with `module`, only those that it trains."""
    names = sorted(path.stem for path in (ROOT / paper / "configs").glob("*.yaml"))
    return [name for name in names if module in (None, module_of(paper, name))]


def check_experiment(paper: str, experiment: str) -> None:
    """Raise UserError if the paper has no such experiment."""
    if experiment not in (known := experiments(paper)):
        raise UserError(f"unknown experiment {experiment!r}{nearest(experiment, known)}")


def config_class(paper: str, experiment: str) -> type:
    """The Config class of an experiment."""
    return importlib.import_module(f"{paper}.{module_of(paper, experiment)}").Config


def experiment_config(paper: str, experiment: str, overrides: dict | None = None) -> Any:
    """The committed config of an experiment, with `overrides` ({field: value}) in place of its values."""
    check_experiment(paper, experiment)
    values = read_yaml(ROOT / paper / "configs" / f"{experiment}.yaml")
    return make_config(config_class(paper, experiment), values | (overrides or {}), f"{paper} {experiment}")


def config_hash(config: Any) -> str:
    """12 hex digits over the fields (epochs aside) that differ from their defaults. A new field changes no old hash."""
    kept = {field.name: field.default for field in fields(config) if field.name != "epochs"}
    differing = {name: value for name, default in kept.items() if (value := getattr(config, name)) != default}
    return hashlib.sha256(json.dumps(differing, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Options:
    """Where and how a run is made. Not part of its config; most of it is recorded as provenance."""

    experiment: str
    seed: Annotated[int, Range(0, below=2**63)] = 0  # fixes everything that is random
    data: Path = Path("data")  # folder that holds MNIST/, FashionMNIST/ …
    runs: Path = Path("runs")  # folder under which runs are kept
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    threads: Annotated[int, Range(0)] = 0  # CPU threads; 0: all cores
    unofficial_data: bool = False  # read data whose digest is not the official one
    inception: Path | None = None  # the Inception weights, where scores need them; else torch's hub folder
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast, on CPU and GPU
    save_every: NonNegative = 60.0  # seconds between checkpoints
    deterministic: bool = False  # bit-identical repeats on a GPU too, slower
    graph: bool = False  # on a GPU, record a training step once and replay it
    tensorboard: bool = False  # write the numbers of log.csv for TensorBoard too, into the run's tensorboard/
    describe: bool = False  # print what would be trained, and stop
    json: bool = False  # with --describe: for programs
    pdf: bool = False  # in an evaluation: figures as vector files, too
    changes: dict = field(default_factory=dict)  # config fields, epochs excepted, that flags set to another value
    moved: dict = field(default_factory=dict)  # {"dataset": folder:<path>} if a flag gave the image folder

    def folder(self, paper: str) -> Path:
        """runs/<paper>/<experiment>/seed<k>; with changed fields they are in the name: seed0-labels-stratified."""
        own = {name: str(value).split("/")[-1] for name, value in self.changes.items()}  # the last part of a path
        words = [re.sub(r"[^\w.]+|_", "-", word).strip("-") for pair in own.items() for word in pair]
        return self.runs / paper / self.experiment / "-".join([f"seed{self.seed}", *words])[:200]

    def flags(self) -> list[str]:
        """The flags with which another command finds this run."""
        given = {"seed": self.seed, "data": self.data, "runs": self.runs, **self.changes, **self.moved}
        return [word for name, value in given.items() for word in (flag_of(name), str(value))]


def flag_of(name: str) -> str:
    """n_labels -> --n-labels."""
    return f"--{name.replace('_', '-')}"


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a UserError: one line with the nearest valid name."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")

    def parse_all(self, argv: list[str] | None) -> argparse.Namespace:
        argv = sys.argv[1:] if argv is None else argv  # accept --grad_clip_norm for --grad-clip-norm
        argv = [a.replace("_", "-", a.partition("=")[0].count("_")) if a.startswith("--") else a for a in argv]
        namespace, unknown = self.parse_known_args(argv)
        if unknown:
            flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
            raise UserError(f"unknown argument {unknown[0]!r}{nearest(unknown[0].partition('=')[0], flags)}")
        return namespace


def parse(program: str, cls: type | None, argv: list[str] | None = None) -> tuple[Any, Options]:
    """Config and options from the command line of `python -m <program>`, for example segma.train.

    cls: the program's Config; each of its fields is a flag. None for an evaluation: it takes its run's flags."""
    paper, _, module = program.partition(".")
    argv = sys.argv[1:] if argv is None else argv
    trains, names = cls is not None, experiments(paper, module if cls else None)
    if not trains:
        cls = next((config_class(paper, name) for name in argv if name in names), None)
    parser = Parser(prog=f"python -m {program}", allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("experiment", help=f"one of: {', '.join(names)}")
    group = parser.add_argument_group("fields of the config; default: the experiment's")
    own = [f for f in fields(Options) if f.default is not MISSING and (trains or f.name not in ("describe", "json"))]
    said = comments(Options) | (comments(cls) if cls else {})
    for f in [*own, *(fields(cls) if cls else ())]:
        where, flag, text = parser if f in own else group, flag_of(f.name), said.get(f.name)
        if f in own and f.type is bool:
            where.add_argument(flag, help=text, action="store_true")
        else:
            check = partial(check_value, flag, annotation=f.type)
            where.add_argument(flag, help=text, metavar="VALUE", type=check)
    values = vars(parser.parse_all(argv))
    asked = values["experiment"]
    if trains and f"{asked}-{module}" in names:  # python -m segma.m1m2 mnist
        values["experiment"] = f"{asked}-{module}"
    elif asked not in names:
        check_experiment(paper, asked)
        raise UserError(f"{asked} is trained by python -m {paper}.{module_of(paper, asked)}, not by {program}")
    options = Options(**{f.name: values.pop(f.name) for f in fields(Options) if f.name in values})
    standing = experiment_config(paper, options.experiment)
    config = make_config(type(standing), asdict(standing) | values, f"{paper} {options.experiment}")
    changes = {name: value for name, value in values.items() if differs(name, value, getattr(standing, name))}
    moved = {name: value for name, value in values.items() if name == "dataset" and ":" in value}
    return config, replace(options, changes=changes, moved=moved)


def differs(name: str, value: object, other: object) -> bool:
    """Whether these two values of a field belong to two different runs. Epochs may grow; an image folder may move."""
    if name in ("dataset", "data") and ":" in str(value):
        value, other = (str(dataset).partition(":")[0] for dataset in (value, other))
    return name != "epochs" and value != other


def comments(cls: type) -> dict[str, str]:
    """{field: the comment beside it in the source of `cls`}. It is the help text of the field's flag."""
    lines = [line for part in cls.__mro__[:-1] for line in inspect.getsource(part).splitlines()]
    found = (re.match(r" {4}(\w+): .*?  # (.*)", line) for line in lines)
    return {match[1]: match[2].replace("%", "%%") for match in found if match}


def start(program: str, cls: type, train: Callable, argv: list[str] | None = None) -> None:
    """Run the command `python -m <program>`: call train(config, options), or obey --describe. cls: its Config."""
    config, options = parse(program, cls, argv)
    if not options.describe:
        train(config, options)
        return
    model = config.build()
    named = [*model.named_children(), ("total", model)]
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in named}
    if options.json:
        total = sizes.pop("total")
        layers = {n: [repr(x) for x in m.modules() if not list(x.children())] for n, m in model.named_children()}
        networks = {name: {"parameters": size, "layers": layers[name]} for name, size in sizes.items()}
        print(json.dumps({"networks": networks, "parameters": total, "config": asdict(config)}, indent=1))
    else:
        print(model, *(f"{name}: {size:,} parameters" for name, size in sizes.items()), sep="\n")
        print(yaml.safe_dump(asdict(config), sort_keys=False))


def set_up(options: Options) -> torch.device:
    """Set threads, device and the published arithmetic (TF32 off). Raises UserError if the machine cannot do it."""
    if options.threads:
        torch.set_num_threads(options.threads)
    gpus = torch.cuda.device_count()
    name = options.device if options.device != "auto" else "cuda" if gpus else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"--device: {name!r} is not one of auto, cpu, cuda, cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise UserError(f"--device: {name} asked for, but this machine has {gpus} CUDA devices. Use --device cpu")
    if options.graph and device.type != "cuda":
        raise UserError(f"--graph: it replays CUDA graphs, and the device is {device.type}. Leave it out")
    if options.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise UserError("--tensorboard: the package is not installed; pip install -e '.[tensorboard]', or leave it out")
    if device.index:
        torch.cuda.set_device(device)  # --graph records on the current device
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return device


def git_state() -> tuple[str | None, bool | None]:
    """(commit, dirty) of this repository; (None, None) if git does not say. dirty: code or configs were changed.

    The files that `make results` writes are not code: results may be collected while a run goes on."""
    git = ["git", "--git-dir=.git"]  # never a repository around this one
    status = [*git, "status", "--porcelain", "--", ".", ":!*/results/*", ":!*/figures/*", ":!*.md"]
    read = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=True)
    try:
        return read([*git, "rev-parse", "HEAD"]).stdout.strip(), bool(read(status).stdout)
    except (OSError, subprocess.SubprocessError):
        return None, None


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: *(.*\S)", cpu.read_text(), re.M) if cpu.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def session(device: torch.device) -> dict:
    """The commit, versions, machine and date of this process. A resumed run has several sessions."""
    commit, dirty = git_state()
    versions = {"torch": str(torch.__version__), "python": platform.python_version()}
    machine = {"device": device_name(device), "threads": torch.get_num_threads()}
    date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return {"git_commit": commit, "git_dirty": dirty, **versions, **machine, "date": date}


def provenance(state: dict) -> dict:
    """How the weights in a checkpoint were made. A fact that differed between the run's sessions is a list."""
    sessions = state["sessions"]
    facts = {key: list(dict.fromkeys(s[key] for s in sessions)) for key in sessions[-1]}
    weights = (value.contiguous().numpy().tobytes() for _, value in sorted(state["weights"].items()))
    origin = {key: values if len(values) > 1 else values[0] for key, values in facts.items()}
    origin |= {"git_commit": sessions[-1]["git_commit"], "git_commits": facts["git_commit"]}
    origin["git_dirty"] = any(dirty is not False for dirty in facts["git_dirty"])
    origin |= {key: value for key, value in state["identity"].items() if key not in ("paper", "experiment", "seed")}
    origin |= {"training_seconds": round(state["seconds"], 1), "epochs": state["epoch"]}
    origin["steps_beyond"] = state["step"]  # steps of an unfinished epoch
    return origin | {"weights": hashlib.sha256(b"".join(weights)).hexdigest()[:16]}


@contextmanager
def atomic(path: Path, mode: str = "w") -> Iterator[IO]:
    """Write a file completely or not at all: write a temporary file in the same folder, fsync it, rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": ""})) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        folder = os.open(path.parent, os.O_RDONLY)  # the rename survives a power cut only if the folder is synced
        os.fsync(folder)
        os.close(folder)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)
        raise


@contextmanager
def locked(path: Path, waiting: str) -> Iterator[None]:
    """Let one process at a time into the block. A second one prints `waiting` and waits. path: the lock file."""
    lock = filelock.FileLock(path)
    try:
        held = lock.acquire(blocking=False)
    except filelock.Timeout:
        print(waiting, flush=True)
        held = lock.acquire()
    with held:
        yield


def write_json(path: Path, value: object) -> None:
    with atomic(path) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def save_checkpoint(path: Path, state: dict) -> None:
    buffer = io.BytesIO()  # because torch.save to a full disk does not raise OSError
    torch.save(state, buffer)
    with atomic(path, "wb") as file:
        file.write(buffer.getbuffer())


def load_checkpoint(path: Path) -> dict | None:
    """The state saved in `path`, on the CPU; None if there is no such file. Raises UserError if it is damaged."""
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not notice most flipped bits
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(damaged)
        return torch.load(path, map_location="cpu", weights_only=True)  # runs no code from the file
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # a damaged zip file can raise nearly anything
        raise UserError(f"{path}: damaged ({str(error)[:150]}). Delete it to begin anew") from None


# --------------------------------------------------------------------------------------------------------------- a run


class Run:
    """One run on disk, open for training: position, log and checkpoint. segma/train.py shows how a loop uses it."""

    SAVED = ("identity", "epoch", "step", "total_steps", "rows", "names", "sums", "seconds", "sessions")

    def __init__(self, paper: str, config: Any, options: Options, data: dict, device: torch.device):
        self.folder, self.config, self.options, self.device = options.folder(paper), config, options, device
        self.path = self.folder / "checkpoint.pt"
        self.identity = {"paper": paper, "experiment": options.experiment, "seed": options.seed}
        self.identity |= {"precision": options.precision, **data}
        self.epoch = self.step = self.total_steps = self.signal = 0
        self.rows, self.sessions, self.names = [], [], []  # rows of the log; see `session`; names of the losses
        self.sums: Tensor | None = None  # each loss summed over this epoch's steps, on the device
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)  # the first step with a loss not finite
        self.seconds = self.printed_at = self.logged_at = 0.0  # seconds: of training, over all sessions

    def __enter__(self) -> "Run":
        self.lock = filelock.FileLock(self.folder / ".lock")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(blocking=False)
        except filelock.Timeout:
            raise UserError(f"{self.folder}: another process trains this run; wait, or use another --runs") from None
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written ({error.strerror}); name another --runs") from None
        for part in self.folder.rglob(".*.part"):  # left by a process that was killed while writing
            part.unlink()
        self.handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        self.board = None  # TensorBoard's writer, with --tensorboard
        shape = "{desc}|{bar:10}| {elapsed} < {remaining}"  # fits 80 columns
        self.bar = tqdm(disable=None, mininterval=0.5, bar_format=shape, dynamic_ncols=True)
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self.handlers.items():
            signal.signal(s, handler)
        self.bar.close()
        if self.board:
            self.board.close()
        self.lock.release()

    def _on_signal(self, number: int, _: object) -> None:
        self.signal = number

    def resume(self, model: nn.Module, optimizers: dict[str, torch.optim.Optimizer], steps: int) -> None:
        """Continue from the checkpoint if there is one, and print the position. steps: per epoch.

        Raises UserError if the folder holds a run with another config, seed, precision or data."""
        self.model, self.optimizers, self.steps, self.saved_position, position = model, optimizers, steps, None, ""
        self.started = self.epoch_started = self.saved_at = time.monotonic()
        if state := load_checkpoint(self.path):
            self._refuse_other(state)
            load_weights(model, state, self.folder)
            for name, optimizer in optimizers.items():
                optimizer.load_state_dict(state["optimizers"][name])
            vars(self).update({name: state[name] for name in self.SAVED})
            self.sums = None if self.sums is None else self.sums.to(self.device)
            self.saved_position = (self.epoch, self.step)
            self.started -= self.seconds
            self.epoch_started -= state["epoch_seconds"]
            position = f", from epoch {self.epoch + 1}, step {self.step} on"
        self.sessions.append(session(self.device))
        with atomic(self.folder / "config.yaml") as file:
            yaml.safe_dump(asdict(self.config), file, sort_keys=False)
        self._write_log()
        epochs, where = self.config.epochs, f"{self.sessions[-1]['device']}, {self.options.precision}"
        if self.epoch >= epochs:
            print(f"{self.folder}: complete, {self.epoch} epochs done")
            return
        print(f"{self.folder}: {epochs} epochs of {steps} steps{position}, on {where}", flush=True)
        if any(s["git_dirty"] is not False for s in self.sessions):
            print("no reference result: the checkout has changes, or git does not say (try `git status`)", flush=True)
        elif not self.identity["data_official"]:
            print("no reference result: the data are not the official ones", flush=True)
        if self.options.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(self.folder / "tensorboard", purge_step=self.epoch + 1)
        self.bar.reset(total=epochs * steps)
        self.bar.update(self.total_steps)

    def _refuse_other(self, state: dict) -> None:
        added = {field.name: field.default for field in fields(self.config)}  # for fields newer than the checkpoint
        ours, theirs = self.identity | asdict(self.config), added | state["identity"] | state["config"]
        wrong = [f"{key}: a field unknown here" for key in state["config"] if key not in added]
        differing = [key for key in ours if differs(key, ours[key], theirs.get(key))]
        flags = {key: flag_of(key) for key in (*added, "seed", "precision")}  # the data's digest has no flag
        wrong += [f"{flags.get(k, k)}: {theirs.get(k)!r} there, {ours[k]!r} asked for" for k in differing]
        if state["epoch"] + (state["step"] > 0) > self.config.epochs:
            wrong.append(f"{state['epoch']} epochs are done, {self.config.epochs} asked for; --epochs can only grow")
        if wrong:
            raise UserError(f"{self.folder} holds a run with other settings ({'; '.join(wrong)}). Use another --runs")

    def after_step(self, losses: dict[str, Tensor]) -> None:
        """Count a step and add up its losses (scalars on the device). Save if it is time; stop after a signal."""
        self.names = list(losses)
        values = torch.stack([value.detach().float() for value in losses.values()])
        self.sums = values if self.sums is None else self.sums + values
        self.step += 1
        self.total_steps += 1
        self.bar.update()
        first = ~torch.isfinite(values).all() & (self.first_bad < 0)
        self.first_bad = torch.where(first, self.total_steps, self.first_bad)
        now = time.monotonic()
        if self.bar.disable and now - max(self.printed_at, self.epoch_started) > SILENT:
            print(f"{self._position(self.epoch + 1)}, step {self.step}/{self.steps}", flush=True)
            self.printed_at = now
        if self.signal or now - self.saved_at > self.options.save_every:
            self.save()
        elif self.step == self.steps:  # before the loop evaluates the epoch
            self._check_finite()

    def after_epoch(self, **more: float) -> None:
        """End an epoch: its mean losses, `more` and its seconds become a row of log.csv."""
        self._check_finite()
        means, now = dict(zip(self.names, (self.sums / self.step).tolist(), strict=True)), time.monotonic()
        row = {**means, **more, "seconds": round(now - self.epoch_started, 3)}
        self.epoch, self.step, self.sums, self.epoch_started = self.epoch + 1, 0, None, now
        self.rows.append({"epoch": self.epoch, **row})
        for name, value in row.items() if self.board else ():
            self.board.add_scalar(name, value, self.epoch)
        if self.epoch == 1 or now - self.logged_at > QUIET:
            self._write_log()
        shown = "  ".join(f"{name} {value:.4g}" for name, value in {**more, **row}.items())
        position = self._position(self.epoch)
        self.bar.set_description_str(f"{position}  {shown}"[: max(40, shutil.get_terminal_size().columns - 30)], False)
        if self.epoch in (1, self.config.epochs) or now - self.printed_at > QUIET * (1 if self.bar.disable else 6):
            tqdm.write(f"{position}  {shown}")
            self.printed_at = now

    def _position(self, epoch: int) -> str:
        return f"{self.identity['experiment']} {self.folder.name}  epoch {epoch}/{self.config.epochs}"

    def sample_path(self) -> Path | None:
        """The file for a grid of samples after this epoch, or None if none is due."""
        due = self.epoch in SAMPLED or self.epoch == self.config.epochs
        return self.folder / "samples" / f"epoch{self.epoch:04d}.png" if due else None

    def finish(self) -> None:
        """Save the last epoch's weights unless they are saved already, and print the next command."""
        if (self.epoch, self.step) != self.saved_position:
            self.save()
            self.bar.close()
            print(f"trained {self.epoch} epochs in {self.seconds:.0f} s; log and pictures in {self.folder}")
            command = [f"{self.identity['paper']}.eval", self.options.experiment, *self.options.flags()]
            print(f"next: python -m {shlex.join(command)}", flush=True)

    def save(self) -> None:
        """Write the checkpoint; after a signal, end the command. Raises RunFailed instead if a loss was not finite."""
        self._check_finite()
        now = time.monotonic()
        self.seconds = now - self.started
        state = {name: getattr(self, name) for name in self.SAVED}
        state |= {"config": asdict(self.config), "epoch_seconds": now - self.epoch_started}
        state["weights"] = self.model.state_dict()
        state["optimizers"] = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        save_checkpoint(self.path, state)
        self._write_log()
        self.saved_at, self.saved_position = time.monotonic(), (self.epoch, self.step)
        if self.signal:
            saved = f"{'Ctrl-C' if self.signal == signal.SIGINT else 'SIGTERM'}: saved after epoch {self.epoch}"
            raise Ended(f"{saved}, step {self.step}; the same command goes on from here", 128 + self.signal)

    def _check_finite(self) -> None:
        if (step := int(self.first_bad)) >= 0:
            kept = "the last good checkpoint is kept" if self.path.exists() else "nothing was saved"
            raise RunFailed(f"{self.folder}: a loss or gradient was not finite, first at step {step}; {kept}")

    def _write_log(self) -> None:
        path, self.logged_at = self.folder / "log.csv", time.monotonic()
        if not self.rows:
            path.unlink(missing_ok=True)  # a log of epochs that no checkpoint holds
            return
        names = dict.fromkeys(name for row in self.rows for name in row)
        with atomic(path) as file:
            csv.writer(file).writerows([names, *([row.get(name) for name in names] for row in self.rows)])


def load_weights(model: nn.Module, state: dict, folder: Path) -> None:
    """Load the checkpoint's weights into the model. Raises UserError if they belong to another system."""
    try:
        model.load_state_dict(state["weights"])
    except RuntimeError as error:
        raise UserError(f"{folder}: not this system's weights ({str(error)[:150]})") from None


def load_run(
    paper: str, folder: str | Path, device: str | torch.device = "cpu", moved: dict | None = None
) -> tuple[nn.Module, dict]:
    """The trained system in `folder`, ready for use, and its checkpoint. Raises UserError if there is none.

    moved: {"dataset": folder:<path>} if the run's image folder has moved.
    """
    folder = Path(folder)
    state = load_checkpoint(folder / "checkpoint.pt")
    if not state or "weights" not in state or state["identity"]["paper"] != paper:
        raise UserError(f"{folder}: no trained run here (no checkpoint.pt, or it is from another paper or version)")
    values = state["config"] | (moved or {})
    config = make_config(config_class(paper, state["identity"]["experiment"]), values, str(folder))
    model = config.build()
    load_weights(model, state, folder)
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False), state


def check_data(folder: Path, state: dict, data: Any) -> None:
    """Raise UserError if `data` (a Dataset) is not what the run with checkpoint `state` was trained on."""
    trained_on = state["identity"]["data_digest"]
    if data.digest != trained_on:
        raise UserError(f"{folder}: trained on {data.name} with digest {trained_on}, found {data.digest}")


def record(config: Any, state: dict, metrics: dict, device: torch.device, **judges: str | None) -> dict:
    """The content of eval.json for the run with checkpoint `state`. judges: digests of the networks that scored it."""
    made = {"experiment": state["identity"]["experiment"], "seed": state["identity"]["seed"], "metrics": metrics}
    made |= {"config": asdict(config), "config_hash": config_hash(config)}
    return made | {"provenance": provenance(state) | judges | {"evaluation": session(device)}}


def evaluate_from(paper: str, evaluate: Callable, argv: list[str] | None, shown: Callable[[str], bool] = bool) -> None:
    """Run the command `python -m <paper>.eval`. evaluate(options) returns a `record`. shown: which metrics to print."""
    from common import diff, plots  # here, because both import this module

    config, options = parse(f"{paper}.eval", None, argv)
    folder, earlier = options.folder(paper), {}
    plots.FORMATS = ("png", "pdf") if options.pdf else ("png",)
    plots.OF = ", ".join(dict.fromkeys([paper, options.experiment, Path(config.dataset).name, folder.name]))
    with suppress(OSError, ValueError):  # an unreadable eval.json is written anew
        earlier = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    result = evaluate(options)
    origin = result["provenance"]
    if lost := earlier.get("metrics", {}).keys() - result["metrics"].keys():
        print(f"left out, where the evaluation before this one had them: {', '.join(sorted(lost))}")
    done = f"{origin['epochs']} of {result['config']['epochs']} epochs on {origin['data']}"
    print(f"{paper} {options.experiment}, seed {result['seed']}, {done}:")
    words = diff.glossary(paper)
    for name in filter(shown, result["metrics"]):
        what = ", ".join(filter(None, words.get(name, [])[:2]))
        print(f"  {name:<34}{result['metrics'][name]:<12.6g}{what}".rstrip())
    print(f"numbers in {folder / 'eval.json'}, pictures in {folder / 'figures'}")
    print("next: make diff" + ("" if options.runs == Path("runs") else f" RUNS={options.runs}"))
