"""Qwen3.5, dense (0.8B to 27B): three layers of linear attention (Gated DeltaNet), then one that attends, and so on.

LoRA adapts a linear-attention layer's wide projections. Those of its gates (`in_proj_a`, `in_proj_b`) have one output a
head, fewer than LoRA's rank, and stay as they are. The checkpoint's heads for several tokens at once (`mtp`) are no
part of the stock class. Rows are not packed: see `acceleration.use_packing`.
"""

from __future__ import annotations

from .base import Family


def _new_decoder_layer(config, index: int):
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer

    return Qwen3_5DecoderLayer(config.get_text_config(), index)


QWEN3_5 = Family(
    model_type="qwen3_5",
    backbone=lambda model: model.model,
    decoder_layers=lambda model: model.model.language_model.layers,
    final_norm=lambda model: model.model.language_model.norm,
    head=lambda model: model.lm_head,
    vision=lambda model: [model.model.visual],
    lora_targets=r".*\.language_model\.layers\.\d+\.("
    r"(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj|linear_attn\.(in_proj_qkv|in_proj_z|out_proj))",
    new_decoder_layer=_new_decoder_layer,
    processor="Qwen3VLProcessor",
)
