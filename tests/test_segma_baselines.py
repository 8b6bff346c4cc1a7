"""Tests of M1+M2 and ADGM: bounds by independent computations, networks, and every experiment end to end."""

import dataclasses
import importlib
import itertools
import math
from functools import partial

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Independent, Normal, kl_divergence

from common import plots, run
from common.data import Dataset, draw_labels
from segma import adgm, load, m1m2, train
from segma.eval import COURSE, evaluate
from segma.model import transfer_style
from segma.train import Batch
from tests.conftest import slope
from tests.test_segma import layer_shapes

M1_SIZES = {"m1_latent_dim": 2, "m1_hidden_dim": 5, "m1_hidden_layers": 1, "m1_epochs": 1}


def small(module, std: float = 0.6, **values):
    """A tiny baseline with random weights in float64, for 1×2×2 images and 3 classes."""

    class Config(module.Config):
        image_shape = (1, 2, 2)

    sizes = M1_SIZES if module is m1m2 else {"auxiliary_dim": 2}
    torch.manual_seed(4)
    system = Config(n_components=3, hidden_dim=5, latent_dim=2, **{**sizes, **values}).build().double()
    with torch.no_grad():
        for p in system.parameters():
            p.normal_(std=std)
    return system


def reconfigured(system, **values):
    """The same networks with a config that differs in these fields."""
    system.config = dataclasses.replace(system.config, **values)
    return system


def gaussian(output):
    mean, log_variance = output
    return Independent(Normal(mean, (log_variance / 2).exp()), 1)


def standard(like: torch.Tensor) -> Independent:
    return Independent(Normal(torch.zeros_like(like), 1.0), 1)


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch_of(n: int, m: int, seed: int = 0, m1_alone: bool = False) -> Batch:
    g = noise(seed)
    x = torch.rand(n + m, 1, 2, 2, generator=g, dtype=torch.float64).round()
    return Batch(x[:n], x[n:], torch.randint(3, (m,), generator=g), m1_alone, noise(seed + 1))


# --------------------------------------------------------------------------------------------- the densities they share


def test_densities_are_those_of_torch_distributions():
    g = noise()
    mean, log_variance, x = torch.randn(3, 6, 4, generator=g, dtype=torch.float64)
    q = gaussian((mean, log_variance))
    torch.testing.assert_close(m1m2.log_normal(x, mean, log_variance), q.log_prob(x))
    torch.testing.assert_close(m1m2.kl_from_standard(mean, log_variance), kl_divergence(q, standard(mean)))
    bits = torch.bernoulli(torch.full_like(x, 0.5), generator=g)
    for name, density in (("bernoulli", Bernoulli(logits=x)), ("gaussian", Normal(x.sigmoid(), 1.0))):
        torch.testing.assert_close(m1m2.log_likelihood(bits, x, name), Independent(density, 1).log_prob(bits))
    drawn = m1m2.draw(mean.expand(20000, -1, -1), log_variance.expand(20000, -1, -1), noise())
    torch.testing.assert_close(drawn.mean(0), mean, atol=0.1, rtol=0)
    torch.testing.assert_close(drawn.var(0).log(), log_variance, atol=0.1, rtol=0)


# ---------------------------------------------------------------------------------------------------------------- M1+M2


def test_m1_bound_lies_below_the_log_likelihood_by_the_kl():
    system = small(m1m2)
    x = torch.tensor([1.0, 0, 1, 1], dtype=torch.float64).view(1, 1, 2, 2)
    bound = system.m1_bound(x.expand(40000, -1, -1, -1), noise()).mean().item()
    # log p(x) from samples of the prior, and from importance sampling with q. These two ways share only p(x|z1).
    z = torch.randn(400_000, 2, generator=noise(1), dtype=torch.float64)

    def log_p(z1):
        logits = system.p_x(z1).flatten(1)
        return Independent(Bernoulli(logits=logits), 1).log_prob(x.flatten())

    by_prior = log_p(z).logsumexp(0).item() - math.log(len(z))
    q = gaussian(system.q_z1(system.features(x)))
    z = q.sample((400_000,))[:, 0]
    log_w = log_p(z) + standard(z).log_prob(z) - q.log_prob(z[:, None]).squeeze()
    assert log_w.logsumexp(0).item() - math.log(len(z)) == pytest.approx(by_prior, abs=0.01)
    assert log_w.mean().item() == pytest.approx(bound, abs=0.02)
    assert bound < by_prior - 0.05


