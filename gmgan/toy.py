"""The toy of Sec. 4.1: 5,000 points of nine Gaussians on {-1, 0, 1}², labelled by Gaussian, and the scores of samples.

`toy` has Σ = 0.1 I as printed. `toy_apart` takes 0.1 as a standard deviation, so its Gaussians hardly overlap.

The true density is known, so Sec. 3.2's classifier is not needed. Quality is the negative log-likelihood of samples
and diversity is their entropy, both in nats. Their difference is the Kullback-Leibler divergence of the samples from
the true distribution.
"""

import functools
import hashlib
import math
from pathlib import Path

import torch
from torch import Tensor

from common import plots, run
from common.data import Dataset
from gmgan.model import Gan

MODES = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 2)  # μ_m, (9, 2)
VARIANCE = {"toy": 0.1, "toy_apart": 0.1**2}  # Σ_m = 0.1 I, as printed, or (0.1 I)²
POINTS = 5000  # training points, and samples that are judged
MULTIPLIERS = tuple(round(0.1 * i, 1) for i in range(5, 21))  # the σ of Sec. 4.3: 0.5, 0.6 … 2.0
SHOWN_MULTIPLIERS = (0.1, 0.5, 1.0, 2.0)  # the σ of Fig. 4
WINDOW = 20  # epochs of the running median by which convergence is judged
CLOSE = 0.25  # nats; the likelihood counts as converged when it is this close to its last value
EPOCHS_NOTED = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 400, 500)  # the points of Fig. 5's curve


