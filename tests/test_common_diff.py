"""The diff: verdicts against hand-computed intervals, records that do not count, and READMEs that are current."""

import json
import math
import re
import shutil
from dataclasses import asdict

import pytest

from common import diff, run
from segma.train import Config
from tests.conftest import ROOT, call

# Tables I, II and III, transcribed from the paper; columns MNIST, SVHN, CelebA.
TABLES = {
    ("Table I", "fid"): {
        "CWAE": (20.76, 49.30, 51.94),
        "SeGMA unsupervised": (17.79, 61.11, 51.13),
        "M1+M2": (40.50, 142.11, 70.96),
        "ADGM": (14.50, 55.54, 51.96),
        "SeGMA": (12.51, 63.80, 50.54),
    },
    ("Table II", "test_error"): {"M1+M2": (17.0, 65.7, 44.5), "ADGM": (4.1, 41.2, 41.7), "SeGMA": (12.7, 32.8, 24.6)},
    ("Table III", "fid_interpolation"): {
        "M1+M2": (56.38, 176.89, 88.24),
        "ADGM": (21.75, 76.66, 63.60),
        "SeGMA": (13.40, 63.47, 48.14),
    },
}


def test_published_yaml_is_tables_i_to_iii_each_cell_once():
    entries = diff.published("segma").entries
    found = {(e.where, e.metric, e.system): e.value for e in entries}
    expected = {
        (f"{where}, {column}", metric, system): value
        for (where, metric), rows in TABLES.items()
        for system, values in rows.items()
        for column, value in zip(("MNIST", "SVHN", "CelebA"), values, strict=True)
    }
    assert found == expected and len(entries) == len(expected) == 33
    assert len({e.id for e in entries}) == 33


def entry(**changes) -> diff.Entry:
    fields = dict(id="x", where="", system="", dataset="", experiment="", metric="", unit="", better="lower", value=3.0,
                  spread=None, spread_is=None, trials=None, needs="")  # fmt: skip
    return diff.Entry(**{**fields, **changes})


def test_a_single_published_value_matches_inside_the_prediction_interval():
    values = [1.0, 2.0, 3.0, 4.0, 5.0]  # mean 3, s 1.5811; t(0.975, 4) = 2.7764; half-width 2.7764 · 1.5811 · √1.2 = 4.8089
    assert diff.verdict(values, entry(value=7.80)) == "match (95 % of seeds in [-1.809, 7.809])"
    assert diff.verdict(values, entry(value=7.82)).startswith("better")  # ours is lower, and lower is better
    assert diff.verdict(values, entry(value=-1.82)).startswith("worse")
    assert diff.verdict(values, entry(value=7.82, better="higher")).startswith("worse")


def test_a_published_mean_matches_inside_the_welch_interval():
    from scipy.stats import ttest_ind_from_stats

    values = [3.1, 3.4, 2.9, 3.3, 3.6, 3.2]
    mean, s = sum(values) / 6, 0.2428991560298224
    for value in (2.5, 3.0, 3.3, 3.5, 3.8):
        for spread_is, spread in (("sd", 0.39), ("se", 0.39 / math.sqrt(10))):
            p = ttest_ind_from_stats(mean, s, 6, value, 0.39, 10, equal_var=False).pvalue
            word = diff.verdict(values, entry(value=value, spread=spread, spread_is=spread_is, trials=10)).split()[0]
            assert word == ("match" if p > 0.05 else "better" if mean < value else "worse")


def test_few_seeds_are_indicative_and_counts_match_when_equal():
    assert diff.verdict([1.0] * 4, entry()) == "indicative"
    assert diff.verdict([101.0], entry(better="equal", value=101)) == "match"
    assert diff.verdict([100.0], entry(better="equal", value=101)) == "differs"


def record(**provenance) -> dict:
    config = run.experiment_config("segma", "digits")
    return {
        "experiment": "digits",
        "seed": 0,
        "metrics": {"test_error": 10.0},
        "config": asdict(config),
        "config_hash": run.config_hash(config),
        "provenance": {
            "epochs": config.epochs, "data": "digits", "data_digest": diff.official_digest("digits"), "data_official": True,
            "train_images": 1437, "test_images": 360, "precision": "fp32", "steps_beyond": 0, **provenance,
        },
    }  # fmt: skip


