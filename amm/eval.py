"""Every table and figure of the AMM paper from a trained run.

    python -m amm.eval mnist --seed 0 --data data

Writes eval.json and figures/ into the run's folder.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from amm.model import sampled
from amm.train import Config, Split, as_input, by_bayes, diagnosis, draw, error, infer, split
from common import plots, run
from common.data import Dataset, load
from common.metrics import contingency, error_rate

STEPS = 9  # images from one test image to another
EMBEDDED = 2_000  # test images of the t-SNE projection
NOISE = 0.5  # a cluster whose largest class has a smaller share than this is called a noise cluster


@dataclass(frozen=True)
class Trained:
    """A trained run. Images go in as uint8 (N, C, H, W) and come out as floats in [0, 1]; codes are y (N, K) and z (N, D) on the CPU."""

    config: Config
    networks: dict[str, nn.Module]
    state: dict  # the checkpoint

    @property
    def device(self) -> torch.device:
        return next(self.networks["decoder"].parameters()).device

    def infer(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """y, the softmax of h_y's mean, and z's mean."""
        h, z = infer(self.networks, images.to(self.device))
        return h.softmax(1), z

    @torch.no_grad()
    def decode(self, y: Tensor, z: Tensor) -> Tensor:
        parts = zip(y.to(self.device).split(500), z.to(self.device).split(500), strict=True)
        return torch.cat([self.networks["decoder"](a, b).cpu() for a, b in parts])

    def sample(self, components: Tensor, seed: int = 0) -> Tensor:
        """Images of these components (n,)."""
        return draw(self.networks, self.config, components, run.generator(seed, "sample"))

    def bayes(self, z: Tensor, priors: Tensor) -> Tensor:
        """ŷ_z, eq. (19), (N,), under the learned mixture and p(y) (K,)."""
        return by_bayes(self.networks, self.config.n_components, z, priors)


def load_run(folder: str | Path, device: str | torch.device = "cpu") -> Trained:
    """The run in `folder`, as far as its last checkpoint. Raises UserError where there is none, or it is damaged."""
    config, _, networks, state = run.trained("amm", Path(folder), torch.device(device))
    return Trained(config, networks, state)


def evaluate(options: run.Options) -> dict:
    """Evaluate one run: its metrics, written to eval.json, and its figures."""
    device, folder = run.set_up(options), options.folder("amm")
    trained = load_run(folder, device)
    data = load(trained.config.dataset, options.data, options.unofficial_data)
    run.check_data(folder, trained.state, data)
    if len(data.test_images) < 2:
        raise run.UserError(f"{data.name} has {len(data.test_images)} test image; the figures need at least 2")
    s = split(trained.config, data, options.seed)
    metrics = predictions(trained, data.test_images, data.test_labels, s.priors, data.n_classes)
    metrics |= diagnosis(trained.networks, data.test_images.to(device))
    if trained.config.validation:
        on_validation = predictions(trained, s.validation_images, s.validation_labels, s.priors, data.n_classes)
        metrics |= {f"{name}_validation": value for name, value in on_validation.items() if "purity_of" not in name}
    if data.n_classes > 1:
        metrics |= in_other_modes(trained, data, s.priors, options.seed)
        if rows := [row for row in trained.state["rows"] if "test_error" in row]:
            metrics["error_best_on_validation"] = min(rows, key=lambda row: row["validation_error"])["test_error"]
    else:
        print(f"{data.name} has one class: what needs labels is left out")
    result = run.record(options, trained.config, trained.state, metrics, device)
    run.write_json(folder / "eval.json", result)
    figures(trained, data, s, folder / "figures", options.seed)
    return result


# -------------------------------------------------------------------------------------------------------------- tables


def predictions(trained: Trained, images: Tensor, labels: Tensor, priors: Tensor, n_classes: int) -> dict[str, float]:
    """Tables 1 and 2, in percent, by both predictions: eq. (19), and (_g_y) argmax of G_y.

    AMM: errors by eq. (17), each cluster counting for its most frequent class, and (_one_to_one) with each class given to one cluster at
    most. SAMM: component k is class k. Beside them what the paper says in words: how often the two predictions agree; how pure a cluster
    is, by G_y, on the mean and at worst; how many are noise; of how many clusters a class is the most frequent one, at least; and
    purity_of_k of each that has images. Without labels, with n_classes 1, agreement and empty clusters alone.
    """
    y, z = trained.infer(images)
    k, found = trained.config.n_components, {}
    both = {"": trained.bayes(z, priors), "_g_y": y.argmax(1)}
    agreement = 100 - error_rate(both[""], both["_g_y"])
    if n_classes < 2:
        return {"agreement": agreement, "empty_clusters": float(k - len(both["_g_y"].unique()))}
    for suffix, predicted in both.items():
        found[f"error{suffix}"] = error(predicted, labels, trained.config, n_classes)
        if not trained.config.semi_supervised:
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
def in_other_modes(trained: Trained, data: Dataset, priors: Tensor, seed: int) -> dict[str, float]:
    """Test errors in percent under other readings of "test time", of which the paper says nothing: by eq. (19), and (_g_y) by argmax G_y.

    _batch_statistics: batch normalisation by the statistics of each batch, as large as in training; _sampled: y and z with their noise.
    """
    encoder = copy.deepcopy(trained.networks["encoder"])
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    torch.manual_seed(seed)
    codes = {"batch_statistics": [], "sampled": []}
    for images in data.test_images.tensor_split(max(1, len(data.test_images) // trained.config.batch)):
        x = as_input(images.to(trained.device))
        codes["batch_statistics"].append([of[0].cpu() for of in encoder(x)])
        codes["sampled"].append([sampled(*of).cpu() for of in trained.networks["encoder"](x)])
    found = {}
    for name, parts in codes.items():
        h, z = (torch.cat(both) for both in zip(*parts, strict=True))
        found[f"error_{name}"] = error(trained.bayes(z, priors), data.test_labels, trained.config, data.n_classes)
        found[f"error_g_y_{name}"] = error(h.argmax(1), data.test_labels, trained.config, data.n_classes)
    return found


def one_to_one_error(table: Tensor) -> float:
    """In percent: each class is given to one cluster at most, in the best way. table: (K, N) counts."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(table.numpy(), maximize=True)
    return 100 * (1 - (table[rows, columns].sum() / table.sum()).item())


