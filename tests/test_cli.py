"""The command lines as a person types them: help, mistakes, kills, a full disk, make."""

import csv
import importlib
import itertools
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from common import diff, run
from segma import eval as segma_eval
from segma import m1m2
from segma import train as segma_train
from tests.conftest import ROOT, TINY, TINY_FOLDER, call, run_command
from tests.torture import assert_same

RUN = ["segma.train", "digits", *TINY]


def checkpoint(runs) -> dict:
    return torch.load(runs / TINY_FOLDER / "checkpoint.pt", weights_only=True)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    runs = tmp_path_factory.mktemp("uninterrupted")
    code, _, err = run_command(*RUN, "--epochs", "60", "--runs", runs)
    assert code == 0, err
    return runs


@pytest.mark.parametrize(("number", "code", "word"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")])
def test_ctrl_c_and_sigterm_save_and_lose_nothing(uninterrupted, tmp_path, capsys, monkeypatch, number, code, word):
    arguments, count, step = [*RUN[1:], "--epochs", "60", "--runs", tmp_path], itertools.count(1), run.Run.after_step

    def with_signal(self, losses):
        if next(count) == 33:
            os.kill(os.getpid(), number)
        step(self, losses)

    monkeypatch.setattr(run.Run, "after_step", with_signal)
    found, _, err = call(segma_train.main, *arguments, capsys=capsys)
    assert found == code and f"{word}: saved after epoch 2, step 5;" in err and err.count("\n") == 1
    assert checkpoint(tmp_path)["total_steps"] == 33
    found, out, err = call(segma_train.main, *arguments, capsys=capsys)
    assert found == 0 and "60 epochs of 14 steps, from epoch 3, step 5 on" in out, err
    assert_same(checkpoint(tmp_path), checkpoint(uninterrupted))
    assert "complete, 60 epochs done" in call(segma_train.main, *arguments, capsys=capsys)[1]


def test_killed_between_the_last_step_and_the_end(tmp_path, monkeypatch):
    """What is left is to close the epoch, without a step: that too is saved."""
    options = run.Options("digits", runs=tmp_path, save_every=0.0, device="cpu", threads=1, changes={"hidden_dim": 32})
    config = run.experiment_config("segma", "digits", {"epochs": 2, "hidden_dim": 8})
    real = run.Run.after_epoch

    def killed(self, **more):
        if self.epoch == 1:
            raise MemoryError
        real(self, **more)

    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "after_epoch", killed)
        with pytest.raises(MemoryError):
            segma_train.train(config, options)
    assert (checkpoint(tmp_path)["epoch"], checkpoint(tmp_path)["step"]) == (1, 14)
    for _ in range(2):
        segma_train.train(config, options)
        found = checkpoint(tmp_path)
        assert (found["epoch"], found["step"], found["total_steps"], len(found["rows"])) == (2, 0, 28, 2)


def test_a_full_disk_while_saving_keeps_the_last_checkpoint(uninterrupted, tmp_path, capsys):
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    before = (tmp_path / TINY_FOLDER / "checkpoint.pt").read_bytes()

    def no_room():  # no file may grow beyond 20 kB: the log still fits, the checkpoint does not
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    code, _, err = run_command(*RUN, "--epochs", "61", "--runs", tmp_path, "--save-every", "0", preexec_fn=no_room)
    assert code == 1 and err.startswith("failed: ") and "checkpoint.pt: File too large" in err and "intact" in err
    assert err.count("\n") == 1
    assert (tmp_path / TINY_FOLDER / "checkpoint.pt").read_bytes() == before
    assert not list((tmp_path / TINY_FOLDER).glob(".*part"))
    code, _, err = call(segma_train.main, *RUN[1:], "--epochs", "61", "--runs", tmp_path, capsys=capsys)
    assert code == 0, err


def test_a_loss_that_is_not_finite_names_the_step(tmp_path, capsys):
    large = ["--learning-rate", "1e30", "--grad-clip-norm", "none"]
    code, _, err = call(segma_train.main, *RUN[1:], "--runs", tmp_path, "--epochs", "2", *large, capsys=capsys)
    assert code == 1 and "not finite, first at step 2; nothing was saved" in err


MISTAKES = [
    (["mnits"], "unknown experiment 'mnits'; did you mean mnist?"),
    (["digits", "--learing-rate", "1"], "unknown argument '--learing-rate'; did you mean --learning-rate?"),
    (["digits", "--epocs=3"], "unknown argument '--epocs=3'; did you mean --epochs?"),
    (["digits", "--epochs", "0"], "--epochs: 0 is out of range; allowed: >= 1"),
    (["digits", "--epochs", "many"], "--epochs: expected int, found 'many'"),
    (["digits", "--labels", "frist"], "--labels: 'frist' is not one of random, stratified, first"),
    (["digits", "--precision", "fp16"], "--precision: 'fp16' is not one of fp32, bf16"),
    (["digits", "--seed", "-1"], "--seed: -1 is out of range"),
    (["digits", "--device", "tpu"], "--device: 'tpu' is not one of auto, cpu, cuda"),
    (["digits", "extra"], "unknown argument 'extra'"),
    ([], "the following arguments are required: experiment"),
    (["digits", "--n-labels", "5000"], "--n-labels: 5000 labels asked for, but the training set has 1437"),
    (["digits", "--n-labels", "11"], "has none of class"),
    (["digits", "--n-components", "7"], "--n-components: 7 cannot stand for the 10 classes"),
    (["digits", "--save-every", "nan"], "--save-every: nan is out of range"),
    (["digits", "--batch-unlabelled", "2000"], "--batch-unlabelled: 2000 is more than the 1437 training images"),
    (["mnist", "--data", "/nonexistent/folder"], "mnist: no data in /nonexistent/folder/MNIST/raw"),
    (["svhn", "--data", "/nonexistent/folder"], "svhn_extra: no data in /nonexistent/folder/SVHN"),
    (["digits-m1m2"], "digits-m1m2 is trained by python -m segma.m1m2, not by segma.train"),
    (["folder", "--dataset", "folder"], "--dataset: 'folder' is not one of digits, mnist"),
    (["folder", "--dataset", "folder:/nonexistent"], "/nonexistent"),
]


@pytest.mark.parametrize(("arguments", "complaint"), MISTAKES, ids=[" ".join(a) or "nothing" for a, _ in MISTAKES])
def test_mistakes_get_one_line_and_code_2(arguments, complaint, tmp_path, capsys, monkeypatch):
    def no_network(*a, **k):
        raise URLError("network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    if "/nonexistent/folder" in arguments:  # somewhere that cannot be made, whoever runs the test
        (tmp_path / "file").write_text("")
        arguments = [str(tmp_path / "file") if a == "/nonexistent/folder" else a for a in arguments]
        complaint = complaint.replace("/nonexistent/folder", str(tmp_path / "file"))
    code, out, err = call(segma_train.main, *arguments, "--runs", tmp_path / "runs", capsys=capsys)
    assert code == 2 and err.startswith("error: ") and complaint in err and err.count("\n") == 1
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("*.*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_asked_for_and_absent(tmp_path, capsys):
    code, _, err = call(segma_train.main, "digits", "--device", "cuda", "--runs", tmp_path, capsys=capsys)
    assert code == 2 and "--device: cuda asked for, but this machine has 0 CUDA devices. Use --device cpu" in err


def test_folders_that_cannot_be_made_and_runs_that_are_not_there(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for main, experiment, runs, complaint in (
        (segma_train.main, "digits", "file", "cannot be written"),
        (segma_eval.main, "digits", ".", "no trained run here"),
        (segma_eval.main, "digitz", ".", "did you mean digits"),
    ):
        code, _, err = call(main, experiment, "--runs", tmp_path / runs, capsys=capsys)
        assert code == 2 and complaint in err and err.count("\n") == 1


def test_a_mistake_on_the_real_command_line_prints_no_traceback():
    code, out, err = run_command("segma.train", "digits", "--learing-rate", "1")
    assert code == 2 and out == "" and err.count("\n") == 1 and "Traceback" not in err
    code, out, _ = run_command("segma.train", "--help")
    assert code == 0 and "--learning-rate" in out and "--seed" in out


def test_describe_needs_no_data_and_a_baseline_is_a_command_of_its_own(tmp_path, capsys):
    code, out, _ = call(segma_train.main, "mnist", "--describe", "--data", "/nonexistent", capsys=capsys)
    assert code == 0 and "total: 3,728,254 parameters" in out and "dataset: mnist" in out
    assert "Linear(in_features=784, out_features=1024, bias=True)" in out
    for name in ("digits", "digits-m1m2"):
        code, out, err = call(m1m2.main, name, "--describe", "--json", "--runs", tmp_path, capsys=capsys)
        assert code == 0 and json.loads(out)["config"]["m1_epochs"] == 200, err
    code, _, err = call(m1m2.main, "digits", "--m1-epochs", "500", capsys=capsys)
    assert code == 2 and "--m1-epochs: 500 of 500 epochs leave none for M2" in err


def test_there_is_one_config_class(tmp_path):
    """Run as a program, train.py is imported once more under its own name: the class must be that one."""
    check = """
import runpy, sys
import common.run, segma.train
common.run.start = lambda program, cls, *rest: print(cls is segma.train.Config)
sys.argv = ["train", "digits"]
runpy.run_module("segma.train", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_a_screen_without_greek_letters(tmp_path):
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    code, _, err = run_command("segma.train", "--help", env=environment, encoding="latin-1")
    assert code == 0, err
    code, _, err = run_command(*RUN, "--epochs", "1", "--runs", tmp_path / "α", env=environment, encoding="latin-1")
    assert code == 0, err


def test_with_standard_error_closed_a_run_goes_on_and_a_mistake_has_its_code(tmp_path):
    for more, code in (([], 0), (["--learning-rate", "0"], 2)):
        arguments = ["-m", *RUN, "--epochs", "1", "--runs", str(tmp_path), *more]
        closed = ["sh", "-c", 'exec "$0" "$@" 2>&-', sys.executable, *arguments]
        assert subprocess.run(closed, cwd=ROOT, capture_output=True).returncode == code
    assert checkpoint(tmp_path)["epoch"] == 1


def test_a_slice_of_mnist_from_files_to_diff(data_root, tmp_path, capsys, monkeypatch):
    """Other readings and bf16 on real images, 2,000 of them: not MNIST any more, and every table says so."""
    monkeypatch.setenv("COLUMNS", "400")
    folder = tmp_path / "data/MNIST/raw"
    folder.mkdir(parents=True)
    for prefix, n in (("train", 2000), ("t10k", 500)):
        for kind, size, head in (("images-idx3", 784, 16), ("labels-idx1", 1, 8)):
            content = (data_root / f"MNIST/raw/{prefix}-{kind}-ubyte").read_bytes()
            header = content[:4] + n.to_bytes(4, "big") + content[8:head]
            (folder / f"{prefix}-{kind}-ubyte").write_bytes(header + content[head : head + n * size])
    where = ["mnist", "--data", tmp_path / "data", "--runs", tmp_path / "runs", "--threads", "1"]
    assert call(segma_train.main, *where, capsys=capsys)[0] == 2  # not the official files
    other = ["--labels", "stratified", "--loss-over", "all", "--hidden-dim", "64"]
    how = ["--precision", "bf16", "--epochs", "2", "--unofficial-data"]
    code, out, err = call(segma_train.main, *where, *other, *how, capsys=capsys)
    assert code == 0 and "epoch 2/2" in out, err
    code, out, err = call(segma_eval.main, *where, *other, "--unofficial-data", capsys=capsys)
    assert code == 0 and "FID left out: mnist has fewer images" in out, err
    code, out, err = call(diff.main, "show", "--experiment", "mnist", "--runs", tmp_path / "runs", capsys=capsys)
    assert code == 0 and "not comparable: another config (labels stratified, hidden_dim 64, loss_over all)" in out, err


@pytest.mark.parametrize(
    ("paper", "experiment"),
    [("segma", "digits"), ("gmgan", "toy"), ("gan_responsibility", "toy"), ("amm", "digits")],
)
def test_a_run_stopped_in_its_first_epoch_is_evaluated(paper, experiment, tmp_path, capsys, monkeypatch):
    step = run.Run.after_step

    def stopped(self, losses):
        os.kill(os.getpid(), signal.SIGTERM)
        step(self, losses)

    monkeypatch.setattr(run.Run, "after_step", stopped)
    arguments = [experiment, "--runs", tmp_path, "--threads", "1"]
    module = {kind: importlib.import_module(f"{paper}.{kind}") for kind in ("train", "eval")}
    assert call(module["train"].main, *arguments, capsys=capsys)[0] == 143
    code, out, err = call(module["eval"].main, *arguments, capsys=capsys)
    assert code == 0 and "0 of " in out, err
    (folder,) = tmp_path.glob(f"{paper}/*/*")
    assert (folder / "figures/samples.png").exists() and not (folder / "figures/training.png").exists()
    code, out, err = call(diff.main, "show", paper, "--runs", tmp_path, capsys=capsys)
    assert code == 0 and "not comparable" in out, err


def test_numbers_that_an_evaluation_cannot_make_again_are_named(tmp_path, capsys, monkeypatch):
    state = {"sessions": [run.session(torch.device("cpu"))], "weights": {}, "seconds": 1.0, "epoch": 1, "step": 0}
    state["identity"] = {"paper": "segma", "experiment": "digits", "seed": 0, "data": "digits"}
    config = run.experiment_config("segma", "digits")
    (folder := tmp_path / "segma/digits/seed0").mkdir(parents=True)
    (folder / "eval.json").write_text('{"metrics": {"error": 1.0, "fid": 9.0}}')
    monkeypatch.setattr(run, "git_state", lambda: ("of today", True))

    def evaluate(options):
        return run.record(config, state, {"error": 2.0}, torch.device("cpu"))

    code, out, err = call(
        lambda argv: run.evaluate_from("segma", evaluate, argv), "digits", "--runs", tmp_path, capsys=capsys
    )
    assert code == 0 and "left out, where the evaluation before this one had them: fid\n" in out, err
    made = evaluate(None)["provenance"]["evaluation"]
    assert (made["git_commit"], made["git_dirty"]) == ("of today", True)  # and not of the training


def test_a_folder_of_images_may_move(tmp_path, capsys):
    pixels = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (tmp_path / "here" / name).mkdir(parents=True)
        for i in range(20):
            Image.fromarray(pixels.integers(0, 256, (28, 28, 3), np.uint8)).save(tmp_path / f"here/{name}/{i}.png")
    how = ["--n-labels", "10", "--batch-unlabelled", "10", "--batch-labelled", "4"]
    how = [*how, "--runs", tmp_path / "runs", "--threads", "1", "--hidden-dim", "16"]
    here, there = (f"folder:{tmp_path / place}" for place in ("here", "there"))
    code, _, err = call(segma_train.main, "folder", "--dataset", here, *how, "--epochs", "1", capsys=capsys)
    assert code == 0, err
    (tmp_path / "here").rename(tmp_path / "there")
    code, out, err = call(segma_train.main, "folder", "--dataset", there, *how, "--epochs", "2", capsys=capsys)
    assert code == 0 and "from epoch 2, step 0 on" in out, err
    assert call(segma_eval.main, "folder", "--dataset", there, *how, capsys=capsys)[0] == 0
    (tmp_path / "there/cats/0.png").unlink()  # other images are other data
    code, _, err = call(segma_eval.main, "folder", "--dataset", there, *how, capsys=capsys)
    assert code == 2 and "trained on folder:there with digest" in err and err.count("\n") == 1


def test_tensorboard_has_the_numbers_of_the_log_each_epoch_once(tmp_path):
    """Also after a power cut: epochs 2 and 3 were written for TensorBoard, but the checkpoint is that of epoch 1."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard here")
    folder, how = tmp_path / TINY_FOLDER, ["--runs", tmp_path, "--tensorboard"]
    assert run_command(*RUN, *how, "--epochs", "1")[0] == 0
    shutil.copy(folder / "checkpoint.pt", tmp_path)
    assert run_command(*RUN, *how, "--epochs", "3")[0] == 0
    shutil.copy(tmp_path / "checkpoint.pt", folder)
    assert run_command(*RUN, *how, "--epochs", "3")[0] == 0
    with open(folder / "log.csv") as file:
        rows = list(csv.DictReader(file))
    board = events.EventAccumulator(str(folder / "tensorboard")).Reload()
    assert len(rows) == 3 and {*board.Tags()["scalars"], "epoch"} == rows[0].keys()
    for name in board.Tags()["scalars"]:
        found = {event.step: event.value for event in board.Scalars(name)}
        assert len(board.Scalars(name)) == 3
        assert found == pytest.approx({int(row["epoch"]): float(row[name]) for row in rows}, rel=1e-6)  # float32


def make(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "DATA")}
    environment["COLUMNS"] = "400"  # no line of a table is wrapped
    return subprocess.run(["make", *arguments], cwd=cwd, capture_output=True, text=True, env=environment)


def test_make_alone_lists_every_target():
    out = make().stdout
    for path in ROOT.glob("*/configs/*.yaml"):
        assert f"make {path.parent.parent.name}-{path.stem} " in out
    for target in ("setup", "test", "torture", "bench", "diff", "results", "pending", "clean"):
        assert f"make {target} " in out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["segma-digits", "EPOCH=1"], "unknown variable EPOCH; did you mean EPOCHS?"),
        (["segma-digits", "SEED=3"], "unknown variable SEED; did you mean SEEDS?"),
        (["segma-digits", "SEEDS=0,1"], 'expected whole numbers between spaces, as SEEDS="0 1 2"'),
        (["segma-digits", "SEEDS="], 'expected whole numbers between spaces, as SEEDS="0 1 2"'),
        (["segma-mnits"], "there is no target segma-mnits; did you mean segma-mnist? (make alone lists all)"),
        (["bench-segma"], "there is no target bench-segma; did you mean bench-segma-"),
        (["diff", "PYTHON=/bin/false"], "PYTHON=/bin/false cannot import torch and torchvision; install"),
    ],
)
def test_make_answers_a_mistake_in_one_line(arguments, complaint):
    done = make(*arguments)
    assert done.returncode == 2 and complaint in done.stderr and done.stdout == ""


