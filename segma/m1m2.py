"""M1+M2 (Kingma, Mohamed, Rezende, Welling: Semi-supervised Learning with Deep Generative Models, 2014), as SeGMA's baseline.

    python -m segma.train mnist-m1m2 --seed 0 --data data

Two variational auto-encoders, one after the other. M1: x ~ p(x|z1), z1 ~ N(0, I). M2 then takes M1's codes, drawn anew for each
batch from q(z1|x) with M1 fixed, for its data: z1 ~ p(z1|y, z2), y uniform, z2 ~ N(0, I); its classifier is q(y|z1).
Equation numbers here are those of that paper; a code is (z2, one-hot y).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.run import Count, NonNegative
from segma.model import convolutional, convolutions, initialise, transposed_convolutions
from segma.train import Batch, Task, descend


@dataclass(frozen=True)
class Config(Task):
    module: Literal["m1m2"] = "m1m2"
    m1_latent_dim: Count = 50  # of z1
    m1_hidden_dim: Count = 500  # units of a hidden layer of M1, both sides
    m1_hidden_layers: Count = 2  # hidden layers of M1, both sides; after and before the convolutions where there are some
    latent_dim: Count = 50  # of z2
    hidden_dim: Count = 300  # units of a hidden layer of M2: classifier, encoder, decoder
    hidden_layers: Count = 1  # hidden layers of each of the three
    activation: Literal["softplus", "relu"] = "softplus"
    likelihood: Literal["bernoulli", "gaussian"] = "bernoulli"  # p(x|z1); gaussian: of variance 1
    binarise: bool = False  # draw black-or-white pixels with the grey values as probabilities, anew for each batch
    posterior_variance: Literal["free", "at_least_one"] = "free"  # of q: log σ² through a softplus, as in the open repository
    labelled_weight: NonNegative = 100 / 60_000  # of the mean labelled bound; the mean unlabelled bound weighs 1
    label_weight: NonNegative = 0.1  # α, of the mean cross-entropy of q(y|z1)
    m1_epochs: Count = 100  # the first so many epochs train M1, the others M2

    def __post_init__(self):
        super().__post_init__()
        if self.m1_epochs >= self.epochs:
            raise ValueError(f"m1_epochs: {self.m1_epochs} of {self.epochs} epochs leave none for M2; give fewer, or more --epochs")


# ------------------------------------------------------------------------------------------------------------- networks


class Softplus(nn.Module):
    """log(1 + eˣ), as nn.Softplus: see softplus below."""

    def forward(self, x: Tensor) -> Tensor:
        return softplus.apply(x)


class Dense(nn.Module):
    """Hidden layers from several inputs to one or more heads. Inputs are joined by adding what the first layer makes of each,

    which is that layer on their concatenation; their leading dimensions broadcast, so that an image meets each class once.
    """

    def __init__(self, inputs: list[int], hidden: list[int], heads: list[int], activation: nn.Module):
        super().__init__()
        self.inputs = nn.ModuleList(nn.Linear(n, hidden[0], bias=i == 0) for i, n in enumerate(inputs))
        stack: list[nn.Module] = [activation]
        for fan_in, fan_out in zip(hidden, hidden[1:], strict=False):
            stack += [nn.Linear(fan_in, fan_out), activation]
        self.hidden = nn.Sequential(*stack)
        self.heads = nn.ModuleList(nn.Linear(hidden[-1], n) for n in heads)

    def forward(self, *inputs: Tensor) -> Tensor | list[Tensor]:
        """inputs: (…, n_i) each. Returns (…, n_j) for each head in float32 or wider, or the one head's alone."""
        joined = sum(layer(x) for layer, x in zip(self.inputs, inputs, strict=True))
        hidden = self.hidden(joined)
        outputs = [head(hidden) for head in self.heads]
        outputs = [x.float() if x.dtype == torch.bfloat16 else x for x in outputs]  # densities are never taken in bf16
        return outputs if len(outputs) > 1 else outputs[0]


def build(config: Config) -> dict[str, nn.Module]:
    """Every trained part by name. Weights Glorot normal, biases 0 (the open repository), in the order of the paper's text."""
    activation = Softplus() if config.activation == "softplus" else nn.ReLU()
    m1_hidden, m2_hidden = [config.m1_hidden_dim] * config.m1_hidden_layers, [config.hidden_dim] * config.hidden_layers
    z1, z2, k, pixels = config.m1_latent_dim, config.latent_dim, config.n_components, math.prod(config.image_shape)
    if convolutional(config.image_shape):
        features, images, n = convolutions(), nn.Sequential(nn.ReLU(), transposed_convolutions()), 1024
    else:
        features, images, n = nn.Flatten(), nn.Unflatten(1, config.image_shape), pixels
    networks = {
        "features": features,  # (B, C, H, W) -> (B, 1024), or flattened
        "q_z1": Dense([n], m1_hidden, [z1, z1], activation),  # q(z1|x): mean, log σ²
        "p_x": nn.Sequential(Dense([z1], m1_hidden, [n], activation), images),  # p(x|z1): logits, (B, C, H, W)
        "q_y": Dense([z1], m2_hidden, [k], activation),  # q(y|z1): logits
        "q_z2": Dense([z1, k], m2_hidden, [z2, z2], activation),  # q(z2|z1, y): mean, log σ²
        "p_z1": Dense([z2, k], m2_hidden, [z1, z1], activation),  # p(z1|z2, y): mean, log σ²
    }
    for network in networks.values():
        initialise(network, nn.init.xavier_normal_)
    return networks


