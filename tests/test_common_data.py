"""Loaders on small files in the exact official formats, and the ways in which those files can be wrong."""

import gzip
import hashlib
import io
import os
import pickle
import re
import shutil
import struct
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, MNIST, STL10, SVHN, CelebA, Flowers102

from common import data
from common.data import draw_labels, load
from common.run import UserError, refuse

ATTR, PARTITION, JPGS = "list_attr_celeba.txt", "list_eval_partition.txt", "img_align_celeba"
CELEBA_BOX = (slice(39, 179), slice(19, 159))  # the 140×140 in the middle of 218×178
BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
FLOWER_LABELS = [11, 3, 1, 2, 10, 4, 5, 102, 6, 7, 8, 9, 1, 10, 5, 50, 2, 10, 1, 11, 7]  # of image 1, 2 and so on
FLOWER_IDS = dict(trnid=[12, 2, 3, 1, 4, 5, 8, 6, 7, 9, 11, 10], valid=[16, 15, 13, 14], tstid=[18, 17, 20, 21, 19])


def pixels(n: int, *shape: int) -> np.ndarray:
    """n images of noise, the same ones at each call."""
    return np.random.default_rng(n).integers(0, 256, (n, *shape), dtype=np.uint8)


def write_idx(folder: Path) -> None:
    """Four idx files as the MNIST page describes them: big-endian magic, dimensions, bytes."""
    for part, n in (("train", 30), ("t10k", 12)):
        images, labels = pixels(n, 28, 28).tobytes(), bytes(i % 10 for i in range(n))
        (folder / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, n, 28, 28) + images)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, n) + labels)


def write_svhn(folder: Path) -> None:
    """X (rows, columns, channels, images) and y, where 10 stands for the digit 0, as Stanford's files have them."""
    for split, n in (("train", 25), ("test", 13), ("extra", 31)):
        content = {"X": pixels(n, 3, 32, 32).transpose(2, 3, 1, 0), "y": np.arange(n, dtype=np.uint8)[:, None] % 10 + 1}
        scipy.io.savemat(folder / f"{split}_32x32.mat", content, do_compression=True)


def write_cifar(folder: Path) -> None:
    """Pickled dicts: an image is a row of red, then green, then blue."""
    contents = {"batches.meta": {"label_names": "airplane automobile bird cat deer dog frog horse ship truck".split()}}
    for n, file in enumerate(BATCHES, start=2):
        contents[file] = {"labels": [(i + 1) % 10 for i in range(n)], "data": pixels(n, 3 * 32 * 32)}
    for file, content in contents.items():
        (folder / file).write_bytes(pickle.dumps(content, protocol=2))


def write_stl(folder: Path) -> None:
    """As the publisher's page has it: red, green, blue, each of them column by column; labels 1 … 10."""
    for split, n in (("train", 4), ("test", 3)):
        (folder / f"{split}_X.bin").write_bytes(pixels(n, 3, 96, 96).transpose(0, 1, 3, 2).tobytes())
        (folder / f"{split}_y.bin").write_bytes(bytes(i + 2 for i in range(n)))


def write_celeba(folder: Path) -> None:
    """Images and text files as the publisher's; the first four images are of the four classes."""
    (folder / JPGS).mkdir()
    names = [f"{i:06d}.jpg" for i in range(1, 13)]
    attributes = np.random.default_rng(0).choice([-1, 1], (len(names), 40))
    attributes[:4, [20, 31]] = [[-1, -1], [-1, 1], [1, -1], [1, 1]]
    for name, coarse in zip(names, pixels(len(names), 11, 9, 3), strict=True):
        Image.fromarray(coarse).resize((178, 218), Image.Resampling.BICUBIC).save(folder / JPGS / name, quality=90)
    columns = " ".join({20: "Male", 31: "Smiling"}.get(i, f"Attribute_{i}") for i in range(40))
    rows = [f"{name} {' '.join(f'{a:2d}' for a in row)}\n" for name, row in zip(names, attributes, strict=True)]
    (folder / ATTR).write_text(f"{len(names)}\n{columns} \n" + "".join(rows))
    (folder / PARTITION).write_text("".join(f"{n} {p}\n" for n, p in zip(names, "000102120220", strict=True)))


def flower_ids(*splits: str) -> list[int]:
    return [i for split in splits for i in FLOWER_IDS[split] if FLOWER_LABELS[i - 1] <= 10]


