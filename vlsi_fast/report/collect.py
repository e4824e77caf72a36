"""Numbers of a report, out of what the stages recorded. Reads JSON only: no model, no torch.

S, L  target layers of student and teacher        a window: consecutive optimizer steps, averaged
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..config import ConfigError, RunConfig, field_names
from ..evaluation.metrics import title
from ..runs import Run

PROGRESS = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
"""Shares of the verbalize stage at which the paper's appendix B gives the losses."""
WINDOWS = 40
"""Most windows of the KL matrix that the page holds."""
EDGE = 0.1
"""Share of the interact stage that counts as its start, and as its end (the paper's figure 5 does not say)."""

ACCURACIES = {
    "teacher": "teacher_accuracy",
    "student before": "student_before_accuracy",
    "student after VLsI": "student_after_accuracy",
    "student after sft alone (control)": "sft_only_accuracy",
}


def mean(values: list[float]) -> float:
    """Mean, NaN where there is nothing."""
    return sum(values) / len(values) if values else math.nan


def windows(count: int, most: int = WINDOWS) -> list[range]:
    """`count` steps cut into at most `most` windows of nearly equal length."""
    number = min(count, most)
    edges = [round(i * count / number) for i in range(number + 1)] if number else []
    return [range(a, b) for a, b in zip(edges, edges[1:])]


