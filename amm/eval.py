"""Every table and figure of the AMM paper from a trained run.

    python -m amm.eval mnist --seed 0 --data data

Writes eval.json and figures/ into the run's folder.
"""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from amm.model import AMM, Inferred, as_input, sampled
from amm.scores import diagnosis, error, one_to_one_error
from amm.train import split
from common import plots, run
from common.data import Dataset, load
from common.metrics import contingency, error_rate

STEPS = 9  # images from one test image to another
EMBEDDED = 2_000  # test images of the t-SNE projection
COURSE = {  # a column of the log: its title in training.png; an error is on validation images unless it says test
    "test_error": "test error by eq. (19), %",
    "validation_error": "validation error by eq. (19), %",
    "validation_error_g_y": "validation error by G_y, %",
    "test_error_averaged": "test error, averaged weights, %",
    "validation_error_averaged": "validation error, averaged weights, %",
    "neighbour_error": "error of 5 nearest neighbours by z, %",
    "cycle": "G_y(G_x(y, z)) is y, %",
    "agreement": "eq. (19) and G_y agree, %",
    "components_used": "components that have an image",
    "components_entropy": "entropy of the components over log K",
    "discriminator_loss": "loss of D, eq. (18), nats",
    "decoder_loss": "loss of G_x and G_z(y), nats",
    "encoder_loss": "loss of G_y and G_z(x), nats",
    "penalty": "gradient penalty of eq. (18)",
    "d_inferred": "D's probability of (x, G(x))",
    "d_generated": "D's probability of (G(y, z), y, z)",
    "discriminator_grad": "norm of D's gradient",
    "decoder_grad": "norm of the gradient of G_x, G_z(y)",
    "encoder_grad": "norm of the gradient of G_y, G_z(x)",
    "slope_x": "norm of D's gradient in x",
    "slope_y": "norm of D's gradient in y",
    "slope_z": "norm of D's gradient in z",
    "sigma_y": "mean σ_y of eq. (8)",
    "spread_y": "deviation of μ_y over images",
}
NOISE = 0.5  # a cluster whose largest class has a smaller share than this is called a noise cluster


def evaluate(options: run.Options) -> dict:
    """Evaluate one run: its metrics, written to eval.json, and its figures."""
    device, folder = run.set_up(options), options.folder("amm")
    model, state = run.load_run("amm", folder, device, options.moved)
    config, seed = model.config, state["identity"]["seed"]
    data = load(config.dataset, options.data, options.unofficial_data)
    run.check_data(folder, state, data)
    n, inferred = data.n_classes, model.infer(data.test_images)
    metrics = predictions(model, inferred, data.test_labels, n)
    metrics |= diagnosis(model, data.test_images, inferred, data.test_labels if n > 1 else None)
    if model.averaged is not None:
        averaged = predictions(model.averaged, model.averaged.infer(data.test_images), data.test_labels, n)
        metrics |= {f"{name}_averaged": value for name, value in averaged.items() if "purity_of" not in name}
    if config.validation:
        s = split(config, data, seed)
        on_validation = predictions(model, model.infer(s.validation_images), s.validation_labels, n)
        metrics |= {f"{name}_validation": value for name, value in on_validation.items() if "purity_of" not in name}
    if n > 1:
        metrics |= in_other_modes(model, data, seed)
        if rows := [row for row in state["rows"] if "test_error" in row]:
            metrics["error_best_on_validation"] = min(rows, key=lambda row: row["validation_error"])["test_error"]
    else:
        print(f"{data.name} has one class: what needs labels is left out")
    result = run.record(config, state, metrics, device)
    run.write_json(folder / "eval.json", result)
    plots.save_course(state["rows"], folder / "figures" / "training.png", COURSE)
    figures(model, data, folder / "figures", seed)
    return result


# -------------------------------------------------------------------------------------------------------------- tables


