"""GAN-based GMM responsibility learning: the networks of Tables 1 to 3, the mixture and the losses of Sec. 2.

Table 3 has two readings (ledger 1). `as_printed`: its layers. `count_matched`: the layers that give exactly Table 6's
numbers of parameters; there D has 5×5 kernels, a third convolution and no batch normalisation. G is Table 2's in both,
without biases. For the points of the toy the networks are small and dense.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import run

SLOPE = 0.3  # of LeakyReLU, TensorFlow's default: the networks are those of its tutorial
WIDTH = 64  # units of the toy's dense layers


# ---------------------------------------------------------------------------------------------------- prior, networks


class Mixture(nn.Module):
    """K Gaussians N(μ_k, A_k A_kᵀ) in the latent space, eq. (1). Trained: means μ (K, D_z), scales A (K, D_z, D_z)."""

    def __init__(self, n_components: int, latent_dim: int, mean_range: float, deviation: float):
        super().__init__()
        self.means = nn.Parameter(torch.empty(n_components, latent_dim).uniform_(-mean_range, mean_range))
        self.scales = nn.Parameter(deviation * torch.eye(latent_dim).repeat(n_components, 1, 1))

    def extra_repr(self) -> str:  # --describe prints it
        return f"means {tuple(self.means.shape)}, scales {tuple(self.scales.shape)}"

    def forward(self, noise: Tensor) -> Tensor:
        """z_k = A_k ε + μ_k for every Gaussian: noise ε (B, K, D_z) -> latent vectors (B, K, D_z)."""
        return torch.einsum("kij,bkj->bki", self.scales, noise) + self.means

    def blend(self, noise: Tensor, weights: Tensor) -> Tensor:
        """Σ_k w_k (A_k ε + μ_k), between Gaussians (Sec. 3.2): noise (B, D_z), weights (B, K) of sum 1 -> (B, D_z)."""
        return torch.einsum("bk,bki->bi", weights, self(noise[:, None].expand(-1, len(self.means), -1)))


def dense(n_inputs: int) -> list[nn.Module]:
    """The hidden layers of the toy's networks: (B, n_inputs) -> (B, WIDTH)."""
    return [nn.Linear(n_inputs, WIDTH), nn.LeakyReLU(SLOPE), nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(SLOPE)]


def generator(shape: tuple[int, ...], latent_dim: int) -> nn.Sequential:
    """Table 2: latent vectors (B, D_z) -> images (B, C, H, W) in [-1, 1]. Both readings have no biases.

    For the toy: -> points (B, 2) in [-1, 1]².
    """
    if len(shape) == 1:
        return nn.Sequential(*dense(latent_dim), nn.Linear(WIDTH, shape[0]), nn.Tanh())
    channels, size, _ = shape
    side = size // 4
    return nn.Sequential(
        nn.Linear(latent_dim, 256 * side * side, bias=False),
        nn.BatchNorm1d(256 * side * side),
        nn.LeakyReLU(SLOPE),
        nn.Unflatten(1, (256, side, side)),  # (256, H/4, W/4)
        nn.ConvTranspose2d(256, 128, 5, stride=1, padding=2, bias=False),  # (128, H/4, W/4)
        nn.BatchNorm2d(128),
        nn.LeakyReLU(SLOPE),
        nn.ConvTranspose2d(128, 64, 5, stride=2, padding=2, output_padding=1, bias=False),  # (64, H/2, W/2)
        nn.BatchNorm2d(64),
        nn.LeakyReLU(SLOPE),
        nn.ConvTranspose2d(64, channels, 5, stride=2, padding=2, output_padding=1, bias=False),  # (C, H, W)
        nn.Tanh(),
    )


