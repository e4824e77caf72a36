"""Scores of several models on the same rows: shares with intervals, by type and source, differences paired by row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .answers import Answer
from .intervals import mcnemar, paired_difference, wilson
from .metrics import METRICS

TITLES = {"exact_match": "exact match", "relaxed_accuracy": "relaxed accuracy (numbers may be 5% off)"}


def share(right: Iterable[bool]) -> dict[str, Any]:
    """`accuracy` (0 to 1), `correct`, `rows` and `interval`, Wilson's 95%."""
    right = list(right)
    correct, rows = sum(right), len(right)
    return {"accuracy": correct / rows, "correct": correct, "rows": rows, "interval": list(wilson(correct, rows))}


def summarise(answers: dict[str, list[Answer]], skipped: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Everything that is told about the models' answers.

    Args:
        answers: model -> its answers; at least one each.
        skipped: model -> cause -> rows that could not be used.

    Returns:
        `models`: name -> `skipped` and, for each metric, a `share` with `by_type` and `by_source`; `differences`: the
        first model against each other one, by metric, on the rows that both answered.
    """
    models = {}
    for name, rows in answers.items():
        models[name] = {"skipped": skipped[name]} | {metric: _scores(rows, metric) for metric in METRICS}
    first, *others = answers
    differences = [_difference(answers, metric, first, other) for metric in METRICS for other in others]
    return {"models": models, "differences": differences}


def _scores(rows: list[Answer], metric: str) -> dict[str, Any]:
    right = [METRICS[metric](row.prediction, row.answer) for row in rows]

    def split(key: str) -> dict[str, Any]:
        groups: dict[str, list[bool]] = {}
        for row, value in zip(rows, right, strict=True):
            groups.setdefault(getattr(row, key), []).append(value)
        return {name: share(groups[name]) for name in sorted(groups)}

    return share(right) | {"by_type": split("type"), "by_source": split("source")}


def _difference(answers: dict[str, list[Answer]], metric: str, first: str, second: str) -> dict[str, Any]:
    of_first, of_second = (
        {row.id: METRICS[metric](row.prediction, row.answer) for row in answers[name]} for name in (first, second)
    )
    shared = of_first.keys() & of_second.keys()
    only_first = sum(of_first[row] and not of_second[row] for row in shared)
    only_second = sum(of_second[row] and not of_first[row] for row in shared)
    return {
        "metric": metric,
        "first": first,
        "second": second,
        "rows": len(shared),
        "only_first": only_first,
        "only_second": only_second,
        "difference": (only_second - only_first) / len(shared),
        "interval": list(paired_difference(only_first, only_second, len(shared))),
        "p": mcnemar(only_first, only_second),
    }


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Name as given -> the end of its path, as many parts of it as tell it from the others."""
    parts = {name: name.rstrip("/").split("/") for name in names}
    for length in range(1, max(map(len, parts.values()), default=0) + 1):
        short = {name: "/".join(each[-length:]) for name, each in parts.items()}
        if len(set(short.values())) == len(short):
            return short
    return {name: name for name in parts}


def print_report(summary: dict[str, Any]) -> None:
    """Tables for a terminal. Relaxed accuracy is shown where it differs for any model."""
    from rich.table import Table

    from ..tabular import console, print_table

    say, models = console().print, summary["models"]
    short = short_names(models)
    told = {metric: [found[metric]["correct"] for found in models.values()] for metric in METRICS}
    shown = [metric for metric in METRICS if metric == "exact_match" or told[metric] != told["exact_match"]]
    for metric in shown:
        table = Table("rows", "number", *short.values(), title=TITLES[metric], caption="[95% interval]")
        scores = [found[metric] for found in models.values()]
        table.add_row("all", str(scores[0]["rows"]), *map(_cell, scores))
        for key in ("by_type", "by_source"):
            groups = sorted({name for each in scores for name in each[key]})
            for name in groups if len(groups) > 1 else ():
                cells = [each[key].get(name) for each in scores]
                number = next(cell["rows"] for cell in cells if cell is not None)
                table.add_row(f"  {name}", str(number), *("-" if cell is None else _cell(cell) for cell in cells))
        print_table(table)
    for each in summary["differences"]:
        if each["metric"] in shown:
            first, second, (low, high) = short[each["first"]], short[each["second"]], each["interval"]
            say(
                f"{second} less {first}, {TITLES[each['metric']]}: {100 * each['difference']:+.2f} "
                f"[{100 * low:+.2f}, {100 * high:+.2f}] points on {each['rows']} rows; only {second} right: "
                f"{each['only_second']}, only {first}: {each['only_first']}; p = {each['p']:.2g} (McNemar, exact)"
            )
    for name, found in models.items():
        if found["skipped"]:
            causes = ", ".join(f"{cause} {count}" for cause, count in found["skipped"].items())
            say(f"{short[name]}: {sum(found['skipped'].values())} rows could not be used ({causes})")


def _cell(score: dict[str, Any]) -> str:
    low, high = score["interval"]
    return f"{100 * score['accuracy']:.2f}% [{100 * low:.1f}, {100 * high:.1f}]"
