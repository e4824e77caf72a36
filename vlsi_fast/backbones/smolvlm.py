"""SmolVLM2 (256M, 500M, 2.2B): SigLIP, a pixel shuffle and one linear layer, and SmolLM2, which is a plain Llama.

Its processors enlarge every image to four tiles along its longer side."""

from __future__ import annotations

from .base import LANGUAGE_LINEARS, Family, plain_decoder_layer

SMOLVLM = Family(
    model_type="smolvlm",
    backbone=lambda model: model.model,
    decoder_layers=lambda model: model.model.text_model.layers,
    final_norm=lambda model: model.model.text_model.norm,
    head=lambda model: model.lm_head,
    vision=lambda model: [model.model.vision_model, model.model.connector],
    lora_targets=LANGUAGE_LINEARS,
    new_decoder_layer=plain_decoder_layer,
    processor="SmolVLMProcessor",
    merge=lambda config: config.scale_factor**2,
    tiles=17,
)