def predictions(model: AMM, inferred: Inferred, labels: Tensor, n_classes: int) -> dict[str, float]:
    """Tables 1 and 2, in percent, by both predictions: eq. (19), and (_g_y) the argmax of G_y.

    AMM: errors by eq. (17), where each cluster stands for its most frequent class, and (_one_to_one) where each class
    has at most one cluster. SAMM: component k is class k.
    Then what the paper claims in words. agreement: how often the two predictions agree. For the clusters by G_y:
    purity_of_k, the share of the largest class in cluster k; purity, its mean; least_purity, its minimum;
    noise_clusters; empty_clusters; fewest_clusters, the number of clusters in which a class is the largest, at its
    minimum over the classes. Without labels (n_classes 1) there are only agreement and empty_clusters.
    """
    k, found = model.config.n_components, {}
    both = {"": model.by_bayes(inferred.z), "_g_y": inferred.h.argmax(1)}
    agreement = 100 - error_rate(both[""], both["_g_y"])
    if n_classes < 2:
        return {"agreement": agreement, "empty_clusters": float(k - len(both["_g_y"].unique()))}
    for suffix, predicted in both.items():
        found[f"error{suffix}"] = error(model, predicted, labels, n_classes)
        if not model.config.semi_supervised:
            found[f"error_one_to_one{suffix}"] = one_to_one_error(contingency(predicted, labels, k, n_classes))
    table = contingency(both["_g_y"], labels, k, n_classes)
    used = table.sum(1).nonzero()[:, 0]
    purity = table[used].amax(1) / table[used].sum(1)
    found |= {f"purity_of_{i}": 100 * share for i, share in zip(used.tolist(), purity.tolist(), strict=True)}
    return found | {
        "agreement": agreement,
        "purity": 100 * purity.mean().item(),
        "least_purity": 100 * purity.min().item(),
        "noise_clusters": float((purity < NOISE).sum()),
        "fewest_clusters": float(table[used].argmax(1).bincount(minlength=n_classes).min()),
        "empty_clusters": float(k - len(used)),
    }


