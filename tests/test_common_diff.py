"""The diff: verdicts against scipy and hand-computed intervals, runs that do not count, and pages that are current."""

import json
import math
import re
import shutil
import subprocess
import sys

import pytest
from scipy import stats

from common import diff, run
from common.data import OFFICIAL_COUNTS
from tests.conftest import ROOT, call

# Tables I (FID), II (test error) and III (FID of interpolations), from the paper: MNIST, SVHN, CelebA.
TABLES = {
    "Table I": {
        "CWAE": (20.76, 49.30, 51.94), "SeGMA unsupervised": (17.79, 61.11, 51.13), "M1+M2": (40.50, 142.11, 70.96),
        "ADGM": (14.50, 55.54, 51.96), "SeGMA": (12.51, 63.80, 50.54),
    },
    "Table II": {"M1+M2": (17.0, 65.7, 44.5), "ADGM": (4.1, 41.2, 41.7), "SeGMA": (12.7, 32.8, 24.6)},
    "Table III": {"M1+M2": (56.38, 176.89, 88.24), "ADGM": (21.75, 76.66, 63.60), "SeGMA": (13.40, 63.47, 48.14)},
}  # fmt: skip
METRICS = {"Table I": "fid", "Table II": "test_error", "Table III": "fid_interpolation"}


def test_published_numbers_of_segma_are_tables_i_to_iii_each_cell_once():
    numbers = [n for n in diff.read_csv("segma", "published") if n["value"] is not None]
    expected = {
        (f"{where}, {column}", METRICS[where], system): value
        for where, rows in TABLES.items()
        for system, values in rows.items()
        for column, value in zip(("MNIST", "SVHN", "CelebA"), values, strict=True)
    }
    assert {(n["where"], n["metric"], n["system"]): n["value"] for n in numbers} == expected
    assert len(numbers) == len(expected) == 33


@pytest.mark.parametrize("paper", diff.papers())
def test_every_experiment_that_a_csv_names_has_a_config(paper):
    names = {name for number in diff.read_csv(paper, "published") for name in diff.readings(number)}
    claims, wanted = diff.read_csv(paper, "claims"), {line["experiment"] for line in diff.read_csv(paper, "pending")}
    names |= {side for claim in claims for side in (claim["experiment"], claim["than"]) if isinstance(side, str)}
    assert names <= wanted == set(run.experiments(paper)) - {"folder", "folder-colour"}  # no data of ours
    for number in diff.read_csv(paper, "published"):
        assert number["better"] in (None, "lower", "higher", "equal") and number["best"] in (None, "yes")
        assert number["value"] is None or number["better"] and number["needs"]


def number(**changes) -> dict:
    return {"better": "lower", "value": 3.0, "spread": None, "spread_is": None, "trials": None, **changes}


def test_a_single_published_value_matches_inside_the_prediction_interval():
    values = [1.0, 2.0, 3.0, 4.0, 5.0]  # mean 3, s 1.5811; t(0.975, 4) = 2.7764; half 2.7764 · 1.5811 · √1.2 = 4.8089
    assert diff.verdict(values, number(value=7.80)) == "match (95 % of seeds in [-1.809, 7.809])"
    assert diff.verdict(values, number(value=7.82)).startswith("better")  # ours is lower, and lower is better
    assert diff.verdict(values, number(value=-1.82)).startswith("worse")
    assert diff.verdict(values, number(value=7.82, better="higher")).startswith("worse")
    without_trials = diff.verdict(values, number(value=7.80, spread=0.4, spread_is="sd"))
    assert without_trials == diff.verdict(values, number(value=7.80))
    assert diff.verdict(values[:4], number()) == "indicative"
    for counted, word in ((101, "match"), (100, "differs")):
        assert diff.verdict([counted], number(better="equal", value=101.0)) == word


