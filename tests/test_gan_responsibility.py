"""GAN responsibility learning: counts, losses, what each loss trains, Algorithm 1 against a literal loop, full runs."""

import csv
import dataclasses
import json
import math

import pytest
import torch
from matplotlib.colors import to_rgb
from torch import nn
from torch.nn import functional as F

import gan_responsibility
from common import classifier, plots, run
from common.data import Dataset
from gan_responsibility import eval as evaluation
from gan_responsibility import gan, model, scores, toy, train
from gan_responsibility.model import Mixture, Responsibility, discriminator_loss, generator_loss, information_loss
from tests.bench import FlopCounter
from tests.conftest import call

TABLE_6 = {  # parameters, Inception Score, FID
    "flowers10-standalone": (13_005_411, (2.9664, 0.2188), (231.0577, 7.5371)),
    "flowers10": (8_794_835, (3.1368, 0.1596), (205.9776, 7.8587)),
    "flowers10-gm-gan": (8_467_145, (2.6770, 0.1079), (239.3936, 6.7672)),
    "flowers10-gan": (8_366_145, (2.4882, 0.1065), (247.0610, 7.2361)),
}

TASK = {  # Sec. 3.2, Tables 4, 5 and 6; where the paper is silent, ledger 6 to 8
    "networks": "count_matched", "n_components": 10, "latent_dim": 100, "mean_range": 0.1, "deviation": 0.15,
    "batch": 64, "learning_rate": 2e-4, "beta1": 0.5, "epochs": 200, "validation": 0, "thinned": False,
    "score_every": 10, "saturating": False,
}  # fmt: skip
SYSTEM = TASK | {  # Sec. 2, Algorithm 1; ledger 3, 22 and 26
    "classifier": "shared", "target": "component", "information_moves": "classifier",
    "adversarial_moves_classifier": True, "alpha_in_information": "fixed", "class_entropy": "left_out",
    "classifier_learning_rate": 2e-5, "classifier_moves_encoder": False, "mixture": "dynamic",
}  # fmt: skip
OF_DATA = {
    "mnist": {}, "fashion": {"dataset": "fashion_mnist"}, "cifar10": {}, "digits": {"batch": 8, "epochs": 20},
    "flowers10": {"epochs": 10_000, "score_every": 100},
    "toy": {"n_components": 3, "latent_dim": 10, "mean_range": 0.5, "epochs": 250, "classifier_learning_rate": None},
}  # fmt: skip
OF_READING = {
    "": {}, "standalone": {"classifier": "standalone"}, "unbalanced": {"thinned": True},
    "static": {"mixture": "static"},
    "printed": {"target": "alpha", "classifier_learning_rate": None},
    "entropy": {"class_entropy": "batch", "classifier_learning_rate": None},
    "gan": {"prior": "normal"}, "gm-gan": {"prior": "mixture"},
}  # fmt: skip


@pytest.mark.parametrize("experiment", run.experiments("gan_responsibility"))
def test_the_experiments_are_the_papers(experiment):
    """Every value of their YAML, Table 5's first."""
    data, _, reading = experiment.partition("-")
    expected = (TASK if "gan" in reading else SYSTEM) | {"dataset": data} | OF_DATA[data] | OF_READING[reading]
    assert dataclasses.asdict(run.experiment_config("gan_responsibility", experiment)) == expected
    assert (scores.SAMPLES, scores.SPLITS) == (5000, 10)  # Sec. 3.3
    old = SYSTEM | {"target": "alpha", "classifier_learning_rate": None}  # of a run from before a switch (ledger 3)
    assert dataclasses.asdict(train.Config()) == old | {"dataset": "mnist"}


# ------------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("experiment", TABLE_6)
def test_the_counts_of_table_6(experiment):
    built = run.experiment_config("gan_responsibility", experiment).build()
    assert built.parameter_count_as_counted == TABLE_6[experiment][0]
    # Table 6 counts the shared head, 32,768 -> 10. A stand-alone classifier needs a head of 1,024 -> 10 to work.
    assert built.parameter_count == (12_687_971 if experiment == "flowers10-standalone" else TABLE_6[experiment][0])


def layers(network, example):
    seen = []
    for module in network.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d | torch.nn.ConvTranspose2d | torch.nn.MaxPool2d):
            module.register_forward_hook(lambda _, __, output: seen.append(tuple(output.shape[1:])))
    network(example)
    return seen


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 64, 64)])
def test_shapes_of_tables_1_to_3(shape):
    c, n, _ = shape
    q, h = n // 4, n // 2
    image = torch.zeros(2, *shape)
    of_g = [(256 * q * q,), (128, q, q), (64, h, h), (c, n, n)]
    assert layers(model.generator(shape, 100), torch.zeros(2, 100)) == of_g
    assert layers(model.encoder(shape, "count_matched"), image) == [(64, h, h), (128, q, q), (128, q, q)]
    assert layers(model.encoder(shape, "as_printed"), image) == [(64, h, h), (128, q, q)]
    assert layers(model.standalone_classifier(shape, 10), image) == [(32, n, n), (32, h, h), (16, q, q), (1024,), (10,)]
    features = torch.zeros(2, 128 * q * q)
    assert model.n_features(shape) == 128 * q * q == model.encoder(shape, "as_printed")(image).shape[1]
    assert layers(model.shared_classifier(shape, 7), features) == [(7,)]
    of_mnist = train.Config().build()
    assert layers(of_mnist.discriminator, of_mnist.encoder(torch.zeros(2, 1, 28, 28))) == [(1,)]


def count(network) -> int:
    return sum(p.numel() for p in network.parameters())


def test_counts_of_the_parts():
    """G; D count-matched; D as printed."""
    expected = {(3, 64, 64): (7_713_856, 652_289, 169_089), (1, 28, 28): (2_305_472, 622_593, 139_393)}
    for shape, (g, matched, printed) in expected.items():
        head = model.n_features(shape) + 1
        assert count(model.generator(shape, 100)) == g
        assert count(model.encoder(shape, "count_matched")) + head == matched
        assert count(model.encoder(shape, "as_printed")) + head == printed
    assert count(Mixture(10, 100, 0.1, 0.15)) == 101_000


def test_the_mixture_samples_every_gaussian_and_blends_end_at_pure_ones():
    torch.manual_seed(0)
    mixture = Mixture(3, 2, 1.0, 0.5)
    matrix = torch.tensor([[1.0, 0.5], [-0.3, 2.0]])
    with torch.no_grad():
        mixture.scales[1] = matrix
    noise = torch.randn(40_000, 3, 2, generator=torch.Generator().manual_seed(0))
    z = mixture(noise)
    torch.testing.assert_close(z.mean(0), mixture.means, atol=0.06, rtol=0)
    torch.testing.assert_close(torch.cov(z[:, 1].T), matrix @ matrix.T, atol=0.1, rtol=0)
    torch.testing.assert_close(torch.cov(z[:, 0].T), 0.25 * torch.eye(2), atol=0.02, rtol=0)
    epsilon = torch.randn(3, 2)
    pure = mixture.blend(epsilon, torch.eye(3))
    for k in range(3):
        torch.testing.assert_close(pure[k], mixture.scales[k] @ epsilon[k] + mixture.means[k])
    half = mixture.blend(epsilon[:1], torch.tensor([[0.5, 0.5, 0.0]]))
    ends = mixture.blend(epsilon[:1].expand(2, -1), torch.eye(3)[:2])
    torch.testing.assert_close(half[0], ends.mean(0))


# --------------------------------------------------------------------------------------------------------------- losses


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


