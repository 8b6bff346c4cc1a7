"""`--graph`: a training step is recorded once as a CUDA graph and then replayed.

A step of a small network is hundreds of kernels of a few microseconds each. Without a graph the GPU waits for Python to
launch each one; a graph is one launch. A recorded step must not read a value back from the GPU, and it may depend only
on its batch, the weights and the optimisers.
"""

import warnings
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

EAGER = 3  # ordinary steps before the recording; they create Adam's state, workspaces and caches

Step = Callable[[NamedTuple], dict[str, Tensor]]


def replayed(step: Step, optimizers: Iterable[torch.optim.Optimizer], wanted: bool) -> Step:
    """`step` itself; if wanted, a function that does the same by replaying recordings.

    step: takes a batch, a named tuple of tensors, generators on the device and plain values. It returns scalars, which
    are valid until the next step. Each kind of batch (shapes and plain values) gets its own recording after EAGER
    batches of that kind in a row; an epoch's smaller last batch gets none. Global generators draw as without a graph.
    """
    if not wanted:
        return step
    stream = torch.cuda.Stream()
    recordings: dict[tuple, tuple[NamedTuple, Callable[[], None], dict[str, Tensor]]] = {}
    last, in_a_row = None, 0

    def call(batch: NamedTuple) -> dict[str, Tensor]:
        nonlocal last, in_a_row
        kind = tuple(x.shape if isinstance(x, Tensor) else x if isinstance(x, int | float) else None for x in batch)
        last, in_a_row = kind, in_a_row + 1 if kind == last else 1
        if kind not in recordings:
            if in_a_row <= EAGER:
                return on_stream(stream, step, batch)
            own = type(batch)(*map(placeholder, batch))
            recordings[kind] = (own, *record(step, own, optimizers, stream))
        own, replay, out = recordings[kind]
        for mine, given in zip(own, batch, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(given)
            elif isinstance(mine, torch.Generator):
                mine.manual_seed(given.initial_seed())
        replay()
        return out

    return call


def placeholder(entry: object) -> object:
    """The place from which a recording reads this entry of a batch."""
    if isinstance(entry, Tensor):
        return torch.empty_like(entry)
    return torch.Generator(entry.device) if isinstance(entry, torch.Generator) else entry


def on_stream(stream: torch.cuda.Stream, step: Step, batch: NamedTuple) -> dict[str, Tensor]:
    """Run a step on the stream that will record, because workspaces and autograd nodes stay on their first stream."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = step(batch)
    torch.cuda.current_stream().wait_stream(stream)
    return out


def record(
    step: Step, batch: NamedTuple, optimizers: Iterable[torch.optim.Optimizer], stream: torch.cuda.Stream
) -> tuple[Callable[[], None], dict[str, Tensor]]:
    """Record a step on this batch without running it. Returns the function that replays it, and its outputs."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    graph = torch.cuda.CUDAGraph()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from PyTorch 2.15 on, a graph finds its generators itself and warns
        for entry in batch:
            if isinstance(entry, torch.Generator) and hasattr(graph, "register_generator_state"):
                graph.register_generator_state(entry)
    for group in groups:
        group["capturable"] = True  # Adam requires it; the fused Adam computes the same with it
    try:
        with torch.cuda.graph(graph, stream=stream):
            out = {name: value.detach() for name, value in step(batch).items()}
    finally:
        for group in groups:
            group["capturable"] = False  # for checkpoints and for steps without a graph
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay, out
