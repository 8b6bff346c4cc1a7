"""Tests of GM-GAN: prior, losses, maps, networks, toy, scores, clustering, by independent computations; end to end."""

import copy
import dataclasses
import itertools
import json
import math
import os
import shutil

import numpy as np
import pytest
import scipy.stats
import sklearn.cluster
import sklearn.metrics
import torch
from PIL import Image
from torch.nn import functional as F

import gmgan
from common import classifier, diff, plots, run
from common.data import Dataset
from gmgan import acgan, kmeans, scores, toy, train
from gmgan import eval as gmgan_eval
from gmgan import figures as gmgan_figures
from gmgan.model import (
    GMGAN,
    Discriminator,
    Mixture,
    ToImage,
    as_input,
    correspondence,
    generator,
    to_bytes,
)
from tests.conftest import call, run_command

TINY = {"width": 2, "latent_dim": 3, "batch_real": 4, "batch_fake": 6}


# --------------------------------------------------------------------------------------------------------- the prior


@pytest.mark.parametrize("kind", ["static", "dynamic", "dynamic_diagonal"])
@pytest.mark.parametrize("sigma_is, variance", [("deviation", 0.3**2), ("variance", 0.3)])
@pytest.mark.parametrize("multiplier", [1.0, 0.5, 2.0])
def test_latents_have_the_stated_moments(kind, sigma_is, variance, multiplier):
    torch.manual_seed(1)
    prior = {"n_components": 3, "latent_dim": 2, "mean_range": 2.0, "sigma": 0.3, "sigma_is": sigma_is}
    mixture = train.Config(dataset="toy", mixture=kind, **prior).build().mixture
    n = 40_000
    k = torch.arange(3).repeat_interleave(n)
    z = mixture(torch.randn(3 * n, 2, generator=torch.Generator().manual_seed(0)), k, multiplier).view(3, n, 2)
    torch.testing.assert_close(z.mean(1), mixture.means, atol=5 * math.sqrt(2 * variance / n), rtol=0)
    for part in z:
        expected = multiplier * variance * torch.eye(2)
        torch.testing.assert_close(torch.cov(part.T), expected, atol=0.03 * multiplier * variance, rtol=0)
    assert len(list(mixture.parameters())) == (0 if kind == "static" else 2)
    assert mixture.scales.shape == {"static": (), "dynamic": (3, 2, 2), "dynamic_diagonal": (3, 2)}[kind]
    assert mixture.state_dict().keys() == {"means", "scales"}  # a run that is loaded has the prior that G learned from


def test_a_dynamic_gaussian_may_take_any_covariance():
    mixture = Mixture(2, 2, 1.0, 0.1, "dynamic")
    matrix = torch.tensor([[1.0, 0.5], [-0.3, 2.0]])
    with torch.no_grad():
        mixture.scales[1] = matrix
    z = mixture(torch.eye(2), torch.tensor([1, 1]))
    torch.testing.assert_close(z - mixture.means[1], matrix.T)


def test_means_are_uniform_in_their_range_and_a_classical_gan_has_a_standard_normal():
    torch.manual_seed(0)
    means = Mixture(400, 100, 0.1, 0.15, "static").means
    assert means.abs().max() <= 0.1 and abs(means.var().item() - 0.1**2 / 3) < 1e-4 and abs(means.mean().item()) < 1e-3
    gan = run.experiment_config("gmgan", "mnist-gan")
    noise = torch.randn(5, gan.latent_dim)
    assert torch.equal(gan.build().mixture(noise, torch.zeros(5, dtype=torch.int64)), noise)


@pytest.mark.parametrize("kind", ["dynamic", "dynamic_diagonal"])
def test_gradients_reach_means_and_scales_by_the_reparametrisation(kind):
    torch.manual_seed(0)
    mixture = Mixture(2, 3, 1.0, 0.5, kind).double()
    inputs = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    names, values = zip(*mixture.named_parameters(), strict=True)

    def latents(*moved):
        return torch.func.functional_call(mixture, dict(zip(names, moved, strict=True)), inputs)

    assert len(names) == 2 and torch.autograd.gradcheck(latents, values)  # by finite differences


# -------------------------------------------------------------------------------------------------------- the losses


def test_losses_by_hand():
    """Algorithm 1, lines 10-16 and 22-26. Without labels, one output stands for every class and Gaussian."""

    def one(row: list[float], wanted: int | None) -> float:  # D = 1 / (1 + e⁻ˣ), 1 - D = 1 / (1 + eˣ)
        return sum(math.log(1 + math.exp(-x if m == wanted else x)) for m, x in enumerate(row))

    unsupervised = train.Config(dataset="toy", n_components=2, **TINY).build()
    supervised = train.Config(n_classes=3, n_components=4, supervised=True, class_map="2,1,0,1", **TINY).build()
    logits = torch.tensor([[0.4, -1.2, 0.1], [2.0, 0.3, -0.7]]), torch.tensor([[-0.5, 1.0, 0.2], [0.9, -2.0, 0.6]])
    for model, labels, classes, k, targets in (  # f(3) = 1, f(0) = 2
        (unsupervised, [8, 3], [0, 0], [1, 0], [0, 0]),
        (supervised, [2, 0], [2, 0], [3, 0], [1, 2]),
    ):
        real, fake = (x[:, : 3 if model is supervised else 1].tolist() for x in logits)
        expected = sum(one(row, c) for row, c in zip(real, classes, strict=True)) + sum(one(row, None) for row in fake)
        found = model.discriminator_loss(torch.tensor(real), torch.tensor(fake), torch.tensor(labels))
        assert found.item() == pytest.approx(expected / 4, rel=1e-6)  # 1 / (2 b_D), b_D = 2
        expected = sum(one(row, t) for row, t in zip(fake, targets, strict=True)) / 2
        assert model.generator_loss(torch.tensor(fake), torch.tensor(k)).item() == pytest.approx(expected, rel=1e-6)


def descend(loss: torch.Tensor, network: torch.nn.Module, *more: torch.nn.Module) -> torch.Tensor:
    """One step of SGD with rate 1, written out. Returns the norm of the gradient."""
    parameters = [p for module in (network, *more) for p in module.parameters()]
    gradients = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        for p, gradient in zip(parameters, gradients, strict=True):
            p -= gradient
    return torch.cat([gradient.flatten() for gradient in gradients]).norm()


def replayed(model: GMGAN, batch: train.Batch) -> dict[str, torch.Tensor]:
    """A step of Algorithm 1 written out, with the same draws in the same order and SGD of rate 1 in place of Adam."""
    config, noise = model.config, run.generator(7, "step")
    k_d = torch.randint(config.components, (len(batch.real),), generator=noise)
    e_d = torch.randn(len(batch.real), config.latent_dim, generator=noise)
    k_g = torch.randint(config.components, (config.batch_fake,), generator=noise)
    e_g = torch.randn(config.batch_fake, config.latent_dim, generator=noise)
    mixture, g, d = model.mixture, model.generator, model.discriminator

    def bce(logits, rows):
        wanted = torch.zeros_like(logits) if rows is None else F.one_hot(rows, logits.shape[1]).to(logits.dtype)
        return F.binary_cross_entropy(logits.sigmoid(), wanted, reduction="sum")

    if config.supervised:
        real_rows = batch.labels % min(config.components, config.class_count)  # K < N: classes may share a Gaussian
        fake_rows = k_g % config.class_count  # K > N: several Gaussians may share a class
    else:
        real_rows, fake_rows = torch.zeros_like(batch.labels), torch.zeros_like(k_g)
    fake = g(mixture(e_d, k_d)).detach()
    on_real, on_fake = d(batch.real), d(fake)  # each with the batch statistics of its own (ledger 10)
    shown = {"real": on_real.sigmoid()[:, 0].mean(), "fake": on_fake.sigmoid()[:, 0].mean()}
    d_loss = (bce(on_real, real_rows) + bce(on_fake, None)) / (2 * len(batch.real))
    d_grad = descend(d_loss, d)
    g_loss = bce(d(g(mixture(e_g, k_g))), fake_rows) / config.batch_fake
    g_grad = descend(g_loss, g, mixture)
    return {"d_loss": d_loss, "g_loss": g_loss, **shown, "d_grad": d_grad, "g_grad": g_grad}