REAL, FAKE = [0.3, -0.8], [[1.0, -0.5, 0.2], [0.1, 0.7, -1.1]]
ALPHA = [[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]
LOGITS = [[[0.2, -1.0, 0.4], [0.0, 0.6, 0.1], [1.2, 0.3, -0.7]], [[-0.4, 0.9, 0.5], [0.8, 0.1, 0.3], [-0.2, 0.4, 1.5]]]


def test_the_adversarial_loss_by_hand():
    pairs = [(i, k) for i in range(2) for k in range(3)]
    value = sum(ALPHA[i][k] * (math.log(sigmoid(REAL[i])) + math.log(1 - sigmoid(FAKE[i][k]))) for i, k in pairs) / 6
    real, fake, alpha = torch.tensor(REAL), torch.tensor(FAKE), torch.tensor(ALPHA)
    assert discriminator_loss(real, fake, alpha).item() == pytest.approx(-value, rel=1e-5)
    saturating = sum(ALPHA[i][k] * math.log(1 - sigmoid(FAKE[i][k])) for i, k in pairs) / 6
    assert generator_loss(fake, alpha, True).item() == pytest.approx(saturating, rel=1e-5)
    usual = -sum(ALPHA[i][k] * math.log(sigmoid(FAKE[i][k])) for i, k in pairs) / 6
    assert generator_loss(fake, alpha, False).item() == pytest.approx(usual, rel=1e-5)


def test_the_information_loss_by_hand():
    def log_p(row):
        total = math.log(sum(math.exp(x) for x in row))
        return [x - total for x in row]

    soft = hard = 0.0
    for i in range(2):
        for k in range(3):
            row = log_p(LOGITS[i][k])
            soft -= ALPHA[i][k] * sum(a * p for a, p in zip(ALPHA[i], row, strict=True)) / 6
            hard -= ALPHA[i][k] * row[k] / 6
    logits, alpha = torch.tensor(LOGITS), torch.tensor(ALPHA)
    assert information_loss(logits, alpha, "alpha").item() == pytest.approx(soft, rel=1e-5)
    assert information_loss(logits, alpha, "component").item() == pytest.approx(hard, rel=1e-5)


@pytest.mark.parametrize("target", ["alpha", "component"])
def test_perfect_responsibilities_repel_as_printed_and_attract_with_the_target_k(target):
    """The algebra of NOTES.md: G is perfect, so C's best row for the fakes of k is the next α of class k."""
    k, errors = 10, []
    alpha = torch.full((k, k), 0.001 / (k - 1), dtype=torch.float64).fill_diagonal_(0.999)  # one image of each class
    for _ in range(14):
        logits = alpha.log().clamp_min(-700).requires_grad_()
        (slope,) = torch.autograd.grad(information_loss(logits.expand(k, k, k), alpha, target), logits)
        best = alpha - k * slope / alpha.mean(0)[:, None]  # the slope is (ᾱ_k C_kj - M_kj) / K, or (ᾱ_k C_kj - ᾱ_k) / K
        printed = alpha.T @ alpha / alpha.sum(0)[:, None]  # M_kj / ᾱ_k
        torch.testing.assert_close(best, printed if target == "alpha" else torch.eye(k).double())
        alpha = best.clamp_min(0)
        errors.append(1 - alpha.diagonal().mean().item())
    if target == "alpha":
        assert (errors[0], errors[6]) == (pytest.approx(0.002, rel=0.01), pytest.approx(0.12, abs=0.01))
        torch.testing.assert_close(alpha, torch.full_like(alpha, 1 / k), atol=0.01, rtol=0)
    else:
        assert max(errors) < 1e-12


def test_the_class_entropy_by_hand():
    def entropy(row):
        return -sum(p * math.log(p) for p in row)

    mean = [(a + b) / 2 for a, b in zip(*ALPHA, strict=True)]
    of_image = sum(map(entropy, ALPHA)) / 2
    assert model.class_entropy(torch.tensor(ALPHA), "batch").item() == pytest.approx(entropy(mean) / 3, rel=1e-5)
    assert model.class_entropy(torch.tensor(ALPHA), "image").item() == pytest.approx(of_image / 3, rel=1e-5)
    for of in ("batch", "image"):  # where α is exactly 0
        alpha = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
        value = model.class_entropy(alpha, of)
        value.backward()
        assert value == 0 and alpha.grad.isfinite().all()


def test_entropy_share():
    assert model.entropy_share(torch.full((4, 5), 0.2)).item() == pytest.approx(1)
    assert model.entropy_share(torch.eye(5)).item() == 0
    mixed = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    assert model.entropy_share(mixed).item() == pytest.approx(0.5)


# --------------------------------------------------------------------------------------------------------- Algorithm 1


def small(system=train, **values) -> train.Task:
    class Config(system.Config):
        shape = (1, 8, 8)

    return Config(n_components=3, latent_dim=4, **values)


def built(config, std: float = 0.3) -> model.MixtureGAN:
    torch.manual_seed(3)
    system = config.build().double()
    with torch.no_grad():
        for name, network in system.named_children():
            if name != "generator":
                for p in network.parameters():
                    p.normal_(std=std / 4 if name in ("encoder", "classifier") else std)
    return system


def sgd(system, rate: float) -> dict[str, torch.optim.Optimizer]:
    return {player: torch.optim.SGD(several, lr=rate) for player, several in system.players().items()}


def gradients(system, given: train.Batch, precision: str = "fp32") -> dict[str, list[torch.Tensor]]:
    """The gradients of one training step with learning rate 0, by player."""
    train.train_step(system, sgd(system, 0.0), given, precision)
    return {player: [p.grad for p in several] for player, several in system.players().items()}


def batch(m: int = 4, seed: int = 5) -> train.Batch:
    images = torch.randn(m, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    return train.Batch(images, run.generator(seed))


def literal(system: Responsibility, given: train.Batch) -> dict[str, list[torch.Tensor]]:
    """Algorithm 1, one image and one Gaussian at a time. All fakes are made at once, for G's batch normalisation."""
    config = system.config
    m, k = len(given.real), config.components
    noise = torch.randn(m, k, config.latent_dim, generator=given.noise, dtype=torch.float64)
    mixture = system.mixture
    z = torch.stack([mixture.scales[j] @ noise[i, j] + mixture.means[j] for i in range(m) for j in range(k)])
    fakes = system.generator(z).view(m, k, *config.shape)
    mine = system.players()
    shared = config.classifier == "shared"

    def classify(image):
        return system.classifier(system.encoder(image) if shared else image)[0]

    def judge(image):
        return system.discriminator(system.encoder(image))[0, 0]

    alphas = [classify(given.real[i : i + 1]).softmax(-1) for i in range(m)]
    entropies = {"left_out": [], "batch": [sum(alphas) / m], "image": alphas}[config.class_entropy]
    d_value = g_value = g_by_alpha = 0.0  # g_by_alpha: with D's outputs fixed
    information = sum((p * p.log()).sum() / k / len(entropies) for p in entropies)
    for i in range(m):
        alpha = alphas[i]
        fixed = alpha.detach()
        in_adversarial = alpha if config.adversarial_moves_classifier else fixed
        in_information = alpha if config.alpha_in_information == "trained" else fixed
        for j in range(k):
            fake = fakes[i, j][None]
            on_real, on_fake = judge(given.real[i : i + 1]).sigmoid(), judge(fake).sigmoid()
            d_value = d_value + fixed[j] / k * (on_real.log() + (1 - on_fake).log()) / m
            score = (1 - on_fake).log() if config.saturating else -on_fake.log()
            g_value = g_value + in_adversarial[j] / k * score / m
            g_by_alpha = g_by_alpha + in_adversarial[j] / k * score.detach() / m
            log_p = classify(fake).log_softmax(-1)
            cross_entropy = -(in_information * log_p).sum() if config.target == "alpha" else -log_p[j]
            information = information + in_information[j] / k * cross_entropy / m

    def grad(value, parameters):
        return torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)

    both = grad(g_value, mine["classifier"]), grad(information, mine["classifier"])
    g_total = g_value + information if config.information_moves == "all" else g_value
    of_c = g_by_alpha + information if config.classifier_moves_encoder else 0
    return {
        "discriminator": grad(of_c - d_value, mine["discriminator"]),
        "generator": grad(g_total, mine["generator"]),
        "classifier": [a + b for a, b in zip(*both, strict=True)],
    }


SWITCHES = [
    {}, {"classifier": "standalone"}, {"saturating": True}, {"target": "component"}, {"information_moves": "all"},
    {"adversarial_moves_classifier": False}, {"alpha_in_information": "trained"}, {"class_entropy": "batch"},
    {"class_entropy": "image"}, {"target": "component", "class_entropy": "batch"},
    {"target": "component", "adversarial_moves_classifier": False, "alpha_in_information": "trained"},
    {"classifier": "standalone", "information_moves": "all", "alpha_in_information": "trained"},
    {"classifier_moves_encoder": True}, {"classifier_moves_encoder": True, "class_entropy": "batch"},
]  # fmt: skip
by_switches = pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items()))