@pytest.mark.parametrize("spread_is, spread", [("sd", 0.39), ("se", 0.39 / math.sqrt(10))])
@pytest.mark.parametrize("value", [2.5, 3.0, 3.3, 3.5, 3.8])
def test_a_published_mean_matches_inside_the_welch_interval(value, spread_is, spread):
    values = [3.1, 3.4, 2.9, 3.3, 3.6, 3.2]  # mean 3.25, s = 0.2429 by n - 1
    p = stats.ttest_ind_from_stats(3.25, 0.2428991560298224, 6, value, 0.39, 10, equal_var=False).pvalue
    word = diff.verdict(values, number(value=value, spread=spread, spread_is=spread_is, trials=10.0)).split()[0]
    assert word == ("match" if p > 0.05 else "better" if value > 3.25 else "worse")


def test_the_welch_verdict_takes_the_standard_deviation_over_n_minus_1():
    """s = √2.5 gives ±2.776 · √(2.5/5 + 0.01²) = ±1.963, which holds 1.9; s = √2, by n, ±1.756, which does not."""
    found = diff.verdict([1.0, 2.0, 3.0, 4.0, 5.0], number(value=4.9, spread=0.01, spread_is="se", trials=10.0))
    assert found == "match (difference in [-3.86, 0.0631])"


def test_the_welch_interval_is_scipys():
    ours, theirs = [1.0, 2.5, 3.0, 4.5, 7.0], [4.0, 4.4, 5.1, 3.9, 4.2, 4.6]
    expected = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval()
    errors = [(stats.tvar(values) / len(values), len(values)) for values in (ours, theirs)]
    found = diff.interval(sum(ours) / 5 - sum(theirs) / 6, *errors)
    assert found == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert found == pytest.approx((-3.569545, 2.036212), abs=1e-6)
    assert diff.interval(2.0, (0.0, 5), (0.0, 5)) == (2.0, 2.0)  # without spread the difference is known exactly


@pytest.mark.parametrize(
    "ours, against, wanted, expected",
    [
        # Welch: 1 … 5 against 11 … 15: difference -10, s² = 2.5 each, error 1, 8 degrees of freedom, t = 2.306
        ([1, 2, 3, 4, 5], [11, 12, 13, 14, 15], "lower", "holds (difference in [-12.3, -7.69])"),
        ([1, 2, 3, 4, 5], [11, 12, 13, 14, 15], "higher", "fails (difference in [-12.3, -7.69])"),
        ([1, 2, 3, 4, 5], [2, 3, 4, 5, 6], "lower", "undecided (difference in [-3.31, 1.31])"),
        # one sample: mean 3, error √(2.5 / 5), 4 degrees of freedom, t = 2.776
        ([1, 2, 3, 4, 5], 0.0, "higher", "holds (difference in [1.04, 4.96])"),
        ([1, 2, 3], 0.0, "higher", "undecided, indicative (difference in [-0.484, 4.48])"),
        ([9, 9, 8], 9.0, "equal", "fails (in 2 of 3 seeds)"),
        ([9, 9], 9.0, "equal", "holds (in 2 of 2 seeds)"),
        ([7], 9.0, "equal", "fails (in 0 of 1 seeds)"),
        ([7], [9, 10], "lower", "one seed: as claimed"),
        ([7, 8, 9], [6], "lower", "one seed: not as claimed"),
        ([7], [7], "lower", "one seed: not as claimed"),
        ([3, 3, 3, 3, 3], [1, 1, 1, 1, 1], "higher", "holds (difference in [2, 2])"),
    ],
)  # fmt: skip
def test_verdicts_on_claims(ours, against, wanted, expected):
    assert diff.verdict_on_claim(ours, against, wanted) == expected


def record(experiment: str = "digits", seed: int = 0, metrics: dict | None = None, **provenance) -> dict:
    """As if from a complete run of SeGMA made from a clean tree."""
    config, clean = run.experiment_config("segma", experiment), {"git_commit": "a" * 40, "git_dirty": False}
    images = OFFICIAL_COUNTS[config.dataset]
    made = dict(data=config.dataset, data_digest="0123456789abcdef", data_official=True)
    made |= dict(train_images=images[0], test_images=images[1], epochs=config.epochs, steps_beyond=0, precision="fp32")
    made |= dict(torch="2.15", device="a CPU", threads=1, training_seconds=60.0, git_commits=["a" * 40], **clean)
    whole = dict(experiment=experiment, seed=seed, metrics=metrics or {"test_error": 10.0 + seed})
    whole |= dict(config=vars(config).copy(), config_hash=run.config_hash(config))
    return whole | {"provenance": {**made, "evaluation": clean, **provenance}}


