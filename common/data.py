"""Data sets as tensors in memory: download, verify, read, and draw the labelled part.

The data folder has torchvision's layout. Where torchvision has the data set, it downloads, verifies and reads it.
Every file that is read has an official checksum, except the images of CelebA and of the flowers.
"""

import hashlib
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from common.run import UserError, generator, locked

SHA256 = {  # of the uncompressed idx files; torchvision knows the MD5s of their .gz
    "mnist": {"train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
              "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
              "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
              "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"},
    "fashion_mnist": {"train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
                      "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
                      "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
                      "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"},
}  # fmt: skip
OFFICIAL_COUNTS: dict[str, tuple[int, int]] = {  # (train, test) images
    "digits": (1437, 360), "mnist": (60_000, 10_000), "fashion_mnist": (60_000, 10_000), "flowers10": (100, 322),
    "svhn": (73_257, 26_032), "svhn_extra": (604_388, 26_032), "celeba": (182_637, 19_962), "stl10": (5_000, 8_000),
    "celeba_train": (162_770, 19_962), "cifar10": (50_000, 10_000), "flowers10_all": (522, 322)}  # fmt: skip
DIGITS_DIGEST = "55c087b603d0064f"  # of scikit-learn's digits, for which nobody publishes a checksum
STL10_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
CELEBA_CLASSES = ("not male, not smiling", "not male, smiling", "male, not smiling", "male, smiling")
FOLDER_SHAPES = {"folder": (1, 28, 28), "folder_colour": (3, 64, 64), "signs": (3, 40, 40)}  # signs: not resized
HIDDEN = (".", "@eaDir", "__MACOSX")  # names of what notebooks, file servers and archives add begin so


@dataclass(frozen=True)
class Dataset:
    """One data set in memory.

    images: uint8 (N, C, H, W), 0 … 255.  labels: int64 (N,), 0 … n_classes - 1.
    digest: 16 hex digits over everything read.  official: whether every file that has an official checksum had it.
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
        """The facts about the data that a result records."""
        counts = {"train_images": len(self.train_images), "test_images": len(self.test_images)}
        return {"data": self.name, "data_digest": self.digest, "data_official": self.official, **counts}


def load(name: str, root: str | Path, unofficial: bool = False) -> Dataset:
    """Load data set `name` from the folder `root`. Missing files are downloaded.

    name: a key of OFFICIAL_COUNTS, or folder:<path>, folder_colour:<path> or signs:<path>, which do not use `root`.
    unofficial: also accept another version of the digits, MNIST, Fashion-MNIST, CelebA or the flowers; results say so.
    Raises UserError if the data are missing, altered or unreadable.
    """
    kind, root = name.partition(":")[0], Path(os.path.expanduser(root))
    readers = {"digits": _digits, "celeba": _celeba, "flowers10": _flowers, **dict.fromkeys(FOLDER_SHAPES, _folder)}
    reader = readers.get(kind) or readers.get(kind.partition("_")[0], _torchvision)
    if name not in OFFICIAL_COUNTS and kind not in FOLDER_SHAPES:
        known = f"{', '.join(OFFICIAL_COUNTS)}, {':<path>, '.join(FOLDER_SHAPES)}:<path>"
        raise UserError(f"unknown data set {name!r}; known: {known}")
    try:
        return reader(name, root, unofficial)
    except (AssertionError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:  # of the libraries
        what = getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{name}: {getattr(error, 'filename', None) or root} cannot be read ({what})") from error


def described(name: str, sets: dict[str, tuple[tuple[int, ...], int | None]]) -> tuple[tuple[int, ...], int | None]:
    """A data set's image shape and number of classes (None: read from its folder). ValueError if `sets` lacks it."""
    kind, _, path = name.partition(":")
    if kind not in sets or (path != "") != (sets[kind][1] is None):
        names = ", ".join(f"{known}:<path>" if n is None else known for known, (_, n) in sets.items())
        raise ValueError(f"--dataset: {name!r} is not one of {names}")
    return sets[kind]


