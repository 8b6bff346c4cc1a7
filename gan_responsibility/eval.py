"""Every table and figure of the responsibility paper that one trained run gives.

    python -m gan_responsibility.eval mnist --seed 0 --data data

Writes eval.json and figures/ into the run's folder. Table 6's scores need the Inception weights; without them they are left out.
"""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from common import plots, run
from common.data import Dataset, load
from common.metrics import contingency
from gan_responsibility.model import shares
from gan_responsibility.scores import JUDGE, Scorer
from gan_responsibility.train import Task, all_responsibilities, clustering, drawn_from, mode_weights, sampled

STEPS = 9  # images from one Gaussian to another, Fig. 2; along a side of the triangle, Fig. 3
CURVES = (
    "d_loss", "g_loss", "information", "alpha_entropy", "alpha_information", "largest_weight", "accuracy", "nmi", "inception_score", "fid",
)  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """A trained run."""

    config: Task
    system: ModuleType  # gan_responsibility.train or gan_responsibility.gan
    networks: dict[str, nn.Module]
    state: dict  # the checkpoint

    @property
    def device(self) -> torch.device:
        return next(self.networks["generator"].parameters()).device

    def responsibilities(self, images: Tensor) -> Tensor:
        """p(k|x), (N, K), of uint8 images (N, C, H, W)."""
        return all_responsibilities(self.system, self.networks, images.to(self.device))

    def sample(self, weights: Tensor, seed: int = 0, same_noise: bool = False) -> Tensor:
        """Images (N, C, H, W) in [0, 1] from weights of the Gaussians (N, K); same_noise: one ε for all (Sec. 3.2)."""
        noise = run.generator(seed, "sample")
        if not same_noise:
            return (sampled(self.system, self.networks, self.config, weights, noise) + 1) / 2
        epsilon = torch.randn(1, self.config.latent_dim, generator=noise).expand(len(weights), -1)
        with torch.no_grad():
            made = self.system.generate(self.networks, epsilon.to(self.device), weights.to(self.device)).cpu()
        return (made + 1) / 2


def load_run(folder: str | Path, device: str | torch.device = "cpu") -> Trained:
    """The run in `folder`, as far as its last checkpoint. Raises UserError where there is none, or it is damaged."""
    return Trained(*run.trained("gan_responsibility", Path(folder), torch.device(device)))


def evaluate(options: run.Options) -> dict:
    """Evaluate one run: its metrics, written to eval.json, and its figures."""
    device, folder = run.set_up(options), options.folder("gan_responsibility")
    trained = load_run(folder, device)
    data = load(trained.config.dataset, options.data, options.unofficial_data)
    run.check_data(folder, trained.state, data)
    metrics = dict(trained.system.counts(trained.config))
    if hasattr(trained.system, "responsibilities"):
        metrics |= what_c_learned(trained, data)
    scorer = Scorer.find(data, options, device)
    if scorer:
        metrics |= table_6(trained, data, scorer, options.seed)
    result = run.record(options, trained.config, trained.state, metrics, device, inception=JUDGE if scorer else None)
    run.write_json(folder / "eval.json", result)
    figures(trained, folder / "figures", options.seed)
    return result


def what_c_learned(trained: Trained, data: Dataset) -> dict[str, float]:
    """The claims of Sec. 1, measured: does argmax p(k|x) give the classes, and do the mean responsibilities give their frequencies?

    ACC and NMI on the test images, and (_train) the training images; on the test images the entropy of p(k|x) and what k tells of x, as
    shares of log K, and the largest mean responsibility. Over the training images the learned weight of each mode and, under ACC's
    pairing of Gaussians with classes, the frequency of its class; weight_error: half the sum of the differences (0: the weights are
    right), of the mean of p(k|x), of argmax p(k|x) (_hard), and of 1/K for every mode (_uniform), which is right where classes are equal.
    """
    alpha = trained.responsibilities(data.test_images)
    found = clustering(alpha, data.test_labels, data.n_classes)
    found |= {name: share.item() for name, share in shares(alpha).items()}
    on_train = trained.responsibilities(data.train_images)
    found |= {f"{name}_train": value for name, value in clustering(on_train, data.train_labels, data.n_classes).items()}
    if alpha.shape[1] == data.n_classes:
        found |= mode_weights_against_classes(on_train, data.train_labels)
    return found


