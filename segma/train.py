"""SeGMA (Śmieja, Wołczyk, Tabor, Geiger), Sec. V: trains encoder, decoder and the mixture's means.

    python -m segma.train mnist --seed 0 --data data

Run it again to resume; `--describe` prints what would be trained. The paper's baselines, M1+M2 (m1m2.py) and ADGM
(adgm.py), use the same loop with their own step.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from common import graph, run
from common.data import Dataset, described, draw_labels, load
from common.metrics import error_rate
from common.plots import save_grid
from common.run import Count, NonNegative, Positive
from segma.model import GenerativeModel, SeGMA, as_input

SETS = {  # data set: image shape, number of classes (None: as many as the folder has)
    "digits": ((1, 28, 28), 10),
    "mnist": ((1, 28, 28), 10),
    "fashion_mnist": ((1, 28, 28), 10),
    "svhn": ((3, 32, 32), 10),
    "svhn_extra": ((3, 32, 32), 10),
    "celeba": ((3, 64, 64), 4),
    "celeba_train": ((3, 64, 64), 4),
    "folder": ((1, 28, 28), None),
    "folder_colour": ((3, 64, 64), None),
}


@dataclass(frozen=True)
class Task:
    """The data and the optimiser of any system. configs/*.yaml give the source of each value; the ledger says why."""

    dataset: str = "mnist"  # one of SETS; folder:<path> and folder_colour:<path> are your own images
    n_components: Count | None = 10  # K, the number of Gaussians, one per class; None: as many as classes
    n_labels: Count = 100  # training images whose class is known
    labels: Literal["random", "stratified", "first"] = "random"  # how these images are chosen
    batch_unlabelled: Count = 100  # images per step from the whole training set, without labels
    batch_labelled: Count = 100  # labelled images per step; all of them if there are fewer
    learning_rate: Positive = 3.0e-4  # of Adam, constant
    grad_clip_norm: Positive | None = 5.0  # clip the norm over all parameters to this
    grad_clip_value: Positive | None = 1.0  # then clip each entry to ± this
    epochs: Count = 500  # passes over the training set

    LEFT_TO_DATA = ("n_components",)  # fields that the data fill in if the config has null

    def __post_init__(self):
        described(self.dataset, SETS)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return described(self.dataset, SETS)[0]

    @property
    def components(self) -> int:
        """K; 1 if n_components is None because the data have not been read yet."""
        return self.n_components or 1

    @property
    def labelled_per_batch(self) -> int:
        return min(self.batch_labelled, self.n_labels)


@dataclass(frozen=True)
class Config(Task):
    """SeGMA. With label_weight 0 it is unsupervised; with n_components 1 as well it is CWAE."""

    latent_dim: Count = 10  # D, dimension of a code
    hidden_dim: Count = 1024  # units of a hidden layer, both sides
    hidden_layers: Count = 2  # hidden layers, both sides
    decoder_layers: Count | None = None  # hidden layers of the decoder; None: hidden_layers
    reconstruction: Literal["squared", "bernoulli"] = "squared"  # eq. (1), or the Bernoulli cross-entropy
    loss_over: Literal["unlabelled", "all"] = "unlabelled"  # the images that reconstruction error and d² use
    distance_weight: NonNegative = 5.0  # α of eq. (9), on log d²
    label_weight: NonNegative = 10.0  # β of eq. (9), on the cross-entropy; 0: labels are not used
    mean_init: NonNegative = 0.1  # scale of the initial means

    def __post_init__(self):
        super().__post_init__()
        if self.latent_dim < 2:
            raise ValueError("--latent-dim: φ_D of eq. (3) needs D >= 2 (and is accurate from 10)")

    @property
    def labelled_per_batch(self) -> int:
        return min(self.batch_labelled, self.n_labels) if self.label_weight else 0

    @property
    def codes_per_batch(self) -> int:
        """The number of codes per batch in the distance. Divided by K it is N_c, which determines γ."""
        return self.batch_unlabelled + (self.labelled_per_batch if self.loss_over == "all" else 0)

    def build(self) -> nn.Module:
        return SeGMA(self)


class Batch(NamedTuple):
    """The input of a training step. Images are floats in [0, 1]."""

    unlabelled: Tensor  # (n, C, H, W)
    labelled: Tensor  # (m, C, H, W)
    labels: Tensor  # (m,)
    m1_alone: bool  # whether this step is in M1's phase of m1m2.py
    noise: torch.Generator  # a new one for each step, on the device; SeGMA does not use it


def train_step(
    model: SeGMA, optimizer: torch.optim.Optimizer, batch: Batch, precision: str = "fp32"
) -> dict[str, Tensor]:
    """One step of gradient descent on eq. (9), Sec. V. It moves encoder, decoder and means; the priors are fixed.

    Returns the terms of eq. (9) and the norm of the gradient before clipping, scalars on the device.
    """
    terms = model.loss(batch.unlabelled, batch.labelled, batch.labels, precision)
    return {**terms, "grad_norm": descend(terms["loss"], optimizer, model.config)}


def descend(loss: Tensor, optimizer: torch.optim.Optimizer, config: Task) -> Tensor:
    """One step of the optimiser down `loss`, clipped by norm and then by value. Returns the norm before clipping."""
    optimizer.zero_grad()
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = nn.utils.clip_grad_norm_(parameters, config.grad_clip_norm or float("inf"))
    if config.grad_clip_value is not None:
        nn.utils.clip_grad_value_(parameters, config.grad_clip_value)
    optimizer.step()
    return grad_norm


# ------------------------------------------------------------------------------------------------------------- the loop


def for_data(config: Task, data: Dataset, seed: int) -> tuple[Task, Tensor]:
    """Return the config, with K filled in from the data if it was null, and the labelled images.

    The images are given as indices of training images. There are none if neither loss nor priors use labels.
    Raises UserError if config and data do not fit together.
    """
    n, images, known, wrong = data.n_classes, len(data.train_images), torch.arange(0), {}
    config = replace(config, n_components=config.n_components or n)
    k = config.n_components
    if n < 2 and config.labelled_per_batch:  # no flag helps a baseline, which needs labels
        wrong[f"{data.name} has {n} class; labels need at least 2"] = "--label-weight 0" * isinstance(config, Config)
    elif k != n and config.labelled_per_batch:
        wrong[f"--n-components: {k} cannot stand for the {n} classes of {data.name}"] = f"--n-components {n}"
    if n > 1 and (config.labelled_per_batch or k == n):
        known, lacking = draw_labels(data.train_labels, config.n_labels, config.labels, data.class_names, seed)
        wrong |= lacking
    if (batch := config.batch_unlabelled) > images:
        wrong[f"--batch-unlabelled: {batch} is more than the {images} training images"] = f"--batch-unlabelled {images}"
    run.refuse(wrong)
    return config, known


def train(config: Task, options: run.Options, step: Callable[..., dict[str, Tensor]] = train_step) -> Path:
    """Train or resume one run; returns its folder. step: the training step of the system that the config builds."""
    device = run.set_up(options)
    data = load(config.dataset, options.data, options.unofficial_data)
    config, known = for_data(config, data, options.seed)
    seed, m, n_classes = options.seed, config.labelled_per_batch, data.n_classes
    images = data.train_images.to(device)
    test_images, test_labels = data.test_images.to(device), data.test_labels.to(device)
    known_images, known_labels = as_input(images[known.to(device)]), data.train_labels[known].to(device)

    torch.manual_seed(seed)
    model = config.build().to(device)
    if isinstance(model, SeGMA) and config.n_components == n_classes > 1:  # Sec. V; otherwise one component, p = 1
        model.priors.copy_(torch.bincount(known_labels, minlength=n_classes) / config.n_labels)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)
    replayed = graph.replayed(
        lambda batch: step(model, optimizer, batch, options.precision), [optimizer], options.graph
    )
    steps = len(images) // config.batch_unlabelled  # an epoch leaves out the last few images of its random order
    with run.Run("segma", config, options, data.provenance(), device) as r:
        r.resume(model, {"adam": optimizer}, steps)
        while r.epoch < config.epochs:
            order = torch.randperm(len(images), generator=run.generator(seed, "order", r.epoch)).to(device)
            cycle = torch.randperm(config.n_labels, generator=run.generator(seed, "labelled", r.epoch)).to(device)
            m1_alone = r.epoch < getattr(config, "m1_epochs", 0)
            while r.step < steps:
                drawn = order[r.step * config.batch_unlabelled :][: config.batch_unlabelled]
                x, y = as_input(images[drawn]), cycle[(r.step * m + torch.arange(m, device=device)) % config.n_labels]
                noise = run.generator(seed, "noise", r.epoch, r.step, device=device)
                r.after_step(replayed(Batch(x, known_images[y], known_labels[y], m1_alone, noise)))
            more = {}
            if m and not m1_alone:  # M1 has no classifier
                # In the run's precision, which saves time. eval.py computes the error in fp32.
                with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
                    z = model.encode(test_images)
                more["test_error"] = error_rate(model.classify(z), test_labels)
            if isinstance(model, SeGMA):
                more["mean_norm"] = model.means.detach().norm(dim=1).mean().item()
            r.after_epoch(**more)
            if path := r.sample_path():
                save_samples(model, path, seed)
        r.finish()
    return r.folder


def save_samples(model: GenerativeModel, path: Path, seed: int) -> None:
    """Save ten samples of each component, one row per component, always from the same noise."""
    k = len(model.priors)
    noise = torch.randn(k, 10, model.config.latent_dim, generator=run.generator(seed, "samples")).to(model.device)
    rows = torch.arange(k, device=model.device).repeat_interleave(10)
    with torch.no_grad():
        save_grid(model.decode(model.place(noise.flatten(0, 1), rows)), path, columns=10)


def main(argv: list[str] | None = None) -> None:
    run.start("segma.train", Config, train, argv)


if __name__ == "__main__":
    from segma.train import main  # under its own name, so that Config exists once

    run.exit_with(main)
