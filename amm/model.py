"""The networks of AMM and SAMM, layer by layer from Tables 3 to 10, and the losses of Algorithms 1 and 2.

Codes y (B, K) and z (B, D) travel through 1×1 layers as maps of one pixel. Every layer has a bias; dropout acts on a layer's input.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEAK = 0.2
Layer = tuple[int, int, int, float]  # channels out, width, stride, dropout on the input: the columns of the tables

# Tables 3, 5 and 6; 9. Both streams of a row have the same numbers. Beside them the sides of the maps, from the input on.
MNIST_ENCODER: list[Layer] = [(32, 2, 1, 0.2), (32, 3, 2, 0.2), (64, 3, 2, 0.2), (64, 3, 1, 0.2), (128, 4, 1, 0.2)]  # 28: 27 13 6 4 1
MNIST_DECODER: list[Layer] = [  # 1: 1 4 6 13 27 28
    (128, 1, 1, 0.0), (64, 4, 1, 0.2), (64, 3, 1, 0.2), (32, 3, 2, 0.2), (32, 3, 2, 0.2), (1, 2, 1, 0.2),
]  # fmt: skip
MNIST_IMAGES: list[Layer] = [(32, 2, 1, 0.0), (32, 3, 2, 0.2), (64, 3, 2, 0.2), (64, 3, 1, 0.2), (128, 4, 1, 0.2)]  # 28: 27 13 6 4 1
# The last row of Table 9 is printed as 4 channels, width 2, stride 1, which ends at 16×16: its columns have slipped by one.
SVHN_DECODER: list[Layer] = [  # 1: 1 4 6 13 15 32
    (512, 1, 1, 0.0), (256, 4, 1, 0.0), (256, 3, 1, 0.0), (128, 3, 2, 0.0), (128, 3, 1, 0.0), (3, 4, 2, 0.0),
]  # fmt: skip
# Tables 7 and 10, the image layers: channels, width, padding, pooling, dropout (in D alone).
SVHN_IMAGES = [
    (96, 3, 1, 1, 0.0), (96, 3, 1, 1, 0.0), (96, 3, 1, 2, 0.0),
    (192, 3, 1, 1, 0.1), (192, 3, 1, 1, 0.0), (192, 3, 1, 2, 0.0), (384, 3, 0, 1, 0.1),
]  # fmt: skip


class InputDropout(nn.Module):
    """Dropout whose masks cost a fifth of PyTorch's on a CPU: 16 random bits an entry, from whole 64-bit draws.

    The probability is met to 2⁻¹⁶; in bf16 what is kept is scaled by the bf16 next to 1 / (1 - p): 1.25 exactly, or 1.109 for 1.111.
    Nothing is dropped in evaluation mode.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def extra_repr(self) -> str:
        return f"p={self.p}"

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        # In the layout of x: a product of two layouts takes several times as long.
        bits = draws.view(torch.int16)[: x.numel()].as_strided(x.shape, torch.empty_like(x, device="meta").stride())
        edge = round(self.p * 2**16) - 2**15
        kept = bits.clamp(edge - 1, edge).sub_(edge - 1)  # 1 where bits >= edge, else 0: a comparison takes eight times as long
        return x * kept.to(x.dtype).mul_(1 / (1 - self.p))


def sampled(mean: Tensor, log_variance: Tensor) -> Tensor:
    """μ + ExpN, eqs. (8), (10), (12) with eq. (20): exp(s / 2) ε, ε ~ N(0, I)."""
    return mean + (log_variance / 2).exp() * torch.randn_like(mean)


def pixel(code: Tensor) -> Tensor:
    """A code (B, C) as a map of one pixel (B, C, 1, 1)."""
    return code[:, :, None, None]


def wide(x: Tensor) -> Tensor:
    """bf16 as float32: samples, softmaxes and losses are never taken in bf16."""
    return x.float() if x.dtype == torch.bfloat16 else x


# ------------------------------------------------------------------------------------------------------------- encoder


