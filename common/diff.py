"""Published vs reference vs yours: the tables of `make diff`, `make results` and `make pending`.

published.csv has one line per published number. also: other experiments that may be what the paper ran. better: lower,
higher, or equal (a parameter count). spread_is: sd or se, over `trials` runs. best: the paper may have printed its best
run, so our best seed is shown beside our mean. A line without an experiment is a metric that only we measure: it has a
row for each experiment with a record of the metric.
claims.csv: the paper claims that `metric` of `experiment` is lower than, higher than or equal to something: a number
(than), or `than_metric` (empty: the same metric) of the experiment `than` (empty: the same runs).
pending.csv: the reference runs that we want, the most valuable first; hours per seed on two CPU cores, estimated.
"""

import csv
import importlib
import json
import re
import shlex
import shutil
import sys
import textwrap
from collections import Counter, namedtuple
from itertools import chain, zip_longest
from math import isfinite
from pathlib import Path
from statistics import fmean, stdev, variance

import torch
from scipy.stats import t as student

from common import run
from common.data import OFFICIAL_COUNTS
from common.run import ROOT, UserError

BEGIN, END = "<!-- results: begin (written by `make results`) -->", "<!-- results: end -->"
RECORD = ("experiment", "seed", "metrics", "config", "config_hash", "provenance")
FACTS = ("epochs", "precision", "torch", "device", "threads")  # keys of the provenance that RESULTS.md shows
CLAIM = ("where", "claim", "as a number", "ours", "against", "verdict")
Row = namedtuple("Row", "where system experiment metric published reference yours verdict")  # all str


def papers() -> list[str]:
    return sorted(path.parent.name for path in ROOT.glob("*/published.csv"))


def read_csv(paper: str, name: str) -> list[dict]:
    """The lines of <paper>/<name>.csv as {column: cell}. Numbers become floats, empty cells None."""
    path = ROOT / paper / f"{name}.csv"
    number = re.compile(r"\d+(\.\d+)?")
    try:
        lines = csv.DictReader(path.read_text(encoding="utf-8").splitlines()) if path.exists() else []
        return [{k: float(v) if number.fullmatch(v) else v or None for k, v in line.items()} for line in lines]
    except (ValueError, TypeError):
        raise UserError(f"{path}: a line has a cell too few or too many, or it is no text") from None


def glossary(paper: str) -> dict[str, list[str]]:
    """{name in log.csv or eval.json: [what it is, its unit, whether lower or higher is better]}, sorted."""
    known = {name: [what, "", ""] for name, what in importlib.import_module(f"{paper}.eval").COURSE.items()}
    known |= {n["metric"]: [n["what"], n["unit"] or "", n["better"] or ""] for n in read_csv(paper, "published")}
    return dict(sorted(known.items()))


def readings(number: dict) -> list[str]:
    return " ".join(filter(None, [number["experiment"], number["also"]])).split()


