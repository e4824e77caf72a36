"""The page: what collect.py found, as one HTML file that needs no network."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .. import __version__
from ..evaluation.report import short_names
from ..runs import Run
from . import collect
from .charts import lines

TEMPLATE = "page.html.j2"


def build_page(runs: list[Run], results: list[dict[str, Any]] = (), samples: dict[Path, Any] | None = None) -> str:
    """The HTML of one run, or of several compared.

    Args:
        runs: at least one.
        results: further accuracies, as `collect.read_results` reads them.
        samples: run folder -> what its layers say, or the reason why that is missing (see samples.py).
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("vlsi_fast.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": number, "percent": percent, "gib": gib, "duration": duration, "tint": tint}
    environment.filters |= {"shade": shade, "points": points}
    short = short_names(str(run.folder.resolve()) for run in runs)
    names = list(short.values())
    return environment.get_template(TEMPLATE).render(
        title="VLsI: " + ", ".join(names),
        version=__version__,
        names=names,
        headline=_headline(runs, names, results),
        curves=_compared(runs, names) if len(runs) > 1 else [],
        differing=collect.differing_settings([_config(run) for run in runs]) if len(runs) > 1 else [],
        runs=[_one(run, name, (samples or {}).get(run.folder)) for run, name in zip(runs, names)],
    )


def _config(run: Run) -> dict[str, Any]:
    return run.records[run.last_stage]["config"]


def _headline(runs: list[Run], names: list[str], results) -> dict[str, Any]:
    """Scores by model, run and metric, questions, cost of the whole run."""
    found = [collect.demo_scores(run) for run in runs]
    labels = list(dict.fromkeys(label for each in found for label in each["scores"]))
    costs = [collect.cost(run) for run in runs]
    return {
        "labels": labels,
        "columns": [
            {"metric": m, "run": r, "at": i}
            for r, each in enumerate(found)
            for i, m in enumerate(each["metrics"] or [""])
        ],
        "widths": [max(1, len(each["metrics"])) for each in found],
        "scores": [each["scores"] for each in found],
        "differences": [each["differences"] for each in found],
        "questions": [each["questions"] for each in found],
        "results": list(results),
        "seconds": [sum(c["seconds"] for c in cost) for cost in costs],
        "steps": [sum(c["optimizer_steps"] for c in cost) for cost in costs],
        "memory": [max((c["peak_memory_bytes"] for c in cost), default=math.nan) for cost in costs],
        "ranks": [max((c["ranks"] for c in cost), default=math.nan) for cost in costs],
        "device": [cost[-1]["device"] for cost in costs],
    }


def _one(run: Run, name: str, samples) -> dict[str, Any]:
    """Everything of one run's section."""
    steps = {stage: run.metrics(stage) for stage in run.records}
    last = run.records[run.last_stage]
    return {
        "name": name,
        "folder": str(run.folder),
        "states": {stage: record["state"] for stage, record in run.records.items()},
        "cost": collect.cost(run),
        "verbalize": _verbalize(steps.get("verbalize") or []),
        "interact": _interact(steps.get("interact") or []),
        "sft": _loss_chart({"answers": steps.get("sft") or []}, "sft: loss", "nats a token"),
        "speed": _speed(steps),
        "samples": samples,
        "settings": collect.settings(last["config"]),
        "versions": last.get("versions", {}),
        "parents": {role: facts for role, facts in last.get("facts", {}).items()},
    }


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
        "edges": collect.start_and_end(records),
        "edge": collect.EDGE,
        "windows": collect.kl_windows(records),
    }


def _loss_chart(stages: dict[str, list[dict]], title: str, unit: str) -> str | None:
    series = {}
    for name, records in stages.items():
        if records:
            width = max(1, len(records) // 50)
            series[name] = ([r["step"] for r in records], collect.smooth([r["loss"] for r in records], width))
    return lines(series, title, unit, log=True) if series else None


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
    """0.9653 -> 96.53%."""
    return "–" if value is None or math.isnan(value) else f"{100 * value:.2f}%"


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


def shade(share: float) -> str:
    """A score (0 to 1) as a background behind dark text: white to green."""
    return f"background:hsl(150 45% {100 - 26 * max(0.0, min(1.0, share)):.0f}%)"


def tint(share: float) -> str:
    """A share (0 to 1) as a cell's background and text colour."""
    light = 97 - 62 * max(0.0, min(1.0, share))
    return f"background:hsl(210 70% {light:.0f}%);color:{'#fff' if light < 55 else '#1f2933'}"
