"""Faster parts of the stock backbones, where they are installed and apply: the attention."""

from __future__ import annotations

import torch


def attention_name(asked: str, dtype: str, device: torch.device) -> str:
    """The attention of a backbone, by its transformers name.

    Args:
        asked: `attn_implementation` of the config; "auto" is flash_attention_2 where flash-attn is installed, the
            device is a CUDA one and `dtype` is not float32 (which it does not take), else sdpa. Others: as given.
        dtype: of the run.
        device: that the stage runs on.
    """
    if asked != "auto":
        return asked
    from transformers.utils import is_flash_attn_2_available

    flash = device.type == "cuda" and dtype != "float32" and is_flash_attn_2_available()
    return "flash_attention_2" if flash else "sdpa"