def read_records(path: Path) -> list[dict]:
    """The records in a results file or an eval.json. Raises UserError if one is incomplete."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        records = [{key: r[key] for key in RECORD} for r in (content if isinstance(content, list) else [content])]
        if all(isinstance(r["seed"], int) and all(map(isfinite, r["metrics"].values())) for r in records):
            return records
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{path}: cannot be read as results; evaluate the run again")


def config_of(paper: str, experiment: str):
    """The committed config of an experiment, or None if there is none."""
    return run.experiment_config(paper, experiment) if experiment in run.experiments(paper) else None


def not_comparable(record: dict, config) -> str | None:
    """Why a record does not count as a result of the experiment; None if it counts. config: the committed one."""
    if config is None:
        return "an experiment without a config"
    made, theirs, ours = record["provenance"], record["config"], vars(config)
    (kind, _, _), (wanted, folder, _) = (values["dataset"].partition(":") for values in (theirs, ours))
    filled = {key for key in getattr(config, "LEFT_TO_DATA", ()) if ours[key] is None}
    filled |= {"dataset"} if folder and kind == wanted else set()  # the path of an image folder is no setting
    differing = [key for key in ours if key not in {"epochs", *filled} and theirs.get(key, ours[key]) != ours[key]]
    unknown = record["config_hash"] != run.config_hash(config) and (not filled or theirs.keys() - ours.keys())
    fields = ", ".join(f"{key} {theirs[key]}" for key in differing) or "a field unknown here"
    data, images = made["data"], (made["train_images"], made["test_images"])
    counts = zip(images, OFFICIAL_COUNTS.get(data, images), ("", " of the test set"), strict=True)
    few = [f"{n:,} of {m:,} images{where}" for n, m, where in counts if n != m]
    steps = made["steps_beyond"]
    epochs = f"{made['epochs']}{f' and {steps} steps' if steps else ''} of {config.epochs} epochs"
    reasons = [
        (differing or unknown, f"another config ({fields})"),
        (data.partition(":")[0] != kind, f"other data ({data}, where the config has {kind})"),
        (steps or made["epochs"] != config.epochs, epochs),
        (few, "".join(few[:1])),
        (not made["data_official"], f"unofficial data ({images[0]:,} + {images[1]:,} images)"),
    ]
    return next((reason for holds, reason in reasons if holds), None)


def read(paper: str, runs: Path | None = None) -> list[dict]:
    """The committed records, or with `runs` those under that folder. Each gets a `reason` if it does not count.

    A seed counts once, and so does a training, even if its folder was copied. beside: the experiment in pending.csv
    that a record is compared with. An experiment that is not there is compared with the one whose name its own name
    begins with, or else with the first on the same data.
    """
    found, seen, known = [], {}, sorted(line["experiment"] for line in read_csv(paper, "pending"))
    for path in sorted((runs / paper).glob("*/*/eval.json") if runs else (ROOT / paper / "results").glob("*.json")):
        for r in read_records(path):
            name, folder, seed = r["experiment"], path.parent, r["seed"]
            form = re.fullmatch(r"seed\d+(?:-(.+))?", folder.name)
            begun = sorted((k for k in known if f"{name}-".startswith(f"{k}-")), key=len, reverse=True)
            alike = (k for k in known if getattr(config_of(paper, k), "dataset", None) == r["config"]["dataset"])
            try:
                beside = next(chain(begun, alike), name)  # lazy: configs are loaded only for an unknown name
                reason = not_comparable(r, config_of(paper, beside))
                keys = (name, seed), (name, r["provenance"].get("weights", (folder, seed)))
            except (KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{path}: a record of another form ({error!r}); evaluate the run again") from None
            if runs and not form:
                reason = "its folder is not named seed<k>"
            elif runs and form[1]:  # a variant, made with other flags; its seeds share a row
                name, reason = f"{name}, {form[1]}", reason or f"another config ({form[1]})"
            elif twin := next((seen[key] for key in keys if key in seen), None):
                reason = f"the seed or the weights of {twin}"
            elif not reason:
                seen.update(dict.fromkeys(keys, folder))
            label = f"{name} seed {seed}" + ("" if beside == r["experiment"] else f" (beside {beside})")
            more = {"reason": reason, "folder": folder, "beside": beside, "label": label, "base": r["experiment"]}
            found.append(r | more | {"experiment": name})
    return found


def complete(paper: str, runs: Path) -> dict[str, list[dict[str, float]]]:
    """{experiment: the metrics of each seed}, of complete runs; a committed seed comes before one in `runs`.

    Prints which runs are left out, and why."""
    found = {}
    for r in read(paper, runs) + read(paper):
        if r["reason"]:
            print(f"{r['label']}: left out: {r['reason']}")
        else:
            found.setdefault(r["experiment"], {})[r["seed"]] = r["metrics"]
    return {experiment: list(seeds.values()) for experiment, seeds in found.items()}


def interval(center: float, *errors: tuple[float, float]) -> tuple[float, float]:
    """95 % interval by Student's t with Welch-Satterthwaite degrees of freedom. errors: (squared error, values)."""
    total, spread = sum(e for e, _ in errors), sum(e**2 / (n - 1) for e, n in errors if e)
    half = float(student.ppf(0.975, total**2 / spread)) * total**0.5 if spread else 0.0
    return center - half, center + half


