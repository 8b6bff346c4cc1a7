"""ADGM (Maaløe, Sønderby, Sønderby, Winther: Auxiliary Deep Generative Models, 2016), as SeGMA's baseline.

    python -m segma.train mnist-adgm --seed 0 --data data

Generative model p(y) p(z) p(x|z, y) p(a|x, z, y), y uniform, z ~ N(0, I), with the auxiliary variable a, which leaves p(x, y, z) as it
is; inference q(a|x) q(y|a, x) q(z|a, x, y), richer for it. A code is (z, one-hot y).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.run import Count, NonNegative
from segma.m1m2 import Dense, as_data, classes, draw, kl_from_standard, log_likelihood, log_normal, place, priors, spread
from segma.model import convolutional, convolutions, initialise, transposed_convolutions
from segma.train import Batch, Task, descend

__all__ = ["Config", "build", "classes", "decode", "encode", "examples", "place", "priors", "train_step"]  # what every system brings


@dataclass(frozen=True)
class Config(Task):
    module: Literal["adgm"] = "adgm"
    latent_dim: Count = 100  # of z
    auxiliary_dim: Count = 100  # of a
    hidden_dim: Count = 500  # units of a hidden layer of each of the five networks
    hidden_layers: Count = 2  # hidden layers of each
    likelihood: Literal["bernoulli", "gaussian"] = "bernoulli"  # p(x|z, y); gaussian: of variance 1
    binarise: bool = False  # draw black-or-white pixels with the grey values as probabilities, anew for each batch
    posterior_variance: Literal["free", "at_least_one"] = "free"  # the latter: log σ² through a softplus, as in the open repository
    labelled_weight: NonNegative = 1.0  # of the mean labelled bound; the mean unlabelled bound weighs 1
    label_weight: NonNegative = 60.0  # α, of the mean cross-entropy of q(y|a, x)


def build(config: Config) -> dict[str, nn.Module]:
    """Every trained part by name; each edge of the graph a ReLU network. Weights Glorot normal, biases 0 (the open repository)."""
    hidden = [config.hidden_dim] * config.hidden_layers
    a, z, k, pixels = config.auxiliary_dim, config.latent_dim, config.n_components, math.prod(config.image_shape)
    if convolutional(config.image_shape):  # the appendix: one set of convolutions, on which every edge builds
        features, images, n = convolutions(), nn.Sequential(nn.ReLU(), transposed_convolutions()), 1024
    else:
        features, images, n = nn.Flatten(), nn.Unflatten(1, config.image_shape), pixels
    relu = nn.ReLU()
    networks = {
        "features": features,  # (B, C, H, W) -> (B, 1024), or flattened
        "q_a": Dense([n], hidden, [a, a], relu),  # q(a|x): mean, log σ²
        "q_y": Dense([n, a], hidden, [k], relu),  # q(y|a, x): logits
        "q_z": Dense([n, a, k], hidden, [z, z], relu),  # q(z|a, x, y): mean, log σ²
        "p_a": Dense([n, z, k], hidden, [a, a], relu),  # p(a|x, z, y): mean, log σ²
        "p_x": Dense([z, k], hidden, [n], relu),  # p(x|z, y): logits, or what the transposed convolutions take
        "images": images,
    }
    for network in networks.values():
        initialise(network, nn.init.xavier_normal_)
    return networks


def examples(config: Config) -> dict[str, Tensor | tuple[Tensor, ...]]:
    a, z, y = torch.zeros(1, config.auxiliary_dim), torch.zeros(1, config.latent_dim), torch.zeros(1, config.n_components or 1)
    h = torch.zeros(1, 1024 if convolutional(config.image_shape) else math.prod(config.image_shape))
    inputs = {"q_a": h, "q_y": (h, a), "q_z": (h, a, y), "p_a": (h, z, y), "p_x": (z, y), "images": h}
    return {"features": torch.zeros(1, *config.image_shape), **inputs}


# --------------------------------------------------------------------------------------------------------------- bounds


def generate(networks: dict[str, nn.Module], z: Tensor, y: Tensor) -> Tensor:
    """The logits of p(x|z, y), (…, P), P pixels in the order C, H, W. z: (…, Z), y: (…, K); leading dimensions broadcast."""
    h = networks["p_x"](z, y)
    logits = networks["images"](h.flatten(0, -2)).reshape(*h.shape[:-1], -1)
    return logits.float() if logits.dtype == torch.bfloat16 else logits


def labelled_bound(
    networks: dict[str, nn.Module], x: Tensor, h: Tensor, a: Tensor, log_q_a: Tensor, y: Tensor, config: Config, noise: torch.Generator
) -> Tensor:
    """-L(x, y), the bound of a labelled image, one sample: log p(x|z,y) + log p(y) + log p(a|x,z,y) - log q(a|x) - KL(q(z|a,x,y) ‖ p(z)).

    x: (…, P) pixels; h: (…, n) their features; a: (…, A) and log_q_a: (…) drawn from q(a|x); y: (…, K) one-hot; leading dimensions
    broadcast. Returns (…), nats; its expectation is ≤ log p(x, y).
    """
    mean, log_variance = networks["q_z"](h, a, y)
    log_variance = spread(log_variance, config)
    z = draw(mean, log_variance, noise)
    a_mean, a_log_variance = networks["p_a"](h, z, y)
    log_p_a = log_normal(a, a_mean, spread(a_log_variance, config))
    log_p_x = log_likelihood(x, generate(networks, z, y), config.likelihood)
    return log_p_x - math.log(y.shape[-1]) + log_p_a - log_q_a - kl_from_standard(mean, log_variance)


def train_step(
    networks: dict[str, nn.Module], optimizer: torch.optim.Optimizer, batch: Batch, config: Config, precision: str = "fp32"
) -> dict[str, Tensor]:
    """One step down the objective: the bounds of both halves of the batch and α times the cross-entropy. Returns its terms, scalars."""
    terms = loss_terms(networks, batch, config, precision)
    return {**terms, "grad_norm": descend(terms["loss"], optimizer, config)}


def loss_terms(networks: dict[str, nn.Module], batch: Batch, config: Config, precision: str = "fp32") -> dict[str, Tensor]:
    """The objective on one batch, and its terms: means over the images of each half, nats."""
    n, k = len(batch.unlabelled), config.n_components
    images = as_data(torch.cat([batch.unlabelled, batch.labelled]), config, batch.noise)
    x = images.flatten(1)  # (B, P)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
        h = networks["features"](images)
        mean, log_variance = networks["q_a"](h)
        log_variance = spread(log_variance, config)
        a = draw(mean, log_variance, batch.noise)
        log_q_a = log_normal(a, mean, log_variance)
        log_q_y = networks["q_y"](h, a).log_softmax(-1)  # (B, K)

        # Unlabelled, -U(x): the sum over every class, each image's first layers computed once.
        known = [t[:n, None] for t in (x, h, a, log_q_a)]  # (n, 1, ·)
        bounds = labelled_bound(networks, *known, torch.eye(k, device=x.device, dtype=x.dtype)[None], config, batch.noise)  # (n, K)
        bound_u = (log_q_y[:n].exp() * (bounds - log_q_y[:n])).sum(-1).mean()

        y = F.one_hot(batch.labels, k).to(x.dtype)
        bound_l = labelled_bound(networks, x[n:], h[n:], a[n:], log_q_a[n:], y, config, batch.noise).mean()
    cross_entropy = F.nll_loss(log_q_y[n:], batch.labels)
    loss = -bound_u - config.labelled_weight * bound_l + config.label_weight * cross_entropy
    return {"loss": loss, "unlabelled_bound": bound_u, "labelled_bound": bound_l, "cross_entropy": cross_entropy}


# --------------------------------------------------------- what any of the systems can do, with m1m2's classes, priors and place


def encode(networks: dict[str, nn.Module], x: Tensor) -> Tensor:
    """Codes (B, Z + K): the mean of q(z|a, x, y) and one-hot y, at the mean a of q(a|x) and the most probable y of q(y|a, x)."""
    h = networks["features"](x)
    a, _ = networks["q_a"](h)
    logits = networks["q_y"](h, a)
    y = F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    return torch.cat([networks["q_z"](h, a, y)[0], y], 1)


def decode(networks: dict[str, nn.Module], codes: Tensor) -> Tensor:
    """Mean images (B, C, H, W) in [0, 1] of p(x|z, y). y may lie between two one-hots."""
    z, y = codes.tensor_split([-networks["q_y"].heads[0].out_features], 1)
    return networks["images"](networks["p_x"](z, y)).sigmoid()
