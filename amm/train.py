"""AMM and SAMM: the Adversarially Learned Mixture Model, unsupervised and semi-supervised (Jesson et al., 2018). Algorithms 1 and 2.

    python -m amm.train mnist --seed 0 --data data

Run it again to resume; `--describe` prints what would be trained.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from amm.model import (
    Components,
    Decoder,
    Discriminator,
    Encoder,
    bayes_classes,
    decoder_loss,
    discriminator_loss,
    encoder_loss,
    gradient_penalty,
    initialise,
    sampled,
    squared_slopes,
)
from common import graph, run
from common.data import Dataset, choose_labels, described, load
from common.metrics import contingency, error_rate
from common.optim import descend
from common.plots import save_grid
from common.run import Count, Decay, NonNegative, Positive, Range

SETS = {  # data set: image shape, classes; None: the number is found in the folder
    "digits": ((1, 28, 28), 10),
    "mnist": ((1, 28, 28), 10),
    "fashion_mnist": ((1, 28, 28), 10),
    "svhn": ((3, 32, 32), 10),
    "svhn_extra": ((3, 32, 32), 10),
    "folder": ((1, 28, 28), None),
}
SVHN_TRAIN = 73_257  # images of svhn_extra that are train's: the first ones
CHECKED = 5_000  # training images on which an epoch is judged where none are held out


@dataclass(frozen=True)
class Config:
    """The values' sources stand in configs/*.yaml, the choices in the ledger."""

    dataset: str = "mnist"  # one of SETS; folder:<path> is a person's own. Pixels in [0, 1]
    n_components: Annotated[int, Range(2)] = 10  # K
    latent_dim: Count = 64  # of z
    factorisation: Literal["eq7", "eq6"] = "eq7"  # q(z|x) q(y|x, z), the tables' wiring, or q(y|x) q(z|x, y), Algorithm 1's
    variance: Literal["unit", "learned"] = "unit"  # of the components: Tables 4 and 8
    y_noise: Literal["learned", "none"] = "learned"  # of h_y: eq. (8)'s σ_y; or ỹ = softmax(μ_y)
    semi_supervised: bool = False  # SAMM, Algorithm 2
    n_labels: Count = 1000  # SAMM: training images whose class is known
    labels: Literal["random", "stratified", "first"] = "random"  # which ones
    penalty: NonNegative = 10.0  # λ of eq. (18)
    penalty_norm: Literal["joint", "each", "probability"] = "joint"  # eq. (18)'s: in x, y and z together, one each; of σ(D), not the logit
    penalty_ends: Literal["joints", "sources"] = "joints"  # eq. (18)'s lines join (x, ỹ, z̃) and (x̃, y, z); or (x, y, z) and (x̃, ỹ, z̃)
    batch: Annotated[int, Range(2)] = 100  # M, images a step of each kind
    learning_rate: Positive = 2.0e-4  # α, Adam's, constant
    beta1: Decay = 0.5  # Adam's; its second one is 0.999
    validation: Annotated[int, Range(0)] = 5000  # training images held out
    held_out: Literal["random", "last"] = "random"  # which ones
    epochs: Count = 200  # passes over the training images

    def __post_init__(self):
        described(self.dataset, SETS)
        if not self.semi_supervised and (self.n_labels, self.labels) != (Config.n_labels, Config.labels):
            raise ValueError(
                f"n_labels, labels: of no influence without --semi-supervised true; leave them at {Config.n_labels} and {Config.labels}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        return described(self.dataset, SETS)[0]


def build(config: Config) -> dict[str, nn.Module]:
    """The four networks by name. components is G_z(y), the mixture."""
    shape, k, d = config.shape, config.n_components, config.latent_dim
    networks = {
        "encoder": Encoder(shape, k, d, "y" if config.factorisation == "eq7" else "z", config.semi_supervised, config.y_noise == "learned"),
        "components": Components(shape, k, d, config.variance),
        "decoder": Decoder(shape, k, d),
        "discriminator": Discriminator(shape, k, d),
    }
    for network in networks.values():
        initialise(network)
    return networks


def examples(config: Config) -> dict[str, Tensor | tuple[Tensor, ...]]:
    """An input for each network, for `--describe`."""
    x, y, z = torch.zeros(2, *config.shape), torch.zeros(2, config.n_components), torch.zeros(2, config.latent_dim)
    return {"encoder": x, "components": y, "decoder": (y, z), "discriminator": (x, y, z)}


PLAYERS = {"discriminator": ("discriminator",), "decoder": ("decoder", "components"), "encoder": ("encoder",)}  # each has its own optimiser
# Who moves after whom, in the last lines of each. As no gradient is taken in between, both give the same (ledger 21).
ALGORITHM_1 = "discriminator", "decoder", "encoder"
ALGORITHM_2 = "discriminator", "encoder", "decoder"


class Batch(NamedTuple):
    """What a training step gets. Images in [0, 1]."""

    images: Tensor  # (M, C, H, W), labels unseen
    labelled: Tensor  # SAMM: (M, C, H, W), else none
    labels: Tensor  # (M,)


class Game(NamedTuple):
    """Both joints of one game: (x, y, z) inferred and generated, each (M, …)."""

    inferred: tuple[Tensor, Tensor, Tensor]
    generated: tuple[Tensor, Tensor, Tensor]


# ------------------------------------------------------------------------------------------------------- Algorithms 1, 2


def train_step(
    networks: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    batch: Batch,
    priors: Tensor,
    config: Config,
    precision: str = "fp32",
) -> dict[str, Tensor]:
    """One iteration of Algorithm 1, or with labels of Algorithm 2. Draws from torch's global generator. Returns what the log shows.

    priors: p(y), (K,). All gradients are taken from the same samples before any parameter moves.
    """
    found, terms = gradients(networks, batch, priors, config, precision)
    norms = {player: descend(optimizers[player], found[player]) for player in (ALGORITHM_2 if config.semi_supervised else ALGORITHM_1)}
    return terms | {f"{player}_grad": norms[player] for player in PLAYERS}


def gradients(
    networks: dict[str, nn.Module], batch: Batch, priors: Tensor, config: Config, precision: str = "fp32"
) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
    """The gradients of each player's loss in its parameters, and the losses."""
    device, m = batch.images.device, len(batch.images)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        games = [play(networks, batch.images, None, priors, config)]
        if config.semi_supervised:  # Algorithm 2's second game, in which y is known
            label = F.one_hot(batch.labels, config.n_components).to(batch.labelled.dtype)
            games.append(play(networks, batch.labelled, label, priors, config))
        # ρ_q and ρ_p of every game in one pass: D normalises nothing over a batch.
        sides = [side for game in games for side in (game.inferred, game.generated)]
        rho = networks["discriminator"](*(torch.cat(parts) for parts in zip(*sides, strict=True)))
        ends = [[torch.cat([game[i][j] for game in games]).detach() for j in range(3)] for i in (0, 1)]
        if config.penalty_ends == "sources":  # real or prior against synthesized or inferred: the codes change sides
            ends = [[ends[0][0], *ends[1][1:]], [ends[1][0], *ends[0][1:]]]
        between = torch.rand(len(ends[0][0]), device=device)
        penalty = gradient_penalty(networks["discriminator"], *ends, between, config.penalty_norm) if config.penalty else rho.new_zeros(())
    share = 1 / len(games)  # Algorithm 2 has 1 / 2M where Algorithm 1 has 1 / M
    pairs = [(rho[2 * i * m :][:m], rho[(2 * i + 1) * m :][:m]) for i in range(len(games))]
    losses = {
        "discriminator": share * sum(discriminator_loss(q, p) for q, p in pairs) + config.penalty * penalty,
        "decoder": share * sum(decoder_loss(p) for _, p in pairs),
        "encoder": share * sum(encoder_loss(q) for q, _ in pairs),
    }
    found = {}
    for player, names in PLAYERS.items():
        parameters = [p for name in names for p in networks[name].parameters()]
        found[player] = list(torch.autograd.grad(losses[player], parameters, retain_graph=player != "encoder"))
    terms = {f"{player}_loss": loss for player, loss in losses.items()} | {
        "penalty": penalty,
        "d_inferred": torch.cat([q for q, _ in pairs]).sigmoid().mean(),
        "d_generated": torch.cat([p for _, p in pairs]).sigmoid().mean(),
    }
    return found, terms


def play(networks: dict[str, nn.Module], x: Tensor, label: Tensor | None, priors: Tensor, config: Config) -> Game:
    """The samples of one game, in the order of Algorithm 1.

    x: (M, C, H, W); label: (M, K) one-hot, or None where y is inferred. The listings, for eq. (6), draw ỹ ~ q(y|x), then z̃ ~ q(z|x, ỹ).
    Under eq. (7) those two lines swap, z̃ ~ q(z|x), then ỹ ~ q(y|x, z̃); both come from streams joined before any draw, so that the order
    of the draws says nothing. Algorithm 2's z̃_ℓ ~ q(z|x, ỹ_ℓ) becomes q(z|x) (ledger 2).
    """
    components = torch.multinomial(priors, len(x), replacement=True)
    y = F.one_hot(components, config.n_components).to(x.dtype)  # y ~ p(y)
    z = sampled(*networks["components"](y))  # z ~ p(z|y)
    generated = networks["decoder"](y, z)  # x̃ ~ p(x|y, z)
    h, code = networks["encoder"](x, label)
    inferred_y = sampled(*h).softmax(-1) if label is None else label  # ỹ, eqs. (8), (9); or the known y
    return Game((x, inferred_y, sampled(*code)), (generated, y, z))  # z̃, eq. (10)


# --------------------------------------------------------------------------------------------------------------- the loop


def as_input(images: Tensor) -> Tensor:
    """uint8 images 0 … 255 as the networks take them: [0, 1] (Sec. 4)."""
    return images.float() / 255


class Split(NamedTuple):
    """A data set as a run sees it. Images uint8 (…, C, H, W), labels int64."""

    images: Tensor
    labels: Tensor
    validation_images: Tensor
    validation_labels: Tensor
    known: Tensor  # SAMM: indices of the labelled ones among `images`
    priors: Tensor  # p(y), (K,)


def check_classes(config: Config, n_classes: int) -> None:
    """SAMM's component k is class k, and every class has a label. Raises UserError where that cannot be."""
    if not config.semi_supervised:
        return
    if n_classes < 2:
        raise run.UserError(f"{config.dataset} has {n_classes} class; labels need at least 2")
    if config.n_components != n_classes:
        raise run.UserError(f"n_components: {config.n_components} cannot stand for the {n_classes} classes of {config.dataset}")
    if config.n_labels < n_classes:
        raise run.UserError(f"n_labels: {config.n_labels} labels are fewer than the {n_classes} classes of {config.dataset}")


def split(config: Config, data: Dataset, seed: int) -> Split:
    """Training and validation images, the labelled ones, p(y). Raises UserError where they cannot fit."""
    check_classes(config, data.n_classes)
    # Of svhn_extra the images of extra are only ever trained on: what is held out, and what is labelled, is of train.
    pool, held = len(data.train_images), config.validation
    if data.name == "svhn_extra":
        pool = min(pool, SVHN_TRAIN)
    if held + config.batch > pool:
        raise run.UserError(f"validation: {held} held out of {pool} training images leave fewer than a batch of {config.batch}")
    order = torch.arange(pool)
    if config.held_out == "random":
        order = torch.randperm(pool, generator=run.generator(seed, "validation"))
    kept, out = order[: pool - held].sort().values, order[pool - held :].sort().values
    extra = torch.arange(pool, len(data.train_images))
    images, labels = (part[torch.cat([kept, extra])] for part in (data.train_images, data.train_labels))
    known, priors = torch.arange(0), torch.full((config.n_components,), 1 / config.n_components)
    if config.semi_supervised:
        known = choose_labels(labels[: len(kept)], config.n_labels, config.labels, data.n_classes, seed)
        priors = labels[known].bincount(minlength=config.n_components).float() / config.n_labels
    return Split(images, labels, data.train_images[out], data.train_labels[out], known, priors)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """The network in evaluation mode meanwhile, and as it was afterwards."""
    mode = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(mode)


@torch.no_grad()
def infer(networks: dict[str, nn.Module], images: Tensor, batch: int = 500) -> tuple[Tensor, Tensor]:
    """h_y's means (N, K) and z's (N, D) of uint8 images, on the CPU; no noise, no dropout, batch normalisation by its running means."""
    with evaluating(networks["encoder"]):
        parts = [networks["encoder"](as_input(part)) for part in images.split(batch)]
    return torch.cat([h[0].cpu() for h, _ in parts]), torch.cat([z[0].cpu() for _, z in parts])


@torch.no_grad()
def mixture(networks: dict[str, nn.Module], k: int) -> tuple[Tensor, Tensor]:
    """Means and log-variances (K, D) of the learned components."""
    device = next(networks["components"].parameters()).device
    with evaluating(networks["components"]):
        return networks["components"](torch.eye(k, device=device))


def mean_slopes(discriminator: nn.Module, images: Tensor, h: Tensor, z: Tensor, batch: int = 500) -> dict[str, float]:
    """Mean norms of the gradient of D's logit in x, in y and in z at uint8 images and their codes, as `infer` gives them; no dropout.

    Eq. (18) asks that the three together have norm 1: where the one in x is near 0, D has gone blind to images (ledger 23).
    """
    codes = (part.to(images.device).split(batch) for part in (h.softmax(1), z))
    with evaluating(discriminator):
        parts = [squared_slopes(discriminator, (as_input(x), *of)) for x, *of in zip(images.split(batch), *codes, strict=True)]
    return {f"slope_{name}": slope.item() for name, slope in zip("xyz", torch.cat(parts, 1).sqrt().mean(1), strict=True)}


@torch.no_grad()
def label_noise(encoder: nn.Module, images: Tensor, batch: int = 500) -> dict[str, float]:
    """Mean σ_y of eq. (8), and the mean deviation of μ_y over these uint8 images: where the first is far above, chance decides ỹ."""
    with evaluating(encoder):
        parts = [encoder(as_input(part))[0] for part in images.split(batch)]
    mean, log_variance = (torch.cat(part) for part in zip(*parts, strict=True))
    return {"sigma_y": (log_variance / 2).exp().mean().item(), "spread_y": mean.std(0, correction=0).mean().item()}


@torch.no_grad()
def coupling(discriminator: nn.Module, images: Tensor, h: Tensor, z: Tensor) -> float:
    """How much D's logit has to do with which code belongs to which image: the share, 0 to 1, of its variance over all pairs of a uint8
    image and a code that no sum f(x) + g(y, z) explains; codes as `infer` gives them, no dropout. Near 0 D compares marginals alone.
    """
    x, y, z = as_input(images), h.softmax(1).to(images.device), z.to(images.device)
    with evaluating(discriminator):
        logits = torch.stack([discriminator(x, *(part[j].expand(len(x), -1) for part in (y, z))) for j in range(len(x))])
    both = logits - logits.mean()
    pair = both - both.mean(0) - both.mean(1, keepdim=True)
    return (pair.square().sum() / both.square().sum().clamp_min(1e-30)).item()


def diagnosis(networks: dict[str, nn.Module], images: Tensor) -> dict[str, float]:
    """What shows why a run goes wrong, of the first 1,000 of these uint8 images: slope_x, slope_y, slope_z, see mean_slopes; sigma_y,
    spread_y, see label_noise; and coupling, of the first 50."""
    images = images[:1000]
    h, z = infer(networks, images)
    found = mean_slopes(networks["discriminator"], images, h, z) | label_noise(networks["encoder"], images)
    return found | {"coupling": coupling(networks["discriminator"], images[:50], h[:50], z[:50])}


def many_to_one_error(table: Tensor) -> float:
    """Eq. (17) as an error in percent, over all mappings: each cluster counts for its most frequent class. table: (K, N) counts."""
    return 100 * (1 - (table.amax(1).sum() / table.sum()).item())


def train(config: Config, options: run.Options) -> Path:
    """Train, or resume, one run; returns its folder."""
    device = run.set_up(options)
    if n_classes := described(config.dataset, SETS)[1]:
        check_classes(config, n_classes)  # before anything is downloaded
    data = load(config.dataset, options.data, options.unofficial_data)
    s = split(config, data, options.seed)
    images = s.images.to(device)
    priors, known = s.priors.to(device), s.known.to(device)
    known_images, known_labels = as_input(images[known]), s.labels.to(device)[known]

    torch.manual_seed(options.seed)
    networks = {name: network.to(device, memory_format=torch.channels_last) for name, network in build(config).items()}
    optimizers = {
        player: torch.optim.Adam(
            [p for name in names for p in networks[name].parameters()], lr=config.learning_rate, betas=(config.beta1, 0.999), fused=True
        )
        for player, names in PLAYERS.items()
    }
    rows = torch.arange(config.n_components).repeat_interleave(10)

    step = graph.replayed(
        lambda batch: train_step(networks, optimizers, batch, priors, config, options.precision), optimizers.values(), options.graph
    )
    steps, m = len(images) // config.batch, config.batch
    with run.Run("amm", config, options, data.provenance(), device) as r:
        r.resume(networks, optimizers, steps)
        while r.epoch < config.epochs:
            order = torch.randperm(len(images), generator=run.generator(options.seed, "order", r.epoch)).to(device)
            shuffles = run.generator(options.seed, "labelled", r.epoch)  # as often through the labelled images as the epoch needs
            passes = -(-steps * m // len(known)) if len(known) else 1
            cycle = torch.cat([torch.randperm(len(known), generator=shuffles) for _ in range(passes)]).to(device)
            while r.step < steps:
                drawn = order[r.step * m :][:m]
                known_drawn = cycle[r.step * m :][:m]
                # Dropout draws from the global generators: a seed for each step, so that nothing has to be saved.
                torch.manual_seed(run.generator(options.seed, "step", r.epoch, r.step).initial_seed())
                batch = Batch(as_input(images[drawn]), known_images[known_drawn], known_labels[known_drawn])
                r.after_step(step(batch))
            r.after_epoch(**checks(networks, config, s, data, device))
            if path := r.sample_path():
                save_grid(draw(networks, config, rows, run.generator(options.seed, "samples")), path, columns=10)
        r.finish()
    return r.folder


def checks(networks: dict[str, nn.Module], config: Config, s: Split, data: Dataset, device: torch.device) -> dict[str, float]:
    """What an epoch has come to, on the validation images, or the first CHECKED training images where there are none.

    components_used: how many components some image goes to by argmax G_y; components_entropy: the entropy of their frequencies, as a share
    of log K; and the diagnosis. With validation images also errors in percent by eq. (19) and (_g_y) by argmax G_y; test_error is for the
    test error at the epoch of the least validation error, which eval.py reports beside the last one.
    """
    images = s.validation_images if config.validation else s.images[:CHECKED]
    h, z = infer(networks, images.to(device))
    share = h.argmax(1).bincount(minlength=config.n_components) / len(h)
    found = {
        "components_used": float((share > 0).sum()),
        "components_entropy": -torch.special.xlogy(share, share).sum().item() / math.log(config.n_components),
    } | diagnosis(networks, images.to(device))
    if config.validation and data.n_classes > 1:
        k, n = config.n_components, data.n_classes
        found["validation_error"] = error(by_bayes(networks, k, z, s.priors), s.validation_labels, config, n)
        found["validation_error_g_y"] = error(h.argmax(1), s.validation_labels, config, n)
        of_test = infer(networks, data.test_images.to(device))[1]
        found["test_error"] = error(by_bayes(networks, k, of_test, s.priors), data.test_labels, config, n)
    return found


def by_bayes(networks: dict[str, nn.Module], k: int, z: Tensor, priors: Tensor) -> Tensor:
    """ŷ_z, eq. (19), (N,), of codes z (N, D) on the CPU, under the learned mixture and p(y) (K,)."""
    means, log_variances = (part.cpu() for part in mixture(networks, k))
    return torch.cat([bayes_classes(part, means, log_variances, priors) for part in z.split(2000)])


def error(predicted: Tensor, labels: Tensor, config: Config, n_classes: int) -> float:
    """In percent: SAMM's plain error, component k being class k; AMM's by eq. (17)."""
    if config.semi_supervised:
        return error_rate(predicted, labels)
    return many_to_one_error(contingency(predicted, labels, config.n_components, n_classes))


@torch.no_grad()
def draw(networks: dict[str, nn.Module], config: Config, components: Tensor, noise: torch.Generator) -> Tensor:
    """Images (n, C, H, W) in [0, 1] on the CPU of these components (n,); noise: a generator on the CPU."""
    means, log_variances = mixture(networks, config.n_components)
    parts = []
    with evaluating(networks["decoder"]):
        for k in components.split(500):
            epsilon = torch.randn(len(k), config.latent_dim, generator=noise).to(means.device)
            z = means[k] + (log_variances[k] / 2).exp() * epsilon
            parts.append(networks["decoder"](F.one_hot(k, config.n_components).to(z.dtype).to(z.device), z).cpu())
    return torch.cat(parts)


def main(argv: list[str] | None = None) -> None:
    config, options = run.parse("amm", argv)
    if options.describe:
        print(run.describe(build(config), examples(config), config, options.json))
    else:
        train(config, options)


if __name__ == "__main__":
    run.exit_with(main)
