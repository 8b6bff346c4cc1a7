"""The scores of Sec. 3 and 5.2: quality, diversity within and between classes, Inception Score, and those of clusters.

Each is a function of images, features or classes; eval.py says which classifier gives those.
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
    """‖c_l(x) - c_l(NN(x))‖₂ of eq. (6), (n,): from each of features (n, d) to the nearest of reference (m, d)."""
    # cdist finds the nearest by matrix products, which cost small distances their digits: the distance is taken anew.
    nearest = torch.cat([reference[torch.cdist(part, reference).argmin(1)] for part in features.split(batch)])
    return (features - nearest).norm(dim=1)


def quality(distances: Tensor, log_a: float) -> Tensor:
    """q(x), eq. (6), (n,): 1 - eᵈ / (eᵈ + a), at most a / (1 + a).

    Written as the sigmoid of log a - d, which no distance d can overflow.
    """
    return (log_a - distances).sigmoid()


def scales(side: int) -> int:
    """On how many scales MS-SSIM is taken: as many as keep its 11×11 window inside, 5 at most. 28: 2, 96: 4."""
    return min(int(math.log2(side / WINDOW)) + 1, len(MS_SSIM_WEIGHTS))


def ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """MS-SSIM of pairs of images x, y (B, C, H, W) in [0, 1], (B,) in [0, 1].

    Contrast and structure at every scale, luminance at the last, each to its weight. The weights of the scales that are
    left out are spread over the others; negative terms count as 0. Raises ValueError where a side is below 11 pixels.
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
    """SSIM and its factor for contrast and structure alone, each (B,), means over pixels and channels; range [0, 1]."""
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

    images: uint8 (n, C, H, W), n ≥ 2.  The n self-pairs, whose MS-SSIM is 1, count exactly; `pairs` random ones stand
    for the other n² - n.
    """
    n = len(images)
    first = torch.randint(n, (pairs,), generator=generator)
    second = (first + torch.randint(1, n, (pairs,), generator=generator)) % n  # never itself
    parts = zip(first.split(batch), second.split(batch), strict=True)
    similar = torch.cat([ms_ssim(images[i].float() / 255, images[j].float() / 255) for i, j in parts]).double()
    share = 1 - 1 / n  # of all pairs that are not self-pairs
    return share * (1 - similar.mean().item()), share * similar.std().item() / math.sqrt(pairs)


def inter_class_diversity(classes: Tensor, n_classes: int) -> float:
    """d_inter, eq. (9): the entropy of how often each of N ≥ 2 classes (n,) occurs, as a share of log N."""
    shares = classes.bincount(minlength=n_classes).double() / len(classes)
    return max(0.0, -torch.special.xlogy(shares, shares).sum().item()) / math.log(n_classes)


def diversity(intra: float, inter: float) -> float:
    """d(X), eq. (10)."""
    return math.sqrt(intra * inter)


def combined(quality: float, diversity: float) -> float:
    """s(X), eq. (11)."""
    return math.sqrt(quality * diversity)


def inception_score(logits: Tensor, splits: int = 10) -> float:
    """Eq. (5), exp(E KL(p(y|x) ‖ p(y))): the mean over `splits` parts of logits (n, classes), as its authors do it."""
    values = []
    for part in logits.double().chunk(splits):
        log_p = part.log_softmax(1)
        log_marginal = log_p.logsumexp(0) - math.log(len(part))
        values.append((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp())
    return torch.stack(values).mean().item()


def clustering(clusters: Tensor, labels: Tensor, n_classes: int) -> dict[str, float]:
    """ACC, eq. (12), and NMI, eq. (13), of clusters (n,) against labels (n,), as many of the one as of the other."""
    table = contingency(clusters, labels, n_classes, n_classes)
    return {"accuracy": clustering_accuracy(table), "nmi": normalised_mutual_information(table)}


def groups_and_classes(model: Gan, classes: Tensor, groups: Tensor, n_classes: int) -> dict[str, float]:
    """How far a Gaussian is a class, in percent (Sec. 5). classes, groups: (n,), of each sample.

    Supervised: samples whose class is the one that their Gaussian stands for. Else: the share of its Gaussian's most
    frequent class, how many classes are such, and the NMI of Gaussian and class.
    """
    if model.supervised:
        of_class, of_group = model.output_of_class.cpu(), model.output_of_group.cpu()
        return {"samples_of_their_class": 100 - error_rate(of_class[classes], of_group[groups])}
    if model.config.groups == 1:
        return {}
    counts = contingency(groups, classes, model.config.groups, n_classes)
    return {
        "component_purity": 100 * (counts.amax(1).sum() / counts.sum()).item(),
        "component_nmi": normalised_mutual_information(counts),
        "main_classes": float(len(counts.argmax(1).unique())),
    }
