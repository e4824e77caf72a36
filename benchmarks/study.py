"""The paper's table 4 and figure 4 at a size that one CPU core can run: each row several times, paired by seed.

    python benchmarks/study.py --prepare                        # data, teachers and students, once
    python benchmarks/study.py --table 4e --seeds 5 --jobs 2    # goes on where it was stopped
    python benchmarks/study.py --table why --seeds 3            # on the validation split: what to choose, and why
    python benchmarks/study.py --table 4d --sft.training.max_steps 100   # any option of the config, for all rows

Prints the table beside the paper's numbers, with the rank correlation of the two orderings, and writes
`benchmarks/results/study_<table>.json` and `.png`. The tables look at the two test splits; nothing may
be chosen on them. `--until 17:30` starts nothing after that time (UTC) and reports what there is.
"""

from __future__ import annotations

import argparse
import datetime
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

import puzzles  # noqa: E402
import study_models  # noqa: E402
from seeds import interval, machine, rank_correlation  # noqa: E402
from study_jobs import Study, run_jobs  # noqa: E402
from study_rows import PAPER, TABLES, Row, rows_of_table  # noqa: E402

from vlsi_fast.config_files import parse_overrides  # noqa: E402
from vlsi_fast.data.dataset import VlsiDataset  # noqa: E402
from vlsi_fast.data.processors import load_processor  # noqa: E402
from vlsi_fast.data.sources import build_source  # noqa: E402
from vlsi_fast.lineage import versions  # noqa: E402
from vlsi_fast.paper import load_table  # noqa: E402

