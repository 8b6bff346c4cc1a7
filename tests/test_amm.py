"""AMM and SAMM: layers and counts from the tables, dropout, losses, the penalty, both predictions, runs end to end."""

import copy
import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import expit, softmax
from scipy.stats import multivariate_normal
from torch.nn import functional as F

from amm import eval as evaluation
from amm import model, train
from amm.model import Components, Decoder, Discriminator, Encoder, InputDropout, gradient_penalty
from common import diff, run
from common.data import Dataset
from common.metrics import contingency
from tests.conftest import call, run_command

MNIST, SVHN = (1, 28, 28), (3, 32, 32)


# --------------------------------------------------------------------------------------------------- Tables 3 to 10, as data

COUNTS = {  # encoder, G_z(y), decoder, D for K = 10, 20, 30
    MNIST: [(412_436, 9_280, 402_818, 341_057), (415_016, 9_920, 404_098, 341_697), (417_596, 10_560, 405_378, 342_337)],
    SVHN: [
        (1_865_620, 1_408, 6_316_550, 1_947_841),
        (1_867_560, 2_688, 6_321_670, 1_948_801),
        (1_869_500, 3_968, 6_326_790, 1_949_761),
    ],
}


def count(network) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("shape", [MNIST, SVHN])
@pytest.mark.parametrize("i, k", [(0, 10), (1, 20), (2, 30)])
def test_the_counts_of_every_network(shape, i, k):
    variance = "unit" if shape == MNIST else "learned"
    networks = Encoder(shape, k, 64, "y"), Components(shape, k, 64, variance), Decoder(shape, k, 64), Discriminator(shape, k, 64)
    assert tuple(count(network) for network in networks) == COUNTS[shape][i]


@pytest.mark.parametrize("experiment", run.experiments("amm"))
def test_the_experiments_networks_are_the_tables(experiment):
    config = run.experiment_config("amm", experiment)
    encoder, *others = COUNTS[config.shape][config.n_components // 10 - 1]
    if config.y_noise == "none":
        encoder -= 128 * 10 + 10  # Table 3's y_σ
    networks = train.build(config)
    assert [count(networks[name]) for name in ("encoder", "components", "decoder", "discriminator")] == [encoder, *others]
    for network in networks.values():
        for module in network.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d | torch.nn.ConvTranspose2d):
                assert module.bias.abs().max() == 0 and (module.weight.numel() < 500 or abs(module.weight.std().item() - 0.02) < 0.003)


def outputs(network, *example, kinds):
    """The shapes (C, H) that layers of these kinds give out, in order of calling."""
    seen = []
    for module in network.modules():
        if isinstance(module, kinds):
            module.register_forward_hook(lambda _, __, out: seen.append((out.shape[1], out.shape[2] if out.dim() > 2 else 1)))
    network(*example)
    return seen


CONV, DENSE = (torch.nn.Conv2d, torch.nn.ConvTranspose2d), torch.nn.Linear


def test_shapes_of_tables_3_to_6():
    both = [(32, 27), (32, 13), (64, 6), (64, 4), (128, 1)]
    heads = [(10, 1), (10, 1), (64, 1), (64, 1)]
    x, y, z = torch.rand(2, *MNIST), torch.eye(10)[:2], torch.randn(2, 64)
    assert outputs(Encoder(MNIST, 10, 64, "y"), x, kinds=CONV) == [s for s in both for _ in "yz"] + heads
    up = [(128, 1), (64, 4), (64, 6), (32, 13), (32, 27), (1, 28)]
    decoder = Decoder(MNIST, 10, 64)
    assert outputs(decoder, y, z, kinds=CONV) == [s for s in up for _ in "yz"]
    assert decoder(y, z).shape == x.shape and 0 <= decoder(y, z).min() and decoder(y, z).max() <= 1
    discriminator = Discriminator(MNIST, 10, 64)
    assert outputs(discriminator, x, y, z, kinds=CONV) == both
    assert outputs(discriminator, x, y, z, kinds=DENSE) == [(64, 1)] * 4 + [(256, 1), (256, 1), (1, 1)]
    assert outputs(Components(MNIST, 10, 64, "unit"), y, kinds=DENSE) == [(64, 1)] * 3
    assert discriminator(x, y, z).shape == (2,)


def test_shapes_of_tables_7_to_10():
    x, y, z = torch.rand(2, *SVHN), torch.eye(30)[:2], torch.randn(2, 64)
    images = [(96, 32), (96, 32), (96, 32), (192, 16), (192, 16), (192, 16), (384, 6)]
    streams = [(192, 6), (192, 6), (96, 6), (96, 6)]
    heads = [(30, 1), (30, 1), (64, 1), (64, 1)]
    assert outputs(Encoder(SVHN, 30, 64, "y"), x, kinds=CONV) == images + streams + heads
    up = [(512, 1), (256, 4), (256, 6), (128, 13), (128, 15), (3, 32)]
    assert outputs(Decoder(SVHN, 30, 64), y, z, kinds=CONV) == [s for s in up for _ in "yz"]
    discriminator = Discriminator(SVHN, 30, 64)
    assert outputs(discriminator, x, y, z, kinds=CONV) == [*images, (192, 6), (96, 6)]
    assert outputs(discriminator, x, y, z, kinds=DENSE) == [(96, 1)] * 4 + [(288, 1), (288, 1), (1, 1)]
    assert outputs(Components(SVHN, 30, 64, "learned"), y, kinds=DENSE) == [(64, 1)] * 2


# ------------------------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("shape", [(1000, 7), (50, 3, 6, 6), (1, 1, 1, 1)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_dropout_drops_the_stated_share_and_keeps_the_mean(shape, channels_last):
    x = torch.ones(shape)
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    torch.manual_seed(0)
    dropout = InputDropout(0.2)
    dropped = dropout(x)
    assert set(dropped.unique().tolist()) <= {0.0, 1.25} and dropped.stride() == x.stride()
    if x.numel() > 5000:
        assert abs((dropped == 0).float().mean().item() - 0.2) < 4 * math.sqrt(0.16 / x.numel())
    assert torch.equal(dropout.eval()(x), x) and torch.equal(InputDropout(0.0)(x), x)


def test_dropout_masks_are_independent_and_seeded():
    dropout, x = InputDropout(0.5), torch.ones(20_000)
    torch.manual_seed(3)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(3)
    assert torch.equal(dropout(x), first) and not torch.equal(first, second)
    neighbours = (first[1:] * first[:-1]).mean().item()  # E = 1 where entries are independent
    assert abs(neighbours - 1) < 0.05


TWICE = [p for p in [0.2] * 5 for _ in "yz"]
# The Dropout columns: the share of dropped inputs that each convolution or dense layer sees, in order of calling; both streams.
DROPOUTS = {
    ("encoder", MNIST): TWICE + [0] * 4, ("components", MNIST): [0, 0.2, 0], ("decoder", MNIST): [0, 0] + TWICE,
    ("discriminator", MNIST): [0, 0.2, 0.2, 0.2, 0.2, 0, 0.2, 0, 0.2, 0.2, 0.2, 0.2],
    ("encoder", SVHN): [0] * 15, ("components", SVHN): [0, 0], ("decoder", SVHN): [0] * 12,
    ("discriminator", SVHN): [0, 0, 0, 0.1, 0, 0, 0.1, 0, 0, 0, 0.1, 0, 0.1, 0.1, 0.1, 0.1],
}  # fmt: skip


@pytest.mark.parametrize("name, shape", DROPOUTS)
def test_which_layers_see_dropped_inputs(name, shape):
    config = run.experiment_config("amm", "mnist" if shape == MNIST else "svhn-k10")
    network, n = train.build(config)[name], 40
    x, y, z = torch.rand(n, *shape) + 0.1, torch.rand(n, 10) + 0.1, torch.rand(n, 64) + 0.1  # nothing is 0 by itself
    example = {"encoder": (x,), "components": (y,), "decoder": (y, z), "discriminator": (x, y, z)}[name]
    shares = []
    for module in network.modules():
        if isinstance(module, (*CONV, DENSE)):
            module.register_forward_pre_hook(lambda _, inputs: shares.append((inputs[0] == 0).float().mean().item()))
    network(*example)
    assert shares == pytest.approx(DROPOUTS[name, shape], abs=0.04) and sum(s == 0 for s in shares) == DROPOUTS[name, shape].count(0)
    shares.clear()
    network.eval()(*example)
    assert set(shares) == {0.0}


# ---------------------------------------------------------------------------------- what a layer does: the other columns


def settled(network):
    """In evaluation mode with weights, running means and variances that are not the neutral ones; and their values by name."""
    g = torch.Generator().manual_seed(6)
    for name, value in network.double().state_dict().items():
        if value.is_floating_point():
            drawn = torch.randn(value.shape, generator=g)
            value.copy_(drawn.abs() + 0.5 if "var" in name or "norm" in name and "weight" in name else 0.3 * drawn)
    return network.eval(), network.state_dict()


def norm(x, w, name):
    mean, var, weight, bias = (w[f"{name}.{k}"].view(-1, *[1] * (x.dim() - 2)) for k in ("running_mean", "running_var", "weight", "bias"))
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def leak(x):
    return torch.where(x > 0, x, 0.2 * x)


def affine(x, w, name, stride=1, padding=0, up=False):
    weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
    if weight.dim() == 2:
        return x @ weight.T + bias
    return (F.conv_transpose2d if up else F.conv2d)(x, weight, bias, stride=stride, padding=padding)


def images_32(x, w, normed):
    """x_1 to x_7 of Tables 7 and 10: channels, width, stride and activation as the rows say; pooling after x_3 and x_6."""
    layer = [k.removesuffix(".weight") for k, v in w.items() if k.startswith(("shared.", "x.")) and v.dim() == 4]
    norms = [k.removesuffix(".running_mean") for k in w if k.startswith("shared.") and "running_mean" in k]
    for i in range(7):
        x = affine(x, w, layer[i], padding=0 if i == 6 else 1)
        x = leak(norm(x, w, norms[i]) if normed else x)
        x = F.max_pool2d(x, 2) if i in (2, 5) else x
    return x, layer[7:]


