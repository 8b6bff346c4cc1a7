"""GAN responsibility learning: counts, losses, who is moved by what, the batched algorithm against a literal loop, runs end to end."""

import dataclasses
import json
import math

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from common import diff, plots, run
from common.bench import Counter
from common.data import Dataset
from gan_responsibility import eval as evaluation
from gan_responsibility import figures, gan, model, scores, train
from gan_responsibility.model import Mixture, discriminator_loss, generator_loss, information_loss
from tests.conftest import call, run_command

TABLE_6 = {  # parameters, Inception Score, FID
    "flowers10-standalone": (13_005_411, (2.9664, 0.2188), (231.0577, 7.5371)),
    "flowers10": (8_794_835, (3.1368, 0.1596), (205.9776, 7.8587)),
    "flowers10-gmgan": (8_467_145, (2.6770, 0.1079), (239.3936, 6.7672)),
    "flowers10-gan": (8_366_145, (2.4882, 0.1065), (247.0610, 7.2361)),
}


# ------------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("experiment", TABLE_6)
def test_the_counts_of_table_6(experiment):
    config = run.experiment_config("gan_responsibility", experiment)
    found = train.system_of(vars(config)).counts(config)
    assert found["parameters_as_counted"] == TABLE_6[experiment][0]
    # A stand-alone classifier that works has 1,024 -> 10 for its head, not the shared one's 32,768 -> 10.
    assert found["parameters"] == (12_687_971 if experiment == "flowers10-standalone" else TABLE_6[experiment][0])


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
    assert layers(model.generator(shape, 100), torch.zeros(2, 100)) == [(256 * q * q,), (128, q, q), (64, h, h), (c, n, n)]
    assert layers(model.encoder(shape, "count_matched"), image) == [(64, h, h), (128, q, q), (128, q, q)]
    assert layers(model.encoder(shape, "as_printed"), image) == [(64, h, h), (128, q, q)]
    assert layers(model.standalone_classifier(shape, 10), image) == [(32, n, n), (32, h, h), (16, q, q), (1024,), (10,)]
    features = torch.zeros(2, 128 * q * q)
    assert model.features(shape) == 128 * q * q == model.encoder(shape, "as_printed")(image).shape[1]
    assert layers(model.discriminator(shape), features) == [(1,)] and layers(model.shared_classifier(shape, 7), features) == [(7,)]


def count(network) -> int:
    return sum(p.numel() for p in network.parameters())


def test_counts_of_the_parts():
    """FACTS of the search: G 7,713,856; D 652,289 count-matched and 169,089 as printed; on MNIST 2,305,472, 622,593 and 139,393."""
    expected = {(3, 64, 64): (7_713_856, 652_289, 169_089), (1, 28, 28): (2_305_472, 622_593, 139_393)}
    for shape, (g, matched, printed) in expected.items():
        head = count(model.discriminator(shape))
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
    value = sum(ALPHA[i][k] * (math.log(sigmoid(REAL[i])) + math.log(1 - sigmoid(FAKE[i][k]))) for i, k in pairs) / 3
    real, fake, alpha = torch.tensor(REAL), torch.tensor(FAKE), torch.tensor(ALPHA)
    assert discriminator_loss(real, fake, alpha).item() == pytest.approx(-value, rel=1e-5)
    saturating = sum(ALPHA[i][k] * math.log(1 - sigmoid(FAKE[i][k])) for i, k in pairs) / 3
    assert generator_loss(fake, alpha, True).item() == pytest.approx(saturating, rel=1e-5)
    usual = -sum(ALPHA[i][k] * math.log(sigmoid(FAKE[i][k])) for i, k in pairs) / 3
    assert generator_loss(fake, alpha, False).item() == pytest.approx(usual, rel=1e-5)


def test_the_information_loss_by_hand():
    def log_p(row):
        total = math.log(sum(math.exp(x) for x in row))
        return [x - total for x in row]

    soft = hard = 0.0
    for i in range(2):
        for k in range(3):
            row = log_p(LOGITS[i][k])
            soft -= ALPHA[i][k] * sum(a * p for a, p in zip(ALPHA[i], row, strict=True)) / 3
            hard -= ALPHA[i][k] * row[k] / 3
    logits, alpha = torch.tensor(LOGITS), torch.tensor(ALPHA)
    assert information_loss(logits, alpha, "alpha").item() == pytest.approx(soft, rel=1e-5)
    assert information_loss(logits, alpha, "component").item() == pytest.approx(hard, rel=1e-5)


