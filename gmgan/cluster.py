"""Clustering (Sec. 5): Algorithm 2, and the two scores of its table."""

from collections.abc import Callable

import torch
from torch import Tensor

from common import classifier


def clusters(make: Callable[[int], Tensor], n_components: int, seed: int, samples: int, device: torch.device) -> classifier.Network:
    """Algorithm 2, lines 2-7: a K-way classifier trained on what each Gaussian generates, labelled by Gaussian.

    make(n): uint8 images (K·n, C, H, W), n of each Gaussian, Gaussian by Gaussian. Line 8 is classifier.classify.
    """
    return classifier.train(make(samples), torch.arange(n_components).repeat_interleave(samples), n_components, seed, device)


def contingency(clusters: Tensor, labels: Tensor, n_clusters: int, n_classes: int) -> Tensor:
    """How many images of each class fall into each cluster, (K, N), float64. clusters, labels: (n,)."""
    return (clusters * n_classes + labels).bincount(minlength=n_clusters * n_classes).view(n_clusters, n_classes).double()


def clustering_accuracy(table: Tensor) -> float:
    """ACC, eq. (12): the share of images in the class that their cluster stands for, under the best permutation. table: (N, N) counts."""
    from scipy.optimize import linear_sum_assignment

    if table.shape[0] != table.shape[1]:
        raise ValueError(f"ACC permutes as many clusters as classes, found {table.shape[0]} and {table.shape[1]}")
    rows, columns = linear_sum_assignment(table.numpy(), maximize=True)
    return (table[rows, columns].sum() / table.sum()).item()


def normalised_mutual_information(table: Tensor) -> float:
    """NMI, eq. (13): I(y, c) / √(H(y) H(c)), without the printed sum over images; 0 where either is constant. table: (K, N) counts."""
    joint = table / table.sum()
    clusters, classes = joint.sum(1), joint.sum(0)

    def entropy(p: Tensor) -> float:
        return -torch.special.xlogy(p, p).sum().item()

    information = entropy(clusters) + entropy(classes) - entropy(joint)
    scale = (entropy(clusters) * entropy(classes)) ** 0.5
    return max(information, 0.0) / scale if scale else 0.0


def scores(clusters: Tensor, labels: Tensor, n_clusters: int, n_classes: int) -> dict[str, float]:
    """ACC and NMI of a clustering."""
    table = contingency(clusters, labels, n_clusters, n_classes)
    return {"accuracy": clustering_accuracy(table), "nmi": normalised_mutual_information(table)}