def verdict(values: list[float], number: dict) -> str:
    """match, better or worse (n ≥ 5 seeds), or indicative (fewer). For counts match or differs. values: one per seed.

    A single published value matches if it lies in the 95 % prediction interval of our seeds, mean ± t·s·√(1 + 1/n). A
    published mean with a spread over N trials matches if the 95 % Welch interval of the difference contains 0.
    """
    mean, n, value, spread, trials = fmean(values), len(values), *(number[key] for key in ("value", "spread", "trials"))
    if number["better"] == "equal":
        return "match" if set(values) == {value} else "differs"
    if n < 5:
        return "indicative"
    if spread is None or trials is None:
        low, high = interval(mean - value, (variance(values) * (1 + 1 / n), n))
        shown = f"95 % of seeds in [{value + low:.4g}, {value + high:.4g}]"
    else:
        theirs = spread**2 / (1 if number["spread_is"] == "se" else trials)
        low, high = interval(mean - value, (variance(values) / n, n), (theirs, trials))
        shown = f"difference in [{low:.3g}, {high:.3g}]"
    word = "match" if low <= 0 <= high else "better" if (mean < value) == (number["better"] == "lower") else "worse"
    return f"{word} ({shown})"


def verdict_on_claim(ours: list[float], against: list[float] | float, wanted: str) -> str:
    """holds or fails if the 95 % interval of the difference lies on one side of 0; otherwise undecided.

    against: the values of other seeds, or one exact number.  wanted: lower, higher or equal.
    """
    theirs, n = against if isinstance(against, list) else [against], len(ours)
    if wanted == "equal":
        return f"{'holds' if set(ours) == set(theirs) else 'fails'} (in {ours.count(theirs[0])} of {n} seeds)"
    difference, m = fmean(ours) - fmean(theirs), len(theirs)
    fewest = min(n, m) if theirs is against else n
    if fewest < 2:
        return f"one seed: {'' if difference and (difference < 0) == (wanted == 'lower') else 'not '}as claimed"
    low, high = interval(difference, (variance(ours) / n, n), (variance(theirs) / m if m > 1 else 0.0, m))
    word = "undecided" if low <= 0 <= high else "holds" if (high < 0) == (wanted == "lower") else "fails"
    return f"{word}{', indicative' if fewest < 5 else ''} (difference in [{low:.3g}, {high:.3g}])"


def sample(records: list[dict], name: str, metric: str, number: dict | None = None) -> tuple[list[float], str]:
    """The values of a metric over the runs that count, and a text: mean ± s.d. (n, precision). If no run counts, the
    list is empty and the text describes the others. number: the line of published.csv, to print the difference from it.
    """
    those = [r for r in records if r["experiment"] == name and metric in r["metrics"]]
    those = (good := [r for r in those if not r["reason"]]) or those
    values = [float(f"{r['metrics'][metric]:.12g}") for r in those]  # sums in another order differ in the last digit
    precisions = {r["provenance"]["precision"] for r in those}
    if not values:
        return [], ""
    spread = f" ± {stdev(values):.2g}" if len(values) > 1 else ""
    how = "" if precisions == {"fp32"} else f", {' and '.join(sorted(precisions))}"
    text = f"{fmean(values):.4g}{spread} (n={len(values)}{how})"
    if number and number["value"] is not None and good:
        text += f", {fmean(values) - number['value']:+.3g}"
    if number and number["best"] and len(values) > 1:
        text += f"; the best seed {(min if number['better'] == 'lower' else max)(values):.4g}"
    return values if good else [], text