def test_the_class_entropy_by_hand():
    def entropy(row):
        return -sum(p * math.log(p) for p in row)

    mean = [(a + b) / 2 for a, b in zip(*ALPHA, strict=True)]
    assert model.class_entropy(torch.tensor(ALPHA), "batch").item() == pytest.approx(entropy(mean) / 3, rel=1e-5)
    assert model.class_entropy(torch.tensor(ALPHA), "image").item() == pytest.approx(sum(map(entropy, ALPHA)) / 2 / 3, rel=1e-5)
    for of in ("batch", "image"):  # α may be exactly 0
        alpha = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
        value = model.class_entropy(alpha, of)
        value.backward()
        assert value == 0 and alpha.grad.isfinite().all()


def test_entropy_share():
    assert model.entropy_share(torch.full((4, 5), 0.2)).item() == pytest.approx(1)
    assert model.entropy_share(torch.eye(5)).item() == 0
    mixed = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    assert model.entropy_share(mixed).item() == pytest.approx(0.5)


# ------------------------------------------------------------------------------------------------------------ Algorithm 1


def small(system=train, **values) -> train.Task:
    class Config(system.Config):
        shape = (1, 8, 8)

    return Config(n_components=3, latent_dim=4, **values)


def built(config, std: float = 0.3) -> dict[str, torch.nn.Module]:
    torch.manual_seed(3)
    networks = {name: network.double() for name, network in train.build(config).items()}
    with torch.no_grad():
        for name, network in networks.items():
            if name != "generator":
                for p in network.parameters():
                    p.normal_(std=std / 4 if name in ("encoder", "classifier") else std)
    return networks


def batch(m: int = 4, seed: int = 5) -> train.Batch:
    return train.Batch(torch.randn(m, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(9)), run.generator(seed))


def literal(networks, given: train.Batch, config: train.Config) -> dict[str, list[torch.Tensor]]:
    """Algorithm 1 image by image and Gaussian by Gaussian; the fakes are made first, since batch normalisation sees all of them."""
    m, k = len(given.real), config.components
    noise = torch.randn(m, k, config.latent_dim, generator=given.noise, dtype=torch.float64)
    mixture = networks["mixture"]
    z = torch.stack([mixture.scales[j] @ noise[i, j] + mixture.means[j] for i in range(m) for j in range(k)])
    fakes = networks["generator"](z).view(m, k, *config.shape)
    mine = train.players(networks)
    shared = config.classifier == "shared"

    def classify(image):
        return networks["classifier"](networks["encoder"](image) if shared else image)[0]

    def judge(image):
        return networks["discriminator"](networks["encoder"](image))[0, 0]

    alphas = [classify(given.real[i : i + 1]).softmax(-1) for i in range(m)]
    entropies = {"left_out": [], "batch": [sum(alphas) / m], "image": alphas}[config.class_entropy]
    d_value = g_value = 0.0
    information = sum((p * p.log()).sum() / k / len(entropies) for p in entropies)
    for i in range(m):
        alpha = alphas[i]
        fixed = alpha.detach()
        in_adversarial = alpha if config.adversarial_moves_classifier else fixed
        in_information = alpha if config.alpha_in_information == "trained" else fixed
        for j in range(k):
            fake = fakes[i, j][None]
            d_value = d_value + fixed[j] / k * (judge(given.real[i : i + 1]).sigmoid().log() + (1 - judge(fake).sigmoid()).log()) / m
            score = (1 - judge(fake).sigmoid()).log() if config.saturating else -judge(fake).sigmoid().log()
            g_value = g_value + in_adversarial[j] / k * score / m
            log_p = classify(fake).log_softmax(-1)
            cross_entropy = -(in_information * log_p).sum() if config.target == "alpha" else -log_p[j]
            information = information + in_information[j] / k * cross_entropy / m

    def grad(value, parameters):
        return torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)

    classifier = [a + b for a, b in zip(grad(g_value, mine["classifier"]), grad(information, mine["classifier"]), strict=True)]
    g_total = g_value + information if config.information_moves == "all" else g_value
    return {"discriminator": grad(-d_value, mine["discriminator"]), "generator": grad(g_total, mine["generator"]), "classifier": classifier}


