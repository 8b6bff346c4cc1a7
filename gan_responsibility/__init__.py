"""GAN-based Gaussian mixture model responsibility learning. `load(folder)` gives a trained run."""

from common import run  # first: it sets OpenMP's variables before torch is imported


def load(folder, device="cpu"):
    """The system trained in `folder` (runs/gan_responsibility/<experiment>/seed<k>), ready: weights loaded, evaluation
    mode. Raises UserError if there is none or if it is damaged."""
    return run.load_run("gan_responsibility", folder, device)[0]
