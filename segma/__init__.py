"""SeGMA: Semi-Supervised Gaussian Mixture Auto-Encoder. `load(folder)` returns a trained system."""

from common import run  # first: it sets OpenMP's variables before torch is imported


def load(folder, device="cpu"):
    """Load the system trained in `folder` (runs/segma/<experiment>/seed<k>); it is in evaluation mode.

    It is a SeGMA, or for a baseline's run an M1M2 or ADGM. Raises UserError if there is no run or if it is damaged.
    """
    return run.load_run("segma", folder, device)[0]
