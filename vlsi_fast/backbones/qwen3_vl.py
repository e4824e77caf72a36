"""Qwen3-VL, dense (2B, 4B, 8B, 32B).

Deepstack: behind each of the first decoder layers the language model adds vision features to the image positions. Text
positions, and so all answer positions, are as the layer left them; only decoder verbalizers read the others.
"""

from __future__ import annotations

from .base import LANGUAGE_LINEARS, Family


def _new_decoder_layer(config, index: int):
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextDecoderLayer

    return Qwen3VLTextDecoderLayer(config.get_text_config(), index)


QWEN3_VL = Family(
    model_type="qwen3_vl",
    backbone=lambda model: model.model,
    decoder_layers=lambda model: model.model.language_model.layers,
    final_norm=lambda model: model.model.language_model.norm,
    head=lambda model: model.lm_head,
    vision=lambda model: [model.model.visual],
    lora_targets=LANGUAGE_LINEARS,
    new_decoder_layer=_new_decoder_layer,
    processor="Qwen3VLProcessor",
    layers_added_to=lambda config: len(config.vision_config.deepstack_visual_indexes),
)