@pytest.fixture
def double():
    """Make float64 the default, so that noise has it too."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def sgd(model, rate: float = 1.0) -> dict[str, torch.optim.Optimizer]:
    return {player: torch.optim.SGD(parameters, lr=rate) for player, parameters in model.players().items()}


POINTS, IMAGES = ("toy", (4, 2)), ("digits", (4, 1, 28, 28))  # images: with batch normalisation


@pytest.mark.parametrize("dataset, shape", [POINTS, IMAGES], ids=["points", "images"])
@pytest.mark.parametrize("supervised, n_components", [(False, 18), (True, 18), (True, 9), (True, 4)])  # 9, 10 classes
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_a_step_is_algorithm_1(supervised, n_components, kind, dataset, shape, double):
    values = {"n_components": n_components, "mixture": kind, "supervised": supervised}
    torch.manual_seed(0)
    ours = train.Config(dataset=dataset, **values, **TINY).build().double()
    theirs = copy.deepcopy(ours)
    batch = train.Batch(torch.randn(shape).tanh(), torch.tensor([0, 8, 3, 3]), run.generator(7, "step"))
    torch.testing.assert_close(train.train_step(ours, sgd(ours), batch), replayed(theirs, batch))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("dataset, shape", [POINTS, IMAGES], ids=["points", "images"])
def test_a_step_of_acgan_by_the_plain_formulas(dataset, shape, double):
    torch.manual_seed(0)
    model = acgan.Config(dataset=dataset, **TINY | {"width": 8}).build().double()
    plain, n = copy.deepcopy(model), model.config.class_count
    real, labels = torch.randn(shape).tanh(), torch.tensor([0, 8, 3, 5])
    acgan.train_step(model, sgd(model), train.Batch(real, labels, run.generator(7)))
    noise = run.generator(7)
    c_d, e_d = torch.randint(n, (4,), generator=noise), torch.randn(4, 3, generator=noise)
    c_g, e_g = torch.randint(n, (6,), generator=noise), torch.randn(6, 3, generator=noise)
    g, d = plain.generator, plain.discriminator

    def log_likelihoods(x, source: float, classes):  # L_S and L_C of these samples
        out = d(x)
        is_real = out[:, 0].sigmoid()
        chosen = out[:, 1:].softmax(1).gather(1, classes[:, None])[:, 0]
        return (source * is_real + (1 - source) * (1 - is_real)).log().mean(), chosen.log().mean()

    fake = g(torch.cat([e_d, F.one_hot(c_d, n).double()], 1)).detach()
    d_loss = -(sum(log_likelihoods(real, 1.0, labels)) + sum(log_likelihoods(fake, 0.0, c_d))) / 2
    descend(d_loss, d)
    g_loss = -sum(log_likelihoods(g(torch.cat([e_g, F.one_hot(c_g, n).double()], 1)), 1.0, c_g))
    descend(g_loss, g)
    torch.testing.assert_close(model.state_dict(), plain.state_dict())
    doubled = torch.cat([2 * e_d, F.one_hot(c_d, n).double()], 1)
    torch.testing.assert_close(plain.generate(e_d, c_d, 4.0), g(doubled))  # σ is a factor on the covariance


def test_bf16_is_the_networks_arithmetic_and_losses_stay_in_fp32():
    def d_loss(precision):
        torch.manual_seed(0)
        model = train.Config(width=2, n_components=2).build()
        batch = train.Batch(torch.rand(8, 1, 28, 28) * 2 - 1, torch.zeros(8, dtype=torch.int64), run.generator(0))
        return train.train_step(model, sgd(model), batch, precision)["d_loss"]

    assert d_loss("bf16").dtype == torch.float32 and 0 < abs(d_loss("bf16") / d_loss("fp32") - 1) < 0.03


@pytest.mark.parametrize("module", [train, acgan, kmeans])
def test_the_precision_is_the_one_asked_for(module):
    model, seen = module.Config(dataset="digits", **({} if module is kmeans else TINY)).build(), []
    for network in (model.encoder, model.decoder) if module is kmeans else (model.generator, model.discriminator.body):
        network[1].register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    batch = train.Batch(torch.rand(4, 1, 28, 28), torch.arange(4), run.generator(0))
    for precision in ("fp32", "bf16"):
        module.train_step(model, sgd(model), batch, precision)
        assert {*seen} == {precision == "bf16"}
        seen.clear()


def test_the_map_between_gaussians_and_classes():
    assert [t.tolist() for t in correspondence(3, 3, None)] == [[0, 1, 2], [0, 1, 2]]
    assert [t.tolist() for t in correspondence(5, 3, None)] == [[0, 1, 2, 0, 1], [0, 1, 2]]  # f: 0, 3 share class 0
    assert [t.tolist() for t in correspondence(2, 3, None)] == [[0, 1], [0, 1, 0]]  # g: classes share a Gaussian
    assert [t.tolist() for t in correspondence(4, 2, "1,1,0,1")] == [[1, 1, 0, 1], [0, 1]]
    assert [t.tolist() for t in correspondence(2, 4, "1, 1, 0, 1")] == [[0, 1], [1, 1, 0, 1]]


@pytest.mark.parametrize(
    "k, n, text, message",
    [
        (3, 3, "0,1,3", "class 3 does not exist; expected 0 … 2"),
        (3, 3, "0,1,-1", "class -1 does not exist"),
        (4, 3, "0,1,1,0", "leaves class 2 without a Gaussian"),
        (2, 3, "0,2,1", "Gaussian 2 does not exist; expected 0 … 1"),
        (2, 3, "0,0,0", "leaves Gaussian 1 without a class"),
        (3, 3, "0,1", "names 2 Gaussians, expected 3: K = 3, N = 3"),
        (2, 3, "0,1", "names 2 classes, expected 3: K = 2, N = 3"),
        (3, 3, "0,one,2", "expected integers with commas, one for each Gaussian, found '0,one,2'"),
    ],
)
def test_a_map_that_is_none_is_refused(k, n, text, message):
    with pytest.raises(ValueError) as refused:
        correspondence(k, n, text)
    assert str(refused.value).startswith("--class-map: ") and message in str(refused.value)


# ---------------------------------------------------------------------------------------------------------- networks

SIDES = {28: [(128, 7), (64, 14)], 32: [(256, 4), (128, 8), (64, 16)], 40: [(256, 5), (128, 10), (64, 20)]}
SIDES[96] = [(512, 6), (256, 12), (128, 24), (64, 48)]


@pytest.mark.parametrize("channels, side", [(1, 28), (3, 32), (3, 40), (3, 96)])
def test_shapes_of_the_image_networks(channels, side):
    shape = (channels, side, side)
    seen = []

    def note(module, _, output):
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d | ToImage):
            seen.append((output.shape[1], output.shape[2]))

    g, d = generator(100, shape, 64, True), Discriminator(shape, 10, 64, True)
    for module in [*g.modules(), *d.modules()]:
        module.register_forward_hook(note)
    images = g(torch.randn(2, 100))
    assert images.shape == (2, *shape) and images.abs().max() <= 1
    assert seen == [*SIDES[side], (channels, side)]
    seen.clear()
    assert d(images).shape == (2, 10)
    assert seen == SIDES[side][::-1]
    norms = [m.num_features for m in d.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms == [depth for depth, _ in SIDES[side][::-1][1:]]  # no norm next to the image


def test_shapes_of_the_auto_encoder():
    model = run.experiment_config("gmgan", "fashion-kmeans").build()
    widths = [m.out_features for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert widths == [500, 500, 2000, 10, 2000, 500, 500, 784]


def normalised(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Batch normalisation in training mode, over all dimensions except the channels."""
    x = x.movedim(1, -1)
    over = tuple(range(x.dim() - 1))
    x = (x - x.mean(over)) / (x.var(over, unbiased=False) + 1e-5).sqrt() * scale + shift
    return x.movedim(-1, 1)


@pytest.mark.parametrize("dense", [0, 40])
@pytest.mark.parametrize("module", [train, acgan])
def test_the_image_networks_by_plain_formulas_and_their_first_weights(module, dense):
    torch.manual_seed(0)
    model = module.Config(dataset="mnist", width=16, dense_units=dense).build()
    for name, p in model.named_parameters():
        mean = float(p.dim() == 1 and name.endswith("weight"))  # 1 for the weights of batch normalisation
        assert abs(p.mean() - mean) < 0.1 / p.numel() ** 0.5  # five standard errors
        std = 0.02 * name.endswith("weight")
        assert p.numel() == 1 or abs(p.std() - std) <= std * 5 / (2 * p.numel()) ** 0.5, name
        p.data = mean + torch.randn_like(p) / (p[0].numel() if p.dim() > 1 else 16) ** 0.5  # so that each one matters

    def leaky(x):
        return torch.where(x > 0, x, 0.2 * x)

    z, left = torch.randn(5, 110 if module is acgan else 100), iter(model.generator.parameters())
    h = F.linear(z, next(left), next(left))
    if dense:
        h = F.linear(normalised(h, next(left), next(left)).clamp(min=0), next(left), next(left))
    h = normalised(h.view(5, 7, 7, 32).permute(0, 3, 1, 2), next(left), next(left)).clamp(min=0)
    h = F.conv_transpose2d(h, next(left), next(left), stride=2, padding=1)
    h = normalised(h, next(left), next(left)).clamp(min=0)
    images = F.conv_transpose2d(h, next(left), next(left), stride=2, padding=1).tanh()
    torch.testing.assert_close(model.generator(z), images, atol=1e-5, rtol=1e-4)
    left = iter(model.discriminator.parameters())
    h = leaky(F.conv2d(images, next(left), next(left), stride=2, padding=1))
    h = leaky(normalised(F.conv2d(h, next(left), next(left), stride=2, padding=1), next(left), next(left)))
    h = h.permute(0, 2, 3, 1).flatten(1)
    if dense:
        h = leaky(normalised(F.linear(h, next(left), next(left)), next(left), next(left)))
    logits = F.linear(h, next(left), next(left))
    torch.testing.assert_close(model.discriminator(images), logits, atol=1e-4, rtol=1e-4)
    assert not [*left]