def test_m2_bounds_lie_below_the_log_likelihoods():
    system = small(m1m2)
    z1 = torch.tensor([[0.7, -0.4]], dtype=torch.float64)
    z2 = torch.randn(400_000, 2, generator=noise(1), dtype=torch.float64)
    log_p = []  # log p(z1, y) for each class, from samples of the prior
    for k in range(3):
        y = torch.eye(3, dtype=torch.float64)[[k]]
        log_p.append(gaussian(system.p_z1(z2, y)).log_prob(z1).logsumexp(0).item() - math.log(len(z2)) - math.log(3))
        bound = system.labelled_bound(z1.expand(40000, 2), y, noise()).mean().item()
        assert bound < log_p[-1] + 0.01
    marginal = math.log(sum(math.exp(v) for v in log_p))
    bound = system.unlabelled_bound(z1.expand(40000, 2), noise()).mean().item()
    assert bound < marginal - 0.01


def test_m2_sums_over_every_class(monkeypatch):
    system = small(m1m2)
    monkeypatch.setattr(m1m2, "draw", lambda mean, log_variance, noise: mean)  # so that both ways see the same codes
    z1 = torch.randn(7, 2, dtype=torch.float64)
    found = system.unlabelled_bound(z1, noise())
    q = system.q_y(z1).softmax(1)
    for i in range(7):
        explicit = Categorical(q[i]).entropy()
        for k in range(3):
            y = torch.eye(3, dtype=torch.float64)[k]
            mean, log_variance = system.q_z2(z1[i], y)
            one = gaussian(system.p_z1(mean, y)).log_prob(z1[i]) - math.log(3)
            one = one - kl_divergence(gaussian((mean, log_variance)), standard(mean))
            explicit = explicit + q[i, k] * one
        assert found[i].item() == pytest.approx(explicit.item(), rel=1e-9)


def test_m2_by_hand():
    """The networks are constant, so every term can be computed by hand."""
    system = small(m1m2)
    with torch.no_grad():
        for p in system.parameters():
            p.zero_()
        system.q_z2.heads[0].bias.copy_(torch.tensor([1.0, 0.0]))  # KL = 1/2
        logits = torch.tensor([math.log(2), 0.0, 0.0], dtype=torch.float64)
        system.q_y.heads[0].bias.copy_(logits)  # q = 1/2, 1/4, 1/4
    z1 = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    log_normal = -math.log(2 * math.pi) - (1 + 4) / 2
    labelled = log_normal - math.log(3) - 0.5
    y = torch.eye(3, dtype=torch.float64)[[0]]
    assert system.labelled_bound(z1, y, noise()).item() == pytest.approx(labelled, rel=1e-12)
    entropy = 0.5 * math.log(2) + 0.5 * math.log(4)
    assert system.unlabelled_bound(z1, noise()).item() == pytest.approx(labelled + entropy, rel=1e-12)


@pytest.mark.parametrize(("reading", "log_variance"), [("free", 0.0), ("at_least_one", math.log(2))])
def test_m2_s_objective_by_hand(reading, log_variance):
    """Every network gives 0, except the classifier: q is 1/2, 1/4, 1/4, and log σ² of q is 0, or softplus(0)."""
    system = small(m1m2, posterior_variance=reading)
    with torch.no_grad():
        for p in system.parameters():
            p.zero_()
        system.q_y.heads[0].bias[0] = math.log(2)
    batch = batch_of(4, 3)
    terms = system.m2_loss(batch._replace(noise=noise(5)))
    z1 = math.exp(log_variance / 2) * torch.randn(7, 2, generator=noise(5), dtype=torch.float64)
    kl = math.exp(log_variance) - 1 - log_variance  # of two dimensions
    bounds = -math.log(2 * math.pi) - z1.square().sum(1) / 2 - math.log(3) - kl
    q = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    expected = {"unlabelled_bound": bounds[:4].mean() + 1.5 * math.log(2), "labelled_bound": bounds[4:].mean()}
    expected["cross_entropy"] = -q[batch.labels].log().mean()
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-10), name


def test_m1_is_trained_first_and_then_left_alone():
    system = small(m1m2, labelled_weight=0.3)
    optimizer = torch.optim.Adam(system.parameters(), lr=0.01)

    def moved(m1_alone: bool) -> set[str]:
        before = {name: p.clone() for name, p in system.named_parameters()}
        m1m2.train_step(system, optimizer, batch_of(6, 4, m1_alone=m1_alone))
        return {name.partition(".")[0] for name, p in system.named_parameters() if (p != before[name]).any()}

    assert moved(True) == {"q_z1", "p_x"}
    assert moved(False) == {"q_y", "q_z2", "p_z1"}
    terms = m1m2.train_step(system, optimizer, batch_of(6, 4))
    whole = -terms["unlabelled_bound"] - 0.3 * terms["labelled_bound"] + 0.1 * terms["cross_entropy"]
    assert terms["loss"].item() == pytest.approx(whole.item())


# ----------------------------------------------------------------------------------------------------------------- ADGM


def adgm_bound(system, x, y, samples: int) -> float:
    h = system.features(x)
    q_a = gaussian(system.q_a(h))
    a = m1m2.draw(*(t.expand(samples, -1) for t in system.q_a(h)), noise())
    return system.labelled_bound(x.flatten(1), h, a, q_a.log_prob(a), y, noise(2)).mean().item()


