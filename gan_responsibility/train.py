"""GAN-based Gaussian mixture model responsibility learning (ICLR 2020 submission HJgEe1SKPr). Algorithm 1, for a batch at once.

    python -m gan_responsibility.train mnist --seed 0 --data data

Run it again to resume; `--describe` prints what would be trained. The same loop trains the two baselines, gan.py.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common import graph, inception, run
from common.data import described, load
from common.metrics import clustering_accuracy, contingency, normalised_mutual_information
from common.optim import descend
from common.plots import save_grid
from common.run import Count, Decay, NonNegative, Positive, Range
from gan_responsibility import model
from gan_responsibility.model import (
    Mixture,
    class_entropy,
    discriminator_loss,
    generator_loss,
    information_loss,
    shares,
)
from gan_responsibility.scores import SAMPLES, Scorer

__all__ = ["Config", "build", "counts", "examples", "generate", "players", "responsibilities", "train_step"]  # what every system brings

SETS = {  # data set: image shape, classes; None: the number is found in the folder
    "digits": ((1, 28, 28), 10),
    "mnist": ((1, 28, 28), 10),
    "fashion_mnist": ((1, 28, 28), 10),
    "cifar10": ((3, 32, 32), 10),
    "flowers10": ((3, 64, 64), 10),
    "flowers10_all": ((3, 64, 64), 10),
    "folder": ((1, 28, 28), None),
    "folder_colour": ((3, 64, 64), None),
}
ALL = 0.99  # beyond this share of α's mass on one Gaussian, that one is said to have all
NOTHING = 0.01  # below this share of log K, k is said to tell nothing of x


@dataclass(frozen=True)
class Task:
    """What any system learns from, and how it is stepped. The values' sources stand in configs/*.yaml, the choices in the ledger."""

    dataset: str = "mnist"  # one of SETS; folder:<path> and folder_colour:<path> are a person's own. Pixels to [-1, 1]
    networks: Literal["count_matched", "as_printed"] = "count_matched"  # the reading of Table 3
    n_components: Annotated[int, Range(2)] | None = 10  # K; None: as many as the data have classes
    latent_dim: Count = 100  # D_z
    mean_range: NonNegative = 0.1  # μ_k ~ U[-this, this]^D_z at first
    deviation: Positive = 0.15  # A_k = this · I at first
    batch: Annotated[int, Range(2)] = 64  # M, real images a step; an epoch's last batch may be smaller
    learning_rate: Positive = 2.0e-4  # γ, Adam's, constant
    beta1: Decay = 0.5  # Adam's; its second one is 0.999
    epochs: Count = 200  # passes over the training set
    score_every: Count = 10  # epochs between Inception Scores and FIDs, where the Inception weights are at hand

    LEFT_TO_DATA = ("n_components",)  # what a run fills in where the config has null

    def __post_init__(self):
        described(self.dataset, SETS)

    @property
    def shape(self) -> tuple[int, int, int]:
        return described(self.dataset, SETS)[0]

    @property
    def components(self) -> int:
        """K; 2 where it stands in a folder that was not read yet."""
        return self.n_components or described(self.dataset, SETS)[1] or 2


@dataclass(frozen=True)
class Config(Task):
    classifier: Literal["shared", "standalone"] = "shared"  # C: a layer on D's features, or a network of its own
    saturating: bool = False  # G minimises log(1 - D), else -log D
    target: Literal["alpha", "component"] = "alpha"  # of eq. (4): the real image's α_i for every k, or k itself
    information_moves: Literal["classifier", "all"] = "classifier"  # Algorithm 1, line 13; or G, μ and A as well, Sec. 2.4
    adversarial_moves_classifier: bool = True  # through α, Algorithm 1, line 12
    alpha_in_information: Literal["fixed", "trained"] = "fixed"  # whether the cross-entropy in eq. (4) moves the real images' α too
    class_entropy: Literal["left_out", "batch", "image"] = "left_out"  # H(c) of eq. (4): of the mean of α over the batch, or of each α_i
    microbatch: Annotated[int, Range(0)] = 0  # real images whose fakes D and C see at once; 0: all M. It bounds memory alone

    NO_INFLUENCE = ("microbatch",)

    def __post_init__(self):
        super().__post_init__()
        if self.microbatch and self.networks == "as_printed":
            raise ValueError("microbatch: the printed discriminator normalises over the batch, which cannot be cut; use count_matched")


