"""M1+M2 and ADGM: their bounds against independent computations, their networks, and every experiment's way through training and eval."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Independent, Normal, kl_divergence

from common import classifier, run
from common.data import Dataset
from segma import adgm, m1m2, model, train
from segma.eval import Trained, evaluate, load_run
from segma.train import Batch
from tests.conftest import run_command

PIXELS = 4


def small(module, std: float = 0.6, **values):
    """A tiny baseline of random weights in float64, on 1×2×2 images and 3 classes, with its config."""

    class Config(module.Config):
        image_shape = (1, 2, 2)

    config = Config(n_components=3, hidden_dim=5, latent_dim=2, **values)
    torch.manual_seed(4)
    networks = {name: network.double() for name, network in module.build(config).items()}
    with torch.no_grad():
        for network in networks.values():
            for p in network.parameters():
                p.normal_(std=std)
    return networks, config


def gaussian(output):
    mean, log_variance = output
    return Independent(Normal(mean, (log_variance / 2).exp()), 1)


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch_of(networks, n: int, m: int, seed: int = 0, m1_alone: bool = False) -> Batch:
    g = noise(seed)
    x = torch.rand(n + m, 1, 2, 2, generator=g, dtype=torch.float64).round()
    return Batch(x[:n], x[n:], torch.randint(3, (m,), generator=g), m1_alone, noise(seed + 1))


# ------------------------------------------------------------------------------------------------- the densities they share


def test_densities_are_those_of_torch_distributions():
    g = noise()
    mean, log_variance, x = torch.randn(3, 6, 4, generator=g, dtype=torch.float64)
    q, standard = gaussian((mean, log_variance)), Independent(Normal(torch.zeros_like(mean), 1.0), 1)
    torch.testing.assert_close(m1m2.log_normal(x, mean, log_variance), q.log_prob(x))
    torch.testing.assert_close(m1m2.kl_from_standard(mean, log_variance), kl_divergence(q, standard))
    bits = torch.bernoulli(torch.full_like(x, 0.5), generator=g)
    torch.testing.assert_close(m1m2.log_likelihood(bits, x, "bernoulli"), Independent(Bernoulli(logits=x), 1).log_prob(bits))
    torch.testing.assert_close(m1m2.log_likelihood(bits, x, "gaussian"), Independent(Normal(x.sigmoid(), 1.0), 1).log_prob(bits))
    drawn = m1m2.draw(mean.expand(20000, -1, -1), log_variance.expand(20000, -1, -1), noise())
    torch.testing.assert_close(drawn.mean(0), mean, atol=0.1, rtol=0)
    torch.testing.assert_close(drawn.var(0).log(), log_variance, atol=0.1, rtol=0)


@pytest.mark.parametrize("module", [m1m2, adgm])
def test_the_open_repositorys_variances_are_at_least_one(module):
    config = module.Config(posterior_variance="at_least_one")
    raw = torch.linspace(-50, 50, 101)
    assert m1m2.spread(raw, config).min() >= 0 and m1m2.spread(raw, module.Config()).min() == -50


# ------------------------------------------------------------------------------------------------------------------- M1+M2


def test_m1_bound_lies_below_the_log_likelihood_by_the_kl():
    networks, config = small(m1m2, m1_latent_dim=2, m1_hidden_dim=5, m1_hidden_layers=1)
    x = torch.tensor([1.0, 0, 1, 1], dtype=torch.float64).view(1, 1, 2, 2)
    bound = m1m2.m1_bound(networks, x.expand(40000, -1, -1, -1), config, noise()).mean().item()
    # log p(x) by samples of the prior, and by importance sampling from q: two ways that share nothing but p(x|z1).
    z = torch.randn(400_000, 2, generator=noise(1), dtype=torch.float64)

    def log_p(z1):
        logits = networks["p_x"](z1).flatten(1)
        return Independent(Bernoulli(logits=logits), 1).log_prob(x.flatten())

    by_prior = log_p(z).logsumexp(0).item() - math.log(len(z))
    q = gaussian(networks["q_z1"](networks["features"](x)))
    z = q.sample((400_000,))[:, 0]
    log_w = log_p(z) + Independent(Normal(torch.zeros_like(z), 1.0), 1).log_prob(z) - q.log_prob(z[:, None]).squeeze()
    assert log_w.logsumexp(0).item() - math.log(len(z)) == pytest.approx(by_prior, abs=0.01)
    assert log_w.mean().item() == pytest.approx(bound, abs=0.02)
    assert bound < by_prior - 0.05


def test_m2_bounds_lie_below_the_log_likelihoods():
    networks, config = small(m1m2, m1_latent_dim=2, m1_hidden_dim=5, m1_hidden_layers=1)
    z1 = torch.tensor([[0.7, -0.4]], dtype=torch.float64)
    z2 = torch.randn(400_000, 2, generator=noise(1), dtype=torch.float64)
    log_p = []  # log p(z1, y) for each class, by samples of the prior
    for k in range(3):
        y = torch.eye(3, dtype=torch.float64)[[k]]
        log_p.append(gaussian(networks["p_z1"](z2, y)).log_prob(z1).logsumexp(0).item() - math.log(len(z2)) - math.log(3))
        bound = m1m2.labelled_bound(networks, z1.expand(40000, 2), y, config, noise()).mean().item()
        assert bound < log_p[-1] + 0.01
    marginal = math.log(sum(math.exp(v) for v in log_p))
    bound = m1m2.unlabelled_bound(networks, z1.expand(40000, 2), config, noise()).mean().item()
    assert bound < marginal - 0.01


def test_m2_sums_over_every_class(monkeypatch):
    networks, config = small(m1m2, m1_latent_dim=2, m1_hidden_dim=5, m1_hidden_layers=1)
    monkeypatch.setattr(m1m2, "draw", lambda mean, log_variance, noise: mean)  # so that both ways see the same codes
    z1 = torch.randn(7, 2, dtype=torch.float64)
    found = m1m2.unlabelled_bound(networks, z1, config, noise())
    q = networks["q_y"](z1).softmax(1)
    for i in range(7):
        explicit = Categorical(q[i]).entropy()
        for k in range(3):
            y = torch.eye(3, dtype=torch.float64)[k]
            mean, log_variance = networks["q_z2"](z1[i], y)
            one = gaussian(networks["p_z1"](mean, y)).log_prob(z1[i]) - math.log(3)
            one = one - kl_divergence(gaussian((mean, log_variance)), Independent(Normal(torch.zeros_like(mean), 1.0), 1))
            explicit = explicit + q[i, k] * one
        assert found[i].item() == pytest.approx(explicit.item(), rel=1e-9)


def test_m2_by_hand():
    """Constant networks: every term is a number that can be written down."""
    networks, config = small(m1m2, m1_latent_dim=2, m1_hidden_dim=5, m1_hidden_layers=1)
    with torch.no_grad():
        for network in networks.values():
            for p in network.parameters():
                p.zero_()
        networks["q_z2"].heads[0].bias.copy_(torch.tensor([1.0, 0.0]))  # KL = 1/2
        networks["q_y"].heads[0].bias.copy_(torch.tensor([math.log(2), 0.0, 0.0], dtype=torch.float64))  # q = 1/2, 1/4, 1/4
    z1 = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    log_normal = -math.log(2 * math.pi) - (1 + 4) / 2
    labelled = log_normal - math.log(3) - 0.5
    y = torch.eye(3, dtype=torch.float64)[[0]]
    assert m1m2.labelled_bound(networks, z1, y, config, noise()).item() == pytest.approx(labelled, rel=1e-12)
    entropy = 0.5 * math.log(2) + 0.5 * math.log(4)
    assert m1m2.unlabelled_bound(networks, z1, config, noise()).item() == pytest.approx(labelled + entropy, rel=1e-12)


def test_m1_is_trained_first_and_then_left_alone():
    networks, config = small(m1m2, m1_latent_dim=2, m1_hidden_dim=5, m1_hidden_layers=1, labelled_weight=0.3)
    optimizer = torch.optim.Adam([p for network in networks.values() for p in network.parameters()], lr=0.01)

    def moved(m1_alone: bool) -> set[str]:
        before = {name: [p.clone() for p in network.parameters()] for name, network in networks.items()}
        m1m2.train_step(networks, optimizer, batch_of(networks, 6, 4, m1_alone=m1_alone), config)
        return {
            name
            for name, network in networks.items()
            if any((a != b).any() for a, b in zip(before[name], network.parameters(), strict=True))
        }

    assert moved(True) == {"q_z1", "p_x"}
    assert moved(False) == {"q_y", "q_z2", "p_z1"}
    terms = m1m2.train_step(networks, optimizer, batch_of(networks, 6, 4), config)
    whole = -terms["unlabelled_bound"] - 0.3 * terms["labelled_bound"] + 0.1 * terms["cross_entropy"]
    assert terms["loss"].item() == pytest.approx(whole.item())


# -------------------------------------------------------------------------------------------------------------------- ADGM


def adgm_bound(networks, config, x, y, samples: int) -> float:
    h = networks["features"](x)
    q_a = gaussian(networks["q_a"](h))
    a = m1m2.draw(*(t.expand(samples, -1) for t in networks["q_a"](h)), noise())
    return adgm.labelled_bound(networks, x.flatten(1), h, a, q_a.log_prob(a), y, config, noise(2)).mean().item()


def test_adgm_bound_lies_below_the_log_likelihood():
    networks, config = small(adgm, std=0.4, auxiliary_dim=2)  # milder weights: importance sampling needs q to cover the posterior
    x = torch.tensor([1.0, 0, 1, 1], dtype=torch.float64).view(1, 1, 2, 2)
    h, n = networks["features"](x), 300_000
    for k in range(3):
        y = torch.eye(3, dtype=torch.float64)[[k]]
        # log p(x, y) needs neither a nor q: the auxiliary variable leaves p(x, y, z) as it is.
        z = torch.randn(n, 2, generator=noise(1), dtype=torch.float64)
        likelihood = Independent(Bernoulli(logits=networks["p_x"](z, y)), 1)
        log_p = likelihood.log_prob(x.flatten()).logsumexp(0).item() - math.log(n) - math.log(3)
        # The same by importance sampling with every density of the model, from torch.distributions.
        q_a = gaussian(networks["q_a"](h))
        a = q_a.sample((n,))[:, 0]
        q_z = gaussian(networks["q_z"](h, a, y))
        z = q_z.sample()
        log_w = (
            Independent(Bernoulli(logits=networks["p_x"](z, y)), 1).log_prob(x.flatten())
            + Independent(Normal(torch.zeros_like(z), 1.0), 1).log_prob(z)
            - math.log(3)
            + gaussian(networks["p_a"](h, z, y)).log_prob(a)
            - q_a.log_prob(a[:, None]).squeeze()
            - q_z.log_prob(z)
        )
        assert log_w.logsumexp(0).item() - math.log(n) == pytest.approx(log_p, abs=0.05)
        bound = adgm_bound(networks, config, x, y, 100_000)
        assert bound == pytest.approx(log_w.mean().item(), abs=0.05)
        assert bound < log_p - 0.05


def test_adgm_sums_over_every_class(monkeypatch):
    networks, config = small(adgm, auxiliary_dim=2, labelled_weight=0.7, label_weight=2.0)
    for module in (m1m2, adgm):
        monkeypatch.setattr(module, "draw", lambda mean, log_variance, noise: mean)
    batch = batch_of(networks, 5, 4)
    terms = adgm.loss_terms(networks, batch, config)

    def bound(x, k: int):
        y, h = torch.eye(3, dtype=torch.float64)[[k]], networks["features"](x[None])
        a, a_log_variance = networks["q_a"](h)
        z, z_log_variance = networks["q_z"](h, a, y)
        standard = Independent(Normal(torch.zeros_like(z), 1.0), 1)
        value = Independent(Bernoulli(logits=networks["p_x"](z, y)), 1).log_prob(x.flatten()) - math.log(3)
        value = value + gaussian(networks["p_a"](h, z, y)).log_prob(a) - gaussian((a, a_log_variance)).log_prob(a)
        return (value - kl_divergence(gaussian((z, z_log_variance)), standard)).squeeze(), networks["q_y"](h, a)[0]

    unlabelled = []
    for x in batch.unlabelled:
        q = bound(x, 0)[1].softmax(0)
        unlabelled.append(Categorical(q).entropy() + sum(q[k] * bound(x, k)[0] for k in range(3)))
    labelled = [bound(x, int(k)) for x, k in zip(batch.labelled, batch.labels, strict=True)]
    cross_entropy = torch.stack([-logits.log_softmax(0)[k] for (_, logits), k in zip(labelled, batch.labels, strict=True)]).mean()
    assert terms["unlabelled_bound"].item() == pytest.approx(torch.stack(unlabelled).mean().item(), rel=1e-9)
    assert terms["labelled_bound"].item() == pytest.approx(torch.stack([v for v, _ in labelled]).mean().item(), rel=1e-9)
    assert terms["cross_entropy"].item() == pytest.approx(cross_entropy.item(), rel=1e-9)
    whole = -terms["unlabelled_bound"] - 0.7 * terms["labelled_bound"] + 2.0 * terms["cross_entropy"]
    assert terms["loss"].item() == pytest.approx(whole.item(), rel=1e-12)


def test_joined_inputs_are_one_layer_on_the_concatenation():
    torch.manual_seed(0)
    dense = m1m2.Dense([3, 2], [6, 4], [5, 1], torch.nn.ReLU())
    x, y = torch.randn(7, 1, 3), torch.randn(1, 4, 2)
    whole = torch.nn.Linear(5, 6)
    with torch.no_grad():
        whole.weight.copy_(torch.cat([layer.weight for layer in dense.inputs], 1))
        whole.bias.copy_(dense.inputs[0].bias)
    hidden = dense.hidden(whole(torch.cat([x.expand(7, 4, 3), y.expand(7, 4, 2)], -1)))
    for found, head in zip(dense(x, y), dense.heads, strict=True):
        torch.testing.assert_close(found, head(hidden))


def test_adgm_moves_codes_and_one_hots():
    networks, config = small(adgm, auxiliary_dim=2)
    networks = {name: network.float() for name, network in networks.items()}
    trained = Trained(config, adgm, networks, {})
    z = trained.encode(torch.randint(256, (6, 1, 2, 2), dtype=torch.uint8))
    assert z.shape == (6, 5) and torch.equal(z[:, 2:].sum(1), torch.ones(6)) and set(z[:, 2:].unique().tolist()) <= {0.0, 1.0}
    moved = model.transfer_style(z[[0]], trained.classify(z[[0]]), torch.tensor([2]), trained.means, 0.5)
    assert torch.equal(moved[0, :2], z[0, :2])  # the style stays
    expected = z[0, 2:] / 2
    expected[2] += 0.5
    torch.testing.assert_close(moved[0, 2:], expected)
    codes, components = trained.draw(3000, noise())
    assert torch.equal(trained.classify(codes), components)
    torch.testing.assert_close(components.bincount() / 3000, torch.full((3,), 1 / 3), atol=0.04, rtol=0)


# ---------------------------------------------------------------------------------------------------------------- networks


def dense(inputs: int, hidden: list[int], *heads: int) -> int:
    sizes = [inputs, *hidden]
    return sum(a * b + b for a, b in itertools.pairwise(sizes)) + sum(hidden[-1] * n + n for n in heads)


CONVOLUTIONS = 3 * 512 + 32 + 32 * 512 + 32 + 32 * 1024 + 64 + 64 * 1024 + 64  # 4×4 kernels: 16 weights a pair of filters
BACK = 64 * 1024 + 64 + 64 * 512 + 32 + 32 * 512 + 32 + 32 * 48 + 3
NETWORKS = {
    "svhn": {"encoder": 4_905_446, "decoder": 4_908_498, "mixture": 200},
    "celeba": {"encoder": 1_565_832, "decoder": 1_566_763, "mixture": 128},
    "mnist-cwae": {"encoder": 1_863_690, "decoder": 1_864_464, "mixture": 10},
    "mnist-m1m2": {"features": 0, "q_z1": dense(784, [500, 500], 50, 50), "p_x": dense(50, [500, 500], 784), "q_y": dense(50, [300], 10),
                   "q_z2": dense(60, [300], 50, 50), "p_z1": dense(60, [300], 50, 50)},
    "svhn-m1m2": {"features": 0, "q_z1": dense(3072, [500, 500], 300, 300), "p_x": dense(300, [500, 500], 3072),
                  "q_y": dense(300, [500], 10), "q_z2": dense(310, [500], 50, 50), "p_z1": dense(60, [500], 300, 300)},
    "celeba-m1m2": {"features": CONVOLUTIONS, "q_z1": dense(1024, [300], 300, 300), "p_x": dense(300, [300], 1024) + BACK,
                    "q_y": dense(300, [300], 4), "q_z2": dense(304, [300], 50, 50), "p_z1": dense(54, [300], 300, 300)},
    "mnist-adgm": {"features": 0, "q_a": dense(784, [500, 500], 100, 100), "q_y": dense(884, [500, 500], 10),
                   "q_z": dense(894, [500, 500], 100, 100), "p_a": dense(894, [500, 500], 100, 100),
                   "p_x": dense(110, [500, 500], 784), "images": 0},
    "svhn-adgm": {"features": 0, "q_a": dense(3072, [500, 500], 300, 300), "q_y": dense(3372, [500, 500], 10),
                  "q_z": dense(3382, [500, 500], 300, 300), "p_a": dense(3382, [500, 500], 300, 300),
                  "p_x": dense(310, [500, 500], 3072), "images": 0},
    "celeba-adgm": {"features": CONVOLUTIONS, "q_a": dense(1024, [500, 500], 300, 300), "q_y": dense(1324, [500, 500], 4),
                    "q_z": dense(1328, [500, 500], 300, 300), "p_a": dense(1328, [500, 500], 300, 300),
                    "p_x": dense(304, [500, 500], 1024), "images": BACK},
}  # fmt: skip


@pytest.mark.parametrize("experiment", NETWORKS)
def test_parameter_counts(experiment):
    config = run.experiment_config("segma", experiment)
    networks = train.system_of(dataclasses.asdict(config)).build(config)
    assert {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()} == NETWORKS[experiment]


def test_describe_traces_every_network_of_a_baseline():
    code, out, err = run_command("segma.train", "celeba-adgm", "--describe", "--json", "--data", "/nowhere")
    assert code == 0, err
    networks = json.loads(out)["networks"]
    assert [layer["output"] for layer in networks["features"]["layers"] if layer["layer"] == "Conv2d"] == [
        [32, 32, 32], [32, 16, 16], [64, 8, 8], [64, 4, 4]]  # fmt: skip
    assert [layer["output"] for layer in networks["images"]["layers"] if layer["layer"] == "ConvTranspose2d"] == [
        [64, 8, 8], [32, 16, 16], [32, 32, 32], [3, 64, 64]]  # fmt: skip


def test_the_decoder_with_the_papers_four_layers():
    config = run.experiment_config("segma", "svhn", {"decoder_layers": 4})
    assert sum(p.numel() for p in model.build(config)["decoder"].parameters()) == 4_289_916


# --------------------------------------------------------------------------------------------- every experiment, two steps


def made_up(config) -> Dataset:
    """A data set of the shape that the experiment wants, of two batches."""
    g = noise()
    classes = config.n_components if config.n_components not in (None, 1) else 10 if config.image_shape[1] != 64 else 4
    n = 2 * max(config.batch_unlabelled, config.n_labels)
    images = torch.randint(256, (n + 220, *config.image_shape), dtype=torch.uint8, generator=g)
    labels = torch.arange(n + 220) % classes
    names = tuple(map(str, range(10))) if classes == 10 else tuple("abcd")
    return Dataset(config.dataset.partition(":")[0], images[:n], labels[:n], images[n:], labels[n:], names, "0" * 16, False)


@pytest.mark.parametrize("experiment", run.experiments("segma"))
def test_every_experiment_trains_two_steps_and_evaluates(experiment, tmp_path, monkeypatch):
    config = run.experiment_config("segma", experiment)
    changed = {"epochs": 1, "batch_unlabelled": min(config.batch_unlabelled, 100), "n_labels": 50}
    config = dataclasses.replace(config, **changed) if not hasattr(config, "m1_epochs") else dataclasses.replace(
        config, **{**changed, "epochs": 2}, m1_epochs=1)  # fmt: skip
    data = made_up(config)
    monkeypatch.setattr(train, "load", lambda *a: data)
    monkeypatch.setattr("segma.eval.load", lambda *a: data)
    monkeypatch.setattr("segma.eval.FID_SAMPLES", 200)
    random_network = classifier.network(config.image_shape, data.n_classes).eval()
    monkeypatch.setattr(classifier, "trained", lambda data, cache, device: (random_network, 10.0))
    options = run.Options(experiment, runs=tmp_path)
    folder = train.train(config, options)
    rows = load_run(folder).state["rows"]
    assert len(rows) == (2 if hasattr(config, "m1_epochs") else 1) and (folder / "samples").is_dir()
    result = evaluate(options)
    labelled = "cwae" not in experiment and "unsupervised" not in experiment
    assert ("test_error" in result["metrics"]) == ("samples_of_their_class" in result["metrics"]) == labelled
    assert ("component_purity" in result["metrics"]) == (not labelled)
    assert {"fid_classifier", "fid_classifier_interpolation", "reconstruction_error"} <= result["metrics"].keys()
    pictures = {path.stem for path in (folder / "figures").glob("*.png")}
    assert {"samples", "interpolations", "training"} <= pictures
    assert ("style_transfer" in pictures) == labelled
    assert ("closed_form" in pictures) == (not experiment.endswith(("adgm", "m1m2")))


# ----------------------------------------------------------------------------------------- gradients, switches, interruptions


def by_hand(networks, batch: Batch, config, labels: torch.Tensor | None = None):
    """ADGM's objective on one batch, image by image and class by class, from the same stream of noise as `loss_terms`."""
    g = batch.noise
    images = torch.cat([batch.unlabelled, batch.labelled])
    if config.binarise:
        images = torch.bernoulli(images, generator=g)
    n, m, k, double = len(batch.unlabelled), len(batch.labelled), 3, torch.float64
    floor = torch.nn.functional.softplus if config.posterior_variance == "at_least_one" else lambda x: x
    h = images.flatten(1)
    a_mean, a_log_variance = networks["q_a"](h)
    a_log_variance = floor(a_log_variance)
    a = a_mean + (a_log_variance / 2).exp() * torch.randn(n + m, 2, generator=g, dtype=double)
    eps_u, eps_l = torch.randn(n, k, 2, generator=g, dtype=double), torch.randn(m, 2, generator=g, dtype=double)

    def bound(i: int, c: int, eps):
        y = torch.eye(k, dtype=double)[[c]]
        mean, log_variance = networks["q_z"](h[[i]], a[[i]], y)
        log_variance = floor(log_variance)
        z = mean + (log_variance / 2).exp() * eps
        p_mean, p_log_variance = networks["p_a"](h[[i]], z, y)
        value = Independent(Bernoulli(logits=networks["p_x"](z, y)), 1).log_prob(h[[i]]) - math.log(k)
        value = value + gaussian((p_mean, floor(p_log_variance))).log_prob(a[[i]])
        value = value - gaussian((a_mean[[i]], a_log_variance[[i]])).log_prob(a[[i]])
        return (value - kl_divergence(gaussian((mean, log_variance)), Independent(Normal(torch.zeros_like(mean), 1.0), 1))).squeeze()

    log_q = networks["q_y"](h, a).log_softmax(1)
    unlabelled = [sum(log_q[i, c].exp() * (bound(i, c, eps_u[i, c]) - log_q[i, c]) for c in range(k)) for i in range(n)]
    labelled = [bound(n + i, int(c), eps_l[i]) for i, c in enumerate(batch.labels)]
    cross_entropy = -torch.stack([log_q[n + i, c] for i, c in enumerate(batch.labels)]).mean()
    return -torch.stack(unlabelled).mean() - config.labelled_weight * torch.stack(labelled).mean() + config.label_weight * cross_entropy


