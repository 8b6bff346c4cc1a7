"""Every table and figure of the SeGMA paper from a trained run of SeGMA or of a baseline.

    python -m segma.eval mnist --seed 0 --data data

Writes eval.json and figures/ into the run's folder. Tables I and III need the Inception weights; without them, FID is
left out.
"""

import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from common import inception, plots, run
from common.data import Dataset, draw_labels, load
from common.metrics import error_rate, frechet_distance, moments, nearest_neighbour
from segma.model import (
    GenerativeModel,
    SeGMA,
    as_input,
    cramer_wold_distance,
    intensify,
    reconstruction_error,
    sampled_distance,
    transfer_style,
)

FID_SAMPLES = 10_000  # Sec. VI-B and VI-C
JUDGED_SAMPLES = 2_000  # samples whose nearest training image gives their class
LINES = 200  # interpolation lines between every two classes
POINTS = 41  # points on each line whose class is determined
ANTI_TARGETS = [(0, 1), (2, 1), (3, 1), (1, 3)]  # Fig. 8, class and anti-target: 1 not male, smiling; 3 male, smiling


def evaluate(options: run.Options) -> dict:
    """Evaluate one run: write metrics and details to eval.json, and draw the figures."""
    device, folder = run.set_up(options), options.folder("segma")
    model, state = run.load_run("segma", folder, device, options.moved)
    options = replace(options, seed=state["identity"]["seed"])  # whatever the folder is called
    data = load(model.config.dataset, options.data, options.unofficial_data)
    run.check_data(folder, state, data)
    labelled = bool(model.config.labelled_per_batch)
    z = model.encode(data.test_images)
    metrics, details, timing = quality(model, data, z), {}, {}
    if labelled:
        metrics = table_ii(model, data, z, options.seed) | metrics
    if data.train_images.shape[-1] < 64:  # for faces, the image nearest in pixels says little about the class
        metrics |= rows_are_classes(model, data, options.seed)
    scores, judge = tables_i_and_iii(model, data, z, options)
    if isinstance(model, SeGMA):
        details["sampled_distance"], timing = closed_form_against_sampling(model, z, options.seed)
        noise = {row["n"]: row["gradient_noise"] for row in details["sampled_distance"]}
        metrics["sampled_gradient_noise"] = 100 * noise[100]
    if isinstance(model, SeGMA) and labelled:
        details["mean_distances"] = torch.cdist(model.means, model.means).tolist()
        details["nearest_class"] = nearest_classes(model, data)
        details["between"] = between(model, data, z, options.seed)
        if data.class_names == tuple("0123456789") and details["between"]["6-9"] is not None:
            metrics["lines_6_to_9_through_4"] = 100 * details["between"]["6-9"].get("4", 0.0)  # Sec. VI-C
    result = run.record(model.config, state, metrics | scores, device, inception=judge)
    result |= {"details": details, "timing": timing}
    run.write_json(folder / "eval.json", result)
    figures(model, data, z, result, state["rows"], folder / "figures", options.seed)
    return result


# --------------------------------------------------------------------------------------------------------------- tables


def table_ii(model: GenerativeModel, data: Dataset, z: Tensor, seed: int) -> dict[str, float]:
    """Test error in percent of eq. (7), and for comparison of the nearest neighbour among the labelled images.

    z: (n, D), the codes of the test images.
    """
    config = model.config
    known, _ = draw_labels(data.train_labels, config.n_labels, config.labels, data.class_names, seed)
    images, labels = as_input(data.train_images[known]), data.train_labels[known]
    return {
        "test_error": error_rate(model.classify(z).cpu(), data.test_labels),
        "nearest_neighbour_error": error_rate(
            nearest_neighbour(images, labels, as_input(data.test_images)), data.test_labels
        ),
    }