@torch.no_grad()
def codes_in_other_modes(model: AMM, images: Tensor, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """h_y (N, K) and z (N, D) of uint8 images under other readings of test time (ledger 11).

    batch_statistics: batch normalisation by the statistics of batches of the training size.  sampled: z with its
    noise, and ỹ (a softmax) in place of h_y.
    """
    encoder = copy.deepcopy(model.encoder)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    torch.manual_seed(seed)
    parts = {"batch_statistics": [], "sampled": []}
    for batch in images.tensor_split(max(1, len(images) // model.config.batch)):
        x = as_input(batch.to(model.device))
        parts["batch_statistics"].append([mean.cpu() for mean, _ in encoder(x)])
        h, z = model.encoder(x)
        parts["sampled"].append([model.drawn_y(*h).cpu(), sampled(*z).cpu()])
    return {mode: tuple(map(torch.cat, zip(*both, strict=True))) for mode, both in parts.items()}


def in_other_modes(model: AMM, data: Dataset, seed: int) -> dict[str, float]:
    """Test errors in percent with `codes_in_other_modes`: by eq. (19), and (_g_y) by argmax G_y."""
    found = {}
    for mode, (h, z) in codes_in_other_modes(model, data.test_images, seed).items():
        for g_y, predicted in (("", model.by_bayes(z)), ("_g_y", h.argmax(1))):
            found[f"error{g_y}_{mode}"] = error(model, predicted, data.test_labels, data.n_classes)
    return found


# ------------------------------------------------------------------------------------------------------------- figures


def figures(model: AMM, data: Dataset, folder: Path, seed: int) -> None:
    """Figures 2 to 4: members and samples of each component, matrices, reconstructions, interpolations, t-SNE."""
    k, images, labels = model.config.n_components, data.test_images, data.test_labels
    generator = run.generator(seed, "figures")
    inferred = model.infer(images)
    y, z = inferred.h.softmax(1), inferred.z
    by_g_y, by_bayes = inferred.h.argmax(1), model.by_bayes(z)

    samples = model.sample(torch.arange(k).repeat_interleave(10), seed)
    names = [f"component {i}" for i in range(k)]
    plots.save_labelled_grid(samples, folder / "samples.png", 10, "Samples of each component", names)
    members = torch.zeros(k, 10, *images.shape[1:])
    for i in range(k):
        mine = (by_g_y == i).nonzero()[:, 0]
        mine = mine[torch.randperm(len(mine), generator=generator)[:10]]
        members[i, : len(mine)] = as_input(images[mine])
    title = "Test images that G_y gives to each component"
    plots.save_labelled_grid(members.flatten(0, 1), folder / "members.png", 10, title, names)

    for name, predicted, title in (("g_y", by_g_y, "argmax of G_y"), ("bayes", by_bayes, "eq. (19)")):
        table = contingency(predicted, labels, k, data.n_classes)
        if data.n_classes > 1:  # the titles of the paper's matrices give it
            title += f": ACC {1 - error(model, predicted, labels, data.n_classes) / 100:.4f}"
        save_counts(table, folder / f"matrix_{name}.png", f"Test images by {title}", "component", "class")

    columns = min(10, len(images))
    lines = min(5, len(images) // columns)
    chosen = torch.randperm(len(images), generator=generator)[: columns * lines]
    shown = as_input(images[chosen]), model.decode(y[chosen], z[chosen])
    pairs = torch.stack([part.view(lines, columns, *images.shape[1:]) for part in shown], 1)
    title = "Test images and their reconstructions"
    which = ["image", "reconstruction"] * lines
    plots.save_labelled_grid(pairs.flatten(0, 2), folder / "reconstructions.png", columns, title, which)

    n = min(10, len(images) // 2)
    ends = torch.randperm(len(images), generator=generator)[: 2 * n].view(n, 2)
    t = torch.linspace(0, 1, STEPS)[None, :, None]
    y_between, z_between = (code[ends[:, :1]] + t * (code[ends[:, 1:]] - code[ends[:, :1]]) for code in (y, z))
    between = model.decode(y_between.flatten(0, 1), z_between.flatten(0, 1)).view(n, STEPS, *images.shape[1:])
    first, last = (as_input(images[ends[:, i]])[:, None] for i in (0, 1))
    rows = torch.cat([first, between, last], 1).flatten(0, 1)
    title = "Between test images: first and last are real"
    classes = [" to ".join(data.class_names[i] for i in pair) for pair in labels[ends].tolist()]
    plots.save_labelled_grid(rows, folder / "interpolations.png", STEPS + 2, title, classes)

    chosen = torch.randperm(len(z), generator=generator)[:EMBEDDED]
    save_points(embedded(z[chosen]), labels[chosen], folder / "tsne.png", "t-SNE of z, test images by class")


def embedded(z: Tensor) -> Tensor:
    """t-SNE (n, 2) of codes (n, D) with fixed settings. If all codes are the same, every point is (0, 0)."""
    from sklearn.manifold import TSNE

    if (z == z[0]).all():
        return torch.zeros(len(z), 2)  # t-SNE divides the initial map by its deviation, 0
    settings = {"learning_rate": "auto", "max_iter": 1000, "random_state": 0}
    settings["init"] = "pca" if z.shape[1] > 1 else "random"
    tsne = TSNE(2, perplexity=min(30.0, (len(z) - 1) / 3), **settings)
    return torch.from_numpy(tsne.fit_transform(z.numpy()))


def save_counts(counts: Tensor, path: Path, title: str, rows: str, columns: str) -> None:
    """Draw a matrix of counts (K, N), coloured by each count's share of its row. rows, columns: the axes' names."""
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    k, n = counts.shape
    figure, axes = plots.subplots(figsize=(0.42 * n + 1.4, 0.3 * k + 1.2))
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i in range(k):
        for j in range(n):
            colour = "white" if shares[i, j] > 0.6 else "black"
            axes.text(j, i, f"{int(counts[i, j])}", ha="center", va="center", fontsize=6, color=colour)
    axes.set(title=title, xlabel=columns, ylabel=rows, xticks=range(n), yticks=range(k))
    plots.save_figure(figure, path)


def save_points(points: Tensor, groups: Tensor, path: Path, title: str) -> None:
    """Draw points (n, 2) in the colours of their groups (n,), which are numbers 0, 1, …, with a legend."""
    figure, axes = plots.subplots(figsize=(5, 4.4))
    drawn = axes.scatter(*points.T.numpy(), s=4, c=groups.numpy(), cmap="tab10", linewidths=0)
    axes.legend(*drawn.legend_elements(num=None), loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set(title=title, xlabel="first coordinate (t-SNE has no units)", ylabel="second coordinate")
    plots.save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    run.evaluate_from("amm", evaluate, argv, shown=lambda name: "purity_of" not in name)


if __name__ == "__main__":
    run.exit_with(main)
