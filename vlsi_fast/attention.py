"""Attention over packed rows by torch's own flash-attention, without flash-attn.

    out[i] = sum_j softmax_j(scale q[i] . k[j]) v[j]     j over the tokens of i's row; causal: j <= i

    S  tokens of all rows, end to end    N  rows    H, H_kv  heads of queries, of keys and values    D  width of a head

`torch.nn.attention.varlen.varlen_attn` (torch 2.10 on, CUDA, half precision) takes the rows' bounds instead of a mask.
transformers' models reach it as `attn_implementation` `flash_varlen`: their language models with the bounds of packed
rows (`data.packing.row_bounds`), their vision towers with the bounds of images and windows that they make themselves.
"""

from __future__ import annotations

import inspect
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.attention import varlen

from .backbones import is_recurrent

VARLEN = "flash_varlen"
"""Its transformers name. With "flash" in it, transformers' vision towers give it all images in one call, with their
bounds (`is_flash_attention_requested`). Other attention they call image by image; the host waits for the lengths."""


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_len: int,
    causal: bool,
    scale: float | None = None,
) -> Tensor:
    """Attention of every row to itself, by `varlen_attn`, whatever torch's signature of it is; the host does not wait.

    Args:
        query: [S, H, D], bfloat16 or float16, on CUDA; the last dimension contiguous.
        key, value: [S, H_kv, D], as `query`; H is a multiple of H_kv.
        cu_seqlens: [N + 1] int32, on the device: 0, then where each row ends.
        max_len: tokens of the longest row, or more.
        causal: tokens attend to none behind them.
        scale: default D ** -0.5.

    Returns:
        [S, H, D].
    """
    known = _parameters(varlen.varlen_attn)
    width, groups = query.shape[2], query.shape[1] // key.shape[1]
    scale = width**-0.5 if scale is None else scale
    options = {}
    if causal:
        options |= {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}  # torch 2.11 on, 2.10
    if groups > 1 and "enable_gqa" in known:  # torch 2.12 on
        options["enable_gqa"] = True
    elif groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if width % 8:  # the kernels take multiples of 8; zeros change no product
        query, key, value = (nn.functional.pad(tensor, (0, -width % 8)) for tensor in (query, key, value))
    if "scale" in known:  # torch 2.11 on
        options["scale"] = scale
    else:
        query = query * (scale * query.shape[2] ** 0.5)
    out = varlen.varlen_attn(query, key, value, cu_seqlens, cu_seqlens, max_len, max_len, **options)
    return out[..., :width]


@cache
def _parameters(function) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others,
) -> tuple[Tensor, None]:
    """`varlen_attention` as transformers' attention layers call it.

    Without bounds each of the B sequences is one row, where that is certain: in vision towers of equal images.

    Args:
        module: the attention layer.
        query: [B, H, T, D]; B is 1 where there are bounds.
        key, value: [B, H_kv, T, D].
        cu_seq_lens_q, max_length_q: bounds as of `varlen_attention`; those of keys are the same.

    Returns:
        [B, T, H, D], and None for the weights.

    Raises:
        ValueError: padding, causal attention without bounds, a cache, or something that `varlen_attn` does not have.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    asked = {"dropout": dropout} | {name: others.get(name) for name in ("sliding_window", "softcap", "s_aux")}
    unknown = [name for name, value in asked.items() if isinstance(value, Tensor) or value]
    if unknown:
        raise ValueError(f"attn_implementation {VARLEN} has no {' and no '.join(unknown)}: set it to sdpa")
    batch, _, length, _ = query.shape
    if attention_mask is not None or key.shape[2] != length or (causal and cu_seq_lens_q is None):
        raise ValueError(
            f"attn_implementation {VARLEN} takes packed rows with their bounds, and was given padded ones or a cache: "
            "set data.padding_free to auto, or attn_implementation to sdpa"
        )
    if cu_seq_lens_q is None:
        cu_seq_lens_q = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=query.device)
        max_length_q = length
    if query.dtype == torch.float32 and torch.is_autocast_enabled(query.device.type):
        # rotary embeddings of float32 hidden states widen what autocast had computed in half precision
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    rows = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    out = varlen_attention(*rows, cu_seq_lens_q, max_length_q, causal, scaling)
    return out.unflatten(0, (batch, length)), None


def set_varlen(model: nn.Module) -> None:
    """Let a stock model's language model and vision tower attend by `attend`, in place.

    To be called on a model that was made with another attention: `from_pretrained` takes any name with "flash" in it
    for one that it must import. No mask function is registered beside: with one, transformers would look for packed
    rows in the position ids, which waits for the device, and make a mask that `attend` does not take.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(VARLEN, attend)
    model.set_attn_implementation(dict.fromkeys(model.config.sub_configs, VARLEN))


def varlen_problem(dtype: str, device: torch.device, config) -> str | None:
    """Why `flash_varlen` cannot run, and what to change; None where it can.

    Args:
        dtype: of the run, by torch's name.
        device: that the model runs on.
        config: the model's transformers config.
    """
    if config is not None and is_recurrent(config):
        return (
            f"{config.model_type} has linear-attention layers, whose rows are padded: set attn_implementation to auto"
        )
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it needs an NVIDIA GPU, and this runs on {device}: set attn_implementation to auto"
    if dtype not in ("bfloat16", "float16"):
        return f"it takes half precision, and dtype is {dtype}: set dtype to bfloat16"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 (A100) or newer: set attn_implementation to auto"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this build of torch has no flash-attention: install one from pytorch.org, or set it to auto"
    text = config.get_text_config()
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        return f"{text.model_type} has sliding-window layers, which it lacks: set attn_implementation to auto"
    if any(getattr(part, "attention_dropout", 0) for part in (text, config.vision_config)):
        return f"{config.model_type} has attention_dropout, which it lacks: set attn_implementation to auto"
    return None
