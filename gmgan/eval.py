"""Every table and figure of the GM-GAN paper that one trained run gives.

    python -m gmgan.eval mnist --seed 0 --data data

Writes eval.json and figures/ into the run's folder. The Inception Score needs the Inception weights and is left out
without them. figures.py draws the figures that compare runs.
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from common import classifier, inception, plots, run
from common.data import Dataset
from gmgan import scores, toy
from gmgan.model import GMGAN, Gan
from gmgan.train import load_data

SAMPLES = 10_000  # samples that are scored
CURVE_SAMPLES = 5_000  # at each σ of Fig. 7
PAIRS = 5_000  # random pairs of samples, whose mean MS-SSIM estimates that of all pairs
MULTIPLIERS = toy.MULTIPLIERS  # the σ of Sec. 4.3: 0.5, 0.6 … 2.0
SHOWN_MULTIPLIERS = toy.SHOWN_MULTIPLIERS  # the σ in Fig. 6
SIGMA = "σ, factor on the covariance after training"
CURVES = {"quality": "quality, eq. (7), 0 to 1", "diversity": "diversity, eq. (10), 0 to 1"}
CURVES |= {"inception_score": "Inception Score, eq. (5)"}
COURSE = {  # a column of the log: its title in training.png
    "d_loss": "loss of D, nats",
    "g_loss": "loss of G, nats",
    "real": "D's probability of real samples",
    "fake": "D's probability of generated samples",
    "d_grad": "norm of D's gradient",
    "g_grad": "norm of G's gradient",
    "nll": "-log p of samples, nats",
    "component_purity": "samples in their Gaussian's class, %",
    "component_nmi": "NMI of Gaussian and class",
    "main_classes": "classes that are some Gaussian's",
    "samples_of_their_class": "samples of their class, %",
    "mse": "squared error per pixel of [-1, 1]",
    "grad": "norm of the gradient",
}
NATURAL = ("cifar10", "stl10")  # the data sets of Table 2, photographs, on which the Inception Score makes sense
INCEPTION_SAMPLES = 50_000  # for Table 2, in 10 parts, as the authors of the score do


def evaluate(options: run.Options) -> dict:
    """Evaluate one run: write its metrics to eval.json and draw its figures."""
    device, folder = run.set_up(options), options.folder("gmgan")
    model, state = run.load_run("gmgan", folder, device, options.moved)
    options = replace(options, seed=state["identity"]["seed"])  # whatever the folder is called
    _, data = load_data(model.config, options)
    run.check_data(folder, state, data)
    judges: dict[str, str | None] = {}
    if data.name in toy.VARIANCE:
        metrics = toy.scores(model, state["rows"])
    elif isinstance(model, Gan):
        metrics, judges = on_images(model, data, options)
    else:
        metrics = model.scores(data, options.seed)
    result = run.record(model.config, state, metrics, device, **judges)
    run.write_json(folder / "eval.json", result)
    plots.save_course(state["rows"], folder / "figures" / "training.png", COURSE)
    if data.name in toy.VARIANCE:
        toy.figures(model, folder / "figures")
    elif isinstance(model, Gan):
        figures(model, data, metrics, folder / "figures")
    return result


# -------------------------------------------------------------------------------------------------- scores on images


def on_images(model: Gan, data: Dataset, options: run.Options) -> tuple[dict[str, float], dict[str, str | None]]:
    """Table 2, Table 3 and the curves of Figs. 2 and 7 for one run, and the names of the networks that judged."""
    network, accuracy = classifier.trained(data, options.runs / "cache", model.device)
    print(f"features of {len(data.train_images):,} real images; scores of {SAMPLES:,} samples", flush=True)
    reference = classifier.features(network, data.train_images)
    held_out = scores.nearest_distances(classifier.features(network, data.test_images), reference)
    log_a = held_out.median().item()  # a = eᵈ at the distance of a typical real image: its quality is 1/2
    quality = scores.quality(held_out, log_a).mean().item()
    found = {"classifier_accuracy": accuracy, "log_a": log_a, "quality_of_real_images": quality}

    judge = Judge(network, reference, log_a, data.n_classes)
    images, groups = model.sample_mixture(SAMPLES, seed=options.seed)
    values, classes = judged(judge, images, options.seed)
    found |= values | scores.groups_and_classes(model, classes, groups, data.n_classes)
    for multiplier in MULTIPLIERS:  # also 1, so that all points of a curve use equally many samples and the same pairs
        images, _ = model.sample_mixture(CURVE_SAMPLES, multiplier, options.seed)
        values, _ = judged(judge, images, options.seed)
        found |= {f"{name}_at_{multiplier}": values[name] for name in ("quality", "diversity", "largest_class")}
        print(f"σ = {multiplier}: quality {values['quality']:.3f}, diversity {values['diversity']:.3f}", flush=True)
    found |= clustering(model, data, options.seed)
    inception_scores, weights = inception_score(model, data, options)
    return found | inception_scores, {"classifier": classifier.digest(network), "inception": weights}


class Judge(NamedTuple):
    """What eqs. (6) to (9) need besides the samples."""

    network: classifier.Network  # the data set's classifier, trained on its labels
    reference: Tensor  # (m, d), the classifier's features of the training images
    log_a: float  # log a of eq. (6)
    n_classes: int  # N


def judged(judge: Judge, images: Tensor, seed: int) -> tuple[dict[str, float], Tensor]:
    """Eqs. (6) to (11) on uint8 images (n, C, H, W), and the share of the most frequent class in percent.

    Returns these scores and the class (n,) that the network gives each image. seed: draws the pairs of eq. (8).
    """
    distances = scores.nearest_distances(classifier.features(judge.network, images), judge.reference)
    classes = classifier.classify(judge.network, images)
    quality = scores.quality(distances, judge.log_a).mean().item()  # eq. (7)
    intra, error = scores.intra_class_diversity(images, PAIRS, run.generator(seed, "pairs"))
    inter = scores.inter_class_diversity(classes, judge.n_classes)
    diversity = scores.diversity(intra, inter)
    largest = classes.bincount(minlength=judge.n_classes).max().item()
    found = {
        "quality": quality,
        "diversity_intra": intra,
        "diversity_intra_error": error,
        "diversity_inter": inter,
        "diversity": diversity,
        "combined": scores.combined(quality, diversity),
        "largest_class": 100 * largest / len(classes),
    }
    return found, classes


def clustering(model: Gan, data: Dataset, seed: int) -> dict[str, float]:
    """ACC and NMI of Table 3 for an unsupervised run with as many Gaussians as classes; otherwise an empty dict.

    Names that end with _test are scores on the test images.
    """
    if model.supervised or model.config.groups != data.n_classes:
        return {}
    made = model.config.groups * model.config.cluster_samples
    print(f"Algorithm 2: a classifier learns from {made:,} generated images", flush=True)
    clusters = model.cluster(torch.cat([data.train_images, data.test_images]), seed)
    train, test = clusters.split([len(data.train_images), len(data.test_images)])
    on_test = scores.clustering(test, data.test_labels, data.n_classes)
    found = scores.clustering(train, data.train_labels, data.n_classes)
    return found | {f"{name}_test": value for name, value in on_test.items()}


def inception_score(model: Gan, data: Dataset, options: run.Options) -> tuple[dict[str, float], str | None]:
    """Table 2's score on 50,000 samples and Fig. 2's curve, 10,000 at each σ; empty without the Inception weights."""
    if data.name not in NATURAL:
        return {}, None
    path, reason = inception.find_weights(options.inception)
    if path is None:
        print(f"Inception Score left out: {reason}")
        return {}, None
    network = inception.extractor(path, model.device, inception.LOGITS)
    images, _ = model.sample_mixture(INCEPTION_SAMPLES, seed=options.seed)
    found = {"inception_score": scores.inception_score(inception.features(network, images))}
    for multiplier in MULTIPLIERS:
        images, _ = model.sample_mixture(SAMPLES, multiplier, options.seed)
        found[f"inception_score_at_{multiplier}"] = scores.inception_score(inception.features(network, images))
        print(f"σ = {multiplier}: Inception Score {found[f'inception_score_at_{multiplier}']:.3f}", flush=True)
    return found, f"Inception 2015-12-05, {inception.SHA256_PREFIX}"


# ----------------------------------------------------------------------------------------------------------- figures


def figures(model: Gan, data: Dataset, metrics: dict[str, float], folder: Path) -> None:
    """Samples by Gaussian (Fig. 8) and at several σ (Fig. 6), and the run's curves (Figs. 2 and 7)."""
    groups = model.config.groups
    each, labels, title = 100, [], "Samples"
    if groups > 1:
        each, labels = 10, label_groups(model, data)
        title = f"Samples of each {'Gaussian' if isinstance(model, GMGAN) else 'class'} (Fig. 8)"
    samples = model.sample(each).float() / 255
    plots.save_labelled_grid(samples, folder / "samples.png", 10, title, labels)
    each = -(-10 // groups)
    at = [model.sample(each, multiplier).float()[: 10 * each] / 255 for multiplier in SHOWN_MULTIPLIERS]
    columns = min(len(at[0]), 10)
    rows_of_each = -(-len(at[0]) // columns)
    heads = [f"σ = {m:g}" if i == 0 else "" for m in SHOWN_MULTIPLIERS for i in range(rows_of_each)]
    title = "The same noise at several σ (Fig. 6)"
    plots.save_labelled_grid(torch.cat(at), folder / "sigma.png", columns, title, heads)
    scored = [score for score in CURVES if f"{score}_at_{MULTIPLIERS[0]}" in metrics]
    curves = {CURVES[s]: {"": (MULTIPLIERS, [metrics[f"{s}_at_{m}"] for m in MULTIPLIERS])} for s in scored}
    plots.save_curves(curves, folder / "trade_off.png", SIGMA)


def label_groups(model: Gan, data: Dataset) -> list[str]:
    """The label of each row of samples: the Gaussian's number, or the class that it stands for."""
    groups = model.config.groups
    if not model.supervised:
        return [f"Gaussian {k}" for k in range(groups)]
    if groups < data.n_classes:
        return [f"group {k}" for k in range(groups)]
    return [data.class_names[c] for c in model.output_of_group.tolist()]


def main(argv: list[str] | None = None) -> None:
    # The points of the curves are not printed.
    run.evaluate_from("gmgan", evaluate, argv, shown=lambda name: "_at_" not in name and "_after_" not in name)


if __name__ == "__main__":
    run.exit_with(main)
