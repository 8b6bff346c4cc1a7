"""M1+M2 (Kingma, Mohamed, Rezende, Welling: Semi-Supervised Learning with Deep Generative Models, 2014), a baseline.

    python -m segma.m1m2 mnist --seed 0 --data data

Two variational auto-encoders, trained one after the other. M1: x ~ p(x|z1), z1 ~ N(0, I). M2: z1 ~ p(z1|y, z2), y
uniform, z2 ~ N(0, I). The data of M2 are codes of the fixed M1, drawn again for each batch from q(z1|x). The classifier
is q(y|z1). Equation numbers are those of that paper. A code is (z2, one-hot y).
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import run
from common.run import Count, NonNegative
from segma.model import GenerativeModel, convolutional, convolutions, initialise, transposed_convolutions
from segma.train import Batch, Task, descend, train


@dataclass(frozen=True)
class Config(Task):
    m1_latent_dim: Count = 50  # dimension of z1
    m1_hidden_dim: Count = 500  # units of a hidden layer of M1, both sides
    m1_hidden_layers: Count = 2  # hidden dense layers of M1, both sides; convolutions are not counted
    latent_dim: Count = 50  # dimension of z2
    hidden_dim: Count = 300  # units of a hidden layer of M2: classifier, encoder, decoder
    hidden_layers: Count = 1  # hidden layers of each of these three
    activation: Literal["softplus", "relu"] = "softplus"
    likelihood: Literal["bernoulli", "gaussian"] = "bernoulli"  # p(x|z1); gaussian: with variance 1
    binarise: bool = False  # draw each pixel as 0 or 1 in each batch, with its grey value as probability of 1
    posterior_variance: Literal["free", "at_least_one"] = "free"  # of q; at_least_one: log σ² goes through a softplus
    labelled_weight: NonNegative = 100 / 60_000  # weight of the mean labelled bound; 1 for the unlabelled
    label_weight: NonNegative = 0.1  # α, weight of the mean cross-entropy of q(y|z1)
    m1_epochs: Count = 100  # the first m1_epochs epochs train M1, the others M2

    def __post_init__(self):
        super().__post_init__()
        if self.m1_epochs >= self.epochs:
            left = f"{self.m1_epochs} of {self.epochs} epochs leave none for M2"
            raise ValueError(f"--m1-epochs: {left}; give fewer, or more --epochs")

    def build(self) -> nn.Module:
        return M1M2(self)


# ------------------------------------------------------------------------------------------- networks, for ADGM as well


class Softplus(nn.Module):
    """`FastSoftplus` as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return FastSoftplus.apply(x)


class Dense(nn.Module):
    """Hidden layers from several inputs to one or more heads.

    Each input has a first layer of its own, and their outputs are added. This equals one layer on the concatenation,
    but that Glorot's scale counts each input alone. The leading dimensions of the inputs broadcast, so that an image
    meets each class once.
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
        """inputs: (…, n_i) each. Returns (…, n_j) for each head, at least in float32; for a single head, not a list."""
        joined = sum(layer(x) for layer, x in zip(self.inputs, inputs, strict=True))
        hidden = self.hidden(joined)
        outputs = [head(hidden) for head in self.heads]
        outputs = [x.float() if x.dtype == torch.bfloat16 else x for x in outputs]  # densities are never in bf16
        return outputs if len(outputs) > 1 else outputs[0]


def image_ends(image_shape: tuple[int, int, int]) -> tuple[nn.Module, nn.Module, int]:
    """Modules from images (B, C, H, W) to features (B, n) and from features to logits (B, C, H, W), and n.

    They flatten and unflatten; for 64×64 images in colour they are the convolutions of the appendix.
    """
    if convolutional(image_shape):
        return convolutions(), nn.Sequential(nn.ReLU(), transposed_convolutions()), 1024
    return nn.Flatten(), nn.Unflatten(1, image_shape), math.prod(image_shape)


# ------------------------------------------------------------------------------------------ densities, for ADGM as well


def spread(log_variance: Tensor, config) -> Tensor:
    """log σ² of a Gaussian, (…, D), from the output of its network. at_least_one: σ² ≥ 1, as in the open repository.

    Used for every q and for ADGM's p(a|x, z, y). M2's p(z1|z2, y) is free: the open repository has none (ledger 33).
    """
    return F.softplus(log_variance) if config.posterior_variance == "at_least_one" else log_variance


def draw(mean: Tensor, log_variance: Tensor, noise: torch.Generator) -> Tensor:
    """A sample of N(mean, σ²), (…, D), through which gradients flow."""
    epsilon = torch.randn(mean.shape, generator=noise, device=mean.device, dtype=mean.dtype)
    return mean + (log_variance / 2).exp() * epsilon


def log_normal(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log N(x; mean, σ²) summed over the last dimension: (…, D) -> (…), nats."""
    return -0.5 * (math.log(2 * math.pi) + log_variance + (x - mean).square() / log_variance.exp()).sum(-1)


