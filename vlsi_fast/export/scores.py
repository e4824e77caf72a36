"""Results for a model card: the demo's `summary.json`, and JSON files of `vlsi-fast eval`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..runs import Run

METRIC = re.compile(r"(relaxed_|mean_)?accuracy|exact_match|anls|f1|cider|score")
NAMES = ("name", "label", "benchmark", "task", "dataset")
COUNTS = ("rows", "questions", "samples", "n")
INTERVALS = ("interval", "accuracy_interval", "confidence_interval", "ci", "ci95")


@dataclass(frozen=True)
class Score:
    """One number of a results table."""

    name: str
    """Of the benchmark or data."""
    metric: str
    value: float
    rows: int | None = None
    interval: tuple[float, float] | None = None
    whole: bool = True
    """False for a part of a benchmark, such as one type of question."""


def read_scores(path: Path) -> list[Score]:
    """The scores of a JSON file: of every mapping in it with an accuracy or the like, whatever lies around them.

    Raises:
        FileNotFoundError: no such file.
        ConfigError: no JSON, or no score in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--results {path} does not exist; write it with vlsi-fast eval --json")
    try:
        tree = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"--results {path} is not valid JSON: {error}") from None
    found = list(_walk(tree, path.stem, whole=True))
    if not found:
        raise ConfigError(f"--results {path} holds no score: no mapping in it has a field accuracy or exact_match")
    return found


def _walk(tree: Any, name: str, whole: bool) -> Iterator[Score]:
    if isinstance(tree, list):
        for item in tree:
            yield from _walk(item, name, whole)
    if not isinstance(tree, dict):
        return
    named = next((tree[key] for key in NAMES if isinstance(tree.get(key), str)), name)
    metrics = {key: value for key, value in tree.items() if METRIC.fullmatch(key) and _is_number(value)}
    rows = next((tree[key] for key in COUNTS if isinstance(tree.get(key), int)), None)
    ranges = (tree[key] for key in INTERVALS if isinstance(tree.get(key), list) and len(tree[key]) == 2)
    interval = next((tuple(pair) for pair in ranges if all(map(_is_number, pair))), None)
    for metric, value in metrics.items():
        yield Score(named, metric, float(value), rows, interval, whole)
    for key, value in tree.items():
        if isinstance(value, (dict, list)):
            below = f"{named}, {key}" if metrics else key
            yield from _walk(value, below, whole and not metrics)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def summary_scores(run: Run) -> tuple[str, list[tuple[str, float]]]:
    """Of the demo's summary.json: what was asked, and (model, exact match) of every model. Empty where there is none.

    Raises:
        ConfigError: the file is damaged.
    """
    path = run.folder / "summary.json"
    if not path.is_file():
        return "", []
    try:
        summary = json.loads(path.read_text())
        labels = {
            "teacher_accuracy": "teacher",
            "student_before_accuracy": "student before",
            "student_after_accuracy": "**this model**",
            "sft_only_accuracy": "control: the student after plain sft alone, equally many optimizer steps",
        }
        rows = [(label, float(summary[key])) for key, label in labels.items() if summary.get(key) is not None]
        questions = summary.get("questions")
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged ({error}); delete it, or run the demo again") from None
    names = ", ".join(source["name"] or source["reader"] for source in run.config_tree["data"]["eval"])
    return f"{names or 'the data of `data.eval`'}, {questions} questions", rows
