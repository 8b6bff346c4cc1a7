"""Every table and figure of the SeGMA paper from a trained run.

    python -m segma.eval mnist --seed 0 --data data

Writes eval.json and figures/ into the run's folder. Tables I and III need the Inception weights; without them FID is left out.
"""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor, nn

from common import inception, plots, run
from common.data import Dataset, choose_labels, load
from common.metrics import error_rate, frechet_distance, moments, nearest_neighbour
from segma import model
from segma.train import Config, as_input, encode

FID_SAMPLES = 10_000  # Sec. VI-B and VI-C
LINES = 200  # interpolation lines between each two classes
POINTS = 41  # on each line, when the classes along it are counted


@dataclass(frozen=True)
class Segma:
    """A trained run. Codes z are (n, D) float32; images go in as uint8 (n, C, H, W) and come out as floats in [0, 1]."""

    config: Config
    encoder: nn.Module
    decoder: nn.Module
    mixture: model.Mixture
    state: dict  # the checkpoint

    @property
    def means(self) -> Tensor:
        """μ_k (K, D)."""
        return self.mixture.means.detach()

    def encode(self, images: Tensor) -> Tensor:
        return encode(self.encoder, images.to(self.means.device))

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        return torch.cat([self.decoder(part) for part in z.split(1000)])

    def classify(self, z: Tensor) -> Tensor:
        """The most probable class (n,), eq. (7)."""
        return model.classify(z, self.means, self.mixture.priors)

    def sample(self, n: int, component: int | None = None, seed: int = 0) -> Tensor:
        """n images of one component, or of the whole mixture in proportion to the priors (component None)."""
        generator = run.generator(seed, "sample")
        z, components = self.mixture.sample(n, generator)
        if component is not None:
            z = z - self.means[components.to(z.device)] + self.means[component]
        return self.decode(z)


def load_run(folder: str | Path, device: str | torch.device = "cpu") -> Segma:
    """The run in `folder`, as far as its last checkpoint. Raises UserError where there is none, or it is damaged."""
    state = run.load_checkpoint(Path(folder) / "checkpoint.pt")
    if state is None:
        raise run.UserError(f"{folder}: no trained run here (no checkpoint.pt)")
    config = run.make_config(Config, state["config"], str(folder))
    networks = model.build(config)
    for name, network in networks.items():
        network.load_state_dict(state["networks"][name])
        network.to(device).eval().requires_grad_(False)
    return Segma(config, **networks, state=state)


def evaluate(options: run.Options, weights: Path | None = None) -> dict:
    """Evaluate one run: metrics and details, written to eval.json, and the figures. weights: the Inception file, if named."""
    device, folder = run.set_up(options), options.folder("segma")
    segma = load_run(folder, device)
    data = load(segma.config.dataset, options.data, options.unofficial_data)
    if data.digest != segma.state["identity"]["data_digest"]:
        raise run.UserError(f"{folder}: trained on {data.name} with digest {segma.state['identity']['data_digest']}, found {data.digest}")
    z = segma.encode(data.test_images)
    metrics = {**table_ii(segma, data, z, options.seed), **quality(segma, data, z)}
    scores, extractor = tables_i_and_iii(segma, data, z, options, weights)
    geometry = {"mean_distances": mean_distances(segma), **nearest_classes(segma, data), "between": between(segma, data, z, options.seed)}
    if data.name in ("digits", "mnist"):  # Sec. VI-C: 4 lies between 6 and 9
        metrics["lines_6_to_9_through_4"] = 100 * geometry["between"]["6-9"].get("4", 0.0)
    figures(segma, data, z, geometry, folder / "figures", options.seed)
    result = {
        "experiment": options.experiment,
        "seed": options.seed,
        "metrics": metrics | scores,
        "config": dataclasses.asdict(segma.config),
        "config_hash": run.config_hash(segma.config),
        "provenance": run.provenance(segma.state) | {"inception": extractor, "evaluation": run.session(device)},
        "details": geometry,
    }
    run.write_json(folder / "eval.json", result)
    return result


