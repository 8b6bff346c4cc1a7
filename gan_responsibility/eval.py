"""Every table and figure of the responsibility paper that one trained run gives.

    python -m gan_responsibility.eval mnist --seed 0 --data data

Writes eval.json and figures/ into the run's folder. A small classifier, trained on the labels, judges the samples of
each Gaussian. Table 6's scores need the Inception weights and are left out without them. Figure 4 compares the
evaluated runs under --runs that have these scores.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from common import classifier, plots, run
from common.data import Dataset
from gan_responsibility import toy
from gan_responsibility.model import Mixture, MixtureGAN, Responsibility, shares, to_uint8
from gan_responsibility.scores import JUDGE, SAMPLES, Scorer, clustering, mode_weights_against_classes, purity
from gan_responsibility.train import prepared, read

JUDGED = 500  # samples of each Gaussian that the classifier judges
STEPS = 9  # images on the way from one Gaussian to another in Fig. 2, and along a side of the triangle in Fig. 3
COURSE = {  # a column of the log: its title in training.png
    "d_loss": "loss of D, nats",
    "g_loss": "loss of G, nats",
    "information": "cross-entropy of C, eq. (4), nats",
    "alpha_entropy": "entropy of p(k|x) over log K",
    "alpha_information": "information of k on x over log K",
    "largest_weight": "largest weight of a Gaussian, 0 to 1",
    "accuracy": "ACC of p(k|x) on test images",
    "nmi": "NMI of p(k|x) on test images",
    "inception_score": "Inception Score",
    "fid": "FID",
}
SYSTEMS = {  # name in Figure 4: experiment
    "encoder shared": "flowers10",
    "classifier apart": "flowers10-standalone",
    "GM-GAN": "flowers10-gm-gan",
    "vanilla GAN": "flowers10-gan",
}


def evaluate(options: run.Options) -> dict:
    """Evaluate one run: its metrics, written to eval.json, and its figures."""
    device, folder = run.set_up(options), options.folder("gan_responsibility")
    model, state = run.load_run("gan_responsibility", folder, device, options.moved)
    whole = read(model.config, options)
    run.check_data(folder, state, whole)
    data, seed, judges = prepared(whole, model.config), state["identity"]["seed"], {}
    metrics = {name: getattr(model, name) for name in ("parameter_count", "parameter_count_as_counted")}
    if isinstance(model, Responsibility):
        metrics |= what_c_learned(model, data)
    if isinstance(model.mixture, Mixture):
        found, judges["classifier"] = what_gaussians_generate(model, whole, options, seed, device)
        metrics |= found
    if scorer := Scorer.find(whole, options, device):
        say("Inception Score and FID")
        metrics |= table_6(model, data, scorer, state["rows"], seed)
    judges["inception"] = JUDGE if scorer else None
    result = run.record(model.config, state, metrics, device, **judges)
    run.write_json(folder / "eval.json", result)
    say("figures")
    figures(model, state, folder / "figures")
    if scorer:
        path = options.runs / "gan_responsibility" / "figures" / "figure-4.png"  # it compares several runs
        figure_4(metrics_of_runs(options.runs), path)
    return result


def say(what: str) -> None:
    """Print what is being computed."""
    print(f"{what} …", flush=True)


def what_c_learned(model: Responsibility, data: Dataset) -> dict[str, float]:
    """The claims of Sec. 1: p(k|x) gives the classes, by its argmax, and their weights, by its mean.

    On the test images: ACC, NMI and `model.shares` of α. On the training images: ACC and NMI (_train) and, if K is the
    number of classes, the weights of the modes against the frequencies of the classes.
    """
    say(f"p(k|x) of {len(data.test_images):,} test images")
    alpha = model.responsibilities(data.test_images)
    found = clustering(alpha, data.test_labels, data.n_classes)
    found |= {name: share.item() for name, share in shares(alpha).items()}
    say(f"p(k|x) of {len(data.train_images):,} training images")
    on_train = model.responsibilities(data.train_images)
    of_train = clustering(on_train, data.train_labels, data.n_classes)
    found |= {f"{name}_train": value for name, value in of_train.items()}
    if alpha.shape[1] == data.n_classes:
        found |= mode_weights_against_classes(on_train, data.train_labels)
    return found


def what_gaussians_generate(
    model: MixtureGAN, data: Dataset, options: run.Options, seed: int, device: torch.device
) -> tuple[dict[str, float], str]:
    """The claim of Sec. 3.2, that each class is allocated to a Gaussian, measured on samples; and the judge's digest.

    The judge is a classifier trained on the labels of the whole data set; for the toy, it is the nearest class. Scores:
    `purity` of JUDGED samples of each Gaussian; judge_accuracy on the test images; samples_recognised, the share of
    samples for which C names the Gaussian that they came from.
    """
    say(f"{JUDGED} samples of each Gaussian")
    k = model.config.components
    gaussians = torch.arange(k).repeat_interleave(JUDGED)
    samples, found = model.sample(torch.eye(k)[gaussians], seed), {}
    if model.config.dataset == "toy":
        judge, classes = "nearest mean", toy.nearest_class(samples)
    else:
        network, accuracy = classifier.trained(data, options.runs / "cache", device)
        judge, classes = classifier.digest(network), classifier.classify(network, to_uint8(samples))
        found["judge_accuracy"] = accuracy / 100
    if isinstance(model, Responsibility):
        recognised = model.responsibilities(samples).argmax(1) == gaussians
        found["samples_recognised"] = recognised.double().mean().item()
    return found | purity(gaussians, classes, k, data.n_classes), judge


def table_6(model: MixtureGAN, data: Dataset, scorer: Scorer, rows: list[dict], seed: int) -> dict[str, float]:
    """Inception Score and FID of the last epoch, and the best ones in the log's rows, which the table prints."""
    found = scorer.scores(model.sample_mixture(SAMPLES, model.mode_weights(data.train_images), seed))
    rows = [row for row in rows if "fid" in row]
    if rows:
        best = max(rows, key=lambda row: row["inception_score"])
        found["inception_score_best"] = best["inception_score"]
        found["inception_score_best_deviation"] = best["inception_score_deviation"]
        found["fid_best"] = min(row["fid"] for row in rows)
        curves = ("inception_score", "fid")  # Fig. 4
        found |= {f"{name}_after_{row['epoch']}": row[name] for row in rows for name in curves}
    else:
        print("the best scores over epochs left out: this run was trained without the Inception weights")
    return found | scorer.of_real_images(data, seed)