@functools.cache
def dataset(name: str = "toy") -> Dataset:
    """The points (5000, 2), float32, and the Gaussian (5000,) of each. All runs share one draw. There is no test set.

    name: toy or toy_apart.
    """
    generator = run.generator(0, "toy")
    labels = torch.randint(len(MODES), (POINTS,), generator=generator)
    points = MODES[labels] + math.sqrt(VARIANCE[name]) * torch.randn(POINTS, 2, generator=generator)
    names = tuple(f"({x:.0f}, {y:.0f})" for x, y in MODES.tolist())
    digest = hashlib.sha256(points.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()[:16]
    return Dataset(name, points, labels, points[:0], labels[:0], names, digest, official=True)


# ---------------------------------------------------------------------------------------------- measures of points


def negative_log_likelihood(points: Tensor, name: str = "toy") -> float:
    """-log p(x) under the true mixture of the toy `name`, the mean over points (n, 2), in nats."""
    variance = VARIANCE[name]
    log_p = -torch.cdist(points.double(), MODES.double()).square() / (2 * variance) - math.log(2 * math.pi * variance)
    return -(log_p.logsumexp(1) - math.log(len(MODES))).mean().item()


def entropy(points: Tensor) -> float:
    """Differential entropy of the distribution of points (n, 2), n ≥ 2, nats, by nearest neighbours.

    The estimate of Kozachenko and Leonenko, ψ(n) - ψ(1) + log π + 2 E log r, where r is the distance from a point to
    the nearest other point (at least 1e-9, for points that coincide).
    """
    from scipy.spatial import KDTree
    from scipy.special import digamma

    found = KDTree(points.double().numpy()).query(points.double().numpy(), k=2)[0]
    distances = torch.from_numpy(found[:, 1]).clamp(min=1e-9)
    return (digamma(len(points)) - digamma(1) + math.log(math.pi) + 2 * distances.log().mean()).item()


def nearest_modes(points: Tensor) -> Tensor:
    """The most probable Gaussian (n,) of points (n, 2)."""
    return torch.cdist(points, MODES).argmin(1)


def main_modes(points: Tensor, groups: Tensor) -> tuple[float, int]:
    """How far each group is one mode. points: (n, 2), groups: (n,).

    The main mode of a group is the mode nearest to most of its points. Returns the percentage of points nearest to the
    main mode of their group, and the number of modes that are the main mode of some group.
    """
    found = nearest_modes(points)
    counts = torch.stack([found[groups == k].bincount(minlength=len(MODES)) for k in groups.unique()])
    return 100 * counts.max(1).values.sum().item() / len(points), len(counts.argmax(1).unique())


def convergence(curve: list[float]) -> dict[str, float]:
    """How fast the negative log-likelihood of samples converges, by its running median over 20 epochs.

    close_after: the number of epochs after which the median is first within 0.25 nats of its last value.
    settled_after: the number of epochs after which it stays there.
    mean_nll: the mean over all epochs, the area under the curve of Fig. 5.
    """
    values = torch.tensor(curve, dtype=torch.float64)
    window = min(WINDOW, len(values))
    medians = values.unfold(0, window, 1).median(1).values  # the first one after `window` epochs
    away = (medians - medians[-1]).abs() > CLOSE
    settled = int(away.nonzero()[-1]) + 1 if away.any() else 0
    return {
        "close_after": float(window + int((~away).nonzero()[0])),
        "settled_after": float(window + settled),
        "mean_nll": values.mean().item(),
    }


# ------------------------------------------------------------------------------------------------ measures of a model


def samples(model: Gan, multiplier: float = 1.0, stream: str = "judged") -> tuple[Tensor, Tensor]:
    """About 5,000 samples, (n, 2), the same number of each group, and the group (n,) of each.

    The noise is the same in all runs, so the spread over seeds is that of training alone.
    """
    groups = model.config.groups
    n = -(-POINTS // groups)
    return model.sample(n, multiplier, stream=("toy", stream)), torch.arange(groups).repeat_interleave(n)


def course(model: Gan) -> dict[str, float]:
    """The column of the log for Fig. 5, after each epoch: the negative log-likelihood of samples."""
    return {"nll": negative_log_likelihood(samples(model, stream="course")[0], model.config.dataset)}


def scores(model: Gan, rows: list[dict]) -> dict[str, float]:
    """The four claims about the toy as numbers, and the curves of Figs. 4 and 5. rows: the rows of the log."""
    data = dataset(model.config.dataset)
    made, groups = samples(model)
    nll, own = negative_log_likelihood(made, data.name), entropy(made)
    purity, modes = main_modes(made, groups)
    shares = nearest_modes(made).bincount(minlength=len(MODES)) / len(made)
    found = {
        "nll": nll,  # claim 1: lower than the baselines'
        "entropy": own,  # claim 2: diversity, lower than the baselines'
        "divergence": nll - own,
        "purity": purity,  # claim 3: each Gaussian has a mode …
        "main_modes": float(modes),  # … and each mode a Gaussian: 9
        "covered_modes": float((shares > 0.1 / len(MODES)).sum()),  # modes with more than a tenth of their fair share
        "data_nll": negative_log_likelihood(data.train_images, data.name),
        "data_entropy": entropy(data.train_images),
        "data_purity": main_modes(data.train_images, data.train_labels)[0],
    }
    if model.supervised:
        right = model.output_of_class[nearest_modes(made)] == model.output_of_group[groups]
        found["samples_of_their_class"] = 100 * right.float().mean().item()
    if rows:  # no rows if the run was stopped in its first epoch
        found |= convergence([row["nll"] for row in rows])  # claim 4: faster than the baselines
    found |= {f"nll_after_{row['epoch']}": row["nll"] for row in rows if row["epoch"] in EPOCHS_NOTED}
    for multiplier in MULTIPLIERS:
        at = samples(model, multiplier)[0]
        found[f"nll_at_{multiplier}"] = negative_log_likelihood(at, data.name)
        found[f"entropy_at_{multiplier}"] = entropy(at)
    return found


# ------------------------------------------------------------------------------------------------------------ figures


def figures(model: Gan, folder: Path) -> None:
    """Samples over the data, coloured by Gaussian (Fig. 3), and at several σ (Fig. 4)."""
    save_scatters({"": (model, *samples(model))}, folder / "samples.png")
    panels = {f"σ = {m:g}": (model, *samples(model, m)) for m in SHOWN_MULTIPLIERS}
    save_scatters(panels, folder / "sigma.png")


def save_samples(model: Gan, path: Path) -> None:
    """200 samples of each group over the data, always from the same noise. Training saves it now and then."""
    groups = torch.arange(model.config.groups).repeat_interleave(200)
    save_scatters({"": (model, model.sample(200, stream=("samples",)), groups)}, path)


def save_scatters(panels: dict[str, tuple[Gan, Tensor, Tensor]], path: Path, columns: int = 4) -> None:
    """Draw a panel for each {title: (model, samples (m, 2), groups (m,))}: data in black, samples coloured by group.

    A legend below a panel names the colours, if there are at most 20 groups.
    """
    rows, columns = -(-len(panels) // columns), min(columns, len(panels))
    figure, all_axes = plots.subplots(rows, columns, figsize=(3.4 * columns, 4.1 * rows), squeeze=False)
    data = [dataset(model.config.dataset).train_images for model, _, _ in panels.values()]
    limit = 1.25 * max(float(points.abs().max()) for points in data)
    for axes in all_axes.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, points, (name, (model, made, groups)) in zip(all_axes.flat, data, panels.items(), strict=False):
        axes.scatter(*points.T.numpy(), s=1, c="black", alpha=0.25, linewidths=0, label="training points")
        several = model.config.groups > 1
        for k in groups.unique().tolist():
            label = group_name(model, k) if several else "samples"
            axes.scatter(*made[groups == k].T.numpy(), s=2, c=f"C{k % 10}", linewidths=0, label=label)
        axes.set(title=name, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xlabel="x₁", ylabel="x₂")
        if model.config.groups <= 20:
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 3, "frameon": False}
            legend = axes.legend(**below, columnspacing=1, handletextpad=0.2)
            for handle in legend.legend_handles:  # larger dots than in the panel, so that they are visible
                handle.set(sizes=[20], alpha=1)
    plots.save_figure(figure, path)


def group_name(model: Gan, k: int) -> str:
    """The name in a legend: the Gaussian's number; if D knows classes, the mode that it stands for."""
    names = dataset(model.config.dataset).class_names
    if model.supervised and model.config.groups >= len(names):
        return f"class {names[int(model.output_of_group[k])]}"
    return f"Gaussian {k}"
