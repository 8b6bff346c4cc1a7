"""GM-GAN: Gaussian Mixture Generative Adversarial Networks (Ben-Yosef, Weinshall). Algorithm 1, static and dynamic, supervised or not.

    python -m gmgan.train mnist --seed 0 --data data

Run it again to resume; `--describe` prints what would be trained. The classical GAN is the same with one Gaussian N(0, I). The same loop
trains AC-GAN (acgan.py) and the auto-encoder whose codes K-means clusters (kmeans.py).
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from common import graph, optim, run
from common.data import Dataset, described, load
from common.plots import save_grid, save_scatters
from common.run import Count, Decay, NonNegative, Positive
from gmgan import toy
from gmgan.model import Discriminator, Mixture, correspondence, discriminator_loss, generator, generator_loss, initialise

__all__ = ["PLAYERS", "Config", "build", "examples", "generate", "train_step"]  # what every system brings

SETS = {  # data set: shape, classes; None: the number is found in the folder
    "toy": ((2,), 9),
    "toy_apart": ((2,), 9),
    "digits": ((1, 28, 28), 10),
    "mnist": ((1, 28, 28), 10),
    "fashion_mnist": ((1, 28, 28), 10),
    "cifar10": ((3, 32, 32), 10),
    "stl10": ((3, 96, 96), 10),
    "signs": ((3, 40, 40), None),
    "folder": ((1, 28, 28), None),
    "folder_colour": ((3, 64, 64), None),
}


PLAYERS = {"discriminator": ("discriminator",), "generator": ("generator", "mixture")}  # each has an optimiser of its own


@dataclass(frozen=True)
class Task:
    """What any system learns from, and how it is stepped. The values' sources stand in configs/*.yaml, the choices in the ledger."""

    dataset: str = "mnist"  # one of SETS; signs:<path>, folder:<path> and folder_colour:<path> are a person's own. Pixels to [-1, 1]
    n_classes: Count | None = None  # N, the first so many classes, in the order of their names; None: all
    classes: str | None = None  # or these, by name: "a,b,c"
    latent_dim: Count = 100  # d
    batch_real: Count = 64  # b_D, real points or images a step
    learning_rate: Positive = 2.0e-4  # γ, Adam's, constant
    beta1: Decay = 0.5  # Adam's; its second one is 0.999
    epochs: Count = 54  # passes over the training set; an epoch has its size / b_D iterations

    LEFT_TO_DATA = ("n_classes",)  # what a run fills in where the config has null

    def __post_init__(self):
        described(self.dataset, SETS)
        named = self.classes.split(",") if self.classes is not None else []
        if self.classes is not None and self.n_classes not in (None, len(named)):
            raise ValueError(f"n_classes: {self.n_classes}, but classes names {len(named)}; give one of them")
        if "" in named or len(set(named)) < len(named):
            raise ValueError(f"classes: expected different names with commas, found {self.classes!r}")
        if self.dataset in toy.VARIANCE and (self.classes or self.n_classes):
            raise ValueError("classes, n_classes: the toy is judged against its nine Gaussians; it cannot be narrowed")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a point or an image."""
        return described(self.dataset, SETS)[0]

    @property
    def class_count(self) -> int:
        """N; 1 where it stands in a folder that was not read yet."""
        named = len(self.classes.split(",")) if self.classes else None
        return self.n_classes or named or described(self.dataset, SETS)[1] or 1


@dataclass(frozen=True)
class Gan(Task):
    """What the GANs share."""

    batch_fake: Count = 128  # b_G, generated ones in a step of the generator
    width: Count = 64  # channels of the layer next to the image, doubled by each layer further in; of the dense networks: units
    norm: Literal["batch", "none"] = "batch"  # of the image networks: batch normalisation as in DCGAN


@dataclass(frozen=True)
class Config(Gan):
    n_components: Count | None = 10  # K, Gaussians; None: as many as classes
    mean_range: NonNegative = 0.1  # c: μ_k ~ U[-c, c]^d
    sigma: Positive = 0.15  # σ: Σ_k = σ² I, or σ I, as the next line says
    sigma_is: Literal["deviation", "variance"] = "deviation"  # what σ is of each Gaussian
    mixture: Literal["static", "dynamic", "dynamic_diagonal"] = "static"  # dynamic: μ_k and A_k are trained; A_k in full or diagonal
    supervised: bool = False  # a discriminator with one output a class
    class_map: str | None = None  # f(k) of each Gaussian as "0,1,2,…" (K ≥ N), or g of each class (K < N); None: k mod N, n mod K
    cluster_samples: Count = 10_000  # M, of each Gaussian, from which Algorithm 2 learns

    def __post_init__(self):
        super().__post_init__()
        if self.class_map and not self.supervised:
            raise ValueError("class_map: of no influence without --supervised true")
        if self.supervised and self.class_count > 1:  # else N stands in a folder that was not read yet
            correspondence(self.components, self.class_count, self.class_map)

    @property
    def components(self) -> int:
        """K."""
        return self.n_components or self.class_count

    @property
    def groups(self) -> int:
        """How many kinds of sample can be asked for: Gaussians."""
        return self.components

    @property
    def deviation(self) -> float:
        """The standard deviation of a Gaussian along each axis before training."""
        return self.sigma if self.sigma_is == "deviation" else math.sqrt(self.sigma)


def build(config: Config) -> dict[str, nn.Module]:
    """Mixture, generator and discriminator, by name."""
    norm = config.norm == "batch"
    outputs = min(config.components, config.class_count) if config.supervised else 1
    networks = {
        "mixture": Mixture(config.components, config.latent_dim, config.mean_range, config.deviation, config.mixture),
        "generator": generator(config.latent_dim, config.shape, config.width, norm),
        "discriminator": Discriminator(config.shape, outputs, config.width, norm),
    }
    for network in networks.values():
        initialise(network)
    return networks


def examples(config: Config) -> dict[str, Tensor | tuple[Tensor, ...]]:
    """An input for each network that is called, for `--describe`."""
    z = torch.zeros(2, config.latent_dim)
    return {"generator": z, "discriminator": torch.zeros(2, *config.shape)}


class Batch(NamedTuple):
    """What a training step gets."""

    real: Tensor  # (b_D, …): points, or images in [-1, 1]
    labels: Tensor  # (b_D,)
    noise: torch.Generator  # its own for each step, on the device


def train_step(
    networks: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer], batch: Batch, config: Config, precision: str = "fp32"
) -> dict[str, Tensor]:
    """One iteration of Algorithm 1, lines 5-27: a step of D, then one of G (and of a dynamic mixture). Returns losses, on the device.

    real, fake: the mean probability that D's first output gives to the real and to the generated ones; d_grad, g_grad: gradients' norms.
    """
    device = batch.real.device
    targets = of_gaussian = None
    if config.supervised:
        of_gaussian, of_class = correspondence(config.components, config.class_count, config.class_map, device)
        targets = of_class[batch.labels]

    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        with torch.no_grad():
            fake, _ = sample(networks, config, len(batch.real), batch.noise)  # lines 7-9
        on_real, on_fake = networks["discriminator"](batch.real), networks["discriminator"](fake)
    d_loss = discriminator_loss(on_real, on_fake, targets)  # lines 10-16
    d_grad = descend(d_loss, optimizers["discriminator"])  # line 17

    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        fake, components = sample(networks, config, config.batch_fake, batch.noise)  # lines 19-21
        logits = networks["discriminator"](fake)
    g_loss = generator_loss(logits, of_gaussian[components] if config.supervised else None)  # lines 22-26
    g_grad = descend(g_loss, optimizers["generator"])  # line 27
    shown = {"real": on_real[:, 0].sigmoid().mean(), "fake": on_fake[:, 0].sigmoid().mean()}
    return {"d_loss": d_loss, "g_loss": g_loss, **shown, "d_grad": d_grad, "g_grad": g_grad}


def sample(networks: dict[str, nn.Module], config: Config, n: int, noise: torch.Generator) -> tuple[Tensor, Tensor]:
    """n generated ones and the Gaussian (n,) of each: k ~ Categ(1/K, …), z ~ N(μ_k, Σ_k), G(z)."""
    components = torch.randint(config.components, (n,), generator=noise, device=noise.device)
    epsilon = torch.randn(n, config.latent_dim, generator=noise, device=noise.device)
    return generate(networks, epsilon, components), components


def generate(networks: dict[str, nn.Module], epsilon: Tensor, components: Tensor, multiplier: float = 1.0) -> Tensor:
    """Points (B, 2) or images (B, C, H, W) in [-1, 1] from noise ε ~ N(0, I) (B, d) and Gaussians (B,).

    multiplier: σ of Sec. 4.3, which multiplies the covariance of every Gaussian after training.
    """
    return networks["generator"](networks["mixture"](epsilon, components, multiplier))


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """One step of the optimiser down `loss`, on its own parameters: the other network's are not touched, nor their gradients computed.

    Returns the gradient's norm, a scalar.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return optim.descend(optimizer, torch.autograd.grad(loss, parameters))


