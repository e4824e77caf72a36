"""What each layer says about rows of the run's own data: base student, distilled student and teacher side by side."""

from __future__ import annotations

import base64
import io
from typing import Any

import torch

from ..asking import encode_prompts, generate, make_prompt
from ..data.encoding import check_messages
from ..data.images import check_pixels, load_image
from ..data.skipped import UnusableRow, row_boundary
from ..data.sources import build_source
from ..evaluation.metrics import Metric, metrics_of_sources, title
from ..loading import resolve_folder
from ..runs import Run
from ..viewer.columns import open_source, sources_of
from ..weights import read_weights

MODELS = ("base", "distilled", "teacher")
CANDIDATES = 12
"""Questions to choose each one from."""
BATCH = 16
"""Candidates answered at once."""
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
        count: rows of data.eval (of data.train where there is none), those with one question only: of `CANDIDATES`
            times as many, spread evenly, the ones whose score rises most from the base to the distilled student.
        max_new_tokens: length of an answer.

    Returns:
        {"rows": [{"images": [data URI], "question", "answer", "models": [name], "shade": metric, "rows": [{"layer",
        "cells"}]}], "chosen_of": how many they were chosen from, 0 if all were taken, "reason": what is missing and
        why, or ""}; a cell is {"text", "right", "share"}, or None where a model has no such layer: whether the source's
        first metric is 1, and the score by the second one (the first, if alone), named by `shade`.
    """
    try:
        found = _questions(run, CANDIDATES * count)
    except (ValueError, FileNotFoundError) as error:
        return {"rows": [], "chosen_of": 0, "reason": f"No samples, since the run's data cannot be read: {error}"}
    questions, chosen_of = _telling(run, found, count, max_new_tokens)
    answers: dict[str, list[dict]] = {}
    problems = []
    for name in MODELS:
        try:
            speaker = _open(run, name)
            answers[name] = [_answers(speaker, q, max_new_tokens) for q in questions]
        except (ValueError, FileNotFoundError, MemoryError) as error:
            problems.append(f"{name} is missing: {error}.")
    rows = [_row(q, {name: found[i] for name, found in answers.items()}) for i, q in enumerate(questions)]
    return {"rows": rows if answers else [], "chosen_of": chosen_of, "reason": " ".join(problems)}


def _open(run: Run, name: str):
    """A model of the run as a speaker. Raises FileNotFoundError, ValueError, MemoryError."""
    compare = [name] if name != "distilled" else []  # which is always there
    (source,) = (each for each in sources_of(run, compare) if each.name == name)
    _require_room(source.checkpoint, run.config.dtype)
    return open_source(run, source)


def _telling(run: Run, found: list[dict], count: int, max_new_tokens: int) -> tuple[list[dict], int]:
    """The `count` questions on which the distilled student gains most, and how many there were to choose from.

    Where one of the two students is missing: questions spread evenly, chosen from 0.
    """
    if len(found) > count:
        try:
            base, distilled = (_own_scores(_open(run, name), found, max_new_tokens) for name in MODELS[:2])
        except (ValueError, FileNotFoundError, MemoryError):  # said where the layers are asked
            return found[:: len(found) // count][:count], 0
        gains = [tuple(b - a for a, b in zip(*pair)) for pair in zip(base, distilled)]
        order = sorted(range(len(found)), key=lambda i: gains[i], reverse=True)[:count]  # ties: the first ones
        return [found[i] for i in order], len(found)
    return found, 0


def _own_scores(speaker, questions: list[dict], max_new_tokens: int) -> list[tuple[float, float]]:
    """A model's own answers, greedily and in batches, by the first and the second metric."""
    scores = []
    for start in range(0, len(questions), BATCH):
        part = questions[start : start + BATCH]
        prompts = [make_prompt(speaker.processor, q["prompt"], q["images"]) for q in part]
        inputs = encode_prompts(speaker.processor, prompts)
        new = generate(speaker.model, inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
        texts = speaker.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        scores += [tuple(map(float, _scores(q, text).values())) for q, text in zip(part, texts)]
    return scores


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
    metrics = metrics_of_sources([each.metrics for each in data.eval or data.train], "data")
    found = []
    for i in range(len(source)):  # a row that cannot be used gives its place to the next one
        if len(found) == count or i >= 20 * count:
            break
        try:
            with row_boundary():
                index = (i * max(1, len(source) // count)) % len(source) + i // count
                row = source[index]
                check_messages(row)
                check_pixels(row.images, data.max_image_pixels, data.max_row_pixels)
                user, _ = row.messages
                question, answer = ("".join(p.get("text", "") for p in turn["content"]) for turn in row.messages)
                images = [load_image(image, max_image_pixels=data.max_image_pixels) for image in row.images]
        except UnusableRow:
            continue
        if max(len(question), len(answer)) > MAX_CHARACTERS:
            continue
        scored = {"metrics": metrics[source.part_of(index)], "id": row.id, "prompt": [user]}
        found.append({"question": question.strip(), "images": images, "answer": answer} | scored)
    if not found:
        raise ValueError("no row of one question and one answer could be used")
    return found


def _answers(speaker, question: dict[str, Any], max_new_tokens: int) -> dict[int | None, str]:
    said = speaker.speak(question["images"], question["question"], max_new_tokens=max_new_tokens)
    return {speech.layer: speech.text for speech in said}


def _row(question: dict[str, Any], answers: dict[str, dict[int | None, str]]) -> dict[str, Any]:
    layers = sorted({k for found in answers.values() for k in found if k is not None})

    def cells(layer: int | None) -> list[dict[str, Any] | None]:
        texts = [found.get(layer) for found in answers.values()]
        return [None if text is None else {"text": text} | _scores(question, text) for text in texts]

    return {
        "images": [_thumbnail(image) for image in question["images"]],
        "question": question["question"],
        "answer": question["answer"],
        "models": list(answers),
        "shade": title(question["metrics"][:2][-1].name),
        "rows": [{"layer": layer or "answer", "cells": cells(layer)} for layer in (*layers, None)],
    }


def _scores(question: dict[str, Any], text: str) -> dict[str, Any]:
    first, second = question["metrics"][0], question["metrics"][:2][-1]

    def score(metric: Metric) -> float:
        return float(metric.score(text, question["answer"], question["id"]))

    return {"right": score(first) == 1, "share": score(second)}


def _thumbnail(image) -> str:
    image = image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