# ------------------------------------------------------------------------------------------------------------- figures


def figures(trained: Trained, data: Dataset, s: Split, folder: Path, seed: int) -> None:
    """Figures 2 to 4: members and samples of each component, matrices, reconstructions, interpolations, t-SNE; the course of training."""
    k = trained.config.n_components
    plots.save_course(trained.state["rows"], folder / "training.png")
    generator = run.generator(seed, "figures")
    y, z = trained.infer(data.test_images)
    by_g_y, by_bayes = y.argmax(1), trained.bayes(z, s.priors)
    labels = [f"{i}" for i in range(k)]

    samples = trained.sample(torch.arange(k).repeat_interleave(10), seed)
    plots.save_labelled_grid(samples, folder / "samples.png", 10, "Samples of each component", labels)
    members = torch.zeros(k, 10, *data.test_images.shape[1:])
    for i in range(k):
        mine = (by_g_y == i).nonzero()[:, 0]
        mine = mine[torch.randperm(len(mine), generator=generator)[:10]]
        members[i, : len(mine)] = as_input(data.test_images[mine])
    plots.save_labelled_grid(members.flatten(0, 1), folder / "members.png", 10, "Test images that G_y gives to each component", labels)

    for name, predicted, title in (("g_y", by_g_y, "argmax of G_y"), ("bayes", by_bayes, "eq. (19)")):
        table = contingency(predicted, data.test_labels, k, data.n_classes)
        if data.n_classes > 1:  # as above the paper's matrices
            title += f": ACC {1 - error(predicted, data.test_labels, trained.config, data.n_classes) / 100:.4f}"
        plots.save_counts(table, folder / f"matrix_{name}.png", f"Test images by {title}", "component", "class")

    columns = min(10, len(data.test_images))
    lines = min(5, len(data.test_images) // columns)
    chosen = torch.randperm(len(data.test_images), generator=generator)[: columns * lines]
    originals, decoded = as_input(data.test_images[chosen]), trained.decode(y[chosen], z[chosen])
    pairs = torch.stack([images.view(lines, columns, *images.shape[1:]) for images in (originals, decoded)], 1)
    title = "Test images and, below each row, their reconstructions"
    plots.save_labelled_grid(pairs.flatten(0, 2), folder / "reconstructions.png", columns, title)

    n = min(10, len(data.test_images) // 2)
    ends = torch.randperm(len(data.test_images), generator=generator)[: 2 * n].view(n, 2)
    t = torch.linspace(0, 1, STEPS)[None, :, None]
    between = [code[ends[:, :1]] + t * (code[ends[:, 1:]] - code[ends[:, :1]]) for code in (y, z)]  # (n, STEPS, …)
    made = trained.decode(*(code.flatten(0, 1) for code in between)).view(n, STEPS, *data.test_images.shape[1:])
    first, last = (as_input(data.test_images[ends[:, i]])[:, None] for i in (0, 1))
    title = "Between test images: first and last are real"
    plots.save_labelled_grid(torch.cat([first, made, last], 1).flatten(0, 1), folder / "interpolations.png", STEPS + 2, title)

    shown = torch.randperm(len(z), generator=generator)[:EMBEDDED]
    plots.save_points(embedded(z[shown]), data.test_labels[shown], folder / "tsne.png", "t-SNE of z, test images by class")


def embedded(z: Tensor) -> Tensor:
    """t-SNE (n, 2) of codes (n, D), its settings pinned."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(z) - 1) / 3)
    found = TSNE(2, perplexity=perplexity, init="pca", learning_rate="auto", max_iter=1000, random_state=0).fit_transform(z.numpy())
    return torch.from_numpy(found)


def main(argv: list[str] | None = None) -> None:
    run.evaluate_from("amm", evaluate, argv, shown=lambda name: "purity_of" not in name)


if __name__ == "__main__":
    run.exit_with(main)
