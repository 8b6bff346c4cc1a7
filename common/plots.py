"""Pictures: grids of images."""

from pathlib import Path

import torch
from torch import Tensor

from common.run import atomic


def save_grid(images: Tensor, path: Path, columns: int, padding: int = 2) -> None:
    """Images (N, C, H, W) in [0, 1] as one PNG, row by row, `columns` to a row, white between them."""
    from PIL import Image
    from torchvision.utils import make_grid

    grid = make_grid(images.float().cpu().clamp(0, 1), nrow=columns, padding=padding, pad_value=1.0)
    pixels = (grid * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    with atomic(path, "wb") as file:
        Image.fromarray(pixels).save(file, format="PNG")
