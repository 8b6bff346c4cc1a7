"""SeGMA: Semi-Supervised Gaussian Mixture Auto-Encoder (Śmieja, Wołczyk, Tabor, Geiger). Trains encoder, decoder and means.

    python -m segma.train mnist --seed 0 --data data

Run it again to resume; `--describe` prints what would be trained.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from common import run
from common.data import choose_labels, load
from common.metrics import error_rate
from common.plots import save_grid
from common.run import Count, NonNegative, Positive
from segma.model import (
    build,
    classification_loss,
    classify,
    cramer_wold_distance,
    reconstruction_error,
    silverman_bandwidth,
)

IMAGES = {"digits": (1, 28, 28), "mnist": (1, 28, 28), "fashion_mnist": (1, 28, 28)}


@dataclass(frozen=True)
class Config:
    """One experiment. The values' sources stand in configs/*.yaml; the choices, numbered, in the ledger of segma/README.md."""

    dataset: Literal["digits", "mnist", "fashion_mnist"] = "mnist"  # images in [0, 1], no preprocessing
    n_components: Count = 10  # K, Gaussians; one per class
    latent_dim: Count = 10  # D
    hidden_dim: Count = 1024  # units of a hidden layer, both sides
    hidden_layers: Count = 2  # hidden layers, both sides
    n_labels: Count = 100  # training images whose class is known
    labels: Literal["random", "stratified", "first"] = "random"  # which ones
    loss_over: Literal["unlabelled", "all"] = "unlabelled"  # the part of a batch that MSE and d² see
    batch_unlabelled: Count = 100  # images per step drawn from the whole training set, labels unseen
    batch_labelled: Count = 100  # images per step from the labelled ones; all of them where there are fewer
    distance_weight: NonNegative = 5.0  # α of eq. (9), on log d²
    label_weight: NonNegative = 10.0  # β of eq. (9), on the cross-entropy
    mean_init: NonNegative = 0.1  # scale of the initial means
    learning_rate: Positive = 3.0e-4  # Adam's, constant
    grad_clip_norm: Positive | None = 5.0  # global norm, over all parts together
    grad_clip_value: Positive | None = 1.0  # then each entry to ±this
    epochs: Count = 500  # passes over the training set

    def __post_init__(self):
        if self.latent_dim < 2:
            raise ValueError("latent_dim: φ_D of eq. (3) needs D >= 2 (and is accurate from 10)")

    @property
    def codes_per_batch(self) -> int:
        """How many codes of a batch the distance sees; over K this is N_c, from which γ follows."""
        return self.batch_unlabelled + (min(self.batch_labelled, self.n_labels) if self.loss_over == "all" else 0)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return IMAGES[self.dataset]


def loss_terms(
    networks: dict[str, nn.Module], unlabelled: Tensor, labelled: Tensor, labels: Tensor, config: Config, precision: str = "fp32"
) -> dict[str, Tensor]:
    """Eq. (9) on one batch, and its terms: scalars. unlabelled: (n, C, H, W), labelled: (m, C, H, W), in [0, 1]; labels: (m,)."""
    encoder, decoder, mixture = networks["encoder"], networks["decoder"], networks["mixture"]
    x = torch.cat([unlabelled, labelled])
    seen = config.codes_per_batch  # the unlabelled images, which come first, or all
    with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
        z = encoder(x)
        reconstruction = decoder(z[:seen])
    z = z.float() if precision == "bf16" else z  # distances and logarithms are never taken in bf16

    gamma = silverman_bandwidth(seen / config.n_components)
    mse = reconstruction_error(x[:seen], reconstruction)
    d2 = cramer_wold_distance(z[:seen], mixture.means, mixture.priors, gamma)
    cross_entropy = classification_loss(z[len(unlabelled) :], labels, mixture.means, mixture.priors)
    loss = mse + config.distance_weight * d2.log() + config.label_weight * cross_entropy  # eq. (9)
    return {"loss": loss, "mse": mse, "d2": d2, "cross_entropy": cross_entropy}


