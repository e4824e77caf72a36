"""A stock checkpoint's own answers to rows of data, with nothing but `generate`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..asking import encode_prompt, generate, join_prompts, make_prompt
from ..config_data import DataConfig
from ..data.dataset import special_token_message
from ..data.encoding import check_characters, check_length, check_special, configure_image_bounds
from ..data.images import check_pixels, load_image
from ..data.processors import load_processor
from ..data.skipped import SpecialTokenError, UnusableRow, row_boundary
from ..data.sources import ConcatSource, build_source
from ..loading import load_backbone
from .metrics import Metric, metrics_of_sources, question_type


@dataclass(frozen=True)
class Answer:
    """What a model said to one row."""

    id: str
    source: str
    """Name of the row's source."""
    type: str
    """The row's own type where its source has a `type_column`, else that of `question_type`."""
    question: str
    """Text of the last user turn."""
    answer: str
    """The true answer: text of the last assistant turn."""
    prediction: str
    scores: dict[str, float | bool]
    """Metric -> score, 0 to 1: those of the row's source, its headline first."""


@torch.inference_mode()
def answer_rows(
    checkpoint: str | Path,
    data: DataConfig,
    *,
    skipped: Counter,
    limit: int | None = None,
    batch_size: int = 256,
    max_new_tokens: int = 16,
    num_beams: int = 1,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    description: str = "",
) -> Iterator[Answer]:
    """Answers to the rows of `data.eval`, in their order.

    Args:
        checkpoint: folder of a stock checkpoint with its processor.
        data: its `eval` sources and image bounds are used.
        skipped: cause -> rows that cannot be used; counted up here.
        limit: rows of each source, from the first; None: all.
        batch_size: rows generated at once, padded on the left.
        max_new_tokens: tokens after which an answer is cut.
        num_beams: 1 for greedy decoding, more for beam search; never sampled.
        dtype: precision of the model.
        device: default: the GPU where there is one, else the CPU.
        description: shown in front of the progress bar; no bar where it is empty.

    Raises:
        SpecialTokenError: a question holds a special token and `data.special_tokens` is error.
        ConfigError: a metric of a source that cannot be imported, that failed, or whose result is out of range.
    """
    from tqdm.auto import tqdm

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    metrics = metrics_of_sources([source.metrics for source in data.eval], "data.eval")
    rows = build_source(data.eval, "data.eval")
    processor = load_processor(checkpoint)
    configure_image_bounds(processor, data.min_pixels, data.max_pixels)
    model = load_backbone(checkpoint, dtype).to(device)
    options = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": False}
    wanted, pending = list(_first_rows(rows, limit)), []
    for position, (index, part) in enumerate(tqdm(wanted, desc=description, disable=not description, leave=False)):
        try:
            pending.append((_question(rows[index], rows.parts[part].name, processor, data), metrics[part]))
        except UnusableRow as error:
            skipped[error.cause] += 1
            if error.cause == "special_token" and data.special_tokens == "error":
                raise SpecialTokenError(special_token_message(rows.skip_record(index, error))) from error
        if pending and (len(pending) == batch_size or position == len(wanted) - 1):
            inputs = join_prompts(processor, [made for (made, _), _ in pending])
            new = generate(model, inputs, **options)
            predictions = processor.tokenizer.batch_decode(new, skip_special_tokens=True)
            for ((_, row), own), prediction in zip(pending, predictions, strict=True):
                yield Answer(prediction=prediction, scores=_scores(own, prediction, row), **row)
            pending = []


def _scores(metrics: list[Metric], prediction: str, row: dict[str, str]) -> dict[str, float | bool]:
    return {metric.name: metric.score(prediction, row["answer"], row["id"]) for metric in metrics}


def _first_rows(rows: ConcatSource, limit: int | None) -> Iterator[tuple[int, int]]:
    """Number of each row to ask and the number of its source."""
    start = 0
    for number, part in enumerate(rows.parts):
        for index in range(len(part) if limit is None else min(limit, len(part))):
            yield start + index, number
        start += len(part)


@row_boundary()
def _question(sample, source: str, processor, data: DataConfig) -> tuple[dict, dict]:
    """Model inputs of the conversation up to the last answer, and the row's part of an `Answer`."""
    turns = sample.messages
    if not turns or turns[-1]["role"] != "assistant":
        raise UnusableRow("bad_row", "the last turn is no answer to compare with")
    check_characters(turns)
    check_length(turns[:-1], processor, data.max_length)
    check_pixels(sample.images, data.max_image_pixels, data.max_row_pixels)
    loaded = {image: load_image(image, data.max_image_pixels) for image in dict.fromkeys(sample.images)}
    asked = next((turn for turn in reversed(turns) if turn["role"] == "user"), {"content": []})
    answer = _text(turns[-1])
    row = {
        "id": sample.id,
        "source": source,
        "type": sample.type or question_type(answer),
        "question": _text(asked),
        "answer": answer,
    }
    prompt = make_prompt(processor, turns[:-1], [loaded[image] for image in sample.images])
    check_special(prompt.rendered, data)
    return encode_prompt(processor, prompt), row


def _text(turn: dict) -> str:
    return "".join(part.get("text", "") for part in turn["content"])