def test_records_that_are_not_the_experiments_do_not_count():
    config = run.experiment_config("segma", "digits")

    def why(**provenance) -> str | None:
        return diff.not_comparable(record(**provenance), config)

    assert why() is None
    assert why(epochs=3) == f"3 of {config.epochs} epochs"
    assert why(epochs=config.epochs + 1)  # longer is another experiment too
    assert why(steps_beyond=9) == f"{config.epochs} and 9 steps of {config.epochs} epochs"
    assert why(data_official=False, train_images=9) == "9 of 1,437 images"
    assert why(data_official=False, test_images=4) == "4 of 360 images of the test set"
    assert why(data_official=False) == "unofficial data (1,437 + 360 images)"
    assert why(data="celeba") == "other data (celeba, where the config has digits)"
    assert diff.not_comparable(record(), None) == "an experiment without a config"
    assert run.config_hash(config) == run.config_hash(run.experiment_config("segma", "digits", {"epochs": 3}))
    other = run.experiment_config("segma", "digits", {"learning_rate": 0.1})
    for config_hash in (run.config_hash(other), run.config_hash(config)):  # the second lies
        changed = record() | {"config": vars(other), "config_hash": config_hash}
        assert diff.not_comparable(changed, config) == "another config (learning_rate 0.1)"
    newer = record() | {"config": vars(config) | {"new": 1}, "config_hash": "another"}
    assert diff.not_comparable(newer, config) == "another config (a field unknown here)"


def test_what_a_config_leaves_to_the_data_and_a_folder_s_place_are_no_other_config():
    config = run.experiment_config("gmgan", "signs-all")
    given = {**vars(config), "dataset": "signs:/somewhere/else", "n_classes": 43}
    made = record(epochs=config.epochs, data="signs:/somewhere/else") | {"config_hash": "of these"}
    others = ({"width": 16}, "width 16"), ({"dataset": "folder:x"}, "dataset"), ({"new": 1}, "a field unknown here")
    for change, reason in (({}, None), *others):
        found = diff.not_comparable(made | {"config": {**given, **change}}, config)
        assert found is None if reason is None else reason in found


@pytest.mark.parametrize("paper", diff.papers())
def test_committed_results_are_whole_runs_from_clean_trees(paper):
    for r in diff.read(paper):
        made = r["provenance"]
        assert r["reason"] is None or (paper, r["experiment"]) == ("segma", "celeba") and "of 182,637" in r["reason"]
        assert made["git_dirty"] is False and made["evaluation"]["git_dirty"] is False
        assert all(math.isfinite(value) for value in r["metrics"].values())


@pytest.fixture
def house(tmp_path, monkeypatch):
    """SeGMA's configs and numbers without results, pages with empty blocks, and a folder for runs."""
    shutil.copytree(ROOT / "segma/configs", tmp_path / "segma/configs")
    for path in (ROOT / "segma").glob("*.*"):
        if path.suffix in (".csv", ".py"):
            shutil.copy(path, tmp_path / "segma")
    for folder in (tmp_path, tmp_path / "segma"):
        (folder / "README.md").write_text(f"# Before\n\n{diff.BEGIN}\nold\n{diff.END}\n\nafter\n")
    for module in (diff, run):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def put(runs, made: dict, folder: str | None = None, picture: bytes = b"a picture") -> None:
    place = runs / "segma" / (folder or f"{made['experiment']}/seed{made['seed']}")
    (place / "figures").mkdir(parents=True)
    (place / "figures/samples.png").write_bytes(picture)
    (place / "eval.json").write_text(json.dumps(made))


def seeds(house, experiment: str = "digits") -> list[int]:
    return [r["seed"] for r in json.loads((house / f"segma/results/{experiment}.json").read_text())]


def tell(capsys, runs, what: str, *arguments: str) -> str:
    code, out, err = call(diff.main, what, "segma", "--runs", runs, *arguments, capsys=capsys)
    assert code == 0, err
    return out


