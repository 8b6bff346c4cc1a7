"""SeGMA's networks, mixture, distances and losses: Secs. III to VI of the paper, no training.

Encoder E: x -> z.  Decoder D: z -> x.  Mixture: P_Z = Σ_k p_k N(μ_k, I), the means trained, the priors set from the known labels.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

# ------------------------------------------------------------------------------------------------ networks, Sec. VI-A


def mlp_encoder(image_shape: tuple[int, int, int], hidden: int, layers: int, latent_dim: int) -> nn.Sequential:
    """MNIST: 784 - 1024 - 1024 - 10, ReLU. In: (B, C, H, W) in [0, 1]; out: codes (B, D), unbounded."""
    sizes = [math.prod(image_shape)] + [hidden] * layers
    stack: list[nn.Module] = [nn.Flatten()]  # (B, C·H·W)
    for fan_in, fan_out in zip(sizes, sizes[1:], strict=False):
        stack += [nn.Linear(fan_in, fan_out), nn.ReLU()]  # (B, hidden)
    return nn.Sequential(*stack, nn.Linear(hidden, latent_dim))  # (B, D)


def mlp_decoder(image_shape: tuple[int, int, int], hidden: int, layers: int, latent_dim: int) -> nn.Sequential:
    """MNIST: 10 - 1024 - 1024 - 784, ReLU, sigmoid out. In: codes (B, D); out: (B, C, H, W) in [0, 1]."""
    sizes = [latent_dim] + [hidden] * layers
    stack: list[nn.Module] = []
    for fan_in, fan_out in zip(sizes, sizes[1:], strict=False):
        stack += [nn.Linear(fan_in, fan_out), nn.ReLU()]  # (B, hidden)
    stack += [nn.Linear(hidden, math.prod(image_shape)), nn.Sigmoid()]  # (B, C·H·W)
    return nn.Sequential(*stack, nn.Unflatten(1, image_shape))  # (B, C, H, W)


class Mixture(nn.Module):
    """The target distribution in latent space, P_Z = Σ_k p_k N(μ_k, I) (Definition 1).

    means: (K, D), μ_k, trained.  priors: (K,), p_k, summing to 1: the class proportions among the known labels, not trained.
    """

    def __init__(self, n_components: int, latent_dim: int):
        super().__init__()
        self.means = nn.Parameter(torch.zeros(n_components, latent_dim))
        self.register_buffer("priors", torch.full((n_components,), 1 / n_components))

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """n codes (n, D) from P_Z and the component (n,) of each, drawn in proportion to the priors."""
        components = torch.multinomial(self.priors.cpu(), n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator)
        return self.means.detach()[components] + noise.to(self.means.device), components


def build(config) -> dict[str, nn.Module]:
    """Every trained part by name, freshly initialised from torch's global random state. config: a train.Config."""
    shape, width = config.image_shape, (config.hidden_dim, config.hidden_layers, config.latent_dim)
    networks = {"encoder": mlp_encoder(shape, *width), "decoder": mlp_decoder(shape, *width)}
    for network in networks.values():
        for layer in network.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
    mixture = Mixture(config.n_components, config.latent_dim)
    with torch.no_grad():
        mixture.means.copy_(initial_means(config.n_components, config.latent_dim, config.mean_init))
    return {**networks, "mixture": mixture}


def initial_means(n_components: int, latent_dim: int, scale: float) -> Tensor:
    """μ_k (K, D) at the start: scale·K/D on the coordinates i with i mod K = k, plus N(0, 0.001²). K > D: N(0, scale²).

    The paper is silent; this is the authors' code.
    """
    if n_components > latent_dim:
        return scale * torch.randn(n_components, latent_dim)
    means = torch.zeros(n_components, latent_dim)
    for i in range(latent_dim):
        means[i % n_components, i] = scale * n_components / latent_dim
    return means + 0.001 * torch.randn_like(means)


# ------------------------------------------------------------------------------------ the Cramer-Wold distance, Sec. III


def phi(s: Tensor, dim: int) -> Tensor:
    """φ_D(s) ≈ (1 + 4s / (2D - 3))^(-1/2), below eq. (3): the asymptotic form of 1F1(1/2; D/2; -s) for D ≥ 10. s ≥ 0."""
    return torch.rsqrt(1 + 4 * s / (2 * dim - 3))


