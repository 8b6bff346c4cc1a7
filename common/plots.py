"""Pictures that several papers draw: grids of images, curves."""

import math
import statistics
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from common.run import atomic

FORMATS = ("png",)  # file formats of figures; an evaluation with --pdf adds pdf
OF = ""  # the run that the figures belong to, printed below each; an evaluation sets it


def subplots(*arguments, **settings):
    """matplotlib's `subplots`, without a display and with small type."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    pyplot.rcParams.update({"axes.titlesize": 9, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7})
    pyplot.rcParams["legend.fontsize"] = 7
    return pyplot.subplots(*arguments, **settings)


def save_figure(figure, path: Path) -> None:
    """Write a figure as PNG (with --pdf also as PDF), with the name of its run below it, and close it."""
    import matplotlib.pyplot as pyplot

    figure.tight_layout()
    if OF:
        bottom = figure.get_tightbbox().y0 / figure.get_figheight() - 0.01  # a legend may hang below the panels
        figure.text(0.5, bottom, OF, fontsize=7, color="grey", ha="center", va="top", parse_math=False)
    for kind in FORMATS:
        with atomic(path.with_suffix(f".{kind}"), "wb") as file:
            about = {"Software": None} if kind == "png" else {"CreationDate": None}
            figure.savefig(file, format=kind, dpi=110, bbox_inches="tight", metadata=about)
    pyplot.close(figure)


def grid(images: Tensor, columns: int) -> Tensor:
    """Images (N, C, H, W) in [0, 1] as one picture, row by row: uint8 (h, w, 3), with two white pixels between them."""
    from torchvision.utils import make_grid

    laid = make_grid(images.detach().float().cpu().clamp(0, 1), nrow=columns, pad_value=1.0)
    return (laid * 255).round().to(torch.uint8).permute(1, 2, 0)


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Write the grid as a PNG, without axes or resizing."""
    with atomic(path, "wb") as file:
        Image.fromarray(grid(images, columns).numpy()).save(file, format="PNG")


def save_labelled_grid(
    images: Tensor, path: Path, columns: int, title: str, rows: Sequence[str] = (), heads: Sequence[str] = ()
) -> None:
    """Write the grid with a title, a label before each row and a head under each column."""
    laid, scale = grid(images, columns), 0.5 / 28  # inches a pixel
    cell_h, cell_w = images.shape[2] + 2, images.shape[3] + 2  # with the two pixels between
    figure, axes = subplots(figsize=(laid.shape[1] * scale + 1.2, laid.shape[0] * scale + 0.8))
    axes.imshow(laid.numpy(), interpolation="nearest")
    axes.set_title(title)
    # parse_math=False, because the name of a class may contain $.
    axes.set_yticks([cell_h * (i + 0.5) + 1 for i in range(len(rows))], rows, parse_math=False)
    axes.set_xticks([cell_w * (i + 0.5) + 1 for i in range(len(heads))], heads, parse_math=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    save_figure(figure, path)


def save_curves(
    panels: dict[str, dict[str, tuple]],
    path: Path,
    x_label: str,
    y_label: str = "",
    log: bool = False,
    log_y: bool | None = False,
) -> None:
    """Draw panels, four to a row: {panel title: {curve name: (x, y) or (x, y, error of y)}}. An empty panel is a gap.

    log: a logarithmic x axis. log_y: a logarithmic y axis; None: if a panel's values span more than a decade.
    """
    columns, rows = min(len(panels), 4), -(-len(panels) // 4)
    size = (3.4, 2.8) if len(panels) > 1 else (5.5, 4.0)
    figure, grid_of_axes = subplots(rows, columns, figsize=(size[0] * columns, size[1] * rows), squeeze=False)
    for axes, (title, curves) in zip_longest(grid_of_axes.flat, panels.items(), fillvalue=("", {})):
        axes.set_visible(bool(curves))
        for name, (x, y, *error) in curves.items():
            how = {"linewidth": 1, "capsize": 2, "marker": "." if len(x) < 40 else ""}  # a marker shows a single epoch
            axes.errorbar(x, y, *(e for e in error if any(e)), label=name or None, **how)
        values = [value for _, y, *_ in curves.values() for value in y]
        spans = curves and 0 < 10 * min(values) < max(values) if log_y is None else log_y
        scales = {"xscale": "log" if log else "linear", "yscale": "log" if spans else "linear"}
        axes.set(title=title, xlabel=x_label, ylabel=y_label, **scales)
        if x_label == "epoch" and not log:
            axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
        if any(curves):
            axes.legend()
    save_figure(figure, path)


def curve(several: Sequence[dict[str, float]], prefix: str) -> tuple[list[float], list[float], list[float]]:
    """A curve from metrics named <prefix><x>: x, and the mean and standard error over runs (0 for a single run).

    It has the points that all runs have.
    """
    common = set.intersection(*map(set, several))
    xs = sorted((float(name.removeprefix(prefix)), name) for name in common if name.startswith(prefix))
    columns = [[metrics[name] for metrics in several] for _, name in xs]
    errors = [statistics.stdev(c) / math.sqrt(len(c)) if len(c) > 1 else 0.0 for c in columns]
    return [x for x, _ in xs], [statistics.fmean(column) for column in columns], errors


def named(name: str, several: Sequence) -> str:
    """A curve's name with the number of its seeds."""
    return f"{name} ({len(several)} seed{'s' * (len(several) > 1)})"


def save_course(rows: Sequence[dict], path: Path, names: dict[str, str], others: bool = True) -> None:
    """Draw each column of a log against the epoch, a panel each. rows: of log.csv. names: {column: panel title}.

    Columns in `names` come first; with `others` the rest follow. Draws nothing if no epoch has ended.
    """
    columns = dict.fromkeys(name for row in rows for name in row if name not in ("epoch", "seconds"))
    shown = [*filter(columns.__contains__, names), *(c for c in columns if others and c not in names)]
    points = {names.get(c, c): [(row["epoch"], row[c]) for row in rows if c in row] for c in shown}
    if points:
        panels = {title: {"": tuple(zip(*several, strict=True))} for title, several in points.items()}
        save_curves(panels, path, "epoch", log_y=None)