SECTION_4 = {"latent_dim": 100, "mean_range": 0.1, "sigma": 0.15, "batch_real": 64, "batch_fake": 128}
SECTION_4 |= {"learning_rate": 2e-4, "mixture": "static", "supervised": False}
BASELINE = {"n_components": 1, "mean_range": 0.0, "sigma": 1.0}  # Sec. 4: N(0, I)
OF_DATA = {  # K of Secs. 4.1, 5.2 and Table 2; the rest is ours: ledgers 4, 5, 6, 17
    "toy": {"dataset": "toy", "n_components": 9, "width": 256, "norm": "none", "beta1": 0.9, "epochs": 200},
    "digits": {"dataset": "digits", "width": 32, "epochs": 100},
    "mnist": {"dataset": "mnist", "epochs": 54},
    "fashion": {"dataset": "fashion_mnist", "epochs": 54},
    "cifar10": {"dataset": "cifar10", "width": 128, "epochs": 128},
    "stl10": {"dataset": "stl10", "epochs": 1282},
    "signs": {"dataset": "signs:data/signs", "n_classes": 10, "epochs": 172},
}
OF_PART = {"gan": BASELINE, "supervised": {"supervised": True}, "dynamic": {"mixture": "dynamic"}, "acgan": {}}
OF_PART |= {"k20": {"n_components": 20}, "k30": {"n_components": 30}, "d2": {"latent_dim": 2}, "narrow": {"width": 32}}
OF_PART |= {"long": {"epochs": 216, "purity_every": 5}, "c015": {"mean_range": 0.15, "purity_every": 5}}
OF_PART |= {"dense": {"dense_units": 1024, "purity_every": 5}}
OF_PART |= {"all": {"n_classes": None, "n_components": None, "epochs": 40}}
KMEANS = {"latent_dim": 10, "batch_real": 256, "learning_rate": 1e-3, "beta1": 0.9}  # ledger 18
NARROW = {"gan", "acgan", "k20", "dynamic", "supervised"}  # narrow on mnist and fashion: ledger 27


def test_every_value_of_every_config_is_the_paper_s_or_the_ledger_s():
    for experiment in run.experiments("gmgan"):
        data, *parts = experiment.split("-")
        ours = {"n_classes": None, "classes": None, "n_components": 10, "sigma_is": "deviation", "class_map": None}
        ours |= {"cluster_samples": 1000 if experiment in ("digits", "digits-dynamic") else 10_000}
        ours |= {"width": 64, "norm": "batch", "beta1": 0.5, "dense_units": 0, "purity_every": 0}
        expected = SECTION_4 | ours | OF_DATA[data]
        if "kmeans" in parts:
            expected |= KMEANS | {"epochs": 200 if data == "digits" else 30}
        else:
            for part in parts:
                expected |= OF_PART[part]
            expected |= {"width": 32} if data in ("mnist", "fashion") and NARROW & {*parts} else {}
        found = dataclasses.asdict(run.experiment_config("gmgan", experiment))
        assert found == {key: expected[key] for key in found}, experiment


# ----------------------------------------------------------------------------------------------------------- the toy


@pytest.mark.parametrize("name, variance", [("toy", 0.1), ("toy_apart", 0.01)])
def test_the_toy_is_section_4_1(name, variance):
    data = toy.dataset(name)
    assert data.train_images.shape == (5000, 2) and data.n_classes == 9 and len(data.test_images) == 0
    means = torch.stack([data.train_images[data.train_labels == k].mean(0) for k in range(9)])
    expected = torch.tensor(list(itertools.product((-1.0, 0, 1), repeat=2)))
    torch.testing.assert_close(means, expected, atol=0.06, rtol=0)
    inside = data.train_images - toy.MODES[data.train_labels]
    torch.testing.assert_close(torch.cov(inside.T), variance * torch.eye(2), atol=0.06 * variance, rtol=0)


def test_negative_log_likelihood_and_entropy_against_scipy():
    from scipy.stats import multivariate_normal

    for name, variance in (("toy", 0.1), ("toy_apart", 0.01)):
        x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
        modes = itertools.product((-1, 0, 1), repeat=2)
        density = sum(multivariate_normal(m, variance * np.eye(2)).pdf(x.numpy()) for m in modes) / 9
        assert toy.negative_log_likelihood(x, name) == pytest.approx(-np.log(density).mean(), rel=1e-5)
    gaussian = multivariate_normal([0, 0], [[2.0, 0.5], [0.5, 0.3]])
    points = torch.from_numpy(gaussian.rvs(20_000, random_state=0))
    assert toy.entropy(points) == pytest.approx(gaussian.entropy(), abs=0.02)
    data = toy.dataset().train_images  # the entropy of the true density is its expected negative log-likelihood
    assert toy.entropy(data) == pytest.approx(toy.negative_log_likelihood(data), abs=0.05)


def test_samples_of_the_toy_are_labelled_by_their_gaussian_and_spread_by_sigma(monkeypatch, tmp_path):
    torch.manual_seed(0)
    values = {"latent_dim": 2, "mean_range": 1.0, "sigma": 1e-3}
    model = run.experiment_config("gmgan", "toy", values).build()
    model.generator = torch.nn.Identity()  # the samples are the latent vectors
    points, groups = toy.samples(model)
    assert torch.equal(torch.cdist(points, model.mixture.means).argmin(1), groups)
    assert groups.bincount().tolist() == [556] * 9  # 5,000 or a few more
    wider, _ = toy.samples(model, 4.0)  # a factor on the covariance
    means = model.mixture.means[groups]
    torch.testing.assert_close(wider - means, 2 * (points - means), atol=1e-6, rtol=0)
    drawn = {}
    monkeypatch.setattr(toy, "save_scatters", lambda panels, path: drawn.update(panels | {path.stem: panels.get("")}))
    toy.figures(model, tmp_path)
    for name, by in (("σ = 0.1", 0.1), ("σ = 2", 2.0), ("samples", 1.0)):
        torch.testing.assert_close(drawn[name][1] - means, by**0.5 * (points - means), atol=1e-6, rtol=0)
    toy.save_samples(model, tmp_path / "epoch.png")
    _, points, groups = drawn["epoch"]
    assert torch.equal(torch.cdist(points, model.mixture.means).argmin(1), groups)


def test_main_modes():
    points = toy.MODES.repeat_interleave(10, 0)
    assert toy.main_modes(points, torch.arange(9).repeat_interleave(10)) == (100, 9)
    assert toy.main_modes(points, torch.zeros(90, dtype=torch.int64)) == (pytest.approx(100 / 9), 1)
    assert toy.main_modes(points[:20], torch.arange(2).repeat(10)) == (50, 1)  # two groups, both on the same two modes


def test_convergence():
    found = toy.convergence([9.0] * 30 + [2.0] * 40)  # the median of 20 values is 2.0 once half of them are
    assert found["close_after"] == found["settled_after"] == 40 and found["mean_nll"] == pytest.approx(5)
    spike = toy.convergence([9.0] * 10 + [2.0] * 40 + [9.0] * 15 + [2.0] * 35)  # it arrives, leaves and comes back
    assert spike["close_after"] == 20 and spike["settled_after"] > 65
    noise = toy.convergence([2.0 + 0.9 * (i % 3 == 0) for i in range(60)])  # single outlying epochs do not count
    assert noise["close_after"] == noise["settled_after"] == 20
    assert toy.convergence([5.0, 4.0])["settled_after"] == 2
    assert [toy.convergence([2 + x] * 30 + [2.0] * 40)["close_after"] for x in (0.24, 0.26)] == [20, 40]  # 0.25 nats


