"""The two baselines of Table 6, with the same G and D: the vanilla GAN and the dynamic GM-GAN of Ben-Yosef, Weinshall.

    python -m gan_responsibility.gan flowers10-gm-gan --seed 0 --data data

There is one fake per real image. GM-GAN: z = A_k ε + μ_k, k uniform, μ and A trained with G. Vanilla: z ~ N(0, I).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import run
from gan_responsibility import train
from gan_responsibility.model import Mixture, MixtureGAN, initialise, to_float32


class StandardNormal(nn.Module):
    """N(0, I), the prior of the vanilla GAN. It has no Gaussians to blend."""

    def blend(self, noise: Tensor, weights: Tensor) -> Tensor:
        return noise


class GAN(MixtureGAN):
    """G, D and, for GM-GAN, the mixture. config: a `Config`. The initial weights come from torch's global generator."""

    def __init__(self, config: "Config"):
        prior: nn.Module = StandardNormal()
        if config.prior == "mixture":
            prior = Mixture(config.components, config.latent_dim, config.mean_range, config.deviation)
        super().__init__(config, prior)
        initialise(self)

    def losses(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """The losses of eq. (2): D's; and that of G, μ and A. real, fake: D's logits (B, 1). Scalars, nats."""
        d_loss = F.softplus(-real).mean() + F.softplus(fake).mean()
        return d_loss, -F.softplus(fake).mean() if self.config.saturating else F.softplus(-fake).mean()

    def mode_weights(self, images: Tensor) -> Tensor:
        """The weight of each Gaussian, (K,): 1/K, whatever the images."""
        return torch.full((self.config.components,), 1 / self.config.components)


@dataclass(frozen=True)
class Config(train.Task):
    prior: Literal["normal", "mixture"] = "mixture"  # z ~ N(0, I), or from GM-GAN's mixture
    saturating: bool = False  # G minimises log(1 - D); otherwise -log D

    def __post_init__(self):
        super().__post_init__()
        if self.dataset == "toy":
            raise ValueError("--dataset: the toy is for the proposed system alone")

    def build(self) -> GAN:
        return GAN(self)


def train_step(
    model: GAN, optimizers: dict[str, torch.optim.Optimizer], batch: train.Batch, precision: str = "fp32"
) -> dict[str, Tensor]:
    """Both gradients of eq. (2), with as many fakes as real images, then both steps. Returns scalars on the device."""
    config, n, device = model.config, len(batch.real), batch.real.device
    components = torch.randint(config.components, (n,), generator=batch.noise, device=device)
    noise = batch.real.new_empty(n, config.latent_dim).normal_(generator=batch.noise)
    # Without autocast's cache, as in train.py: D's gradients on real images and on fakes are summed in fp32.
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
        fakes = model.decode(noise, F.one_hot(components, config.components).to(noise.dtype))
        on_real, on_fakes = (to_float32(model.discriminator(model.encoder(x))) for x in (batch.real, fakes))
    d_loss, g_loss = model.losses(on_real, on_fakes)

    players = model.players()
    for optimizer in optimizers.values():
        optimizer.zero_grad()
    d_loss.backward(inputs=players["discriminator"], retain_graph=True)
    g_loss.backward(inputs=players["generator"])
    for optimizer in optimizers.values():
        optimizer.step()
    return {"d_loss": d_loss.detach(), "g_loss": g_loss.detach()} | train.gradient_norms(players)


def main(argv: list[str] | None = None) -> None:
    run.start("gan_responsibility.gan", Config, lambda config, options: train.train(config, options, train_step), argv)


if __name__ == "__main__":
    from gan_responsibility.gan import main  # under its own name, so that Config exists once

    run.exit_with(main)
