"""Data sets as tensors in memory: load, verify, and draw the labelled part.

    name                    under the data folder                                                             official digests
    digits                  nothing: they come with scikit-learn                                              ours, of their integers
    mnist, fashion_mnist    MNIST/raw/, FashionMNIST/raw/: four idx files each                                every file
    svhn, svhn_extra        SVHN/: train_32x32.mat, test_32x32.mat; with extra also extra_32x32.mat           every file
    celeba, celeba_train    celeba/: img_align_celeba/*.jpg, list_attr_celeba.txt, list_eval_partition.txt    the two text files
    cifar10                 cifar-10-batches-py/: data_batch_1 … data_batch_5, test_batch, batches.meta       every file
    stl10                   stl10_binary/: {train,test}_X.bin, {train,test}_y.bin, class_names.txt            every .bin file
    flowers10, flowers10_all    flowers-102/: imagelabels.mat, setid.mat, jpg/ with the ten classes' images   the two .mat files
    folder:PATH, folder_colour:PATH    a person's own images, PATH/<class>/*.jpg, anywhere                    there are none
    signs:PATH              the same, for the Synthetic Traffic Signs: 40×40 images, taken as they are        there are none

The layout is that of torchvision, which downloads what is missing (its SVHN class takes our SVHN/ as its root). Verifying is ours:
every file that has an official digest is checked against it on every start.
"""

import errno
import hashlib
import math
import os
import pickle
import re
import shutil
import socket
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from common.run import UserError, atomic, generator, locked

