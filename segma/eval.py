"""Every table and figure of the SeGMA paper from a trained run, SeGMA's own or a baseline's.

    python -m segma.eval mnist --seed 0 --data data

Writes eval.json and figures/ into the run's folder. Tables I and III need the Inception weights; without them FID is left out.
"""

import time
from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from common import classifier, inception, plots, run
from common.data import Dataset, choose_labels, load
from common.metrics import error_rate, frechet_distance, moments, nearest_neighbour
from segma import model
from segma.train import Task, as_input, encode_all

FID_SAMPLES = 10_000  # Sec. VI-B and VI-C
LINES = 200  # interpolation lines between each two classes
POINTS = 41  # on each line, when the classes along it are counted
ANTI_TARGETS = [(0, 1), (2, 1), (3, 1), (1, 3)]  # Fig. 8: away from "not male, smiling" in three rows, from "male, smiling" in one


@dataclass(frozen=True)
class Trained:
    """A trained run. Codes z are (n, D) float32; images go in as uint8 (n, C, H, W) and come out as floats in [0, 1].

    A baseline's code is its latent code followed by the one-hot class, so that codes of every system are moved alike.
    """

    config: Task
    system: ModuleType  # segma.train, segma.m1m2 or segma.adgm
    networks: dict[str, nn.Module]
    state: dict  # the checkpoint

    @property
    def device(self) -> torch.device:
        return next(p.device for network in self.networks.values() for p in network.parameters())

    @property
    def means(self) -> Tensor:
        """The code at the centre of each component (K, D): μ_k; of a baseline the origin with class k."""
        k = self.config.n_components
        noise = torch.zeros(k, self.config.latent_dim, device=self.device)
        return self.system.place(self.networks, noise, torch.arange(k, device=self.device)).detach()

    def encode(self, images: Tensor) -> Tensor:
        return encode_all(self.system, self.networks, images.to(self.device))

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        return torch.cat([self.system.decode(self.networks, part) for part in z.split(1000)])

    def classify(self, z: Tensor) -> Tensor:
        """The most probable class (n,), eq. (7); of a baseline the class in the code."""
        return self.system.classes(self.networks, z)

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """n codes (n, D) from the target distribution and the component (n,) of each, drawn in proportion to the priors."""
        components = torch.multinomial(self.system.priors(self.networks).cpu(), n, replacement=True, generator=generator)
        noise = torch.randn(n, self.config.latent_dim, generator=generator)
        return self.system.place(self.networks, noise.to(self.device), components.to(self.device)).detach(), components

    def sample(self, n: int, component: int | None = None, seed: int = 0) -> Tensor:
        """n images of one component, or of the whole mixture in proportion to the priors (component None)."""
        z, components = self.draw(n, run.generator(seed, "sample"))
        if component is not None:
            z = z - self.means[components.to(z.device)] + self.means[component]
        return self.decode(z)


def load_run(folder: str | Path, device: str | torch.device = "cpu") -> Trained:
    """The run in `folder`, as far as its last checkpoint. Raises UserError where there is none, or it is damaged."""
    return Trained(*run.trained("segma", Path(folder), torch.device(device)))


def evaluate(options: run.Options) -> dict:
    """Evaluate one run: metrics and details, written to eval.json, and the figures."""
    device, folder = run.set_up(options), options.folder("segma")
    trained = load_run(folder, device)
    data = load(trained.config.dataset, options.data, options.unofficial_data)
    run.check_data(folder, trained.state, data)
    z = trained.encode(data.test_images)
    metrics, details, timing = quality(trained, data, z), {}, {}
    if trained.config.labelled_per_batch:
        metrics = table_ii(trained, data, z, options.seed) | metrics
    scores, judges = tables_i_and_iii(trained, data, z, options)
    if "mixture" in trained.networks:  # SeGMA's own
        details["sampled_distance"], timing = closed_form_against_sampling(trained, z, options.seed)
        noise = {row["n"]: row["gradient_noise"] for row in details["sampled_distance"]}
        metrics["sampled_gradient_noise"] = 100 * noise[100]
        if trained.config.labelled_per_batch:
            geometry = {"mean_distances": mean_distances(trained), **nearest_classes(trained, data)}
            details |= geometry | {"between": between(trained, data, z, options.seed)}
            if data.class_names == tuple("0123456789"):  # Sec. VI-C: 4 lies between 6 and 9
                lines = details["between"]["6-9"]
                if lines is not None:
                    metrics["lines_6_to_9_through_4"] = 100 * lines.get("4", 0.0)
    result = run.record(options, trained.config, trained.state, metrics | scores, device, **judges) | {"details": details, "timing": timing}
    run.write_json(folder / "eval.json", result)
    figures(trained, data, z, details | {"timing": timing}, folder / "figures", options.seed)
    return result


