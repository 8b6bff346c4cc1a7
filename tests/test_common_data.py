"""Loaders on files in the exact official formats, and every way those files can be wrong."""

import gzip
import struct
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

from common import data
from common.data import choose_labels, load, official_digest
from common.run import UserError


def write_idx(folder: Path, n_train: int = 30, n_test: int = 12, side: int = 28) -> None:
    """Four idx files as the MNIST page describes them: big-endian magic, dimensions, bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for prefix, n in (("train", n_train), ("t10k", n_test)):
        images = generator.integers(0, 256, (n, side, side), dtype=np.uint8)
        labels = (np.arange(n) % 10).astype(np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, n, side, side) + images.tobytes())
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, n) + labels.tobytes())


@pytest.fixture
def root(tmp_path):
    write_idx(tmp_path / "MNIST/raw")
    return tmp_path


def test_digits_are_scikit_learns_and_split_for_good():
    digits = load("digits", "/nowhere")
    assert digits.train_images.shape == (1437, 1, 28, 28) and digits.test_images.shape == (360, 1, 28, 28)
    assert digits.train_images.dtype == torch.uint8 and digits.train_labels.dtype == torch.int64
    assert digits.official and digits.digest == official_digest("digits")
    assert digits.train_labels.bincount().tolist() == [142, 146, 142, 146, 145, 145, 145, 143, 139, 144]
    assert digits.test_labels.bincount().tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    assert digits.train_images.max() == 255 and digits.train_images.min() == 0


def test_other_digits_than_ours_are_refused_unless_asked_for(monkeypatch):
    monkeypatch.setattr(data, "DIGITS_DIGEST", "0" * 16)
    with pytest.raises(UserError, match="not the one our results come from"):
        load("digits", "")
    assert load("digits", "", unofficial=True).official is False


def test_digits_are_interpolated_bilinearly():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits().data
    first = train_test_split(np.arange(len(raw)), test_size=360, random_state=0, stratify=load_digits().target)[0][0]
    small = raw[first].reshape(8, 8) * 255 / 16
    # pixel (i, j) of 28×28 lies at ((i + ½)·8/28 - ½) of 8×8
    at = np.clip((np.arange(28) + 0.5) * 8 / 28 - 0.5, 0, 7)
    low = np.floor(at).astype(int)
    high, t = np.minimum(low + 1, 7), at - low
    rows = small[low] * (1 - t)[:, None] + small[high] * t[:, None]
    expected = rows[:, low] * (1 - t) + rows[:, high] * t
    found = load("digits", "").train_images[0, 0].numpy().astype(float)
    assert np.abs(found - expected).max() <= 0.51


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_the_real_mnist_and_fashion_mnist(data_root, name):
    if not (data_root / data.FOLDER[name] / "t10k-labels-idx1-ubyte").exists():
        pytest.skip(f"{name} is not in {data_root}")
    found = load(name, data_root)
    assert found.train_images.shape == (60000, 1, 28, 28) and found.test_images.shape == (10000, 1, 28, 28)
    assert found.official and found.digest == official_digest(name) and found.n_classes == 10
    if name == "mnist":
        assert found.train_labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
        assert found.class_names == tuple("0123456789")


def test_unofficial_files_are_refused_unless_asked_for(root):
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte: not the official file .*expected ba891046e650.*--unofficial-data"):
        load("mnist", root)
    found = load("mnist", root, unofficial=True)
    assert not found.official and found.digest != official_digest("mnist")
    assert found.train_images.shape == (30, 1, 28, 28) and found.test_labels.tolist() == [i % 10 for i in range(12)]
    raw = np.frombuffer((root / "MNIST/raw/train-images-idx3-ubyte").read_bytes()[16:], np.uint8)
    np.testing.assert_array_equal(found.train_images.numpy().ravel(), raw)
    assert found.provenance()["train_images"] == 30 and found.provenance()["data_official"] is False


DAMAGE = {
    "empty": lambda b: b"",
    "header cut": lambda b: b[:10],
    "one byte short": lambda b: b[:-1],
    "one byte more": lambda b: b + b"\0",
    "half": lambda b: b[: len(b) // 2],
    "wrong magic": lambda b: b"\x89PNG" + b[4:],
    "wrong type of number": lambda b: b[:2] + b"\x0d" + b[3:],
    "no images": lambda b: b[:4] + bytes(4) + b[8:16],
    "absurd dimensions": lambda b: b[:4] + b"\xff" * 12 + b[16:],
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_damaged_idx_files(root, file, damage):
    path = root / "MNIST/raw" / file
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    for unofficial in (False, True):
        with pytest.raises(UserError) as error:
            load("mnist", root, unofficial)
        assert "\n" not in str(error.value) and "MNIST" in str(error.value)


def test_a_flipped_bit_is_found(root, monkeypatch):
    import hashlib

    folder = root / "MNIST/raw"
    digests = {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in data.SHA256["mnist"]}
    monkeypatch.setitem(data.SHA256, "mnist", digests)
    assert load("mnist", root).official
    content = bytearray((folder / "t10k-images-idx3-ubyte").read_bytes())
    content[1000] ^= 4
    (folder / "t10k-images-idx3-ubyte").write_bytes(bytes(content))
    with pytest.raises(UserError, match="t10k-images-idx3-ubyte: not the official file"):
        load("mnist", root)


def test_files_that_do_not_fit_together(root):
    folder = root / "MNIST/raw"
    (folder / "train-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 29) + bytes(29))
    with pytest.raises(UserError, match="30 train images but 29 labels"):
        load("mnist", root, unofficial=True)
    (folder / "train-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 30) + bytes([11] * 30))
    with pytest.raises(UserError, match="label is 11, expected 0 … 9"):
        load("mnist", root, unofficial=True)
    write_idx(folder, side=8)
    with pytest.raises(UserError, match="8×8, expected 28×28"):
        load("mnist", root, unofficial=True)


def test_a_folder_in_the_place_of_a_file(root):
    path = root / "MNIST/raw/t10k-images-idx3-ubyte"
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="t10k-images-idx3-ubyte: cannot be read"):
        load("mnist", root, unofficial=True)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*a, **k):
        raise URLError("network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def test_missing_data_without_network_says_where_to_put_which_files(tmp_path, no_network):
    with pytest.raises(UserError) as error:
        load("fashion_mnist", tmp_path)
    message = str(error.value)
    assert str(tmp_path / "FashionMNIST/raw") in message and "train-images-idx3-ubyte" in message
    assert "--data" in message and "digits" in message and "\n" not in message
    assert "network is unreachable" in message
    assert not list((tmp_path / "FashionMNIST/raw").glob(".download*"))


def test_archives_that_a_person_brought_are_unpacked(data_root, tmp_path, monkeypatch, no_network):
    folder = tmp_path / "MNIST/raw"
    folder.mkdir(parents=True)
    for file in data.SHA256["mnist"]:
        content = (data_root / "MNIST/raw" / file).read_bytes()
        (folder / f"{file}.gz").write_bytes(gzip.compress(content, 1))
    # The archives' own MD5s are torchvision's to check; ours differ in compression, so the check is told of them.
    import hashlib

    import torchvision.datasets as sets

    resources = [(f"{f}.gz", hashlib.md5((folder / f"{f}.gz").read_bytes()).hexdigest()) for f in data.SHA256["mnist"]]
    monkeypatch.setattr(sets.MNIST, "resources", resources)
    assert load("mnist", tmp_path).official
    assert sorted(p.name for p in folder.iterdir() if not p.name.endswith(".gz")) == sorted([".lock", *data.SHA256["mnist"]])


def test_unknown_data_set():
    with pytest.raises(UserError, match="unknown data set 'minst'; known: digits, mnist"):
        load("minst", "")


# ------------------------------------------------------------------------------------------------------------ label draws

LABELS = torch.arange(10).repeat_interleave(100)[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]


def test_random_labels_are_uniform_and_fixed_by_the_seed():
    draws = [choose_labels(LABELS, 100, "random", 10, seed) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert len(draws[0].unique()) == 100
    counts = torch.stack([LABELS[choose_labels(LABELS, 200, "random", 10, s)].bincount(minlength=10) for s in range(200)]).double()
    assert abs(counts.mean(0) - 20).max() < 1.2
    assert 3 < counts.std(0).mean() < 4.6  # hypergeometric: 3.8; a stratified draw would have 0


def test_stratified_labels_have_equal_counts_and_a_random_remainder():
    chosen = choose_labels(LABELS, 100, "stratified", 10, 4)
    assert LABELS[chosen].bincount().tolist() == [10] * 10
    counts = LABELS[choose_labels(LABELS, 103, "stratified", 10, 4)].bincount()
    assert sorted(counts.tolist()) == [10] * 7 + [11] * 3
    assert len(choose_labels(LABELS, 1000, "stratified", 10, 0).unique()) == 1000


def test_label_budgets_that_cannot_be_met():
    with pytest.raises(UserError, match="1001 labels asked for, but the training set has 1000"):
        choose_labels(LABELS, 1001, "random", 10, 0)
    with pytest.raises(UserError, match=r"none of class .*--labels stratified"):
        choose_labels(LABELS, 12, "random", 10, 0)
    with pytest.raises(UserError, match="none of class"):
        choose_labels(LABELS.sort().values, 50, "first", 10, 0)
    rare = torch.cat([torch.zeros(99), torch.ones(1)]).long()
    with pytest.raises(UserError, match="5 labels of class 1 asked for, but it has 1"):
        choose_labels(rare, 10, "stratified", 2, 0)