def table(paper: str, reference: list[dict], mine: list[dict]) -> list[Row]:
    """One row for each experiment of a line of published.csv, and one for each of the user's own beside it."""
    rows, numbers = [], read_csv(paper, "published")
    named = {(number["metric"], name) for number in numbers for name in readings(number)}
    hours = {line["experiment"]: f" ({line['hours']:g} h a seed)" for line in read_csv(paper, "pending")}
    for number in numbers:
        value, better, unit, metric = (number[key] for key in ("value", "better", "unit", "metric"))
        what = [number["what"], unit, f"{better} is better" if better in ("lower", "higher") else ""]
        spread = "" if number["spread"] is None else f" ± {number['spread']:g}"
        printed = "" if value is None else f"{value:,.12g}{spread} {unit or ''}".strip()
        measured = {r["beside"] for r in reference + mine if metric in r["metrics"]}
        for name in readings(number) or sorted(name for name in measured if (metric, name) not in named):
            values, ours = sample(reference, name, metric, number)
            if better == "equal":
                with torch.device("meta"):  # no memory, no initial weights: only the counts are needed
                    model = config_of(paper, name).build()
                values, built = [getattr(model, metric)], sum(p.numel() for p in model.parameters())
                ours = f"{values[0]:,} (as built)" if values[0] == built else f"{values[0]:,} (built: {built:,})"
            why = "; ".join({r["reason"] for r in reference if r["experiment"] == name} - {None})
            missing = f"not comparable: {why}" if why else f"not run: needs {number['needs']}{hours.get(name, '')}"
            word = (verdict(values, number) if values else missing) if printed else ""
            for experiment in dict.fromkeys([name, *(r["experiment"] for r in mine if r["beside"] == name)]):
                here, text = sample(mine, experiment, metric, number)
                if here and printed:
                    text += f": {verdict(here, number)}"
                elif here and len(values) > 4:
                    low, high = interval(fmean(values), (variance(values) * (1 + 1 / len(values)), len(values)))
                    inside = sum(low <= x <= high for x in here)
                    text += f": {inside} of {len(here)} in our 95 % interval [{low:.4g}, {high:.4g}]"
                facts = ", ".join(filter(None, what)), printed, ours, text, word
                rows.append(Row(number["where"], number["system"] or "", experiment, *facts))
    return rows


def claims(paper: str, reference: list[dict], mine: list[dict]) -> list[list[str]]:
    """One row for each claim of the paper, checked on the reference runs, or on yours if there are none."""
    rows, ran = [], {r["experiment"] for r in reference if not r["reason"]}
    records = reference + [r for r in mine if r["experiment"] not in ran]
    for claim in read_csv(paper, "claims"):
        name, metric, than, other = (claim[key] for key in ("experiment", "metric", "than", "than_metric"))
        (ours, shown), (against, text) = sample(records, name, metric), sample(records, than or name, other or metric)
        if isinstance(than, float):
            against, text = than, (than := f"{than:g}")
        pairs = (ours, against) if than else ([a - b for a, b in zip(ours, against, strict=True)], 0.0)
        word = "not run" if [] in pairs else verdict_on_claim(*pairs, claim["is"])
        sign = "=" if claim["is"] == "equal" else f"{claim['is']} than"
        against_what = f"{than}: {other}" if than and other else than or other
        rows.append([claim["where"], claim["claim"], f"{name}: {metric} {sign} {against_what}", shown, text, word])
    return rows


def tally(rows: list[Row]) -> str:
    """How many rows with a published number match, differ, and so on. A number with two readings has two rows."""
    words = Counter(re.match("[a-z ]*", row.verdict)[0].strip() for row in rows if row.published)
    words["differ"] = words["better"] + words["worse"] + words["differs"]
    return ", ".join(f"{words[word]} {word}" for word in ("match", "differ", "indicative", "not comparable", "not run"))


def as_text(rows: list[list[str]]) -> str:
    """A table as text; rows[0] are the heads. Leaves out empty columns and wraps the widest to fit the terminal."""
    rows = list(zip(*(column for column in zip(*rows, strict=True) if any(column[1:])), strict=True))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    while sum(widths) + 2 * len(widths) - 2 > shutil.get_terminal_size((120, 24)).columns and max(widths) > 1:
        widths[widths.index(max(widths))] -= 1
    lines = []
    for cells in [rows[0], ["-" * width for width in widths], *rows[1:]]:
        for parts in zip_longest(*map(textwrap.wrap, cells, widths), fillvalue=""):
            lines.append("  ".join(map(str.ljust, parts, widths)).rstrip())
    return "\n".join(lines)


def as_markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def course(paper: str, path: Path) -> tuple[str, dict[int, float]]:
    """The first metric of published.csv that log.csv has ('' if none), and {epoch: its value}."""
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    metrics = (number["metric"] for number in read_csv(paper, "published"))
    metric = next((m for m in metrics if rows and m in rows[0]), "")
    return metric, {int(row["epoch"]): float(row[metric]) for row in rows if metric and row[metric]}