def test_collect_takes_whole_clean_runs_and_says_what_it_leaves_out(house, capsys):
    runs = house / "mine"
    put(runs, record(seed=1) | {"details": {}}, picture=b"of seed 1")
    put(runs, record(seed=2))
    put(runs, record(seed=3, evaluation={"git_commit": "a" * 40, "git_dirty": True}))
    put(runs, record(seed=4, git_dirty=True))
    put(runs, record(seed=5, epochs=7))
    (runs / "segma/figures").mkdir()
    (runs / "segma/figures/figure-3.png").write_bytes(b"compares runs")
    code, out, err = call(diff.main, "collect", "--runs", runs, capsys=capsys)
    assert code == 0, err
    for seed in (3, 4):
        assert f"seed{seed}: left out: trained or evaluated from a tree that was not clean" in out
    assert re.search(r"seed5: left out: 7 of \d+ epochs", out)
    committed = json.loads((house / "segma/results/digits.json").read_text())
    assert seeds(house) == [1, 2] and committed[0].keys() == set(diff.RECORD)
    assert (house / "segma/figures/digits-samples.png").read_bytes() == b"of seed 1"
    assert (house / "segma/figures/figure-3.png").exists()
    page = (house / "segma/RESULTS.md").read_text()
    assert "| 11.5 ± 0.71 (n=2) |" in page and "figures/digits-samples.png" in page and "| digits | 1 |" in page
    readme = (house / "segma/README.md").read_text()
    assert readme.startswith("# Before\n") and readme.endswith("\n\nafter\n") and "needs CelebA" in readme
    shutil.rmtree(runs)
    put(runs, record(seed=0), picture=b"of seed 0")
    put(runs, record(seed=2, metrics={"test_error": 1.0}, epochs=7))  # not complete: the committed one stays
    diff.collect(runs)
    assert json.loads((house / "segma/results/digits.json").read_text())[1:] == committed and seeds(house) == [0, 1, 2]
    assert (house / "segma/figures/digits-samples.png").read_bytes() == b"of seed 0"
    assert call(diff.main, "check", capsys=capsys)[0] == 0
    (house / "segma/RESULTS.md").write_text((house / "segma/RESULTS.md").read_text().replace("(n=3)", "(n=9)"))
    code, _, err = call(diff.main, "check", capsys=capsys)
    assert code == 1 and "segma/RESULTS.md; run make results" in err


def test_courses_are_collected_and_stand_beside_a_run_that_is_under_way(house, capsys):
    def log(runs, seed: int, *errors: str) -> None:
        folder = runs / f"segma/digits/seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        rows = "".join(f"{epoch},7,{error}\n" for epoch, error in enumerate(errors, 1))
        (folder / "log.csv").write_text(f"epoch,seconds,test_error\n{rows}")

    for seed, errors in ((10, ("50", "40.25", "30")), (2, ("60", "", "20"))):  # the second was not tested in epoch 2
        put(house / "theirs", record(seed=seed))
        log(house / "theirs", seed, *errors)
        diff.collect(house / "theirs")  # the second time beside what is there
    courses = (house / "segma/results/digits.csv").read_text()
    assert courses == "epoch,seed2,seed10\n1,60,50\n2,,40.25\n3,20,30\n"
    log(house / "mine", 0, "55", "45")
    said = tell(capsys, house / "mine", "show")
    assert "digits seed0, epoch 2: test_error 45; reference: 40.25\n" in said
    put(house / "mine", record(seed=0))  # evaluated, so its row says it
    assert "epoch 2" not in tell(capsys, house / "mine", "show")


def test_a_committed_seed_counts_until_a_new_run_is_collected(house):
    runs = house / "mine"
    put(runs, record(seed=1))
    diff.collect(runs)
    shutil.rmtree(runs)
    put(runs, record(seed=1, metrics={"test_error": 1.0}))
    assert diff.complete("segma", runs)["digits"] == [{"test_error": 11.0}]
    diff.collect(runs)
    assert diff.complete("segma", house)["digits"] == [{"test_error": 1.0}]