def write_flowers(folder: Path) -> None:
    """The images of the ten classes alone: broad ones, high ones, a square and odd margins."""
    (folder / "jpg").mkdir()
    ids = {name: np.array([row], np.uint16) for name, row in FLOWER_IDS.items()}
    scipy.io.savemat(folder / "setid.mat", ids, do_compression=True)
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": np.array([FLOWER_LABELS], np.uint8)}, do_compression=True)
    for n, i in enumerate(flower_ids("trnid", "valid", "tstid")):
        size = [(500, 500), (667, 500), (500, 752), (503, 500), (500, 501)][n % 5]
        image = Image.fromarray(pixels(n + 1, 50, 50, 3)[n]).resize(size, Image.Resampling.BICUBIC)
        image.save(folder / f"jpg/image_{i:05d}.jpg", quality=80)


SETS = {  # name: its folder, what writes it
    "mnist": ("MNIST/raw", write_idx),
    "svhn_extra": ("SVHN", write_svhn),
    "cifar10": ("cifar-10-batches-py", write_cifar),
    "stl10": ("stl10_binary", write_stl),
    "celeba": ("celeba", write_celeba),
    "flowers10_all": ("flowers-102", write_flowers),
}


def write(name: str, root: Path, monkeypatch=None) -> Path:
    """A small data set in `root`; with monkeypatch it is the official one. Returns its folder."""
    folder = root / SETS[name][0]
    folder.mkdir(parents=True)
    SETS[name][1](folder)
    if monkeypatch:
        make_official(name, folder, monkeypatch)
    return folder


def make_official(name: str, folder: Path, monkeypatch) -> None:
    """The checksums that torchvision and data.py know become those of the files in `folder`."""

    def md5(file: str, otherwise: str = "0" * 32) -> str:
        return hashlib.md5((folder / file).read_bytes()).hexdigest() if (folder / file).exists() else otherwise

    if name == "mnist":
        sums = {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in data.SHA256[name]}
        monkeypatch.setitem(data.SHA256, name, sums)
        monkeypatch.setattr(MNIST, "resources", [[f"{file}.gz", md5(f"{file}.gz")] for file in sums])
    elif name == "svhn_extra":
        files = {split: (url, file, md5(file)) for split, (url, file, _) in SVHN.split_list.items()}
        monkeypatch.setattr(SVHN, "split_list", files)
    elif name == "celeba":
        monkeypatch.setattr(CelebA, "file_list", [(i, md5(file, was), file) for i, was, file in CelebA.file_list])
    elif name == "flowers10_all":
        files = {key: (file, md5(file, was)) for key, (file, was) in Flowers102._file_dict.items()}
        monkeypatch.setattr(Flowers102, "_file_dict", files)
    else:
        cls = {"cifar10": CIFAR10, "stl10": STL10}[name]
        for attribute in ("train_list", "test_list"):
            monkeypatch.setattr(cls, attribute, [[file, md5(file)] for file, _ in getattr(cls, attribute)])
        monkeypatch.setattr(cls, "tgz_md5", md5(cls.filename))
        monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5("batches.meta")})


def write_images(folder: Path, n: int, size: tuple[int, int] = (40, 30), suffix: str = "png", first: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + n):
        Image.fromarray(pixels(i + 1, size[1], size[0], 3)[i]).save(folder / f"{i:03d}.{suffix}")


def square(path: Path, size: tuple[int, int] = (64, 64), mode: str = "RGB", box: tuple | None = None) -> np.ndarray:
    """An image as (C, H, W), by another way: the crop by indices, then PIL's resize."""
    array = np.asarray(Image.open(path).convert(mode))
    side = min(array.shape[:2])
    top, left = (array.shape[0] - side) // 2, (array.shape[1] - side) // 2
    cut = Image.fromarray(array[box or (slice(top, top + side), slice(left, left + side))])
    return np.asarray(cut.resize(size, Image.Resampling.BILINEAR)).reshape(*size[::-1], -1).transpose(2, 0, 1)


