"""Scores of several models on the same rows: shares with intervals, by type and source, differences paired by row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .answers import Answer
from .intervals import mcnemar, mean_difference, mean_score, paired_difference, wilson
from .metrics import MIXED, is_graded, title


def share(scores: Iterable[float | bool], graded: bool = False) -> dict[str, Any]:
    """`mean` (0 to 1), `rows`, `interval` (95%); of scores of 0 and 1 also `accuracy` and `correct`.

    Args:
        scores: at least one.
        graded: whether the metric has scores between 0 and 1: its interval is that of a mean, otherwise Wilson's.
    """
    scores = list(scores)
    rows = len(scores)
    if graded:
        return {"mean": sum(scores) / rows, "rows": rows, "interval": list(mean_score(scores))}
    correct = int(sum(scores))
    accuracy, interval = correct / rows, list(wilson(correct, rows))
    return {"mean": accuracy, "accuracy": accuracy, "correct": correct, "rows": rows, "interval": interval}


def metric_names(answers: Iterable[Answer]) -> list[str]:
    """Metrics of all rows, their first ones in front; `MIXED` before them where the first ones differ."""
    rows = [list(row.scores) for row in answers]
    first = list(dict.fromkeys(names[0] for names in rows))
    names = list(dict.fromkeys([*first, *(name for each in rows for name in each)]))
    return [MIXED, *names] if len(first) > 1 else names


def summarise(answers: dict[str, list[Answer]], skipped: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Everything that is told about the models' answers.

    Args:
        answers: model -> its answers; at least one each.
        skipped: model -> cause -> rows that could not be used.

    Returns:
        `metrics`: names, the headline first; `models`: name -> `skipped` and, for each metric, a `share` with `by_type`
        and `by_source` (no metric of which the model answered no row); `differences`: the first model against each
        other one, by metric, on the rows that both answered.
    """
    metrics = metric_names(row for rows in answers.values() for row in rows)
    scored = {metric: {name: _of_metric(rows, metric) for name, rows in answers.items()} for metric in metrics}
    graded = {m: is_graded(value for rows in scored[m].values() for _, value in rows) for m in metrics}
    models = {}
    for name in answers:
        found = {m: _scores(scored[m][name], graded[m]) for m in metrics if scored[m][name]}
        models[name] = {"skipped": skipped[name]} | found
    first, *others = answers
    pairs = [(metric, other) for metric in metrics for other in others]
    differences = [{"metric": m} | _difference(scored[m], graded[m], first, other) for m, other in pairs]
    return {"metrics": metrics, "models": models, "differences": [each for each in differences if each["rows"]]}


Scored = list[tuple[Answer, float | bool]]


def _of_metric(rows: list[Answer], metric: str) -> Scored:
    """The rows that have this metric, with their scores."""
    if metric == MIXED:
        return [(row, next(iter(row.scores.values()))) for row in rows]
    return [(row, row.scores[metric]) for row in rows if metric in row.scores]


def _scores(rows: Scored, graded: bool) -> dict[str, Any]:
    def split(key: str) -> dict[str, Any]:
        groups: dict[str, list[float | bool]] = {}
        for row, value in rows:
            groups.setdefault(getattr(row, key), []).append(value)
        return {name: share(groups[name], graded) for name in sorted(groups)}

    return share((value for _, value in rows), graded) | {"by_type": split("type"), "by_source": split("source")}


def _difference(scored: dict[str, Scored], graded: bool, first: str, second: str) -> dict[str, Any]:
    of_first, of_second = ({row.id: value for row, value in scored[name]} for name in (first, second))
    shared = sorted(of_first.keys() & of_second.keys())
    found = {"first": first, "second": second, "rows": len(shared)}
    changes = [of_second[row] - of_first[row] for row in shared]
    if not shared:
        return found
    if graded:
        return found | {"difference": sum(changes) / len(shared), "interval": list(mean_difference(changes))}
    only_first, only_second = changes.count(-1), changes.count(1)
    return found | {
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
    """Tables for a terminal. Relaxed accuracy is shown where it differs from exact match for any model."""
    from rich.table import Table

    from ..tabular import console, print_table

    say, models = console().print, summary["models"]
    short = short_names(models)
    told = {metric: [found.get(metric, {}).get("mean") for found in models.values()] for metric in summary["metrics"]}
    shown = [m for m in told if m != "relaxed_accuracy" or told[m] != told.get("exact_match")]
    for metric in shown:
        table = Table("rows", "number", *short.values(), title=title(metric), caption="[95% interval]")
        scores = [found.get(metric) for found in models.values()]
        _add_row(table, "all", scores)
        for key in ("by_type", "by_source"):
            parts = [each[key] if each else {} for each in scores]
            groups = sorted({name for each in parts for name in each})
            for name in groups if len(groups) > 1 else ():
                _add_row(table, f"  {name}", [each.get(name) for each in parts])
        print_table(table)
    for each in summary["differences"]:
        if each["metric"] in shown:
            say(_difference_line(each, short))
    for name, found in models.items():
        if found["skipped"]:
            causes = ", ".join(f"{cause} {count}" for cause, count in found["skipped"].items())
            say(f"{short[name]}: {sum(found['skipped'].values())} rows could not be used ({causes})")


def _add_row(table, label: str, scores: list[dict[str, Any] | None]) -> None:
    rows = next((str(score["rows"]) for score in scores if score is not None), "0")
    table.add_row(label, rows, *("-" if score is None else _cell(score) for score in scores))


def _cell(score: dict[str, Any]) -> str:
    low, high = score["interval"]
    return f"{100 * score['mean']:.2f}% [{100 * low:.1f}, {100 * high:.1f}]"


def _difference_line(each: dict[str, Any], short: dict[str, str]) -> str:
    first, second, (low, high) = short[each["first"]], short[each["second"]], each["interval"]
    line = (
        f"{second} less {first}, {title(each['metric'])}: {100 * each['difference']:+.2f} "
        f"[{100 * low:+.2f}, {100 * high:+.2f}] points on {each['rows']} rows"
    )
    if "p" not in each:
        return line
    return (
        f"{line}; only {second} right: {each['only_second']}, only {first}: {each['only_first']}; "
        f"p = {each['p']:.2g} (McNemar, exact)"
    )