def build(config: Config) -> dict[str, nn.Module]:
    """Every trained part by name. D is encoder and discriminator; with a shared classifier that encoder serves both."""
    classifier = model.shared_classifier if config.classifier == "shared" else model.standalone_classifier
    networks = {
        "mixture": Mixture(config.components, config.latent_dim, config.mean_range, config.deviation),
        "generator": model.generator(config.shape, config.latent_dim),
        "encoder": model.encoder(config.shape, config.networks),
        "discriminator": model.discriminator(config.shape),
        "classifier": classifier(config.shape, config.components),
    }
    for network in networks.values():
        model.initialise(network)
    return networks


def counts(config: Config) -> dict[str, float]:
    """Table 6's numbers of parameters. as_counted: as the table counts a stand-alone classifier, with the shared one's head for its own.

    own_head, shared_head: of a stand-alone classifier, the parameters of the two heads that are exchanged.
    """
    networks = build(config)
    total = sum(p.numel() for network in networks.values() for p in network.parameters())
    if config.classifier == "shared":
        return {"parameters": total, "parameters_as_counted": total}
    own = sum(p.numel() for p in networks["classifier"][-1].parameters())
    shared = sum(p.numel() for p in model.shared_classifier(config.shape, config.components).parameters())
    return {"parameters": total, "parameters_as_counted": total - own + shared, "own_head": own, "shared_head": shared}


def bookkeeping(found: dict[str, float]) -> str:
    """How `counts` comes from what was built to what Table 6 counts."""
    return f"{found['parameters']:,} as built, its head's {found['own_head']:,} exchanged for the shared one's {found['shared_head']:,}"


def examples(config: Config) -> dict[str, Tensor]:
    """An input for each network that is called, for `--describe`."""
    image, h = torch.zeros(2, *config.shape), torch.zeros(2, model.features(config.shape))
    return {
        "mixture": torch.zeros(2, config.components, config.latent_dim),
        "generator": torch.zeros(2, config.latent_dim),
        "encoder": image,
        "discriminator": h,
        "classifier": h if config.classifier == "shared" else image,
    }


def players(networks: dict[str, nn.Module]) -> dict[str, list[nn.Parameter]]:
    """The parameters of each optimiser. The shared encoder belongs to D."""
    names = {"discriminator": ("encoder", "discriminator"), "generator": ("generator", "mixture"), "classifier": ("classifier",)}
    return {player: [p for name in parts for p in networks[name].parameters()] for player, parts in names.items()}


class Batch(NamedTuple):
    """What a training step gets."""

    real: Tensor  # (M, C, H, W) in [-1, 1]
    noise: torch.Generator  # its own for each step, on the device


# ------------------------------------------------------------------------------------------------------------ Algorithm 1


def train_step(
    networks: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer], batch: Batch, config: Config, precision: str = "fp32"
) -> dict[str, Tensor]:
    """One iteration of Algorithm 1 for the whole batch. All gradients are taken before any step. Returns losses, on the device.

    alpha_entropy: see `entropy_share`; alpha_information: see `information_share`; largest_weight: the largest of the K means of α over the
    batch. An information near 0 or a weight near 1: α says nothing.
    """
    found, terms = gradients(networks, batch, config, precision)
    return terms | {f"{player}_grad": descend(optimizer, found[player]) for player, optimizer in optimizers.items()}  # lines 11 to 13


