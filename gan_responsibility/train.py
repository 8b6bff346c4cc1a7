"""GAN-based Gaussian mixture model responsibility learning (ICLR 2020 submission HJgEe1SKPr): Algorithm 1.

    python -m gan_responsibility.train mnist --seed 0 --data data

Run it again to resume; `--describe` prints what would be trained. The two baselines (gan.py) use the same loop.
configs/*.yaml give the source of each value, the README's ledger explains each choice.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor, nn

from common import graph, run
from common.data import Dataset, described, load
from common.plots import save_grid
from common.run import Count, Decay, NonNegative, Positive, Range
from gan_responsibility import toy
from gan_responsibility.model import MixtureGAN, Responsibility, as_input, shares
from gan_responsibility.scores import SAMPLES, Scorer, clustering

SETS = {  # data set: image shape, classes (None: as many as the folder has)
    "toy": ((2,), 3),
    "digits": ((1, 28, 28), 10),
    "mnist": ((1, 28, 28), 10),
    "fashion_mnist": ((1, 28, 28), 10),
    "cifar10": ((3, 32, 32), 10),
    "flowers10": ((3, 64, 64), 10),
    "flowers10_all": ((3, 64, 64), 10),
    "folder": ((1, 28, 28), None),
    "folder_colour": ((3, 64, 64), None),
}


@dataclass(frozen=True)
class Task:
    """The fields that the proposed system and the baselines share."""

    dataset: str = "mnist"  # one of SETS; folder:<path> and folder_colour:<path> are your own images
    networks: Literal["count_matched", "as_printed"] = "count_matched"  # the reading of Table 3
    n_components: Annotated[int, Range(2)] | None = 10  # K, Gaussians; None: as many as classes
    latent_dim: Count = 100  # D_z
    mean_range: NonNegative = 0.1  # initial μ_k ~ U[-this, this]^D_z
    deviation: Positive = 0.15  # initial A_k = this · I
    batch: Annotated[int, Range(2)] = 64  # M, real images per step; the last batch of an epoch may be smaller
    learning_rate: Positive = 2.0e-4  # γ of Adam, constant
    beta1: Decay = 0.5  # β1 of Adam; β2 is 0.999
    epochs: Count = 200  # passes over the training set
    validation: Annotated[int, Range(0)] = 0  # training images held out; scores use them instead of the test set
    thinned: bool = False  # class c keeps all, half or a quarter of its images if c mod 3 is 0, 1 or 2
    score_every: Count = 10  # epochs between two Inception Scores and FIDs, if the weights are there

    LEFT_TO_DATA = ("n_components",)  # fields that the data fill in if the config has null

    def __post_init__(self):
        described(self.dataset, SETS)

    @property
    def shape(self) -> tuple[int, ...]:
        return described(self.dataset, SETS)[0]

    @property
    def components(self) -> int:
        """K; 2 if the folder that tells it has not been read yet."""
        return self.n_components or described(self.dataset, SETS)[1] or 2


@dataclass(frozen=True)
class Config(Task):
    """The fields of the proposed system."""

    classifier: Literal["shared", "standalone"] = "shared"  # C: a layer on D's features, or a network of its own
    mixture: Literal["dynamic", "static"] = "dynamic"  # whether μ and A are trained, with G; static: they stay as drawn
    saturating: bool = False  # G minimises log(1 - D); otherwise -log D
    target: Literal["alpha", "component"] = "alpha"  # in eq. (4): the real image's α for every k, or k itself
    information_moves: Literal["classifier", "all"] = "classifier"  # Algorithm 1, line 13; all: G, μ, A too, Sec. 2.4
    adversarial_moves_classifier: bool = True  # through α, Algorithm 1, line 12
    alpha_in_information: Literal["fixed", "trained"] = "fixed"  # trained: the cross-entropy of eq. (4) moves α too
    class_entropy: Literal["left_out", "batch", "image"] = "left_out"  # H(c) of eq. (4): of a batch's mean α, or each α
    classifier_learning_rate: Positive | None = None  # γ of C's Adam; None: as the others
    classifier_moves_encoder: bool = False  # whether C's losses also move a shared encoder, which belongs to D

    def __post_init__(self):
        super().__post_init__()
        if self.classifier_moves_encoder and self.classifier != "shared":
            raise ValueError("--classifier-moves-encoder: a stand-alone classifier shares no encoder")

    def build(self) -> Responsibility:
        return Responsibility(self)


class Batch(NamedTuple):
    """The input of a training step."""

    real: Tensor  # (M, C, H, W) in [-1, 1]
    noise: torch.Generator  # a new one for each step, on the device


# --------------------------------------------------------------------------------------------------------- Algorithm 1


def train_step(
    model: Responsibility, optimizers: dict[str, torch.optim.Optimizer], batch: Batch, precision: str = "fp32"
) -> dict[str, Tensor]:
    """One iteration of Algorithm 1, for all M images at once. All gradients are taken before any step (ledger 5).

    Returns scalars on the device: the losses, `model.shares` of α, and the norm of each player's gradient.
    """
    m, k = len(batch.real), model.config.components
    # Without autocast's cache, D's and C's gradients on real images and on fakes are summed in fp32, not in bf16.
    with torch.autocast(batch.real.device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
        on_real, logits = model.forward_d_and_c(batch.real)
        alpha = logits.softmax(-1)  # line 2: (M, K)
        noise = batch.real.new_empty(m, k, model.config.latent_dim).normal_(generator=batch.noise)  # line 4: ε
        z = model.mixture(noise)  # line 5: (M, K, D_z)
        fakes = model.generator(z.flatten(0, 1))  # line 6: (M·K, C, H, W)
        on_fakes, logits_of_fakes = model.forward_d_and_c(fakes)  # line 7
    # Lines 9 and 10.
    d_loss, g_loss, information = model.losses(on_real, on_fakes.view(m, k), logits_of_fakes.view(m, k, k), alpha)

    players = model.players()
    for optimizer in optimizers.values():
        optimizer.zero_grad()
    d_loss.backward(inputs=players["discriminator"], retain_graph=True)  # line 11
    of_generator = g_loss + information if model.config.information_moves == "all" else g_loss
    of_generator.backward(inputs=players["generator"], retain_graph=True)  # line 12: G, μ and A through the fakes
    of_classifier, by_classifier = g_loss + information, players["classifier"]
    if model.config.classifier_moves_encoder:  # C's losses move it, with D's outputs on the fakes held fixed
        verdicts = on_fakes.detach().view(m, k)
        of_classifier = model.losses(on_real, verdicts, logits_of_fakes.view(m, k, k), alpha)[1] + information
        by_classifier = [*by_classifier, *model.encoder.parameters()]  # added to the gradient of D's loss, line 11
    of_classifier.backward(inputs=by_classifier)  # lines 12 and 13: C through α, and by eq. (4)
    for optimizer in optimizers.values():
        optimizer.step()

    terms = {"d_loss": d_loss.detach(), "g_loss": g_loss.detach(), "information": information.detach()}
    return terms | shares(alpha.detach()) | gradient_norms(players)


def gradient_norms(players: dict[str, list[nn.Parameter]]) -> dict[str, Tensor]:
    """The norm of each player's gradient, for the log."""
    return {f"{name}_grad": nn.utils.get_total_norm([p.grad for p in several]) for name, several in players.items()}