# ------------------------------------------------------------------------------------------------------------- figures


def figures(model: MixtureGAN, state: dict, folder: Path) -> None:
    """The course of training; samples from one Gaussian to the next (Fig. 2) and between three of them (Fig. 3)."""
    k, seed = model.config.components, state["identity"]["seed"]

    def save(name: str, weights: Tensor, columns: int, title: str, labels: list[str], same_noise: bool = False) -> None:
        images = (model.sample(weights, seed, same_noise) + 1) / 2
        plots.save_labelled_grid(images, folder / f"{name}.png", columns, title, labels)

    plots.save_course(state["rows"], folder / "training.png", COURSE, others=False)
    if model.config.dataset == "toy":
        toy.save_samples(model, folder / "samples.png", seed)
        return
    is_mixture = isinstance(model.mixture, Mixture)
    labels = [f"Gaussian {i}" for i in range(k)] if is_mixture else []
    save("samples", torch.eye(k).repeat_interleave(10, 0), 10, "Samples (Fig. 2, left)", labels)
    if not is_mixture:
        return
    title, labels = "From Gaussian to Gaussian, the same ε (Fig. 2, right)", [f"{i} to {(i + 1) % k}" for i in range(k)]
    save("interpolations", from_one_to_the_next(k), STEPS, title, labels, same_noise=True)
    if k >= 3:
        title = "Between Gaussians 0 (top left), 1 (right), 2 (below) (Fig. 3)"
        save("triangle", triangle(k), STEPS, title, [], same_noise=True)


def from_one_to_the_next(k: int) -> Tensor:
    """Weights (K · STEPS, K): equal steps from each Gaussian to the next, and from the last to the first."""
    own, t = torch.eye(k), torch.linspace(0, 1, STEPS)[:, None]
    return torch.cat([(1 - t) * own[i] + t * own[(i + 1) % k] for i in range(k)])


def triangle(k: int) -> Tensor:
    """Weights (STEPS², K) on a square grid: that of Gaussian 1 grows to the right, that of 2 downwards; 0 has the rest.

    Beyond the diagonal nothing is left for 0, and the weights of 1 and 2 are scaled to a sum of 1.
    """
    side = torch.linspace(0, 1, STEPS)
    down, right = torch.meshgrid(side, side, indexing="ij")
    total = (down + right).clamp(min=1)
    weights = torch.zeros(STEPS, STEPS, k)
    weights[..., 1], weights[..., 2] = right / total, down / total
    weights[..., 0] = (1 - down - right).clamp(min=0)
    return weights.flatten(0, 1)


def metrics_of_runs(runs: Path) -> dict[str, list[dict[str, float]]]:
    """{experiment of Figure 4: the metrics of each evaluated seed under `runs`}."""
    return {
        experiment: [
            json.loads(path.read_text(encoding="utf-8"))["metrics"]
            for path in sorted((runs / "gan_responsibility" / experiment).glob("seed*/eval.json"))
            if path.parent.name[4:].isdigit()  # leaves out runs with changed fields
        ]
        for experiment in SYSTEMS.values()
    }


def figure_4(found: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Inception Score and FID of the four systems during training, with standard errors over seeds.

    found: as `metrics_of_runs` returns it. Runs without these scores are left out.
    """
    panels = {}
    for title, score, best in (("Inception Score", "inception_score", max), ("FID", "fid", min)):
        panels[title] = {}
        for name, experiment in SYSTEMS.items():
            several = [metrics for metrics in found.get(experiment, []) if f"{score}_best" in metrics]
            if several:
                epochs, means, errors = plots.curve(several, f"{score}_after_")
                label = f"{plots.named(name, several)}: best {best(means):.4g}, last {means[-1]:.4g}"
                panels[title][label] = (epochs, means, errors)
    if any(panels.values()):
        plots.save_curves(panels, path, "epoch")


def main(argv: list[str] | None = None) -> None:
    shown = ("_of_", "_after_")  # names with these parts are too many to print
    run.evaluate_from("gan_responsibility", evaluate, argv, shown=lambda name: not any(part in name for part in shown))


if __name__ == "__main__":
    run.exit_with(main)
