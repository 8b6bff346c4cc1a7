"""Loaders on files in the exact official formats, and every way those files can be wrong."""

import gzip
import hashlib
import io
import os
import pickle
import shutil
import struct
import sys
import tarfile
import threading
import time
import tracemalloc
import zipfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, STL10, SVHN, CelebA, Flowers102

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
    monkeypatch.setitem(sys.modules, "gdown", None)


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
    import torchvision.datasets as sets

    resources = [(f"{f}.gz", hashlib.md5((folder / f"{f}.gz").read_bytes()).hexdigest()) for f in data.SHA256["mnist"]]
    monkeypatch.setattr(sets.MNIST, "resources", resources)
    assert load("mnist", tmp_path).official
    assert sorted(p.name for p in folder.iterdir() if not p.name.endswith(".gz")) == sorted([".lock", *data.SHA256["mnist"]])


def test_unknown_data_set():
    with pytest.raises(UserError, match="unknown data set 'minst'; known: digits, mnist") as error:
        load("minst", "")
    for name in (*data.OFFICIAL_COUNTS, "folder:<path>", "folder_colour:<path>", "signs:<path>"):
        assert f" {name}" in str(error.value)


def test_official_counts_and_digests(data_root):
    for name in ("digits", "mnist", "fashion_mnist"):
        if name == "digits" or (data_root / data.FOLDER[name]).exists():
            found = load(name, data_root)
            assert data.OFFICIAL_COUNTS[name] == (len(found.train_images), len(found.test_images))


def test_official_counts_are_those_of_the_papers_and_the_data_sets_pages():
    assert data.OFFICIAL_COUNTS["svhn_extra"][0] - data.OFFICIAL_COUNTS["svhn"][0] == 531_131
    assert data.OFFICIAL_COUNTS["celeba"][0] - data.OFFICIAL_COUNTS["celeba_train"][0] == 19_867
    assert sum(data.OFFICIAL_COUNTS["celeba"]) == 202_599
    assert data.OFFICIAL_COUNTS["cifar10"] == (5 * 10_000, 10_000)  # five batches and one
    assert data.OFFICIAL_COUNTS["stl10"] == (10 * 500, 10 * 800)  # of each class
    assert data.OFFICIAL_COUNTS["flowers10"][0] == 10 * 10 and data.OFFICIAL_COUNTS["flowers10_all"][0] == 2 * 10 * 10 + 322
    unknown_beforehand = ("celeba", "celeba_train", "flowers10", "flowers10_all", "folder:x", "signs:x")
    assert [official_digest(name) for name in unknown_beforehand] == [None] * 6
    digests = {official_digest(name) for name in data.OFFICIAL_COUNTS if name not in unknown_beforehand}
    assert len(digests) == 7 and all(len(digest) == 16 for digest in digests)


# ------------------------------------------------------------------------------------------------------------------ SVHN


def svhn_arrays(n: int, seed: int) -> dict[str, np.ndarray]:
    """X and y as Stanford's files have them."""
    rng = np.random.default_rng(seed)
    return {"X": rng.integers(0, 256, (32, 32, 3, n), dtype=np.uint8), "y": (np.arange(n) % 10 + 1).astype(np.uint8)[:, None]}


def write_svhn(folder: Path, compressed: bool = True) -> dict[str, dict[str, np.ndarray]]:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {split: svhn_arrays(n, n) for split, n in (("train", 25), ("test", 13), ("extra", 31))}
    for split, content in arrays.items():
        scipy.io.savemat(folder / f"{split}_32x32.mat", content, do_compression=compressed)
    return arrays


def make_svhn_official(folder: Path, monkeypatch) -> None:
    files = {split: (url, file, hashlib.md5((folder / file).read_bytes()).hexdigest()) for split, (url, file, _) in SVHN.split_list.items()}
    monkeypatch.setattr(SVHN, "split_list", files)


@pytest.mark.parametrize("compressed", [True, False])
def test_svhn_is_read_pixel_by_pixel(tmp_path, monkeypatch, compressed):
    arrays = write_svhn(tmp_path / "SVHN", compressed)
    make_svhn_official(tmp_path / "SVHN", monkeypatch)
    for name, train in (("svhn", ["train"]), ("svhn_extra", ["train", "extra"])):
        found = load(name, tmp_path)
        for images, labels, splits in (
            (found.train_images, found.train_labels, train),
            (found.test_images, found.test_labels, ["test"]),
        ):
            assert images.dtype == torch.uint8 and labels.dtype == torch.int64 and images.is_contiguous()
            assert images.untyped_storage().nbytes() == images.numel() == 3072 * len(labels)  # held once
            i = 0
            for x, y in ((arrays[split]["X"], arrays[split]["y"]) for split in splits):
                for j in range(len(y)):
                    image = x[:, :, :, j]  # rows, columns, channels
                    for channel in range(3):
                        np.testing.assert_array_equal(images[i, channel].numpy(), image[:, :, channel])
                    assert labels[i] == (0 if y[j, 0] == 10 else y[j, 0])
                    i += 1
            assert i == len(images)
        assert found.official and found.digest == official_digest(name) and found.class_names == tuple("0123456789")
        np.testing.assert_array_equal(SVHN(tmp_path / "SVHN", "test").labels, found.test_labels.numpy())
        np.testing.assert_array_equal(SVHN(tmp_path / "SVHN", "test").data, found.test_images.numpy())


def test_unofficial_svhn_is_refused_unless_asked_for(tmp_path):
    write_svhn(tmp_path / "SVHN")
    with pytest.raises(UserError, match=r"train_32x32.mat: not the official file \(MD5 .*expected e26dedcc434d.*--unofficial-data"):
        load("svhn", tmp_path)
    found = load("svhn", tmp_path, unofficial=True)
    assert not found.official and found.digest != official_digest("svhn") and len(found.train_images) == 25


def test_a_flipped_bit_in_svhn_is_found(tmp_path, monkeypatch):
    write_svhn(tmp_path / "SVHN", compressed=False)
    make_svhn_official(tmp_path / "SVHN", monkeypatch)
    digest = load("svhn_extra", tmp_path).digest
    path = tmp_path / "SVHN/extra_32x32.mat"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="extra_32x32.mat: not the official file"):
        load("svhn_extra", tmp_path)
    assert load("svhn", tmp_path).official  # which has no business with that file
    assert load("svhn_extra", tmp_path, unofficial=True).digest != digest


SVHN_MISTAKES = {
    "no X": (lambda a: {"y": a["y"]}, "has no X, but y"),
    "no y": (lambda a: {"X": a["X"], "labels": a["y"]}, "has no y, but X, labels"),
    "other names": (lambda a: {"a": a["y"]}, "has no X and no y, but a"),
    "images first": (lambda a: {**a, "X": a["X"].transpose(3, 0, 1, 2)}, "X is 25×32×32×3, expected 32×32×3×N"),
    "grey": (lambda a: {**a, "X": a["X"][:, :, 0]}, "X is 32×32×25, expected"),
    "no images": (lambda a: {"X": a["X"][..., :0], "y": a["y"][:0]}, "X is 32×32×3×0, expected"),
    "floats": (lambda a: {**a, "X": a["X"] / 255}, "X holds float64, expected uint8"),
    "complex": (lambda a: {**a, "X": a["X"] + 0j}, "X holds complex128, expected uint8"),
    "too few labels": (lambda a: {**a, "y": a["y"][:-1]}, "y is 24×1, expected 25×1"),
    "a row of labels": (lambda a: {**a, "y": a["y"].T}, "y is 1×25, expected 25×1"),
    "text labels": (lambda a: {**a, "y": np.array(["a"] * 25)[:, None].astype(object)}, "y holds object, expected numbers"),
    "sparse labels": (lambda a: {**a, "y": scipy.sparse.csc_matrix(a["y"].astype(float))}, "y holds float64, expected numbers"),
    "labels from 0": (lambda a: {**a, "y": a["y"] - 1}, "a label is 0, expected 1 … 10"),
    "label 11": (lambda a: {**a, "y": a["y"] + 1}, "a label is 11, expected 1 … 10"),
    "half a label": (lambda a: {**a, "y": a["y"] + 0.5}, "a label is 1.5, expected 1 … 10"),
    "no number": (lambda a: {**a, "y": a["y"] * np.nan}, "a label is nan, expected 1 … 10"),
}


@pytest.mark.parametrize("mistake", SVHN_MISTAKES)
def test_mat_files_that_hold_something_else(tmp_path, mistake):
    arrays = write_svhn(tmp_path / "SVHN")["train"]
    change, message = SVHN_MISTAKES[mistake]
    scipy.io.savemat(tmp_path / "SVHN/train_32x32.mat", change(arrays))
    with pytest.raises(UserError) as error:
        load("svhn", tmp_path, unofficial=True)
    assert message in str(error.value) and "train_32x32.mat: " in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("compressed", [True, False])