def test_adgm_bound_lies_below_the_log_likelihood():
    system = small(adgm, std=0.4)  # milder weights: importance sampling needs q to cover the posterior
    x = torch.tensor([1.0, 0, 1, 1], dtype=torch.float64).view(1, 1, 2, 2)
    h, n = system.features(x), 300_000
    for k in range(3):
        y = torch.eye(3, dtype=torch.float64)[[k]]
        # log p(x, y) needs neither a nor q: the auxiliary variable does not change p(x, y, z).
        z = torch.randn(n, 2, generator=noise(1), dtype=torch.float64)
        likelihood = Independent(Bernoulli(logits=system.p_x(z, y)), 1)
        log_p = likelihood.log_prob(x.flatten()).logsumexp(0).item() - math.log(n) - math.log(3)
        # The same from importance sampling with every density of the model, by torch.distributions.
        q_a = gaussian(system.q_a(h))
        a = q_a.sample((n,))[:, 0]
        q_z = gaussian(system.q_z(h, a, y))
        z = q_z.sample()
        log_w = (
            Independent(Bernoulli(logits=system.p_x(z, y)), 1).log_prob(x.flatten())
            + standard(z).log_prob(z)
            - math.log(3)
            + gaussian(system.p_a(h, z, y)).log_prob(a)
            - q_a.log_prob(a[:, None]).squeeze()
            - q_z.log_prob(z)
        )
        assert log_w.logsumexp(0).item() - math.log(n) == pytest.approx(log_p, abs=0.05)
        bound = adgm_bound(system, x, y, 100_000)
        assert bound == pytest.approx(log_w.mean().item(), abs=0.05)
        assert bound < log_p - 0.05


def test_joined_inputs_are_one_layer_on_the_concatenation():
    torch.manual_seed(0)
    dense = m1m2.Dense([3, 2], [6, 4], [5, 1], torch.nn.ReLU())
    x, y = torch.randn(7, 1, 3), torch.randn(1, 4, 2)
    whole = torch.nn.Linear(5, 6)
    with torch.no_grad():
        whole.weight.copy_(torch.cat([layer.weight for layer in dense.inputs], 1))
        whole.bias.copy_(dense.inputs[0].bias)
    hidden = whole(torch.cat([x.expand(7, 4, 3), y.expand(7, 4, 2)], -1)).relu()
    hidden = dense.hidden[1](hidden).relu()
    for found, head in zip(dense(x, y), dense.heads, strict=True):
        torch.testing.assert_close(found, head(hidden))
    with torch.autocast("cpu", torch.bfloat16):
        assert all(out.dtype == torch.float32 for out in dense(x, y))  # densities are never in bf16


