"""SeGMA: networks, mixture, distances and losses, Secs. III to VI of the paper.

Encoder E: x -> z.  Decoder D: z -> x.  Mixture: P_Z = Σ_k p_k N(μ_k, I). The means are trained; the priors come from
the known labels.  Each equation is one function. The class SeGMA at the end uses these functions.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from common import run

# --------------------------------------------------------------------------------- networks, Sec. VI-A and the appendix


def mlp_encoder(image_shape: tuple[int, ...], hidden: int, layers: int, latent_dim: int) -> nn.Sequential:
    """MNIST: 784 - 1024 - 1024 - 10, ReLU. In: (B, C, H, W) in [0, 1]; out: codes (B, D), unbounded."""
    sizes = [math.prod(image_shape)] + [hidden] * layers
    stack: list[nn.Module] = [nn.Flatten()]  # (B, C·H·W)
    for fan_in, fan_out in zip(sizes, sizes[1:], strict=False):
        stack += [nn.Linear(fan_in, fan_out), nn.ReLU()]  # (B, hidden)
    return nn.Sequential(*stack, nn.Linear(hidden, latent_dim))  # (B, D)


def mlp_decoder(image_shape: tuple[int, ...], hidden: int, layers: int, latent_dim: int) -> nn.Sequential:
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
    for before, after in ((3, 32), (32, 32), (32, 64), (64, 64)):  # sides 32, 16, 8, 4
        stack += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*stack, nn.Flatten())  # (B, 1024)


def transposed_convolutions() -> nn.Sequential:
    """Appendix: transposed convolutions, 64 - 32 - 32 - 3 filters. In: (B, 1024); out: (B, 3, 64, 64), unbounded."""
    stack: list[nn.Module] = [nn.Unflatten(1, (64, 4, 4))]  # (B, 64, 4, 4)
    for before, after in ((64, 64), (64, 32), (32, 32)):  # sides 8, 16, 32
        stack += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*stack, nn.ConvTranspose2d(32, 3, 4, stride=2, padding=1))  # (B, 3, 64, 64)


def conv_encoder(hidden: int, layers: int, latent_dim: int) -> nn.Sequential:
    """CelebA: the convolutions, 786 - 786 - 32, ReLU. In: (B, 3, 64, 64) in [0, 1]; out: codes (B, D), unbounded."""
    return nn.Sequential(*convolutions(), *mlp_encoder((1024,), hidden, layers, latent_dim)[1:])


def conv_decoder(hidden: int, layers: int, latent_dim: int) -> nn.Sequential:
    """CelebA: 32 - 786 - 786 - 1024, ReLU, the transposed convolutions, sigmoid out.

    In: codes (B, D); out: (B, 3, 64, 64) in [0, 1].
    """
    dense = mlp_decoder((1024,), hidden, layers, latent_dim)[:-2]  # without Unflatten and Sigmoid
    return nn.Sequential(*dense, nn.ReLU(), *transposed_convolutions(), nn.Sigmoid())


def convolutional(image_shape: tuple[int, ...]) -> bool:
    """Whether images of this shape get the appendix's convolutions: 3×64×64, CelebA's. Others are flattened."""
    return tuple(image_shape) == (3, 64, 64)


def initialise(network: nn.Module, weights: Callable[[Tensor], Tensor]) -> None:
    """Initialise the weights of every layer by `weights` and set all biases to 0."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            weights(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


# -------------------------------------------------------------------------------------------- the mixture, Definition 1


class Mixture(nn.Module):
    """The target distribution in latent space, P_Z = Σ_k p_k N(μ_k, I) (Definition 1).

    means: (K, D), μ_k, trained.
    priors: (K,), p_k, summing to 1: the class proportions among the known labels (Sec. V), not trained.
    """

    def __init__(self, n_components: int, latent_dim: int, mean_init: float):
        super().__init__()
        self.means = nn.Parameter(initial_means(n_components, latent_dim, mean_init))
        self.register_buffer("priors", torch.full((n_components,), 1 / n_components))


