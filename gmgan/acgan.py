"""AC-GAN, the supervised baseline (Odena, Olah, Shlens: Conditional Image Synthesis with Auxiliary Classifier GANs).

    python -m gmgan.acgan mnist --seed 0 --data data

The generator gets noise z ~ N(0, I) and a class c, one-hot. The discriminator says whether a sample is real (S) and of
which class it is (C). D maximises L_S + L_C, G maximises L_C - L_S. Everything else is as in GM-GAN (ledger 12).
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import run
from gmgan.model import Discriminator, Gan, generator, initialise
from gmgan.train import Batch, GanConfig, Optimizers, descend, train


@dataclass(frozen=True)
class Config(GanConfig):
    @property
    def groups(self) -> int:
        """The number of groups of samples: a group is a class."""
        return self.class_count

    def build(self) -> nn.Module:
        return ACGAN(self)


class ACGAN(Gan):
    """A generator with input (z, c), and a discriminator with 1 + N outputs: the logit of S, then the logits of C."""

    def __init__(self, config: Config):
        super().__init__(config, supervised=True)
        n, networks = config.class_count, (config.width, config.norm == "batch", config.dense_units)
        self.generator = generator(config.latent_dim + n, config.shape, *networks)
        self.discriminator = Discriminator(config.shape, 1 + n, *networks)
        initialise(self.generator)
        initialise(self.discriminator)
        self.output_of_group = self.output_of_class = torch.arange(n)  # output c of C stands for class c

    def players(self) -> dict[str, list[nn.Parameter]]:
        """The parameters of each player."""
        return {"discriminator": list(self.discriminator.parameters()), "generator": list(self.generator.parameters())}

    def generate(self, epsilon: Tensor, groups: Tensor, multiplier: float = 1.0) -> Tensor:
        """As Gan.generate; the groups (B,) are classes."""
        one_hot = F.one_hot(groups, self.config.class_count).to(epsilon.dtype)
        return self.generator(torch.cat([math.sqrt(multiplier) * epsilon, one_hot], 1))

    def source_loss(self, logits: Tensor, real: bool) -> Tensor:
        """-log P(S = real) or -log P(S = fake), mean over the batch. logits: (B, 1 + N); the first one is S."""
        return F.softplus(-logits[:, 0] if real else logits[:, 0]).mean()

    def class_loss(self, logits: Tensor, classes: Tensor) -> Tensor:
        """-log P(C = c), mean over the batch. logits: (B, 1 + N); all but the first are C. classes: (B,)."""
        return F.cross_entropy(logits[:, 1:], classes)

    def discriminator_loss(self, on_real: Tensor, on_fake: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
        """-(L_S + L_C) / 2, as Algorithm 1 halves the sum over real and fake samples; a scalar, nats.

        on_real, on_fake: logits (b_D, 1 + N).  labels, classes: (b_D,), of real and generated samples.
        """
        source = self.source_loss(on_real, True) + self.source_loss(on_fake, False)
        return (source + self.class_loss(on_real, labels) + self.class_loss(on_fake, classes)) / 2

    def generator_loss(self, on_fake: Tensor, classes: Tensor) -> Tensor:
        """-(L_C - L_S); the source term does not saturate, as in eq. (2) of GM-GAN. on_fake: logits (b_G, 1 + N)."""
        return self.source_loss(on_fake, True) + self.class_loss(on_fake, classes)


def train_step(model: ACGAN, optimizers: Optimizers, batch: Batch, precision: str = "fp32") -> dict[str, Tensor]:
    """A step of D, then one of G, in the order of Algorithm 1. Returns the same scalars as GM-GAN's step."""
    autocast = torch.autocast(batch.real.device.type, torch.bfloat16, enabled=precision == "bf16")
    with autocast:
        with torch.no_grad():
            fake, classes = model.draw(len(batch.real), batch.noise)
        on_real, on_fake = model.discriminator(batch.real), model.discriminator(fake)
    d_loss = model.discriminator_loss(on_real, on_fake, batch.labels, classes)
    d_grad = descend(d_loss, optimizers["discriminator"])

    shown = {"real": on_real[:, 0].sigmoid().mean(), "fake": on_fake[:, 0].sigmoid().mean()}
    with autocast:
        fake, classes = model.draw(model.config.batch_fake, batch.noise)
        on_fake = model.discriminator(fake)
    g_loss = model.generator_loss(on_fake, classes)
    g_grad = descend(g_loss, optimizers["generator"])
    return {"d_loss": d_loss, "g_loss": g_loss, **shown, "d_grad": d_grad, "g_grad": g_grad}


def main(argv: list[str] | None = None) -> None:
    run.start("gmgan.acgan", Config, functools.partial(train, step=train_step), argv)


if __name__ == "__main__":
    from gmgan.acgan import main  # under its own name, so that Config exists once

    run.exit_with(main)