def examples(config: Config) -> dict[str, Tensor | tuple[Tensor, ...]]:
    z1, z2, y = torch.zeros(1, config.m1_latent_dim), torch.zeros(1, config.latent_dim), torch.zeros(1, config.n_components or 1)
    n = 1024 if convolutional(config.image_shape) else math.prod(config.image_shape)
    inputs = {"q_z1": torch.zeros(1, n), "p_x": z1, "q_y": z1, "q_z2": (z1, y), "p_z1": (z2, y)}
    return {"features": torch.zeros(1, *config.image_shape), **inputs}


# ------------------------------------------------------------------------------------------------------------ densities


def spread(log_variance: Tensor, config) -> Tensor:
    """log σ² of a Gaussian from its network's output, (…, D). at_least_one is the open repository's reading: σ² ≥ 1.

    Of every q, and of ADGM's p(a|x, z, y). M2's p(z1|z2, y) is free: the open repository has no such density (ledger 33).
    """
    return F.softplus(log_variance) if config.posterior_variance == "at_least_one" else log_variance


def draw(mean: Tensor, log_variance: Tensor, noise: torch.Generator) -> Tensor:
    """A sample of N(mean, σ²), (…, D), through which gradients flow."""
    return mean + (log_variance / 2).exp() * torch.randn(mean.shape, generator=noise, device=mean.device, dtype=mean.dtype)


def log_normal(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log N(x; mean, σ²) summed over the last dimension: (…, D) -> (…), nats."""
    return -0.5 * (math.log(2 * math.pi) + log_variance + (x - mean).square() / log_variance.exp()).sum(-1)


def kl_from_standard(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, σ²) ‖ N(0, I)): (…, D) -> (…), nats, ≥ 0."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1)


class softplus(torch.autograd.Function):  # noqa: N801, used as a function
    """log(1 + eˣ). PyTorch's takes log1p, which on a CPU costs ten times as much as log: half of an M2 step."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        wide = x.float() if x.dtype == torch.bfloat16 else x
        return (wide.clamp(min=0) - wide.abs().sigmoid_().log_()).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0].sigmoid()


class log_bernoulli(torch.autograd.Function):  # noqa: N801, used as a function
    """Σ x l - log(1 + eˡ) over the last dimension, x the data and l the logits: (…, P) each -> (…). In as few passes as can be."""

    @staticmethod
    def forward(ctx, x: Tensor, logits: Tensor) -> Tensor:
        ctx.save_for_backward(x, logits)
        terms = logits.abs().sigmoid_().log_()
        terms -= logits.clamp(min=0)
        terms += x * logits
        return terms.sum(-1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, Tensor]:
        x, logits = ctx.saved_tensors
        return None, gradient[..., None] * (x - logits.sigmoid())  # x is data


def log_likelihood(x: Tensor, logits: Tensor, likelihood: str) -> Tensor:
    """log p(x | codes) summed over pixels, for decoder output `logits`, whose sigmoid is the mean image; both (…, P) -> (…).

    bernoulli: grey values count as expectations of black-or-white ones. gaussian: variance 1.
    """
    if likelihood == "bernoulli":
        return log_bernoulli.apply(x, logits)
    return log_normal(x, logits.sigmoid(), torch.zeros((), device=x.device, dtype=x.dtype))


def as_data(x: Tensor, config, noise: torch.Generator) -> Tensor:
    """The images as the likelihood takes them."""
    return torch.bernoulli(x, generator=noise) if config.binarise else x


# --------------------------------------------------------------------------------------------------------------- bounds