def initial_means(n_components: int, latent_dim: int, scale: float) -> Tensor:
    """μ_k (K, D) at the start: scale·K/D on the coordinates i with i mod K = k, plus N(0, 0.001²). K > D: N(0, scale²).

    The paper does not give the initial means. These are those of the authors' code.
    """
    if n_components > latent_dim:
        return scale * torch.randn(n_components, latent_dim)
    means = torch.zeros(n_components, latent_dim)
    for i in range(latent_dim):
        means[i % n_components, i] = scale * n_components / latent_dim
    return means + 0.001 * torch.randn_like(means)


# ----------------------------------------------------------------------------------- the Cramer-Wold distance, Sec. III


def phi(s: Tensor, dim: int) -> Tensor:
    """φ_D(s) ≈ (1 + 4s / (2D - 3))^(-1/2), s ≥ 0, below eq. (3): the asymptotic form of 1F1(1/2; D/2; -s), D ≥ 10."""
    return torch.rsqrt(1 + 4 * s / (2 * dim - 3))


def gaussian_product(squared_distance: Tensor, variances: float, gamma: float, dim: int, phi: Callable = phi) -> Tensor:
    """⟨N(a, αI), N(b, βI)⟩_γ, eq. (3), for squared_distance = ‖a - b‖² ≥ 0 (any shape) and variances = α + β ≥ 0."""
    spread = variances + 2 * gamma
    return phi(squared_distance / (2 * spread), dim) / math.sqrt(2 * math.pi * spread)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """‖a_i - b_j‖² for all pairs. a: (n, D), b: (m, D) -> (n, m), ≥ 0."""
    return (a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)


def cramer_wold_distance(z: Tensor, means: Tensor, priors: Tensor, gamma: float, phi: Callable = phi) -> Tensor:
    """Squared Cramer-Wold distance d²_γ of a sample and a mixture of unit Gaussians, eq. (8); K = 1, μ = 0: eq. (4).

    z: (m, D) latent codes.  means: (K, D), μ_k.  priors: (K,), p_k, summing to 1.  gamma: kernel bandwidth γ > 0.
    Returns a scalar. The form is closed: nothing is sampled. Valid for D ≥ 10, where φ_D has an error of up to 2.3 %.
    Because of this error exact samples of the mixture have a distance above 0 (ledger 10). phi: another φ_D.
    """
    dim = z.shape[1]
    rows = z.split(2048)  # block by block, since the (m, m) matrix of a test set is large; a batch is one block
    z_z = sum(gaussian_product(squared_distances(part, z), 0, gamma, dim, phi).sum() for part in rows) / len(z) ** 2
    z_p = (gaussian_product(squared_distances(z, means), 1, gamma, dim, phi) @ priors).mean()
    p_p = priors @ gaussian_product(squared_distances(means, means), 2, gamma, dim, phi) @ priors
    return z_z - 2 * z_p + p_p


def sampled_distance(z: Tensor, samples: Tensor, gamma: float, phi: Callable = phi) -> Tensor:
    """An estimate of eq. (8) from samples of the mixture, as other MMDs use: the kernel of eq. (4) over two samples.

    z: (m, D), samples: (n, D). Returns a scalar. Not used in training; eval.py compares it with the closed form.
    """
    dim = z.shape[1]

    def mean(a: Tensor, b: Tensor) -> Tensor:
        return gaussian_product(squared_distances(a, b), 0, gamma, dim, phi).mean()

    return mean(z, z) - 2 * mean(z, samples) + mean(samples, samples)


def silverman_bandwidth(samples_per_class: float) -> float:
    """γ = (4 / (3 N_c))^(2/5), Sec. VI-A. samples_per_class: N_c > 0, the number of codes in d² divided by K."""
    return (4 / (3 * samples_per_class)) ** 0.4


# ----------------------------------------------------------------------------------------------- losses, Secs. III to V


def reconstruction_error(x: Tensor, reconstruction: Tensor) -> Tensor:
    """MSE of eq. (1): squared error summed over pixels, mean over images. Both (n, C, H, W) in [0, 1]; a scalar."""
    return (x - reconstruction).square().flatten(1).sum(1).mean()


