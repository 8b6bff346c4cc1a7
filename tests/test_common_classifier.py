"""The classifier that judges generated images: its shapes, what it learns, and its one training per data set."""

import contextlib
import dataclasses
import fcntl
import io
import threading
from pathlib import Path

import pytest
import torch

from common import classifier
from common.data import Dataset, load
from common.metrics import error_rate, frechet_distance, moments
from common.run import UserError, load_checkpoint, save_checkpoint

# At most 8×8 before the dense layer: 2 convolutions for 28 and 32 pixels, 3 for 40 and 64, 4 for 96.
PARAMETERS = {(1, 28, 28): 422_154, (3, 32, 32): 546_634, (3, 40, 40): 505_802, (3, 64, 64): 1_144_778, (3, 96, 96): 833_610}
STEPS = 300  # enough for digits: a few seconds


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits", "")


@pytest.fixture(scope="module")
def cached(digits, tmp_path_factory) -> tuple[Path, classifier.Network, float, str]:
    """A cache folder with the classifier of the digits, trained in a few seconds; the network, its accuracy, and what was printed."""
    torch.set_num_threads(1)
    cache, out = tmp_path_factory.mktemp("runs") / "cache", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(classifier, "LEAST_STEPS", STEPS)
        network, accuracy = classifier.trained(digits, cache, "cpu")
    return cache, network, accuracy, out.getvalue()


def equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def never(*a, **k):
    raise AssertionError("trained again")


def some(shape: tuple[int, int, int], n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (n, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("shape", "parameters"), PARAMETERS.items())
def test_shapes(shape, parameters):
    network = classifier.network(shape, 10).eval()
    # Cached files are of this network: with another raise RECIPE, and then change the numbers here.
    assert (classifier.RECIPE, sum(p.numel() for p in network.parameters())) == ("2", parameters)
    x = some(shape, 3).float() / 255
    assert network.features(x).shape == (3, 128) and network(x).shape == (3, 10)
    assert classifier.network(shape, 3)(x).shape == (3, 3)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 17, 30), (1, 1, 1)])
def test_any_other_shape_will_do(shape):
    assert classifier.network(shape, 2)(torch.zeros(2, *shape)).shape == (2, 2)


def test_logits_are_the_head_of_the_features_and_batches_do_not_matter():
    network, images = classifier.network((3, 32, 32), 7).eval(), some((3, 32, 32), 23)
    with torch.no_grad():
        features = network.features(images.float() / 255)
        logits = network(images.float() / 255)
    torch.testing.assert_close(network.head(features), logits)
    found = classifier.features(network, images, batch=5)
    assert found.dtype == torch.float64 and found.shape == (23, 128) and not found.requires_grad
    assert found.min() >= 0 and found.max() > 0
    torch.testing.assert_close(found, features.double(), rtol=1e-4, atol=1e-6)
    classes = classifier.classify(network, images)
    assert classes.dtype == torch.int64 and torch.equal(classes, logits.argmax(1))


def test_steps_follow_the_data_within_bounds():
    assert [classifier.steps_for(n) for n in (1, 1437, 60_000, 604_388)] == [1000, 1000, 4687, 5000]


def test_digits_are_learnt_and_the_file_says_what_it_holds(digits, cached):
    cache, network, accuracy, printed = cached
    assert accuracy == 100 - error_rate(classifier.classify(network, digits.test_images), digits.test_labels) >= 95
    assert f"training the classifier for digits, once: {STEPS} steps" in printed and f"{accuracy:.2f} %" in printed
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    path = classifier.cache_path(digits, cache)
    assert path.exists() and path.name == f"classifier-digits-{digits.digest}-1x28x28-10-recipe2.pt"
    state = load_checkpoint(path)
    assert state["accuracy"] == accuracy and state["data_digest"] == digits.digest and state["session"]["threads"] == 1


def test_it_is_trained_once(digits, cached, monkeypatch, capsys):
    cache, network, accuracy, _ = cached
    monkeypatch.setattr(classifier, "train", never)
    found, again = classifier.trained(digits, cache, torch.device("cpu"))
    assert equal(found, network) and again == accuracy and capsys.readouterr() == ("", "")
    assert not found.training and not any(p.requires_grad for p in found.parameters())
    torch.testing.assert_close(
        classifier.features(found, digits.test_images), classifier.features(network, digits.test_images), rtol=0, atol=0
    )


