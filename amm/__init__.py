"""AMM and SAMM: the Adversarially Learned Mixture Model. `load(folder)` gives a trained run."""

from common import run


def load(folder, device="cpu"):
    """The system trained in `folder` (runs/amm/<experiment>/seed<k>), ready: weights loaded, in evaluation mode.

    Raises UserError if there is no such run or if it is damaged.
    """
    return run.load_run("amm", folder, device)[0]