@by_switches
def test_the_batch_at_once_is_the_literal_loop(switches):
    system = built(small(**switches))
    ours, theirs = gradients(system, batch()), literal(system, batch())
    assert ours.keys() == theirs.keys()
    for player in ours:
        for a, b in zip(ours[player], theirs[player], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
        assert any(a.abs().max() > 1e-8 for a in ours[player]), player


@by_switches
def test_who_is_moved_by_which_loss(switches, monkeypatch):
    """The players that have a gradient if one loss is kept and the others are multiplied by 0."""
    names = ("discriminator_loss", "generator_loss", "information_loss", "class_entropy")
    originals = {name: getattr(model, name) for name in names}

    def moved(kept: str) -> set[str]:
        for name, own in originals.items():
            monkeypatch.setattr(model, name, own if name == kept else lambda *a, own=own: 0 * own(*a))
        found = gradients(built(small(**switches)), batch())
        return {player for player, several in found.items() if any(g.abs().max() > 0 for g in several)}

    through_alpha = {"classifier"} if switches.get("adversarial_moves_classifier", True) else set()
    through_fakes = {"generator"} if switches.get("information_moves") == "all" else set()
    encoder = {"discriminator"} if "classifier_moves_encoder" in switches else set()
    assert moved("discriminator_loss") == {"discriminator"}  # α is fixed there
    assert moved("generator_loss") == {"generator"} | through_alpha | encoder
    assert moved("information_loss") == {"classifier"} | through_fakes | encoder
    assert moved("class_entropy") == ({"classifier"} | encoder if "class_entropy" in switches else set())


def test_a_static_prior_stays_as_drawn_and_all_else_moves():
    system = built(small(train, mixture="static"))
    before = {name: p.detach().clone() for name, p in system.named_parameters()}
    train.train_step(system, sgd(system, 0.1), batch())
    stayed = {name for name, p in system.named_parameters() if torch.equal(before[name], p.detach())}
    assert stayed == {"mixture.means", "mixture.scales"}


OWNERS = {  # {network: its player} in Algorithm 1, with μ and A beside G (ledger 2)
    "encoder": "discriminator", "discriminator": "discriminator", "generator": "generator", "mixture": "generator",
    "classifier": "classifier",
}  # fmt: skip


@pytest.mark.parametrize("module, values", [(train, {}), (gan, {"prior": "mixture"}), (gan, {"prior": "normal"})])
def test_every_network_is_trained_by_its_own_player(module, values):
    """Every parameter, μ and A too, belongs to exactly one player and moves in a step."""
    system = built(small(module, **values))
    owned = [(id(p), player) for player, parameters in system.players().items() for p in parameters]
    assert len(owned) == len(dict(owned)) == len(list(system.parameters()))
    owners = {name: OWNERS[name.split(".")[0]] for name, _ in system.named_parameters()}
    assert dict(owned) == {id(p): owners[name] for name, p in system.named_parameters()}
    expected = set(owners.values()) - ({"classifier"} if module is gan else set())
    assert expected == system.players().keys() and ("mixture.means" in owners) == (values.get("prior") != "normal")
    before = {name: p.detach().clone() for name, p in system.named_parameters()}
    module.train_step(system, sgd(system, 0.1), batch())
    for name, p in system.named_parameters():
        assert not torch.equal(before[name], p.detach()), name


def test_a_step_takes_all_gradients_before_it_moves_anything():
    expected = gradients(built(small()), batch())
    system = built(small())
    before = {player: [p.detach().clone() for p in parameters] for player, parameters in system.players().items()}
    train.train_step(system, sgd(system, 0.1), batch())
    for player, parameters in system.players().items():
        for old, new, gradient in zip(before[player], parameters, expected[player], strict=True):
            torch.testing.assert_close(new.detach(), old - 0.1 * gradient)


def test_a_short_run_learns_the_responsibilities_of_two_clusters():
    """Algorithm 1 on two clusters in the plane, eq. (4) with the target k. By chance: accuracy 0.5, samples 1 away."""
    torch.manual_seed(0)
    options = {"target": "component", "information_moves": "all"}
    system = train.Config(dataset="digits", n_components=2, latent_dim=2, **options).build()
    system.mixture = Mixture(2, 2, mean_range=1.0, deviation=0.3)
    system.generator = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2))
    system.encoder = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.3))
    system.discriminator, system.classifier = nn.Linear(32, 1), nn.Linear(32, 2)
    optimizers = {player: torch.optim.Adam(p, lr=2e-3, betas=(0.5, 0.999)) for player, p in system.players().items()}
    noise = torch.Generator().manual_seed(0)
    labels = torch.arange(32) % 2
    clusters = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    for _ in range(1000):
        points = clusters[labels] + 0.1 * torch.randn(32, 2, generator=noise)
        train.train_step(system, optimizers, train.Batch(points, noise))
    alpha = system.responsibilities(points.clamp(-1, 1))
    first = alpha[:, 0].argmax() % 2  # the cluster of Gaussian 0
    assert scores.clustering(alpha, labels, 2)["accuracy"] > 0.95
    fakes = system.generator(system.mixture(torch.randn(500, 2, 2, generator=noise)).flatten(0, 1)).view(500, 2, 2)
    distances = (fakes - torch.stack([clusters[first], clusters[1 - first]])).norm(dim=2).median(0).values
    assert (distances < 0.4).all(), distances


@pytest.mark.parametrize("saturating", [False, True])
@pytest.mark.parametrize("prior", ["normal", "mixture"])
def test_the_baselines_steps_by_the_plain_formulas(prior, saturating):
    system = built(small(gan, prior=prior, saturating=saturating))
    noise = run.generator(5)
    k = torch.randint(3, (4,), generator=noise)
    z = epsilon = torch.randn(4, 4, generator=noise, dtype=torch.float64)
    if prior == "mixture":
        mixture = system.mixture
        z = torch.stack([mixture.scales[j] @ e + mixture.means[j] for j, e in zip(k, epsilon, strict=True)])
    given = batch()
    on_fake = system.discriminator(system.encoder(system.generator(z))).sigmoid()
    on_real = system.discriminator(system.encoder(given.real)).sigmoid()
    one, zero = torch.ones_like(on_real), torch.zeros_like(on_real)
    d_loss = F.binary_cross_entropy(on_real, one) + F.binary_cross_entropy(on_fake, zero)
    g_loss = (1 - on_fake).log().mean() if saturating else F.binary_cross_entropy(on_fake, one)
    mine = system.players()
    expected = {"discriminator": torch.autograd.grad(d_loss, mine["discriminator"], retain_graph=True)}
    expected["generator"] = torch.autograd.grad(g_loss, mine["generator"])
    before = {player: [p.detach().clone() for p in parameters] for player, parameters in mine.items()}
    for p in system.parameters():  # what an earlier step may have left
        p.grad = torch.ones_like(p)
    terms = gan.train_step(system, sgd(system, 0.1), given)
    torch.testing.assert_close((terms["d_loss"], terms["g_loss"]), (d_loss, g_loss))
    for player, parameters in mine.items():
        for old, new, gradient in zip(before[player], parameters, expected[player], strict=True):
            torch.testing.assert_close(new.detach(), old - 0.1 * gradient)


