"""GM-GAN: Gaussian Mixture GANs for diverse data sets. `load(folder)` returns a trained system."""

from common import run


def load(folder, device="cpu"):
    """Load the system trained in `folder` (runs/gmgan/<experiment>/seed<k>); it is in evaluation mode.

    Raises UserError if there is no such run or if it is damaged.
    """
    return run.load_run("gmgan", folder, device)[0]