def test_a_committed_seed_that_does_not_count_is_pending(house):
    (house / "segma/results").mkdir()
    run.write_json(house / "segma/results/digits.json", [record(seed=0), record(seed=1, epochs=3)])
    rows, _ = diff.pending(["segma"], house, [])
    assert next(row for row in rows if row[0] == "segma-digits")[1].startswith("1, 2")


def test_a_person_s_seeds_stand_beside_the_reference_with_a_verdict_of_their_own(house, capsys):
    for seed in range(9):
        put(house / "theirs", record(seed=seed))
    for folder, error in (("theirs", 10.7), ("mine", 50.0)):
        for seed in range(5):
            put(house / folder, record("mnist", seed, {"test_error": error + seed}, weights=f"{folder} {seed}"))
    rows = diff.table("segma", diff.read("segma", house / "theirs"), diff.read("segma", house / "mine"))
    (row,) = (r for r in rows if r.experiment == "mnist" and r.yours)
    assert row.verdict.startswith("match (") and ": worse (" in row.yours
    diff.collect(house / "theirs")
    put(house / "mine", record(seed=0, metrics={"test_error": 30.0}))
    out = " ".join(tell(capsys, house / "mine", "show").split())
    # 10 … 18: mean 14, s 2.7386; t(0.975, 8) = 2.306; half 2.306 · 2.7386 · √(1 + 1/9) = 6.657
    assert "30 (n=1): 0 of 1 in our 95 % interval [7.343, 20.66]" in out


def test_the_tally_counts_better_and_worse_as_differing():
    words = ("match (x)", "better (x)", "worse (x)", "differs", "not run: needs MNIST")
    rows = [diff.Row("", "", "", "", "1", "", "", word) for word in words]
    assert diff.tally(rows) == "1 match, 3 differ, 0 indicative, 0 not comparable, 1 not run"


def test_two_commands_that_collect_at_once_lose_nothing(checkout):
    """Two real processes, both let go at the same moment: the results' lock is held until both wait for it."""
    (checkout / "runs").mkdir()
    both = []
    with run.locked(checkout / "runs/.results.lock", "held by another test"):
        for seed in (0, 1):
            put(checkout / f"mine{seed}", record(seed=seed))
            argv = [sys.executable, "-u", "-m", "common.diff", "collect", "--runs", f"mine{seed}"]
            both.append(subprocess.Popen(argv, cwd=checkout, stdout=subprocess.PIPE, text=True))
        for process in both:
            assert process.stdout.readline() == "another process collects results: waiting for it\n"
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert seeds(checkout) == [0, 1] and any("digits.json: seeds 0, 1\n" in out for out in said)


def test_copies_and_folders_of_another_name_count_once(house, capsys):
    runs = house / "mine"
    put(runs, record(seed=0, weights="w0"))
    put(runs, record(seed=0, weights="w0"), "digits/seed1")  # a copy: its checkpoint says seed 0
    put(runs, record(seed=2, weights="w0"), "digits/seed2")  # the same weights under another seed
    for name in ("seed0.bak", "seed3-labels-stratified", "myseed4"):
        put(runs, record(seed=9, weights=name), f"digits/{name}")
    put(runs, record("digits-adgm", weights="w0"))  # another experiment
    out = tell(capsys, runs, "show", "--experiment", "digits")
    assert "10 (n=1)" in out and out.count("its folder is not named seed<k>") == 1
    assert "another config (labels-stratified)" in out  # a run with other flags
    assert "digits seed 0, digits seed 2 " in out and "the seed or the weights of" in out
    diff.collect(runs)
    assert seeds(house) == [0] and seeds(house, "digits-adgm") == [0]


