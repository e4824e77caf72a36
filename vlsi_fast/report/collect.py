"""Numbers of a report, out of what the stages recorded. Reads JSON only: no model, no torch.

S, L  target layers of student and teacher        a window: consecutive optimizer steps, averaged
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import ConfigError, RunConfig, field_names
from ..evaluation.intervals import wilson
from ..evaluation.metrics import title
from ..evaluation.report import short_names
from ..runs import Run
from . import headline
from .headline import Score

PROGRESS = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
"""Shares of the verbalize stage at which the paper's appendix B gives the losses."""
WINDOWS = 40
"""Most windows of the KL matrix that the page holds."""
EDGE = 0.1
"""Share of the interact stage that counts as its start, and as its end (the paper's figure 5 does not say)."""

ROLES = {
    "teacher": "teacher",
    "student_before": "before",
    "student_after": "after",
    "sft_best": "control",
    "sft_only": "control",
    "last_layer": "control",
}
"""Of the models in the demo's `summary.json`; all others learn from more than the labels of these."""
OLDER = {
    "teacher": "teacher",
    "student_before": "student before",
    "student_after": "student after VLsI",
    "sft_only": "sft alone",
}
"""Labels of models in an older `summary.json`, which has accuracies alone."""


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
        rows.append(
            {
                "stage": stage,
                "state": record["state"],
                "device": record.get("summary", {}).get("device", "").split(":")[0],
                "ranks": len(peaks[0]) if peaks else math.nan,
                "optimizer_steps": len(steps),
                "rows": sum(r["rows"] for r in steps),
                "answer_tokens": sum(r["answer_tokens"] for r in steps),
                "seconds": record.get("summary", {}).get("seconds", seconds),
                "step_seconds": seconds,
                "tokens_per_second": tokens / seconds if seconds else math.nan,
                "data_wait_share": waited / seconds if seconds else math.nan,
                "peak_memory_bytes": max((max(p) for p in peaks), default=math.nan),
                "skipped_rows": sum((record.get("summary", {}).get("skipped_rows") or {}).values()),
                "best": best(record.get("summary", {})),
            }
        )
    return rows


def best(summary: dict[str, Any]) -> str:
    """What a stage's record says of its best evaluation, in words; empty where it had none."""
    found = summary.get("best") or {}
    if found.get("step") is None:
        return ""
    taken = ", the result's" if found["loaded"] else ""
    early = ", ended early" if summary.get("stopped_early_at") else ""
    return f"{found['metric']} {found['value']:.4g}, step {found['step']}{taken}{early}"


def demo_scores(summary: dict[str, Any]) -> dict[str, Any]:
    """What the demo's `summary.json` says: nothing but empty lists where it has no scores.

    Returns:
        {"tables": one for each metric, {"metric", "questions", "scores": list of `Score`}, "differences": [{"label",
        "metric", "difference", "interval"}], VLsI less another model on the same questions}.
    """
    questions = summary.get("questions")
    if "scores" not in summary:
        scores = [
            Score(label, ROLES[name], found, _wilson(found, questions))
            for name, label in OLDER.items()
            if (found := summary.get(f"{name}_accuracy")) is not None
        ]
        table = {"metric": title("exact_match"), "questions": questions, "scores": scores}
        return {"tables": [table] if scores else [], "differences": []}
    tables = [
        {
            "metric": title(metric),
            "questions": questions,
            "scores": [
                Score(each["label"], ROLES.get(name, "more"), each[metric]["mean"], each[metric]["interval"])
                for name, each in summary["scores"].items()
            ],
        }
        for metric in summary["metrics"]
    ]
    differences = [
        {
            "label": summary["scores"][each["second"]]["label"],
            "metric": title(each["metric"]),
            "difference": 0.0 - each["difference"],
            "interval": [-bound for bound in reversed(each["interval"])],
        }
        for each in summary["differences"]
        if summary["scores"][each["second"]]["optimizer_steps"]
    ]
    return {"tables": tables, "differences": differences}


