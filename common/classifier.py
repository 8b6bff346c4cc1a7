"""A small classifier trained on labelled images. Its features give scores, and it judges generated images.

One paper defines scores and a clustering by such a network. Its scores can be compared with each other, not with
published ones.
"""

import hashlib
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.data import Dataset
from common.metrics import error_rate
from common.run import SILENT, UserError, generator, load_checkpoint, locked, save_checkpoint

RECIPE = "3"  # part of the cached file's name: raise it when the network or its training changes
FEATURES = 128
BATCH = 128
EPOCHS = 10
LEAST_STEPS, MOST_STEPS = 1000, 5000  # 10 epochs are 110 steps on the digits, 7,800 on 100,000 images


class Network(nn.Module):
    """Strided convolutions down to at most 8×8, a dense layer of 128 with ReLU (the features), a layer of logits.

    Strides instead of max pooling lose half a percent on Fashion-MNIST and save two thirds of the time on a CPU.
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
        self.to(memory_format=torch.channels_last)  # twice as fast on a CPU

    def features(self, images: Tensor) -> Tensor:
        """The penultimate layer (B, 128), ≥ 0, of uint8 images (B, C, H, W)."""
        return self.body(images.float().div_(255).contiguous(memory_format=torch.channels_last))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, n_classes) of uint8 images (B, C, H, W)."""
        return self.head(self.features(images))


def train(images: Tensor, labels: Tensor, n_classes: int, seed: int, device: torch.device | str) -> Network:
    """Train a network on uint8 images (N, C, H, W) and int64 labels (N,). Returns it frozen, on `device`.

    Adam, rate 0.002 with cosine decay to 0; fp32; 10 epochs, but at least 1,000 and at most 5,000 steps. Leaves
    torch's global random state as it was.
    """
    if len(images) == 0 or len(images) != len(labels):
        raise UserError(f"cannot train a classifier on {len(images):,} images with {len(labels):,} labels")
    device, per_epoch = torch.device(device), max(len(images) // BATCH, 1)
    steps = min(max(EPOCHS * len(images) // BATCH, LEAST_STEPS), MOST_STEPS)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)  # for the initial weights and dropout
        network = Network(tuple(images.shape[1:]), n_classes).to(device)
        optimizer = torch.optim.Adam(network.parameters(), lr=2e-3, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        images, labels = images.to(device), labels.to(device)
        bar, said = tqdm(range(steps), disable=None, leave=False, unit="step"), time.monotonic()
        for step in bar:
            if bar.disable and time.monotonic() - said > SILENT:  # no terminal, so no bar
                print(f"training a classifier: step {step:,} of {steps:,}", flush=True)
                said = time.monotonic()
            epoch, position = divmod(step, per_epoch)
            if position == 0:
                order = torch.randperm(len(images), generator=generator(seed, "classifier order", epoch)).to(device)
            chosen = order[position * BATCH : (position + 1) * BATCH]
            loss = nn.functional.cross_entropy(network(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval().requires_grad_(False)


def trained(data: Dataset, cache: Path, device: torch.device | str) -> tuple[Network, float]:
    """The classifier of a data set, frozen, on `device`, and its accuracy on the test images in percent.

    It is trained once, with seed 0, and kept in the folder `cache`, so that one network judges all runs. If the file
    is damaged, it is trained again.
    """
    shape = "x".join(map(str, data.train_images.shape[1:]))
    path = cache / f"classifier-{data.digest}-{shape}-{data.n_classes}-recipe{RECIPE}.pt"
    cache.mkdir(parents=True, exist_ok=True)
    with locked(path.with_suffix(".lock"), f"waiting for another process, which trains {data.name}'s classifier"):
        try:
            state = load_checkpoint(path)
        except UserError as error:
            print(f"{error}: training it anew", flush=True)
            state = None
        if state is None:
            print(f"training the classifier for {data.name}, once; kept in {path}", flush=True)
            network = train(data.train_images, data.train_labels, data.n_classes, 0, device)
            accuracy = 100 - error_rate(classify(network, data.test_images), data.test_labels)
            state = {"weights": network.state_dict(), "accuracy": accuracy}
            save_checkpoint(path, state)
    network = Network(tuple(data.train_images.shape[1:]), data.n_classes)
    network.load_state_dict(state["weights"])
    return network.to(device).eval().requires_grad_(False), state["accuracy"]


def digest(network: Network) -> str:
    """12 hex digits over the weights. They identify the network that judged."""
    return hashlib.sha256(b"".join(p.detach().cpu().numpy().tobytes() for p in network.parameters())).hexdigest()[:12]


@torch.no_grad()
def features(network: Network, images: Tensor, batch: int = 500) -> Tensor:
    """Features (N, 128), float32 on the CPU, of uint8 images (N, C, H, W)."""
    device = network.head[1].weight.device
    return torch.cat([network.features(part.to(device)).cpu() for part in images.split(batch)])


@torch.no_grad()
def classify(network: Network, images: Tensor, batch: int = 500) -> Tensor:
    """The most probable class (N,), int64 on the CPU, of uint8 images (N, C, H, W)."""
    device = network.head[1].weight.device
    return torch.cat([network(part.to(device)).argmax(1).cpu() for part in images.split(batch)])