def test_show_pending_and_commands(house, capsys):
    runs = house / "mine"
    target = r"segma-digits +{} +nothing +{}"
    out = tell(capsys, runs, "pending")
    assert re.search(target.format("0, 1, 2, 3, 4, 5, 6, 7, 8, 9", r"0\.04 h estimated"), out)
    for seed in range(9):
        put(runs, record(seed=seed))
    diff.collect(runs)
    out = tell(capsys, runs, "pending")
    assert re.search(target.format("9", r"0\.02 h measured"), out)
    (runs / "segma/mnist/seed2").mkdir(parents=True)
    (runs / "segma/mnist/seed2/log.csv").write_text("epoch\n1\n2\n")
    assert "seed 2: epoch 2" in tell(capsys, runs, "pending")
    out = tell(capsys, runs, "show", "--experiment", "digits")
    assert re.search(r"14 ± 2\.7 \(n=9\) +14 ± 2\.7 \(n=9\): 9 of 9 in our 95 % interval", " ".join(out.split()))
    flags = ("--threads", "1", "--precision", "bf16", "--data", "/some data")
    lines = tell(capsys, runs, "commands", *flags).splitlines()
    given = f"'--data=/some data' --threads=1 --precision=bf16 --runs={runs}"
    assert f"-m segma.train digits --seed 9 {given} && " in lines[0] and "--precision" not in lines[0].split("&&")[1]
    m1m2 = next(line for line in lines if "segma.m1m2" in line)
    assert "-m segma.m1m2 digits --seed 0 " in m1m2 and "-m segma.eval digits-m1m2 --seed 0 " in m1m2
    assert len(lines) == sum(line["seeds"] for line in diff.read_csv("segma", "pending")) - 9


