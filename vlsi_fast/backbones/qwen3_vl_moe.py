"""Qwen3-VL, mixture of experts (30B-A3B, 235B-A22B): its decoder layers route each token to 8 of 128 experts.

A layer's experts are two parameters, [experts, ..]; no module is an expert. LoRA adapts attention alone, so experts and
routers stay as they are, and with them the balance between experts, which no loss here looks after. Decoder verbalizers
are refused: one would be a layer of experts, begun anew.
"""

from __future__ import annotations

from .base import LANGUAGE_ATTENTION, Family, no_decoder_layer
from .qwen3_vl import QWEN3_VL

QWEN3_VL_MOE = Family(
    model_type="qwen3_vl_moe",
    backbone=QWEN3_VL.backbone,
    decoder_layers=QWEN3_VL.decoder_layers,
    final_norm=QWEN3_VL.final_norm,
    head=QWEN3_VL.head,
    vision=QWEN3_VL.vision,
    lora_targets=LANGUAGE_ATTENTION,
    new_decoder_layer=no_decoder_layer,
    processor=QWEN3_VL.processor,
    layers_added_to=QWEN3_VL.layers_added_to,
    sparse_block="Qwen3VLMoeTextSparseMoeBlock",
)