# -------------------------------------------------------------------------------------------------------------- tables


def table_ii(segma: Segma, data: Dataset, z: Tensor, seed: int) -> dict[str, float]:
    """Test error in percent by eq. (7), and for scale that of the nearest neighbour among the same labelled images.

    z: (n, D), the codes of the test images.
    """
    config = segma.config
    known = choose_labels(data.train_labels, config.n_labels, config.labels, data.n_classes, seed)
    neighbour = nearest_neighbour(as_input(data.train_images[known]), data.train_labels[known], as_input(data.test_images))
    return {
        "test_error": error_rate(segma.classify(z).cpu(), data.test_labels),
        "nearest_neighbour_error": error_rate(neighbour, data.test_labels),
    }


def quality(segma: Segma, data: Dataset, z: Tensor) -> dict[str, float]:
    """Reconstruction error, eq. (1), and distance d², eq. (8), on the test set, with the γ of training."""
    config = segma.config
    gamma = model.silverman_bandwidth(config.codes_per_batch / config.n_components)
    codes, means, priors = z.double(), segma.means.double(), segma.mixture.priors.double()
    return {
        "reconstruction_error": model.reconstruction_error(as_input(data.test_images), segma.decode(z).cpu()).item(),
        "distance": model.cramer_wold_distance(codes, means, priors, gamma).item(),
    }


def tables_i_and_iii(
    segma: Segma, data: Dataset, z: Tensor, options: run.Options, weights: Path | None
) -> tuple[dict[str, float], str | None]:
    """FID of 10,000 samples of the mixture (Table I) and of 10,000 points between test images (Table III).

    Against the training set's statistics, and (_test) the test set's. Returns the scores and the extractor's name, or {} and
    None, having said why, where they cannot be computed.
    """
    if min(len(data.train_images), len(data.test_images)) < inception.FEATURES:
        print(f"FID left out: {data.name} has fewer images than the {inception.FEATURES} features whose covariance it needs")
        return {}, None
    path, reason = inception.find_weights(weights)
    if path is None:
        print(f"FID left out: {reason}")
        return {}, None
    network = inception.extractor(path, z.device)
    cache = options.runs / "cache"
    real = {
        "": inception.cached_moments(network, data.train_images, cache, f"{data.name}-train-{data.digest}"),
        "_test": inception.cached_moments(network, data.test_images, cache, f"{data.name}-test-{data.digest}"),
    }
    made = {
        "fid": segma.decode(segma.mixture.sample(FID_SAMPLES, run.generator(options.seed, "fid"))[0]),
        "fid_interpolation": segma.decode(points_between(z, run.generator(options.seed, "fid interpolation"))),
    }
    scores = {}
    for name, images in made.items():
        statistics = moments(inception.features(network, to_bytes(images)))
        for against, reference in real.items():
            scores[name + against] = frechet_distance(statistics, reference)
    return scores, f"Inception 2015-12-05, {inception.SHA256_PREFIX}"


def points_between(z: Tensor, generator: torch.Generator) -> Tensor:
    """10,000 codes (10000, D), each at t ~ U(0, 1) between two random codes of z (n, D): 10 × 1,000 pairs without replacement."""
    size = FID_SAMPLES // 10
    parts = []
    for _ in range(10):
        first, second = torch.randperm(len(z), generator=generator)[: 2 * size].view(2, size).to(z.device)
        t = torch.rand(size, 1, generator=generator).to(z.device)
        parts.append(z[first] + t * (z[second] - z[first]))
    return torch.cat(parts)


def to_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8, clipped and truncated as the authors' code does."""
    return (images.clamp(0, 1) * 255).to(torch.uint8).cpu()


# ------------------------------------------------------------------------------------ the geometry of the latent space


def mean_distances(segma: Segma) -> list[list[float]]:
    """‖μ_k - μ_l‖ for all pairs, K × K."""
    return torch.cdist(segma.means, segma.means).tolist()