@pytest.mark.parametrize("shape", [MNIST, SVHN])
@pytest.mark.parametrize("receiver", "yz")
def test_the_encoder_is_tables_3_and_7(shape, receiver):
    network, w = settled(Encoder(shape, 10, 64, receiver))
    x = torch.rand(3, *shape).double()
    y = z = x if shape == MNIST else images_32(x, w, True)[0]
    for i, stride in enumerate([1, 2, 2, 1, 1] if shape == MNIST else [1, 1]):
        own_y, own_z = affine(y, w, f"rows.{i}.y", stride), affine(z, w, f"rows.{i}.z", stride)
        both = own_y + own_z
        y = leak(norm(both if receiver == "y" else own_y, w, f"rows.{i}.y_norm"))
        z = leak(norm(own_z if receiver == "y" else both, w, f"rows.{i}.z_norm"))
    if shape == SVHN:
        y, z = y.mean((2, 3), keepdim=True), z.mean((2, 3), keepdim=True)
    found = network(x)
    for which, code in zip(("y_heads", "z_heads"), (y, z), strict=True):
        for i in (0, 1):
            wanted = affine(code, w, f"{which}.{i}").flatten(1)
            torch.testing.assert_close(found[which == "z_heads"][i], wanted)


@pytest.mark.parametrize("shape", [MNIST, SVHN])
def test_the_decoder_is_tables_5_and_9(shape):
    network, w = settled(Decoder(shape, 10, 64))
    y, z = torch.rand(3, 10).double(), torch.randn(3, 64).double()
    found = network(y, z)
    y, z = y[:, :, None, None], z[:, :, None, None]
    for i, stride in enumerate([1, 1, 1, 2, 2, 1] if shape == MNIST else [1, 1, 1, 2, 1, 2]):
        y, z = affine(y, w, f"y.{i}", stride, up=True), affine(z, w, f"z.{i}", stride, up=True)
        if i < 5:  # y_n + z_n, normalised, without activation; z's own with
            y, z = norm(y + z, w, f"y_norms.{i}"), leak(norm(z, w, f"z_norms.{i}"))
    torch.testing.assert_close(found, 1 / (1 + (-(y + z)).exp()))


@pytest.mark.parametrize("shape", [MNIST, SVHN])
def test_the_discriminator_is_tables_6_and_10(shape):
    network, w = settled(Discriminator(shape, 10, 64))
    x, y, z = torch.rand(3, *shape).double(), torch.rand(3, 10).double(), torch.randn(3, 64).double()
    found = network(x, y, z)
    if shape == MNIST:
        for name, stride in zip([k for k in w if k.startswith("x.") and "weight" in k], [1, 2, 2, 1, 1], strict=True):
            x = leak(affine(x, w, name.removesuffix(".weight"), stride))
    else:
        x, rest = images_32(x, w, False)
        for name in rest:
            x = leak(affine(x, w, name))
        x = x.mean((2, 3))
    for part in "yz":
        for name in [k for k in w if k.startswith(f"{part}.") and "weight" in k]:
            if part == "y":
                y = leak(affine(y, w, name.removesuffix(".weight")))
            else:
                z = leak(affine(z, w, name.removesuffix(".weight")))
    p = torch.cat([x.flatten(1), y, z], 1)
    *hidden, last = [k.removesuffix(".weight") for k in w if k.startswith("p.") and "weight" in k]
    for name in hidden:
        p = leak(affine(p, w, name))
    wanted = affine(p, w, last)[:, 0]
    torch.testing.assert_close(found, wanted)


def test_the_components_are_tables_4_and_8():
    y = torch.eye(10).double()
    network, w = settled(Components(MNIST, 10, 64, "unit"))
    h = y
    for i in (1, 5):
        h = leak(norm(affine(h, w, f"body.{i}"), w, f"body.{i + 1}"))
    mean, log_variance = network(y)
    torch.testing.assert_close(mean, affine(h, w, "mean"))
    assert log_variance.abs().max() == 0
    network, w = settled(Components(SVHN, 10, 64, "learned"))
    mean, log_variance = network(y)
    torch.testing.assert_close(mean, affine(y, w, "mean"))
    torch.testing.assert_close(log_variance, affine(y, w, "log_variance"))


def test_without_labels_both_factorisations_have_the_tables_counts():
    for i, k in enumerate((10, 20, 30)):
        assert count(Encoder(MNIST, k, 64, "z")) == COUNTS[MNIST][i][0]
        assert count(Encoder(MNIST, k, 64, "z", labelled=True)) > COUNTS[MNIST][i][0] == count(Encoder(MNIST, k, 64, "y", labelled=True))


SETTINGS = {  # Secs. 4, 4.1 and 4.2, and ledger 9 and 10: data, K, λ, held out and how, labels, variance
    "mnist": ("mnist", 10, 10.0, 5000, "random", None, "unit"), "mnist-nonoise": ("mnist", 10, 1.0, 5000, "random", None, "unit"),
    "mnist-k20": ("mnist", 20, 10.0, 5000, "random", None, "unit"), "mnist-k30": ("mnist", 30, 10.0, 5000, "random", None, "unit"),
    "samm-mnist": ("mnist", 10, 10.0, 5000, "random", 100, "unit"),
    "svhn-k10": ("svhn", 10, 0.01, 10_000, "last", None, "learned"), "svhn-k20": ("svhn", 20, 0.01, 10_000, "last", None, "learned"),
    "svhn-k30": ("svhn", 30, 0.01, 10_000, "last", None, "learned"), "samm-svhn": ("svhn", 10, 0.01, 10_000, "last", 1000, "learned"),
    "digits": ("digits", 10, 1.0, 100, "random", None, "unit"), "samm-digits": ("digits", 10, 1.0, 100, "random", 100, "unit"),
}  # fmt: skip


def test_the_experiments_settings_are_the_papers():
    assert sorted(SETTINGS) == run.experiments("amm")
    for name, expected in SETTINGS.items():
        c = run.experiment_config("amm", name)
        labels = c.n_labels if c.semi_supervised else None
        assert (c.dataset, c.n_components, c.penalty, c.validation, c.held_out, labels, c.variance) == expected
        departs = name == "mnist-nonoise"
        assert c.y_noise == ("none" if departs else "learned")
        assert c.learning_rate == (1e-3 if departs or c.dataset == "digits" else 2e-4)  # both ours
        assert c.batch == (100 if c.dataset == "svhn" else 32)
        assert (c.beta1, c.latent_dim, c.factorisation, c.penalty_norm) == (0.5, 64, "eq7", "joint")


def test_evaluation_is_deterministic_and_training_is_not():
    config = run.experiment_config("amm", "mnist")
    networks = train.build(config)
    images = torch.randint(0, 256, (4, *MNIST), dtype=torch.uint8)
    assert torch.equal(train.infer(networks, images)[0], train.infer(networks, images)[0])
    x = images.float() / 255
    assert not torch.equal(networks["encoder"](x)[0][0], networks["encoder"](x)[0][0])
    assert networks["encoder"].training  # infer left the mode as it was


# --------------------------------------------------------------------------------------------------------------- losses


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_the_losses_of_algorithm_1_by_hand():
    q, p = [0.4, -1.2, 2.0], [0.3, -0.7, 1.1]
    rho_q, rho_p = torch.tensor(q), torch.tensor(p)
    expected = -sum(math.log(sigmoid(x)) for x in q) / 3 - sum(math.log(1 - sigmoid(x)) for x in p) / 3
    assert model.discriminator_loss(rho_q, rho_p).item() == pytest.approx(expected, rel=1e-6)
    assert model.decoder_loss(rho_p).item() == pytest.approx(-sum(math.log(sigmoid(x)) for x in p) / 3, rel=1e-6)
    assert model.encoder_loss(rho_q).item() == pytest.approx(-sum(math.log(1 - sigmoid(x)) for x in q) / 3, rel=1e-6)


class Linear(torch.nn.Module):
    """A D that is linear in (x, y, z), whose gradient is its weights everywhere."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.weights = torch.nn.ParameterList(torch.randn(n, generator=g, dtype=torch.float64) for n in (4, 3, 2))

    def forward(self, *joint):
        return sum(part.flatten(1) @ w for part, w in zip(joint, self.weights, strict=True))


def joints(n: int = 5):
    g = torch.Generator().manual_seed(1)
    shapes = (n, 1, 2, 2), (n, 3), (n, 2)
    return [tuple(torch.randn(*s, generator=g, dtype=torch.float64) for s in shapes) for _ in range(2)]


def test_the_penalty_of_a_linear_discriminator_in_closed_form():
    discriminator = Linear()
    norm = math.sqrt(sum(w.square().sum().item() for w in discriminator.weights))
    penalty = gradient_penalty(discriminator, *joints(), torch.rand(5, dtype=torch.float64))
    assert penalty.item() == pytest.approx((norm - 1) ** 2, rel=1e-6)
    penalty.backward()
    for w in discriminator.weights:  # d/dw (‖w‖ - 1)² = 2 (‖w‖ - 1) w / ‖w‖
        torch.testing.assert_close(w.grad, 2 * (norm - 1) * w.detach() / norm, rtol=1e-6, atol=1e-9)


def test_one_penalty_each_asks_slope_1_of_a_linear_discriminator_in_x_y_and_z():
    discriminator = Linear()
    norms = [w.square().sum().sqrt().item() for w in discriminator.weights]
    penalty = gradient_penalty(discriminator, *joints(), torch.rand(5, dtype=torch.float64), norm="each")
    assert penalty.item() == pytest.approx(sum((norm - 1) ** 2 for norm in norms), rel=1e-6)
    penalty.backward()
    for w, norm in zip(discriminator.weights, norms, strict=True):
        torch.testing.assert_close(w.grad, 2 * (norm - 1) * w.detach() / norm, rtol=1e-6, atol=1e-9)


def test_the_penalty_of_the_probability_in_closed_form():
    """σ' of what the logit is at each point, times the slope of a linear D."""
    discriminator, (first, second), t = Linear(), joints(), torch.rand(5, dtype=torch.float64)
    norm = math.sqrt(sum(w.square().sum().item() for w in discriminator.weights))
    points = [a + t.view(-1, *[1] * (a.dim() - 1)) * (b - a) for a, b in zip(first, second, strict=True)]
    at = torch.from_numpy(expit(discriminator(*points).detach().numpy()))
    penalty = gradient_penalty(discriminator, first, second, t, norm="probability")
    assert penalty.item() == pytest.approx((at * (1 - at) * norm - 1).square().mean().item(), rel=1e-6)