def test_other_data_and_another_recipe_have_other_files(digits, tmp_path, monkeypatch):
    one = classifier.cache_path(digits, tmp_path)
    assert digits.digest in one.name
    variants = [
        dataclasses.replace(digits, digest="0" * 16),
        dataclasses.replace(digits, name="folder:digits"),
        dataclasses.replace(digits, class_names=("odd", "even")),
        dataclasses.replace(digits, train_images=digits.train_images[..., :20]),
    ]
    paths = {classifier.cache_path(data, tmp_path) for data in variants}
    monkeypatch.setattr(classifier, "RECIPE", "other")
    paths |= {one, classifier.cache_path(digits, tmp_path)}
    assert len(paths) == 6


def test_a_persons_own_data_get_a_safe_file_name(digits, tmp_path):
    data = dataclasses.replace(digits, name="folder:../../My Bilder/Zürich:1/" + 80 * "x")
    path = classifier.cache_path(data, tmp_path)
    assert path.parent == tmp_path and len(path.name) < 200 and digits.digest in path.name
    assert set(path.name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")


def test_a_damaged_file_is_trained_anew_aloud(digits, cached, monkeypatch, tmp_path, capsys):
    source = classifier.cache_path(digits, cached[0])
    path = classifier.cache_path(digits, tmp_path)
    path.write_bytes(source.read_bytes()[:-1000])
    calls = []

    def train(images, labels, n_classes, seed, device):
        calls.append(seed)
        return cached[1]

    monkeypatch.setattr(classifier, "train", train)
    classifier.trained(digits, tmp_path, "cpu")
    out, err = capsys.readouterr()
    assert calls == [classifier.SEED] and "training the classifier" in out
    assert err.count("\n") == 1 and "damaged" in err and "trained anew" in err and "resume" not in err
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == [path.name]
    monkeypatch.setattr(classifier, "train", never)
    assert classifier.trained(digits, tmp_path, "cpu")[1] == cached[2]


def test_nothing_is_kept_of_a_training_that_was_stopped(digits, monkeypatch, tmp_path):
    def train(*a, **k):
        raise KeyboardInterrupt

    leftover = tmp_path / f".{classifier.cache_path(digits, tmp_path).name}.123.part"
    leftover.write_bytes(b"of a process that was killed")
    monkeypatch.setattr(classifier, "train", train)
    with pytest.raises(KeyboardInterrupt):
        classifier.trained(digits, tmp_path, "cpu")
    assert [p.suffix for p in tmp_path.iterdir()] == [".lock"]


def test_the_second_of_two_processes_waits_and_finds_it(digits, cached, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(classifier, "train", never)
    path, found = classifier.cache_path(digits, tmp_path), []
    with open(tmp_path / f".{path.stem}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first process, in the middle of its training
        second = threading.Thread(target=lambda: found.append(classifier.trained(digits, tmp_path, "cpu")))
        second.start()
        second.join(0.3)
        assert second.is_alive() and "waiting for another process" in capsys.readouterr().out
        save_checkpoint(path, load_checkpoint(classifier.cache_path(digits, cached[0])))
    second.join(30)
    assert equal(found[0][0], cached[1]) and found[0][1] == cached[2]


def test_the_distance_of_features_tells_digits_from_noise(digits, cached):
    network = cached[1]
    images = (digits.train_images, digits.test_images, some((1, 28, 28), 500))
    train, test, noise = (moments(classifier.features(network, x)) for x in images)
    itself, other, far = (frechet_distance(x, train) for x in (train, test, noise))
    assert itself == pytest.approx(0, abs=1e-6 * far)
    assert 0 < 30 * other < far


def test_the_same_seed_gives_the_same_bits(digits):
    def train(seed):
        return classifier.train(digits.train_images, digits.train_labels, 10, seed, "cpu", steps=15)

    first = train(4)
    torch.rand(7)  # the global generator has no say, and is left as it was
    before = torch.get_rng_state()
    assert equal(first, train(4)) and torch.equal(before, torch.get_rng_state())
    assert not equal(first, train(5))


def test_it_learns_any_labelled_images_even_a_few():
    """As for clustering: labelled samples of a generator. Fewer than a batch of colour images, told apart by their brightest channel."""
    labels = torch.arange(60) % 3
    images = some((3, 40, 40), 60) // 2
    images[torch.arange(60), labels] += 100
    network = classifier.train(images[:45], labels[:45], 3, 0, "cpu", steps=40)
    assert torch.equal(classifier.classify(network, images[45:]), labels[45:])


def test_no_images_or_too_few_labels_are_refused():
    images = some((1, 28, 28), 5)
    with pytest.raises(UserError, match="0 images"):
        classifier.train(images[:0], torch.zeros(0, dtype=torch.int64), 2, 0, "cpu")
    with pytest.raises(UserError, match="5 images with 4 labels"):
        classifier.train(images, torch.zeros(4, dtype=torch.int64), 2, 0, "cpu")
