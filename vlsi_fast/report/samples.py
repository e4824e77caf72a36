"""What each layer says about rows of the run's own data: base student, distilled student and teacher side by side."""

from __future__ import annotations

import base64
import io
from difflib import SequenceMatcher
from itertools import combinations
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
from ..viewer.columns import Source, open_source, sources_of
from ..weights import read_weights

MODELS = ("base", "distilled", "teacher")
CANDIDATES = 12
"""Questions to choose each one from."""
BATCH = 16
"""Candidates answered at once."""
SHARE_OF_MEMORY = 0.8
"""Of the free memory, that a model's weights may take."""
THUMBNAIL = 320
"""Longest side, pixels, of an image on the page; smaller ones are shown as they are."""
SMALL = 128
"""Longest side, pixels, of an image that is enlarged without blurring its pixels."""
MAX_CHARACTERS = 20_000
"""Of a question or an answer on the page."""


def what_layers_say(run: Run, count: int, max_new_tokens: int = 64) -> dict[str, Any]:
    """Answers of every target layer, and of the model itself, to `count` questions.

    Args:
        run: its base student, distilled student and teacher are loaded one after the other (as `vlsi-fast verbalize`).
        count: rows of data.eval (of data.train where there is none), those with one question only: chosen from
            `CANDIDATES` times as many, spread evenly, as `_telling` says.
        max_new_tokens: length of an answer.

    Returns:
        {"rows": [{"images": [{"src": data URI, "small"}], "question", "answer", "shade": metric, "columns": [{"model",
        "cells"}]}], "outcomes": [{"right": {model: whether}, "count"}] of all that they were chosen from, the most
        frequent first, empty if all were taken, "reason": what is missing and why, or ""}; a cell, shallow to deep and
        the model's own answer last, is {"layer", "text", "right", "share"}: the layer's number or "answer", whether the
        source's first metric is 1, and the score by the second one (the first, if alone), named by `shade`.
    """
    try:
        found = _questions(run, CANDIDATES * count)
    except (ValueError, FileNotFoundError) as error:
        return {"rows": [], "outcomes": [], "reason": f"No samples, since the run's data cannot be read: {error}"}
    questions, outcomes = _telling(run, found, count, max_new_tokens)
    answers: dict[str, list[dict]] = {}
    problems = []
    for name in MODELS:
        try:
            speaker, source = _open(run, name), _source(run, name)
            answers[name] = [_answers(speaker, q, max_new_tokens) for q in questions]
            problems += [f"{name}: {source.note}."] if source.verbalizers is None else []
        except (ValueError, FileNotFoundError, MemoryError) as error:
            problems.append(f"{name} is missing: {error}.")
    rows = [_row(q, {name: found[i] for name, found in answers.items()}) for i, q in enumerate(questions)]
    return {"rows": rows if answers else [], "outcomes": outcomes, "reason": " ".join(problems)}


def _source(run: Run, name: str) -> Source:
    """A model of the run. Raises FileNotFoundError, ValueError."""
    compare = [name] if name != "distilled" else []  # which is always there
    (source,) = (each for each in sources_of(run, compare) if each.name == name)
    return source


def _open(run: Run, name: str):
    """A model of the run as a speaker. Raises FileNotFoundError, ValueError, MemoryError."""
    source = _source(run, name)
    _require_room(source.checkpoint, run.config.dtype)
    return open_source(run, source)


def _telling(run: Run, found: list[dict], count: int, max_new_tokens: int) -> tuple[list[dict], list[dict[str, Any]]]:
    """The `count` questions to show, and how often the models' own answers were right and wrong on all of them.

    An outcome says which of the models are right. Every outcome in which they are not all alike has its turn, the most
    frequent first; within it, the question on which the models' answers differ most. What all get right, or wrong,
    comes last. Where fewer than two models can be asked: questions spread evenly, and no outcomes.
    """
    if len(found) <= count:
        return found, []
    own: dict[str, list[dict]] = {}
    for name in MODELS:
        try:
            own[name] = _own_answers(_open(run, name), found, max_new_tokens)
        except (ValueError, FileNotFoundError, MemoryError):  # said where the layers are asked
            continue
    if len(own) < 2:
        return found[:: len(found) // count][:count], []
    groups: dict[tuple[bool, ...], list[int]] = {}
    for i in sorted(range(len(found)), key=lambda i: _difference([answers[i] for answers in own.values()])):
        groups.setdefault(tuple(answers[i]["right"] for answers in own.values()), []).append(i)
    often = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    outcomes = [{"right": dict(zip(own, right)), "count": len(members)} for right, members in often]
    alike = [list(members) for right, members in often if len(set(right)) == 1]
    differing = [list(members) for right, members in often if len(set(right)) > 1]
    chosen: list[int] = []
    for turns in (differing, sorted(alike, key=len, reverse=True)):
        while len(chosen) < count and any(turns):
            chosen += [members.pop() for members in turns if members][: count - len(chosen)]
    return [found[i] for i in chosen], outcomes


def _difference(answers: list[dict[str, Any]]) -> tuple[float, float]:
    """How far answers to one question are apart: by their scores, then by their words (sums over pairs)."""
    pairs = list(combinations(answers, 2))
    words = (SequenceMatcher(None, a["text"].split(), b["text"].split(), autojunk=False).ratio() for a, b in pairs)
    return sum(abs(a["share"] - b["share"]) for a, b in pairs), sum(1 - same for same in words)


def _own_answers(speaker, questions: list[dict], max_new_tokens: int) -> list[dict[str, Any]]:
    """A model's own answers, greedily and in batches, each with its scores."""
    answers = []
    for start in range(0, len(questions), BATCH):
        part = questions[start : start + BATCH]
        prompts = [make_prompt(speaker.processor, q["prompt"], q["images"]) for q in part]
        inputs = encode_prompts(speaker.processor, prompts)
        new = generate(speaker.model, inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
        texts = speaker.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        answers += [{"text": text.strip()} | _scores(q, text.strip()) for q, text in zip(part, texts)]
    return answers


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
    def cells(said: dict[int | None, str]) -> list[dict[str, Any]]:
        layers = [*sorted(k for k in said if k is not None), None]
        return [{"layer": k or "answer", "text": said[k]} | _scores(question, said[k]) for k in layers]

    return {
        "images": [{"src": _thumbnail(image), "small": max(image.size) < SMALL} for image in question["images"]],
        "question": question["question"],
        "answer": question["answer"],
        "shade": title(question["metrics"][:2][-1].name),
        "columns": [{"model": name, "cells": cells(said)} for name, said in answers.items()],
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
