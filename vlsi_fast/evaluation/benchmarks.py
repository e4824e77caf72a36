"""The paper's 17 benchmarks by lmms-eval: which task each is, and their scores beside the paper's.

Task names, metric keys and what the metrics mean are those of lmms-eval 0.7.3. It writes shares (0 to 1) for most and
percent for some; `scale` brings all to the unit of the paper's tables.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..paper import load_table


@dataclass(frozen=True)
class Benchmark:
    """One benchmark of tables 1 to 3, or a task that the paper does not have."""

    name: str
    """On the command line."""
    column: str | None
    """In the paper's tables."""
    task: str
    metrics: tuple[str, ...] = ()
    """Keys in lmms-eval's results, `metric,filter`; several are added up. Empty: every metric is told as it is."""
    scale: float = 100.0
    judge: bool = False
    """Whether answers are graded or read by a language model behind an API."""
    note: str = ""
    """Where lmms-eval's number is, or may be, another one than the paper's."""


DEV = "dev split: the test split's answers are not public, lmms-eval only writes a file to submit; the paper names none"
BENCHMARKS = (
    Benchmark("qbench", "QBench", "qbench_dev", ("qbench_acc,none",), note="dev split, the only one there"),
    Benchmark("ai2d", "AI2D", "ai2d", ("exact_match,flexible-extract",)),
    Benchmark("chartqa", "ChartQA", "chartqa", ("relaxed_overall,none",)),
    Benchmark("pope", "POPE", "pope", ("pope_f1_score,none",), note="F1, as usual; the paper names no metric"),
    Benchmark(
        "hallb",
        "HallB",
        "hallusion_bench_image",
        ("aAcc,none",),
        1.0,
        judge=True,
        note="aAcc, on rows with an image; the paper names no metric",
    ),
    Benchmark(
        "mme",
        "MME",
        "mme",
        ("mme_perception_score,none", "mme_cognition_score,none"),
        1.0,
        note="perception and cognition, added up",
    ),
    Benchmark(
        "mathvista",
        "MathVista",
        "mathvista_testmini_format",
        ("llm_as_judge_eval,none",),
        1.0,
        judge=True,
        note="testmini",
    ),
    Benchmark("mmb", "MMB", "mmbench_en_dev_static", ("gpt_eval_score,none",), 1.0, note=DEV),
    Benchmark("mmb-cn", "MMB-CN", "mmbench_cn_dev", ("gpt_eval_score,none",), 1.0, judge=True, note=DEV),
    Benchmark(
        "mm-vet",
        "MM-Vet",
        "mmvet",
        ("gpt_eval_score,none",),
        1.0,
        judge=True,
        note="asks to think step by step, with another judge than MM-Vet's own",
    ),
    Benchmark("mmmu", "MMMU", "mmmu_val", ("mmmu_acc,none",), note="validation split"),
    Benchmark(
        "mm-vet-v2",
        "MM-Vet-v2",
        "mmvetv2",
        ("gpt_eval_score,none",),
        1.0,
        judge=True,
        note="asks to think step by step, with another judge than MM-Vet's own",
    ),
    Benchmark("mmstar", "MMStar", "mmstar", ("average,none",)),
    Benchmark("seed-2-plus", "SEED-2-Plus", "seedbench_2_plus", ("seedbench_2_plus_all,none",)),
    Benchmark("blink", "BLINK", "blink", ("blink_acc,none",), note="validation split"),
    Benchmark(
        "cv-bench",
        "CV-Bench",
        "cv_bench",
        ("cv_bench_acc,none",),
        note="mean over rows; the benchmark's own is a mean over 2D and 3D",
    ),
    Benchmark("llava-wilder", "LLaVA-Wilder", "llava_wilder_small", ("gpt_eval_llava_all,none",), 1.0, judge=True),
)
"""All of tables 1 to 3, in their order. lmms-eval has a task for each; `note` says where it falls short."""

PAPER_ROWS = ("VLsI-2B", "VLsI-7B", "Qwen2-VL-2B", "Qwen2-VL-7B", "Qwen2-VL-72B")
"""The paper's rows to print beside one's own."""
PAPER_TABLES = ("table_1", "table_2", "table_3a", "table_3b")
JUDGE_KEYS = ("OPENAI_API_KEY", "AZURE_API_KEY", "API_TYPE")


