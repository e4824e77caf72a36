"""GLM-4.1V-9B and GLM-4.6V-Flash: a GLM-4 language model, with two further norms in each decoder layer."""

from __future__ import annotations

from .base import Family


def _new_decoder_layer(config, index: int):
    from transformers.models.glm4v.modeling_glm4v import Glm4vTextDecoderLayer

    return Glm4vTextDecoderLayer(config.get_text_config(), index)


GLM4V = Family(
    model_type="glm4v",
    backbone=lambda model: model.model,
    decoder_layers=lambda model: model.model.language_model.layers,
    final_norm=lambda model: model.model.language_model.norm,
    head=lambda model: model.lm_head,
    vision=lambda model: [model.model.visual],
    lora_targets=r".*\.language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate_up|down)_proj)",
    new_decoder_layer=_new_decoder_layer,
    processor="Glm46VProcessor",
)