def test_records_that_are_not_the_experiments_do_not_count():
    config = run.experiment_config("segma", "digits")
    assert diff.not_comparable(record(), config) is None
    assert diff.not_comparable(record(epochs=3), config) == f"3 of {config.epochs} epochs"
    assert diff.not_comparable(record(data_official=False, train_images=9), config) == "9 of 1,437 images"
    assert diff.not_comparable(record(data_official=False, test_images=4), config) == "4 of 360 images of the test set"
    assert "unofficial data (1,437 + 360 images)" in diff.not_comparable(record(data_official=False), config)
    own = record(data_official=False, data="folder:x", train_images=9, test_images=4)
    assert "unofficial data (9 + 4 images)" in diff.other_data(own)
    lying = record() | {"config": record()["config"] | {"learning_rate": 0.1}}  # under the hash of the committed one
    assert diff.not_comparable(lying, config) == "another config (learning_rate 0.1)"
    assert diff.other_data(record(data="celeba", train_images=182_637, test_images=19_962, data_digest="f" * 16)) is None
    assert diff.not_comparable(record(data="celeba"), config) == "other data (celeba, where the config has digits)"
    assert "other data" in diff.not_comparable(record(data_digest="0" * 16), config)
    other = run.experiment_config("segma", "digits", {"learning_rate": 0.1})
    changed = record() | {"config": record()["config"] | {"learning_rate": 0.1}, "config_hash": run.config_hash(other)}
    assert diff.not_comparable(changed, config) == "another config (learning_rate 0.1)"
    assert diff.not_comparable(record(steps_beyond=9), config) == f"{config.epochs} and 9 steps of {config.epochs} epochs"
    found = diff.sample([record(), record(precision="bf16"), record(epochs=3)], config, "test_error")
    assert found.values == [10.0, 10.0] and found.reasons == [f"3 of {config.epochs} epochs"]
    assert str(found) == "10 ± 0 (n=2, bf16 and fp32)"  # which precisions a mean is over is always said
    assert str(diff.sample([record(epochs=3)], config, "test_error")) == f"not comparable: 3 of {config.epochs} epochs"
    assert str(diff.sample([record()], config, "fid")) == "–"


def test_config_hash_leaves_old_runs_as_they_were():
    base = Config()
    assert run.config_hash(base) == run.config_hash(Config(epochs=3))
    assert run.config_hash(base) != run.config_hash(Config(learning_rate=1e-3))
    assert run.config_hash(base) == run.config_hash(Config(**{"learning_rate": base.learning_rate}))


def test_committed_results_are_whole_runs_from_clean_trees():
    for paper in diff.papers():
        subsets = {item["experiment"] for item in diff.published(paper).reference if item.get("subset")}  # said to be not comparable
        for experiment, records in diff.references(paper).items():
            config = diff.config_of(paper, experiment)
            refused = diff.unfinished if experiment in subsets else diff.not_comparable
            assert config is not None, f"results of an experiment that is gone: {experiment}"
            assert len({r["seed"] for r in records}) == len(records)
            for r in records:
                assert refused(r, config) is None and diff.unclean(r) is None
                assert all(math.isfinite(v) for v in r["metrics"].values())