def read_curves(path: Path) -> dict[int, dict[str, float]]:
    """results/<experiment>.csv as {epoch: {seed: the main metric}}; empty if there is no such file."""
    rows = csv.DictReader(path.read_text(encoding="utf-8").splitlines()) if path.exists() else []
    return {int(row.pop("epoch")): {seed: float(value) for seed, value in row.items() if value} for row in rows}


def midway(paper: str, runs: Path, only: str | None) -> list[str]:
    """One line for each unfinished run: its main metric beside the reference's at the same epoch."""
    lines = []
    for log in sorted((runs / paper).glob("*/seed*/log.csv")):
        name = log.parent.parent.name
        if only not in (None, name) or log.with_name("eval.json").exists():
            continue
        if theirs := read_curves(ROOT / paper / "results" / f"{name}.csv"):
            metric, mine = course(paper, log)
            if epoch := max(mine.keys() & theirs.keys(), default=0):
                ours = ", ".join(f"{value:.4g}" for value in theirs[epoch].values())
                lines.append(f"{name} {log.parent.name}, epoch {epoch}: {metric} {mine[epoch]:.4g}; reference: {ours}")
    return lines


def write_curves(paper: str, experiment: str, records: list[dict]) -> None:
    """Write results/<experiment>.csv: the log's main metric by epoch, one column per seed. Keeps earlier seeds."""
    path = ROOT / paper / "results" / f"{experiment}.csv"
    table = read_curves(path)
    for r in records:
        if (log := r["folder"] / "log.csv").exists():
            for epoch, value in course(paper, log)[1].items():
                table.setdefault(epoch, {})[f"seed{r['seed']}"] = value
    if table:
        seeds = sorted({seed for row in table.values() for seed in row}, key=lambda seed: int(seed[4:]))
        with run.atomic(path) as file:
            shown = {epoch: {seed: f"{value:.5g}" for seed, value in row.items()} for epoch, row in table.items()}
            lines = ([epoch, *(shown[epoch].get(seed, "") for seed in seeds)] for epoch in sorted(shown))
            csv.writer(file, lineterminator="\n").writerows([["epoch", *seeds], *lines])


def show(paper: str, runs: Path, only: str | None, everything: bool) -> None:
    """Print why some runs do not count, the rows that have a result (or all), and how many numbers match."""
    if only:
        run.check_experiment(paper, only)
    mine, reference, reasons = [r for r in read(paper, runs) if only in (None, r["base"])], read(paper), {}
    for r in mine:
        reasons.setdefault(r["reason"], []).append(r["label"])
    reasons.pop(None, None)
    notes = [["yours", "why"], *([", ".join(names), f"not comparable: {why}"] for why, names in reasons.items())]
    wanted = {only, *(r["experiment"] for r in mine)}
    rows = [row for row in table(paper, reference, mine) if only is None or row.experiment in wanted]
    said = [] if only else claims(paper, reference, mine)
    shown = [row for row in rows if everything or row.reference or row.yours]
    held = [cells for cells in said if everything or cells[-1] != "not run"]
    print(f"\n{paper}")
    table_rows = [[f"{r.where}: {r.system}" if r.system else r.where, *r[2:]] for r in shown]
    for lines in (notes, [("number", *Row._fields[2:]), *table_rows], [CLAIM, *held]):
        print(as_text(lines) + "\n" if len(lines) > 1 else "")
    for line in midway(paper, runs, only):
        print(line)
    if only and not shown:
        print(f"no result of {only} stands in the table; an evaluated run has its own in its eval.json")
    if any(row.published for row in rows):
        print(f"published numbers: {tally(rows)}")
    if more := len(rows) + len(said) - len(shown) - len(held):
        print(f"{more} more rows have no result yet; --all (make diff ALL=1) shows them")


