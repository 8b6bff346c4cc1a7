"""SeGMA: Semi-Supervised Gaussian Mixture Auto-Encoder (Śmieja, Wołczyk, Tabor, Geiger). Trains encoder, decoder and means.

    python -m segma.train mnist --seed 0 --data data

Run it again to resume; `--describe` prints what would be trained. The same loop trains the paper's baselines, m1m2.py and adgm.py.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from common import graph, run
from common.data import Dataset, choose_labels, described, load
from common.metrics import error_rate
from common.plots import save_grid
from common.run import Count, NonNegative, Positive
from segma.model import (
    bernoulli_error,
    build,
    classes,
    classification_loss,
    cramer_wold_distance,
    decode,
    encode,
    place,
    priors,
    reconstruction_error,
    silverman_bandwidth,
)

__all__ = ["Config", "build", "classes", "decode", "encode", "examples", "place", "priors", "train_step"]  # what every system brings

SETS = {  # data set: image shape, classes; None: the number is found in the folder
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
    """What any system learns from, and how it is stepped. The values' sources stand in configs/*.yaml, the choices in the ledger."""

    dataset: str = "mnist"  # one of SETS; folder:<path> and folder_colour:<path> are a person's own. [0, 1], no preprocessing
    n_components: Count | None = 10  # K, Gaussians; one per class. None: as many as the data have classes
    n_labels: Count = 100  # training images whose class is known
    labels: Literal["random", "stratified", "first"] = "random"  # which ones
    batch_unlabelled: Count = 100  # images per step drawn from the whole training set, labels unseen
    batch_labelled: Count = 100  # images per step from the labelled ones; all of them where there are fewer
    learning_rate: Positive = 3.0e-4  # Adam's, constant
    grad_clip_norm: Positive | None = 5.0  # global norm, over all parts together
    grad_clip_value: Positive | None = 1.0  # then each entry to ±this
    epochs: Count = 500  # passes over the training set

    LEFT_TO_DATA = ("n_components",)  # what a run fills in where the config has null

    def __post_init__(self):
        described(self.dataset, SETS)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return described(self.dataset, SETS)[0]

    @property
    def labelled_per_batch(self) -> int:
        return min(self.batch_labelled, self.n_labels)


@dataclass(frozen=True)
class Config(Task):
    """SeGMA; with label_weight 0 unsupervised, and with n_components 1 as well CWAE."""

    latent_dim: Count = 10  # D
    hidden_dim: Count = 1024  # units of a hidden layer, both sides
    hidden_layers: Count = 2  # hidden layers, both sides
    decoder_layers: Count | None = None  # hidden layers of the decoder, where they are not as many
    reconstruction: Literal["squared", "bernoulli"] = "squared"  # the reconstruction error: eq. (1), or the Bernoulli cross-entropy
    loss_over: Literal["unlabelled", "all"] = "unlabelled"  # the part of a batch that the reconstruction error and d² see
    distance_weight: NonNegative = 5.0  # α of eq. (9), on log d²
    label_weight: NonNegative = 10.0  # β of eq. (9), on the cross-entropy; 0: no label is seen
    mean_init: NonNegative = 0.1  # scale of the initial means

    def __post_init__(self):
        super().__post_init__()
        if self.latent_dim < 2:
            raise ValueError("latent_dim: φ_D of eq. (3) needs D >= 2 (and is accurate from 10)")

    @property
    def labelled_per_batch(self) -> int:
        return min(self.batch_labelled, self.n_labels) if self.label_weight else 0

    @property
    def codes_per_batch(self) -> int:
        """How many codes of a batch the distance sees; over K this is N_c, from which γ follows."""
        return self.batch_unlabelled + (self.labelled_per_batch if self.loss_over == "all" else 0)


def examples(config: Config) -> dict[str, Tensor]:
    """An input for each network that is called, for `--describe`."""
    return {"encoder": torch.zeros(1, *config.image_shape), "decoder": torch.zeros(1, config.latent_dim)}