def test_coupling_is_what_no_sum_of_two_parts_explains():
    """Of f(x) + g(y, z) nothing; of a product of centred parts all; of the sum of both what the variances say."""
    images = torch.randint(0, 256, (9, *MNIST), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    h, z = torch.randn(9, 3), torch.randn(9, 4)
    image, code = (images.float() / 255).mean((1, 2, 3)), h.softmax(1)[:, 0] + z[:, 1]
    f, g = image - image.mean(), code - code.mean()

    class D(torch.nn.Module):
        def __init__(self, of_sum: float, of_product: float):
            super().__init__()
            self.weights = of_sum, of_product

        def forward(self, x, y, z):
            assert not self.training
            u, v = x.mean((1, 2, 3)) - image.mean(), y[:, 0] + z[:, 1] - code.mean()
            return self.weights[0] * (u + v) + self.weights[1] * u * v

    assert train.coupling(D(1.0, 0.0), images, h, z) == pytest.approx(0, abs=1e-9)
    assert train.coupling(D(0.0, 1.0), images, h, z) == pytest.approx(1, abs=1e-4)
    additive, product = f.square().mean() + g.square().mean(), f.square().mean() * g.square().mean()
    expected = 100**2 * product / (additive + 100**2 * product)
    assert 0.01 < expected < 0.99 and train.coupling(D(1.0, 100.0), images, h, z) == pytest.approx(expected.item(), rel=1e-3)


def test_the_noise_of_the_label_as_the_log_has_it():
    """An encoder that says μ_y = (x, 3x) and log σ_y² = (0, 2 log 4) of an image of value x."""

    class Says(torch.nn.Module):
        def forward(self, x):
            assert not self.training
            value = x.mean((1, 2, 3))
            return (torch.stack([value, 3 * value], 1), torch.tensor([0.0, 2 * math.log(4)]).expand(len(x), 2)), None

    images = torch.tensor([0, 255] * 6, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, *MNIST)
    found = train.label_noise(Says(), images, batch=5)
    assert found == pytest.approx({"sigma_y": (1 + 4) / 2, "spread_y": (0.5 + 1.5) / 2})


@pytest.mark.parametrize("factorisation", ["eq7", "eq6"])
def test_without_noise_the_label_is_the_softmax_of_the_mean(factorisation):
    config, networks = built(y_noise="none", factorisation=factorisation)
    x = a_batch().images
    torch.manual_seed(1)
    inferred = train.play(networks, x, None, PRIORS, config).inferred
    torch.manual_seed(1)  # the same draws once more, dropout's included
    y = F.one_hot(torch.multinomial(PRIORS, 6, replacement=True), 3).float()
    networks["decoder"](y, model.sampled(*networks["components"](y)))
    (mean, log_variance), _ = networks["encoder"](x)
    assert torch.equal(inferred[1], mean.softmax(1)) and (log_variance == -torch.inf).all()
    with_noise = built(factorisation=factorisation)[1]["encoder"]
    assert count(with_noise) - count(networks["encoder"]) == 128 * 3 + 3  # the head of y_σ
    assert train.label_noise(networks["encoder"], (255 * x).byte())["sigma_y"] == 0


def test_slopes_of_a_discriminator_that_is_no_plane():
    """Half the sum of squares has the point itself for a gradient. Of more images than go in at once; a D that is trained is left so, and
    without gradients."""

    class D(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, *points):
            assert not self.training
            return self.weight * sum(part.flatten(1).square().sum(1) for part in points) / 2

    images = torch.randint(0, 256, (7, *MNIST), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    h, z, discriminator = torch.randn(7, 3), torch.randn(7, 2), D()
    found = train.mean_slopes(discriminator, images, h, z, batch=3)
    points = images.flatten(1).numpy() / 255, softmax(h.numpy(), axis=1), z.numpy()
    norms = [np.sqrt((part**2).sum(1)).mean() for part in points]
    assert found == pytest.approx(dict(zip(("slope_x", "slope_y", "slope_z"), norms, strict=True)), rel=1e-6)
    assert discriminator.training and discriminator.weight.grad is None


def test_the_points_of_the_penalty_lie_between_both_joints():
    first, second = joints()
    seen = []

    def discriminator(*points):
        seen.append([p.detach().clone() for p in points])
        return sum(p.flatten(1).sum(1) for p in points)

    t = torch.tensor([0.0, 1.0, 0.5, 0.25, 0.75], dtype=torch.float64)
    gradient_penalty(discriminator, first, second, t)
    for a, b, point in zip(first, second, seen[0], strict=True):
        expected = torch.stack([(1 - s) * u + s * v for s, u, v in zip(t, a, b, strict=True)])
        torch.testing.assert_close(point, expected)


def test_the_penalty_s_second_order_gradient_by_finite_differences():
    torch.manual_seed(0)

    class Smooth(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Sequential(torch.nn.Linear(9, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).double()

        def forward(self, x, y, z):
            return self.body(torch.cat([x.flatten(1), y, z], 1)).squeeze(1)

    discriminator, (first, second), t = Smooth(), joints(), torch.rand(5, dtype=torch.float64)
    gradient_penalty(discriminator, first, second, t).backward()
    for p in discriminator.parameters():
        for index in itertools.islice(itertools.product(*map(range, p.shape)), 12):
            values = []
            for shift in (1e-6, -1e-6):
                with torch.no_grad():
                    p[index] += shift
                values.append(gradient_penalty(discriminator, first, second, t).item())
                with torch.no_grad():
                    p[index] -= shift
            slope = (values[0] - values[1]) / 2e-6
            grad = 0.0 if p.grad is None else p.grad[index].item()
            assert abs(slope - grad) < 1e-6 * (1 + abs(grad))


def test_the_same_of_the_real_discriminator():
    """Convolutions, leaks and dropout, whose masks are the same each time, in the second-order gradient."""
    torch.manual_seed(3)
    discriminator = Discriminator(MNIST, 3, 4).double()
    for p in discriminator.parameters():
        torch.nn.init.normal_(p, std=0.2)
    g = torch.Generator().manual_seed(1)
    shapes = (3, *MNIST), (3, 3), (3, 4)
    first, second = (tuple(torch.rand(*s, generator=g, dtype=torch.float64) for s in shapes) for _ in range(2))
    t = torch.rand(3, generator=g, dtype=torch.float64)

    def penalty():
        torch.manual_seed(7)
        return gradient_penalty(discriminator, first, second, t)

    penalty().backward()
    for name, p in discriminator.named_parameters():
        if not name.endswith("weight"):
            continue
        flat, index = p.detach().view(-1), p.grad.abs().argmax()  # the entry that moves it most
        values = []
        for shift in (1e-6, -1e-6):
            flat[index] += shift
            values.append(penalty().item())
            flat[index] -= shift
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(p.grad.view(-1)[index].item(), rel=1e-3), name


# ------------------------------------------------------------------------------------------------------- Algorithms 1, 2


def built(**values):
    config = run.experiment_config(
        "amm", "samm-digits" if values.get("semi_supervised") else "digits", {"n_components": 3, "latent_dim": 4, "penalty": 10.0, **values}
    )
    torch.manual_seed(2)
    networks = train.build(config)
    for network in networks.values():
        for p in network.parameters():
            torch.nn.init.normal_(p, std=0.1)
    return config, networks


def a_batch(m: int = 6) -> train.Batch:
    g = torch.Generator().manual_seed(4)
    return train.Batch(torch.rand(m, *MNIST, generator=g), torch.rand(m, *MNIST, generator=g), torch.arange(m) % 3)


PRIORS = torch.tensor([0.5, 0.3, 0.2])


@pytest.mark.parametrize("factorisation", ["eq7", "eq6"])
@pytest.mark.parametrize("semi_supervised", [False, True])
def test_losses_and_who_is_moved_by_which(factorisation, semi_supervised, monkeypatch):
    """Each loss alone, the others set to nothing: which networks then have a gradient; and the labelled game leaves G_y alone."""

    def moved(kept: str | None, labelled_only: bool = False) -> dict[str, list[torch.Tensor]]:
        for name in ("discriminator_loss", "decoder_loss", "encoder_loss"):
            own, calls = getattr(model, name), itertools.count()

            def loss(*a, own=own, name=name, calls=calls):
                skipped = labelled_only and next(calls) == 0  # the unlabelled game comes first
                return own(*a) * (1.0 if name == kept and not skipped else 0.0)

            monkeypatch.setattr(train, name, loss)
        config, networks = built(factorisation=factorisation, semi_supervised=semi_supervised, penalty=0.0)
        torch.manual_seed(0)
        found, _ = train.gradients(networks, a_batch(), PRIORS, config)
        names = {player: [f"{n}.{k}" for n in parts for k, _ in networks[n].named_parameters()] for player, parts in train.PLAYERS.items()}
        return {n: g for player in found for n, g in zip(names[player], found[player], strict=True) if g.abs().max() > 0}

    assert {n.split(".")[0] for n in moved("discriminator_loss")} == {"discriminator"}
    assert {n.split(".")[0] for n in moved("decoder_loss")} == {"decoder", "components"}
    of_encoder = moved("encoder_loss")
    assert {n.split(".")[0] for n in of_encoder} == {"encoder"}
    assert any(".y_heads." in n for n in of_encoder) and any(".z_heads." in n for n in of_encoder)
    assert any(".label." in n for n in of_encoder) == (semi_supervised and factorisation == "eq6")
    if semi_supervised:
        labelled = moved("encoder_loss", labelled_only=True)
        assert labelled and all(".z" in n or ".label." in n for n in labelled)  # θ_Gz alone


def test_the_joined_stream_is_the_stated_one():
    """Under eq. (7) z's code does not depend on the y stream's weights, y's does on z's; under eq. (6) the other way round."""
    for factorisation, free, bound in (("eq7", 1, 0), ("eq6", 0, 1)):
        _, networks = built(factorisation=factorisation)
        encoder = networks["encoder"].eval()
        x = torch.rand(4, *MNIST)
        before = encoder(x)
        other = "y" if factorisation == "eq7" else "z"
        with torch.no_grad():
            for row in encoder.rows:
                getattr(row, other).weight.mul_(1.5)
        after = encoder(x)
        assert torch.equal(before[free][0], after[free][0]) and not torch.allclose(before[bound][0], after[bound][0])


def samples(networks, config, x, label=None):
    """The listings' samples of one game, line by line, with nothing cut out of the graph."""
    y = F.one_hot(torch.multinomial(PRIORS, len(x), replacement=True), len(PRIORS)).float()
    mean, log_variance = networks["components"](y)
    z = mean + (log_variance / 2).exp() * torch.randn_like(mean)
    made = networks["decoder"](y, z)
    of_y, (z_mean, z_log_variance) = networks["encoder"](x, label)
    inferred_y = label
    if label is None:
        noise = torch.randn_like(of_y[0])
        inferred_y = (of_y[0] if config.y_noise == "none" else of_y[0] + (of_y[1] / 2).exp() * noise).softmax(1)
    inferred_z = z_mean + (z_log_variance / 2).exp() * torch.randn_like(z_mean)
    return (x, inferred_y, inferred_z), (made, y, z)


@pytest.mark.parametrize("semi_supervised", [False, True])
@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"penalty_norm": "each"},
        {"penalty_norm": "probability"},
        {"penalty_ends": "sources"},
        {"factorisation": "eq6"},
        {"y_noise": "none"},
    ],
)
def test_algorithms_1_and_2_replayed(semi_supervised, switches):
    """Losses, their gradients and the log of one step against the listings' samples and formulas, λ = 10."""
    config, networks = built(semi_supervised=semi_supervised, **switches)
    batch, d = a_batch(), networks["discriminator"]
    torch.manual_seed(5)
    games = [samples(networks, config, batch.images)]
    if semi_supervised:
        games.append(samples(networks, config, batch.labelled, F.one_hot(batch.labels, 3).float()))
    rho = d(*(torch.cat([side[j] for game in games for side in game]) for j in range(3))).sigmoid().split(6)  # q, p of each game
    t = torch.rand(6 * len(games))
    points = []
    for j in range(3):
        sides = (1, 0) if config.penalty_ends == "sources" and j else (0, 1)  # prior codes go with real images, inferred with synthesized
        first, second = (torch.cat([game[i][j] for game in games]).detach() for i in sides)
        along = t.reshape(-1, *[1] * (first.dim() - 1))
        points.append(((1 - along) * first + along * second).requires_grad_())
    at = d(*points)
    slopes = torch.autograd.grad((at.sigmoid() if config.penalty_norm == "probability" else at).sum(), points, create_graph=True)
    flat = [slope.flatten(1) for slope in slopes]
    asked = flat if config.penalty_norm == "each" else [torch.cat(flat, 1)]
    penalty = sum((part.norm(dim=1) - 1).pow(2).mean() for part in asked)
    halves = 0.5 if semi_supervised else 1.0  # 1 / 2M for 1 / M
    expected = {
        "discriminator": halves * sum(-part.log().mean() for part in (*rho[::2], *(1 - p for p in rho[1::2]))) + 10 * penalty,
        "decoder": halves * sum(-p.log().mean() for p in rho[1::2]),
        "encoder": halves * sum(-(1 - q).log().mean() for q in rho[::2]),
    }
    torch.manual_seed(5)
    found, terms = train.gradients(networks, batch, PRIORS, config)
    for player, names in train.PLAYERS.items():
        torch.testing.assert_close(terms[f"{player}_loss"], expected[player], rtol=1e-4, atol=1e-5)
        parameters = [p for name in names for p in networks[name].parameters()]
        given = torch.autograd.grad(expected[player], parameters, retain_graph=True)
        for a, b in zip(found[player], given, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-4 * max(1.0, b.abs().max().item()))
    torch.testing.assert_close(terms["penalty"], penalty, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(terms["d_inferred"], torch.cat(rho[::2]).mean())
    torch.testing.assert_close(terms["d_generated"], torch.cat(rho[1::2]).mean())


@pytest.mark.parametrize("shape, channels", [(MNIST, 32), (SVHN, 192)])
@pytest.mark.parametrize("receiver", ["y", "z"])
def test_a_known_label_enters_z_alone(shape, channels, receiver):
    """With nothing said of y, z's code is the unlabelled one; under eq. (6), and only there, a label adds its own map to every row."""
    torch.manual_seed(0)
    encoder = Encoder(shape, 3, 64, receiver, labelled=True).eval()
    for row in encoder.rows:
        torch.nn.init.zeros_(row.y.weight), torch.nn.init.zeros_(row.y.bias)
        if row.label is not None:
            torch.nn.init.zeros_(row.label.weight), torch.nn.init.zeros_(row.label.bias)
    x, label = torch.rand(4, *shape), torch.eye(3)[[0, 1, 2, 0]]
    plain, (none, known) = encoder(x)[1], encoder(x, label)
    assert none is None
    for a, b in zip(plain, known, strict=True):
        torch.testing.assert_close(a, b)
    row = encoder.rows[0]
    assert (row.label is not None) == (receiver == "z")
    if receiver == "z":  # a bias of the label's map is one of z's own
        shift = torch.randn(channels)
        with torch.no_grad():
            row.label.bias.copy_(shift)
        shifted = encoder(x, label)[1]
        with torch.no_grad():
            row.label.bias.zero_()
            row.z.bias.add_(shift)
        for a, b in zip(encoder(x, label)[1], shifted, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("semi_supervised", [False, True])
def test_bf16_gives_nearly_the_same_gradients(semi_supervised):
    config, networks = built(semi_supervised=semi_supervised)
    found = []
    for precision in ("fp32", "bf16"):
        torch.manual_seed(1)
        found.append(train.gradients(networks, a_batch(), PRIORS, config, precision)[0])
    for player in train.PLAYERS:
        exact, rough = (torch.cat([g.flatten() for g in given[player]]) for given in found)
        assert exact.dtype == rough.dtype == torch.float32 and not torch.equal(exact, rough)
        assert F.cosine_similarity(exact, rough, dim=0) > 0.97, player


def test_the_labelled_game_leaves_the_statistics_of_g_y_alone():
    for factorisation in ("eq7", "eq6"):
        config, networks = built(semi_supervised=True, factorisation=factorisation)
        before = {k: v.clone() for k, v in networks["encoder"].state_dict().items() if "norm.running_mean" in k}
        train.play(networks, a_batch().labelled, F.one_hot(a_batch().labels, 3).float(), PRIORS, config)
        after = networks["encoder"].state_dict()
        assert all(torch.equal(after[k], v) == ("y_norm" in k) for k, v in before.items())


def labels_of_30(data, runs):
    config = run.experiment_config("amm", "samm-digits", {"batch": 8, "validation": 10, "n_labels": 30, "labels": "random"})
    s = train.split(config, data, 0)
    return s.labels[s.known].sort().values


def test_each_labelled_image_comes_with_its_own_label(monkeypatch, tmp_path):
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (60,), generator=g)
    images = (20 * labels).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, *MNIST).contiguous()  # an image tells its class
    made = Dataset("digits", images, labels, images[:20], labels[:20], tuple("0123456789"), "0" * 16, False)
    monkeypatch.setattr(train, "load", lambda *_: made)
    batches = []
    monkeypatch.setattr(train, "train_step", lambda n, o, batch, *_: batches.append(batch) or {"loss": torch.zeros(())})
    few = {"epochs": 2, "batch": 8, "validation": 10, "n_labels": 30, "labels": "random"}
    train.train(run.experiment_config("amm", "samm-digits", few), run.Options("samm-digits", runs=tmp_path, device="cpu"))
    assert len(batches) == 12
    for batch in batches:
        torch.testing.assert_close(batch.labelled[:, 0, 5, 7], batch.labels * 20 / 255)
    assert torch.cat([batch.images for batch in batches]).max() <= 1
    passes = torch.cat([batch.labels for batch in batches[:6]])  # 48 draws of an epoch: once through all 30, then in another order
    assert torch.equal(passes[:30].sort().values, labels_of_30(made, tmp_path)) and not torch.equal(passes[:18], passes[30:])


def test_algorithm_2_halves_both_games(monkeypatch):
    config, networks = built(semi_supervised=True, penalty=0.0)
    seen = []
    own = model.discriminator_loss
    monkeypatch.setattr(train, "discriminator_loss", lambda q, p: seen.append(own(q, p)) or seen[-1])
    torch.manual_seed(0)
    _, terms = train.gradients(networks, a_batch(), PRIORS, config)
    assert len(seen) == 2 and terms["discriminator_loss"].item() == pytest.approx((seen[0] + seen[1]).item() / 2, rel=1e-5)


@pytest.mark.parametrize(
    "semi_supervised, order", [(False, ["discriminator", "decoder", "encoder"]), (True, ["discriminator", "encoder", "decoder"])]
)
def test_all_gradients_are_taken_before_anything_moves(semi_supervised, order):
    """order: of the last lines of Algorithm 1, and of Algorithm 2."""
    config, networks = built(semi_supervised=semi_supervised)
    torch.manual_seed(0)
    expected, _ = train.gradients(networks, a_batch(), PRIORS, config)
    before = {player: [p.detach().clone() for n in names for p in networks[n].parameters()] for player, names in train.PLAYERS.items()}
    optimizers = {
        player: torch.optim.SGD([p for n in names for p in networks[n].parameters()], lr=0.1) for player, names in train.PLAYERS.items()
    }
    stepped = []
    for player, optimizer in optimizers.items():
        optimizer.register_step_post_hook(lambda *_, player=player: stepped.append(player))
    torch.manual_seed(0)
    train.train_step(networks, optimizers, a_batch(), PRIORS, config)
    assert stepped == order
    for player, names in train.PLAYERS.items():
        after = [p.detach() for n in names for p in networks[n].parameters()]
        for old, new, gradient in zip(before[player], after, expected[player], strict=True):
            torch.testing.assert_close(new, old - 0.1 * gradient, rtol=1e-4, atol=1e-6)


def test_the_games_draw_from_the_priors_and_the_mixture():
    config, networks = built(variance="learned")
    torch.manual_seed(0)
    n = 4000
    x = torch.rand(n, 1, 1, 1).expand(-1, *MNIST)
    g = torch.Generator().manual_seed(8)
    means, log_variances = 3 * torch.randn(3, 4, generator=g), 1.5 * torch.randn(3, 4, generator=g)
    of_z = 2 * torch.randn(4, generator=g), torch.tensor([1.5, -1.5, 0.7, -3.0])
    networks["decoder"] = lambda y, z: x
    networks["encoder"] = lambda x, label: ((torch.zeros(n, 3), torch.full((n, 3), 2.0)), tuple(part.expand(n, 4) for part in of_z))
    networks["components"] = lambda y: (y @ means, y @ log_variances)
    game = train.play(networks, x, None, PRIORS, config)
    _, y, z = game.generated
    torch.testing.assert_close(y.mean(0), PRIORS, atol=0.03, rtol=0)
    for drawn, mean, log_variance in [(z[y[:, k] == 1], means[k], log_variances[k]) for k in range(3)] + [(game.inferred[2], *of_z)]:
        deviation = (log_variance / 2).exp()
        assert ((drawn.mean(0) - mean).abs() < 5 * deviation / math.sqrt(len(drawn))).all()
        torch.testing.assert_close(drawn.std(0), deviation, rtol=0.12, atol=0)
    inferred_y = game.inferred[1]
    torch.testing.assert_close(inferred_y.sum(1), torch.ones(n))
    # The logits, up to a constant: three of variance e² less their mean.
    logits = inferred_y.log() - inferred_y.log().mean(1, keepdim=True)
    torch.testing.assert_close(logits.var(), torch.tensor(math.exp(2.0) * 2 / 3), rtol=0.05, atol=0)
    known = F.one_hot(torch.zeros(n, dtype=torch.int64), 3).float()
    assert torch.equal(train.play(networks, x, known, PRIORS, config).inferred[1], known)


class OnPoints(torch.nn.Module):
    """A small network in the place of one of the four, for points in the plane as images (M, 2, 1, 1)."""

    def __init__(self, role: str):
        super().__init__()
        self.role, sizes = role, {"encoder": (2, 32, 8), "components": (2, 2), "decoder": (4, 32, 2), "discriminator": (6, 64, 64, 1)}[role]
        layers = [[torch.nn.Linear(a, b), torch.nn.LeakyReLU(0.2)] for a, b in itertools.pairwise(sizes)]
        self.body = torch.nn.Sequential(*itertools.chain(*layers))[:-1]

    def forward(self, *given):
        if self.role == "encoder":
            h, s, z, u = self.body(given[0].flatten(1)).chunk(4, 1)
            return (h, s), (z, u)
        out = self.body(torch.cat([part.flatten(1) for part in given], 1))
        return {"components": (out, torch.zeros_like(out)), "decoder": out.view(-1, 2, 1, 1), "discriminator": out.squeeze(1)}[self.role]


def test_the_discriminator_alone_tells_both_joints_apart():
    """Against an encoder and a decoder that stand still, penalty included: some 50 steps of the loop's own kind are enough."""
    config = run.experiment_config("amm", "mnist", {"batch": 16})
    torch.manual_seed(0)
    networks = {name: network.to(memory_format=torch.channels_last) for name, network in train.build(config).items()}
    optimizers = {
        player: torch.optim.SGD([p for name in names for p in networks[name].parameters()], lr=0.0)
        for player, names in train.PLAYERS.items()
    }
    optimizers["discriminator"] = torch.optim.Adam(networks["discriminator"].parameters(), lr=2e-4, betas=(0.5, 0.999), fused=True)
    images = train.as_input(train.load("digits", "data").train_images[:64])
    losses = []
    for i in range(60):
        batch = train.Batch(images[16 * (i % 4) :][:16], *[torch.zeros(0)] * 2)
        terms = train.train_step(networks, optimizers, batch, torch.full((10,), 0.1), config)
        losses.append((terms["discriminator_loss"] - config.penalty * terms["penalty"]).item())
    assert abs(losses[0] - 2 * math.log(2)) < 0.01 and sum(losses[-5:]) / 5 < 0.6


def test_a_short_run_finds_two_clusters():
    """Algorithm 1 with its penalty on two clusters in the plane. Untrained or with the sign of any loss changed it misses a bound."""
    torch.manual_seed(0)
    config = train.Config(dataset="digits", n_components=2, latent_dim=2, penalty=1.0)
    networks = {role: OnPoints(role) for role in ("encoder", "components", "decoder", "discriminator")}
    optimizers = {
        player: torch.optim.Adam([p for name in names for p in networks[name].parameters()], lr=1e-3, betas=(0.5, 0.999))
        for player, names in train.PLAYERS.items()
    }
    clusters, priors = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), torch.full((2,), 0.5)

    def points(labels):
        return (clusters[labels] + 0.2 * torch.randn(len(labels), 2)).view(-1, 2, 1, 1)

    for _ in range(1000):
        train.train_step(networks, optimizers, train.Batch(points(torch.randint(2, (64,))), *[torch.zeros(0)] * 2), priors, config)
    labels = torch.arange(400) % 2
    with torch.no_grad():
        h, z = networks["encoder"](points(labels))
        made = networks["decoder"](torch.eye(2)[labels], model.sampled(*networks["components"](torch.eye(2)[labels])))
    assert train.error(h[0].argmax(1), labels, config, 2) < 5
    assert train.error(train.by_bayes(networks, 2, z[0], priors), labels, config, 2) < 5
    assert torch.cdist(made.flatten(1), clusters).min(1).values.mean() < 0.85  # real points: 0.25


