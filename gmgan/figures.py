"""The figures that compare runs: 3, 4 and 5 on the toy, 2 and 7 on images.

    python -m gmgan.figures --runs runs

Figures 3 and 4 need the runs themselves (seed 0 of each). Figures 2, 5 and 7 use every seed of the reference results
and of the evaluated runs under --runs, with standard errors. Missing runs are named and left out.
"""

import time
from pathlib import Path

import gmgan
from common import diff, plots, run
from common.plots import curve, named
from gmgan import toy
from gmgan.eval import MULTIPLIERS, SIGMA

TOY = {"GAN": "toy-gan", "GM-GAN": "toy", "AC-GAN": "toy-acgan", "GM-GAN, supervised": "toy-supervised"}
DATA = {"CIFAR-10": "cifar10", "STL-10": "stl10", "Fashion-MNIST": "fashion", "MNIST": "mnist", "digits": "digits"}
FIGURE_7 = {  # for each of its two columns, the experiment of each curve
    "supervised": {"AC-GAN": "{}-acgan", "GM-GAN": "{}-supervised", "GM-GAN, dynamic": "{}-supervised-dynamic"},
    "unsupervised": {"GAN": "{}-gan", "GM-GAN": "{}", "GM-GAN, dynamic": "{}-dynamic"},
}
NARROW = {"mnist": "mnist-narrow", "fashion": "fashion-narrow"}  # GM-GAN with the width of the baselines (ledger 27)


def figures_3_and_4(runs: Path, out: Path) -> None:
    """Samples of the four models over the data; samples of GAN and GM-GAN at several σ."""
    trained = {}
    for name, experiment in TOY.items():
        folder = runs / "gmgan" / experiment / "seed0"
        config = run.experiment_config("gmgan", experiment)
        if not (folder / "eval.json").exists():
            print(f"figure 3: {experiment} left out: no evaluated run in {folder}; make gmgan-{experiment}")
        elif reason := diff.not_comparable(diff.read_records(folder / "eval.json")[0], config):
            print(f"figure 3: {experiment} left out: {reason}")
        else:
            trained[name] = gmgan.load(folder)
    if trained:
        panels = {f"{name} ({TOY[name]}, seed 0)": (model, *toy.samples(model)) for name, model in trained.items()}
        toy.save_scatters(panels, out / "figure-3.png")
    panels = {
        f"{name} ({TOY[name]}, seed 0), σ = {m:g}": (trained[name], *toy.samples(trained[name], m))
        for name in ("GAN", "GM-GAN")
        if name in trained
        for m in toy.SHOWN_MULTIPLIERS
    }
    if panels:
        toy.save_scatters(panels, out / "figure-4.png")


def figure_4_curves(found: dict, out: Path) -> None:
    """The trade-off of Fig. 4 in numbers: likelihood against entropy of samples of the toy, one point per σ."""
    curves = {}
    for name, experiment in TOY.items():
        if experiment in found:
            _, entropy, _ = curve(found[experiment], "entropy_at_")
            _, nll, errors = curve(found[experiment], "nll_at_")
            curves[named(name, found[experiment])] = (entropy, nll, errors)
    if curves:
        labels = ("entropy, nats (diversity)", "negative log-likelihood, nats")
        plots.save_curves({"": curves}, out / "figure-4-curves.png", *labels)


def figure_5(found: dict, out: Path) -> None:
    """Negative log-likelihood of samples against the epoch; a line shows that of the data."""
    curves = {named(name, found[e]): curve(found[e], "nll_after_") for name, e in TOY.items() if e in found}
    if curves:
        xs = next(iter(curves.values()))[0]
        own = toy.negative_log_likelihood(toy.dataset().train_images)
        curves["the data"] = (xs, [own] * len(xs), [0.0] * len(xs))
        labels = ("epoch", "negative log-likelihood, nats")
        plots.save_curves({"": curves}, out / "figure-5.png", *labels, log=True)


def figure_7(found: dict, out: Path) -> None:
    """Quality and diversity against σ, one row for each data set that has a run."""
    panels = {}
    for title, data in DATA.items():
        row = {}
        for setting, models in FIGURE_7.items():
            experiments = {name: NARROW.get(e.format(data), e.format(data)) for name, e in models.items()}
            several = {name: found[e] for name, e in experiments.items() if e in found}
            for score in ("quality", "diversity"):
                curves = {named(name, runs): curve(runs, f"{score}_at_") for name, runs in several.items()}
                row[f"{title}, {setting}: {score}"] = curves
        panels |= row if any(row.values()) else {}
    if panels:
        plots.save_curves(panels, out / "figure-7.png", SIGMA, "score, 0 to 1")


def figure_2(found: dict, out: Path) -> None:
    """Inception Score against σ."""
    panels = {}
    for title, data in DATA.items():
        if data in found and f"inception_score_at_{MULTIPLIERS[0]}" in found[data][0]:
            panels[title] = {named("GM-GAN", found[data]): curve(found[data], "inception_score_at_")}
    if panels:
        plots.save_curves(panels, out / "figure-2.png", SIGMA, "Inception Score")
    else:
        print("figure 2 left out: no run on CIFAR-10 or STL-10 was evaluated with Inception weights")


def main(argv: list[str] | None = None) -> None:
    parser = run.Parser(prog="python -m gmgan.figures")
    parser.add_argument("--runs", type=run.as_path, default=Path("runs"), help="folder under which runs are kept")
    parser.add_argument("--out", type=run.as_path, help="where the figures go; default: <runs>/gmgan/figures")
    options = parser.parse_all(argv)
    runs, out = options.runs, options.out or options.runs / "gmgan" / "figures"
    started = time.time()
    figures_3_and_4(runs, out)
    found = diff.complete("gmgan", runs)
    for figure in (figure_2, figure_4_curves, figure_5, figure_7):
        figure(found, out)
    made = sorted(path.name for path in out.glob("figure-*.png") if path.stat().st_mtime >= started - 1)
    if not made:
        raise run.UserError(f"no run of gmgan under {runs} and no reference results: train one first, make gmgan-toy")
    print(f"{out}: {', '.join(made)}")


if __name__ == "__main__":
    run.exit_with(main)