def bernoulli_error(x: Tensor, logits: Tensor) -> Tensor:
    """Bernoulli cross-entropy of the pixels, summed over pixels, mean over images (ledger 49).

    x: (n, C, H, W) in [0, 1]; logits: of the same shape, their sigmoid is the reconstruction. A scalar ≥ 0 in nats,
    computed in fp32 or wider.
    """
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    return nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(1).mean()


def log_joint(z: Tensor, means: Tensor, priors: Tensor) -> Tensor:
    """log p_k N(μ_k, I)(z) up to a constant that is the same for all k. z: (n, D) -> (n, K). Its softmax is eq. (7)."""
    return priors.log() - squared_distances(z, means) / 2


def log_posterior(z: Tensor, means: Tensor, priors: Tensor) -> Tensor:
    """log P(k | z), eq. (7). z: (n, D), means: (K, D), priors: (K,) -> (n, K)."""
    return log_joint(z, means, priors).log_softmax(1)


def classification_loss(z: Tensor, labels: Tensor, means: Tensor, priors: Tensor) -> Tensor:
    """Cross-entropy of the Gaussian classifier on labelled codes, eq. (5): a scalar, nats. z: (n, D), labels: (n,)."""
    return nn.functional.nll_loss(log_posterior(z, means, priors), labels)


# ---------------------------------------------------------------------------------------------- moving codes, Sec. VI-D


def transfer_style(z: Tensor, source: Tensor, target: Tensor, means: Tensor, t: float = 1.0) -> Tensor:
    """ẑ = z + t (μ_target - μ_source): eq. (10) at t = 1, a point on the way there for 0 < t < 1.

    z: (n, D); source, target: classes (n,); means: (K, D).
    """
    return z + t * (means[target] - means[source])


def intensify(z: Tensor, source: Tensor, anti_target: Tensor, means: Tensor, alpha: float = 0.5) -> Tensor:
    """ẑ = z + α (μ_source - μ_anti_target), α > 0, eq. (11): away from the anti-target class.

    z: (n, D); source, anti_target: classes (n,); means: (K, D).
    """
    return z + alpha * (means[source] - means[anti_target])


# ---------------------------------------------------------------------------------------------------------- the systems


def as_input(images: Tensor) -> Tensor:
    """uint8 images 0 … 255 scaled to [0, 1], without other preprocessing (Sec. VI-A)."""
    return images.float() / 255


def checked_input(images: Tensor) -> Tensor:
    """uint8 images scaled by `as_input`; floats in [0, 1] unchanged. Raises ValueError for other images."""
    if images.dtype == torch.uint8:
        return as_input(images)
    if not (images.is_floating_point() and ((images >= 0) & (images <= 1)).all()):
        found = f"{images.dtype} from {images.min():g} to {images.max():g}"
        raise ValueError(f"images: expected uint8, or floats in [0, 1]; found {found}")
    return images