SWITCHES = [
    {}, {"classifier": "standalone"}, {"saturating": True}, {"target": "component"}, {"information_moves": "all"},
    {"adversarial_moves_classifier": False}, {"alpha_in_information": "trained"}, {"class_entropy": "batch"}, {"class_entropy": "image"},
    {"target": "component", "class_entropy": "batch"},
    {"classifier": "standalone", "information_moves": "all", "alpha_in_information": "trained"},
]  # fmt: skip


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items()) or "default")
@pytest.mark.parametrize("microbatch", [0, 1, 3])
def test_the_batch_at_once_is_the_literal_loop(switches, microbatch):
    config = small(microbatch=microbatch, **switches)
    networks = built(config)
    ours, _ = train.gradients(networks, batch(), config)
    theirs = literal(networks, batch(), config)
    assert ours.keys() == theirs.keys()
    for player in ours:
        for a, b in zip(ours[player], theirs[player], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
        assert any(a.abs().max() > 1e-8 for a in ours[player]), player


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items()) or "default")
def test_who_is_moved_by_which_loss(switches, monkeypatch):
    """Each loss alone, the others set to nothing: which player then has a gradient."""

    def moved(kept: str) -> set[str]:
        for name in ("discriminator_loss", "generator_loss", "information_loss", "class_entropy"):
            own = getattr(model, name)
            monkeypatch.setattr(train, name, own if name == kept else lambda *a, own=own: 0 * own(*a))
        config = small(**switches)
        found, _ = train.gradients(built(config), batch(), config)
        return {player for player, several in found.items() if any(g.abs().max() > 0 for g in several)}

    assert moved("discriminator_loss") == {"discriminator"}  # α is fixed there
    assert moved("generator_loss") == {"generator"} | ({"classifier"} if switches.get("adversarial_moves_classifier", True) else set())
    assert moved("information_loss") == {"classifier"} | ({"generator"} if switches.get("information_moves") == "all" else set())
    assert moved("class_entropy") == ({"classifier"} if "class_entropy" in switches else set())


OWNERS = {  # Algorithm 1, with μ and A beside G (ledger 2): network, whose it is
    "encoder": "discriminator", "discriminator": "discriminator", "generator": "generator", "mixture": "generator",
    "classifier": "classifier",
}  # fmt: skip


@pytest.mark.parametrize("system, values", [(train, {}), (gan, {"prior": "mixture"}), (gan, {"prior": "normal"})])
def test_every_network_is_trained_by_its_own_player(system, values):
    """μ and A too: every parameter once, and each moves in a step."""
    config = small(system, **values)
    networks = built(config) if system is train else {name: n.double() for name, n in gan.build(config).items()}
    players = system.players(networks)
    owned = {id(p): player for player, parameters in players.items() for p in parameters}
    assert len(owned) == sum(len(parameters) for parameters in players.values())
    assert owned == {id(p): OWNERS[name] for name, network in networks.items() for p in network.parameters()}
    assert set(networks) == set(OWNERS) - ({"classifier"} if system is gan else set()) - (
        {"mixture"} if values.get("prior") == "normal" else set()
    )
    before = {name: [p.detach().clone() for p in network.parameters()] for name, network in networks.items()}
    system.train_step(networks, {player: torch.optim.SGD(several, lr=0.1) for player, several in players.items()}, batch(), config)
    for name, network in networks.items():
        for i, (old, p) in enumerate(zip(before[name], network.parameters(), strict=True)):
            assert not torch.equal(old, p.detach()) or name == "classifier" and p.dim() == 1, f"{name}.{i}"


def test_a_step_takes_all_gradients_before_it_moves_anything():
    config = small()
    networks = built(config)
    expected, _ = train.gradients(networks, batch(), config)
    before = {player: [p.detach().clone() for p in parameters] for player, parameters in train.players(networks).items()}
    optimizers = {player: torch.optim.SGD(parameters, lr=0.1) for player, parameters in train.players(networks).items()}
    for network in networks.values():  # the running means of the first pass
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
                module.reset_running_stats()
    train.train_step(networks, optimizers, batch(), config)
    for player, parameters in train.players(networks).items():
        for old, new, gradient in zip(before[player], parameters, expected[player], strict=True):
            torch.testing.assert_close(new.detach(), old - 0.1 * gradient)


def test_a_short_run_learns_the_responsibilities_of_two_clusters():
    """Algorithm 1 on two clusters in the plane, told k by eq. (4): chance is an accuracy of 0.5 and samples 1 from their cluster."""
    torch.manual_seed(0)
    config = train.Config(dataset="digits", n_components=2, latent_dim=2, target="component", information_moves="all")
    networks = {
        "mixture": Mixture(2, 2, mean_range=1.0, deviation=0.3),
        "generator": nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2)),
        "encoder": nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.3)),
        "discriminator": nn.Linear(32, 1),
        "classifier": nn.Linear(32, 2),
    }
    optimizers = {player: torch.optim.Adam(p, lr=2e-3, betas=(0.5, 0.999)) for player, p in train.players(networks).items()}
    noise = torch.Generator().manual_seed(0)
    labels = torch.arange(32) % 2
    clusters = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    for _ in range(1000):
        points = clusters[labels] + 0.1 * torch.randn(32, 2, generator=noise)
        train.train_step(networks, optimizers, train.Batch(points, noise), config)
    alpha = train.responsibilities(networks, points)
    first = alpha[:, 0].argmax() % 2  # the cluster of Gaussian 0
    assert train.clustering(alpha, labels, 2)["accuracy"] > 0.95
    made = networks["generator"](networks["mixture"](torch.randn(500, 2, 2, generator=noise)).flatten(0, 1)).view(500, 2, 2)
    distances = (made - torch.stack([clusters[first], clusters[1 - first]])).norm(dim=2).median(0).values
    assert (distances < 0.4).all(), distances