def train_step(
    networks: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    unlabelled: Tensor,
    labelled: Tensor,
    labels: Tensor,
    config: Config,
    precision: str = "fp32",
) -> dict[str, Tensor]:
    """One step down eq. (9), on encoder, decoder and means. Arguments as `loss_terms`.

    Returns its terms and the gradient's norm before clipping, scalars on the device.
    """
    terms = loss_terms(networks, unlabelled, labelled, labels, config, precision)
    optimizer.zero_grad()
    terms["loss"].backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = nn.utils.clip_grad_norm_(parameters, config.grad_clip_norm or float("inf"))
    if config.grad_clip_value is not None:
        nn.utils.clip_grad_value_(parameters, config.grad_clip_value)
    optimizer.step()
    return {**terms, "grad_norm": grad_norm}


def as_input(images: Tensor) -> Tensor:
    """uint8 images 0 … 255 as the networks take them: [0, 1], nothing else (Sec. VI-A: no preprocessing)."""
    return images.float() / 255


@torch.no_grad()
def encode(encoder: nn.Module, images: Tensor, precision: str = "fp32", batch: int = 1000) -> Tensor:
    """Codes (N, D), float32, of uint8 images (N, C, H, W), in batches."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return torch.cat([encoder(as_input(part)).float() for part in images.split(batch)])


def train(config: Config, options: run.Options) -> Path:
    """Train, or resume, one run; returns its folder. Algorithm: Sec. V, last paragraph."""
    device = run.set_up(options)
    data = load(config.dataset, options.data, options.unofficial_data)
    if config.n_components != data.n_classes:
        raise run.UserError(f"n_components: {config.n_components} components cannot stand for the {data.n_classes} classes of {data.name}")
    known = choose_labels(data.train_labels, config.n_labels, config.labels, config.n_components, options.seed)
    if config.batch_unlabelled > len(data.train_images):
        raise run.UserError(f"batch_unlabelled: {config.batch_unlabelled} is more than the {len(data.train_images)} training images")
    images = data.train_images.to(device)
    test_images, test_labels = data.test_images.to(device), data.test_labels.to(device)
    known_images, known_labels = as_input(images[known.to(device)]), data.train_labels[known].to(device)

    torch.manual_seed(options.seed)
    networks = {name: network.to(device) for name, network in build(config).items()}
    mixture = networks["mixture"]
    mixture.priors.copy_(torch.bincount(known_labels, minlength=config.n_components) / config.n_labels)
    parameters = [p for network in networks.values() for p in network.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, fused=True)
    noise = torch.randn(config.n_components, 10, config.latent_dim, generator=run.generator(options.seed, "samples")).to(device)

    steps = len(images) // config.batch_unlabelled  # the few images left over come in with another epoch's order
    n_labelled = min(config.batch_labelled, config.n_labels)
    with run.Run("segma", config, options, data.provenance(), device) as r:
        r.resume(networks, {"adam": optimizer}, steps)
        while r.epoch < config.epochs:
            order = torch.randperm(len(images), generator=run.generator(options.seed, "order", r.epoch)).to(device)
            cycle = torch.randperm(config.n_labels, generator=run.generator(options.seed, "labelled", r.epoch)).to(device)
            while r.step < steps:
                drawn = order[r.step * config.batch_unlabelled :][: config.batch_unlabelled]
                known_drawn = cycle[(r.step * n_labelled + torch.arange(n_labelled, device=device)) % config.n_labels]
                unlabelled, labelled = as_input(images[drawn]), known_images[known_drawn]
                r.after_step(train_step(networks, optimizer, unlabelled, labelled, known_labels[known_drawn], config, options.precision))
            codes = encode(networks["encoder"], test_images, options.precision)
            test_error = error_rate(classify(codes, mixture.means, mixture.priors), test_labels)
            r.after_epoch(test_error=test_error, mean_norm=mixture.means.detach().norm(dim=1).mean().item())
            if path := r.sample_path():
                with torch.no_grad():  # one row per component, always from the same noise
                    save_grid(networks["decoder"]((mixture.means[:, None] + noise).flatten(0, 1)), path, columns=10)
        r.finish()
    return r.folder


def main(argv: list[str] | None = None) -> None:
    config, options = run.parse("segma", Config, argv)
    if options.describe:
        examples = {"encoder": torch.zeros(1, *config.image_shape), "decoder": torch.zeros(1, config.latent_dim)}
        print(run.describe(build(config), examples, config, options.json))
    else:
        train(config, options)


if __name__ == "__main__":
    run.exit_with(main)
