"""GM-GAN's mixture prior, networks and losses (Sec. 2). The paper gives no architecture: the ledger says where ours come from.

Toy, points in the plane: two dense networks. Images: a light DCGAN, which halves the image down to 7×7 (28), 4×4 (32), 5×5 (40) or
6×6 (96), one stride-2 layer each. A discriminator has one output, or one for each class.
"""

import functools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# -------------------------------------------------------------------------------------------------------------- the prior


class Mixture(nn.Module):
    """K equally likely Gaussians N(μ_k, A_k A_kᵀ) in the latent space, eq. (4) and Algorithm 1, lines 1-3.

    means: μ_k ~ U[-c, c]^d.  scales: A_k, all σ I at first (√σ I where σ is a variance): one number where they stay fixed (static),
    or parameters, as the means are (dynamic): (K, d, d) in full, (K, d) diagonal. K = 1, c = 0 and σ = 1 is the classical N(0, I).
    """

    def __init__(self, n_components: int, latent_dim: int, mean_range: float, deviation: float, kind: str):
        super().__init__()
        means = torch.empty(n_components, latent_dim).uniform_(-mean_range, mean_range)
        if kind == "static":
            self.register_buffer("means", means)
            self.register_buffer("scales", torch.tensor(deviation))
        else:
            ones = torch.ones(n_components, latent_dim)
            self.means = nn.Parameter(means)
            self.scales = nn.Parameter(deviation * (ones.diag_embed() if kind == "dynamic" else ones))

    def forward(self, noise: Tensor, components: Tensor, multiplier: float = 1.0) -> Tensor:
        """z = A_k ε + μ_k, the re-parametrisation of Sec. 2: noise ε ~ N(0, I), (B, d), and k, (B,), to latent vectors (B, d).

        multiplier: the σ of Sec. 4.3, on the covariance after training; 1 while training.
        """
        scaled = math.sqrt(multiplier) * noise
        if self.scales.dim() == 3:
            spread = torch.einsum("bij,bj->bi", self.scales[components], scaled)
        else:
            spread = (self.scales[components] if self.scales.dim() else self.scales) * scaled
        return self.means[components] + spread


# ------------------------------------------------------------------------------------------------------------- networks


def stages(height: int) -> int:
    """How often an image is halved: while its side stays even and at least 4. 28 -> 7, 32 -> 4, 40 -> 5, 96 -> 6."""
    n = 0
    while height % 2 == 0 and height // 2 >= 4:
        height, n = height // 2, n + 1
    return n


class ToImage(nn.Module):
    """(B, H·W·C) to (B, C, H, W), channels last in memory, as every layer around it; two layouts in one gradient cost 15 % of a step."""

    def __init__(self, channels: int, side: int):
        super().__init__()
        self.size = (side, side, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, self.size).permute(0, 3, 1, 2)


class ToVector(nn.Module):
    """Its inverse: (B, C, H, W) to (B, H·W·C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)


def generator(inputs: int, shape: tuple[int, ...], width: int, norm: bool) -> nn.Sequential:
    """From a latent vector (B, inputs) to points (B, 2), or images (B, C, H, W) in [-1, 1]. width: units, or channels next to the image."""
    if len(shape) == 1:
        return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, *shape))
    channels, height, _ = shape
    n = stages(height)
    side, wide = height >> n, width << (n - 1)  # 28: 7, 2·width
    layers: list[nn.Module] = [nn.Linear(inputs, wide * side * side), ToImage(wide, side)]  # (2·width, 7, 7)
    while n:
        layers += [nn.BatchNorm2d(wide), nn.ReLU()] if norm else [nn.ReLU()]
        n -= 1
        out = wide // 2 if n else channels
        layers += [nn.ConvTranspose2d(wide, out, 4, stride=2, padding=1)]  # (width, 14, 14), then (C, 28, 28)
        wide = out
    return nn.Sequential(*layers, nn.Tanh())


class Discriminator(nn.Module):
    """Logits of D(x), (B, outputs): the sigmoid of each is a probability. x: points (B, 2), or images (B, C, H, W) in [-1, 1]."""

    def __init__(self, shape: tuple[int, ...], outputs: int, width: int, norm: bool):
        super().__init__()
        layers: list[nn.Module] = []
        if len(shape) == 1:
            layers += [nn.Linear(*shape, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2)]
            features = width
        else:
            channels, height, _ = shape
            for i in range(stages(height)):
                out = width << i
                layers.append(nn.Conv2d(channels, out, 4, stride=2, padding=1))  # (width, 14, 14), then (2·width, 7, 7)
                layers += [nn.BatchNorm2d(out)] if norm and i else []  # none next to the image, as in DCGAN
                layers.append(nn.LeakyReLU(0.2))
                channels, height = out, height // 2
            layers.append(ToVector())
            features = channels * height * height
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(features, outputs)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(self.body(x))
        return logits.float() if logits.dtype == torch.bfloat16 else logits  # losses are never taken in bf16


def initialise(network: nn.Module) -> None:
    """DCGAN's: weights N(0, 0.02), batch normalisation's N(1, 0.02), biases 0. Dense networks keep PyTorch's own."""
    if any(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in network.modules()):
        for m in network.modules():
            if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear | nn.BatchNorm2d):
                nn.init.normal_(m.weight, 1.0 if isinstance(m, nn.BatchNorm2d) else 0.0, 0.02)
                nn.init.zeros_(m.bias)


