"""Pictures: grids of images, heat maps, curves, scatters."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from common.run import atomic


def grid(images: Tensor, columns: int, padding: int = 2) -> Tensor:
    """Images (N, C, H, W) in [0, 1] laid out row by row: uint8 (h, w, 3), white between them."""
    from torchvision.utils import make_grid

    laid = make_grid(images.detach().float().cpu().clamp(0, 1), nrow=columns, padding=padding, pad_value=1.0)
    return (laid * 255).round().to(torch.uint8).permute(1, 2, 0)


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """The bare grid as a PNG, one pixel per pixel."""
    from PIL import Image

    with atomic(path, "wb") as file:
        Image.fromarray(grid(images, columns).numpy()).save(file, format="PNG")


def save_labelled_grid(images: Tensor, path: Path, columns: int, title: str, rows: Sequence[str] = (), heads: Sequence[str] = ()) -> None:
    """The grid with a title, a label before each row and a head above each column."""
    laid = grid(images, columns)
    cell_h, cell_w = images.shape[2] + 2, images.shape[3] + 2  # with the padding of `grid`
    scale = 0.5 / 28  # inches a pixel
    figure, axes = _pyplot().subplots(figsize=(laid.shape[1] * scale + 1.2, laid.shape[0] * scale + 0.8))
    axes.imshow(laid.numpy(), interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.set_yticks([cell_h * (i + 0.5) + 1 for i in range(len(rows))], rows, fontsize=8)
    axes.set_xticks([cell_w * (i + 0.5) + 1 for i in range(len(heads))], heads, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    _save(figure, path)


def save_matrix(values: Tensor, path: Path, names: Sequence[str], title: str, text: Sequence[Sequence[str]], colours: str) -> None:
    """A square matrix (K, K) as a heat map without its diagonal, `text` in its cells. colours: what the colour bar says."""
    values = values.cpu().clone().fill_diagonal_(float("nan"))
    shown = values[~values.isnan()]
    middle = (shown.min() + shown.max()) / 2
    figure, axes = _pyplot().subplots(figsize=(0.55 * len(names) + 2.2, 0.5 * len(names) + 1.2))
    picture = axes.imshow(values.numpy(), cmap="viridis")
    for i, row in enumerate(text):
        for j, word in enumerate(row):
            axes.text(j, i, word, ha="center", va="center", fontsize=7, color="white" if values[i, j] < middle else "black")
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_title(title, fontsize=9)
    figure.colorbar(picture, ax=axes, label=colours)
    _save(figure, path)


def save_counts(counts: Tensor, path: Path, title: str, rows: str, columns: str) -> None:
    """A matrix of counts (K, N) with each count in its cell, coloured by its share of the row. rows, columns: what they are."""
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    k, n = counts.shape
    figure, axes = _pyplot().subplots(figsize=(0.42 * n + 1.4, 0.3 * k + 1.2))
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i in range(k):
        for j in range(n):
            axes.text(j, i, f"{int(counts[i, j])}", ha="center", va="center", fontsize=6, color="white" if shares[i, j] > 0.6 else "black")
    axes.set_xticks(range(n), range(n), fontsize=7)
    axes.set_yticks(range(k), range(k), fontsize=7)
    axes.set(xlabel=columns, ylabel=rows)
    axes.set_title(title, fontsize=9)
    _save(figure, path)


def save_points(points: Tensor, groups: Tensor, path: Path, title: str) -> None:
    """Points (n, 2) in the colours of their groups (n,), numbers 0, 1, …, with a legend."""
    figure, axes = _pyplot().subplots(figsize=(5, 4.4))
    drawn = axes.scatter(*points.T.numpy(), s=4, c=groups.numpy(), cmap="tab10", linewidths=0)
    axes.legend(*drawn.legend_elements(num=None), fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=7)
    _save(figure, path)


def save_curves(curves: dict[str, tuple[Sequence[float], Sequence[float]]], path: Path, x_label: str, log: bool = False) -> None:
    """One panel for each named curve (x, y), four to a row; log: on logarithmic axes."""
    columns, rows = min(len(curves), 4), -(-len(curves) // 4)
    figure, panels = _pyplot().subplots(rows, columns, figsize=(3.2 * columns, 2.6 * rows), squeeze=False)
    for axes in panels.flat[len(curves) :]:
        axes.set_visible(False)
    for axes, (name, (x, y)) in zip(panels.flat, curves.items(), strict=False):
        axes.plot(x, y, linewidth=1)
        if log:
            axes.set_xscale("log")
            axes.set_yscale("log")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel(x_label, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    _save(figure, path)


def save_error_curves(panels: dict[str, dict[str, tuple]], path: Path, x_label: str, y_label: str, log: bool = False) -> None:
    """Panels of several named curves (x, y, error of y) each, four to a row, a gap where one has none; log: the x axis is logarithmic."""
    columns = min(len(panels), 4)
    size = (3.6, 2.9) if len(panels) > 1 else (5.5, 4.0)
    rows = -(-len(panels) // columns)
    figure, grid_of_axes = _pyplot().subplots(rows, columns, figsize=(size[0] * columns, size[1] * rows), squeeze=False)
    for axes in grid_of_axes.flat:
        axes.set_visible(False)
    for axes, (title, curves) in zip(grid_of_axes.flat, panels.items(), strict=False):
        if not curves:
            continue
        axes.set_visible(True)
        for name, (x, y, error) in curves.items():
            axes.errorbar(x, y, error if any(error) else None, label=name, linewidth=1, capsize=2, marker=".", markersize=3)
        if log:
            axes.set_xscale("log")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(x_label, fontsize=8)
        axes.set_ylabel(y_label, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    _save(figure, path)


def curve(several: Sequence[dict[str, float]], prefix: str) -> tuple[list[float], list[float], list[float]]:
    """x, mean and standard error over seeds of the metrics prefix_x of each run; an error of 0 where there is one seed."""
    names = sorted((name for name in several[0] if name.startswith(prefix)), key=lambda name: float(name.removeprefix(prefix)))
    columns = [[metrics[name] for metrics in several] for name in names]
    errors = [statistics.stdev(column) / math.sqrt(len(column)) if len(column) > 1 else 0.0 for column in columns]
    xs = [float(name.removeprefix(prefix)) for name in names]
    return xs, [statistics.fmean(column) for column in columns], errors


def named(name: str, several: Sequence) -> str:
    """A curve's name, with how many seeds it is of."""
    return f"{name} ({len(several)} seed{'s' * (len(several) > 1)})"


