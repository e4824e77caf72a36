"""Faster parts of the stock backbones, where they are installed and apply: attention, packed rows,
liger-kernel's norms and MLPs."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from .attention import VARLEN, varlen_problem
from .backbones import FAMILIES, is_recurrent
from .config_files import ConfigError

LIGER_NAMES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
"""A language model's `config.model_type` -> that of the plain language model with the same layers, by which
liger-kernel patches it. Its patches of the Qwen-VL families (0.8.5) need classes that transformers no longer has."""
LIGER_NORMS_ALONE = ("qwen3_moe",)
"""Those whose experts keep transformers' own grouped products."""


def attention_name(asked: str, dtype: str, device: torch.device, padding_free: bool | Literal["auto"], config) -> str:
    """The attention of a backbone, by its transformers name.

    Args:
        asked: `attn_implementation` of the config. "auto", on a CUDA device and unless `dtype` is float32: the first of
            flash_attention_3 (installed, and the GPU is a Hopper), flash_attention_2 (installed) and flash_varlen
            (`attention.VARLEN`: in torch itself; packed rows alone). Where none of them runs, or an image's tokens
            attend in both directions (Gemma 3): sdpa. Others: as given.
        dtype: of the run.
        device: that the stage runs on.
        padding_free: `data.padding_free` of the config; False where the model is given padded rows, or writes.
        config: the model's transformers config.

    Raises:
        ConfigError: flash_varlen is asked for and cannot run, or flash-attention of any kind where it would hide from
            an image's tokens those behind them.
    """
    packs = padding_free is not False
    if _images_look_ahead(config):
        if asked.startswith("flash_"):
            raise ConfigError(
                f"attn_implementation is {asked}, but in {config.model_type} the tokens of an image attend to each "
                "other in both directions, and flash-attention has no mask for that: it would be another model. Set "
                "attn_implementation to sdpa or auto"
            )
        return "sdpa" if asked == "auto" else asked
    if asked == VARLEN:
        padded = "it takes packed rows alone: set data.padding_free to auto, or attn_implementation to sdpa"
        problem = varlen_problem(dtype, device, config) if packs else padded
        if problem is not None:
            raise ConfigError(f"attn_implementation is {VARLEN}, but {problem}")
    if asked != "auto":
        return asked
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    if device.type != "cuda" or dtype == "float32":
        return "sdpa"
    if is_flash_attn_3_available() and torch.cuda.get_device_capability(device)[0] == 9:
        return "flash_attention_3"
    if is_flash_attn_2_available():
        return "flash_attention_2"
    return VARLEN if packs and varlen_problem(dtype, device, config) is None else "sdpa"


def _images_look_ahead(config) -> bool:
    """See `Family.images_look_ahead`; of models without an adapter, which may answer pictures, Gemma 4's field."""
    family = FAMILIES.get(config.model_type)
    known = family is not None and family.images_look_ahead
    return known or getattr(config.get_text_config(), "use_bidirectional_attention", None) == "vision"


def use_packing(asked: bool | Literal["auto"], attention: str, config) -> bool:
    """Whether a model's rows are packed without padding.

    Args:
        asked: `data.padding_free` of the config; "auto": where flash-attention runs (torch's own, flash_varlen, too),
            which skips what lies between the rows. Others make a mask of all positions of the micro-batch squared.
        attention: of the model, by its transformers name.
        config: the model's transformers config.

    Raises:
        ConfigError: asked for, with an attention that is not known to keep packed rows apart, a family whose own mask
            does not, or a model with linear attention. Its state and its convolution run on from one row into the next:
            transformers' plain implementation of both knows no bounds.
    """
    if asked is True and _images_look_ahead(config):
        raise ConfigError(
            f"data.padding_free is true, but transformers' mask of packed rows is wrong for {config.model_type}: its "
            "sliding-window layers look up a later row's images where the first row's are. Set data.padding_free to "
            "auto or false"
        )
    if is_recurrent(config):
        if asked is True:
            raise ConfigError(
                f"data.padding_free is true, but {config.model_type} has linear-attention layers, whose state runs on "
                "from one packed row into the next: set data.padding_free to auto or false"
            )
        return False
    flash = attention.startswith("flash_attention") or attention == VARLEN
    if asked is True and not flash and attention not in ("sdpa", "eager", "flex_attention"):
        raise ConfigError(
            f"data.padding_free is true, but {attention} is not known to keep packed rows apart: set "
            f"attn_implementation to auto, flash_attention_2, {VARLEN}, sdpa, eager or flex_attention, or "
            "data.padding_free to false"
        )
    return flash if asked == "auto" else asked


def use_liger(asked: bool | Literal["auto"], device: torch.device) -> bool:
    """Whether liger-kernel's norms and MLPs are used.

    Args:
        asked: `liger` of the config; "auto": where liger-kernel is installed and the device is a CUDA one.
        device: that the stage runs on.

    Raises:
        ConfigError: asked for, but not installed or not on CUDA.
    """
    from transformers.utils import is_liger_kernel_available

    installed, cuda = is_liger_kernel_available(), device.type == "cuda"
    if asked is True and not installed:
        raise ConfigError("liger is true, but liger-kernel is not installed: pip install liger-kernel, or use auto")
    if asked is True and not cuda:
        raise ConfigError(f"liger is true, but its kernels need a CUDA device and the stage runs on {device}; use auto")
    return installed and cuda and asked is not False


def apply_liger(model: nn.Module, required: bool = False) -> str | None:
    """Put liger-kernel's RMSNorm and SwiGLU into a stock backbone's language model, in place; before LoRA is.

    Its rotary embeddings as well where the language model is a plain one: liger-kernel replaces a function of that
    model's module in transformers, for the whole process. Its losses never: those here read hidden states and the
    head's weight, so the model's own forward with a loss is not called.

    Args:
        model: stock `..ForConditionalGeneration`.
        required: raise where there is nothing for the model.

    Returns:
        The plain language model's name, or None where liger-kernel has nothing for this one, or nothing that the
        self-test has probes of (Gemma 3: GeGLU, and norms that add 1 to their weight).

    Raises:
        ConfigError: nothing of it is used, and `required`.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    language = model.get_decoder()
    kind = language.config.model_type
    patch = MODEL_TYPE_TO_APPLY_LIGER_FN.get(LIGER_NAMES.get(kind))
    if patch is not None:
        losses = {"cross_entropy": False, "fused_linear_cross_entropy": False}
        name = LIGER_NAMES[kind]
        patch(model=language, rms_norm=True, swiglu=name not in LIGER_NORMS_ALONE, rope=kind == name, **losses)
        return name
    if required:
        raise ConfigError(f"liger is true, but no part of liger-kernel is used for {kind}; set it to auto or false")
    return None