def smooth(values: list[float], width: int) -> list[float]:
    """Centred moving mean over `width` values, fewer at both ends."""
    half = width // 2
    return [mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def token_mean(records: list[dict], name: str) -> float:
    """Mean of a per-token number over steps, each weighted by its answer tokens."""
    tokens = sum(r["answer_tokens"] for r in records)
    return sum(r[name] * r["answer_tokens"] for r in records) / tokens if tokens else math.nan


def losses_of_layers(records: list[dict]) -> dict[str, dict[int, list[float]]]:
    """Of verbalize records: role -> target layer -> loss at each step."""
    found: dict[str, dict[int, list[float]]] = {}
    for name in records[0] if records else ():
        role, _, layer = name.removeprefix("loss/").partition("_layer_")
        if name.startswith("loss/") and layer.isdigit():
            found.setdefault(role, {})[int(layer)] = [record[name] for record in records]
    return found


def appendix_b(layers: dict[int, list[float]]) -> list[dict[str, Any]]:
    """Loss of each layer at `PROGRESS`, each a mean over the 5% of steps before it (at least one step)."""
    rows = []
    for layer, values in sorted(layers.items()):
        width = max(1, round(0.05 * len(values)))
        ends = [max(1, round(share * len(values))) for share in PROGRESS]
        rows.append({"layer": layer, "losses": [mean(values[max(0, end - width) : end]) for end in ends]})
    return rows


def summed(records: list[dict], name: str) -> list[list[float]]:
    """Sum of a [S, L] matrix over steps."""
    first = records[0][name]
    return [[sum(r[name][i][j] for r in records) for j in range(len(first[0]))] for i in range(len(first))]


def kl_windows(records: list[dict]) -> list[dict[str, Any]]:
    """The KL matrix and the share of matches of each window.

    Returns:
        A list of {"first", "last": steps, "kl": [S][L] nats a token, "share": [S][L] of a student layer's matches}.
    """
    result = []
    for window in windows(len(records)):
        part = [records[i] for i in window]
        tokens = max(1, sum(r["answer_tokens"] for r in part))
        weighted = [{"kl": [[v * r["answer_tokens"] for v in row] for row in r["kl"]]} for r in part]
        kl = [[v / tokens for v in row] for row in summed(weighted, "kl")]
        result.append({"first": part[0]["step"], "last": part[-1]["step"], "kl": kl, "share": match_shares(part)})
    return result


def match_shares(records: list[dict]) -> list[list[float]]:
    """[S][L]: of a student layer's matches in these steps, the share that went to each teacher layer."""
    return [[v / max(1, sum(row)) for v in row] for row in summed(records, "matches")]


def start_and_end(records: list[dict]) -> dict[str, list[list[float]]]:
    """Figure 5: shares of matches in the first and in the last `EDGE` of the steps."""
    width = max(1, round(EDGE * len(records)))
    return {"start": match_shares(records[:width]), "end": match_shares(records[-width:])}


def drift(records: list[dict]) -> dict[int, list[float]]:
    """Student layer -> mean matched teacher layer, by its number in the teacher, at each step."""
    teachers = records[0]["teacher_layers"]
    result = {}
    for i, layer in enumerate(records[0]["student_layers"]):
        rows = [record["matches"][i] for record in records]
        result[layer] = [sum(n * t for n, t in zip(row, teachers)) / max(1, sum(row)) for row in rows]
    return result


def cost(run: Run) -> list[dict[str, Any]]:
    """What each stage took: one row a stage, sums over optimizer steps."""
    rows = []
    for stage, record in run.records.items():
        steps = run.metrics(stage)
        seconds = sum(r["step_seconds"] for r in steps)
        tokens = sum(r["tokens_per_second"] * r["step_seconds"] for r in steps)
        waited = sum(r.get("data_wait_share", math.nan) * r["step_seconds"] for r in steps)
        peaks = [r["peak_memory_bytes"] for r in steps]
        rows.append({
            "stage": stage,
            "state": record["state"],
            "device": record.get("summary", {}).get("device", "").split(":")[0],
            "ranks": len(peaks[0]) if peaks else math.nan,
            "optimizer_steps": len(steps),
            "rows": sum(r["rows"] for r in steps),
            "answer_tokens": sum(r["answer_tokens"] for r in steps),
            "seconds": record.get("summary", {}).get("seconds", seconds),
            "tokens_per_second": tokens / seconds if seconds else math.nan,
            "data_wait_share": waited / seconds if seconds else math.nan,
            "peak_memory_bytes": max((max(p) for p in peaks), default=math.nan),
            "skipped_rows": sum((record.get("summary", {}).get("skipped_rows") or {}).values()),
        })  # fmt: skip
    return rows


def demo_scores(run: Run) -> dict[str, Any]:
    """What the demo's `summary.json` says: nothing but empty lists where a run has none.

    Returns:
        {"metrics": titles, "scores": {label: [{"mean", "interval" or None} for each metric]}, "questions": number or
        None, "differences": [{"label", "metric", "difference", "interval"}], VLsI less another model on the same rows}.
    """
    path = run.folder / "summary.json"
    summary = json.loads(path.read_text()) if path.is_file() else {}
    if "scores" not in summary:  # none, or an older file
        old = {label: summary.get(key) for label, key in ACCURACIES.items()}
        scores = {label: [{"mean": v, "interval": None}] for label, v in old.items() if v is not None}
        metrics = [title("exact_match")] if scores else []
        return {"metrics": metrics, "scores": scores, "questions": summary.get("questions"), "differences": []}
    labels = {name: each["label"] for name, each in summary["scores"].items()}
    scores = {labels[name]: [each[m] for m in summary["metrics"]] for name, each in summary["scores"].items()}
    differences = [
        {"label": labels[each["second"]], "metric": title(each["metric"]), "difference": 0.0 - each["difference"],
         "interval": [-bound for bound in reversed(each["interval"])]}
        for each in summary["differences"] if summary["scores"][each["second"]]["optimizer_steps"]
    ]  # fmt: skip
    metrics = [title(metric) for metric in summary["metrics"]]
    return {"metrics": metrics, "scores": scores, "questions": summary["questions"], "differences": differences}


def read_results(path: Path) -> list[dict[str, Any]]:
    """Headline scores of a `vlsi-fast eval --json` file: {"name", "metric", "mean" (0 to 1), "rows", "interval" (95%)}.

    Raises:
        ConfigError: another kind of file.
    """
    try:
        tree = json.loads(path.read_text())
        metric = tree.get("metrics", ["exact_match"])[0]  # an older file has no list of them
        scores = [{"mean": found[metric].get("accuracy")} | found[metric] for found in tree["models"].values()]
        return [
            {"name": name, "metric": title(metric)} | {key: score[key] for key in ("mean", "rows", "interval")}
            for name, score in zip(tree["models"], scores)
        ]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path} holds no scores of vlsi-fast eval; write it with vlsi-fast eval --json") from None


def settings(config: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """Every option of a recorded config: dotted name, value, whether it differs from the default."""
    rows = []
    for name, info in field_names(RunConfig).items():
        value: Any = config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        default = None if info.is_required() else info.get_default(call_default_factory=True)
        default = getattr(default, "model_dump", lambda default=default: default)()
        rows.append((name, json.dumps(value, ensure_ascii=False, default=str), value != default))
    return rows


def differing_settings(configs: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Options whose values are not the same in all runs."""
    tables = [{name: value for name, value, _ in settings(config)} for config in configs]
    return [(n, [t[n] for t in tables]) for n in tables[0] if len({t[n] for t in tables}) > 1]
