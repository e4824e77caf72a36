"""Questions to a stock checkpoint in batches: chat template, processor, stock `generate`, padded on the left.

`vlsi-fast eval` and `vlsi-fast data answer` both ask this way; a row's answer is the one that it gets alone
(`tests/test_evaluation.py`), but for the last bits of the logits, which another batch may round differently. Special
tokens that the text spells are read as text, as in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature

from .data.collate import join_vision
from .data.encoding import check_characters, check_placeholders, encode_rendered
from .data.plaintext import Rendered, render
from .data.skipped import row_boundary


@dataclass(frozen=True)
class Prompt:
    """A conversation up to where an answer starts."""

    rendered: Rendered
    """As the chat template writes it, image tokens not expanded."""
    images: list[Image.Image]

    @property
    def text(self) -> str:
        """What is asked, in the template's words."""
        return self.rendered.plain


@row_boundary()
def make_prompt(processor, messages: list[dict], images: list[Image.Image]) -> Prompt:
    """Renders a conversation that ends with a user turn.

    Args:
        processor: of the model that is asked.
        messages: chat messages, content in list form.
        images: one for each image part, in order.

    Raises:
        UnusableRow: the template fails, or the text cannot be told from its special tokens.
    """
    check_characters(messages)
    rendered = render(processor, messages, prompt=True)
    check_placeholders(rendered, len(images), processor)
    return Prompt(rendered, images)


@row_boundary()
def encode_prompt(processor, prompt: Prompt) -> dict[str, torch.Tensor]:
    """Model inputs of one prompt: `input_ids` and `attention_mask` [1, T], vision tensors ..

    Raises:
        UnusableRow: the processor refuses one of the images, or fails on the row in any other way.
    """
    return encode_rendered(prompt.rendered, prompt.images, processor)


def join_prompts(processor, rows: list[dict[str, torch.Tensor]]) -> BatchFeature:
    """Model inputs of B encoded prompts together.

    Returns:
        `input_ids` and `attention_mask` [B, T], and whatever else has one value a token, padded on the left; vision
        tensors joined along their first axis.
    """
    vision = set(processor.image_processor.model_input_names)
    length, batch = max(row["input_ids"].shape[1] for row in rows), {}
    for name in dict.fromkeys(name for row in rows for name in row):
        found = [row[name] for row in rows if name in row]
        if name in vision:
            batch[name] = join_vision(found)
            continue
        value = processor.tokenizer.pad_token_id if name == "input_ids" else 0
        pad = torch.nn.functional.pad
        batch[name] = torch.cat([pad(each, (length - each.shape[1], 0), value=value) for each in found])
    return BatchFeature(batch)


def encode_prompts(processor, prompts: list[Prompt]) -> BatchFeature:
    """`join_prompts` of B prompts. Raises UnusableRow where the processor refuses one of them."""
    return join_prompts(processor, [encode_prompt(processor, prompt) for prompt in prompts])


@torch.inference_mode()
def generate(model, inputs, **options: Any) -> torch.Tensor:
    """What stock `generate` adds to the prompts, [B, T'] token ids, padded on the right."""
    generated = model.generate(**inputs.to(model.device), **options)
    return generated[:, inputs["input_ids"].shape[1] :]
