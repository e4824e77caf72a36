"""Questions to a stock checkpoint in batches: chat template, processor, stock `generate`, padded on the left.

`vlsi-fast eval` and `vlsi-fast data answer` both ask this way; a row's answer is the one that it gets alone
(`tests/test_evaluation.py`), but for the last bits of the logits, which another batch may round differently.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from .data.encoding import render, tokenizer_options
from .data.skipped import UnusableRow


@dataclass(frozen=True)
class Prompt:
    """A conversation up to where an answer starts."""

    text: str
    """As the chat template renders it, image tokens not expanded."""
    images: list[Image.Image]


def make_prompt(processor, messages: list[dict], images: list[Image.Image]) -> Prompt:
    """Renders a conversation that ends with a user turn.

    Args:
        processor: of the model that is asked.
        messages: chat messages, content in list form.
        images: one for each image part, in order.

    Raises:
        UnusableRow: the template fails, or the text itself holds an image or video token.
    """
    text = render(processor, messages, prompt=True)
    image_token = getattr(processor, "image_token", None)
    found = len(images) if image_token is None else text.count(image_token)
    if found != len(images):
        raise UnusableRow("bad_row", f"{found} image tokens {image_token} in the prompt, but {len(images)} images")
    for token in (getattr(processor, "video_token", None), getattr(processor, "audio_token", None)):
        if token is not None and token in text:
            raise UnusableRow("bad_row", f"the prompt holds {token}, but rows have no videos and no sound")
    return Prompt(text, images)


def encode_prompts(processor, prompts: list[Prompt]):
    """Model inputs of B prompts: `input_ids` and `attention_mask` [B, T], padded on the left, vision tensors ..

    Raises:
        ValueError: the processor refuses one of the images.
    """
    processor.tokenizer.padding_side = "left"
    # a list for each row that has images: LLaVA-OneVision treats several images of one row otherwise than one
    images = [prompt.images for prompt in prompts if prompt.images]
    options = tokenizer_options(processor, prompts[0].text)
    return processor(
        text=[prompt.text for prompt in prompts], images=images or None, padding=True, return_tensors="pt", **options
    )


@torch.inference_mode()
def generate(model, inputs, **options: Any) -> torch.Tensor:
    """What stock `generate` adds to the prompts, [B, T'] token ids, padded on the right."""
    generated = model.generate(**inputs.to(model.device), **options)
    return generated[:, inputs["input_ids"].shape[1] :]
