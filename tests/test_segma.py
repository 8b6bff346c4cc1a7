"""Tests of SeGMA: equations by independent computations, networks by the paper's text, and training end to end."""

import csv
import dataclasses
import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
from scipy.special import hyp1f1
from scipy.stats import multivariate_normal

import segma
from common import inception, plots, run
from common.data import Dataset, draw_labels, load
from common.metrics import frechet_distance, moments
from segma import model
from segma.eval import (
    COURSE,
    between,
    closed_form_against_sampling,
    evaluate,
    geometry,
    intensities,
    interpolations,
    nearest_classes,
    points_between,
    rows_are_classes,
    samples,
    style_transfers,
    table_ii,
    tables_i_and_iii,
    to_bytes,
    verdict,
)
from segma.model import SeGMA
from segma.train import Batch, Config, save_samples, train, train_step
from tests.conftest import ROOT, run_command, slope


def exact_phi(s: torch.Tensor, dim: int) -> torch.Tensor:
    """φ_D(s) = 1F1(1/2; D/2; -s), exactly. The paper prints its asymptotic form."""
    return torch.from_numpy(np.asarray(hyp1f1(0.5, dim / 2, -s.numpy())))


def small(**values) -> SeGMA:
    """A tiny SeGMA on 28×28 images with batches of 10 + 5."""
    torch.manual_seed(1)
    sizes = {"hidden_dim": 6, "batch_unlabelled": 10, "batch_labelled": 5, "n_labels": 5}
    return Config(**{**sizes, **values}).build()


def toy(means: torch.Tensor) -> SeGMA:
    """A SeGMA with these means. Encoder and decoder are identities, so that an image is its own code."""
    system = small(n_components=len(means), batch_unlabelled=100)
    system.encoder = system.decoder = torch.nn.Identity()
    with torch.no_grad():
        system.means.copy_(means)
    return system.requires_grad_(False)


