"""What `torch.nn.attention.varlen.varlen_attn` computes, on the CPU, by each signature that it has had."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlsi_fast import attention


def reference_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, causal: bool, scale: float | None = None
) -> Tensor:
    """The formula, a row at a time, in the inputs' precision and on their device; differentiable. Arguments and result
    as of `attention.varlen_attention`."""
    scale = query.shape[2] ** -0.5 if scale is None else scale
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    rows, bounds = [], cu_seqlens.tolist()
    for start, end in zip(bounds, bounds[1:]):
        q, k, v = (tensor[start:end].transpose(0, 1) for tensor in (query, key, value))  # [H, T, D]
        scores = scale * q @ k.transpose(1, 2)
        if causal:
            later = torch.ones_like(scores, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        rows.append((scores.softmax(2) @ v).transpose(0, 1))
    return torch.cat(rows)


@dataclass
class Call:
    """What one call was given."""

    lengths: Tensor
    longest: int
    causal: bool
    heads: tuple[int, int]


calls: list[Call] = []


def _block_diagonal(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, causal, scale=None):
    """One mask for all rows, so nothing is read on the host. Refuses what torch's kernels refuse, or cannot see."""
    assert cu_seq_q is cu_seq_k and cu_seq_q.dtype == torch.int32
    assert type(max_q) is type(max_k) is int and max_q == max_k >= cu_seq_q.diff().max()
    assert query.shape[0] == key.shape[0] == cu_seq_q[-1] and query.shape[2] % 8 == 0
    assert all(tensor.stride(2) == 1 and tensor.dtype == query.dtype for tensor in (query, key, value))
    calls.append(Call(cu_seq_q.diff(), max_q, causal, (query.shape[1], key.shape[1])))
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    row = torch.bucketize(torch.arange(len(query)), cu_seq_q[1:], right=True)
    seen = row[:, None] == row
    if causal:
        seen = seen.tril()
    q, k, v = (tensor.transpose(0, 1) for tensor in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=scale).transpose(0, 1)


def _torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert query.shape[1] == key.shape[1]
    return _block_diagonal(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal)


def _torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert query.shape[1] == key.shape[1]
    causal = {(-1, -1): False, (-1, 0): True}[window_size]
    return _block_diagonal(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, causal, scale)


def _torch_2_12(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    assert enable_gqa or query.shape[1] == key.shape[1]
    causal = {(-1, -1): False, (-1, 0): True}[window_size]
    return _block_diagonal(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, causal, scale)


SIGNATURES = {"2.10": _torch_2_10, "2.11": _torch_2_11, "2.12": _torch_2_12}
"""First torch release -> the function."""


def install(monkeypatch, function=_torch_2_12) -> list[Call]:
    """Put it in the place of torch's own. Returns the list that calls are written to, empty."""
    monkeypatch.setattr(attention.varlen, "varlen_attn", function)
    calls.clear()
    return calls