def chosen(names: str | None, tasks: str | None) -> list[Benchmark]:
    """Benchmarks by `--benchmarks` and `--tasks`.

    Raises:
        ConfigError: an unknown name.
    """
    known = {benchmark.name: benchmark for benchmark in BENCHMARKS}
    wanted = list(known) if names == "all" else [name.strip() for name in (names or "").split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
            raise ConfigError(f"--benchmarks: no {name!r}; {hint} (other tasks of lmms-eval: --tasks)")
    others = [task.strip() for task in (tasks or "").split(",") if task.strip()]
    return [known[name] for name in dict.fromkeys(wanted)] + [Benchmark(task, None, task) for task in others]


def paper_scores(column: str) -> dict[str, list[float]]:
    """Row of the paper -> its scores in a column of tables 1 to 3: several where the tables contradict each other."""
    found: dict[str, list[float]] = {}
    for name in PAPER_TABLES:
        table = load_table(name)
        if column not in table["columns"]:
            continue
        at = table["columns"].index(column)
        for row in table["rows"]:
            scores = found.setdefault(row["name"], [])
            if row["values"][at] is not None and row["values"][at] not in scores:
                scores.append(row["values"][at])
    return {name: scores for name, scores in found.items() if scores}


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Run benchmarks or read their results, and print them. Returns the exit code: 1 where a benchmark failed."""
    from . import lmms

    _check(arguments, overrides)
    if arguments.benchmarks == "list":
        _print_list()
        return 0
    wanted = chosen(arguments.benchmarks, arguments.tasks)
    if arguments.results:
        results = lmms.read_results([Path(folder) for folder in arguments.results])
        wanted = wanted or _found_in(results)
        failed = []
    else:
        _require_judge(wanted)
        results, failed = lmms.run(arguments, wanted)
    rows = [_row(benchmark, results) for benchmark in wanted]
    if arguments.json:
        print(json.dumps({"benchmarks": rows, "failed": failed}, indent=2))
    else:
        _print_rows(rows)
    return 1 if failed else 0


def _check(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Options that mean nothing here are errors."""
    names = ("config", "data", "reader", "metric", "predictions", "dtype")
    wrong = [name for name in names if getattr(arguments, name)]
    if wrong or overrides:
        given = f"--{wrong[0]}" if wrong else overrides[0]
        raise ConfigError(f"{given} has no meaning with benchmarks, which bring their own rows; remove it")
    if arguments.results and arguments.models:
        raise ConfigError("--results runs nothing: remove --run and --model")


def _require_judge(wanted: list[Benchmark]) -> None:
    judged = [benchmark.name for benchmark in wanted if benchmark.judge]
    if judged and not any(os.environ.get(key) for key in JUDGE_KEYS):
        rest = ",".join(benchmark.name for benchmark in wanted if not benchmark.judge and benchmark.column)
        raise ConfigError(
            f"{', '.join(judged)}: answers are graded by a language model; set OPENAI_API_KEY, or another judge as "
            "lmms-eval's documentation tells (API_TYPE), or leave them out" + (f": --benchmarks {rest}" if rest else "")
        )


def _found_in(results: dict[str, dict[str, Any]]) -> list[Benchmark]:
    """The paper's benchmarks that have results, then all other tasks."""
    tasks = dict.fromkeys(task for found in results.values() for task in found)
    known = [benchmark for benchmark in BENCHMARKS if benchmark.task in tasks]
    rest = tasks.keys() - {benchmark.task for benchmark in known}
    inner = {part for found in results.values() for each in found.values() for part in each["parts"]}
    return known + [Benchmark(task, None, task) for task in tasks if task in rest - inner]


def _row(benchmark: Benchmark, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One benchmark with every model's score; None where it was not run or is not told."""
    scores, limited = {}, {}
    for model, found in results.items():
        each = found.get(benchmark.task)
        metrics = {} if each is None else each["metrics"]
        if each is not None and each["rows"] < each["all_rows"]:
            limited[model] = [each["rows"], each["all_rows"]]
        if not benchmark.metrics:
            scores[model] = metrics or None
            continue
        values = [metrics.get(key) for key in benchmark.metrics]
        scores[model] = None if None in values else benchmark.scale * sum(values)
    paper = paper_scores(benchmark.column) if benchmark.column else {}
    return {
        "benchmark": benchmark.column or benchmark.name,
        "task": benchmark.task,
        "scores": scores,
        "limited": limited,
        "judge": benchmark.judge,
        "note": benchmark.note,
        "paper": {name: paper[name] for name in PAPER_ROWS if name in paper},
    }


def _print_rows(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from ..tabular import console, print_table
    from .report import short_names

    models = list(dict.fromkeys(model for row in rows for model in row["scores"]))
    short = short_names(models)
    beside = [name for name in PAPER_ROWS if any(name in row["paper"] for row in rows)]
    notes = []
    table = Table("benchmark", *short.values(), *beside)
    for row in rows:
        paper = [" / ".join(f"{score:g}" for score in row["paper"].get(name, [])) or "-" for name in beside]
        for name, cells in _lines(row, models):
            table.add_row(name, *cells, *paper)
        told = [row["note"]] if row["note"] else []
        told += ["graded by a language model"] if row["judge"] else []
        told += [f"{short[model]}: only {few} of {all_} rows" for model, (few, all_) in row["limited"].items()]
        if told:
            notes.append(f"{row['benchmark']} ({row['task']}): {'; '.join(told)}")
    print_table(table)
    if beside:
        notes.insert(0, f"{', '.join(beside)}: the paper's tables 1 to 3; 'a / b' where they contradict each other.")
    for note in notes:
        console().print(note)


def _lines(row: dict[str, Any], models: list[str]) -> list[tuple[str, list[str]]]:
    """Name and cells of a benchmark's line; of a task that the paper lacks, a line for each metric."""
    scores = {model: row["scores"].get(model) for model in models}
    keys = dict.fromkeys(key for score in scores.values() if isinstance(score, dict) for key in score)
    if not keys:
        return [(row["benchmark"], ["-" if score is None else f"{score:.1f}" for score in scores.values()])]
    lines = []
    for key in keys:
        values = [(score or {}).get(key) for score in scores.values()]
        lines.append((f"{row['benchmark']} {key}", ["-" if value is None else f"{value:.4g}" for value in values]))
    return lines


def _print_list() -> None:
    from rich.table import Table

    from ..tabular import print_table

    table = Table("--benchmarks", "paper", "lmms-eval task", "metric", "judge", "what differs")
    for each in BENCHMARKS:
        metrics = " + ".join(metric.split(",")[0] for metric in each.metrics)
        table.add_row(each.name, each.column, each.task, metrics, "needed" if each.judge else "", each.note)
    print_table(table)
