"""The two classical baselines of Table 3: K-means on pixels, and on the codes of an auto-encoder.

    python -m gmgan.kmeans fashion --seed 0 --data data

This trains the auto-encoder; the evaluation clusters pixels and codes. The paper says only that it implemented both
baselines itself. We take the auto-encoder of DEC (Xie, Girshick, Farhadi 2016), dense 500-500-2000-10 with ReLU,
because the table quotes DEC's AE + K-means row (ledger 18).
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import run
from common.data import Dataset
from gmgan import scores
from gmgan.model import checked_input
from gmgan.train import Batch, Optimizers, Task, descend, train

HIDDEN = (500, 500, 2000)
RESTARTS = 10  # of K-means, each started by k-means++; the one with the lowest objective counts


@dataclass(frozen=True)
class Config(Task):
    def __post_init__(self):
        super().__post_init__()
        if len(self.shape) == 1:
            raise ValueError(f"--dataset: {self.dataset} has no images")

    def build(self) -> nn.Module:
        return KMeansAutoencoder(self)


def dense(sizes: list[int]) -> list[nn.Module]:
    """Linear layers of these sizes with ReLU between them."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return layers[:-1]


class KMeansAutoencoder(nn.Module):
    """DEC's auto-encoder, trained end to end by squared error; K-means then clusters its codes."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        sizes = [math.prod(config.shape), *HIDDEN, config.latent_dim]
        self.encoder = nn.Sequential(nn.Flatten(), *dense(sizes))  # (B, C, H, W) -> (B, latent_dim)
        self.decoder = nn.Sequential(*dense(sizes[::-1]), nn.Unflatten(1, config.shape))  # and back

    def players(self) -> dict[str, list[nn.Parameter]]:
        return {"autoencoder": list(self.parameters())}

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Codes (B, latent_dim) of images (B, C, H, W), uint8 or floats in [-1, 1]; otherwise raises ValueError."""
        return self.encoder(checked_input(images))

    @torch.no_grad()
    def scores(self, data: Dataset, seed: int) -> dict[str, float]:
        """ACC and NMI of K-means with K = N, on pixels and on codes, fitted to the training images.

        Names that end with _test are scores on the test images.
        """
        from sklearn.cluster import KMeans

        device = next(self.parameters()).device
        found = {}
        for name, encode in (("kmeans", lambda images: checked_input(images).flatten(1)), ("ae_kmeans", self.encode)):
            train, test = (
                torch.cat([encode(part.to(device)).cpu() for part in images.split(1000)]).numpy()
                for images in (data.train_images, data.test_images)
            )
            fitted = KMeans(data.n_classes, n_init=RESTARTS, random_state=seed % 2**32).fit(train)
            for suffix, points, labels in (("", train, data.train_labels), ("_test", test, data.test_labels)):
                clusters = torch.from_numpy(fitted.predict(points)).long()
                values = scores.clustering(clusters, labels, data.n_classes)
                found |= {f"{name}_{score}{suffix}": value for score, value in values.items()}
        return found


def train_step(
    model: KMeansAutoencoder, optimizers: Optimizers, batch: Batch, precision: str = "fp32"
) -> dict[str, Tensor]:
    """One step down the squared error of pixels in [-1, 1], mean over pixels and images."""
    with torch.autocast(batch.real.device.type, torch.bfloat16, enabled=precision == "bf16"):
        decoded = model.decoder(model.encoder(batch.real))
    loss = F.mse_loss(decoded.float(), batch.real)
    return {"mse": loss, "grad": descend(loss, optimizers["autoencoder"])}


def main(argv: list[str] | None = None) -> None:
    run.start("gmgan.kmeans", Config, functools.partial(train, step=train_step), argv)


if __name__ == "__main__":
    from gmgan.kmeans import main  # under its own name, so that Config exists once

    run.exit_with(main)
