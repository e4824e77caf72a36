"""Probes of what replaces parts of the stock backbones: liger-kernel's modules and the attention.

B, T  sequences, tokens     H, H_kv  heads of queries, of keys and values     D  width of a head
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from .probe import ATTENTION_SLACK, GATED_SLACK, Inputs, Probe

ROWS = 29
LENGTHS = (37, 1, 70, 23)
"""Tokens of packed rows."""


# ---- liger-kernel ----


def liger_rms_norm(width: int, eps: float, dtype) -> Probe:
    """RMSNorm over `width` as `acceleration.apply_liger` binds it."""
    from liger_kernel.transformers import LigerRMSNorm

    module = LigerRMSNorm(width, eps)

    def inputs(generator: torch.Generator) -> Inputs:
        return {"x": _normal(generator, 2, ROWS, width), "weight": 1 + 0.3 * _normal(generator, width)}

    def fast(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"weight": weight}, (x,))

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()

    return Probe(f"Liger RMSNorm, width {width}", "liger", "liger", dtype, inputs, fast, plain, ("x", "weight"))


def liger_swiglu(inner: int, dtype) -> Probe:
    """The language model's MLP with its real inner width; what it reads and writes is narrow."""
    from liger_kernel.transformers import LigerSwiGLUMLP

    width = 64
    with torch.device("meta"):
        module = LigerSwiGLUMLP(SimpleNamespace(hidden_size=width, intermediate_size=inner, hidden_act="silu"))

    def inputs(generator: torch.Generator) -> Inputs:
        return {
            "x": _normal(generator, ROWS, width),
            "gate": _normal(generator, inner, width) * width**-0.5,
            "up": _normal(generator, inner, width) * width**-0.5,
            "down": _normal(generator, width, inner) * inner**-0.5,
        }

    def fast(x: Tensor, **weights: Tensor) -> Tensor:
        return torch.func.functional_call(module, {f"{name}_proj.weight": w for name, w in weights.items()}, (x,))

    def plain(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    learns = ("x", "gate", "up", "down")
    name = f"Liger SwiGLU, inner width {inner}"
    return Probe(name, "liger", "liger", dtype, inputs, fast, plain, learns, slack=GATED_SLACK)


def liger_rope(heads: int, kv_heads: int, width: int, dtype) -> Probe:
    """Rotary embeddings of queries and keys, for two sequences."""
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    def inputs(generator: torch.Generator) -> Inputs:
        angle = torch.rand(2, ROWS, width // 2, generator=generator, device=generator.device) * 6.3
        angle = torch.cat([angle, angle], dim=-1)
        q, k = (_normal(generator, 2, ROWS, n, width) for n in (heads, kv_heads))
        return {"q": q, "k": k, "cos": angle.cos(), "sin": angle.sin()}

    def fast(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (t.clone().transpose(1, 2) for t in (q, k))  # the kernel writes where it reads, which no leaf allows
        return liger_rotary_pos_emb(q, k, cos, sin)

    def plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos[:, None], sin[:, None]
        return tuple(t * cos + _rotated_half(t) * sin for t in (q.transpose(1, 2), k.transpose(1, 2)))

    name = f"Liger RoPE, {heads} and {kv_heads} heads of width {width}"
    return Probe(name, "liger", "liger", dtype, inputs, fast, plain, ("q", "k"))


def _rotated_half(t: Tensor) -> Tensor:
    low, high = t.chunk(2, dim=-1)
    return torch.cat([-high, low], dim=-1)


# ---- attention ----


def is_known(attention: str) -> bool:
    """Whether an attention of that transformers name can be called here. `eager` is the plain form itself."""
    return attention == "sdpa" or attention.startswith("flash_")


def attention(
    name: str, option: str, heads: int, kv_heads: int, width: int, dtype, causal: bool, packed: bool = True
) -> Probe:
    """Attention by its transformers name, called as the stock models call it.

    Args:
        name: sdpa, flash_varlen, flash_attention_2, ..
        option: of the config.
        heads, kv_heads, width: H, H_kv, D.
        dtype: of the run.
        causal: as in language models; vision towers attend to all of an image.
        packed: rows of `LENGTHS` end to end, kept apart by their bounds (sdpa: by a mask); else two equal sequences
            without mask or bounds, as vision towers of equal images have them.
    """
    lengths = LENGTHS if packed else (ROWS, ROWS)
    shape = (1, sum(LENGTHS)) if packed else (2, ROWS)
    module = _Layer(name, heads // kv_heads, causal)

    def inputs(generator: torch.Generator) -> Inputs:
        sizes = {"query": heads, "key": kv_heads, "value": kv_heads}
        return {n: _normal(generator, *shape, count, width) for n, count in sizes.items()}

    def fast(**tensors: Tensor) -> Tensor:
        query, key, value = (t.transpose(1, 2) for t in tensors.values())
        options = {"scaling": width**-0.5, "dropout": 0.0} | ({} if causal else {"is_causal": False})
        mask = None
        if packed and name.startswith("flash_"):
            ends = torch.tensor([0, *lengths], device=query.device).cumsum(0).int()
            options |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
            options |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
        elif packed:
            mask = _allowed(lengths, causal, query.device)[None, None]
        return _function(name)(module, query, key, value, mask, **options)[0]

    def plain(**tensors: Tensor) -> Tensor:
        query, key, value = (t.reshape(-1, *t.shape[2:]).transpose(0, 1) for t in tensors.values())  # [H, B T, D]
        key, value = (t.repeat_interleave(heads // kv_heads, dim=0) for t in (key, value))
        scores = (query @ key.mT) * width**-0.5
        scores = scores.masked_fill(~_allowed(lengths, causal, query.device), -torch.inf)
        return (scores.softmax(-1) @ value).transpose(0, 1).reshape(*shape, heads, width)

    what = f"{heads} and {kv_heads} heads of width {width}, {'causal' if causal else 'of images'}"
    learns = ("query", "key", "value")
    return Probe(f"{name}, {what}", option, name, dtype, inputs, fast, plain, learns, slack=ATTENTION_SLACK)


class _Layer(nn.Module):
    """What attention functions ask of the layer that calls them."""

    def __init__(self, name: str, groups: int, causal: bool):
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation=name)
        self.num_key_value_groups, self.is_causal = groups, causal


def _function(name: str):
    from ..attention import VARLEN, attend

    if name == VARLEN:
        return attend
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS[name]


def _allowed(lengths: tuple[int, ...], causal: bool, device: torch.device) -> Tensor:
    """[S, S]: which token may look at which, each row at itself alone."""
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    allowed = row[:, None] == row[None]
    return allowed.tril() if causal else allowed


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device)