def halves(found: data.Dataset) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images and labels of the training set and of the test set, of the types that they must have."""
    both = [(found.train_images, found.train_labels), (found.test_images, found.test_labels)]
    for images, labels in both:
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64 and len(images) == len(labels)
        assert images.is_contiguous() and labels.max() < found.n_classes
    return both


def refused(name: str, root: str | Path = "", unofficial: bool = False) -> str:
    """The one line with which `load` refuses."""
    with pytest.raises(UserError) as error:
        load(name, root, unofficial)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", mock.Mock(side_effect=URLError("network is unreachable")))
    monkeypatch.setitem(sys.modules, "gdown", None)


@pytest.fixture(params=["mnist", "svhn_extra", "cifar10", "stl10", "flowers10_all"])
def server(request, tmp_path, monkeypatch) -> SimpleNamespace:
    """A data set as its publisher's server has it: its archives, with files that are not read."""
    name, folder = request.param, write(request.param, tmp_path / "server")
    it = SimpleNamespace(name=name, inside=SETS[name][0], folder=folder, archives=[], asked=[], breaks=False)
    if name == "mnist":
        for file in data.SHA256["mnist"]:
            (folder / f"{file}.gz").write_bytes(gzip.compress((folder / file).read_bytes()))
        it.archives = list(folder.glob("*.gz"))
    elif name != "svhn_extra":
        (folder / "readme.html").write_bytes(bytes(1000))
        cls = {"cifar10": CIFAR10, "stl10": STL10}.get(name)
        with tarfile.open(tmp_path / "archive", "w:gz") as tar:
            tar.add(folder if cls else folder / "jpg", it.inside if cls else "jpg")
        it.archives = [(tmp_path / "archive").rename(folder / (cls.filename if cls else "102flowers.tgz"))]
    make_official(name, folder, monkeypatch)

    def urlopen(request, *a, **k):
        it.asked.append(request.full_url.rsplit("/", 1)[-1])
        answer = io.BytesIO((folder / it.asked[-1]).read_bytes()[: 1000 if it.breaks else None])
        answer.url, answer.length = request.full_url, None
        return answer

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    return it


def test_what_is_missing_is_downloaded_whole_or_not_at_all(server, tmp_path):
    place = tmp_path / "new/data"
    server.breaks = True
    assert "the download failed (File not found or corrupted.)" in refused(server.name, place)
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*"))  # nor a lock, nor half a file
    (place / server.inside).mkdir(parents=True)
    server.breaks, server.asked = False, []
    with ThreadPoolExecutor(2) as pool:  # two threads that open the lock file each are as good as two processes
        first, second = pool.map(load, [server.name] * 2, [place] * 2)
    assert first.official and first.name == server.name and second.digest == first.digest
    assert len(server.asked) == 2 * len({*server.asked})  # torchvision asks for a file's address, then for the file
    assert [path.name for path in place.iterdir()] == [server.inside.split("/")[0]]  # no archive, no lock
    assert not {"readme.html", *(path.name for path in server.archives)} & {path.name for path in place.rglob("*")}
    server.asked.clear()
    assert load(server.name, place).digest == first.digest and not server.asked


def test_official_archives_that_a_person_brought_are_unpacked(server, tmp_path):
    place, folder = tmp_path / "data", tmp_path / "data" / server.inside
    folder.mkdir(parents=True)
    at = place if server.name in ("cifar10", "flowers10_all") else folder  # either will do
    brought = [Path(shutil.copy(path, at)) for path in server.archives]
    for path in server.folder.glob("*.mat"):
        shutil.copy(path, folder)
    assert load(server.name, place).official and not server.asked
    for path in brought:  # the same content, compressed again, is refused by name and stays as it is
        shutil.rmtree(folder)
        folder.mkdir()
        path.write_bytes(again := gzip.compress(gzip.decompress(server.archives[0].read_bytes()), 1))
        message = refused(server.name, place)
        assert f"{path}: refused: its checksum" in message and f"no data in {folder}, for it lacks " in message
        assert path.read_bytes() == again and list(folder.iterdir()) == [path] * (path.parent == folder)


LACKING = {
    "mnist": "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte",
    "svhn_extra": "train_32x32.mat, extra_32x32.mat, test_32x32.mat",
    "cifar10": "data_batch_1, data_batch_2, data_batch_3, data_batch_4, data_batch_5, test_batch, batches.meta",
    "stl10": "train_X.bin, train_y.bin, test_X.bin, test_y.bin",
    "celeba": f"{ATTR}, {PARTITION}, {JPGS}",
    "flowers10": "imagelabels.mat, setid.mat, jpg",
}


@pytest.mark.parametrize("name", LACKING)
def test_missing_data_without_network_is_one_line_that_says_where_to_put_what(tmp_path, no_network, name):
    for place in (tmp_path / "typed/wrong", tmp_path):
        message = refused(name, place)
        assert f"{name}: no data in {place}/" in message and f" lacks {LACKING[name]}; the download" in message
        assert "--data (DATA= for make)" in message and "`make <paper>-digits` needs no data" in message
        assert ("gdown" if name == "celeba" else "network is unreachable") in message
        assert not list(tmp_path.rglob("*"))
    (write("mnist", tmp_path) / "t10k-labels-idx1-ubyte").unlink()
    before = sorted(tmp_path.rglob("*"))
    assert "MNIST/raw, for it lacks t10k-labels-idx1-ubyte;" in refused("mnist", tmp_path, unofficial=True)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", SETS)
