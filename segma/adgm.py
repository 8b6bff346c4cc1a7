"""ADGM (Maaløe, Sønderby, Sønderby, Winther: Auxiliary Deep Generative Models, 2016), a baseline.

    python -m segma.adgm mnist --seed 0 --data data

The generative model is p(y) p(z) p(x|z, y) p(a|x, z, y), y uniform, z ~ N(0, I). The auxiliary variable a does not
change p(x, y, z) but makes the inference model richer: q(a|x) q(y|a, x) q(z|a, x, y). A code is (z, one-hot y).
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
from segma.m1m2 import (
    ClassConditional,
    Dense,
    as_data,
    draw,
    image_ends,
    kl_from_standard,
    log_likelihood,
    log_normal,
    spread,
)
from segma.model import initialise
from segma.train import Batch, Task, descend, train


@dataclass(frozen=True)
class Config(Task):
    latent_dim: Count = 100  # dimension of z
    auxiliary_dim: Count = 100  # dimension of a
    hidden_dim: Count = 500  # units of a hidden layer of each of the five networks
    hidden_layers: Count = 2  # hidden layers of each of the five networks
    likelihood: Literal["bernoulli", "gaussian"] = "bernoulli"  # p(x|z, y); gaussian: with variance 1
    binarise: bool = False  # draw each pixel as 0 or 1 in each batch, with its grey value as probability of 1
    posterior_variance: Literal["free", "at_least_one"] = "free"  # at_least_one: log σ² goes through a softplus
    labelled_weight: NonNegative = 1.0  # weight of the mean labelled bound; the mean unlabelled bound has weight 1
    label_weight: NonNegative = 60.0  # α, weight of the mean cross-entropy of q(y|a, x)

    def build(self) -> nn.Module:
        return ADGM(self)


class ADGM(ClassConditional):
    """Each edge of the graph is a ReLU network. Initial weights are Glorot normal, biases 0 (ledger 44).

    For CelebA all edges that see the image share one set of convolutions (appendix). config: a Config.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        hidden, relu = [config.hidden_dim] * config.hidden_layers, nn.ReLU()
        a, z, k = config.auxiliary_dim, config.latent_dim, config.components
        features, images, n = image_ends(config.image_shape)
        self.features = features
        self.q_a = Dense([n], hidden, [a, a], relu)  # q(a|x): mean, log σ²
        self.q_y = Dense([n, a], hidden, [k], relu)  # q(y|a, x): logits
        self.q_z = Dense([n, a, k], hidden, [z, z], relu)  # q(z|a, x, y): mean, log σ²
        self.p_a = Dense([n, z, k], hidden, [a, a], relu)  # p(a|x, z, y): mean, log σ²
        self.p_x = Dense([z, k], hidden, [n], relu)  # p(x|z, y): logits, or the input of the transposed convolutions
        self.images = images
        for network in self.children():
            initialise(network, nn.init.xavier_normal_)

    def generate(self, z: Tensor, y: Tensor) -> Tensor:
        """The logits of p(x|z, y), (…, P), P pixels in the order C, H, W.

        z: (…, Z), y: (…, K); leading dimensions broadcast.
        """
        h = self.p_x(z, y)
        logits = self.images(h.flatten(0, -2)).reshape(*h.shape[:-1], -1)
        return logits.float() if logits.dtype == torch.bfloat16 else logits

    def labelled_bound(
        self, x: Tensor, h: Tensor, a: Tensor, log_q_a: Tensor, y: Tensor, noise: torch.Generator
    ) -> Tensor:
        """-L(x, y), the bound of a labelled image, with one sample:

        log p(x|z,y) + log p(y) + log p(a|x,z,y) - log q(a|x) - KL(q(z|a,x,y) ‖ p(z)).

        x: (…, P) pixels; h: (…, n) their features; a: (…, A), drawn from q(a|x), and log_q_a: (…); y: (…, K) one-hot.
        Leading dimensions broadcast. Returns (…), nats; its expectation is ≤ log p(x, y).
        """
        mean, log_variance = self.q_z(h, a, y)
        log_variance = spread(log_variance, self.config)
        z = draw(mean, log_variance, noise)
        a_mean, a_log_variance = self.p_a(h, z, y)
        log_p_a = log_normal(a, a_mean, spread(a_log_variance, self.config))
        log_p_x = log_likelihood(x, self.generate(z, y), self.config.likelihood)
        return log_p_x - math.log(y.shape[-1]) + log_p_a - log_q_a - kl_from_standard(mean, log_variance)

    def loss(self, batch: Batch, precision: str = "fp32") -> dict[str, Tensor]:
        """The objective on one batch, and its terms: means over the images of each half, scalars, nats."""
        config, noise, n, k = self.config, batch.noise, len(batch.unlabelled), self.config.components
        images = as_data(torch.cat([batch.unlabelled, batch.labelled]), config, noise)
        x = images.flatten(1)  # (B, P)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            h = self.features(images)
            mean, log_variance = self.q_a(h)
            log_variance = spread(log_variance, config)
            a = draw(mean, log_variance, noise)
            log_q_a = log_normal(a, mean, log_variance)
            log_q_y = self.q_y(h, a).log_softmax(-1)  # (B, K)

            # -U(x) of the unlabelled images is a sum over all classes. The first layers see each image once.
            known = [t[:n, None] for t in (x, h, a, log_q_a)]  # (n, 1, ·)
            every_class = torch.eye(k, device=x.device, dtype=x.dtype)[None]  # (1, K, K)
            bounds = self.labelled_bound(*known, every_class, noise)  # (n, K)
            bound_u = (log_q_y[:n].exp() * (bounds - log_q_y[:n])).sum(-1).mean()

            y = self.one_hot(batch.labels, x)
            bound_l = self.labelled_bound(x[n:], h[n:], a[n:], log_q_a[n:], y, noise).mean()
        cross_entropy = F.nll_loss(log_q_y[n:], batch.labels)
        loss = -bound_u - config.labelled_weight * bound_l + config.label_weight * cross_entropy
        return {"loss": loss, "unlabelled_bound": bound_u, "labelled_bound": bound_l, "cross_entropy": cross_entropy}

    def codes_of(self, x: Tensor) -> Tensor:
        """Codes (B, Z + K) of images x (B, C, H, W) in [0, 1]: the mean of q(z|a, x, y), and one-hot y.

        a is the mean of q(a|x), y the most probable class of q(y|a, x).
        """
        h = self.features(x)
        a, _ = self.q_a(h)
        logits = self.q_y(h, a)
        y = self.one_hot(logits.argmax(-1), logits)
        return torch.cat([self.q_z(h, a, y)[0], y], 1)

    def images_of(self, z: Tensor) -> Tensor:
        """Mean images (B, C, H, W) in [0, 1] of p(x|z, y). y may lie between two one-hots."""
        return self.images(self.p_x(*self.split(z))).sigmoid()


def train_step(
    model: ADGM, optimizer: torch.optim.Optimizer, batch: Batch, precision: str = "fp32"
) -> dict[str, Tensor]:
    """One step down the objective: the bounds of both halves of the batch, and α times the cross-entropy.

    Returns the terms of the objective, scalars on the device.
    """
    terms = model.loss(batch, precision)
    return {**terms, "grad_norm": descend(terms["loss"], optimizer, model.config)}


def main(argv: list[str] | None = None) -> None:
    run.start("segma.adgm", Config, partial(train, step=train_step), argv)


if __name__ == "__main__":
    from segma.adgm import main  # under its own name, so that Config exists once

    run.exit_with(main)
