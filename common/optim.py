"""A step down gradients that were taken by `torch.autograd.grad`."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def descend(optimizer: torch.optim.Optimizer, gradients: Sequence[Tensor]) -> Tensor:
    """One step of the optimiser down these gradients of its parameters, in their order. Returns their norm, a scalar.

    Each is brought to its parameter's memory layout first. The fused Adam walks both as flat memory, on a CPU without a check: of a
    channels-last weight and a contiguous gradient, as a double backward leaves it, it would pair each entry with another one's gradient.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient if gradient.stride() == p.stride() else torch.empty_like(p).copy_(gradient)
    optimizer.step()
    return nn.utils.get_total_norm(gradients)