def gaussian_product(squared_distance: Tensor, variances: float, gamma: float, dim: int, phi: Callable = phi) -> Tensor:
    """⟨N(a, αI), N(b, βI)⟩_γ, eq. (3), for squared_distance = ‖a - b‖² ≥ 0 (any shape) and variances = α + β ≥ 0."""
    spread = variances + 2 * gamma
    return phi(squared_distance / (2 * spread), dim) / math.sqrt(2 * math.pi * spread)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """‖a_i - b_j‖² for all pairs. a: (n, D), b: (m, D) -> (n, m), ≥ 0."""
    return (a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)


def cramer_wold_distance(z: Tensor, means: Tensor, priors: Tensor, gamma: float, phi: Callable = phi) -> Tensor:
    """Squared Cramer-Wold distance d²_γ between a sample and a mixture of unit Gaussians, eq. (8); with K = 1, μ = 0, eq. (4).

    z: (m, D) latent codes.  means: (K, D), μ_k.  priors: (K,), p_k, summing to 1.  gamma: kernel bandwidth γ > 0.
    Returns a scalar. Closed form: nothing is sampled. Valid for D ≥ 10, where φ_D is within 2.3 % of the exact one, which
    `phi` may replace; with the asymptotic φ_D the distance of a perfect fit is a few 0.001, not 0.
    """
    dim = z.shape[1]
    rows = z.split(2048)  # of the (m, m) matrix: a batch is one block, a whole test set does not fill the memory
    z_z = sum(gaussian_product(squared_distances(part, z), 0, gamma, dim, phi).sum() for part in rows) / len(z) ** 2
    z_p = (gaussian_product(squared_distances(z, means), 1, gamma, dim, phi) @ priors).mean()
    p_p = priors @ gaussian_product(squared_distances(means, means), 2, gamma, dim, phi) @ priors
    return z_z - 2 * z_p + p_p


def silverman_bandwidth(samples_per_class: float) -> float:
    """γ = (4 / (3 N_c))^(2/5), Sec. VI-A. samples_per_class: N_c > 0, the codes of one batch that the distance sees, over K."""
    return (4 / (3 * samples_per_class)) ** 0.4


# ------------------------------------------------------------------------------------------------ losses, Secs. III to V


def reconstruction_error(x: Tensor, reconstruction: Tensor) -> Tensor:
    """MSE of eq. (1): squared error summed over pixels, mean over images. Both (n, C, H, W) in [0, 1]; a scalar."""
    return (x - reconstruction).square().flatten(1).sum(1).mean()


def log_joint(z: Tensor, means: Tensor, priors: Tensor) -> Tensor:
    """log p_k N(μ_k, I)(z) up to a constant common to all k. z: (n, D) -> (n, K). Its softmax over k is eq. (7)."""
    return priors.log() - squared_distances(z, means) / 2


def log_posterior(z: Tensor, means: Tensor, priors: Tensor) -> Tensor:
    """log P(k | z), eq. (7). z: (n, D), means: (K, D), priors: (K,) -> (n, K)."""
    return log_joint(z, means, priors).log_softmax(1)


def classification_loss(z: Tensor, labels: Tensor, means: Tensor, priors: Tensor) -> Tensor:
    """Cross-entropy of the Gaussian classifier on labelled codes, eq. (5). z: (n, D), labels: (n,); nats, a scalar ≥ 0."""
    return nn.functional.nll_loss(log_posterior(z, means, priors), labels)


def classify(z: Tensor, means: Tensor, priors: Tensor) -> Tensor:
    """The most probable component by eq. (7). z: (n, D) -> (n,)."""
    return log_joint(z, means, priors).argmax(1)


# ------------------------------------------------------------------------------- moving codes, Sec. VI-D; means: (K, D)


def transfer_style(z: Tensor, source: Tensor, target: Tensor, means: Tensor, t: float = 1.0) -> Tensor:
    """ẑ = z + t (μ_target - μ_source): eq. (10) at t = 1, a step on the way there for 0 < t < 1. z: (n, D); classes: (n,)."""
    return z + t * (means[target] - means[source])


def intensify(z: Tensor, source: Tensor, anti_target: Tensor, means: Tensor, alpha: float = 0.5) -> Tensor:
    """ẑ = z + α (μ_source - μ_anti_target), eq. (11): away from the anti-target class, α > 0. z: (n, D); classes: (n,)."""
    return z + alpha * (means[source] - means[anti_target])