# --------------------------------------------------------------------------------------------------------------- the loop


def as_input(images: Tensor) -> Tensor:
    """uint8 images 0 … 255 brought to [-1, 1] (Sec. 4); the toy's points as they are."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def system_of(values: dict) -> ModuleType:
    """The module that the key `module` of a config names: acgan, kmeans, or (without the key) this one."""
    return run.module_of("gmgan", values)


def load_data(config: Task, options: run.Options) -> tuple[Task, Dataset]:
    """The data of a config, narrowed to its classes, and the config with N where only the data could tell.

    Raises UserError where a class is not there, there are fewer than two, or K, N and the map between them do not fit.
    """
    data = toy.dataset(config.dataset) if config.dataset in toy.VARIANCE else load(config.dataset, options.data, options.unofficial_data)
    wanted = config.classes.split(",") if config.classes else list(data.class_names[: config.n_classes])
    for name in wanted:
        if name not in data.class_names:
            raise run.UserError(f"classes: {data.name} has no class {name!r}{run.nearest(name, data.class_names)}")
    if config.n_classes and len(wanted) < config.n_classes:
        raise run.UserError(f"n_classes: {config.n_classes} asked for, but {data.name} has {data.n_classes} classes")
    if len(wanted) < 2:
        raise run.UserError(f"{data.name}: {len(wanted)} class is left; supervision, clustering and the scores need at least 2")
    if wanted != list(data.class_names):
        data = narrowed(data, [data.class_names.index(name) for name in wanted])
    if config.batch_real > len(data.train_images):
        raise run.UserError(f"batch_real: {config.batch_real} is more than the {len(data.train_images)} training images")
    if config.class_count != len(wanted):
        try:
            config = replace(config, n_classes=len(wanted))
        except ValueError as error:
            raise run.UserError(str(error)) from None
    return config, data


def narrowed(data: Dataset, kept: list[int]) -> Dataset:
    """The data set with these classes alone, numbered in this order."""
    number = torch.full((data.n_classes,), -1)
    number[kept] = torch.arange(len(kept))
    parts = []
    for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
        mine = number[labels] >= 0
        parts += [images[mine], number[labels[mine]]]
    return replace(
        data,
        **dict(zip(("train_images", "train_labels", "test_images", "test_labels"), parts, strict=True)),
        class_names=tuple(data.class_names[i] for i in kept),
        digest=hashlib.sha256(f"{data.digest} {kept}".encode()).hexdigest()[:16],  # else two choices would share a classifier
    )


def train(config: Task, options: run.Options) -> Path:
    """Train, or resume, one run; returns its folder."""
    device = run.set_up(options)
    config, data = load_data(config, options)
    system = system_of(vars(config))
    images, labels = data.train_images.to(device), data.train_labels.to(device)

    torch.manual_seed(options.seed)
    networks = {name: network.to(device, memory_format=torch.channels_last) for name, network in system.build(config).items()}
    optimizers = {}
    for player, names in system.PLAYERS.items():
        parameters = [p for name in names if name in networks for p in networks[name].parameters()]
        optimizers[player] = torch.optim.Adam(parameters, lr=config.learning_rate, betas=(config.beta1, 0.999), fused=True)

    step = graph.replayed(
        lambda batch: system.train_step(networks, optimizers, batch, config, options.precision), optimizers.values(), options.graph
    )
    steps = len(images) // config.batch_real  # the few left over come in with another epoch's order
    with run.Run("gmgan", config, options, data.provenance(), device) as r:
        r.resume(networks, optimizers, steps)
        while r.epoch < config.epochs:
            order = torch.randperm(len(images), generator=run.generator(options.seed, "order", r.epoch)).to(device)
            while r.step < steps:
                drawn = order[r.step * config.batch_real :][: config.batch_real]
                noise = run.generator(options.seed, "noise", r.epoch, r.step, device=device)
                batch = Batch(as_input(images[drawn]), labels[drawn], noise)
                r.after_step(step(batch))
            r.after_epoch(**(toy.course(networks, system, config) if data.name in toy.VARIANCE else {}))
            if (path := r.sample_path()) and hasattr(system, "generate"):
                show(networks, system, config, path)
        r.finish()
    return r.folder


def show(networks: dict[str, nn.Module], system: ModuleType, config: Gan, path: Path) -> None:
    """Samples as a PNG: of the toy 200 of each group in its colour, of images one row a group; always from the same noise."""
    n = 200 if config.dataset in toy.VARIANCE else 10
    made = generate_many(networks, system, config, n, run.generator(0, "samples"))
    if config.dataset in toy.VARIANCE:
        points, groups = toy.dataset(config.dataset).train_images, torch.arange(config.groups).repeat_interleave(n)
        save_scatters({"": (points, made, groups)}, path)
    else:
        save_grid((made + 1) / 2, path, columns=n)


@torch.no_grad()
def generate_many(
    networks: dict[str, nn.Module],
    system: ModuleType,
    config: Gan,
    n: int,
    noise: torch.Generator,
    multiplier: float = 1.0,
    convert: Callable[[Tensor], Tensor] = Tensor.cpu,
) -> Tensor:
    """n points or images of each group, (groups · n, …) on the CPU, group by group, in batches; batch normalisation by its running means.

    noise: a generator on the CPU. convert: what is kept of each batch.
    """
    device = next(networks["generator"].parameters()).device
    components = torch.arange(config.groups).repeat_interleave(n)
    parts, mode = [], networks["generator"].training
    networks["generator"].eval()
    for k in components.split(1000):
        epsilon = torch.randn(len(k), config.latent_dim, generator=noise)
        parts.append(convert(system.generate(networks, epsilon.to(device), k.to(device), multiplier)))
    networks["generator"].train(mode)
    return torch.cat(parts)


def main(argv: list[str] | None = None) -> None:
    config, options = run.parse("gmgan", argv)
    if options.describe:
        system = system_of(vars(config))
        print(run.describe(system.build(config), system.examples(config), config, options.json))
    else:
        train(config, options)


if __name__ == "__main__":
    run.exit_with(main)
