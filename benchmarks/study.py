"""Where distilling pays, and the paper's table 4 and figure 4, at a size that one CPU core can run.

    python benchmarks/study.py --prepare --table main           # data, teachers and students, once
    python benchmarks/study.py --table main --seeds 5 --jobs 2  # goes on where it was stopped
    python benchmarks/study.py --table layers --seeds 3 --split validation
    python benchmarks/study.py --curves                         # one figure of the tables that there are

Every row is tuned in the same way on the validation split with seed 0 (`study_rows.py`); its best setting is then run
with seeds 1, 2, .. and scored on the test split. Both go to `benchmarks/results/study_<table>.json` (and `.png`),
beside the paper's numbers where it has any. What each finished job found goes to `study_jobs.jsonl` there: a study goes
on from it on another machine. `--until 17:30` starts nothing after that time (UTC) and reports what there
is.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; a job is one process on one core
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import study_curves  # noqa: E402
import study_models  # noqa: E402
from seeds import interval, rank_correlation  # noqa: E402
from study_jobs import Job, Study, run_jobs  # noqa: E402
from study_rows import (  # noqa: E402
    EQUAL_STEPS,
    PAPER,
    TABLES,
    TITLES,
    VLSI,
    Row,
    Setting,
    models_of,
)
from tokenizer_baselines import WholeAnswers  # noqa: E402

from vlsi_fast.config_files import parse_overrides  # noqa: E402
from vlsi_fast.data.dataset import VlsiDataset  # noqa: E402
from vlsi_fast.data.processors import load_processor  # noqa: E402
from vlsi_fast.data.sources import build_source  # noqa: E402
from vlsi_fast.lineage import versions  # noqa: E402
from vlsi_fast.paper import load_table  # noqa: E402

ROOT = study_models.ROOT


def main(arguments: list[str] | None = None) -> int:
    """Prepare, tune, run, collect, print. Returns 1 where a job failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", choices=TABLES)
    parser.add_argument("--prepare", action="store_true", help="make data and models where they are not there yet")
    parser.add_argument("--curves", action="store_true", help="draw the figure of curves from results that are there")
    parser.add_argument("--seeds", type=int, default=5, help="number of fresh seeds, from 1 (0 to 10; 0: tune only)")
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="scored with fresh seeds")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, one core each (default: %(default)s)")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/study"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--until", help="HH:MM, UTC: start no job after it, and report on what is done")
    parser.add_argument(
        "--only", help="regular expression: run only rows whose names match; report on all that is done"
    )
    options, rest = parser.parse_known_args(arguments)
    if options.curves:
        print(json.dumps({"png": study_curves.plot(options.out)}))
        return 0
    if options.table is None:
        parser.error("nothing to do: give --table, or --curves")
    if not 0 <= options.seeds <= 10:
        parser.error("--seeds must be between 0 and 10")
    rows = TABLES[options.table]()
    study_models.keep_rows()
    study_models.keep_states()
    chosen = [row for row in rows if re.search(options.only or "", row.name)]
    if options.prepare:
        study_models.prepare(options.work_dir, models_of(chosen))
    missing = [name for name in models_of(chosen) if not (options.work_dir / "models" / name).is_dir()]
    if missing:
        parser.error(f"{options.work_dir} has no {', '.join(missing)}; add --prepare")
    study = Study(options.work_dir, parse_overrides(rest), options.out / "study_jobs.jsonl")
    runner = Runner(study, options.jobs, _deadline(options.until))
    warm(study, chosen)
    gc.freeze()  # jobs are forked from this process, and each would look through what is imported here for garbage
    runner.tune(chosen)
    runner.fresh(chosen, range(1, options.seeds + 1), options.split)
    result = collect(runner, options.table, rows, range(1, options.seeds + 1), options.split)
    options.out.mkdir(parents=True, exist_ok=True)
    study.record()
    name = f"study_{options.table}"
    print_table(result)
    result["png"] = plot(result, options.out / f"{name}.png")
    (options.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"table": result["table"], "seeds_done": result["seeds_done"], "failed": runner.failed}))
    return 1 if runner.failed else 0