@pytest.mark.parametrize("columns", [40, 80])
def test_show_is_never_wider_than_the_terminal(house, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    put(house / "mine", record("mnist", epochs=2, metrics={"test_error": 50.0}))
    short, whole = tell(capsys, house / "mine", "show"), tell(capsys, house / "mine", "show", "--all")
    assert max(map(len, whole.splitlines()[:-1])) <= columns  # the last line counts the verdicts
    assert len(whole) > 2 * len(short) and "more rows have no result yet; --all" in short and "more rows" not in whole


def test_runs_that_are_not_comparable_are_shown_and_the_reason_is_said_once(house, capsys):
    runs, config = house / "mine", run.experiment_config("segma", "mnist")
    for seed in (0, 1):
        put(runs, record("mnist", seed, {"test_error": 50.0 + 2 * seed}, epochs=2))
    out = tell(capsys, runs, "show")
    assert out.count(f"not comparable: 2 of {config.epochs} epochs") == 1 and "mnist seed 0, mnist seed 1" in out
    assert "51 ± 1.4 (n=2)" in out and "test error, eq. (7), %, lower is better" in " ".join(out.split())
    assert re.search(r"0 match, 0 differ, 0 indicative, 0 not comparable, \d+ not run", out)


def test_an_experiment_of_a_persons_own_stands_beside_the_one_it_departs_from(house, capsys):
    runs, other = house / "mine", run.experiment_config("segma", "digits", {"learning_rate": 0.1})
    for seed in (0, 1):
        put(runs, record(seed=seed))
    diff.collect(runs)
    shutil.rmtree(runs)
    shutil.copy(house / "segma/configs/digits.yaml", house / "segma/configs/digits-lr.yaml")
    for name in ("digits-lr", "fast"):  # by its name, and by its data
        put(runs, record() | {"experiment": name, "config": vars(other), "config_hash": run.config_hash(other)})
    rows = diff.table("segma", diff.read("segma"), diff.read("segma", runs))
    row = next(r for r in rows if r.experiment == "digits-lr")
    assert (row.reference, row.yours, row.verdict) == ("10.5 ± 0.71 (n=2)", "10 (n=1)", "")
    put(runs, record(seed=7, metrics={"distance": 1.0}))  # a metric that only we measure, and no reference has
    (row,) = (r for r in diff.table("segma", diff.read("segma"), diff.read("segma", runs)) if r.yours == "1 (n=1)")
    assert (row.experiment, row.reference, row.verdict) == ("digits", "", "")
    out = tell(capsys, runs, "show")
    assert out.count("not comparable: another config (learning_rate 0.1)") == 1
    assert "digits-lr seed 0 (beside digits), fast seed 0 (beside digits)" in out


def test_damaged_inputs_of_the_diff(house, capsys):
    put(house / "mine", record())
    for content in ('{"experiment": "dig', "{}", "[3]", "null", '"text"'):
        (house / "mine/segma/digits/seed0/eval.json").write_text(content)
        for what in ("show", "collect"):
            code, _, err = call(diff.main, what, "--runs", house / "mine", capsys=capsys)
            assert (code, err.count("\n")) == (2, 1) and "eval.json: " in err
    assert "did you mean segma?" in call(diff.main, "show", "sigma", capsys=capsys)[2]
    assert "unknown experiment 'digit'" in call(diff.main, "show", "--experiment", "digit", capsys=capsys)[2]
    (house / "segma/README.md").write_text("no markers")
    assert "are not there" in call(diff.main, "check", capsys=capsys)[2]


def test_the_best_seed_stands_beside_the_mean_where_the_published_number_may_be_one(house):
    path = house / "segma/published.csv"
    line = '"Table II, MNIST",SeGMA,.*12.7,,,,MNIST,'
    path.write_text(re.sub(f"({line})\n", r"\1yes\n", path.read_text()))
    for seed, error in enumerate((20.0, 16.0, 18.0)):
        put(house / "mine", record("mnist", seed, {"test_error": error}, precision="fp32" if seed else "bf16"))
    diff.collect(house / "mine")
    (row,) = (r for r in diff.table("segma", diff.read("segma"), []) if r.experiment == "mnist" and r.reference)
    assert row[:2] == ("Table II, MNIST", "SeGMA")  # its line names mnist; the line without an experiment adds no row
    assert row.reference == "18 ± 2 (n=3, bf16 and fp32), +5.3; the best seed 16" and row.verdict == "indicative"


def test_claims_compare_with_experiments_numbers_and_other_metrics(house):
    (house / "segma/claims.csv").write_text(
        "where,claim,experiment,metric,is,than,than_metric\n"
        "Sec. 1,better than M1+M2,mnist,test_error,lower,mnist-m1m2,\n"
        "Sec. 2,better than a number,mnist,test_error,lower,30,\n"
        "Sec. 3,better than itself,mnist,test_error,lower,,other\n"
    )
    for seed, error in enumerate((20.0, 21.0)):
        put(house / "mine", record("mnist", seed, {"test_error": error, "other": error + 1 + seed}))
    rows = diff.claims("segma", [], diff.read("segma", house / "mine"))
    assert rows[0][2:] == ["mnist: test_error lower than mnist-m1m2", "20.5 ± 0.71 (n=2)", "", "not run"]
    assert rows[1][2:5] == ["mnist: test_error lower than 30", "20.5 ± 0.71 (n=2)", "30"]
    assert rows[1][5] == "holds, indicative (difference in [-15.9, -3.15])"
    assert rows[2][2:5] == ["mnist: test_error lower than other", "20.5 ± 0.71 (n=2)", "22 ± 1.4 (n=2)"]
    assert rows[2][5] == "undecided, indicative (difference in [-7.85, 4.85])"  # paired: -1 and -2
    both = diff.read("segma", house / "mine")
    assert diff.claims("segma", both, both) == rows  # no seed counts twice
    assert "better than a number" in diff.pages()[house / "segma/RESULTS.md"]


def test_results_are_current(capsys):
    code, _, err = call(diff.main, "check", capsys=capsys)
    assert code == 0, err


@pytest.mark.parametrize("paper", diff.papers())
def test_the_readmes_links_lead_to_what_they_name(paper):
    links = re.findall(r"\[`(\w+)`\]\(([\w./]+)#L(\d+)\)", (ROOT / paper / "README.md").read_text())
    assert len(links) > 20
    for name, file, line in links:
        found = (ROOT / paper / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf" *(def|class) {name}\b", found), f"{name} is not at {file}:{line}"


def test_the_pages_links_and_pictures_lead_somewhere():
    def anchor(heading: str) -> str:  # as GitHub makes it
        return re.sub(r"[^\w -]", "", heading.lstrip("# ").lower()).replace(" ", "-")

    for page in (ROOT / "README.md", *ROOT.glob("*/*.md")):
        for place, target in re.findall(r"\]\(([\w/-]+\.\w+|LICENSE)?(?:#([^)]+))?\)", page.read_text()):
            found = page.parent / place if place else page
            assert found.exists(), f"{page}: {place}"
            if target and found.suffix == ".md":
                headings = [line for line in found.read_text().splitlines() if line.startswith("#")]
                assert target in map(anchor, headings), f"{page}: {place}#{target}"