ROOT = study_models.ROOT
TEST = ("test", "test_held_out")
TITLES = {
    "4b": "use of the sft step", "4c": "share of the sft step", "4d": "operations of intermediate / last layers",
    "4e": "matching strategy", "4f": "verbalizer architecture", "fig4": "teacher -> student",
    "why": "what helps, on validation",
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Prepare, run, collect, print. Returns 1 where a job failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", choices=TABLES)
    parser.add_argument("--prepare", action="store_true", help="make data and models where they are not there yet")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 0 (1 to 10)")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, one core each (default: %(default)s)")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/study"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--until", help="HH:MM, UTC: start no job after it, and report on what is done")
    parser.add_argument(
        "--only", help="regular expression: run only rows whose names match; report on all that is done"
    )
    options, rest = parser.parse_known_args(arguments)
    if not options.prepare and options.table is None:
        parser.error("nothing to do: give --prepare, --table, or both")
    if not 1 <= options.seeds <= 10:
        parser.error("--seeds must be between 1 and 10")
    overrides = parse_overrides(rest)
    study_models.keep_rows()
    if options.prepare:
        study_models.prepare(options.work_dir, models_of(options.table))
    if options.table is None:
        return 0
    missing = [name for name in models_of(options.table) if not (options.work_dir / "models" / name).is_dir()]
    if missing:
        parser.error(f"{options.work_dir} has no {', '.join(missing)}; add --prepare")
    study = Study(options.work_dir, overrides)
    rows = rows_of_table(options.table, study.config)
    splits = ("validation",) if options.table == "why" else TEST
    if options.table == "why":
        puzzles.write_noisy(options.work_dir / "data", "train", share=0.3, seed=0)
    scores = {(row.name, seed): study.jobs(row, seed, splits) for seed in range(options.seeds) for row in rows}
    wanted = [job for (name, _), jobs in scores.items() if re.search(options.only or "", name) for job in jobs]
    if any(study.result(job) is None for job in wanted):
        warm(study)
    failed = run_jobs(study, wanted, options.jobs, lambda text: print(text, file=sys.stderr, flush=True),
                      _deadline(options.until))  # fmt: skip
    result = collect(study, options.table, rows, scores, options.seeds, splits)
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"study_{options.table}"
    print_table(result)
    result["png"] = plot(result, options.out / f"{name}.png")
    (options.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 1 if failed else 0


def models_of(table: str | None) -> list[str]:
    """Models that a table needs, teachers first."""
    more = {"fig4": ["teacher_small", "student_small"], "why": ["student_deep"]}
    return sorted(["teacher", "student", *more.get(table, [])], key=lambda name: name.startswith("student"))


def warm(study: Study) -> None:
    """Encode the training rows in this process, from which the jobs are forked."""
    source = study_models.rows_of(study.work / "data" / "train.jsonl")
    data = study.config.data.model_copy(update={"train": [type(study.config.data.train[0])(**source)]})
    dataset = VlsiDataset(
        build_source(data.train), {"student": load_processor(study.work / "models" / "student")}, data
    )
    for i in range(len(dataset)):
        dataset[i]


def _deadline(until: str | None) -> float:
    if until is None:
        return 0
    now = datetime.datetime.now(datetime.UTC)
    hour, minute = map(int, until.split(":"))
    then = now.replace(hour=hour, minute=minute, second=0)
    return (then + datetime.timedelta(days=then < now)).timestamp()


# ---- results ----


def collect(
    study: Study, table: str, rows: list[Row], scores: dict, seeds: int, splits: tuple[str, ...]
) -> dict[str, Any]:
    """Everything about a table, as the JSON file has it. Rows without a finished seed have `seeds: []`."""
    entries, by_seed = [], {}
    for row in rows:
        done = {}
        for seed in range(seeds):
            found = [study.result(job) for job in scores[row.name, seed]]
            if None not in found:
                done[seed] = found
        by_seed[row.name] = {
            s: sum(f["correct"] for f in found) / sum(f["rows"] for f in found) for s, found in done.items()
        }
        entries.append(_entry(study, row, done, by_seed[row.name], scores, splits))
    base = next((row.name for row in rows if "default" in row.name), None)
    for entry in entries:
        mine, theirs = by_seed[entry["name"]], by_seed.get(base, {})
        common = [seed for seed in mine if seed in theirs]
        if common and entry["name"] != base:
            entry["difference_to_default"] = interval([mine[s] - theirs[s] for s in common])
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    return {
        "benchmark": "study", "table": table, "title": TITLES[table], "splits": splits, "seeds_asked": seeds,
        "seeds_done": min(len(entry["seeds"]) for entry in entries), "default": base, "rows": entries,
        "order": _orders(table, rows, entries), "questions": _questions(scores, study),
        "task": json.loads((study.work / "data" / "finished").read_text()), "sizes": study_models.SIZES,
        "overrides": study.overrides, "config": study.config.model_dump(mode="json"), "machine": machine(),
        "versions": versions(), "commit": commit.strip(),
        "note": "The machine was shared: seconds are those of the processor, and indicative only.",
    }  # fmt: skip


def _entry(study: Study, row: Row, done: dict, accuracy: dict[int, float], scores: dict, splits) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": row.name, "paper_rows": row.paper, "seeds": list(accuracy)}
    if not accuracy:
        return entry
    entry["accuracy"] = interval(list(accuracy.values()))
    types: dict[str, list[float]] = {}
    for found in done.values():
        for split, result in zip(splits, found):
            for kind, (right, count) in result["types"].items():
                types.setdefault(f"{split}/{kind}", []).append(right / count)
    entry["types"] = {kind: statistics.fmean(shares) for kind, shares in types.items()}
    chains = [[study.result(job) for job in scores[row.name, seed][0].chain()[:-1]] for seed in accuracy]
    entry["steps"] = {result["stage"]: result["steps"] for result in chains[0]}
    entry["tflop"] = statistics.fmean(sum(result["flops"] for result in chain) for chain in chains) / 1e12
    entry["cpu_seconds"] = statistics.fmean(sum(result["cpu_seconds"] for result in chain) for chain in chains)
    return entry


def _questions(scores: dict, study: Study) -> int | None:
    for jobs in scores.values():
        found = [study.result(job) for job in jobs]
        if None not in found:
            return sum(result["rows"] for result in found)
    return None


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
    ours = {entry["name"]: entry["accuracy"]["mean"] for entry in entries if "accuracy" in entry}
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

    types = next((list(entry["types"]) for entry in result["rows"] if "types" in entry), [])
    papers = [f"paper {order['paper_table'].removeprefix('table_')}" for order in result["order"]]
    title = f"{result['table']}: {result['title']}; {result['questions']} questions of {' + '.join(result['splits'])}"
    table = Table(*("row", "seeds", "right, %", "± 95%", "to default", "± 95%", *papers, "TFLOP", "cpu s"), title=title)
    kinds = Table("right, %", *(name.replace("test_held_out/", "held out/") for name in types), title="by type")
    for entry in result["rows"]:
        means = [order["paper_means"].get(entry["name"]) for order in result["order"]]
        table.add_row(
            *(entry["name"], f"{len(entry['seeds'])} of {result['seeds_asked']}"),
            *(percent(entry.get("accuracy")) + percent(entry.get("difference_to_default"))),
            *("" if mean is None else f"{mean:.1f}" for mean in means),
            *((f"{entry['tflop']:.1f}", f"{entry['cpu_seconds']:.0f}") if "tflop" in entry else ("", "")),
        )
        if "types" in entry:
            kinds.add_row(entry["name"], *(f"{100 * entry['types'][name]:.0f}" for name in types))
    console = Console(width=200)
    console.print(table)
    console.print(kinds)
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

    scored = [entry for entry in result["rows"] if "accuracy" in entry]
    rows = [entry for entry in scored if entry["steps"]]
    if not rows:
        return None
    orders = [order for order in result["order"] if order["paper_means"]]
    size = (7 + 3 * len(orders), 1.2 + 0.35 * len(rows))
    figure, axes = pyplot.subplots(1, 1 + len(orders), figsize=size, sharey=True,
                                   squeeze=False)  # fmt: skip
    places = list(range(len(rows)))[::-1]
    ours, *theirs = axes[0]
    for y, entry in zip(places, rows):
        value, color = entry["accuracy"], "tab:gray" if "control" in entry["name"] else "tab:blue"
        half = value["half_width_95"] or 0
        ours.errorbar(100 * value["mean"], y, xerr=100 * half, fmt="o", color=color, capsize=3)
        ours.plot([100 * v for v in value["values"]], [y] * len(value["values"]), ".", color=color, alpha=0.4, ms=4)
    ours.set_yticks(places, [entry["name"] for entry in rows])
    fewest, most = min(len(e["seeds"]) for e in rows), max(len(e["seeds"]) for e in rows)
    seeds = f"{most} seeds" if fewest == most else f"{fewest} to {most} seeds"
    untrained = "; ".join(f"{e['name']} {100 * e['accuracy']['mean']:.1f}" for e in scored if not e["steps"])
    ours.set_xlabel(f"answers right, % ({seeds}, mean and 95%)\n{textwrap.fill(untrained, 50)}")
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
