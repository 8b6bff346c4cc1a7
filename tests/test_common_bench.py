"""The bench: what it counts, and its table from a real run of the command."""

import json
import subprocess
import sys

import torch

from common.bench import Counter
from tests.conftest import ROOT, run_command


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
    assert numbers.keys() == {"textbook", "fp32", "bf16"} and numbers["fp32"]["images"] == 64
    g, d = 100 * 256 + 256 * 256 + 256 * 2 + 256 * 2 + 2, 2 * 256 + 256 * 256 + 256 + 256 * 2 + 1
    for variant, n in numbers.items():
        assert n["operations"] > 0 and n["ceiling"] > 0 and n["bandwidth"] > 1e8 and n["peak"] > 1e8 and n["start_up"] > 0
        assert n["parameters"] == g + d and n["steps"] == 1  # of two in three rounds
        row = next(line for line in out.splitlines() if line.startswith("gmgan-toy") and variant in line)
        assert f"{1e3 * n['seconds']:.1f}" in row and f"{n['times_textbook']:.2f}" in row
    assert numbers["textbook"]["times_textbook"] == 1


def test_what_a_textbook_is():
    """In a process of its own: what it undoes, it undoes for good."""
    program = """
import torch
from common import bench
data = bench.generated((1, 28, 28), 10)
after = bench.as_a_textbook(data, 8)
layer = torch.nn.Conv2d(3, 4, 3)
adam = torch.optim.Adam(layer.to("cpu", memory_format=torch.channels_last).parameters(), fused=True, lr=0.1)
assert not adam.defaults["fused"] and adam.defaults["foreach"] is False and adam.defaults["lr"] == 0.1
assert layer.weight.is_contiguous() and not layer.weight.is_contiguous(memory_format=torch.channels_last)
after({"loss": torch.ones(())})
images, labels = next(bench.batches_of(data, 8))
found = [(data.train_images == round_.mul(255).round().byte()).flatten(1).all(1).nonzero()[0, 0] for round_ in images]
assert data.train_labels[torch.stack(found)].tolist() == labels.tolist()
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "fine", done.stderr


def test_errors():
    code, _, err = run_command("common.bench", "gmgan", "toi")
    assert code == 2 and "did you mean toy" in err and err.count("\n") == 1
    code, _, err = run_command("common.bench", "gmgan", "toy", "--steps", "0")
    assert code == 2 and "--steps: 0 is out of range" in err
    code, _, err = run_command("common.bench", "gmgan", "toy", "--steps", "2", "--sigma", "0")
    assert code == 2 and "--sigma: 0.0 is out of range" in err and err.count("\n") == 1
