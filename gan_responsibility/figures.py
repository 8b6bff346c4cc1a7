"""Figure 4: Inception Score and FID of the four systems during training.

    python -m gan_responsibility.figures --runs runs

It takes the reference results and the evaluated runs under --runs, every seed of each, with standard errors.
"""

from pathlib import Path

from common import diff, plots, run

SYSTEMS = {
    "encoder shared": "flowers10",
    "classifier apart": "flowers10-standalone",
    "GM-GAN": "flowers10-gmgan",
    "vanilla GAN": "flowers10-gan",
}


def figure_4(found: dict[str, list[dict[str, float]]], path: Path) -> bool:
    """Draws the curves of those systems that have scores; whether there are any. found: metrics by experiment, one dict for each seed."""
    panels = {}
    for title, score, best in (("Inception Score", "inception_score", max), ("FID", "fid", min)):
        panels[title] = {}
        for name, experiment in SYSTEMS.items():
            several = [metrics for metrics in found.get(experiment, []) if f"{score}_best" in metrics]
            if several:
                epochs, means, errors = plots.curve(several, f"{score}_after_")
                label = f"{plots.named(name, several)}: best {best(means):.4g}, last {means[-1]:.4g}"
                panels[title][label] = (epochs, means, errors)
    if not any(panels.values()):
        return False
    plots.save_error_curves(panels, path, "epoch", "")
    return True


def main(argv: list[str] | None = None) -> None:
    parser = run.Parser(prog="python -m gan_responsibility.figures")
    parser.add_argument("--runs", type=run.as_path, default=Path("runs"), help="folder under which runs are kept")
    parser.add_argument("--out", type=run.as_path, help="where the figure goes; default: <runs>/gan_responsibility/figures")
    options = parser.parse_all(argv)
    path = (options.out or options.runs / "gan_responsibility" / "figures") / "figure-4.png"
    if not figure_4(diff.complete("gan_responsibility", options.runs), path):
        raise run.UserError(
            f"no run of {', '.join(SYSTEMS.values())} with scores, under {options.runs} or among the reference results: "
            "train and evaluate one with the Inception weights first, as in make gan_responsibility-flowers10 INCEPTION=file"
        )
    print(path)


if __name__ == "__main__":
    run.exit_with(main)
