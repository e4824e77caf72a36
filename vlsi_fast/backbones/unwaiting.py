"""Methods of stock models that wait for the device in every forward, replaced by equals that do not.

The host runs ahead of a GPU and queues its work; a method that reads a tensor's values stops it until the queue is
empty. Only methods whose result is the same are here. `tests/test_waits.py` counts what is left.
"""

from __future__ import annotations

import inspect
from functools import wraps

import torch
from torch import Tensor, nn

from .base import Family


def spare_waits(model: nn.Module, family: Family) -> None:
    """Replace them in a stock `..ForConditionalGeneration`, in place."""
    backbone = family.backbone(model)
    if hasattr(backbone, "get_placeholder_mask"):
        backbone.get_placeholder_mask = _unchecked(backbone.get_placeholder_mask, backbone.config.image_token_id)
    language = model.get_decoder()
    if hasattr(language, "_deepstack_process"):
        language._deepstack_process = add_at


def _unchecked(stock, image_token: int):
    """Without the comparison of the number of image tokens with that of image features, which reads both. Rows come
    from one call of the model's own processor, which makes as many of one as of the other. On the CPU it stays."""

    needs_features = inspect.signature(stock).parameters["image_features"].default is inspect.Parameter.empty

    @wraps(stock)
    def masks(input_ids, inputs_embeds, **features):
        if inputs_embeds.device.type == "cpu":
            return stock(input_ids, inputs_embeds, **features)
        if needs_features:  # it compares in any case (Gemma 3), and has one mask
            return (input_ids == image_token)[..., None]
        return stock(input_ids, inputs_embeds)

    return masks


def add_at(hidden: Tensor, mask: Tensor, added: Tensor) -> Tensor:
    """`hidden[mask] += added` as a new tensor: hidden [B, T, d], mask [B, T] bool with n True, added [n, d]. The stock
    model's index by the mask reads where it is True (Qwen3-VL's deepstack)."""
    spread = torch.zeros_like(hidden).masked_scatter(mask.to(hidden.device)[..., None], added.to(hidden))
    return hidden + spread