@pytest.mark.parametrize("switches", [{}, {"posterior_variance": "at_least_one"}, {"binarise": True}], ids=str)
def test_adgm_loss_and_gradients_are_those_of_the_objective_written_out(switches):
    networks, config = small(adgm, std=0.4, auxiliary_dim=2, labelled_weight=0.7, label_weight=2.0, **switches)
    batch = batch_of(networks, 4, 3)
    batch = batch._replace(unlabelled=(0.2 + 0.6 * batch.unlabelled) if switches.get("binarise") else batch.unlabelled)
    parameters = [p for network in networks.values() for p in network.parameters()]
    found = adgm.loss_terms(networks, batch._replace(noise=noise(7)), config)["loss"]
    expected = by_hand(networks, batch._replace(noise=noise(7)), config)
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)
    gradients = [torch.autograd.grad(value, parameters) for value in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
        assert a.abs().max() > 0


@pytest.mark.parametrize("module", [m1m2, adgm])
def test_gradients_of_the_baselines_by_finite_differences(module):
    more = {"auxiliary_dim": 2} if module is adgm else {"m1_latent_dim": 2, "m1_hidden_dim": 5, "m1_hidden_layers": 1, "m1_epochs": 1}
    networks, config = small(module, **more, learning_rate=1e-3, grad_clip_norm=None, grad_clip_value=None, labelled_weight=0.7)
    parameters = [p for network in networks.values() for p in network.parameters()]
    for m1_alone in (True, False):  # M1, then M2; ADGM has one phase
        batch = batch_of(networks, 4, 3, m1_alone=m1_alone)
        optimizer = torch.optim.SGD(parameters, lr=0.0)

        def loss(batch=batch, optimizer=optimizer) -> float:
            return module.train_step(networks, optimizer, batch._replace(noise=noise(5)), config)["loss"].item()

        loss()
        gradients = [None if p.grad is None else p.grad.clone() for p in parameters]
        checked = 0
        for p, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                continue
            index, flat = p.numel() // 2, p.data.view(-1)
            value, step = flat[index].item(), 1e-5
            flat[index] = value + step
            up = loss()
            flat[index] = value - step
            down = loss()
            flat[index] = value
            assert gradient.view(-1)[index].item() == pytest.approx((up - down) / (2 * step), rel=1e-4, abs=1e-6)
            checked += 1
        assert checked >= 8


def test_m2_is_fed_samples_of_m1s_codes():
    """M1's spread reaches M2: with the means of z1 alone its bound would not change with q(z1|x)'s variance."""
    networks, config = small(m1m2, m1_latent_dim=2, m1_hidden_dim=5, m1_hidden_layers=1, m1_epochs=1)
    seen = []
    networks["q_y"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    optimizer = torch.optim.SGD([p for network in networks.values() for p in network.parameters()], lr=0.0)
    batch = batch_of(networks, 4, 3)
    m1m2.train_step(networks, optimizer, batch._replace(noise=noise(5)), config)
    x = torch.cat([batch.unlabelled, batch.labelled])
    mean, log_variance = networks["q_z1"](x.flatten(1))
    expected = mean + (log_variance / 2).exp() * torch.randn(7, 2, generator=noise(5), dtype=torch.float64)
    torch.testing.assert_close(torch.cat(seen), expected.detach())


def test_switches_of_m1m2():
    networks, config = small(m1m2, m1_latent_dim=2, m1_hidden_dim=5, m1_hidden_layers=1)
    x = torch.full((2000, 1, 2, 2), 0.3, dtype=torch.float64)
    pixels = m1m2.as_data(x, dataclasses.replace(config, binarise=True), noise())
    assert set(pixels.unique().tolist()) == {0.0, 1.0} and pixels.mean().item() == pytest.approx(0.3, abs=0.02)
    with torch.no_grad():
        for p in networks["q_z1"].parameters():
            p.zero_()
        networks["q_z1"].heads[1].bias.fill_(-5.0)  # σ² of e^-5, or of 1 + e^-5
        for p in networks["p_x"].parameters():
            p.zero_()
    for reading, log_variance in (("free", -5.0), ("at_least_one", math.log1p(math.exp(-5)))):
        found = m1m2.m1_bound(networks, x[:1], dataclasses.replace(config, posterior_variance=reading), noise()).item()
        kl = math.exp(log_variance) - 1 - log_variance  # of two dimensions, each half of this
        assert found == pytest.approx(-4 * math.log(2) - kl, rel=1e-9)


@pytest.mark.parametrize("experiment", ["digits-m1m2", "digits-adgm"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_interrupted_baseline_ends_with_the_same_bits(experiment, precision, tmp_path, monkeypatch):
    small_ones = {"hidden_dim": 8, "epochs": 2, **({"m1_epochs": 1, "m1_hidden_dim": 8} if experiment == "digits-m1m2" else {})}
    config = run.experiment_config("segma", experiment, small_ones)
    system = train.system_of(dataclasses.asdict(config))
    options = run.Options(experiment, runs=tmp_path / "whole", precision=precision)
    train.train(config, options)
    step, count = system.train_step, itertools.count(1)

    def killed_now_and_then(*arguments):
        if next(count) in (5, 14, 17, 30):  # in M1, at its last step, in M2
            raise MemoryError
        return step(*arguments)

    monkeypatch.setattr(system, "train_step", killed_now_and_then)
    often = dataclasses.replace(options, runs=tmp_path / "parts", save_every=0.0)
    for _ in range(4):
        with pytest.raises(MemoryError):
            train.train(config, often)
    train.train(config, often)
    whole, parts = (run.load_checkpoint(o.folder("segma") / "checkpoint.pt") for o in (options, often))
    assert whole["total_steps"] == parts["total_steps"] == 28
    for name, weights in whole["networks"].items():
        for key, value in weights.items():
            assert torch.equal(value, parts["networks"][name][key]), (name, key)
    timed = ("seconds",)
    assert [{k: v for k, v in row.items() if k not in timed} for row in whole["rows"]] == [
        {k: v for k, v in row.items() if k not in timed} for row in parts["rows"]]  # fmt: skip


def test_a_short_run_of_each_baseline_reaches_what_it_reached(tmp_path):
    """Seeded: what these gave when they were written, with room for another machine's rounding; a wrong term misses it."""
    pinned = {"digits-adgm": ({"epochs": 12, "hidden_dim": 200}, 20, {"unlabelled_bound": (-350, 15)}),
              "digits-m1m2": ({"epochs": 60, "m1_epochs": 40, "m1_hidden_dim": 200}, 75,
                              {"m1_bound": (-318, 12), "unlabelled_bound": (-71.6, 3)})}  # fmt: skip
    for experiment, (changes, error, bounds) in pinned.items():
        config = run.experiment_config("segma", experiment, changes)
        folder = train.train(config, run.Options(experiment, runs=tmp_path))
        rows = load_run(folder).state["rows"]
        assert rows[-1]["test_error"] < error, rows[-1]
        for name, (value, tolerance) in bounds.items():
            course = [row[name] for row in rows if name in row]
            assert course[-1] == pytest.approx(value, abs=tolerance) and course[-1] > course[0] + 10, name


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_softplus_and_log_bernoulli_are_pytorch_s_own(dtype, tolerance):
    x = torch.cat([torch.linspace(-120, 120, 4801), torch.zeros(1)]).to(dtype).requires_grad_()
    ours, theirs = m1m2.softplus.apply(x), torch.nn.functional.softplus(x.double(), threshold=1000)
    torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
    gradient = torch.autograd.grad(ours.sum(), x)[0].double()
    torch.testing.assert_close(gradient, x.detach().double().sigmoid(), rtol=tolerance, atol=tolerance)
    if dtype == torch.bfloat16:  # densities are never taken in it
        return
    torch.manual_seed(0)
    pixels, logits = torch.rand(3, 1, 5, dtype=dtype), (20 * torch.randn(3, 4, 5, dtype=dtype)).requires_grad_()
    ours = m1m2.log_bernoulli.apply(pixels, logits)
    theirs = Independent(Bernoulli(logits=logits.double(), validate_args=False), 1).log_prob(pixels.double())
    torch.testing.assert_close(ours.double(), theirs, rtol=10 * tolerance, atol=10 * tolerance)
    weights = torch.rand(3, 4)
    gradients = [torch.autograd.grad((f * weights).sum(), logits, retain_graph=True)[0].double() for f in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=10 * tolerance, atol=10 * tolerance)
