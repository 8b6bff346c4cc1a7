"""Data sets as tensors in memory: load, verify, and draw the labelled part.

Downloading and reading is torchvision's; verifying is ours: every file is checked against its official digest on every start.
"""

import errno
import fcntl
import hashlib
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.run import UserError, generator

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
NAMES = ("digits", *SHA256)
FOLDER = {"mnist": "MNIST/raw", "fashion_mnist": "FashionMNIST/raw"}


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

    unofficial: read files whose digest is not the official one all the same; the result says so.
    Raises UserError where the data are missing, truncated, altered or unreadable.
    """
    if name == "digits":
        return _digits(unofficial)
    if name in SHA256:
        return _idx(name, Path(root), unofficial)
    raise UserError(f"unknown data set {name!r}; known: {', '.join(NAMES)}")


def official_digest(name: str) -> str:
    """The digest that `load` finds on the official data."""
    return DIGITS_DIGEST if name == "digits" else _digest(SHA256[name].values())


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


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
    if any(not (folder / file).exists() for file in SHA256[name]):
        _download(name, root)
    parts, found_digests, official = {}, [], True
    for file, expected in SHA256[name].items():
        path = folder / file
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        found = hashlib.sha256(content).hexdigest()
        found_digests.append(found)
        if found != expected:
            official = False
            if not unofficial:
                raise UserError(
                    f"{path}: not the official file (SHA-256 {found[:12]}…, {len(content):,} bytes; expected {expected[:12]}…): "
                    "truncated or altered. Delete it and run again to download it, or pass --unofficial-data to use it as it is"
                )
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
    classes = (sets.MNIST if name == "mnist" else sets.FashionMNIST).classes
    split = []
    for prefix in ("train", "t10k"):
        images, labels = parts[f"{prefix}-images-idx3-ubyte"].unsqueeze(1), parts[f"{prefix}-labels-idx1-ubyte"]
        if len(images) != len(labels):
            raise UserError(f"{folder}: {len(images):,} {prefix} images but {len(labels):,} labels")
        if images.shape[1:] != (1, 28, 28):
            raise UserError(f"{folder}: {prefix} images are {images.shape[2]}×{images.shape[3]}, expected 28×28")
        if labels.max() >= len(classes):
            raise UserError(f"{folder}: a {prefix} label is {labels.max()}, expected 0 … {len(classes) - 1}")
        split += [images, labels]
    class_names = tuple(c.split(" - ")[0] for c in classes)
    return Dataset(name, *split, class_names, _digest(found_digests), official)


def _download(name: str, root: Path) -> None:
    """Download by torchvision into a folder beside the final one, then move the files: a kill leaves nothing half-written."""
    import torchvision.datasets as sets

    folder = root / FOLDER[name]
    cls = {"mnist": sets.MNIST, "fashion_mnist": sets.FashionMNIST}[name]
    way_out = (
        f"Put {', '.join(SHA256[name])} in {folder}, or name the folder that holds {FOLDER[name]} with --data (DATA= for make). "
        "The digits experiment needs no data"
    )
    timeout = socket.getdefaulttimeout()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two first runs at once: the second waits, then finds the files
            if all((folder / file).exists() for file in SHA256[name]):
                return
            print(f"{name} is not in {folder}: downloading it", flush=True)
            socket.setdefaulttimeout(30)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as part:
                for archive in folder.glob("*.gz"):  # a person may have brought the archives alone: torchvision checks their MD5
                    target = Path(part, FOLDER[name])
                    target.mkdir(parents=True, exist_ok=True)
                    shutil.copy(archive, target)
                cls(part, download=True)
                for file in SHA256[name]:
                    if not (folder / file).exists():
                        os.replace(Path(part, FOLDER[name], file), folder / file)
    except (OSError, RuntimeError) as error:  # urllib's URLError is an OSError
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise UserError(f"{root}: the disk is full: {name} could not be downloaded there") from None
        reason = " ".join(str(error).split()).rsplit("got: ", 1)[-1][:150]  # torchvision lists each mirror's; the last will do
        raise UserError(f"{name}: no data in {folder}, and it could not be downloaded ({reason}). {way_out}") from None
    finally:
        socket.setdefaulttimeout(timeout)
