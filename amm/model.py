"""AMM and SAMM: the networks of Tables 3 to 10, layer by layer, and the samples and losses of Algorithms 1 and 2.

Categories y are (B, K), codes z are (B, D); 1×1 layers take them as maps of one pixel. Every layer has a bias. Dropout
acts on a layer's input.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import run

LEAK = 0.2
Layer = tuple[int, int, int, float]  # channels out, width, stride, dropout on the input: the columns of the tables

# Tables 3, 5, 6 and 9. Both streams of a row have the same layer. The comments give the sides of the maps, input first.
MNIST_ENCODER: list[Layer] = [  # 28: 27 13 6 4 1
    (32, 2, 1, 0.2), (32, 3, 2, 0.2), (64, 3, 2, 0.2), (64, 3, 1, 0.2), (128, 4, 1, 0.2),
]  # fmt: skip
MNIST_DECODER: list[Layer] = [  # 1: 1 4 6 13 27 28
    (128, 1, 1, 0.0), (64, 4, 1, 0.2), (64, 3, 1, 0.2), (32, 3, 2, 0.2), (32, 3, 2, 0.2), (1, 2, 1, 0.2),
]  # fmt: skip
MNIST_IMAGES: list[Layer] = [  # 28: 27 13 6 4 1
    (32, 2, 1, 0.0), (32, 3, 2, 0.2), (64, 3, 2, 0.2), (64, 3, 1, 0.2), (128, 4, 1, 0.2),
]  # fmt: skip
# Table 9 prints 4 channels, width 2, stride 1 in its last row, which would end at 16×16: its columns are shifted.
SVHN_DECODER: list[Layer] = [  # 1: 1 4 6 13 15 32
    (512, 1, 1, 0.0), (256, 4, 1, 0.0), (256, 3, 1, 0.0), (128, 3, 2, 0.0), (128, 3, 1, 0.0), (3, 4, 2, 0.0),
]  # fmt: skip
# Tables 7 and 10, the image layers: channels, width, padding, pooling, dropout (only in D).
SVHN_IMAGES = [
    (96, 3, 1, 1, 0.0), (96, 3, 1, 1, 0.0), (96, 3, 1, 2, 0.0),
    (192, 3, 1, 1, 0.1), (192, 3, 1, 1, 0.0), (192, 3, 1, 2, 0.0), (384, 3, 0, 1, 0.1),
]  # fmt: skip


class InputDropout(nn.Module):
    """nn.Dropout with cheaper masks: 16 random bits per entry, taken from 64-bit draws.

    p is exact to 2⁻¹⁶. In bf16 the factor 1 / (1 - p) is rounded to bf16: 1.25 is exact, 1.111 becomes 1.109.
    """

    # A training step of `mnist` (100 images, one CPU thread) takes 450 ms in fp32 and 309 ms in bf16; with nn.Dropout
    # it takes 577 and 454 ms (NOTES.md).

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def extra_repr(self) -> str:
        return f"p={self.p}"

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        # In the memory layout of x: the product of two layouts takes several times as long.
        strides = torch.empty_like(x, device="meta").stride()
        bits = draws.view(torch.int16)[: x.numel()].as_strided(x.shape, strides)
        edge = round(self.p * 2**16) - 2**15
        kept = bits.clamp(edge - 1, edge).sub_(edge - 1)  # 1 if bits >= edge, else 0; 8 times as fast as a comparison
        return x * kept.to(x.dtype).mul_(1 / (1 - self.p))


def sampled(mean: Tensor, log_variance: Tensor) -> Tensor:
    """μ + ExpN, eqs. (8), (10), (12) with eq. (20): exp(s / 2) ε, ε ~ N(0, I)."""
    return mean + (log_variance / 2).exp() * torch.randn_like(mean)


def as_map(code: Tensor) -> Tensor:
    """A code (B, C) as a map of one pixel (B, C, 1, 1)."""
    return code[:, :, None, None]


def to_float32(x: Tensor) -> Tensor:
    """bf16 as float32: samples, softmaxes and losses are never computed in bf16."""
    return x.float() if x.dtype == torch.bfloat16 else x


def as_input(images: Tensor) -> Tensor:
    """uint8 images 0 … 255 as the networks take them: floats in [0, 1] (Sec. 4). Floats stay as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