def warm(study: Study, rows: list[Row]) -> None:
    """Encode the training rows in this process, from which the jobs are forked."""
    kind, models = type(study.config.data.train[0]), study.work / "models"
    wanted = {(name, row.teacher, bool(row.baseline), row.translates) for row in rows if row.arm for name in row.data}
    for name, teacher, whole, translated in sorted(wanted):
        source = kind(**study_models.rows_of(study.work / "data" / name))
        data = study.config.data.model_copy(update={"train": [source]})
        processors = {
            role: load_processor(models / folder) for role, folder in (("student", "teacher"), ("teacher", teacher))
        }
        options = (build_source(data.train), processors, data)
        dataset = WholeAnswers(*options) if whole else VlsiDataset(*options, translated=translated)
        for i in range(len(dataset)):
            dataset[i]


class Runner:
    """Tunes rows and runs them with fresh seeds, as far as time allows."""

    def __init__(self, study: Study, workers: int, deadline: float = 0):
        self.study, self.workers, self.deadline = study, workers, deadline
        self.failed = 0

    # ---- settings ----

    def scores(self, row: Row) -> list[dict[str, Any]] | None:
        """What tuning found: each candidate with its validation scores. None: not all of them are done."""
        found = []
        for setting in self._candidates(row) or ():
            job = self._job(row, setting, 0, "validation")
            result, fit = self.study.result(job), self.study.fit(job)
            if result is None:
                return None
            found.append(setting | {"f1": result["f1"], "exact": result["exact"]} | ({"fit": fit} if fit else {}))
        return found or None

    def setting(self, row: Row) -> Setting | None:
        """The best candidate by F1 on validation (of equals the one with fewer steps, then the lower rate)."""
        if not row.arm:
            return {}
        scores = self.scores(row.like or row)
        if scores is None:
            return None
        best = min(scores, key=lambda each: (-each["f1"], each["steps"], each["rate"]))
        return {"rate": best["rate"], "steps": best["steps"]}

    def _candidates(self, row: Row) -> list[Setting] | None:
        """None: they rest on another row that is not done."""
        if row.after and self.setting(row.after) is None:
            return None
        if row.budget != "operations":
            return list(row.candidates())
        vlsi, sft = (self.setting(each) for each in (VLSI, EQUAL_STEPS))
        if vlsi is None or sft is None:
            return None
        jobs = self._job(VLSI, vlsi, 0, "validation"), self._job(EQUAL_STEPS, sft, 0, "validation")
        return list(row.candidates(self.study.operations_steps(*jobs)))

    def _job(self, row: Row, setting: Setting, seed: int, split: str) -> Job:
        after = self.setting(row.after) if row.after else None
        return self.study.job(row, setting, seed, split, after)

    # ---- work ----

    def tune(self, rows: list[Row]) -> None:
        """Run every candidate of every row on validation with seed 0; rows that rest on others afterwards."""
        rows = [row.like or row for row in rows if row.arm]
        wanted = [*rows, *(row.after for row in rows if row.after)]
        if any(row.budget == "operations" for row in rows):
            wanted += [VLSI, EQUAL_STEPS]
        first = [row for row in wanted if not row.after and row.budget != "operations"]
        for group in (first, [row for row in wanted if row not in first]):
            self._run([self._job(row, each, 0, "validation") for row in group for each in self._candidates(row) or ()])

    def fresh(self, rows: list[Row], seeds: range, split: str) -> None:
        """Run each tuned row with each seed; all rows with the first seed before the next one."""
        tuned = [(row, setting) for row in rows if (setting := self.setting(row)) is not None]
        self._run([self._job(row, setting, seed, split) for seed in seeds for row, setting in tuned])

    def fresh_job(self, row: Row, seed: int, split: str) -> Job | None:
        """The score of a row's best setting; None where it is not tuned."""
        setting = self.setting(row)
        return None if setting is None else self._job(row, setting, seed, split)

    def _run(self, jobs: list[Job]) -> None:
        tell = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
        self.failed += len(run_jobs(self.study, jobs, self.workers, tell, self.deadline))


def _deadline(until: str | None) -> float:
    if until is None:
        return 0
    now = datetime.datetime.now(datetime.UTC)
    hour, minute = map(int, until.split(":"))
    then = now.replace(hour=hour, minute=minute, second=0)
    return (then + datetime.timedelta(days=then < now)).timestamp()


# ---- results ----


