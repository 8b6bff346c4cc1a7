"""The classifier that judges generated images: its shapes, what it learns, and its one training per data set."""

import dataclasses
import math
import queue
import threading

import filelock
import pytest
import torch

from common import classifier
from common.data import Dataset, load
from common.metrics import error_rate
from common.run import UserError, load_checkpoint, save_checkpoint

# At most 8×8 before the dense layer: 2 convolutions for 28 and 32 pixels, 3 for 40 and 64, 4 for 96.
PARAMETERS = {28: 422_154, 32: 546_634, 40: 505_802, 64: 1_144_778, 96: 833_610}


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits", "")


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(classifier, "LEAST_STEPS", 15)
    monkeypatch.setattr(classifier, "MOST_STEPS", 15)


@pytest.fixture(scope="module")
def cached(digits, tmp_path_factory):
    """A cache folder with the digits' classifier, trained in a few seconds; the network and its accuracy."""
    torch.set_num_threads(1)
    cache = tmp_path_factory.mktemp("runs") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "LEAST_STEPS", 300)
        return cache, *classifier.trained(digits, cache, "cpu")


def equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def never(*a, **k):
    raise AssertionError("trained again")


def some(shape: tuple[int, int, int], n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (n, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("side", "parameters"), PARAMETERS.items())
def test_shapes(side, parameters):
    shape = (1 if side == 28 else 3, side, side)
    network = classifier.Network(shape, 10).eval()
    # Cached files are of this network: with another raise RECIPE, and then change the numbers here.
    assert (classifier.RECIPE, sum(p.numel() for p in network.parameters())) == ("3", parameters)
    x = some(shape, 3)
    assert network.features(x).shape == (3, 128) and network(x).shape == (3, 10)
    assert classifier.Network((3, 17, 30), 2)(some((3, 17, 30), 2)).shape == (2, 2)


def test_logits_are_the_head_of_the_features_and_batches_do_not_matter():
    network, images = classifier.Network((3, 32, 32), 7).eval(), some((3, 32, 32), 23)
    with torch.no_grad():
        features = network.body(images.float() / 255)
        logits = network.head(features)
    found = classifier.features(network, images, batch=5)
    assert found.dtype == torch.float32 and found.shape == (23, 128) and not found.requires_grad
    assert found.min() >= 0 and found.max() > 0
    torch.testing.assert_close(found, features, rtol=1e-4, atol=1e-6)
    assert torch.equal(classifier.classify(network, images), logits.argmax(1))
    before = classifier.digest(network)
    network.body[0].weight.data[0, 0, 0, 0] += 1
    assert classifier.digest(network) != before


def test_digits_are_learnt_once(digits, cached, monkeypatch):
    cache, network, accuracy = cached
    assert accuracy == 100 - error_rate(classifier.classify(network, digits.test_images), digits.test_labels) >= 95
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    monkeypatch.setattr(classifier, "train", never)
    found, again = classifier.trained(digits, cache, "cpu")
    assert equal(found, network) and again == accuracy and not found.training


def test_other_data_have_other_files_and_a_damaged_one_is_trained_anew(digits, tmp_path, few_steps, capsys):
    narrow = {name: getattr(digits, name)[..., :20] for name in ("train_images", "test_images")}
    for changes in (
        {},
        {"digest": "0" * 16},
        {"train_labels": digits.train_labels % 2, "class_names": ("odd", "even")},
        narrow,
        {"digest": "1" * 16, "name": "folder:../../My Bilder/Zürich:1/" + 80 * "x"},
    ):
        classifier.trained(dataclasses.replace(digits, **changes), tmp_path, "cpu")
    files = list(tmp_path.glob("*.pt"))
    assert len(files) == 5 and "damaged" not in capsys.readouterr().out
    for path in files:
        path.write_bytes(path.read_bytes()[:-1000])
    classifier.trained(digits, tmp_path, "cpu")
    out = capsys.readouterr().out
    assert "damaged" in out and "training it anew" in out


def test_the_second_of_two_processes_waits_and_finds_it(digits, cached, monkeypatch, tmp_path):
    said: queue.Queue[str] = queue.Queue()  # what one thread prints while another reads it, capsys may lose
    monkeypatch.setattr("common.run.print", lambda line, **_: said.put(line), raising=False)
    monkeypatch.setattr(classifier, "train", never)
    source, found = next(cached[0].glob("*.pt")), []
    with filelock.FileLock(tmp_path / source.with_suffix(".lock").name):  # the first process, training
        second = threading.Thread(target=lambda: found.append(classifier.trained(digits, tmp_path, "cpu")))
        second.start()
        assert "waiting for another process" in said.get() and second.is_alive()
        save_checkpoint(tmp_path / source.name, load_checkpoint(source))
    second.join()
    assert equal(found[0][0], cached[1]) and found[0][1] == cached[2]


def test_the_same_seed_gives_the_same_bits(digits, few_steps):
    def train(seed):
        return classifier.train(digits.train_images, digits.train_labels, 10, seed, "cpu")

    first = train(4)
    torch.rand(7)  # the global generator has no say, and is left as it was
    before = torch.get_rng_state()
    assert equal(first, train(4)) and torch.equal(before, torch.get_rng_state())
    assert not equal(first, train(5))


def test_what_is_cached_learnt_the_training_images_by_this_recipe(digits, tmp_path, few_steps, monkeypatch):
    network, _ = classifier.trained(digits, tmp_path, "cpu")
    assert equal(network, classifier.train(digits.train_images, digits.train_labels, 10, 0, "cpu"))
    monkeypatch.setattr(classifier, "RECIPE", "another")
    monkeypatch.setattr(classifier, "train", never)
    with pytest.raises(AssertionError, match="trained again"):
        classifier.trained(digits, tmp_path, "cpu")


def test_the_rate_falls_by_a_cosine(few_steps, monkeypatch):
    rates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda o, *a: (rates.append(o.param_groups[0]["lr"]), step(o, *a)))
    classifier.train(some((1, 28, 28), 256), torch.arange(256) % 2, 2, 0, "cpu")
    assert rates == pytest.approx([1e-3 * (1 + math.cos(math.pi * i / 15)) for i in range(15)])


