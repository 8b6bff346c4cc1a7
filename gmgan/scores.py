"""The scores of Secs. 3 and 5.2: quality, diversity within and between classes, Inception Score, ACC and NMI.

Each score is a function of images, features or classes. The classifier in eval.py gives features and classes.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from common.metrics import clustering_accuracy, contingency, error_rate, normalised_mutual_information
from gmgan.model import Gan

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang, Simoncelli, Bovik 2003
WINDOW, WINDOW_DEVIATION = 11, 1.5  # the Gaussian window of SSIM


def nearest_distances(features: Tensor, reference: Tensor, batch: int = 1000) -> Tensor:
    """‖c_l(x) - c_l(NN(x))‖₂ of eq. (6), (n,): the distance of features (n, d) to the nearest of reference (m, d)."""
    # cdist uses matrix products, which lose the digits of small distances. So it only finds the nearest.
    nearest = torch.cat([reference[torch.cdist(part, reference).argmin(1)] for part in features.split(batch)])
    return (features - nearest).norm(dim=1)


def quality(distances: Tensor, log_a: float) -> Tensor:
    """q(x), eq. (6), (n,): 1 - eᵈ / (eᵈ + a), at most a / (1 + a).

    Computed as the sigmoid of log a - d, which cannot overflow.
    """
    return (log_a - distances).sigmoid()


def scales(side: int) -> int:
    """The number of scales of MS-SSIM: as many as leave room for its 11×11 window, at most 5. 28: 2, 96: 4."""
    return min(int(math.log2(side / WINDOW)) + 1, len(MS_SSIM_WEIGHTS))


def ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """MS-SSIM, (B,) in [0, 1], of pairs of images x, y (B, C, H, W) in [0, 1].

    The product of contrast and structure at every scale and luminance at the last, each to the power of its weight.
    The weights of the scales in use are rescaled to sum to 1; negative terms count as 0. Raises ValueError if a side
    is below 11 pixels.
    """
    if min(x.shape[-2:]) < WINDOW:
        found = f"{x.shape[-2]}×{x.shape[-1]}"
        raise ValueError(f"MS-SSIM needs images of at least {WINDOW}×{WINDOW} pixels, found {found}")
    weights = torch.tensor(MS_SSIM_WEIGHTS[: scales(min(x.shape[-2:]))])
    weights = (weights / weights.sum()).tolist()
    result = torch.ones(len(x), device=x.device)
    for i, weight in enumerate(weights):
        if i:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        whole, contrast = _ssim(x, y)
        result = result * (whole if i == len(weights) - 1 else contrast).clamp(min=0) ** weight
    return result


def _ssim(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM, and its factor for contrast and structure; each (B,), a mean over pixels and channels. x, y: in [0, 1]."""
    c1, c2 = 0.01**2, 0.03**2
    axis = torch.arange(WINDOW, device=x.device, dtype=x.dtype) - WINDOW // 2
    window = (-(axis**2) / (2 * WINDOW_DEVIATION**2)).exp()
    window = window / window.sum()
    maps = torch.cat([x, y, x * x, y * y, x * y]).flatten(0, 1)[:, None]  # (5·B·C, 1, H, W)
    blurred = F.conv2d(F.conv2d(maps, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
    mean_x, mean_y, xx, yy, xy = blurred.view(5, len(x), -1)  # each (B, C·h·w)
    contrast = (2 * (xy - mean_x * mean_y) + c2) / (xx - mean_x**2 + yy - mean_y**2 + c2)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * contrast).mean(1), contrast.mean(1)


def intra_class_diversity(
    images: Tensor, pairs: int, generator: torch.Generator, batch: int = 100
) -> tuple[float, float]:
    """d_intra, eq. (8), and its standard error: 1 - the mean MS-SSIM over all ordered pairs of images.

    images: uint8 (n, C, H, W), n ≥ 2.  The n pairs of an image with itself have an MS-SSIM of 1 and count exactly;
    `pairs` random pairs stand for the other n² - n.
    """
    n = len(images)
    first = torch.randint(n, (pairs,), generator=generator)
    second = (first + torch.randint(1, n, (pairs,), generator=generator)) % n  # never the same image
    parts = zip(first.split(batch), second.split(batch), strict=True)
    similar = torch.cat([ms_ssim(images[i].float() / 255, images[j].float() / 255) for i, j in parts]).double()
    share = 1 - 1 / n  # of the pairs of two different images
    return share * (1 - similar.mean().item()), share * similar.std().item() / math.sqrt(pairs)


def inter_class_diversity(classes: Tensor, n_classes: int) -> float:
    """d_inter, eq. (9): the entropy of the frequencies of N ≥ 2 classes, divided by log N. classes: (n,)."""
    shares = classes.bincount(minlength=n_classes).double() / len(classes)
    return max(0.0, -torch.special.xlogy(shares, shares).sum().item()) / math.log(n_classes)


def diversity(intra: float, inter: float) -> float:
    """d(X), eq. (10)."""
    return math.sqrt(intra * inter)


def combined(quality: float, diversity: float) -> float:
    """s(X), eq. (11)."""
    return math.sqrt(quality * diversity)


def inception_score(logits: Tensor, splits: int = 10) -> float:
    """Eq. (5), exp(E KL(p(y|x) ‖ p(y))), of logits (n, classes): the mean over `splits` parts, as its authors do it."""
    values = []
    for part in logits.double().chunk(splits):
        log_p = part.log_softmax(1)
        log_marginal = log_p.logsumexp(0) - math.log(len(part))
        values.append((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp())
    return torch.stack(values).mean().item()


def clustering(clusters: Tensor, labels: Tensor, n_classes: int) -> dict[str, float]:
    """ACC, eq. (12), and NMI, eq. (13), of clusters (n,) and labels (n,), each 0 … n_classes - 1."""
    table = contingency(clusters, labels, n_classes, n_classes)
    return {"accuracy": clustering_accuracy(table), "nmi": normalised_mutual_information(clusters, labels)}


def groups_and_classes(model: Gan, classes: Tensor, groups: Tensor, n_classes: int) -> dict[str, float]:
    """How far each Gaussian is one class (Sec. 5). classes, groups: (n,), of each sample.

    Supervised: the percentage of samples of the class that their Gaussian stands for. Otherwise: the percentage of
    samples of the main (most frequent) class of their Gaussian, the number of main classes, and the NMI.
    """
    if model.supervised:
        of_class, of_group = model.output_of_class.cpu(), model.output_of_group.cpu()
        return {"samples_of_their_class": 100 - error_rate(of_class[classes], of_group[groups])}
    if model.config.groups == 1:
        return {}
    counts = contingency(groups, classes, model.config.groups, n_classes)
    return {
        "component_purity": 100 * (counts.amax(1).sum() / counts.sum()).item(),
        "component_nmi": normalised_mutual_information(groups, classes),
        "main_classes": float(len(counts.argmax(1).unique())),
    }
