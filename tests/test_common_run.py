"""A run on disk: configs, checkpoints, the log, the lock; what happens when any of it goes wrong."""

import dataclasses
import os
import platform
import re
import stat
import subprocess
import sys
import tomllib
import typing
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from common import run
from common.run import Count, NonNegative, Positive, RunFailed, UserError
from segma.train import Config
from tests.conftest import ROOT

# ------------------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class Small:
    size: Count = 3
    rate: Positive = 0.5
    weight: NonNegative = 0.0
    kind: typing.Literal["a", "b"] = "a"
    clip: Positive | None = None
    flag: bool = False


WRONG = [
    ({"sise": 3}, "unknown key 'sise'; did you mean size?"),
    ({"size": 0}, "size: 0 is out of range; allowed: >= 1"),
    ({"size": 2.5}, "size: expected int, found 2.5"),
    ({"size": True}, "size: expected int, found True"),
    ({"rate": 0.0}, "rate: 0.0 is out of range; allowed: > 0"),
    ({"rate": "fast"}, "rate: expected float, found 'fast'"),
    ({"rate": float("nan")}, "rate: nan is out of range"),
    ({"rate": float("inf")}, "rate: inf is out of range; allowed: > 0"),
    ({"weight": -1.0}, "weight: -1.0 is out of range"),
    ({"kind": 3}, "kind: 3 is not one of a, b"),
    ({"clip": [1]}, "clip: expected float, found [1]"),
    ({"flag": "yes"}, "flag: expected true or false, found 'yes'"),
    ({"rate": None}, "rate: expected float, found None"),
]


@pytest.mark.parametrize(("values", "complaint"), WRONG)
def test_wrong_values_are_refused_with_what_is_allowed(values, complaint):
    with pytest.raises(UserError) as error:
        run.make_config(Small, values, "x.yaml")
    assert str(error.value).startswith("x.yaml: ") and complaint in str(error.value)


def test_right_values_are_taken():
    config = run.make_config(Small, {"size": 7, "rate": 1, "kind": "b", "clip": 2.0, "flag": True}, "")
    assert config == Small(7, 1.0, 0.0, "b", 2.0, True) and type(config.rate) is float
    assert run.make_config(Small, {"rate": "3e-4"}, "").rate == 3e-4  # YAML reads it as text
    assert run.make_config(Small, {"clip": None}, "").clip is None
    words = {"size": "12", "clip": "none", "flag": "true"}  # as flags give them
    assert run.make_config(Small, words, "") == Small(12, clip=None, flag=True)


NOT_CONFIGS = [
    *("- 1\n- 2\n", "a: [1\n", "", "!!python/object/apply:os.system ['touch never']", "\x00", "a: &x [*x]", "a:\n\tb"),
    "size: 3\nrate: 0.1\nsize: 4\n",  # YAML takes the last
]