class Coupled(nn.Module):
    """One row of each stream: `receiver`_a = Leak(BN(y + z)), the other's Leak(BN(own)). Tables 3 and 7.

    The tables have y receive z, which is the factorisation q(z|x) q(y|x, z), eq. (7); the roles change places for eq. (6).
    """

    def __init__(self, inputs: int, layer: Layer, n_components: int, receiver: str, labelled: bool, pool: int = 1):
        super().__init__()
        channels, width, stride, p = layer
        self.dropout = InputDropout(p)
        self.y, self.z = (nn.Conv2d(inputs, channels, width, stride) for _ in "yz")
        self.y_norm, self.z_norm = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.receiver, self.leak, self.pool = receiver, nn.LeakyReLU(LEAK), nn.AvgPool2d(pool) if pool > 1 else nn.Identity()
        # Of SAMM under eq. (6): a known label in place of what the y stream would say.
        self.label = nn.Linear(n_components, channels) if labelled and receiver == "z" else None

    def forward(self, y: Tensor | None, z: Tensor, label: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
        """Maps (B, C, H, W) of both streams. Where y is known there is no G_y: its stream is not run, its batch norms see nothing."""
        if label is not None:
            z = self.z(self.dropout(z))
            return None, self._activated(self.z_norm(z if self.label is None else z + pixel(self.label(label))))
        y, z = self.y(self.dropout(y)), self.z(self.dropout(z))
        y, z = (y + z, z) if self.receiver == "y" else (y, z + y)
        return self._activated(self.y_norm(y)), self._activated(self.z_norm(z))

    def _activated(self, x: Tensor) -> Tensor:
        return self.pool(self.leak(x))


class Encoder(nn.Module):
    """G_y and G_z of images: Table 3 (28×28) or Table 7 (32×32)."""

    def __init__(
        self, shape: tuple[int, int, int], n_components: int, latent_dim: int, receiver: str, labelled: bool = False, y_noise: bool = True
    ):
        super().__init__()
        if shape[1] == 28:
            self.shared, channels, rows = nn.Identity(), shape[0], [(layer, 1) for layer in MNIST_ENCODER]
        else:
            self.shared, channels = svhn_images(shape[0], norm=True), SVHN_IMAGES[-1][0]
            rows = [((192, 1, 1, 0.0), 1), ((96, 1, 1, 0.0), 6)]
        self.rows = nn.ModuleList()
        for layer, pool in rows:
            self.rows.append(Coupled(channels, layer, n_components, receiver, labelled, pool))
            channels = layer[0]
        self.y_heads = nn.ModuleList(nn.Conv2d(channels, n_components, 1) for _ in range(1 + y_noise))  # y_μ, y_σ
        self.z_heads = nn.ModuleList(nn.Conv2d(channels, latent_dim, 1) for _ in range(2))  # z_μ, z_σ

    def forward(self, x: Tensor, label: Tensor | None = None) -> tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor]]:
        """Means and log-variances of h_y, (B, K), and z, (B, D). x: (B, C, H, W) in [0, 1].

        label: (B, K), one-hot, where y is known: then None stands for h_y's. Without noise h_y's log-variance is -inf.
        """
        y = z = self.shared(x)
        for row in self.rows:
            y, z = row(y, z, label)
        of_y = None
        if y is not None:
            mean, *log_variance = (wide(head(y).flatten(1)) for head in self.y_heads)
            of_y = mean, log_variance[0] if log_variance else torch.full_like(mean, -torch.inf)
        return of_y, tuple(wide(head(z).flatten(1)) for head in self.z_heads)


def svhn_images(channels: int, norm: bool) -> nn.Sequential:
    """Tables 7 and 10, x_1 to x_7: 32-32-32-16-16-16-8-6, the layout of the networks that the dagger in Table 2 points to."""
    layers: list[nn.Module] = []
    for out, width, padding, pool, p in SVHN_IMAGES:
        layers += [InputDropout(p)] if p and not norm else []
        layers.append(nn.Conv2d(channels, out, width, padding=padding))
        layers += [nn.BatchNorm2d(out)] if norm else []
        layers.append(nn.LeakyReLU(LEAK))
        layers += [nn.MaxPool2d(pool)] if pool > 1 else []
        channels = out
    return nn.Sequential(*layers)