# ----------------------------------------------------------------------------------------------------------- evaluation


def test_eq_19_against_scipy():
    g = torch.Generator().manual_seed(0)
    means, log_variances = torch.randn(3, 2, generator=g), 0.5 * torch.randn(3, 2, generator=g)
    z, priors = torch.randn(40, 2, generator=g), torch.tensor([0.7, 0.2, 0.1])
    densities = [
        multivariate_normal(m.numpy(), torch.diag(s.exp()).numpy()).pdf(z.numpy()) for m, s in zip(means, log_variances, strict=True)
    ]
    densities = torch.from_numpy(np.stack(densities, 1))
    torch.testing.assert_close(model.log_component_density(z, means, log_variances).double().exp(), densities, rtol=1e-4, atol=1e-8)
    assert torch.equal(model.bayes_classes(z, means, log_variances, priors), (densities * priors).argmax(1))


def test_both_mappings_of_eq_17_by_brute_force():
    g = torch.Generator().manual_seed(0)
    for k, n in ((3, 3), (4, 3)):
        clusters, labels = torch.randint(k, (60,), generator=g), torch.randint(n, (60,), generator=g)
        table = contingency(clusters, labels, k, n)
        best = max((labels == torch.tensor(m)[clusters]).float().mean().item() for m in itertools.product(range(n), repeat=k))
        assert train.many_to_one_error(table) == pytest.approx(100 * (1 - best), abs=1e-4)
        right = (sum((labels[clusters == c] == m).sum().item() for m, c in enumerate(p)) for p in itertools.permutations(range(k), n))
        assert evaluation.one_to_one_error(table) == pytest.approx(100 * (1 - max(right) / 60), abs=1e-4)