def gradients(
    networks: dict[str, nn.Module], batch: Batch, config: Config, precision: str = "fp32"
) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
    """The gradient of each player's losses in its parameters, and the losses (means over the M images).

    The fakes of all images are generated in one pass, so that batch normalisation sees them all; D and C then work on the fakes of
    `microbatch` images at a time. What G, μ, A and C are owed is gathered where the parts are joined, at the fakes and at α; what D is owed
    for the real images, at its outputs on them.
    """
    m, k, device = len(batch.real), config.components, batch.real.device
    mine = players(networks)
    sums = {player: [torch.zeros_like(p) for p in parameters] for player, parameters in mine.items()}
    totals = {name: torch.zeros((), device=device) for name in ("d_loss", "g_loss", "information")}
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

    def add(player: str, given: tuple[Tensor, ...]) -> None:
        sums[player] = [total + gradient for total, gradient in zip(sums[player], given, strict=True)]

    with mixed:
        h_real, logits = look(networks, batch.real, config)
        alpha = logits.softmax(-1)  # (M, K), line 2
        on_real = wide(networks["discriminator"](h_real)).squeeze(1)
        noise = torch.randn(m, k, config.latent_dim, generator=batch.noise, device=device, dtype=batch.real.dtype)  # line 4
        made = networks["generator"](networks["mixture"](noise).flatten(0, 1))  # (M·K, C, H, W), lines 5 and 6
    # Cut the graph here: from α, the fakes and D of the real images on, part by part.
    weights, fakes, judged = alpha.detach(), made.detach(), on_real.detach()
    owed_alpha, owed_fakes, owed_real = (torch.zeros_like(t) for t in (weights, fakes, judged))

    size = config.microbatch or m
    for start in range(0, m, size):
        images = slice(start, min(start + size, m))
        rows = slice(images.start * k, images.stop * k)
        part, a, real = (t.clone().requires_grad_() for t in (fakes[rows], weights[images], judged[images]))
        fixed = a.detach()
        with mixed:
            h, on_part = look(networks, part, config)  # line 7
            on_fake = wide(networks["discriminator"](h)).view(-1, k)
        information = information_loss(on_part.view(-1, k, k), a if config.alpha_in_information == "trained" else fixed, config.target) / m
        adversarial = generator_loss(on_fake, a if config.adversarial_moves_classifier else fixed, config.saturating) / m
        d_loss = discriminator_loss(real, on_fake, fixed) / m  # lines 9 and 10 end here

        owed_real[images], *at_discriminator = torch.autograd.grad(d_loss, (real, *mine["discriminator"]), retain_graph=True)
        add("discriminator", tuple(at_discriminator))  # line 11; α is fixed
        # Line 12: G, μ and A at the fakes; C at α. Line 13: C by its own outputs and, as a switch, at α; as a switch G, μ and A.
        owed = torch.autograd.grad(adversarial, (part, a), retain_graph=True, allow_unused=True, materialize_grads=True)
        owed_fakes[rows] += owed[0]
        owed_alpha[images] += owed[1]
        inputs = [*mine["classifier"]] + [a] * (config.alpha_in_information == "trained") + [part] * (config.information_moves == "all")
        given = list(torch.autograd.grad(information, inputs))
        if config.information_moves == "all":
            owed_fakes[rows] += given.pop()
        if config.alpha_in_information == "trained":
            owed_alpha[images] += given.pop()
        add("classifier", tuple(given))
        for name, value in (("d_loss", d_loss), ("g_loss", adversarial), ("information", information)):
            totals[name] = totals[name] + value.detach()

    if config.class_entropy != "left_out":  # the other term of eq. (4): it depends on α alone, and moves it
        a = weights.clone().requires_grad_()
        entropy = class_entropy(a, config.class_entropy)
        owed_alpha += torch.autograd.grad(-entropy, a)[0]
        totals["information"] = totals["information"] - entropy.detach()

    add("discriminator", torch.autograd.grad(on_real, mine["discriminator"], owed_real, retain_graph=True))
    add("classifier", torch.autograd.grad(alpha, mine["classifier"], owed_alpha))
    add("generator", torch.autograd.grad(made, mine["generator"], owed_fakes))
    return sums, totals | shares(weights)


def look(networks: dict[str, nn.Module], images: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """D's features of images (B, C, H, W) and C's logits (B, K)."""
    h = networks["encoder"](images)
    return h, wide(networks["classifier"](h if config.classifier == "shared" else images))


def wide(x: Tensor) -> Tensor:
    """bf16 as float32: losses are never taken in bf16."""
    return x.float() if x.dtype == torch.bfloat16 else x


def generate(networks: dict[str, nn.Module], noise: Tensor, weights: Tensor) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] from ε (B, D_z) and weights of the Gaussians (B, K): one-hot is a Gaussian, else between them."""
    return networks["generator"](networks["mixture"].blend(noise, weights))


def responsibilities(networks: dict[str, nn.Module], images: Tensor) -> Tensor:
    """p(k|x), (B, K), of images (B, C, H, W) in [-1, 1]."""
    classifier = networks["classifier"]
    return classifier(networks["encoder"](images) if isinstance(classifier, nn.Linear) else images).softmax(-1)


# --------------------------------------------------------------------------------------------------------------- the loop


def as_input(images: Tensor) -> Tensor:
    """uint8 images 0 … 255 brought to [-1, 1], the range of G's tanh."""
    return images.float() / 127.5 - 1


