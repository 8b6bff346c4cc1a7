"""AMM and SAMM: the Adversarially Learned Mixture Model (Jesson et al., 2018). Algorithms 1 and 2.

    python -m amm.train mnist --seed 0 --data data

Run it again to resume; `--describe` prints what would be trained.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor, nn

from amm.model import AMM, as_input
from amm.scores import epoch_row
from common import graph, run
from common.data import Dataset, described, draw_labels, load
from common.plots import save_grid
from common.run import Count, Decay, NonNegative, Positive, Range

SETS = {  # data set: image shape, classes (None: as many as the folder has)
    "digits": ((1, 28, 28), 10),
    "mnist": ((1, 28, 28), 10),
    "fashion_mnist": ((1, 28, 28), 10),
    "svhn": ((3, 32, 32), 10),
    "svhn_extra": ((3, 32, 32), 10),
    "folder": ((1, 28, 28), None),
}
SVHN_TRAIN = 73_257  # images of the train part, which are the first ones of svhn_extra


@dataclass(frozen=True)
class Config:
    """configs/*.yaml give the source of each value, the README's ledger explains each choice."""

    dataset: str = "mnist"  # one of SETS; folder:<path>: your own images
    n_components: Annotated[int, Range(2)] = 10  # K
    latent_dim: Count = 64  # dimension of z
    factorisation: Literal["eq7", "eq6"] = "eq7"  # q(z|x) q(y|x, z), as in the tables; q(y|x) q(z|x, y), Algorithm 1
    variance: Literal["unit", "learned"] = "unit"  # variance of the components; Tables 4 and 8
    y_noise: Literal["learned", "none"] = "learned"  # noise of h_y: σ_y of eq. (8); none: ỹ = softmax(μ_y)
    y_samples: Count = 1  # T draws of h_y: ỹ is the mean of their softmaxes; eq. (9) has T = 1
    semi_supervised: bool = False  # SAMM, Algorithm 2
    n_labels: Count = 1000  # SAMM: training images whose class is known
    labels: Literal["random", "stratified", "first"] = "random"  # which ones
    penalty: NonNegative = 10.0  # λ of eq. (18)
    penalty_norm: Literal["joint", "each", "probability"] = "joint"  # in (x, y, z); in each of them; of σ(D)
    penalty_ends: Literal["joints", "sources"] = "joints"  # (x, ỹ, z̃) to (x̃, y, z); or (x, y, z) to (x̃, ỹ, z̃)
    discriminator_dropout: Literal["printed", "none"] = "printed"  # in D: Table 6 has 0.2, Table 10 has 0.1
    batch: Annotated[int, Range(2)] = 100  # M, images of each kind per step
    learning_rate: Positive = 2.0e-4  # α of Adam
    discriminator_learning_rate: Positive | None = None  # that of D; None: as the others
    decay_from: Count | None = None  # epoch from which the rates fall linearly to 0 at the end; None: never
    beta1: Decay = 0.5  # β1 of Adam; β2 is 0.999
    validation: Annotated[int, Range(0)] = 5000  # training images held out
    held_out: Literal["random", "last"] = "random"  # which ones
    averaged_weights: Annotated[int, Range(0)] = 0  # horizon of a moving average of the weights, in steps; 0: none
    epochs: Count = 200  # passes over the training images

    def __post_init__(self):
        described(self.dataset, SETS)
        if self.y_noise == "none" and self.y_samples != Config.y_samples:
            raise ValueError("--y-samples: of no influence without noise; leave it at 1, or take --y-noise learned")
        if not self.semi_supervised and (self.n_labels, self.labels) != (Config.n_labels, Config.labels):
            only = f"leave them at {Config.n_labels} and {Config.labels}"
            raise ValueError(f"--n-labels, --labels: of no influence without --semi-supervised true; {only}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return described(self.dataset, SETS)[0]

    def build(self) -> nn.Module:
        return AMM(self)


class Batch(NamedTuple):
    """The input of a training step. Images are floats in [0, 1]."""

    images: Tensor  # (M, C, H, W), without labels
    labelled: Tensor  # SAMM: (M, C, H, W); AMM: empty
    labels: Tensor  # SAMM: (M,), their classes; AMM: empty


Optimizers = dict[str, torch.optim.Optimizer]  # {player: its optimiser}
# The updates in the order of each listing. No gradient is taken between them, so the order has no effect (ledger 21).
ALGORITHM_1 = "discriminator", "decoder", "encoder"
ALGORITHM_2 = "discriminator", "encoder", "decoder"


def train_step(model: AMM, optimizers: Optimizers, batch: Batch, precision: str = "fp32") -> dict[str, Tensor]:
    """One iteration of Algorithm 1, or with labels of Algorithm 2. Draws from torch's global generator.

    Returns scalars on the device: each player's loss and the norm of its gradient; penalty, eq. (18) without λ;
    d_inferred and d_generated, D's mean probability for both joints.
    """
    config, players = model.config, model.players()
    with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        games = [model.play(batch.images)]  # sample from data and priors, then from the conditionals
        if config.semi_supervised:
            games.append(model.play(batch.labelled, batch.labels))  # Algorithm 2's second game, with known y
        rho = model.predictions(games)  # ρ_q, ρ_p
        penalty = model.penalty(games) if config.penalty else torch.zeros((), device=batch.images.device)
    losses = {
        "discriminator": model.discriminator_loss(rho) + config.penalty * penalty,  # L_D, with eq. (18)
        "decoder": model.decoder_loss(rho),  # L_Gx = L_Gz(y)
        "encoder": model.encoder_loss(rho),  # L_Gy = L_Gz(x)
    }
    for optimizer in optimizers.values():
        optimizer.zero_grad()
    for player, loss in losses.items():  # all gradients, before any parameter moves
        loss.backward(inputs=players[player], retain_graph=player != "encoder")
    for player in ALGORITHM_2 if config.semi_supervised else ALGORITHM_1:
        optimizers[player].step()  # θ ← θ - ∇_θ L
    shown = {f"{player}_loss": loss for player, loss in losses.items()} | {"penalty": penalty}
    shown["d_inferred"] = torch.cat([q for q, _ in rho]).sigmoid().mean()
    shown["d_generated"] = torch.cat([p for _, p in rho]).sigmoid().mean()
    return shown | {f"{name}_grad": nn.utils.get_total_norm([p.grad for p in ps]) for name, ps in players.items()}


# ------------------------------------------------------------------------------------------------------------ the loop


class Split(NamedTuple):
    """A data set as a run uses it. Images are uint8 (…, C, H, W), labels int64."""

    images: Tensor
    labels: Tensor
    validation_images: Tensor
    validation_labels: Tensor
    known: Tensor  # SAMM: indices of the labelled images
    priors: Tensor  # p(y), (K,)


def misfits(config: Config, n_classes: int) -> dict[str, str]:
    """The mistakes, for `run.refuse`: SAMM needs one component per class and a label of each class, AMM neither."""
    k, name, wrong = config.n_components, config.dataset, {}
    if not config.semi_supervised:
        return wrong
    if n_classes < 2:
        without = f"--semi-supervised false --n-labels {Config.n_labels} --labels {Config.labels}"
        return {f"{name} has {n_classes} class; labels need at least 2": without}
    if k != n_classes:
        wrong[f"--n-components: {k} cannot stand for the {n_classes} classes of {name}"] = f"--n-components {n_classes}"
    if (n := config.n_labels) < n_classes:
        fits = f"--n-labels {n_classes} --labels stratified"
        wrong[f"--n-labels: {n} labels are fewer than the {n_classes} classes of {name}"] = fits
    return wrong


def split(config: Config, data: Dataset, seed: int) -> Split:
    """Training and validation images, the labelled ones, and p(y). Raises UserError if config and data do not fit."""
    wrong = misfits(config, data.n_classes)
    if len(data.test_images) < 2:
        wrong[f"{data.name} has {len(data.test_images)} test image; the figures need at least 2"] = ""
    # The extra images of svhn_extra are only trained on. Held-out and labelled images come from the train part.
    pool, held, batch = len(data.train_images), config.validation, config.batch
    if data.name == "svhn_extra":
        pool = min(pool, SVHN_TRAIN)
    if held + batch > pool:
        left = f"--validation: {held} held out of {pool} training images leave fewer than a batch of {batch}"
        held = min(held, pool // 5)
        wrong[left] = f"--validation {held} --batch {min(batch, pool - held)}" * (pool > 1)
    order = torch.arange(pool)
    if config.held_out == "random":
        order = torch.randperm(pool, generator=run.generator(seed, "validation"))
    kept, out = order[: pool - held].sort().values, order[pool - held :].sort().values
    extra = torch.arange(pool, len(data.train_images))
    images, labels = (part[torch.cat([kept, extra])] for part in (data.train_images, data.train_labels))
    known, priors = torch.arange(0), torch.full((config.n_components,), 1 / config.n_components)
    if config.semi_supervised and data.n_classes > 1:
        known, lacking = draw_labels(labels[: len(kept)], config.n_labels, config.labels, data.class_names, seed)
        wrong |= lacking if config.n_labels >= data.n_classes else {}
    run.refuse(wrong)
    if config.semi_supervised:
        priors = labels[known].bincount(minlength=config.n_components).float() / config.n_labels
    return Split(images, labels, data.train_images[out], data.train_labels[out], known, priors)


def labelled_order(n: int, draws: int, noise: torch.Generator) -> Tensor:
    """At least `draws` indices of n labelled images: all n in random order, again and again. n may be 0."""
    passes = -(-draws // n) if n else 1
    return torch.cat([torch.randperm(n, generator=noise) for _ in range(passes)])


def rate(config: Config, player: str, step: int, steps: int) -> float:
    """The learning rate of a player in training step `step` (0, 1, …) of a run with `steps` steps per epoch.

    It is constant, or it falls linearly from the start of epoch decay_from to 0 after the last step.
    """
    alpha = config.discriminator_learning_rate if player == "discriminator" else None
    alpha = config.learning_rate if alpha is None else alpha
    if config.decay_from is None or step < (first := (config.decay_from - 1) * steps):
        return alpha
    return alpha * (config.epochs * steps - step) / (config.epochs * steps - first)


def train(config: Config, options: run.Options) -> Path:
    """Train or resume one run; returns its folder."""
    if options.graph and config.decay_from:
        raise run.UserError("--graph: a recording keeps its learning rates, and decay_from changes them. Leave it out")
    device, seed = run.set_up(options), options.seed
    if n_classes := described(config.dataset, SETS)[1]:
        run.refuse(misfits(config, n_classes))  # before anything is downloaded
    data = load(config.dataset, options.data, options.unofficial_data)
    s = split(config, data, seed)
    images, known = s.images.to(device), s.known.to(device)
    known_images, known_labels = as_input(images[known]), s.labels.to(device)[known]

    torch.manual_seed(seed)
    model = config.build().to(device, memory_format=torch.channels_last)
    model.priors.copy_(s.priors)
    adam = {"lr": config.learning_rate, "betas": (config.beta1, 0.999), "fused": True}  # the loop sets the rates
    optimizers = {player: torch.optim.Adam(parameters, **adam) for player, parameters in model.players().items()}
    step = graph.replayed(
        lambda batch: train_step(model, optimizers, batch, options.precision), optimizers.values(), options.graph
    )
    steps, m = len(images) // config.batch, config.batch
    with run.Run("amm", config, options, data.provenance(), device) as r:
        r.resume(model, optimizers, steps)
        rates = {player: optimizer.param_groups[0]["lr"] for player, optimizer in optimizers.items()}
        if r.total_steps and any(rates[player] != rate(config, player, r.total_steps - 1, steps) for player in rates):
            raise run.UserError(f"{r.folder}: epochs cannot grow once the rates fall (decay_from). Use another --runs")
        while r.epoch < config.epochs:
            order = torch.randperm(len(images), generator=run.generator(seed, "order", r.epoch)).to(device)
            shuffles = run.generator(seed, "labelled", r.epoch)
            order_known = labelled_order(len(known), steps * m, shuffles).to(device)
            while r.step < steps:
                for player, optimizer in optimizers.items():
                    optimizer.param_groups[0]["lr"] = rate(config, player, r.total_steps, steps)
                drawn, drawn_known = (o[r.step * m :][:m] for o in (order, order_known))
                # All draws come from the global generators. They get a seed for each step, so none has to be saved.
                torch.manual_seed(run.generator(seed, "step", r.epoch, r.step).initial_seed())
                shown = step(Batch(as_input(images[drawn]), known_images[drawn_known], known_labels[drawn_known]))
                if model.averaged is not None:
                    model.average(r.total_steps + 1)
                r.after_step(shown)
            r.after_epoch(**epoch_row(model, s, data))
            if path := r.sample_path():
                rows = torch.arange(config.n_components).repeat_interleave(10)
                save_grid(model.sample(rows, seed), path, columns=10)
        r.finish()
    return r.folder


def main(argv: list[str] | None = None) -> None:
    run.start("amm.train", Config, train, argv)


if __name__ == "__main__":
    from amm.train import main  # under its own name, so that Config exists once

    run.exit_with(main)
