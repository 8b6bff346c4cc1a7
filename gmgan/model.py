"""GM-GAN (Sec. 2): the mixture prior, the networks, the losses of Algorithm 1, sampling, and clustering (Algorithm 2).

The paper gives no architecture; ledger 5 says where ours comes from. For the points of the toy both networks are dense.
For images they are a light DCGAN. Its stride-2 layers reduce a side to 7 (from 28), 4 (32), 5 (40) or 6 (96).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import classifier, run

# -------------------------------------------------------------------------------------------------------- the prior


class Mixture(nn.Module):
    """K equally likely Gaussians N(μ_k, A_k A_kᵀ) in the latent space, eq. (4) and Algorithm 1, lines 1-3.

    means: μ_k, drawn from U[-c, c]^d.  scales: A_k, initially σ I (√σ I if σ is a variance).
    Static: both stay fixed, and the scales are one number. Dynamic: both are trained, and the scales are (K, d, d), or
    (K, d) if they are diagonal. K = 1, c = 0 and σ = 1 give the classical N(0, I).
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
        """z = A_k ε + μ_k, the re-parametrisation of Sec. 2: (B, d), from noise ε ~ N(0, I), (B, d), and k, (B,).

        multiplier: the σ of Sec. 4.3, which scales the covariance after training; 1 while training.
        """
        scaled = math.sqrt(multiplier) * noise
        if self.scales.dim() == 3:
            spread = torch.einsum("bij,bj->bi", self.scales[components], scaled)
        else:
            spread = (self.scales[components] if self.scales.dim() else self.scales) * scaled
        return self.means[components] + spread


# --------------------------------------------------------------------------------------------------------- networks


def halvings(height: int) -> int:
    """How often a side is halved: while it is even and the half is at least 4. 28 -> 7, 32 -> 4, 40 -> 5, 96 -> 6."""
    n = 0
    while height % 2 == 0 and height // 2 >= 4:
        height, n = height // 2, n + 1
    return n


class ToImage(nn.Module):
    """(B, H·W·C) to (B, C, H, W), channels last in memory like the layers around it.

    A gradient with two memory layouts would cost 15 % of a step.
    """

    def __init__(self, channels: int, side: int):
        super().__init__()
        self.size = (side, side, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, self.size).permute(0, 3, 1, 2)


