"""Table 6's scores: Inception Score and FID of 5,000 samples, where the Inception weights can be had."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common import inception, run
from common.data import Dataset, load
from common.metrics import frechet_distance, moments

SAMPLES = 5_000  # Sec. 3.3
SPLITS = 10
JUDGE = f"Inception 2015-12-05, {inception.SHA256_PREFIX}"


@dataclass(frozen=True)
class Scorer:
    """The Inception network and what it makes of the real images."""

    network: nn.Module
    real: tuple[Tensor, Tensor]  # mean and covariance over the training images
    everything: Tensor  # all images of the ten classes, of the three official splits, each once
    of_everything: tuple[Tensor, Tensor]  # mean and covariance

    @classmethod
    def find(cls, data: Dataset, options: run.Options, device: torch.device) -> "Scorer | None":
        """The scorer of Oxford-102, the one data set that the paper scores; None for others, or, aloud, without weights."""
        if not data.name.startswith("flowers10"):
            return None
        path, reason = inception.find_weights(options.inception)
        if path is None:
            print(f"Inception Score and FID left out: {reason}", flush=True)
            return None
        network, cache = inception.extractor(path, device, str(inception.FEATURES), inception.LOGITS), options.runs / "cache"
        whole = load("flowers10_all", options.data, options.unofficial_data)
        return cls(
            network,
            inception.cached_moments(network, data.train_images, cache, f"{data.name}-train-{data.digest}"),
            whole.train_images,
            inception.cached_moments(network, whole.train_images, cache, f"{whole.name}-train-{whole.digest}"),
        )

    def scores(self, draw: Callable[[int], Tensor]) -> dict[str, float]:
        """inception_score, the mean over 10 parts, and fid and fid_all, of draw(5000): uint8 images."""
        features, logits = inception.outputs(self.network, draw(SAMPLES))
        score, deviation = inception_score(logits)
        made = moments(features)
        return {
            "inception_score": score,
            "inception_score_deviation": deviation,
            "fid": frechet_distance(made, self.real),
            "fid_all": frechet_distance(made, self.of_everything),
        }

    def of_real_images(self, data: Dataset, seed: int) -> dict[str, float]:
        """How much of a FID is due to so few images. fid_halves: between two random halves of all; fid_real: training against test."""
        features = inception.features(self.network, self.everything)
        halves = features[torch.randperm(len(features), generator=run.generator(seed, "halves"))].tensor_split(2)
        found = {"fid_halves": frechet_distance(*(moments(half) for half in halves))}
        if data.name == "flowers10":  # of flowers10_all the test images are training images
            found["fid_real"] = frechet_distance(self.real, moments(inception.features(self.network, data.test_images)))
        return found


def inception_score(logits: Tensor, splits: int = SPLITS) -> tuple[float, float]:
    """exp(E KL(p(y|x) ‖ p(y))), Sec. 3.3: mean and standard deviation over `splits` parts of logits (n, classes)."""
    values = []
    for part in logits.double().chunk(splits):
        log_p = part.log_softmax(1)
        log_marginal = log_p.logsumexp(0) - math.log(len(part))
        values.append((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp())
    found = torch.stack(values)
    return found.mean().item(), found.std(correction=0).item()
