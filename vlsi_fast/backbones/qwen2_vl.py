"""Qwen2-VL (2B, 7B, 72B)."""

from __future__ import annotations

from .base import LANGUAGE_LINEARS, Family


def _new_decoder_layer(config, index: int):
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLDecoderLayer

    return Qwen2VLDecoderLayer(config.get_text_config(), index)


QWEN2_VL = Family(
    model_type="qwen2_vl",
    backbone=lambda model: model.model,
    decoder_layers=lambda model: model.model.language_model.layers,
    final_norm=lambda model: model.model.language_model.norm,
    head=lambda model: model.lm_head,
    vision=lambda model: [model.model.visual],
    lora_targets=LANGUAGE_LINEARS,
    new_decoder_layer=_new_decoder_layer,
    processor="Qwen2VLProcessor",
)
