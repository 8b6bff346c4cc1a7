"""How good a run is: errors by eq. (17), and the diagnosis that stands in the log and in eval.json."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from amm.model import AMM, Inferred, as_input, squared_slopes
from common import run
from common.data import Dataset
from common.metrics import contingency, error_rate

if TYPE_CHECKING:
    from amm.train import Split

CHECKED = 5_000  # training images on which an epoch is judged where none are held out
DIAGNOSED = 1_000  # images, or sampled pairs, of the diagnosis
NEIGHBOURS = 5


def many_to_one_error(table: Tensor) -> float:
    """Eq. (17) as an error in percent: each cluster counts for its most frequent class. table: (K, N) counts."""
    return 100 * (1 - (table.amax(1).sum() / table.sum()).item())


def one_to_one_error(table: Tensor) -> float:
    """In percent, each class given to one cluster at most, in the best way. table: (K, N) counts."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(table.numpy(), maximize=True)
    return 100 * (1 - (table[rows, columns].sum() / table.sum()).item())


def error(model: AMM, predicted: Tensor, labels: Tensor, n_classes: int) -> float:
    """In percent: AMM's by eq. (17); SAMM's plain error, because its component k is class k."""
    if model.config.semi_supervised:
        return error_rate(predicted, labels)
    return many_to_one_error(contingency(predicted, labels, model.config.n_components, n_classes))


def epoch_row(model: AMM, s: "Split", data: Dataset) -> dict[str, float]:
    """What the log says after an epoch, of the validation images, or of the first CHECKED training images without any.

    components_used: how many components get an image by argmax G_y.  components_entropy: the entropy of their
    frequencies, as a share of log K.  agreement: of eq. (19) with argmax G_y, in percent.  Then the diagnosis.
    With validation images also errors in percent: validation_error by eq. (19), validation_error_g_y by argmax G_y, and
    test_error by eq. (19), from which eval.py takes the one at the epoch of the least validation error.
    Where weights are averaged, validation_error_averaged and test_error_averaged are eq. (19)'s with the averaged ones.
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
    """Why a run goes wrong, from uint8 images (N, C, H, W) and what `model.infer` says of them.

    slope_x, slope_y, slope_z: `mean_slopes`; sigma_y, spread_y: `label_noise`; both of the first DIAGNOSED images.
    cycle: `cycle`.  neighbour_error: `neighbour_error`, where labels (N,) are given.
    """
    few = Inferred(*(part[:DIAGNOSED] for part in inferred))
    found = mean_slopes(model, images[:DIAGNOSED], few) | label_noise(few) | {"cycle": cycle(model)}
    return found if labels is None else found | {"neighbour_error": neighbour_error(inferred.z, labels)}


def mean_slopes(model: AMM, images: Tensor, inferred: Inferred, batch: int = 500) -> dict[str, float]:
    """Mean norms of the gradient of D's logit in x, y and z at uint8 images and their codes, without dropout.

    Eq. (18) asks that the norm of the three together be 1. Where slope_x is near 0, D does not see images (ledger 23).
    """
    codes = inferred.h.softmax(1), inferred.z
    parts = zip(*(part.split(batch) for part in (images, *codes)), strict=True)
    with model.evaluating():
        points = ([as_input(x.to(model.device)), y.to(model.device), z.to(model.device)] for x, y, z in parts)
        slopes = torch.cat([squared_slopes(model.discriminator, three) for three in points], 1).sqrt().mean(1)
    return {f"slope_{name}": slope.item() for name, slope in zip("xyz", slopes, strict=True)}


def label_noise(inferred: Inferred) -> dict[str, float]:
    """sigma_y, the mean σ_y of eq. (8), and spread_y, the mean deviation of μ_y over the images.

    Where sigma_y is far above spread_y, ỹ is drawn at random (ledger 25).
    """
    sigma, spread = (inferred.h_log_variance / 2).exp(), inferred.h.std(0, correction=0)
    return {"sigma_y": sigma.mean().item(), "spread_y": spread.mean().item()}


def cycle(model: AMM) -> float:
    """How often argmax G_y(G_x(y, z)) = y, in percent, for DIAGNOSED pairs y ~ p(y), z ~ p(z|y), always the same."""
    y = torch.multinomial(model.priors.cpu(), DIAGNOSED, replacement=True, generator=run.generator(0, "cycle"))
    return 100 - error_rate(model.classify(model.sample(y), by="g_y"), y)


def neighbour_error(z: Tensor, labels: Tensor) -> float:
    """How often the majority class of an image's 5 nearest others by z is wrong, in percent; of DIAGNOSED images.

    z: (N, D), labels: (N,). A tie goes to the class with the smallest number, as in scikit-learn.
    """
    distances = torch.cdist(z[:DIAGNOSED], z).fill_diagonal_(torch.inf)  # nobody is a neighbour of its own
    nearest = distances.topk(min(NEIGHBOURS, len(z) - 1), largest=False).indices
    return error_rate(F.one_hot(labels[nearest]).sum(1).argmax(1), labels[:DIAGNOSED])
