"""A few of the demo's test drawings, and its student as it is before training."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from vlsi_fast.config_data import DataConfig
from vlsi_fast.data import load_processor
from vlsi_fast.demo import inputs, pictures
from vlsi_fast.demo.models import MODELS, make_model
from vlsi_fast.evaluation.answers import Answer, answer_rows
from vlsi_fast.shrinking import shrink

TEACHER = MODELS / "teacher"
METRIC = ["vlsi_fast.demo.pictures:exact_facts", "vlsi_fast.demo.pictures:facts_f1"]


@cache
def _drawn() -> list:
    return [scene for scene in pictures.scenes() if scene[0] == "test"]


def write_drawings(folder: Path, count: int) -> dict:
    """`drawings.jsonl`, the first test drawings, each with `kind`: its number of objects. Returns the source."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for _, number, cells, image in _drawn()[:count]:
        image.save(folder / f"{number}.png")
        words = pictures.describe(cells, random.Random(f"0 words test {number}"))
        row = json.loads(pictures.row(f"{number}.png", pictures.QUESTION, words))
        lines.append(json.dumps(row | {"kind": f"{sum(cell is not None for cell in cells)} objects"}))
    (folder / "drawings.jsonl").write_text("\n".join(lines) + "\n")
    return {"reader": "messages", "path": str(folder / "drawings.jsonl"), "metric": METRIC}


def make_student(folder: Path) -> Path:
    """The teacher with layers left out."""
    return shrink(TEACHER, folder, keep_layers=inputs.KEPT_LAYERS).folder


SIZES = {
    "teacher": {"hidden_size": 192, "layers": 7, "intermediate_size": 512, "heads": 6, "kv_heads": 2},
    "student": {"hidden_size": 96, "layers": 4, "intermediate_size": 192, "heads": 4, "kv_heads": 2},
}
"""3M and 0.6M parameters: as large as a test of memory can do with, and of two widths."""


def start(folder: Path) -> dict:
    """Random models of `SIZES` with the demo's processor, and easy-VQA: overrides of `configs/demo.yaml`."""
    processor = load_processor(TEACHER)
    for role, size in SIZES.items():
        make_model(size, processor.tokenizer).save_pretrained(folder / role)
        processor.save_pretrained(folder / role)
    changes = {f"{role}.path": str(folder / role) for role in SIZES}
    changes |= {"teacher.layers": [1, 2, 3, 4, 5, 6], "student.layers": [1, 2, 3], "data.max_length": 128}
    return changes | {"data.train": [{"reader": "easy_vqa"}], "data.eval": [], "data.root": None}


def answers(checkpoint: Path, data: DataConfig) -> Iterator[Answer]:
    """A checkpoint's answers to `data.eval`."""
    return answer_rows(checkpoint, data, skipped=Counter(), max_new_tokens=inputs.MAX_ANSWER)