def encoder(shape: tuple[int, ...], reading: str) -> nn.Sequential:
    """Table 3, the encoding network of D: images (B, C, H, W) -> features (B, 128 · H/4 · W/4); points -> (B, 64)."""
    if len(shape) == 1:
        return nn.Sequential(*dense(shape[0]))
    layers = [nn.Conv2d(shape[0], 64, 5, stride=2, padding=2), nn.LeakyReLU(SLOPE)]  # (64, H/2, W/2)
    if reading == "as_printed":
        layers += [nn.Conv2d(64, 128, 4, stride=2, padding=1), nn.BatchNorm2d(128)]  # (128, H/4, W/4)
        layers += [nn.LeakyReLU(SLOPE)]
    else:
        layers += [nn.Conv2d(64, 128, 5, stride=2, padding=2), nn.LeakyReLU(SLOPE)]  # (128, H/4, W/4)
        layers += [nn.Conv2d(128, 128, 5, stride=1, padding=2), nn.LeakyReLU(SLOPE)]  # (128, H/4, W/4), in no table
    return nn.Sequential(*layers, nn.Flatten())


def n_features(shape: tuple[int, ...]) -> int:
    """The number of features that the encoding network gives for an image or a point."""
    return WIDTH if len(shape) == 1 else 128 * (shape[1] // 4) * (shape[2] // 4)


def shared_classifier(shape: tuple[int, ...], n_components: int) -> nn.Linear:
    """Table 1, if shared: D's features -> logits of p(k|x), (B, K)."""
    return nn.Linear(n_features(shape), n_components)


def standalone_classifier(shape: tuple[int, ...], n_components: int) -> nn.Sequential:
    """Table 1, if not shared: images (B, C, H, W), or points, -> logits of p(k|x), (B, K)."""
    if len(shape) == 1:
        return nn.Sequential(*dense(shape[0]), nn.Linear(WIDTH, n_components))
    side = shape[1] // 4
    return nn.Sequential(
        nn.Conv2d(shape[0], 32, 5, stride=1, padding=2),  # (32, H, W)
        nn.ReLU(),
        nn.MaxPool2d(2),  # (32, H/2, W/2)
        nn.Conv2d(32, 16, 5, stride=2, padding=2),  # (16, H/4, W/4)
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * side * side, 1024),
        nn.ReLU(),
        nn.Linear(1024, n_components),
    )


