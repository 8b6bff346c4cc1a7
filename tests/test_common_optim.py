"""common/optim.py against plain Adam on plainly laid out tensors."""

import pytest
import torch

from common.optim import descend

LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("of_parameter", LAYOUTS)
@pytest.mark.parametrize("of_gradient", LAYOUTS)
@pytest.mark.parametrize("fused", [False, True])
def test_each_entry_moves_by_its_own_gradient_whatever_the_layouts(of_parameter, of_gradient, fused):
    g = torch.Generator().manual_seed(0)
    start, gradient = (torch.randn(4, 3, 3, 3, generator=g) for _ in range(2))
    plain = torch.nn.Parameter(start.clone())
    expected = torch.optim.Adam([plain], lr=0.1)
    mine = torch.nn.Parameter(start.clone(memory_format=of_parameter))
    optimizer = torch.optim.Adam([mine], lr=0.1, fused=fused)
    for scale in (1.0, -0.3):
        plain.grad = scale * gradient
        expected.step()
        norm = descend(optimizer, [(scale * gradient).contiguous(memory_format=of_gradient)])
        assert norm.item() == pytest.approx((scale * gradient).norm().item(), rel=1e-6)
    torch.testing.assert_close(mine.detach(), plain.detach(), rtol=1e-6, atol=1e-6)
    assert mine.stride() == start.contiguous(memory_format=of_parameter).stride()
