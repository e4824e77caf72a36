"""LLaVA-OneVision: Hugging Face's `llava-hf` checkpoints (Qwen2; 0.5B, 7B, 72B), or another plain language model.

The stock class takes any language model that transformers knows; those with Qwen2's and Llama's names of modules work.
"""

from __future__ import annotations

from .base import LANGUAGE_LINEARS, Family, plain_decoder_layer

LLAVA_ONEVISION = Family(
    model_type="llava_onevision",
    backbone=lambda model: model.model,
    decoder_layers=lambda model: model.model.language_model.layers,
    final_norm=lambda model: model.model.language_model.norm,
    head=lambda model: model.lm_head,
    vision=lambda model: [model.model.vision_tower, model.model.multi_modal_projector, model.model.image_newline],
    lora_targets=LANGUAGE_LINEARS,
    new_decoder_layer=plain_decoder_layer,
    processor="LlavaOnevisionProcessor",
)