@pytest.mark.parametrize("saturating", [False, True])
def test_the_baselines_steps_by_the_plain_formulas(saturating):
    for prior in ("normal", "mixture"):
        config = small(gan, prior=prior, saturating=saturating)
        torch.manual_seed(3)
        networks = {name: network.double() for name, network in gan.build(config).items()}
        noise = run.generator(5)
        k = torch.randint(3, (4,), generator=noise)
        epsilon = torch.randn(4, 4, generator=noise, dtype=torch.float64)
        z = epsilon
        if prior == "mixture":
            z = torch.stack([networks["mixture"].scales[j] @ e + networks["mixture"].means[j] for j, e in zip(k, epsilon, strict=True)])
        given = batch()
        on_fake = networks["discriminator"](networks["encoder"](networks["generator"](z))).sigmoid()
        on_real = networks["discriminator"](networks["encoder"](given.real)).sigmoid()
        d_loss = F.binary_cross_entropy(on_real, torch.ones_like(on_real)) + F.binary_cross_entropy(on_fake, torch.zeros_like(on_fake))
        g_loss = (1 - on_fake).log().mean() if saturating else F.binary_cross_entropy(on_fake, torch.ones_like(on_fake))
        mine = gan.players(networks)
        expected = {"discriminator": torch.autograd.grad(d_loss, mine["discriminator"], retain_graph=True)}
        expected["generator"] = torch.autograd.grad(g_loss, mine["generator"])
        before = {player: [p.detach().clone() for p in parameters] for player, parameters in mine.items()}
        optimizers = {player: torch.optim.SGD(parameters, lr=0.1) for player, parameters in mine.items()}
        terms = gan.train_step(networks, optimizers, given, config)
        torch.testing.assert_close((terms["d_loss"], terms["g_loss"]), (d_loss, g_loss))
        for player, parameters in mine.items():
            for old, new, gradient in zip(before[player], parameters, expected[player], strict=True):
                torch.testing.assert_close(new.detach(), old - 0.1 * gradient)


@pytest.mark.parametrize("switches", [{}, {"classifier": "standalone"}, {"microbatch": 2}, {"information_moves": "all"}], ids=str)
def test_bf16_gives_nearly_the_same_gradients(switches):
    config = small(**switches)
    networks = {name: network.float() for name, network in built(config).items()}
    found = [train.gradients(networks, train.Batch(batch().real.float(), run.generator(5)), config, p)[0] for p in ("fp32", "bf16")]
    for player in found[0]:
        exact, rough = (torch.cat([g.flatten() for g in given[player]]) for given in found)
        assert exact.dtype == rough.dtype == torch.float32 and not torch.equal(exact, rough)
        assert F.cosine_similarity(exact, rough, dim=0) > 0.99


def backward_operations(config) -> int:
    networks = built(config)
    with Counter() as counter:
        train.gradients(networks, batch(), config)
    return counter.total


def test_nothing_is_computed_and_thrown_away():
    whole = backward_operations(small())
    assert backward_operations(small(microbatch=1)) == whole  # the real images go through once, not once a part
    assert backward_operations(small(information_moves="all")) > 1.02 * whole  # the information's way back to the fakes
    about = train.operations(small(epochs=1), train, 4)
    assert whole == pytest.approx(about, rel=0.06)


def test_the_cost_of_the_published_runs():
    for name, n, cost in (("mnist", 60_000, 7e16), ("flowers10", 100, 3e16)):
        assert train.operations(run.experiment_config("gan_responsibility", name), train, n) == pytest.approx(cost, rel=0.03)


# ----------------------------------------------------------------------------------------------------------- evaluation


def test_accuracy_and_weights_of_perfect_responsibilities():
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    alpha = F.one_hot((labels + 1) % 3, 3).float()  # right, but for the names of the Gaussians
    assert train.clustering(alpha, labels, 3) == {"nmi": pytest.approx(1), "accuracy": 1}
    found = evaluation.mode_weights_against_classes(alpha, labels)
    assert max(found["weight_error"], found["weight_error_hard"]) < 1e-7 and found["weight_error_uniform"] == pytest.approx(1 / 6)
    for what in ("weight", "frequency"):
        assert [found[f"{what}_of_{k}"] for k in range(3)] == pytest.approx([1 / 3, 1 / 2, 1 / 6])
    nothing = evaluation.mode_weights_against_classes(torch.full((6, 3), 1 / 3), labels)
    assert [nothing[f"weight_error{s}"] for s in ("", "_uniform")] == pytest.approx([1 / 6, 1 / 6], abs=1e-6)
    leaning = alpha * 0.4 + 0.2  # argmax is right, the means are not
    found = evaluation.mode_weights_against_classes(leaning, labels)
    assert found["weight_error_hard"] == pytest.approx(0) and found["weight_error"] == pytest.approx(0.6 / 6, abs=1e-6)