# The uncompressed idx files. SHA-256 of files whose MD5s are the publishers' (the .gz files' MD5s stand in torchvision).
SHA256 = {
    "mnist": {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    "fashion_mnist": {
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
}
DIGITS_DIGEST = "55c087b603d0064f"  # of scikit-learn's integers and our split
FOLDER = {"mnist": "MNIST/raw", "fashion_mnist": "FashionMNIST/raw"}
SVHN_SPLITS = {"svhn": ("train", "test"), "svhn_extra": ("train", "extra", "test")}  # the last is the test set
CELEBA_TEXTS = ("list_attr_celeba.txt", "list_eval_partition.txt")
CELEBA_PARTITIONS = {"celeba": (0, 1), "celeba_train": (0,)}  # trained on: the paper counts train and valid, its code takes train alone
CELEBA_BOX = (19, 39, 159, 179)  # left, top, right, bottom of the 140×140 in the middle of 178×218
CELEBA_VERSION = f"crop {CELEBA_BOX}, bilinear to 64×64, uint8 (N, C, H, W), v1"  # another preprocessing is another cache
STL10_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")  # their file has no official digest
FLOWERS_SPLITS = {"flowers10": ("train",), "flowers10_all": ("train", "val", "test")}  # trained on; either is tested on test
FLOWERS_SIDE = 500  # pixels: the publisher brought every image's smaller side to it
FOLDER_SHAPES = {"folder": (1, 28, 28), "folder_colour": (3, 64, 64), "signs": (3, 40, 40)}
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP")  # Pillow's names; not those that call other programs

# (train, test) images of the official data.
OFFICIAL_COUNTS: dict[str, tuple[int, int]] = {
    "digits": (1437, 360),
    "mnist": (60_000, 10_000),
    "fashion_mnist": (60_000, 10_000),
    "svhn": (73_257, 26_032),
    "svhn_extra": (604_388, 26_032),
    "celeba": (182_637, 19_962),
    "celeba_train": (162_770, 19_962),
    "cifar10": (50_000, 10_000),
    "stl10": (5_000, 8_000),
    "flowers10": (100, 322),
    "flowers10_all": (522, 322),
}


@dataclass(frozen=True)
class Dataset:
    """One data set, whole, in memory.

    images: uint8 (N, C, H, W), 0 … 255.  labels: int64 (N,), 0 … n_classes - 1.
    digest: 16 hex digits over everything read.  official: whether every file had its official digest.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]
    digest: str
    official: bool

    @property
    def n_classes(self) -> int:
        return len(self.class_names)

    def provenance(self) -> dict:
        """What a result says about the data it was measured on."""
        return {
            "data": self.name,
            "data_digest": self.digest,
            "data_official": self.official,
            "train_images": len(self.train_images),
            "test_images": len(self.test_images),
        }


def load(name: str, root: str | Path, unofficial: bool = False) -> Dataset:
    """Load data set `name` from `root`, downloading it there if it is missing and can be had.

    name: a key of OFFICIAL_COUNTS, or folder:<path>, folder_colour:<path> or signs:<path>, which have no business with `root`.
    unofficial: read files whose digest is not the official one all the same; the result says so.
    Raises UserError where the data are missing, truncated, altered or unreadable.
    """
    try:
        return _load(name, root, unofficial)
    except PermissionError as error:
        raise UserError(f"{name}: {error.filename or root} cannot be read ({error.strerror}): look at its owner and mode") from None


def _load(name: str, root: str | Path, unofficial: bool) -> Dataset:
    if name == "digits":
        return _digits(unofficial)
    if name in SHA256:
        return _idx(name, Path(root), unofficial)
    if name in SVHN_SPLITS:
        return _svhn(name, Path(root), unofficial)
    if name in CELEBA_PARTITIONS:
        return _celeba(name, Path(root), unofficial)
    if name == "cifar10":
        return _cifar10(Path(root), unofficial)
    if name == "stl10":
        return _stl10(Path(root), unofficial)
    if name in FLOWERS_SPLITS:
        return _flowers(name, Path(root), unofficial)
    if name.partition(":")[0] in FOLDER_SHAPES:
        return _folder(name)
    raise UserError(f"unknown data set {name!r}; known: {', '.join([*OFFICIAL_COUNTS, *(f'{kind}:<path>' for kind in FOLDER_SHAPES)])}")


def described(name: str, sets: dict[str, tuple[tuple[int, ...], int | None]]) -> tuple[tuple[int, ...], int | None]:
    """What `sets` says of a data set: the shape of an image and the number of classes, None where a folder has to tell.

    Raises ValueError for a name that is not in `sets`, or one with a path where none belongs, or the other way round.
    """
    kind, _, path = name.partition(":")
    if kind not in sets or (path != "") != (sets[kind][1] is None):
        names = ", ".join(f"{known}:<path>" if n is None else known for known, (_, n) in sets.items())
        raise ValueError(f"dataset: {name!r} is not one of {names}")
    return sets[kind]


def official_digest(name: str) -> str | None:
    """The digest that `load` finds on the official data, or None where it cannot be known beforehand.

    That is CelebA's and the flowers', which go over the decoded pixels, and those depend on the JPEG decoder in the last bit; and a
    person's own.
    """
    if name == "digits":
        return DIGITS_DIGEST
    if name in SHA256:
        return _digest(SHA256[name].values())
    if name == "cifar10":
        return _digest(_cifar10_files().values())
    if name == "stl10":
        return _digest([*_stl10_files().values(), *STL10_CLASSES])
    return _digest(_svhn_files(name).values()) if name in SVHN_SPLITS else None


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


def _verify(path: Path, expected: str, algorithm: str, unofficial: bool) -> str:
    """The digest of a file. Raises UserError where it cannot be read, or is not `expected` and unofficial files are not asked for."""
    try:
        with open(path, "rb") as file:  # in pieces; some machines let MD5 pass only where it is not said to be security
            found = hashlib.file_digest(file, partial(hashlib.new, algorithm, usedforsecurity=False)).hexdigest()
            size = file.tell()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if found != expected and not unofficial:
        raise UserError(
            f"{path}: not the official file ({algorithm.upper()} {found[:12]}…, {size:,} bytes; expected {expected[:12]}…): "
            "truncated, altered or a subset. Delete it and run again to download it, or pass --unofficial-data to use it as it is"
        )
    return found


def _some(names: Iterable[str]) -> str:
    """The first three names, for a message."""
    names = list(names)
    return ", ".join(name[:40] for name in names[:3]) + (" …" if len(names) > 3 else "")


def choose_labels(labels: Tensor, n: int, how: str, n_classes: int, seed: int) -> Tensor:
    """Indices (n,), ascending, of the training images whose labels are known.

    labels: (N,).  how: 'random' (uniform, without replacement), 'stratified' (n / n_classes of each class, the remainder on
    classes drawn at random) or 'first' (the first n in file order).
    Raises UserError where n exceeds the data, or the draw misses a class.
    """
    if n > len(labels):
        raise UserError(f"n_labels: {n} labels asked for, but the training set has {len(labels)} images")
    if how == "first":
        chosen = torch.arange(n)
    else:
        shuffled = torch.randperm(len(labels), generator=generator(seed, "labels"))
        if how == "random":
            chosen = shuffled[:n]
        else:
            quota = torch.full((n_classes,), n // n_classes)
            quota[torch.randperm(n_classes, generator=generator(seed, "remainder"))[: n % n_classes]] += 1
            by_class = [shuffled[labels[shuffled] == c] for c in range(n_classes)]
            for c, members in enumerate(by_class):
                if len(members) < quota[c]:
                    raise UserError(f"n_labels: {quota[c]} labels of class {c} asked for, but it has {len(members)} images")
            chosen = torch.cat([members[: quota[c]] for c, members in enumerate(by_class)])
    missing = sorted(set(range(n_classes)) - set(labels[chosen].tolist()))
    if missing:
        raise UserError(
            f"labels: the {how} draw of {n} labels (seed {seed}) has none of class {', '.join(map(str, missing))}; "
            "its prior would be 0. Use --labels stratified, another --seed, or more --n-labels"
        )
    return chosen.sort().values


def _digits(unofficial: bool) -> Dataset:
    """scikit-learn's 1,797 digits: 8×8, 0 … 16, brought to 28×28 bilinearly; 1,437 train, 360 test, stratified and fixed."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw, labels = load_digits(return_X_y=True)
    train, test = train_test_split(np.arange(len(labels)), test_size=360, random_state=0, stratify=labels)
    # Over the raw integers and the split: bilinear rounding may differ between machines, these may not.
    parts = (array[part].astype(np.uint8).tobytes() for part in (train, test) for array in (raw, labels))
    digest = _digest(hashlib.sha256(part).hexdigest() for part in parts)
    if digest != DIGITS_DIGEST and not unofficial:
        raise UserError(
            f"digits: scikit-learn's data or split is not the one our results come from (digest {digest}, expected {DIGITS_DIGEST}). "
            "Install the scikit-learn of constraints.txt, or pass --unofficial-data"
        )
    images = torch.from_numpy(raw).float().view(-1, 1, 8, 8) * (255 / 16)
    images = torch.nn.functional.interpolate(images, size=28, mode="bilinear").round().to(torch.uint8)
    labels = torch.from_numpy(labels).long()
    split = (images[train], labels[train], images[test], labels[test])
    return Dataset("digits", *split, tuple("0123456789"), digest, digest == DIGITS_DIGEST)


def _idx(name: str, root: Path, unofficial: bool) -> Dataset:
    """MNIST or Fashion-MNIST from the four idx files under root/MNIST/raw or root/FashionMNIST/raw."""
    import torchvision.datasets as sets

    folder = root / FOLDER[name]
    cls = {"mnist": sets.MNIST, "fashion_mnist": sets.FashionMNIST}[name]

    def fetch(part: Path, missing: list[str]) -> Iterator[str]:
        for archive in folder.glob("*.gz"):  # a person may have brought the archives alone: torchvision checks their MD5
            shutil.copy(archive, part / FOLDER[name])
        cls(part, download=True)
        yield from missing

    _provide(name, root, FOLDER[name], list(SHA256[name]), fetch)
    parts, found_digests = {}, []
    for file, expected in SHA256[name].items():
        path = folder / file
        found_digests.append(_verify(path, expected, "sha256", unofficial))
        content = path.read_bytes()
        dimensions = 3 if "images" in file else 1
        # Checked here since an unofficial file may hold anything, and torchvision's reader states its doubts as asserts.
        if len(content) < 4 + 4 * dimensions or content[:4] != bytes([0, 0, 8, dimensions]):
            begins = content[:4].hex() or "nothing"
            raise UserError(f"{path}: not an idx file of {dimensions}-dimensional bytes (it begins with {begins})")
        shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
        there = len(content) - 4 - 4 * dimensions
        if 0 in shape or math.prod(shape) != there:
            raise UserError(f"{path}: its header announces {'×'.join(map(str, shape))} bytes, {there:,} are there")
        read = sets.mnist.read_image_file if dimensions == 3 else sets.mnist.read_label_file
        parts[file] = read(str(path))
    split = []
    for prefix in ("train", "t10k"):
        images, labels = parts[f"{prefix}-images-idx3-ubyte"].unsqueeze(1), parts[f"{prefix}-labels-idx1-ubyte"]
        if len(images) != len(labels):
            raise UserError(f"{folder}: {len(images):,} {prefix} images but {len(labels):,} labels")
        if images.shape[1:] != (1, 28, 28):
            raise UserError(f"{folder}: {prefix} images are {images.shape[2]}×{images.shape[3]}, expected 28×28")
        if labels.max() >= len(cls.classes):
            raise UserError(f"{folder}: a {prefix} label is {labels.max()}, expected 0 … {len(cls.classes) - 1}")
        split += [images, labels]
    class_names = tuple(c.split(" - ")[0] for c in cls.classes)
    return Dataset(name, *split, class_names, _digest(found_digests), found_digests == list(SHA256[name].values()))


# ------------------------------------------------------------------------------------------------------------------ SVHN


def _svhn_files(name: str) -> dict[str, str]:
    """The .mat files of a set, the test set's last, and their official MD5s, as they stand in torchvision."""
    from torchvision.datasets import SVHN

    return {SVHN.split_list[split][1]: SVHN.split_list[split][2] for split in SVHN_SPLITS[name]}


def _svhn(name: str, root: Path, unofficial: bool) -> Dataset:
    """Street View House Numbers, 32×32 crops, from root/SVHN. svhn_extra: the training set is train followed by extra."""
    from torchvision.datasets import SVHN
    from torchvision.datasets.utils import download_url

    files = _svhn_files(name)

    def fetch(part: Path, missing: list[str]) -> Iterator[str]:
        for url, file, md5 in SVHN.split_list.values():
            if file in missing:
                download_url(url, part / "SVHN", file, md5)
                yield file

    _provide(name, root, "SVHN", list(files), fetch)
    found = [_verify(root / "SVHN" / file, md5, "md5", unofficial) for file, md5 in files.items()]
    *train, test = (root / "SVHN" / file for file in files)
    split = (*_read_mats(train), *_read_mats([test]))
    return Dataset(name, *split, tuple("0123456789"), _digest(found), found == list(files.values()))


def _read_mats(paths: list[Path]) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) and labels (N,) of several .mat files, one after the other.

    The pixels are held once, and beside them one file's while it is read. The last file is read first: of svhn_extra's it is the
    largest, and what was not written to yet takes no memory; so the peak is 3.3 GB, for 1.9 GB of pixels.
    """
    counts = [_mat_count(path) for path in paths]
    images = torch.empty(sum(counts), 3, 32, 32, dtype=torch.uint8)
    labels = torch.empty(sum(counts), dtype=torch.int64)
    for path, *parts in reversed(list(zip(paths, images.split(counts), labels.split(counts), strict=True))):
        _read_mat(path, *parts)
    return images, labels


@contextmanager
def _reading_mat(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # on a damaged file scipy raises nearly anything, from IndexError to zlib's own
        reason = " ".join(str(error).split())[:100]
        raise UserError(
            f"{path}: not a readable MATLAB file: truncated, altered or another format ({reason}). "
            "Delete it and run again to download the official one"
        ) from None


def _mat_count(path: Path) -> int:
    """How many images a .mat file announces. Raises UserError where it does not hold X and y in SVHN's shapes."""
    import scipy.io

    with _reading_mat(path):
        shapes = {name: shape for name, shape, _ in reversed(scipy.io.whosmat(path))}  # of two of a name, loadmat takes the first
    missing = [name for name in "Xy" if name not in shapes]
    if missing:
        raise UserError(f"{path}: has no {' and no '.join(missing)}, but {', '.join(sorted(shapes)) or 'nothing'}; expected SVHN's X and y")
    x, y = shapes["X"], shapes["y"]
    if len(x) != 4 or x[:3] != (32, 32, 3) or 0 in x:
        raise UserError(f"{path}: X is {'×'.join(map(str, x))}, expected 32×32×3×N, the cropped digits (format 2)")
    if y != (x[3], 1):
        raise UserError(f"{path}: y is {'×'.join(map(str, y))}, expected {x[3]}×1: one label for each image of X")
    return x[3]


def _read_mat(path: Path, images: Tensor, labels: Tensor) -> None:
    """Fill images (N, 3, 32, 32) and labels (N,) from X (32, 32, 3, N) and y (N, 1), where 10 stands for the digit 0."""
    import scipy.io

    with _reading_mat(path):
        content = scipy.io.loadmat(path, variable_names=("X", "y"))
    pixels, digits = content["X"], content["y"]
    if getattr(pixels, "dtype", None) != np.uint8:
        raise UserError(f"{path}: X holds {getattr(pixels, 'dtype', 'no numbers')}, expected uint8")
    if not isinstance(digits, np.ndarray) or digits.dtype.kind not in "uif":
        raise UserError(f"{path}: y holds {getattr(digits, 'dtype', 'no numbers')}, expected numbers")
    wrong = digits[~np.isin(digits, range(1, 11))]
    if len(wrong):
        raise UserError(f"{path}: a label is {wrong[0]}, expected 1 … 10 (10 stands for the digit 0)")
    images.copy_(torch.from_numpy(pixels).permute(3, 2, 0, 1))
    labels.copy_(torch.from_numpy(digits.astype(np.int64)[:, 0] % 10))


# ---------------------------------------------------------------------------------------------------------------- CelebA


def _celeba(name: str, root: Path, unofficial: bool) -> Dataset:
    """CelebA's aligned faces from root/celeba: the middle 140×140 brought to 64×64, four classes from Male and Smiling.

    Official are the two text files; of the images only the archive has an official digest, so of them no more is known than that
    all are there, can be decoded and are 178×218. The valid images are read for both names: the two share one cache.
    """
    from torchvision.datasets import CelebA
    from torchvision.datasets.utils import check_integrity, download_file_from_google_drive, extract_archive

    folder, images = root / "celeba", root / "celeba/img_align_celeba"
    official = {file: md5 for _, md5, file in CelebA.file_list}

    def fetch(part: Path, missing: list[str]) -> Iterator[str]:
        for file_id, md5, file in CelebA.file_list:
            if file in missing:
                download_file_from_google_drive(file_id, part / "celeba", file, md5)
                yield file
            elif file == "img_align_celeba.zip" and images.name in missing:
                archive = folder / file  # a person may have brought it
                if not archive.exists():
                    archive = part / "celeba" / file
                    download_file_from_google_drive(file_id, archive.parent, file, md5)
                elif not check_integrity(archive, md5):
                    raise RuntimeError(f"the {file} there is not the official one: its MD5 is not {md5[:12]}…")
                extract_archive(archive, part / "celeba")
                yield images.name

    _provide(name, root, "celeba", [images.name, *CELEBA_TEXTS], fetch)
    found = [_verify(folder / file, official[file], "md5", unofficial) for file in CELEBA_TEXTS]
    classes, partition = _celeba_classes(folder / CELEBA_TEXTS[0]), _celeba_partition(folder / CELEBA_TEXTS[1])
    names = sorted(partition, key=partition.__getitem__)  # train, valid, test, each in file order: a split is a slice, not a copy
    unknown = [n for n in names if n not in classes]
    if unknown:
        raise UserError(f"{folder / CELEBA_TEXTS[0]}: no attributes of {len(unknown):,} images that the partition names ({_some(unknown)})")
    n_train, n_valid, n_test = (list(partition.values()).count(p) for p in range(3))
    if not n_train or not n_test:
        raise UserError(f"{folder / CELEBA_TEXTS[1]}: names {n_train} training and {n_test} test images (0 and 2), expected some of each")
    pixels, pixels_digest = _celeba_pixels(images, names, found)
    split = slice(n_train + n_valid if 1 in CELEBA_PARTITIONS[name] else n_train), slice(n_train + n_valid, None)
    pixels, labels = torch.from_numpy(pixels), torch.tensor([classes[n] for n in names])
    return Dataset(
        name,
        *(tensor[part] for part in split for tensor in (pixels, labels)),
        ("not male, not smiling", "not male, smiling", "male, not smiling", "male, smiling"),
        _digest([*found, pixels_digest]),
        found == [official[file] for file in CELEBA_TEXTS],
    )


def _celeba_classes(path: Path) -> dict[str, int]:
    """Image name -> 2·male + smiling, from list_attr_celeba.txt: a count, the attributes' names, a row of ±1 for each image."""
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    names, rows = lines[1].split() if len(lines) > 1 else [], lines[2:]
    if not {"Male", "Smiling"} <= set(names):
        raise UserError(f"{path}: line 2 names no attributes Male and Smiling ({_some(names) or 'nothing'}); expected CelebA's 40")
    if lines[0].strip() != str(len(rows)):
        raise UserError(f"{path}: line 1 announces {lines[0].strip()[:20]} images, {len(rows)} rows follow")
    classes, male, smiling = {}, names.index("Male") + 1, names.index("Smiling") + 1
    for i, row in enumerate(rows, start=3):
        cells = row.split()
        if len(cells) != len(names) + 1:
            raise UserError(f"{path}: line {i} has {len(cells)} columns, expected {len(names) + 1}: an image and {len(names)} attributes")
        if not {cells[male], cells[smiling]} <= {"1", "-1"}:
            raise UserError(f"{path}: line {i}: Male is {cells[male]} and Smiling {cells[smiling]}, expected 1 or -1")
        classes[cells[0]] = 2 * (cells[male] == "1") + (cells[smiling] == "1")
    if len(classes) < len(rows):
        raise UserError(f"{path}: {len(rows) - len(classes)} images have several rows")
    return classes


def _celeba_partition(path: Path) -> dict[str, int]:
    """Image name -> 0 (train), 1 (valid) or 2 (test), from list_eval_partition.txt."""
    partition: dict[str, int] = {}
    for i, row in enumerate(path.read_text(encoding="utf-8", errors="replace").strip().splitlines(), start=1):
        found = re.fullmatch(r"(\S+)\s+([012])\s*", row)
        if not found:
            raise UserError(f"{path}: line {i} is {row[:40]!r}, expected an image and 0, 1 or 2, as in '000001.jpg 0'")
        if found[1] in partition:
            raise UserError(f"{path}: line {i} names {found[1]} a second time")
        partition[found[1]] = int(found[2])
    return partition


def _celeba_pixels(folder: Path, names: list[str], text_digests: list[str]) -> tuple[np.ndarray, str]:
    """The images as uint8 (N, 3, 64, 64), in the order of `names`, and the pixels' SHA-256: decoded once, from then on read from a cache.

    The cache's name says what it was made from; beside it stand its SHA-256, which is verified on every start, and when the images were
    last changed. It may be deleted.
    """
    try:
        with os.scandir(folder) as entries:
            found = {entry.name: entry.stat() for entry in entries if entry.is_file()}
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from None
    missing = sorted(n for n in names if n not in found)
    if missing:
        raise UserError(
            f"{folder}: {len(missing):,} of {len(names):,} images that {CELEBA_TEXTS[1]} names are not there ({_some(missing)}). "
            "Unpack img_align_celeba.zip again, or name only those that are there and pass --unofficial-data"
        )
    shape = (len(names), 3, 64, 64)
    file = f"pixels-64x64-{_digest([CELEBA_VERSION, *text_digests, *(f'{n} {found[n].st_size};' for n in names)])}.bin"
    changed = _digest(f"{n} {found[n].st_mtime_ns};" for n in names)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    places = (folder.parent, Path(home, "gmm-reproductions"))
    for place in places:
        if cached := _read_cache(place / file, shape, changed):
            return cached
    place = next((place for place in places if _has_room(place, math.prod(shape))), None)
    if place is None:
        where, needed = " nor ".join(map(str, places)), math.prod(shape) / 1e9
        raise UserError(f"celeba: neither {where} can be written and has {needed:.1f} GB free, for the decoded images. Set XDG_CACHE_HOME")
    with _locked(place):
        if cached := _read_cache(place / file, shape, changed, aloud=False):  # of a process that was first
            return cached
        for part in place.glob(f".{file}*.part"):  # of a process that was killed while it wrote
            part.unlink()
        print(f"celeba: decoding {len(names):,} images, once; they are kept in {place / file}", flush=True)
        pixels = _decode([folder / n for n in names], _celeba_face, shape[1:])
        digest = hashlib.sha256(pixels.ravel()).hexdigest()
        with atomic(place / file, "wb") as out:
            out.write(pixels.ravel())
        with atomic(place / f"{file}.sha256") as out:  # after the pixels, in the format of sha256sum
            out.write(f"{digest}  {file}\n# of images last changed as {changed} says\n")
    return pixels, digest


def _celeba_face(image: Image.Image) -> Image.Image:
    if image.size != (178, 218):
        raise ValueError(f"{image.width}×{image.height} pixels, expected 178×218")
    return image.convert("RGB").crop(CELEBA_BOX).resize((64, 64), Image.Resampling.BILINEAR)


def _read_cache(path: Path, shape: tuple[int, ...], changed: str, aloud: bool = True) -> tuple[np.ndarray, str] | None:
    """The cached array and its SHA-256; None where there is none, or, aloud, where it is damaged or the images have changed since.

    changed: a digest of when each was.
    """
    try:
        text = Path(f"{path}.sha256").read_text(encoding="utf-8", errors="replace")
        expected, same = text[:64], f" {changed} " in text
        whole = path.stat().st_size == math.prod(shape)
        pixels = np.fromfile(path, np.uint8) if whole else np.empty(0, np.uint8)
    except OSError:  # there is none, or it is somebody else's
        return None
    whole = hashlib.sha256(pixels).hexdigest() == expected
    if whole and same:
        return pixels.reshape(shape), expected
    if aloud:
        why = "older than some of the images" if whole else "damaged: it is not what its SHA-256 says"
        print(f"{path}: {why}; the images are decoded anew", flush=True)
    return None


def _has_room(place: Path, size: int) -> bool:
    """Whether `size` bytes can be written in a folder, which is made if it is not there."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        # The mode as well: root may write anywhere, but a folder that is marked read-only is to be left alone.
        return os.access(place, os.W_OK) and bool(place.stat().st_mode & 0o222) and shutil.disk_usage(place).free > size
    except OSError:
        return False


# --------------------------------------------------------------------------------------------------- CIFAR-10 and STL-10


def _cifar10_files() -> dict[str, str]:
    """The training batches, the test batch and the file of names, in this order, and their official MD5s, as they stand in torchvision."""
    from torchvision.datasets import CIFAR10

    return dict([*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])])


def _cifar10(root: Path, unofficial: bool) -> Dataset:
    """CIFAR-10, 32×32, from root/cifar-10-batches-py: five training batches, a test batch and the classes' names, each a pickle."""
    from torchvision.datasets import CIFAR10

    files = _cifar10_files()
    folder = _provide_archive("cifar10", root, CIFAR10, list(files))
    found = [_verify(folder / file, md5, "md5", unofficial) for file, md5 in files.items()]
    *train, test, meta = (folder / file for file in files)
    (names,) = _unpickle(meta, CIFAR10.meta["key"])
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names) or not len(names) == len(set(names)) == 10:
        raise UserError(f"{meta}: {CIFAR10.meta['key']} is not a list of ten different names, expected one for each of CIFAR-10's classes")
    split = (*_read_batches(train), *_read_batches([test]))
    return Dataset("cifar10", *split, tuple(names), _digest(found), found == list(files.values()))


