"""Methods of stock models that wait for the device in every forward, replaced by equals that do not.

The host runs ahead of a GPU and queues its work; a method that reads a tensor's values stops it until the queue is
empty. Only methods whose result is the same are here. `tests/test_waits.py` counts what is left.
"""

from __future__ import annotations

import inspect
from functools import wraps

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .base import Family


def spare_waits(model: nn.Module, family: Family) -> None:
    """Replace them in a stock `..ForConditionalGeneration`, in place."""
    backbone = family.backbone(model)
    if hasattr(backbone, "get_placeholder_mask"):
        backbone.get_placeholder_mask = _unchecked(backbone.get_placeholder_mask, backbone.config.image_token_id)
    if family.model_type == "smolvlm":
        backbone.get_image_features = _every_tile(backbone)
        backbone.vision_model.forward = _unmasked(backbone.vision_model)
        backbone.register_forward_pre_hook(_embed_tiles, with_kwargs=True)
    if family.model_type == "glm4v":
        backbone.visual.embeddings.register_forward_pre_hook(_sizes_to_device)
    language = model.get_decoder()
    if hasattr(language, "_deepstack_process"):
        language._deepstack_process = add_at


def _sizes_to_device(module, arguments):
    """Images' sizes are on the host where rows are packed; GLM's embedding of positions takes them on the device."""
    patches, lengths, sizes, *coordinates = arguments
    if sizes.device != patches.device:
        sizes = sizes.pin_memory().to(patches.device, non_blocking=True)
    return patches, lengths, sizes, *coordinates


def _unchecked(stock, image_token: int):
    """Without the comparison of the number of image tokens with that of image features, which reads both. Rows come
    from one call of the model's own processor, which makes as many of one as of the other. On the CPU it stays."""

    needs_features = inspect.signature(stock).parameters["image_features"].default is inspect.Parameter.empty

    @wraps(stock)
    def masks(input_ids, inputs_embeds, **features):
        if inputs_embeds.device.type == "cpu":
            return stock(input_ids, inputs_embeds, **features)
        if needs_features:  # it compares in any case, and has one mask
            return (input_ids == image_token)[..., None]
        return stock(input_ids, inputs_embeds)

    return masks


def _every_tile(backbone: nn.Module):
    """SmolVLM's vision tower on all tiles [1, n, 3, side, side] that it is given. The stock method looks for tiles that
    are padding, and for pixels of tiles that are; tiles joined by `data/collate.py` are neither, nor are one row's."""
    stock = backbone.get_image_features

    @wraps(stock)
    def features(pixel_values, pixel_attention_mask=None, **kwargs):
        if len(pixel_values) > 1:  # rows of a processor, padded to the same number of tiles
            return stock(pixel_values, pixel_attention_mask, **kwargs)
        tiles = pixel_values.flatten(0, 1).to(backbone.dtype)
        outputs = backbone.vision_model(pixel_values=tiles)
        outputs.pooler_output = [backbone.connector(outputs.last_hidden_state).flatten(0, 1)]
        return outputs

    return features


def _embed_tiles(backbone: nn.Module, arguments: tuple, keywords: dict) -> tuple[tuple, dict] | None:
    """SmolVLM's images among its embeddings, in their dtype. The stock forward casts images to the dtype of its first
    weights, the tower's: another one where the language model alone is trained, in float32."""
    ids, tiles = keywords.get("input_ids"), keywords.get("pixel_values")
    if ids is None or tiles is None or len(tiles) > 1:
        return None
    embedded = backbone.get_input_embeddings()(ids)
    features = torch.cat(backbone.get_image_features(tiles).pooler_output).to(embedded)
    mask = backbone.get_placeholder_mask(ids, inputs_embeds=embedded, image_features=features)
    given = {n: v for n, v in keywords.items() if n not in ("input_ids", "pixel_values", "pixel_attention_mask")}
    return arguments, given | {"inputs_embeds": embedded.masked_scatter(mask, features)}


def _unmasked(tower: nn.Module):
    """SmolVLM's vision tower on whole tiles [n, 3, side, side] without a mask, whose values the stock one asks for."""
    stock = tower.forward

    @wraps(stock)
    def forward(pixel_values, patch_attention_mask=None, **kwargs):
        if patch_attention_mask is not None:
            return stock(pixel_values, patch_attention_mask, **kwargs)
        patches = (len(pixel_values), *(side // tower.patch_size for side in pixel_values.shape[2:]))
        seen = torch.ones(patches, dtype=torch.bool, device=pixel_values.device)
        hidden = tower.embeddings(pixel_values=pixel_values, patch_attention_mask=seen)
        return BaseModelOutputWithPooling(tower.post_layernorm(tower.encoder(inputs_embeds=hidden).last_hidden_state))

    return forward


def add_at(hidden: Tensor, mask: Tensor, added: Tensor) -> Tensor:
    """`hidden[mask] += added` as a new tensor: hidden [B, T, d], mask [B, T] bool with n True, added [n, d]. The stock
    model's index by the mask reads where it is True (Qwen3-VL's deepstack)."""
    spread = torch.zeros_like(hidden).masked_scatter(mask.to(hidden.device)[..., None], added.to(hidden))
    return hidden + spread