@pytest.mark.parametrize(("n", "steps"), [(1437, 1000), (20_000, 1562), (100_000, 5000)])
def test_how_long_it_trains(n, steps, monkeypatch):
    taken = []

    def forward(network, x):
        taken.append(len(x))
        return network.head[1].bias.expand(len(x), -1)

    monkeypatch.setattr(classifier.Network, "forward", forward)
    classifier.train(torch.zeros(n, 1, 2, 2, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64), 2, 0, "cpu")
    assert len(taken) == steps


def test_each_epoch_takes_every_image_once_in_an_order_of_its_own_with_dropout(few_steps, monkeypatch):
    seen, forward, images = [], classifier.Network.forward, some((1, 28, 28), 256)
    images[:, 0, 0, 0] = torch.arange(256)

    def recorded(network, x):
        assert network.training and network.head[0].p == 0.3
        seen.append(x[:, 0, 0, 0].tolist())
        return forward(network, x)

    monkeypatch.setattr(classifier.Network, "forward", recorded)
    classifier.train(images, torch.arange(256) % 2, 2, 0, "cpu")
    orders = {tuple(seen[i] + seen[i + 1]) for i in range(0, 14, 2)}  # batches of 128
    assert len(seen) == 15 and len(orders) == 7 and all(sorted(order) == list(range(256)) for order in orders)


def test_it_learns_any_labelled_images_even_a_few(monkeypatch):
    """As for clustering: labelled samples of a generator. Fewer than a batch, told apart by their brightest channel."""
    monkeypatch.setattr(classifier, "LEAST_STEPS", 40)
    labels = torch.arange(60) % 3
    images = some((3, 40, 40), 60) // 2
    images[torch.arange(60), labels] += 100
    network = classifier.train(images[:45], labels[:45], 3, 0, "cpu")
    assert torch.equal(classifier.classify(network, images[45:]), labels[45:])
    with pytest.raises(UserError, match="45 images with 44 labels"):
        classifier.train(images[:45], labels[:44], 3, 0, "cpu")