# ----------------------------------------------------------------------------------------------- components and decoder


class Components(nn.Module):
    """G_z(y), the mixture p(z|y): Table 4 (28×28), whose variance is 1 unless `variance` is "learned", or Table 8 (32×32), where it is."""

    def __init__(self, shape: tuple[int, int, int], n_components: int, latent_dim: int, variance: str):
        super().__init__()
        channels = n_components
        layers: list[nn.Module] = []
        if shape[1] == 28:
            for p in (0.0, 0.2):
                layers += [InputDropout(p), nn.Linear(channels, 64), nn.BatchNorm1d(64), nn.LeakyReLU(LEAK)]
                channels = 64
        self.body = nn.Sequential(*layers)
        self.mean = nn.Linear(channels, latent_dim)
        self.log_variance = nn.Linear(channels, latent_dim) if variance == "learned" else None

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """y: (B, K) one-hot. Means and log-variances (B, D)."""
        h = self.body(y)
        mean = wide(self.mean(h))
        return mean, torch.zeros_like(mean) if self.log_variance is None else wide(self.log_variance(h))


class Decoder(nn.Module):
    """G_x(y, z): Table 5 (28×28) or Table 9 (32×32): y_na = BN(y + z), z_na = Leak(BN(z)), images sigmoid(y + z)."""

    def __init__(self, shape: tuple[int, int, int], n_components: int, latent_dim: int):
        super().__init__()
        self.leak, self.sigmoid = nn.LeakyReLU(LEAK), nn.Sigmoid()
        inputs_y, inputs_z = n_components, latent_dim
        self.y, self.z, self.y_norms, self.z_norms, self.dropouts = (nn.ModuleList() for _ in range(5))
        for channels, width, stride, p in MNIST_DECODER if shape[1] == 28 else SVHN_DECODER:
            self.dropouts.append(InputDropout(p))
            self.y.append(nn.ConvTranspose2d(inputs_y, channels, width, stride))
            self.z.append(nn.ConvTranspose2d(inputs_z, channels, width, stride))
            if channels != shape[0]:
                self.y_norms.append(nn.BatchNorm2d(channels))
                self.z_norms.append(nn.BatchNorm2d(channels))
            inputs_y = inputs_z = channels

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """y: (B, K), z: (B, D). Images (B, C, H, W) in [0, 1]."""
        y, z = pixel(y), pixel(z)
        for i, dropout in enumerate(self.dropouts):
            y, z = self.y[i](dropout(y)), self.z[i](dropout(z))
            if i < len(self.y_norms):
                y, z = self.y_norms[i](y + z), self.leak(self.z_norms[i](z))
        return self.sigmoid(wide(y + z))


# --------------------------------------------------------------------------------------------------------- discriminator


class Discriminator(nn.Module):
    """D(x, y, z): Table 6 (28×28) or Table 10 (32×32, whose p_0 must mean x_9 for x_5, and whose last row is missing)."""

    def __init__(self, shape: tuple[int, int, int], n_components: int, latent_dim: int):
        super().__init__()
        if shape[1] == 28:
            layers, channels = [], shape[0]
            for out, width, stride, p in MNIST_IMAGES:
                layers += [InputDropout(p), nn.Conv2d(channels, out, width, stride), nn.LeakyReLU(LEAK)]
                channels = out
            self.x, code, p = nn.Sequential(*layers), 64, 0.2
        else:
            self.x = nn.Sequential(
                *svhn_images(shape[0], norm=False), nn.Conv2d(384, 192, 1), nn.LeakyReLU(LEAK),
                nn.Conv2d(192, 96, 1), nn.LeakyReLU(LEAK), nn.AvgPool2d(6),
            )  # fmt: skip
            channels, code, p = 96, 96, 0.1
        self.y, self.z = (self._dense([inputs, code, code], [0.0, p]) for inputs in (n_components, latent_dim))
        joint = channels + 2 * code
        self.p = nn.Sequential(*self._dense([joint, joint, joint], [p, p]), InputDropout(p), nn.Linear(joint, 1))

    @staticmethod
    def _dense(sizes: list[int], dropouts: list[float]) -> nn.Sequential:
        layers: list[nn.Module] = []
        for fan_in, fan_out, p in zip(sizes, sizes[1:], dropouts, strict=False):
            layers += [InputDropout(p), nn.Linear(fan_in, fan_out), nn.LeakyReLU(LEAK)]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """Logits (B,) of D: (B, C, H, W), (B, K), (B, D)."""
        return wide(self.p(torch.cat([self.x(x).flatten(1), self.y(y), self.z(z)], 1)).squeeze(1))