def quality(model: GenerativeModel, data: Dataset, z: Tensor) -> dict[str, float]:
    """Reconstruction error, eq. (1), and for SeGMA the distance d², eq. (8), on the test set with the γ of training."""
    parts = zip(data.test_images.split(1000), z.split(1000), strict=True)
    squares = sum(len(x) * reconstruction_error(as_input(x), model.decode(code).cpu()).item() for x, code in parts)
    scores = {"reconstruction_error": squares / len(z)}
    if isinstance(model, SeGMA):
        d2 = cramer_wold_distance(z.double(), model.means.double(), model.priors.double(), model.gamma)
        scores["distance"] = d2.item()
    return scores


def rows_are_classes(model: GenerativeModel, data: Dataset, seed: int) -> dict[str, float]:
    """Sec. VI-B, "examples in each row … have the same class": how far each component is one class, in percent.

    The class of each of 2,000 samples of the mixture is that of the nearest training image in pixels.
    """
    codes, components = model.draw(JUDGED_SAMPLES, run.generator(seed, "nearest images"))
    images = as_input(to_bytes(model.decode(codes)))
    found = nearest_neighbour(as_input(data.train_images), data.train_labels, images)
    return verdict(found, components, data.n_classes, bool(model.config.labelled_per_batch))


def verdict(found: Tensor, components: Tensor, n_classes: int, labelled: bool) -> dict[str, float]:
    """The percentage of samples that are of the class of their component.

    found: (n,), the class of each sample; components: (n,), its component. Without labels the class of a component is
    the one that most of its samples have.
    """
    if labelled:
        return {"nearest_image_of_their_class": 100 - error_rate(found, components)}
    counts = torch.stack([found[components == k].bincount(minlength=n_classes) for k in components.unique()])
    return {"nearest_image_purity": 100 * counts.max(1).values.sum().item() / len(found)}


def tables_i_and_iii(
    model: GenerativeModel, data: Dataset, z: Tensor, options: run.Options
) -> tuple[dict[str, float], str | None]:
    """FID of 10,000 samples of the mixture (Table I) and of 10,000 points between test images (Table III).

    Each FID is taken against the training set and, under a name with _test, the test set. z: (n, D), codes of the test
    images. Returns the scores and the name of the Inception network. Without the network it prints the reason.
    """
    if min(len(data.train_images), len(data.test_images)) < inception.FEATURES:
        print(f"FID left out: {data.name} has fewer images than the {inception.FEATURES} features of Inception")
        return {}, None
    path, reason = inception.find_weights(options.inception)
    if path is None:
        print(f"FID left out: {reason}")
        return {}, None
    network, cache = inception.extractor(path, z.device), options.runs / "cache"
    real = {
        "": inception.cached_moments(network, data.train_images, cache, f"{data.name}-train-{data.digest}"),
        "_test": inception.cached_moments(network, data.test_images, cache, f"{data.name}-test-{data.digest}"),
    }
    codes = {
        "fid": model.draw(FID_SAMPLES, run.generator(options.seed, "fid"))[0],
        "fid_interpolation": points_between(z, run.generator(options.seed, "fid interpolation")),
    }
    scores = {}
    for name, points in codes.items():
        images = torch.cat([to_bytes(model.decode(part)) for part in points.split(1000)])  # not all as floats at once
        statistics = moments(inception.features(network, images))
        for against, reference in real.items():
            scores[name + against] = frechet_distance(statistics, reference)
    return scores, f"Inception 2015-12-05, {inception.SHA256_PREFIX}"


