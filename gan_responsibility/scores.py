"""Table 6's scores: Inception Score and FID of 5,000 samples, where the Inception weights can be had."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from common import inception
from common.data import Dataset
from common.metrics import frechet_distance, moments

SAMPLES = 5_000  # Sec. 3.3
SPLITS = 10


@dataclass(frozen=True)
class Scorer:
    """The Inception network and what it makes of the real images."""

    features: nn.Module
    logits: nn.Module
    real: tuple[Tensor, Tensor]  # mean and covariance over the training images
    everything: tuple[Tensor, Tensor]  # over training and test images

    @classmethod
    def find(cls, data: Dataset, cache: Path, device: torch.device, weights: Path | None = None) -> "Scorer | None":
        """The scorer of Oxford-102, the one data set that the paper scores; None for others, or, aloud, without weights."""
        if not data.name.startswith("flowers10"):
            return None
        path, reason = inception.find_weights(weights)
        if path is None:
            print(f"Inception Score and FID left out: {reason}", flush=True)
            return None
        network = inception.extractor(path, device)
        everything = torch.cat([data.train_images, data.test_images])
        return cls(
            network,
            inception.extractor(path, device, "logits_unbiased"),
            inception.cached_moments(network, data.train_images, cache, f"{data.name}-train-{data.digest}"),
            inception.cached_moments(network, everything, cache, f"{data.name}-all-{data.digest}"),
        )

    def scores(self, draw: Callable[[int], Tensor]) -> dict[str, float]:
        """inception_score, the mean over 10 parts, and fid and fid_all, of draw(5000): uint8 images."""
        images = draw(SAMPLES)
        score, deviation = inception_score(inception.features(self.logits, images))
        made = moments(inception.features(self.features, images))
        return {
            "inception_score": score,
            "inception_score_deviation": deviation,
            "fid": frechet_distance(made, self.real),
            "fid_all": frechet_distance(made, self.everything),
        }


def inception_score(logits: Tensor, splits: int = SPLITS) -> tuple[float, float]:
    """exp(E KL(p(y|x) ‖ p(y))), Sec. 3.3: mean and standard deviation over `splits` parts of logits (n, classes)."""
    values = []
    for part in logits.double().chunk(splits):
        log_p = part.log_softmax(1)
        log_marginal = log_p.logsumexp(0) - math.log(len(part))
        values.append((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp())
    found = torch.stack(values)
    return found.mean().item(), found.std(correction=0).item()
