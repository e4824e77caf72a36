"""Methods of stock models that wait for the device in every forward, replaced by equals that do not.

The host runs ahead of a GPU and queues its work; a method that reads a tensor's values stops it until the queue is
empty. Only methods whose result is the same are here. `tests/test_waits.py` counts what is left.
"""

from __future__ import annotations

from functools import wraps

import torch
from torch import Tensor, nn

from .base import Family


def spare_waits(model: nn.Module, family: Family) -> None:
    """Replace them in a stock `..ForConditionalGeneration`, in place."""
    backbone = family.backbone(model)
    if hasattr(backbone, "get_placeholder_mask"):
        backbone.get_placeholder_mask = _unchecked(backbone.get_placeholder_mask)
    if family.model_type == "glm4v":
        backbone.visual.embeddings.register_forward_pre_hook(_sizes_to_device)
    language = model.get_decoder()
    if hasattr(language, "_deepstack_process"):
        language._deepstack_process = add_at


def _sizes_to_device(module, arguments):
    """Images' sizes are on the host where rows are packed; GLM's embedding of positions takes them on the device."""
    patches, lengths, sizes, *coordinates = arguments
    return patches, lengths, sizes.to(patches.device, non_blocking=True), *coordinates


def _unchecked(stock):
    """Without the comparison of the number of image tokens with that of image features, which reads both. Rows come
    from one call of the model's own processor, which makes as many of one as of the other. On the CPU it stays."""

    @wraps(stock)
    def masks(input_ids, inputs_embeds, image_features=None, video_features=None):
        if inputs_embeds.device.type == "cpu":
            return stock(input_ids, inputs_embeds, image_features, video_features)
        return stock(input_ids, inputs_embeds)

    return masks


def add_at(hidden: Tensor, mask: Tensor, added: Tensor) -> Tensor:
    """`hidden[mask] += added` as a new tensor: hidden [B, T, d], mask [B, T] bool with n True, added [n, d]. The stock
    model's index by the mask reads where it is True (Qwen3-VL's deepstack)."""
    spread = torch.zeros_like(hidden).masked_scatter(mask.to(hidden.device)[..., None], added.to(hidden))
    return hidden + spread