# Figure 3d: rows are classes, columns the 30 clusters. The last row's text has 31 numbers: one of its first fifteen, all small, is one too
# many (a 3 is left out here), for with the last dropped instead 566 and 731 would lie in clusters of other classes.
FIGURE_3D = """
40 0 2 3 0 262 0 0 1 2 7 0 635 6 43 0 2 4 3 22 0 9 0 0 3 49 4 23 608 6
688 1 864 9 1 101 3 1 9 3 6 7 7 2 2 1 23 2 1307 695 1 26 1 620 1 25 1 467 19 5
19 2 9 1001 2 30 0 6 3 1 16 0 2 1 25 612 21 28 5 142 272 96 0 5 1 45 4 205 1 1574
46 171 9 5 0 19 8 371 1 4 53 0 3 2 15 2 3 406 9 96 0 930 4 3 0 594 15 89 3 7
95 1 13 79 627 39 1 0 1037 1 3 0 1 3 23 0 5 7 18 294 0 18 1 3 0 15 5 213 6 2
4 0 1 8 0 21 1 10 1 3 1001 1 2 22 5 0 2 19 2 76 0 75 649 1 219 212 3 25 3 5
7 6 0 4 0 371 1 4 0 709 26 0 5 595 3 0 1 18 0 44 0 21 1 2 2 121 2 16 3 1
38 0 21 7 1 12 0 0 1 0 44 572 1 0 0 1 688 12 18 123 0 15 0 6 0 9 1 423 3 13
9 438 6 4 1 135 654 6 5 14 18 0 3 3 8 1 0 10 2 29 2 68 2 1 0 204 5 21 2 3
7 3 1 8 0 18 1 1 1 0 4 0 3 3 566 3 0 1 2 39 2 62 0 2 1 47 731 64 5 10
"""