# -------------------------------------------------------------------------------------------------------------- tables


def table_ii(trained: Trained, data: Dataset, z: Tensor, seed: int) -> dict[str, float]:
    """Test error in percent by eq. (7), and for scale that of the nearest neighbour among the same labelled images.

    z: (n, D), the codes of the test images.
    """
    config = trained.config
    known = choose_labels(data.train_labels, config.n_labels, config.labels, data.n_classes, seed)
    neighbour = nearest_neighbour(as_input(data.train_images[known]), data.train_labels[known], as_input(data.test_images))
    return {
        "test_error": error_rate(trained.classify(z).cpu(), data.test_labels),
        "nearest_neighbour_error": error_rate(neighbour, data.test_labels),
    }


def quality(trained: Trained, data: Dataset, z: Tensor) -> dict[str, float]:
    """Reconstruction error, eq. (1), and for SeGMA the distance d², eq. (8), on the test set, with the γ of training."""
    config = trained.config
    parts = zip(data.test_images.split(1000), z.split(1000), strict=True)
    squares = sum(len(x) * model.reconstruction_error(as_input(x), trained.decode(code).cpu()).item() for x, code in parts)
    scores = {"reconstruction_error": squares / len(z)}
    if "mixture" in trained.networks:
        gamma = model.silverman_bandwidth(config.codes_per_batch / config.n_components)
        codes, means, priors = z.double(), trained.means.double(), trained.networks["mixture"].priors.double()
        scores["distance"] = model.cramer_wold_distance(codes, means, priors, gamma).item()
    return scores


def tables_i_and_iii(trained: Trained, data: Dataset, z: Tensor, options: run.Options) -> tuple[dict[str, float], dict[str, str | None]]:
    """FID of 10,000 samples of the mixture (Table I) and of 10,000 points between test images (Table III).

    On Inception features against the training set's statistics, and (_test) the test set's; where these cannot be computed they
    are left out, and why is said. Always as well, under names of its own, on the features of a small classifier trained on the
    data set's own labels (against the training set): that ranks systems against each other and is comparable with nothing published.
    Beside it that classifier's verdict: which share of a component's samples are of its class, in percent; for a system without
    labels, of the class that most of them are of. Returns the scores, and which networks judged.
    """
    codes, components = trained.draw(FID_SAMPLES, run.generator(options.seed, "fid"))
    made = {"fid": decode_bytes(trained, codes)}
    made["fid_interpolation"] = decode_bytes(trained, points_between(z, run.generator(options.seed, "fid interpolation")))
    cache = options.runs / "cache"

    network, accuracy = classifier.trained(data, cache, z.device)
    judges = {"classifier": classifier.digest(network), "inception": None}
    real = moments(classifier.features(network, data.train_images))
    scores = {"classifier_accuracy": accuracy}
    for name, images in made.items():
        scores[name.replace("fid", "fid_classifier")] = frechet_distance(moments(classifier.features(network, images)), real)
    scores |= verdict(classifier.classify(network, made["fid"]), components, data.n_classes, bool(trained.config.labelled_per_batch))

    if min(len(data.train_images), len(data.test_images)) < inception.FEATURES:
        print(f"FID left out: {data.name} has fewer images than the {inception.FEATURES} features whose covariance it needs")
        return scores, judges
    path, reason = inception.find_weights(options.inception)
    if path is None:
        print(f"FID left out: {reason}")
        return scores, judges
    network = inception.extractor(path, z.device)
    real = {
        "": inception.cached_moments(network, data.train_images, cache, f"{data.name}-train-{data.digest}"),
        "_test": inception.cached_moments(network, data.test_images, cache, f"{data.name}-test-{data.digest}"),
    }
    for name, images in made.items():
        statistics = moments(inception.features(network, images))
        for against, reference in real.items():
            scores[name + against] = frechet_distance(statistics, reference)
    return scores, judges | {"inception": f"Inception 2015-12-05, {inception.SHA256_PREFIX}"}