def test_a_supervised_toy_is_judged_by_its_map(monkeypatch):
    points, groups = toy.MODES.repeat_interleave(3, 0), torch.arange(9).repeat_interleave(3)
    model = run.experiment_config("gmgan", "toy-supervised", {"class_map": "8,7,6,5,4,3,2,1,0"}).build()
    monkeypatch.setattr(toy, "samples", lambda *_: (points.flip(0), groups))
    assert toy.scores(model, [{"epoch": 1, "nll": 2.0}])["samples_of_their_class"] == 100
    monkeypatch.setattr(toy, "samples", lambda *_: (points, groups))
    found = toy.scores(model, [{"epoch": 1, "nll": 2.0}])
    assert found["samples_of_their_class"] == pytest.approx(100 / 9)
    assert found["covered_modes"] == 9 and found["purity"] == 100
    own = (1 - 4 / 3 * scipy.stats.norm.sf(0.5 / math.sqrt(0.1))) ** 2  # nearest to their own mode, along both axes
    assert found["data_purity"] == pytest.approx(100 * own, abs=3)
    model = run.experiment_config("gmgan", "toy-acgan").build()  # its class c is mode c
    assert toy.scores(model, [{"epoch": 1, "nll": 2.0}])["samples_of_their_class"] == 100
    for copies, covered in ((1, 8), (2, 9)):  # the last mode has 0.6 or 1.2 % of samples; it needs a tenth of a ninth
        several = torch.cat([toy.MODES[:8].repeat(20, 1), toy.MODES[8:].repeat(copies, 1)])
        monkeypatch.setattr(toy, "samples", lambda *_, x=several: (x, torch.zeros(len(x), dtype=torch.int64)))
        assert toy.scores(model, [])["covered_modes"] == covered
    assert "settled_after" not in toy.scores(model, [])  # a run that was stopped in its first epoch has no rows
    monkeypatch.setattr(toy, "samples", lambda *_, **__: (points, groups))
    apart = run.experiment_config("gmgan", "toy", {"dataset": "toy_apart"}).build()
    at_modes = math.log(9) + math.log(2 * math.pi * 0.01)  # -log p at a mode, if the Gaussians do not overlap
    found, course = toy.scores(apart, []), toy.course(apart)
    assert found["nll"] == found["nll_at_0.5"] == course["nll"] == pytest.approx(at_modes)
    assert (found["data_nll"], found["data_entropy"]) == pytest.approx((at_modes + 1, at_modes + 1), abs=0.06)


# ------------------------------------------------------------------------------------------------------------ scores


@pytest.mark.parametrize("shape, n_scales", [((1, 28, 28), 2), ((3, 32, 32), 2), ((3, 40, 40), 2), ((3, 96, 96), 4)])
def test_ms_ssim_against_torchmetrics(shape, n_scales):
    """By its SSIM at each scale, cut where the window fits; its MS-SSIM mirrors borders at the last scale."""
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    assert scores.scales(shape[1]) == n_scales
    g = torch.Generator().manual_seed(0)
    first = torch.rand(3, *shape, generator=g)
    near = (first + 0.2 * torch.randn(3, *shape, generator=g)).clamp(0, 1)
    weights = [0.0448, 0.2856, 0.3001, 0.2363, 0.1333][:n_scales]  # Wang, Simoncelli, Bovik 2003
    weights = [w / sum(weights) for w in weights]
    for second in (first, near, torch.rand(3, *shape, generator=g), 1 - first):
        x, y, expected = first, second, torch.ones(3)
        for i in range(n_scales):
            _, contrast = ssim(y, x, data_range=1.0, reduction="none", return_contrast_sensitivity=True)
            _, whole = ssim(y, x, data_range=1.0, reduction="none", return_full_image=True)
            part = contrast if i < n_scales - 1 else whole[..., 5:-5, 5:-5].mean((1, 2, 3))
            expected = expected * part.clamp(min=0) ** weights[i]
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        torch.testing.assert_close(scores.ms_ssim(first, second), expected, atol=1e-4, rtol=1e-4)
    assert (scores.ms_ssim(first, first) - 1).abs().max() < 1e-5
    with pytest.raises(ValueError, match="at least 11×11"):
        scores.ms_ssim(torch.rand(1, 1, 10, 10), torch.rand(1, 1, 10, 10))


def test_intra_class_diversity_estimates_the_sum_over_all_pairs(monkeypatch):
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 1, 28, 28), dtype=torch.uint8, generator=g)
    images[6:] = images[0]
    floats = images.float() / 255
    exact = 1 - torch.stack([scores.ms_ssim(floats, one.expand_as(floats)) for one in floats]).mean().item()
    found, error = scores.intra_class_diversity(images, 4000, g)
    assert abs(found - exact) < 4 * error and 0 < error < 0.02
    same, error = scores.intra_class_diversity(images[:1].repeat(5, 1, 1, 1), 50, g)
    assert same == pytest.approx(0, abs=1e-5) and error == pytest.approx(0, abs=1e-5)  # copies of one image
    monkeypatch.setattr(scores, "ms_ssim", lambda *pair: torch.stack(pair).amax((0, 2, 3, 4)))
    assert scores.intra_class_diversity(torch.full((5, 1, 2, 2), 255, dtype=torch.uint8), 150, g)[0] == 0  # 255 is 1


def test_quality_at_its_corners():
    train_features = 30 * torch.rand(300, 64, generator=torch.Generator().manual_seed(0))
    distances = scores.nearest_distances(train_features, train_features)
    log_a = 3.0
    a = math.exp(log_a)
    # A copy of the training set has the largest value of eq. (6), 1 - 1 / (1 + a).
    torch.testing.assert_close(scores.quality(distances, log_a), torch.full((300,), 1 - 1 / (1 + a)), atol=1e-5, rtol=0)
    far = torch.tensor([0.5, 3.0, 40.0, 1000.0])
    expected = [1 - math.exp(d) / (math.exp(d) + a) for d in (0.5, 3.0, 40.0)]
    torch.testing.assert_close(scores.quality(far, log_a)[:3], torch.tensor(expected), atol=1e-6, rtol=0)
    assert scores.quality(far, log_a)[1] == 0.5 and scores.quality(far, log_a)[3] == 0  # no overflow
    brute = torch.stack([(train_features[0] + 1 - t).norm() for t in train_features]).min()
    found = scores.nearest_distances(train_features[:1] + 1, train_features)
    assert found.item() == pytest.approx(brute.item(), rel=1e-5)


def test_inter_class_diversity_and_what_is_made_of_it():
    assert scores.inter_class_diversity(torch.arange(10).repeat(7), 10) == pytest.approx(1)
    assert scores.inter_class_diversity(torch.zeros(7, dtype=torch.int64), 10) == 0
    shares = torch.tensor([0.5, 0.25, 0.25, 0])
    expected = -(shares[:3] * shares[:3].log()).sum().item() / math.log(4)
    assert scores.inter_class_diversity(torch.tensor([0, 0, 1, 2]), 4) == pytest.approx(expected)
    assert scores.diversity(0.25, 1.0) == 0.5 and scores.combined(0.25, 1.0) == 0.5


def test_inception_score_against_torch_fidelity():
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * torch.randn(200, 1008, generator=torch.Generator().manual_seed(0))
    theirs = isc_features_to_metric(logits, splits=10, shuffle=False)["inception_score_mean"]
    assert scores.inception_score(logits) == pytest.approx(theirs, rel=1e-5)


def test_algorithm_2_on_known_clusters(monkeypatch):
    g = torch.Generator().manual_seed(0)

    def stripes(k: torch.Tensor) -> torch.Tensor:  # cluster k: a bright band in rows 7k … 7k + 6, over noise
        images = torch.randint(0, 60, (len(k), 1, 28, 28), dtype=torch.uint8, generator=g)
        for image, row in zip(images, (7 * k).tolist(), strict=True):
            image[0, row : row + 7] += 150
        return images

    labels = torch.randint(4, (200,), generator=g)
    order = torch.tensor([2, 0, 3, 1])  # Gaussian k generates class order[k]
    model = coded(n_components=4, n_classes=4, cluster_samples=60)
    monkeypatch.setattr(model, "sample", lambda n, seed: stripes(order.repeat_interleave(n)))
    monkeypatch.setattr(classifier, "LEAST_STEPS", 100)
    images = stripes(labels)
    clusters = model.cluster(images)
    assert torch.equal(order[clusters], labels) and torch.equal(model.cluster(as_input(images)), clusters)
    assert scores.clustering(clusters, labels, 4) == {"accuracy": 1, "nmi": pytest.approx(1)}


def test_kmeans_finds_what_scikit_learn_finds(monkeypatch):
    from sklearn.cluster import KMeans

    seen = []
    monkeypatch.setattr(sklearn.cluster, "KMeans", lambda k, **how: seen.append((k, how)) or KMeans(k, **how))
    from sklearn.metrics import normalized_mutual_info_score

    data = narrow_digits()
    config = dataclasses.replace(run.experiment_config("gmgan", "digits-kmeans"), latent_dim=2)
    torch.manual_seed(0)
    model = config.build()
    found = model.scores(data, 3)
    pixels = data.train_images.flatten(1).double().numpy()
    codes = decoded_by_hand(model.encoder, data.train_images / 127.5 - 1).detach().numpy()
    for name, points in (("kmeans", pixels), ("ae_kmeans", codes)):
        fitted = KMeans(3, n_init=10, random_state=3).fit(points)
        theirs = normalized_mutual_info_score(data.train_labels, fitted.labels_, average_method="geometric")
        assert found[f"{name}_nmi"] == pytest.approx(theirs, abs=1e-6)
        if name == "kmeans":
            assigned = fitted.predict(data.test_images.flatten(1).double().numpy())
            theirs = normalized_mutual_info_score(data.test_labels, assigned, average_method="geometric")
            assert found["kmeans_nmi_test"] == pytest.approx(theirs, abs=1e-6) != found["kmeans_nmi"]
    assert found["kmeans_accuracy"] > 0.8
    assert seen == [(3, {"n_init": 10, "random_state": 3})] * 2  # ledger 18
    names = itertools.product(("kmeans", "ae_kmeans"), ("accuracy", "nmi"), ("", "_test"))
    assert {f"{n}_{s}{t}" for n, s, t in names} == found.keys()