def nearest_classes(segma: Segma, data: Dataset) -> dict:
    """Each class's nearest neighbour by the distance between the means."""
    distances = torch.cdist(segma.means, segma.means).fill_diagonal_(float("inf"))
    names = data.class_names
    return {"nearest_class": {names[k]: names[int(nearest)] for k, nearest in enumerate(distances.argmin(1))}}


def between(segma: Segma, data: Dataset, z: Tensor, seed: int) -> dict[str, dict[str, float]]:
    """For each two classes, the share of straight lines between their test images that pass through each third class.

    z: (n, D), codes of the test images; only images that eq. (7) classifies rightly are taken, LINES pairs of them at random.
    Returns {"6-9": {"4": 0.6, …}, …}, the most frequent class first; empty where a class has no such image.
    """
    labels = data.test_labels.to(z.device)
    right = segma.classify(z) == labels
    generator = run.generator(seed, "between")
    t = torch.linspace(0, 1, POINTS, device=z.device)[:, None, None]
    shares = {}
    for s, e in combinations(range(data.n_classes), 2):
        ends = []
        for k in (s, e):
            members = (right & (labels == k)).nonzero()[:, 0]
            if len(members):
                ends.append(z[members[torch.randint(len(members), (LINES,), generator=generator).to(z.device)]])
        passed = Counter()
        if len(ends) == 2:
            on_line = segma.classify((ends[0] + t * (ends[1] - ends[0])).flatten(0, 1)).view(POINTS, LINES)
            for k in set(range(data.n_classes)) - {s, e}:
                share = (on_line == k).any(0).float().mean().item()
                if share:
                    passed[data.class_names[k]] = share
        shares[f"{data.class_names[s]}-{data.class_names[e]}"] = dict(passed.most_common())
    return shares


# ------------------------------------------------------------------------------------------------------------- figures


