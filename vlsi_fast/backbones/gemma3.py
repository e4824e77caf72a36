"""Gemma 3 (4B, 12B, 27B).

An image is always 256 tokens, which attend to each other in both directions. Most layers attend to a sliding window of
1024 tokens, every sixth to all. RMSNorm multiplies by 1 + weight.
"""

from __future__ import annotations

from .base import LANGUAGE_LINEARS, Family, plain_decoder_layer

GEMMA3 = Family(
    model_type="gemma3",
    backbone=lambda model: model.model,
    decoder_layers=lambda model: model.model.language_model.layers,
    final_norm=lambda model: model.model.language_model.norm,
    head=lambda model: model.lm_head,
    vision=lambda model: [model.model.vision_tower, model.model.multi_modal_projector],
    lora_targets=LANGUAGE_LINEARS,
    new_decoder_layer=plain_decoder_layer,
    processor="Gemma3Processor",
    images_look_ahead=True,
    merge=lambda config: (
        (config.vision_config.image_size // config.vision_config.patch_size) ** 2 // config.mm_tokens_per_image
    ),
    tiles=1,
)
