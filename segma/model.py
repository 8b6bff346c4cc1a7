"""SeGMA's networks, mixture, distances and losses: Secs. III to VI of the paper, no training.

Encoder E: x -> z.  Decoder D: z -> x.  Mixture: P_Z = Σ_k p_k N(μ_k, I), the means trained, the priors set from the known labels.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

# ------------------------------------------------------------------------------------ networks, Sec. VI-A and the appendix


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
    stack += [nn.Linear(hidden, math.prod(image_shape))]  # (B, C·H·W)
    return nn.Sequential(*stack, nn.Unflatten(1, image_shape), nn.Sigmoid())  # (B, C, H, W)


def convolutions() -> nn.Sequential:
    """Appendix: four 4×4 convolutions of stride 2, ReLU. In: (B, 3, 64, 64) in [0, 1]; out: (B, 1024), not negative."""
    stack: list[nn.Module] = []
    for before, after in ((3, 32), (32, 32), (32, 64), (64, 64)):  # (B, ·, 32, 32), (B, ·, 16, 16), (B, ·, 8, 8), (B, ·, 4, 4)
        stack += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*stack, nn.Flatten())  # (B, 1024)


def transposed_convolutions() -> nn.Sequential:
    """Appendix: the way back, 64 - 32 - 32 - 3 filters. In: (B, 1024); out: (B, 3, 64, 64), unbounded."""
    stack: list[nn.Module] = [nn.Unflatten(1, (64, 4, 4))]  # (B, 64, 4, 4)
    for before, after in ((64, 64), (64, 32), (32, 32)):  # (B, ·, 8, 8), (B, ·, 16, 16), (B, ·, 32, 32)
        stack += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*stack, nn.ConvTranspose2d(32, 3, 4, stride=2, padding=1))  # (B, 3, 64, 64)


def conv_encoder(hidden: int, layers: int, latent_dim: int) -> nn.Sequential:
    """CelebA: the convolutions, 786 - 786 - 32, ReLU. In: (B, 3, 64, 64) in [0, 1]; out: codes (B, D), unbounded."""
    return nn.Sequential(*convolutions(), *mlp_encoder((1024,), hidden, layers, latent_dim)[1:])


def conv_decoder(hidden: int, layers: int, latent_dim: int) -> nn.Sequential:
    """CelebA: 32 - 786 - 786 - 1024, ReLU, the transposed convolutions, sigmoid out. In: codes (B, D); out: (B, 3, 64, 64) in [0, 1]."""
    dense = mlp_decoder((1024,), hidden, layers, latent_dim)[:-2]  # without its image shape and its sigmoid
    return nn.Sequential(*dense, nn.ReLU(), *transposed_convolutions(), nn.Sigmoid())


class Mixture(nn.Module):
    """The target distribution in latent space, P_Z = Σ_k p_k N(μ_k, I) (Definition 1).

    means: (K, D), μ_k, trained.  priors: (K,), p_k, summing to 1: the class proportions among the known labels, not trained.
    """

    def __init__(self, n_components: int, latent_dim: int):
        super().__init__()
        self.means = nn.Parameter(torch.zeros(n_components, latent_dim))
        self.register_buffer("priors", torch.full((n_components,), 1 / n_components))


def build(config) -> dict[str, nn.Module]:
    """Every trained part by name, freshly initialised from torch's global random state. config: a train.Config."""
    shape, hidden, dim = config.image_shape, config.hidden_dim, config.latent_dim
    layers = config.hidden_layers, config.decoder_layers or config.hidden_layers
    if convolutional(shape):
        networks = {"encoder": conv_encoder(hidden, layers[0], dim), "decoder": conv_decoder(hidden, layers[1], dim)}
    else:
        networks = {"encoder": mlp_encoder(shape, hidden, layers[0], dim), "decoder": mlp_decoder(shape, hidden, layers[1], dim)}
    for network in networks.values():
        initialise(network, nn.init.xavier_uniform_)
    mixture = Mixture(config.n_components, config.latent_dim)
    with torch.no_grad():
        mixture.means.copy_(initial_means(config.n_components, config.latent_dim, config.mean_init))
    return {**networks, "mixture": mixture}


