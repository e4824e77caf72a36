"""InternVL3 and InternVL3.5, dense: the checkpoints with `-hf` in their names, which are of the stock class.

The stock class takes any language model that transformers knows: Qwen2.5 in InternVL3 (1B to 78B), Qwen3 in
InternVL3.5. Its processors cut a large image into twelve tiles.
"""

from __future__ import annotations

from .base import LANGUAGE_LINEARS, Family, plain_decoder_layer

INTERNVL = Family(
    model_type="internvl",
    backbone=lambda model: model.model,
    decoder_layers=lambda model: model.model.language_model.layers,
    final_norm=lambda model: model.model.language_model.norm,
    head=lambda model: model.lm_head,
    vision=lambda model: [model.model.vision_tower, model.model.multi_modal_projector],
    lora_targets=LANGUAGE_LINEARS,
    new_decoder_layer=plain_decoder_layer,
    processor="InternVLProcessor",
    merge=lambda config: round(config.downsample_ratio**-2),
    tiles=13,
)
