"""AC-GAN (Odena, Olah, Shlens: Conditional Image Synthesis with Auxiliary Classifier GANs, 2016), GM-GAN's supervised baseline.

    python -m gmgan.train mnist-acgan --seed 0 --data data

The generator gets noise z ~ N(0, I) and a class c, one-hot; the discriminator says whether a sample is real (S) and of which class (C).
D climbs L_S + L_C, G climbs L_C - L_S, with GM-GAN's networks, batch sizes and optimiser.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmgan.model import Discriminator, generator, initialise
from gmgan.train import PLAYERS, Batch, Gan, descend

__all__ = ["PLAYERS", "Config", "build", "examples", "generate", "train_step"]  # what every system brings


@dataclass(frozen=True)
class Config(Gan):
    module: Literal["acgan"] = "acgan"

    @property
    def groups(self) -> int:
        """How many kinds of sample can be asked for: classes."""
        return self.class_count


def build(config: Config) -> dict[str, nn.Module]:
    """Generator of (z, c) and discriminator with 1 + N outputs: the logit of S, then those of C."""
    norm, n = config.norm == "batch", config.class_count
    networks = {
        "generator": generator(config.latent_dim + n, config.shape, config.width, norm),
        "discriminator": Discriminator(config.shape, 1 + n, config.width, norm),
    }
    for network in networks.values():
        initialise(network)
    return networks


def examples(config: Config) -> dict[str, Tensor]:
    return {"generator": torch.zeros(2, config.latent_dim + config.class_count), "discriminator": torch.zeros(2, *config.shape)}


def source_loss(logits: Tensor, real: bool) -> Tensor:
    """-log P(S = real) or -log P(S = fake), mean over the batch. logits: (B, 1 + N), of which the first."""
    return F.softplus(-logits[:, 0] if real else logits[:, 0]).mean()


def class_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """-log P(C = c), mean over the batch. logits: (B, 1 + N), of which all but the first; classes: (B,)."""
    return F.cross_entropy(logits[:, 1:], classes)


def train_step(
    networks: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer], batch: Batch, config: Config, precision: str = "fp32"
) -> dict[str, Tensor]:
    """A step of D down -(L_S + L_C), halved as Algorithm 1 halves the sum over real and fake, then one of G down -(L_C - L_S)."""
    device = batch.real.device
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        with torch.no_grad():
            fake, classes = sample(networks, config, len(batch.real), batch.noise)
        on_real, on_fake = networks["discriminator"](batch.real), networks["discriminator"](fake)
    on_source = source_loss(on_real, True) + source_loss(on_fake, False)
    d_loss = (on_source + class_loss(on_real, batch.labels) + class_loss(on_fake, classes)) / 2
    d_grad = descend(d_loss, optimizers["discriminator"])

    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        fake, classes = sample(networks, config, config.batch_fake, batch.noise)
        logits = networks["discriminator"](fake)
    g_loss = source_loss(logits, True) + class_loss(logits, classes)  # the first non-saturating, as in eq. (2) of GM-GAN
    g_grad = descend(g_loss, optimizers["generator"])
    shown = {"real": on_real[:, 0].sigmoid().mean(), "fake": on_fake[:, 0].sigmoid().mean()}
    return {"d_loss": d_loss, "g_loss": g_loss, **shown, "d_grad": d_grad, "g_grad": g_grad}


def sample(networks: dict[str, nn.Module], config: Config, n: int, noise: torch.Generator) -> tuple[Tensor, Tensor]:
    """n generated ones and the class (n,) of each, all classes equally likely."""
    classes = torch.randint(config.class_count, (n,), generator=noise, device=noise.device)
    epsilon = torch.randn(n, config.latent_dim, generator=noise, device=noise.device)
    return generate(networks, epsilon, classes), classes


def generate(networks: dict[str, nn.Module], epsilon: Tensor, components: Tensor, multiplier: float = 1.0) -> Tensor:
    """Points (B, 2) or images (B, C, H, W) in [-1, 1] from noise ε ~ N(0, I) (B, d) and classes (B,). multiplier: σ of Sec. 4.3."""
    inputs = networks["generator"][0].in_features
    one_hot = F.one_hot(components, inputs - epsilon.shape[1]).to(epsilon.dtype)
    return networks["generator"](torch.cat([math.sqrt(multiplier) * epsilon, one_hot], 1))