def test_what_c_learned_pairs_images_with_their_own_labels(monkeypatch):
    g = torch.Generator().manual_seed(0)
    labels = torch.cat([torch.arange(10), torch.randint(10, (20,), generator=g)])
    images = (20 * labels).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)
    data = Dataset("digits", images, labels, images.flip(0), labels.flip(0), tuple("0123456789"), "0" * 16, True)
    monkeypatch.setattr(evaluation.Trained, "responsibilities", lambda self, x: F.one_hot(x[:, 0, 0, 0].long() // 20, 10).float())
    found = evaluation.what_c_learned(evaluation.Trained(run.experiment_config("gan_responsibility", "digits"), train, {}, {}), data)
    assert found["accuracy"] == found["accuracy_train"] == 1 and found["weight_error"] == pytest.approx(0)
    assert found["alpha_entropy"] == 0 and 0.8 < found["alpha_information"] <= 1


def test_information_share():
    assert model.information_share(torch.tensor([[0.5, 0.5, 0.0]]).expand(7, 3)).item() == pytest.approx(0, abs=1e-7)
    assert model.information_share(torch.full((4, 5), 0.2)).item() == pytest.approx(0, abs=1e-6)
    assert model.information_share(torch.eye(5)).item() == pytest.approx(1)
    mixed = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]])  # which half: one bit of two
    assert model.information_share(mixed).item() == pytest.approx(0.5)


def test_the_way_from_one_gaussian_to_the_next():
    weights = evaluation.from_one_to_the_next(3).view(3, evaluation.STEPS, 3)
    assert torch.equal(weights[:, 0], torch.eye(3)) and torch.equal(weights[:, -1], torch.eye(3).roll(-1, 0))
    torch.testing.assert_close(weights[1, 4], torch.tensor([0, 0.5, 0.5]))
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, evaluation.STEPS))


def test_the_same_noise_is_the_same():
    config = run.experiment_config("gan_responsibility", "digits", {"n_components": 2, "latent_dim": 3})
    networks = {name: network.eval() for name, network in train.build(config).items()}
    trained = evaluation.Trained(config, train, networks, {})
    same = trained.sample(torch.eye(2)[[0, 0, 1]], same_noise=True)
    torch.testing.assert_close(same[0], same[1])
    assert (same[0] - same[2]).abs().max() > 1e-4
    other = trained.sample(torch.eye(2)[[0, 0]])
    assert (other[0] - other[1]).abs().max() > 1e-4 and 0 <= other.min() and other.max() <= 1


