"""GM-GAN: Gaussian Mixture Generative Adversarial Networks (Ben-Yosef, Weinshall). Algorithm 1, all its variants.

    python -m gmgan.train mnist --seed 0 --data data

Run it again to resume; `--describe` prints what would be trained. The classical GAN is the case of one Gaussian
N(0, I). AC-GAN (acgan.py) and the auto-encoder of AE + K-means (kmeans.py) use the same loop with their own step.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor, nn

from common import classifier, graph, plots, run
from common.data import Dataset, described, load
from common.run import Count, Decay, NonNegative, Positive, Range
from gmgan import scores, toy
from gmgan.model import GMGAN, Gan, as_input, correspondence

Whole = Annotated[int, Range(0)]
JUDGED = 5_000  # samples per measurement of `purity_every`
SETS = {  # data set: shape, number of classes (None: as many as the folder has)
    "toy": ((2,), 9),
    "toy_apart": ((2,), 9),
    "digits": ((1, 28, 28), 10),
    "mnist": ((1, 28, 28), 10),
    "fashion_mnist": ((1, 28, 28), 10),
    "cifar10": ((3, 32, 32), 10),
    "stl10": ((3, 96, 96), 10),
    "signs": ((3, 40, 40), None),
    "folder": ((1, 28, 28), None),
    "folder_colour": ((3, 64, 64), None),
}


@dataclass(frozen=True)
class Task:
    """The data and the optimiser of any system. configs/*.yaml give the source of each value; the ledger says why."""

    dataset: str = "mnist"  # one of SETS; signs:<path>, folder:<path>, folder_colour:<path>: your own class folders
    n_classes: Count | None = None  # N: use the first N classes, in the order of their names; None: all
    classes: str | None = None  # or use these classes: "a,b,c"
    latent_dim: Count = 100  # d, dimension of the latent space
    batch_real: Count = 64  # b_D, real points or images per step
    learning_rate: Positive = 2.0e-4  # γ of Adam, constant
    beta1: Decay = 0.5  # β1 of Adam; β2 is 0.999
    epochs: Count = 54  # passes over the training set; an epoch has (its size) / b_D iterations

    LEFT_TO_DATA = ("n_classes",)  # fields that the data fill in if the config has null

    def __post_init__(self):
        described(self.dataset, SETS)
        named = self.classes.split(",") if self.classes is not None else []
        if self.classes is not None and self.n_classes not in (None, len(named)):
            raise ValueError(f"--n-classes: {self.n_classes}, but --classes names {len(named)}; give one of them")
        if "" in named or len(set(named)) < len(named):
            raise ValueError(f"--classes: expected different names with commas, found {self.classes!r}")
        if self.dataset in toy.VARIANCE and (self.classes or self.n_classes):
            raise ValueError("--classes, --n-classes: the toy is judged against all nine Gaussians; it has no subset")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a point or an image."""
        return described(self.dataset, SETS)[0]

    @property
    def class_count(self) -> int:
        """N, the number of classes; 1 for a folder of images that has not been read yet."""
        named = len(self.classes.split(",")) if self.classes else None
        return self.n_classes or named or described(self.dataset, SETS)[1] or 1


@dataclass(frozen=True)
class GanConfig(Task):
    """The fields that GM-GAN and AC-GAN share."""

    batch_fake: Count = 128  # b_G, generated samples in a step of the generator
    width: Count = 64  # channels of the layer next to the image; each layer further in has twice as many; toy: units
    norm: Literal["batch", "none"] = "batch"  # image networks: batch normalisation as in DCGAN
    dense_units: Whole = 0  # image networks: units of a dense layer in G and in D; 0: no such layer
    purity_every: Whole = 0  # epochs between two measurements of the purity of the Gaussians; 0: none

    def __post_init__(self):
        super().__post_init__()
        if len(self.shape) == 1 and (self.dense_units or self.purity_every):
            raise ValueError("--dense-units, --purity-every: the toy has no images, for which these are")


@dataclass(frozen=True)
class Config(GanConfig):
    n_components: Count | None = 10  # K, the number of Gaussians; None: as many as classes
    mean_range: NonNegative = 0.1  # c: μ_k ~ U[-c, c]^d
    sigma: Positive = 0.15  # σ: Σ_k = σ² I or σ I, see sigma_is
    sigma_is: Literal["deviation", "variance"] = "deviation"  # whether σ is a deviation or a variance
    mixture: Literal["static", "dynamic", "dynamic_diagonal"] = "static"  # dynamic: μ_k and A_k are trained
    supervised: bool = False  # the discriminator has one output per class
    class_map: str | None = None  # f(k) of each Gaussian as "0,1,2,…" (K ≥ N), or g of each class (K < N); None: modulo
    cluster_samples: Count = 10_000  # M, samples of each Gaussian from which Algorithm 2 learns

    def __post_init__(self):
        super().__post_init__()
        if self.class_map and not self.supervised:
            raise ValueError("--class-map: of no influence without --supervised true")
        if self.supervised and self.class_count > 1:  # otherwise N is not known yet
            correspondence(self.components, self.class_count, self.class_map)

    @property
    def components(self) -> int:
        """K, the number of Gaussians."""
        return self.n_components or self.class_count

    @property
    def groups(self) -> int:
        """The number of groups of samples: a group is a Gaussian."""
        return self.components

    @property
    def deviation(self) -> float:
        """The standard deviation of each Gaussian along each axis at the start."""
        return self.sigma if self.sigma_is == "deviation" else math.sqrt(self.sigma)

    def build(self) -> nn.Module:
        return GMGAN(self)


class Batch(NamedTuple):
    """The input of a training step."""

    real: Tensor  # (b_D, …): points, or images in [-1, 1]
    labels: Tensor  # (b_D,)
    noise: torch.Generator  # a new one for each step, on the device


Optimizers = dict[str, torch.optim.Optimizer]  # {player: its optimiser}


def train_step(model: GMGAN, optimizers: Optimizers, batch: Batch, precision: str = "fp32") -> dict[str, Tensor]:
    """One iteration of Algorithm 1, lines 5-27: a step of D, then one of G (and of a dynamic mixture).

    Returns scalars on the device: the losses; real, fake: the mean probability of D's first output on real and on
    generated samples; d_grad, g_grad: the norms of the gradients.
    """
    autocast = torch.autocast(batch.real.device.type, torch.bfloat16, enabled=precision == "bf16")
    with autocast:
        with torch.no_grad():
            fake, _ = model.draw(len(batch.real), batch.noise)  # lines 7-9
        on_real, on_fake = model.discriminator(batch.real), model.discriminator(fake)
    d_loss = model.discriminator_loss(on_real, on_fake, batch.labels)  # lines 10-16
    d_grad = descend(d_loss, optimizers["discriminator"])  # line 17

    shown = {"real": on_real[:, 0].sigmoid().mean(), "fake": on_fake[:, 0].sigmoid().mean()}
    with autocast:
        fake, components = model.draw(model.config.batch_fake, batch.noise)  # lines 19-21
        on_fake = model.discriminator(fake)
    g_loss = model.generator_loss(on_fake, components)  # lines 22-26
    g_grad = descend(g_loss, optimizers["generator"])  # line 27
    return {"d_loss": d_loss, "g_loss": g_loss, **shown, "d_grad": d_grad, "g_grad": g_grad}


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """One step of the optimiser down `loss`, on its own parameters only. Returns the norm of the gradient, a scalar."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad()
    loss.backward(inputs=parameters)  # no gradients of the other player
    optimizer.step()
    return nn.utils.get_total_norm([p.grad for p in parameters])


# -------------------------------------------------------------------------------------------------------- the loop


def load_data(config: Task, options: run.Options) -> tuple[Task, Dataset]:
    """Return the config, with N filled in from the data if it was null, and the data, with only the config's classes.

    Raises UserError if a class is missing, if there are fewer than two, or if K, N and the map do not fit together.
    """
    name = config.dataset
    data = toy.dataset(name) if name in toy.VARIANCE else load(name, options.data, options.unofficial_data)
    wanted = config.classes.split(",") if config.classes else list(data.class_names[: config.n_classes])
    if strange := [name for name in wanted if name not in data.class_names]:
        close = "; ".join(f"no class {name!r}{run.nearest(name, data.class_names)}" for name in strange)
        raise run.UserError(f"--classes: {data.name} has {close}")
    if len(wanted) < 2:
        raise run.UserError(f"{data.name}: {len(wanted)} class is left; clustering and the scores need at least 2")
    if wanted != list(data.class_names):
        data = narrowed(data, [data.class_names.index(name) for name in wanted])
    wrong, n = {}, len(data.train_images)
    if config.n_classes and len(wanted) < config.n_classes:
        asked = f"--n-classes: {config.n_classes} asked for, but {data.name} has {data.n_classes} classes"
        wrong[asked] = f"--n-classes {len(wanted)}"
    if config.batch_real > n:
        wrong[f"--batch-real: {config.batch_real} is more than the {n} training images"] = f"--batch-real {n}"
    run.refuse(wrong)
    if config.class_count != len(wanted):
        try:
            config = replace(config, n_classes=len(wanted))
        except ValueError as error:
            raise run.UserError(str(error)) from None
    return config, data


def narrowed(data: Dataset, kept: list[int]) -> Dataset:
    """The data set with only these classes, numbered in this order."""
    number = torch.full((data.n_classes,), -1)
    number[kept] = torch.arange(len(kept))
    train, test = number[data.train_labels], number[data.test_labels]
    return replace(
        data,
        train_images=data.train_images[train >= 0],
        train_labels=train[train >= 0],
        test_images=data.test_images[test >= 0],
        test_labels=test[test >= 0],
        class_names=tuple(data.class_names[i] for i in kept),
        # A digest of its own; otherwise two choices of classes would share a classifier.
        digest=hashlib.sha256(f"{data.digest} {kept}".encode()).hexdigest()[:16],
    )


def train(config: Task, options: run.Options, step: Callable[..., dict[str, Tensor]] = train_step) -> Path:
    """Train or resume one run; returns its folder. step: the training step of the system that the config builds."""
    device = run.set_up(options)
    config, data = load_data(config, options)
    images, labels = data.train_images.to(device), data.train_labels.to(device)

    torch.manual_seed(options.seed)
    model = config.build().to(device, memory_format=torch.channels_last)
    adam = {"lr": config.learning_rate, "betas": (config.beta1, 0.999), "fused": True}
    optimizers = {player: torch.optim.Adam(parameters, **adam) for player, parameters in model.players().items()}
    replayed = graph.replayed(
        lambda batch: step(model, optimizers, batch, options.precision), optimizers.values(), options.graph
    )
    steps = len(images) // config.batch_real  # an epoch leaves out the last few images of its random order
    with run.Run("gmgan", config, options, data.provenance(), device) as r:
        r.resume(model, optimizers, steps)
        while r.epoch < config.epochs:
            order = torch.randperm(len(images), generator=run.generator(options.seed, "order", r.epoch)).to(device)
            while r.step < steps:
                drawn = order[r.step * config.batch_real :][: config.batch_real]
                noise = run.generator(options.seed, "noise", r.epoch, r.step, device=device)
                r.after_step(replayed(Batch(as_input(images[drawn]), labels[drawn], noise)))
            r.after_epoch(**course(model, data, r.epoch + 1, options))
            if (path := r.sample_path()) and isinstance(model, Gan):
                save_samples(model, path)
        r.finish()
    return r.folder


def course(model: nn.Module, data: Dataset, epoch: int, options: run.Options) -> dict[str, float]:
    """The columns of the log besides the losses, after an epoch. For the toy: the likelihood of samples (Fig. 5).

    For images, after every `purity_every` epochs: how far each Gaussian is one class, on 5,000 samples, judged by the
    data set's classifier. The classifier is trained when it is first needed.
    """
    if data.name in toy.VARIANCE:
        return toy.course(model)
    if not isinstance(model, Gan) or not model.config.purity_every or epoch % model.config.purity_every:
        return {}
    network, _ = classifier.trained(data, options.runs / "cache", model.device)
    images, groups = model.sample_mixture(JUDGED)
    return scores.groups_and_classes(model, classifier.classify(network, images), groups, data.n_classes)


def save_samples(model: Gan, path: Path) -> None:
    """Save samples as a PNG, always from the same noise: the toy's over its data, images with one row per group."""
    if model.config.dataset in toy.VARIANCE:
        toy.save_samples(model, path)
    else:
        plots.save_grid(model.sample(10, stream=("samples",)).float() / 255, path, columns=10)


def main(argv: list[str] | None = None) -> None:
    run.start("gmgan.train", Config, train, argv)


if __name__ == "__main__":
    from gmgan.train import main  # under its own name, so that Config exists once

    run.exit_with(main)