@pytest.mark.parametrize("switches", [{}, {"classifier": "standalone"}, {"information_moves": "all"}], ids=str)
def test_bf16_gives_nearly_the_same_gradients(switches):
    system, images = built(small(**switches)).float(), batch().real.float()
    found = []
    for precision in ("fp32", "bf16"):
        given = gradients(system, train.Batch(images, run.generator(5)), precision)
        found.append({player: torch.cat([g.flatten() for g in several]) for player, several in given.items()})
    for player in found[0]:
        exact, rough = (given[player] for given in found)
        assert exact.dtype == rough.dtype == torch.float32 and not torch.equal(exact, rough)
        assert F.cosine_similarity(exact, rough, dim=0) > 0.99


@pytest.mark.parametrize("module", [train, gan])
def test_the_precision_is_the_one_asked_for(module):
    system, seen = built(small(module)).float(), []
    system.encoder[0].register_forward_hook(lambda *given: seen.append(given[2].dtype))
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        given = train.Batch(batch().real.float(), run.generator(5))
        found = module.train_step(system, sgd(system, 0.0), given, precision)
        assert {*seen} == {dtype} and {value.dtype for value in found.values()} == {torch.float32}  # no loss in bf16
        seen.clear()


def test_what_a_step_logs():
    system, given = built(small()), batch()
    found = train.train_step(system, sgd(system, 0.0), given)
    norms = {name: torch.cat([p.grad.flatten() for p in several]).norm() for name, several in system.players().items()}
    noise = torch.randn(4, 3, 4, generator=batch().noise, dtype=torch.float64)
    on_fakes, logits = system.forward_d_and_c(system.generator(system.mixture(noise).flatten(0, 1)))
    on_real, of_real = system.forward_d_and_c(given.real)
    alpha = of_real.softmax(-1)
    losses = system.losses(on_real, on_fakes.view(4, 3), logits.view(4, 3, 3), alpha)
    expected = dict(zip(("d_loss", "g_loss", "information"), losses, strict=True)) | model.shares(alpha)
    torch.testing.assert_close(found, expected | {f"{name}_grad": norm for name, norm in norms.items()})


def operations(function, *inputs) -> int:
    with FlopCounter() as counter:
        function(*inputs)
    return counter.total


def test_nothing_is_computed_and_thrown_away():
    """A backward pass costs two forward passes, or one to inputs only. G: 3. D and C: 3 on real images, 4 on fakes."""
    system, m, k = built(small()), 4, 3
    whole = operations(gradients, system, batch())
    of_g = operations(lambda: system.generator(system.mixture(torch.zeros(1, k, 4).double()).flatten(0, 1))) / k
    of_d_and_c = operations(system.forward_d_and_c, batch(1).real)
    assert whole == pytest.approx(m * (k * (3 * of_g + 4 * of_d_and_c) + 3 * of_d_and_c), rel=0.06)
    # The gradient of eq. (4) in the fakes is added to the adversarial one at D's features.
    assert whole < operations(gradients, built(small(information_moves="all")), batch()) < 1.02 * whole


# ----------------------------------------------------------------------------------------------------------- evaluation


def test_accuracy_and_weights_of_perfect_responsibilities():
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    alpha = F.one_hot((labels + 1) % 3, 3).float()  # right up to a permutation of the Gaussians
    assert scores.clustering(alpha, labels, 3) == {"nmi": pytest.approx(1), "accuracy": 1}
    found = scores.mode_weights_against_classes(alpha, labels)
    assert max(found["weight_error"], found["weight_error_hard"]) < 1e-7
    assert found["weight_error_uniform"] == pytest.approx(1 / 6)
    for what in ("weight", "frequency"):
        assert [found[f"{what}_of_{k}"] for k in range(3)] == pytest.approx([1 / 3, 1 / 2, 1 / 6])
    nothing = scores.mode_weights_against_classes(torch.full((6, 3), 1 / 3), labels)
    assert [nothing[f"weight_error{s}"] for s in ("", "_uniform")] == pytest.approx([1 / 6, 1 / 6], abs=1e-6)
    leaning = alpha * 0.4 + 0.2  # argmax is right, the means are not
    assert scores.clustering(F.one_hot(labels, 4), labels, 3) == {"nmi": pytest.approx(1)}
    found = scores.mode_weights_against_classes(leaning, labels)
    assert found["weight_of_1"] == pytest.approx(0.4)
    assert found["weight_error_hard"] == pytest.approx(0) and found["weight_error"] == pytest.approx(0.6 / 6, abs=1e-6)


def test_purity_by_hand():
    gaussians, classes = torch.tensor([0] * 5 + [1] * 4), torch.tensor([0] * 8 + [1])  # [[5, 0], [3, 1]]
    found = {"sample_purity": 0.875, "sample_classes": 1, "sample_purity_of_0": 1, "sample_purity_of_1": 0.75}
    assert scores.purity(gaussians, classes, 2, 3) == found
    assert scores.purity(gaussians, classes, 2, 2) == pytest.approx(found | {"sample_accuracy": 6 / 9})


def test_what_gaussians_generate(monkeypatch):
    """Gaussians 0, 1, 2 have classes 1, 2, 0, except 50 samples of Gaussian 0. C takes Gaussian 0's samples for 1's."""
    system, data = train.Config(dataset="digits", n_components=3).build(), toy.dataset()  # both with three classes
    judge = classifier.Network((1, 28, 28), 3)
    monkeypatch.setattr(system, "sample", lambda weights, seed: weights.argmax(1) / 10)
    monkeypatch.setattr(system, "responsibilities", lambda x: F.one_hot((10 * x).round().long().clamp(min=1), 3))
    monkeypatch.setattr(classifier, "trained", lambda of, *_: (judge, 90.0) if of is data else None)
    seen = [128, 140, 153]  # 0, 0.1 and 0.2 as uint8
    judged = [0] * 50 + [1] * 450 + [2] * 500 + [0] * 500
    monkeypatch.setattr(classifier, "classify", lambda _, x: torch.tensor(judged) if x.unique().tolist() == seen else x)
    found, name = evaluation.what_gaussians_generate(system, data, run.Options("digits"), 0, torch.device("cpu"))
    expected = {"judge_accuracy": 0.9, "samples_recognised": 2 / 3, "sample_purity": 2.9 / 3, "sample_classes": 3}
    expected |= {"sample_purity_of_0": 0.9, "sample_purity_of_1": 1, "sample_purity_of_2": 1}
    assert found == pytest.approx(expected | {"sample_accuracy": 2.9 / 3}) and name == classifier.digest(judge)


def test_the_toy_is_three_gaussians():
    data = toy.dataset()
    for points, labels, n in ((data.train_images, data.train_labels, 3200), (data.test_images, data.test_labels, 1000)):
        assert (labels.bincount() / n).tolist() == pytest.approx([0.5, 0.3, 0.2]) and len(points) == n
        assert torch.equal(toy.nearest_class(points), labels) and points.abs().max() <= 1
        for k, mean in enumerate(((0, 0.6), (-0.6 * 0.75**0.5, -0.3), (0.6 * 0.75**0.5, -0.3))):
            torch.testing.assert_close(points[labels == k].mean(0), torch.tensor(mean), atol=0.015, rtol=0)
            torch.testing.assert_close(points[labels == k].std(0), torch.full((2,), 0.08), atol=0.01, rtol=0)