class Batch(NamedTuple):
    """What a training step gets. Images in [0, 1]."""

    unlabelled: Tensor  # (n, C, H, W)
    labelled: Tensor  # (m, C, H, W)
    labels: Tensor  # (m,)
    m1_alone: bool  # m1m2.py's first phase
    noise: torch.Generator  # for systems that draw; its own for each step, on the device


def loss_terms(
    networks: dict[str, nn.Module], unlabelled: Tensor, labelled: Tensor, labels: Tensor, config: Config, precision: str = "fp32"
) -> dict[str, Tensor]:
    """Eq. (9) on one batch, and its terms: scalars. unlabelled: (n, C, H, W), labelled: (m, C, H, W), in [0, 1]; labels: (m,)."""
    encoder, decoder, mixture = networks["encoder"], networks["decoder"], networks["mixture"]
    x = torch.cat([unlabelled, labelled])
    seen = config.codes_per_batch  # the unlabelled images, which come first, or all
    with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
        z = encoder(x)
        if config.reconstruction == "squared":
            error = {"mse": reconstruction_error(x[:seen], decoder(z[:seen]))}
        else:
            error = {"bernoulli": bernoulli_error(x[:seen], decoder[:-1](z[:seen]))}  # without its last layer, the sigmoid
    z = z.float() if precision == "bf16" else z  # distances and logarithms are never taken in bf16

    gamma = silverman_bandwidth(seen / config.n_components)
    d2 = cramer_wold_distance(z[:seen], mixture.means, mixture.priors, gamma)
    loss = sum(error.values()) + config.distance_weight * d2.log()  # eq. (9) with β = 0
    if config.label_weight == 0:
        return {"loss": loss, **error, "d2": d2}
    cross_entropy = classification_loss(z[len(unlabelled) :], labels, mixture.means, mixture.priors)
    loss = loss + config.label_weight * cross_entropy  # eq. (9)
    return {"loss": loss, **error, "d2": d2, "cross_entropy": cross_entropy}


def train_step(
    networks: dict[str, nn.Module], optimizer: torch.optim.Optimizer, batch: Batch, config: Config, precision: str = "fp32"
) -> dict[str, Tensor]:
    """One step down eq. (9), on encoder, decoder and means.

    Returns its terms and the gradient's norm before clipping, scalars on the device.
    """
    terms = loss_terms(networks, batch.unlabelled, batch.labelled, batch.labels, config, precision)
    return {**terms, "grad_norm": descend(terms["loss"], optimizer, config)}


def descend(loss: Tensor, optimizer: torch.optim.Optimizer, config: Task) -> Tensor:
    """One step of the optimiser down `loss`, clipped by global norm and then by value. Returns the norm before, a scalar."""
    optimizer.zero_grad()
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = nn.utils.clip_grad_norm_(parameters, config.grad_clip_norm or float("inf"))
    if config.grad_clip_value is not None:
        nn.utils.clip_grad_value_(parameters, config.grad_clip_value)
    optimizer.step()
    return grad_norm


def as_input(images: Tensor) -> Tensor:
    """uint8 images 0 … 255 as the networks take them: [0, 1], nothing else (Sec. VI-A: no preprocessing)."""
    return images.float() / 255


def system_of(values: dict) -> ModuleType:
    """The module that the key `module` of a config names: m1m2, adgm, or (without the key) this one, SeGMA itself.

    It brings Config, build, train_step, and encode, decode, classes, priors, place as model.py describes them.
    """
    return run.module_of("segma", values)


