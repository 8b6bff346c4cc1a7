"""Clustering (Sec. 5): Algorithm 2, and what its result is worth."""

from collections.abc import Callable

import torch
from torch import Tensor

from common import classifier
from common.metrics import clustering_accuracy, contingency, normalised_mutual_information


def clusters(make: Callable[[int], Tensor], n_components: int, seed: int, samples: int, device: torch.device) -> classifier.Network:
    """Algorithm 2, lines 2-7: a K-way classifier trained on what each Gaussian generates, labelled by Gaussian.

    make(n): uint8 images (K·n, C, H, W), n of each Gaussian, Gaussian by Gaussian. Line 8 is classifier.classify.
    """
    return classifier.train(make(samples), torch.arange(n_components).repeat_interleave(samples), n_components, seed, device)


def scores(clusters: Tensor, labels: Tensor, n_classes: int) -> dict[str, float]:
    """ACC, eq. (12), and NMI, eq. (13), of clusters (n,) against labels (n,), with as many of the one as of the other."""
    table = contingency(clusters, labels, n_classes, n_classes)
    return {"accuracy": clustering_accuracy(table), "nmi": normalised_mutual_information(table)}