# --------------------------------------------------------------------------------------------------------------- losses


def discriminator_loss(real: Tensor, fake: Tensor, targets: Tensor | None) -> Tensor:
    """L(D), Algorithm 1, lines 10-16: a scalar, nats, 1/(2 b_D) times the sum over both halves of the batch.

    real, fake: logits (b_D, 1), eq. (3); or (b_D, N) with targets (b_D,), the output of each real image's class: that one is to be 1
    for it and all others 0, and all N are to be 0 for a fake.
    """
    wanted = torch.zeros_like(real)
    wanted.scatter_(1, targets[:, None] if targets is not None else torch.zeros_like(real[:, :1], dtype=torch.int64), 1.0)
    return (_binary(real, wanted) + _binary(fake, torch.zeros_like(fake))) / 2


def generator_loss(fake: Tensor, targets: Tensor | None) -> Tensor:
    """L(G), Algorithm 1, lines 22-26: a scalar, nats. fake: logits (b_G, 1), eq. (2); or (b_G, N) with targets (b_G,), f(k) of each."""
    wanted = torch.zeros_like(fake)
    wanted.scatter_(1, targets[:, None] if targets is not None else torch.zeros_like(fake[:, :1], dtype=torch.int64), 1.0)
    return _binary(fake, wanted)


def _binary(logits: Tensor, wanted: Tensor) -> Tensor:
    """-log D where 1 is wanted, -log(1 - D) where 0: summed over outputs, mean over the batch."""
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum(1).mean()


# ------------------------------------------------------------------------------------- Gaussians and classes, supervised


@functools.cache
def correspondence(n_components: int, n_classes: int, text: str | None, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    """Which output of the discriminator stands for each Gaussian, (K,), and for each class, (N,).

    K ≥ N: one output a class, and f: [K] -> [N] sends several Gaussians to one class (Sec. 2). K < N: what the paper calls f: [K] -> [N]
    cannot be; a map g: [N] -> [K] clusters the classes, with one output a Gaussian. text: the map's values, "0,1,2,0,…": f of each
    Gaussian, or g of each class; None: k mod N, or n mod K. Made once: a training step copies nothing to its device. Raises ValueError
    where the text is no such map.
    """
    k, n = n_components, n_classes
    size, values = (k, n) if k >= n else (n, k)
    of, to = ("Gaussian", "class") if k >= n else ("class", "Gaussian")
    if text is None:
        chosen = [i % values for i in range(size)]
    else:
        try:
            chosen = [int(part) for part in text.split(",")]
        except ValueError:
            raise ValueError(f"class_map: expected whole numbers with commas, one for each {of}, found {text!r}") from None
    if len(chosen) != size:
        raise ValueError(f"class_map: names {len(chosen)} {of}{'es' if of == 'class' else 's'}, expected {size}: K = {k}, N = {n}")
    wrong = [value for value in chosen if not 0 <= value < values]
    if wrong:
        raise ValueError(f"class_map: {to} {wrong[0]} does not exist; expected 0 … {values - 1}")
    missing = sorted(set(range(values)) - set(chosen))
    if missing:
        raise ValueError(f"class_map: leaves {to} {', '.join(map(str, missing))} without a {of}")
    mapped, own = torch.tensor(chosen, device=device), torch.arange(values, device=device)
    return (mapped, own) if k >= n else (own, mapped)