def collect(runs: Path) -> None:
    """Merge the complete runs made from a clean tree into results/ and figures/, then write the pages."""
    (ROOT / "runs").mkdir(exist_ok=True)
    with run.locked(ROOT / "runs" / ".results.lock", "another process collects results: waiting for it"):
        for paper in papers():
            kept = {(r["experiment"], r["seed"]): r for r in read(paper)}  # only a new run of the seed replaces one
            mine, figures = read(paper, runs), [(runs / paper / "figures", "")]  # figures that compare several runs
            for r in mine:
                sessions = r["provenance"], r["provenance"]["evaluation"]
                if any(s["git_commit"] is None or s["git_dirty"] is not False for s in sessions):
                    r["reason"] = r["reason"] or "trained or evaluated from a tree that was not clean"
                if r["reason"]:
                    print(f"{r['folder']}: left out: {r['reason']}")
                else:
                    kept[r["experiment"], r["seed"]] = r
            for name in sorted({r["experiment"] for r in mine if not r["reason"]}):
                records = [kept[key] for key in sorted(kept) if key[0] == name]
                run.write_json(ROOT / paper / "results" / f"{name}.json", [{k: r[k] for k in RECORD} for r in records])
                write_curves(paper, name, records)
                print(f"{paper}/results/{name}.json: seeds {', '.join(str(r['seed']) for r in records)}")
                figures.append((records[0]["folder"] / "figures", f"{name}-"))  # always the lowest seed's
            for path, prefix in [(path, prefix) for folder, prefix in figures for path in folder.glob("*.png")]:
                with run.atomic(ROOT / paper / "figures" / f"{prefix}{path.name}", "wb") as file:
                    file.write(path.read_bytes())
        for path, text in pages().items():
            with run.atomic(path) as file:
                file.write(text)


def pages() -> dict[Path, str]:
    """{path: text} of each RESULTS.md and README, the latter with its results block, from the committed results."""
    heads = ["where", "system", "published", "ours, n", "verdict"]
    blocks, written, glance, everything = {}, {}, [["paper", *heads]], []
    for paper in papers():
        records, folder, figures = read(paper), ROOT / paper, {}
        rows, said = table(paper, records, []), claims(paper, records, [])
        numbers, beside = [r for r in rows if r.published], [r for r in rows if r.reference and not r.published]
        done = [row for row in numbers if not row.verdict.startswith("not ")]
        everything += numbers
        short = [[r.where, f"{r.system} ({r.experiment})", r.published, r.reference, r.verdict] for r in done]
        missing = [r for r in numbers if r[:2] not in {row[:2] for row in done}]  # no reading has a run
        left = {r[:2]: r.verdict.partition(" (")[0] for r in missing}  # without the hours
        waiting = "; ".join(f"{n} {why}" for why, n in Counter(left.values()).items()) or "none"
        blocks[folder] = f"{as_markdown([heads, *short])}\n\n" * bool(short) + (
            f"Published numbers without a comparable run of ours: {waiting}.\n\n"
            "[RESULTS.md](RESULTS.md) has every number, claim, reference run and figure."
        )
        glance += [[f"[{paper}]({paper}/README.md)", *cells] for cells in short]
        names = [["name", "what", "unit", "better"]]
        names += [[f"`{name}`", *words] for name, words in glossary(paper).items()]
        runs = [["experiment", "seed", *FACTS, "minutes", "commits"]]
        for r, made in ((r, r["provenance"]) for r in records):
            facts = [", ".join(map(str, made[key])) if isinstance(made[key], list) else str(made[key]) for key in FACTS]
            commits = ", ".join(commit[:7] for commit in made["git_commits"])
            runs.append([r["experiment"], str(r["seed"]), *facts, f"{made['training_seconds'] / 60:.1f}", commits])
        for path in sorted((folder / "figures").glob("*.png")):  # mnist-adgm-samples.png belongs to mnist-adgm
            owners = [r["experiment"] for r in records if path.name.startswith(f"{r['experiment']}-")]
            image = f"![{path.stem}](figures/{path.name})"
            figures.setdefault(max(owners, key=len, default="several runs"), []).append(image)
        parts = [
            f"# Results: {paper}\n\nWritten by `make results`; not to be edited.",
            f"## Published numbers\n\n{as_markdown([Row._fields, *numbers])}",
            f"## What we measure beside them\n\n{as_markdown([Row._fields, *beside])}",
            f"## What the paper says\n\n{as_markdown([CLAIM, *said])}" if said else "",
            f"## Reference runs\n\n{as_markdown(runs)}",
            f"## Names in eval.json and log.csv\n\n{as_markdown(names)}\n\n## Figures",
        ]
        for name, images in figures.items():
            parts.append("\n".join([f"<details><summary>{name}</summary>\n", *images, "\n</details>"]))
        written[folder / "RESULTS.md"] = "\n\n".join(filter(None, parts)) + "\n"
    blocks[ROOT] = f"{as_markdown(glance)}\n\nOf {len(everything)} rows with a published number: {tally(everything)}."
    for folder, block in blocks.items():
        before, _, rest = (path := folder / "README.md").read_text(encoding="utf-8").partition(BEGIN)
        if END not in rest:
            raise UserError(f"{path}: the lines {BEGIN} and {END} are not there")
        written[path] = f"{before}{BEGIN}\n\n{block}\n\n{END}{rest.partition(END)[2]}"
    return written


