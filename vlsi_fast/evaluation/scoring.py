"""Exact match of a checkpoint's own answers in one call; `vlsi-fast eval` tells more."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from ..config_data import DataConfig
from . import metrics
from .answers import answer_rows


def exact_match(checkpoint: str | Path, data: DataConfig, **options: Any) -> dict:
    """Share of the rows of `data.eval` whose last answer the model gives word for word.

    Args:
        checkpoint: folder of a stock checkpoint with its processor.
        data: its `eval` sources and image bounds are used.
        options: of `evaluation.answers.answer_rows`: num_beams, batch_size, max_new_tokens, dtype, ..

    Returns:
        `accuracy` (0 to 1), `correct`, `rows` (those scored) and `skipped` (cause -> rows that cannot be used).
    """
    skipped = Counter()
    answers = answer_rows(checkpoint, data, skipped=skipped, **options)
    right = [metrics.exact_match(answer.prediction, answer.answer) for answer in answers]
    correct, rows = sum(right), len(right)
    return {"accuracy": correct / max(rows, 1), "correct": correct, "rows": rows, "skipped": dict(skipped)}
