"""Scores as pure functions, each named after what it computes; no model, no file, no random state."""

import torch
from torch import Tensor


def error_rate(predicted: Tensor, labels: Tensor) -> float:
    """Share of wrong predictions, in percent. Both (n,)."""
    return 100 * (predicted != labels).double().mean().item()


def nearest_neighbour(train: Tensor, train_labels: Tensor, test: Tensor, batch: int = 1000) -> Tensor:
    """The label (n,) of each test point's nearest training point, by Euclidean distance. train: (m, ...), test: (n, ...)."""
    train, test = train.flatten(1), test.flatten(1)
    return torch.cat([train_labels[torch.cdist(part, train).argmin(1)] for part in test.split(batch)])


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and unbiased covariance (d, d) in float64 of features (n, d), n ≥ 2."""
    features = features.double()
    return features.mean(0), torch.cov(features.T)


def frechet_distance(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """Fréchet distance between two Gaussians given by their moments (mean (d,), covariance (d, d)); on Inception features, FID.

    ‖m_1 - m_2‖² + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)) (Heusel et al. 2017, eq. 6). The trace of the root is the sum of the roots
    of the eigenvalues of C_1^(1/2) C_2 C_1^(1/2), which is symmetric: no complex numbers, and singular covariances are no trouble.
    """
    (mean_1, cov_1), (mean_2, cov_2) = first, second
    values, vectors = torch.linalg.eigh(cov_1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_2 @ root).clamp(min=0).sqrt().sum()
    return ((mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * cross).item()
