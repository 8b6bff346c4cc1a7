"""The small classifier: what it gives out, that it learns, and its cache."""

import pytest
import torch

from common import classifier
from common.data import load
from common.metrics import frechet_distance, moments


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 40, 40), (3, 64, 64), (3, 96, 96)])
def test_shapes(shape):
    network = classifier.network(shape, 7).eval()
    images = torch.randint(256, (5, *shape), dtype=torch.uint8)
    features = classifier.features(network, images)
    assert features.shape == (5, classifier.FEATURES) and features.dtype == torch.float64
    torch.testing.assert_close(network.head(features.float()), network(images / 255).detach())
    assert torch.equal(classifier.classify(network, images), network(images / 255).argmax(1))


def test_it_learns_digits_is_cached_and_a_damaged_cache_is_made_anew(tmp_path, monkeypatch, capsys):
    data, cpu = load("digits", ""), torch.device("cpu")
    network, accuracy = classifier.trained(data, tmp_path, cpu)
    assert accuracy > 94 and f"{accuracy:.2f} %" in capsys.readouterr().out
    assert accuracy == pytest.approx(100 * (classifier.classify(network, data.test_images) == data.test_labels).double().mean().item())

    features = classifier.features(network, data.train_images)
    again = frechet_distance(moments(features), moments(features))
    other = frechet_distance(moments(features), moments(classifier.features(network, data.test_images)))
    noise = torch.randint(256, (1000, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    far = frechet_distance(moments(features), moments(classifier.features(network, noise)))
    assert abs(again) < 1e-6 * far and other < far / 10

    calls = []

    def short(*arguments):
        calls.append(arguments)
        return classifier.network((1, 28, 28), 10).eval()

    monkeypatch.setattr(classifier, "train", short)
    cached, same = classifier.trained(data, tmp_path, cpu)
    assert not calls and same == accuracy
    assert torch.equal(classifier.features(cached, data.test_images), classifier.features(network, data.test_images))
    (file,) = tmp_path.glob("*.pt")
    assert data.digest in file.name
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)
    classifier.trained(data, tmp_path, cpu)
    assert len(calls) == 1 and "damaged" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_bits():
    data = load("digits", "")
    made = [classifier.train(data.train_images, data.train_labels, 10, 3, torch.device("cpu"), passes=1, least_steps=20) for _ in range(2)]
    for a, b in zip(made[0].parameters(), made[1].parameters(), strict=True):
        assert torch.equal(a, b)