def test_the_paper_s_own_matrix_needs_the_many_to_one_mapping():
    """Printed above it is ACC 0.7985; the matrix as it can be read gives 0.797 many-to-one and 0.36 one-to-one."""
    rows = [[int(x) for x in line.split()] for line in FIGURE_3D.strip().splitlines()]
    table = torch.tensor(rows, dtype=torch.float64).T
    assert table.shape == (30, 10)
    assert 100 - train.many_to_one_error(table) == pytest.approx(79.85, abs=0.2)
    assert 100 - evaluation.one_to_one_error(table) == pytest.approx(36, abs=0.5)
    purity = table.amax(1) / table.sum(1)  # what published.yaml says of it
    assert purity.mean().item() == pytest.approx(0.844, abs=5e-4) and (purity < 0.5).sum() == 4
    assert table.argmax(1).bincount(minlength=10).min() == 2


def a_folder_to_evaluate(monkeypatch, config, answers, rows=()):
    """evaluate() on a run whose G_y and eq. (19) answer by image: answers, the clusters (by G_y, by eq. (19)) of the images 0, 1, …"""
    y = F.one_hot(torch.tensor(answers[0]), config.n_components).float()
    by_bayes = torch.tensor(answers[1])
    trained = evaluation.Trained(config, {"decoder": torch.nn.Linear(1, 1)}, {"rows": list(rows)})
    asked = []

    def infer(self, images):
        which = images[:, 0, 0, 0].long()  # an image's pixels are its number, so is its z
        return y[which], which[:, None].float()

    monkeypatch.setattr(evaluation.Trained, "infer", infer)
    monkeypatch.setattr(evaluation.Trained, "bayes", lambda self, z, priors: asked.append(priors) or by_bayes[z[:, 0].long()])
    monkeypatch.setattr(evaluation, "load_run", lambda *_: trained)
    return trained, asked


def numbered(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, *MNIST).contiguous()


def test_the_numbers_of_an_evaluation(monkeypatch, tmp_path):
    """Eight test and four validation images, five clusters of which two are empty, by hand.

    By G_y test images 0 to 7, of classes 0 0 1 1 2 2 0 1, are in clusters 0 0 1 1 3 3 3 3: cluster 3 is half of class 2. By eq. (19) it is
    left by image 6 and 7 for cluster 0 and 4. Validation images 8 to 11, of classes 0 1 2 2, share a cluster of which 2 is one half; by
    eq. (19) image 9 is in another.
    """
    config = run.experiment_config("amm", "digits", {"n_components": 5, "validation": 4})
    rows = [
        {"epoch": 1, "validation_error": 7.0, "test_error": 30.0},
        {"epoch": 2, "validation_error": 5.0, "test_error": 50.0},
        {"epoch": 3, "validation_error": 6.0, "test_error": 20.0},
    ]
    answers = [0, 0, 1, 1, 3, 3, 3, 3, 2, 2, 2, 2], [0, 0, 1, 1, 3, 3, 0, 4, 2, 1, 2, 2]
    _, asked = a_folder_to_evaluate(monkeypatch, config, answers, rows)
    labels, priors = torch.tensor([0, 0, 1, 1, 2, 2, 0, 1]), torch.tensor([0.1, 0.3, 0.2, 0.2, 0.2])
    data = Dataset("digits", numbered(99), labels[:1], numbered(*range(8)), labels, tuple("012"), "0" * 16, True)
    s = train.Split(numbered(99), labels[:1], numbered(8, 9, 10, 11), torch.tensor([0, 1, 2, 2]), labels[:0], priors)
    for name, answer in (("load", data), ("split", s), ("in_other_modes", {}), ("diagnosis", {"slope_x": 0.5}), ("figures", None)):
        monkeypatch.setattr(evaluation, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(run, "check_data", lambda *_: None)
    monkeypatch.setattr(run, "record", lambda options, config, state, metrics, device: metrics)
    options = run.Options("digits", runs=tmp_path, device="cpu")
    options.folder("amm").mkdir(parents=True)
    found = evaluation.evaluate(options)
    assert found == json.loads((options.folder("amm") / "eval.json").read_text())
    assert all(torch.equal(given, priors) for given in asked) and len(asked) == 2
    per_cluster = {f"purity_of_{k}": found.pop(f"purity_of_{k}") for k in (0, 1, 3)}
    assert per_cluster == {"purity_of_0": 100, "purity_of_1": 100, "purity_of_3": 50}
    expected = {
        "error": 0.0, "error_one_to_one": 100 / 8, "error_g_y": 25.0, "error_one_to_one_g_y": 25.0, "agreement": 75.0,
        "purity": 250 / 3, "least_purity": 50.0, "noise_clusters": 0.0, "empty_clusters": 2.0, "fewest_clusters": 1.0,
        "error_validation": 25.0, "error_one_to_one_validation": 25.0, "error_g_y_validation": 50.0,
        "error_one_to_one_g_y_validation": 50.0, "agreement_validation": 75.0, "purity_validation": 50.0, "least_purity_validation": 50.0,
        "noise_clusters_validation": 0.0, "empty_clusters_validation": 4.0, "fewest_clusters_validation": 0.0,
        "error_best_on_validation": 50.0, "slope_x": 0.5,
    }  # fmt: skip
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_cluster_without_a_majority_is_noise(monkeypatch):
    config = run.experiment_config("amm", "digits", {"n_components": 4})
    trained, _ = a_folder_to_evaluate(monkeypatch, config, ([0, 0, 0, 1, 1, 2], [0] * 6))
    found = evaluation.predictions(trained, numbered(*range(6)), torch.tensor([0, 1, 2, 0, 0, 1]), torch.full((4,), 0.25), 3)
    assert found["noise_clusters"] == 1 and found["least_purity"] == pytest.approx(100 / 3) and found["fewest_clusters"] == 0


def test_what_the_figures_show(monkeypatch, tmp_path):
    """Every picture's images, counts and points from codes that tell which image they are of."""
    config = run.experiment_config("amm", "digits", {"n_components": 3, "validation": 0})
    answers = [i % 3 if i % 7 else 2 for i in range(40)], [i % 2 for i in range(40)]
    trained, _ = a_folder_to_evaluate(monkeypatch, config, answers, [{"epoch": 1, "penalty": 1.0, "seconds": 1.0}])
    labels = torch.arange(40) % 10
    data = Dataset("digits", numbered(99), labels[:1], numbered(*range(40)), labels, tuple("0123456789"), "0" * 16, True)
    shown = {}
    for kind in ("save_labelled_grid", "save_counts", "save_points"):
        monkeypatch.setattr(evaluation.plots, kind, lambda *a, **_: shown.update({next(p.stem for p in a if hasattr(p, "stem")): a}))
    monkeypatch.setattr(evaluation, "embedded", lambda z: z)

    def paint(of_y, z):  # an image of its z's size, with its y's argmax's weight in its corner
        images = (z[:, :1, None, None] / 255).expand(-1, *MNIST).clone()
        images[:, 0, 0, 0] = of_y @ torch.tensor([0.1, 0.2, 0.4])
        return images

    monkeypatch.setattr(evaluation.Trained, "decode", lambda self, y, z: paint(y, z))
    monkeypatch.setattr(evaluation.Trained, "sample", lambda self, components, seed: components.view(-1, 1, 1, 1).float())
    s = train.Split(numbered(99), labels[:1], numbered(99)[:0], labels[:0], labels[:0], torch.full((3,), 1 / 3))
    evaluation.figures(trained, data, s, tmp_path, 0)
    assert shown["samples"][0].view(3, 10).tolist() == [[float(k)] * 10 for k in range(3)] and shown["samples"][2] == 10
    members = (shown["members"][0][:, 0, 5, 5] * 255).round().long().view(3, 10)
    for k in range(3):
        mine = [i for i in range(40) if answers[0][i] == k]
        assert set(members[k].tolist()) <= set(mine) and len(members[k].unique()) == 10
    for name, clusters in (("matrix_g_y", answers[0]), ("matrix_bayes", answers[1])):
        table, _, title = shown[name][:3]
        counted = [[sum(a == k and i % 10 == c for i, a in enumerate(clusters)) for c in range(10)] for k in range(3)]
        assert table.tolist() == counted and title.endswith(f"ACC {sum(map(max, counted)) / 40:.4f}")
    rows = shown["reconstructions"][0].view(4, 2, 10, *MNIST)  # lines of ten, each with its reconstructions below
    which = (rows[:, 0, :, 0, 5, 5] * 255).round().long()
    assert len(which.unique()) == 40 and torch.equal((rows[:, 1, :, 0, 5, 5] * 255).round().long(), which)
    weights = torch.tensor([0.1, 0.2, 0.4])[torch.tensor(answers[0])[which]]
    torch.testing.assert_close(rows[:, 1, :, 0, 0, 0], weights)
    lines = shown["interpolations"][0].view(10, evaluation.STEPS + 2, *MNIST)
    z, y = lines[:, :, 0, 5, 5] * 255, lines[:, 1:-1, 0, 0, 0]
    assert shown["interpolations"][2] == evaluation.STEPS + 2
    for line, corner in zip(z, y, strict=True):
        first, last = round(line[0].item()), round(line[-1].item())
        assert first != last
        torch.testing.assert_close(line[1:-1], torch.linspace(first, last, evaluation.STEPS))
        ends = (0.1, 0.2, 0.4)[answers[0][first]], (0.1, 0.2, 0.4)[answers[0][last]]
        torch.testing.assert_close(corner, torch.linspace(*ends, evaluation.STEPS))
    points, classes = shown["tsne"][:2]
    assert sorted(points[:, 0].tolist()) == list(range(40)) and torch.equal(points[:, 0].long() % 10, classes)


def test_what_an_epoch_has_come_to(monkeypatch):
    """Four of five components in use, one of them twice as often; one of ten images wrong by argmax, two by eq. (19), five on test."""
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 0, 1, 2, 2])
    chosen = torch.tensor([0, 0, 1, 1, 3, 3, 0, 1, 4, 1])
    config = run.experiment_config("amm", "digits", {"n_components": 5})
    h = F.one_hot(chosen, 5).float()
    monkeypatch.setattr(train, "infer", lambda networks, images: (h, images))
    answers = {"validation": torch.tensor([0, 0, 1, 1, 3, 3, 0, 3, 4, 1]), "test": torch.zeros(10, dtype=torch.int64)}
    priors = torch.tensor([0.1, 0.2, 0.3, 0.2, 0.2])

    def by_bayes(networks, k, z, given):
        assert given is priors
        return answers["test" if z[0] else "validation"]

    monkeypatch.setattr(train, "by_bayes", by_bayes)
    images = torch.zeros(10)
    s = train.Split(images, labels, images, labels, labels[:0], priors)
    data = Dataset("digits", images, labels, images + 1, torch.tensor([0, 1] * 5), tuple("012"), "0" * 16, True)
    diagnosis = {"slope_x": 0.7, "sigma_y": 2.0}
    monkeypatch.setattr(train, "diagnosis", lambda networks, images: diagnosis)
    found = train.checks({}, config, s, data, torch.device("cpu"))
    shares = [0.3, 0.4, 0.2, 0.1]
    assert found.pop("components_entropy") == pytest.approx(-sum(p * math.log(p) for p in shares) / math.log(5))
    assert found == pytest.approx(diagnosis | {"components_used": 4, "validation_error_g_y": 10, "validation_error": 20, "test_error": 50})
    none_held_out = train.checks({}, dataclasses.replace(config, validation=0), s, data, torch.device("cpu"))
    assert none_held_out.keys() == {"components_used", "components_entropy", *diagnosis}