def collect(runner: Runner, table: str, rows: list[Row], seeds: range, split: str) -> dict[str, Any]:
    """Everything about a table, as the JSON file has it. Rows without a finished seed have `seeds: []`."""
    study, entries, by_seed = runner.study, [], {}
    for row in rows:
        jobs = {seed: runner.fresh_job(row, seed, split) for seed in seeds}
        done = {seed: job for seed, job in jobs.items() if job is not None and study.result(job) is not None}
        by_seed[row.name] = {seed: study.result(job) for seed, job in done.items()}
        entries.append(_entry(runner, row, done))
    base = next((row.name for row in rows if "default" in row.name), VLSI.name)
    for entry in entries:
        mine, theirs = by_seed[entry["name"]], by_seed.get(base, {})
        common = [seed for seed in mine if seed in theirs]
        if common and entry["name"] != base:
            for measure in ("exact", "f1"):
                differences = [mine[s][measure] - theirs[s][measure] for s in common]
                entry[f"{measure}_to_default"] = interval(differences)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    scored = [result for found in by_seed.values() for result in found.values()]
    counts = [result["rows"] for result in scored]
    return {
        "benchmark": "study",
        "table": table,
        "title": TITLES[table],
        "split": split,
        "seeds_asked": len(seeds),
        "seeds_done": min(len(entry["seeds"]) for entry in entries),
        "default": base,
        "rows": entries,
        "order": _orders(table, rows, entries),
        "questions": counts[0] if counts else None,
        "task": json.loads((study.work / "data" / "finished").read_text()),
        "teachers": study_models.TEACHERS,
        "students": study_models.STUDENTS,
        "overrides": study.overrides,
        "config": study.config.model_dump(mode="json"),
        "processors": sorted({result["processor"] for result in scored}),
        "versions": versions(),
        "commit": commit.strip(),
        "note": "The machine was shared: seconds are those of the processor, and indicative only. "
        "Jobs since 2026-11-30 compute the states of frozen models once a row.",
    }


def _entry(runner: Runner, row: Row, done: dict[int, Job]) -> dict[str, Any]:
    """A row: its setting and how it was tuned, its scores by seed, steps and cost."""
    study, setting = runner.study, runner.setting(row)
    entry: dict[str, Any] = {"name": row.name, "arm": row.arm, "paper_rows": row.paper, "seeds": list(done)}
    entry |= {"setting": setting, "tuning": runner.scores(row.like or row) if row.arm else None}
    if not done:
        return entry
    for measure in ("exact", "f1"):
        entry[measure] = interval([study.result(job)[measure] for job in done.values()])
    fits = [fit for job in done.values() if (fit := study.fit(job))]
    if len(fits) == len(done):
        entry["fit"] = {when: statistics.fmean(fit[when] for fit in fits) for when in ("half", "end")}
    chains = [[study.result(each) for each in job.chain()[:-1]] for job in done.values()]
    entry["steps"] = {result["stage"]: result["steps"] for result in chains[0]}
    entry["tflop"] = statistics.fmean(sum(result["flops"] for result in chain) for chain in chains) / 1e12
    entry["cpu_seconds"] = statistics.fmean(sum(result["cpu_seconds"] for result in chain) for chain in chains)
    return entry


def paper_means(table: str, rows: list[Row]) -> dict[str, dict[str, float]]:
    """File of the paper's numbers -> our row -> mean over benchmarks, and over the paper's rows that it stands for."""
    means: dict[str, dict[str, float]] = {}
    for name in PAPER.get(table, []):
        values: dict[str, list[float]] = {}
        for entry in load_table(name)["rows"]:
            numbers = [v for v in entry["values"] if isinstance(v, float | int)]
            values.setdefault(entry["name"], []).append(statistics.fmean(numbers))
        means[name] = {
            row.name: statistics.fmean(v for paper in row.paper for v in values[paper])
            for row in rows
            if row.paper and all(paper in values for paper in row.paper)
        }
    return means


def _orders(table: str, rows: list[Row], entries: list[dict]) -> list[dict[str, Any]]:
    """Rank correlation of our means with the paper's, for each of its tables. With so few rows, p-values are large."""
    ours = {entry["name"]: entry["exact"]["mean"] for entry in entries if "exact" in entry}
    found = []
    for name, means in paper_means(table, rows).items():
        common = [row for row in means if row in ours]
        correlation = rank_correlation([ours[row] for row in common], [means[row] for row in common])
        found.append({"paper_table": name, "paper_means": means} | correlation)
    return found


