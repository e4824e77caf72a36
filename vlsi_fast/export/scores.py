"""Results for a model card: the demo's `summary.json`, and JSON files of `vlsi-fast eval`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..runs import Run

THIS = "this model"


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
    model: str = THIS
    """Whose score it is, where a file has those of several."""


def read_scores(path: Path, students: Iterable[Path]) -> list[Score]:
    """The scores of a file that `vlsi-fast eval --json` wrote.

    Args:
        path: the file.
        students: folders in which the exported student lies; in a file of several models it is known by its folder.

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
    models = tree.get("models") if isinstance(tree, dict) else None
    own, found = {folder.resolve() for folder in students}, []
    for name, entry in models.items() if isinstance(models, dict) else ():
        is_own = len(models) == 1 or Path(str(entry.get("path", ""))).resolve() in own
        found += _of_model(THIS if is_own else name, entry, path.stem)
    if not found:
        raise ConfigError(f"--results {path} holds no scores; write it with vlsi-fast eval --json")
    return found


def _of_model(model: str, entry: dict[str, Any], stem: str) -> Iterator[Score]:
    """One model of `vlsi-fast eval`: metric -> mean, rows, interval, and these by source and type of question."""
    for metric, share in entry.items():
        if not (isinstance(share, dict) and ("mean" in share or "accuracy" in share)):  # its path, rows skipped
            continue
        sources = share.get("by_source") or {}
        data = ", ".join(sources) or stem
        yield _score(data, metric, share, True, model)
        parts = (share.get("by_type") or {}) | (sources if len(sources) > 1 else {})
        for name, part in parts.items():
            yield _score(f"{data}: {name}", metric, part, False, model)


def _score(name: str, metric: str, share: dict[str, Any], whole: bool, model: str) -> Score:
    value = share.get("mean", share.get("accuracy"))  # older files have accuracies only
    return Score(name, metric, value, share["rows"], tuple(share["interval"]), whole, model)


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
            "student_after_accuracy": THIS,
            "sft_best_accuracy": "control: the student after plain sft alone, its best number of optimizer steps",
            "sft_only_accuracy": "control: the student after plain sft alone, equally many optimizer steps",
        }
        rows = [(label, float(summary[key])) for key, label in labels.items() if summary.get(key) is not None]
        questions = summary.get("questions")
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged ({error}); delete it, or run the demo again") from None
    names = ", ".join(map(source_label, run.config_tree["data"]["eval"]))
    return f"{names}, {questions} questions", rows


def source_label(source: dict[str, Any]) -> str:
    """What a source of the config is called; no folders, since cards are published."""
    path = source["path"][0] if isinstance(source["path"], list) else source["path"]
    return source["name"] or (Path(path).name if path else source["reader"])