def kl_from_standard(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, σ²) ‖ N(0, I)): (…, D) -> (…), nats, ≥ 0."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1)


class FastSoftplus(torch.autograd.Function):
    """log(1 + eˣ). PyTorch's softplus uses log1p: on a CPU ten times the time of log, and half of an M2 step."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        float_x = x.float() if x.dtype == torch.bfloat16 else x
        return (float_x.clamp(min=0) - float_x.abs().sigmoid_().log_()).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0].sigmoid()


class FastLogBernoulli(torch.autograd.Function):
    """Σ x l - log(1 + eˡ) over the last dimension, of data x and logits l: (…, P) -> (…), in few passes."""

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
        return None, gradient[..., None] * (x - logits.sigmoid())  # no gradient for x, the data


def log_likelihood(x: Tensor, logits: Tensor, likelihood: str) -> Tensor:
    """log p(x | codes) summed over pixels: x and logits (…, P) -> (…). The sigmoid of the logits is the mean image.

    bernoulli: grey values count as expectations of 0 and 1. gaussian: variance 1.
    """
    if likelihood == "bernoulli":
        return FastLogBernoulli.apply(x, logits)
    return log_normal(x, logits.sigmoid(), torch.zeros((), device=x.device, dtype=x.dtype))


def as_data(x: Tensor, config, noise: torch.Generator) -> Tensor:
    """The images x (B, C, H, W) as the likelihood takes them: drawn as 0 or 1 if config.binarise."""
    return torch.bernoulli(x, generator=noise) if config.binarise else x


# ---------------------------------------------------------------------------------------------------------- the systems


class ClassConditional(GenerativeModel):
    """A model with the class as a separate variable: a code (D = Z + K) is z followed by the one-hot y."""

    @property
    def priors(self) -> Tensor:
        """p(y), (K,): uniform."""
        k = self.config.components
        return torch.full((k,), 1 / k, device=self.device)

    def split(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """z (…, Z) and y (…, K) of codes (…, Z + K)."""
        return codes.tensor_split([-self.config.components], -1)

    def one_hot(self, y: Tensor, like: Tensor) -> Tensor:
        """Classes (n,) one-hot, (n, K), with the type and device of `like`."""
        return F.one_hot(y, self.config.components).to(like.dtype)

    def classify(self, z: Tensor) -> Tensor:
        """The class (n,) in each code z (n, Z + K)."""
        return self.split(z)[1].argmax(1)

    def place(self, noise: Tensor, components: Tensor) -> Tensor:
        """Codes (B, Z + K): z = noise (B, Z), and the classes `components` (B,) as one-hots."""
        return torch.cat([noise, self.one_hot(components, noise)], 1)


class M1M2(ClassConditional):
    """M1 and M2. config: a Config. Initial weights are Glorot normal, biases 0, as in the open repository."""

    def __init__(self, config: Config):
        super().__init__(config)
        activation = Softplus() if config.activation == "softplus" else nn.ReLU()
        m1_hidden = [config.m1_hidden_dim] * config.m1_hidden_layers
        m2_hidden = [config.hidden_dim] * config.hidden_layers
        z1, z2, k = config.m1_latent_dim, config.latent_dim, config.components
        features, images, n = image_ends(config.image_shape)
        self.features = features
        self.q_z1 = Dense([n], m1_hidden, [z1, z1], activation)  # q(z1|x): mean, log σ²
        self.p_x = nn.Sequential(Dense([z1], m1_hidden, [n], activation), images)  # p(x|z1): logits, (B, C, H, W)
        self.q_y = Dense([z1], m2_hidden, [k], activation)  # q(y|z1): logits
        self.q_z2 = Dense([z1, k], m2_hidden, [z2, z2], activation)  # q(z2|z1, y): mean, log σ²
        self.p_z1 = Dense([z2, k], m2_hidden, [z1, z1], activation)  # p(z1|z2, y): mean, log σ²
        for network in self.children():
            initialise(network, nn.init.xavier_normal_)

    def m1_bound(self, x: Tensor, noise: torch.Generator, precision: str = "fp32") -> Tensor:
        """Eq. (5): E_q(z1|x) log p(x|z1) - KL(q(z1|x) ‖ p(z1)) ≤ log p(x), with one sample.

        x: (B, C, H, W) -> (B,), nats.
        """
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            mean, log_variance = self.q_z1(self.features(x))
            log_variance = spread(log_variance, self.config)
            logits = self.p_x(draw(mean, log_variance, noise))
        logits = logits.float() if precision == "bf16" else logits
        log_p_x = log_likelihood(x.flatten(1), logits.flatten(1), self.config.likelihood)
        return log_p_x - kl_from_standard(mean, log_variance)

    def labelled_bound(self, z1: Tensor, y: Tensor, noise: torch.Generator) -> Tensor:
        """-L(z1, y), eq. (6): E_q(z2|z1,y) log p(z1|z2, y) + log p(y) - KL(q(z2|z1,y) ‖ p(z2)) ≤ log p(z1, y).

        With one sample. z1: (…, Z1), y: (…, K) one-hot; their leading dimensions broadcast. Returns (…), nats.
        """
        mean, log_variance = self.q_z2(z1, y)
        log_variance = spread(log_variance, self.config)
        z2 = draw(mean, log_variance, noise)
        log_p_z1 = log_normal(z1, *self.p_z1(z2, y))
        return log_p_z1 - math.log(y.shape[-1]) - kl_from_standard(mean, log_variance)

    def unlabelled_bound(self, z1: Tensor, noise: torch.Generator) -> Tensor:
        """-U(z1), eq. (7): Σ_y q(y|z1) (-L(z1, y) - log q(y|z1)) ≤ log p(z1), the sum over all classes.

        z1: (B, Z1) -> (B,), nats.
        """
        log_q = self.q_y(z1).log_softmax(-1)  # (B, K)
        y = torch.eye(log_q.shape[-1], device=z1.device, dtype=z1.dtype)[None]  # (1, K, K): each class for each image
        bounds = self.labelled_bound(z1[:, None], y, noise)  # (B, K)
        return (log_q.exp() * (bounds - log_q)).sum(-1)

    def m2_loss(self, batch: Batch, precision: str = "fp32") -> dict[str, Tensor]:
        """M2's objective, eq. (9), divided by the number of images, and its terms: scalars, nats. M1 is fixed."""
        config, noise, n = self.config, batch.noise, len(batch.unlabelled)
        with torch.autocast(batch.labels.device.type, torch.bfloat16, enabled=precision == "bf16"):
            with torch.no_grad():
                x = as_data(torch.cat([batch.unlabelled, batch.labelled]), config, noise)
                mean, log_variance = self.q_z1(self.features(x))
                z1 = draw(mean, spread(log_variance, config), noise)
            bound_u = self.unlabelled_bound(z1[:n], noise).mean()
            bound_l = self.labelled_bound(z1[n:], self.one_hot(batch.labels, z1), noise).mean()
            cross_entropy = F.cross_entropy(self.q_y(z1[n:]), batch.labels)
        loss = -bound_u - config.labelled_weight * bound_l + config.label_weight * cross_entropy
        return {"loss": loss, "unlabelled_bound": bound_u, "labelled_bound": bound_l, "cross_entropy": cross_entropy}

    def codes_of(self, x: Tensor) -> Tensor:
        """Codes (B, Z2 + K) of images x (B, C, H, W) in [0, 1]: the mean of q(z2|z1, y), and one-hot y.

        z1 is the mean of q(z1|x), y the most probable class of q(y|z1).
        """
        z1, _ = self.q_z1(self.features(x))
        y = self.one_hot(self.q_y(z1).argmax(-1), z1)
        return torch.cat([self.q_z2(z1, y)[0], y], 1)

    def images_of(self, z: Tensor) -> Tensor:
        """Mean images (B, C, H, W) in [0, 1] of p(x|z1) at the mean of p(z1|z2, y). y may lie between two one-hots."""
        return self.p_x(self.p_z1(*self.split(z))[0]).sigmoid()


def train_step(
    model: M1M2, optimizer: torch.optim.Optimizer, batch: Batch, precision: str = "fp32"
) -> dict[str, Tensor]:
    """One step: up M1's bound in M1's epochs, down M2's objective later. Returns the terms, scalars on the device."""
    if batch.m1_alone:
        x = as_data(batch.unlabelled, model.config, batch.noise)
        bound = model.m1_bound(x, batch.noise, precision).mean()
        terms = {"loss": -bound, "m1_bound": bound}
    else:
        terms = model.m2_loss(batch, precision)
    return {**terms, "grad_norm": descend(terms["loss"], optimizer, model.config)}


def main(argv: list[str] | None = None) -> None:
    run.start("segma.m1m2", Config, partial(train, step=train_step), argv)


if __name__ == "__main__":
    from segma.m1m2 import main  # under its own name, so that Config exists once

    run.exit_with(main)