def test_the_whole_mixture_is_sampled_by_the_mean_responsibilities(monkeypatch):
    config = run.experiment_config("gan_responsibility", "digits", {"n_components": 3, "latent_dim": 2})
    alpha = torch.tensor([[0.9, 0.1, 0.0], [0.5, 0.1, 0.4]])
    monkeypatch.setattr(train, "all_responsibilities", lambda *_: alpha)
    weights = train.mode_weights(train, {}, config, None)
    torch.testing.assert_close(weights, torch.tensor([0.7, 0.1, 0.2]))
    asked = []
    monkeypatch.setattr(train, "sampled", lambda s, n, c, w, noise: asked.append(w) or torch.zeros(len(w), 1, 28, 28))
    made = train.drawn_from(train, {}, config, weights, 5000, 0)
    torch.testing.assert_close(asked[0].mean(0), weights, atol=0.03, rtol=0)
    assert made.dtype == torch.uint8 and set(made.unique().tolist()) == {128}
    assert train.as_input(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


def test_the_layers_between():
    """What shapes do not show: activations and their slope, the range of G, the initial weights, the optimisers."""
    networks = train.build(run.experiment_config("gan_responsibility", "digits"))
    assert {m.negative_slope for network in networks.values() for m in network.modules() if isinstance(m, torch.nn.LeakyReLU)} == {0.3}
    made = networks["generator"](50 * torch.randn(8, 100))
    assert made.min() >= -1 and made.max() <= 1 and isinstance(networks["generator"][-1], torch.nn.Tanh)
    for network in networks.values():
        for m in network.modules():
            if isinstance(m, torch.nn.Linear | torch.nn.Conv2d | torch.nn.ConvTranspose2d):
                fan_in, fan_out = torch.nn.init._calculate_fan_in_and_fan_out(m.weight)
                bound = math.sqrt(6 / (fan_in + fan_out))  # Glorot's uniform
                assert 0.9 * bound < m.weight.abs().max() <= bound + 1e-6
                assert m.bias is None or m.bias.abs().max() == 0


def test_the_optimisers_and_the_collapse_in_a_run(tiny, tmp_path, monkeypatch, capsys):
    seen = []

    def step(networks, optimizers, *_):
        seen.append({name: (o.param_groups[0]["lr"], o.param_groups[0]["betas"]) for name, o in optimizers.items()})
        values = {"d_loss": 1.0, "alpha_entropy": 1.0, "alpha_information": 0.0, "largest_weight": 0.1}
        return {name: torch.tensor(value) for name, value in values.items()}

    monkeypatch.setattr(train, "train_step", step)
    config = run.experiment_config("gan_responsibility", "digits", {"epochs": 1, "batch": 2, "learning_rate": 0.003, "beta1": 0.25})
    train.train(config, run.Options("digits", runs=tmp_path, device="cpu"))
    assert seen[0] == {player: (0.003, (0.25, 0.999)) for player in ("discriminator", "generator", "classifier")}
    assert "epoch 1: α is still nearly the same for every image" in capsys.readouterr().out


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
    assert found == (pytest.approx(theirs["inception_score_mean"], rel=1e-5), pytest.approx(theirs["inception_score_std"], rel=1e-4))


def test_a_collapse_is_said(capsys):
    def said(*rows: tuple[float, float]) -> str:
        named = [{"epoch": i + 1, "alpha_entropy": 0.5, "alpha_information": a, "largest_weight": b} for i, (a, b) in enumerate(rows)]
        train.say_if_collapsed(named, 10)
        return capsys.readouterr().out

    assert said((0.3, 0.4)) == ""
    assert "epoch 2: α is still nearly the same for every image" in said((0.001, 0.1), (0.002, 0.5))
    assert "epoch 3: α is nearly the same again for every image" in said((0.001, 0.1), (0.2, 0.1), (0.002, 0.5))
    assert "epoch 1: α has collapsed: of training images 99.5 % of its mass on one Gaussian" in said((0.0, 0.995))
    # MNIST, seed 0, epoch 2: 78 % over the training batches, and one Gaussian for every test image
    last = {"epoch": 2, "alpha_entropy": 0.24, "alpha_information": 0.01007, "largest_weight": 0.78}
    train.say_if_collapsed([last | {"test_alpha_information": 0.0016, "test_largest_weight": 0.992, "test_alpha_entropy": 0.02}], 10)
    assert "epoch 2: α has collapsed: of test images 99.2 % of its mass on one Gaussian" in capsys.readouterr().out
    train.say_if_collapsed([last | {"test_alpha_information": 0.002, "test_largest_weight": 0.8, "test_alpha_entropy": 0.3}], 10)
    assert "of test images k tells 0.20 % of log 10, entropy 30.0 %" in capsys.readouterr().out
    train.say_if_collapsed([{"epoch": 4, "d_loss": 1.0}], 10)  # a baseline has none
    assert capsys.readouterr().out == ""


# --------------------------------------------------------------------------------------------- experiments, end to end


@pytest.fixture
def tiny(monkeypatch):
    """A few images under every data set's name, and no Inception weights."""

    def make(name: str, *_) -> Dataset:
        g = torch.Generator().manual_seed(0)  # the same images each time
        labels = torch.arange(4)
        images = torch.randint(0, 256, (4, *train.SETS[name][0]), dtype=torch.uint8, generator=g)
        return Dataset(name, images, labels, images, labels, tuple("abcdefghij"), "0" * 16, False)

    monkeypatch.setattr(train, "load", make)
    monkeypatch.setattr(evaluation, "load", make)
    monkeypatch.setattr(scores, "load", make)
    monkeypatch.setattr(scores.inception, "find_weights", lambda _: (None, "none in this test"))


@pytest.mark.parametrize("experiment", run.experiments("gan_responsibility"))
def test_two_steps_of_every_experiment_and_its_evaluation(experiment, tiny, tmp_path, capsys):
    config = run.experiment_config("gan_responsibility", experiment, {"epochs": 1, "batch": 2, "latent_dim": 5})
    options = run.Options(experiment, runs=tmp_path, device="cpu", unofficial_data=True)
    folder = train.train(config, options)
    result = evaluation.evaluate(options)
    assert "operations for 1 epochs" in capsys.readouterr().out
    assert result == json.loads((folder / "eval.json").read_text()) and all(math.isfinite(v) for v in result["metrics"].values())
    assert "parameters" in result["metrics"]
    pictures = {path.stem for path in (folder / "figures").glob("*.png")}
    baseline = experiment in ("flowers10-gan", "flowers10-gmgan")
    assert ("accuracy" in result["metrics"]) == ("weight_error" in result["metrics"]) == (not baseline)
    assert pictures == {"training", "samples"} | ({"interpolations", "triangle"} if experiment != "flowers10-gan" else set())
    row = torch.load(folder / "checkpoint.pt", weights_only=True)["rows"][0]
    shown = {"alpha_entropy", "alpha_information", "largest_weight", "accuracy", "nmi", "test_alpha_information", "test_largest_weight"}
    assert baseline or shown <= row.keys()
    train.train(config, options)  # complete
    assert "operations" not in capsys.readouterr().out


def test_table_6_with_weights(tiny, tmp_path, monkeypatch, capsys):
    """The scores while training and after it, with a stand-in for the Inception network."""
    g = torch.Generator().manual_seed(0)
    monkeypatch.setattr(scores, "SAMPLES", 40)
    monkeypatch.setattr(train, "SAMPLES", 40)
    named = []
    monkeypatch.setattr(scores.inception, "find_weights", lambda path: (named.append(path) or tmp_path, ""))
    monkeypatch.setattr(scores.inception, "extractor", lambda *_: "network")
    projection, looked_at = torch.randn(3 * 64 * 64, 6, generator=g), []

    def outputs(network, images):
        looked_at.append(images)
        found = images.flatten(1).float() @ projection / 255
        return found, found

    monkeypatch.setattr(scores.inception, "outputs", outputs)
    monkeypatch.setattr(scores.inception, "features", lambda network, images: outputs(network, images)[0])
    whole = torch.randint(0, 256, (14, 3, 64, 64), dtype=torch.uint8, generator=g)
    few = scores.load("flowers10_all")
    monkeypatch.setattr(scores, "load", lambda name, *_: dataclasses.replace(few, train_images=whole, train_labels=torch.arange(14) % 10))
    config = run.experiment_config("gan_responsibility", "flowers10", {"epochs": 2, "batch": 4, "latent_dim": 5, "score_every": 1})
    options = run.Options("flowers10", runs=tmp_path, device="cpu", unofficial_data=True, inception=tmp_path / "weights.pth")
    folder = train.train(config, options)
    assert named == [tmp_path / "weights.pth"]
    assert "and 9.1e+11 for their scores" in capsys.readouterr().out  # 2 · 40 · 1.14e10
    rows = torch.load(folder / "checkpoint.pt", weights_only=True)["rows"]
    result = evaluation.evaluate(options)
    metrics, best = result["metrics"], max(rows, key=lambda row: row["inception_score"])
    assert result["provenance"]["inception"] == scores.JUDGE
    assert metrics["fid_best"] == min(row["fid"] for row in rows) and metrics["fid"] == pytest.approx(rows[-1]["fid"], rel=1e-4)
    assert metrics["inception_score_best"] == best["inception_score"]
    assert metrics["inception_score_best_deviation"] == best["inception_score_deviation"]
    assert [metrics[f"fid_after_{epoch}"] for epoch in (1, 2)] == [row["fid"] for row in rows]
    drawn = []
    monkeypatch.setattr(plots, "save_error_curves", lambda panels, *_: drawn.append(panels))
    assert figures.figure_4({"flowers10": [metrics], "flowers10-gan": [{"parameters": 1.0}]}, tmp_path / "figure-4.png")
    ((label, (epochs, curve, _)),) = drawn[0]["FID"].items()
    assert epochs == [1, 2] and curve == [row["fid"] for row in rows]
    assert label == f"encoder shared (1 seed): best {min(curve):.4g}, last {curve[-1]:.4g}"
    assert sorted(len(images) for images in looked_at) == [4, 4, 14, 14, 40, 40, 40]  # training and all are cached but for the halves

    def distance(a, b):
        return scores.frechet_distance(*(scores.moments(images.flatten(1).float() @ projection / 255) for images in (a, b)))

    made = next(images for images in looked_at[::-1] if len(images) == 40)
    assert metrics["fid_all"] == pytest.approx(distance(made, whole), rel=1e-4)
    assert metrics["fid"] == pytest.approx(distance(made, few.train_images), rel=1e-4)
    assert metrics["fid_real"] == pytest.approx(distance(few.train_images, few.test_images), abs=1e-3)
    halves = whole[torch.randperm(14, generator=run.generator(0, "halves"))]
    assert metrics["fid_halves"] == pytest.approx(distance(halves[:7], halves[7:]), rel=1e-4) and metrics["fid_halves"] > 0


def test_figure_4_without_scores_says_what_to_do(tmp_path, capsys):
    code, _, err = call(figures.main, "--runs", tmp_path, capsys=capsys)
    assert code == 2 and "Inception weights" in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_folder_of_one_class_makes_no_mixture(tmp_path, capsys):
    (tmp_path / "own" / "one").mkdir(parents=True)
    for i in range(6):
        Image.new("L", (28, 28), 40 * i).save(tmp_path / "own" / "one" / f"{i}.png")
    arguments = ["digits", "--dataset", f"folder:{tmp_path / 'own'}", "--n-components", "null", "--batch", "2", "--runs", tmp_path / "runs"]
    code, _, err = call(train.main, *arguments, capsys=capsys)
    assert code == 2 and "has one class" in err and err.count("\n") == 1


def test_microbatch_is_refused_where_it_would_change_the_arithmetic(tmp_path, capsys):
    arguments = ["digits", "--networks", "as_printed", "--microbatch", "4", "--runs", tmp_path]
    code, _, err = call(train.main, *arguments, capsys=capsys)
    assert code == 2 and "normalises over the batch" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["digits", "--batch", "1"], "out of range; allowed: >= 2"),
        (["digits", "--batch", "2000"], "is more than the 1437 training images"),
        (["digits", "--n-components", "0"], "out of range"),
        (["digits", "--n-components", "1"], "out of range; allowed: >= 2"),
        (["digits", "--target", "beta"], "not one of alpha, component"),
        (["digits", "--dataset", "svhn"], "is not one of"),
        (["flowers10-gan", "--target", "alpha"], "flowers10-gan has no such value"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, tmp_path, capsys):
    code, _, err = call(train.main, *arguments, "--runs", tmp_path, capsys=capsys)
    assert code == 2 and message in err and err.count("\n") == 1