def test_other_readings_of_test_time(monkeypatch):
    """Both predictions from codes normalised batch by batch, and from codes with their noise; the network is left as it was."""
    config, networks = built(batch=6)
    for network in networks.values():
        network.eval()
    images = train.load("digits", "data").test_images[:12]
    with torch.no_grad():  # codes of mean 0 and variance 1, so that there is something to decide
        encoder = networks["encoder"]
        for heads, code in zip((encoder.y_heads, encoder.z_heads), encoder(train.as_input(images)), strict=True):
            heads[0].weight.div_(code[0].std(0)[:, None, None, None])
            heads[0].bias.copy_((heads[0].bias - code[0].mean(0)) / code[0].std(0))
    means, log_variances = torch.randn(3, 4), torch.zeros(3, 4)
    monkeypatch.setattr(train, "mixture", lambda networks, k: (means, log_variances))
    trained = evaluation.Trained(config, networks, {})
    data = Dataset("digits", images, torch.arange(12) % 3, images, torch.arange(12) % 3, tuple("012"), "0" * 16, True)
    before = {key: value.clone() for key, value in networks["encoder"].state_dict().items()}
    seen = []
    monkeypatch.setattr(evaluation, "error", lambda predicted, *_: seen.append(predicted) or float(len(seen)))
    found = evaluation.in_other_modes(trained, data, PRIORS, 0)
    names = [f"error{g}_{mode}" for mode in ("batch_statistics", "sampled") for g in ("", "_g_y")]
    assert found == {name: i for i, name in enumerate(names, 1)}
    assert all(torch.equal(value, before[key]) for key, value in networks["encoder"].state_dict().items())

    def by_eq_19(z):
        densities = [multivariate_normal(mean.numpy(), np.eye(4)).logpdf(z.numpy()) for mean in means]
        return torch.from_numpy((np.stack(densities, 1) + PRIORS.log().numpy()).argmax(1))

    torch.manual_seed(0)
    sampled_h, sampled_z = [], []
    plain_h, plain_z = train.infer({"encoder": networks["encoder"].train()}, images)  # running means, no noise
    networks["encoder"].eval()
    with torch.no_grad():
        for x in train.as_input(images).split(6):
            (h, h_log_variance), (z, z_log_variance) = networks["encoder"](x)
            sampled_h.append(h + (h_log_variance / 2).exp() * torch.randn_like(h))
            sampled_z.append(z + (z_log_variance / 2).exp() * torch.randn_like(z))
        for module in networks["encoder"].modules():
            module.train(not isinstance(module, InputDropout))
        by_batch = [networks["encoder"](x) for x in train.as_input(images).split(6)]
        at_once = networks["encoder"](train.as_input(images))
    expected = [
        by_eq_19(torch.cat([z[0] for _, z in by_batch])),
        torch.cat([h[0] for h, _ in by_batch]).argmax(1),
        by_eq_19(torch.cat(sampled_z)),
        torch.cat(sampled_h).argmax(1),
    ]
    for given, wanted in zip(seen, expected, strict=True):
        assert torch.equal(given, wanted)
    others = [by_eq_19(at_once[1][0]), at_once[0][0].argmax(1), by_eq_19(plain_z), plain_h.argmax(1)]  # all images as one batch; neither
    assert not any(torch.equal(a, b) for a, b in itertools.combinations([*expected, *others], 2))


def test_the_split_and_the_labelled_part():
    data = train.load("digits", "data")
    config = run.experiment_config("amm", "samm-digits")
    s = train.split(config, data, 3)
    assert len(s.images) == 1337 and len(s.validation_images) == 100 and len(s.known) == 100
    torch.testing.assert_close(s.priors, s.labels[s.known].bincount(minlength=10) / 100)
    whole = {tuple(image.flatten().tolist()) for image in data.train_images}
    assert {tuple(image.flatten().tolist()) for image in torch.cat([s.images, s.validation_images])} == whole
    assert not torch.equal(train.split(config, data, 4).validation_labels, s.validation_labels)
    last = train.split(dataclasses.replace(config, held_out="last"), data, 3)
    assert torch.equal(last.validation_images, data.train_images[-100:])


def test_of_svhn_extra_only_train_is_held_out_and_labelled(monkeypatch):
    monkeypatch.setattr(train, "SVHN_TRAIN", 60)
    images = torch.arange(200, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, *SVHN)
    labels = torch.arange(200) % 10
    data = Dataset("svhn_extra", images, labels, images, labels, tuple("0123456789"), "0" * 16, False)
    few = {"dataset": "svhn_extra", "validation": 20, "batch": 10, "n_labels": 30, "labels": "stratified"}
    s = train.split(run.experiment_config("amm", "samm-svhn", few), data, 0)
    for part, part_labels, expected in (
        (s.validation_images, s.validation_labels, [*range(40, 60)]),
        (s.images, s.labels, [*range(40), *range(60, 200)]),
    ):
        assert part[:, 0, 0, 0].tolist() == expected and part_labels.tolist() == [i % 10 for i in expected]
    assert s.known.max() < 40 and len(s.known) == 30


def test_the_bayes_prediction_weighs_by_p_of_y(monkeypatch):
    trained = evaluation.Trained(run.experiment_config("amm", "digits", {"n_components": 2}), {}, {})
    monkeypatch.setattr(train, "mixture", lambda *_: (torch.tensor([[-1.0], [1.0]]), torch.zeros(2, 1)))
    z = torch.tensor([[0.5]])  # twice as near to the second: the densities are as 1 to e
    assert trained.bayes(z, torch.tensor([0.5, 0.5])).item() == 1
    assert trained.bayes(z, torch.tensor([0.72, 0.28])).item() == 1 and trained.bayes(z, torch.tensor([0.74, 0.26])).item() == 0