def test_the_best_scores_are_each_its_own_best_epoch(monkeypatch):
    """Table 6 from a log, and the scores of an epoch. The training images give the mixture's weights."""
    monkeypatch.setattr(evaluation, "SAMPLES", 7)
    monkeypatch.setattr(train, "SAMPLES", 6)
    log = {1: (2.0, 0.1, 90.0), 3: (2.9, 0.2, 80.0), 5: (2.5, 0.3, 70.0), 6: (2.4, 0.4, 75.0)}
    names = ("inception_score", "inception_score_deviation", "fid")
    rows = [{"epoch": e} | dict(zip(names, log.get(e, ()), strict=False)) for e in range(1, 7)]
    data, asked = toy.dataset(), []
    system = type("", (), {"mode_weights": lambda _, x: x, "sample_mixture": lambda _, *given: given})()
    scorer = type("", (), {"scores": lambda _, x: asked.append(x) or {"fid": 76}, "of_real_images": lambda *_: {}})()
    found = evaluation.table_6(system, data, scorer, rows, 4)
    best = {"inception_score_best": 2.9, "inception_score_best_deviation": 0.2, "fid_best": 70, "fid": 76}
    curves = {f"inception_score_after_{e}": row[0] for e, row in log.items()}
    assert found == best | curves | {f"fid_after_{e}": row[2] for e, row in log.items()}
    assert train.scores_of_epoch(system, data, scorer, 5) == {"fid": 76}
    assert [(n, images is data.train_images, seed) for n, images, seed in asked] == [(7, True, 4), (6, True, 5)]
    assert train.scores_of_epoch(system, data, None, 5) == {}


def test_what_c_learned_pairs_images_with_their_own_labels(monkeypatch):
    labels = torch.arange(10).repeat_interleave(torch.arange(3, 13))  # 3 images of class 0, …, 12 of class 9
    images = (20 * labels).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)
    tested = labels[::2].clone()
    tested[-1] = 0  # one of 38 test images is mislabelled
    data = Dataset("digits", images, labels, images[::2], tested, tuple("0123456789"), "0" * 16, True)
    system = train.Config(dataset="digits").build()
    monkeypatch.setattr(system, "responsibilities", lambda x: F.one_hot(x[:, 0, 0, 0].long() // 20, 10).float())
    found = evaluation.what_c_learned(system, data)
    assert (found["accuracy"], found["accuracy_train"]) == (37 / 38, 1) and found["weight_error"] == pytest.approx(0)
    assert found["nmi"] < found["nmi_train"] == pytest.approx(1) and found["weight_of_9"] == pytest.approx(12 / 75)
    assert found["alpha_entropy"] == 0 and 0.8 < found["alpha_information"] <= 1
    assert found["largest_weight"] == pytest.approx(6 / 38)
    row = {x: found[x] for x in ("accuracy", "nmi")}
    row |= {f"test_{x}": found[x] for x in found if x.startswith(("alpha", "largest"))}
    assert train.scores_of_epoch(system, data, None, 0) == pytest.approx(row) and len(row) == 5


def test_information_share():
    assert model.information_share(torch.tensor([[0.5, 0.5, 0.0]]).expand(7, 3)).item() == pytest.approx(0, abs=1e-7)
    assert model.information_share(torch.full((4, 5), 0.2)).item() == pytest.approx(0, abs=1e-6)
    assert model.information_share(torch.eye(5)).item() == pytest.approx(1)
    mixed = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]])  # k tells which half: one bit of two
    assert model.information_share(mixed).item() == pytest.approx(0.5)


def test_the_way_from_one_gaussian_to_the_next():
    weights = evaluation.from_one_to_the_next(3).view(3, evaluation.STEPS, 3)
    assert torch.equal(weights[:, 0], torch.eye(3)) and torch.equal(weights[:, -1], torch.eye(3).roll(-1, 0))
    torch.testing.assert_close(weights[1, 4], torch.tensor([0, 0.5, 0.5]))
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, evaluation.STEPS))


def test_what_the_pictures_show(monkeypatch, tmp_path):
    """Ten samples of each Gaussian in a row; all images between Gaussians share one ε."""
    system, asked, shown = train.Config(dataset="digits", n_components=3, latent_dim=2).build(), [], {}

    def sample(weights, seed, same_noise=False):
        asked.append((seed, same_noise))
        return 2 * weights - 1

    monkeypatch.setattr(system, "sample", sample)
    monkeypatch.setattr(train, "save_grid", lambda images, path, columns: shown.update({path.stem: (images, columns)}))
    monkeypatch.setattr(plots, "save_labelled_grid", lambda x, path, n, *_: shown.update({path.stem: (x, n)}))
    train.save_samples(system, tmp_path / "epoch.png", 7, 1)
    state = {"identity": {"experiment": "digits", "seed": 7}, "epoch": 1, "rows": []}
    evaluation.figures(system, state, tmp_path)
    rows = torch.eye(3).repeat_interleave(10, 0), 10
    ways = evaluation.from_one_to_the_next(3), evaluation.triangle(3)
    expected = {"epoch": rows, "samples": rows, "interpolations": (ways[0], 9), "triangle": (ways[1], 9)}
    torch.testing.assert_close(shown, expected)
    assert asked == [(7, False), (7, False), (7, True), (7, True)]


def test_the_picture_of_the_toy_shows_each_gaussian_where_it_is(monkeypatch, tmp_path):
    system, figures = run.experiment_config("gan_responsibility", "toy").build(), []
    monkeypatch.setattr(system, "sample", lambda weights, seed: weights[:, 1:])  # Gaussian 1 at (1, 0), 2 at (0, 1)
    monkeypatch.setattr(system, "responsibilities", lambda x: F.one_hot((x[:, 1] > 0).long(), 3).float())  # 1 if x₂ > 0
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    toy.save_samples(system, tmp_path / "samples.png", 0)
    left, right = figures[0].axes
    for points, place in zip(left.collections[1:], torch.eye(3)[:, 1:], strict=True):
        assert (points.get_offsets() == place.numpy()).all()
    assert right.images[0].origin == "lower"
    for row, colour in ((0, "C0"), (-1, "C1")):
        expected = torch.tensor(to_rgb(colour)).expand(201, 3)
        torch.testing.assert_close(torch.as_tensor(right.images[0].get_array()[row]), expected)


def test_the_same_noise_is_the_same():
    system = train.Config(dataset="digits", n_components=2, latent_dim=3).build()
    same = system.sample(torch.eye(2)[[0, 0, 1]], same_noise=True)
    torch.testing.assert_close(same[0], same[1])
    assert (same[0] - same[2]).abs().max() > 1e-4
    other = system.sample(torch.eye(2)[[0, 0]])
    assert (other[0] - other[1]).abs().max() > 1e-4 and -1 <= other.min() and other.max() <= 1
    assert (other - system.sample(torch.eye(2)[[0, 0]], seed=1)).abs().max() > 1e-4
    torch.testing.assert_close(system.sample(torch.eye(2)[[0, 0, 1]], same_noise=True, batch=2), same)
    assert system.training and other.requires_grad is False


