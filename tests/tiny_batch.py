"""A right-padded batch of small random images with questions and answers of different lengths, for `tiny`'s models."""

from __future__ import annotations

from functools import lru_cache

import numpy
import tiny
import torch
from PIL import Image

PATCH = 8
SEEN = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
ROWS = [
    (SEEN + "What shape is in the image?<|im_end|>\n<|im_start|>assistant\n", "a red circle"),
    (SEEN + "Is a blue rectangle present?<|im_end|>\n<|im_start|>assistant\n", "no"),
    ("<|im_start|>user\nyes or no?<|im_end|>\n<|im_start|>assistant\n", "yes yes, yes no"),
]


@lru_cache(maxsize=1)
def processor():
    return tiny.make_processor("tiny", patch_size=PATCH, min_pixels=1024, max_pixels=1024)


def make_model(**options):
    return tiny.make_model(tokenizer=processor().tokenizer, patch_size=PATCH, **options)


def _image(prompt: str) -> Image.Image:
    noise = numpy.random.default_rng(len(prompt))
    return Image.fromarray(noise.integers(0, 256, (32, 48, 3), dtype=numpy.uint8))


def make_batch(rows=ROWS) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The processor's tensors, and labels [B, T] with -100 outside the answers."""
    images = [_image(prompt) for prompt, _ in rows if SEEN in prompt]
    texts = [prompt + answer + "<|im_end|>" for prompt, answer in rows]
    options = {"padding": True, "padding_side": "right", "return_tensors": "pt"}
    inputs = dict(processor()(text=texts, images=images or None, **options))
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, (_, answer) in enumerate(rows):
        count = len(processor().tokenizer(answer + "<|im_end|>")["input_ids"])
        end = int(inputs["attention_mask"][row].sum())
        labels[row, end - count : end] = inputs["input_ids"][row, end - count : end]
    return inputs, labels