def initialise(network: nn.Module) -> None:
    """Kernels N(0, 0.02), biases 0 (Sec. 4)."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
            nn.init.zeros_(module.bias)


# --------------------------------------------------------------------------------------------------------------- losses


def discriminator_loss(rho_q: Tensor, rho_p: Tensor) -> Tensor:
    """L_D of Algorithm 1: -mean log ρ_q - mean log(1 - ρ_p), from logits (M,) of the inferred and the generated joint. Nats."""
    return F.softplus(-rho_q).mean() + F.softplus(rho_p).mean()


def decoder_loss(rho_p: Tensor) -> Tensor:
    """Of G_x and G_z(y): -mean log ρ_p, from logits (M,)."""
    return F.softplus(-rho_p).mean()


def encoder_loss(rho_q: Tensor) -> Tensor:
    """Of G_y and G_z(x): -mean log(1 - ρ_q), from logits (M,)."""
    return F.softplus(rho_q).mean()


def squared_slopes(d: Callable[..., Tensor], points: Sequence[Tensor], create_graph: bool = False) -> Tensor:
    """Squared norms of the gradient of d(x, y, z), (M,), in x, in y and in z at these points, each (M, …): (3, M)."""
    points = [point.detach().requires_grad_() for point in points]
    gradients = torch.autograd.grad(d(*points).sum(), points, create_graph=create_graph)
    return torch.stack([wide(g).flatten(1).square().sum(1) for g in gradients])


def gradient_penalty(
    discriminator: nn.Module, first: tuple[Tensor, ...], second: tuple[Tensor, ...], t: Tensor, norm: str = "joint"
) -> Tensor:
    """Eq. (18) without λ: mean (‖∇ D‖₂ - 1)², at points t of the way from `first` to `second`.

    first, second: (x, y, z), each (M, …), without gradients; t: (M,), uniform; norm: "joint", of the gradient of D's logit in (x, y, z)
    together; "each", the sum of a penalty for x, one for y and one for z; or "probability", as joint, of σ(D). A scalar through which D's
    parameters have gradients.
    """
    points = [a + t.view(-1, *[1] * (a.dim() - 1)) * (b - a) for a, b in zip(first, second, strict=True)]
    d = (lambda *joint: discriminator(*joint).sigmoid()) if norm == "probability" else discriminator
    squares = squared_slopes(d, points, create_graph=True)
    if norm != "each":
        squares = squares.sum(0, keepdim=True)
    return ((squares + 1e-12).sqrt() - 1).square().sum(0).mean()  # the root has no gradient at 0


# -------------------------------------------------------------------------------------------------------- classification


def log_component_density(z: Tensor, means: Tensor, log_variances: Tensor) -> Tensor:
    """log p(z|y = k), (B, K), of z (B, D) under K diagonal Gaussians (K, D)."""
    distances = (z[:, None] - means).square() / log_variances.exp()  # (B, K, D)
    return -0.5 * (distances + log_variances + math.log(2 * math.pi)).sum(-1)


def bayes_classes(z: Tensor, means: Tensor, log_variances: Tensor, priors: Tensor) -> Tensor:
    """ŷ_z, eq. (19): argmax_k p(z|y = k) p(y = k), (B,)."""
    return (log_component_density(z, means, log_variances) + priors.log()).argmax(1)
