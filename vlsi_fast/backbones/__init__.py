"""One small adapter per family of vision-language models, found by the config's `model_type`."""

from __future__ import annotations

from .base import Family, default_layers, is_recurrent, require_dense
from .gemma3 import GEMMA3
from .glm4v import GLM4V
from .internvl import INTERNVL
from .llava_onevision import LLAVA_ONEVISION
from .qwen2_5_vl import QWEN2_5_VL
from .qwen2_vl import QWEN2_VL
from .qwen3_5 import QWEN3_5
from .qwen3_vl import QWEN3_VL
from .qwen3_vl_moe import QWEN3_VL_MOE
from .smolvlm import SMOLVLM

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        *(QWEN2_VL, LLAVA_ONEVISION, QWEN2_5_VL, QWEN3_VL, QWEN3_VL_MOE, QWEN3_5),
        *(SMOLVLM, INTERNVL, GEMMA3, GLM4V),
    )
}

__all__ = [
    "FAMILIES",
    "Family",
    "default_layers",
    "family_of",
    "is_recurrent",
    "require_dense",
    "require_plain_logits",
]


def family_of(config) -> Family:
    """The adapter of a transformers config. Raises ValueError with the list of known families."""
    try:
        return FAMILIES[config.model_type]
    except KeyError:
        raise ValueError(
            f"no adapter for model type {config.model_type!r}; known families: {', '.join(sorted(FAMILIES))}. "
            "CONTRIBUTING.md tells how to add one"
        ) from None


def require_plain_logits(config) -> None:
    """Refuse a model whose head is followed by c tanh(logits / c).

    The losses here are of logits that are linear in the state: a teacher layer's target is then the mean of the
    student head's rows under it, for every student layer at once. Of capped logits it is not (docs/models.md).

    Raises:
        ValueError: `final_logit_softcapping` is set in the text config of a transformers config.
    """
    text = config.get_text_config()
    cap = getattr(text, "final_logit_softcapping", None)
    if cap is not None:
        raise ValueError(
            f"{config.model_type} caps its logits (final_logit_softcapping {cap} in its text config), and the losses "
            "here are of plain logits. Use models without it, as all sizes of Gemma 3 are. Where the checkpoint was "
            "trained without a cap, set the field to null in its config.json"
        )
