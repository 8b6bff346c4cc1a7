"""The two classical baselines of Table 3: K-means on pixels, and on the codes of an auto-encoder.

    python -m gmgan.train fashion-kmeans --seed 0 --data data

Trains the auto-encoder; evaluation clusters pixels and codes. The paper says of both only that they are its own implementation.
The auto-encoder is that of DEC (Xie, Girshick, Farhadi 2016), whose AE + K-means row the table quotes: dense 500-500-2000-10, ReLU.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.data import Dataset
from gmgan.cluster import scores as clustering_scores
from gmgan.train import Batch, Task, as_input, descend

__all__ = ["PLAYERS", "Config", "build", "examples", "train_step"]  # what every system brings

PLAYERS = {"autoencoder": ("encoder", "decoder")}
HIDDEN = (500, 500, 2000)
RESTARTS = 10  # of K-means, by k-means++; the best by its own objective counts


@dataclass(frozen=True)
class Config(Task):
    module: Literal["kmeans"] = "kmeans"

    def __post_init__(self):
        super().__post_init__()
        if len(self.shape) == 1:
            raise ValueError(f"dataset: {self.dataset} has no images")


def dense(sizes: list[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return layers[:-1]


def build(config: Config) -> dict[str, nn.Module]:
    sizes = [math.prod(config.shape), *HIDDEN, config.latent_dim]
    return {
        "encoder": nn.Sequential(nn.Flatten(), *dense(sizes)),  # (B, C, H, W) -> (B, latent_dim)
        "decoder": nn.Sequential(*dense(sizes[::-1]), nn.Unflatten(1, config.shape)),  # and back
    }


def examples(config: Config) -> dict[str, Tensor]:
    return {"encoder": torch.zeros(1, *config.shape), "decoder": torch.zeros(1, config.latent_dim)}


def train_step(
    networks: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer], batch: Batch, config: Config, precision: str = "fp32"
) -> dict[str, Tensor]:
    """One step down the mean squared error, per pixel of [-1, 1]."""
    with torch.autocast(batch.real.device.type, torch.bfloat16, enabled=precision == "bf16"):
        decoded = networks["decoder"](networks["encoder"](batch.real))
    loss = F.mse_loss(decoded.float(), batch.real)
    return {"mse": loss, "grad": descend(loss, optimizers["autoencoder"])}


@torch.no_grad()
def scores(networks: dict[str, nn.Module], data: Dataset, seed: int) -> dict[str, float]:
    """ACC and NMI of K-means with K = N, on pixels and on codes, fitted to the training images; _test: of the test images."""
    from sklearn.cluster import KMeans

    device = next(networks["encoder"].parameters()).device
    found = {}
    for name, encode in (("kmeans", nn.Flatten()), ("ae_kmeans", networks["encoder"])):
        train, test = (
            torch.cat([encode(as_input(part.to(device))).cpu() for part in images.split(1000)]).numpy()
            for images in (data.train_images, data.test_images)
        )
        fitted = KMeans(data.n_classes, n_init=RESTARTS, random_state=seed % 2**32).fit(train)
        for suffix, points, labels in (("", train, data.train_labels), ("_test", test, data.test_labels)):
            assigned = torch.from_numpy(fitted.predict(points)).long()
            values = clustering_scores(assigned, labels, data.n_classes)
            found |= {f"{name}_{score}{suffix}": value for score, value in values.items()}
    return found