def _read_batches(paths: list[Path]) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) and labels (N,) of several batches, one after the other."""
    pixels, labels = [], []
    for path in paths:
        data, classes = _unpickle(path, "data", "labels")
        if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != 3 * 32 * 32 or not len(data):
            what = "×".join(map(str, data.shape)) if isinstance(data, np.ndarray) else f"a {type(data).__name__}"
            raise UserError(f"{path}: data is {what}, expected an array N×3072 of uint8: 3×32×32 an image")
        if not isinstance(classes, list) or len(classes) != len(data):
            what = f"{len(classes):,} labels" if isinstance(classes, list) else f"labels is a {type(classes).__name__}"
            raise UserError(f"{path}: {what}, expected a list of {len(data):,}: one for each image")
        wrong = [i for i, label in enumerate(classes) if type(label) is not int or not 0 <= label < 10]
        if wrong:
            raise UserError(f"{path}: the label of image {wrong[0]} is none of the integers 0 … 9")
        pixels.append(data)
        labels += classes
    return torch.from_numpy(np.concatenate(pixels)).view(-1, 3, 32, 32), torch.tensor(labels)


def _unpickle(path: Path, *keys: str) -> list:
    """What CIFAR's pickled dict holds under `keys`. Raises UserError where it cannot be read, lacks one, or wants to run anything."""
    try:
        with open(path, "rb") as file:
            content = _ArrayUnpickler(file, encoding="latin1").load()  # Python 2 wrote them: their text is bytes, as the pixels are
    except Exception as error:  # on a damaged file pickle raises nearly anything
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise UserError(
            f"{path}: not a readable pickle of CIFAR-10: truncated, altered or another format ({reason}). "
            "Delete it and run again to download the official one"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a dict with {' and '.join(keys)}")
    missing = [key for key in keys if key not in content]
    if missing:
        there = _some(repr(key) for key in content if isinstance(key, str | bytes)) or "nothing"
        raise UserError(f"{path}: has no {' and no '.join(missing)}, but {there}; expected CIFAR-10's {' and '.join(keys)}")
    return [content[key] for key in keys]


def _uint8(code: object, *_: object) -> np.dtype:
    if code not in ("u1", "uint8"):
        raise pickle.UnpicklingError(f"it holds an array of {code!r}, expected uint8")
    return np.dtype(np.uint8)


class _ArrayUnpickler(pickle._Unpickler):
    """Reads numbers, text, lists, dicts and arrays of uint8, and can do nothing else.

    A pickle names functions, and reading calls them: a stranger's could run anything. So the names that an array's pickle has lead to
    functions of ours, and no other is looked up. numpy's own will not do: a crafted dtype reaches memory outside of its array. Nor will
    pickle.Unpickler, the same in C: where a bit has flipped it may take gigabytes.
    """

    ALLOWED = {
        ("numpy", "ndarray"): None,  # only ever an argument of _reconstruct
        ("numpy", "dtype"): _uint8,
        ("numpy.core.multiarray", "_reconstruct"): lambda *_: np.empty(0, np.uint8),  # what it holds follows, as its state
        ("numpy._core.multiarray", "_reconstruct"): lambda *_: np.empty(0, np.uint8),  # as numpy 2 calls it
        ("_codecs", "encode"): lambda text, _: text.encode("latin1"),  # how Python 3 writes bytes for Python 2
    }

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {f'{module}.{name}'!r}, which images do not need and which was not run")
        return self.ALLOWED[module, name]


def _stl10_files() -> dict[str, str]:
    """The labelled images and their labels, and their official MD5s, as they stand in torchvision; its unlabeled_X.bin is not read."""
    from torchvision.datasets import STL10

    official = dict([*STL10.train_list, *STL10.test_list])
    return {file: official[file] for file in ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin")}


def _stl10(root: Path, unofficial: bool) -> Dataset:
    """STL-10's labelled images, 96×96, from root/stl10_binary."""
    from torchvision.datasets import STL10

    files = _stl10_files()
    folder = _provide_archive("stl10", root, STL10, [*files, STL10.class_names_file])
    found = [_verify(folder / file, md5, "md5", unofficial) for file, md5 in files.items()]
    path = folder / STL10.class_names_file
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8", errors="replace").strip().splitlines())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if names != STL10_CLASSES and not unofficial:
        raise UserError(
            f"{path}: not the official names ({_some(names) or 'nothing'}; expected {', '.join(STL10_CLASSES)}, one a line). "
            "Delete it and run again to download it, or pass --unofficial-data to use it as it is"
        )
    if not len(names) == len(set(names)) == 10:
        raise UserError(f"{path}: has {len(set(names))} names in {len(names)} lines, expected ten different ones, one a line")
    split = [tensor for part in ("train", "test") for tensor in _read_bins(folder / f"{part}_X.bin", folder / f"{part}_y.bin")]
    is_official = found == list(files.values()) and names == STL10_CLASSES
    return Dataset("stl10", *split, names, _digest([*found, *names]), is_official)


def _read_bins(images: Path, labels: Path) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 96, 96), stored column by column, and labels (N,), stored as 1 … 10: bytes without any header."""
    size, classes = images.stat().st_size, np.fromfile(labels, np.uint8)
    n, rest = divmod(size, 3 * 96 * 96)
    if not n or rest:
        raise UserError(
            f"{images}: {size:,} bytes, expected a multiple of 27,648: 3×96×96 an image. "
            "Delete it and run again to download the official one"
        )
    if len(classes) != n:
        raise UserError(f"{labels}: {len(classes):,} labels, expected {n:,}: a byte for each image of {images.name}")
    wrong = classes[(classes < 1) | (classes > 10)]
    if len(wrong):
        raise UserError(f"{labels}: a label is {wrong[0]}, expected 1 … 10")
    pixels = torch.from_numpy(np.fromfile(images, np.uint8)).view(n, 3, 96, 96)
    return pixels.transpose(2, 3).contiguous(), torch.from_numpy(classes.astype(np.int64) - 1)


# --------------------------------------------------------------------------------------------------------------- flowers


def _flowers_files() -> dict[str, str]:
    """The .mat files of the labels and of the splits, in this order, and their official MD5s, as they stand in torchvision."""
    from torchvision.datasets import Flowers102

    return dict(Flowers102._file_dict[key] for key in ("label", "setid"))


def _flowers(name: str, root: Path, unofficial: bool) -> Dataset:
    """The first ten classes of Oxford-102 Flowers from root/flowers-102, each image brought to 64×64 as folder_colour: does it.

    Trained on are flowers10's official training split or, for flowers10_all, all three splits: its test set, which is the official
    one as well, is then part of its training set, as may be where the learning is unsupervised.
    Official are the two .mat files; of the images only the archive has an official digest, so of them no more is known than that the
    ten classes' are there, can be decoded and, as the originals, have no side under 500 pixels. Other classes' are not looked at.
    """
    from torchvision.datasets import Flowers102
    from torchvision.datasets.utils import download_url

    folder, images, files = root / "flowers-102", root / "flowers-102/jpg", _flowers_files()
    url, (archive, archive_md5) = Flowers102._download_url_prefix, Flowers102._file_dict["image"]

    def fetch(part: Path, missing: list[str]) -> Iterator[str]:
        for file in missing:
            if file in files:
                download_url(url + file, part / "flowers-102", file, files[file])
            else:
                (part / "flowers-102" / file).mkdir()
                path = _archive(part, (folder, root), url + archive, archive, archive_md5)
                if not list(_unpack(path, partial(_flowers_target, part / "flowers-102"))):
                    raise RuntimeError(f"{archive} does not hold jpg/image_00001.jpg and so on")
            yield file

    _provide(name, root, "flowers-102", [*files, images.name], fetch, archive)
    found = [_verify(folder / file, md5, "md5", unofficial) for file, md5 in files.items()]
    splits, labels = _flowers_splits(*(folder / file for file in files))
    ids = [i for split in dict.fromkeys([*FLOWERS_SPLITS[name], "test"]) for i in splits[split]]  # the test split last: a slice
    n_test = len(splits["test"])
    n_train = len(ids) if "test" in FLOWERS_SPLITS[name] else len(ids) - n_test
    if not n_train or not n_test:
        raise UserError(
            f"{folder / 'setid.mat'}: names {n_train} training and {n_test} test images of the first ten classes, expected some of each. "
            "Delete it and run again to download the official one"
        )
    pixels, others = _flowers_pixels(images, ids, unofficial)
    pixels, y = torch.from_numpy(pixels), torch.tensor([labels[i] for i in ids])
    return Dataset(
        name,
        *(tensor[part] for part in (slice(n_train), slice(len(ids) - n_test, None)) for tensor in (pixels, y)),
        tuple(Flowers102.classes[:10]),
        _digest([*found, hashlib.sha256(pixels.numpy().ravel()).hexdigest()]),
        found == list(files.values()) and not others,
    )


def _flowers_target(folder: Path, path: Path) -> Path | None:
    return folder / path if re.fullmatch(r"jpg/image_\d{5}\.jpg", path.as_posix()) else None


def _flowers_splits(labels_path: Path, splits_path: Path) -> tuple[dict[str, list[int]], dict[int, int]]:
    """The first ten classes' images, numbered from 1: those of each split, in file order, and the label 0 … 9 of each."""
    from torchvision.datasets import Flowers102

    (classes,) = _mat_rows(labels_path, ["labels"], len(Flowers102.classes), "a class")
    labels = {i: label - 1 for i, label in enumerate(classes, start=1) if label <= 10}
    names = list(Flowers102._splits_map.values())
    rows = _mat_rows(splits_path, names, len(classes), f"an image that {labels_path.name} labels")
    again = [i for i, times in Counter(i for row in rows for i in row).items() if times > 1]
    if again:
        raise UserError(
            f"{splits_path}: names {len(again):,} images more than once ({_some(map(str, again))}), expected each once, in one of "
            f"{', '.join(names)}. Delete it and run again to download the official one"
        )
    return {split: [i for i in row if i in labels] for split, row in zip(Flowers102._splits_map, rows, strict=True)}, labels


def _mat_rows(path: Path, names: list[str], largest: int, meaning: str) -> list[list[int]]:
    """What a .mat file holds under each of `names`: a row (1, N) of whole numbers 1 … largest. meaning: what each of them stands for."""
    import scipy.io

    with _reading_mat(path):
        content = scipy.io.loadmat(path)
    way_out = "Delete it and run again to download the official one"
    missing, rows = [name for name in names if name not in content], []
    if missing:
        there = _some(sorted(name for name in content if not name.startswith("__"))) or "nothing"
        raise UserError(f"{path}: has no {' and no '.join(missing)}, but {there}; expected {', '.join(names)}. {way_out}")
    for name in names:
        row = content[name]
        if not isinstance(row, np.ndarray) or row.dtype.kind not in "uif" or row.ndim != 2 or len(row) != 1 or not row.size:
            what = f"{'×'.join(map(str, getattr(row, 'shape', ())))} of {getattr(row, 'dtype', type(row).__name__)}"
            raise UserError(f"{path}: {name} is {what}, expected a row of numbers, 1×N. {way_out}")
        wrong = row[~np.isin(row, np.arange(1, largest + 1))]
        if len(wrong):
            raise UserError(f"{path}: {name} holds {wrong[0]}, expected 1 … {largest:,}, each {meaning}. {way_out}")
        rows.append(row[0].astype(np.int64).tolist())
    return rows


def _flowers_pixels(folder: Path, ids: list[int], unofficial: bool) -> tuple[np.ndarray, bool]:
    """Images of these numbers as uint8 (N, 3, 64, 64), and whether some are not the originals, going by their size."""
    names = [f"image_{i:05d}.jpg" for i in ids]
    try:
        with os.scandir(folder) as entries:
            there = {entry.name for entry in entries if entry.is_file()}
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from None
    way_out = "Unpack 102flowers.tgz again, or delete the folder and run again to download it"
    missing = sorted(set(names) - there)
    if missing:
        raise UserError(
            f"{folder}: {len(missing):,} of {len(names):,} images of the first ten classes are not there ({_some(missing)}). {way_out}"
        )
    others = []

    def prepare(image: Image.Image) -> Image.Image:
        if min(image.size) < FLOWERS_SIDE:
            others.append(f"{Path(image.filename).name} is {image.width}×{image.height}")
        return _square(image, (3, 64, 64))

    pixels = _decode([folder / name for name in names], prepare, (3, 64, 64))
    if others and not unofficial:
        raise UserError(
            f"{folder}: {len(others):,} of {len(names):,} images are not the originals ({_some(sorted(others))}); expected no side under "
            f"{FLOWERS_SIDE} pixels. {way_out}, or pass --unofficial-data to use them as they are"
        )
    return pixels, bool(others)


# ---------------------------------------------------------------------------------------------------- a person's own images


def _folder(name: str) -> Dataset:
    """A folder of class folders of images, as grey 28×28 (folder:) or colour 64×64 (folder_colour:); classes in the order of names.

    Each image is cut to the square in its middle and brought to size bilinearly, with antialiasing; but signs: takes images of 40×40,
    in colour, as they are, and no others. Where there are folders train and test, they are the split. Otherwise a fifth of each class,
    at least one image, is the test set: those whose paths have the smallest SHA-256, so that the split depends on nothing but the
    files' names.
    """
    kind, _, given = name.partition(":")
    folder = Path(os.path.expanduser(given))
    if not given:
        raise UserError(f"{name}: names no folder; expected {kind}:<path>")
    if not folder.is_dir():
        raise UserError(f"{name}: {folder} is {'not a folder' if folder.exists() else 'not there'}; expected a folder of class folders")
    there = [part for part in ("train", "test") if (folder / part).is_dir()]
    if len(there) == 2:
        train, test = _class_files(folder / "train"), _class_files(folder / "test")
        if list(train) != list(test):
            raise UserError(
                f"{folder}: train and test must have the same classes; only one of them has {_some(sorted({*train} ^ {*test}))}"
            )
    elif there and not any(_is_image(path) for path in (folder / there[0]).iterdir()):
        raise UserError(f"{folder}: has {there[0]} but not its counterpart; expected both train and test, or the class folders themselves")
    else:
        train, test = {}, {}
        for label, files in _class_files(folder).items():
            if len(files) < 2:
                raise UserError(f"{folder / label}: holds 1 image, expected at least 2: one to train on and one to test on")
            shuffled = sorted(files, key=lambda path: hashlib.sha256(os.fsencode(path.relative_to(folder))).digest())
            test[label] = sorted(shuffled[: max(1, round(len(files) / 5))])
            train[label] = sorted(set(files) - set(test[label]))
    if kind == "signs" and len(train) < 2:
        raise UserError(f"{folder}: holds one class folder, {_some(train)}; expected at least two: there is nothing to tell apart")
    paths = [path for split in (train, test) for files in split.values() for path in files]
    labels = torch.tensor([i for split in (train, test) for i, files in enumerate(split.values()) for _ in files])
    shape = FOLDER_SHAPES[kind]
    try:
        pixels = _decode(paths, partial(_as_it_is if kind == "signs" else _square, shape=shape), shape)
    except UserError:  # of the first image that will not do; where that is for their sizes, a few of them tell more
        others = _other_sizes(paths, folder, shape) if kind == "signs" else []
        if not others:
            raise
        raise UserError(
            f"{folder}: {', '.join(others[:3])}{' …' if len(others) > 3 else ''}; expected every image to be {shape[2]}×{shape[1]}, "
            f"as signs: takes them as they are. Bring them to that size, or use folder_colour:{given}, which cuts and resizes"
        ) from None
    n, images = sum(map(len, train.values())), torch.from_numpy(pixels)
    digest = _digest([hashlib.sha256(pixels.ravel()).hexdigest(), f"{n}/", *(f"{c}/" for c in train), *map(str, labels.tolist())])
    name = f"{kind}:{Path(os.path.abspath(folder)).name}"  # never the whole path, which would go into results
    return Dataset(name, images[:n], labels[:n], images[n:], labels[n:], tuple(train), digest, official=False)


def _is_image(path: Path) -> bool:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return path.suffix.lower() in IMG_EXTENSIONS and not path.name.startswith(".") and not path.is_dir()


def _class_files(folder: Path) -> dict[str, list[Path]]:
    """Class name -> its images, also those in folders within; both sorted. A link to a folder is followed for a class, never within."""
    classes = {}
    try:
        for place in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
            if folder.resolve().is_relative_to(place.resolve()):
                raise UserError(f"{place}: is a link back to the folder that holds it, expected a class folder")
            found = (Path(inside, file) for inside, _, files in os.walk(place, onerror=_raise) for file in files)
            classes[place.name] = sorted(filter(_is_image, found))
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
    if not classes:
        raise UserError(f"{folder}: holds no class folders; expected a folder of images for each class")
    empty = [label for label, files in classes.items() if not files]
    if empty:
        raise UserError(f"{folder}: no images in the class {_some(empty)}; expected files such as .jpg, .png, .bmp or .webp")
    return classes


def _raise(error: OSError) -> None:
    raise error


def _square(image: Image.Image, shape: tuple[int, int, int]) -> Image.Image:
    """The square in an image's middle, upright, on white where it is transparent, brought to shape (C, H, W)."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"pixels of kind {image.mode}, expected 8 bits per channel")
    image = ImageOps.exif_transpose(image)  # a telephone's pictures lie on their side without it
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.convert("L" if shape[0] == 1 else "RGB").crop((left, top, left + side, top + side))
    return image.resize((shape[2], shape[1]), Image.Resampling.BILINEAR)


def _as_it_is(image: Image.Image, shape: tuple[int, int, int]) -> Image.Image:
    if image.size != (shape[2], shape[1]):
        raise ValueError(f"{image.width}×{image.height} pixels, expected {shape[2]}×{shape[1]}")
    return _square(image, shape)  # which has nothing to cut, and PIL copies where the size stays


def _other_sizes(paths: list[Path], folder: Path, shape: tuple[int, int, int]) -> list[str]:
    """The first four images that are not of shape (C, H, W), in the order of names, each with its size."""
    others: list[str] = []
    for path in sorted(paths):
        with suppress(Exception), Image.open(path, formats=IMAGE_FORMATS) as image:  # what cannot be read is `_decode`'s to name
            if image.size != (shape[2], shape[1]):
                others.append(f"{path.relative_to(folder)} is {image.width}×{image.height}")
        if len(others) == 4:
            break
    return others


# ------------------------------------------------------------------------------------------------ what several of them need


def _decode(paths: list[Path], prepare: Callable[[Image.Image], Image.Image], shape: tuple[int, int, int]) -> np.ndarray:
    """Image files as uint8 (N, C, H, W). prepare: the image as opened -> the image as kept, of shape (C, H, W).

    On all cores: threads will do, since PIL lets go of Python's lock. Raises UserError naming the first file that cannot be used.
    """
    pixels = np.empty((len(paths), *shape), np.uint8)

    def read(i: int) -> None:
        try:
            with Image.open(paths[i], formats=IMAGE_FORMATS) as image:
                prepared = np.asarray(prepare(image))
        except Exception as error:  # on a damaged file PIL raises nearly anything; ValueErrors are also those of `prepare`
            reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())[:150]
            raise UserError(f"{paths[i]}: not a usable image ({reason or type(error).__name__})") from None
        pixels[i] = prepared.reshape(*shape[1:], shape[0]).transpose(2, 0, 1)

    with ThreadPool() as pool:
        done = pool.imap(read, range(len(paths)), chunksize=16)
        for _ in tqdm(done, total=len(paths), unit="image", disable=not sys.stderr.isatty()):
            pass
    return pixels


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time in a folder: of two first runs the second waits, then finds what the first one made."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock", f"{folder}: another process is preparing the data here; waiting for it"):
        yield


def _provide_archive(name: str, root: Path, cls: type, files: list[str]) -> Path:
    """The folder of a set that torchvision's class `cls` has as one .tar.gz. What is missing of `files` is unpacked, and nothing else.

    The archive may lie in the folder or, where torchvision puts it, beside it; otherwise it is downloaded.
    """
    folder = root / cls.base_folder

    def fetch(part: Path, missing: list[str]) -> Iterator[str]:
        archive = _archive(part, (folder, root), cls.url, cls.filename, cls.tgz_md5)
        wanted = {Path(cls.base_folder, file): part / cls.base_folder / file for file in missing}
        for path in _unpack(archive, wanted.get):
            del wanted[path]
            if not wanted:
                break
        if wanted:
            raise RuntimeError(f"{cls.filename} does not hold {_some(map(str, wanted))}")
        yield from missing

    _provide(name, root, cls.base_folder, files, fetch, cls.filename)
    return folder


def _archive(part: Path, places: Iterable[Path], url: str, file: str, md5: str) -> Path:
    """The official archive `file`: one that a person put in one of the places or, where there is none, downloaded into `part`."""
    from torchvision.datasets.utils import check_integrity, download_url

    archive = next((place / file for place in places if (place / file).is_file()), None)
    if archive is None:
        archive = part / file
        download_url(url, part, file, md5)
    elif not check_integrity(archive, md5):
        raise RuntimeError(f"the {file} there is not the official one: its MD5 is not {md5[:12]}…")
    return archive


def _unpack(archive: Path, target: Callable[[Path], Path | None]) -> Iterator[Path]:
    """Unpack a .tar.gz's files one by one, each to where `target` says for the path that it names, and yield that path.

    target: None for a file to leave out. None is ever extracted by the path that it names: that may lead anywhere.
    """
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            to = target(Path(member.name)) if member.isreg() else None
            if to:
                with tar.extractfile(member) as source, open(to, "wb") as out:
                    shutil.copyfileobj(source, out)
                yield Path(member.name)


def _provide(
    name: str, root: Path, inside: str, files: list[str], fetch: Callable[[Path, list[str]], Iterable[str]], archive: str | None = None
) -> None:
    """Download those of `files` that are not in root/inside, into a folder beside, then move them: a kill leaves nothing half-written.

    fetch(part, missing): puts the missing files in part/inside and yields each one's name once it is whole.  archive: one that will do
    instead of the files, or of the last of them.
    """
    folder = root / inside

    def missing() -> list[str]:
        return [file for file in files if not (folder / file).exists()]

    if not missing():
        return
    way_out = (
        f"Put {', '.join(files)}{f' (or {archive})' if archive else ''} in {folder}, "
        f"or name the folder that holds {inside} with --data (DATA= for make). "
        "The digits experiment needs no data"
    )
    timeout = socket.getdefaulttimeout()
    try:
        with _locked(folder):
            if not missing():
                return
            for left in folder.glob(".download-*"):  # of a process that was killed
                shutil.rmtree(left)
            print(f"{name} is not in {folder}: downloading it", flush=True)
            socket.setdefaulttimeout(30)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as part:
                Path(part, inside).mkdir(parents=True)
                for file in fetch(Path(part), missing()):
                    os.replace(Path(part, inside, file), folder / file)
    except Exception as error:  # OSError (urllib's and requests' are), RuntimeError (torchvision's), zipfile's, gdown's own
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise UserError(f"{root}: the disk is full: {name} could not be downloaded there") from None
        reason = " ".join(str(error).split()).rsplit("got: ", 1)[-1][:150]  # torchvision lists each mirror's; the last will do
        raise UserError(f"{name}: no data in {folder}, and it could not be downloaded ({reason}). {way_out}") from None
    finally:
        socket.setdefaulttimeout(timeout)
