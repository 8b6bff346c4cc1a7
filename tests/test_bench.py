"""The bench: what it counts, and its table from a real run of the command."""

import pytest
import torch

from tests import bench
from tests.conftest import call


def test_operations_are_counted_forwards_backwards_and_twice_backwards():
    x, w = torch.randn(4, 6), torch.randn(5, 6, requires_grad=True)
    with bench.FlopCounter() as counter:
        y = x @ w.T
    assert counter.total == 2 * 4 * 6 * 5
    with bench.FlopCounter() as counter:
        y.square().sum().backward()
    assert counter.total == 2 * 4 * 6 * 5  # to w alone
    image, kernel = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(5, 3, 3, 3, requires_grad=True)
    one = 2 * 2 * 5 * 6 * 6 * 27
    with bench.FlopCounter() as counter:
        out = torch.nn.functional.conv2d(image, kernel)
        slope = torch.autograd.grad(out.square().sum(), image, create_graph=True)[0]
    assert counter.total == 2 * one
    with bench.FlopCounter() as counter:
        torch.autograd.grad(slope.square().sum(), kernel)
    assert counter.total >= 3 * one


@pytest.mark.parametrize("paper, experiment", [
    ("segma", "digits"), ("segma", "digits-m1m2"), ("segma", "digits-adgm"),
    ("gmgan", "toy-acgan"), ("gmgan", "mnist-supervised"), ("gmgan", "digits-kmeans"),
    ("gan_responsibility", "digits"), ("gan_responsibility", "flowers10-gan"),
    ("amm", "digits"), ("amm", "samm-digits"),
])  # fmt: skip
def test_every_trainer_takes_a_step_of_its_own_batch_size(paper, experiment):
    config, options = bench.parse(paper, [experiment, "--device", "cpu"])
    step, images = bench.prepared(paper, config, options, torch.device("cpu"))
    assert all(value.isfinite() for value in step().values())
    assert images in [getattr(config, name, None) for name in ("batch_unlabelled", "batch_real", "batch")]


def test_the_command(capsys, monkeypatch):
    monkeypatch.setattr(bench, "ROUNDS", 1)
    monkeypatch.setattr(bench, "SIDE", {"cpu": 256})
    where = ["--steps", "2", "--threads", "1", "--device", "cpu"]
    assert "did you mean toy" in call(bench.main, "gmgan", "toi", capsys=capsys)[2]
    code, out, err = call(bench.main, "gmgan", "toy", *where, capsys=capsys)
    assert code == 0, err
    rows = [line.split() for line in out.splitlines() if line.strip().startswith(("fp32", "bf16"))]
    assert [row[0] for row in rows] == ["fp32", "bf16"]
    n, g, d = 64, 100 * 256 + 256 * 256 + 256 * 2, 2 * 256 + 256 * 256 + 256  # real points; products a point takes
    step_of_d = n * g + 2 * n * d + 2 * n * (2 * d - 2 * 256)  # fakes, logits, gradients: the points need none
    step_of_g = 2 * n * g + 2 * n * d + 2 * n * (d + 2 * g - 100 * 256)  # twice as many fakes; D's weights need none
    for _, milliseconds, per_second, images, flop, *_ in rows:
        assert float(flop) == pytest.approx(2 * (step_of_d + step_of_g) / 1e9, abs=6e-4)
        assert float(images.replace(",", "")) == pytest.approx(n * float(per_second), rel=0.02)
        assert float(per_second) == pytest.approx(1e3 / float(milliseconds), rel=0.05)