def test_make_and_a_paper_lists_its_experiments():
    out = make("segma").stdout
    assert all(f"make segma-{name} " in out for name in run.experiments("segma")) and "make gmgan" not in out


def test_a_new_yaml_file_is_a_new_target(tmp_path):
    subprocess.run(["cp", "-r", "Makefile", "segma", tmp_path], cwd=ROOT, check=True)
    (tmp_path / "segma/configs/my-own.yaml").write_text("# Something of mine.\n")
    out = subprocess.run(["make"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "make segma-my-own" in out and "Something of mine." in out


def test_a_line_of_make_pending_trains_and_evaluates_with_the_flags_that_make_was_given(checkout):
    """FLAGS and DATASET with quotes and spaces in them come through; the line itself runs in a shell."""
    pending, how = ("pending", "COMMANDS=1", f"PYTHON={sys.executable}"), ("EPOCHS=1", "THREADS=1", "PRECISION=bf16")
    done = make(*pending, *how, "UNOFFICIAL=1", "FLAGS=--hidden-dim 32 --save-every '9'", cwd=checkout)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and not done.stderr, done.stderr
    subprocess.run(lines[1], shell=True, cwd=checkout, check=True, capture_output=True)
    made = json.loads((checkout / "runs/segma/digits/seed1-hidden-dim-32/eval.json").read_text())
    assert (made["seed"], made["config"]["hidden_dim"], made["config"]["epochs"]) == (1, 32, 1)
    assert made["provenance"]["precision"] == "bf16" and made["provenance"]["epochs"] == 1
    done = make(*pending, "DATASET=folder:/my own", "UNOFFICIAL=1", "FLAGS=--precision bf16", cwd=checkout)
    given = " digits --seed 1 --unofficial-data --dataset 'folder:/my own' --precision bf16 --data"
    assert all(given in half for half in done.stdout.splitlines()[1].split("&&"))


def test_make_trains_evaluates_and_prints_the_diff(tmp_path):
    """Two seeds at once, by make's own -j; the table comes when both are there."""
    how = ["EPOCHS=1", "SEEDS=4 5", f"RUNS={tmp_path}", "THREADS=1", "FLAGS=--hidden-dim 32"]
    done = make("-j2", "segma-digits", f"PYTHON={sys.executable}", *how)
    assert done.returncode == 0, done.stderr
    for seed in (4, 5):
        assert (tmp_path / f"segma/digits/seed{seed}-hidden-dim-32/eval.json").exists()
    table = done.stdout.rindex("reference")  # a head of the table
    assert "not comparable: another config (hidden_dim 32)" in done.stdout and done.stdout.rindex("numbers in") < table


OWN = {  # program, experiment -> flags of one's own; words of the answer for two classes of 12 images, and for one
    "segma.train folder": (
        "--hidden-dim 16",
        "--n-labels --labels --batch-unlabelled",
        "--label-weight --batch-unlabelled",
    ),
    "segma.adgm digits-adgm": ("--n-components null --hidden-dim 16", "--n-labels --labels --batch-unlabelled", ""),
    "gmgan.train digits": ("--n-classes 9 --width 4 --cluster-samples 50", "--n-classes --batch-real", ""),
    "gan_responsibility.train digits": ("--batch 64 --n-components null", "--batch", "--n-components --batch"),
    "amm.train digits": ("", "--validation --batch", "--validation --batch"),
    "amm.train samm-digits": (
        "",
        "--n-components --validation --batch --n-labels --labels",
        "--semi-supervised --n-labels --labels --validation --batch",
    ),
}


@pytest.mark.parametrize("classes", ["old boxes,Äpfel $1", "old boxes"])
@pytest.mark.parametrize("program", OWN)
def test_a_few_images_of_one_s_own_in_two_tries(program, classes, tmp_path, capsys, monkeypatch):
    """The refusal names every flag that is needed; with these the run is trained and evaluated. Or it says why not."""
    for name in ("SAMPLES", "CURVE_SAMPLES"):  # of GM-GAN's scores, which take a minute
        monkeypatch.setattr(f"gmgan.eval.{name}", 100)
    own, *expected = OWN[program]
    expected, noise = expected["," not in classes].split(), np.random.default_rng(0)
    for name in classes.split(","):
        (tmp_path / "my images" / name).mkdir(parents=True)
        for i in range(12):
            mode, size = (("RGB", 50), ("L", 31), ("RGBA", 64))[i % 3]
            image = Image.fromarray(noise.integers(0, 256, (size, size + 9, 3), np.uint8)).convert(mode)
            image.save(tmp_path / "my images" / name / f"ü {i} $.png")
    module, experiment = program.split()
    paper, where = module.split(".")[0], ["--runs", str(tmp_path / "runs"), "--threads", "1", "--device", "cpu"]
    arguments = [experiment, "--dataset", f"folder:{tmp_path / 'my images'}", *own.split(), *where]
    main = importlib.import_module(module).main
    code, _, err = call(main, *arguments, "--epochs", "1", capsys=capsys)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    fits = shlex.split(err.partition("What fits: ")[2])
    assert [word for word in fits if word.startswith("--")] == expected
    if not expected:
        assert "1 class" in err and "at least 2" in err
        return
    code, out, err = call(main, *arguments, *fits, "--epochs", "1", capsys=capsys)
    assert code == 0 and "trained 1 epochs" in out, err
    code, out, err = call(importlib.import_module(f"{paper}.eval").main, *arguments, *fits, capsys=capsys)
    assert code == 0 and "numbers in" in out, err