def convolutional(image_shape: tuple[int, int, int]) -> bool:
    """Whether images of this shape get the appendix's convolutions: those of CelebA, 3×64×64. The others are flattened."""
    return tuple(image_shape) == (3, 64, 64)


def initialise(network: nn.Module, weights: Callable[[Tensor], Tensor]) -> None:
    """Initial weights by `weights`, biases 0, in every layer that has them."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            weights(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


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


def sampled_distance(z: Tensor, samples: Tensor, gamma: float, phi: Callable = phi) -> Tensor:
    """What eq. (8) would be estimated by if the mixture were sampled, as MMDs are: eq. (4)'s kernel over two samples; a scalar.

    z: (m, D), samples: (n, D). Not used in training; eval.py measures it against the closed form.
    """
    dim = z.shape[1]

    def mean(a: Tensor, b: Tensor) -> Tensor:
        return gaussian_product(squared_distances(a, b), 0, gamma, dim, phi).mean()

    return mean(z, z) - 2 * mean(z, samples) + mean(samples, samples)


def silverman_bandwidth(samples_per_class: float) -> float:
    """γ = (4 / (3 N_c))^(2/5), Sec. VI-A. samples_per_class: N_c > 0, the codes of one batch that the distance sees, over K."""
    return (4 / (3 * samples_per_class)) ** 0.4


# ------------------------------------------------------------------------------------------------ losses, Secs. III to V


def reconstruction_error(x: Tensor, reconstruction: Tensor) -> Tensor:
    """MSE of eq. (1): squared error summed over pixels, mean over images. Both (n, C, H, W) in [0, 1]; a scalar."""
    return (x - reconstruction).square().flatten(1).sum(1).mean()


def bernoulli_error(x: Tensor, logits: Tensor) -> Tensor:
    """Cross-entropy of each pixel taken as a Bernoulli's probability, summed over pixels, mean over images (ledger 49).

    x: (n, C, H, W) in [0, 1]; logits: the same shape, of which the sigmoid is the reconstruction. Nats, a scalar ≥ 0, in fp32 or wider.
    """
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    return nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(1).mean()


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


# ------------------------------- what any of the systems can do, for train.py and eval.py; networks: as `build` names them


def encode(networks: dict[str, nn.Module], x: Tensor) -> Tensor:
    """Codes (B, D) of images x (B, C, H, W) in [0, 1]."""
    return networks["encoder"](x)


def decode(networks: dict[str, nn.Module], codes: Tensor) -> Tensor:
    """Images (B, C, H, W) in [0, 1] of codes (B, D)."""
    return networks["decoder"](codes)


def classes(networks: dict[str, nn.Module], codes: Tensor) -> Tensor:
    """The class (B,) of each code, eq. (7)."""
    return classify(codes, networks["mixture"].means, networks["mixture"].priors)


def priors(networks: dict[str, nn.Module]) -> Tensor:
    """The probability (K,) of each component when codes are drawn from the target distribution: p_k."""
    return networks["mixture"].priors


def place(networks: dict[str, nn.Module], noise: Tensor, components: Tensor) -> Tensor:
    """Codes (B, D) at `noise` (B, D) from the mean of each one's component (B,)."""
    return networks["mixture"].means[components] + noise


# ------------------------------------------------------------------------------- moving codes, Sec. VI-D; means: (K, D)


def transfer_style(z: Tensor, source: Tensor, target: Tensor, means: Tensor, t: float = 1.0) -> Tensor:
    """ẑ = z + t (μ_target - μ_source): eq. (10) at t = 1, a step on the way there for 0 < t < 1. z: (n, D); classes: (n,)."""
    return z + t * (means[target] - means[source])


def intensify(z: Tensor, source: Tensor, anti_target: Tensor, means: Tensor, alpha: float = 0.5) -> Tensor:
    """ẑ = z + α (μ_source - μ_anti_target), eq. (11): away from the anti-target class, α > 0. z: (n, D); classes: (n,)."""
    return z + alpha * (means[source] - means[anti_target])