def decoded_by_hand(network: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The encoder or the decoder of DEC: ReLU between dense layers, none after the last."""
    h = x.flatten(1)
    for i, layer in enumerate(m for m in network.modules() if isinstance(m, torch.nn.Linear)):
        h = F.linear(h.clamp(min=0) if i else h, layer.weight, layer.bias)
    return h


def test_a_step_of_the_auto_encoder_by_the_plain_formulas():
    torch.manual_seed(0)
    model = kmeans.Config(dataset="digits").build()
    plain, images = copy.deepcopy(model), torch.rand(4, 1, 28, 28) * 2 - 1
    found = kmeans.train_step(model, sgd(model), train.Batch(images, torch.arange(4), run.generator(0)))
    decoded = decoded_by_hand(plain.decoder, decoded_by_hand(plain.encoder, images))
    mse = ((decoded - images.flatten(1)) ** 2).mean()
    torch.testing.assert_close(found, {"mse": mse, "grad": descend(mse, plain)}, rtol=1e-4, atol=0)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-6)


def narrow_digits(classes: int = 3) -> Dataset:
    config = dataclasses.replace(run.experiment_config("gmgan", "digits"), n_classes=classes)
    return train.load_data(config, run.Options("digits"))[1]


def test_pixels_go_to_the_networks_range_and_back():
    every = torch.arange(256, dtype=torch.uint8)
    inputs = as_input(every)
    assert inputs.min() == -1 and inputs.max() == 1 and torch.equal(to_bytes(inputs), every)
    assert to_bytes(torch.tensor([-3.0, 0.0, 3.0])).tolist() == [0, 128, 255]


def test_images_are_converted_or_refused():
    images = torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    encode = kmeans.Config(dataset="digits").build().encode
    torch.testing.assert_close(encode(images), encode(images.float() / 127.5 - 1))
    for wrong in (images.float(), images.long(), torch.full((1, 1, 28, 28), torch.nan)):
        for ask in (encode, train.Config(dataset="digits", width=2).build().cluster):
            with pytest.raises(ValueError, match=r"expected uint8, or floats in \[-1, 1\]"):
                ask(wrong)


class Coded(GMGAN):
    """Its images encode their origin: the first pixel is the group, the second the multiplier, three others are ε."""

    def generate(self, epsilon, groups, multiplier=1.0):
        images = torch.full((len(groups), 1, 28, 28), -1.0)
        images[:, 0, 0, 0], images[:, 0, 0, 1] = groups / 127.5 - 1, 20 * multiplier / 127.5 - 1
        images[:, 0, 1, :3] = epsilon[:, :3].clamp(-1, 1)
        return images


def coded(**values) -> Coded:
    return Coded(run.experiment_config("gmgan", "mnist", values | {"width": 2}))


def test_samples_are_of_the_groups_and_at_the_sigma_that_are_asked_for():
    model = coded(n_components=4, n_classes=4)
    images = model.sample(3, 2.0)
    assert images[:, 0, 0, 0].tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 and (images[:, 0, 0, 1] == 40).all()
    images, groups = model.sample_mixture(10, 0.5)
    assert torch.equal(images[:, 0, 0, 0].long(), groups) and groups.tolist() == [0, 1, 2, 3] * 2 + [0, 1]
    assert (images[:, 0, 0, 1] == 10).all()
    assert torch.equal(model.sample(3, 1.0)[:, 0, 1], model.sample(3, 2.0)[:, 0, 1])  # the same ε at every σ
    assert len({tuple(row) for row in images[:, 0, 1, :3].tolist()}) == 10
    assert not torch.equal(model.sample(3), model.sample(3, seed=1))
    assert not torch.equal(model.sample_mixture(3)[0], model.sample_mixture(3, seed=1)[0])


def test_figure_6_has_the_same_noise_at_each_sigma_and_figure_8_a_row_for_each_gaussian(monkeypatch, tmp_path):
    shown = {}
    monkeypatch.setattr(plots, "save_labelled_grid", lambda images, path, *_: shown.update({path.stem: images}))
    monkeypatch.setattr(plots, "save_curves", lambda panels, *_: shown.update(panels))
    found = {f"{s}_at_{0.5 + 0.1 * i:.1f}": j + i for j, s in ((0, "quality"), (50, "diversity")) for i in range(16)}
    gmgan_eval.figures(coded(n_components=3, n_classes=3), narrow_digits(3), found, tmp_path)
    for title, first in (("quality, eq. (7), 0 to 1", 0), ("diversity, eq. (10), 0 to 1", 50)):
        assert shown.pop(title)[""][1] == [*range(first, first + 16)]
    pixels = {name: (255 * images).round() for name, images in shown.items()}  # see `Coded`
    assert pixels["samples"][:, 0, 0, 0].tolist() == [0] * 10 + [1] * 10 + [2] * 10
    assert pixels["sigma"].view(4, 12, -1)[:, :, 1].unique(dim=1).flatten().tolist() == [2, 10, 20, 40]  # 20 σ


def test_samples_use_the_running_means_and_leave_the_mode_alone():
    model = run.experiment_config("gmgan", "digits", {"width": 2, "latent_dim": 3}).build()
    few, many = model.sample(1, stream=("x",))[:1], model.sample(20, stream=("x",))[:1]
    assert torch.equal(few, many) and model.training and model.generator.training
    before = copy.deepcopy(model.state_dict())
    model.sample(20)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_what_is_said_of_groups_and_classes():
    classes = torch.tensor([3, 3, 3, 1, 2, 2, 2, 2])
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    found = scores.groups_and_classes(coded(n_components=2, n_classes=4), classes, groups, 4)
    nmi = sklearn.metrics.normalized_mutual_info_score(classes, groups, average_method="geometric")
    assert found == {"component_purity": 87.5, "component_nmi": pytest.approx(nmi), "main_classes": 2}
    supervised = coded(supervised=True, n_components=4, n_classes=4, class_map="3,2,1,0")
    found = scores.groups_and_classes(supervised, torch.tensor([3, 2, 1, 3]), torch.tensor([0, 1, 2, 3]), 4)
    assert found == {"samples_of_their_class": 75}
    grouped = coded(supervised=True, n_components=2, n_classes=4)  # classes 0, 2 share Gaussian 0; 1, 3 share 1
    found = scores.groups_and_classes(grouped, torch.tensor([0, 2, 1, 3]), torch.tensor([0, 0, 0, 1]), 4)
    assert found == {"samples_of_their_class": 75}
    assert scores.groups_and_classes(coded(n_components=1), classes, groups, 4) == {}


def test_clustering_is_of_both_sets_and_in_this_order(monkeypatch):
    model = coded(n_components=4, n_classes=4, cluster_samples=5)
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (40,), generator=g)

    def images(labels):  # images as `Coded` makes them for group 3 - label
        made = torch.zeros(len(labels), 1, 28, 28, dtype=torch.uint8)
        made[:, 0, 0, 0] = (3 - labels).to(torch.uint8)
        return made

    seen = []
    monkeypatch.setattr(classifier, "train", lambda x, y, *_: seen.append((x[:, 0, 0, 0].long(), y)))
    monkeypatch.setattr(classifier, "classify", lambda network, x: x[:, 0, 0, 0].long())
    wrong = labels.clone()
    wrong[:10] = (wrong[:10] + 1) % 4  # a quarter of the test set is mislabelled
    data = Dataset("mnist", images(labels), labels, images(labels), wrong, tuple("abcd"), "0" * 16, False)
    found = gmgan_eval.clustering(model, data, 0)
    assert torch.equal(*seen[0]) and len(seen[0][0]) == 20  # M images of each Gaussian, labelled by it
    assert found["accuracy"] == 1 and found["accuracy_test"] == 0.75
    assert found["nmi"] == pytest.approx(1) and found["nmi_test"] < 0.8
    assert gmgan_eval.clustering(coded(n_components=5), data, 0) == {}


def test_scores_of_a_set_of_images():
    """The extreme cases of Sec. 3.2 with all scores: a copy of the training set, and many copies of one image."""
    data = narrow_digits(3)
    torch.manual_seed(0)
    network = classifier.Network((1, 28, 28), 3).eval()
    with torch.no_grad():  # no class has the largest logit on average, so there are several answers
        network.head[1].bias -= network(data.train_images).mean(0)
    judge = gmgan_eval.Judge(network, classifier.features(network, data.train_images).float(), 3.0, 3)
    same, classes = gmgan_eval.judged(judge, data.train_images, 0)
    assert same["quality"] == pytest.approx(1 / (1 + math.exp(-3.0)), abs=1e-5)
    assert torch.equal(classes, classifier.classify(network, data.train_images))
    shares = np.bincount(classes, minlength=3) / len(classes)
    assert 0 < shares.max() < 1  # this network has more than one answer
    inter = scipy.stats.entropy(shares, base=3)  # eq. (9)
    assert (same["diversity_inter"], same["largest_class"]) == pytest.approx((inter, 100 * shares.max()))
    assert same["diversity"] == pytest.approx(math.sqrt(same["diversity_intra"] * inter))  # eq. (10)
    assert same["combined"] == pytest.approx(math.sqrt(same["quality"] * same["diversity"]))  # eq. (11)
    one, _ = gmgan_eval.judged(judge, data.train_images[:1].repeat(50, 1, 1, 1), 0)
    assert one["diversity"] == one["combined"] == one["diversity_inter"] == 0 and one["largest_class"] == 100
    assert math.copysign(1, one["diversity"]) == 1  # not -0


def test_what_is_scored_of_how_many_samples(monkeypatch, capsys):
    """Ledgers 13, 15: 10,000 samples are scored, 5,000 at each σ of Fig. 7, 50,000 for Table 2; log a is a median."""
    assert (gmgan_eval.PAIRS, gmgan_eval.INCEPTION_SAMPLES, train.JUDGED) == (5000, 50_000, 5000)
    data, model, seen, judges = narrow_digits(3), coded(n_components=3, n_classes=3), [], []
    torch.manual_seed(0)
    network = classifier.Network((1, 28, 28), 3).eval()
    monkeypatch.setattr(classifier, "trained", lambda *_: (network, 99.0))
    monkeypatch.setattr(gmgan_eval, "clustering", lambda *_: {})

    def judged(judge, images, seed):
        seen.append(images)
        judges.append(judge)
        values = {name: i + float(len(seen)) for i, name in ((0, "quality"), (50, "diversity"), (90, "largest_class"))}
        return values, torch.zeros(len(images), dtype=torch.int64)

    monkeypatch.setattr(gmgan_eval, "judged", judged)
    found, _ = gmgan_eval.on_images(model, data, run.Options("digits", seed=3))
    real, test = (classifier.features(network, x) for x in (data.train_images, data.test_images))
    distances = torch.cdist(test, real, compute_mode="donot_use_mm_for_euclid_dist").min(1).values
    log_a = distances.median().item()
    assert found["log_a"] == pytest.approx(log_a, rel=1e-5) and found["classifier_accuracy"] == 99
    of_real = (1 - distances.exp() / (distances.exp() + math.exp(log_a))).mean().item()  # eqs. (6) and (7)
    assert found["quality_of_real_images"] == pytest.approx(of_real, rel=1e-4)
    for judge in judges:
        assert judge.network is network and torch.equal(judge.reference, real.float())
        assert judge.log_a == found["log_a"] and judge.n_classes == 3
    # All samples are judged to be of class 0, so each of the three Gaussians is one class.
    assert (found["component_purity"], found["component_nmi"], found["main_classes"]) == (100, 0, 1)
    assert torch.equal(seen[0], model.sample_mixture(10_000, 1.0, 3)[0])
    assert len(seen) == 17 and found["quality"] == 1
    assert capsys.readouterr().out.count("\nσ = ") == 16  # one line for each σ
    for i in range(16):
        sigma = round(0.5 + 0.1 * i, 1)
        assert torch.equal(seen[1 + i], model.sample_mixture(5000, sigma, 3)[0])
        assert [found[f"{n}_at_{sigma}"] for n in ("quality", "diversity", "largest_class")] == [i + 2, i + 52, i + 92]


def test_figure_7_compares_networks_of_one_width_by_means_and_standard_errors(monkeypatch, tmp_path):
    drawn = {}
    monkeypatch.setattr(plots, "save_curves", lambda panels, *_: drawn.update(panels))
    names = ("mnist-gan", "mnist", "mnist-narrow", "cifar10", "digits-dynamic")
    names += ("fashion-acgan", "fashion-supervised", "fashion-supervised-dynamic", "fashion", "fashion-narrow")
    found = {e: [{"quality_at_1.0": float(i), "diversity_at_1.0": 0.0}] for i, e in enumerate(names)}
    found["mnist-gan"] = [{f"{s}_at_{x}": x * i for s in ("quality", "diversity") for x in (10.0, 0.5)} for i in (1, 3)]
    gmgan_figures.figure_7(found, tmp_path)
    curves = drawn["MNIST, unsupervised: quality"]
    assert curves == {"GAN (2 seeds)": ([0.5, 10], [1, 20], [0.5, 10]), "GM-GAN (1 seed)": ([1.0], [2.0], [0.0])}
    assert drawn["CIFAR-10, unsupervised: quality"]["GM-GAN (1 seed)"][1] == [3.0]
    assert drawn["digits, unsupervised: quality"]["GM-GAN, dynamic (1 seed)"][1] == [4.0]
    supervised = {name: y for name, (_, y, _) in drawn["Fashion-MNIST, supervised: quality"].items()}
    assert supervised == {"AC-GAN (1 seed)": [5], "GM-GAN (1 seed)": [6], "GM-GAN, dynamic (1 seed)": [7]}
    assert drawn["Fashion-MNIST, unsupervised: quality"]["GM-GAN (1 seed)"][1] == [9.0]  # the narrow one, ledger 27
    toys = {"toy": [{"entropy_at_1.0": 2.0, "nll_at_1.0": 3.0}]}
    toys["toy-acgan"] = [{"entropy_at_1.0": 1.0, "nll_at_1.0": x} for x in (4.0, 6.0)]
    gmgan_figures.figure_4_curves(toys, tmp_path)  # diversity to the right, likelihood upwards
    assert drawn[""] == {"GM-GAN (1 seed)": ([2.0], [3.0], [0.0]), "AC-GAN (2 seeds)": ([1.0], [5.0], [1.0])}


# ----------------------------------------------------------------------------------------- experiments, end to end


def test_narrowing_to_classes():
    config = run.experiment_config("gmgan", "digits", {"classes": "7,2", "n_components": 2})
    whole = train.load_data(run.experiment_config("gmgan", "digits"), run.Options("digits"))[1]
    narrowed_config, data = train.load_data(config, run.Options("digits"))
    assert data.class_names == ("7", "2") and narrowed_config.class_count == 2 and data.digest != whole.digest
    sevens = whole.train_images[whole.train_labels == 7]
    assert torch.equal(data.train_images[data.train_labels == 0], sevens)
    assert torch.equal(data.test_images[data.test_labels == 1], whole.test_images[whole.test_labels == 2])
    assert len(data.test_labels) == (whole.test_labels == 7).sum() + (whole.test_labels == 2).sum()


@pytest.fixture(scope="module")
def fixtures(tmp_path_factory):
    """Tiny data sets under the names that the experiments ask for."""
    g = torch.Generator().manual_seed(0)
    root = tmp_path_factory.mktemp("signs")
    for c in range(12):
        (root / f"{c:02}").mkdir()
        for i in range(6):
            pixels = torch.randint(0, 255, (40, 40, 3), dtype=torch.uint8, generator=g) // 4 + 15 * c
            Image.fromarray(pixels.numpy()).save(root / f"{c:02}" / f"{i}.png")

    def make(name: str) -> Dataset:
        shape = train.SETS[name][0]
        labels = torch.arange(10).repeat(8)
        images = torch.randint(0, 60, (80, *shape), dtype=torch.uint8, generator=g)
        images += (15 * labels).to(torch.uint8).view(-1, 1, 1, 1)
        return Dataset(name, images, labels, images[:20], labels[:20], tuple("abcdefghij"), "0" * 16, False)

    return root, make


# Each kind of experiment on each kind of data. The others run the same code with other numbers; see the next test.
WALKED = [
    "mnist", "mnist-dynamic", "mnist-supervised", "mnist-k20", "mnist-gan", "mnist-acgan", "fashion-supervised-dynamic",
    "fashion-kmeans", "cifar10-supervised-k20", "stl10-acgan", "signs", "signs-all", "signs-kmeans",
]  # fmt: skip
STEPS = {"train": train.train_step, "acgan": acgan.train_step, "kmeans": kmeans.train_step}


@pytest.mark.parametrize("experiment", WALKED)
def test_two_steps_of_every_kind_of_experiment_and_its_evaluation(experiment, fixtures, tmp_path, monkeypatch):
    root, make = fixtures
    config = run.experiment_config("gmgan", experiment)
    signs = config.dataset.startswith("signs")
    small = {"epochs": 1, "latent_dim": 5, "batch_real": 20 if signs else 40, "width": 2, "batch_fake": 6}
    small |= {"cluster_samples": 5, "dataset": f"signs:{root}" if signs else config.dataset}
    small = {key: value for key, value in small.items() if hasattr(config, key)}
    if not signs:
        monkeypatch.setattr(train, "load", lambda name, *_: make(name))
    fewer = {"SAMPLES": 40, "CURVE_SAMPLES": 20, "PAIRS": 20, "MULTIPLIERS": (0.5, 1.0, 2.0)}
    of_others = {"LEAST_STEPS": 3, "MOST_STEPS": 3}, {"HIDDEN": (8, 8), "RESTARTS": 1}
    for module, values in zip((gmgan_eval, classifier, kmeans), (fewer, *of_others), strict=True):
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(gmgan_eval.inception, "find_weights", lambda _: (None, "no weights in this test"))
    options = run.Options(experiment, runs=tmp_path, device="cpu", unofficial_data=True)
    step = STEPS[run.module_of("gmgan", experiment)]
    folder = train.train(run.make_config(type(config), dataclasses.asdict(config) | small, "test"), options, step)
    result = gmgan_eval.evaluate(options)
    if experiment == "mnist":
        with monkeypatch.context() as other, pytest.raises(run.UserError, match="trained on mnist with digest"):
            other.setattr(train, "load", lambda name, *_: dataclasses.replace(make(name), digest="1" * 16))
            gmgan_eval.evaluate(options)
        shutil.copytree(folder, folder.with_name("seed1"))  # under another name the run keeps its own seed
        with monkeypatch.context() as other:
            other.setattr(gmgan_eval, "on_images", lambda model, data, options: ({"seed": options.seed}, {}))
            other.setattr(gmgan_eval, "figures", lambda *_: None)
            assert gmgan_eval.evaluate(dataclasses.replace(options, seed=1))["metrics"] == {"seed": 0}
    metrics = result["metrics"]
    assert result == json.loads((folder / "eval.json").read_text()) and all(map(math.isfinite, metrics.values()))
    pictures = {path.stem for path in (folder / "figures").glob("*.png")}
    model = gmgan.load(folder)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    if "kmeans" in experiment:
        assert pictures == {"training"} and {"kmeans_accuracy", "ae_kmeans_nmi_test"} <= metrics.keys()
        return
    assert pictures == {"samples", "sigma", "trade_off", "training"}
    measured = {"quality", "diversity", "combined", "quality_at_0.5", "diversity_at_2.0", "largest_class_at_0.5"}
    assert measured <= metrics.keys()
    labelled = "supervised" in experiment or "acgan" in experiment
    assert ("samples_of_their_class" in metrics) == labelled
    assert ("component_purity" in metrics) == (not labelled and "gan" not in experiment)
    assert ("accuracy" in metrics) == (experiment in ("mnist", "mnist-dynamic", "signs", "signs-all"))
    picture = model.sample(2)
    assert picture.dtype == torch.uint8 and picture.shape[1:] == config.shape


@pytest.mark.parametrize("experiment", [e for e in run.experiments("gmgan") if "kmeans" not in e])
def test_every_gan_builds_and_draws(experiment):
    config = run.experiment_config("gmgan", experiment)
    model = config.build()
    fake, groups = model.draw(2, torch.Generator())
    outputs = {"acgan": 11}.get(run.module_of("gmgan", experiment), 10 if "supervised" in experiment else 1)
    outputs -= "toy-acgan" == experiment or "toy-supervised" == experiment  # the toy has nine classes
    assert model.discriminator(fake).shape == (2, outputs) and fake.shape[1:] == config.shape and len(groups) == 2
    assert {m.negative_slope for m in model.modules() if isinstance(m, torch.nn.LeakyReLU)} == {0.2}
    if config.dataset == "toy":  # two hidden layers, with PyTorch's initial weights (ledger 5)
        layers = [" ".join(type(m).__name__ for m in net) for net in (model.generator, model.discriminator.body)]
        assert layers == ["Linear ReLU Linear ReLU Linear", "Linear LeakyReLU Linear LeakyReLU"]
        for m in (m for m in model.modules() if isinstance(m, torch.nn.Linear)):
            assert 0.9 < m.weight.abs().max() * m.in_features**0.5 <= 1.0001
    else:
        plain = dataclasses.replace(config, norm="none", width=2).build()
        assert "BatchNorm" in str(model) and "BatchNorm" not in str(plain)


def test_the_inception_score_of_a_run(fixtures, tmp_path, monkeypatch):
    _, make = fixtures
    for name, value in {"INCEPTION_SAMPLES": 30, "SAMPLES": 20, "MULTIPLIERS": (0.5, 1.0)}.items():
        monkeypatch.setattr(gmgan_eval, name, value)
    monkeypatch.setattr(gmgan_eval.inception, "find_weights", lambda _: (tmp_path, ""))
    monkeypatch.setattr(gmgan_eval.inception, "extractor", lambda path, device, layer: layer)
    seen = []

    def features(layer, images):
        assert layer == "logits_unbiased"  # ledger 24
        seen.append(images)
        return torch.zeros(len(images), 1008)

    monkeypatch.setattr(gmgan_eval.inception, "features", features)
    torch.manual_seed(0)
    model = run.experiment_config("gmgan", "cifar10", {"width": 2}).build()
    with torch.no_grad():  # otherwise the images of an untrained network are all alike
        model.generator[-2].weight.mul_(300)
    options = run.Options("cifar10")
    found, judge = gmgan_eval.inception_score(model, make("cifar10"), options)
    assert found == {"inception_score": 1.0, "inception_score_at_0.5": 1.0, "inception_score_at_1.0": 1.0}
    assert "2015-12-05" in judge
    assert torch.equal(seen[2], model.sample_mixture(20, 1.0)[0])
    assert torch.equal(seen[1], model.sample_mixture(20, 0.5)[0])
    assert len(seen[0]) == 30 and not torch.equal(seen[1], seen[2])
    assert gmgan_eval.inception_score(model, make("mnist"), options) == ({}, None)
    assert gmgan_eval.NATURAL == ("cifar10", "stl10")  # Table 2


@pytest.mark.parametrize("experiment, size, beta1", [("toy", 900, 0.9), ("digits", 400, 0.5)])
def test_the_loop_takes_plain_adam_s_steps_with_new_noise_and_a_new_order_each_epoch(experiment, size, beta1, tmp_path):
    config = run.experiment_config("gmgan", experiment, {"width": 4, "epochs": 2, "batch_real": size})
    options, plain, seen = run.Options(experiment, seed=3, runs=tmp_path, device="cpu"), [], []
    data = train.load_data(config, options)[1]
    pixels = data.train_images if experiment == "toy" else data.train_images / 127.5 - 1

    def both(model, optimizers, batch, precision):
        if not plain:
            torch.manual_seed(3)
            first = config.build().to(memory_format=torch.channels_last)
            assert all(torch.equal(value, model.state_dict()[key]) for key, value in first.state_dict().items())
            adam = {"lr": 2e-4, "betas": (beta1, 0.999), "foreach": False}
            plain.extend([first, {player: torch.optim.Adam(p, **adam) for player, p in first.players().items()}])
        index = torch.cdist(batch.real.flatten(1), pixels.flatten(1)).argmin(1)
        torch.testing.assert_close(batch.real, pixels[index])
        assert torch.equal(batch.labels, data.train_labels[index])
        seen.append((index, noise := batch.noise.initial_seed()))
        plain[0].load_state_dict(model.state_dict())  # rounding grows from step to step
        train.train_step(*plain, batch._replace(noise=torch.Generator().manual_seed(noise)))
        losses = train.train_step(model, optimizers, batch, precision)
        for p, q in zip(model.parameters(), plain[0].parameters(), strict=True):  # a bias before a norm drifts
            torch.testing.assert_close(p, q, atol=1e-6 if p.dim() > 1 else 1e-3, rtol=1e-4)
        return losses

    train.train(config, options, both)
    steps = len(pixels) // size
    first, second = (torch.cat([index for index, _ in seen[i : i + steps]]) for i in (0, steps))
    assert len(seen) == 2 * steps == len({noise for _, noise in seen})
    assert len(first.unique()) == len(second.unique()) == steps * size and not torch.equal(first, second)
    other = []  # what another seed gets

    def idle(model, optimizers, batch, precision):
        other.append((batch.labels, batch.noise.initial_seed()))
        return {"d_loss": torch.ones(())}

    train.train(config, dataclasses.replace(options, seed=4), idle)
    assert not {noise for _, noise in seen} & {noise for _, noise in other}
    assert not torch.equal(torch.cat([labels for labels, _ in other[:steps]]), data.train_labels[first])


def test_purity_is_noted_now_and_then_and_neither_that_nor_a_cut_in_two_changes_a_bit(tmp_path, monkeypatch):
    torch.manual_seed(0)
    network = classifier.Network((1, 28, 28), 10).eval()
    monkeypatch.setattr(classifier, "trained", lambda data, cache, device: (network, 0.0))
    values = {"width": 2, "epochs": 5, "batch_real": 700, "n_components": 3, "mixture": "dynamic", "latent_dim": 4}
    config = run.experiment_config("gmgan", "digits", values)
    for purity_every, epochs in ((2, 5), (2, 6), (0, 6)):
        options = run.Options("digits", runs=tmp_path / f"{purity_every}", device="cpu")
        train.train(dataclasses.replace(config, purity_every=purity_every, epochs=epochs), options)
    folders = [tmp_path / f"{purity_every}/gmgan/digits/seed0" for purity_every in (2, 0)]
    noted, silent = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in folders)
    assert all(torch.equal(value, silent["weights"][key]) for key, value in noted["weights"].items())
    assert noted["rows"][5]["d_loss"] == silent["rows"][5]["d_loss"]
    found = {row["epoch"]: row["component_purity"] for row in noted["rows"] if "component_purity" in row}
    images, groups = gmgan.load(folders[0]).sample_mixture(5000)
    counts = sklearn.metrics.cluster.contingency_matrix(groups, classifier.classify(network, images))
    assert [*found] == [2, 4, 6] and found[6] == pytest.approx(counts.max(1).sum() / 50)


def test_the_toy_end_to_end_and_the_figures_that_compare(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(toy, "POINTS", 500)  # samples; the data too, unless an earlier test drew them
    toy.dataset()
    monkeypatch.setattr(toy, "MULTIPLIERS", (0.5, 1.0))
    monkeypatch.setattr(run, "differs", lambda *_: False)  # the smaller run keeps the experiment's folder
    for experiment in ("toy", "toy-gan"):
        where = [experiment, "--runs", tmp_path, "--threads", "1"]
        assert call(train.main, *where, "--epochs", "2", "--width", "8", capsys=capsys)[0] == 0
        code, out, err = call(gmgan_eval.main, *where, capsys=capsys)
        assert code == 0 and "divergence" in out, err
        metrics = json.loads((tmp_path / f"gmgan/{experiment}/seed0/eval.json").read_text())["metrics"]
        assert {"nll", "entropy", "purity", "nll_after_2", "nll_at_0.5", "entropy_at_1.0"} <= metrics.keys()
        assert metrics["divergence"] == pytest.approx(metrics["nll"] - metrics["entropy"])
        for name in ("nll", "entropy"):
            assert metrics[f"{name}_at_1.0"] == pytest.approx(metrics[name])
            assert metrics[f"{name}_at_0.5"] != pytest.approx(metrics[name])
    read = diff.read
    monkeypatch.setattr(diff, "read", lambda paper, runs=None: read(paper, runs) if runs else [])  # no reference runs
    code, out, err = call(gmgan_figures.main, "--runs", tmp_path, capsys=capsys)
    # Runs with another config give no figure.
    assert code == 2 and "toy left out: another config (width 8)" in out and "train one first" in err
    monkeypatch.setattr(diff, "not_comparable", lambda *_: None)
    code, out, err = call(gmgan_figures.main, "--runs", tmp_path, capsys=capsys)
    assert code == 0 and "toy-acgan left out: no evaluated run" in out, err
    assert "figure-3.png, figure-4-curves.png, figure-4.png, figure-5.png" in out


def test_the_command_line(tmp_path):
    """The real command line: a short run learns, is evaluated and is in the diff. Untrained samples nearly coincide."""
    torch.manual_seed(0)
    made, _ = toy.samples(run.experiment_config("gmgan", "toy").build())
    assert toy.negative_log_likelihood(made) - toy.entropy(made) > 4
    where = ["toy", "--runs", tmp_path, "--threads", "1", "--learning-rate", "1e-3"]
    code, out, err = run_command("gmgan.train", *where, "--epochs", "20")
    assert code == 0 and "trained 20 epochs" in out, err
    code, out, _ = run_command("gmgan.eval", *where)
    assert code == 0 and "epochs after which the likelihood is first within" in out
    metrics = json.loads((tmp_path / "gmgan/toy/seed0-learning-rate-0.001/eval.json").read_text())["metrics"]
    assert metrics["divergence"] < 2.5 and metrics["covered_modes"] >= 4, metrics
    show, wide = ("common.diff", "show", "gmgan", "--experiment", "toy", "--runs", tmp_path), {"COLUMNS": "400"}
    code, out, err = run_command(*show, env=os.environ | wide)
    assert code == 0 and "KL divergence" in out and "another config (learning_rate 0.001)" in out, err


MISTAKES = [
    (["digits", "--supervised", "true", "--class-map", "0,1,2"], "names 3 Gaussians, expected 10"),
    (["digits", "--class-map", "0,1"], "of no influence without --supervised true"),
    (["digits", "--classes", "0,x"], "has no class 'x'"),
    (["digits", "--classes", "y,0,x"], "no class 'y'; known: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9; no class 'x'; known"),
    (["digits", "--n-classes", "11"], "11 asked for, but digits has 10 classes"),
    (["digits", "--n-classes", "1"], "need at least 2"),
    (["digits", "--classes", "1,2", "--n-classes", "3"], "but --classes names 2"),
    (["digits", "--classes", ""], "expected different names"),
    (["toy", "--n-classes", "3"], "it has no subset"),
    (["digits-kmeans", "--dataset", "toy"], "has no images"),
    (["digits", "--batch-real", "5000"], "is more than the 1437 training images"),
    (["digits", "--dataset", "signs"], "signs:<path>"),
    (["toy", "--dense-units", "8"], "the toy has no images"),
    (["signs", "--dataset", "signs:/nonexistent"], "/nonexistent"),
    (["mnist-acgan", "--sigma", "1"], "unknown argument '--sigma'"),
]


@pytest.mark.parametrize("arguments, message", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, tmp_path, capsys):
    main = {"train": train, "acgan": acgan, "kmeans": kmeans}[run.module_of("gmgan", arguments[0])].main
    code, _, err = call(main, *arguments, "--runs", tmp_path, capsys=capsys)
    assert code == 2 and message in err and err.count("\n") == 1
    assert not list(tmp_path.rglob("*"))


# ------------------------------------------------------------------------------------------------- published numbers

TABLE_2 = {  # (score, standard error) of GAN or AC-GAN, then of k = 10, 20, 30
    "CIFAR-10, unsupervised": [(5.71, 0.06), (5.92, 0.07), (5.91, 0.05), (5.98, 0.05)],
    "CIFAR-10, supervised": [(6.23, 0.07), (6.84, 0.03), (6.81, 0.04), (6.83, 0.02)],
    "STL-10, unsupervised": [(6.80, 0.07), (7.06, 0.11), (6.58, 0.16), (7.03, 0.10)],
    "STL-10, supervised": [(7.45, 0.10), (8.32, 0.06), (8.16, 0.05), (8.08, 0.07)],
}
SIGNS = {"K-Means": (0.2447, 0.1977), "AE + K-Means": (0.2932, 0.2738), "GM-GAN": (0.8974, 0.9274)}
TABLE_3 = {
    "MNIST": {"GM-GAN": (0.9924, 0.9618)},
    "Synthetic Traffic Signs": SIGNS,
    "Fashion-MNIST": {"K-Means": (0.4714, 0.5115), "AE + K-Means": (0.5353, 0.5261), "GM-GAN": (0.5816, 0.5690)},
}


def test_published_numbers_are_tables_2_and_3_each_own_number_once():
    entries = [e for e in diff.read_csv("gmgan", "published") if e["value"] is not None]
    found = {(e["where"], e["system"]): (e["value"], e["spread"], e["trials"]) for e in entries}
    expected = {}
    for half, values in TABLE_2.items():
        systems = ["GAN" if "unsupervised" in half else "AC-GAN", *(f"GM-GAN (k={k})" for k in (10, 20, 30))]
        for system, (value, error) in zip(systems, values, strict=True):
            expected[f"Table 2, {half}", system] = (value, error, 10)
    for data, rows in TABLE_3.items():
        for system, (accuracy, nmi) in rows.items():
            expected[f"Table 3, {data}, ACC", system] = (accuracy, None, None)
            expected[f"Table 3, {data}, NMI", system] = (nmi, None, None)
    assert found == expected and len(entries) == len(expected) == 30


def test_the_claims_of_section_4_3_name_the_dynamic_runs_and_every_table_has_its_own():
    claims = diff.read_csv("gmgan", "claims")
    higher = {(c["experiment"], c["metric"], c["than"], c["than_metric"]) for c in claims if c["is"] == "higher"}
    of_4_3 = [c for c in claims if c["where"] == "Sec. 4.3"]
    assert not {"cifar10", "stl10", "cifar10-supervised", "stl10-supervised"} & {c["experiment"] for c in of_4_3}
    for data, k in itertools.product(("cifar10", "stl10"), ("", "-k20", "-k30")):  # "in all cases", Table 2
        for ours, baseline in ((data, "gan"), (f"{data}-supervised", "acgan")):
            assert (f"{ours}{k}", "inception_score", f"{data}-{baseline}", None) in higher
    for data, metric, rival in itertools.product(("fashion", "signs"), ("accuracy", "nmi"), ("kmeans", "ae_kmeans")):
        assert (data, metric, f"{data}-kmeans", f"{rival}_{metric}") in higher  # Table 3