def test_the_whole_mixture_is_sampled_by_the_mean_responsibilities(monkeypatch):
    system = train.Config(dataset="digits", n_components=3, latent_dim=2).build()
    alpha = torch.tensor([[0.9, 0.1, 0.0], [0.5, 0.1, 0.4]])
    monkeypatch.setattr(system, "responsibilities", lambda images: alpha)
    weights = system.mode_weights(None)
    torch.testing.assert_close(weights, torch.tensor([0.7, 0.1, 0.2]))
    asked = []
    monkeypatch.setattr(system, "sample", lambda *given: asked.append(given) or torch.zeros(len(given[0]), 1, 28, 28))
    samples, _ = (system.sample_mixture(5000, weights, seed) for seed in (0, 1))
    torch.testing.assert_close(asked[0][0].mean(0), weights, atol=0.03, rtol=0)
    assert [seed for _, seed in asked] == [0, 1] and not torch.equal(asked[0][0], asked[1][0])
    assert samples.dtype == torch.uint8 and set(samples.unique().tolist()) == {128}
    baseline = gan.Config(dataset="digits", n_components=4).build()
    assert baseline.mode_weights(None).tolist() == [0.25] * 4


@pytest.mark.parametrize("classifier", ["shared", "standalone"])
def test_images_are_never_misread(classifier):
    """uint8 images and the same images as floats in [-1, 1] have the same p(k|x), in any batch. Other floats are
    refused."""
    system = train.Config(dataset="digits", classifier=classifier, networks="as_printed").build()
    images = torch.randint(0, 256, (7, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[0, 0, 0, :2] = torch.tensor([0, 255], dtype=torch.uint8)
    floats = model.as_input(images)
    assert (floats.min(), floats.max()) == (-1, 1) and torch.equal(model.to_uint8(floats), images)
    alpha = system.responsibilities(images)
    torch.testing.assert_close(alpha, system.responsibilities(floats, batch=3))
    torch.testing.assert_close(alpha.sum(1), torch.ones(7))
    system.eval()
    torch.testing.assert_close(alpha, system.forward_d_and_c(floats)[1].softmax(-1))
    for wrong in (images.float(), 1.01 * floats, floats / 0):
        with pytest.raises(ValueError, match=r"uint8 or floats in \[-1, 1\]"):
            system.responsibilities(wrong)


def test_the_layers_between():
    """What shapes do not show: activations and their slope, the range of G, the initial weights."""
    shape, tconv = (1, 28, 28), "BatchNorm2d LeakyReLU ConvTranspose2d"
    for network, expected in {
        model.generator(shape, 2): f"Linear BatchNorm1d LeakyReLU Unflatten ConvTranspose2d {tconv} {tconv} Tanh",
        model.encoder(shape, "count_matched"): "Conv2d LeakyReLU Conv2d LeakyReLU Conv2d LeakyReLU Flatten",
        model.encoder(shape, "as_printed"): "Conv2d LeakyReLU Conv2d BatchNorm2d LeakyReLU Flatten",
        model.standalone_classifier(shape, 3): "Conv2d ReLU MaxPool2d Conv2d ReLU Flatten Linear ReLU Linear",
    }.items():
        assert " ".join(type(m).__name__ for m in network) == expected
        assert {(m.momentum, m.eps) for m in network if "Norm" in type(m).__name__} <= {(0.1, 1e-5)}  # ledger 16
    for system in (train.Config(dataset="digits").build(), gan.Config(dataset="digits").build()):
        assert {m.negative_slope for m in system.modules() if isinstance(m, nn.LeakyReLU)} == {0.3}
        means, scales = system.mixture.means, system.mixture.scales
        assert -0.1 <= means.min() < -0.09 and 0.09 < means.max() <= 0.1
        assert torch.equal(scales, 0.15 * torch.eye(100).expand(10, -1, -1))
        fakes = system.generator(50 * torch.randn(8, 100))
        assert fakes.min() >= -1 and fakes.max() <= 1 and isinstance(system.generator[-1], nn.Tanh)
        for m in system.modules():
            if isinstance(m, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(m.weight)
                bound = math.sqrt(6 / (fan_in + fan_out))  # Glorot's uniform
                assert 0.9 * bound < m.weight.abs().max() <= bound + 1e-6
                assert m.bias is None or m.bias.abs().max() == 0
    toy_networks = train.Config(dataset="toy", n_components=3, classifier="standalone").build()
    hidden = "Linear LeakyReLU Linear LeakyReLU"  # of 64 units (ledger 23)
    ends = {"generator": " Linear Tanh", "encoder": "", "classifier": " Linear"}
    for network, after in ((getattr(toy_networks, name), end) for name, end in ends.items()):
        assert " ".join(type(m).__name__ for m in network) == hidden + after
        assert [m.out_features for m in network if isinstance(m, nn.Linear)][:2] == [64, 64]


def test_the_optimisers_and_the_collapse_in_a_run(tiny, tmp_path, capsys):
    seen = []

    def step(system, optimizers, *_):
        groups = {name: optimizer.param_groups[0] for name, optimizer in optimizers.items()}
        seen.append({name: (group["lr"], group["betas"]) for name, group in groups.items()})
        owned = {name: [*map(id, parameters)] for name, parameters in system.players().items()}
        assert {name: [*map(id, group["params"])] for name, group in groups.items()} == owned
        values = {"d_loss": 1.0, "alpha_entropy": 1.0, "alpha_information": 0.0, "largest_weight": 0.1}
        return {name: torch.tensor(value) for name, value in values.items()}

    config = train.Config(dataset="digits", epochs=1, batch=2, learning_rate=0.003, beta1=0.25)
    train.train(config, run.Options("digits", runs=tmp_path / "same", device="cpu"), step)
    assert seen[0] == {player: (0.003, (0.25, 0.999)) for player in ("discriminator", "generator", "classifier")}
    assert "epoch 1: α does not tell the training images apart" in capsys.readouterr().out
    slower = dataclasses.replace(config, classifier_learning_rate=0.0001)
    train.train(slower, run.Options("digits", runs=tmp_path / "slower", device="cpu"), step)
    assert seen[-1] == seen[0] | {"classifier": (0.0001, (0.25, 0.999))}


def test_the_triangle_has_its_three_gaussians_at_its_corners():
    weights = evaluation.triangle(5).view(evaluation.STEPS, evaluation.STEPS, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(evaluation.STEPS, evaluation.STEPS))
    assert weights.min() >= 0
    assert torch.equal(torch.stack([weights[0, 0], weights[0, -1], weights[-1, 0]]), torch.eye(5)[:3])
    torch.testing.assert_close(weights[0, 4], torch.tensor([0.5, 0.5, 0, 0, 0]))


def test_inception_score_against_torch_fidelity():
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * torch.randn(200, 1008, generator=torch.Generator().manual_seed(0))
    theirs = isc_features_to_metric(logits, splits=10, shuffle=False)
    found = scores.inception_score(logits)
    assert found[0] == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    assert found[1] == pytest.approx(theirs["inception_score_std"], rel=1e-4)


def test_a_collapse_is_said_when_it_begins(capsys):
    def said(*rows: dict[str, float]) -> str:
        train.say_if_collapsed([{"epoch": i + 1, **row} for i, row in enumerate(rows)])
        return capsys.readouterr().out

    alive = {"alpha_information": 0.011, "largest_weight": 0.989}
    same = {"alpha_information": 0.001, "largest_weight": 0.1}
    assert said(alive) == said(same, alive) == said({"d_loss": 1.0}) == ""  # a baseline has no α
    assert said(same) == said(same, alive, same).replace("epoch 3", "epoch 1") != "" == said(alive, same, same)
    assert "epoch 1: α does not tell the training images apart" in said(same)
    assert "(one Gaussian has 10.0 % of α, I(k; x) is 0.10 % of log K)" in said(same)
    one = {"alpha_information": 0.02, "largest_weight": 0.995}
    assert "epoch 2: α does not tell the training images apart (one Gaussian has 99.5 % of α" in said(alive, one)
    # MNIST, seed 0, epoch 2: one Gaussian has 78 % of α on the training batches and nearly all of it on test images
    last = {"alpha_information": 0.01007, "largest_weight": 0.78}
    of_test = said(last | {"test_alpha_information": 0.0016, "test_largest_weight": 0.992})
    assert "does not tell the test images apart (one Gaussian has 99.2 % of α, I(k; x) is 0.16 % of log K)" in of_test


# --------------------------------------------------------------------------------------------- experiments, end to end


@pytest.fixture
def tiny(monkeypatch):
    """A few images under every data set's name, an untrained judge, and no Inception weights."""

    def make(name: str, *_) -> Dataset:
        g = torch.Generator().manual_seed(0)  # the same images each time
        labels = torch.arange(4)
        images = torch.randint(0, 256, (4, *train.SETS[name][0]), dtype=torch.uint8, generator=g)
        return Dataset(name, images, labels, images, labels, tuple("abcdefghij"), "0" * 16, False)

    def judge(data: Dataset, *_):
        return classifier.Network(tuple(data.train_images.shape[1:]), data.n_classes).eval(), 90.0

    monkeypatch.setattr(train, "load", make)
    monkeypatch.setattr(scores, "load", make)
    monkeypatch.setattr(classifier, "trained", judge)
    monkeypatch.setattr(scores.inception, "find_weights", lambda _: (None, "none in this test"))


@pytest.mark.parametrize("experiment", run.experiments("gan_responsibility"))
def test_two_steps_of_every_experiment_and_its_evaluation(experiment, tiny, tmp_path, capsys):
    config = run.experiment_config("gan_responsibility", experiment, {"epochs": 1, "batch": 2, "latent_dim": 5})
    options = run.Options(experiment, runs=tmp_path, device="cpu", unofficial_data=True)
    step = gan.train_step if isinstance(config, gan.Config) else train.train_step
    folder = train.train(config, options, step)
    result = evaluation.evaluate(options)
    assert result == json.loads((folder / "eval.json").read_text())
    assert all(math.isfinite(value) for value in result["metrics"].values())
    pictures = {path.stem for path in (folder / "figures").glob("*.png")}
    baseline = experiment in ("flowers10-gan", "flowers10-gm-gan")
    assert ("accuracy" in result["metrics"]) == ("weight_error" in result["metrics"]) == (not baseline)
    assert ("sample_purity" in result["metrics"]) == (experiment != "flowers10-gan")
    strips = {"interpolations", "triangle"} if experiment != "flowers10-gan" and config.dataset != "toy" else set()
    assert pictures == {"training", "samples"} | strips
    row = torch.load(folder / "checkpoint.pt", weights_only=True)["rows"][0]
    shares = {"alpha_entropy", "alpha_information", "largest_weight"}
    assert baseline or shares | {f"test_{name}" for name in shares} | {"accuracy", "nmi"} <= row.keys()
    trained = gan_responsibility.load(folder)
    assert isinstance(trained, gan.GAN if baseline else Responsibility) and trained.config == config
    assert result["metrics"]["parameter_count"] == count(trained)
    assert result["metrics"]["parameter_count_as_counted"] == trained.parameter_count_as_counted
    k = config.components
    assert trained.sample(torch.eye(k)).shape == (k, *config.shape) and not trained.training
    train.train(config, options, step)
    assert "complete" in capsys.readouterr().out


def numbered(first: int, end: int) -> torch.Tensor:
    """Images `first` to `end` - 1. Every pixel of image i is i."""
    return torch.arange(first, end, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)


def numbers(images: torch.Tensor) -> list[int]:
    return images[:, 0, 0, 0].tolist()


@pytest.fixture
def seen():
    """Lists of each step's image numbers, first noise and one weight; and a step that only fills these lists."""
    steps, noises, weights = [], [], []

    def step(system, optimizers, given, *_):
        steps.append(numbers(model.to_uint8(given.real)))
        noises.append(torch.randn(1, generator=given.noise).item())
        weights.append(system.discriminator.weight[0, 0].item())
        assert len(system.mixture.means) == 10  # as many as classes
        return {"d_loss": torch.ones(())}

    return steps, noises, weights, step


@pytest.mark.parametrize("n, sizes", [(21, [8, 8, 5]), (17, [8, 8])])
def test_the_loop_takes_every_image_once_an_epoch_in_a_new_order(n, sizes, tmp_path, monkeypatch, seen):
    """A last batch of one image is skipped. Noise and order depend on the seed. The last epoch is always scored."""
    steps, noises, weights, step = seen
    data = Dataset("digits", *[numbered(0, n), torch.arange(n)] * 2, tuple("0123456789"), "0", False)
    monkeypatch.setattr(train, "load", lambda *_: data)
    monkeypatch.setattr(scores.Scorer, "find", lambda *_: "scorer")
    scored = []
    monkeypatch.setattr(train, "scores_of_epoch", lambda _, given, scorer, seed: scored.append((scorer, seed)) or {})
    config = train.Config(dataset="digits", n_components=None, batch=8, epochs=3, score_every=2, latent_dim=2)
    for seed, name in ((1, "a"), (1, "b"), (2, "c")):
        train.train(config, run.Options("digits", seed, runs=tmp_path / name, device="cpu"), step)
        assert scored[-3:] == [(None, seed), ("scorer", seed), ("scorer", seed)]
    assert [len(images) for images in steps] == 9 * sizes
    orders = [sum(steps[i : i + len(sizes)], []) for i in range(0, len(steps), len(sizes))]
    assert all(len(set(order)) == sum(sizes) and set(order) <= {*range(n)} for order in orders)
    assert orders[:3] == orders[3:6] and noises[: len(noises) // 3] == noises[len(noises) // 3 :][: len(noises) // 3]
    assert len({*map(tuple, orders), tuple(range(sum(sizes)))}) == 7 and len(set(noises)) == 6 * len(sizes)
    assert len(set(weights)) == 2


def test_thinned_and_held_out_images(tmp_path, monkeypatch, seen):
    """Counts; images keep their labels; held-out images are never trained on and replace the test images."""
    labels = torch.arange(100) // 25
    data = Dataset("digits", numbered(0, 100), labels, numbered(100, 200), labels, tuple("0123456789"), "0", False)
    config = train.Config(dataset="digits", batch=4, epochs=1, latent_dim=2, thinned=True)
    few = train.prepared(data, config)
    for images, kept in ((few.train_images, few.train_labels), (few.test_images, few.test_labels)):
        assert kept.bincount().tolist() == [25, 13, 7, 25] and len({*numbers(images)}) == 70
        assert kept.tolist() == [i % 100 // 25 for i in numbers(images)]
    assert numbers(few.train_images)[25:38] != [*range(25, 38)]  # random, not the first ones
    scored = []
    monkeypatch.setattr(train, "load", lambda *_: data)
    monkeypatch.setattr(train, "scores_of_epoch", lambda _, given, *rest: scored.append(given) or {})
    monkeypatch.setattr(evaluation, "what_c_learned", lambda _, given: scored.append(given) or {})
    monkeypatch.setattr(evaluation, "what_gaussians_generate", lambda _, given, *rest: scored.append(given) or ({}, ""))
    monkeypatch.setattr(evaluation, "figures", lambda *_: None)
    against = []  # the images of FID
    monkeypatch.setattr(scores.Scorer, "find", lambda given, *_: against.append(given))
    options = run.Options("digits", 3, runs=tmp_path, device="cpu")
    train.train(dataclasses.replace(config, validation=20), options, seen[-1])
    evaluation.evaluate(options)
    with monkeypatch.context() as other, pytest.raises(run.UserError, match="with digest 0, found 1"):
        other.setattr(train, "load", lambda *_: dataclasses.replace(data, digest="1"))
        evaluation.evaluate(options)
    assert scored[2] is data and [given is data for given in against] == [True] * 2  # they get all data
    for given in scored[:2]:
        held, rest = numbers(given.test_images), numbers(given.train_images)
        assert len({*held}) == 20 and sorted(held + rest) == numbers(few.train_images)
        assert sorted(sum(seen[0], [])) == sorted(rest)
        assert given.test_labels.tolist() + given.train_labels.tolist() == [i // 25 for i in held + rest]


def test_table_6_and_figure_4_with_weights(tiny, tmp_path, monkeypatch):
    """The scores while training and after it, with a stand-in for the Inception network."""
    g = torch.Generator().manual_seed(0)
    monkeypatch.setattr(evaluation, "SAMPLES", 40)
    monkeypatch.setattr(train, "SAMPLES", 40)
    named = []
    monkeypatch.setattr(scores.inception, "find_weights", lambda path: (named.append(path) or tmp_path, ""))
    monkeypatch.setattr(scores.inception, "extractor", lambda *_: "network")
    projection, looked_at = torch.randn(3 * 64 * 64, 6, generator=g), []

    def outputs(network, images):
        looked_at.append(images)
        found = images.flatten(1).float() @ projection / 255
        return found, 3 * found.flip(1)  # features, logits

    monkeypatch.setattr(scores.inception, "outputs", outputs)
    monkeypatch.setattr(scores.inception, "features", lambda network, images: outputs(network, images)[0])
    whole = torch.randint(0, 256, (14, 3, 64, 64), dtype=torch.uint8, generator=g)
    few = scores.load("flowers10_all")
    everything = dataclasses.replace(few, train_images=whole, train_labels=torch.arange(14) % 10)
    monkeypatch.setattr(scores, "load", lambda name, *_: everything)
    short = {"epochs": 2, "batch": 4, "latent_dim": 5, "score_every": 1}
    config = run.experiment_config("gan_responsibility", "flowers10", short)
    weights = tmp_path / "weights.pth"
    options = run.Options("flowers10", runs=tmp_path, device="cpu", unofficial_data=True, inception=weights)
    folder = train.train(config, options)
    assert named == [weights]
    rows = torch.load(folder / "checkpoint.pt", weights_only=True)["rows"]
    drawn, save = [], plots.save_curves
    monkeypatch.setattr(plots, "save_curves", lambda panels, *a, **k: drawn.append(panels) or save(panels, *a, **k))
    result = evaluation.evaluate(options)
    metrics, best = result["metrics"], max(rows, key=lambda row: row["inception_score"])
    assert result["provenance"]["inception"] == scores.JUDGE
    assert metrics["fid_best"] == min(row["fid"] for row in rows)
    assert metrics["fid"] == pytest.approx(rows[-1]["fid"], rel=1e-4)
    assert metrics["inception_score_best"] == best["inception_score"]
    assert metrics["inception_score_best_deviation"] == best["inception_score_deviation"]
    assert [metrics[f"fid_after_{epoch}"] for epoch in (1, 2)] == [row["fid"] for row in rows]
    assert (tmp_path / "gan_responsibility/figures/figure-4.png").exists()
    ((label, (epochs, curve, _)),) = drawn[-1]["FID"].items()
    assert epochs == [1, 2] and curve == [row["fid"] for row in rows]
    assert label == f"encoder shared (1 seed): best {min(curve):.4g}, last {curve[-1]:.4g}"
    # Moments of training and of all images are cached; the halves need the features of all images again.
    assert sorted(len(images) for images in looked_at) == [4, 4, 14, 14, 40, 40, 40]

    def distance(a, b):
        both = (scores.moments(images.flatten(1).float() @ projection / 255) for images in (a, b))
        return scores.frechet_distance(*both)

    samples = next(images for images in looked_at[::-1] if len(images) == 40)
    logits = 3 * outputs("network", samples)[0]
    assert metrics["inception_score"] == pytest.approx(scores.inception_score(logits)[0], rel=1e-4)
    assert metrics["fid_all"] == pytest.approx(distance(samples, whole), rel=1e-4)
    assert metrics["fid"] == pytest.approx(distance(samples, few.train_images), rel=1e-4)
    assert metrics["fid_real"] == pytest.approx(distance(few.train_images, few.test_images), abs=1e-3)
    halves = whole[torch.randperm(14, generator=run.generator(0, "halves"))]
    assert metrics["fid_halves"] == pytest.approx(distance(halves[:7], halves[7:]), rel=1e-4)
    assert metrics["fid_halves"] > 0


def test_figure_4_has_each_system_s_own_runs(monkeypatch, tmp_path):
    drawn, folders = {}, ("-gan/seed0", "-gm-gan/seed0", "-standalone/seed0", "/seed0", "/seed0-batch-8")
    for i, folder in enumerate(folders):  # the last one has another batch size, so it is not in the figure
        values = {"metrics": {"fid_best": i, "fid_after_1": i}}
        (tmp_path / f"gan_responsibility/flowers10{folder}").mkdir(parents=True)
        run.write_json(tmp_path / f"gan_responsibility/flowers10{folder}/eval.json", values)
    monkeypatch.setattr(plots, "save_curves", lambda panels, *_: drawn.update(panels["FID"]))
    evaluation.figure_4(evaluation.metrics_of_runs(tmp_path), tmp_path)
    found = {label.partition(" (1 seed)")[0]: means for label, (_, means, _) in drawn.items()}
    assert found == {"vanilla GAN": [0], "GM-GAN": [1], "classifier apart": [2], "encoder shared": [3]}


def test_a_curve_has_the_epochs_that_all_seeds_have():
    several = [{"fid_after_1": 1.0, "fid_after_2": 9.0}, {"fid_after_1": 2.0}]
    for order in (several, several[::-1]):
        assert plots.curve(order, "fid_after_") == ([1.0], [1.5], [0.5])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["digits", "--batch", "1"], "out of range; allowed: >= 2"),
        (["digits", "--batch", "2000"], "is more than the 1437 training images"),
        (["digits", "--n-components", "0"], "out of range"),
        (["digits", "--n-components", "1"], "out of range; allowed: >= 2"),
        (["digits", "--target", "beta"], "not one of alpha, component"),
        (["digits-printed", "--classifier", "standalone", "--classifier-moves-encoder", "true"], "shares no encoder"),
        (["digits", "--dataset", "svhn"], "is not one of"),
        (["flowers10-gan"], "flowers10-gan is trained by python -m gan_responsibility.gan"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, tmp_path, capsys):
    code, _, err = call(train.main, *arguments, "--runs", tmp_path, capsys=capsys)
    assert code == 2 and message in err and err.count("\n") == 1


def test_a_run_that_was_cut_in_two_ends_with_the_same_bits(tiny, tmp_path):
    config = train.Config(dataset="digits", epochs=2, batch=2, latent_dim=4, networks="as_printed")
    whole = train.train(config, run.Options("digits", runs=tmp_path / "whole", device="cpu"))
    options = run.Options("digits", runs=tmp_path / "parts", device="cpu")
    train.train(dataclasses.replace(config, epochs=1), options)
    parts = train.train(config, options)
    first, second = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, parts))
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name


# -------------------------------------------------------------------------------------------------------- published.csv


def test_published_csv_is_table_6_each_number_once():
    with open(run.ROOT / "gan_responsibility/published.csv", newline="", encoding="utf-8") as file:
        entries = [e for e in csv.DictReader(file) if e["value"]]  # the others are our own measurements
    found = {(e["experiment"], e["metric"]): (float(e["value"]), float(e["spread"] or 0)) for e in entries}
    expected = {}
    for experiment, (parameters, score, distance) in TABLE_6.items():
        expected[experiment, "parameter_count_as_counted"] = (parameters, 0)
        expected[experiment, "inception_score_best"] = score
        expected[experiment, "fid_best"] = distance
    assert found == expected and len(entries) == 12