def read_summary(run: Run) -> dict[str, Any]:
    """The demo's `summary.json` in a run's folder; empty where there is none."""
    path = run.folder / "summary.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _wilson(accuracy: float, questions: int | None) -> tuple[float, float] | None:
    """Interval of an accuracy of which only the number of questions is known."""
    return wilson(round(accuracy * questions), questions) if questions else None


def eval_scores(runs: Sequence[Run], results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tables as `demo_scores` has them of what `read_results` read, one for each file; of no run, none of them further.

    Models that are a run's base student, trained student or teacher get these roles, by their folder or name. Of one
    run they are called so, too.
    """
    known = [(role, path) for run in runs for role, path in _own_models(run)]
    short = short_names(row["name"] for row in results)

    def score(row: dict[str, Any]) -> Score:
        role = next((role for role, path in known if _same(row, path)), "other")
        label = headline.LABELS.get(role) if len(runs) == 1 else None
        return Score(label or short[row["name"]], role, row["mean"], row["interval"])

    tables = []
    for file in dict.fromkeys(row["file"] for row in results):
        rows = [row for row in results if row["file"] == file]
        questions = max(row["rows"] for row in rows)
        scores = [score(row) for row in rows]
        tables.append(
            {"metric": rows[0]["metric"], "questions": questions, "scores": scores} | {"run": "", "further": False}
        )
    return tables


def _own_models(run: Run) -> list[tuple[str, str]]:
    found = [("before", run.base("student")), ("teacher", run.base("teacher"))]
    with contextlib.suppress(FileNotFoundError):  # none is trained yet
        found.insert(0, ("after", str(run.student)))
    return found


def _same(row: dict[str, Any], path: str) -> bool:
    folder = row.get("path")
    return row["name"] == path or (folder is not None and Path(folder).resolve() == Path(path).resolve())


def sentence(run: Run, tables: list[dict[str, Any]]) -> str:
    """The run in one sentence, by the first table that has its student's score, else by its last stage's loss."""
    for table in tables:
        if (found := headline.of_scores(table["scores"])) is not None:
            return found
    for stage in reversed(run.records):
        if records := run.metrics(stage):
            width = max(1, round(0.05 * len(records)))
            ends = [token_mean(part, "loss") for part in (records[:width], records[-width:])]
            return headline.of_losses(stage, *ends, len(records))
    return headline.NOTHING


def totals(cost: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole run's cost out of its stages' (`cost`), NaN where unknown."""
    measured = [c for c in cost if not math.isnan(c["tokens_per_second"])]
    busy = sum(c["step_seconds"] for c in measured)
    return {
        "seconds": sum(c["seconds"] for c in cost),
        "optimizer_steps": sum(c["optimizer_steps"] for c in cost),
        "answer_tokens": sum(c["answer_tokens"] for c in cost),
        "tokens_per_second": sum(c["tokens_per_second"] * c["step_seconds"] for c in measured) / busy
        if busy
        else math.nan,
        "peak_memory_bytes": max((c["peak_memory_bytes"] for c in measured), default=math.nan),
        "ranks": max((c["ranks"] for c in measured), default=math.nan),
        "device": cost[-1]["device"] if cost else "",
    }


def read_results(path: Path) -> list[dict[str, Any]]:
    """Headline scores of a `vlsi-fast eval --json` file: {"name", "path", "file", "metric", "mean" (0 to 1), "rows",
    "interval" (95%)}.

    Raises:
        ConfigError: another kind of file.
    """
    try:
        tree = json.loads(path.read_text())
        metric = tree.get("metrics", ["exact_match"])[0]  # an older file has no list of them
        scores = [{"mean": found[metric].get("accuracy")} | found[metric] for found in tree["models"].values()]
        return [
            {"name": name, "path": tree["models"][name].get("path"), "file": str(path), "metric": title(metric)}
            | {key: score[key] for key in ("mean", "rows", "interval")}
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