def system_of(values: dict) -> ModuleType:
    """The module that the key `module` of a config names: gan, or (without the key) this one."""
    return run.module_of("gan_responsibility", values)


def operations(config: Task, system: ModuleType, n_images: int) -> float:
    """About how many floating-point operations the whole training takes: a backward pass is two forward ones, to inputs alone one."""
    forward = {}
    networks = system.build(config)
    for name, example in system.examples(config).items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            networks[name](example)
        forward[name] = counter.get_total_flops() / 2  # the examples are two
    made = forward["generator"] + forward.get("mixture", 0)
    looked_at = sum(forward.get(name, 0) for name in ("encoder", "discriminator", "classifier"))
    fakes = config.components if hasattr(system, "responsibilities") else 1
    # G: there and back. D and C: there and back on real images; on fakes back to G as well.
    return n_images * config.epochs * (fakes * (3 * made + 4 * looked_at) + 3 * looked_at)


@torch.no_grad()
def all_responsibilities(system: ModuleType, networks: dict[str, nn.Module], images: Tensor, batch: int = 500) -> Tensor:
    """p(k|x), (N, K), float32 on the CPU, of uint8 images (N, C, H, W); batch normalisation by its running means."""
    modes = {name: network.training for name, network in networks.items()}
    for network in networks.values():
        network.eval()
    found = torch.cat([system.responsibilities(networks, as_input(part)).float().cpu() for part in images.split(batch)])
    for name, network in networks.items():
        network.train(modes[name])
    return found


@torch.no_grad()
def sampled(
    system: ModuleType, networks: dict[str, nn.Module], config: Task, weights: Tensor, noise: torch.Generator, batch: int = 200
) -> Tensor:
    """Images (N, C, H, W) in [-1, 1] on the CPU, from weights of the Gaussians (N, K); noise: a generator on the CPU."""
    device = next(networks["generator"].parameters()).device
    mode = networks["generator"].training
    networks["generator"].eval()
    parts = []
    for w in weights.split(batch):
        epsilon = torch.randn(len(w), config.latent_dim, generator=noise)
        parts.append(system.generate(networks, epsilon.to(device), w.to(device)).cpu())
    networks["generator"].train(mode)
    return torch.cat(parts)


def clustering(alpha: Tensor, labels: Tensor, n_classes: int) -> dict[str, float]:
    """What p(k|x) (N, K) says of classes (N,): ACC (where K is their number) and NMI of argmax p(k|x)."""
    table = contingency(alpha.argmax(1), labels, alpha.shape[1], n_classes)
    found = {"nmi": normalised_mutual_information(table)}
    return found | {"accuracy": clustering_accuracy(table)} if alpha.shape[1] == n_classes else found