def test_images_are_drawn_around_the_means():
    config, networks = built(variance="learned")
    seen = []
    networks["decoder"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    components = torch.arange(3).repeat_interleave(600)
    train.draw(networks, config, components, torch.Generator().manual_seed(0))
    y, z = (torch.cat([part[j] for part in seen]) for j in (0, 1))
    means, log_variances = train.mixture(networks, 3)
    assert torch.equal(y.argmax(1), components)
    for k in range(3):
        deviation = (log_variances[k] / 2).exp()
        assert ((z[components == k].mean(0) - means[k]).abs() < 5 * deviation / math.sqrt(600)).all()
        torch.testing.assert_close(z[components == k].std(0), deviation, rtol=0.15, atol=0)
    assert train.as_input(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [0, 1]


# --------------------------------------------------------------------------------------------- experiments, end to end


@pytest.fixture
def tiny(monkeypatch):
    def make(name: str, *_) -> Dataset:
        g = torch.Generator().manual_seed(0)
        labels = torch.arange(10).repeat(3)
        images = torch.randint(0, 256, (30, *train.SETS[name][0]), dtype=torch.uint8, generator=g)
        return Dataset(name, images, labels, images[:20], labels[:20], tuple("0123456789"), "0" * 16, False)

    monkeypatch.setattr(train, "load", make)
    monkeypatch.setattr(evaluation, "load", make)


@pytest.mark.parametrize("experiment", ["mnist", "samm-mnist", "svhn-k10"])
def test_the_loop_s_steps_are_plain_adam_s(experiment, tiny, tmp_path, monkeypatch):
    """The networks and optimisers as the loop sets them up, against contiguous weights and Adam written out: lr 2e-4, β 0.5 and 0.999."""
    own, pairs, starts = train.train_step, [], []

    def both(networks, optimizers, batch, priors, config, precision):
        for module in [m for network in networks.values() for m in network.modules() if isinstance(m, InputDropout)]:
            module.p = 0.0  # whose masks are drawn in the layout of their input
        if not pairs:  # D's own start has gradients of 1e-7, whose signs are rounding's
            torch.manual_seed(0)
            for p in networks["discriminator"].parameters():
                if p.dim() > 1:
                    torch.nn.init.kaiming_normal_(p)
            plain = {name: copy.deepcopy(network).to(memory_format=torch.contiguous_format) for name, network in networks.items()}
            starts.append({name: {key: p.detach().clone() for key, p in network.named_parameters()} for name, network in networks.items()})
            pairs.append((networks, plain, {name: [[0.0, 0.0] for _ in network.parameters()] for name, network in plain.items()}))
        _, plain, moments = pairs[0]
        torch.manual_seed(len(pairs))
        found, _ = train.gradients(plain, batch, priors, config)
        torch.manual_seed(len(pairs))
        terms = own(networks, optimizers, batch, priors, config, precision)
        for player, names in train.PLAYERS.items():
            parameters = [(p, m) for n in names for p, m in zip(plain[n].parameters(), moments[n], strict=True)]
            for (p, m), gradient in zip(parameters, found[player], strict=True):
                m[0], m[1] = 0.5 * m[0] + 0.5 * gradient, 0.999 * m[1] + 0.001 * gradient.square()
                mean, square = m[0] / (1 - 0.5 ** len(pairs)), m[1] / (1 - 0.999 ** len(pairs))
                p.data -= 2e-4 * mean / (square.sqrt() + 1e-8)
        pairs.append(None)
        return terms

    monkeypatch.setattr(train, "train_step", both)
    few = {"epochs": 1, "batch": 10, "validation": 10} | ({"n_labels": 10, "labels": "stratified"} if "samm" in experiment else {})
    train.train(run.experiment_config("amm", experiment, few), run.Options(experiment, runs=tmp_path, device="cpu", unofficial_data=True))
    (networks, plain, _), start = pairs[0], starts[0]
    assert len(pairs) > 2
    for name, network in networks.items():
        for key, p in network.named_parameters():
            if not key.endswith("weight"):
                continue  # a bias before batch normalisation has no gradient but rounding
            ways = [(state - start[name][key]).flatten() for state in (p.detach(), dict(plain[name].named_parameters())[key].detach())]
            assert F.cosine_similarity(*ways, 0) > 0.99 and 0.99 < ways[0].norm() / ways[1].norm() < 1.01, f"{name}.{key}"


@pytest.mark.parametrize("n_test", [2, 9, 15])
def test_figures_of_a_small_test_set(tiny, tmp_path, n_test, monkeypatch):
    whole = train.load("digits")
    small = dataclasses.replace(whole, test_images=whole.test_images[:n_test], test_labels=whole.test_labels[:n_test])
    config = run.experiment_config("amm", "digits", {"epochs": 1, "batch": 10, "validation": 0})
    trained = evaluation.Trained(config, train.build(config), {"rows": [{"epoch": 1, "penalty": 1.0, "seconds": 1.0}]})
    for network in trained.networks.values():
        network.eval()
    monkeypatch.setattr(evaluation, "embedded", lambda z: z[:, :2])
    evaluation.figures(trained, small, train.split(config, small, 0), tmp_path, 0)
    assert len(list(tmp_path.glob("*.png"))) == 8


@pytest.mark.parametrize("experiment", ["mnist-k20", "samm-mnist", "svhn-k30", "samm-svhn"])
def test_two_steps_of_every_kind_of_experiment_and_its_evaluation(experiment, tiny, tmp_path):
    few = {"epochs": 1, "batch": 10, "validation": 10}
    few |= {"n_labels": 10, "labels": "stratified"} if experiment.startswith("samm") else {}
    config = run.experiment_config("amm", experiment, few)
    options = run.Options(experiment, runs=tmp_path, device="cpu", unofficial_data=True)
    folder = train.train(config, options)
    result = evaluation.evaluate(options)
    assert result == json.loads((folder / "eval.json").read_text()) and all(math.isfinite(v) for v in result["metrics"].values())
    assert {"error", "error_g_y", "agreement", "purity", "error_validation", "slope_z", "sigma_y", "coupling"} <= result["metrics"].keys()
    assert {"error_sampled", "error_g_y_batch_statistics", "error_best_on_validation"} <= result["metrics"].keys()
    assert ("error_one_to_one" in result["metrics"]) == (not experiment.startswith("samm"))
    pictures = {path.stem for path in (folder / "figures").glob("*.png")}
    assert pictures == {"training", "samples", "members", "matrix_g_y", "matrix_bayes", "reconstructions", "interpolations", "tsne"}
    row = torch.load(folder / "checkpoint.pt", weights_only=True)["rows"][0]
    shown = {
        "d_inferred",
        "d_generated",
        "penalty",
        "discriminator_grad",
        "decoder_grad",
        "encoder_grad",
        "components_entropy",
        "components_used",
        "slope_x",
        "slope_y",
        "slope_z",
        "sigma_y",
        "spread_y",
        "coupling",
        "validation_error",
        "validation_error_g_y",
        "test_error",
    }
    assert shown <= row.keys()


def test_a_run_that_was_cut_in_two_ends_with_the_same_bits(tiny, tmp_path):
    config = run.experiment_config("amm", "digits", {"epochs": 2, "batch": 10, "validation": 0})
    whole = train.train(config, run.Options("digits", runs=tmp_path / "whole", device="cpu"))
    options = run.Options("digits", runs=tmp_path / "parts", device="cpu")
    train.train(dataclasses.replace(config, epochs=1), options)
    parts = train.train(config, options)
    first, second = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, parts))
    for name, tensors in first["networks"].items():
        for key, value in tensors.items():
            assert torch.equal(value, second["networks"][name][key]), f"{name}.{key}"


def test_the_command_line(tmp_path):
    """The real one, once."""
    where = ["digits", "--runs", tmp_path, "--threads", "1"]
    code, out, err = run_command("amm.train", *where, "--epochs", "1")
    assert code == 0 and "trained 1 epochs" in out, err
    code, out, err = run_command("amm.eval", *where)
    assert code == 0 and "agreement" in out, err
    code, out, err = run_command("common.diff", "show", "amm", "--experiment", "digits", "--runs", tmp_path)
    assert code == 0 and "1 of 150 epochs" in out, err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["digits", "--penalty", "-1"], "--penalty: -1.0 is out of range; allowed: >= 0"),
        (["samm-digits", "--n-components", "9"], "9 cannot stand for the 10 classes"),
        (["samm-mnist", "--data", "nowhere", "--n-components", "5"], "5 cannot stand for the 10 classes"),  # before any download
        (["samm-digits", "--n-components", "12"], "12 cannot stand for the 10 classes"),
        (["samm-digits", "--n-labels", "9"], "9 labels are fewer than the 10 classes"),
        (["samm-digits", "--n-labels", "12", "--seed", "1"], "its prior would be 0"),
        (["samm-digits", "--n-labels", "5000"], "5000 labels asked for"),
        (["digits", "--validation", "1410"], "leave fewer than a batch of 32"),
        (["digits", "--n-components", "1"], "--n-components: 1 is out of range; allowed: >= 2"),
        (["digits", "--dataset", "celeba"], "is not one of"),
        (["digits", "--n-labels", "50"], "n_labels, labels: of no influence without --semi-supervised true"),
        (["digits", "--factorisation", "eq8"], "not one of eq7, eq6"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, tmp_path, capsys):
    code, _, err = call(train.main, *arguments, "--runs", tmp_path, capsys=capsys)
    assert code == 2 and message in err and err.count("\n") == 1


def test_labels_of_a_set_without_them_are_refused(tiny, tmp_path, monkeypatch):
    data = train.load("digits")
    one_class = dataclasses.replace(data, train_labels=data.train_labels * 0, class_names=("all",))
    with pytest.raises(run.UserError, match="labels need at least 2"):
        train.split(run.experiment_config("amm", "samm-digits", {"validation": 0, "batch": 10}), one_class, 0)


def test_one_s_own_images_without_labels(tmp_path, capsys):
    """A folder of one class: it is clustered, and what needs labels is left out; labels for SAMM, or a figure of one image, are refused."""
    g = torch.Generator().manual_seed(0)
    for n in (40, 4):
        (tmp_path / str(n) / "all").mkdir(parents=True)
        for i in range(n):
            Image.fromarray(torch.randint(0, 256, (28, 28), dtype=torch.uint8, generator=g).numpy()).save(
                tmp_path / str(n) / "all" / f"{i}.png"
            )
    where = ["--dataset", f"folder:{tmp_path / '40'}", "--validation", "8", "--batch", "8", "--runs", tmp_path]
    code, _, err = call(train.main, "samm-digits", *where, capsys=capsys)
    assert code == 2 and "labels need at least 2" in err
    code, out, err = call(train.main, "digits", *where, "--epochs", "1", capsys=capsys)
    assert code == 0 and "components_used" in out and "error" not in out, err
    code, out, err = call(evaluation.main, "digits", "--runs", tmp_path, capsys=capsys)
    assert code == 0 and "agreement" in out and "  error" not in out and "  purity" not in out, err
    where = ["--dataset", f"folder:{tmp_path / '4'}", "--validation", "0", "--batch", "2", "--runs", tmp_path / "few", "--epochs", "1"]
    assert call(train.main, "digits", *where, capsys=capsys)[0] == 0
    code, _, err = call(evaluation.main, "digits", "--runs", tmp_path / "few", capsys=capsys)
    assert code == 2 and "at least 2" in err and err.count("\n") == 1


def test_a_penalty_that_is_not_finite_stops_the_run(tiny, tmp_path, monkeypatch):
    config = run.experiment_config("amm", "digits", {"epochs": 3, "batch": 10, "validation": 0})
    own, calls = model.gradient_penalty, itertools.count(1)
    monkeypatch.setattr(train, "gradient_penalty", lambda *a: own(*a) * (math.inf if next(calls) == 2 else 1))
    with pytest.raises(run.RunFailed, match=r"discriminator_loss, penalty, .*were not finite, first at step 2"):
        train.train(config, run.Options("digits", runs=tmp_path, device="cpu"))


# ------------------------------------------------------------------------------------------------------- published.yaml


def test_published_yaml_is_tables_1_and_2_each_own_number_once():
    entries = diff.published("amm").entries
    found = {(e.where, e.system): (e.value, e.spread, e.trials) for e in entries}
    assert found == {
        ("Table 1, MNIST", "AMM, K = 10"): (3.32, 0.39, 10),
        ("Table 1, MNIST", "AMM, K = 20"): (3.99, 0.79, 10),
        ("Table 1, MNIST", "AMM, K = 30"): (4.01, 1.11, 10),
        ("Table 1, SVHN", "AMM, K = 20"): (35.0, 5.24, 10),
        ("Table 1, SVHN", "AMM, K = 30"): (20.4, 0.80, 10),
        ("Table 2, SVHN, 1,000 labels", "SAMM"): (5.60, 0.45, 10),
    }
    assert len({e.id for e in entries}) == len(entries) == 6
