"""Exact match of a checkpoint's own answers, with nothing but stock `generate`."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import torch

from .data.encoding import configure_image_bounds
from .data.images import load_image
from .data.processors import load_processor
from .data.skipped import UnusableRow
from .data.sources import DataConfig, build_source
from .loading import load_backbone


def normalise(text: str) -> str:
    """Answers are compared without case and surrounding space."""
    return " ".join(text.split()).lower()


@torch.inference_mode()
def exact_match(
    checkpoint: str | Path,
    data: DataConfig,
    *,
    batch_size: int = 256,
    max_new_tokens: int = 16,
    num_beams: int = 1,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    description: str = "",
) -> dict:
    """Share of the rows of `data.eval` whose last answer the model gives word for word.

    Args:
        checkpoint: folder of a stock checkpoint with its processor.
        data: its `eval` sources and image bounds are used.
        batch_size: rows generated at once.
        max_new_tokens: tokens after which an answer is cut.
        num_beams: width of the beam search (the paper's is 5); 1: greedy decoding.
        dtype: precision of the model.
        device: default: the GPU where there is one, else the CPU.
        description: shown in front of the progress bar; no bar where it is empty.

    Returns:
        `accuracy` (0 to 1), `correct`, `rows` (those scored), `right` (whether each of them is, in order) and
        `skipped` (cause -> rows that cannot be used).
    """
    from tqdm.auto import tqdm

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    processor = load_processor(checkpoint)
    configure_image_bounds(processor, data.min_pixels, data.max_pixels)
    processor.tokenizer.padding_side = "left"
    model = load_backbone(checkpoint, dtype).to(device)
    source = build_source(data.eval, "data.eval")
    right, skipped, pending = [], Counter(), []
    for i in tqdm(range(len(source)), desc=description, disable=not description, leave=False):
        try:
            pending.append(_question(source[i], processor, data))
        except UnusableRow as error:
            skipped[error.cause] += 1
        if pending and (len(pending) == batch_size or i == len(source) - 1):
            answers = _generate(model, processor, pending, max_new_tokens, num_beams)
            right += [normalise(a) == normalise(q["answer"]) for a, q in zip(answers, pending)]
            pending = []
    correct, rows = sum(right), len(right)
    return {
        "accuracy": correct / max(rows, 1), "correct": correct, "rows": rows, "right": right, "skipped": dict(skipped)
    }  # fmt: skip


def _question(sample, processor, data: DataConfig) -> dict:
    """The conversation up to the last answer, as prompt and images, and that answer."""
    turns = sample.messages
    if not turns or turns[-1]["role"] != "assistant":
        raise UnusableRow("bad_row", "the last turn is no answer to compare with")
    load = partial(load_image, max_image_pixels=data.max_image_pixels)
    return {
        "text": processor.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True),
        "images": [load(image) for image in sample.images],
        "answer": "".join(part.get("text", "") for part in turns[-1]["content"]),
    }


def _generate(model, processor, questions: list[dict], max_new_tokens: int, num_beams: int) -> list[str]:
    images = [image for question in questions for image in question["images"]]
    inputs = processor(
        text=[question["text"] for question in questions], images=images or None, padding=True, return_tensors="pt"
    ).to(model.device)
    generated = model.generate(**inputs, max_new_tokens=max_new_tokens, num_beams=num_beams, do_sample=False)
    new = generated[:, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.batch_decode(new, skip_special_tokens=True)
