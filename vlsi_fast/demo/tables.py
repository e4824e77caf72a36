"""What the demo tells: `summary.json`, and tables on the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..config import RunConfig
from .arms import LABELS, VLSI, Arm


def summarise_run(configs: dict[Arm, RunConfig], answers: dict[str, list]) -> dict[str, Any]:
    """What `summary.json` holds but for times.

    Args:
        configs: of the arms that were run.
        answers: name (of a base model or an arm) -> its answers to the test questions.

    Returns:
        `<name>_accuracy`: mean of the first metric, 0 to 1, None where an arm was not run; `f1`: name -> mean of the
        last metric; `scores`: name -> `label`, `optimizer_steps` (None of a model that is scored as it is), and each
        metric's `mean` and `interval`; `differences`: VLsI (first) against each other model,
        paired by question; `questions`, `metrics`, `stages` (VLsI's), `arms`, `peak_rss_bytes`, `seed`, `versions`.
    """
    from ..evaluation.report import summarise
    from ..lineage import versions

    order = {VLSI.name: answers[VLSI.name]} | answers
    found = summarise(order, {name: {} for name in order})
    scores, metrics = found["models"], found["metrics"]
    arms = {arm.name: _of_arm(config) for arm, config in configs.items()}
    stages = arms[VLSI.name]["stages"]
    return {f"{name}_accuracy": scores[name][metrics[0]]["mean"] if name in scores else None for name in LABELS} | {
        "f1": {name: scores[name][metrics[-1]]["mean"] if name in scores else None for name in LABELS},
        "scores": {name: _scores(name, scores[name], metrics, arms) for name in LABELS if name in answers},
        "differences": found["differences"],
        "metrics": metrics,
        "questions": scores["teacher"][metrics[0]]["rows"],
        "stages": stages,
        "stages_seconds": sum(stage["seconds"] for stage in stages.values()),
        "arms": arms,
        "peak_rss_bytes": _peak_rss(Path(configs[VLSI].output_dir)),
        "seed": configs[VLSI].seed,
        "versions": versions(),
    }


def _scores(name: str, found: dict[str, Any], metrics: list[str], arms: dict[str, Any]) -> dict[str, Any]:
    told = {m: {key: found[m][key] for key in ("mean", "interval")} for m in metrics}
    steps = arms[name]["optimizer_steps"] if name in arms else None
    return {"label": LABELS[name], "optimizer_steps": steps} | told


def _of_arm(config: RunConfig) -> dict[str, Any]:
    stages = {stage: _summary(config.stage_dir(stage)) for stage in config.stages}
    steps = sum(stage["optimizer_steps"] for stage in stages.values())
    return {"folder": config.output_dir, "optimizer_steps": steps, "stages": stages}


def _summary(folder: Path) -> dict[str, Any]:
    summary = json.loads((folder / "vlsi_stage.json").read_text())["summary"]
    return {name: summary[name] for name in ("seconds", "optimizer_steps", "answer_tokens", "skipped_rows")}


def _peak_rss(folder: Path) -> int:
    """Largest sum over ranks of resident memory in any stage of any arm, bytes."""
    records = (json.loads(line) for file in folder.glob("**/metrics.jsonl") for line in file.read_text().splitlines())
    return max((sum(record["peak_rss_bytes"]) for record in records), default=0)


def print_tables(summary: dict[str, Any], output: Path, report: Path) -> None:
    """Scores of all models, what training took, where everything lies, and the run in one sentence."""
    from rich.console import Console
    from rich.table import Table

    from ..evaluation.metrics import title
    from ..report.collect import demo_scores
    from ..report.headline import of_scores

    console, metrics = Console(highlight=False), summary["metrics"]
    table = Table(
        "model",
        "steps",
        *(f"{title(metric)} [95%]" for metric in (metrics[0], metrics[-1])),
        title=f"{summary['questions']} drawings of the test split",
    )
    for score in summary["scores"].values():
        cells = [_cell(score[m]) for m in (metrics[0], metrics[-1])]
        table.add_row(score["label"], str(score["optimizer_steps"] or ""), *cells)
    console.print(table)
    for each in summary["differences"]:
        if each["metric"] == metrics[0] and each["second"] in summary["arms"]:
            low, high = (-100 * bound for bound in reversed(each["interval"]))
            gain = 0.0 - 100 * each["difference"]  # no -0.0
            console.print(f"VLsI less {LABELS[each['second']]}: {gain:+.1f} points [{low:+.1f}, {high:+.1f}]")
    console.print(
        f"peak memory of training {summary['peak_rss_bytes'] / 2**30:.2f} GiB, all in all {summary['seconds']:.0f} s\n"
        f"distilled student: {output / 'interact' / 'student'}\nsummary: {output / 'summary.json'}\n"
        f"report, with what each layer says: {report}\n"
        f"ask its layers yourself: vlsi-fast verbalize --run {output} --image {output}/data/images/test/0000.png "
        "--question 'describe the image.'"
    )
    console.print(of_scores(demo_scores(summary)["tables"][0]["scores"]), style="bold")


def _cell(score: dict[str, Any]) -> str:
    low, high = score["interval"]
    return f"{100 * score['mean']:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"
