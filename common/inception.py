"""Features and logits of the Inception network that defines FID, by torch-fidelity; their moments are cached.

The network is the TensorFlow one of 2015-12-05. torch-fidelity resizes to 299×299 as the original program does and
scales (x - 128) / 128. Grey images are repeated to 3 channels.
"""

import hashlib
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from common.metrics import moments
from common.run import UserError, load_checkpoint, save_checkpoint

FEATURES = 2048
LOGITS = "logits_unbiased"
SHA256_PREFIX = "6726825d"  # of the official weights file, whose name ends with it


def find_weights(path: Path | None) -> tuple[Path | None, str]:
    """(the weights file, ""), or (None, the reason why there is none).

    path: the file. Without it, the file in torch's hub folder is taken, and downloaded there once.
    Raises UserError if the file is not the official one, because another network gives another score.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as url

    name = url.rpartition("/")[2]
    if path is None:
        path = Path(torch.hub.get_dir(), "checkpoints", name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                torch.hub.download_url_to_file(url, str(path), hash_prefix=SHA256_PREFIX)
        except (OSError, RuntimeError) as error:
            advice = f"({str(error)[:80]}); put {name} there, or name it with --inception"
            return None, f"the Inception weights are not at {path} and could not be downloaded {advice}"
    elif not path.is_file():
        raise UserError(f"{path}: no such file; expected {name}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()  # torch-fidelity would unpickle, and so run, any file
    if not found.startswith(SHA256_PREFIX):
        raise UserError(f"{path}: not the official Inception weights (SHA-256 {found[:8]}…): delete it")
    return path, ""


def extractor(weights: Path, device: torch.device, *layers: str) -> torch.nn.Module:
    """The network that gives `layers`: FEATURES, for FID (the default), or LOGITS, 1,008, for the Inception Score."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    return FeatureExtractorInceptionV3("inception-v3-compat", list(layers) or [str(FEATURES)], str(weights)).to(device)


def features(network: torch.nn.Module, images: Tensor, batch: int = 100) -> Tensor:
    """The extractor's first layer, (N, 2048) or (N, 1008), float32 on the CPU, of uint8 images (N, 1 or 3, H, W)."""
    return outputs(network, images, batch)[0]


@torch.no_grad()
def outputs(network: torch.nn.Module, images: Tensor, batch: int = 100) -> tuple[Tensor, ...]:
    """All layers of the extractor; each as `features` gives the first."""
    device = next(network.parameters()).device
    print(f"Inception features of {len(images):,} images", flush=True)  # on a CPU some minutes per 10,000
    parts = tqdm(images.split(batch), disable=None, leave=False)
    given = [[layer.cpu() for layer in network(part.to(device).expand(-1, 3, -1, -1).contiguous())] for part in parts]
    return tuple(torch.cat(layer) for layer in zip(*given, strict=True))


def cached_moments(network: torch.nn.Module, images: Tensor, cache: Path, key: str) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the features of `images`, kept in the folder `cache`. key: has the data's digest."""
    path = cache / f"inception-{key.replace('/', '_')}.pt"
    with suppress(UserError):  # a damaged file is made again
        if state := load_checkpoint(path):
            return state["mean"], state["covariance"]
    mean, covariance = moments(features(network, images))
    save_checkpoint(path, {"mean": mean, "covariance": covariance})
    return mean, covariance