@pytest.mark.parametrize("content", NOT_CONFIGS)
def test_yaml_that_is_not_a_config(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        run.make_config(Small, run.read_yaml(path), str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert os.listdir() == ["x.yaml"]  # its command was not run


@pytest.mark.parametrize("path", sorted(ROOT.glob("*/configs/*.yaml")), ids=lambda p: f"{p.parts[-3]}-{p.stem}")
def test_every_config_is_complete_and_every_value_has_a_source(path):
    values = run.read_yaml(path)
    config = run.experiment_config(path.parent.parent.name, path.stem)
    assert set(values) == {f.name for f in dataclasses.fields(config)}
    lines = path.read_text().splitlines()
    assert re.match(r"# \S", lines[0])  # what `make` shows
    for line in lines[1:]:
        sources = r"Sec\.|Table|eq\.|eqs\.|appendix|authors' code|code of |Figure |\[1[01]\]|open repository|ours: "
        assert re.match(rf"\w+: \S+ +# .*({sources})", line), f"{path.name}: no source: {line}"


# ---------------------------------------------------------------------------------------------------------- randomness


def test_generators_differ_by_seed_and_purpose_and_repeat():
    def draw(*stream):
        return torch.rand(3, generator=run.generator(*stream)).tolist()

    assert draw(0, "order", 1) == draw(0, "order", 1)
    streams = [(0, "order", 1), (0, "order", 2), (1, "order", 1), (0, "labels"), (0, "order", "1")]
    assert len({tuple(draw(*stream)) for stream in streams}) == 5


# --------------------------------------------------------------------------------------------------------- checkpoints


def states(n: int = 3) -> list[dict]:
    return [{"step": i, "weights": torch.full((500,), float(i)), "names": ["a", None, 1.5]} for i in range(n)]


def test_a_checkpoint_comes_back_and_plain_torch_load_opens_it(tmp_path):
    path = tmp_path / "checkpoint.pt"
    assert run.load_checkpoint(path) is None
    for state in states():
        run.save_checkpoint(path, state)
    assert run.load_checkpoint(path)["step"] == 2 and [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert torch.equal(torch.load(path, weights_only=True)["weights"], torch.full((500,), 2.0))
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="checkpoint.pt: cannot be read"):  # and not: damaged
        run.load_checkpoint(path)


def test_a_checkpoint_is_at_most_a_minute_old(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: clock[0])
    with open_run(tmp_path) as r:
        r.resume(*one_layer(), 1000)
        for _ in range(130):  # steps of a second
            clock[0] += 1
            r.after_step({"loss": torch.tensor(1.0)})
            assert r.step - (run.load_checkpoint(r.path) or {"step": 0})["step"] <= 60


def test_a_power_cut_finds_the_old_checkpoint_or_the_new_one(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(stat.S_ISDIR(os.fstat(fd).st_mode)) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("renamed") or replace(*paths))
    run.save_checkpoint(tmp_path / "checkpoint.pt", states()[0])
    assert done == [False, "renamed", True]  # the file is on the disk, then its name


def test_options_reach_torch(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.set_num_threads(2)
    try:
        run.set_up(run.Options("digits", device="cpu", threads=1, deterministic=True))
        assert torch.get_num_threads() == 1 and torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_flags_of_a_run_find_it_again(tmp_path):
    moved = {"dataset": "folder:/a b"}
    options = run.Options("folder", seed=3, runs=tmp_path, changes={"n_labels": 50}, moved=moved)
    _, found = run.parse("segma.eval", None, ["folder", *options.flags()])
    assert found.folder("segma") == options.folder("segma") and found.moved == moved


def test_a_checkpoint_that_carries_code_does_not_run_it(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"step": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="damaged"):
        run.load_checkpoint(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("broken_call", ["os.replace", "os.fsync"])
def test_a_failing_disk_leaves_the_last_file_whole(tmp_path, monkeypatch, broken_call):
    path = tmp_path / "checkpoint.pt"
    first, second, _ = states()
    run.save_checkpoint(path, first)

    def full(*a, **k):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(broken_call, full)
    with pytest.raises(OSError) as error:
        run.save_checkpoint(path, second)
    assert error.value.filename == str(path)
    monkeypatch.undo()
    assert run.load_checkpoint(path)["step"] == 0
    assert not list(tmp_path.glob(".*part"))


def test_atomic_leaves_nothing_behind_when_the_writer_fails(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    with pytest.raises(ZeroDivisionError), run.atomic(path) as file:
        file.write("half")
        1 / 0  # noqa: B018
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["a.txt"]


# --------------------------------------------------------------------------------------------------------------- a run

DATA = {"data": "digits", "data_digest": "x", "data_official": True, "train_images": 1, "test_images": 1}


def open_run(tmp_path, config=None, **options) -> run.Run:
    options = run.Options("digits", runs=tmp_path, **options)
    return run.Run("segma", config or Config(epochs=3), options, DATA, torch.device("cpu"))


def one_layer():
    network = torch.nn.Linear(2, 2)
    return network, {"adam": torch.optim.Adam(network.parameters())}


def test_without_a_terminal_a_line_every_few_seconds(tmp_path, monkeypatch, capsys):
    clock = [1000.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: clock[0])
    with open_run(tmp_path, config=Config(epochs=150), save_every=1e9) as r:
        r.resume(*one_layer(), 2)
        capsys.readouterr()
        for _ in range(150):  # of a quarter of a second each
            for _ in range(2):
                clock[0] += 0.125
                r.after_step({"loss": torch.tensor(1.0)})
            r.after_epoch()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[3] for line in lines] == ["1/150", *(f"{e}/150" for e in range(22, 150, 21)), "150/150"]
    with open_run(tmp_path / "long", config=Config(epochs=1), save_every=1e9) as r:
        r.resume(*one_layer(), 10)
        capsys.readouterr()
        for _ in range(9):  # of nine seconds each
            clock[0] += 9
            r.after_step({"loss": torch.tensor(1.0)})
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == ["3/10", "6/10", "9/10"]


def test_openmp_threads_spin_briefly_unless_the_person_has_said_how_they_wait():
    show = [sys.executable, "-c", "import common, os; print(os.environ.get('GOMP_SPINCOUNT'))"]
    for own, found in (({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")):
        bare = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
        assert subprocess.check_output(show, cwd=run.ROOT, env=bare | own, text=True).strip() == found


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept_for_the_next_step():
    """Fifty times 64 MiB, filled and freed: 16,384 new pages each time, or only the first few times."""
    faults = "resource.getrusage(resource.RUSAGE_SELF).ru_minflt"
    pages = "import ctypes\nctypes.CDLL(None).prctl(41, 1, 0, 0, 0)\n"  # PR_SET_THP_DISABLE: 4 KiB, not 2 MiB
    fill = f"import common, resource, torch\nn = {faults}\nfor _ in range(50): torch.ones(2**24)\nprint({faults} - n)"
    for own, kept in (({}, True), ({"MALLOC_TRIM_THRESHOLD_": "100000"}, False)):
        env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | own
        found = int(subprocess.check_output([sys.executable, "-c", pages + fill], cwd=run.ROOT, env=env))
        assert (found < 400_000) == kept


def test_the_package_ships_every_config_and_number():
    """What pyproject.toml's patterns match is every file that a command reads."""
    setup = tomllib.loads((run.ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = [f"{package}/{pattern}" for package in setup["packages"] for pattern in setup["package-data"]["*"]]
    shipped = {str(path.relative_to(run.ROOT)) for pattern in patterns for path in run.ROOT.glob(pattern)}
    tracked = subprocess.check_output(["git", "ls-files", *setup["packages"]], cwd=run.ROOT, text=True).split()
    assert shipped >= {file for file in tracked if file.endswith((".yaml", ".csv", ".json"))}
    assert {f.split("/")[0] for f in tracked if f.endswith(".py")} == set(setup["packages"])


def test_steps_that_are_not_finite_stop_the_run_and_keep_the_last_good_checkpoint(tmp_path):
    model, optimizers = one_layer()
    with open_run(tmp_path) as r:
        r.resume(model, optimizers, 10)
        for _ in range(4):
            r.after_step({"loss": torch.tensor(1.0), "grad_norm": torch.tensor(2.0)})
        r.save()
        good = r.path.read_bytes()
        r.after_step({"loss": torch.tensor(1.0), "grad_norm": torch.tensor(float("inf"))})
        r.after_step({"loss": torch.tensor(float("nan")), "grad_norm": torch.tensor(1.0)})
        for close in (r.save, r.after_epoch, r.finish):
            with pytest.raises(RunFailed, match="not finite, first at step 5; the last good checkpoint is kept"):
                close()
        assert r.path.read_bytes() == good


def test_the_log_has_the_first_epoch_at_once_and_is_never_behind_a_checkpoint(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: clock[0])

    def epochs_logged() -> int:
        return len((r.folder / "log.csv").read_text().splitlines()) - 1

    with open_run(tmp_path, config=Config(epochs=9), save_every=1e9) as r:
        r.resume(*one_layer(), 1)
        logged = []
        for seconds in (0.1, 0.1, 0.1, 5.1, 0.1):
            clock[0] += seconds
            r.after_step({"loss": torch.tensor(1.0)})
            r.after_epoch()
            logged.append(epochs_logged())
        assert logged == [1, 1, 1, 4, 4]
        r.save()
        assert epochs_logged() == 5 and [row["seconds"] for row in r.rows] == pytest.approx([0.1, 0.1, 0.1, 5.1, 0.1])
    clock[0] += 100  # between the sessions; each epoch's mean is over its steps
    with open_run(tmp_path, config=Config(epochs=9)) as r:
        r.resume(*one_layer(), 2)
        for loss in (1.0, 4.0):
            clock[0] += 1
            r.after_step({"loss": torch.tensor(loss)})
        r.after_epoch()
        r.finish()
        state = run.load_checkpoint(r.path)
    assert state["seconds"] == pytest.approx(7.5)
    assert state["rows"][-1] == {"epoch": 6, "loss": 2.5, "seconds": pytest.approx(2)}


def test_a_folder_made_otherwise_is_refused_with_the_difference(tmp_path):
    model, optimizers = one_layer()
    with open_run(tmp_path) as r:
        r.resume(model, optimizers, 1)
        r.after_step({"loss": torch.tensor(1.0)})
        r.after_epoch()
        r.finish()
    before = (r.folder / "config.yaml").read_text(), r.path.read_bytes(), (r.folder / "log.csv").read_text()
    for changes, complaint in (
        ({"config": Config(epochs=3, learning_rate=0.1)}, "--learning-rate: 0.0003 there, 0.1 asked for"),
        ({"precision": "bf16"}, "--precision: 'fp32' there, 'bf16' asked for"),
    ):
        with open_run(tmp_path, **changes) as other, pytest.raises(UserError, match=complaint):
            other.resume(*one_layer(), 1)
    data = DATA | {"data_digest": "y"}
    other = run.Run("segma", Config(epochs=3), run.Options("digits", runs=tmp_path), data, torch.device("cpu"))
    with other, pytest.raises(UserError, match="data_digest: 'x' there, 'y' asked for"):
        other.resume(*one_layer(), 1)
    assert before == ((r.folder / "config.yaml").read_text(), r.path.read_bytes(), (r.folder / "log.csv").read_text())
    with open_run(tmp_path, config=Config(epochs=9)) as grown:  # epochs may grow
        grown.resume(*one_layer(), 1)
        assert grown.epoch == 1
        grown.after_step({"loss": torch.tensor(1.0)})
        grown.after_epoch()
        grown.finish()
    shrunk = open_run(tmp_path, config=Config(epochs=1))
    with shrunk, pytest.raises(UserError, match="2 epochs are done, 1 asked for"):
        shrunk.resume(*one_layer(), 1)


def test_a_field_added_later_leaves_old_runs_as_they_were(tmp_path):
    model, optimizers = one_layer()
    with open_run(tmp_path) as r:
        r.resume(model, optimizers, 1)
        r.after_step({"loss": torch.tensor(1.0)})
        r.save()
    state = run.load_checkpoint(r.path)
    del state["config"]["loss_over"]  # as if the run were older than the field
    run.save_checkpoint(r.path, state)
    with open_run(tmp_path) as again:
        again.resume(model, optimizers, 1)
        assert again.step == 1
    state["config"]["of_another_version"] = 3
    run.save_checkpoint(r.path, state)
    with open_run(tmp_path) as other, pytest.raises(UserError, match="a field unknown here"):
        other.resume(model, optimizers, 1)
    del state["config"]["of_another_version"]
    state["weights"] = {f"module.{name}": value for name, value in state["weights"].items()}
    run.save_checkpoint(r.path, state)
    with open_run(tmp_path) as other, pytest.raises(UserError, match="not this system's weights"):
        other.resume(model, optimizers, 1)


@pytest.mark.parametrize(
    ("dirty", "official", "said"),
    [(False, True, ""), (True, True, "has changes"), (None, True, "git does not"), (False, False, "not the official")],
)
def test_a_run_that_can_become_no_reference_says_so_at_its_start(tmp_path, monkeypatch, capsys, dirty, official, said):
    monkeypatch.setattr(run, "git_state", lambda: ("a" if dirty is not None else None, dirty))
    data = DATA | {"data_official": official}
    options = run.Options("digits", runs=tmp_path)
    with run.Run("segma", Config(epochs=3), options, data, torch.device("cpu")) as r:
        r.resume(*one_layer(), 1)
    out = capsys.readouterr().out
    assert ("no reference result" in out) == bool(said) and said in out


def test_results_that_are_collected_do_not_make_the_tree_dirty(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=b", *words], cwd=tmp_path, check=True)

    git("init", "-q")
    for name in ("segma/train.py", "segma/README.md", "segma/results/mnist.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    git("add", "-A")
    git("commit", "-qm", "first")
    monkeypatch.setattr(run, "ROOT", tmp_path.resolve())
    (tmp_path / "segma/README.md").write_text("collected")
    (tmp_path / "segma/results/digits.json").write_text("collected")
    assert run.git_state()[1] is False
    for name in ("segma/new.py", "segma/configs/new.yaml"):  # git does not know them yet
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
        assert run.git_state()[1] is True, name
        (tmp_path / name).unlink()
    (tmp_path / "segma/train.py").write_text("changed")
    assert run.git_state()[1] is True
    monkeypatch.setattr(run, "ROOT", tmp_path.resolve() / "segma")  # inside another repository
    assert run.git_state() == (None, None)


def test_a_run_that_was_once_dirty_stays_so(tmp_path, monkeypatch):
    for state in (("a", True), ("b", False)):
        monkeypatch.setattr(run, "git_state", lambda state=state: state)
        with open_run(tmp_path) as r:
            r.resume(*one_layer(), 9)
            r.after_step({"loss": torch.tensor(1.0)})
            r.save()
    found = run.provenance(run.load_checkpoint(r.path))
    assert found["git_dirty"] is True and found["git_commits"] == ["a", "b"]


def test_provenance_names_every_commit_and_any_dirty_tree():
    session = {"torch": "2", "device": "x"}
    state = {
        "identity": {"paper": "segma", "experiment": "digits", "seed": 0, "precision": "bf16", "data_digest": "d"},
        "sessions": [session | {"git_commit": c, "git_dirty": d} for c, d in (("a", False), ("a", True), ("b", False))],
        "weights": {"layer": torch.ones(2)},
        "seconds": 12.34,
        "epoch": 7,
        "step": 3,
    }
    found = run.provenance(state)
    assert found["git_commit"] == "b" and found["git_commits"] == ["a", "b"] and found["git_dirty"] is True
    assert found["precision"] == "bf16" and found["epochs"] == 7 and found["training_seconds"] == 12.3
    assert found["device"] == "x" and found["steps_beyond"] == 3
    last = session | {"device": "y", "git_commit": "b", "git_dirty": False}
    moved = run.provenance(state | {"sessions": [*state["sessions"], last]})
    assert moved["device"] == ["x", "y"]
    unknown = session | {"git_commit": None, "git_dirty": None}
    assert run.provenance(state | {"sessions": [unknown]})["git_dirty"] is True
    other = run.provenance(state | {"weights": {"layer": torch.zeros(2)}})
    assert found["weights"] == moved["weights"] != other["weights"] and len(found["weights"]) == 16