def test_damaged_mat_files(tmp_path, compressed):
    write_svhn(tmp_path / "SVHN", compressed)
    path = tmp_path / "SVHN/test_32x32.mat"
    whole = path.read_bytes()
    hdf5 = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(400)
    cuts = [whole[:n] for n in (1, 60, 130, 150, 200, 5000, len(whole) // 2, len(whole) - 40)]
    for content in (b"", b"\x89PNG" + whole[4:100], b"<html>quota exceeded</html>" * 20, hdf5, bytes(5000), *cuts):
        path.write_bytes(content)
        with pytest.raises(UserError, match="test_32x32.mat: (not a readable MATLAB file|has no)") as error:
            load("svhn", tmp_path, unofficial=True)
        assert "\n" not in str(error.value)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="test_32x32.mat: cannot be read"):
        load("svhn", tmp_path, unofficial=True)


def test_missing_svhn_without_network_says_where_to_put_which_files(tmp_path, no_network):
    left = tmp_path / "SVHN/.download-killed"
    left.mkdir(parents=True)
    (left / "half").write_bytes(bytes(100))
    with pytest.raises(UserError) as error:
        load("svhn_extra", tmp_path)
    message = str(error.value)
    for said in (str(tmp_path / "SVHN"), "train_32x32.mat, extra_32x32.mat, test_32x32.mat", "--data", "digits", "unreachable"):
        assert said in message
    assert "\n" not in message
    assert [path.name for path in (tmp_path / "SVHN").iterdir()] == [".lock"]  # nor what a killed process left


class Answer(io.BytesIO):
    """What urlopen gives, of a server that may hang up early."""

    def __init__(self, url: str, content: bytes, dies_at: int | None = None):
        super().__init__(content)
        self.url, self.length, self.dies_at = url, len(content), dies_at

    def read(self, size: int = -1) -> bytes:
        if self.dies_at is not None and self.tell() >= self.dies_at:
            raise ConnectionResetError("connection reset by peer")
        return super().read(size)


def test_a_download_that_dies_leaves_whole_files_only(tmp_path, monkeypatch):
    write_svhn(tmp_path / "server")
    make_svhn_official(tmp_path / "server", monkeypatch)
    asked, dies_at = set(), 40_000

    def urlopen(request, *a, **k):
        file = request.full_url.rsplit("/", 1)[-1]
        asked.add(file)
        return Answer(request.full_url, (tmp_path / "server" / file).read_bytes(), dies_at if "extra" in file else None)

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    root = tmp_path / "root"
    with pytest.raises(UserError, match="reset by peer.*Put train_32x32.mat, extra_32x32.mat"):
        load("svhn_extra", root)
    assert sorted(path.name for path in (root / "SVHN").iterdir()) == [".lock", "test_32x32.mat", "train_32x32.mat"]
    dies_at = None
    asked.clear()
    assert load("svhn_extra", root).official and asked == {"extra_32x32.mat"}


# ---------------------------------------------------------------------------------------------------------------- CelebA

ATTRIBUTES = (
    "5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose Black_Hair Blond_Hair Blurry "
    "Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee Gray_Hair Heavy_Makeup High_Cheekbones Male Mouth_Slightly_Open "
    "Mustache Narrow_Eyes No_Beard Oval_Face Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks Sideburns Smiling Straight_Hair "
    "Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace Wearing_Necktie Young"
).split()


def write_celeba(folder: Path, partition: tuple[int, ...] = (0, 0, 0, 1, 0, 2, 1, 2, 0, 2, 2, 0)) -> np.ndarray:
    """Images and text files as the publisher's; the attributes (N, 40), ±1."""
    (folder / "img_align_celeba").mkdir(parents=True)
    rng = np.random.default_rng(0)
    attributes = rng.choice([-1, 1], (len(partition), 40))
    attributes[:4, [ATTRIBUTES.index("Male"), ATTRIBUTES.index("Smiling")]] = [[-1, -1], [-1, 1], [1, -1], [1, 1]]
    names = [f"{i + 1:06d}.jpg" for i in range(len(partition))]
    for name in names:
        coarse = Image.fromarray(rng.integers(0, 256, (11, 9, 3), dtype=np.uint8))
        coarse.resize((178, 218), Image.Resampling.BICUBIC).save(folder / "img_align_celeba" / name, quality=90)
    rows = [f"{name} {' '.join(f'{a:2d}' for a in row)}\n" for name, row in zip(names, attributes, strict=True)]
    (folder / "list_attr_celeba.txt").write_text(f"{len(names)}\n{' '.join(ATTRIBUTES)} \n" + "".join(rows))
    (folder / "list_eval_partition.txt").write_text("".join(f"{n} {p}\n" for n, p in zip(names, partition, strict=True)))
    return attributes


@pytest.fixture
def celeba(tmp_path, monkeypatch) -> Path:
    """A data folder with a small CelebA; the user's cache is elsewhere, so that no test writes into the real one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_celeba(tmp_path / "data/celeba")
    return tmp_path / "data"


def make_celeba_official(folder: Path, monkeypatch, *more: str) -> None:
    files = {"list_attr_celeba.txt", "list_eval_partition.txt", *more}
    md5 = {file: hashlib.md5((folder / file).read_bytes()).hexdigest() for file in files}
    monkeypatch.setattr(CelebA, "file_list", [(i, md5.get(file, official), file) for i, official, file in CelebA.file_list])


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """How many images each call of the decoder was for."""
    counts, real = [], data._decode
    monkeypatch.setattr(data, "_decode", lambda paths, *a: (counts.append(len(paths)), real(paths, *a))[1])
    return counts


def face(path: Path) -> np.ndarray:
    """(3, 64, 64), by another way: the crop by indices, then PIL's resize."""
    crop = np.asarray(Image.open(path))[39:179, 19:159]
    assert crop.shape == (140, 140, 3)
    return np.moveaxis(np.asarray(Image.fromarray(crop).resize((64, 64), Image.BILINEAR)), 2, 0)


def test_celeba_is_cropped_resized_split_and_labelled(celeba, monkeypatch):
    make_celeba_official(celeba / "celeba", monkeypatch)
    names = [line.split() for line in (celeba / "celeba/list_eval_partition.txt").read_text().splitlines()]
    attributes = {
        line.split()[0]: dict(zip(ATTRIBUTES, line.split()[1:], strict=True))
        for line in (celeba / "celeba/list_attr_celeba.txt").read_text().splitlines()[2:]
    }
    for name, parts, count in (("celeba", "01", (8, 4)), ("celeba_train", "0", (6, 4))):
        found = load(name, celeba)
        assert found.official and (len(found.train_images), len(found.test_images)) == count
        train = [image for part in parts for image, p in names if p == part]  # the valid images after the training images
        for images, labels, expected in (
            (found.train_images, found.train_labels, train),
            (found.test_images, found.test_labels, [image for image, p in names if p == "2"]),
        ):
            assert images.dtype == torch.uint8 and labels.dtype == torch.int64
            for image, label, file in zip(images, labels, expected, strict=True):
                np.testing.assert_array_equal(image.numpy(), face(celeba / "celeba/img_align_celeba" / file))
                male, smiling = attributes[file]["Male"] == "1", attributes[file]["Smiling"] == "1"
                assert found.class_names[label] == f"{'male' if male else 'not male'}, {'smiling' if smiling else 'not smiling'}"
        assert found.train_labels[:3].tolist() == [0, 1, 2] and found.n_classes == 4
    # torch's own antialiased bilinear agrees to rounding: no other filter, no shift by a pixel
    crop = torch.from_numpy(np.array(Image.open(celeba / "celeba/img_align_celeba/000001.jpg")))[39:179, 19:159].permute(2, 0, 1)
    other = torch.nn.functional.interpolate(crop[None].float(), size=64, mode="bilinear", antialias=True)[0]
    assert (other - load("celeba", celeba).train_images[0]).abs().max() <= 1.01


def test_a_subset_of_celeba_is_refused_unless_asked_for(celeba, monkeypatch):
    with pytest.raises(
        UserError, match=r"list_attr_celeba.txt: not the official file \(MD5 .*expected 75e246fa4810.*a subset.*--unofficial"
    ):
        load("celeba", celeba)
    assert not list((celeba / "celeba").glob("*.bin"))
    found = load("celeba", celeba, unofficial=True)
    assert not found.official and len(found.train_images) == 8
    # one official file is not enough
    make_celeba_official(celeba / "celeba", monkeypatch)
    path = celeba / "celeba/list_eval_partition.txt"
    path.write_text(path.read_text().replace("000001.jpg 0", "000001.jpg 2"))
    with pytest.raises(UserError, match="list_eval_partition.txt: not the official file"):
        load("celeba", celeba)
    other = load("celeba", celeba, unofficial=True)
    assert not other.official and other.digest != found.digest


def test_celeba_is_decoded_once(celeba, decoded, capsys):
    first = load("celeba", celeba, unofficial=True)
    assert "decoding 12 images, once" in capsys.readouterr().out
    again = load("celeba", celeba, unofficial=True)
    other = load("celeba_train", celeba, unofficial=True)
    assert decoded == [12] and capsys.readouterr().out == ""
    assert torch.equal(first.train_images, again.train_images) and torch.equal(first.test_images, again.test_images)
    assert first.digest == again.digest and torch.equal(other.train_images, first.train_images[:6])
    (cache,) = (celeba / "celeba").glob("*.bin")
    assert hashlib.sha256(cache.read_bytes()).hexdigest() in Path(f"{cache}.sha256").read_text()
    assert not (celeba.parent / "cache").exists()
    # other images, or other text files, are another cache
    path = celeba / "celeba/img_align_celeba/000002.jpg"
    Image.new("RGB", (178, 218), "red").save(path)
    changed = load("celeba", celeba, unofficial=True)
    assert decoded == [12, 12] and changed.digest != first.digest and changed.train_images[1, 0].min() > 250
    # and so is another image of as many bytes
    capsys.readouterr()
    content, at = bytearray(path.read_bytes()), path.read_bytes().rindex(b"\xff\xda") + 20
    content[at] ^= 0x55
    path.write_bytes(content)
    same_size = load("celeba", celeba, unofficial=True)
    assert decoded == [12, 12, 12] and same_size.digest != changed.digest
    assert "older than some of the images; the images are decoded anew" in capsys.readouterr().out


CACHE_DAMAGE = {
    "a flipped bit": lambda pixels, sha: pixels.write_bytes(pixels.read_bytes()[:-1] + bytes([pixels.read_bytes()[-1] ^ 1])),
    "cut short": lambda pixels, sha: pixels.write_bytes(pixels.read_bytes()[:-1]),
    "empty": lambda pixels, sha: pixels.write_bytes(b""),
    "too long": lambda pixels, sha: pixels.write_bytes(pixels.read_bytes() + b"\0"),
    "digest cut": lambda pixels, sha: sha.write_text(sha.read_text()[:30]),
    "digest is junk": lambda pixels, sha: sha.write_bytes(b"\xff" * 99),
    "digest empty": lambda pixels, sha: sha.write_bytes(b""),
}


@pytest.mark.parametrize("damage", CACHE_DAMAGE)
def test_a_damaged_cache_is_made_anew_aloud(celeba, decoded, capsys, damage):
    first = load("celeba", celeba, unofficial=True)
    (cache,) = (celeba / "celeba").glob("*.bin")
    CACHE_DAMAGE[damage](cache, Path(f"{cache}.sha256"))
    capsys.readouterr()
    again = load("celeba", celeba, unofficial=True)
    out = capsys.readouterr().out
    assert f"{cache}: damaged" in out and "decoding 12 images" in out
    assert decoded == [12, 12] and again.digest == first.digest and torch.equal(again.train_images, first.train_images)
    load("celeba", celeba, unofficial=True)
    assert decoded == [12, 12] and capsys.readouterr().out == ""


def test_a_kill_between_the_cache_and_its_digest(celeba, decoded):
    load("celeba", celeba, unofficial=True)
    (cache,) = (celeba / "celeba").glob("*.bin")
    Path(f"{cache}.sha256").unlink()
    left = cache.with_name(f".{cache.name}.4711.part")
    left.write_bytes(bytes(100))
    load("celeba", celeba, unofficial=True)
    assert decoded == [12, 12] and not left.exists() and Path(f"{cache}.sha256").exists()


def test_the_users_cache_where_the_data_folder_is_read_only(celeba, decoded):
    folder = celeba / "celeba"
    before = sorted(folder.iterdir())
    folder.chmod(0o555)
    try:
        first = load("celeba", celeba, unofficial=True)
        assert load("celeba", celeba, unofficial=True).digest == first.digest and decoded == [12]
        assert sorted(folder.iterdir()) == before
        assert len(list((celeba.parent / "cache/gmm-reproductions").glob("*.bin"))) == 1
    finally:
        folder.chmod(0o755)


def test_no_place_for_the_cache(celeba, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**12, 10**12, 1000))
    with pytest.raises(UserError, match="neither .*celeba nor .*gmm-reproductions can be written and has 0.0 GB free"):
        load("celeba", celeba, unofficial=True)