class ToVector(nn.Module):
    """The inverse of ToImage: (B, C, H, W) to (B, H·W·C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)


def dense_layer(inputs: int, units: int, norm: bool, activation: nn.Module) -> list[nn.Module]:
    """(B, inputs) to (B, units), with batch normalisation before the activation."""
    return [nn.Linear(inputs, units), *([nn.BatchNorm1d(units)] if norm else []), activation]


def generator(inputs: int, shape: tuple[int, ...], width: int, norm: bool, dense_units: int = 0) -> nn.Sequential:
    """Network from vectors (B, inputs) to points (B, 2), or to images (B, C, H, W) in [-1, 1].

    width: units of a hidden layer, or channels of the layer next to the image.  norm: use batch normalisation.
    dense_units: for images, units of a first dense layer, as InfoGAN has it; 0: no such layer.
    """
    if len(shape) == 1:
        hidden = [nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        return nn.Sequential(*hidden, nn.Linear(width, *shape))
    channels, height, _ = shape
    n = halvings(height)
    side, depth = height >> n, width << (n - 1)  # for 28×28: 7, 2·width
    layers: list[nn.Module] = dense_layer(inputs, dense_units, norm, nn.ReLU()) if dense_units else []
    layers += [nn.Linear(dense_units or inputs, depth * side * side), ToImage(depth, side)]  # (2·width, 7, 7)
    while n:
        layers += [nn.BatchNorm2d(depth), nn.ReLU()] if norm else [nn.ReLU()]
        n -= 1
        out = depth // 2 if n else channels
        layers += [nn.ConvTranspose2d(depth, out, 4, stride=2, padding=1)]  # (width, 14, 14), then (C, 28, 28)
        depth = out
    return nn.Sequential(*layers, nn.Tanh())


class Discriminator(nn.Module):
    """Logits of D(x), (B, outputs): the sigmoid of each is a probability.

    x: points (B, 2), or images (B, C, H, W) in [-1, 1]. dense_units: units of a dense layer after the convolutions.
    """

    def __init__(self, shape: tuple[int, ...], outputs: int, width: int, norm: bool, dense_units: int = 0):
        super().__init__()
        layers: list[nn.Module] = []
        if len(shape) == 1:
            layers += [nn.Linear(*shape, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2)]
            features = width
        else:
            channels, height, _ = shape
            for i in range(halvings(height)):
                out = width << i
                layers.append(nn.Conv2d(channels, out, 4, stride=2, padding=1))  # (width, 14, 14), then (2·width, 7, 7)
                layers += [nn.BatchNorm2d(out)] if norm and i else []  # not next to the image, as in DCGAN
                layers.append(nn.LeakyReLU(0.2))
                channels, height = out, height // 2
            layers.append(ToVector())
            features = channels * height * height
            if dense_units:
                layers += dense_layer(features, dense_units, norm, nn.LeakyReLU(0.2))
                features = dense_units
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(features, outputs)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(self.body(x))
        return logits.float() if logits.dtype == torch.bfloat16 else logits  # losses are never taken in bf16


def initialise(network: nn.Module) -> None:
    """As in DCGAN: normal weights of deviation 0.02 around 0 (batch normalisation: 1), biases 0. Not for the toy."""
    if any(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in network.modules()):
        for m in network.modules():
            normed = isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)
            if normed or isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                nn.init.normal_(m.weight, 1.0 if normed else 0.0, 0.02)
                nn.init.zeros_(m.bias)


# ----------------------------------------------------------------------------------------- pixels, Gaussians, classes


def as_input(x: Tensor) -> Tensor:
    """uint8 images 0 … 255 scaled to [-1, 1] (Sec. 4). Floats and the points of the toy stay as they are."""
    return x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x


def checked_input(x: Tensor) -> Tensor:
    """`as_input`, but raises ValueError if images are neither uint8 nor floats in [-1, 1]."""
    if x.dtype != torch.uint8 and not (x.is_floating_point() and (x.abs() <= 1).all()):
        found = f"{x.dtype} from {x.min():g} to {x.max():g}"
        raise ValueError(f"images: expected uint8, or floats in [-1, 1]; found {found}")
    return as_input(x)


def to_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8 0 … 255."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def correspondence(n_components: int, n_classes: int, text: str | None) -> tuple[Tensor, Tensor]:
    """Which output of a supervised discriminator stands for each Gaussian, (K,), and which for each class, (N,).

    K ≥ N: one output per class; f: [K] -> [N] may send several Gaussians to one class (Sec. 2).
    K < N: the paper's f cannot exist (ledger 7), so g: [N] -> [K] groups the classes; one output per Gaussian.
    text: the values of the map, "0,1,2,0,…": f of each Gaussian, or g of each class; None: k mod N, or n mod K.
    Raises ValueError if the text is not such a map.
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
            raise ValueError(f"--class-map: expected integers with commas, one for each {of}, found {text!r}") from None
    if len(chosen) != size:
        plural = "classes" if of == "class" else "Gaussians"
        raise ValueError(f"--class-map: names {len(chosen)} {plural}, expected {size}: K = {k}, N = {n}")
    wrong = [value for value in chosen if not 0 <= value < values]
    if wrong:
        raise ValueError(f"--class-map: {to} {wrong[0]} does not exist; expected 0 … {values - 1}")
    missing = sorted(set(range(values)) - set(chosen))
    if missing:
        raise ValueError(f"--class-map: leaves {to} {', '.join(map(str, missing))} without a {of}")
    mapped, own = torch.tensor(chosen), torch.arange(values)
    return (mapped, own) if k >= n else (own, mapped)


# --------------------------------------------------------------------------------------------------------- the losses


def wanted_outputs(logits: Tensor, outputs: Tensor) -> Tensor:
    """The targets of D, (B, outputs), shaped as its logits: 1 at the output (B,) of each sample, 0 at all others."""
    return torch.zeros_like(logits).scatter_(1, outputs[:, None], 1.0)


def binary_cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    """-log D for a target of 1, -log(1 - D) for a target of 0: summed over outputs, mean over the batch, in nats."""
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum(1).mean()


# ---------------------------------------------------------------------------------------------------------- the systems


