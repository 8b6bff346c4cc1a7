"""Scores against scikit-learn and torch-fidelity, and Inception features through torch-fidelity's own network."""

import hashlib
import itertools

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from sklearn.metrics import accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from common import inception
from common.metrics import (
    clustering_accuracy,
    contingency,
    error_rate,
    frechet_distance,
    moments,
    nearest_neighbour,
    normalised_mutual_information,
)
from common.run import UserError


def two_feature_sets(n: int = 400, d: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(d, d, generator=generator) / 4
    return torch.randn(n, d, generator=generator), torch.randn(n, d, generator=generator) @ mix + 0.3


def test_error_rate_is_one_minus_accuracy():
    predicted, labels = torch.tensor([0, 1, 2, 2, 1]), torch.tensor([0, 1, 1, 2, 0])
    expected = 100 * (1 - accuracy_score(labels, predicted))
    assert error_rate(predicted, labels) == pytest.approx(expected) == pytest.approx(40)


def test_nearest_neighbour_is_scikit_learns():
    generator = torch.Generator().manual_seed(1)
    train, test = torch.rand(50, 1, 6, 6, generator=generator), torch.rand(230, 1, 6, 6, generator=generator)
    labels = torch.randint(5, (50,), generator=generator)
    expected = KNeighborsClassifier(1).fit(train.flatten(1).numpy(), labels.numpy()).predict(test.flatten(1).numpy())
    np.testing.assert_array_equal(nearest_neighbour(train, labels, test, batch=100).numpy(), expected)


def test_moments_are_numpys():
    features, _ = two_feature_sets()
    mean, covariance = moments(features)
    np.testing.assert_allclose(mean.numpy(), features.double().numpy().mean(0), rtol=1e-10)
    np.testing.assert_allclose(covariance.numpy(), np.cov(features.double().numpy(), rowvar=False), rtol=1e-9)


@pytest.mark.parametrize(("n", "d"), [(400, 64), (50, 128)])  # the second with singular covariances
def test_frechet_distance_is_torch_fidelitys(n, d):
    first, second = two_feature_sets(n, d)
    statistics = [fid_features_to_statistics(x.double()) for x in (first, second)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(moments(first), moments(second)) == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_of_known_gaussians():
    zero, eye = torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    assert frechet_distance((zero, eye), (zero, eye)) == pytest.approx(0, abs=1e-12)
    # ‖m‖² + Σ (σ_1 - σ_2)² for diagonal covariances: 9 + (1-2)² + (1-3)² + 0
    other = (torch.tensor([3.0, 0, 0]).double(), torch.diag(torch.tensor([4.0, 9.0, 1.0]).double()))
    assert frechet_distance((zero, eye), other) == pytest.approx(14, rel=1e-12)


def test_frechet_distance_pinned():
    first, second = two_feature_sets()
    assert frechet_distance(moments(first), moments(second)) == pytest.approx(117.2527745649, rel=1e-8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A weights file in the official format, with random values: torch-fidelity's network, saved by itself."""
    import torch_fidelity.feature_extractor_inceptionv3 as module

    path = tmp_path_factory.mktemp("weights") / "weights-inception-2015-12-05-6726825d.pth"
    patch = pytest.MonkeyPatch()
    patch.setattr(module, "load_state_dict_from_url", lambda *a, **k: {})
    patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    torch.manual_seed(0)
    network = module.FeatureExtractorInceptionV3("random", ["2048"])
    patch.undo()
    torch.save(network.state_dict(), path)
    return path


def test_features_are_torch_fidelitys_and_grey_is_repeated(weights, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="not the official Inception weights"):
        inception.find_weights(weights)
    monkeypatch.setattr(inception, "SHA256_PREFIX", hashlib.sha256(weights.read_bytes()).hexdigest()[:8])
    path, reason = inception.find_weights(weights)
    assert path == weights and reason == ""
    network = inception.extractor(path, torch.device("cpu"))
    grey = torch.randint(256, (3, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = inception.features(network, grey, batch=2)
    with torch.no_grad():
        expected = network(grey.repeat(1, 3, 1, 1))[0]
    assert found.shape == (3, 2048)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    both = inception.extractor(path, torch.device("cpu"), str(inception.FEATURES), inception.LOGITS)
    pooled, logits = inception.outputs(both, grey)
    assert logits.shape == (3, 1008)  # of the Inception Score: without the last layer's bias
    torch.testing.assert_close(logits, pooled @ both.fc.weight.T, rtol=1e-4, atol=1e-5)


def test_moments_are_computed_once_per_key_and_again_when_damaged(monkeypatch, tmp_path):
    calls = []

    def features(network, images):
        calls.append(len(images))
        return images.float().flatten(1)

    monkeypatch.setattr(inception, "features", features)
    images = torch.randint(256, (20, 1, 2, 2), dtype=torch.uint8)
    first = inception.cached_moments(None, images, tmp_path, "digits-train-abc")
    second = inception.cached_moments(None, images, tmp_path, "digits-train-abc")
    assert calls == [20] and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    inception.cached_moments(None, images, tmp_path, "digits-test-abc")
    assert calls == [20, 20]
    file = tmp_path / "inception-digits-train-abc.pt"
    file.write_bytes(file.read_bytes()[:-100])
    third = inception.cached_moments(None, images, tmp_path, "digits-train-abc")
    assert calls == [20, 20, 20] and torch.equal(first[1], third[1])


def test_missing_weights_say_where_they_go(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def no_network(*a, **k):
        raise OSError("network is unreachable")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    path, reason = inception.find_weights(None)
    assert path is None and str(tmp_path) in reason and "--inception" in reason
    with pytest.raises(UserError, match="no such file"):
        inception.find_weights(tmp_path / "nothing.pth")


def test_clustering_scores_against_entropies_and_all_permutations():
    g = torch.Generator().manual_seed(0)
    labels, found = torch.randint(4, (300,), generator=g), torch.randint(4, (300,), generator=g)
    found[:150] = (labels[:150] + 1) % 4
    table = contingency(found, labels, 4, 4)
    assert all(table[k, c] == ((found == k) & (labels == c)).sum() for k in range(4) for c in range(4))
    best = max((labels == torch.tensor(p)[found]).float().mean().item() for p in itertools.permutations(range(4)))
    assert clustering_accuracy(table) == pytest.approx(best)
    joint, of_clusters, of_classes = (entropy(counts.flatten()) for counts in (table, table.sum(1), table.sum(0)))
    expected = (of_clusters + of_classes - joint) / (of_clusters * of_classes) ** 0.5
    assert normalised_mutual_information(found, labels) == pytest.approx(expected)
    renamed = (labels + 2) % 4
    assert clustering_accuracy(contingency(renamed, labels, 4, 4)) == 1
    assert normalised_mutual_information(renamed, labels) == pytest.approx(1)
    assert normalised_mutual_information(torch.zeros_like(labels), labels) == 0


def test_accuracy_gives_a_class_to_one_cluster_alone():
    table = torch.tensor([[5.0, 0.0], [3.0, 1.0]])  # many-to-one it would be 8 of 9
    assert clustering_accuracy(table) == pytest.approx(6 / 9)
    assert clustering_accuracy(torch.tensor([[5.0, 0.0, 0.0], [3.0, 1.0, 2.0]])) == pytest.approx(7 / 11)  # K < N


def test_a_frechet_distance_is_never_negative():
    features, _ = two_feature_sets(30, 40)
    assert 0 <= frechet_distance(moments(features), moments(features)) < 1e-6
