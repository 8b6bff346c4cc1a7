"""GM-GAN: Gaussian Mixture GANs for diverse data sets. `load(folder)` gives a trained run."""

from common import run


def load(folder, device="cpu"):
    """The system trained in `folder` (runs/gmgan/<experiment>/seed<k>), ready: weights loaded, in evaluation mode.

    Raises UserError if there is no such run or if it is damaged.
    """
    return run.load_run("gmgan", folder, device)[0]
