"""A small convolutional network trained on a data set's own labels.

Its penultimate layer gives features for a Fréchet distance where Inception's weights are not at hand, and its verdict says which class
a generated image is of. Comparable with nothing published.
"""

import fcntl
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from common import run
from common.data import Dataset
from common.metrics import error_rate

RECIPE = "v1"  # of network and training: another recipe is another file in the cache
FEATURES = 128


class Network(nn.Module):
    """3×3 convolutions, halved until 7×7 or smaller, a dense layer of 128, logits. In: (B, C, H, W) in [0, 1]."""

    def __init__(self, image_shape: tuple[int, int, int], n_classes: int):
        super().__init__()
        channels, size, _ = image_shape
        stack: list[nn.Module] = []
        width = 16
        while size > 8:
            stack += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            channels, size, width = width, size // 2, min(2 * width, 64)
        self.body = nn.Sequential(*stack, nn.Flatten(), nn.Linear(channels * size * size, FEATURES), nn.ReLU())
        self.head = nn.Linear(FEATURES, n_classes)

    def features(self, x: Tensor) -> Tensor:
        return self.body(x.to(memory_format=torch.channels_last))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.dropout(self.features(x), 0.5, self.training))


def network(image_shape: tuple[int, int, int], n_classes: int) -> Network:
    """A fresh network from torch's global random state. image_shape: (C, H, W), H = W."""
    return Network(image_shape, n_classes).to(memory_format=torch.channels_last)


def train(
    images: Tensor, labels: Tensor, n_classes: int, seed: int, device: torch.device, passes: int = 10, least_steps: int = 500
) -> Network:
    """A network trained on uint8 images (N, C, H, W) and labels (N,): Adam, batches of 128, the rate falling from 1e-3 to 0 by a cosine.

    The same bits for the same seed on one machine and thread count.
    """
    torch.manual_seed(seed)
    trained = network(tuple(images.shape[1:]), n_classes).to(device).train()
    batch = min(128, len(images))
    per_pass = len(images) // batch
    steps = max(passes * per_pass, least_steps)
    optimizer = torch.optim.Adam(trained.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        if step % per_pass == 0:
            order = torch.randperm(len(images), generator=run.generator(seed, "classifier", step))
        drawn = order[step % per_pass * batch :][:batch]
        loss = nn.functional.cross_entropy(trained(images[drawn].to(device).float() / 255), labels[drawn].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return trained.eval()


def trained(data: Dataset, cache: Path, device: torch.device) -> tuple[Network, float]:
    """The network of a data set and its accuracy on the test images, in percent: trained once, then read from folder `cache`.

    A damaged file is trained anew, aloud; where two processes want it at once, the second waits and finds it.
    """
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"classifier-{RECIPE}-{data.name.replace(':', '-').replace('/', '-')}-{data.digest}.pt"
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            state = run.load_checkpoint(path)
        except run.UserError as error:
            print(f"{error}; training the classifier anew", file=sys.stderr)
            state = None
        if state is None:
            print(f"training a classifier on {data.name}, once (some minutes at most)", flush=True)
            found = train(data.train_images, data.train_labels, data.n_classes, 0, device)
            accuracy = 100 - error_rate(classify(found, data.test_images), data.test_labels)
            print(f"its accuracy on the test images: {accuracy:.2f} %", flush=True)
            run.save_checkpoint(path, {"network": found.state_dict(), "accuracy": accuracy})
            return found, accuracy
    found = network(tuple(data.train_images.shape[1:]), data.n_classes).to(device)
    found.load_state_dict(state["network"])
    return found.eval(), state["accuracy"]


@torch.no_grad()
def _in_batches(function, network: Network, images: Tensor, batch: int = 500) -> Tensor:
    device = next(network.parameters()).device
    return torch.cat([function(part.to(device).float() / 255).cpu() for part in images.split(batch)])


def features(network: Network, images: Tensor) -> Tensor:
    """Penultimate activations (N, 128), float64, on the CPU, of uint8 images (N, C, H, W)."""
    return _in_batches(network.features, network, images).double()


def classify(network: Network, images: Tensor) -> Tensor:
    """The most probable class (N,), on the CPU, of uint8 images (N, C, H, W)."""
    return _in_batches(network, network, images).argmax(1)