# ------------------------------------------------------------------------------------------------------------- encoder


class Coupled(nn.Module):
    """One row of both streams, Tables 3 and 7: Leak(BN(y + z)) in the receiving stream, Leak(BN(own)) in the other.

    In the tables the y stream receives z: the factorisation q(z|x) q(y|x, z), eq. (7). Under eq. (6) z receives y.
    """

    def __init__(self, inputs: int, layer: Layer, n_components: int, receiver: str, labelled: bool, pool: int = 1):
        super().__init__()
        channels, width, stride, p = layer
        self.dropout = InputDropout(p)
        self.y, self.z = (nn.Conv2d(inputs, channels, width, stride) for _ in "yz")
        self.y_norm, self.z_norm = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.receiver, self.leak = receiver, nn.LeakyReLU(LEAK)
        self.pool = nn.AvgPool2d(pool) if pool > 1 else nn.Identity()
        # SAMM under eq. (6): the known label replaces the y stream.
        self.label = nn.Linear(n_components, channels) if labelled and receiver == "z" else None

    def forward(self, y: Tensor | None, z: Tensor, label: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
        """The next maps (B, C, H, W) of both streams.

        With a known label there is no G_y: its stream is not run, and its batch normalisation is not updated.
        """
        if label is not None:
            z = self.z(self.dropout(z))
            return None, self._activated(self.z_norm(z if self.label is None else z + as_map(self.label(label))))
        y, z = self.y(self.dropout(y)), self.z(self.dropout(z))
        y, z = (y + z, z) if self.receiver == "y" else (y, z + y)
        return self._activated(self.y_norm(y)), self._activated(self.z_norm(z))

    def _activated(self, x: Tensor) -> Tensor:
        return self.pool(self.leak(x))


class Encoder(nn.Module):
    """G_y and G_z of images: Table 3 (28×28) or Table 7 (32×32)."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        n_components: int,
        latent_dim: int,
        receiver: str,
        labelled: bool = False,
        y_noise: bool = True,
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

    def forward(
        self, x: Tensor, label: Tensor | None = None
    ) -> tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor]]:
        """Means and log-variances of h_y, (B, K), and of z, (B, D). x: (B, C, H, W) in [0, 1].

        label: (B, K), one-hot, if y is known; then the pair of h_y is None.
        Without noise the log-variance of h_y is -inf.
        """
        y = z = self.shared(x)
        for row in self.rows:
            y, z = row(y, z, label)
        h = None
        if y is not None:
            mean, *log_variance = (to_float32(head(y).flatten(1)) for head in self.y_heads)
            h = mean, log_variance[0] if log_variance else torch.full_like(mean, -torch.inf)
        return h, tuple(to_float32(head(z).flatten(1)) for head in self.z_heads)


def svhn_images(channels: int, norm: bool) -> nn.Sequential:
    """Tables 7 and 10, x_1 to x_7: sides 32-32-32-16-16-16-8-6, as in the networks that Table 2's dagger refers to."""
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
    """G_z(y), the mixture p(z|y): Table 4 (28×28) or Table 8 (32×32). Variance is 1 unless `variance` is learned."""

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
        """Means and log-variances (B, D) of the components y (B, K), one-hot."""
        h = self.body(y)
        mean = to_float32(self.mean(h))
        return mean, torch.zeros_like(mean) if self.log_variance is None else to_float32(self.log_variance(h))


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
        """Images (B, C, H, W) in [0, 1] of y (B, K) and z (B, D)."""
        y, z = as_map(y), as_map(z)
        for i, dropout in enumerate(self.dropouts):
            y, z = self.y[i](dropout(y)), self.z[i](dropout(z))
            if i < len(self.y_norms):
                y, z = self.y_norms[i](y + z), self.leak(self.z_norms[i](z))
        return self.sigmoid(to_float32(y + z))


# ------------------------------------------------------------------------------------------------------- discriminator


class Discriminator(nn.Module):
    """D(x, y, z): Table 6 (28×28) or Table 10 (32×32; there p_0 must take x_9, not x_5).

    dropout: as printed in the tables; False: none.
    """

    def __init__(self, shape: tuple[int, int, int], n_components: int, latent_dim: int, dropout: bool = True):
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
        for module in self.modules():
            if isinstance(module, InputDropout) and not dropout:
                module.p = 0.0

    @staticmethod
    def _dense(sizes: list[int], dropouts: list[float]) -> nn.Sequential:
        layers: list[nn.Module] = []
        for fan_in, fan_out, p in zip(sizes, sizes[1:], dropouts, strict=False):
            layers += [InputDropout(p), nn.Linear(fan_in, fan_out), nn.LeakyReLU(LEAK)]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """Logits (B,) of D. x: (B, C, H, W), y: (B, K), z: (B, D)."""
        return to_float32(self.p(torch.cat([self.x(x).flatten(1), self.y(y), self.z(z)], 1)).squeeze(1))


def initialise(network: nn.Module) -> None:
    """Kernels N(0, 0.02), biases 0 (Sec. 4)."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
            nn.init.zeros_(module.bias)


# --------------------------------------------------------------------------------------------------- eqs. (18) and (19)

Joint = tuple[Tensor, Tensor, Tensor]  # x, y and z of M samples, each (M, …)


def squared_slopes(d: Callable[..., Tensor], points: Sequence[Tensor], create_graph: bool = False) -> Tensor:
    """Squared norms (3, M) of the gradients of d(x, y, z), (M,), in x, in y and in z. points: x, y, z, each (M, …)."""
    points = [point.detach().requires_grad_() for point in points]
    gradients = torch.autograd.grad(d(*points).sum(), points, create_graph=create_graph)
    return torch.stack([to_float32(g).flatten(1).square().sum(1) for g in gradients])


def gradient_penalty(
    discriminator: nn.Module,
    first: Joint,
    second: Joint,
    t: Tensor,
    norm: Literal["joint", "each", "probability"] = "joint",
) -> Tensor:
    """Eq. (18) without λ: the mean of (‖∇ D‖₂ - 1)² at the points (1 - t) first + t second.

    first, second: without gradients.  t: (M,), uniform on [0, 1].  norm: "joint", one norm of the gradient of D's logit
    in (x, y, z); "each", the sum of a penalty for x, one for y and one for z; "probability", as joint, of σ(logit).
    Returns a scalar with gradients for the parameters of D.
    """
    points = [a + t.view(-1, *[1] * (a.dim() - 1)) * (b - a) for a, b in zip(first, second, strict=True)]
    d = (lambda *joint: discriminator(*joint).sigmoid()) if norm == "probability" else discriminator
    squares = squared_slopes(d, points, create_graph=True)
    if norm != "each":
        squares = squares.sum(0, keepdim=True)
    return ((squares + 1e-12).sqrt() - 1).square().sum(0).mean()  # the root has no finite gradient at 0


def log_component_density(z: Tensor, means: Tensor, log_variances: Tensor) -> Tensor:
    """log p(z|y = k), (B, K), of z (B, D) under K diagonal Gaussians (K, D)."""
    distances = (z[:, None] - means).square() / log_variances.exp()  # (B, K, D)
    return -0.5 * (distances + log_variances + math.log(2 * math.pi)).sum(-1)


def bayes_classes(z: Tensor, means: Tensor, log_variances: Tensor, priors: Tensor) -> Tensor:
    """ŷ_z, eq. (19): argmax_k p(z|y = k) p(y = k), (B,)."""
    return (log_component_density(z, means, log_variances) + priors.log()).argmax(1)


# ---------------------------------------------------------------------------------------------------------- the system


class Game(NamedTuple):
    """The samples of one game: both joints (x, y, z) that D compares."""

    inferred: Joint
    generated: Joint


class Inferred(NamedTuple):
    """The encoder's Gaussians of h_y, (N, K), and of z, (N, D), for N images in evaluation mode."""

    h: Tensor  # means
    h_log_variance: Tensor
    z: Tensor  # means
    z_log_variance: Tensor


class AMM(nn.Module):
    """The Adversarially Learned Mixture Model; with labels (config.semi_supervised) SAMM, whose component k is class k.

    config: a train.Config.  The mixture p(y) p(z|y) is `priors` and `components`; `encoder` is G_y and G_z of images,
    `decoder` is G_x, `discriminator` is D.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        shape, k, d = config.shape, config.n_components, config.latent_dim
        receiver, noise = "y" if config.factorisation == "eq7" else "z", config.y_noise == "learned"
        self.encoder = Encoder(shape, k, d, receiver, config.semi_supervised, noise)
        self.components = Components(shape, k, d, config.variance)
        self.decoder = Decoder(shape, k, d)
        self.discriminator = Discriminator(shape, k, d, config.discriminator_dropout == "printed")
        for network in self.children():
            initialise(network)
        # p(y), (K,): uniform. In SAMM it comes from the labels, so it is saved with the weights.
        self.register_buffer("priors", torch.full((k,), 1 / k), persistent=config.semi_supervised)
        self.averaged: AMM | None = None  # a copy with averaged weights, see `average`; saved with the weights
        if config.averaged_weights:
            self.averaged = copy.deepcopy(self).requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self.priors.device

    def players(self) -> dict[str, list[nn.Parameter]]:
        """The parameters that each player moves; each has an optimiser of its own."""
        return {
            "discriminator": list(self.discriminator.parameters()),
            "decoder": [*self.decoder.parameters(), *self.components.parameters()],
            "encoder": list(self.encoder.parameters()),
        }

    # ------------------------------------------------------------------------------------------- Algorithms 1 and 2

    def play(self, x: Tensor, labels: Tensor | None = None) -> Game:
        """The samples of one game, in the order of Algorithm 1.

        x: (M, C, H, W) in [0, 1].  labels: (M,), the known classes; None where y is inferred.
        Algorithm 1 is printed for eq. (6): ỹ ~ q(y|x), then z̃ ~ q(z|x, ỹ). Under eq. (7) these two lines swap:
        z̃ ~ q(z|x), then ỹ ~ q(y|x, z̃). In both cases the streams are joined before anything is drawn, so the order of
        the two draws has no effect. Algorithm 2's z̃_ℓ ~ q(z|x, ỹ_ℓ) becomes q(z|x) under eq. (7) (ledger 2).
        """
        k = self.config.n_components
        y = F.one_hot(torch.multinomial(self.priors, len(x), replacement=True), k).to(x.dtype)  # y ~ p(y)
        z = sampled(*self.components(y))  # z ~ p(z|y)
        generated = self.decoder(y, z)  # x̃ ~ p(x|y, z)
        known = None if labels is None else F.one_hot(labels, k).to(x.dtype)
        h, code = self.encoder(x, known)
        inferred_y = self.drawn_y(*h) if known is None else known  # ỹ, eqs. (8) and (9); or the known y
        return Game((x, inferred_y, sampled(*code)), (generated, y, z))  # z̃, eq. (10)

    def drawn_y(self, mean: Tensor, log_variance: Tensor) -> Tensor:
        """ỹ, (M, K), eqs. (8) and (9): the softmax of one draw of h_y, or the mean over T = config.y_samples draws."""
        t = self.config.y_samples
        return sampled(*(part.expand(t, *part.shape) for part in (mean, log_variance))).softmax(-1).mean(0)

    def predictions(self, games: list[Game]) -> list[tuple[Tensor, Tensor]]:
        """ρ_q and ρ_p of each game, as logits (M,): D of the inferred and of the generated joint.

        D has no batch normalisation, so one pass takes all of them.
        """
        joints = [joint for game in games for joint in game]
        rho = self.discriminator(*(torch.cat(parts) for parts in zip(*joints, strict=True))).chunk(len(joints))
        return list(zip(rho[::2], rho[1::2], strict=True))

    def penalty(self, games: list[Game]) -> Tensor:
        """Eq. (18) without λ, a scalar, over the samples of all games, at random points between both joints."""
        sides = zip(*games, strict=True)
        first, second = (tuple(torch.cat(parts).detach() for parts in zip(*side, strict=True)) for side in sides)
        if self.config.penalty_ends == "sources":  # the codes change sides (ledger 20)
            first, second = (first[0], *second[1:]), (second[0], *first[1:])
        t = torch.rand(len(first[0]), device=self.device)
        return gradient_penalty(self.discriminator, first, second, t, self.config.penalty_norm)

    # Each loss takes the predictions of one game (Algorithm 1) or of two (Algorithm 2, where 1/M becomes 1/(2M)).

    @staticmethod
    def discriminator_loss(rho: list[tuple[Tensor, Tensor]]) -> Tensor:
        """L_D: -mean log ρ_q - mean log(1 - ρ_p), a scalar, nats."""
        return sum(F.softplus(-q).mean() + F.softplus(p).mean() for q, p in rho) / len(rho)

    @staticmethod
    def decoder_loss(rho: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Loss of G_x and G_z(y): -mean log ρ_p, a scalar, nats."""
        return sum(F.softplus(-p).mean() for _, p in rho) / len(rho)

    @staticmethod
    def encoder_loss(rho: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Loss of G_y and G_z(x): -mean log(1 - ρ_q), a scalar, nats."""
        return sum(F.softplus(q).mean() for q, _ in rho) / len(rho)

    @torch.no_grad()
    def average(self, step: int) -> None:
        """Update `averaged` with the weights and running statistics after training step `step` (1, 2, …).

        It is the mean over the first config.averaged_weights steps, and then an exponential moving average.
        """
        mine, theirs = self.state_dict(), self.averaged.state_dict()
        names = [name for name, value in theirs.items() if value.is_floating_point()]
        weight = 1 / min(step, self.config.averaged_weights)
        torch._foreach_lerp_([theirs[name] for name in names], [mine[name] for name in names], weight)

    # --------------------------------------------------------------------------------------------------- inference

    # Without noise and dropout; batch normalisation uses its running statistics (ledger 11). Results are on the CPU.

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode inside the block; the previous mode returns after it."""
        training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(training)

    @torch.no_grad()
    def infer(self, images: Tensor, batch: int = 500) -> Inferred:
        """The Gaussians of h_y and z for images (N, C, H, W), uint8 or floats in [0, 1]; others raise ValueError."""
        if images.dtype != torch.uint8 and not (images.is_floating_point() and ((images >= 0) & (images <= 1)).all()):
            range_found = f"{images.dtype} from {images.min():g} to {images.max():g}"
            raise ValueError(f"images: expected uint8, or floats in [0, 1]; found {range_found}")
        with self.evaluating():
            parts = [self.encoder(as_input(part.to(self.device))) for part in images.split(batch)]
        return Inferred(*(torch.cat(column).cpu() for column in zip(*((*h, *z) for h, z in parts), strict=True)))

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """y (N, K), the softmax of h_y's mean, and z (N, D), its mean. Images as for `infer`."""
        inferred = self.infer(images)
        return inferred.h.softmax(1), inferred.z

    def classify(self, images: Tensor, by: Literal["bayes", "g_y"] = "bayes") -> Tensor:
        """The component (N,) of each image (in SAMM its class): ŷ_z of eq. (19), or the argmax of G_y.

        Images as for `infer`.
        """
        inferred = self.infer(images)
        return self.by_bayes(inferred.z) if by == "bayes" else inferred.h.argmax(1)

    def by_bayes(self, z: Tensor) -> Tensor:
        """ŷ_z, eq. (19), (N,), of codes z (N, D) under the learned mixture."""
        means, log_variances = self.mixture()
        parts = z.cpu().split(2000)
        return torch.cat([bayes_classes(part, means, log_variances, self.priors.cpu()) for part in parts])

    @torch.no_grad()
    def mixture(self) -> tuple[Tensor, Tensor]:
        """Means and log-variances (K, D) of the components p(z|y)."""
        with self.evaluating():
            mean, log_variance = self.components(torch.eye(self.config.n_components, device=self.device))
        return mean.cpu(), log_variance.cpu()

    @torch.no_grad()
    def decode(self, y: Tensor, z: Tensor, batch: int = 500) -> Tensor:
        """Images (N, C, H, W), floats in [0, 1], of y (N, K) and z (N, D)."""
        parts = zip(y.to(self.device).split(batch), z.to(self.device).split(batch), strict=True)
        with self.evaluating():
            return torch.cat([self.decoder(*part).cpu() for part in parts])

    def sample(self, components: Tensor, seed: int = 0) -> Tensor:
        """Images (n, C, H, W), floats in [0, 1], of these components (n,): z ~ p(z|y), x = G_x(y, z)."""
        means, log_variances = self.mixture()
        noise = torch.randn(len(components), self.config.latent_dim, generator=run.generator(seed, "sample"))
        z = means[components] + (log_variances[components] / 2).exp() * noise
        return self.decode(F.one_hot(components, self.config.n_components).to(z.dtype), z)
