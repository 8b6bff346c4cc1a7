"""common/graph.py: a replayed step does what the step does, in every paper's own loop.

Without a GPU what records is replaced by what runs the step again on the recording's own batch: all but CUDA's part
is tested.
"""

import importlib
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from common import data, graph, run
from tests.conftest import call, run_command

LOOPS = [  # program, flags (one epoch, if they do not say), how many recordings a run makes
    ("segma.train", ["digits", "--batch-unlabelled", "10", "--n-labels", "20"], 1),
    ("segma.m1m2", ["digits", "--batch-unlabelled", "10", "--n-labels", "20", "--m1-epochs", "1", "--epochs", "2"], 2),
    ("segma.adgm", ["digits", "--batch-unlabelled", "10", "--n-labels", "20", "--hidden-dim", "20"], 1),
    ("gmgan.train", ["toy-supervised", "--batch-real", "800", "--width", "16"], 1),
    ("gmgan.acgan", ["toy", "--batch-real", "800", "--width", "16"], 1),
    ("gmgan.train", ["digits", "--batch-real", "10", "--batch-fake", "20", "--width", "4"], 1),
    ("gmgan.kmeans", ["digits", "--batch-real", "10"], 1),
    ("gan_responsibility.train", ["digits", "--batch", "10", "--n-components", "2", "--latent-dim", "4"], 1),
    ("gan_responsibility.gan", ["flowers10", "--dataset", "digits", "--batch", "10", "--latent-dim", "4"], 1),
    ("amm.train", ["digits", "--batch", "10", "--validation", "2"], 1),
    ("amm.train", ["samm-digits", "--batch", "10", "--validation", "2", "--n-labels", "20"], 1),
]
in_every_loop = pytest.mark.parametrize(
    ("program", "flags", "count"), LOOPS, ids=lambda v: v[0] if isinstance(v, list) else str(v)
)
STEPS = 6  # of an epoch; four images more are left, which two of the loops take as a smaller batch


def trained(program: str, flags: list[str], folder, wanted: bool) -> dict:
    """The checkpoint of a run on a few of the digits."""
    whole, n = data.load("digits", folder), 10 * STEPS + 4
    few = {"train_images": whole.train_images[:n], "train_labels": torch.arange(n) % 10}
    few |= {"test_images": whole.test_images[:20], "test_labels": whole.test_labels[:20]}
    with pytest.MonkeyPatch.context() as patch:
        loop = importlib.import_module(f"{program.partition('.')[0]}.train")
        patch.setattr(loop, "load", lambda *_: replace(whole, **few))
        where = ["--threads", "1", "--runs", str(folder), *["--graph"] * wanted]
        importlib.import_module(program).main(["--epochs", "1", *flags, *where])
    return run.load_checkpoint(next(folder.glob("*/*/*/checkpoint.pt")))


@pytest.fixture
def recordings(monkeypatch):
    """Replaces what needs a GPU. A list of what was recorded: how often each was replayed."""
    made = []

    def record(step, batch, optimizers, stream):
        assert all(isinstance(optimizer, torch.optim.Adam) for optimizer in optimizers)
        out, number = {}, len(made)
        made.append(0)

        def replay():
            made[number] += 1
            out.update(step(batch))

        return replay, out

    set_up = run.set_up
    monkeypatch.setattr(run, "set_up", lambda options: set_up(replace(options, graph=False)))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(graph, "on_stream", lambda stream, step, batch: step(batch))
    monkeypatch.setattr(graph, "record", record)
    return made


@in_every_loop
def test_a_run_by_replays_is_the_same_run(program, flags, count, tmp_path, recordings):
    plain, replayed = (trained(program, flags, tmp_path / str(wanted), wanted) for wanted in (False, True))
    assert recordings == [STEPS - graph.EAGER] * count
    for kind in ("weights", "optimizers"):
        torch.testing.assert_close(replayed[kind], plain[kind], rtol=0, atol=0)
    for mine, theirs in zip(replayed["rows"], plain["rows"], strict=True):
        assert mine | {"seconds": 0} == theirs | {"seconds": 0}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs")
@in_every_loop
def test_a_run_by_cuda_graphs_is_the_same_run(program, flags, count, tmp_path):
    """Bit for bit where the kernels are deterministic, so the draws are the same ones too."""
    states = []
    for more in ([], ["--graph"]):
        where = ["--device", "cuda", "--deterministic", "--runs", tmp_path / str(len(states))]
        code, _, err = run_command(program, "--epochs", "1", *flags, *where, *more)
        assert code == 0, err
        states.append(run.load_checkpoint(next(where[-1].glob("*/*/*/checkpoint.pt"))))
    plain, replayed = states
    torch.testing.assert_close(replayed["weights"], plain["weights"], rtol=0, atol=0)
    for optimizer in replayed["optimizers"].values():
        assert not any(group["capturable"] for group in optimizer["param_groups"])


class Batch(NamedTuple):
    x: torch.Tensor
    phase: bool = False


def test_a_kind_of_batch_is_recorded_once_it_came_often_enough_in_a_row(recordings):
    seen = []

    def step(batch):
        seen.append((tuple(batch.x.shape), batch.phase, batch.x.sum().item()))
        return {"sum": batch.x.sum()}

    call = graph.replayed(step, [], True)
    batches = [Batch(torch.full((n,), float(i))) for i, n in enumerate([4, 4, 3, 4, 4, 4, 4, 3, 3, 3, 3, 4])]
    batches += [Batch(torch.full((4,), 20.0), True)]
    found = [call(batch)["sum"].item() for batch in batches]
    assert found == [batch.x.sum().item() for batch in batches]
    assert seen == [(tuple(batch.x.shape), batch.phase, batch.x.sum().item()) for batch in batches]
    # Of size 4 the seventh batch, the fourth in a row, is the first from the recording, and the last but one again.
    # Of size 3 it is the eleventh.
    assert recordings == [2, 1]


def test_a_cpu_has_no_graphs_and_without_the_option_the_step_is_left_alone(tmp_path, capsys):
    flags = ["toy", "--graph", "--device", "cpu", "--runs", tmp_path]
    code, out, err = call(importlib.import_module("gmgan.train").main, *flags, capsys=capsys)
    said = "error: --graph: it replays CUDA graphs, and the device is cpu. Leave it out\n"
    assert (code, out, err) == (2, "", said) and not any(tmp_path.iterdir())
    assert graph.replayed(trained, [], False) is trained
