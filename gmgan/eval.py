"""Every table and figure of the GM-GAN paper that one trained run gives.

    python -m gmgan.eval mnist --seed 0 --data data

Writes eval.json and figures/ into the run's folder. The Inception Score needs the Inception weights; without them it is left out.
Figures that compare runs are figures.py's.
"""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from common import classifier, inception, plots, run
from common.data import Dataset
from common.metrics import contingency, error_rate, normalised_mutual_information
from gmgan import cluster, scores, toy
from gmgan.model import correspondence
from gmgan.train import Task, generate_many, load_data

SAMPLES = 10_000  # scored
CURVE_SAMPLES = 5_000  # at each σ of Fig. 7
PAIRS = 5_000  # of them, whose MS-SSIM stands for all
MULTIPLIERS = toy.MULTIPLIERS  # the σ of Sec. 4.3: 0.5, 0.6 … 2.0
SHOWN_MULTIPLIERS = toy.SHOWN_MULTIPLIERS  # of Fig. 6
NATURAL = ("cifar10", "stl10")  # data sets of Table 2, for which the Inception network means something
INCEPTION_SAMPLES = 50_000  # of Table 2, in 10 parts, as the score's authors do


@dataclass(frozen=True)
class Trained:
    """A trained run."""

    config: Task
    system: ModuleType  # gmgan.train, gmgan.acgan or gmgan.kmeans
    networks: dict[str, nn.Module]
    state: dict  # the checkpoint

    @property
    def device(self) -> torch.device:
        return next(p.device for network in self.networks.values() for p in network.parameters())

    def sample(self, n: int, multiplier: float = 1.0, seed: int = 0) -> Tensor:
        """n of each Gaussian (or of each class of AC-GAN), group by group: points (groups · n, 2), or uint8 images (…, C, H, W)."""
        convert = to_bytes if len(self.config.shape) == 3 else Tensor.cpu  # batch by batch: all of them as floats could be 10 GB
        return generate_many(self.networks, self.system, self.config, n, run.generator(seed, "sample"), multiplier, convert)

    def mixture(self, n: int, multiplier: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
        """n images of the whole mixture, as near to equally many of each group as can be, and the group (n,) of each."""
        groups = self.config.groups
        each = -(-n // groups)
        kept = torch.arange(groups * each).view(groups, each).T.flatten()[:n]  # one of each group in turn
        return self.sample(each, multiplier, seed)[kept], kept // each


def to_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8, on the CPU."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def load_run(folder: str | Path, device: str | torch.device = "cpu") -> Trained:
    """The run in `folder`, as far as its last checkpoint. Raises UserError where there is none, or it is damaged."""
    return Trained(*run.trained("gmgan", Path(folder), torch.device(device)))


def evaluate(options: run.Options) -> dict:
    """Evaluate one run: its metrics, written to eval.json, and its figures."""
    device, folder = run.set_up(options), options.folder("gmgan")
    trained = load_run(folder, device)
    config, data = load_data(trained.config, options)
    run.check_data(folder, trained.state, data)
    judges: dict[str, str | None] = {}
    if data.name in toy.VARIANCE:
        metrics = toy.scores(trained.networks, trained.system, config, trained.state["rows"])
    elif hasattr(trained.system, "generate"):
        metrics, judges = on_images(trained, data, options)
    else:
        metrics = trained.system.scores(trained.networks, data, options.seed)
    result = run.record(options, trained.config, trained.state, metrics, device, **judges)
    run.write_json(folder / "eval.json", result)
    if data.name in toy.VARIANCE:
        toy.figures(trained.networks, trained.system, config, trained.state["rows"], folder / "figures")
    else:
        figures(trained, data, metrics, folder / "figures")
    return result


# ------------------------------------------------------------------------------------------------------ scores on images


def on_images(trained: Trained, data: Dataset, options: run.Options) -> tuple[dict[str, float], dict[str, str | None]]:
    """Table 2, Table 3 and the curves of Figs. 2 and 7 for one run, and which networks judged."""
    network, accuracy = classifier.trained(data, options.runs / "cache", trained.device)
    reference = classifier.features(network, data.train_images).float()
    held_out = scores.nearest_distances(classifier.features(network, data.test_images).float(), reference)
    log_a = held_out.median().item()  # a = eᵈ at the distance of a typical real image: its quality is 1/2

    found = {"classifier_accuracy": accuracy, "log_a": log_a, "quality_of_real_images": scores.quality(held_out, log_a).mean().item()}
    images, groups = trained.mixture(SAMPLES, seed=options.seed)
    found |= judged(network, reference, log_a, data.n_classes, images, run.generator(options.seed, "pairs"))
    found |= groups_and_classes(trained, classifier.classify(network, images), groups, data.n_classes)
    for multiplier in MULTIPLIERS:  # 1 among them, once more: a curve is of as many samples, and of the same pairs, all along
        images, _ = trained.mixture(CURVE_SAMPLES, multiplier, options.seed)
        values = judged(network, reference, log_a, data.n_classes, images, run.generator(options.seed, "pairs"))
        found |= {f"{name}_at_{multiplier}": values[name] for name in ("quality", "diversity", "largest_class")}
    found |= clustering(trained, data, options.seed)
    inception_scores, judge = inception_score(trained, data, options)
    return found | inception_scores, {"classifier": classifier.digest(network), "inception": judge}


def judged(
    network: classifier.Network, reference: Tensor, log_a: float, n_classes: int, images: Tensor, generator: torch.Generator
) -> dict[str, float]:
    """Eqs. (6) to (11) for uint8 images (n, C, H, W), and the share of the most frequent class in percent.

    network: a classifier of the data set; reference: (m, d), its features of the training images; log_a: of eq. (6).
    """
    distances = scores.nearest_distances(classifier.features(network, images).float(), reference)
    classes = classifier.classify(network, images)
    quality = scores.quality(distances, log_a).mean().item()  # eq. (7)
    intra, error = scores.intra_class_diversity(images, PAIRS, generator)
    inter = scores.inter_class_diversity(classes, n_classes)
    diversity = scores.diversity(intra, inter)
    return {
        "quality": quality,
        "diversity_intra": intra,
        "diversity_intra_error": error,
        "diversity_inter": inter,
        "diversity": diversity,
        "combined": scores.combined(quality, diversity),
        "largest_class": 100 * classes.bincount(minlength=n_classes).max().item() / len(classes),
    }


def groups_and_classes(trained: Trained, classes: Tensor, groups: Tensor, n_classes: int) -> dict[str, float]:
    """How far a Gaussian is a class, in percent (Sec. 5). classes: (n,), the classifier's; groups: (n,), where each was drawn.

    Supervised: samples whose class is the one that their Gaussian stands for. Else: the share of its Gaussian's most frequent class,
    how many classes are such, and the NMI of Gaussian and class.
    """
    config = trained.config
    if getattr(config, "supervised", True):  # AC-GAN always is
        k = config.groups
        of_gaussian, of_class = correspondence(k, n_classes, getattr(config, "class_map", None))
        return {"samples_of_their_class": 100 - error_rate(of_class[classes], of_gaussian[groups])}
    if config.groups == 1:
        return {}
    counts = contingency(groups, classes, config.groups, n_classes)
    return {
        "component_purity": 100 * (counts.amax(1).sum() / counts.sum()).item(),
        "component_nmi": normalised_mutual_information(counts),
        "main_classes": float(len(counts.argmax(1).unique())),
    }


def clustering(trained: Trained, data: Dataset, seed: int) -> dict[str, float]:
    """Table 3 for an unsupervised run with as many Gaussians as classes, else nothing: ACC and NMI; _test: of the test images."""
    config = trained.config
    if getattr(config, "supervised", True) or config.groups != data.n_classes:
        return {}
    network = cluster.clusters(lambda n: trained.sample(n, seed=seed), config.groups, seed, config.cluster_samples, trained.device)
    found = {}
    for suffix, images, labels in (("", data.train_images, data.train_labels), ("_test", data.test_images, data.test_labels)):
        values = cluster.scores(classifier.classify(network, images), labels, data.n_classes)
        found |= {f"{name}{suffix}": value for name, value in values.items()}
    return found


def inception_score(trained: Trained, data: Dataset, options: run.Options) -> tuple[dict[str, float], str | None]:
    """Table 2's score, of 50,000 samples, and Fig. 2's curve, of 10,000 at each σ; nothing where the weights cannot be had."""
    if data.name not in NATURAL:
        return {}, None
    path, reason = inception.find_weights(options.inception)
    if path is None:
        print(f"Inception Score left out: {reason}")
        return {}, None
    network = inception.extractor(path, trained.device, inception.LOGITS)
    images, _ = trained.mixture(INCEPTION_SAMPLES, seed=options.seed)
    found = {"inception_score": scores.inception_score(inception.features(network, images))}
    for multiplier in MULTIPLIERS:
        images, _ = trained.mixture(SAMPLES, multiplier, options.seed)
        found[f"inception_score_at_{multiplier}"] = scores.inception_score(inception.features(network, images))
    return found, f"Inception 2015-12-05, {inception.SHA256_PREFIX}"


# ------------------------------------------------------------------------------------------------------------- figures


def figures(trained: Trained, data: Dataset, metrics: dict[str, float], folder: Path) -> None:
    """Samples by Gaussian (Fig. 8) and at several σ (Fig. 6), the run's own curves (Figs. 2 and 7), and the course of training."""
    plots.save_course(trained.state["rows"], folder / "training.png")
    if not hasattr(trained.system, "generate"):
        return
    groups = trained.config.groups
    each = 10 if groups > 1 else 100
    labels = label_groups(trained, data) if groups > 1 else ()
    images = trained.sample(each).float() / 255
    title = "Samples" if not labels else f"Samples of each {'Gaussian' if hasattr(trained.config, 'mixture') else 'class'} (Fig. 8)"
    plots.save_labelled_grid(images, folder / "samples.png", 10, title, labels)
    each = -(-10 // groups)
    at = [trained.sample(each, multiplier).float()[: 10 * each] / 255 for multiplier in SHOWN_MULTIPLIERS]
    columns = min(len(at[0]), 10)
    rows_of_each = -(-len(at[0]) // columns)
    heads = [f"σ = {m:g}" if i == 0 else "" for m in SHOWN_MULTIPLIERS for i in range(rows_of_each)]
    plots.save_labelled_grid(torch.cat(at), folder / "sigma.png", columns, "The same noise at several σ (Fig. 6)", heads)
    measured = [name for name in ("quality", "diversity", "inception_score") if f"{name}_at_{MULTIPLIERS[0]}" in metrics]
    curves = {name: (MULTIPLIERS, [metrics[f"{name}_at_{m}"] for m in MULTIPLIERS]) for name in measured}
    plots.save_curves(curves, folder / "trade_off.png", "σ, after training")


def label_groups(trained: Trained, data: Dataset) -> list[str]:
    """What stands before each row of samples: the Gaussian's number, or the class that it is to stand for."""
    config = trained.config
    if not getattr(config, "supervised", True):
        return [f"Gaussian {k}" for k in range(config.groups)]
    if config.groups < data.n_classes:
        return [f"group {k}" for k in range(config.groups)]
    of_gaussian, _ = correspondence(config.groups, data.n_classes, getattr(config, "class_map", None))
    return [data.class_names[c] for c in of_gaussian.tolist()]


def main(argv: list[str] | None = None) -> None:
    run.evaluate_from("gmgan", evaluate, argv, shown=lambda name: "_at_" not in name and "_after_" not in name)  # not the points of curves


if __name__ == "__main__":
    run.exit_with(main)