def draw_labels(labels: Tensor, n: int, how: str, classes: Sequence[str], seed: int) -> tuple[Tensor, dict[str, str]]:
    """Indices (n,), ascending, of the training images whose labels are known, and the draw's mistakes for `refuse`.

    labels: (N,).  how: 'random' (uniform, without replacement), 'stratified' (n / n_classes of each class; the
    remainder goes to classes drawn at random) or 'first' (the first n in file order).  classes: their names.
    """
    k, wrong = len(classes), {}
    shuffled = torch.randperm(len(labels), generator=generator(seed, "labels"))
    chosen = torch.arange(len(labels))[:n] if how == "first" else shuffled[:n]
    if how == "stratified":
        quota = torch.full((k,), n // k)
        quota[torch.randperm(k, generator=generator(seed, "remainder"))[: n % k]] += 1
        chosen = torch.cat([shuffled[labels[shuffled] == c][: quota[c]] for c in range(k)])
    fitting = k * int(labels.bincount(minlength=k).min())  # the largest stratified draw
    fits = f"--n-labels {max(k, min(n, fitting))} --labels stratified" if fitting else ""
    if len(chosen) < n:
        found = f"the training set has {len(labels)} images, and the {how} draw finds {len(chosen)}"
        wrong[f"--n-labels: {n} labels asked for, but {found}"] = fits
    elif missing := ", ".join(name for c, name in enumerate(classes) if c not in labels[chosen]):
        draw = f"--labels: the {how} draw of {n} labels (seed {seed})"
        wrong[f"{draw} has none of class {missing}; its prior would be 0"] = fits
    return chosen.sort().values, wrong


def _digits(name: str, root: Path, unofficial: bool) -> Dataset:
    """scikit-learn's 1,797 digits, 8×8, resized to 28×28 bilinearly: 1,437 train, 360 test, stratified."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw, labels = load_digits(return_X_y=True)
    train, test = train_test_split(np.arange(len(labels)), test_size=360, random_state=0, stratify=labels)
    # The digest is over the raw integers and the split. Bilinear rounding may differ between machines; these may not.
    digest = _digest(array[part].astype(np.uint8) for part in (train, test) for array in (raw, labels))
    if digest != DIGITS_DIGEST and not unofficial:
        raise UserError("digits: not as in our results. Use constraints.txt's scikit-learn, or pass --unofficial-data")
    images = torch.from_numpy(raw).float().view(-1, 1, 8, 8) * (255 / 16)
    images = torch.nn.functional.interpolate(images, size=28, mode="bilinear").round().to(torch.uint8)
    labels = torch.from_numpy(labels).long()
    split = (images[train], labels[train], images[test], labels[test])
    return Dataset(name, *split, tuple("0123456789"), digest, digest == DIGITS_DIGEST)


def _torchvision(name: str, root: Path, unofficial: bool) -> Dataset:
    """MNIST, Fashion-MNIST, SVHN, CIFAR-10 or STL-10. For the last three, torchvision accepts only official files."""
    import torchvision.datasets as sets

    known = {"mnist": sets.MNIST, "fashion_mnist": sets.FashionMNIST, "cifar10": sets.CIFAR10, "stl10": sets.STL10}
    cls, idx, cifar, place = known.get(name, sets.SVHN), name in SHA256, name == "cifar10", ""
    splits = (True, False) if idx or cifar else ("train", "extra", "test") if "extra" in name else ("train", "test")
    if idx:
        files, archives, inside = SHA256[name], dict(cls.resources), f"{cls.__name__}/raw"
        cls = type(cls.__name__, (cls,), {"_check_legacy_exist": lambda self: False})  # it would read other files
    elif cls is sets.SVHN:
        files, archives, inside, place = dict(cls.split_list[split][1:] for split in splits), {}, "SVHN", "SVHN"
    else:  # without STL-10's 2.7 GB of unlabelled images
        cls = type(cls.__name__, (cls,), {"train_list": [x for x in cls.train_list if x[0] != "unlabeled_X.bin"]})
        files, archives, inside = dict([*cls.train_list, *cls.test_list]), {cls.filename: cls.tgz_md5}, cls.base_folder
        files |= {cls.meta["filename"]: cls.meta["md5"]} if cifar else {}
    folder = _provide(
        name, root, inside, files, archives or files, lambda part: [cls(part / place, s, download=True) for s in splits]
    )
    found = _check(folder, files, unofficial if idx else None)  # torchvision would not name the file that is wrong
    parts = [cls(root / place, split) for split in splits]
    images = [p.data[:, None] if idx else p.data.transpose(0, 3, 1, 2) if cifar else p.data for p in parts]
    images = list(map(torch.as_tensor, images))
    labels = [torch.as_tensor(p.targets if idx or cifar else p.labels).long() for p in parts]
    if idx and any(x.shape != (len(y), 1, 28, 28) or y.max() > 9 for x, y in zip(images, labels, strict=True)):
        raise UserError(f"{folder}: expected images of 28×28, and as many labels, 0 … 9")
    names = STL10_CLASSES if name == "stl10" else parts[0].classes if cifar or "fashion" in name else "0123456789"
    also = STL10_CLASSES if name == "stl10" else ()
    split = (torch.cat(images[:-1]), torch.cat(labels[:-1]), images[-1].contiguous(), labels[-1])  # the last is test
    return Dataset(name, *split, tuple(names), _digest([*found, *also]), found == [*files.values()])


def _flowers(name: str, root: Path, unofficial: bool) -> Dataset:
    """The first ten classes of Oxford-102, resized as folder_colour: does. flowers10_all trains on the test set too."""
    from torchvision.datasets import Flowers102

    md5, files = dict(Flowers102._file_dict.values()), ("imagelabels.mat", "setid.mat")
    folder = _provide(name, root, "flowers-102", (*files, "jpg"), md5, lambda part: Flowers102(part, download=True))
    found = _check(folder, {file: md5[file] for file in files})
    wanted = ("train", "test") if name == "flowers10" else ("train", "val", "test")
    splits = [[flower for flower in Flowers102(root, split, loader=Path) if flower[1] < 10] for split in wanted]
    paths, labels = zip(*(flower for split in splits for flower in split), strict=True)
    images, labels, n_test = _decode(folder / "jpg", paths, (3, 64, 64)), torch.tensor(labels), len(splits[-1])
    official = all(min(Image.open(path).size) >= 500 for path in paths)  # no side of an original is shorter
    if not official and not unofficial:
        way_out = "Unpack 102flowers.tgz again, or pass --unofficial-data to use these"
        raise UserError(f"{folder}: not the original images (a side is under 500 pixels). {way_out}")
    n_train = len(images) - (n_test if name == "flowers10" else 0)
    split = (images[:n_train], labels[:n_train], images[-n_test:], labels[-n_test:])
    return Dataset(name, *split, tuple(Flowers102.classes[:10]), _digest([*found, images]), official)


def _celeba(name: str, root: Path, unofficial: bool) -> Dataset:
    """CelebA at 64×64. celeba trains on train and valid (the paper's count), celeba_train on train (its code)."""
    from torchvision.datasets import CelebA

    md5, jpgs = {file: checksum for _, checksum, file in CelebA.file_list}, "img_align_celeba"
    texts = {file: md5[file] for file in ("list_attr_celeba.txt", "list_eval_partition.txt")}
    folder = _provide(name, root, "celeba", (*texts, jpgs), md5, lambda part: CelebA(part, download=True))
    found = _check(folder, texts, unofficial)
    attributes, partition = (folder / text for text in texts)
    columns = attributes.read_text(encoding="utf-8-sig").splitlines()[1].split()  # line 0 is a count
    used = (0, columns.index("Male") + 1, columns.index("Smiling") + 1)
    rows = np.loadtxt(attributes, str, skiprows=2, usecols=used, encoding="utf-8-sig", ndmin=2)
    classes = dict(zip(rows[:, 0], 2 * (rows[:, 1] == "1") + (rows[:, 2] == "1"), strict=True))
    parts = np.loadtxt(partition, str, encoding="utf-8-sig", ndmin=2)
    names = [image for part in "012" for image, of in parts if of == part]  # train, valid, test, in file order
    n_train, n_valid, n_test = (sum(parts[:, 1] == part) for part in "012")
    if not n_train or not n_test or not classes.keys() >= {*names}:
        raise UserError(f"{partition}: expected training and test images (0 and 2), all of them in {attributes.name}")
    labels, end = torch.tensor([classes[n] for n in names]), n_train + (n_valid if name == "celeba" else 0)
    folder = folder / jpgs / jpgs if (folder / jpgs / jpgs).is_dir() else folder / jpgs  # as some programs unpack it
    pixels = _decode(folder, [folder / image for image in names], (3, 64, 64), size=(178, 218), side=140)
    split = (pixels[:end], labels[:end], pixels[-n_test:], labels[-n_test:])
    return Dataset(name, *split, CELEBA_CLASSES, _digest([*found, pixels]), found == [*texts.values()])


def _folder(name: str, root: Path, unofficial: bool) -> Dataset:
    """Class folders of images. Without train/ and test/, the fifth of each class with the smallest SHA-256s tests."""
    kind, _, given = name.partition(":")
    folder, shape = Path(os.path.abspath(os.path.expanduser(given))), FOLDER_SHAPES[kind]
    if not given or not folder.is_dir():
        raise UserError(f"{name}: {given or 'nothing'} is not a folder; expected {kind}:<a folder of class folders>")
    parts = {p.name.lower(): p for p in folder.iterdir() if p.name.lower() in ("train", "test") and p.is_dir()}
    if len(parts) == 2:
        train, test = _classes(parts["train"], 1), _classes(parts["test"], 1)
        if [*train] != [*test]:
            raise UserError(f"{folder}: only one of train and test has {', '.join(sorted({*train} ^ {*test})[:3])}")
    elif any(p.is_dir() and not p.name.startswith(HIDDEN) for part in parts.values() for p in part.iterdir()):
        raise UserError(f"{folder}: has only one of train and test; expected both, or neither")
    else:
        train, test = _classes(folder, 2), {}
        for label, files in train.items():
            shuffled = sorted(files, key=lambda path: hashlib.sha256(os.fsencode(path.relative_to(folder))).digest())
            test[label] = sorted(shuffled[: max(1, round(len(files) / 5))])
            train[label] = sorted({*files} - {*test[label]})
    paths = [path for split in (train, test) for files in split.values() for path in files]
    labels = torch.tensor([i for split in (train, test) for i, files in enumerate(split.values()) for _ in files])
    images, n = _decode(folder, paths, shape, (40, 40) if kind == "signs" else None), sum(map(len, train.values()))
    digest = _digest([images, f"{n}/", *(f"{c}/" for c in train), *map(str, labels.tolist())])
    name = f"{kind}:{folder.name}".encode(errors="backslashreplace").decode()  # not the whole path: results show it
    print(f"{name}: {n:,} + {len(labels) - n:,} images of {len(train)} classes: {', '.join(train)[:200]}")
    return Dataset(name, images[:n], labels[:n], images[n:], labels[n:], tuple(train), digest, official=False)


def _classes(folder: Path, least: int) -> dict[str, list[Path]]:
    """{class: its images, at any depth}, both sorted. Skips hidden files and folders."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    classes, endings = {}, (*IMG_EXTENSIONS, ".gif", ".heic", ".heif", ".avif", ".jfif")  # PIL may refuse some
    for place in sorted(place for place in folder.iterdir() if place.is_dir() and not place.name.startswith(HIDDEN)):
        found = (path for path in place.rglob("*") if path.suffix.lower() in endings and not path.is_dir())
        shown = (path for path in found if not any(p.startswith(HIDDEN) for p in path.relative_to(place).parts))
        classes[place.name.encode(errors="backslashreplace").decode()] = sorted(shown)  # a name need not be UTF-8
    if few := ", ".join(label for label, files in classes.items() if len(files) < least) or ("" if classes else "none"):
        raise UserError(f"{folder}: expected class folders of {least} or more .jpg, .png …; too few: {few}")
    return classes


def _decode(folder: Path, paths: list[Path], shape: tuple, size: tuple | None = None, side: int = 0) -> Tensor:
    """Images as uint8 (N, C, H, W): the central square of `side` pixels (0: the largest), resized to `shape`.

    size: (width, height) that every image must have; None for any."""
    pixels, n = torch.empty(len(paths), *shape, dtype=torch.uint8), len(paths)

    def read(i: int) -> str | None:
        try:
            with Image.open(paths[i]) as image:
                if image.size != (size or image.size) or image.mode[0] in "IF":  # I and F: more than 8 bits
                    raise ValueError(f"{image.mode}, {image.size} pixels; expected 8 bits and {size or 'any'} pixels")
                image = ImageOps.exif_transpose(image)  # phones store pictures unrotated
                if image.has_transparency_data:
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
                length = side or min(image.size)
                left, top = ((whole - length) // 2 for whole in image.size)
                image = image.convert("L" if shape[0] == 1 else "RGB").crop((left, top, left + length, top + length))
                array = np.array(image.resize(shape[:0:-1], Image.Resampling.BILINEAR))
                pixels[i] = torch.from_numpy(array).view(*shape[1:], shape[0]).permute(2, 0, 1)
        except Exception as error:  # for a damaged file PIL can raise nearly anything
            reason = getattr(error, "strerror", None) or str(error).partition(" '")[0] or type(error).__name__
            return f"{paths[i].relative_to(folder)} ({reason})"

    with ThreadPool() as pool:  # threads suffice: PIL releases Python's lock
        failed = [*filter(None, tqdm(pool.imap(read, range(n), 16), total=n, unit="image", disable=None))]
    if failed:
        told = ", ".join(failed[:10]) + f" and {len(failed) - 10:,} more" * (len(failed) > 10)
        raise UserError(f"{folder}: {len(failed):,} of {n:,} images cannot be used: {told}. Replace or remove them")
    return pixels


def _provide(name: str, root: Path, inside: str, files: Iterable[str], md5: dict[str, str], download: Callable) -> Path:
    """The folder root/inside, complete. download(another root) fetches missing files.

    md5: {file: checksum} of archives and files that may already lie in `root` or in the folder; they are used."""
    folder, missing = root / inside, [file for file in files if not (root / inside / file).exists()]
    if not missing:
        return folder
    base = next(place for place in (folder, *folder.parents) if place.is_dir())  # so a failure leaves no new folders
    try:
        with locked(base / ".lock", f"{folder}: waiting for another download"), TemporaryDirectory(dir=base) as part:
            if all((folder / file).exists() for file in missing):  # another process has downloaded them
                return folder
            Path(part, inside).mkdir(parents=True)
            for file, place in [(f, place) for f in md5 for place in (root, folder) if (place / f).is_file()]:
                _check(place, {file: md5[file]})
                for link in (Path(part, file), Path(part, inside, file)):  # torchvision looks in one or the other
                    link.symlink_to((place / file).resolve())
            print(f"{name}: downloading {', '.join(missing)} to {folder}", flush=True)
            socket.setdefaulttimeout(30)
            download(Path(part))
            folder.mkdir(parents=True, exist_ok=True)
            for file in (file for file in missing if not (folder / file).exists()):
                os.replace(Path(part, inside, file), folder / file)
    except Exception as error:  # of urllib, torchvision or gdown
        reason = " ".join(str(error).split()).rsplit("got: ", 1)[-1]  # of all mirrors, the last
        where = f"Put these there, or name the folder that holds {inside} with --data (DATA= for make)"
        what = f"{name}: no data in {folder}, for it lacks {', '.join(missing)}; the download failed ({reason})"
        raise UserError(f"{what}. {where}. `make <paper>-digits` needs no data") from None
    finally:
        (base / ".lock").unlink(missing_ok=True)
    return folder


def _check(folder: Path, checksums: dict[str, str], unofficial: bool | None = None) -> list[str]:
    """The files' checksums. Raises UserError if one is not official. unofficial: accept it; None: no flag can."""
    found = []
    for file, expected in checksums.items():
        with open(folder / file, "rb") as content:
            found.append(hashlib.file_digest(content, "sha256" if len(expected) == 64 else "md5").hexdigest())
        if found[-1] != expected and not unofficial:
            way_out = "Delete it to download it again" + ("" if unofficial is None else ", or pass --unofficial-data")
            raise UserError(f"{folder / file}: refused: its checksum {found[-1][:8]}… is not official. {way_out}")
    return found


def _digest(parts: Iterable[str | Tensor | np.ndarray]) -> str:  # of texts, and of the SHA-256 of arrays
    texts = (part if isinstance(part, str) else hashlib.sha256(np.asarray(part)).hexdigest() for part in parts)
    return hashlib.sha256("".join(texts).encode()).hexdigest()[:16]
