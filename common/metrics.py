"""Scores as pure functions: no model, no file, no random state."""

import torch
from torch import Tensor


def error_rate(predicted: Tensor, labels: Tensor) -> float:
    """Share of wrong predictions, in percent. Both (n,)."""
    return 100 * (predicted != labels).double().mean().item()


def nearest_neighbour(train: Tensor, train_labels: Tensor, test: Tensor, batch: int = 1000) -> Tensor:
    """The label (n,) of each test point's nearest training point, Euclidean. train: (m, ...), test: (n, ...)."""
    train, test = train.flatten(1), test.flatten(1)
    return torch.cat([train_labels[torch.cdist(part, train).argmin(1)] for part in test.split(batch)])


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and unbiased covariance (d, d) in float64 of features (n, d), n ≥ 2."""
    features = features.double()
    return features.mean(0), torch.cov(features.T)


def frechet_distance(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """Fréchet distance of two Gaussians, given by mean (d,) and covariance (d, d). Of Inception features it is FID.

    ‖m_1 - m_2‖² + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)) (Heusel et al. 2017, eq. 6), at least 0. The trace of the root is
    computed as the sum of the square roots of the eigenvalues of C_1^(1/2) C_2 C_1^(1/2). That matrix is symmetric, so
    no complex numbers appear, and the covariances may be singular.
    """
    (mean_1, cov_1), (mean_2, cov_2) = first, second
    values, vectors = torch.linalg.eigh(cov_1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_2 @ root).clamp(min=0).sqrt().sum()
    return max(0.0, ((mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * cross).item())


def contingency(clusters: Tensor, labels: Tensor, n_clusters: int, n_classes: int) -> Tensor:
    """How many points of each class fall into each cluster, (K, N), float64. clusters, labels: (n,)."""
    counts = (clusters * n_classes + labels).bincount(minlength=n_clusters * n_classes)
    return counts.view(n_clusters, n_classes).double()


def clustering_accuracy(table: Tensor) -> float:
    """The share of points whose cluster stands for their class, under the best one-to-one assignment. table: (K, N)."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(table.numpy(), maximize=True)
    return (table[rows, columns].sum() / table.sum()).item()


def normalised_mutual_information(clusters: Tensor, labels: Tensor) -> float:
    """I(cluster, class) / √(H(cluster) H(class)); 0 if one of them is constant. clusters, labels: (n,)."""
    from sklearn.metrics import normalized_mutual_info_score

    return normalized_mutual_info_score(labels.numpy(), clusters.numpy(), average_method="geometric")