class Gan(nn.Module):
    """What GM-GAN and AC-GAN (acgan.py) share: how samples are drawn while training and after it.

    Every sample belongs to a group: a Gaussian of GM-GAN or a class of AC-GAN. A subclass defines `generator`,
    `discriminator`, `generate`, `supervised`, and which output of D stands for each group and for each class.
    """

    def __init__(self, config, supervised: bool):
        super().__init__()
        self.config, self.supervised = config, supervised

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def generate(self, epsilon: Tensor, groups: Tensor, multiplier: float = 1.0) -> Tensor:
        """Points (B, 2), or images (B, C, H, W) in [-1, 1], from noise ε ~ N(0, I), (B, d), and groups (B,).

        multiplier: the σ of Sec. 4.3, which scales the covariance of every Gaussian after training.
        """
        raise NotImplementedError

    def draw(self, n: int, noise: torch.Generator) -> tuple[Tensor, Tensor]:
        """n generated samples and the group (n,) of each, all groups equally likely (Algorithm 1, lines 7-9, 19-21)."""
        groups = torch.randint(self.config.groups, (n,), generator=noise, device=noise.device)
        epsilon = torch.randn(n, self.config.latent_dim, generator=noise, device=noise.device)
        return self.generate(epsilon, groups), groups

    @torch.no_grad()
    def sample(self, n: int, multiplier: float = 1.0, seed: int = 0, stream: tuple[str, ...] = ("sample",)) -> Tensor:
        """n samples of each group, group by group, on the CPU.

        Points (groups · n, 2), or uint8 images (groups · n, C, H, W). multiplier: as in `generate`. seed, stream: they
        fix the noise ε, which is the same for every multiplier. Batch normalisation uses its running statistics.
        """
        noise, training, parts = run.generator(seed, *stream), self.training, []
        self.eval()
        for groups in torch.arange(self.config.groups).repeat_interleave(n).split(1000):
            epsilon = torch.randn(len(groups), self.config.latent_dim, generator=noise)
            made = self.generate(epsilon.to(self.device), groups.to(self.device), multiplier)
            parts.append((to_bytes(made) if made.dim() == 4 else made).cpu())  # floats could take 10 GB
        self.train(training)
        return torch.cat(parts)

    def sample_mixture(self, n: int, multiplier: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
        """n samples and the group (n,) of each; group sizes differ by at most one. Otherwise as `sample`."""
        each = -(-n // self.config.groups)
        kept = torch.arange(self.config.groups * each).view(-1, each).T.flatten()[:n]  # one of each group in turn
        return self.sample(each, multiplier, seed)[kept], kept // each


class GMGAN(Gan):
    """GM-GAN, unsupervised or supervised: the mixture, G and D. config: a train.Config.

    Unsupervised, D has one output, which stands for every Gaussian and every class, because eqs. (2) and (3) are the
    supervised losses with N = 1.
    """

    def __init__(self, config):
        super().__init__(config, config.supervised)
        k, n = config.components, config.class_count
        networks = config.width, config.norm == "batch", config.dense_units
        outputs = min(k, n) if config.supervised else 1
        self.mixture = Mixture(k, config.latent_dim, config.mean_range, config.deviation, config.mixture)
        self.generator = generator(config.latent_dim, config.shape, *networks)
        self.discriminator = Discriminator(config.shape, outputs, *networks)
        initialise(self.generator)
        initialise(self.discriminator)
        of_group, of_class = torch.zeros(k, dtype=torch.int64), torch.zeros(n, dtype=torch.int64)
        if config.supervised and n > 1:  # N = 1: the number of classes is not known yet
            of_group, of_class = correspondence(k, n, config.class_map)
        self.register_buffer("output_of_group", of_group, persistent=False)
        self.register_buffer("output_of_class", of_class, persistent=False)

    def players(self) -> dict[str, list[nn.Parameter]]:
        """The parameters of each player. A dynamic mixture belongs to G."""
        moved_by_g = [*self.generator.parameters(), *self.mixture.parameters()]
        return {"discriminator": list(self.discriminator.parameters()), "generator": moved_by_g}

    def generate(self, epsilon: Tensor, groups: Tensor, multiplier: float = 1.0) -> Tensor:
        return self.generator(self.mixture(epsilon, groups, multiplier))

    def discriminator_loss(self, on_real: Tensor, on_fake: Tensor, labels: Tensor) -> Tensor:
        """L(D), eq. (3) and its supervised form, Algorithm 1, lines 10-16: a scalar, nats.

        on_real, on_fake: D's logits (b_D, outputs) of real and generated samples.  labels: (b_D,), of the real ones.
        The target of a real sample is 1 at its class and 0 elsewhere, that of a fake 0 everywhere. Divided by 2 b_D.
        """
        real = binary_cross_entropy(on_real, wanted_outputs(on_real, self.output_of_class[labels]))
        return (real + binary_cross_entropy(on_fake, torch.zeros_like(on_fake))) / 2

    def generator_loss(self, on_fake: Tensor, components: Tensor) -> Tensor:
        """L(G), eq. (2) and its supervised form, Algorithm 1, lines 22-26: a scalar, nats.

        on_fake: D's logits (b_G, outputs) of generated samples.  components: (b_G,), the Gaussian k of each.
        The target is 1 at the output f(k) and 0 elsewhere.
        """
        return binary_cross_entropy(on_fake, wanted_outputs(on_fake, self.output_of_group[components]))

    def cluster(self, images: Tensor, seed: int = 0) -> Tensor:
        """Algorithm 2: the cluster (n,) of each image (n, C, H, W), uint8 or floats in [-1, 1] (else ValueError).

        Trains a K-way classifier on M generated images of each Gaussian, labelled by Gaussian, and applies it.
        """
        images = images if images.dtype == torch.uint8 else to_bytes(checked_input(images))
        k, m = self.config.components, self.config.cluster_samples
        generated = self.sample(m, seed=seed)  # lines 2-4
        labels = torch.arange(k).repeat_interleave(m)  # lines 5-6
        network = classifier.train(generated, labels, k, seed, self.device)  # line 7
        return classifier.classify(network, images)  # line 8
