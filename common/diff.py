"""Published vs reference vs yours: the tables of `make diff`, `make results` and `make pending`.

    python -m common.diff show [paper …]      one row per published number
    python -m common.diff collect             complete runs -> <paper>/results, figures and the READMEs' results blocks
    python -m common.diff check               are the results blocks what the committed results give?
    python -m common.diff pending             reference runs still missing
    python -m common.diff pairs gmgan --experiment toy --runs R    the runs in R against the reference, seed by seed: is bf16 a shift?

A paper is a folder with a published.yaml.
"""

import dataclasses
import json
import math
import shutil
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from common import run
from common.data import OFFICIAL_COUNTS, official_digest
from common.run import ROOT, UserError

BEGIN, END = "<!-- results: begin (written by `make results`) -->", "<!-- results: end -->"


RECORD = {"experiment": str, "seed": int, "metrics": dict, "config": dict, "config_hash": str, "provenance": dict}
PROVENANCE = {
    "git_commits", "git_dirty", "evaluation", "torch", "device", "threads", "precision", "data", "data_digest", "data_official",
    "train_images", "test_images", "training_seconds", "epochs", "steps_beyond",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One published number. value: as printed; spread: sd or se over `trials` runs, spread_is says which; None: not published."""

    id: str
    where: str
    system: str
    dataset: str
    experiment: str
    metric: str
    unit: str
    better: str
    value: float
    spread: float | None
    spread_is: str | None
    trials: int | None
    needs: str
    also: tuple[str, ...] = ()  # experiments that are other readings of the same entry
    show_best: bool = False  # the published number may be a best one: show our best seed too, which no verdict uses


@dataclass(frozen=True)
class Published:
    """A paper's published.yaml."""

    entries: list[Entry]
    ours: list[dict]  # what we measure beside them
    reference: list[dict]  # the reference runs we want
    stand_ins: dict[str, str]  # the metric that ranks our systems where a column's own cannot be computed
    claims: list[dict]  # what the paper says of its results, each as a comparison of metrics


ITEMS = {  # of published.yaml's other lists: what each item must have, and of which type
    "ours": {"experiment": (str, list), "metric": (str,), "what": (str,)},
    "reference": {"experiment": (str,), "seeds": (int,), "hours": (int, float), "needs": (str,)},
    "claims": {
        "where": (str,), "claim": (str,), "experiment": (str,), "metric": (str,), "is": (str,), "than": (str, int, float, dict),
    },
}  # fmt: skip


def papers() -> list[str]:
    return sorted(path.parent.name for path in ROOT.glob("*/published.yaml"))


def published(paper: str) -> Published:
    """A paper's published.yaml. Raises UserError where it is not whole."""
    path = ROOT / paper / "published.yaml"
    content = run.read_yaml(path)
    try:
        entries = [Entry(**{**entry, "also": tuple(entry.get("also", ()))}) for entry in content["entries"]]
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: an entry is not complete ({error})") from None
    for entry in entries:
        if type(entry.value) not in (int, float) or entry.better not in ("lower", "higher", "equal"):
            raise UserError(f"{path}: {entry.id}: value must be a number and better one of lower, higher, equal")
    lists = {key: content.get(key, []) for key in ITEMS}
    for key, needed in ITEMS.items():
        if not isinstance(lists[key], list):
            raise UserError(f"{path}: {key} is not a list")
        for i, item in enumerate(lists[key], start=1):
            wrong = [name for name, kinds in needed.items() if not isinstance(item, dict) or type(item.get(name)) not in kinds]
            if wrong:
                raise UserError(f"{path}: {key}, item {i}: {', '.join(wrong)}: missing, or not of its kind")
    lists["ours"] = _each_experiment(lists["ours"])
    return Published(entries, **lists, stand_ins=content.get("stand_ins", {}))


def _each_experiment(items: list[dict]) -> list[dict]:
    """One item for each experiment, where several are named, those of one experiment together."""
    several = [(item, [item["experiment"]] if isinstance(item["experiment"], str) else item["experiment"]) for item in items]
    single = [{**item, "experiment": experiment} for item, experiments in several for experiment in experiments]
    order = list(dict.fromkeys(item["experiment"] for item in single))
    return sorted(single, key=lambda item: order.index(item["experiment"]))


def read_records(path: Path) -> list[dict]:
    """The records in a results file or an eval.json. Raises UserError where it is not JSON or a record is not whole."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not valid JSON: damaged; delete it and evaluate again") from None
    records = content if isinstance(content, list) else [content]
    for record in records:
        fits = isinstance(record, dict) and all(isinstance(record.get(key), kind) for key, kind in RECORD.items())
        if not fits or not PROVENANCE <= record["provenance"].keys():
            raise UserError(f"{path}: a record is not whole; delete it and evaluate again")
        for name, value in record["metrics"].items():
            if type(value) not in (int, float) or not math.isfinite(value):
                raise UserError(f"{path}: {name} is {value!r}, not a number; delete it and evaluate again")
    return records


def references(paper: str) -> dict[str, list[dict]]:
    """The committed records by experiment, one per seed."""
    return {path.stem: read_records(path) for path in sorted((ROOT / paper / "results").glob("*.json"))}


def yours(paper: str, runs: Path) -> dict[str, list[dict]]:
    """The evaluated runs on this machine, by experiment."""
    found: dict[str, list[dict]] = {}
    for path in sorted((runs / paper).glob("*/seed*/eval.json")):
        found.setdefault(path.parent.parent.name, []).extend(read_records(path))
    return found


def config_of(paper: str, experiment: str):
    """The committed config of an experiment, or None where it is not written yet."""
    if experiment not in run.experiments(paper):
        return None
    return run.experiment_config(paper, experiment)


def not_comparable(record: dict, config) -> str | None:
    """Why a record's numbers are not the experiment's, or None where they are. config: the committed one."""
    return unfinished(record, config) or other_data(record)


def unfinished(record: dict, config) -> str | None:
    """How a record's run differs from a complete run of the committed config, or None."""
    provenance = record["provenance"]
    theirs, ours = record["config"], dataclasses.asdict(config)
    filled = {k for k in getattr(config, "LEFT_TO_DATA", ()) if ours[k] is None}
    if ":" in (named := str(ours.get("dataset"))) and str(theirs.get("dataset")).startswith(named.partition(":")[0] + ":"):
        filled.add("dataset")  # where a person keeps a folder is no setting
    free = run.without_influence(config) | filled
    differing = [f"{k} {theirs.get(k)}" for k, v in ours.items() if k not in free and theirs.get(k, v) != v]
    other_hash = record["config_hash"] != run.config_hash(config)
    if differing or other_hash and (not filled or theirs.keys() - ours.keys()):
        return f"another config ({', '.join(differing) or 'a field unknown here'})"
    kind = str(theirs.get("dataset")).partition(":")[0]
    if "dataset" in theirs and str(provenance["data"]).partition(":")[0] != kind:
        return f"other data ({provenance['data']}, where the config has {kind})"
    if provenance["epochs"] != config.epochs or provenance["steps_beyond"]:
        beyond = f" and {provenance['steps_beyond']} steps" if provenance["steps_beyond"] else ""
        return f"{provenance['epochs']}{beyond} of {config.epochs} epochs"
    return None


def other_data(record: dict) -> str | None:
    """How the data that a record was measured on differ from the official ones, or None."""
    provenance = record["provenance"]
    name, found = provenance["data"], (provenance["train_images"], provenance["test_images"])
    if name in OFFICIAL_COUNTS and found != OFFICIAL_COUNTS[name]:
        part = 0 if found[0] != OFFICIAL_COUNTS[name][0] else 1
        return f"{found[part]:,} of {OFFICIAL_COUNTS[name][part]:,} images{' of the test set' if part else ''}"
    if not provenance["data_official"]:
        return f"unofficial data ({found[0]:,} + {found[1]:,} images)"
    if provenance["data_digest"] != (official_digest(name) or provenance["data_digest"]):  # None: it cannot be known beforehand
        return f"other data (digest {provenance['data_digest']})"
    return None


def complete(paper: str, runs: Path) -> dict[str, list[dict[str, float]]]:
    """The metrics of every complete run by experiment, one for each seed: the reference's, and those under `runs` for other seeds.

    What is left out is said.
    """
    found: dict[str, dict[int, dict]] = {}
    for source in (yours(paper, runs), references(paper)):
        for experiment, several in source.items():
            config = config_of(paper, experiment)
            for record in several:
                reason = "an experiment that is not there" if config is None else not_comparable(record, config)
                if reason:
                    print(f"{experiment} seed {record['seed']}: left out: {reason}")
                else:
                    found.setdefault(experiment, {})[record["seed"]] = record["metrics"]
    return {experiment: list(seeds.values()) for experiment, seeds in found.items()}


@dataclass(frozen=True)
class Sample:
    """The values of one metric over the seeds of one experiment that count, their precisions, and why others do not count."""

    values: list[float]
    precisions: list[str]
    reasons: list[str]

    def __str__(self) -> str:
        """mean ± s.d. (n, and the precision where it is not the published fp32)."""
        if not self.values:
            return f"not comparable: {'; '.join(self.reasons)}" if self.reasons else "–"
        spread = f" ± {statistics.stdev(self.values):.2g}" if len(self.values) > 1 else ""
        how = "" if self.precisions == ["fp32"] else f", {' and '.join(self.precisions)}"
        return f"{statistics.fmean(self.values):.4g}{spread} (n={len(self.values)}{how})"

    def best(self, entry: Entry) -> float:
        return (min if entry.better == "lower" else max)(self.values)

    def difference(self, entry: Entry) -> str:
        return f"{statistics.fmean(self.values) - entry.value:+.3g}" if self.values else "–"


def counted(paper: str, entry: Entry, config) -> list[str] | None:
    """Reference, difference and verdict of a number that needs no training, since the networks as built have it; else None.

    Such are the `counts` that the module of a config gives: `parameters`, and any other way of counting them, which its `bookkeeping`
    explains.
    """
    module = run.module_of(paper, {"module": getattr(config, "module", "train")})
    found = module.counts(config) if entry.better == "equal" and hasattr(module, "counts") else {}
    if entry.metric not in found:
        return None
    value, built = found[entry.metric], found["parameters"]
    how = "as built" if value == built else f"counted as there: {module.bookkeeping(found)}"
    return [f"{value:,} ({how})", f"{value - entry.value:+,}", verdict([value], entry)]


def sample(records: Iterable[dict], config, metric: str) -> Sample:
    """The comparable values of `metric` among the records. config: the committed one."""
    reasons = {id(record): not_comparable(record, config) for record in records}
    good = [record for record in records if not reasons[id(record)] and metric in record["metrics"]]
    precisions = sorted({record["provenance"]["precision"] for record in good})
    return Sample([record["metrics"][metric] for record in good], precisions, sorted({reason for reason in reasons.values() if reason}))


# ------------------------------------------------------------------------------------------------------------- verdict


def verdict(values: list[float], entry: Entry) -> str:
    """match, better or worse (n ≥ 5), indicative (fewer); for counts, match or differs. values: one a seed, at least one.

    A single published value matches when it lies in the 95 % prediction interval of ours, mean ± t·s·√(1 + 1/n); a published
    mean with a spread over N trials matches when the 95 % Welch interval of the difference of the means contains 0.
    """
    mean, n = statistics.fmean(values), len(values)
    if entry.better == "equal":
        return "match" if all(value == entry.value for value in values) else "differs"
    if n < 5:
        return "indicative"
    s = statistics.stdev(values)
    if entry.spread is None or not entry.trials or entry.trials < 2:
        low, high = prediction_interval(values)
        inside, shown = low <= entry.value <= high, f"95 % of seeds in [{low:.4g}, {high:.4g}]"
    else:
        theirs = entry.spread**2 if entry.spread_is == "se" else entry.spread**2 / entry.trials
        low, high = welch_interval(mean - entry.value, s**2 / n, n, theirs, entry.trials)
        inside, shown = low <= 0 <= high, f"difference in [{low:.3g}, {high:.3g}]"
    word = "match" if inside else "better" if (mean < entry.value) == (entry.better == "lower") else "worse"
    return f"{word} ({shown})"


def welch_interval(difference: float, first: float, n_first: int, second: float, n_second: int) -> tuple[float, float]:
    """The 95 % interval of a difference of two means with squared standard errors `first` and `second`, over n ≥ 2 values each.

    n_second = 1 with an error of 0 stands for a number that is known exactly.
    """
    from scipy.stats import t

    # Welch-Satterthwaite; with no spread on either side the difference of the means is known exactly
    spread = first**2 / (n_first - 1) + (second**2 / (n_second - 1) if n_second > 1 else 0.0)
    freedom = (first + second) ** 2 / spread if spread else 1
    half = float(t.ppf(0.975, freedom)) * math.sqrt(first + second)
    return difference - half, difference + half


def prediction_interval(values: list[float]) -> tuple[float, float]:
    """Where 95 % of further seeds lie, by Student's t: mean ± t·s·√(1 + 1/n). At least two values."""
    from scipy.stats import t

    n, mean = len(values), statistics.fmean(values)
    half = float(t.ppf(0.975, n - 1)) * statistics.stdev(values) * math.sqrt(1 + 1 / n)
    return mean - half, mean + half


# --------------------------------------------------------------------------------------------------------------- table


def table(paper: str, mine: dict[str, list[dict]] | None, only: str | None = None) -> list[list[str]]:
    """The rows of a paper's diff, heads first. mine: the runs of this machine, or None to leave them out (the READMEs).

    only: an experiment; the rows of its data set alone.
    """
    said = published(paper)
    entries, ours = said.entries, said.ours
    reference = references(paper)
    heads = ["where", "system", "experiment", "published", "reference", "difference"]
    rows = [heads + (["yours"] if mine is not None else []) + ["verdict"]]
    configs = {e: config_of(paper, e) for entry in entries for e in (entry.experiment, *entry.also)}
    dataset = getattr(config_of(paper, only), "dataset", None) if only else None
    for entry in entries:
        for experiment in (entry.experiment, *entry.also):
            if only and entry.dataset != dataset:
                continue
            config, needs = configs[experiment], entry.needs
            spread = f" ± {entry.spread:g}" if entry.spread is not None else ""
            value = f"{entry.value:,}" if isinstance(entry.value, int) else f"{entry.value:g}"
            row = [entry.where, entry.system, experiment, f"{value}{spread}{f' {entry.unit}' if entry.unit else ''}"]
            if config is None:
                rows.append([*row, "–", "–", *(["–"] if mine is not None else []), f"not run: to be written; needs {needs}"])
                continue
            if known := counted(paper, entry, config):
                rows.append([*row, *known[:2], *(["–"] if mine is not None else []), known[2]])
                continue
            found = sample(reference.get(experiment, []), config, entry.metric)
            best = f"; the best seed {found.best(entry):.4g}" if entry.show_best and len(found.values) > 1 else ""
            row += [f"{found}{best}", found.difference(entry)]
            if mine is not None:
                here = sample(mine.get(experiment, []), config, entry.metric)
                row.append(f"{here}, {here.difference(entry)}: {verdict(here.values, entry)}" if here.values else str(here))
            word = verdict(found.values, entry) if found.values else "not comparable" if found.reasons else f"not run: needs {needs}"
            rows.append([*row, word])
    for item in ours:
        if only and item["experiment"] != only:
            continue
        config = config_of(paper, item["experiment"])
        found = sample(reference.get(item["experiment"], []), config, item["metric"])
        row = ["ours", item["what"], item["experiment"], "–", str(found), "–"]
        word = "no published number" if found.values else "not comparable" if found.reasons else "not run"
        if mine is not None:
            here = sample(mine.get(item["experiment"], []), config, item["metric"])
            row.append(str(here))
            if here.values and len(found.values) >= 5:
                word = like_reference(here.values, found.values)
        rows.append([*row, word])
    return rows


def without_the_unmeasured(rows: list[list[str]]) -> tuple[list[list[str]], str]:
    """`table`'s rows without those of ours that nobody has measured, and a sentence that says how many they are, or nothing."""

    def measured(row: list[str]) -> bool:  # yours is shown with why it cannot be compared, where it cannot
        return not row[4].startswith(("–", "not comparable")) or any(value != "–" for value in row[6:-1])

    shown = [row for row in rows if row[0] != "ours" or measured(row)]
    left = len(rows) - len(shown)
    return shown, f"{left} more numbers that we measure beside them have no comparable run yet." if left else ""


def rankings(paper: str, mine: dict[str, list[dict]] | None = None) -> list[list[str]]:
    """Whether the order that a published column puts its systems in is ours too, heads first. Without heads where there is none.

    By the column's own metric where every system that ran has it, else by its stand-in, which ranks our systems alone and is
    comparable with nothing published. mine: the runs of this machine, for experiments that have no reference.
    """
    said = published(paper)
    entries, stand_ins = said.entries, said.stand_ins
    reference = references(paper)
    columns: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        columns.setdefault((entry.where, entry.metric), []).append(entry)
    rows = []
    for (where, metric), column in columns.items():
        if column[0].better == "equal":
            continue
        configs = {entry.experiment: config_of(paper, entry.experiment) for entry in column}
        by_metric: dict[str, dict[str, list[float]]] = {}
        for name in filter(None, (metric, stand_ins.get(metric))):
            by_metric[name] = {}
            for entry in column:
                config = configs[entry.experiment]
                for records in (reference, mine or {}):
                    values = sample(records.get(entry.experiment, []), config, name).values if config is not None else []
                    if values:
                        by_metric[name].setdefault(entry.system, values)
        any_value = {system for found in by_metric.values() for system in found}
        name, found = next(((n, f) for n, f in by_metric.items() if f.keys() == any_value), (None, {}))
        ran = [entry for entry in column if entry.system in found]
        if len(ran) < 2:
            continue
        lower = column[0].better == "lower"
        theirs = sorted(ran, key=lambda e: e.value, reverse=not lower)
        ours = sorted(ran, key=lambda e: statistics.fmean(found[e.system]), reverse=not lower)
        pairs = [(a, b) for i, a in enumerate(theirs) for b in theirs[i + 1 :]]
        alike = sum(ours.index(a) < ours.index(b) for a, b in pairs)
        published_order = ", ".join(f"{e.system} {e.value:.4g}" for e in theirs)
        our_order = ", ".join(f"{e.system} {statistics.fmean(found[e.system]):.4g} (n={len(found[e.system])})" for e in ours)
        indicative = "" if min(len(found[e.system]) for e in ran) >= 5 else ", indicative"
        rows.append([where, published_order, our_order, name, f"{alike} of {len(pairs)}{indicative}"])
    return [["where", "published order, best first", "our order", "by", "pairs in the same order"], *rows] if rows else []


def claims(paper: str, mine: dict[str, list[dict]] | None = None) -> list[list[str]]:
    """What the paper says of its results, each claim as a comparison of our numbers, heads first; without heads where there is none.

    A claim names an experiment and a metric, `is` (lower, higher, equal) and `than`: another experiment, whose same metric is meant, or
    {metric: another one of the same runs}, or a number. mine: the runs of this machine, for experiments that have no reference.
    """
    reference, rows = references(paper), []

    def values(experiment: str, metric: str) -> list[float]:
        config = config_of(paper, experiment)
        sources = (reference, mine or {}) if config is not None else ()
        return next((v for source in sources if (v := sample(source.get(experiment, []), config, metric).values)), [])

    for claim in published(paper).claims:
        experiment, metric, than = claim["experiment"], claim["metric"], claim["than"]
        ours = values(experiment, metric)
        if isinstance(than, str):
            against, shown, kind = values(than, metric), than, "seeds"
        elif isinstance(than, dict):
            against, shown, kind = values(experiment, than["metric"]), than["metric"], "paired"
        else:
            against, shown, kind = [float(than)], str(than), "number"
        what = f"{experiment}: {metric} {'=' if claim['is'] == 'equal' else claim['is'] + ' than'} {shown}"
        row = [claim["where"], claim["claim"], what]
        if ours and against:
            row += [plain(ours), *verdict_on_claim(ours, against, claim["is"], kind)]
        rows.append(row if len(row) > 3 else [*row, "–", "–", "not run"])
    return [["where", "claim", "as a number", "ours", "against", "verdict"], *rows] if rows else []


def plain(values: list[float]) -> str:
    """mean ± s.d. (n)."""
    return str(Sample(values, ["fp32"], []))


def verdict_on_claim(ours: list[float], against: list[float], wanted: str, kind: str) -> tuple[str, str]:
    """The other side of a comparison as text, and whether the claim holds.

    It holds, or fails, where the 95 % interval of the difference lies wholly on that side of 0, and is undecided else; with fewer than
    five seeds on a side that is indicative. kind of `against`: other runs ("seeds"), the same runs in order ("paired"), a "number".
    """
    other = plain(against) if len(against) > 1 else f"{against[0]:.4g}"
    if wanted == "equal":
        n = sum(value == against[0] for value in ours)
        return other, f"{'holds' if n == len(ours) else 'fails'} (in {n} of {len(ours)} seeds)"
    if kind == "paired":
        ours, against = [a - b for a, b in zip(ours, against, strict=True)], [0.0]
    difference = statistics.fmean(ours) - statistics.fmean(against)
    if min(len(ours), len(against) if kind == "seeds" else 2) < 2:
        return other, f"one seed: {'as claimed' if (difference < 0 if wanted == 'lower' else difference > 0) else 'not as claimed'}"
    error = statistics.variance(against) / len(against) if len(against) > 1 else 0.0
    low, high = welch_interval(difference, statistics.variance(ours) / len(ours), len(ours), error, len(against))
    holds, fails = (high < 0, low > 0) if wanted == "lower" else (low > 0, high < 0)
    indicative = ", indicative" if len(ours) < 5 or kind == "seeds" and len(against) < 5 else ""
    return other, f"{'holds' if holds else 'fails' if fails else 'undecided'}{indicative} (difference in [{low:.3g}, {high:.3g}])"


def pairs(paper: str, experiment: str, mine: dict[str, list[dict]]) -> list[list[str]]:
    """Your runs of an experiment against the reference runs of the same seeds, metric by metric: is there a shift? Heads first.

    For runs in another precision, or with other code: complete runs of the committed config, at least two seeds on both sides.
    """
    config = config_of(paper, experiment)
    sides = [
        {r["seed"]: r["metrics"] for r in records.get(experiment, []) if not_comparable(r, config) is None}
        for records in (references(paper), mine)
    ]
    seeds = sorted(sides[0].keys() & sides[1].keys())
    if len(seeds) < 2:
        raise UserError(f"{experiment}: {len(seeds)} seed has a complete run here and in the reference; pairs need at least 2")
    rows = [["metric", f"reference, seeds {', '.join(map(str, seeds))}", "yours", "difference of a pair, 95 % interval", ""]]
    for metric in sides[0][seeds[0]]:
        theirs, ours = ([side[seed][metric] for seed in seeds if metric in side[seed]] for side in sides)
        if len(theirs) < len(seeds) or len(ours) < len(seeds):
            continue
        differences = [b - a for a, b in zip(theirs, ours, strict=True)]
        mean = statistics.fmean(differences)
        low, high = welch_interval(mean, statistics.variance(differences) / len(seeds), len(seeds), 0.0, 1)
        verdict = "the same" if low == high == 0 else "no shift seen" if low <= 0 <= high else "shift"
        rows.append([metric, plain(theirs), plain(ours), f"{mean:+.3g} in [{low:.3g}, {high:.3g}]", verdict])
    return rows


def like_reference(here: list[float], reference: list[float]) -> str:
    """Whether your values lie where 95 % of seeds should, by the reference's (n ≥ 5)."""
    low, high = prediction_interval(reference)
    outside = sum(not low <= value <= high for value in here)
    word = f"{outside} of your {len(here)} outside" if outside else "yours as the reference"
    return f"{word} (95 % of seeds in [{low:.4g}, {high:.4g}])"


def as_text(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def as_markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


# ------------------------------------------------------------------------------------------------------------- collect


def collect(runs: Path) -> None:
    """Bring the complete runs made from a clean tree into results/ and figures/, then write the READMEs' results blocks."""
    for paper in papers():
        subsets = {item["experiment"] for item in published(paper).reference if item.get("subset")}
        for experiment, records in yours(paper, runs).items():
            config = config_of(paper, experiment)
            if config is None:
                continue
            # Where published.yaml says so, a run on a part of the data is kept as well; the diff says that it is not comparable.
            refused = unfinished if experiment in subsets else not_comparable
            path = ROOT / paper / "results" / f"{experiment}.json"
            committed = read_records(path) if path.exists() else []
            kept = {record["seed"]: record for record in committed if not refused(record, config)}
            taken = []
            for record in records:
                reason = refused(record, config) or unclean(record)
                if not reason and other_data(record) and record["seed"] in kept and not other_data(kept[record["seed"]]):
                    reason = f"the committed run is on the whole data, this one on {other_data(record)}"
                if reason:
                    print(f"{paper} {experiment} seed {record['seed']}: left out: {reason}")
                else:
                    kept[record["seed"]] = {key: record[key] for key in RECORD}
                    taken.append(record["seed"])
            if not taken:
                continue
            run.write_json(path, [kept[seed] for seed in sorted(kept)])
            print(f"{path.relative_to(ROOT)}: seeds {', '.join(map(str, sorted(kept)))}")
            if min(kept) in taken:  # the pictures of the first seed, never of the prettiest
                for picture in sorted((runs / paper / experiment / f"seed{min(kept)}" / "figures").glob("*.png")):
                    target = ROOT / paper / "figures" / f"{experiment}-{picture.name}"
                    target.parent.mkdir(exist_ok=True)
                    shutil.copyfile(picture, target)
        for picture in sorted((runs / paper / "figures").glob("*.png")):  # those that compare runs
            (ROOT / paper / "figures").mkdir(exist_ok=True)
            shutil.copyfile(picture, ROOT / paper / "figures" / picture.name)
    for path, text in blocks().items():
        with run.atomic(path) as file:
            file.write(text)
        print(f"{path.relative_to(ROOT)}: results block written")


def unclean(record: dict) -> str | None:
    """Why a record cannot be traced to commits, or None where it can."""
    for part, provenance in (("trained", record["provenance"]), ("evaluated", record["provenance"]["evaluation"])):
        if provenance["git_commit"] is None or provenance["git_dirty"] is not False:
            return f"{part} from a tree that was not clean"
    return None


def blocks() -> dict[Path, str]:
    """The READMEs with their results blocks as the committed results give them."""
    written = {}
    glance = []
    for paper in papers():
        rows = table(paper, None)
        numbers = [row for row in rows[1:] if row[3] != "–"]
        done = [row for row in numbers if not row[4].startswith(("–", "not comparable"))]
        left = len(numbers) - len(done)
        rest = f"{left} more of the paper's numbers have no comparable run yet; all, and what we measure beside them: `make diff`."
        glance += [f"**[{paper}]({paper}/README.md)**", *([as_markdown([rows[0], *done])] if done else []), rest]
        order = rankings(paper)
        said = claims(paper)
        shown, waiting = without_the_unmeasured(rows)
        tables = [as_markdown(shown), waiting, *(as_markdown(block) for block in (order, said) if block)]
        body = [*tables, reference_runs(paper), pictures(paper)]
        path = ROOT / paper / "README.md"
        written[path] = with_block(path, "\n\n".join(part for part in body if part))
    path = ROOT / "README.md"
    written[path] = with_block(path, "\n\n".join(glance))
    return written


def reference_runs(paper: str) -> str:
    """One row per experiment: what its numbers come from."""
    rows = [["reference runs", "seeds", "epochs", "precision", "torch", "device, threads", "wall clock of training, mean", "commits"]]
    for experiment, records in references(paper).items():
        provenances = [record["provenance"] for record in records]

        def each(key: str, provenances=provenances) -> str:
            values = [v for p in provenances for v in (p[key] if isinstance(p[key], list) else [p[key]])]
            return ", ".join(dict.fromkeys(map(str, values)))

        commits = dict.fromkeys(c[:7] for p in provenances for c in p["git_commits"])
        minutes = statistics.fmean(p["training_seconds"] for p in provenances) / 60
        seeds = ", ".join(str(record["seed"]) for record in records)
        where = f"{each('device')}, {each('threads')}"
        rows.append([experiment, seeds, each("epochs"), each("precision"), each("torch"), where, f"{minutes:.1f} min", ", ".join(commits)])
    return as_markdown(rows) if len(rows) > 1 else ""


def pictures(paper: str) -> str:
    """The figures that compare runs, then those of the reference runs, first seed, folded by experiment."""
    of_runs = {p for e in references(paper) for p in (ROOT / paper / "figures").glob(f"{e}-*.png")}
    shared = sorted(p for p in (ROOT / paper / "figures").glob("*.png") if p not in of_runs)
    parts = [f"![{p.stem}](figures/{p.name})" for p in shared]
    for experiment in references(paper):
        files = sorted(p for p in (ROOT / paper / "figures").glob(f"{experiment}-*.png") if experiment_of(paper, p) == experiment)
        images = "\n".join(f"![{p.stem}](figures/{p.name})" for p in files)
        if images:
            parts.append(f"<details><summary>Figures of {experiment}</summary>\n\n{images}\n\n</details>")
    return "\n".join(parts)


def experiment_of(paper: str, picture: Path) -> str:
    """mnist-first-labels-samples.png is of mnist-first-labels, not of mnist."""
    return max((e for e in references(paper) if picture.name.startswith(f"{e}-")), key=len, default="")


def with_block(path: Path, content: str) -> str:
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UserError(f"{path}: expected one line {BEGIN!r} and one {END!r} around the results block")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{rest.split(END)[1]}"


# ------------------------------------------------------------------------------------------------------------- pending


def pending(runs: Path) -> list[list[str]]:
    """The reference runs still missing, the most valuable first: experiment, seeds, needs, cost, and how far they are here."""
    rows = [["target", "missing seeds", "needs", "cost of a seed", "here"]]
    for paper in papers():
        records = references(paper)
        for item in published(paper).reference:
            experiment, seeds = item["experiment"], range(item["seeds"])
            config = config_of(paper, experiment)
            good = [r for r in records.get(experiment, []) if config is not None and not not_comparable(r, config)]
            missing = sorted(set(seeds) - {r["seed"] for r in good})
            if not missing:
                continue
            seconds = [r["provenance"]["training_seconds"] for r in good]
            cost = f"{statistics.fmean(seconds) / 3600:.2f} h measured" if seconds else f"{item['hours']:g} h estimated"
            here = []
            for seed in missing:
                log = runs / paper / experiment / f"seed{seed}" / "log.csv"
                if log.exists() and config is not None:
                    here.append(f"seed {seed}: epoch {len(log.read_text().splitlines()) - 1} of {config.epochs}")
            state = "; ".join(here) or ("–" if config is not None else "to be written")
            rows.append([f"{paper}-{experiment}", ", ".join(map(str, missing)), item["needs"], cost, state])
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = run.Parser(prog="python -m common.diff")
    parser.add_argument("what", choices=("show", "collect", "check", "pending", "pairs"))
    parser.add_argument("papers", nargs="*", help="show: these alone; pairs: one")
    parser.add_argument("--experiment", help="show: the rows of its data set alone; pairs: this one, against the reference seed by seed")
    parser.add_argument("--runs", type=run.as_path, default=Path("runs"))
    options = parser.parse_all(argv)
    if options.what == "pairs" and (len(options.papers) != 1 or not options.experiment):
        raise UserError("pairs takes one paper and --experiment")
    if options.what not in ("show", "pairs") and (options.papers or options.experiment):
        raise UserError(f"{options.what} takes no papers and no --experiment")
    for paper in options.papers:
        if paper not in papers():
            raise UserError(f"unknown paper {paper!r}{run.nearest(paper, papers())}")
    if options.what == "show":
        for paper in options.papers or papers():
            if options.experiment:
                run.check_experiment(paper, options.experiment)
            mine = yours(paper, options.runs)
            rows = table(paper, mine, options.experiment)
            waiting = ""
            if not options.experiment:
                rows, waiting = without_the_unmeasured(rows)
            print(f"\n{paper}\n{as_text(rows) if len(rows) > 1 else f'no published number for {options.experiment}'}")
            if waiting:
                print(waiting)
            for more in (rankings(paper, mine), claims(paper, mine) if not options.experiment else []):
                if more:
                    print(f"\n{as_text(more)}")
    elif options.what == "pairs":
        run.check_experiment(options.papers[0], options.experiment)
        print(as_text(pairs(options.papers[0], options.experiment, yours(options.papers[0], options.runs))))
    elif options.what == "collect":
        collect(options.runs)
    elif options.what == "check":
        stale = [str(path.relative_to(ROOT)) for path, text in blocks().items() if path.read_text(encoding="utf-8") != text]
        if stale:
            raise run.RunFailed(f"results blocks out of date: {', '.join(stale)}; run make results")
    else:
        rows = pending(options.runs)
        print(as_text(rows) if len(rows) > 1 else "no reference run is missing")


if __name__ == "__main__":
    run.exit_with(main)