def initialise(network: nn.Module) -> None:
    """Glorot uniform weights and zero biases, TensorFlow's defaults and so those of its tutorial."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# -------------------------------------------------------------------------------------------------------------- losses


def weighted(alpha: Tensor, values: Tensor) -> Tensor:
    """E_x (1/K Σ_k α_k v_k), the mean over images in eqs. (3) and (4). α and v are (M, K)."""
    return (alpha * values).sum() / alpha.shape[1] / alpha.shape[0]


def discriminator_loss(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    """-E_x (1/K Σ_k α_k (log D(x) + log(1 - D(x̂_k)))): D maximises eq. (3). real, fake: logits (M,), (M, K); nats."""
    return weighted(alpha, F.softplus(-real)[:, None] + F.softplus(fake))


def generator_loss(fake: Tensor, alpha: Tensor, saturating: bool) -> Tensor:
    """E_x (1/K Σ_k α_k log(1 - D(x̂_k))) of eq. (3), or with -log D(x̂_k): for G, μ, A and, through α, for C.

    The term of the real images is left out: it is the same for every α, since the rows of α have sum 1.
    fake: logits (M, K). A scalar, nats.
    """
    return weighted(alpha, -F.softplus(fake) if saturating else F.softplus(-fake))


def information_loss(logits: Tensor, alpha: Tensor, target: str) -> Tensor:
    """-L^I of eq. (4) without H(c), for which see `class_entropy`: E_x (1/K Σ_k α_k CE(target, C(x̂_k))).

    logits: (M, K, K), of C for each fake.  target: "alpha", the α of the real image, the same for every k (as printed),
    or "component", the Gaussian k that the fake came from. A scalar, nats.
    """
    log_p = logits.log_softmax(-1)  # (M, K, K)
    if target == "alpha":
        return weighted(alpha, -(alpha[:, None] * log_p).sum(-1))
    return weighted(alpha, -log_p.diagonal(dim1=1, dim2=2))


def class_entropy(alpha: Tensor, of: str) -> Tensor:
    """The term H(c) of eq. (4), 1/K Σ_k α_k H = H / K, to be maximised through α (M, K). A scalar, nats.

    of: "batch", H of the mean of α over the M images; or "image", the mean over the images of H of each α.
    """
    p = alpha.mean(0, keepdim=True) if of == "batch" else alpha
    log_p = p.clamp_min(torch.finfo(p.dtype).tiny).log()  # so that the gradient at p = 0 is finite
    return -(p * log_p).sum(-1).mean() / alpha.shape[1]


# ----------------------------------------------------------------------------------------- how much α says, for the log


def entropy_share(alpha: Tensor) -> Tensor:
    """The mean entropy of the rows of α (M, K), as a share of log K. 1: α is uniform for every image."""
    return -torch.special.xlogy(alpha, alpha).sum(-1).mean() / math.log(alpha.shape[-1])


def information_share(alpha: Tensor) -> Tensor:
    """I(k; x) by α (M, K): entropy of the mean row minus mean entropy, as a share of log K. 0: all rows agree."""
    return entropy_share(alpha.mean(0, keepdim=True)) - entropy_share(alpha)


def shares(alpha: Tensor) -> dict[str, Tensor]:
    """What the log says about α (M, K): `entropy_share`, `information_share` and the largest entry of the mean row."""
    information, largest = information_share(alpha), alpha.mean(0).max()
    return {"alpha_entropy": entropy_share(alpha), "alpha_information": information, "largest_weight": largest}


# ------------------------------------------------------------------------------------------------------------- systems


def as_input(images: Tensor) -> Tensor:
    """uint8 images 0 … 255 scaled to [-1, 1], the range of G's tanh. Raises ValueError for floats outside of it."""
    if images.dtype == torch.uint8:
        return images.float() / 127.5 - 1
    low, high = images.min().item(), images.max().item()
    if not -1 <= low <= high <= 1:
        raise ValueError(f"images must be uint8 or floats in [-1, 1], found floats from {low:.4g} to {high:.4g}")
    return images


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8, 0 … 255."""
    return ((images + 1) * 127.5).round().to(torch.uint8)


def to_float32(x: Tensor) -> Tensor:
    """bfloat16 as float32, because no loss is computed in bfloat16; other types as they are."""
    return x.float() if x.dtype == torch.bfloat16 else x


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (batch normalisation by its running statistics) without gradients; then the mode from before."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


class MixtureGAN(nn.Module):
    """G, D and the prior of z: what the proposed system and its two baselines share (Sec. 3.3).

    config: a `train.Task`.  prior: a network with a method `blend` as in `Mixture`. Subclasses call `initialise`.
    """

    def __init__(self, config, prior: nn.Module):
        super().__init__()
        self.config = config
        self.mixture = prior
        self.generator = generator(config.shape, config.latent_dim)
        self.encoder = encoder(config.shape, config.networks)
        self.discriminator = nn.Linear(n_features(config.shape), 1)  # Table 3: features -> the logit of D(x), (B, 1)

    def players(self) -> dict[str, list[nn.Parameter]]:
        """The parameters that each optimiser moves (ledger 2)."""
        return {
            "discriminator": [*self.encoder.parameters(), *self.discriminator.parameters()],
            "generator": [*self.generator.parameters(), *self.mixture.parameters()],
        }

    def decode(self, noise: Tensor, weights: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] from ε (B, D_z) and weights of the Gaussians (B, K).

        A one-hot row of weights selects one Gaussian; any other row of sum 1 is a point between them (Sec. 3.2).
        """
        return self.generator(self.mixture.blend(noise, weights))

    def sample(self, weights: Tensor, seed: int = 0, same_noise: bool = False, batch: int = 200) -> Tensor:
        """Images (N, C, H, W) in [-1, 1] on the CPU; weights as for `decode`. same_noise: one ε for all (Sec. 3.2)."""
        n, device = len(weights), self.discriminator.weight.device
        drawn = torch.randn(1 if same_noise else n, self.config.latent_dim, generator=run.generator(seed, "sample"))
        pairs = zip(drawn.expand(n, -1).split(batch), weights.split(batch), strict=True)
        with evaluation_mode(self):
            return torch.cat([self.decode(noise.to(device), w.to(device)).cpu() for noise, w in pairs])

    def sample_mixture(self, n: int, mode_weights: Tensor, seed: int = 0) -> Tensor:
        """n uint8 images (n, C, H, W) of the whole mixture with weights mode_weights (K,). Ledger 10."""
        k = torch.multinomial(mode_weights, n, replacement=True, generator=run.generator(seed, "component"))
        return to_uint8(self.sample(torch.eye(len(mode_weights))[k], seed))

    @property
    def parameter_count(self) -> int:
        """The number of parameters, as built."""
        return sum(p.numel() for p in self.parameters())

    @property
    def parameter_count_as_counted(self) -> int:
        """The number of parameters, as Table 6 counts them."""
        return self.parameter_count