def points_between(z: Tensor, generator: torch.Generator) -> Tensor:
    """10,000 codes (10000, D), each at t ~ U(0, 1) between two random codes of z (n, D), n ≥ 2.

    The pairs come in ten batches of 1,000, each drawn without replacement; in more, smaller batches if n < 2,000.
    """
    size = min(FID_SAMPLES // 10, len(z) // 2)
    parts = []
    for _ in range(-(-FID_SAMPLES // size)):
        first, second = torch.randperm(len(z), generator=generator)[: 2 * size].view(2, size).to(z.device)
        t = torch.rand(size, 1, generator=generator).to(z.device)
        parts.append(z[first] + t * (z[second] - z[first]))
    return torch.cat(parts)[:FID_SAMPLES]


def to_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8 on the CPU, clipped and truncated as the authors' code does."""
    return (images.clamp(0, 1) * 255).to(torch.uint8).cpu()


# --------------------------------------------------------------------------- what the paper claims and does not measure


def closed_form_against_sampling(
    model: SeGMA, z: Tensor, seed: int, repeats: int = 20
) -> tuple[list[dict], list[dict]]:
    """Compare the closed form of eq. (8) with the MMD of the same kernel on n samples of the mixture (Sec. I).

    z: (N, D), of which one training batch is used. For each n, over `repeats` draws: the mean and standard deviation of
    d², and the noise of its gradient in codes and means, √E‖g - ḡ‖² / ‖ḡ‖. n = 0 is the closed form, which draws
    nothing and has no noise. Returns these rows, which the seed fixes, and the median milliseconds for drawing, value
    and gradient, which vary between runs.
    The pairs of a sample with itself raise d² by about k(0) / n, as those of the codes do in eq. (8). The
    asymptotic φ_D has an error of its own (ledger 10), which more samples do not remove.
    """
    generator, size = run.generator(seed, "sampled distance"), model.config.codes_per_batch
    codes = z[torch.randperm(len(z), generator=generator)[:size].to(z.device)].clone().requires_grad_()
    priors, means = model.priors, model.means.detach().clone().requires_grad_()

    def distance(n: int) -> Tensor:
        if n == 0:
            return cramer_wold_distance(codes, means, priors, model.gamma)
        components = torch.multinomial(priors.cpu(), n, replacement=True, generator=generator).to(z.device)
        noise = torch.randn(n, z.shape[1], generator=generator).to(z.device)
        return sampled_distance(codes, means[components] + noise, model.gamma)

    rows, timing = [], []
    for n in (0, 10, 30, 100, 300, 1000):
        values, gradients, times = [], [], []
        for _ in range(repeats):
            started = time.perf_counter()
            value = distance(n)
            gradient = torch.autograd.grad(value, (codes, means))
            gradients.append(torch.cat([g.flatten() for g in gradient]).cpu())  # .cpu() waits for a GPU
            times.append(1000 * (time.perf_counter() - started))
            values.append(value.item())
        mean = torch.stack(gradients).mean(0)
        noise = torch.stack([(g - mean).square().sum() for g in gradients]).mean().sqrt() / mean.norm()
        d2 = torch.tensor(values, dtype=torch.float64)
        spread = {"sd": d2.std().item(), "gradient_noise": noise.item()} if n else {"sd": 0.0, "gradient_noise": 0.0}
        rows.append({"n": n, "mean": d2.mean().item(), **spread})
        timing.append({"n": n, "milliseconds": sorted(times)[repeats // 2]})
    return rows, timing


def nearest_classes(model: SeGMA, data: Dataset) -> dict[str, str]:
    """Return {class: the class with the nearest mean}."""
    nearest = torch.cdist(model.means, model.means).fill_diagonal_(float("inf")).argmin(1).tolist()
    return {data.class_names[k]: data.class_names[neighbour] for k, neighbour in enumerate(nearest)}


def between(model: SeGMA, data: Dataset, z: Tensor, seed: int) -> dict[str, dict[str, float] | None]:
    """For every two classes, the share of straight lines between their test images that pass through each third class.

    z: (n, D), codes of the test images. LINES pairs are drawn from the images that eq. (7) classifies correctly.
    Returns {"6-9": {"4": 0.6, …}, …}, the most frequent third class first; None if one of the two has no such image.
    """
    labels = data.test_labels.to(z.device)
    right = model.classify(z) == labels
    generator = run.generator(seed, "between")
    t = torch.linspace(0, 1, POINTS, device=z.device)[:, None, None]
    shares: dict[str, dict[str, float] | None] = {}
    for pair in combinations(range(data.n_classes), 2):
        ends = []
        for k in pair:
            members = (right & (labels == k)).nonzero()[:, 0]
            if len(members):
                ends.append(z[members[torch.randint(len(members), (LINES,), generator=generator).to(z.device)]])
        name = "-".join(data.class_names[k] for k in pair)
        shares[name] = None
        if len(ends) == 2:
            on_line = model.classify((ends[0] + t * (ends[1] - ends[0])).flatten(0, 1)).view(POINTS, LINES)
            thirds = sorted(set(range(data.n_classes)) - set(pair))
            passed = Counter({data.class_names[k]: (on_line == k).any(0).float().mean().item() for k in thirds})
            shares[name] = {third: share for third, share in passed.most_common() if share}
    return shares


# -------------------------------------------------------------------------------------------------------------- figures


def figures(
    model: GenerativeModel, data: Dataset, z: Tensor, result: dict, rows: list[dict], folder: Path, seed: int
) -> None:
    """Figures 3 to 8 for this data set, the geometry of the latent space, and the course of training.

    z: (n, D), the codes of the test images.  result: the record with the metrics.  rows: the rows of the log.
    """
    details = result["details"]
    generator, labelled = run.generator(seed, "figures"), bool(model.config.labelled_per_batch)
    samples(model, data, generator, folder / "samples.png")
    interpolations(model, data, z, generator, folder / "interpolations.png")
    if labelled:
        chosen = style_transfers(model, data, z, generator, folder / "style_transfer.png")
    if labelled and isinstance(model, SeGMA):
        intensities(model, data, z, chosen, generator, folder / "intensity.png")
        geometry(details, data.class_names, folder)
    if "sampled_distance" in details:
        closed_form(details["sampled_distance"], result["timing"], folder / "closed_form.png")
    plots.save_course(rows, folder / "training.png", COURSE, others=False)


def samples(model: GenerativeModel, data: Dataset, generator: torch.Generator, path: Path) -> None:
    """Draw Figures 3 to 5: ten samples of each component, one row per component."""
    k = len(model.means)
    noise = torch.randn(k * 10, model.config.latent_dim, generator=generator).to(model.device)
    codes = model.place(noise, torch.arange(k, device=model.device).repeat_interleave(10))
    labelled = bool(model.config.labelled_per_batch)
    rows = data.class_names if labelled else [f"component {i}" for i in range(k)]
    plots.save_labelled_grid(model.decode(codes), path, 10, "Samples of each component (Figs. 3-5)", rows)


def one_of(class_: int, classes: Tensor, generator: torch.Generator) -> int:
    """The index of a random image of this class in `classes` (n,), or of any image if this class has none."""
    members = (classes == class_).nonzero()[:, 0]
    members = members if len(members) else torch.arange(len(classes))
    return int(members[torch.randint(len(members), (1,), generator=generator)])


def other_than(class_: int, n: int, generator: torch.Generator) -> int:
    """A random one of the n - 1 other classes; the class itself if it is the only one."""
    return (class_ + 1 + int(torch.randint(max(1, n - 1), (1,), generator=generator))) % n


def shows_originals(data: Dataset) -> bool:
    """Whether figures may show originals. CelebA's terms forbid passing its images on, and figures are committed."""
    return not data.name.startswith("celeba")


def with_originals(
    model: GenerativeModel, data: Dataset, first: Tensor, codes: Tensor, last: Tensor | None = None
) -> Tensor:
    """Rows of a test image, decoded codes and a test image. For faces, the decoded codes only.

    first, last: (rows,), indices of test images.  codes: (rows, columns, D).  Returns (rows · columns, C, H, W).
    """
    parts = [model.decode(codes.flatten(0, 1)).cpu().unflatten(0, codes.shape[:2])]
    if shows_originals(data):
        parts.insert(0, as_input(data.test_images[first])[:, None])
        parts += [as_input(data.test_images[last])[:, None]] if last is not None else []
    return torch.cat(parts, 1).flatten(0, 1)


def interpolations(model: GenerativeModel, data: Dataset, z: Tensor, generator: torch.Generator, path: Path) -> None:
    """Figure 6: nine steps from a test image to one of another class, if there is one. Row 1: 6 to 9, as printed."""
    n, names, real = data.n_classes, data.class_names, shows_originals(data)
    pairs = [(s, other_than(s, n, generator)) for s in range(n)]
    pairs[0] = (6, 9) if n == 10 else pairs[0]
    first, last = (torch.tensor([one_of(pair[i], data.test_labels, generator) for pair in pairs]) for i in (0, 1))
    if n == 1:  # to another image of the same class
        last = torch.tensor([other_than(int(first), len(data.test_images), generator)])
    steps = torch.linspace(0, 1, 9, device=z.device)
    line = z[first][:, None] + steps[None, :, None] * (z[last] - z[first])[:, None]
    images = with_originals(model, data, first, line, last)
    title = "Interpolations between test images (Fig. 6)" + (": first and last are real" if real else "")
    plots.save_labelled_grid(images, path, 11 if real else 9, title, [f"{names[s]} to {names[e]}" for s, e in pairs])


def style_transfers(model: GenerativeModel, data: Dataset, z: Tensor, generator: torch.Generator, path: Path) -> Tensor:
    """Draw Figure 7: a test image of each class moves to another class. Returns the indices of these images, (K,)."""
    k, names, real, assigned = len(model.means), data.class_names, shows_originals(data), model.classify(z)
    chosen = torch.tensor([one_of(s, assigned, generator) for s in range(k)])
    source = assigned[chosen]
    target = torch.tensor([other_than(s, k, generator) for s in source.tolist()]).to(z.device)
    steps = torch.linspace(0, 1, 9, device=z.device).tolist()
    moved = torch.stack([transfer_style(z[chosen], source, target, model.means, t) for t in steps], 1)
    formula = "z + t (μ_t - μ_s), eq. (10), Fig. 7" if isinstance(model, SeGMA) else "the class alone moves, Fig. 7"
    plots.save_labelled_grid(
        with_originals(model, data, chosen, moved),
        path,
        10 if real else 9,
        f"Continuous style transfer, {formula}",
        [f"{names[s]} to {names[e]}" for s, e in zip(source.tolist(), target.tolist(), strict=True)],
        ["real"] * real + [f"t={t:.2g}" for t in steps],
    )
    return chosen


def intensities(model: SeGMA, data: Dataset, z: Tensor, chosen: Tensor, generator: torch.Generator, path: Path) -> None:
    """Draw Figure 8: the test images with indices `chosen` (K,) move away from an anti-target class.

    For faces the paper gives the classes. Otherwise the anti-target is the class with the nearest mean (ledger 23).
    """
    names, real, assigned = data.class_names, shows_originals(data), model.classify(z)
    if data.name.startswith("celeba"):
        chosen = torch.tensor([one_of(s, assigned, generator) for s, _ in ANTI_TARGETS])
        source, anti_target = assigned[chosen], torch.tensor([t for _, t in ANTI_TARGETS]).to(z.device)
    else:
        source = assigned[chosen]
        anti_target = torch.cdist(model.means, model.means).fill_diagonal_(float("inf")).argmin(1)[source]
    alphas = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
    moved = torch.stack([intensify(z[chosen], source, anti_target, model.means, alpha) for alpha in alphas], 1)
    plots.save_labelled_grid(
        with_originals(model, data, chosen, moved),
        path,
        8 if real else 7,
        "Class intensity, z + α (μ_s - μ_t), eq. (11), Fig. 8 (the paper's α is 0.5)",
        [f"{names[s]}, away from {names[e]}" for s, e in zip(source.tolist(), anti_target.tolist(), strict=True)],
        ["real"] * real + [f"α={alpha:g}" for alpha in alphas],
    )


def geometry(details: dict, names: Sequence[str], folder: Path) -> None:
    """Draw the distances between the means, and the classes that lie between two others."""
    distances = details["mean_distances"]
    text = [["" if i == j else f"{d:.2f}" for j, d in enumerate(row)] for i, row in enumerate(distances)]
    title = "Distances between the means"
    save_matrix(torch.tensor(distances), folder / "means.png", names, title, text, "‖μ_k - μ_l‖")
    if len(names) < 3:
        return
    shares = torch.zeros(len(names), len(names))
    text = [[""] * len(names) for _ in names]
    for i, j in combinations(range(len(names)), 2):
        for name, share in list((details["between"][f"{names[i]}-{names[j]}"] or {}).items())[:1]:
            shares[i, j] = shares[j, i] = 100 * share
            text[i][j] = text[j][i] = f"{name}: {100 * share:.0f}"
    title = "The third class on most lines between two classes,\nand % of lines through it"
    save_matrix(shares, folder / "between.png", names, title, text, "% of lines")


def save_matrix(
    values: Tensor, path: Path, names: Sequence[str], title: str, text: Sequence[Sequence[str]], colours: str
) -> None:
    """Draw a square matrix (K, K) as a heat map without its diagonal. text: in the cells. colours: label of the bar."""
    values = values.clone().fill_diagonal_(float("nan"))
    shown = values[~values.isnan()]
    middle, long = (shown.min() + shown.max()) / 2, max(map(len, names)) > 6
    cell = 1.0 if long else 0.55  # inches
    figure, axes = plots.subplots(figsize=(cell * len(names) + 2.2, cell * len(names) + 1.2))
    picture = axes.imshow(values.numpy(), cmap="viridis")
    for i, row in enumerate(text):
        for j, word in enumerate(row):
            how = {"ha": "center", "va": "center", "color": "white" if values[i, j] < middle else "black"}
            # parse_math=False, because the name of a class may contain $.
            axes.text(j, i, textwrap.fill(word, 12), fontsize=7, parse_math=False, **how)
    lean = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if long else {}
    axes.set_xticks(range(len(names)), names, parse_math=False, **lean)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set(xlabel="class", ylabel="class")
    axes.set_title(title)
    figure.colorbar(picture, ax=axes, label=colours, shrink=0.8)
    plots.save_figure(figure, path)


def closed_form(rows: list[dict], timing: list[dict], path: Path) -> None:
    """Draw the noise and the time that sampling the mixture costs, against the number of samples."""
    closed, n = timing[0]["milliseconds"], [row["n"] for row in rows[1:]]
    noise, times = [row["gradient_noise"] for row in rows[1:]], [row["milliseconds"] for row in timing[1:]]
    curves = {
        "noise of the gradient over its norm\n(closed form: 0)": {"": (n, noise)},
        f"milliseconds, value and gradient\n(closed form: {closed:.2g})": {"": (n, times)},
    }
    plots.save_curves(curves, path, "samples of the mixture in a sampled MMD", log=True, log_y=True)


COURSE = {  # a column of the log: its title in training.png
    "test_error": "test error, %",
    "mse": "reconstruction error, eq. (1)",
    "bernoulli": "reconstruction error, cross-entropy, nats",
    "d2": "distance to the mixture d², eq. (8)",
    "mean_norm": "mean norm of the means μ_k",
    "m1_bound": "bound of M1, nats",
    "unlabelled_bound": "bound of the unlabelled images, nats",
    "cross_entropy": "cross-entropy of the labels, nats",
}


def main(argv: list[str] | None = None) -> None:
    run.evaluate_from("segma", evaluate, argv)


if __name__ == "__main__":
    run.exit_with(main)