def test_an_altered_file_is_found_and_named(tmp_path, monkeypatch, no_network, name):
    files = [path for path in write(name, tmp_path, monkeypatch).iterdir() if path.is_file()]
    digest = load(name, tmp_path).digest
    for path in files:
        content = path.read_bytes()
        for changed in (content[:-1] + bytes([content[-1] ^ 1]), content[: len(content) // 2], b""):
            path.write_bytes(changed)
            message = refused(name, tmp_path)
            assert f"{path}: refused: its checksum" in message and "Delete it to download it again" in message
            assert ("--unofficial-data" in message) == (name in ("mnist", "celeba"))
        if name in ("svhn_extra", "cifar10", "stl10"):  # a pickle of unknown origin can run anything
            assert "refused: its checksum" in refused(name, tmp_path, unofficial=True)
        path.write_bytes(content)
    assert load(name, tmp_path).digest == digest
    files[0].unlink()
    files[0].mkdir()
    assert files[0].name in refused(name, tmp_path)


def test_unknown_names_and_paths(tmp_path, no_network):
    message = refused("minst")
    assert message.startswith("unknown data set 'minst'; known: digits, mnist")
    assert all(f" {name}" in message for name in (*data.OFFICIAL_COUNTS, "folder:<path>", "signs:<path>"))
    assert "lacks" in refused("mnist", "~nosuch/x") and not list(Path.cwd().glob("~*"))


def test_official_counts():
    assert [sum(data.OFFICIAL_COUNTS[name]) for name in ("svhn_extra", "celeba")] == [630_420, 202_599]


def test_digits_are_scikit_learns_split_for_good_and_interpolated_bilinearly(monkeypatch):
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load("digits", "/nowhere")
    (images, labels), (test_images, test_labels) = halves(digits)
    assert images.shape == (1437, 1, 28, 28) and test_images.shape == (360, 1, 28, 28)
    assert digits.official and digits.digest == data.DIGITS_DIGEST and digits.n_classes == 10
    assert labels.bincount().tolist() == [142, 146, 142, 146, 145, 145, 145, 143, 139, 144]
    assert test_labels.bincount().tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    raw = load_digits()
    first = train_test_split(np.arange(1797), test_size=360, random_state=0, stratify=raw.target)[0][0]
    small = raw.data[first].reshape(8, 8) * 255 / 16
    at = np.clip((np.arange(28) + 0.5) * 8 / 28 - 0.5, 0, 7)  # where pixel i of 28 lies among the 8
    low = np.floor(at).astype(int)
    high, t = np.minimum(low + 1, 7), at - low
    rows = small[low] * (1 - t)[:, None] + small[high] * t[:, None]
    assert np.abs(rows[:, low] * (1 - t) + rows[:, high] * t - images[0, 0].numpy()).max() <= 0.51
    monkeypatch.setattr(data, "DIGITS_DIGEST", "0" * 16)
    assert "not as in our results" in refused("digits")
    assert load("digits", "", unofficial=True).official is False


def test_the_real_data(data_root):
    for name, digest in (("mnist", "c65580678af93f1e"), ("fashion_mnist", "d1fd84a877f3b78f")):
        found = load(name, data_root)
        assert [images.shape for images, _ in halves(found)] == [(60000, 1, 28, 28), (10000, 1, 28, 28)]
        assert found.official and found.digest == digest  # as the committed results and checkpoints have it
    assert found.class_names[0] == "T-shirt/top" and found.train_labels.bincount().tolist() == [6000] * 10
    if not (data_root / "flowers-102").exists():
        pytest.skip(f"no flowers-102 in {data_root}")
    ten = [path for path, label in Flowers102(data_root, "train", loader=Path) if label < 10]
    original, test = min(Image.open(ten[0]).size) >= 500, [20, 40, 20, 36, 45, 25, 20, 65, 26, 25]
    assert original or "not the original images" in refused("flowers10", data_root)
    for name, train in (("flowers10", [10] * 10), ("flowers10_all", [n + 20 for n in test])):
        found = load(name, data_root, unofficial=not original)
        assert [labels.bincount().tolist() for _, labels in halves(found)] == [train, test]
        np.testing.assert_array_equal(found.train_images[:100:9], [square(path) for path in ten[::9]])


def test_an_unofficial_mnist_is_read_where_it_is_asked_for_unless_it_is_damaged(tmp_path):
    write("mnist", tmp_path)
    (tmp_path / "MNIST/processed").mkdir()
    for file in ("training.pt", "test.pt"):  # of old versions of torchvision, which would read them instead
        torch.save((torch.zeros(3, 28, 28), torch.zeros(3)), tmp_path / "MNIST/processed" / file)
    found = load("mnist", tmp_path, unofficial=True)
    for (images, labels), n in zip(halves(found), (30, 12), strict=True):
        np.testing.assert_array_equal(images[:, 0], pixels(n, 28, 28))
        assert labels.tolist() == [i % 10 for i in range(n)]
    counts = {"train_images": 30, "test_images": 12}
    assert found.provenance() == {"data": "mnist", "data_digest": found.digest, "data_official": False, **counts}
    folder = tmp_path / "MNIST/raw"
    for file in ("train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        whole = (folder / file).read_bytes()
        for content in (b"", whole[:10], whole[:-1], b"\x89PNG" + whole[4:], whole[:7] + b"\x09" + whole[8:]):
            (folder / file).write_bytes(content)
            assert str(tmp_path) in refused("mnist", tmp_path, unofficial=True)
        (folder / file).write_bytes(whole)
    (folder / file).write_bytes(whole[:8] + bytes([10] * 12))
    assert "expected images of 28×28, and as many labels, 0 … 9" in refused("mnist", tmp_path, unofficial=True)


COUNTS = {"svhn_extra": ([25, 31], [13]), "svhn": ([25], [13]), "stl10": ([4], [3]), "cifar10": ([2, 3, 4, 5, 6], [7])}


@pytest.mark.parametrize(("name", "counts"), COUNTS.items())
def test_svhn_cifar10_and_stl10_are_read_pixel_by_pixel(tmp_path, monkeypatch, name, counts):
    side = 96 if name == "stl10" else 32  # stl10 without unlabeled_X.bin, which torchvision's own class wants
    folder = write({"svhn": "svhn_extra"}.get(name, name), tmp_path, monkeypatch)
    if name == "svhn":
        (folder / "extra_32x32.mat").write_bytes(b"")  # which it does not read
    found = load(name, tmp_path)
    for (images, labels), its in zip(halves(found), counts, strict=True):
        expected = [pixels(n, 3072) if name == "cifar10" else pixels(n, 3, side, side) for n in its]
        np.testing.assert_array_equal(images, np.concatenate(expected).reshape(-1, 3, side, side))
        assert labels.tolist() == [(i + 1) % 10 for n in its for i in range(n)]
    names = ("0", "9") if "svhn" in name else ("airplane", "truck")
    assert found.official and (found.class_names[0], found.class_names[9]) == names


def test_celeba_is_cropped_resized_split_and_labelled(tmp_path, monkeypatch):
    folder = write("celeba", tmp_path)
    part = load("celeba", tmp_path, unofficial=True)
    assert "--unofficial-data" in refused("celeba", tmp_path) and not part.official
    make_official("celeba", folder, monkeypatch)
    parts = dict(line.split() for line in (folder / PARTITION).read_text().splitlines())
    rows = {line.split()[0]: line.split()[1:] for line in (folder / ATTR).read_text().splitlines()[2:]}
    for name, train in (("celeba", "01"), ("celeba_train", "0")):
        found = load(name, tmp_path)
        assert found.official and found.train_labels[:3].tolist() == [0, 1, 2] and found.digest == part.digest
        for (images, labels), its in zip(halves(found), (train, "2"), strict=True):
            names = [image for part in its for image in parts if parts[image] == part]  # train, then valid
            for image, label, file in zip(images, labels, names, strict=True):
                np.testing.assert_array_equal(image, square(folder / JPGS / file, box=CELEBA_BOX))
                male, smiling = ("" if rows[file][i] == "1" else "not " for i in (20, 31))
                assert found.class_names[label] == f"{male}male, {smiling}smiling"
    # torch's own antialiased bilinear agrees to rounding: no other filter, no shift by a pixel
    crop = torch.from_numpy(np.array(Image.open(folder / JPGS / "000001.jpg"))[CELEBA_BOX]).permute(2, 0, 1)
    other = torch.nn.functional.interpolate(crop[None].float(), size=64, mode="bilinear", antialias=True)[0]
    assert (other - found.train_images[0]).abs().max() <= 1.01
    # as some programs leave it: images in a folder of the archive's name; texts with a byte-order mark, other line ends
    shutil.copytree(folder / JPGS, folder / "copy" / JPGS)
    shutil.rmtree(folder / JPGS)
    (folder / "copy").rename(folder / JPGS)
    for file in (ATTR, PARTITION):
        (folder / file).write_bytes("\ufeff".encode() + (folder / file).read_bytes().replace(b"\n", b"\r\n"))
    found = load("celeba", tmp_path, unofficial=True)
    assert torch.equal(found.train_images, part.train_images) and torch.equal(found.test_labels, part.test_labels)


CELEBA_MISTAKES = {
    "commas": (lambda f: (f / ATTR).write_text("image_id,Male,Smiling\n000001.jpg,1,-1\n"), "'Male' is not in list"),
    "a row less": (lambda f: (f / ATTR).write_text((f / ATTR).read_text()[:-131]), f"all of them in {ATTR}"),
    "no images": (lambda f: [p.unlink() for p in (f / JPGS).iterdir()], "12 of 12 images cannot be used: 000001.jpg ("),
    "wild": (lambda f: Image.new("RGB", (9, 7)).save(f / JPGS / "000009.jpg"), "000009.jpg (RGB, (9, 7) pixels; exp"),
}


@pytest.mark.parametrize("mistake", CELEBA_MISTAKES)
def test_celeba_files_that_are_wrong(tmp_path, mistake):
    make, message = CELEBA_MISTAKES[mistake]
    make(write("celeba", tmp_path))
    said = refused("celeba", tmp_path, unofficial=True)
    assert message in said and str(tmp_path) in said


def test_flowers_are_cut_resized_split_and_labelled(tmp_path, monkeypatch):
    folder = write("flowers10_all", tmp_path, monkeypatch)
    for name, splits in (("flowers10", ("trnid",)), ("flowers10_all", ("trnid", "valid", "tstid"))):
        found = load(name, tmp_path, unofficial=True)
        assert found.official  # asked for or not, it is the official one
        assert found.class_names[0] == "pink primrose" and found.class_names[9] == "globe thistle"
        for (images, labels), its in zip(halves(found), (splits, ("tstid",)), strict=True):
            assert labels.tolist() == [FLOWER_LABELS[i - 1] - 1 for i in flower_ids(*its)]
            np.testing.assert_array_equal(images, [square(folder / f"jpg/image_{i:05d}.jpg") for i in flower_ids(*its)])
    (folder / "jpg/image_00016.jpg").write_text("of another class: not read")
    assert load("flowers10_all", tmp_path).digest == found.digest
    Image.new("RGB", (499, 700), "red").save(folder / "jpg/image_00017.jpg")  # of the test set
    assert "not the original images (a side is under 500 pixels)" in refused("flowers10", tmp_path)
    assert not load("flowers10_all", tmp_path, unofficial=True).official
    (folder / "jpg/image_00017.jpg").unlink()
    message = refused("flowers10", tmp_path, unofficial=True)
    assert f"{folder}/jpg: 1 of 14 images cannot be used: image_00017.jpg (No such file" in message


@pytest.mark.parametrize("name, file", [("celeba", f"{JPGS}/000001.jpg"), ("flowers10_all", "jpg/image_00017.jpg")])
def test_another_picture_is_another_digest(name, file, tmp_path, monkeypatch):
    path = write(name, tmp_path, monkeypatch) / file
    before = load(name, tmp_path).digest
    Image.new("RGB", Image.open(path).size, "red").save(path)
    assert load(name, tmp_path).digest != before


def test_folders_of_class_folders(tmp_path, capsys):
    pets = tmp_path / "pets"
    write_images(pets / "cats", 10, (40, 30))
    write_images(pets / "ants", 10, (20, 70), "bmp", first=10)
    write_images(pets / "dogs", 10, (99, 90), "jpg", first=20)
    write_images(pets / "ants/more", 5, suffix="WEBP", first=30)
    paths = list(pets.rglob("*.*"))
    for junk in (".DS_Store", "._000.png", "notes.txt"):
        (pets / "ants" / junk).write_text("junk")
    for hidden in (".git", "__MACOSX", "cats/.ipynb_checkpoints", "dogs/@eaDir/x"):
        write_images(pets / hidden, 2, first=50)
    (pets / "cats/loop").symlink_to(pets)
    for kind, mode, (c, h, w) in (("folder", "L", (1, 28, 28)), ("folder_colour", "RGB", (3, 64, 64))):
        found = load(f"{kind}:{pets}/", "/nowhere")
        assert capsys.readouterr().out == f"{kind}:pets: 28 + 7 images of 3 classes: ants, cats, dogs\n"
        assert found.provenance()["data"] == f"{kind}:pets" and not found.official  # not the path: results show it
        (images, labels), (test_images, test_labels) = halves(found)
        assert images.shape == (28, c, h, w) and test_images.shape == (7, c, h, w)
        assert labels.bincount().tolist() == [12, 8, 8] and test_labels.bincount().tolist() == [3, 2, 2]
        stored = zip([*labels, *test_labels], [*images, *test_images], strict=True)
        expected = {(path.relative_to(pets).parts[0], square(path, (w, h), mode).tobytes()) for path in paths}
        assert {(found.class_names[y], x.numpy().tobytes()) for y, x in stored} == expected and len(expected) == 35


def test_the_split_of_a_folder_depends_on_its_names_alone(tmp_path, monkeypatch):
    for place, order in (("a/pets", range(13)), ("b/pets", reversed(range(13)))):
        for i in order:
            write_images(tmp_path / place / "cats", 1, first=i)
            write_images(tmp_path / place / "dogs", 1, first=i % 2)
    found = load(f"folder:{tmp_path}/a/pets", "")
    assert load(f"folder:{tmp_path}/b/pets", "").digest == found.digest
    monkeypatch.chdir(tmp_path / "a/pets")
    assert load("folder:.", "").name == "folder:pets" and load("folder:../pets", "").digest == found.digest
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("folder:~/a/pets", "").digest == found.digest
    # a fifth of 13 cats, those with the smallest SHA-256; of 2 dogs one
    drawn = sorted(range(13), key=lambda i: hashlib.sha256(f"cats/{i:03d}.png".encode()).hexdigest())[:3]
    expected = [square(tmp_path / f"a/pets/cats/{i:03d}.png", (28, 28), "L") for i in sorted(drawn)]
    np.testing.assert_array_equal(found.test_images[:3], expected)
    assert found.test_labels.tolist() == [0, 0, 0, 1] and found.train_labels.tolist() == [0] * 10 + [1]


@pytest.mark.parametrize(("train", "test"), [("train", "test"), ("Train", "TEST")])
def test_a_folder_that_is_split_already(tmp_path, train, test):
    for part, n in ((train, 3), (test, 1), ("val", 2)):
        for label in ("b", "a"):
            write_images(tmp_path / part / label, n, (40, 40), "ppm")
    found = load(f"signs:{tmp_path}", "")  # which takes them as they are
    np.testing.assert_array_equal(found.train_images[2].permute(1, 2, 0), pixels(3, 40, 40, 3)[2])
    assert found.train_labels.tolist() == [0, 0, 0, 1, 1, 1] and found.test_labels.tolist() == [0, 1]
    write_images(tmp_path / test / "c", 1)
    assert refused(f"folder:{tmp_path}").endswith("only one of train and test has c")
    shutil.rmtree(tmp_path / test)
    assert "has only one of train and test" in refused(f"folder:{tmp_path}")
    # but a class may be named so: here are trains
    write_images(tmp_path / "vehicles" / train, 3)
    write_images(tmp_path / "vehicles/bus", 3)
    (tmp_path / "vehicles" / train / ".ipynb_checkpoints").mkdir()
    assert {*load(f"folder:{tmp_path}/vehicles", "").class_names} == {"bus", train}


def test_names_that_are_not_utf8(tmp_path, capsys):
    place = os.fsencode(tmp_path) + b"/caf\xe9"
    for label in (b"gr\xfcn", "größe".encode()):
        write_images(Path(os.fsdecode(place + b"/" + label)), 3)
    found = load("folder:" + os.fsdecode(place), "")
    assert found.class_names == ("größe", "gr\\udcfcn") and found.name == "folder:caf\\udce9"
    assert "2 classes: größe, gr\\udcfcn".encode() in capsys.readouterr().out.encode()


def test_pictures_that_lie_on_their_side_or_are_transparent(tmp_path):
    upright, exif = Image.new("RGB", (60, 60), "black"), Image.Exif()
    upright.paste("white", (0, 0, 60, 30))  # the upper half
    exif[0x0112] = 6  # to be turned by 90° clockwise
    for label, image, more in (("a", upright.rotate(90), {"exif": exif}), ("b", Image.new("RGBA", (60, 60)), {})):
        (tmp_path / label).mkdir()
        for i in range(2):
            image.save(tmp_path / label / f"{i}.png", **more)
    turned, clear = load(f"folder:{tmp_path}", "").train_images[:, 0]
    assert turned[:13].min() == 255 and turned[15:].max() == 0 and clear.min() == 255


def unusable(f: Path) -> None:
    (f / "b/y.jpg").write_text("no image")
    (f / "b/$ ü.HEIC").write_bytes(b"")  # no JPEG, and PIL does not read it
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    frames[0].save(f / "b/moves.gif", save_all=True, append_images=frames[1:])  # its first picture is used
    (f / "b/notes.txt").write_text("no image, and it does not say so")
    (f / "b/002.png").write_bytes((f / "b/002.png").read_bytes()[:900])
    (f / "b/z.png").symlink_to(f / "gone")
    Image.fromarray(np.full((9, 9), 999, np.uint16)).save(f / "a/z.png")


FOLDER_MISTAKES = {  # what is changed, what is asked for, what is said
    "no such user": (lambda f: None, "folder:~nosuch/x", "~nosuch/x is not a folder; expected folder:<"),
    "images only": (lambda f: None, "folder:{}/a", "expected class folders of 2 or more .jpg, .png …; too few: none"),
    "one image": (lambda f: write_images(f / "c", 1), "folder:{}", "too few: c"),
    "unusable": (unusable, "folder:{}", "5 of 13 images cannot be used: a/z.png (I;16, (9, 9) pixels; expected 8 bits"),
    "size": (lambda f: None, "signs:{}", "8 of 8 images cannot be used: a/000.png (RGB, (40, 30) pixels; expected 8"),
    "many": (lambda f: write_images(f / "b", 12), "signs:{}", "16 of 16 images cannot be used: "),
}


@pytest.mark.parametrize("mistake", FOLDER_MISTAKES)
def test_folders_of_images_that_are_wrong(tmp_path, mistake):
    [write_images(tmp_path / label, 4) for label in "ab"]
    make, name, message = FOLDER_MISTAKES[mistake]
    make(tmp_path)
    said = refused(name.format(tmp_path))
    assert message in said
    if mistake == "unusable":  # each of them, with its reason
        named = re.findall(r"([ab]/[^(:]*) \(", said)
        assert sorted(named) == ["a/z.png", "b/$ ü.HEIC", "b/002.png", "b/y.jpg", "b/z.png"]
    if mistake == "many":
        assert said.count("png (") == 10 and said.endswith(") and 6 more. Replace or remove them")


DIGITS = "0123456789"  # the names of ten classes
LABELS = torch.arange(10).repeat_interleave(100)[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]


def test_label_draws_and_budgets():
    draws = [draw_labels(LABELS, 103, h, DIGITS, seed)[0].tolist() for h in ("random", "stratified") for seed in (0, 7)]
    as_in_the_results = ["dc187208", "6ed18277", "60bc90ae", "e2334817"]
    assert [hashlib.sha256(str(draw).encode()).hexdigest()[:8] for draw in draws] == as_in_the_results
    assert draw_labels(LABELS, 103, "first", DIGITS, 0)[0].tolist() == list(range(103))
    many = [LABELS[draw_labels(LABELS, 200, "random", DIGITS, s)[0]].bincount(minlength=10) for s in range(200)]
    counts = torch.stack(many).double()
    assert abs(counts.mean(0) - 20).max() < 1.2
    assert 3 < counts.std(0).mean() < 4.6  # hypergeometric: 3.8; a stratified draw would have 0
    counts = LABELS[draw_labels(LABELS, 103, "stratified", DIGITS, 4)[0]].bincount()
    assert sorted(counts.tolist()) == [10] * 7 + [11] * 3
    rare = torch.tensor([0] * 99 + [1])
    for labels, n, how, message in (
        (LABELS, 1001, "first", "1001 labels asked for, but the training set has 1000 images"),
        (rare, 10, "stratified", "10 labels asked for, .* 100 images, and the stratified draw finds 6.*--n-labels 2 "),
        (LABELS, 12, "random", "none of class .*its prior would be 0. What fits: --n-labels 12 --labels stratified$"),
        (LABELS.sort().values, 50, "first", "none of class bird, car, cat, .*--n-labels 50 --labels stratified$"),
        (LABELS, 9, "stratified", "none of class .*--n-labels 10 --labels stratified$"),
        (torch.tensor([0, 0, 2]), 3, "first", "none of class bird; its prior would be 0$"),  # and no draw has one
    ):
        names = data.STL10_CLASSES[: int(labels.max()) + 1]
        with pytest.raises(UserError, match=message) as refused:
            refuse(draw_labels(labels, n, how, names, 0)[1])
        if fits := re.search("What fits: --n-labels (.*) --labels (.*)", str(refused.value)):
            assert not draw_labels(labels, int(fits[1]), fits[2], names, 0)[1]
