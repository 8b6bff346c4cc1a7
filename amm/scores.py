"""How good a run is: errors by eq. (17), and the diagnosis in log.csv and eval.json."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from amm.model import AMM, Inferred, as_input, squared_slopes
from common import run
from common.data import Dataset
from common.metrics import clustering_accuracy, contingency, error_rate

if TYPE_CHECKING:
    from amm.train import Split

CHECKED = 5_000  # training images on which an epoch is evaluated if none are held out
DIAGNOSED = 1_000  # images or sampled pairs in the diagnosis
NEIGHBOURS = 5


def many_to_one_error(table: Tensor) -> float:
    """Eq. (17) as an error in percent: each cluster stands for its most frequent class. table: (K, N) counts."""
    return 100 * (1 - (table.amax(1).sum() / table.sum()).item())


def one_to_one_error(table: Tensor) -> float:
    """The error in percent under the best assignment of classes to at most one cluster each. table: (K, N) counts."""
    return 100 * (1 - clustering_accuracy(table))


def error(model: AMM, predicted: Tensor, labels: Tensor, n_classes: int) -> float:
    """The error in percent: AMM's by eq. (17); SAMM's plain error, because its component k is class k."""
    if model.config.semi_supervised:
        return error_rate(predicted, labels)
    return many_to_one_error(contingency(predicted, labels, model.config.n_components, n_classes))


def epoch_row(model: AMM, s: "Split", data: Dataset) -> dict[str, float]:
    """What the log has after an epoch, on the validation images; without any, on the first CHECKED training images.

    components_used: how many components get an image by argmax G_y.  components_entropy: the entropy of their
    frequencies, as a share of log K.  agreement: of eq. (19) with argmax G_y, in percent.  Then the diagnosis.
    With validation images also errors in percent: validation_error by eq. (19), validation_error_g_y by argmax G_y, and
    test_error by eq. (19); eval.py reports the test error at the epoch of the lowest validation error.
    With averaged weights also validation_error_averaged and test_error_averaged, by eq. (19).
    """
    k, n = model.config.n_components, data.n_classes
    images = s.validation_images if model.config.validation else s.images[:CHECKED]
    labels = s.validation_labels if model.config.validation and n > 1 else None
    inferred = model.infer(images)
    by_g_y, by_bayes = inferred.h.argmax(1), model.by_bayes(inferred.z)
    share = by_g_y.bincount(minlength=k) / len(by_g_y)
    row = {
        "components_used": float((share > 0).sum()),
        "components_entropy": -torch.special.xlogy(share, share).sum().item() / math.log(k),
        "agreement": 100 - error_rate(by_bayes, by_g_y),
    } | diagnosis(model, images, inferred, labels)
    if labels is not None:
        row["validation_error"] = error(model, by_bayes, labels, n)
        row["validation_error_g_y"] = error(model, by_g_y, labels, n)
        row["test_error"] = error(model, model.classify(data.test_images), data.test_labels, n)
        if model.averaged is not None:
            for part, given, classes in (("validation", images, labels), ("test", data.test_images, data.test_labels)):
                row[f"{part}_error_averaged"] = error(model, model.averaged.classify(given), classes, n)
    return row


def diagnosis(model: AMM, images: Tensor, inferred: Inferred, labels: Tensor | None) -> dict[str, float]:
    """Numbers that show why a run goes wrong. images: uint8 (N, C, H, W).  inferred: what `model.infer` gives for them.

    slope_x, slope_y, slope_z: `mean_slopes`; sigma_y, spread_y: `label_noise`; both on the first DIAGNOSED images.
    cycle: `cycle`.  neighbour_error: `neighbour_error`, if labels (N,) are given.
    """
    few = Inferred(*(part[:DIAGNOSED] for part in inferred))
    found = mean_slopes(model, images[:DIAGNOSED], few) | label_noise(few) | {"cycle": cycle(model)}
    return found if labels is None else found | {"neighbour_error": neighbour_error(inferred.z, labels)}


def mean_slopes(model: AMM, images: Tensor, inferred: Inferred, batch: int = 500) -> dict[str, float]:
    """Mean norms of the gradient of D's logit in x, y and z at uint8 images and their codes, without dropout.

    Eq. (18) pulls the norm of the joint gradient to 1. If slope_x is near 0, D does not see the images (ledger 23).
    """
    codes = inferred.h.softmax(1), inferred.z
    parts = zip(*(part.split(batch) for part in (images, *codes)), strict=True)
    with model.evaluating():
        points = ([as_input(x.to(model.device)), y.to(model.device), z.to(model.device)] for x, y, z in parts)
        slopes = torch.cat([squared_slopes(model.discriminator, three) for three in points], 1).sqrt().mean(1)
    return {f"slope_{name}": slope.item() for name, slope in zip("xyz", slopes, strict=True)}


def label_noise(inferred: Inferred) -> dict[str, float]:
    """sigma_y, the mean σ_y of eq. (8), and spread_y, the mean deviation of μ_y over the images.

    If sigma_y is far above spread_y, ỹ is random (ledger 25).
    """
    sigma, spread = (inferred.h_log_variance / 2).exp(), inferred.h.std(0, correction=0)
    return {"sigma_y": sigma.mean().item(), "spread_y": spread.mean().item()}


def cycle(model: AMM) -> float:
    """How often argmax G_y(G_x(y, z)) = y, in percent, for DIAGNOSED fixed pairs y ~ p(y), z ~ p(z|y)."""
    y = torch.multinomial(model.priors.cpu(), DIAGNOSED, replacement=True, generator=run.generator(0, "cycle"))
    return 100 - error_rate(model.classify(model.sample(y), by="g_y"), y)


def neighbour_error(z: Tensor, labels: Tensor) -> float:
    """How often the majority class of the 5 other images nearest in z is wrong, in percent, for DIAGNOSED images.

    z: (N, D), labels: (N,). A tie goes to the class with the smallest number, as in scikit-learn.
    """
    distances = torch.cdist(z[:DIAGNOSED], z).fill_diagonal_(torch.inf)  # no image is its own neighbour
    nearest = distances.topk(min(NEIGHBOURS, len(z) - 1), largest=False).indices
    return error_rate(F.one_hot(labels[nearest]).sum(1).argmax(1), labels[:DIAGNOSED])