def random_mixture(k: int, dim: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(k, dim, generator=generator, dtype=torch.float64) * 1.5
    priors = torch.rand(k, generator=generator, dtype=torch.float64) + 0.2
    return means, priors / priors.sum()


def sample_mixture(n: int, means: torch.Tensor, priors: torch.Tensor, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    components = torch.multinomial(priors, n, replacement=True, generator=generator)
    return means[components] + torch.randn(n, means.shape[1], generator=generator, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------ equations


@pytest.mark.parametrize(("dim", "bound"), [(10, 0.0235), (20, 0.0106), (32, 0.0064)])
def test_phi_is_within_its_stated_error_of_the_confluent_hypergeometric_function(dim, bound):
    s = torch.logspace(-4, 4, 4000, dtype=torch.float64)
    error = (model.phi(s, dim) / exact_phi(s, dim) - 1).abs().max().item()
    assert 0.8 * bound < error < bound


def test_gaussian_product_is_eq_3_written_out():
    a, b, alpha, beta, gamma, dim = 1.7, -0.4, 0.5, 1.0, 0.3, 12
    spread = alpha + beta + 2 * gamma
    expected = 1 / math.sqrt(2 * math.pi * spread) / math.sqrt(1 + 4 * ((a - b) ** 2 / (2 * spread)) / (2 * dim - 3))
    found = model.gaussian_product(torch.tensor((a - b) ** 2, dtype=torch.float64), alpha + beta, gamma, dim)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_distance_is_eq_3_summed_over_all_pairs():
    dim, gamma = 11, 0.41
    means, priors = random_mixture(4, dim)
    z = torch.randn(17, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def product(a, b, variances):
        spread = variances + 2 * gamma
        s = float(((a - b) ** 2).sum()) / (2 * spread)
        return (1 + 4 * s / (2 * dim - 3)) ** -0.5 / math.sqrt(2 * math.pi * spread)

    m = len(z)
    zz = sum(product(a, b, 0) for a in z for b in z) / m**2
    zp = sum(p * product(a, mu, 1) for a in z for p, mu in zip(priors.tolist(), means, strict=True)) / m
    pairs = [(p, mu) for p, mu in zip(priors.tolist(), means, strict=True)]
    pp = sum(p * q * product(mu, nu, 2) for p, mu in pairs for q, nu in pairs)
    found = model.cramer_wold_distance(z, means, priors, gamma).item()
    assert found == pytest.approx(zz - 2 * zp + pp, rel=1e-10)


def test_distance_with_exact_phi_is_the_sliced_kernel_distance():
    """The definition, by quadrature: the mean over v of ∫ (smoothed density of v·Z - smoothed density of v·P)² dt."""
    dim, gamma, directions = 10, 0.5, 3000
    means, priors = random_mixture(3, dim)
    z = sample_mixture(25, means, priors) + 0.7
    v = torch.randn(directions, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    v = v / v.norm(dim=1, keepdim=True)
    t = torch.linspace(-14, 14, 700, dtype=torch.float64)

    def density(centres, weights, variance):  # centres: (directions, n) -> (directions, len(t))
        total = torch.zeros(directions, len(t), dtype=torch.float64)
        for i, weight in enumerate(weights.tolist()):
            bells = torch.exp(-((t - centres[:, i, None]) ** 2) / (2 * variance))
            total += weight * bells / math.sqrt(2 * math.pi * variance)
        return total

    difference = density(v @ z.T, torch.full((len(z),), 1 / len(z)), gamma) - density(v @ means.T, priors, 1 + gamma)
    per_direction = difference.square().sum(1) * (t[1] - t[0])
    estimate, error = per_direction.mean().item(), per_direction.std().item() / math.sqrt(directions)
    found = model.cramer_wold_distance(z, means, priors, gamma, exact_phi).item()
    assert error < 0.03 * estimate
    assert abs(found - estimate) < 4 * error


def test_distance_with_exact_phi_goes_to_zero_on_the_mixture_itself_and_not_off_it():
    dim, gamma = 10, 0.45
    means, priors = random_mixture(3, dim)
    samples = [sample_mixture(n, means, priors) for n in (150, 500, 1500)]
    on = [model.cramer_wold_distance(z, means, priors, gamma, exact_phi).item() for z in samples]
    assert 0 < on[2] < on[1] < on[0]
    assert on[2] < 4e-4
    off = model.cramer_wold_distance(sample_mixture(1500, means, priors) + 0.5, means, priors, gamma, exact_phi).item()
    assert off > 20 * on[2]


def test_asymptotic_phi_leaves_a_few_thousandths():
    means, priors = random_mixture(3, 10)
    gamma = model.silverman_bandwidth(10)
    exact = model.cramer_wold_distance(sample_mixture(1500, means, priors), means, priors, gamma, exact_phi).item()
    printed = model.cramer_wold_distance(sample_mixture(1500, means, priors), means, priors, gamma).item()
    assert 0.001 < printed - exact < 0.006


def test_distance_in_blocks_is_the_distance_at_once():
    means, priors = random_mixture(3, 10)
    z = sample_mixture(2500, means, priors)  # two blocks of rows
    at_once = model.gaussian_product(torch.cdist(z, z).square(), 0, 0.4, 10).mean()
    at_once = at_once - 2 * (model.gaussian_product(torch.cdist(z, means).square(), 1, 0.4, 10) @ priors).mean()
    at_once = at_once + priors @ model.gaussian_product(torch.cdist(means, means).square(), 2, 0.4, 10) @ priors
    assert model.cramer_wold_distance(z, means, priors, 0.4).item() == pytest.approx(at_once.item(), rel=1e-8)


def test_bandwidth_is_silvermans():
    assert model.silverman_bandwidth(10) == pytest.approx((4 / 30) ** (2 / 5), rel=1e-15)
    assert Config().codes_per_batch / Config().n_components == 10  # N_c for MNIST
    assert Config(loss_over="all").codes_per_batch / Config().n_components == 20
    assert Config(loss_over="all", n_labels=30).codes_per_batch == 130  # all labels, since they are fewer


def test_posterior_is_eq_7_and_classify_its_mode():
    means, priors = random_mixture(4, 10)
    between = [(means[i] + means[j]) / 2 for i, j in itertools.combinations(range(4), 2)]  # here the priors decide
    z = torch.cat([sample_mixture(44, means, priors), torch.stack(between)])
    densities = [multivariate_normal(mu.numpy(), np.eye(10)).pdf(z.numpy()) for mu in means]
    joint = np.stack(densities, 1) * priors.numpy()
    expected = joint / joint.sum(1, keepdims=True)
    found = model.log_posterior(z, means, priors).exp().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-15)
    system = toy(means).double()
    system.priors.copy_(priors)
    np.testing.assert_array_equal(system.classify(z).numpy(), expected.argmax(1))
    labels = torch.arange(50) % 4
    loss = model.classification_loss(z, labels, means, priors).item()
    assert loss == pytest.approx(-np.log(expected[np.arange(50), labels.numpy()]).mean(), rel=1e-8)  # eq. (5)


def test_reconstruction_error_sums_over_pixels_and_averages_over_images():
    x = torch.zeros(2, 1, 2, 2)
    y = torch.tensor([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 3.0]]).view(2, 1, 2, 2)
    assert model.reconstruction_error(x, y).item() == pytest.approx((1 + 4 + 9) / 2)


def test_bernoulli_error_is_the_binary_cross_entropy():
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(5, 1, 4, 3, generator=generator, dtype=torch.float64)
    logits = (3 * torch.randn(5, 1, 4, 3, generator=generator, dtype=torch.float64)).requires_grad_()
    found = model.bernoulli_error(x, logits)
    expected = torch.nn.functional.binary_cross_entropy(logits.sigmoid(), x, reduction="sum") / 5  # mean over images
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(found, logits)
    for i in range(logits.numel()):
        numerical = slope(lambda: model.bernoulli_error(x, logits), logits, i, 1e-6)
        assert gradient.flatten()[i].item() == pytest.approx(numerical, rel=1e-5, abs=1e-8)
    # At this logit a sigmoid in bf16 is 0, and its logarithm would be cut off at -100.
    extreme = model.bernoulli_error(torch.ones(1, 1, 1, 1), torch.tensor([[[[-120.0]]]], dtype=torch.bfloat16))
    assert extreme.item() == pytest.approx(120, rel=1e-6)


def test_style_transfer_ends_at_z_plus_difference_of_means():
    means, _ = random_mixture(5, 10)
    z = torch.randn(3, 10, dtype=torch.float64)
    source, target = torch.tensor([0, 1, 2]), torch.tensor([4, 3, 0])
    assert torch.equal(model.transfer_style(z, source, target, means), z + (means[target] - means[source]))
    assert torch.equal(model.transfer_style(z, source, target, means, 0.0), z)
    halfway = (z + model.transfer_style(z, source, target, means)) / 2
    torch.testing.assert_close(model.transfer_style(z, source, target, means, 0.5), halfway)


def test_intensity_moves_away_from_the_anti_target():
    means, _ = random_mixture(5, 10)
    z = means[[1]] + 0.1
    moved = model.intensify(z, torch.tensor([1]), torch.tensor([3]), means)
    torch.testing.assert_close(moved, z + 0.5 * (means[[1]] - means[[3]]))
    assert (moved - means[3]).norm() > (z - means[3]).norm()


@pytest.mark.parametrize("reconstruction", ["squared", "bernoulli"])
@pytest.mark.parametrize("loss_over", ["unlabelled", "all"])
def test_gradients_of_eq_9_by_finite_differences(loss_over, reconstruction):
    sizes = {"hidden_dim": 5, "batch_unlabelled": 12, "batch_labelled": 4, "n_labels": 4}
    system = small(**sizes, loss_over=loss_over, reconstruction=reconstruction).double()
    with torch.no_grad():
        system.means.normal_()
    x, known, labels = torch.rand(12, 1, 28, 28).double(), torch.rand(4, 1, 28, 28).double(), torch.tensor([0, 3, 3, 9])

    def loss() -> torch.Tensor:
        return system.loss(x, known, labels)["loss"]

    loss().backward()
    entries = [(p, i) for p in system.parameters() for i in torch.randperm(p.numel())[:4].tolist()]
    assert len(entries) > 40
    for p, i in entries:
        assert p.grad.view(-1)[i].item() == pytest.approx(slope(loss, p, i), rel=2e-4, abs=1e-5)


def test_loss_is_eq_9_of_its_parts():
    system = small()
    system.priors.copy_(torch.tensor([0.2, 0.05, 0.05, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]))
    x, known, labels = torch.rand(10, 1, 28, 28), torch.rand(5, 1, 28, 28), torch.tensor([0, 1, 2, 3, 4])
    terms = system.loss(x, known, labels)
    z = system.encoder(x)
    assert terms["mse"].item() == pytest.approx((x - system.decoder(z)).square().sum().item() / 10, rel=1e-5)
    gamma = (4 / 3) ** 0.4  # N_c = 10 codes over 10 components
    distance = model.cramer_wold_distance(z, system.means, system.priors, gamma)
    assert system.gamma == gamma and terms["d2"].item() == pytest.approx(distance.item(), rel=1e-4)
    cross_entropy = model.classification_loss(system.encoder(known), labels, system.means, system.priors)
    assert terms["cross_entropy"].item() == pytest.approx(cross_entropy.item(), rel=1e-5)
    total = terms["mse"] + 5 * terms["d2"].log() + 10 * terms["cross_entropy"]
    assert terms["loss"].item() == pytest.approx(total.item(), rel=1e-6)
    system.config, x = dataclasses.replace(system.config, loss_over="all"), torch.cat([x, known])  # ledger 4
    terms, z = system.loss(x[:10], known, labels), system.encoder(x)
    assert terms["mse"].item() == pytest.approx((x - system.decoder(z)).square().sum().item() / 15, rel=1e-5)
    distance = model.cramer_wold_distance(z, system.means, system.priors, (4 / 4.5) ** 0.4)  # N_c = 15 / 10
    assert terms["d2"].item() == pytest.approx(distance.item(), rel=1e-4)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("shape", ["mnist", "celeba"])
def test_the_bernoulli_reading_changes_the_reconstruction_error_alone(labelled, shape):
    """This also holds without labels (CWAE, the unsupervised variant) and with the appendix's convolutions."""
    system = small(dataset=shape, label_weight=10.0 if labelled else 0.0, reconstruction="bernoulli")
    shape = system.config.image_shape
    x, known, labels = torch.rand(10, *shape), torch.rand(5, *shape), torch.tensor([0, 1, 2, 3, 3])
    terms = system.loss(x, known, labels)
    images = system.decoder(system.encoder(x))
    bce = torch.nn.BCELoss(reduction="sum")(images, x).item() / 10
    assert terms["bernoulli"].item() == pytest.approx(bce, rel=1e-5)
    system.config = dataclasses.replace(system.config, reconstruction="squared")
    squared = system.loss(x, known, labels)
    assert terms["d2"].item() == squared["d2"].item()
    difference = terms["loss"] - squared["loss"]
    assert difference.item() == pytest.approx((terms["bernoulli"] - squared["mse"]).item(), rel=1e-4)


def test_gradient_is_clipped_by_global_norm_then_by_value():
    system = small(grad_clip_norm=5.0, grad_clip_value=0.01)
    parameters = list(system.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    x, known, labels = torch.rand(10, 1, 28, 28), torch.rand(5, 1, 28, 28), torch.tensor([0, 1, 2, 3, 4])
    system.loss(x, known, labels)["loss"].backward()
    before = [p.grad.clone() for p in parameters]
    norm = torch.cat([g.flatten() for g in before]).norm()
    assert norm > 5
    for limit, bound in ((5.0, 0.01), (None, 0.01), (5.0, None)):
        system.config = dataclasses.replace(system.config, grad_clip_norm=limit, grad_clip_value=bound)
        terms = train_step(system, optimizer, Batch(x, known, labels, False, torch.Generator()))
        assert terms["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-4)
        for p, g in zip(parameters, before, strict=True):
            scaled, most = g * (limit / norm if limit else 1), bound or math.inf
            torch.testing.assert_close(p.grad, scaled.clamp(-most, most), rtol=1e-3, atol=1e-6)


# ------------------------------------------------------------------------------------------------ networks, the mixture

MNIST_LAYERS = {
    "encoder": [("Flatten", [784]), ("Linear", [1024]), ("ReLU", [1024]), ("Linear", [1024]), ("ReLU", [1024]),
                ("Linear", [10])],
    "decoder": [("Linear", [1024]), ("ReLU", [1024]), ("Linear", [1024]), ("ReLU", [1024]), ("Linear", [784]),
                ("Unflatten", [1, 28, 28]), ("Sigmoid", [1, 28, 28])],
}  # fmt: skip


def layer_shapes(network: torch.nn.Module, x: torch.Tensor) -> list[tuple[str, list[int]]]:
    """The type and the output shape of each layer that x passes, without the batch dimension."""
    seen = []
    for layer in network.modules():
        if not list(layer.children()):
            layer.register_forward_hook(lambda m, _, out: seen.append((type(m).__name__, list(out.shape[1:]))))
    network(x)
    return seen


def test_networks_are_those_of_section_vi_a():
    code, out, err = run_command("segma.train", "mnist", "--describe", "--json", "--data", "/nowhere")
    assert code == 0, err
    described = json.loads(out)
    counts = {name: network["parameters"] for name, network in described["networks"].items()}
    assert counts == {"encoder": 1_863_690, "decoder": 1_864_464, "mixture": 100}
    assert described["parameters"] == 1_863_690 + 1_864_464 + 100
    assert described["config"] == dataclasses.asdict(run.experiment_config("segma", "mnist"))
    system = Config().build()
    assert layer_shapes(system.encoder, torch.zeros(1, 1, 28, 28)) == MNIST_LAYERS["encoder"]
    assert layer_shapes(system.decoder, torch.zeros(1, 10)) == MNIST_LAYERS["decoder"]


def test_initial_weights_are_glorot_uniform_with_zero_bias():
    torch.manual_seed(0)
    layer = Config().build().encoder[3]
    bound = math.sqrt(6 / (1024 + 1024))
    assert layer.weight.abs().max().item() <= bound
    assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert layer.bias.abs().max().item() == 0


def test_initial_means_follow_the_authors_code():
    torch.manual_seed(0)
    means = model.initial_means(10, 10, 0.1)  # MNIST: one coordinate each, 0.1
    torch.testing.assert_close(means, 0.1 * torch.eye(10), atol=0.006, rtol=0)
    assert 0.0005 < (means - 0.1 * torch.eye(10)).std() < 0.0015
    means = model.initial_means(10, 20, 2.0)  # SVHN: two coordinates each, 1.0
    torch.testing.assert_close(means, torch.cat([torch.eye(10)] * 2, 1), atol=0.006, rtol=0)
    means = model.initial_means(4, 32, 1.0)  # CelebA: eight coordinates each, 0.125
    torch.testing.assert_close(means, 0.125 * torch.cat([torch.eye(4)] * 8, 1), atol=0.006, rtol=0)
    many = model.initial_means(500, 10, 0.7)  # more components than dimensions
    assert many.std().item() == pytest.approx(0.7, rel=0.05)


def test_mixture_samples_follow_priors_and_means():
    system = toy(torch.tensor([[-5.0] * 10, [0.0] * 10, [5.0] * 10]))
    system.priors.copy_(torch.tensor([0.2, 0.3, 0.5]))
    z, components = system.draw(20000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(components.bincount() / 20000, system.priors, atol=0.015, rtol=0)
    for k in range(3):
        torch.testing.assert_close(z[components == k].mean(0), system.means[k], atol=0.1, rtol=0)
        torch.testing.assert_close(z[components == k].var(0), torch.ones(10), atol=0.12, rtol=0)
    torch.testing.assert_close(system.sample(20000, component=2).mean(0), system.means[2], atol=0.1, rtol=0)


def test_images_go_in_as_bytes_or_as_floats_in_the_unit_range():
    system = small()
    images = torch.randint(256, (5, 1, 28, 28), dtype=torch.uint8)
    z = system.encode(images)
    assert z.shape == (5, 10) and torch.equal(system.encode(images / 255), z)
    assert system.decode(z).shape == (5, 1, 28, 28) and system.sample(3, component=1).shape == (3, 1, 28, 28)
    once, again, other = (system.sample(3, seed=seed) for seed in (1, 1, 0))
    assert torch.equal(once, again) and not torch.equal(once, other)
    for wrong in (images.long(), images.float(), images / 127.5 - 1, torch.full((1, 1, 28, 28), float("nan"))):
        with pytest.raises(ValueError, match=r"^images: expected uint8, or floats in \[0, 1\]; found .*$"):
            system.encode(wrong)


# ------------------------------------------------------------------------------------------------------------ configs

FIELDS = {  # (MNIST, SVHN, CelebA), from the paper; batches, means, clipping and epochs from the authors' code
    **{"dataset": ("mnist", "svhn_extra", "celeba"), "n_components": (10, 10, 4), "labels": "random"},
    **{"n_labels": (100, 1000, 1000), "batch_unlabelled": (100, 1000, 256), "batch_labelled": (100, 1000, 256)},
    **{"learning_rate": 3e-4, "grad_clip_norm": 5.0, "grad_clip_value": 1.0, "epochs": (500, 400, 500)},
}
SEGMA = FIELDS | {
    **{"latent_dim": (10, 20, 32), "hidden_dim": (1024, 786, 786), "hidden_layers": (2, 5, 2), "decoder_layers": None},
    **{"reconstruction": "squared", "loss_over": "unlabelled", "distance_weight": 5.0, "label_weight": 10.0},
    **{"mean_init": (0.1, 2.0, 1.0)},
}
VAE = FIELDS | {
    **{"likelihood": ("bernoulli", "gaussian", "gaussian"), "binarise": False, "posterior_variance": "free"},
}
M1M2 = VAE | {  # [10] and its code; CelebA: the appendix
    **{"m1_latent_dim": (50, 300, 300), "m1_hidden_dim": (500, 500, 300), "m1_hidden_layers": (2, 2, 1)},
    **{"latent_dim": 50, "hidden_dim": (300, 500, 300), "hidden_layers": 1, "m1_epochs": 100},
    **{"activation": ("softplus", "softplus", "relu"), "epochs": (600, 400, 500), "label_weight": 0.1},
    **{"labelled_weight": (100 / 60_000, 1000 / 604_388, 1000 / 182_637)},
    **{"grad_clip_norm": None, "grad_clip_value": None},
}
ADGM = VAE | {  # [11] and its code; CelebA: the appendix. α = 0.1 N / N_l
    **{"latent_dim": (100, 300, 300), "auxiliary_dim": (100, 300, 300), "hidden_dim": 500, "hidden_layers": 2},
    **{"batch_unlabelled": 100, "batch_labelled": 100, "labelled_weight": 1.0, "epochs": (251, 400, 500)},
    **{"label_weight": (0.1 * 60_000 / 100, 0.1 * 604_388 / 1000, 0.1 * 182_637 / 1000)},
}
CWAE = {"n_components": 1, "label_weight": 0.0, "mean_init": 0.0, "grad_clip_norm": None, "grad_clip_value": None}
OF_DIGITS = {  # 1,437 images in batches of 100
    "digits": {"mean_init": 4.0, "epochs": 150},
    "digits-m1m2": {"labelled_weight": 100 / 1437, "m1_epochs": 200, "epochs": 500},
    "digits-adgm": {"label_weight": 0.1 * 1437 / 100, "epochs": 150},
}
OTHERS = {
    "mnist-first-labels": {"labels": "first"},
    "mnist-bernoulli": {"reconstruction": "bernoulli"},
    "mnist-first-labels-bernoulli": {"labels": "first", "reconstruction": "bernoulli"},
    **{name: {"dataset": "digits", **changes} for name, changes in OF_DIGITS.items()},
}
PERSONS = {"n_components": None, "labels": "stratified", "mean_init": 4.0, "epochs": 150}
PERSONS |= {"n_labels": 100, "batch_unlabelled": 100, "batch_labelled": 100}
OTHERS |= {
    "folder": {"dataset": "folder:images", **PERSONS},
    "folder-colour": {"dataset": "folder_colour:images", **PERSONS},
}


@pytest.mark.parametrize("experiment", run.experiments("segma"))
def test_every_value_of_every_config_is_the_papers(experiment):
    last = experiment.rpartition("-")[2]
    column = next((i for i, name in enumerate(("svhn", "celeba"), 1) if experiment.startswith(name)), 0)
    column = 2 if experiment == "folder-colour" else column
    table = {"m1m2": M1M2, "adgm": ADGM}.get(last, SEGMA)
    expected = {name: value[column] if isinstance(value, tuple) else value for name, value in table.items()}
    expected |= {"cwae": CWAE, "unsupervised": {"label_weight": 0.0}}.get(last, {}) | OTHERS.get(experiment, {})
    found = vars(run.experiment_config("segma", experiment))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), name


# ---------------------------------------------------------------------------------------------------- the labelled part


def test_first_hundred_labels_of_mnist(data_root):
    data = load("mnist", data_root)
    for seed in (0, 7):
        chosen, _ = draw_labels(data.train_labels, 100, "first", "0123456789", seed)
        assert chosen.tolist() == list(range(100))
        assert data.train_labels[chosen].bincount().tolist() == [13, 14, 6, 11, 11, 5, 11, 10, 8, 11]


def test_priors_are_the_proportions_of_the_known_labels(trained):
    system = segma.load(trained / "segma/digits/seed3")
    labels = load("digits", "").train_labels
    known, _ = draw_labels(labels, 100, "random", "0123456789", 3)
    torch.testing.assert_close(system.priors, labels[known].bincount(minlength=10) / 100)
    assert not system.training and not any(p.requires_grad for p in system.parameters())


# ------------------------------------------------------------------------------------------------- training, end to end


def test_a_short_run_learns(trained):
    folder = trained / "segma/digits/seed3"
    rows = list(csv.DictReader(open(folder / "log.csv")))
    assert [int(row["epoch"]) for row in rows] == list(range(1, 13))
    # Values of seed 3. The tolerances allow for the rounding of other machines; a wrong term exceeds them.
    pinned = {"mse": (8.76, 0.8), "d2": (0.0062, 0.0025), "cross_entropy": (0.0067, 0.004)}
    for name, (value, tolerance) in (pinned | {"test_error": (12.5, 3.0), "loss": (-16.7, 2.0)}).items():
        assert float(rows[-1][name]) == pytest.approx(value, abs=tolerance), name
    assert float(rows[0]["mse"]) == pytest.approx(90.3, abs=5)
    for name in ("config.yaml", "checkpoint.pt", "eval.json", "samples/epoch0012.png"):
        assert (folder / name).stat().st_size > 0
    pictures = "samples interpolations style_transfer intensity means between closed_form training".split()
    for name in pictures:
        assert (folder / f"figures/{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_short_run_with_the_cross_entropy_learns(tmp_path):
    config = run.experiment_config("segma", "digits", {"epochs": 4, "reconstruction": "bernoulli"})
    folder = train(config, run.Options("digits", seed=3, runs=tmp_path, threads=1))
    rows = run.load_run("segma", folder)[1]["rows"]
    assert rows[0]["bernoulli"] == pytest.approx(491.7, abs=10)
    pinned = {"bernoulli": (297.9, 4), "d2": (0.047, 0.015), "cross_entropy": (0.0063, 0.004)}
    for name, (value, tolerance) in (pinned | {"test_error": (17, 3), "loss": (282.7, 5)}).items():
        assert rows[-1][name] == pytest.approx(value, abs=tolerance), name


def test_eval_json_is_complete(trained):
    result = json.loads((trained / "segma/digits/seed3/eval.json").read_text())
    assert (result["experiment"], result["seed"]) == ("digits", 3)
    config = run.experiment_config("segma", "digits", {"epochs": 12})
    assert result["config"] == dataclasses.asdict(config)
    assert result["config_hash"] == run.config_hash(config) == run.config_hash(run.experiment_config("segma", "digits"))
    provenance = result["provenance"]
    assert provenance["epochs"] == 12 and provenance["train_images"] == 1437 and provenance["data_official"] is True
    assert (provenance["torch"], provenance["precision"]) == (torch.__version__, "fp32")
    assert provenance["training_seconds"] > 0
    judged = {"test_error", "nearest_neighbour_error", "reconstruction_error", "distance"}
    claims = {"nearest_image_of_their_class", "sampled_gradient_noise", "lines_6_to_9_through_4"}
    assert set(result["metrics"]) == judged | claims  # no FID without the weights
    assert set(result["details"]) == {"sampled_distance", "mean_distances", "nearest_class", "between"}


def test_eval_repeats_itself_and_reports_what_the_run_gives(trained, tmp_path, monkeypatch):
    path = trained / "segma/digits/seed3/eval.json"
    before = json.loads(path.read_text())
    monkeypatch.setattr("segma.eval.figures", lambda *_: None)
    (tmp_path / "segma/digits").mkdir(parents=True)
    (tmp_path / "segma/digits/seed7").symlink_to(path.parent)  # under another name the run keeps its own seed
    options = run.Options("digits", seed=7, runs=tmp_path, threads=1)
    after = evaluate(options)
    assert after["metrics"] == before["metrics"] and after["details"] == before["details"]
    system, data = segma.load(path.parent), load("digits", "")
    wrong = (system.classify(system.encode(data.test_images)) != data.test_labels).double().mean().item()
    assert after["metrics"]["test_error"] == pytest.approx(100 * wrong)
    found, images, z = after["metrics"], data.test_images / 255, system.encode(data.test_images)
    squares = (images - system.decode(z)).square().sum().item() / 360
    assert found["reconstruction_error"] == pytest.approx(squares, rel=1e-4)
    distance = model.cramer_wold_distance(z.double(), system.means.double(), system.priors.double(), (4 / 30) ** 0.4)
    assert found["distance"] == pytest.approx(distance.item(), rel=1e-6)
    known, _ = draw_labels(data.train_labels, 100, "random", "0123456789", 3)
    nearest = torch.cdist(images.flatten(1), data.train_images[known].flatten(1) / 255).argmin(1)
    wrong = (data.train_labels[known][nearest] != data.test_labels).double().mean().item()
    assert found["nearest_neighbour_error"] == pytest.approx(100 * wrong)
    (sampled,) = (row for row in after["details"]["sampled_distance"] if row["n"] == 100)
    assert found["sampled_gradient_noise"] == pytest.approx(100 * sampled["gradient_noise"])
    assert found["lines_6_to_9_through_4"] == pytest.approx(100 * after["details"]["between"]["6-9"].get("4", 0))
    system.config = dataclasses.replace(system.config, labels="first")  # ledger 1
    nearest = torch.cdist(images.flatten(1), data.train_images[:100].flatten(1) / 255).argmin(1)
    wrong = (data.train_labels[nearest] != data.test_labels).double().mean().item()
    assert table_ii(system, data, z, 3)["nearest_neighbour_error"] == pytest.approx(100 * wrong)
    distances = np.linalg.norm(system.means[:, None].numpy() - system.means.numpy(), axis=2)
    np.testing.assert_allclose(after["details"]["mean_distances"], distances, atol=1e-3)
    log = list(csv.DictReader(open(path.parent / "log.csv")))
    assert after["metrics"]["test_error"] == pytest.approx(float(log[-1]["test_error"]), abs=1e-4)
    monkeypatch.setattr("segma.eval.load", lambda *_: dataclasses.replace(data, digest="0" * 16))
    with pytest.raises(run.UserError, match=f"trained on digits with digest {data.digest}, found 0000"):
        evaluate(options)


@pytest.mark.parametrize("reconstruction", ["squared", "bernoulli"])
def test_bf16_follows_fp32(reconstruction):
    torch.manual_seed(0)
    system = Config(reconstruction=reconstruction).build()
    x, labels = torch.rand(200, 1, 28, 28), torch.arange(100) % 10
    terms = {p: system.loss(x[:100], x[100:], labels, p) for p in ("fp32", "bf16")}
    for name, value in terms["fp32"].items():
        assert terms["bf16"][name].item() == pytest.approx(value.item(), rel=0.02)
    assert terms["bf16"]["loss"] != terms["fp32"]["loss"]
    system = toy(3 * torch.eye(10))  # an image is its own code: only the distance and the logarithms are left
    z, components = system.draw(105, torch.Generator().manual_seed(0))
    exact, found = (system.loss(z[:100], z[100:], components[100:], p) for p in ("fp32", "bf16"))
    assert found["d2"].item() == pytest.approx(exact["d2"].item(), rel=1e-5)
    assert found["cross_entropy"].item() == pytest.approx(exact["cross_entropy"].item(), rel=1e-5)


# ----------------------------------------------------------------------------------------------------------- evaluation


def test_figures_of_any_class_names_and_of_a_single_epoch(tmp_path, monkeypatch):
    made, names = [], ["a_$", "b_$", "$_$ and not smiling", "6"]
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: made.append(figure))
    lines = {"-".join(pair): {"$_$ and not smiling": 0.5, "6": 0.1} for pair in itertools.combinations(names, 2)}
    geometry({"mean_distances": torch.rand(4, 4).tolist(), "between": lines}, names, tmp_path)
    for figure in made:  # no text covers another, and $…$ is not read as a formula
        figure.canvas.draw()
        boxes = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text()]
        assert len(boxes) == 12 and all(box.count_overlaps(boxes) == 1 for box in boxes)
        assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == names
    assert all(text.get_text().endswith(": 50") for text in figure.axes[0].texts if text.get_text())  # most lines
    before = len(made)  # between two classes there is no third one
    geometry({"mean_distances": torch.rand(2, 2).tolist(), "between": {"a-b": {}}}, ["a", "b"], tmp_path)
    assert len(made) == before + 1
    rows = [{"epoch": 1, "mse": 20.0, "d2": 0.1}, {"epoch": 2, "mse": 10.0, "d2": 0.001}]
    for several, scales in ((rows, ["linear", "log"]), (rows[:1], ["linear", "linear"])):
        plots.save_course(several, tmp_path / "x.png", COURSE)
        assert [axes.get_yscale() for axes in made[-1].axes[:2]] == scales
        assert made[-1].axes[0].get_title() == "reconstruction error, eq. (1)"
        assert all(axes.lines[0].get_marker() == "." for axes in made[-1].axes[:2])
        assert made[-1].axes[0].lines[0].get_xdata().tolist() == [row["epoch"] for row in several]


def test_a_grid_is_laid_out_row_by_row_beside_its_labels(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: made.append(figure))
    images = torch.tensor([-0.5, 0.2, 0.4, 0.6, 0.8, 1.5]).view(6, 1, 1, 1).expand(6, 1, 4, 5)
    laid = plots.grid(images, 3)  # cells of 4×5, two pixels between
    assert laid.shape == (14, 23, 3) and laid[[3, 9]][:, [3, 10, 17], 0].tolist() == [[0, 51, 102], [153, 204, 255]]
    plots.save_labelled_grid(images, tmp_path / "x.png", 3, "", ["upper", "lower"], ["left", "middle", "right"])
    (axes,) = made[0].axes
    rows, columns = {"upper": 4, "lower": 10}, {"left": 4.5, "middle": 11.5, "right": 18.5}
    for axis, expected in ((axes.yaxis, rows), (axes.xaxis, columns)):
        labels = [label.get_text() for label in axis.get_ticklabels()]
        assert dict(zip(labels, axis.get_ticklocs().tolist(), strict=True)) == expected


def test_a_figure_says_below_everything_else_whose_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "OF", "segma, a_$_$, seed0")
    monkeypatch.setattr("matplotlib.pyplot.close", lambda figure: None)
    figure, axes = plots.subplots()
    axes.plot([0, 1], label="curve")
    axes.legend(bbox_to_anchor=(0.5, -0.2))  # the legend hangs below the panel
    plots.save_figure(figure, tmp_path / "x.png")
    (said,) = figure.texts
    assert said.get_text() == plots.OF
    assert not said.get_window_extent().overlaps(axes.get_legend().get_window_extent())


def test_figures_7_and_8_start_from_the_class_that_eq_7_gives(tmp_path, monkeypatch):
    means = torch.zeros(4, 10)
    means[:, 0] = torch.tensor([0.0, 20.0, 60.0, 90.0])  # nearest: 1 to 0, 0 to 1, 3 to 2, 2 to 3
    system, assigned, drawn = toy(means), torch.arange(12) % 4, []
    z = means[assigned] + torch.randn(12, 10, generator=torch.Generator().manual_seed(0))
    system.decoder = torch.nn.Unflatten(1, (1, 1, 10))
    images = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1).expand(12, 1, 1, 10)
    data = Dataset("made up", images.flip(0), assigned, images, (assigned + 1) % 4, tuple("0123"), "0" * 16, False)
    monkeypatch.setattr(plots, "save_labelled_grid", lambda *arguments: drawn.append(arguments))
    chosen = style_transfers(system, data, z, torch.Generator().manual_seed(1), tmp_path)
    intensities(system, data, z, chosen, torch.Generator(), tmp_path)
    assert assigned[chosen].tolist() == [0, 1, 2, 3] and [row[:4] for row in drawn[0][4]] == [
        f"{k} to" for k in range(4)
    ]
    target = torch.tensor([int(row[-1]) for row in drawn[0][4]])
    codes = [images.view(4, -1, 10)[:, 1:] for images, *_ in drawn]  # the first column is the real image
    torch.testing.assert_close(codes[0][:, 0], z[chosen])
    torch.testing.assert_close(codes[0][:, -1], z[chosen] + means[target] - means)
    assert drawn[1][4] == ["0, away from 1", "1, away from 0", "2, away from 3", "3, away from 2"]
    torch.testing.assert_close(codes[1][:, 2], z[chosen] + 0.5 * (means - means[[1, 0, 3, 2]]))
    intensities(system, dataclasses.replace(data, name="celeba_train"), z, chosen, torch.Generator(), tmp_path)
    assert drawn[2][4] == ["0, away from 1", "2, away from 1", "3, away from 1", "1, away from 3"]  # as in the paper
    assert len(drawn[2][0]) == 4 * 7  # and no original (ledger 47)
    samples(system, data, torch.Generator().manual_seed(0), tmp_path)  # Figs. 3 to 5: a row is a component
    assert torch.equal(system.classify(drawn[-1][0].flatten(1)).view(4, 10), torch.arange(4)[:, None].expand(4, 10))
    interpolations(system, data, z, torch.Generator().manual_seed(0), tmp_path)  # Fig. 6
    rows = drawn[-1][0].view(4, 11, 10)
    first, last = ((255 * rows[:, i, 0]).round().long() for i in (0, -1))
    t = torch.linspace(0, 1, 9)[None, :, None]
    torch.testing.assert_close(rows[:, 1:-1], (1 - t) * z[first][:, None] + t * z[last][:, None])
    assert drawn[-1][4] == [f"{data.test_labels[i]} to {data.test_labels[j]}" for i, j in zip(first, last, strict=True)]
    for seed in range(20):  # no image is classified as 3: row 3 starts from another class
        style_transfers(system, data, z[assigned % 3], torch.Generator().manual_seed(seed), tmp_path)
        assert all(source != target for source, target in (row.split(" to ") for row in drawn[-1][4]))
    system.config = dataclasses.replace(system.config, label_weight=0.0)  # then a component is no class
    samples(system, data, torch.Generator(), tmp_path)
    assert drawn[-1][4][3] == "component 3"


def test_with_one_class_figure_6_goes_from_one_image_to_another(tmp_path, monkeypatch):
    images, drawn, system = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1) * 40, [], toy(torch.zeros(1, 10))
    system.decoder = torch.nn.Sequential(torch.nn.Linear(10, 1), torch.nn.Unflatten(1, (1, 1, 1)))
    data = Dataset("mine", images, torch.zeros(3).long(), images, torch.zeros(3).long(), ("a",), "0" * 16, False)
    monkeypatch.setattr(plots, "save_labelled_grid", lambda *arguments: drawn.append(arguments))
    for seed in range(20):
        interpolations(system, data, torch.randn(3, 10), torch.Generator().manual_seed(seed), tmp_path)
    ends = {(round(255 * row[0][0].item()), round(255 * row[0][-1].item())) for row in drawn}
    assert len(ends) == 6 and all(first != last for first, last in ends) and drawn[0][4] == ["a to a"]


def test_samples_are_always_from_the_same_noise(tmp_path, monkeypatch):
    system, paths = small(), [tmp_path / f"{i}.png" for i in range(3)]
    for path, seed in zip(paths, (0, 0, 1), strict=True):
        save_samples(system, path, seed)
    once, again, other = (path.read_bytes() for path in paths)
    assert once == again != other
    made, system = [], toy(50 * torch.eye(3, 10))
    monkeypatch.setattr("segma.train.save_grid", lambda codes, *_, **__: made.append(codes))
    save_samples(system, tmp_path, 0)
    assert torch.equal(system.classify(made[0]).view(3, 10), torch.arange(3)[:, None].expand(3, 10))


def test_lines_pass_through_the_class_that_lies_between():
    means = torch.zeros(10, 10)
    means[:, 0] = torch.tensor([0, 100, 200, 300, 60, 500, 50, 700, 800, 70]).float()  # 6 at 50, 4 at 60, 9 at 70
    system, data = toy(means), load("digits", "")
    z = means[data.test_labels]
    z[(data.test_labels == 8).nonzero()[::2, 0]] = means[1]  # eq. (7) classifies these as 1: no line starts there
    shares = between(system, data, z, seed=0)
    assert shares["6-9"] == {"4": 1.0}
    assert shares["4-6"] == shares["1-2"] == shares["7-8"] == {}
    assert list(shares["0-1"]) and set(shares["0-1"]) == {"4", "6", "9"}
    assert len(shares) == 45
    assert nearest_classes(system, data)["6"] == "4"


def test_points_between_lie_on_segments_between_codes():
    z = torch.randn(3000, 10, dtype=torch.float64)
    points = points_between(z, torch.Generator().manual_seed(0))
    assert points.shape == (10_000, 10)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(3000, generator=generator)
    first, second = z[order[:1000]], z[order[1000:2000]]
    direction = second - first
    t = ((points[:1000] - first) * direction).sum(1) / direction.square().sum(1)
    torch.testing.assert_close(first + t[:, None] * direction, points[:1000])
    assert 0 <= t.min() and t.max() <= 1 and t.mean().item() == pytest.approx(0.5, abs=0.05)
    t = ((points[1000:2000] - first) * direction).sum(1) / direction.square().sum(1)
    assert not torch.isclose(first + t[:, None] * direction, points[1000:2000]).all(1).any()  # other pairs


def test_to_bytes_clips_and_truncates():
    assert to_bytes(torch.tensor([-0.2, 0.0, 0.5, 0.9999, 1.0, 1.3])).tolist() == [0, 0, 127, 254, 255, 255]


def test_fids_are_taken_against_train_and_test(monkeypatch, tmp_path, trained):
    """Tables I and III, and the cache, with a random projection in place of the Inception network."""
    projection = torch.randn(784, 16, generator=torch.Generator().manual_seed(0))
    calls = []

    def features(network, images, batch=100):
        calls.append(len(images))
        return images.float().flatten(1) / 255 @ projection

    monkeypatch.setattr(inception, "FEATURES", 16)
    monkeypatch.setattr(inception, "find_weights", lambda path: (tmp_path / "weights", ""))
    monkeypatch.setattr(inception, "extractor", lambda *a: torch.nn.Linear(1, 1))
    monkeypatch.setattr(inception, "features", features)
    monkeypatch.setattr("segma.eval.FID_SAMPLES", 1000)
    system, data = segma.load(trained / "segma/digits/seed3"), load("digits", "")
    options = run.Options("digits", seed=3, runs=tmp_path)
    scores, judge = tables_i_and_iii(system, data, system.encode(data.test_images), options)
    assert set(scores) == {"fid", "fid_test", "fid_interpolation", "fid_interpolation_test"} and "Inception" in judge
    assert calls == [1437, 360, 1000, 1000]
    made = to_bytes(system.decode(system.draw(1000, run.generator(3, "fid"))[0]))
    expected = frechet_distance(moments(features(None, made)), moments(features(None, data.train_images)))
    assert scores["fid"] == pytest.approx(expected, rel=1e-6)
    again, _ = tables_i_and_iii(system, data, system.encode(data.test_images), options)
    assert again == scores and calls[6:] == [1000, 1000]  # the real images' moments came from the cache
    points = points_between(system.encode(data.test_images), run.generator(3, "fid interpolation"))
    made = features(None, to_bytes(system.decode(points)))
    expected = frechet_distance(moments(made), moments(features(None, data.test_images)))
    assert scores["fid_interpolation_test"] == pytest.approx(expected, rel=1e-6)


def test_without_weights_fid_is_left_out_and_the_reason_printed(monkeypatch, capsys, tmp_path):
    images, labels = torch.zeros(3000, 1, 28, 28, dtype=torch.uint8), torch.zeros(3000, dtype=torch.int64)
    data = Dataset("mnist", images, labels, images, labels, ("0",), "0" * 16, False)
    monkeypatch.setattr(inception, "find_weights", lambda path: (None, "the Inception weights are not here"))
    options = run.Options("mnist", runs=tmp_path)
    assert tables_i_and_iii(toy(torch.zeros(10, 10)), data, torch.zeros(3000, 10), options) == ({}, None)
    assert "FID left out: the Inception weights are not here" in capsys.readouterr().out
    few = dataclasses.replace(data, test_images=images[:2000], test_labels=labels[:2000])
    assert tables_i_and_iii(toy(torch.zeros(10, 10)), few, torch.zeros(2000, 10), options) == ({}, None)
    assert "FID left out: mnist has fewer images" in capsys.readouterr().out


def test_the_readme_example_runs(trained):
    """Run the lines of the README unchanged, except that they load a run of this test."""
    text = (ROOT / "README.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "from segma import load" in block)
    target = trained / "segma/digits/seed0"
    if not target.exists():
        target.symlink_to(trained / "segma/digits/seed3")
    names: dict = {}
    exec(code.replace('"runs/', f'"{trained}/'), names)
    system, z, label = names["model"], names["z"], names["label"]
    assert z.shape == (1, 10) and label.shape == (1,) and names["threes"].shape == (8, 1, 28, 28)
    torch.testing.assert_close(names["moved"], system.decode(z + system.means[[3]] - system.means[label]))


def test_the_closed_form_is_what_sampling_tends_to():
    """Both use the exact φ_D, since the asymptotic one is not consistent between points and Gaussians."""
    means, priors = random_mixture(4, 10)
    z, gamma = sample_mixture(50, means, priors, seed=2), 0.6
    exact = model.cramer_wold_distance(z, means, priors, gamma, exact_phi).item()
    n = 2000
    samples = sample_mixture(n, means, priors, seed=3)
    pairs = model.gaussian_product(model.squared_distances(samples, samples), 0, gamma, 10, exact_phi)
    found = model.sampled_distance(z, samples, gamma, exact_phi).item()
    unbiased = found - pairs.mean().item() + (pairs.sum() - pairs.diagonal().sum()).item() / (n * (n - 1))
    assert unbiased == pytest.approx(exact, abs=5e-4) and exact > 2e-3
    assert model.cramer_wold_distance(z, means, priors, gamma).item() != pytest.approx(exact, abs=5e-4)


def test_noise_of_the_sampled_gradient_falls_as_one_over_the_root_of_n():
    system = toy(3 * torch.eye(10))
    system.priors.copy_(torch.arange(1, 11) / 55)
    z, _ = system.draw(3000, torch.Generator().manual_seed(0))
    rows, timing = closed_form_against_sampling(system, z, seed=0)
    assert [row["n"] for row in rows] == [row["n"] for row in timing] == [0, 10, 30, 100, 300, 1000]
    noise = [row["gradient_noise"] for row in rows]
    assert noise[0] == 0 and noise[1] / noise[5] == pytest.approx(10, rel=0.5)
    assert noise[3] / noise[5] == pytest.approx(10**0.5, rel=0.3)
    assert rows[1]["sd"] > rows[5]["sd"] > 0 == rows[0]["sd"]
    assert all(row["milliseconds"] > 0 for row in timing)
    generator, gradients, values = run.generator(0, "sampled distance"), [], []  # the noise for n = 10, by NumPy
    codes = z[torch.randperm(3000, generator=generator)[:100]].requires_grad_()
    means = system.means.clone().requires_grad_()
    for _ in range(20):
        k = torch.multinomial(system.priors, 10, replacement=True, generator=generator)
        drawn = means[k] + torch.randn(10, 10, generator=generator)
        values.append(model.sampled_distance(codes, drawn, system.gamma))
        slopes = torch.autograd.grad(values[-1], (codes, means))
        gradients.append(np.concatenate([g.flatten() for g in slopes]))
    mean = np.mean(gradients, 0)
    expected = np.sqrt(np.square(gradients - mean).sum(1).mean()) / np.linalg.norm(mean)
    assert noise[1] == pytest.approx(expected, rel=1e-4)
    exact = model.cramer_wold_distance(codes, means, system.priors, system.gamma).item()
    assert [row["mean"] for row in rows[:2]] == pytest.approx([exact, sum(values).item() / 20], rel=1e-4)


def test_verdict_counts_samples_of_their_class():
    found, components = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 0, 1, 2, 2, 2])
    assert verdict(found, components, 3, True) == {"nearest_image_of_their_class": pytest.approx(500 / 6)}
    found = torch.tensor([2, 2, 0, 1, 1, 1])  # component 0 has only 2s, component 1 one 0, component 2 only 1s
    assert verdict(found, components, 3, False) == {"nearest_image_purity": pytest.approx(100)}
    purity = verdict(torch.tensor([0, 1, 0, 1, 2, 2]), components, 3, False)
    assert purity == {"nearest_image_purity": pytest.approx(400 / 6)}


