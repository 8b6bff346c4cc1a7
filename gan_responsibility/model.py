"""Networks, mixture and losses of GAN-based GMM responsibility learning: Tables 1 to 3, Sec. 2.

Two readings of Tables 2 and 3. `count_matched`: the layers that give Table 6's numbers of parameters to the digit (no biases and a flat
batch normalisation in G; in D 5×5 kernels, a third convolution and no batch normalisation). `as_printed`: the tables' own.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SLOPE = 0.3  # of LeakyReLU: TensorFlow's default, whose tutorial networks these are


class Mixture(nn.Module):
    """K Gaussians N(μ_k, A_k A_kᵀ) in the latent space, eq. (1): means μ (K, D_z) and scales A (K, D_z, D_z), all trained."""

    def __init__(self, n_components: int, latent_dim: int, mean_range: float, deviation: float):
        super().__init__()
        self.means = nn.Parameter(torch.empty(n_components, latent_dim).uniform_(-mean_range, mean_range))
        self.scales = nn.Parameter(deviation * torch.eye(latent_dim).repeat(n_components, 1, 1))

    def forward(self, noise: Tensor) -> Tensor:
        """z = A_k ε + μ_k for every Gaussian: noise ε (B, K, D_z) -> latent vectors (B, K, D_z). Algorithm 1, lines 4 and 5."""
        return torch.einsum("kij,bkj->bki", self.scales, noise) + self.means

    def blend(self, noise: Tensor, weights: Tensor) -> Tensor:
        """Σ_k w_k (A_k ε + μ_k), between Gaussians (Sec. 3.2): noise (B, D_z), weights (B, K) with sum 1 -> (B, D_z)."""
        return torch.einsum("bk,bki->bi", weights, self(noise[:, None].expand(-1, len(self.means), -1)))


# ------------------------------------------------------------------------------------------------------------- networks


def generator(shape: tuple[int, int, int], latent_dim: int) -> nn.Sequential:
    """Table 2: latent vectors (B, D_z) -> images (B, C, H, W) in [-1, 1]. Both readings: without biases."""
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


def encoder(shape: tuple[int, int, int], reading: str) -> nn.Sequential:
    """Table 3, the encoding network of D: images (B, C, H, W) -> features (B, 128 · H/4 · W/4)."""
    layers: list[nn.Module] = [nn.Conv2d(shape[0], 64, 5, stride=2, padding=2), nn.LeakyReLU(SLOPE)]  # (64, H/2, W/2)
    if reading == "as_printed":
        layers += [nn.Conv2d(64, 128, 4, stride=2, padding=1), nn.BatchNorm2d(128), nn.LeakyReLU(SLOPE)]  # (128, H/4, W/4)
    else:
        layers += [nn.Conv2d(64, 128, 5, stride=2, padding=2), nn.LeakyReLU(SLOPE)]  # (128, H/4, W/4)
        layers += [nn.Conv2d(128, 128, 5, stride=1, padding=2), nn.LeakyReLU(SLOPE)]  # (128, H/4, W/4), in no table
    return nn.Sequential(*layers, nn.Flatten())


def features(shape: tuple[int, int, int]) -> int:
    """How many numbers the encoding network gives."""
    return 128 * (shape[1] // 4) * (shape[2] // 4)


def discriminator(shape: tuple[int, int, int]) -> nn.Linear:
    """Table 3, the discriminator network: features -> the logit of D(x), (B, 1)."""
    return nn.Linear(features(shape), 1)


def shared_classifier(shape: tuple[int, int, int], n_components: int) -> nn.Linear:
    """Table 1, if shared: D's features -> logits of p(k|x), (B, K)."""
    return nn.Linear(features(shape), n_components)


def standalone_classifier(shape: tuple[int, int, int], n_components: int) -> nn.Sequential:
    """Table 1, if not shared: images (B, C, H, W) -> logits of p(k|x), (B, K)."""
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
    """Glorot uniform and zero biases, TensorFlow's defaults, as in the tutorial whose networks these are."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# --------------------------------------------------------------------------------------------------------------- losses
# Responsibilities α: (M, K), rows with sum 1. Each is a sum over the images of a part of the batch; the caller divides by M.


def discriminator_loss(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    """-Σ_i 1/K Σ_k α_ik (log D(x_i) + log(1 - D(x̂_ik))), eq. (3), which D maximises. Logits real (M,), fake (M, K); a scalar, nats."""
    return (alpha * (F.softplus(-real)[:, None] + F.softplus(fake))).sum() / alpha.shape[1]


def generator_loss(fake: Tensor, alpha: Tensor, saturating: bool) -> Tensor:
    """What G, μ, A and, through α, C minimise of eq. (3): Σ_i 1/K Σ_k α_ik log(1 - D(x̂_ik)), or with -log D(x̂_ik) in its place.

    The real images' term of eq. (3) is the same for every α, whose rows have sum 1. Logits fake (M, K); a scalar, nats.
    """
    return (alpha * (-F.softplus(fake) if saturating else F.softplus(-fake))).sum() / alpha.shape[1]


def information_loss(logits: Tensor, alpha: Tensor, target: str) -> Tensor:
    """-L^I of eq. (4) without H(c), see `class_entropy`: Σ_i 1/K Σ_k α_ik CE(target, C(x̂_ik)), to be minimised.

    logits: (M, K, K), C's on each fake.  target: "alpha", the α_i of the real image, the same for every k (as printed), or
    "component", the Gaussian k that the fake came from. A scalar, nats.
    """
    log_p = logits.log_softmax(-1)  # (M, K, K)
    if target == "alpha":
        cross_entropy = -(alpha[:, None] * log_p).sum(-1)
    else:
        cross_entropy = -log_p.diagonal(dim1=1, dim2=2)
    return (alpha * cross_entropy).sum() / alpha.shape[1]


def class_entropy(alpha: Tensor, of: str) -> Tensor:
    """Eq. (4)'s share of H(c), 1/K Σ_k α_ik H = H / K, to be maximised through α (M, K). A scalar, nats.

    of: "batch", c ~ the mean of α over the M images, the distribution of the classes; or "image", c ~ α_i, the mean over the images.
    """
    p = alpha.mean(0, keepdim=True) if of == "batch" else alpha
    log_p = p.clamp_min(torch.finfo(p.dtype).tiny).log()  # at p = 0 the gradient must be a number
    return -(p * log_p).sum(-1).mean() / alpha.shape[1]


def entropy_share(alpha: Tensor) -> Tensor:
    """How undecided responsibilities are: the mean entropy of the rows of α (M, K), as a share of log K. 1: uniform for every image."""
    return -torch.special.xlogy(alpha, alpha).sum(-1).mean() / math.log(alpha.shape[-1])


def information_share(alpha: Tensor) -> Tensor:
    """What k tells of x: entropy of the mean row of α (M, K) less the rows' mean entropy, as a share of log K. 0: all rows are the same."""
    return entropy_share(alpha.mean(0, keepdim=True)) - entropy_share(alpha)


def shares(alpha: Tensor) -> dict[str, Tensor]:
    """What α (N, K) says, as the log has it: alpha_entropy, alpha_information, and largest_weight, the largest of the K means of α."""
    return {"alpha_entropy": entropy_share(alpha), "alpha_information": information_share(alpha), "largest_weight": alpha.mean(0).max()}
