"""The scores, during training and after it: clusters by p(k|x), the weights of the modes, Table 6.

Table 6 has the Inception Score and FID of 5,000 samples of Oxford-102. They need the Inception weights.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common import inception, run
from common.data import Dataset, load
from common.metrics import clustering_accuracy, contingency, frechet_distance, moments, normalised_mutual_information

SAMPLES = 5_000  # Sec. 3.3
SPLITS = 10
JUDGE = f"Inception 2015-12-05, {inception.SHA256_PREFIX}"


def clustering(alpha: Tensor, labels: Tensor, n_classes: int) -> dict[str, float]:
    """NMI and (if K = n_classes) ACC of argmax p(k|x). alpha: p(k|x), (N, K).  labels: (N,)."""
    clusters = alpha.argmax(1)
    found = {"nmi": normalised_mutual_information(clusters, labels)}
    if alpha.shape[1] == n_classes:
        found["accuracy"] = clustering_accuracy(contingency(clusters, labels, n_classes, n_classes))
    return found


def mode_weights_against_classes(alpha: Tensor, labels: Tensor) -> dict[str, float]:
    """The weights of the modes and the frequencies of the classes, paired as ACC pairs them (Sec. 1).

    alpha: p(k|x), (N, K).  labels: (N,), of K classes. weight_error is half the sum of the absolute differences (0: the
    weights are right). The weights are the mean of p(k|x); the shares of argmax p(k|x) (_hard); or 1/K for every mode
    (_uniform), which is right if all classes are equally frequent.
    """
    from scipy.optimize import linear_sum_assignment

    k, n = alpha.shape[1], len(alpha)
    _, paired = linear_sum_assignment(contingency(alpha.argmax(1), labels, k, k).numpy(), maximize=True)
    frequencies = (labels.bincount(minlength=k).double() / n)[torch.from_numpy(paired)]
    soft, hard = alpha.double().mean(0), alpha.argmax(1).bincount(minlength=k).double() / n
    uniform = torch.full((k,), 1 / k, dtype=torch.float64)
    found = {}
    for suffix, weights in (("", soft), ("_hard", hard), ("_uniform", uniform)):
        found[f"weight_error{suffix}"] = 0.5 * (weights - frequencies).abs().sum().item()  # the total variation
    found |= {f"weight_of_{i}": soft[i].item() for i in range(k)}
    return found | {f"frequency_of_{i}": frequencies[i].item() for i in range(k)}


def purity(gaussians: Tensor, classes: Tensor, k: int, n_classes: int) -> dict[str, float]:
    """Is each Gaussian one class (Sec. 3.2)? gaussians, classes: (n,), of samples, the same number of each Gaussian.

    sample_purity: the share of samples that belong to the main class of their Gaussian, the mean over Gaussians.
    sample_purity_of_k: of one Gaussian. sample_classes: how many classes are the main class of some Gaussian.
    sample_accuracy, if K = n_classes: the share of samples in the class that is paired with their Gaussian.
    """
    table = contingency(gaussians, classes, k, n_classes)
    of_each, main = (table / table.sum(1, keepdim=True)).max(1)
    found = {"sample_purity": of_each.mean().item(), "sample_classes": float(len(main.unique()))}
    if k == n_classes:
        found["sample_accuracy"] = clustering_accuracy(table)
    return found | {f"sample_purity_of_{i}": of_each[i].item() for i in range(k)}


def inception_score(logits: Tensor, splits: int = SPLITS) -> tuple[float, float]:
    """exp(E KL(p(y|x) ‖ p(y))), Sec. 3.3: mean and standard deviation over `splits` parts of logits (n, classes)."""
    values = []
    for part in logits.double().chunk(splits):
        log_p = part.log_softmax(1)
        log_marginal = log_p.logsumexp(0) - math.log(len(part))
        values.append((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp())
    found = torch.stack(values)
    return found.mean().item(), found.std(correction=0).item()


@dataclass(frozen=True)
class Scorer:
    """The Inception network and its features of the real images."""

    network: nn.Module
    real: tuple[Tensor, Tensor]  # mean and covariance over the training images
    everything: Tensor  # all images of the ten classes in the three official splits, each once
    of_everything: tuple[Tensor, Tensor]  # mean and covariance over these

    @classmethod
    def find(cls, data: Dataset, options: run.Options, device: torch.device) -> "Scorer | None":
        """The scorer of Oxford-102, the only data set that the paper scores; None for others. None as well, with a
        printed reason, if the Inception weights are missing."""
        if not data.name.startswith("flowers10"):
            return None
        path, reason = inception.find_weights(options.inception)
        if path is None:
            print(f"Inception Score and FID left out: {reason}", flush=True)
            return None
        network = inception.extractor(path, device, str(inception.FEATURES), inception.LOGITS)
        whole, cache = load("flowers10_all", options.data, options.unofficial_data), options.runs / "cache"

        def moments_of(part: Dataset) -> tuple[Tensor, Tensor]:
            return inception.cached_moments(network, part.train_images, cache, f"{part.name}-train-{part.digest}")

        return cls(network, moments_of(data), whole.train_images, moments_of(whole))

    def scores(self, samples: Tensor) -> dict[str, float]:
        """inception_score (the mean over 10 parts), fid and fid_all of samples: uint8 (n, C, H, W)."""
        features, logits = inception.outputs(self.network, samples)
        score, deviation = inception_score(logits)
        of_samples = moments(features)
        return {
            "inception_score": score,
            "inception_score_deviation": deviation,
            "fid": frechet_distance(of_samples, self.real),
            "fid_all": frechet_distance(of_samples, self.of_everything),
        }

    def of_real_images(self, data: Dataset, seed: int) -> dict[str, float]:
        """The FID between real images, which is far from 0 because there are so few.

        fid_halves: between two random halves of all images.  fid_real: between training and test images.
        """
        features = inception.features(self.network, self.everything)
        order = torch.randperm(len(features), generator=run.generator(seed, "halves"))
        found = {"fid_halves": frechet_distance(*(moments(half) for half in features[order].tensor_split(2)))}
        if data.name == "flowers10":  # the test images of flowers10_all are training images too
            found["fid_real"] = frechet_distance(self.real, moments(inception.features(self.network, data.test_images)))
        return found