def test_results_blocks_are_current(capsys):
    code, _, err = call(diff.main, "check", capsys=capsys)
    assert code == 0, err


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A copy of the READMEs, configs and published numbers, without results, for `collect` to write into."""
    for path in ("README.md", "segma/README.md", "segma/published.yaml"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    shutil.copytree(ROOT / "segma/configs", tmp_path / "segma/configs")
    for path in (ROOT / "segma").glob("*.py"):  # of which `module:` names some
        shutil.copy(path, tmp_path / "segma")
    monkeypatch.setattr(diff, "ROOT", tmp_path)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    return tmp_path


def put_result(runs, experiment: str, seed: int, **metrics: float) -> None:
    """An eval.json on MNIST, as if from a complete run made from a clean tree."""
    config = run.experiment_config("segma", experiment)
    digest = diff.official_digest("mnist")
    made = record(data="mnist", data_digest=digest, train_images=60_000, test_images=10_000, epochs=config.epochs)
    made |= {"experiment": experiment, "seed": seed, "config": asdict(config), "config_hash": run.config_hash(config), "metrics": metrics}
    made["provenance"] |= {key: None for key in diff.PROVENANCE - made["provenance"].keys()}
    made["provenance"] |= {"git_commit": "0" * 40, "git_commits": ["0" * 40], "git_dirty": False, "training_seconds": 1.0}
    made["provenance"]["evaluation"] = {"git_commit": "0" * 40, "git_dirty": False}
    folder = runs / experiment / f"seed{seed}"
    folder.mkdir(parents=True)
    (folder / "eval.json").write_text(json.dumps(made))


def test_pairs_of_runs_are_compared_seed_by_seed(house, tmp_path, capsys):
    reference, mine = [10.0, 20.0, 40.0], [11.0, 21.5, 42.0]  # differences 1, 1.5, 2: mean 1.5, s 0.5; t(0.975, 2) = 4.3027
    for seed, (theirs, ours) in enumerate(zip(reference, mine, strict=True)):
        put_result(tmp_path / "theirs", "mnist", seed, test_error=theirs, same=3.0)
        put_result(tmp_path / "runs/segma", "mnist", seed, test_error=ours, same=3.0, only_here=1.0)
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "theirs").glob("*/*/eval.json"))]
    (house / "segma/results").mkdir()
    (house / "segma/results/mnist.json").write_text(json.dumps(records))
    where = ["pairs", "segma", "--experiment", "mnist", "--runs", tmp_path / "runs"]
    code, out, err = call(diff.main, *where, capsys=capsys)
    half = 4.3027 * 0.5 / 3**0.5
    assert code == 0 and f"+1.5 in [{1.5 - half:.3g}, {1.5 + half:.3g}]" in out and "only_here" not in out, err
    assert "seeds 0, 1, 2" in out and out.split("+1.5 in")[1].splitlines()[0].endswith("shift")
    assert re.search(r"same +3 ± 0 \(n=3\) +3 ± 0 \(n=3\) +\+0 in \[0, 0\] +the same", out)
    assert diff.pairs("segma", "mnist", {"mnist": records})[1][3] == "+0 in [0, 0]"
    further = [{**r, "metrics": {"test_error": r["metrics"]["test_error"] + d}} for r, d in zip(records, (-1, 0, 2), strict=True)]
    assert diff.pairs("segma", "mnist", {"mnist": further})[1][4] == "no shift seen"
    shutil.rmtree(tmp_path / "runs/segma/mnist/seed1")
    shutil.rmtree(tmp_path / "runs/segma/mnist/seed2")
    code, _, err = call(diff.main, *where, capsys=capsys)
    assert code == 2 and "mnist: 1 seed has a complete run here and in the reference" in err
    assert call(diff.main, "pairs", "segma", capsys=capsys)[0] == 2


def put_run(runs, trained, seed: int, **provenance) -> None:
    """An evaluated run, as if it had been trained to the end from a clean tree."""
    folder = runs / f"segma/digits/seed{seed}"
    shutil.copytree(trained / "segma/digits/seed3/figures", folder / "figures")
    result = json.loads((trained / "segma/digits/seed3/eval.json").read_text()) | {"seed": seed}
    clean = {"git_commit": "a" * 40, "git_dirty": False}
    epochs = run.experiment_config("segma", "digits").epochs
    result["provenance"] |= {"epochs": epochs, "git_commits": ["a" * 40], "evaluation": clean, **clean, **provenance}
    result["metrics"]["test_error"] = 10.0 + seed
    (folder / "eval.json").write_text(json.dumps(result))


def test_collect_takes_whole_clean_runs_and_leaves_out_the_rest(house, trained, capsys, tmp_path):
    runs = tmp_path / "runs"
    for seed in (1, 2):
        put_run(runs, trained, seed)
    put_run(runs, trained, 4, git_dirty=True)
    put_run(runs, trained, 5, epochs=7)
    code, out, err = call(diff.main, "collect", "--runs", runs, capsys=capsys)
    assert code == 0, err
    assert "seed 4: left out: trained from a tree that was not clean" in out and "seed 5: left out: 7 of" in out
    records = json.loads((house / "segma/results/digits.json").read_text())
    assert [r["seed"] for r in records] == [1, 2]
    assert (house / "segma/figures/digits-samples.png").exists()
    text = (house / "segma/README.md").read_text()
    assert "| 11.5 ± 0.71 (n=2) |" in text and "figures/digits-samples.png" in text
    assert "details" not in records[0] and records[0].keys() == diff.RECORD.keys()
    put_run(runs, trained, 0)
    call(diff.main, "collect", "--runs", runs, capsys=capsys)
    assert [r["seed"] for r in json.loads((house / "segma/results/digits.json").read_text())] == [0, 1, 2]
    assert call(diff.main, "check", capsys=capsys)[0] == 0
    (house / "segma/README.md").write_text((house / "segma/README.md").read_text().replace("(n=3)", "(n=9)"))
    code, _, err = call(diff.main, "check", capsys=capsys)
    assert code == 1 and "segma/README.md; run make results" in err


def test_show_and_pending(house, trained, capsys, tmp_path):
    runs = tmp_path / "runs"
    code, out, _ = call(diff.main, "pending", "--runs", runs, capsys=capsys)
    assert code == 0 and re.search(r"segma-digits +0, 1, 2, 3, 4, 5, 6, 7, 8, 9 +nothing", out)
    for seed in range(10):
        put_run(runs, trained, seed)
    call(diff.main, "collect", "--runs", runs, capsys=capsys)
    code, out, _ = call(diff.main, "show", "segma", "--experiment", "digits", "--runs", runs, capsys=capsys)
    assert code == 0 and re.search(r"digits +– +14.5 ± 3 \(n=10\) +– +14.5 ± 3 \(n=10\) +yours as the reference", out)
    assert "segma-digits " not in call(diff.main, "pending", "--runs", runs, capsys=capsys)[1]
    (runs / "segma/mnist/seed2").mkdir(parents=True)
    (runs / "segma/mnist/seed2/log.csv").write_text("epoch\n1\n2\n")
    assert "seed 2: epoch 2 of 500" in call(diff.main, "pending", "--runs", runs, capsys=capsys)[1]


def test_damaged_inputs_of_the_diff(house, capsys, tmp_path):
    folder = tmp_path / "runs/segma/digits/seed0"
    folder.mkdir(parents=True)
    wrong = json.dumps(record() | {"metrics": {"test_error": float("nan")}})
    for content in ('{"experiment": "dig', "{}", "[]", "[3]", "null", '"text"', json.dumps(record()), wrong):
        (folder / "eval.json").write_text(content)
        for what in ("show", "collect"):
            code, _, err = call(diff.main, what, "--runs", tmp_path / "runs", capsys=capsys)
            assert (code, err.count("\n")) == (2, 1) and "eval.json: " in err if content != "[]" else code == 0
    assert call(diff.main, "show", "sigma", capsys=capsys)[0] == 2
    assert "unknown experiment 'digit'" in call(diff.main, "show", "--experiment", "digit", capsys=capsys)[2]
    assert call(diff.main, "pending", "segma", capsys=capsys)[0] == 2
    text = (house / "segma/published.yaml").read_text()
    (house / "segma/published.yaml").write_text(
        text.replace("ours:\n", "ours:\n  - {experiment: mnist, seeds: 5, hours: 1, needs: MNIST}\n")
    )
    code, _, err = call(diff.main, "show", capsys=capsys)
    assert code == 2 and "published.yaml: ours, item 1: metric, what: missing, or not of its kind" in err
    (house / "segma/published.yaml").write_text(text + "claims: 3\n")
    code, _, err = call(diff.main, "show", capsys=capsys)
    assert code == 2 and "published.yaml: claims is not a list" in err
    (house / "segma/published.yaml").write_text("entries:\n  - {id: x}\n")
    code, _, err = call(diff.main, "show", capsys=capsys)
    assert code == 2 and "published.yaml: an entry is not complete" in err


@pytest.mark.parametrize("paper", diff.papers())
def test_the_readmes_links_lead_to_what_they_name(paper):
    text = (ROOT / paper / "README.md").read_text()
    links = re.findall(r"\[`(\w+)`\]\(([\w./]+)#L(\d+)\)", text)
    assert len(links) > 20
    for name, file, line in links:
        found = (ROOT / paper / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"(def|class) {name}\b", found), f"{name} is not at {file}:{line}"


def test_the_best_seed_stands_beside_the_mean_where_the_published_number_may_be_one(house, tmp_path):
    text = (house / "segma/published.yaml").read_text()
    marked = text.replace("better: lower, value: 12.7,", "better: lower, value: 12.7, show_best: true,")
    assert marked != text
    (house / "segma/published.yaml").write_text(marked)
    for seed, error in enumerate((20.0, 16.0, 18.0)):
        put_result(tmp_path / "runs/segma", "mnist", seed, test_error=error)
    diff.collect(tmp_path / "runs")
    row = next(r for r in diff.table("segma", None) if r[0] == "Table II, MNIST" and r[2] == "mnist")
    assert row[4].startswith("18 ± 2 (n=3") and row[4].endswith("; the best seed 16") and row[5] == "+5.3"


@pytest.mark.parametrize(
    "ours, against, wanted, kind, expected",
    [
        # Welch: 1 … 5 against 11 … 15: difference -10, s² = 2.5 each, error 1, 8 degrees of freedom, t = 2.306
        ([1, 2, 3, 4, 5], [11, 12, 13, 14, 15], "lower", "seeds", "holds (difference in [-12.3, -7.69])"),
        ([1, 2, 3, 4, 5], [11, 12, 13, 14, 15], "higher", "seeds", "fails (difference in [-12.3, -7.69])"),
        ([1, 2, 3, 4, 5], [2, 3, 4, 5, 6], "lower", "seeds", "undecided (difference in [-3.31, 1.31])"),
        # one sample: mean 3, error √(2.5 / 5), 4 degrees of freedom, t = 2.776
        ([1, 2, 3, 4, 5], [0], "higher", "number", "holds (difference in [1.04, 4.96])"),
        ([1, 2, 3], [0], "higher", "number", "undecided, indicative (difference in [-0.484, 4.48])"),
        # paired: the differences are 1 but once 2
        ([2, 3, 4, 6, 6], [1, 2, 3, 4, 5], "higher", "paired", "holds (difference in [0.645, 1.76])"),
        ([9, 9, 8], [9], "equal", "number", "fails (in 2 of 3 seeds)"),
        ([9, 9], [9], "equal", "number", "holds (in 2 of 2 seeds)"),
        ([7], [9], "equal", "number", "fails (in 0 of 1 seeds)"),
        ([7], [9, 10], "lower", "seeds", "one seed: as claimed"),
        ([7], [6], "lower", "seeds", "one seed: not as claimed"),
        ([7, 8, 9], [6], "lower", "seeds", "one seed: not as claimed"),
        ([7], [7], "higher", "seeds", "one seed: not as claimed"),
        ([3, 3, 3, 3, 3], [1, 1, 1, 1, 1], "higher", "seeds", "holds (difference in [2, 2])"),
    ],
)  # fmt: skip
def test_verdicts_on_claims(ours, against, wanted, kind, expected):
    found = diff.verdict_on_claim([float(x) for x in ours], [float(x) for x in against], wanted, kind)[1]
    assert found == expected


def test_what_a_config_leaves_to_the_data_and_a_folder_s_place_are_no_other_config():
    config = run.experiment_config("gmgan", "signs-all")
    given = {**asdict(config), "dataset": "signs:/somewhere/else", "n_classes": 43}
    made = record(epochs=config.epochs, data="signs:/somewhere/else") | {"config": given, "config_hash": "of these"}
    assert diff.unfinished(made, config) is None
    assert diff.unfinished(made | {"config": {**given, "width": 32}}, config) == "another config (width 32)"
    assert "dataset" in diff.unfinished(made | {"config": {**given, "dataset": "folder:x"}}, config)
    assert diff.unfinished(made | {"config": {**given, "new": 1}}, config) == "another config (a field unknown here)"
    mnist = run.experiment_config("gmgan", "mnist")  # there all is given
    made = record(epochs=mnist.epochs) | {"config": asdict(mnist) | {"n_components": None}, "config_hash": "of these"}
    assert diff.unfinished(made, mnist) == "another config (n_components None)"


def test_claims_name_experiments_and_say_where_nothing_was_run(house, tmp_path):
    text = (house / "segma/published.yaml").read_text()
    claims = """