def pending(names: list[str], runs: Path, flags: list[str]) -> tuple[list[list[str]], list[str]]:
    """The missing reference runs: one row per experiment, and one shell line per seed that trains and evaluates it."""
    rows, lines = [["target", "missing seeds", "needs", "cost of a seed", "here"]], []
    for paper in names:
        records = read(paper)
        for rank, line in enumerate(read_csv(paper, "pending")):
            name, module = line["experiment"], run.module_of(paper, line["experiment"])
            good = {r["seed"]: r["provenance"] for r in records if r["experiment"] == name and not r["reason"]}
            seeds = [str(seed) for seed in range(int(line["seeds"])) if seed not in good]
            hours = [made["training_seconds"] / 3600 for made in good.values()]
            cost = f"{fmean(hours):.2f} h measured" if hours else f"{line['hours']:g} h estimated"
            logs = {seed: runs / paper / name / f"seed{seed}" / "log.csv" for seed in seeds}
            done = {seed: len(log.read_text().splitlines()) - 1 for seed, log in logs.items() if log.exists()}
            here = "; ".join(f"seed {seed}: epoch {epoch}" for seed, epoch in done.items())
            rows += [[f"{paper}-{name}", ", ".join(seeds), line["needs"], cost, here]] if seeds else []
            for seed in seeds:
                train = [f"{paper}.{module}", name.removesuffix(f"-{module}"), "--seed", seed, *flags]
                evaluate = [f"{paper}.eval", name, "--seed", seed, *(f for f in flags if "--precision=" not in f)]
                lines.append((rank, " && ".join(shlex.join([sys.executable, "-m", *w]) for w in (train, evaluate))))
    return rows, [line for _, line in sorted(lines, key=lambda ranked: ranked[0])]


def main(argv: list[str] | None = None) -> None:
    parser = run.Parser(prog="python -m common.diff")
    parser.add_argument("what", choices=("show", "collect", "check", "pending", "commands"))
    parser.add_argument("papers", nargs="*", help="show, pending, commands: these alone")
    parser.add_argument("--experiment", help="show: its rows alone")
    parser.add_argument("--all", action="store_true", help="show: the rows without a result as well")
    parser.add_argument("--runs", type=run.as_path, default=Path("runs"))
    for flag in (passed := ("data", "device", "threads", "inception", "precision")):
        parser.add_argument(f"--{flag}", help="commands: passed on")
    parser.add_argument("--flags", type=shlex.split, default=[], help="commands: any others, as --flags='--epochs 2'")
    options = parser.parse_all(argv)
    what, only, runs = options.what, options.experiment, options.runs
    for paper in set(options.papers) - set(papers()):
        raise UserError(f"unknown paper {paper!r}{run.nearest(paper, papers())}")
    names = options.papers or [paper for paper in papers() if only in (None, *run.experiments(paper))] or papers()
    if what == "show":
        for paper in names:
            show(paper, runs, only, options.all)
    elif what == "collect":
        collect(runs)
    elif what == "check":
        stale = [path for path, text in pages().items() if not path.exists() or path.read_text("utf-8") != text]
        if stale:
            names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
            raise run.RunFailed(f"out of date: {names}; run make results")
    else:
        flags = [f"--{key}={value}" for key in (*passed, "runs") if (value := getattr(options, key))]
        rows, lines = pending(names, runs, [*options.flags, *flags])  # common.farm reads these lines
        print(as_text(rows) if what == "pending" else "\n".join(lines))


if __name__ == "__main__":
    run.exit_with(main)