@torch.no_grad()
def encode_all(system: ModuleType, networks: dict[str, nn.Module], images: Tensor, precision: str = "fp32", batch: int = 1000) -> Tensor:
    """Codes (N, D), float32, of uint8 images (N, C, H, W), in batches."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return torch.cat([system.encode(networks, as_input(part)).float() for part in images.split(batch)])


def for_data(config: Task, data: Dataset) -> Task:
    """The config with as many components as the data have classes, where it left that open. Raises UserError where they cannot fit."""
    if data.n_classes < 2 and config.labelled_per_batch:
        raise run.UserError(f"{data.name} has {data.n_classes} class; labels need at least 2 (--label-weight 0 trains without)")
    if config.n_components is None:
        config = replace(config, n_components=data.n_classes)
    if config.n_components != data.n_classes and config.labelled_per_batch:
        raise run.UserError(f"n_components: {config.n_components} components cannot stand for the {data.n_classes} classes of {data.name}")
    if config.batch_unlabelled > len(data.train_images):
        raise run.UserError(f"batch_unlabelled: {config.batch_unlabelled} is more than the {len(data.train_images)} training images")
    return config


def train(config: Task, options: run.Options) -> Path:
    """Train, or resume, one run; returns its folder. Algorithm: Sec. V, last paragraph."""
    device = run.set_up(options)
    data = load(config.dataset, options.data, options.unofficial_data)
    config, system = for_data(config, data), system_of(vars(config))
    m = config.labelled_per_batch
    if m or config.n_components == data.n_classes:  # else neither the loss nor the priors have a use for labels
        known = choose_labels(data.train_labels, config.n_labels, config.labels, data.n_classes, options.seed)
    else:
        known = torch.arange(0)
    images = data.train_images.to(device)
    test_images, test_labels = data.test_images.to(device), data.test_labels.to(device)
    known_images, known_labels = as_input(images[known.to(device)]), data.train_labels[known].to(device)

    torch.manual_seed(options.seed)
    networks = {name: network.to(device) for name, network in system.build(config).items()}
    if "mixture" in networks and config.n_components == data.n_classes:  # else one component, p = 1
        networks["mixture"].priors.copy_(torch.bincount(known_labels, minlength=data.n_classes) / config.n_labels)
    parameters = [p for network in networks.values() for p in network.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, fused=True)
    noise = torch.randn(config.n_components, 10, config.latent_dim, generator=run.generator(options.seed, "samples")).to(device)
    rows = torch.arange(config.n_components, device=device).repeat_interleave(10)

    step = graph.replayed(
        lambda batch: system.train_step(networks, optimizer, batch, config, options.precision), [optimizer], options.graph
    )
    steps = len(images) // config.batch_unlabelled  # the few images left over come in with another epoch's order
    with run.Run("segma", config, options, data.provenance(), device) as r:
        r.resume(networks, {"adam": optimizer}, steps)
        while r.epoch < config.epochs:
            order = torch.randperm(len(images), generator=run.generator(options.seed, "order", r.epoch)).to(device)
            cycle = torch.randperm(config.n_labels, generator=run.generator(options.seed, "labelled", r.epoch)).to(device)
            m1_alone = r.epoch < getattr(config, "m1_epochs", 0)
            while r.step < steps:
                drawn = order[r.step * config.batch_unlabelled :][: config.batch_unlabelled]
                known_drawn = cycle[(r.step * m + torch.arange(m, device=device)) % config.n_labels]
                generator = run.generator(options.seed, "noise", r.epoch, r.step, device=device)
                batch = Batch(as_input(images[drawn]), known_images[known_drawn], known_labels[known_drawn], m1_alone, generator)
                r.after_step(step(batch))
            more = {}
            if m and not m1_alone:  # M1 alone has no classifier yet
                found = system.classes(networks, encode_all(system, networks, test_images, options.precision))
                more["test_error"] = error_rate(found, test_labels)
            if "mixture" in networks:
                more["mean_norm"] = networks["mixture"].means.detach().norm(dim=1).mean().item()
            r.after_epoch(**more)
            if path := r.sample_path():
                with torch.no_grad():  # one row per component, always from the same noise
                    save_grid(system.decode(networks, system.place(networks, noise.flatten(0, 1), rows)), path, columns=10)
        r.finish()
    return r.folder


def main(argv: list[str] | None = None) -> None:
    config, options = run.parse("segma", argv)
    if options.describe:
        system = system_of(vars(config))
        networks = system.build(replace(config, n_components=config.n_components or 1))
        print(run.describe(networks, system.examples(config), config, options.json))
    else:
        train(config, options)


if __name__ == "__main__":
    run.exit_with(main)