claims:
  - {where: "Sec. 1", claim: "better than M1+M2", experiment: mnist, metric: test_error, is: lower, than: mnist-m1m2}
  - {where: "Sec. 2", claim: "better than a number", experiment: mnist, metric: test_error, is: lower, than: 30}
  - {where: "Sec. 3", claim: "better than itself", experiment: mnist, metric: test_error, is: lower, than: {metric: other}}
"""
    (house / "segma/published.yaml").write_text(text + claims)
    for seed, error in enumerate((20.0, 21.0)):
        put_result(tmp_path / "runs/segma", "mnist", seed, test_error=error, other=error + 1 + seed)
    mine = diff.yours("segma", tmp_path / "runs")
    rows = diff.claims("segma", mine)
    assert rows[1][2:] == ["mnist: test_error lower than mnist-m1m2", "–", "–", "not run"]
    assert rows[2][2:5] == ["mnist: test_error lower than 30", "20.5 ± 0.71 (n=2)", "30"] and rows[2][5].startswith("holds, indicative")
    assert rows[3][2:5] == ["mnist: test_error lower than other", "20.5 ± 0.71 (n=2)", "22 ± 1.4 (n=2)"]
    assert rows[3][5].startswith("undecided, indicative (difference in [-7.85")
    assert all(row[5] == "not run" for row in diff.claims("segma")[1:])  # runs of this machine are no reference
    assert "better than a number" in next(text for path, text in diff.blocks().items() if path.parent.name == "segma")


def test_the_readmes_pictures_exist():
    for readme in (ROOT / "README.md", *ROOT.glob("*/README.md")):
        for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", readme.read_text()):
            assert (readme.parent / target).exists()


def test_rankings_hold_our_order_against_the_published_one(house, tmp_path):
    """Table II on MNIST: ADGM 4.1, SeGMA 12.7, M1+M2 17.0. Ours here: SeGMA, ADGM, M1+M2: one pair of three is the other way round."""
    runs = tmp_path / "runs/segma"
    values = {"mnist": (9.0, 30.0), "mnist-adgm": (10.0, 10.0), "mnist-m1m2": (20.0, 20.0)}
    for experiment, (error, stand_in) in values.items():
        put_result(runs, experiment, 0, test_error=error, fid_classifier=stand_in)
    heads, *rows = diff.rankings("segma", diff.yours("segma", tmp_path / "runs"))
    assert len(heads) == 5
    assert rows == [
        [
            "Table I, MNIST",
            "SeGMA 12.51, ADGM 14.5, M1+M2 40.5",
            "ADGM 10 (n=1), M1+M2 20 (n=1), SeGMA 30 (n=1)",
            "fid_classifier",
            "1 of 3, indicative",
        ],
        [
            "Table II, MNIST",
            "ADGM 4.1, SeGMA 12.7, M1+M2 17",
            "SeGMA 9 (n=1), ADGM 10 (n=1), M1+M2 20 (n=1)",
            "test_error",
            "2 of 3, indicative",
        ],
    ]
    assert diff.rankings("segma", {}) == []


def test_what_nobody_has_measured_is_counted_not_listed():
    head = ["where", "system", "experiment", "published", "reference", "difference", "yours", "verdict"]
    ours = ["ours", "a number", "e", "–"]
    kept = [
        ["Table 1", "s", "e", "1", "–", "–", "–", "not run"],  # the paper's own always stand
        [*ours, "2 (n=1)", "–", "–", "no published number"],
        [*ours, "–", "–", "not comparable: 1 of 20 epochs", "not run"],
    ]
    dropped = [[*ours, "–", "–", "–", "not run"], [*ours, "not comparable: another config", "–", "–", "not comparable"]]
    shown, said = diff.without_the_unmeasured([head, *kept, *dropped])
    assert shown == [head, *kept] and said.startswith("2 more numbers")
    without_yours = [row[:6] + row[7:] for row in (head, kept[1], dropped[0])]
    assert diff.without_the_unmeasured(without_yours)[0] == without_yours[:2]
    assert diff.without_the_unmeasured([head, *kept])[1] == ""
