"""Qwen2.5-VL (3B, 7B, 32B, 72B): Qwen2-VL's language model; window attention is the vision tower's alone."""

from __future__ import annotations

from .base import LANGUAGE_LINEARS, Family


def _new_decoder_layer(config, index: int):
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer

    return Qwen2_5_VLDecoderLayer(config.get_text_config(), index)


QWEN2_5_VL = Family(
    model_type="qwen2_5_vl",
    backbone=lambda model: model.model,
    decoder_layers=lambda model: model.model.language_model.layers,
    final_norm=lambda model: model.model.language_model.norm,
    head=lambda model: model.lm_head,
    vision=lambda model: [model.model.visual],
    lora_targets=LANGUAGE_LINEARS,
    new_decoder_layer=_new_decoder_layer,
    processor="Qwen2_5_VLProcessor",
)