def verdict(found: Tensor, components: Tensor, n_classes: int, labelled: bool) -> dict[str, float]:
    """How far components are classes, in percent. found: (n,), the class of each sample; components: (n,), where it was drawn."""
    if labelled:
        return {"samples_of_their_class": 100 - error_rate(found, components)}
    counts = torch.stack([found[components == k].bincount(minlength=n_classes) for k in components.unique()])
    return {"component_purity": 100 * counts.max(1).values.sum().item() / len(found)}


def points_between(z: Tensor, generator: torch.Generator) -> Tensor:
    """10,000 codes (10000, D), each at t ~ U(0, 1) between two random codes of z (n, D), n ≥ 2.

    Ten batches of 1,000 pairs, each batch without replacement; more and smaller ones where z has fewer than 2,000.
    """
    size = min(FID_SAMPLES // 10, len(z) // 2)
    parts = []
    for _ in range(-(-FID_SAMPLES // size)):
        first, second = torch.randperm(len(z), generator=generator)[: 2 * size].view(2, size).to(z.device)
        t = torch.rand(size, 1, generator=generator).to(z.device)
        parts.append(z[first] + t * (z[second] - z[first]))
    return torch.cat(parts)[:FID_SAMPLES]


def to_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8, clipped and truncated as the authors' code does."""
    return (images.clamp(0, 1) * 255).to(torch.uint8).cpu()


def decode_bytes(trained: Trained, codes: Tensor) -> Tensor:
    """The decoded images as uint8, on the CPU, never all of them as floats."""
    return torch.cat([to_bytes(trained.decode(part)) for part in codes.split(1000)])


# ---------------------------------------------------------------------------- what the paper claims and does not measure


def closed_form_against_sampling(trained: Trained, z: Tensor, seed: int, repeats: int = 20) -> tuple[list[dict], list[dict]]:
    """The closed form of eq. (8) against the same kernel's MMD with n samples of the mixture in its place (Secs. I and VII).

    z: (N, D), of which one training batch is taken. For each n, over `repeats` draws: mean and standard deviation of d², and the noise of
    its gradient in codes and means, √E‖g - ḡ‖² / ‖ḡ‖; the closed form draws nothing and has none. Returns that (deterministic) and, by
    itself since it differs from run to run, the median milliseconds for drawing, value and gradient. n = 0 stands for the closed form.
    The self-pairs of a sample raise its d² by about k(0) / n, as those of the codes do in eq. (8); the asymptotic φ_D has an error of its
    own (ledger 10), which no number of samples shows.
    """
    config = trained.config
    gamma = model.silverman_bandwidth(config.codes_per_batch / config.n_components)
    generator = run.generator(seed, "sampled distance")
    codes = z[torch.randperm(len(z), generator=generator)[: config.codes_per_batch].to(z.device)].clone().requires_grad_()
    priors = trained.networks["mixture"].priors
    means = trained.means.clone().requires_grad_()

    def closed() -> Tensor:
        return model.cramer_wold_distance(codes, means, priors, gamma)

    def sampled(n: int) -> Tensor:
        components = torch.multinomial(priors.cpu(), n, replacement=True, generator=generator).to(z.device)
        noise = torch.randn(n, config.latent_dim, generator=generator).to(z.device)
        return model.sampled_distance(codes, means[components] + noise, gamma)

    rows, timing = [], []
    for n in (0, 10, 30, 100, 300, 1000):
        values, gradients, times = [], [], []
        for _ in range(repeats):
            started = time.perf_counter()
            value = sampled(n) if n else closed()
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, (codes, means))]).cpu())  # .cpu() waits for a GPU
            times.append(1000 * (time.perf_counter() - started))
            values.append(value.item())
        mean = torch.stack(gradients).mean(0)
        noise = torch.stack([(g - mean).square().sum() for g in gradients]).mean().sqrt() / mean.norm()
        spread = torch.tensor(values, dtype=torch.float64)
        rows.append(
            {"n": n, "mean": spread.mean().item(), "sd": spread.std().item() if n else 0.0, "gradient_noise": noise.item() if n else 0.0}
        )
        timing.append({"n": n, "milliseconds": sorted(times)[repeats // 2]})
    return rows, timing


def mean_distances(trained: Trained) -> list[list[float]]:
    """‖μ_k - μ_l‖ for all pairs, K × K."""
    return torch.cdist(trained.means, trained.means).tolist()


def nearest_classes(trained: Trained, data: Dataset) -> dict:
    """Each class's nearest neighbour by the distance between the means."""
    distances = torch.cdist(trained.means, trained.means).fill_diagonal_(float("inf"))
    names = data.class_names
    return {"nearest_class": {names[k]: names[int(nearest)] for k, nearest in enumerate(distances.argmin(1))}}


def between(trained: Trained, data: Dataset, z: Tensor, seed: int) -> dict[str, dict[str, float]]:
    """For each two classes, the share of straight lines between their test images that pass through each third class.

    z: (n, D), codes of the test images; only images that eq. (7) classifies rightly are taken, LINES pairs of them at random.
    Returns {"6-9": {"4": 0.6, …}, …}, the most frequent class first; None for two classes of which one has no such image.
    """
    labels = data.test_labels.to(z.device)
    right = trained.classify(z) == labels
    generator = run.generator(seed, "between")
    t = torch.linspace(0, 1, POINTS, device=z.device)[:, None, None]
    shares = {}
    for s, e in combinations(range(data.n_classes), 2):
        ends = []
        for k in (s, e):
            members = (right & (labels == k)).nonzero()[:, 0]
            if len(members):
                ends.append(z[members[torch.randint(len(members), (LINES,), generator=generator).to(z.device)]])
        passed = Counter() if len(ends) == 2 else None
        if passed is not None:
            on_line = trained.classify((ends[0] + t * (ends[1] - ends[0])).flatten(0, 1)).view(POINTS, LINES)
            for k in set(range(data.n_classes)) - {s, e}:
                share = (on_line == k).any(0).float().mean().item()
                if share:
                    passed[data.class_names[k]] = share
        shares[f"{data.class_names[s]}-{data.class_names[e]}"] = None if passed is None else dict(passed.most_common())
    return shares


# ------------------------------------------------------------------------------------------------------------- figures


def figures(trained: Trained, data: Dataset, z: Tensor, details: dict, folder: Path, seed: int) -> None:
    """Figures 3 to 8 for this data set, the geometry of the latent space, and the course of training. z: (n, D), test codes."""
    names, means = data.class_names, trained.means
    k, labelled, own = len(means), bool(trained.config.labelled_per_batch), "mixture" in trained.networks
    real = not data.name.startswith("celeba")  # its terms forbid passing images on, and figures are committed
    generator = run.generator(seed, "figures")
    assigned = trained.classify(z)

    noise = torch.randn(k * 10, trained.config.latent_dim, generator=generator).to(z.device)
    samples = trained.decode(trained.system.place(trained.networks, noise, torch.arange(k, device=z.device).repeat_interleave(10)))
    rows = list(names) if labelled else [f"component {i}" for i in range(k)]
    plots.save_labelled_grid(samples, folder / "samples.png", 10, "Samples of each component (Figs. 3-5)", rows)

    def one_of(class_: int, classes: Tensor) -> int:
        """A random test image that is of this class in `classes` (n,), or any image where there is none."""
        members = (classes == class_).nonzero()[:, 0]
        members = members if len(members) else torch.arange(len(z))
        return int(members[torch.randint(len(members), (1,), generator=generator)])

    def other_than(class_: int, n: int) -> int:
        return (class_ + 1 + int(torch.randint(n - 1, (1,), generator=generator))) % n

    def with_originals(first: Tensor, codes: Tensor, last: Tensor | None = None) -> Tensor:
        """Rows of real image, decoded codes (rows, columns, D), real image; of faces the decoded ones alone."""
        decoded = trained.decode(codes.flatten(0, 1)).cpu().unflatten(0, codes.shape[:2])
        if not real:
            return decoded.flatten(0, 1)
        parts = [as_input(first)[:, None], decoded] + ([as_input(last)[:, None]] if last is not None else [])
        return torch.cat(parts, 1).flatten(0, 1)

    # Fig. 6: the first row goes from 6 to 9 where there are such classes, as in the paper.
    n = data.n_classes
    pairs = [(s, other_than(s, n)) for s in range(n)]
    pairs[0] = (6, 9) if n == 10 else pairs[0]
    first, last = (torch.tensor([one_of(pair[i], data.test_labels) for pair in pairs]) for i in (0, 1))
    steps = torch.linspace(0, 1, 9, device=z.device)
    line = z[first][:, None] + steps[None, :, None] * (z[last] - z[first])[:, None]
    plots.save_labelled_grid(
        with_originals(data.test_images[first], line, data.test_images[last]),
        folder / "interpolations.png",
        11 if real else 9,
        "Interpolations between test images (Fig. 6)" + (": first and last are real" if real else ""),
        [f"{names[s]} to {names[e]}" for s, e in pairs],
    )

    if labelled:
        chosen = torch.tensor([one_of(s, assigned) for s in range(k)])
        source, target = assigned[chosen], torch.tensor([other_than(s, k) for s in range(k)]).to(z.device)
        path = torch.stack([model.transfer_style(z[chosen], source, target, means, t) for t in steps.tolist()], 1)
        plots.save_labelled_grid(
            with_originals(data.test_images[chosen], path),
            folder / "style_transfer.png",
            10 if real else 9,
            "Continuous style transfer, " + ("z + t (μ_t - μ_s), eq. (10), Fig. 7" if own else "the class alone moves, Fig. 7"),
            [f"{names[s]} to {names[e]}" for s, e in zip(source.tolist(), target.tolist(), strict=True)],
            ["real"] * real + [f"t={t:.2g}" for t in steps.tolist()],
        )

    if labelled and own:
        # Fig. 8, with the paper's anti-targets on faces; elsewhere the nearest other class, which one is most easily taken for.
        if data.name.startswith("celeba"):
            chosen = torch.tensor([one_of(s, assigned) for s, _ in ANTI_TARGETS])
            source, anti_target = assigned[chosen], torch.tensor([t for _, t in ANTI_TARGETS]).to(z.device)
        else:
            anti_target = torch.cdist(means, means).fill_diagonal_(float("inf")).argmin(1)[source]
        alphas = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
        path = torch.stack([model.intensify(z[chosen], source, anti_target, means, alpha) for alpha in alphas], 1)
        plots.save_labelled_grid(
            with_originals(data.test_images[chosen], path),
            folder / "intensity.png",
            8 if real else 7,
            "Class intensity, z + α (μ_s - μ_t), eq. (11), Fig. 8 (the paper's α is 0.5)",
            [f"{names[s]}, away from {names[e]}" for s, e in zip(source.tolist(), anti_target.tolist(), strict=True)],
            ["real"] * real + [f"α={alpha:g}" for alpha in alphas],
        )
        geometry_figures(details, names, folder)

    if "sampled_distance" in details:
        rows, timing = details["sampled_distance"][1:], details["timing"]
        n = [row["n"] for row in rows]
        noise, times = [row["gradient_noise"] for row in rows], [row["milliseconds"] for row in timing]
        curves = {
            "noise of the sampled gradient (closed form: 0)": (n, noise),
            f"milliseconds, sampled (closed form: {times[0]:.2g})": (n, times[1:]),
        }
        plots.save_curves(curves, folder / "closed_form.png", "samples of the mixture in a sampled MMD", log=True)

    history = trained.state["rows"]
    shown = {
        "test error, %": "test_error",
        "MSE, eq. (1)": "mse",
        "cross-entropy of the pixels, nats": "bernoulli",
        "d², eq. (8)": "d2",
        "mean ‖μ_k‖": "mean_norm",
        "bound of M1, nats": "m1_bound",
        "bound, unlabelled, nats": "unlabelled_bound",
        "cross-entropy, nats": "cross_entropy",
    }
    curves = {title: [(row["epoch"], row[key]) for row in history if key in row] for title, key in shown.items()}
    curves = {title: tuple(zip(*points, strict=True)) for title, points in curves.items() if points}
    plots.save_curves(curves, folder / "training.png", "epoch")


def geometry_figures(details: dict, names: tuple[str, ...], folder: Path) -> None:
    """The distances between the means, and the classes that lie between classes."""
    distances = torch.tensor(details["mean_distances"])
    text = [["" if i == j else f"{d:.1f}" for j, d in enumerate(row)] for i, row in enumerate(details["mean_distances"])]
    plots.save_matrix(distances, folder / "means.png", names, "Distances between the means", text, "‖μ_k - μ_l‖")

    shares = torch.zeros(len(names), len(names))
    text = [[""] * len(names) for _ in names]
    for i, j in combinations(range(len(names)), 2):
        for name, share in list((details["between"][f"{names[i]}-{names[j]}"] or {}).items())[:1]:
            shares[i, j] = shares[j, i] = 100 * share
            text[i][j] = text[j][i] = f"{name}: {100 * share:.0f}"
    title = "The third class that most lines between two classes pass through, and % of lines"
    plots.save_matrix(shares, folder / "between.png", names, title, text, "% of lines")


def main(argv: list[str] | None = None) -> None:
    run.evaluate_from("segma", evaluate, argv)


if __name__ == "__main__":
    run.exit_with(main)
