"""The two baselines of Table 6 with the same G and D: the vanilla GAN, and GM-GAN (Ben-Yosef, Weinshall 2018), the dynamic one.

    python -m gan_responsibility.train flowers10-gmgan --seed 0 --data data

One fake for each real image. GM-GAN: z = A_k ε + μ_k with k uniform, μ and A trained with G. Vanilla: z ~ N(0, I).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.optim import descend
from gan_responsibility import model
from gan_responsibility.model import Mixture
from gan_responsibility.train import Batch, Task, wide

__all__ = ["Config", "build", "counts", "examples", "generate", "players", "train_step"]  # what every system brings


@dataclass(frozen=True)
class Config(Task):
    module: Literal["gan"] = "gan"
    prior: Literal["normal", "mixture"] = "mixture"  # z ~ N(0, I), or GM-GAN's
    saturating: bool = False  # G minimises log(1 - D), else -log D


def build(config: Config) -> dict[str, nn.Module]:
    mixture = {"mixture": Mixture(config.components, config.latent_dim, config.mean_range, config.deviation)}
    networks = {
        **(mixture if config.prior == "mixture" else {}),
        "generator": model.generator(config.shape, config.latent_dim),
        "encoder": model.encoder(config.shape, config.networks),
        "discriminator": model.discriminator(config.shape),
    }
    for network in networks.values():
        model.initialise(network)
    return networks


def counts(config: Config) -> dict[str, float]:
    """Table 6's number of parameters."""
    total = sum(p.numel() for network in build(config).values() for p in network.parameters())
    return {"parameters": total, "parameters_as_counted": total}


def examples(config: Config) -> dict[str, Tensor]:
    return {
        **({"mixture": torch.zeros(2, config.components, config.latent_dim)} if config.prior == "mixture" else {}),
        "generator": torch.zeros(2, config.latent_dim),
        "encoder": torch.zeros(2, *config.shape),
        "discriminator": torch.zeros(2, model.features(config.shape)),
    }


def players(networks: dict[str, nn.Module]) -> dict[str, list[nn.Parameter]]:
    """The parameters of each optimiser."""
    names = {"discriminator": ("encoder", "discriminator"), "generator": ("generator", "mixture")}
    return {player: [p for name in parts if name in networks for p in networks[name].parameters()] for player, parts in names.items()}


def train_step(
    networks: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer], batch: Batch, config: Config, precision: str = "fp32"
) -> dict[str, Tensor]:
    """D's and G's gradients of eq. (2) on as many fakes as real images, then both steps. Returns losses, on the device."""
    device, n = batch.real.device, len(batch.real)
    components = torch.randint(config.components, (n,), generator=batch.noise, device=device)
    noise = torch.randn(n, config.latent_dim, generator=batch.noise, device=device, dtype=batch.real.dtype)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        fake = generate(networks, noise, F.one_hot(components, config.components).to(noise.dtype))
        on_real, on_fake = (wide(networks["discriminator"](networks["encoder"](x))) for x in (batch.real, fake))
    d_loss = F.softplus(-on_real).mean() + F.softplus(on_fake).mean()
    g_loss = -F.softplus(on_fake).mean() if config.saturating else F.softplus(-on_fake).mean()
    mine = players(networks)
    found = {"discriminator": torch.autograd.grad(d_loss, mine["discriminator"], retain_graph=True)}
    found["generator"] = torch.autograd.grad(g_loss, mine["generator"])
    return {"d_loss": d_loss, "g_loss": g_loss} | {f"{player}_grad": descend(optimizers[player], found[player]) for player in found}


def generate(networks: dict[str, nn.Module], noise: Tensor, weights: Tensor) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] from ε (B, D_z) and weights of the Gaussians (B, K), of which the vanilla GAN has none."""
    return networks["generator"](networks["mixture"].blend(noise, weights) if "mixture" in networks else noise)
