"""A toy: points of three Gaussians in the plane with weights 0.5, 0.3 and 0.2. It shows at a glance what C learned.

The paper has no toy. This one uses the same system and loop and trains in a minute. The truth is known: the classes are
far apart, so a correct p(k|x) has an NMI of 1, and its mean over the points gives the three weights.
"""

import functools
import hashlib
from pathlib import Path

import torch
from torch import Tensor

from common import plots, run
from common.data import Dataset
from gan_responsibility.model import Responsibility

COUNTS = (1600, 960, 640)  # training points of each class: weights 0.5, 0.3, 0.2 exactly
ANGLES = torch.tensor([90.0, 210.0, 330.0]).deg2rad()
MEANS = 0.6 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)  # (3, 2)
DEVIATION = 0.08  # of each class, in both directions; all points lie within tanh's range
TEST_POINTS = 1000
SHOWN = 300  # samples of each Gaussian in the figure


@functools.cache
def dataset() -> Dataset:
    """The points (3200, 2), float32 in [-1, 1]², and the class of each; test points with the same weights. All runs
    share one draw."""
    generator, parts = run.generator(0, "toy"), []
    for counts in (COUNTS, [TEST_POINTS * n // sum(COUNTS) for n in COUNTS]):
        labels = torch.repeat_interleave(torch.arange(len(COUNTS)), torch.tensor(counts))
        parts += [MEANS[labels] + DEVIATION * torch.randn(len(labels), 2, generator=generator), labels]
    digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()[:16]
    return Dataset("toy", *parts, ("above", "left", "right"), digest, official=True)


def nearest_class(points: Tensor) -> Tensor:
    """The class (n,) whose mean is nearest to points (n, 2)."""
    return torch.cdist(points, MEANS).argmin(1)


def save_samples(model: Responsibility, path: Path, seed: int, title: str = "") -> None:
    """Left: samples of each Gaussian over the data. Right: p(k|x) over the plane, in the colours of the Gaussians.

    A point has the mean of the three colours, weighted by p(k|x): grey-brown where p(k|x) is uniform.
    """
    from matplotlib.colors import to_rgb

    data, k = dataset(), model.config.components
    made = model.sample(torch.eye(k).repeat_interleave(SHOWN, 0), seed).view(k, SHOWN, 2)
    side = torch.linspace(-1, 1, 201)
    plane = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1)  # the first index is y
    alpha, weights = model.responsibilities(plane.flatten(0, 1)), model.mode_weights(data.train_images)
    colours = torch.tensor([to_rgb(f"C{i}") for i in range(k)])
    figure, (left, right) = plots.subplots(1, 2, figsize=(8.4, 4.3))
    for axes in (left, right):
        axes.scatter(*data.train_images.T.numpy(), s=2, c="black", alpha=0.25, linewidths=0, zorder=2)
        axes.set(xlim=(-1, 1), ylim=(-1, 1), aspect="equal", xlabel="$x_1$", ylabel="$x_2$")
    for i in range(k):
        label = f"Gaussian {i}: weight {weights[i]:.2f}"
        left.scatter(*made[i].T.numpy(), s=5, color=f"C{i}", linewidths=0, zorder=3, label=label)
    left.legend(loc="lower center", ncols=1, markerscale=3)
    left.set_title("The data (black) and what each Gaussian generates")
    right.imshow((alpha @ colours).view(201, 201, 3).clamp(0, 1).numpy(), extent=(-1, 1, -1, 1), origin="lower")
    right.set_title("p(k|x): the Gaussians' colours, mixed")
    figure.suptitle(title, fontsize=10)
    plots.save_figure(figure, path)