def test_a_sample_has_the_class_of_the_nearest_training_image():
    """Codes are images here. Samples of component k are bright in pixel k, and so is training image k."""
    system = toy(50 * torch.eye(4, 10))
    system.priors.copy_(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    images = (255 * torch.eye(4, 10)).to(torch.uint8).view(4, 1, 1, 10)
    labels = torch.tensor([0, 1, 2, 2])  # component 3 makes images of class 2
    data = Dataset("made up", images, labels, images.flip(0), labels, tuple("0123"), "0" * 16, False)
    monochrome = torch.nn.Unflatten(1, (1, 1, 10))
    system.decoder = torch.nn.Sequential(monochrome, torch.nn.Threshold(20.0, 0.0))
    _, components = system.draw(2000, run.generator(7, "nearest images"))
    share = 100 * (components != 3).double().mean().item()
    assert 88 < share < 92
    assert rows_are_classes(system, data, 7) == {"nearest_image_of_their_class": pytest.approx(share)}
    system.config = dataclasses.replace(system.config, label_weight=0.0)
    assert rows_are_classes(system, data, 7) == {"nearest_image_purity": 100.0}


def test_without_labels_no_label_is_seen():
    system = small(label_weight=0.0)
    assert system.config.labelled_per_batch == 0 and system.config.codes_per_batch == 10
    x, none = torch.rand(10, 1, 28, 28), torch.rand(0, 1, 28, 28)
    terms = system.loss(x, none, torch.zeros(0, dtype=torch.long))
    assert set(terms) == {"loss", "mse", "d2"}
    assert terms["loss"].item() == pytest.approx((terms["mse"] + 5 * terms["d2"].log()).item())


def test_cwae_is_eq_4():
    """With K = 1 and μ = 0 the distance is that of a batch from N(0, I): eq. (4), written out here."""
    torch.manual_seed(0)
    z, gamma, dim = torch.randn(20, 10, dtype=torch.float64), 0.3, 10
    found = model.cramer_wold_distance(z, torch.zeros(1, 10).double(), torch.ones(1).double(), gamma)
    pairs = sum(model.phi((a - b).square().sum() / (4 * gamma), dim).item() for a in z for b in z)
    middle = sum(model.phi(a.square().sum() / (2 + 4 * gamma), dim).item() for a in z)
    expected = pairs / 400 / math.sqrt(4 * math.pi * gamma) + 1 / math.sqrt(2 * math.pi * (2 + 2 * gamma))
    expected -= 2 * middle / 20 / math.sqrt(2 * math.pi * (1 + 2 * gamma))
    assert found.item() == pytest.approx(expected, rel=1e-10)
