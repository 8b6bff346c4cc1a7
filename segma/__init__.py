"""SeGMA: Semi-Supervised Gaussian Mixture Auto-Encoder. `load(folder)` gives a trained run."""

from common import run  # first: it sets OpenMP's variables before torch is imported


def load(folder, device="cpu"):
    """The system trained in `folder` (runs/segma/<experiment>/seed<k>), ready: weights loaded, evaluation mode.

    It is a SeGMA, or an M1M2 or ADGM for a baseline's run. Raises UserError if there is no run or if it is damaged.
    """
    return run.load_run("segma", folder, device)[0]
