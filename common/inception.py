"""Features of the Inception network that FID is defined on, by torch-fidelity, and their moments, cached; its logits as well.

The network is the TensorFlow one of 2015-12-05; torch-fidelity resizes to 299×299 as the original program does (bilinear, TF 1)
and scales (x - 128) / 128. Grey images are repeated to 3 channels.
"""

import hashlib
import os
import socket
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from common.metrics import moments
from common.run import UserError, load_checkpoint, save_checkpoint

FEATURES = 2048
LOGITS = "logits_unbiased"
OPERATIONS = 1.14e10  # of one image, 299×299
SHA256_PREFIX = "6726825d"  # of the weights file; its publishers write it into the file's name


def find_weights(path: Path | None) -> tuple[Path | None, str]:
    """The weights file and '', or None and the reason why there is none.

    path: the file; without it torch's hub folder is searched, and the file downloaded there once.
    Raises UserError where a path was given and it is not the official file: another network gives another score.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    except ImportError:
        return None, "torch-fidelity is not installed"
    if path is not None:
        if not path.is_file():
            raise UserError(f"{path}: no such file; expected {os.path.basename(URL_INCEPTION_V3)}")
        _check(path)
        return path, ""
    path = Path(torch.hub.get_dir(), "checkpoints", os.path.basename(URL_INCEPTION_V3))
    if not path.is_file():
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(15)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=SHA256_PREFIX)
        except (OSError, RuntimeError) as error:
            return None, (
                f"the Inception weights are not at {path} and could not be downloaded ({' '.join(str(error).split())[:80]}); "
                f"put {path.name} there, or name it with --inception"
            )
        finally:
            socket.setdefaulttimeout(timeout)
    _check(path)
    return path, ""


def _check(path: Path) -> None:
    # Checked before it is opened: torch-fidelity loads the file with the full unpickler.
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(SHA256_PREFIX):
        raise UserError(f"{path}: not the official Inception weights (SHA-256 {found[:8]}…, expected {SHA256_PREFIX}…): delete it")


def extractor(weights: Path, device: torch.device, *layers: str) -> torch.nn.Module:
    """The network up to FEATURES, FID's, or to the layers named: also LOGITS, the 1,008 without bias of the Inception Score."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    return FeatureExtractorInceptionV3("inception-v3-compat", list(layers) or [str(FEATURES)], str(weights)).to(device)


@torch.no_grad()
def features(network: torch.nn.Module, images: Tensor, batch: int = 100) -> Tensor:
    """What the extractor gives first, (N, 2048) or (N, 1008), float32 on the CPU, of uint8 images (N, 1 or 3, H, W)."""
    return outputs(network, images, batch)[0]


@torch.no_grad()
def outputs(network: torch.nn.Module, images: Tensor, batch: int = 100) -> tuple[Tensor, ...]:
    """All that the extractor gives, layer by layer, as `features` gives the first."""
    device = next(network.parameters()).device
    print(f"Inception features of {len(images):,} images", flush=True)  # on a CPU some minutes per 10,000
    parts = tqdm(images.split(batch), disable=not sys.stderr.isatty(), leave=False)
    given = [[layer.cpu() for layer in network(part.to(device).expand(-1, 3, -1, -1).contiguous())] for part in parts]
    return tuple(torch.cat(layer) for layer in zip(*given, strict=True))


def cached_moments(network: torch.nn.Module, images: Tensor, cache: Path, key: str) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the features of `images`, computed once per key (which names the data's digest) in folder `cache`."""
    path = cache / f"inception-{key}.pt"
    try:
        state = load_checkpoint(path)
    except UserError:  # a damaged cache is computed anew; a folder is nobody's cache
        if path.is_dir():
            raise
        state = None
    if state is None:
        mean, covariance = moments(features(network, images))
        save_checkpoint(path, {"mean": mean, "covariance": covariance})
        return mean, covariance
    return state["mean"], state["covariance"]