@pytest.mark.parametrize("module", [m1m2, adgm])
def test_a_code_is_z_and_a_one_hot(module):
    system = small(module).float()
    z = system.encode(torch.randint(256, (6, 1, 2, 2), dtype=torch.uint8))
    assert z.shape == (6, 5) and torch.equal(z[:, 2:].sum(1), torch.ones(6))
    assert set(z[:, 2:].unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(system.means, torch.cat([torch.zeros(3, 2), torch.eye(3)], 1))
    moved = transfer_style(z[[0]], system.classify(z[[0]]), torch.tensor([2]), system.means, 0.5)
    assert torch.equal(moved[0, :2], z[0, :2])  # the style z stays
    expected = z[0, 2:] / 2
    expected[2] += 0.5
    torch.testing.assert_close(moved[0, 2:], expected)
    codes, components = system.draw(3000, noise())
    assert torch.equal(system.classify(codes), components)
    torch.testing.assert_close(components.bincount() / 3000, torch.full((3,), 1 / 3), atol=0.04, rtol=0)
    assert system.decode(moved).shape == (1, 1, 2, 2)
    images = torch.rand(6, 1, 2, 2)  # ledger 42: means all the way, and the most probable class
    x, codes = images.flatten(1), system.encode(images)
    if module is m1m2:
        z1 = system.q_z1(x)[0]
        y = torch.eye(3)[system.q_y(z1).argmax(1)]
        z, logits = system.q_z2(z1, y)[0], system.p_x(system.p_z1(codes[:, :2], codes[:, 2:])[0])
    else:
        a = system.q_a(x)[0]
        y = torch.eye(3)[system.q_y(x, a).argmax(1)]
        z, logits = system.q_z(x, a, y)[0], system.p_x(codes[:, :2], codes[:, 2:])
    torch.testing.assert_close(codes, torch.cat([z, y], 1))
    torch.testing.assert_close(system.decode(codes).flatten(1), 1 / (1 + (-logits.flatten(1)).exp()))


# ------------------------------------------------------------------------------------------------------------- networks


def dense(inputs: int, hidden: list[int], *heads: int) -> int:
    sizes = [inputs, *hidden]
    return sum(a * b + b for a, b in itertools.pairwise(sizes)) + sum(hidden[-1] * n + n for n in heads)


# The kernels are 4×4: 16 weights for each pair of filters.
CONVOLUTIONS = 3 * 512 + 32 + 32 * 512 + 32 + 32 * 1024 + 64 + 64 * 1024 + 64
BACK = 64 * 1024 + 64 + 64 * 512 + 32 + 32 * 512 + 32 + 32 * 48 + 3
NETWORKS = {
    "svhn": {"encoder": 4_905_446, "decoder": 4_908_498, "mixture": 200},
    "celeba": {"encoder": 1_565_832, "decoder": 1_566_763, "mixture": 128},
    "mnist-cwae": {"encoder": 1_863_690, "decoder": 1_864_464, "mixture": 10},
    "mnist-m1m2": {"features": 0, "q_z1": dense(784, [500, 500], 50, 50), "p_x": dense(50, [500, 500], 784),
                   "q_y": dense(50, [300], 10), "q_z2": dense(60, [300], 50, 50), "p_z1": dense(60, [300], 50, 50)},
    "svhn-m1m2": {"features": 0, "q_z1": dense(3072, [500, 500], 300, 300), "p_x": dense(300, [500, 500], 3072),
                  "q_y": dense(300, [500], 10), "q_z2": dense(310, [500], 50, 50), "p_z1": dense(60, [500], 300, 300)},
    "celeba-m1m2": {"features": CONVOLUTIONS, "q_z1": dense(1024, [300], 300, 300),
                    "p_x": dense(300, [300], 1024) + BACK, "q_y": dense(300, [300], 4),
                    "q_z2": dense(304, [300], 50, 50), "p_z1": dense(54, [300], 300, 300)},
    "mnist-adgm": {"features": 0, "q_a": dense(784, [500, 500], 100, 100), "q_y": dense(884, [500, 500], 10),
                   "q_z": dense(894, [500, 500], 100, 100), "p_a": dense(894, [500, 500], 100, 100),
                   "p_x": dense(110, [500, 500], 784), "images": 0},
    "svhn-adgm": {"features": 0, "q_a": dense(3072, [500, 500], 300, 300), "q_y": dense(3372, [500, 500], 10),
                  "q_z": dense(3382, [500, 500], 300, 300), "p_a": dense(3382, [500, 500], 300, 300),
                  "p_x": dense(310, [500, 500], 3072), "images": 0},
    "celeba-adgm": {"features": CONVOLUTIONS, "q_a": dense(1024, [500, 500], 300, 300),
                    "q_y": dense(1324, [500, 500], 4),
                    "q_z": dense(1328, [500, 500], 300, 300), "p_a": dense(1328, [500, 500], 300, 300),
                    "p_x": dense(304, [500, 500], 1024), "images": BACK},
}  # fmt: skip


@pytest.mark.parametrize("experiment", NETWORKS)
def test_parameter_counts(experiment):
    system = run.experiment_config("segma", experiment).build()
    found = {name: sum(p.numel() for p in network.parameters()) for name, network in system.named_children()}
    assert found == NETWORKS[experiment] and all(p.requires_grad for p in system.parameters())  # CWAE's mean, too
    assert all(p.abs().max() == 0 for name, p in system.named_parameters() if name.endswith("bias"))  # not PyTorch's


def test_the_appendixs_convolutions():
    system = run.experiment_config("segma", "celeba-adgm").build()
    features = layer_shapes(system.features, torch.zeros(1, 3, 64, 64))
    assert [x for x in features if x[0] == "Conv2d"] == [
        ("Conv2d", s) for s in ([32, 32, 32], [32, 16, 16], [64, 8, 8], [64, 4, 4])]  # fmt: skip
    images = layer_shapes(system.images, torch.zeros(1, 1024))
    assert [x for x in images if x[0] == "ConvTranspose2d"] == [
        ("ConvTranspose2d", s) for s in ([64, 8, 8], [32, 16, 16], [32, 32, 32], [3, 64, 64])]  # fmt: skip
    segma, dense = run.experiment_config("segma", "celeba").build(), ["Linear", "ReLU"]
    there, back = ["Conv2d", "ReLU"] * 4 + ["Flatten"], ["Unflatten"] + ["ConvTranspose2d", "ReLU"] * 3
    encoder = layer_shapes(segma.encoder, torch.zeros(1, 3, 64, 64))
    decoder = layer_shapes(segma.decoder, torch.zeros(1, 32))
    kinds = [[kind for kind, _ in layers] for layers in (features, images, encoder, decoder)]
    assert kinds[:2] == [there, ["ReLU", *back, "ConvTranspose2d"]]
    assert kinds[2:] == [there + dense * 2 + ["Linear"], dense * 3 + back + ["ConvTranspose2d", "Sigmoid"]]


def test_the_decoder_with_the_papers_four_layers():
    config = run.experiment_config("segma", "svhn", {"decoder_layers": 4})
    assert sum(p.numel() for p in config.build().decoder.parameters()) == 4_289_916


# ------------------------------------------------------------------------------------------ every experiment, two steps


def made_up(config) -> Dataset:
    """A random data set with the shape of the experiment's images, for two batches."""
    g = noise()
    classes = config.components if config.components > 1 else 10 if config.image_shape[1] != 64 else 4
    n = 2 * max(config.batch_unlabelled, config.n_labels)
    images = torch.randint(256, (n + 220, *config.image_shape), dtype=torch.uint8, generator=g)
    labels = torch.arange(n + 220) % classes
    names = tuple(map(str, range(10))) if classes == 10 else tuple("abcd")
    split = (images[:n], labels[:n], images[n:], labels[n:])
    return Dataset(config.dataset.partition(":")[0], *split, names, "0" * 16, False)


def save_nothing(figure, path) -> None:
    """Replaces plots.save_figure, which takes a second for each figure."""
    from matplotlib import pyplot

    path.parent.mkdir(exist_ok=True)
    path.touch()
    pyplot.close(figure)


@pytest.mark.parametrize("experiment", run.experiments("segma"))
def test_every_experiment_trains_two_steps_and_evaluates(experiment, tmp_path, monkeypatch):
    config = run.experiment_config("segma", experiment)
    m1 = {"epochs": 2, "m1_epochs": 1} if experiment.endswith("m1m2") else {}
    small_batch = min(config.batch_unlabelled, 100)
    config = dataclasses.replace(config, **{"epochs": 1, "batch_unlabelled": small_batch, "n_labels": 50, **m1})
    data = made_up(config)
    monkeypatch.setattr(train, "load", lambda *a: data)
    monkeypatch.setattr("segma.eval.load", lambda *a: data)
    monkeypatch.setattr("segma.eval.FID_SAMPLES", 200)
    monkeypatch.setattr(plots, "save_figure", save_nothing)
    options = run.Options(experiment, runs=tmp_path)
    step = importlib.import_module(f"segma.{run.module_of('segma', experiment)}").train_step
    folder = train.train(config, options, step)
    rows = run.load_run("segma", folder)[1]["rows"]
    assert len(rows) == (2 if m1 else 1) and (folder / "samples").is_dir()
    assert ["test_error" in row for row in rows] == ([False, True] if m1 else [config.labelled_per_batch > 0])
    assert {*itertools.chain(*rows)} - {"epoch", "seconds", "loss", "grad_norm", "labelled_bound"} <= COURSE.keys()
    system, k = load(folder), config.components
    if step is train.train_step:
        assert rows[-1]["mean_norm"] == pytest.approx(system.means.square().sum(1).sqrt().mean().item(), rel=1e-5)
    if step is train.train_step and k > 1:  # also with β = 0 (ledger 30)
        known, _ = draw_labels(data.train_labels, 50, config.labels, data.class_names, 0)
        torch.testing.assert_close(system.priors, data.train_labels[known].bincount(minlength=k) / 50)
    result = evaluate(options)
    labelled, faces = not experiment.endswith(("cwae", "unsupervised")), config.image_shape[1] == 64
    assert ("test_error" in result["metrics"]) == labelled
    assert ("nearest_image_of_their_class" in result["metrics"]) == (labelled and not faces)
    assert ("nearest_image_purity" in result["metrics"]) == (not labelled and not faces)
    assert "reconstruction_error" in result["metrics"]
    pictures = {path.stem for path in (folder / "figures").glob("*.png")}
    assert {"samples", "interpolations", "training"} <= pictures
    assert ("style_transfer" in pictures) == labelled
    assert ("closed_form" in pictures) == (not experiment.endswith(("adgm", "m1m2")))


# ------------------------------------------------------------------------------------------------------------- the loop


@pytest.mark.parametrize("module", [train, m1m2, adgm])
def test_each_epoch_has_its_own_order_and_each_step_its_own_noise(module, tmp_path, monkeypatch):
    """The batches of two epochs, for two seeds. The first pixel of an image is the index of the image."""
    n, phases = 37, {"epochs": 2, "m1_epochs": 1} if module is m1m2 else {"epochs": 2}
    images = torch.full((n, 1, 28, 28), 255, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(n)
    labels = torch.tensor([0, 0, 0, 1, 1, 2]).repeat(7)[:n]
    data = Dataset("digits", images, labels, images[:5], labels[:5], ("a", "b", "c"), "0" * 16, False)
    monkeypatch.setattr(train, "load", lambda *a: data)
    config = module.Config(
        "digits", 3, n_labels=8, batch_unlabelled=10, batch_labelled=6, hidden_dim=4, learning_rate=0.02, **phases
    )
    runs = []
    for seed in (0, 2):
        seen, first = [], []

        def step(model, optimizer, batch, precision, seen=seen, first=first):
            assert precision == "bf16"
            first += [] if first else [{name: x.clone() for name, x in model.state_dict().items()}]
            (group,) = optimizer.param_groups
            assert type(optimizer) is torch.optim.Adam and (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8)
            assert (group["lr"], group["weight_decay"]) == (0.02, 0) and {*group["params"]} == {*model.parameters()}
            assert batch.unlabelled[:, 0, 1:].unique().item() == batch.labelled[:, 0, 1:].unique().item() == 1
            drawn, known = ((255 * x[:, 0, 0, 0]).round().long() for x in (batch.unlabelled, batch.labelled))
            assert torch.equal(batch.labels, labels[known])
            draws = torch.randn(3, generator=batch.noise).tolist()
            seen.append((drawn.tolist(), known.tolist(), batch.m1_alone, draws))
            return {"loss": torch.zeros(())}

        train.train(config, run.Options("digits", seed=seed, runs=tmp_path, precision="bf16"), step)
        drawn, known, m1_alone, noises = zip(*seen, strict=True)
        orders = [sum(drawn[i : i + 3], []) for i in (0, 3)]  # 7 of the 37 images are left out
        cycles = [sum(known[i : i + 3], []) for i in (0, 3)]  # three batches of six from the eight labelled images
        assert len(seen) == 6 and all(len({*order}) == 30 for order in orders) and orders[0] != orders[1]
        assert {*orders[0]} != {*orders[1]} and {*orders[0], *orders[1]} > {*cycles[0]}  # labelled images, too
        for cycle in cycles:
            assert {*cycle[:8]} == {*cycles[0]} and len({*cycle}) == 8 and cycle[8:] == (cycle[:8] * 2)[:10]
        assert cycles[0] != cycles[1] and len({*map(tuple, noises)}) == 6
        assert m1_alone == (((True,) if module is m1m2 else (False,)) * 3 + (False,) * 3)
        if module is train:  # Sec. V: the proportions of the known labels, not of all labels
            proportions = labels[cycles[0][:8]].bincount(minlength=3) / 8
            assert torch.equal(first[0].pop("mixture.priors"), proportions)
            assert not torch.allclose(proportions, labels.bincount() / n, atol=0.02)
        weights = sum(x.double().sum().item() for x in first[0].values())
        runs.append((orders[0], sorted({*cycles[0]}), noises[0], weights))
    assert all(a != b for a, b in zip(*runs, strict=True))


# ----------------------------------------------------------------------------------- gradients, switches, interruptions


def by_hand(system, batch: Batch):
    """Compute what `loss` returns image by image and class by class, from the same noise."""
    config, g = system.config, batch.noise
    images = torch.cat([batch.unlabelled, batch.labelled])
    if config.binarise:
        images = torch.bernoulli(images, generator=g)
    n, m, k, double = len(batch.unlabelled), len(batch.labelled), 3, torch.float64
    floor = torch.nn.functional.softplus if config.posterior_variance == "at_least_one" else lambda x: x
    h = images.flatten(1)
    a_mean, a_log_variance = system.q_a(h)
    a_log_variance = floor(a_log_variance)
    a = a_mean + (a_log_variance / 2).exp() * torch.randn(n + m, 2, generator=g, dtype=double)
    eps_u, eps_l = torch.randn(n, k, 2, generator=g, dtype=double), torch.randn(m, 2, generator=g, dtype=double)

    def bound(i: int, c: int, eps):
        y = torch.eye(k, dtype=double)[[c]]
        mean, log_variance = system.q_z(h[[i]], a[[i]], y)
        log_variance = floor(log_variance)
        z = mean + (log_variance / 2).exp() * eps
        p_mean, p_log_variance = system.p_a(h[[i]], z, y)
        logits = system.p_x(z, y)
        pixels = Bernoulli(logits=logits) if config.likelihood == "bernoulli" else Normal(logits.sigmoid(), 1.0)
        value = Independent(pixels, 1).log_prob(h[[i]]) - math.log(k)
        value = value + gaussian((p_mean, floor(p_log_variance))).log_prob(a[[i]])
        value = value - gaussian((a_mean[[i]], a_log_variance[[i]])).log_prob(a[[i]])
        return (value - kl_divergence(gaussian((mean, log_variance)), standard(mean))).squeeze()

    log_q = system.q_y(h, a).log_softmax(1)
    unlabelled = [sum(log_q[i, c].exp() * (bound(i, c, eps_u[i, c]) - log_q[i, c]) for c in range(k)) for i in range(n)]
    labelled = torch.stack([bound(n + i, int(c), eps_l[i]) for i, c in enumerate(batch.labels)]).mean()
    cross_entropy = -torch.stack([log_q[n + i, c] for i, c in enumerate(batch.labels)]).mean()
    unlabelled = torch.stack(unlabelled).mean()
    loss = config.label_weight * cross_entropy - unlabelled - config.labelled_weight * labelled
    return {"loss": loss, "unlabelled_bound": unlabelled, "labelled_bound": labelled, "cross_entropy": cross_entropy}


READINGS = [{}, {"posterior_variance": "at_least_one"}, {"binarise": True}, {"likelihood": "gaussian"}]


@pytest.mark.parametrize("switches", READINGS, ids=str)
def test_adgm_loss_and_gradients_are_those_of_the_objective_written_out(switches):
    system = small(adgm, std=0.4, labelled_weight=0.7, label_weight=2.0, **switches)
    batch = batch_of(4, 3)
    batch = batch._replace(unlabelled=(0.2 + 0.6 * batch.unlabelled) if switches.get("binarise") else batch.unlabelled)
    parameters = list(system.parameters())
    found, expected = (of(batch._replace(noise=noise(7))) for of in (system.loss, partial(by_hand, system)))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-10), name
    gradients = [torch.autograd.grad(terms["loss"], parameters) for terms in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
        assert a.abs().max() > 0


@pytest.mark.parametrize("module", [m1m2, adgm])
def test_gradients_of_the_baselines_by_finite_differences(module):
    system = small(module, grad_clip_norm=None, grad_clip_value=None, labelled_weight=0.7)
    parameters = list(system.parameters())
    for m1_alone in (True, False):  # M1, then M2; ADGM has one phase
        batch, optimizer = batch_of(4, 3, m1_alone=m1_alone), torch.optim.SGD(parameters, lr=0.0)
        module.train_step(system, optimizer, batch._replace(noise=noise(5)))
        gradients = [(p, p.grad.clone()) for p in parameters if p.grad is not None]

        def loss(batch=batch, optimizer=optimizer) -> torch.Tensor:
            return module.train_step(system, optimizer, batch._replace(noise=noise(5)))["loss"]

        for p, gradient in gradients:
            numerical = slope(loss, p, p.numel() // 2)
            assert gradient.view(-1)[p.numel() // 2].item() == pytest.approx(numerical, rel=1e-4, abs=1e-6)
        assert len(gradients) >= 8


def test_m2_is_fed_samples_of_m1s_codes():
    """M2 sees samples of q(z1|x). If it saw only the means, the variance of q(z1|x) could not change its bound."""
    system = small(m1m2)
    seen = []
    system.q_y.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    optimizer = torch.optim.SGD(system.parameters(), lr=0.0)
    batch = batch_of(4, 3)
    m1m2.train_step(system, optimizer, batch._replace(noise=noise(5)))
    x = torch.cat([batch.unlabelled, batch.labelled])
    mean, log_variance = system.q_z1(x.flatten(1))
    expected = mean + (log_variance / 2).exp() * torch.randn(7, 2, generator=noise(5), dtype=torch.float64)
    torch.testing.assert_close(torch.cat(seen), expected.detach())


def test_switches_of_m1m2():
    system = small(m1m2)
    x = torch.full((2000, 1, 2, 2), 0.3, dtype=torch.float64)
    pixels = m1m2.as_data(x, dataclasses.replace(system.config, binarise=True), noise())
    assert set(pixels.unique().tolist()) == {0.0, 1.0} and pixels.mean().item() == pytest.approx(0.3, abs=0.02)
    seen, grey = [], batch_of(6, 4)
    grey = grey._replace(unlabelled=0.3 + 0 * grey.unlabelled, labelled=0.6 + 0 * grey.labelled)
    black_or_white = small(m1m2, binarise=True)
    black_or_white.features.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].unique().tolist()))
    optimizer = torch.optim.SGD(black_or_white.parameters(), lr=0.0)
    for m1_alone in (True, False):
        m1m2.train_step(black_or_white, optimizer, grey._replace(m1_alone=m1_alone))
    assert seen == [[0, 1], [0, 1]]
    with torch.no_grad():
        for p in system.q_z1.parameters():
            p.zero_()
        system.q_z1.heads[1].bias.fill_(-5.0)  # σ² is e^-5, or 1 + e^-5 with at_least_one
        for p in system.p_x.parameters():
            p.zero_()
    for reading, log_variance in (("free", -5.0), ("at_least_one", math.log1p(math.exp(-5)))):
        found = reconfigured(system, posterior_variance=reading).m1_bound(x[:1], noise()).item()
        kl = math.exp(log_variance) - 1 - log_variance  # the sum over two dimensions; each has half of this
        assert found == pytest.approx(-4 * math.log(2) - kl, rel=1e-9)
    found = reconfigured(system, likelihood="gaussian").m1_bound(x[:1], noise()).item()  # SVHN, CelebA (ledger 34)
    assert found == pytest.approx(-2 * math.log(2 * math.pi) - 4 * 0.2**2 / 2 - kl, rel=1e-9)  # the mean image is 0.5
    networks = small(m1m2).p_z1, small(m1m2, activation="relu").p_z1, small(adgm).p_a
    assert [type(network.hidden[0]) for network in networks] == [m1m2.Softplus, torch.nn.ReLU, torch.nn.ReLU]
    assert m1m2.Config(n_labels=30).labelled_per_batch == 30  # fewer labels than places


@pytest.mark.parametrize("module, m1_alone", [(m1m2, True), (m1m2, False), (adgm, False)])
def test_layers_compute_in_the_precision_asked_for(module, m1_alone):
    system, batch, seen = small(module).float(), batch_of(4, 3, m1_alone=m1_alone), []
    batch = batch._replace(unlabelled=batch.unlabelled.float(), labelled=batch.labelled.float())
    for layer in system.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        seen.clear()
        module.train_step(system, torch.optim.SGD(system.parameters(), lr=0.0), batch, precision)
        assert {*seen} == {dtype}


@pytest.mark.parametrize("experiment", ["digits-m1m2", "digits-adgm"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_interrupted_baseline_ends_with_the_same_bits(experiment, precision, tmp_path, monkeypatch):
    m1 = {"m1_epochs": 1, "m1_hidden_dim": 8} if experiment == "digits-m1m2" else {}
    config = run.experiment_config("segma", experiment, {"hidden_dim": 8, "epochs": 2, **m1})
    step = (m1m2 if m1 else adgm).train_step
    options = run.Options(experiment, runs=tmp_path / "whole", precision=precision)
    train.train(config, options, step)
    count = itertools.count(1)

    def killed_now_and_then(*arguments):
        if next(count) in (5, 14, 17, 30):  # twice in M1, at the first step of M2, in M2
            raise MemoryError
        return step(*arguments)

    often = dataclasses.replace(options, runs=tmp_path / "parts", save_every=0.0)
    for _ in range(4):
        with pytest.raises(MemoryError):
            train.train(config, often, killed_now_and_then)
    train.train(config, often, killed_now_and_then)
    whole, parts = (run.load_run("segma", o.folder("segma"))[1] for o in (options, often))
    assert whole["total_steps"] == parts["total_steps"] == 28
    for name, value in whole["weights"].items():
        assert torch.equal(value, parts["weights"][name]), name
    assert [{**row, "seconds": 0} for row in whole["rows"]] == [{**row, "seconds": 0} for row in parts["rows"]]


def test_a_short_run_of_each_baseline_reaches_what_it_reached(tmp_path):
    """Values of seeded runs. The tolerances allow for the rounding of other machines; a wrong term exceeds them."""
    adgm_sizes, m1m2_sizes = {"epochs": 12, "hidden_dim": 200}, {"epochs": 60, "m1_epochs": 40, "m1_hidden_dim": 200}
    pinned = [
        (adgm, "digits-adgm", adgm_sizes, 20, {"unlabelled_bound": (-350, 15)}),
        (m1m2, "digits-m1m2", m1m2_sizes, 75, {"m1_bound": (-318, 12), "unlabelled_bound": (-71.6, 3)}),
    ]
    for module, experiment, changes, error, bounds in pinned:
        config = run.experiment_config("segma", experiment, changes)
        folder = train.train(config, run.Options(experiment, runs=tmp_path), module.train_step)
        rows = run.load_run("segma", folder)[1]["rows"]
        assert rows[-1]["test_error"] < error, rows[-1]
        for name, (value, tolerance) in bounds.items():
            course = [row[name] for row in rows if name in row]
            assert course[-1] == pytest.approx(value, abs=tolerance) and course[-1] > course[0] + 10, name
        assert type(load(folder)) is type(config.build())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_softplus_and_log_bernoulli_are_pytorch_s_own(dtype, tolerance):
    x = torch.cat([torch.linspace(-120, 120, 4801), torch.zeros(1)]).to(dtype).requires_grad_()
    ours, theirs = m1m2.FastSoftplus.apply(x), torch.nn.functional.softplus(x.double(), threshold=1000)
    torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
    gradient = torch.autograd.grad(ours.sum(), x)[0].double()
    torch.testing.assert_close(gradient, x.detach().double().sigmoid(), rtol=tolerance, atol=tolerance)
    if dtype == torch.bfloat16:  # densities are never computed in bf16
        return
    torch.manual_seed(0)
    pixels, logits = torch.rand(3, 1, 5, dtype=dtype), (20 * torch.randn(3, 4, 5, dtype=dtype)).requires_grad_()
    ours = m1m2.FastLogBernoulli.apply(pixels, logits)
    theirs = Independent(Bernoulli(logits=logits.double(), validate_args=False), 1).log_prob(pixels.double())
    torch.testing.assert_close(ours.double(), theirs, rtol=10 * tolerance, atol=10 * tolerance)
    weights = torch.rand(3, 4)
    gradients = [
        torch.autograd.grad((f * weights).sum(), logits, retain_graph=True)[0].double() for f in (ours, theirs)
    ]
    torch.testing.assert_close(*gradients, rtol=10 * tolerance, atol=10 * tolerance)