class Responsibility(MixtureGAN):
    """The proposed system (Sec. 2): G, D, the mixture, and the classifier C, which gives p(k|x).

    C is a layer on D's features (`shared`) or a network that takes images (`standalone`), Table 1.
    config: a `train.Config`. The initial weights come from torch's global generator.
    """

    def __init__(self, config):
        prior = Mixture(config.components, config.latent_dim, config.mean_range, config.deviation)
        super().__init__(config, prior)
        self.shared = config.classifier == "shared"
        self.classifier = (shared_classifier if self.shared else standalone_classifier)(config.shape, config.components)
        initialise(self)

    def players(self) -> dict[str, list[nn.Parameter]]:
        """The parameters that each optimiser moves (ledger 2). A shared encoder belongs to D (ledger 22)."""
        by_g = {"generator": [*self.generator.parameters()]} if self.config.mixture == "static" else {}  # ledger 27
        return super().players() | by_g | {"classifier": [*self.classifier.parameters()]}

    def forward_d_and_c(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """D's logits (B,) and C's logits of p(k|x) (B, K) of images (B, C, H, W) in [-1, 1]."""
        h = self.encoder(images)
        logits = self.classifier(h if self.shared else images)
        return to_float32(self.discriminator(h)).squeeze(1), to_float32(logits)

    def losses(self, real: Tensor, fake: Tensor, logits: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Three losses: D's, eq. (3); that of G, μ, A and, through α, C; and -L^I, eq. (4). Scalars, nats.

        real, fake: D's logits (M,), (M, K).  logits: C's for the fakes (M, K, K).  alpha: (M, K), of the real images.
        α is detached in D's loss, and in any loss that a switch keeps from C.
        """
        config, fixed = self.config, alpha.detach()
        d_loss = discriminator_loss(real, fake, fixed)
        in_adversarial = alpha if config.adversarial_moves_classifier else fixed
        g_loss = generator_loss(fake, in_adversarial, config.saturating)
        in_information = alpha if config.alpha_in_information == "trained" else fixed
        information = information_loss(logits, in_information, config.target)
        if config.class_entropy != "left_out":
            information = information - class_entropy(alpha, config.class_entropy)
        return d_loss, g_loss, information

    def responsibilities(self, images: Tensor, batch: int = 500) -> Tensor:
        """p(k|x), (N, K), float32 on the CPU, of images (N, C, H, W). Raises ValueError unless uint8 or in [-1, 1].

        For the toy, of points (N, 2) in [-1, 1]². Batch normalisation uses its running statistics.
        """
        device = self.discriminator.weight.device

        def of_batch(x: Tensor) -> Tensor:
            return self.classifier(self.encoder(x) if self.shared else x).softmax(-1).float().cpu()

        with evaluation_mode(self):
            return torch.cat([of_batch(as_input(part.to(device))) for part in images.split(batch)])

    def mode_weights(self, images: Tensor) -> Tensor:
        """The weight of each Gaussian, (K,) of sum 1: the mean of p(k|x) over images (N, C, H, W). Ledger 10."""
        return self.responsibilities(images).double().mean(0).float()

    @property
    def parameter_count_as_counted(self) -> int:
        """The number of parameters as Table 6 counts them: the stand-alone classifier with the shared one's head."""
        if self.shared:
            return self.parameter_count
        k, own_head = self.config.components, self.classifier[-1]
        return self.parameter_count - k * (own_head.in_features + 1) + k * (n_features(self.config.shape) + 1)