# ------------------------------------------------------------------------------------------------------------ the loop


def train(config: Task, options: run.Options, step: Callable = train_step) -> Path:
    """Train or resume one run; returns its folder. step: `train_step`, here or in gan.py."""
    device = run.set_up(options)
    whole = read(config, options)
    data = prepared(whole, config)
    if config.n_components is None:
        config = replace(config, n_components=data.n_classes)
    images = data.train_images.to(device)
    scorer = Scorer.find(whole, options, device)  # its moments are cached, so they are always of the same images

    torch.manual_seed(options.seed)
    model = config.build().to(device, memory_format=torch.channels_last)
    optimizers = {}
    for player, parameters in model.players().items():
        own = config.classifier_learning_rate if player == "classifier" else None  # the baselines have no C
        rate = own or config.learning_rate
        optimizers[player] = torch.optim.Adam(parameters, lr=rate, betas=(config.beta1, 0.999), fused=True)
    replayed = graph.replayed(
        lambda batch: step(model, optimizers, batch, options.precision), optimizers.values(), options.graph
    )
    steps = -(-len(images) // config.batch)
    if len(images) % config.batch == 1:
        steps -= 1  # skip a last batch of one image: a baseline's one fake has no batch statistics in G
    with run.Run("gan_responsibility", config, options, whole.provenance(), device) as r:
        r.resume(model, optimizers, steps)
        while r.epoch < config.epochs:
            order = torch.randperm(len(images), generator=run.generator(options.seed, "order", r.epoch)).to(device)
            while r.step < steps:
                drawn = order[r.step * config.batch :][: config.batch]
                noise = run.generator(options.seed, "noise", r.epoch, r.step, device=device)
                r.after_step(replayed(Batch(as_input(images[drawn]), noise)))
            scored = scorer if (r.epoch + 1) % config.score_every == 0 or r.epoch + 1 == config.epochs else None
            r.after_epoch(**scores_of_epoch(model, data, scored, options.seed))
            say_if_collapsed(r.rows)
            if path := r.sample_path():
                save_samples(model, path, options.seed, r.epoch)
        r.finish()
    return r.folder


def save_samples(model: MixtureGAN, path: Path, seed: int, epoch: int) -> None:
    """Save samples as a PNG: ten images of each Gaussian in a row; for the toy, points over the data."""
    if model.config.dataset == "toy":
        toy.save_samples(model, path, seed, f"after {epoch} epochs")
    else:
        samples = model.sample(torch.eye(model.config.components).repeat_interleave(10, 0), seed)
        save_grid((samples + 1) / 2, path, columns=10)


def read(config: Task, options: run.Options) -> Dataset:
    """The data set as it is on disk. The toy is generated."""
    return toy.dataset() if config.dataset == "toy" else load(config.dataset, options.data, options.unofficial_data)


def prepared(data: Dataset, config: Task) -> Dataset:
    """The data as the config asks for: thinned classes, validation images instead of the test images.

    The draws are the same for every seed. Raises UserError if too few images are left.
    """
    if config.thinned:
        train, test = thinned(data.train_labels), thinned(data.test_labels)
        data = replace(data, train_images=data.train_images[train], train_labels=data.train_labels[train])
        data = replace(data, test_images=data.test_images[test], test_labels=data.test_labels[test])
    wrong, n, held, batch = {}, len(data.train_images), config.validation, config.batch
    if config.n_components is None and data.n_classes < 2:
        wrong[f"--n-components: {data.name} has one class; a mixture needs two"] = "--n-components 2"
    if batch > n - held:
        fit = min(held, n // 5)
        flags = f"--validation {fit} " * (held > fit) + f"--batch {min(batch, n - fit)}"
        without = f" without the {held} of --validation" if held else ""
        wrong[f"--batch: {batch} is more than the {n} training images{without}"] = flags if n > 1 else ""
    run.refuse(wrong)
    if config.validation:
        order = torch.randperm(len(data.train_images), generator=run.generator(0, "validation"))
        held, rest = order[: config.validation], order[config.validation :]
        data = replace(data, test_images=data.train_images[held], test_labels=data.train_labels[held])
        data = replace(data, train_images=data.train_images[rest], train_labels=data.train_labels[rest])
    return data


def thinned(labels: Tensor) -> Tensor:
    """Indices of the images to keep, ascending: all, half or a quarter of class c for c mod 3 = 0, 1 or 2."""
    order = torch.randperm(len(labels), generator=run.generator(0, "thinned"))
    members = [order[labels[order] == c] for c in range(int(labels.max()) + 1)]
    return torch.cat([found[: -(-len(found) // 2 ** (c % 3))] for c, found in enumerate(members)]).sort().values


def scores_of_epoch(model: MixtureGAN, data: Dataset, scorer: Scorer | None, seed: int) -> dict[str, float]:
    """What the log has after an epoch besides the losses. For a model with C: how p(k|x) fits the test images' classes.

    scorer: computes Table 6's scores; None in epochs without them.
    """
    found = {}
    if isinstance(model, Responsibility):
        alpha = model.responsibilities(data.test_images)
        found = clustering(alpha, data.test_labels, data.n_classes)
        found |= {f"test_{name}": share.item() for name, share in shares(alpha).items()}
    if scorer:
        found |= scorer.scores(model.sample_mixture(SAMPLES, model.mode_weights(data.train_images), seed))
    return found


def say_if_collapsed(rows: list[dict[str, float]]) -> None:
    """Print a line if α has become uninformative in this epoch. rows: those of the log."""
    last, before = collapse(rows[-1]), collapse(rows[-2]) if len(rows) > 1 else ""
    if last and not before:
        print(f"epoch {rows[-1]['epoch']}: α does not tell the {last}", flush=True)


def collapse(row: dict[str, float]) -> str:
    """On which images α is uninformative: one Gaussian has all of it, or it is the same for every image. Else "".

    row: one of the log. It describes α on the training batches and, at the end of the epoch, on the test images.
    """
    for prefix, images in (("", "training"), ("test_", "test")):
        weight, information = row.get(f"{prefix}largest_weight", 0.0), row.get(f"{prefix}alpha_information", 1.0)
        if weight > 0.99 or information < 0.01:
            told = f"I(k; x) is {100 * information:.2f} % of log K"
            return f"{images} images apart (one Gaussian has {100 * weight:.1f} % of α, {told})"
    return ""


def main(argv: list[str] | None = None) -> None:
    run.start("gan_responsibility.train", Config, train, argv)


if __name__ == "__main__":
    from gan_responsibility.train import main  # under its own name, so that Config exists once

    run.exit_with(main)