def figures(segma: Segma, data: Dataset, z: Tensor, geometry: dict, folder: Path, seed: int) -> None:
    """Figures 3 to 8 for this data set, the matrices of the geometry, and the course of training. z: (n, D), test codes."""
    names, means = data.class_names, segma.means
    k = len(means)
    generator = run.generator(seed, "figures")
    assigned = segma.classify(z)

    noise = torch.randn(k, 10, z.shape[1], generator=generator).to(z.device)
    samples = segma.decode((means[:, None] + noise).flatten(0, 1))
    plots.save_labelled_grid(samples, folder / "samples.png", 10, "Samples of each component (Figs. 3-5)", names)

    def one_of(class_: int, classes: Tensor) -> int:
        """A random test image that is of this class in `classes` (n,), or any image where there is none."""
        members = (classes == class_).nonzero()[:, 0]
        members = members if len(members) else torch.arange(len(z))
        return int(members[torch.randint(len(members), (1,), generator=generator)])

    def other_than(class_: int) -> int:
        return (class_ + 1 + int(torch.randint(k - 1, (1,), generator=generator))) % k

    def with_originals(first: Tensor, codes: Tensor, last: Tensor | None = None) -> Tensor:
        """Rows of real image, decoded codes (rows, columns, D), real image."""
        decoded = segma.decode(codes.flatten(0, 1)).cpu().unflatten(0, codes.shape[:2])
        parts = [as_input(first)[:, None], decoded] + ([as_input(last)[:, None]] if last is not None else [])
        return torch.cat(parts, 1).flatten(0, 1)

    # Fig. 6: the first row goes from 6 to 9 where there are such classes, as in the paper.
    sources = list(range(k))
    pairs = [(6, 9), *((s, other_than(s)) for s in sources[1:])] if k == 10 else [(s, other_than(s)) for s in sources]
    first, last = (torch.tensor([one_of(pair[i], data.test_labels) for pair in pairs]) for i in (0, 1))
    steps = torch.linspace(0, 1, 9, device=z.device)
    line = z[first][:, None] + steps[None, :, None] * (z[last] - z[first])[:, None]
    plots.save_labelled_grid(
        with_originals(data.test_images[first], line, data.test_images[last]),
        folder / "interpolations.png",
        11,
        "Interpolations between test images (Fig. 6): first and last are real",
        [f"{names[s]} to {names[e]}" for s, e in pairs],
    )

    chosen = torch.tensor([one_of(s, assigned) for s in sources])
    source, target = assigned[chosen], torch.tensor([other_than(s) for s in sources]).to(z.device)
    path = torch.stack([model.transfer_style(z[chosen], source, target, means, t) for t in steps.tolist()], 1)
    plots.save_labelled_grid(
        with_originals(data.test_images[chosen], path),
        folder / "style_transfer.png",
        10,
        "Continuous style transfer, z + t (μ_t - μ_s), eq. (10), Fig. 7",
        [f"{names[s]} to {names[e]}" for s, e in zip(source.tolist(), target.tolist(), strict=True)],
        ["real", *(f"t={t:.2g}" for t in steps.tolist())],
    )

    # Fig. 8: away from the nearest other class, the one that it is most easily taken for.
    anti_target = torch.cdist(means, means).fill_diagonal_(float("inf")).argmin(1)[source]
    alphas = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
    path = torch.stack([model.intensify(z[chosen], source, anti_target, means, alpha) for alpha in alphas], 1)
    plots.save_labelled_grid(
        with_originals(data.test_images[chosen], path),
        folder / "intensity.png",
        8,
        "Class intensity, z + α (μ_s - μ_t), eq. (11), Fig. 8",
        [f"{names[s]}, away from {names[e]}" for s, e in zip(source.tolist(), anti_target.tolist(), strict=True)],
        ["real", *(f"α={alpha:g}" for alpha in alphas)],
    )

    distances = torch.tensor(geometry["mean_distances"])
    text = [["" if i == j else f"{d:.1f}" for j, d in enumerate(row)] for i, row in enumerate(geometry["mean_distances"])]
    plots.save_matrix(distances, folder / "means.png", names, "Distances between the means", text, "‖μ_k - μ_l‖")

    shares = torch.zeros(k, k)
    text = [[""] * k for _ in range(k)]
    for i, j in combinations(range(k), 2):
        for name, share in list(geometry["between"][f"{names[i]}-{names[j]}"].items())[:1]:
            shares[i, j] = shares[j, i] = 100 * share
            text[i][j] = text[j][i] = f"{name}: {100 * share:.0f}"
    title = "The third class that most lines between two classes pass through, and % of lines"
    plots.save_matrix(shares, folder / "between.png", names, title, text, "% of lines")

    rows = segma.state["rows"]
    epochs = [row["epoch"] for row in rows]
    shown = {"test error, %": "test_error", "MSE, eq. (1)": "mse", "d², eq. (8)": "d2", "mean ‖μ_k‖": "mean_norm"}
    plots.save_curves({title: (epochs, [row[key] for row in rows]) for title, key in shown.items()}, folder / "training.png", "epoch")


def main(argv: list[str] | None = None) -> None:
    parser = run.Parser(prog="python -m segma.eval")
    run.add_options(parser, "segma")
    parser.add_argument("--inception", type=run.as_path, help="the Inception weights; default: torch's hub folder, downloaded once")
    namespace = vars(parser.parse_all(argv))
    weights = namespace.pop("inception")
    options = run.Options(**namespace)
    run.check_experiment("segma", options.experiment)
    result = evaluate(options, weights)
    folder = options.folder("segma")
    done, asked = result["provenance"]["epochs"], result["config"]["epochs"]
    print(f"segma {options.experiment}, seed {options.seed}, {done} of {asked} epochs on {result['provenance']['data']}:")
    for name, value in result["metrics"].items():
        print(f"  {name:<26}{value:.4g}")
    print(f"numbers in {folder / 'eval.json'}, pictures in {folder / 'figures'}; next: make diff")


if __name__ == "__main__":
    run.exit_with(main)