def test_a_run_that_was_cut_in_two_ends_with_the_same_bits(tiny, tmp_path):
    config = run.experiment_config("gan_responsibility", "digits", {"epochs": 2, "batch": 2, "latent_dim": 4, "networks": "as_printed"})
    whole = train.train(config, run.Options("digits", runs=tmp_path / "whole", device="cpu"))
    options = run.Options("digits", runs=tmp_path / "parts", device="cpu")
    train.train(dataclasses.replace(config, epochs=1), options)
    parts = train.train(config, options)
    first, second = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, parts))
    for name, tensors in first["networks"].items():
        for key, value in tensors.items():
            assert torch.equal(value, second["networks"][name][key]), f"{name}.{key}"


def test_microbatch_may_change_from_one_session_to_the_next(tiny, tmp_path):
    config = run.experiment_config("gan_responsibility", "digits", {"epochs": 1, "batch": 4, "latent_dim": 4})
    options = run.Options("digits", runs=tmp_path, device="cpu")
    train.train(config, options)
    more = dataclasses.replace(config, epochs=2, microbatch=2)
    train.train(more, options)
    assert run.config_hash(config) == run.config_hash(more)


def test_the_command_line(tmp_path):
    """The real one, once."""
    where = ["digits", "--runs", tmp_path, "--threads", "1", "--data", tmp_path]
    code, out, err = run_command("gan_responsibility.train", *where, "--epochs", "1", "--batch", "480", "--n-components", "2")
    assert code == 0 and "trained 1 epochs" in out, err
    code, out, err = run_command("gan_responsibility.eval", *where)
    assert code == 0 and "alpha_entropy" in out, err
    code, out, err = run_command("common.diff", "show", "gan_responsibility", "--runs", tmp_path)
    assert code == 0 and "another config" in out, err


# ------------------------------------------------------------------------------------------------------- published.yaml


def test_published_yaml_is_table_6_each_number_once():
    entries = diff.published("gan_responsibility").entries
    found = {(e.experiment, e.metric): (e.value, e.spread) for e in entries}
    expected = {}
    for experiment, (parameters, score, distance) in TABLE_6.items():
        expected[experiment, "parameters_as_counted"] = (parameters, None)
        expected[experiment, "inception_score_best"] = score
        expected[experiment, "fid_best"] = distance
    assert found == expected and len(entries) == 12 == len({e.id for e in entries})


def test_the_diff_counts_parameters_without_a_run():
    rows = {row[2]: row for row in diff.table("gan_responsibility", None) if row[0] == "Table 6, number of parameters"}
    assert all(row[-1] == "match" for row in rows.values()) and len(rows) == 4
    explained = "13,005,411 (counted as there: 12,687,971 as built, its head's 10,250 exchanged for the shared one's 327,690)"
    assert explained in rows["flowers10-standalone"]
