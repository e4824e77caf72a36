"""What each layer says about rows of the run's own data: base student, distilled student and teacher side by side."""

from __future__ import annotations

import base64
import io
from typing import Any

import torch

from ..data.encoding import check_messages
from ..data.images import check_pixels, load_image
from ..data.skipped import UnusableRow, row_boundary
from ..data.sources import build_source
from ..evaluation.metrics import normalise
from ..loading import resolve_folder
from ..runs import Run
from ..viewer.columns import open_source, sources_of
from ..weights import read_weights

MODELS = ("base", "distilled", "teacher")
SHARE_OF_MEMORY = 0.8
"""Of the free memory, that a model's weights may take."""
THUMBNAIL = 256
"""Longest side, pixels, of an image on the page; smaller ones are shown as they are."""
MAX_CHARACTERS = 20_000
"""Of a question or an answer on the page."""


def what_layers_say(run: Run, count: int, max_new_tokens: int = 64) -> dict[str, Any]:
    """Answers of every target layer, and of the model itself, to `count` questions.

    Args:
        run: its base student, distilled student and teacher are loaded one after the other (as `vlsi-fast verbalize`).
        count: rows of data.eval (of data.train where there is none), spread evenly; those with one question only.
        max_new_tokens: length of an answer.

    Returns:
        {"rows": [{"images": [data URI], "question", "answer", "models": [name], "rows": [{"layer", "cells"}]}],
        "reason": what is missing and why, or ""}; a cell is {"text", "right"} or None where a model has no such layer.
    """
    try:
        questions = _questions(run, count)
    except (ValueError, FileNotFoundError) as error:
        return {"rows": [], "reason": f"No samples, since the run's data cannot be read: {error}"}
    answers: dict[str, list[dict]] = {}
    problems = []
    for name in MODELS:
        try:
            compare = [name] if name != "distilled" else []  # which is always there
            (source,) = (each for each in sources_of(run, compare) if each.name == name)
            _require_room(source.checkpoint, run.config.dtype)
            speaker = open_source(run, source)
            answers[name] = [_answers(speaker, q, max_new_tokens) for q in questions]
        except (ValueError, FileNotFoundError, MemoryError) as error:
            problems.append(f"{name} is missing: {error}.")
    rows = [_row(q, {name: found[i] for name, found in answers.items()}) for i, q in enumerate(questions)]
    return {"rows": rows if answers else [], "reason": " ".join(problems)}


def _require_room(checkpoint: str, dtype: str) -> None:
    """Raise MemoryError where a model's weights would not fit: a report may be written far from the run's GPUs."""
    weights = read_weights(resolve_folder(checkpoint, "checkpoint"))
    need = weights.parameters * getattr(torch, dtype).itemsize
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else free_memory_bytes()
    if need > SHARE_OF_MEMORY * free:
        raise MemoryError(
            f"its weights take {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free; write the report on a larger "
            "machine, or with --samples 0"
        )


def free_memory_bytes() -> int:
    """Memory that this machine could still give."""
    import psutil

    return psutil.virtual_memory().available


def _questions(run: Run, count: int) -> list[dict[str, Any]]:
    """Up to `count` usable rows: a question, its images and the answer."""
    data = run.config.data
    source = build_source(data.eval or data.train)
    found = []
    for i in range(len(source)):  # a row that cannot be used gives its place to the next one
        if len(found) == count or i >= 20 * count:
            break
        try:
            with row_boundary():
                row = source[(i * max(1, len(source) // count)) % len(source) + i // count]
                check_messages(row)
                check_pixels(row.images, data.max_image_pixels, data.max_row_pixels)
                question, answer = ("".join(p.get("text", "") for p in turn["content"]) for turn in row.messages)
                images = [load_image(image, max_image_pixels=data.max_image_pixels) for image in row.images]
        except UnusableRow:
            continue
        if max(len(question), len(answer)) <= MAX_CHARACTERS:
            found.append({"question": question.strip(), "images": images, "answer": answer})
    if not found:
        raise ValueError("no row of one question and one answer could be used")
    return found


def _answers(speaker, question: dict[str, Any], max_new_tokens: int) -> dict[int | None, str]:
    said = speaker.speak(question["images"], question["question"], max_new_tokens=max_new_tokens)
    return {speech.layer: speech.text for speech in said}


def _row(question: dict[str, Any], answers: dict[str, dict[int | None, str]]) -> dict[str, Any]:
    layers = sorted({k for found in answers.values() for k in found if k is not None})
    right = normalise(question["answer"])

    def cells(layer: int | None) -> list[dict[str, Any] | None]:
        texts = [found.get(layer) for found in answers.values()]
        return [None if t is None else {"text": t, "right": normalise(t) == right} for t in texts]

    return {
        "images": [_thumbnail(image) for image in question["images"]],
        "question": question["question"],
        "answer": question["answer"],
        "models": list(answers),
        "rows": [{"layer": layer or "answer", "cells": cells(layer)} for layer in (*layers, None)],
    }


def _thumbnail(image) -> str:
    image = image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
