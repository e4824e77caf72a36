"""The page: what collect.py found, as one HTML file that needs no network."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from .. import __version__
from ..evaluation.report import short_names
from ..runs import Run
from . import collect, headline
from .charts import flow, lines

TEMPLATE = "page.html.j2"
ORDER = ("teacher", "before", "control", "other", "after", "more")
"""Of the roles of models in a chart."""


def build_page(runs: list[Run], results: list[dict[str, Any]] = (), samples: dict[Path, Any] | None = None) -> str:
    """The HTML of one run, or of several compared.

    Args:
        runs: at least one.
        results: further accuracies, as `collect.read_results` reads them.
        samples: run folder -> what its layers say, or the reason why that is missing (see samples.py).
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("vlsi_fast.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "gib": gib, "duration": duration, "points": points}
    environment.filters["together"] = together
    short = short_names(str(run.folder.resolve()) for run in runs)
    names = list(short.values())
    told = [collect.demo_scores(collect.read_summary(run)) for run in runs]
    several = len(runs) > 1
    tables = [
        table | {"run": name * several, "further": i > 0}
        for each, name in zip(told, names)
        for i, table in enumerate(each["tables"])
    ] + collect.eval_scores(runs, results)
    return environment.get_template(TEMPLATE).render(
        title="VLsI: " + ", ".join(names),
        version=__version__,
        names=names,
        sentences=[
            collect.sentence(run, each["tables"] + collect.eval_scores([run], results)) for run, each in zip(runs, told)
        ],
        tables=[
            table | {"scores": sorted(table["scores"], key=lambda score: ORDER.index(score.role))} for table in tables
        ],
        roles={score.role for table in tables for score in table["scores"]},
        differences=[each["differences"] for each in told],
        curves=_compared(runs, names) if several else [],
        differing=collect.differing_settings([_config(run) for run in runs]) if several else [],
        runs=[_one(run, name, (samples or {}).get(run.folder)) for run, name in zip(runs, names)],
    )


def _config(run: Run) -> dict[str, Any]:
    return run.records[run.last_stage]["config"]


def _one(run: Run, name: str, samples) -> dict[str, Any]:
    """Everything of one run's section."""
    steps = {stage: run.metrics(stage) for stage in run.records}
    evaluated = {stage: _evaluated(stage, records, run.evaluations(stage)) for stage, records in steps.items()}
    last, cost = run.records[run.last_stage], collect.cost(run)
    return {
        "name": name,
        "folder": str(run.folder),
        "states": {stage: record["state"] for stage, record in run.records.items()},
        "cost": cost,
        "totals": collect.totals(cost),
        "verbalize": _verbalize(steps.get("verbalize") or []),
        "interact": _interact(steps.get("interact") or []),
        "sft": _loss_chart({"answers": steps.get("sft") or []}, "sft: loss", "nats a token"),
        "evaluated": evaluated,
        "speed": _speed(steps),
        "samples": samples and samples | {"rows": [_figure(row) for row in samples["rows"]]},
        "settings": collect.settings(last["config"]),
        "versions": last.get("versions", {}),
        "parents": {role: facts for role, facts in last.get("facts", {}).items()},
    }


def _figure(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample's answers as cells of a grid: a column a model, from the shallow layers (row 1) to the own answers.

    The deepest model has a layer a row; layers of others span as many rows as put them at about the same depth.
    """
    columns = sample["columns"]
    depth = max(1, *(len(column["cells"]) - 1 for column in columns)) if columns else 1
    cells = []
    for j, column in enumerate(columns):
        *layers, own = column["cells"]
        for i, cell in enumerate(layers):
            row, end = i * depth // len(layers), (i + 1) * depth // len(layers)
            cells.append(cell | {"model": column["model"], "column": j + 1, "row": row + 1, "span": end - row})
        cells.append(own | {"model": column["model"], "column": j + 1, "row": depth + 1, "span": 1})
    own = {column["model"]: column["cells"][-1]["right"] for column in columns}
    return sample | {"own": own, "depth": depth, "cells": sorted(cells, key=lambda cell: (cell["row"], cell["column"]))}


def _verbalize(records: list[dict]) -> dict[str, Any] | None:
    if not records:
        return None
    steps, charts, tables = [r["step"] for r in records], [], {}
    for role, layers in collect.losses_of_layers(records).items():
        width = max(1, len(steps) // 50)
        series = {f"layer {k}": (steps, collect.smooth(v, width)) for k, v in sorted(layers.items())}
        charts.append(lines(series, f"{role}: verbalization loss", "nats a token", log=True))
        tables[role] = collect.appendix_b(layers)
    return {"charts": charts, "tables": tables, "progress": collect.PROGRESS}


def _interact(records: list[dict]) -> dict[str, Any] | None:
    if not records:
        return None
    steps, width = [r["step"] for r in records], max(1, len(records) // 50)
    losses = [name for name in records[0] if name.startswith("loss/")]
    label = {name: name.removeprefix("loss/").replace("_", " ") for name in losses}
    series = {label[n]: (steps, collect.smooth([r[n] for r in records], width)) for n in losses}
    found = {"charts": [lines(series, "interact: loss of each layer", "nats a token", log=True)]}
    weights = [r.get("intermediate_weight", 1.0) for r in records]  # older records have none
    if len(set(weights)) > 1:
        found["charts"].append(lines({"target layers": (steps, weights)}, "factor of the losses", "factor"))
    if "matches" not in records[0]:
        return found | {"students": [], "teachers": []}
    moved = collect.drift(records)
    drift = {f"student layer {k}": (steps, collect.smooth(v, max(1, len(steps) // 20))) for k, v in moved.items()}
    found["charts"].append(lines(drift, "mean matched teacher layer", "teacher layer"))
    return found | {
        "students": records[0]["student_layers"],
        "teachers": records[0]["teacher_layers"],
        "edges": _edges(records),
        "windows": collect.kl_windows(records),
    }


def _edges(records: list[dict]) -> list[dict[str, Any]]:
    """Matches of the first and of the last steps, as shares and as a flow."""
    shares, layers = collect.start_and_end(records), (records[0]["student_layers"], records[0]["teacher_layers"])
    words = {"start": "first", "end": "last"}
    return [
        {"title": f"{words[edge]} {collect.EDGE:.0%} of the steps", "shares": found, "flow": flow(found, *layers)}
        for edge, found in shares.items()
    ]


def _loss_chart(stages: dict[str, list[dict]], title: str, unit: str) -> str | None:
    series = {}
    for name, records in stages.items():
        if records:
            width = max(1, len(records) // 50)
            series[name] = ([r["step"] for r in records], collect.smooth([r["loss"] for r in records], width))
    return lines(series, title, unit, log=True) if series else None


def _evaluated(stage: str, records: list[dict], evaluations: list[dict]) -> list[str]:
    """Charts of a stage's evaluations while training: loss, beside that of the training's own rows, and exact match."""
    if not evaluations:
        return []
    steps = [r["step"] for r in evaluations]
    series = {"data.eval": (steps, [r["loss"] for r in evaluations])}
    if len({r.get("intermediate_weight") for r in records}) == 1:  # else its parts are weighed otherwise at each step
        own = collect.smooth([r["loss"] for r in records], max(1, len(records) // 50))
        series["data.train"] = ([r["step"] for r in records], own)
    charts = [lines(series, f"{stage}: loss on data.eval", "nats a token", log=True)]
    if "exact_match" in evaluations[0]:
        match = {"data.eval": (steps, [r["exact_match"] for r in evaluations])}
        charts.append(lines(match, f"{stage}: exact match on data.eval", "share of rows"))
    return charts


def _speed(steps: dict[str, list[dict]]) -> list[str]:
    """Tokens a second and data-wait share of every stage."""
    charts = []
    for key, title, unit in (
        ("tokens_per_second", "throughput, all ranks", "tokens a second"),
        ("data_wait_share", "waiting for data", "share of a step"),
    ):
        series = {}
        for stage, records in steps.items():
            known = [r for r in records if key in r][1:]  # the first step holds start-up
            if known:
                values = collect.smooth([r[key] for r in known], max(1, len(known) // 50))
                series[stage] = ([r["step"] for r in known], values)
        if series:
            charts.append(lines(series, title, unit))
    return charts


def _compared(runs: list[Run], names: list[str]) -> list[str]:
    """The loss of each stage, all runs in one chart; stages that only one run has are left to its own section."""
    charts = []
    for stage in ("verbalize", "interact", "sft"):
        found = {name: run.metrics(stage) for run, name in zip(runs, names)}
        if sum(map(bool, found.values())) > 1:
            charts.append(_loss_chart(found, f"{stage}: loss", "nats a token"))
    return charts


# ---- filters ----


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits, thousands apart; a dash where unknown."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, int) or abs(value) >= 10**digits:
        return f"{round(value):,}"
    return f"{value:#.{digits}g}".rstrip(".")


def percent(value: float | None) -> str:
    """0.9653 -> 96.5%."""
    return "–" if value is None or math.isnan(value) else headline.percent(value)


def together(sentence: str) -> str:
    """With no line break between a name and its percentage."""
    return re.sub(r" (?=\d+\.\d%)", "\u00a0", sentence)


def gib(value: float) -> str:
    """Bytes -> GiB."""
    return "–" if math.isnan(value) else f"{value / 2**30:.2f} GiB"


def duration(seconds: float) -> str:
    """Seconds -> the two largest units."""
    if math.isnan(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    pairs = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    first = next((i for i, (n, _) in enumerate(pairs) if n), 3)
    return " ".join(f"{n} {unit}" for n, unit in pairs[first : first + 2])


def points(value: float) -> str:
    """A difference of shares: 0.105 -> +10.5."""
    return f"{100 * value:+.1f}"
