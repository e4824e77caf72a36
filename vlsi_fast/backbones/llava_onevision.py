"""LLaVA-OneVision with a Qwen2 language model (0.5B, 7B, 72B), as Hugging Face's `llava-hf` checkpoints have it."""

from __future__ import annotations

from .base import LANGUAGE_LINEARS, Family


def _new_decoder_layer(config, index: int):
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

    return Qwen2DecoderLayer(config.get_text_config(), index)


LLAVA_ONEVISION = Family(
    model_type="llava_onevision",
    backbone=lambda model: model.model,
    decoder_layers=lambda model: model.model.language_model.layers,
    final_norm=lambda model: model.model.language_model.norm,
    head=lambda model: model.lm_head,
    vision=lambda model: [model.model.vision_tower, model.model.multi_modal_projector, model.model.image_newline],
    lora_targets=LANGUAGE_LINEARS,
    new_decoder_layer=_new_decoder_layer,
    processor="LlavaOnevisionProcessor",
)