class GenerativeModel(nn.Module):
    """What SeGMA and its baselines M1+M2 and ADGM offer once they are trained.

    Images (n, C, H, W) go in as uint8 or as floats in [0, 1] and come out as floats in [0, 1]. Codes are (n, D).
    A subclass defines `codes_of`, `images_of`, `place`, `classify` and `priors`.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def means(self) -> Tensor:
        """The code at the centre of each component, (K, D): μ_k; for a baseline, z = 0 and class k."""
        k = len(self.priors)
        noise = torch.zeros(k, self.config.latent_dim, device=self.device)
        return self.place(noise, torch.arange(k, device=self.device))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Codes (n, D), float32, of images (n, C, H, W), uint8 or floats in [0, 1]; otherwise raises ValueError."""
        return torch.cat([self.codes_of(checked_input(x.to(self.device))).float() for x in images.split(1000)])

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Images (n, C, H, W) in [0, 1] of codes z (n, D)."""
        return torch.cat([self.images_of(part.to(self.device)) for part in z.split(1000)])

    @torch.no_grad()
    def draw(self, n: int, generator: torch.Generator, component: int | None = None) -> tuple[Tensor, Tensor]:
        """Draw n codes (n, D) and the component (n,) of each. component: if None, the priors decide."""
        components = torch.multinomial(self.priors.cpu(), n, replacement=True, generator=generator)
        components = components if component is None else torch.full_like(components, component)
        noise = torch.randn(n, self.config.latent_dim, generator=generator)
        return self.place(noise.to(self.device), components.to(self.device)), components

    def sample(self, n: int, component: int | None = None, seed: int = 0) -> Tensor:
        """n images (n, C, H, W) in [0, 1] of one component, or of the whole mixture (None)."""
        return self.decode(self.draw(n, run.generator(seed, "sample"), component)[0])


class SeGMA(GenerativeModel):
    """Encoder, decoder and mixture. config: a train.Config. Initial weights come from torch's global generator."""

    def __init__(self, config):
        super().__init__(config)
        shape, hidden, dim = config.image_shape, config.hidden_dim, config.latent_dim
        layers, decoder_layers = config.hidden_layers, config.decoder_layers or config.hidden_layers
        if convolutional(shape):
            self.encoder = conv_encoder(hidden, layers, dim)
            self.decoder = conv_decoder(hidden, decoder_layers, dim)
        else:
            self.encoder = mlp_encoder(shape, hidden, layers, dim)
            self.decoder = mlp_decoder(shape, hidden, decoder_layers, dim)
        initialise(self.encoder, nn.init.xavier_uniform_)
        initialise(self.decoder, nn.init.xavier_uniform_)
        self.mixture = Mixture(config.components, dim, config.mean_init)

    @property
    def means(self) -> Tensor:
        """μ_k, (K, D)."""
        return self.mixture.means

    @property
    def priors(self) -> Tensor:
        """p_k, (K,)."""
        return self.mixture.priors

    @property
    def gamma(self) -> float:
        """γ of the distance, from the N_c of a training batch (Sec. VI-A)."""
        return silverman_bandwidth(self.config.codes_per_batch / self.config.components)

    def loss(self, unlabelled: Tensor, labelled: Tensor, labels: Tensor, precision: str = "fp32") -> dict[str, Tensor]:
        """Eq. (9) on one batch, and its terms: scalars.

        unlabelled: (n, C, H, W), labelled: (m, C, H, W), in [0, 1]; labels: (m,). With β = 0 the labels are not used.
        """
        config, x = self.config, torch.cat([unlabelled, labelled])
        seen = config.codes_per_batch  # error and distance use the first images: the unlabelled ones, or all
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            z = self.encoder(x)
            if config.reconstruction == "squared":
                error = {"mse": reconstruction_error(x[:seen], self.decoder(z[:seen]))}
            else:
                logits = self.decoder[:-1](z[:seen])  # without the last layer, the sigmoid
                error = {"bernoulli": bernoulli_error(x[:seen], logits)}
        z = z.float() if precision == "bf16" else z  # distances and logarithms are never computed in bf16

        d2 = cramer_wold_distance(z[:seen], self.means, self.priors, self.gamma)
        loss = sum(error.values()) + config.distance_weight * d2.log()  # eq. (9) with β = 0
        if config.label_weight == 0:
            return {"loss": loss, **error, "d2": d2}
        cross_entropy = classification_loss(z[len(unlabelled) :], labels, self.means, self.priors)
        loss = loss + config.label_weight * cross_entropy  # eq. (9)
        return {"loss": loss, **error, "d2": d2, "cross_entropy": cross_entropy}

    def codes_of(self, x: Tensor) -> Tensor:
        """Codes (B, D) of images x (B, C, H, W) in [0, 1]."""
        return self.encoder(x)

    def images_of(self, z: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] of codes z (B, D)."""
        return self.decoder(z)

    def classify(self, z: Tensor) -> Tensor:
        """The most probable component (n,) of each code z (n, D), by eq. (7)."""
        return log_joint(z, self.means, self.priors).argmax(1)

    def place(self, noise: Tensor, components: Tensor) -> Tensor:
        """Codes (B, D): noise ~ N(0, I), (B, D), plus the mean of each code's component (B,)."""
        return self.means[components] + noise