def print_table(result: dict[str, Any]) -> None:
    """Rows with the paper's means beside ours, the same rows by type of question, and how far the orderings agree."""
    from rich.console import Console
    from rich.table import Table

    def percent(value: dict | None) -> list[str]:
        if value is None:
            return ["", ""]
        half = value["half_width_95"]
        return [f"{100 * value['mean']:.1f}", "" if half is None else f"{100 * half:.1f}"]

    papers = [f"paper {order['paper_table'].removeprefix('table_')}" for order in result["order"]]
    title = f"{result['table']}: {result['title']}; {result['questions']} pictures of {result['split']}"
    columns = ("row", "seeds", "rate", "steps", "exact, %", "± 95%", "F1, %", "± 95%", "exact to default", "± 95%")
    table = Table(*columns, *papers, "TFLOP", "cpu s", title=title)
    for entry in result["rows"]:
        means = [order["paper_means"].get(entry["name"]) for order in result["order"]]
        setting = entry["setting"] or {}
        table.add_row(
            *(entry["name"], f"{len(entry['seeds'])} of {result['seeds_asked']}"),
            *(f"{setting[key]:g}" if key in setting else "" for key in ("rate", "steps")),
            *(percent(entry.get("exact")) + percent(entry.get("f1")) + percent(entry.get("exact_to_default"))),
            *("" if mean is None else f"{mean:.1f}" for mean in means),
            *((f"{entry['tflop']:.1f}", f"{entry['cpu_seconds']:.0f}") if "tflop" in entry else ("", "")),
        )
    console = Console(width=200)
    console.print(table)
    for order in result["order"]:
        if order["spearman"] is not None:
            console.print(
                f"order against {order['paper_table']}, {order['rows']} rows: "
                f"Spearman {order['spearman']:.2f} (p {order['spearman_p']:.2f}), "
                f"Kendall {order['kendall']:.2f} (p {order['kendall_p']:.2f})"
            )


def plot(result: dict[str, Any], path: Path) -> str | None:
    """Our trained rows with intervals; beside them, where there are any, the paper's means. Returns the file's name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    scored = [entry for entry in result["rows"] if "exact" in entry]
    rows = [entry for entry in scored if entry["steps"]]
    if not rows:
        return None
    orders = [order for order in result["order"] if order["paper_means"]]
    width = 5 + max(2, max(len(entry["name"]) for entry in rows) * 0.08)  # inches, of names and our means
    size = (width + 3 * len(orders), 1.2 + 0.35 * len(rows))
    figure, axes = pyplot.subplots(1, 1 + len(orders), figsize=size, sharey=True, squeeze=False)
    places = list(range(len(rows)))[::-1]
    ours, *theirs = axes[0]
    for y, entry in zip(places, rows):
        value, color = entry["exact"], {"sft": "tab:gray", "last": "tab:green"}.get(entry["arm"], "tab:blue")
        half = value["half_width_95"] or 0
        ours.errorbar(100 * value["mean"], y, xerr=100 * half, fmt="o", color=color, capsize=3)
        ours.plot([100 * v for v in value["values"]], [y] * len(value["values"]), ".", color=color, alpha=0.4, ms=4)
    ours.set_yticks(places, [entry["name"] for entry in rows])
    fewest, most = min(len(e["seeds"]) for e in rows), max(len(e["seeds"]) for e in rows)
    seeds = f"{most} seeds" if fewest == most else f"{fewest} to {most} seeds"
    untrained = "; ".join(f"{e['name']} {100 * e['exact']['mean']:.1f}" for e in scored if not e["steps"])
    ours.set_xlabel(f"exact sets of facts, % ({seeds}, mean and 95%)\n{textwrap.fill(untrained, 50)}")
    for axis, order in zip(theirs, orders):
        for y, entry in zip(places, rows):
            if entry["name"] in order["paper_means"]:
                axis.plot(order["paper_means"][entry["name"]], y, "s", color="tab:orange")
        axis.set_xlabel(f"paper, {order['paper_table']}, mean")
    for axis in axes[0]:
        axis.grid(axis="x", alpha=0.3)
    figure.suptitle(f"study {result['table']}: {result['title']}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path.name


if __name__ == "__main__":
    sys.exit(main())