def mode_weights_against_classes(alpha: Tensor, labels: Tensor) -> dict[str, float]:
    """The weights of the modes by alpha (N, K) and the frequencies of the classes by labels (N,), N = K, paired as ACC pairs them."""
    from scipy.optimize import linear_sum_assignment

    k = alpha.shape[1]
    _, paired = linear_sum_assignment(contingency(alpha.argmax(1), labels, k, k).numpy(), maximize=True)
    frequencies = (labels.bincount(minlength=k).double() / len(labels))[torch.from_numpy(paired)]
    soft, hard = alpha.double().mean(0), alpha.argmax(1).bincount(minlength=k).double() / len(alpha)
    found = {}
    for suffix, weights in (("", soft), ("_hard", hard), ("_uniform", torch.full((k,), 1 / k, dtype=torch.float64))):
        found[f"weight_error{suffix}"] = 0.5 * (weights - frequencies).abs().sum().item()  # the total variation
    found |= {f"weight_of_{i}": soft[i].item() for i in range(k)}
    return found | {f"frequency_of_{i}": frequencies[i].item() for i in range(k)}


def table_6(trained: Trained, data: Dataset, scorer: Scorer, seed: int) -> dict[str, float]:
    """Inception Score and FID of the last epoch, and the best of those noted while training, which is what the table prints."""
    weights = mode_weights(trained.system, trained.networks, trained.config, data.train_images.to(trained.device))
    found = scorer.scores(lambda n: drawn_from(trained.system, trained.networks, trained.config, weights, n, seed))
    rows = [row for row in trained.state["rows"] if "fid" in row]
    if rows:
        best = max(rows, key=lambda row: row["inception_score"])
        found |= {"inception_score_best": best["inception_score"], "inception_score_best_deviation": best["inception_score_deviation"]}
        found["fid_best"] = min(row["fid"] for row in rows)
        found |= {f"{name}_after_{row['epoch']}": row[name] for row in rows for name in ("inception_score", "fid")}  # Fig. 4
    else:
        print("the best scores over epochs left out: this run was trained without the Inception weights")
    return found | scorer.of_real_images(data, seed)


# ------------------------------------------------------------------------------------------------------------- figures


def figures(trained: Trained, folder: Path, seed: int) -> None:
    """Samples of each Gaussian and the way from one to the next (Fig. 2), three Gaussians (Fig. 3), the course of training."""
    k = trained.config.components
    plots.save_course(trained.state["rows"], folder / "training.png", CURVES)
    made = trained.sample(torch.eye(k).repeat_interleave(10, 0), seed)
    if "mixture" not in trained.networks:
        plots.save_labelled_grid(made, folder / "samples.png", 10, "Samples (Fig. 2, left)")
        return
    plots.save_labelled_grid(made, folder / "samples.png", 10, "Samples (Fig. 2, left)", [f"Gaussian {i}" for i in range(k)])
    labels = [f"{i} to {(i + 1) % k}" for i in range(k)]
    made = trained.sample(from_one_to_the_next(k), seed, same_noise=True)
    plots.save_labelled_grid(made, folder / "interpolations.png", STEPS, "From Gaussian to Gaussian, the same ε (Fig. 2, right)", labels)
    if k < 3:
        return
    made = trained.sample(triangle(k), seed, same_noise=True)
    plots.save_labelled_grid(made, folder / "triangle.png", STEPS, "Between Gaussians 0 (top left), 1 (right) and 2 (below) (Fig. 3)")


def from_one_to_the_next(k: int) -> Tensor:
    """Weights (K · STEPS, K) from each Gaussian, by equal steps, to the next, and from the last to the first."""
    own, t = torch.eye(k), torch.linspace(0, 1, STEPS)[:, None]
    return torch.cat([(1 - t) * own[i] + t * own[(i + 1) % k] for i in range(k)])


def triangle(k: int) -> Tensor:
    """Weights (STEPS², K) on a square grid: Gaussian 1's grows to the right, 2's downwards, and 0 has the rest.

    Beyond the diagonal nothing is left for 0, and the two share all of it.
    """
    side = torch.linspace(0, 1, STEPS)
    down, right = torch.meshgrid(side, side, indexing="ij")
    total = (down + right).clamp(min=1)
    weights = torch.zeros(STEPS, STEPS, k)
    weights[..., 1], weights[..., 2] = right / total, down / total
    weights[..., 0] = (1 - down - right).clamp(min=0)
    return weights.flatten(0, 1)


def main(argv: list[str] | None = None) -> None:
    run.evaluate_from("gan_responsibility", evaluate, argv, shown=lambda name: "_of_" not in name and "_after_" not in name)


if __name__ == "__main__":
    run.exit_with(main)