def m1_bound(networks: dict[str, nn.Module], x: Tensor, config: Config, noise: torch.Generator, precision: str = "fp32") -> Tensor:
    """Eq. (5): E_q(z1|x) log p(x|z1) - KL(q(z1|x) ‖ p(z1)) ≤ log p(x), by one sample. x: (B, C, H, W) -> (B,), nats."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
        mean, log_variance = networks["q_z1"](networks["features"](x))
        log_variance = spread(log_variance, config)
        logits = networks["p_x"](draw(mean, log_variance, noise))
    logits = logits.float() if precision == "bf16" else logits
    return log_likelihood(x.flatten(1), logits.flatten(1), config.likelihood) - kl_from_standard(mean, log_variance)


def labelled_bound(networks: dict[str, nn.Module], z1: Tensor, y: Tensor, config: Config, noise: torch.Generator) -> Tensor:
    """-L(z1, y), eq. (6): E_q(z2|z1,y) log p(z1|z2, y) + log p(y) - KL(q(z2|z1,y) ‖ p(z2)) ≤ log p(z1, y), by one sample.

    z1: (…, Z1), y: (…, K) one-hot, their leading dimensions broadcast. Returns (…), nats.
    """
    mean, log_variance = networks["q_z2"](z1, y)
    log_variance = spread(log_variance, config)
    z2 = draw(mean, log_variance, noise)
    log_p_z1 = log_normal(z1, *networks["p_z1"](z2, y))
    return log_p_z1 - math.log(y.shape[-1]) - kl_from_standard(mean, log_variance)


def unlabelled_bound(networks: dict[str, nn.Module], z1: Tensor, config: Config, noise: torch.Generator) -> Tensor:
    """-U(z1), eq. (7): Σ_y q(y|z1) (-L(z1, y) - log q(y|z1)) ≤ log p(z1), the sum over all classes. z1: (B, Z1) -> (B,), nats."""
    log_q = networks["q_y"](z1).log_softmax(-1)  # (B, K)
    y = torch.eye(log_q.shape[-1], device=z1.device, dtype=z1.dtype)[None]  # (1, K, K): each class for each image
    bounds = labelled_bound(networks, z1[:, None], y, config, noise)  # (B, K)
    return (log_q.exp() * (bounds - log_q)).sum(-1)


def train_step(
    networks: dict[str, nn.Module], optimizer: torch.optim.Optimizer, batch: Batch, config: Config, precision: str = "fp32"
) -> dict[str, Tensor]:
    """One step up M1's bound, or, once M1 is done, up M2's objective, eq. (9). Returns its terms, scalars on the device."""
    if batch.m1_alone:
        bound = m1_bound(networks, as_data(batch.unlabelled, config, batch.noise), config, batch.noise, precision).mean()
        return {"loss": -bound, "m1_bound": bound, "grad_norm": descend(-bound, optimizer, config)}

    with torch.autocast(batch.labels.device.type, torch.bfloat16, enabled=precision == "bf16"):
        with torch.no_grad():  # M1 is fixed
            x = as_data(torch.cat([batch.unlabelled, batch.labelled]), config, batch.noise)
            mean, log_variance = networks["q_z1"](networks["features"](x))
            z1 = draw(mean, spread(log_variance, config), batch.noise)
        unlabelled, labelled = z1[: len(batch.unlabelled)], z1[len(batch.unlabelled) :]
        y = F.one_hot(batch.labels, config.n_components).to(z1.dtype)
        bound_u = unlabelled_bound(networks, unlabelled, config, batch.noise).mean()
        bound_l = labelled_bound(networks, labelled, y, config, batch.noise).mean()
        cross_entropy = F.cross_entropy(networks["q_y"](labelled), batch.labels)
    loss = -bound_u - config.labelled_weight * bound_l + config.label_weight * cross_entropy  # eq. (9), over the number of images
    grad_norm = descend(loss, optimizer, config)
    return {"loss": loss, "unlabelled_bound": bound_u, "labelled_bound": bound_l, "cross_entropy": cross_entropy, "grad_norm": grad_norm}


# ---------------------------------------------------------------------- what any of the systems can do, as in segma/model.py


def encode(networks: dict[str, nn.Module], x: Tensor) -> Tensor:
    """Codes (B, Z2 + K): the mean of q(z2|z1, y) and one-hot y, at the mean z1 of q(z1|x) and the most probable y of q(y|z1)."""
    z1, _ = networks["q_z1"](networks["features"](x))
    logits = networks["q_y"](z1)
    y = F.one_hot(logits.argmax(-1), logits.shape[-1]).to(z1.dtype)
    return torch.cat([networks["q_z2"](z1, y)[0], y], 1)


def decode(networks: dict[str, nn.Module], codes: Tensor) -> Tensor:
    """Mean images (B, C, H, W) in [0, 1]: of p(x|z1) at the mean of p(z1|z2, y). y may lie between two one-hots."""
    z2, y = codes.tensor_split([-networks["q_y"].heads[0].out_features], 1)
    return networks["p_x"](networks["p_z1"](z2, y)[0]).sigmoid()


def classes(networks: dict[str, nn.Module], codes: Tensor) -> Tensor:
    """The class (B,) in each code."""
    return codes[:, -networks["q_y"].heads[0].out_features :].argmax(1)


def priors(networks: dict[str, nn.Module]) -> Tensor:
    """p(y), (K,): uniform."""
    k = networks["q_y"].heads[0].out_features
    return torch.full((k,), 1 / k)


def place(networks: dict[str, nn.Module], noise: Tensor, components: Tensor) -> Tensor:
    """Codes (B, Z2 + K) of z2 = noise (B, Z2) and class components (B,)."""
    return torch.cat([noise, F.one_hot(components, networks["q_y"].heads[0].out_features).to(noise.dtype)], 1)