def train(config: Task, options: run.Options) -> Path:
    """Train, or resume, one run; returns its folder."""
    device = run.set_up(options)
    data = load(config.dataset, options.data, options.unofficial_data)
    if config.n_components is None:
        if data.n_classes < 2:
            raise run.UserError(f"n_components: {data.name} has one class, and a mixture needs at least two; give --n-components")
        config = replace(config, n_components=data.n_classes)
    if config.batch > len(data.train_images):
        raise run.UserError(f"batch: {config.batch} is more than the {len(data.train_images)} training images")
    system = system_of(vars(config))
    images, test_images = data.train_images.to(device), data.test_images.to(device)
    scorer = Scorer.find(data, options, device)

    torch.manual_seed(options.seed)
    networks = {name: network.to(device, memory_format=torch.channels_last) for name, network in system.build(config).items()}
    optimizers = {
        player: torch.optim.Adam(parameters, lr=config.learning_rate, betas=(config.beta1, 0.999), fused=True)
        for player, parameters in system.players(networks).items()
    }
    rows = torch.eye(config.components).repeat_interleave(10, 0)  # one-hot: ten of each Gaussian

    step = graph.replayed(
        lambda batch: system.train_step(networks, optimizers, batch, config, options.precision), optimizers.values(), options.graph
    )
    steps = -(-len(images) // config.batch)
    if len(images) % config.batch == 1:
        steps -= 1  # one image alone has no batch statistics
    with run.Run("gan_responsibility", config, options, data.provenance(), device) as r:
        r.resume(networks, optimizers, steps)
        if left := config.epochs - r.epoch:
            say_what_it_takes(replace(config, epochs=left), system, len(images), scorer is not None, device)
        while r.epoch < config.epochs:
            order = torch.randperm(len(images), generator=run.generator(options.seed, "order", r.epoch)).to(device)
            while r.step < steps:
                drawn = order[r.step * config.batch :][: config.batch]
                batch = Batch(as_input(images[drawn]), run.generator(options.seed, "noise", r.epoch, r.step, device=device))
                r.after_step(step(batch))
            more = {}
            if hasattr(system, "responsibilities"):
                alpha = all_responsibilities(system, networks, test_images)
                more = clustering(alpha, data.test_labels, data.n_classes)
                more |= {f"test_{name}": share.item() for name, share in shares(alpha).items()}
            if scorer and ((r.epoch + 1) % config.score_every == 0 or r.epoch + 1 == config.epochs):
                weights = mode_weights(system, networks, config, images)
                more |= scorer.scores(lambda n: drawn_from(system, networks, config, weights, n, options.seed))  # noqa: B023
            r.after_epoch(**more)
            say_if_collapsed(r.rows, config.components)
            if path := r.sample_path():
                made = sampled(system, networks, config, rows, run.generator(options.seed, "samples"))
                save_grid((made + 1) / 2, path, columns=10)
        r.finish()
    return r.folder


def mode_weights(system: ModuleType, networks: dict[str, nn.Module], config: Task, images: Tensor) -> Tensor:
    """How often each Gaussian is sampled, (K,) with sum 1: the mean of p(k|x) over the training images; alike in the baselines."""
    if hasattr(system, "responsibilities"):
        return all_responsibilities(system, networks, images).double().mean(0).float()
    return torch.full((config.components,), 1 / config.components)


def drawn_from(system: ModuleType, networks: dict[str, nn.Module], config: Task, weights: Tensor, n: int, seed: int) -> Tensor:
    """n uint8 images (n, C, H, W) of the whole mixture."""
    noise = run.generator(seed, "drawn")
    components = torch.multinomial(weights, n, replacement=True, generator=noise)
    made = sampled(system, networks, config, torch.eye(len(weights))[components], noise)
    return ((made.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def say_what_it_takes(config: Task, system: ModuleType, n_images: int, scored: bool, device: torch.device) -> None:
    """The operations of config.epochs epochs, before they begin; scored: with Table 6's scores."""
    cost = operations(config, system, n_images)
    scoring = -(-config.epochs // config.score_every) * SAMPLES * inception.OPERATIONS if scored else 0.0
    more = f" and {scoring:.2g} for their scores" if scored else ""
    needed = ": a GPU is needed" if device.type == "cpu" and cost + scoring > 1e16 else ""
    print(f"about {cost:.2g} operations for {config.epochs} epochs{more}{needed}", flush=True)


def say_if_collapsed(rows: list[dict], k: int) -> None:
    """A line on the screen after an epoch in which α said nothing, of the training batches or, at its end, of the test images.

    That is: all of it on one Gaussian, or nearly the same for every image, as it is at first.
    """
    row = rows[-1]
    for of, images in (("", "training images"), ("test_", "test images")):
        weight, information = row.get(f"{of}largest_weight", 0.0), row.get(f"{of}alpha_information", 1.0)
        if weight > ALL:
            print(f"epoch {row['epoch']}: α has collapsed: of {images} {100 * weight:.1f} % of its mass on one Gaussian", flush=True)
            return
        if information < NOTHING:
            told = any(earlier.get(f"{of}alpha_information", 0.0) >= NOTHING for earlier in rows)
            print(
                f"epoch {row['epoch']}: α is {'nearly the same again' if told else 'still nearly the same'} for every image: of {images} "
                f"k tells {100 * information:.2f} % of log {k}, entropy {100 * row[f'{of}alpha_entropy']:.1f} %",
                flush=True,
            )
            return


def main(argv: list[str] | None = None) -> None:
    config, options = run.parse("gan_responsibility", argv)
    if options.describe:
        system = system_of(vars(config))
        print(run.describe(system.build(config), system.examples(config), config, options.json))
    else:
        train(config, options)


if __name__ == "__main__":
    run.exit_with(main)
