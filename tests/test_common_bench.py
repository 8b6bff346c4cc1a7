"""The bench: what it counts, and its table from a real run of the command."""

import json

import torch

from common.bench import Counter
from tests.conftest import run_command


def test_operations_are_counted_forwards_backwards_and_twice_backwards():
    x, w = torch.randn(4, 6), torch.randn(5, 6, requires_grad=True)
    with Counter() as counter:
        y = x @ w.T
    assert counter.total == 2 * 4 * 6 * 5
    with Counter() as counter:
        y.square().sum().backward()
    assert counter.total == 2 * 4 * 6 * 5  # to w alone
    image, kernel = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(5, 3, 3, 3, requires_grad=True)
    one = 2 * 2 * 5 * 6 * 6 * 27
    with Counter() as counter:
        out = torch.nn.functional.conv2d(image, kernel)
        slope = torch.autograd.grad(out.square().sum(), image, create_graph=True)[0]
    assert counter.total == 2 * one
    with Counter() as counter:
        torch.autograd.grad(slope.square().sum(), kernel)
    assert counter.total >= 3 * one


def test_the_command(tmp_path):
    where = ["--steps", "2", "--threads", "1", "--device", "cpu", "--json", tmp_path / "bench.json"]
    code, out, err = run_command("common.bench", "gmgan", "toy", *where)
    assert code == 0, err
    numbers = json.loads((tmp_path / "bench.json").read_text())["toy"]
    assert numbers.keys() == {"fp32", "bf16"} and numbers["fp32"]["images"] == 64
    for precision, n in numbers.items():
        assert n["operations"] > 0 and n["ceiling"] > 0 and n["peak"] > 1e8
        row = next(line for line in out.splitlines() if line.startswith("gmgan-toy") and precision in line)
        assert f"{1e3 * n['seconds']:.1f}" in row
    code, _, err = run_command("common.bench", "gmgan", "toi")
    assert code == 2 and "did you mean toy" in err and err.count("\n") == 1
    code, _, err = run_command("common.bench", "gmgan", "toy", "--steps", "0")
    assert code == 2 and "--steps: 0 is out of range" in err
    code, _, err = run_command("common.bench", "gmgan", "toy", "--steps", "2", "--sigma", "0")
    assert code == 2 and "--sigma: 0.0 is out of range" in err and err.count("\n") == 1
