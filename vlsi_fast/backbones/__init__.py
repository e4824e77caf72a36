"""One small adapter per family of vision-language models, found by the config's `model_type`."""

from __future__ import annotations

from .base import Family, default_layers, is_recurrent, require_dense
from .glm4v import GLM4V
from .llava_onevision import LLAVA_ONEVISION
from .qwen2_5_vl import QWEN2_5_VL
from .qwen2_vl import QWEN2_VL
from .qwen3_5 import QWEN3_5
from .qwen3_vl import QWEN3_VL
from .qwen3_vl_moe import QWEN3_VL_MOE

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (QWEN2_VL, LLAVA_ONEVISION, QWEN2_5_VL, QWEN3_VL, QWEN3_VL_MOE, QWEN3_5, GLM4V)
}

__all__ = ["FAMILIES", "Family", "default_layers", "family_of", "is_recurrent", "require_dense"]


def family_of(config) -> Family:
    """The adapter of a transformers config. Raises ValueError with the list of known families."""
    try:
        return FAMILIES[config.model_type]
    except KeyError:
        raise ValueError(
            f"no adapter for model type {config.model_type!r}; known families: {', '.join(sorted(FAMILIES))}. "
            "CONTRIBUTING.md tells how to add one"
        ) from None
