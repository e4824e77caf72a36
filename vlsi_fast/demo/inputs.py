"""What the demo starts from: pictures drawn on the spot, the student, and the teacher's answers.

What is made:

    <output_dir>/data/        labelled.jsonl, validation.jsonl, test.jsonl, answered.jsonl, images/
    <output_dir>/start/       the student before training
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from ..config import RunConfig
from . import pictures

LABELLED, UNLABELLED = 300, 1500
KEPT_LAYERS = [1, 3, 6, 8]
"""Of the teacher's 8 decoder layers, counted from 1."""
MAX_ANSWER = 96
"""Tokens of an answer; the longest description has fewer."""


def draw_data(folder: Path, splits: dict[str, int] = pictures.SPLITS) -> None:
    """Draw `data/`: the first `LABELLED` pictures of split `train` with descriptions, its last `UNLABELLED` without.

    They are the pictures of `pictures.write` (seed 0), so that the shipped teacher has seen none of them.
    """
    rows: dict[str, list[str]] = {"labelled": [], "validation": [], "test": []}
    for kind, number, cells, image in _wanted(splits):
        name = f"images/{kind}/{number:04}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name)
        if kind != "unlabelled":
            split = "train" if kind == "labelled" else kind
            words = pictures.describe(cells, random.Random(f"0 words {split} {number}"))
            rows[kind].append(pictures.row(name, pictures.QUESTION, words))
    for kind, lines in rows.items():
        (folder / f"{kind}.jsonl").write_text("\n".join(lines) + "\n")


def _wanted(splits: dict[str, int]) -> Iterator[tuple]:
    """Kind, number, cells and picture of what is needed."""
    for split, number, cells, image in pictures.scenes(splits):
        if split in ("validation", "test"):
            yield split, number, cells, image
        elif split == "train" and number < LABELLED:
            yield "labelled", number, cells, image
        elif split == "train" and number >= splits["train"] - UNLABELLED:
            yield "unlabelled", number, cells, image


def make_student(config: RunConfig) -> None:
    """Make `start/student` of the teacher, by leaving out layers.

    Raises:
        ConfigError: the teacher has other layers.
    """
    from ..shrinking import shrink

    shrink(config.teacher.path, config.student.path, keep_layers=KEPT_LAYERS)


def answer_pictures(config: RunConfig) -> int:
    """Write `data/answered.jsonl`: what the teacher says of the pictures without labels, sampled at temperature 1.

    Returns:
        Rows written.
    """
    from ..data.answering import answer

    data = Path(config.output_dir) / "data"
    manifest = answer(
        config,
        data / "images" / "unlabelled",
        pictures.QUESTION,
        data / "answered.jsonl",
        temperature=1.0,
        max_new_tokens=MAX_ANSWER,
        batch_size=250,
        seed=config.seed,
        progress=False,
    )
    return manifest["kept"]