def save_course(rows: Sequence[dict], path: Path, names: Sequence[str] = ()) -> None:
    """The columns of a log against the epoch, those of `names` that there are, or all. rows: as in log.csv; a column may have gaps.

    Before the first epoch has ended there is nothing to draw, and no file.
    """
    columns = dict.fromkeys(name for row in rows for name in row if name not in ("epoch", "seconds") and (not names or name in names))
    if not columns:
        return
    points = {name: [(row["epoch"], row[name]) for row in rows if name in row] for name in columns}
    save_curves({name: tuple(zip(*several, strict=True)) for name, several in points.items()}, path, "epoch")


def save_scatters(panels: dict[str, tuple[Tensor, Tensor, Tensor]], path: Path, columns: int = 4) -> None:
    """One panel for each named (data (n, 2), samples (m, 2), groups (m,)): data in black, samples in the colour of their group."""
    rows, columns = -(-len(panels) // columns), min(columns, len(panels))
    figure, grid_of_axes = _pyplot().subplots(rows, columns, figsize=(3.2 * columns, 3.3 * rows), squeeze=False)
    limit = 1.25 * max(float(data.abs().max()) for data, _, _ in panels.values())
    for axes in grid_of_axes.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (name, (data, samples, groups)) in zip(grid_of_axes.flat, panels.items(), strict=False):
        axes.scatter(*data.T.numpy(), s=1, c="black", alpha=0.25, linewidths=0)
        axes.scatter(*samples.T.numpy(), s=2, c=groups.numpy(), cmap="tab10", linewidths=0)
        axes.set(title=name, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
        axes.title.set_fontsize(9)
        axes.tick_params(labelsize=7)
    _save(figure, path)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    return pyplot


def _save(figure, path: Path) -> None:
    figure.tight_layout()
    with atomic(path, "wb") as file:
        figure.savefig(file, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    _pyplot().close(figure)