def test_of_two_processes_the_second_waits_and_finds_the_cache(celeba, monkeypatch, capsys):
    counts, real, found = [], data._decode, []

    def slow(paths, *a):
        counts.append(len(paths))
        time.sleep(0.5)
        return real(paths, *a)

    monkeypatch.setattr(data, "_decode", slow)
    # flock is between open files: two threads that open it each are as good as two processes
    threads = [threading.Thread(target=lambda: found.append(load("celeba", celeba, unofficial=True).digest)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [12] and len(set(found)) == 1 and len(found) == 2
    assert "another process is preparing" in capsys.readouterr().out


def rewrite(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


ATTR, PARTITION = "list_attr_celeba.txt", "list_eval_partition.txt"
CELEBA_MISTAKES = {
    "count": (lambda f: rewrite(f / ATTR, "12\n", "13\n"), "line 1 announces 13 images, 12 rows follow"),
    "no count": (lambda f: rewrite(f / ATTR, "12\n", ""), "line 2 names no attributes Male and Smiling"),
    "rows cut": (lambda f: (f / ATTR).write_text((f / ATTR).read_text()[:-300]), "announces 12 images, 10 rows follow"),
    "a row cut": (lambda f: (f / ATTR).write_text((f / ATTR).read_text()[:-20]), "line 14 has 35 columns, expected 41"),
    "a name less": (lambda f: rewrite(f / ATTR, "Bald ", ""), "line 3 has 41 columns, expected 40"),
    "no Smiling": (lambda f: rewrite(f / ATTR, "Smiling", "Grinning"), "no attributes Male and Smiling (5_o_Clock_Shadow, "),
    "a 0": (lambda f: (f / ATTR).write_text((f / ATTR).read_text().replace("-1", " 0")), "expected 1 or -1"),
    "an image twice": (lambda f: rewrite(f / ATTR, "000004.jpg", "000003.jpg"), "1 images have several rows"),
    "empty": (lambda f: (f / ATTR).write_text(""), "names no attributes Male and Smiling (nothing)"),
    "not text": (lambda f: (f / ATTR).write_bytes(bytes(range(256)) * 10), "names no attributes Male and Smiling"),
    "other images": (
        lambda f: rewrite(f / ATTR, "000003.jpg", "x3.jpg"),
        "no attributes of 1 images that the partition names (000003.jpg)",
    ),
    "partition 3": (lambda f: rewrite(f / PARTITION, "3.jpg 0", "3.jpg 3"), "line 3 is '000003.jpg 3', expected an image and 0, 1 or 2"),
    "no partition": (lambda f: rewrite(f / PARTITION, "3.jpg 0", "3.jpg"), "line 3 is '000003.jpg', expected"),
    "an image again": (lambda f: rewrite(f / PARTITION, "000003", "000001"), "line 3 names 000001.jpg a second time"),
    "empty partition": (lambda f: (f / PARTITION).write_text(""), "names 0 training and 0 test images"),
    "no test images": (lambda f: (f / PARTITION).write_text("000001.jpg 0\n"), "names 1 training and 0 test images"),
    "binary partition": (lambda f: (f / PARTITION).write_bytes(b"\xff\xd8" * 50), "line 1 is "),
    "missing image": (lambda f: (f / "img_align_celeba/000005.jpg").unlink(), "1 of 12 images that list_eval_partition.txt names"),
    "many missing": (
        lambda f: [(f / f"img_align_celeba/00000{i}.jpg").unlink() for i in range(2, 8)],
        "6 of 12 images that list_eval_partition.txt names are not there (000002.jpg, 000003.jpg, 000004.jpg …)",
    ),
    "a folder for an image": (
        lambda f: ((f / "img_align_celeba/000005.jpg").unlink(), (f / "img_align_celeba/000005.jpg").mkdir()),
        "not there (000005.jpg)",
    ),
    "a file for the images": (
        lambda f: (shutil.rmtree(f / "img_align_celeba"), (f / "img_align_celeba").write_text("")),
        "img_align_celeba: cannot be read (Not a directory)",
    ),
    "cut image": (
        lambda f: os.truncate(f / "img_align_celeba/000007.jpg", 1500),
        "000007.jpg: not a usable image (image file is truncated",
    ),
    "empty image": (lambda f: os.truncate(f / "img_align_celeba/000007.jpg", 0), "000007.jpg: not a usable image (cannot identify"),
    "a page for an image": (
        lambda f: (f / "img_align_celeba/000007.jpg").write_text("<html>quota exceeded</html>"),
        "000007.jpg: not a usable image",
    ),
    "in-the-wild image": (
        lambda f: Image.new("RGB", (409, 687)).save(f / "img_align_celeba/000009.jpg"),
        "000009.jpg: not a usable image (409×687 pixels, expected 178×218)",
    ),
}


@pytest.mark.parametrize("mistake", CELEBA_MISTAKES)
def test_celeba_files_that_are_wrong(celeba, mistake):
    change, message = CELEBA_MISTAKES[mistake]
    change(celeba / "celeba")
    for _ in range(2):  # a failure leaves nothing that a second start would take for good
        with pytest.raises(UserError) as error:
            load("celeba", celeba, unofficial=True)
        assert message in str(error.value) and str(celeba / "celeba") in str(error.value) and "\n" not in str(error.value)
    assert not list((celeba / "celeba").glob("*.bin"))


def test_missing_celeba_without_network_says_where_to_put_which_files(tmp_path, no_network):
    with pytest.raises(UserError) as error:
        load("celeba", tmp_path)
    message = str(error.value)
    files = "img_align_celeba, list_attr_celeba.txt, list_eval_partition.txt"
    for said in (str(tmp_path / "celeba"), files, "--data", "digits", "'gdown' is required", "pip install gdown"):
        assert said in message
    assert "\n" not in message and [path.name for path in (tmp_path / "celeba").iterdir()] == [".lock"]


def test_an_archive_of_celeba_that_a_person_brought_is_unpacked(celeba, no_network, monkeypatch):
    folder = celeba / "celeba"
    with zipfile.ZipFile(folder / "img_align_celeba.zip", "w") as archive:
        for path in sorted((folder / "img_align_celeba").iterdir()):
            archive.write(path, f"img_align_celeba/{path.name}")
    shutil.rmtree(folder / "img_align_celeba")
    with pytest.raises(UserError, match="the img_align_celeba.zip there is not the official one"):
        load("celeba", celeba)
    make_celeba_official(folder, monkeypatch, "img_align_celeba.zip")
    assert load("celeba", celeba).official
    assert not list(folder.glob(".download*")) and len(list((folder / "img_align_celeba").iterdir())) == 12


def test_celeba_is_downloaded_piece_by_piece(celeba, tmp_path, monkeypatch):
    from types import SimpleNamespace

    folder, root = celeba / "celeba", tmp_path / "root"
    with zipfile.ZipFile(folder / "img_align_celeba.zip", "w") as archive:
        for path in (folder / "img_align_celeba").iterdir():
            archive.write(path, f"img_align_celeba/{path.name}")
    make_celeba_official(folder, monkeypatch, "img_align_celeba.zip")
    files, quota = {file_id: file for file_id, _, file in CelebA.file_list}, True

    def download(id, output, **_):
        if quota and files[id] == "list_attr_celeba.txt":
            raise Exception("Too many users have viewed or downloaded this file recently")  # gdown's own is an Exception
        shutil.copy(folder / files[id], output)

    monkeypatch.setitem(sys.modules, "gdown", SimpleNamespace(download=download))
    with pytest.raises(UserError, match="could not be downloaded .Too many users"):
        load("celeba", root)
    assert sorted(path.name for path in (root / "celeba").iterdir()) == [".lock", "img_align_celeba"]
    shutil.rmtree(folder / "img_align_celeba")
    (folder / "img_align_celeba.zip").unlink()
    quota = False
    assert load("celeba", root).official


def test_twenty_images_of_the_real_celeba(data_root, celeba):
    real, folder = data_root / "celeba", celeba / "celeba"
    if not (real / "img_align_celeba/000001.jpg").exists():
        pytest.skip(f"no CelebA in {data_root}")
    names = [f"{i:06d}.jpg" for i in range(1, 21)]
    for name in names:
        shutil.copy(real / "img_align_celeba" / name, folder / "img_align_celeba" / name)
    shutil.copyfile(real / ATTR, folder / ATTR)  # more rows than the partition names is well
    (folder / PARTITION).write_text("".join(f"{name} {2 if i >= 15 else 0}\n" for i, name in enumerate(names)))
    found = load("celeba", celeba, unofficial=True)
    np.testing.assert_array_equal(found.test_images[0].numpy(), face(real / "img_align_celeba/000016.jpg"))
    # as their rows say: 000001 is not male and smiles, 000003 is male and does not
    assert found.train_labels[:3].tolist() == [1, 1, 2]


# --------------------------------------------------------------------------------------------------- CIFAR-10 and STL-10

CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def python2(thing: object) -> bytes:
    """A pickle as Python 2's cPickle wrote CIFAR's, opcode by opcode: protocol 2, text as bytes, numpy by its old name."""
    puts = 0

    def put(code: bytes) -> bytes:
        nonlocal puts
        puts += 1
        return code + (b"q" + bytes([puts]) if puts < 256 else b"r" + struct.pack("<I", puts))

    def text(content: bytes) -> bytes:
        return put(b"U" + bytes([len(content)]) + content if len(content) < 256 else b"T" + struct.pack("<i", len(content)) + content)

    def write(thing: object) -> bytes:
        if isinstance(thing, dict):
            return put(b"}") + b"(" + b"".join(write(key) + write(value) for key, value in thing.items()) + b"u"
        if isinstance(thing, list):
            return put(b"]") + b"(" + b"".join(map(write, thing)) + b"e"
        if isinstance(thing, str | bytes):
            return text(thing.encode() if isinstance(thing, str) else thing)
        if isinstance(thing, int):
            for code, letter, limit in ((b"K", "B", 2**8), (b"M", "H", 2**16), (b"J", "i", 2**31)):
                if 0 <= thing < limit or letter == "i":
                    return code + struct.pack(f"<{letter}", thing)
        assert isinstance(thing, np.ndarray)
        out = put(b"cnumpy.core.multiarray\n_reconstruct\n") + put(b"cnumpy\nndarray\n") + put(b"K\0\x85") + text(b"b")
        out += put(b"\x87") + put(b"R") + b"(K\x01" + b"".join(map(write, thing.shape)) + put(b"\x86" if thing.ndim == 2 else b"\x85")
        out += put(b"cnumpy\ndtype\n") + text(thing.dtype.str[1:].encode()) + put(b"K\0K\x01\x87") + put(b"R") + b"(K\x03"
        out += text(thing.dtype.str[:1].encode()) + b"NNN" + 2 * b"J\xff\xff\xff\xff" + put(b"K\0t") + b"b\x89"
        return out + text(thing.tobytes()) + put(b"t") + b"b"

    return b"\x80\x02" + write(thing) + b"."


def cifar_batch(n: int, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "batch_label": f"training batch {seed} of 5",
        "labels": rng.integers(0, 10, n).tolist(),
        "data": rng.integers(0, 256, (n, 3072), dtype=np.uint8),
        "filenames": [f"leptodactylus_pentadactylus_s_{i:06d}.png" for i in range(n)],
    }


def write_cifar(folder: Path) -> dict[str, dict]:
    folder.mkdir(parents=True, exist_ok=True)
    batches = {file: cifar_batch(n, n) for n, file in enumerate(BATCHES, start=2)}
    for file, batch in batches.items():
        (folder / file).write_bytes(python2(batch))
    meta = {"num_cases_per_batch": 10000, "label_names": CIFAR10_CLASSES, "num_vis": 3072}
    (folder / "batches.meta").write_bytes(python2(meta))
    return batches


def make_cifar_official(folder: Path, monkeypatch) -> None:
    md5 = [[file, hashlib.md5((folder / file).read_bytes()).hexdigest()] for file in BATCHES]
    monkeypatch.setattr(CIFAR10, "train_list", md5[:5])
    monkeypatch.setattr(CIFAR10, "test_list", md5[5:])


@pytest.fixture
def cifar(tmp_path) -> Path:
    """A data folder with a small CIFAR-10."""
    write_cifar(tmp_path / "data/cifar-10-batches-py")
    return tmp_path / "data"


def test_cifar10_is_read_pixel_by_pixel(tmp_path, monkeypatch):
    batches, folder = write_cifar(tmp_path / "cifar-10-batches-py"), tmp_path / "cifar-10-batches-py"
    make_cifar_official(folder, monkeypatch)
    # the publisher's own file, byte for byte: so the rest is in its format as well
    assert hashlib.md5((folder / "batches.meta").read_bytes()).hexdigest() == "5ff9c542aee3614f3951f8cda6e48888" == CIFAR10.meta["md5"]
    found = load("cifar10", tmp_path)
    assert found.official and found.name == "cifar10" and found.digest == official_digest("cifar10")
    assert found.class_names == tuple(CIFAR10_CLASSES) and len(found.train_images) == 2 + 3 + 4 + 5 + 6 and len(found.test_images) == 7
    for images, labels, files in (
        (found.train_images, found.train_labels, BATCHES[:5]),
        (found.test_images, found.test_labels, BATCHES[5:]),
    ):
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64 and images.is_contiguous()
        rows = [row for file in files for row in batches[file]["data"]]
        assert labels.tolist() == [label for file in files for label in batches[file]["labels"]]
        for image, row in zip(images, rows, strict=True):
            assert image.shape == (3, 32, 32)
            for channel in range(3):  # red, then green, then blue, each row by row
                for y in (0, 1, 17, 31):
                    begin = 1024 * channel + 32 * y
                    assert image[channel, y].tolist() == row[begin : begin + 32].tolist()
        other = CIFAR10(tmp_path, train=files != BATCHES[5:])
        np.testing.assert_array_equal(other.data.transpose(0, 3, 1, 2), images.numpy())
        assert other.targets == labels.tolist() and other.classes == list(found.class_names)


def test_unofficial_cifar10_is_refused_unless_asked_for(cifar, monkeypatch):
    with pytest.raises(UserError, match=r"data_batch_1: not the official file \(MD5 .*expected c99cafc15224.*--unofficial-data"):
        load("cifar10", cifar)
    found = load("cifar10", cifar, unofficial=True)
    assert not found.official and found.digest != official_digest("cifar10") and len(found.test_images) == 7
    make_cifar_official(cifar / "cifar-10-batches-py", monkeypatch)
    for file in (*BATCHES, "batches.meta"):
        path = cifar / "cifar-10-batches-py" / file
        content = path.read_bytes()
        path.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
        with pytest.raises(UserError, match=f"{file}: not the official file"):
            load("cifar10", cifar)
        path.write_bytes(content)
    assert load("cifar10", cifar).official


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_a_cifar10_that_python_3_wrote(cifar, protocol):
    """As a person makes a subset: numpy by its new name, bytes by another way."""
    before = load("cifar10", cifar, unofficial=True)
    for n, file in enumerate(BATCHES, start=2):
        (cifar / "cifar-10-batches-py" / file).write_bytes(pickle.dumps(cifar_batch(n, n), protocol))
    found = load("cifar10", cifar, unofficial=True)
    assert torch.equal(found.train_images, before.train_images) and torch.equal(found.test_labels, before.test_labels)
    assert found.digest != before.digest


CIFAR_MISTAKES = {
    "no data": (lambda b: {"labels": b["labels"]}, "has no data, but 'labels'; expected CIFAR-10's data and labels"),
    "CIFAR-100": (lambda b: {"data": b["data"], "fine_labels": b["labels"]}, "has no labels, but 'data', 'fine_labels'"),
    "an empty dict": (lambda b: {}, "has no data and no labels, but nothing"),
    "a list": (lambda b: [1], "holds a list, expected a dict with data and labels"),
    "images as they are shown": (lambda b: {**b, "data": b["data"].reshape(-1)}, "data is 21504, expected an array N×3072 of uint8"),
    "other images": (lambda b: {**b, "data": b["data"][:, :784]}, "data is 7×784, expected an array N×3072"),
    "no images": (lambda b: {**b, "data": b["data"][:0], "labels": []}, "data is 0×3072, expected"),
    "floats": (lambda b: {**b, "data": b["data"].astype(np.float32)}, "it holds an array of 'f4', expected uint8"),
    "objects": (lambda b: {**b, "data": b["data"].astype("V1")}, "it holds an array of 'V1', expected uint8"),
    "text": (lambda b: {**b, "data": b["data"].tobytes()}, "data is a str, expected an array"),
    "a label less": (lambda b: {**b, "labels": b["labels"][:-1]}, "test_batch: 6 labels, expected a list of 7: one for each image"),
    "labels as an array": (lambda b: {**b, "labels": np.zeros(7, np.uint8)}, "labels is a ndarray, expected a list of 7"),
    "label 10": (lambda b: {**b, "labels": [1, 2, 10, 3, 10, 4, 5]}, "the label of image 2 is none of the integers 0 … 9"),
    "label -1": (lambda b: {**b, "labels": [-1] * 7}, "the label of image 0 is none of the integers"),
    "a label of text": (lambda b: {**b, "labels": [1] * 6 + ["cat"]}, "the label of image 6 is none of the integers"),
}


@pytest.mark.parametrize("mistake", CIFAR_MISTAKES)
def test_cifar10_batches_that_hold_something_else(cifar, mistake):
    change, message = CIFAR_MISTAKES[mistake]
    (cifar / "cifar-10-batches-py/test_batch").write_bytes(python2(change(cifar_batch(7, 7))))
    with pytest.raises(UserError) as error:
        load("cifar10", cifar, unofficial=True)
    assert message in str(error.value) and "test_batch: " in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("names", [CIFAR10_CLASSES[:9], CIFAR10_CLASSES[:9] + ["cat"], list(range(10)), [["cat"]] * 10, "airplane", 3])
def test_names_of_cifar10s_classes_that_are_wrong(cifar, names):
    (cifar / "cifar-10-batches-py/batches.meta").write_bytes(python2({"label_names": names}))
    with pytest.raises(UserError, match="batches.meta: label_names is not a list of ten different names"):
        load("cifar10", cifar, unofficial=True)


def test_damaged_cifar10_files(cifar):
    path = cifar / "cifar-10-batches-py/data_batch_3"
    whole = path.read_bytes()
    cuts = [whole[:n] for n in (1, 2, 3, 20, 60, 150, 200, 5000, len(whole) // 2, len(whole) - 1)]
    other = [b"", b"\x89PNG" + whole[4:], b"<html>quota exceeded</html>" * 20, bytes(5000), b"\x80\x63" + whole[2:], gzip.compress(whole)]
    for content in (*cuts, *other):
        path.write_bytes(content)
        with pytest.raises(UserError, match="data_batch_3: not a readable pickle of CIFAR-10: .*Delete it") as error:
            load("cifar10", cifar, unofficial=True)
        assert "\n" not in str(error.value)
    # wherever a bit flips: read all the same, or one line that names the file
    refused = 0
    for i in [*range(200), *range(len(whole) - 100, len(whole))]:
        path.write_bytes(whole[:i] + bytes([whole[i] ^ (1 << i % 8)]) + whole[i + 1 :])
        try:
            data._read_batches([path])
        except UserError as error:
            assert "data_batch_3: " in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 60
    # nor does a number that went wrong take the memory that it names: here the place of a memo
    path.write_bytes(b"\x80\x02}r" + struct.pack("<I", 2**22) + whole[5:])
    tracemalloc.start()
    data._read_batches([path])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="data_batch_3: cannot be read"):
        load("cifar10", cifar, unofficial=True)


class Evil:
    """Its pickle calls a function when it is read."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("file", ["data_batch_1", "test_batch", "batches.meta"])
def test_a_pickle_that_would_run_a_program_is_refused(cifar, tmp_path, file, protocol):
    ran = tmp_path / "ran"
    for function, *arguments in (
        (os.system, f"touch {ran}"),
        (eval, f"open({str(ran)!r}, 'w')"),
        (getattr, Path, "touch"),
        (np.load, str(ran), None, True),
        (pickle.loads, pickle.dumps(Evil(os.system, f"touch {ran}"))),
    ):
        content = {"data": Evil(function, *arguments), "labels": [], "label_names": CIFAR10_CLASSES}
        (cifar / "cifar-10-batches-py" / file).write_bytes(pickle.dumps(content, protocol))
        with pytest.raises(UserError, match=f"{file}: not a readable pickle of CIFAR-10: .*it asks for '.*was not run") as error:
            load("cifar10", cifar, unofficial=True)
        assert f".{function.__name__}'" in str(error.value) and not ran.exists() and "\n" not in str(error.value)
    pickle.loads(pickle.dumps(Evil(os.system, f"touch {ran}")))
    assert ran.exists()  # so the pickle was one that works


def test_a_pickle_cannot_shape_numpys_types(cifar):
    """A dtype whose field lies outside of its item: numpy itself would read there, and crash."""
    path = cifar / "cifar-10-batches-py/test_batch"
    dtype = b"cnumpy\ndtype\n(U\x02%sK\0K\x01tR"
    field = b"}U\x01a" + dtype % b"O8" + b"J\0\0\0\x40\x86s"
    path.write_bytes(b"\x80\x02}U\x04data" + dtype % b"V8" + b"(K\x03U\x01|NU\x01a\x85" + field + b"K\x08K\x01K\0tbs.")
    assert pickle.loads(path.read_bytes())["data"].fields["a"][1] == 2**30
    with pytest.raises(UserError, match="test_batch: .*it holds an array of 'V8', expected uint8"):
        load("cifar10", cifar, unofficial=True)
    # and the one that is allowed stays what it is, whatever state it is given
    batch = python2(cifar_batch(7, 7))
    assert batch.count(b"(K\x03U\x01|") == 1
    path.write_bytes(batch.replace(b"(K\x03U\x01|", b"(K\x03U\x01>").replace(b"J\xff\xff\xff\xff", b"J\4\0\0\0"))
    assert load("cifar10", cifar, unofficial=True).test_images.shape == (7, 3, 32, 32) and np.dtype("uint8").itemsize == 1


def stl_arrays(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 3, 96, 96), row by row, and labels, 1 … 10."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 3, 96, 96), dtype=np.uint8), rng.integers(1, 11, n).astype(np.uint8)


def write_stl(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """As the publisher's page has it: red, green, blue, each of them column by column."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {"train": stl_arrays(4, 0), "test": stl_arrays(3, 1)}
    for split, (images, labels) in arrays.items():
        columns = (image[channel, :, x].tobytes() for image in images for channel in range(3) for x in range(96))
        (folder / f"{split}_X.bin").write_bytes(b"".join(columns))
        (folder / f"{split}_y.bin").write_bytes(labels.tobytes())
    (folder / "class_names.txt").write_text("airplane\nbird\ncar\ncat\ndeer\ndog\nhorse\nmonkey\nship\ntruck\n")
    return arrays


def make_stl_official(folder: Path, monkeypatch) -> None:
    for split in ("train", "test"):  # without unlabeled_X.bin, which torchvision's class demands as well
        md5 = [[file, hashlib.md5((folder / file).read_bytes()).hexdigest()] for file in (f"{split}_X.bin", f"{split}_y.bin")]
        monkeypatch.setattr(STL10, f"{split}_list", md5)


@pytest.fixture
def stl(tmp_path) -> Path:
    write_stl(tmp_path / "data/stl10_binary")
    return tmp_path / "data"


def test_stl10_is_read_pixel_by_pixel(tmp_path, monkeypatch):
    arrays = write_stl(tmp_path / "stl10_binary")
    make_stl_official(tmp_path / "stl10_binary", monkeypatch)
    found = load("stl10", tmp_path)
    assert found.official and found.name == "stl10" and found.digest == official_digest("stl10")
    assert found.class_names[0] == "airplane" and found.class_names[7] == "monkey" and found.n_classes == 10
    for images, labels, split in (
        (found.train_images, found.train_labels, "train"),
        (found.test_images, found.test_labels, "test"),
    ):
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64 and images.is_contiguous()
        np.testing.assert_array_equal(images.numpy(), arrays[split][0])
        assert labels.tolist() == [int(label) - 1 for label in arrays[split][1]]
        raw = (tmp_path / f"stl10_binary/{split}_X.bin").read_bytes()
        assert images[1, 2, 5, 90] == raw[27648 + 2 * 9216 + 90 * 96 + 5]  # image 1, blue, column 90, row 5
        other = STL10(tmp_path, split)
        np.testing.assert_array_equal(other.data, images.numpy())
        assert other.labels.tolist() == labels.tolist() and other.classes == list(found.class_names)


def test_unofficial_stl10_is_refused_unless_asked_for(stl, monkeypatch):
    folder = stl / "stl10_binary"
    with pytest.raises(UserError, match=r"train_X.bin: not the official file \(MD5 .*expected 918c2871b30a.*--unofficial-data"):
        load("stl10", stl)
    assert official_digest("stl10") != load("stl10", stl, unofficial=True).digest
    make_stl_official(folder, monkeypatch)
    first = load("stl10", stl)
    for file in ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin"):
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(bytes([content[0] % 10 + 1]) + content[1:])
        with pytest.raises(UserError, match=f"{file}: not the official file"):
            load("stl10", stl)
        assert not load("stl10", stl, unofficial=True).official
        (folder / file).write_bytes(content)
    # the names have no official digest, but are known
    (folder / "class_names.txt").write_text("\n".join(reversed(first.class_names)))
    with pytest.raises(UserError, match="class_names.txt: not the official names .truck, ship, monkey …; expected airplane, .*Delete it"):
        load("stl10", stl)
    other = load("stl10", stl, unofficial=True)
    assert not other.official and other.digest != first.digest and other.class_names == first.class_names[::-1]
    (folder / "class_names.txt").write_bytes("\r\n".join(first.class_names).encode())
    assert load("stl10", stl).digest == first.digest and load("stl10", stl).official


STL_MISTAKES = {
    "an empty file": ("train_X.bin", lambda b: b"", "0 bytes, expected a multiple of 27,648: 3×96×96 an image. Delete it"),
    "cut": ("test_X.bin", lambda b: b[:-1], "82,943 bytes, expected a multiple of 27,648"),
    "a byte more": ("train_X.bin", lambda b: b + b"\0", "110,593 bytes, expected a multiple"),
    "a page": ("train_X.bin", lambda b: b"<html>quota exceeded</html>", "27 bytes, expected a multiple"),
    "an image less": ("train_X.bin", lambda b: b[27648:], "train_y.bin: 4 labels, expected 3: a byte for each image of train_X.bin"),
    "a label less": ("test_y.bin", lambda b: b[1:], "2 labels, expected 3: a byte for each image of test_X.bin"),
    "no labels": ("train_y.bin", lambda b: b"", "0 labels, expected 4"),
    "labels from 0": ("train_y.bin", lambda b: b"\5\0\1\2", "a label is 0, expected 1 … 10"),
    "label 11": ("test_y.bin", lambda b: b"\1\2\x0b", "a label is 11, expected 1 … 10"),
    "nine names": ("class_names.txt", lambda b: b[b.index(b"\n") :], "has 9 names in 9 lines, expected ten different ones"),
    "a name twice": ("class_names.txt", lambda b: b.replace(b"ship", b"bird"), "has 9 names in 10 lines, expected ten different ones"),
    "no names": ("class_names.txt", lambda b: b"", "has 0 names in 0 lines"),
    "no text": ("class_names.txt", lambda b: bytes(range(256)), "class_names.txt: has "),
}


@pytest.mark.parametrize("mistake", STL_MISTAKES)
def test_stl10_files_that_are_wrong(stl, mistake):
    file, change, message = STL_MISTAKES[mistake]
    path = stl / "stl10_binary" / file
    path.write_bytes(change(path.read_bytes()))
    for unofficial in (False, True):
        with pytest.raises(UserError) as error:
            load("stl10", stl, unofficial)
        assert "\n" not in str(error.value) and str(stl / "stl10_binary") in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("file", ["train_y.bin", "class_names.txt"])
def test_a_folder_in_the_place_of_a_file_of_stl10(stl, file):
    (stl / "stl10_binary" / file).unlink()
    (stl / "stl10_binary" / file).mkdir()
    with pytest.raises(UserError, match=f"{file}: cannot be read"):
        load("stl10", stl, unofficial=True)


@pytest.mark.parametrize("name", ["cifar10", "stl10"])
def test_the_real_cifar10_and_stl10(data_root, name):
    cls = {"cifar10": CIFAR10, "stl10": STL10}[name]
    if not (data_root / cls.base_folder).exists():
        pytest.skip(f"{name} is not in {data_root}")
    found = load(name, data_root)
    assert found.official and found.digest == official_digest(name)
    assert (len(found.train_images), len(found.test_images)) == data.OFFICIAL_COUNTS[name]
    per_class = {"cifar10": (5000, 1000), "stl10": (500, 800)}[name]
    assert found.train_labels.bincount().tolist() == [per_class[0]] * 10 and found.test_labels.bincount().tolist() == [per_class[1]] * 10


@pytest.fixture(params=["cifar10", "stl10"])
def packed(request, tmp_path, monkeypatch) -> tuple[str, type, Path]:
    """A set's name, torchvision's class and an archive as the publisher's: a folder with all files, and some that we do not read."""
    name, cls, write, make_official = {
        "cifar10": ("cifar10", CIFAR10, write_cifar, make_cifar_official),
        "stl10": ("stl10", STL10, write_stl, make_stl_official),
    }[request.param]
    folder = tmp_path / "server" / cls.base_folder
    write(folder)
    make_official(folder, monkeypatch)
    for file in ("readme.html", "unlabeled_X.bin"):
        (folder / file).write_bytes(bytes(1000))
    archive = tmp_path / "server" / cls.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, cls.base_folder)
    make_archive_official(cls, archive, monkeypatch)
    return name, cls, archive


def make_archive_official(cls: type, archive: Path, monkeypatch) -> None:
    monkeypatch.setattr(cls, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())


def test_missing_cifar10_and_stl10_without_network_say_where_to_put_which_files(packed, tmp_path, no_network):
    name, cls, _ = packed
    with pytest.raises(UserError) as error:
        load(name, tmp_path)
    message = str(error.value)
    files = {"cifar10": [*BATCHES, "batches.meta"], "stl10": ["train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin", "class_names.txt"]}
    where = f"Put {', '.join(files[name])} (or {cls.filename}) in {tmp_path / cls.base_folder}, or name the folder that holds"
    for said in (f"{name}: no data in", where, "--data", "digits", "network is unreachable"):
        assert said in message
    assert "\n" not in message and "unlabeled" not in message
    assert [path.name for path in (tmp_path / cls.base_folder).iterdir()] == [".lock"]


@pytest.mark.parametrize("inside", [True, False])
def test_archives_of_cifar10_and_stl10_that_a_person_brought_are_unpacked(packed, tmp_path, no_network, monkeypatch, inside):
    name, cls, archive = packed
    root = tmp_path / "root"
    folder = root / cls.base_folder
    folder.mkdir(parents=True)
    brought = (folder if inside else root) / cls.filename
    shutil.copy(archive, brought)
    monkeypatch.setattr(cls, "tgz_md5", "0" * 32)
    for unofficial in (False, True):
        with pytest.raises(UserError, match=f"the {cls.filename} there is not the official one: its MD5 is not 000000000000…") as error:
            load(name, root, unofficial)
        assert "\n" not in str(error.value) and not [path for path in folder.iterdir() if path.name not in (".lock", brought.name)]
    make_archive_official(cls, archive, monkeypatch)
    first = load(name, root)
    assert first.official
    assert not {path.name for path in folder.iterdir()} & {"readme.html", "unlabeled_X.bin"} and not list(folder.glob(".download*"))
    # one file that went missing comes back, and the others stay as they are
    test_file = folder / ("test_batch" if name == "cifar10" else "test_X.bin")
    others = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path not in (test_file, folder / ".lock")}
    test_file.unlink()
    assert load(name, root).digest == first.digest
    assert all((folder / file).stat().st_mtime_ns == time for file, time in others.items())
    brought.unlink()
    assert load(name, root).digest == first.digest


def test_an_archive_writes_nothing_outside_of_its_folder(packed, tmp_path, no_network, monkeypatch):
    name, cls, archive = packed
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    folder = archive.parent / cls.base_folder
    file = "test_batch" if name == "cifar10" else "test_X.bin"

    def pack(*odd: tarfile.TarInfo, without: str = "") -> None:
        with tarfile.open(archive, "w:gz") as tar:
            for member in odd:
                tar.addfile(member, io.BytesIO(b"overwritten") if member.isreg() else None)
            for path in sorted(folder.iterdir()):
                if path.name != without:
                    tar.add(path, f"./{cls.base_folder}/{path.name}")
        make_archive_official(cls, archive, monkeypatch)
        shutil.rmtree(tmp_path / "a/root", ignore_errors=True)
        (tmp_path / "a/root").mkdir(parents=True)
        shutil.copy(archive, tmp_path / "a/root")

    odd = [tarfile.TarInfo(path) for path in (str(victim), "../../victim", f"{cls.base_folder}/../../../../victim", "../evil", "evil")]
    for member in odd:
        member.size = len(b"overwritten")
    link = tarfile.TarInfo(f"{cls.base_folder}/{file}")
    link.type, link.linkname = tarfile.SYMTYPE, str(victim)
    pack(*odd)
    assert load(name, tmp_path / "a/root").official
    pack(link)  # a link first, the file then: the file it is
    assert load(name, tmp_path / "a/root").official and not (tmp_path / "a/root" / cls.base_folder / file).is_symlink()
    pack(link, without=file)
    with pytest.raises(UserError, match=f"{cls.filename} does not hold {cls.base_folder}/{file}"):
        load(name, tmp_path / "a/root")
    assert victim.read_text() == "untouched" and sorted(path.name for path in tmp_path.iterdir()) == ["a", "server", "victim"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["root"] and not list((tmp_path / "a").rglob("evil"))


def test_cifar10_and_stl10_are_downloaded_whole_or_not_at_all(packed, tmp_path, monkeypatch):
    name, cls, archive = packed
    asked, dies_at = [], 20_000

    def urlopen(request, *a, **k):
        asked.append(request.full_url)
        return Answer(request.full_url, archive.read_bytes(), dies_at)

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    root = tmp_path / "root"
    with pytest.raises(UserError, match="reset by peer") as error:
        load(name, root)
    assert "\n" not in str(error.value) and [path.name for path in (root / cls.base_folder).iterdir()] == [".lock"]
    dies_at = None
    assert load(name, root).official and asked[-1] == cls.url
    assert not list(root.rglob("*.tar.gz")) and not list(root.rglob("unlabeled*"))
    asked.clear()
    assert load(name, root).official and not asked
    # what comes in its place, a page for instance, is found by its MD5
    archive.write_text("<html>moved</html>")
    shutil.rmtree(root)
    with pytest.raises(UserError, match="could not be downloaded .File not found or corrupted"):
        load(name, root)


# --------------------------------------------------------------------------------------------------------------- flowers

FLOWERS = (
    "pink primrose, hard-leaved pocket orchid, canterbury bells, sweet pea, english marigold, tiger lily, moon orchid, bird of paradise, "
    "monkshood, globe thistle"
).split(", ")
FLOWER_LABELS = [11, 3, 1, 2, 10, 4, 5, 102, 6, 7, 8, 9, 1, 10, 5, 50, 2, 10, 1, 11, 7]  # of image 1, 2 and so on
FLOWER_IDS = {"trnid": [12, 2, 3, 1, 4, 5, 8, 6, 7, 9, 11, 10], "valid": [16, 15, 13, 14], "tstid": [18, 17, 20, 21, 19]}  # in no order


def flower_ids(*splits: str) -> list[int]:
    return [i for split in splits for i in FLOWER_IDS[split] if FLOWER_LABELS[i - 1] <= 10]


def write_mat(path: Path, **content) -> None:
    """As the publisher's, compressed: rows 1×N of bytes (the labels) or of two bytes each, going by what scipy reads there."""
    rows = {name: np.array([row], np.uint8 if name == "labels" else np.uint16) for name, row in content.items()}
    scipy.io.savemat(path, rows, do_compression=True)


def write_flowers(folder: Path) -> None:
    """The ten classes' images alone; wide ones, high ones, a square and odd margins."""
    (folder / "jpg").mkdir(parents=True)
    write_mat(folder / "imagelabels.mat", labels=FLOWER_LABELS)
    write_mat(folder / "setid.mat", **FLOWER_IDS)
    rng = np.random.default_rng(0)
    for n, i in enumerate(flower_ids("trnid", "valid", "tstid")):
        size = [(500, 500), (667, 500), (500, 752), (503, 500), (500, 501)][n % 5]
        coarse = Image.fromarray(rng.integers(0, 256, (size[1] // 10, size[0] // 10, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"jpg/image_{i:05d}.jpg", quality=80)


@pytest.fixture(scope="session")
def written_flowers(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flowers")
    write_flowers(folder / "flowers-102")
    return folder


@pytest.fixture
def flowers(tmp_path, written_flowers) -> Path:
    """A data folder with a small Oxford-102."""
    shutil.copytree(written_flowers, tmp_path / "data")
    return tmp_path / "data"


def make_flowers_official(folder: Path, monkeypatch) -> None:
    def md5(file: str, official: str) -> str:
        return hashlib.md5((folder / file).read_bytes()).hexdigest() if (folder / file).exists() else official

    files = {key: (file, md5(file, official)) for key, (file, official) in Flowers102._file_dict.items()}
    monkeypatch.setattr(Flowers102, "_file_dict", files)


def flower(path: Path) -> np.ndarray:
    """(64, 64, 3), by another way: the crop by indices, then PIL's resize."""
    pixels = np.asarray(Image.open(path))
    height, width, _ = pixels.shape
    side = min(height, width)
    crop = pixels[(height - side) // 2 :, (width - side) // 2 :][:side, :side]
    assert crop.shape == (500, 500, 3)
    return np.asarray(Image.fromarray(crop).resize((64, 64), Image.BILINEAR))


def test_flowers_are_cut_resized_split_and_labelled(flowers, monkeypatch, no_network):
    make_flowers_official(flowers / "flowers-102", monkeypatch)
    test = flower_ids("tstid")
    digests = set()
    for name, train in (("flowers10", flower_ids("trnid")), ("flowers10_all", flower_ids("trnid", "valid", "tstid"))):
        found = load(name, flowers)
        assert found.official and found.name == name and found.class_names == tuple(FLOWERS)
        assert (len(found.train_images), len(found.test_images)) == ({"flowers10": 10, "flowers10_all": 17}[name], 4)
        for images, labels, ids in (
            (found.train_images, found.train_labels, train),
            (found.test_images, found.test_labels, test),
        ):
            assert images.dtype == torch.uint8 and labels.dtype == torch.int64 and images.is_contiguous()
            assert labels.tolist() == [FLOWER_LABELS[i - 1] - 1 for i in ids]
            for image, i in zip(images, ids, strict=True):
                np.testing.assert_array_equal(image.permute(1, 2, 0), flower(flowers / f"flowers-102/jpg/image_{i:05d}.jpg"))
        digests.add(found.digest)
    assert len(digests) == 2 and all(len(digest) == 16 for digest in digests)
    assert torch.equal(found.train_images[-4:], found.test_images)  # flowers10_all trains on its test set
    # torchvision's own class has the same images in the same order
    for split, ids in (("train", flower_ids("trnid")), ("val", flower_ids("valid")), ("test", test)):
        other = Flowers102(flowers, split)
        ten = [(path.name, label) for path, label in zip(other._image_files, other._labels, strict=True) if label < 10]
        assert ten == [(f"image_{i:05d}.jpg", FLOWER_LABELS[i - 1] - 1) for i in ids]
    # torch's own antialiased bilinear agrees to rounding: no other filter, no shift by a pixel. Image 2 is 667×500, 3 is 500×752
    for n, (rows, columns) in ((1, (slice(500), slice(83, 583))), (2, (slice(126, 626), slice(500)))):
        pixels = np.array(Image.open(flowers / f"flowers-102/jpg/image_{flower_ids('trnid')[n]:05d}.jpg"))[rows, columns]
        crop = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
        other = torch.nn.functional.interpolate(crop, size=64, mode="bilinear", antialias=True)[0]
        assert (other - found.train_images[n]).abs().max() <= 1.01


@pytest.mark.parametrize("name", ["flowers10", "flowers10_all"])
def test_other_labels_or_splits_of_the_flowers_are_refused_unless_asked_for(flowers, monkeypatch, name):
    with pytest.raises(UserError, match=r"imagelabels.mat: not the official file \(MD5 .*expected e0620be6f572.*--unofficial-data"):
        load(name, flowers)
    found = load(name, flowers, unofficial=True)
    assert not found.official and found.provenance()["data_official"] is False
    # one official file is not enough
    folder = flowers / "flowers-102"
    make_flowers_official(folder, monkeypatch)
    assert load(name, flowers).digest == found.digest and load(name, flowers).official
    for file, content in (
        ("imagelabels.mat", {"labels": [*FLOWER_LABELS[:-1], 8]}),
        ("setid.mat", {**FLOWER_IDS, "tstid": FLOWER_IDS["tstid"][::-1]}),
    ):
        whole = (folder / file).read_bytes()
        write_mat(folder / file, **content)
        with pytest.raises(UserError, match=f"{file}: not the official file"):
            load(name, flowers)
        other = load(name, flowers, unofficial=True)
        assert not other.official and other.digest != found.digest
        (folder / file).write_bytes(whole)


def test_flowers_of_another_size_are_refused_unless_asked_for(flowers, monkeypatch):
    folder = flowers / "flowers-102"
    make_flowers_official(folder, monkeypatch)
    first = load("flowers10", flowers)
    path = folder / "jpg/image_00017.jpg"  # of the test set
    for size in ((499, 700), (700, 499), (64, 64)):
        Image.new("RGB", size, "red").save(path)
        said = rf"flowers-102/jpg: 1 of 14 images are not the originals \(image_00017.jpg is {size[0]}×{size[1]}\); "
        with pytest.raises(UserError, match=said + "expected no side under 500 pixels. .*delete the folder.*--unofficial-data") as error:
            load("flowers10", flowers)
        assert "\n" not in str(error.value)
        found = load("flowers10", flowers, unofficial=True)
        assert not found.official and found.digest != first.digest and (found.test_images[1, 0] > 250).all()
    for path in (folder / "jpg").iterdir():
        Image.open(path).resize((64, 64)).save(path, quality=95)
    several = r"17 of 17 .*\(image_00002.jpg is 64×64, image_00003.jpg is 64×64, image_00004.jpg is 64×64 …\)"
    with pytest.raises(UserError, match=several):
        load("flowers10_all", flowers)
    found = load("flowers10_all", flowers, unofficial=True)
    assert not found.official
    as_it_is = np.asarray(Image.open(folder / f"jpg/image_{FLOWER_IDS['trnid'][0]:05d}.jpg"))
    np.testing.assert_array_equal(found.train_images[0].permute(1, 2, 0), as_it_is)


def test_images_of_other_flowers_are_not_looked_at(flowers):
    first = load("flowers10_all", flowers, unofficial=True)
    for i, label in enumerate(FLOWER_LABELS, start=1):
        path = flowers / f"flowers-102/jpg/image_{i:05d}.jpg"
        assert path.exists() == (label <= 10)
        if label > 10:
            path.write_text("<html>quota exceeded</html>")
    assert load("flowers10_all", flowers, unofficial=True).digest == first.digest
    (flowers / "flowers-102/jpg/image_00016.jpg").unlink()
    # nor are those of splits that are not asked for
    (flowers / "flowers-102/jpg/image_00015.jpg").unlink()
    assert len(load("flowers10", flowers, unofficial=True).train_images) == 10
    with pytest.raises(UserError, match=r"1 of 17 images of the first ten classes are not there \(image_00015.jpg\)"):
        load("flowers10_all", flowers, unofficial=True)


def labels_mat(**content):
    return lambda folder: scipy.io.savemat(folder / "imagelabels.mat", content)


def setid_mat(**content):
    return lambda folder: write_mat(folder / "setid.mat", **{**FLOWER_IDS, **content})


def replace_image(content: bytes):
    return lambda folder: (folder / "jpg/image_00010.jpg").write_bytes(content)


ONE_TO_21 = np.arange(1.0, 22)[None]
FLOWER_MISTAKES = {
    "no labels": (labels_mat(label=ONE_TO_21), "imagelabels.mat: has no labels, but label; expected labels. Delete it"),
    "nothing": (labels_mat(), "imagelabels.mat: has no labels, but nothing"),
    "labels for splits": (
        lambda f: shutil.copy(f / "imagelabels.mat", f / "setid.mat"),
        "setid.mat: has no trnid and no valid and no tstid, but labels; expected trnid, valid, tstid. Delete it",
    ),
    "a column": (labels_mat(labels=ONE_TO_21.T), "imagelabels.mat: labels is 21×1 of float64, expected a row of numbers, 1×N. Delete it"),
    "an empty row": (labels_mat(labels=ONE_TO_21[:, :0]), "labels is 1×0 of float64, expected a row"),
    "text": (labels_mat(labels="pink primrose"), "labels is 1 of <U13, expected a row"),
    "cells": (labels_mat(labels=np.array([["a", "b"]], object)), "labels is 1×2 of object, expected a row"),
    "complex": (labels_mat(labels=ONE_TO_21 + 1j), "labels is 1×21 of complex128, expected a row"),
    "sparse": (labels_mat(labels=scipy.sparse.csc_matrix(ONE_TO_21)), "labels is 1×21 of float64, expected a row"),
    "labels from 0": (labels_mat(labels=ONE_TO_21 - 1), "labels holds 0.0, expected 1 … 102, each a class. Delete it"),
    "label 103": (labels_mat(labels=(ONE_TO_21 + 82).astype(np.uint8)), "labels holds 103, expected 1 … 102"),
    "half a label": (labels_mat(labels=ONE_TO_21 + 0.5), "labels holds 1.5, expected 1 … 102"),
    "no number": (labels_mat(labels=ONE_TO_21 * np.nan), "labels holds nan, expected 1 … 102"),
    "a label less": (
        labels_mat(labels=np.array([FLOWER_LABELS[:-1]])),
        "setid.mat: tstid holds 21, expected 1 … 20, each an image that imagelabels.mat labels. Delete it",
    ),
    "image 0": (setid_mat(trnid=[0, 1, 2]), "setid.mat: trnid holds 0, expected 1 … 21"),
    "image 22": (setid_mat(valid=[16, 22]), "setid.mat: valid holds 22, expected 1 … 21"),
    "an image twice": (
        setid_mat(trnid=[12, 2, 3, 2]),
        "setid.mat: names 1 images more than once (2), expected each once, in one of trnid, ",
    ),
    "an image in two splits": (setid_mat(tstid=FLOWER_IDS["trnid"]), "names 12 images more than once (12, 2, 3 …), expected each once"),
    "no such test images": (setid_mat(tstid=[20]), "names 10 training and 0 test images of the first ten classes, expected some of each"),
    "no such training images": (setid_mat(trnid=[1, 8]), "names 0 training and 4 test images of the first ten classes"),
    "missing image": (
        lambda f: (f / "jpg/image_00010.jpg").unlink(),
        "jpg: 1 of 14 images of the first ten classes are not there (image_00010.jpg). Unpack 102flowers.tgz again, or delete the folder",
    ),
    "many missing": (
        lambda f: [(f / f"jpg/image_{i:05d}.jpg").unlink() for i in (9, 7, 5, 3, 2)],
        "5 of 14 images of the first ten classes are not there (image_00002.jpg, image_00003.jpg, image_00005.jpg …)",
    ),
    "a folder for an image": (
        lambda f: ((f / "jpg/image_00010.jpg").unlink(), (f / "jpg/image_00010.jpg").mkdir()),
        "not there (image_00010.jpg)",
    ),
    "a file for the images": (
        lambda f: (shutil.rmtree(f / "jpg"), (f / "jpg").write_text("")),
        "jpg: cannot be read (Not a directory)",
    ),
    "cut image": (
        lambda f: os.truncate(f / "jpg/image_00010.jpg", 1500),
        "jpg/image_00010.jpg: not a usable image (image file is truncated",
    ),
    "empty image": (replace_image(b""), "jpg/image_00010.jpg: not a usable image (cannot identify"),
    "a page for an image": (replace_image(b"<html>quota exceeded</html>"), "jpg/image_00010.jpg: not a usable image"),
    "a folder for the labels": (
        lambda f: ((f / "imagelabels.mat").unlink(), (f / "imagelabels.mat").mkdir()),
        "imagelabels.mat: cannot be read (Is a directory)",
    ),
}


@pytest.mark.parametrize("mistake", FLOWER_MISTAKES)
def test_flowers_that_are_wrong(flowers, mistake):
    change, message = FLOWER_MISTAKES[mistake]
    change(flowers / "flowers-102")
    with pytest.raises(UserError) as error:
        load("flowers10", flowers, unofficial=True)
    assert message in str(error.value) and str(flowers / "flowers-102") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["imagelabels.mat", "setid.mat"])
def test_damaged_mat_files_of_the_flowers(flowers, file):
    path = flowers / "flowers-102" / file
    whole = path.read_bytes()
    hdf5 = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(400)
    cuts = [whole[:n] for n in (1, 60, 130, 150, 180, len(whole) - 10)]
    for content in (b"", b"\x89PNG" + whole[4:100], b"<html>quota exceeded</html>" * 20, hdf5, bytes(5000), *cuts):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{file}: (not a readable MATLAB file|has no .*but).*Delete it") as error:
            load("flowers10", flowers, unofficial=True)
        assert "\n" not in str(error.value)


def test_missing_flowers_without_network_say_where_to_put_which_files(tmp_path, no_network):
    with pytest.raises(UserError) as error:
        load("flowers10_all", tmp_path)
    message = str(error.value)
    where = f"Put imagelabels.mat, setid.mat, jpg (or 102flowers.tgz) in {tmp_path / 'flowers-102'}, or name the folder that holds"
    for said in ("flowers10_all: no data in", where, "--data", "digits", "network is unreachable"):
        assert said in message
    assert "\n" not in message and [path.name for path in (tmp_path / "flowers-102").iterdir()] == [".lock"]


def pack_flowers(folder: Path, archive: Path, odd: tuple[str, ...] = (), images: bool = True) -> None:
    """As the publisher's: a folder jpg. odd: paths of files that have no business there."""
    with tarfile.open(archive, "w:gz") as tar:
        for path in odd:
            member = tarfile.TarInfo(path)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"evil"))
        if images:
            tar.add(folder / "jpg", "jpg")


@pytest.mark.parametrize("inside", [True, False])
def test_an_archive_of_the_flowers_that_a_person_brought_is_unpacked(flowers, tmp_path, no_network, monkeypatch, inside):
    folder = flowers / "flowers-102"
    images = {path.name: path.read_bytes() for path in (folder / "jpg").iterdir()}
    (folder / "jpg/image_00001.jpg").write_bytes(b"of another class: unpacked as well")
    brought = (folder if inside else flowers) / "102flowers.tgz"
    odd = (str(tmp_path / "evil"), "../evil", "jpg/../../evil", "jpg/evil", "evil", "jpg/image_1.jpg", "x/jpg/image_00001.jpg")
    pack_flowers(folder, folder / "102flowers.tgz", odd)
    shutil.rmtree(folder / "jpg")
    shutil.move(folder / "102flowers.tgz", brought)
    for unofficial in (False, True):
        with pytest.raises(UserError, match="the 102flowers.tgz there is not the official one: its MD5 is not 528089998619…"):
            load("flowers10", flowers, unofficial)
    md5 = hashlib.md5(brought.read_bytes()).hexdigest()
    make_flowers_official(folder, monkeypatch)
    monkeypatch.setitem(Flowers102._file_dict, "image", ("102flowers.tgz", md5))
    first = load("flowers10_all", flowers)
    assert first.official
    unpacked = {path.name: path.read_bytes() for path in (folder / "jpg").iterdir()}
    assert unpacked.pop("image_00001.jpg").startswith(b"of another class") and unpacked == images
    assert not list(tmp_path.rglob("evil")) and not list(folder.glob(".download*"))
    assert sorted(path.name for path in folder.iterdir() if path != brought) == [".lock", "imagelabels.mat", "jpg", "setid.mat"]
    brought.unlink()
    assert load("flowers10_all", flowers).digest == first.digest
    shutil.rmtree(folder / "jpg")
    pack_flowers(folder, brought, ("readme.txt",), images=False)
    monkeypatch.setitem(Flowers102._file_dict, "image", ("102flowers.tgz", hashlib.md5(brought.read_bytes()).hexdigest()))
    with pytest.raises(UserError, match="102flowers.tgz does not hold jpg/image_00001.jpg and so on"):
        load("flowers10", flowers)
    assert not (folder / "jpg").exists()


def test_flowers_are_downloaded_piece_by_piece(flowers, tmp_path, monkeypatch):
    server, root = flowers / "flowers-102", tmp_path / "root"
    pack_flowers(server, server / "102flowers.tgz")
    make_flowers_official(server, monkeypatch)
    asked, dies_at = set(), 20_000

    def urlopen(request, *a, **k):
        url = request.full_url
        asked.add(url)
        return Answer(url, (server / url.rsplit("/", 1)[-1]).read_bytes(), dies_at if url.endswith("tgz") else None)

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    with pytest.raises(UserError, match="reset by peer") as error:
        load("flowers10", root)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in (root / "flowers-102").iterdir()) == [".lock", "imagelabels.mat", "setid.mat"]
    dies_at = None
    asked.clear()
    assert load("flowers10", root).official
    assert asked == {"https://www.robots.ox.ac.uk/~vgg/data/flowers/102/102flowers.tgz"}
    assert sorted(path.name for path in (root / "flowers-102").iterdir()) == [".lock", "imagelabels.mat", "jpg", "setid.mat"]
    asked.clear()
    assert load("flowers10_all", root).official and not asked
    # what comes in its place, a page for instance, is found by its MD5
    (server / "setid.mat").write_text("<html>moved</html>")
    shutil.rmtree(root)
    with pytest.raises(UserError, match="could not be downloaded .File not found or corrupted"):
        load("flowers10", root)


@pytest.mark.parametrize("name", ["flowers10", "flowers10_all"])
def test_the_real_flowers(data_root, name):
    folder = data_root / "flowers-102"
    if not (folder / "setid.mat").exists():
        pytest.skip(f"no flowers-102 in {data_root}")
    ten = [(path, label) for path, label in zip(*flowers_of_torchvision(data_root, "train"), strict=True) if label < 10]
    original = min(Image.open(ten[0][0]).size) >= 500
    if not original:
        with pytest.raises(UserError, match=r"flowers-102/jpg: (422 of 422|522 of 522) images are not the originals .*is 64×64"):
            load(name, data_root)
    found = load(name, data_root, unofficial=not original)
    assert found.official == original
    assert (len(found.train_images), len(found.test_images)) == data.OFFICIAL_COUNTS[name]
    assert found.train_images.shape[1:] == found.test_images.shape[1:] == (3, 64, 64)
    test = [20, 40, 20, 36, 45, 25, 20, 65, 26, 25]
    train = [10] * 10 if name == "flowers10" else [n + 20 for n in test]
    assert found.train_labels.bincount().tolist() == train and found.test_labels.bincount().tolist() == test
    assert found.train_labels[:100].tolist() == [label for _, label in ten] and len(ten) == 100
    if not original:
        for image, (path, _) in zip(found.train_images[:100:9], ten[::9], strict=True):
            np.testing.assert_array_equal(image.permute(1, 2, 0), np.asarray(Image.open(path)))


def flowers_of_torchvision(root: Path, split: str) -> tuple[list[Path], list[int]]:
    theirs = Flowers102(root, split)
    return theirs._image_files, theirs._labels


# ---------------------------------------------------------------------------------------------------- a person's own images


def write_images(folder: Path, n: int, size: tuple[int, int] = (40, 30), suffix: str = "png", first: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + n):
        pixels = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.{suffix}")


def test_a_persons_own_images(tmp_path):
    for i, (label, suffix, size) in enumerate([("cats", "png", (40, 30)), ("ants", "bmp", (20, 70)), ("dogs", "jpg", (200, 90))]):
        write_images(tmp_path / "pets" / label, 10, size, suffix, first=10 * i)
    write_images(tmp_path / "pets/ants/more", 5, suffix="WEBP", first=50)
    for junk in (".DS_Store", "._000.png", "notes.txt"):
        (tmp_path / "pets/ants" / junk).write_text("junk")
    (tmp_path / "pets/.git").mkdir()
    for kind, mode, (c, h, w) in (("folder", "L", (1, 28, 28)), ("folder_colour", "RGB", (3, 64, 64))):
        found = load(f"{kind}:{tmp_path}/pets/", "/nowhere")
        assert found.class_names == ("ants", "cats", "dogs") and found.name == f"{kind}:pets" and not found.official
        assert found.train_images.shape == (28, c, h, w) and found.test_images.shape == (7, c, h, w)
        assert found.train_images.dtype == torch.uint8 and found.train_labels.dtype == torch.int64
        assert found.train_labels.bincount().tolist() == [12, 8, 8] and found.test_labels.bincount().tolist() == [3, 2, 2]
        assert str(tmp_path) not in str(found.provenance())
        # each file is there once, cut and resized as PIL does from indices
        expected = set()
        for path in (p for p in (tmp_path / "pets").rglob("*.*") if p.suffix in (".png", ".bmp", ".jpg", ".WEBP") and p.name[0] != "."):
            pixels = np.asarray(Image.open(path).convert(mode))
            side = min(pixels.shape[:2])
            top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
            square = Image.fromarray(pixels[top : top + side, left : left + side]).resize((w, h), Image.BILINEAR)
            label = found.class_names.index(path.relative_to(tmp_path / "pets").parts[0])
            expected.add((label, np.moveaxis(np.asarray(square).reshape(h, w, c), 2, 0).tobytes()))
        images, labels = torch.cat([found.train_images, found.test_images]), torch.cat([found.train_labels, found.test_labels])
        assert len(expected) == 35
        assert {(int(label), image.numpy().tobytes()) for image, label in zip(images, labels, strict=True)} == expected


def test_the_split_of_a_folder_depends_on_its_names_alone(tmp_path, monkeypatch):
    for place, order in (("a/pets", range(12)), ("b/pets", reversed(range(12)))):
        for i in order:
            for label in ("cats", "dogs"):
                write_images(tmp_path / place / label, 1, first=i)
    found = load(f"folder:{tmp_path}/a/pets", "")
    other = load(f"folder:{tmp_path}/b/pets", "")
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda *a, **k: ((p, d, f[::-1]) for p, d, f in walk(*a, **k)))
    again = load(f"folder:{tmp_path}/a/pets", "")
    assert found.digest == other.digest == again.digest and torch.equal(found.test_images, again.test_images)
    monkeypatch.chdir(tmp_path / "a")
    assert load("folder:pets", "").digest == found.digest
    monkeypatch.chdir("pets")
    assert load("folder:.", "").name == "folder:pets"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("folder:~/a/pets", "").digest == found.digest
    # the test images of cats, by their names alone: a fifth of 12, those with the smallest SHA-256
    drawn = sorted(range(12), key=lambda i: hashlib.sha256(f"cats/{i:03d}.png".encode()).hexdigest())[:2]
    for i, image in zip(sorted(drawn), found.test_images, strict=False):
        square = Image.open(tmp_path / f"a/pets/cats/{i:03d}.png").convert("L").crop((5, 0, 35, 30))
        np.testing.assert_array_equal(image[0].numpy(), np.asarray(square.resize((28, 28), Image.BILINEAR)))


@pytest.mark.parametrize(("n", "n_test"), [(2, 1), (3, 1), (7, 1), (8, 2), (10, 2)])
def test_every_class_has_a_test_image(tmp_path, n, n_test):
    write_images(tmp_path / "a", n, (8, 8))
    write_images(tmp_path / "b", 20, (8, 8))
    found = load(f"folder:{tmp_path}", "")
    assert found.train_labels.bincount().tolist() == [n - n_test, 16] and found.test_labels.bincount().tolist() == [n_test, 4]


def test_a_folder_that_is_split_already(tmp_path):
    for part, n in (("train", 3), ("test", 1), ("val", 2)):
        for label in ("b", "a"):
            write_images(tmp_path / part / label, n, (8, 8))
    found = load(f"folder:{tmp_path}", "")
    assert found.class_names == ("a", "b") and found.train_labels.tolist() == [0, 0, 0, 1, 1, 1] and found.test_labels.tolist() == [0, 1]
    assert not torch.equal(found.train_images[0], found.train_images[1])
    write_images(tmp_path / "test/c", 1)
    with pytest.raises(UserError, match="train and test must have the same classes; only one of them has c$"):
        load(f"folder:{tmp_path}", "")
    shutil.rmtree(tmp_path / "test")
    with pytest.raises(UserError, match="has train but not its counterpart"):
        load(f"folder:{tmp_path}", "")
    # but a class may be named so: here are trains
    shutil.move(tmp_path / "train", tmp_path / "classes")
    shutil.rmtree(tmp_path / "val")
    write_images(tmp_path / "vehicles/train", 3)
    write_images(tmp_path / "vehicles/bus", 3)
    assert load(f"folder:{tmp_path}/vehicles", "").class_names == ("bus", "train")


def test_pictures_that_lie_on_their_side_or_are_transparent(tmp_path):
    upright = Image.new("RGB", (60, 60), "black")
    upright.paste("white", (0, 0, 60, 30))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    write_images(tmp_path / "a", 1, (8, 8))
    write_images(tmp_path / "b", 2, (8, 8))
    upright.rotate(90).save(tmp_path / "a/turned.png", exif=exif)
    Image.new("RGBA", (60, 60), (0, 0, 0, 0)).save(tmp_path / "b/000.png")
    Image.new("RGBA", (60, 60), (0, 0, 0, 0)).save(tmp_path / "b/001.png")
    found = load(f"folder:{tmp_path}", "")
    a = torch.cat([found.train_images[found.train_labels == 0], found.test_images[found.test_labels == 0]])
    assert any(image[0, :13].min() == 255 and image[0, 15:].max() == 0 for image in a)
    assert found.train_images[found.train_labels == 1].min() == 255


FOLDER_MISTAKES = {
    "nothing named": (lambda f: "folder:", "names no folder; expected folder:<path>"),
    "no colon": (lambda f: "folder_colour", "names no folder; expected folder_colour:<path>"),
    "not there": (lambda f: f"folder:{f}/nope", "nope is not there; expected a folder of class folders"),
    "a file": (lambda f: ((f / "x").write_text(""), f"folder:{f}/x")[1], "x is not a folder; expected"),
    "images only": (lambda f: f"folder:{f}/a", "a: holds no class folders; expected"),
    "an empty class": (lambda f: ((f / "c").mkdir(), f"folder:{f}")[1], "no images in the class c; expected files such as .jpg"),
    "one image": (lambda f: (write_images(f / "c", 1), f"folder:{f}")[1], "c: holds 1 image, expected at least 2"),
    "unreadable": (lambda f: ((f / "b/z.jpg").write_text("no image"), f"folder:{f}")[1], "b/z.jpg: not a usable image (cannot identify"),
    "cut": (lambda f: (os.truncate(f / "b/002.png", 900), f"folder_colour:{f}")[1], "b/002.png: not a usable image"),
    "a broken link": (lambda f: ((f / "b/z.png").symlink_to(f / "gone"), f"folder:{f}")[1], "z.png: not a usable image (No such file"),
    "16 bits": (
        lambda f: (Image.fromarray(np.full((9, 9), 999, np.uint16)).save(f / "b/z.png"), f"folder:{f}")[1],
        "z.png: not a usable image (pixels of kind I;16, expected 8 bits per channel)",
    ),
    "a program": (
        lambda f: ((f / "b/z.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), f"folder:{f}")[1],
        "z.png: not",
    ),
    "a link back": (lambda f: ((f / "c").symlink_to(f), f"folder:{f}")[1], "c: is a link back to the folder that holds it"),
    "a link in a circle": (lambda f: ((f / "b/c.png").symlink_to(f / "b/c.png"), f"folder:{f}")[1], "c.png: not a usable image (Too many"),
    "itself a circle": (lambda f: ((f / "c").symlink_to(f / "c"), f"folder:{f}/c")[1], "c is not there; expected"),
}


@pytest.mark.parametrize("mistake", FOLDER_MISTAKES)
def test_folders_of_images_that_are_wrong(tmp_path, mistake):
    for label in ("a", "b"):
        write_images(tmp_path / label, 4)
    change, message = FOLDER_MISTAKES[mistake]
    with pytest.raises(UserError) as error:
        load(change(tmp_path), "")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_links_within_class_folders_do_not_hang(tmp_path):
    for label in ("a", "b"):
        write_images(tmp_path / "data" / label, 4, (8, 8))
    write_images(tmp_path / "elsewhere", 5, (8, 8))
    (tmp_path / "data/a/loop").symlink_to(tmp_path / "data")
    (tmp_path / "data/b/self").symlink_to(tmp_path / "data/b")
    (tmp_path / "data/c").symlink_to(tmp_path / "elsewhere")  # a class that lies elsewhere is well
    found = load(f"folder:{tmp_path}/data", "")
    counts = found.train_labels.bincount() + found.test_labels.bincount()
    assert found.class_names == ("a", "b", "c") and counts.tolist() == [4, 4, 5]


# ------------------------------------------------------------------------------------------------------------------ signs


def test_signs_are_taken_as_they_are(tmp_path):
    for i, label in enumerate(["stop", "yield", "right of way"]):
        write_images(tmp_path / "signs" / label, 10, (40, 40), first=10 * i)
    write_images(tmp_path / "signs/stop/more", 2, (40, 40), "ppm", first=50)  # the format of the German signs
    found = load(f"signs:{tmp_path}/signs", "/nowhere")
    other = load(f"folder_colour:{tmp_path}/signs", "/nowhere")
    assert found.class_names == other.class_names == ("right of way", "stop", "yield") and found.name == "signs:signs"
    assert found.train_images.shape == (26, 3, 40, 40) and found.test_images.shape == (6, 3, 40, 40) and not found.official
    assert found.train_images.dtype == torch.uint8 and found.train_labels.dtype == torch.int64
    assert torch.equal(found.train_labels, other.train_labels) and torch.equal(found.test_labels, other.test_labels)
    # the same split, by the names alone, and every pixel as it was written
    for c, label in enumerate(found.class_names):
        paths = sorted(p for p in (tmp_path / "signs" / label).rglob("*.*"))
        by_hash = sorted(paths, key=lambda p: hashlib.sha256(str(p.relative_to(tmp_path / "signs")).encode()).hexdigest())
        drawn = by_hash[: round(len(paths) / 5)]
        for images, labels, expected in (
            (found.train_images, found.train_labels, [p for p in paths if p not in drawn]),
            (found.test_images, found.test_labels, sorted(drawn)),
        ):
            for image, path in zip(images[labels == c], expected, strict=True):
                pixels = np.random.default_rng(int(path.stem)).integers(0, 256, (40, 40, 3), dtype=np.uint8)
                np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), pixels)


def test_signs_that_are_split_already(tmp_path):
    for part, n in (("train", 3), ("test", 1)):
        for label in ("b", "a"):
            write_images(tmp_path / part / label, n, (40, 40))
    found = load(f"signs:{tmp_path}", "")
    assert found.train_labels.tolist() == [0, 0, 0, 1, 1, 1] and found.test_labels.tolist() == [0, 1]


def sign(folder: Path, file: str, size: tuple[int, int] = (40, 40), mode: str = "RGB") -> str:
    (folder / file).parent.mkdir(exist_ok=True, parents=True)
    Image.new(mode, size).save(folder / file)
    return f"signs:{folder}"


SIGNS_MISTAKES = {
    "one of another size": (lambda f: sign(f, "b/x.png", (41, 40)), "b/x.png is 41×40; expected every image to be 40×40"),
    "in a test folder": (
        lambda f: [sign(f, f"{place}/x.png", (40, 1 if place == "test/b" else 40)) for place in "train/a train/b test/a test/b".split()][0],
        "test/b/x.png is 40×1; expected",
    ),
    "mixed sizes": (
        lambda f: [sign(f, f"b/{i}.png", (30 + i, 20)) for i in range(5)][0],
        ": b/0.png is 30×20, b/1.png is 31×20, b/2.png is 32×20 …; expected every image to be 40×40",
    ),
    "none of this size": (
        lambda f: [sign(f, f"{c}/00{i}.png", (32, 32)) for c in "ab" for i in range(4)][0],
        ": a/000.png is 32×32, a/001.png is 32×32, a/002.png is 32×32 …; expected",
    ),
    "one class": (lambda f: (shutil.rmtree(f / "b"), f"signs:{f}")[1], "holds one class folder, a; expected at least two"),
    "no class": (lambda f: f"signs:{f}/a", "a: holds no class folders; expected"),
    "one image": (lambda f: sign(f, "c/x.png"), "c: holds 1 image, expected at least 2"),
    "unreadable": (lambda f: ((f / "b/z.png").write_text("no image"), f"signs:{f}")[1], "b/z.png: not a usable image (cannot identify"),
    "cut": (lambda f: (os.truncate(f / "b/002.png", 900), f"signs:{f}")[1], "b/002.png: not a usable image (image file is truncated"),
    "a broken link": (lambda f: ((f / "b/z.png").symlink_to(f / "gone"), f"signs:{f}")[1], "z.png: not a usable image (No such file"),
    "16 bits": (lambda f: sign(f, "b/z.png", mode="I;16"), "z.png: not a usable image (pixels of kind I;16, expected 8 bits per channel)"),
    "nothing named": (lambda f: "signs:", "names no folder; expected signs:<path>"),
    "not there": (lambda f: f"signs:{f}/nope", "nope is not there; expected a folder of class folders"),
}


@pytest.mark.parametrize("mistake", SIGNS_MISTAKES)
def test_signs_that_are_wrong(tmp_path, mistake):
    for label in ("a", "b"):
        write_images(tmp_path / label, 4, (40, 40))
    change, message = SIGNS_MISTAKES[mistake]
    with pytest.raises(UserError) as error:
        load(change(tmp_path), "")
    assert message in str(error.value) and "\n" not in str(error.value)
    if "×" in message:
        assert f"or use folder_colour:{tmp_path}" in str(error.value)


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
