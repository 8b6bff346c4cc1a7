"""A small convolutional network trained on a data set's own training labels, for features and for a verdict on generated images.

Its features give a Fréchet distance without a download, and its verdict says which class an image is of. Both rank systems that were
judged by the same network; neither is comparable with a published number. `train` alone classifies any labelled images, generated
ones too.
"""

import hashlib
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.data import Dataset
from common.metrics import error_rate
from common.run import UserError, generator, load_checkpoint, locked, save_checkpoint, session

FEATURES = 128
RECIPE = "2"  # names the cached files: raise it when the network or its training changes, so that they are trained anew
SEED = 0  # one network per data set judges all runs, whatever their seeds
BATCH = 128
EPOCHS = 10
LEAST_STEPS, MOST_STEPS = 1000, 5000  # digits' 11 batches would not do in 10 epochs; CelebA's 1,400 need not be seen 10 times


class Network(nn.Module):
    """Strided convolutions down to at most 8×8, a dense layer of 128 whose ReLU gives the features, logits.

    Strides in place of max pooling cost half a percent of Fashion-MNIST and save a CPU two thirds of the time.
    """

    def __init__(self, image_shape: tuple[int, int, int], n_classes: int):
        super().__init__()
        channels, height, width = image_shape
        layers: list[nn.Module] = []
        while max(height, width) > 8:
            out, kernel = (min(2 * channels, 128), 3) if layers else (32, 5)
            layers += [nn.Conv2d(channels, out, kernel, stride=2, padding=kernel // 2), nn.ReLU()]
            channels, height, width = out, (height + 1) // 2, (width + 1) // 2
        layers += [nn.Flatten(), nn.Linear(channels * height * width, FEATURES), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(FEATURES, n_classes))

    def features(self, x: Tensor) -> Tensor:
        """The penultimate layer (B, 128), ≥ 0, of x (B, C, H, W) in [0, 1]."""
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, n_classes) of x (B, C, H, W) in [0, 1]."""
        return self.head(self.features(x))


def network(image_shape: tuple[int, int, int], n_classes: int) -> Network:
    """An untrained network for images of image_shape (C, H, W), of any size; its weights come from torch's global generator."""
    return Network(image_shape, n_classes).to(memory_format=torch.channels_last)  # twice as fast on a CPU


def steps_for(n_images: int) -> int:
    """How many batches `train` takes of so many images: 10 epochs, but neither too few nor too many."""
    return min(max(EPOCHS * n_images // BATCH, LEAST_STEPS), MOST_STEPS)


def train(images: Tensor, labels: Tensor, n_classes: int, seed: int, device: torch.device | str, steps: int | None = None) -> Network:
    """A network trained on uint8 images (N, C, H, W) and int64 labels (N,), 0 … n_classes - 1; frozen, in eval mode, on `device`.

    steps: batches of 128, in a new order each epoch (all N in each where N < 128); by default `steps_for(N)`.
    Adam, the rate falling from 0.002 to 0 by a cosine; fp32. Leaves torch's global generators as they were.
    The same seed gives the same bits on the same machine, torch build and thread count (on a GPU: with --deterministic); another
    thread count or device gives another network, as good. Raises UserError where there are no images, or not as many labels.
    """
    if len(images) == 0 or len(images) != len(labels):
        raise UserError(f"cannot train a classifier on {len(images):,} images with {len(labels):,} labels")
    device = torch.device(device)
    steps = steps_for(len(images)) if steps is None else steps
    per_epoch = max(len(images) // BATCH, 1)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # of the weights, and of dropout
        trained = network(tuple(images.shape[1:]), n_classes).to(device)
        optimizer = torch.optim.Adam(trained.parameters(), lr=2e-3, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        images, labels = images.to(device), labels.to(device)
        for step in tqdm(range(steps), disable=not sys.stderr.isatty(), leave=False, unit="step"):
            epoch, position = divmod(step, per_epoch)
            if position == 0:
                order = torch.randperm(len(images), generator=generator(seed, "classifier order", epoch)).to(device)
            chosen = order[position * BATCH : (position + 1) * BATCH]
            loss = nn.functional.cross_entropy(trained(_as_input(images[chosen])), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return trained.eval().requires_grad_(False)


def trained(data: Dataset, cache: Path, device: torch.device | str) -> tuple[Network, float]:
    """The data set's own classifier, frozen and in eval mode on `device`, and its accuracy on the test images in percent.

    Trained once and kept in folder `cache`. A damaged file is trained anew, aloud; of two processes at once the second waits and
    finds the first one's. A file made on another device or with other threads serves all the same: one judge for all runs.
    """
    device = torch.device(device)
    path = cache_path(data, cache)
    cache.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f".{path.stem}.lock"), f"waiting for another process, which trains the classifier for {data.name}"):
        state = _cached(path)
        if state is None:
            for part in cache.glob(f".{path.name}.*.part"):  # of a process that was killed while it wrote
                part.unlink()
            print(f"training the classifier for {data.name}, once: {steps_for(len(data.train_images)):,} steps", flush=True)
            made = train(data.train_images, data.train_labels, data.n_classes, SEED, device)
            accuracy = 100 - error_rate(classify(made, data.test_images), data.test_labels)
            state = {"network": made.state_dict(), "accuracy": accuracy, **data.provenance(), "session": session(device)}
            save_checkpoint(path, state)
            print(f"the classifier for {data.name} is right on {accuracy:.2f} % of the test images; kept in {path}", flush=True)
    found = network(tuple(data.train_images.shape[1:]), data.n_classes)
    found.load_state_dict(state["network"])
    return found.to(device).eval().requires_grad_(False), state["accuracy"]


def cache_path(data: Dataset, cache: Path) -> Path:
    """Where `trained` keeps the network of a data set: the name says which data, in what shape, and which recipe."""
    name = re.sub(r"[^\w.-]+", "-", data.name, flags=re.ASCII)[-60:].strip("-")  # a person's own may hold colons and slashes
    # One digest, over files, may stand for several shapes or labellings of them.
    shape = "x".join(map(str, data.train_images.shape[1:]))
    return cache / f"classifier-{name}-{data.digest}-{shape}-{data.n_classes}-recipe{RECIPE}.pt"


def _cached(path: Path) -> dict | None:
    """What the file holds, or None where there is none, or a damaged one: which is removed, aloud. Raises UserError for a folder."""
    try:
        return load_checkpoint(path)
    except UserError as error:
        if path.is_dir():
            raise
        print(f"{str(error).split('. Nothing to resume')[0]}: the classifier is trained anew", file=sys.stderr, flush=True)
        path.unlink(missing_ok=True)
        return None


def digest(network: Network) -> str:
    """12 hex digits over the weights: which network judged."""
    return hashlib.sha256(b"".join(p.detach().cpu().numpy().tobytes() for p in network.parameters())).hexdigest()[:12]


def features(network: Network, images: Tensor, batch: int = 500) -> Tensor:
    """Features (N, 128), float64 on the CPU, of uint8 images (N, C, H, W), on the network's device in batches."""
    return _in_batches(network.features, network, images, batch).double()


def classify(network: Network, images: Tensor, batch: int = 500) -> Tensor:
    """The most probable class (N,), int64 on the CPU, of uint8 images (N, C, H, W)."""
    return _in_batches(lambda x: network(x).argmax(1), network, images, batch)


@torch.no_grad()
def _in_batches(function: Callable[[Tensor], Tensor], network: Network, images: Tensor, batch: int) -> Tensor:
    device = next(network.parameters()).device
    return torch.cat([function(_as_input(part.to(device))).cpu() for part in images.split(batch)])


def _as_input(images: Tensor) -> Tensor:
    return images.float().div_(255).contiguous(memory_format=torch.channels_last)
