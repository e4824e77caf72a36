"""RMSNorm in front of the verbalizer's network, for one layer or for a stack of layers at once.

    rstd = 1 / sqrt(mean(x^2) + eps),  n = x rstd,  y = weight n
    d loss / d x      = rstd (w - n mean(w n))   with w = d loss / d y * weight
    d loss / d weight = sum over rows of d loss / d y * n

Shapes: x [.., Din] with weight [Din], or x [K, R, Din] with weight [Din] or [K, Din]; K layers, R rows, Din width.
It rounds where transformers' Qwen2RMSNorm does: statistics in float32, n to x's dtype, then the weight.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._common import check_tensor, widen
from ._launch import Launch, launch_kernel, layered, unit_stride
from ._triton import jit, tl, triton

# ---- reference ----


def reference_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """float64 oracle, differentiable by autograd."""
    x = x.double()
    return _per_row(weight.double()) * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


# ---- Triton kernels ----
# Offsets of a layer or a row are int64, as in verb_ffn.py.


@jit
def _norm_kernel(
    x_ptr,  # [K, R, Din]
    weight_ptr,  # [Din], or [K, Din]
    y_ptr,  # [K, R, Din], written
    rstd_ptr,  # [K, R] float32, written
    rows, width, inverse_width, eps, x_stride_layer, x_stride_row,
    weight_stride_layer,  # 0: one weight for all layers
    BLOCK: tl.constexpr,
):  # fmt: skip
    """y = weight * (x * rstd), rounded to x's dtype before the weight. Grid: K R, one row each."""
    index = tl.program_id(0).to(tl.int64)
    layer, row = index // rows, index % rows
    x_row = x_ptr + layer * x_stride_layer + row * x_stride_row
    column = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, width, BLOCK):
        x = tl.load(x_row + start + column, mask=column < width - start, other=0.0).to(tl.float32)
        squares += x * x
    rstd = tl.rsqrt(tl.sum(squares) * inverse_width + eps)
    tl.store(rstd_ptr + index, rstd)
    for start in range(0, width, BLOCK):
        mask = column < width - start
        x = tl.load(x_row + start + column, mask=mask, other=0.0)
        weight = tl.load(weight_ptr + layer * weight_stride_layer + start + column, mask=mask, other=0.0)
        normalized = (x.to(tl.float32) * rstd).to(x.dtype).to(tl.float32)
        tl.store(y_ptr + index * width + start + column, normalized * weight.to(tl.float32), mask=mask)


@jit
def _norm_backward_kernel(
    grad_y_ptr,  # [K, R, Din]
    x_ptr,  # [K, R, Din]
    weight_ptr,  # [Din], or [K, Din]
    rstd_ptr,  # [K, R] float32
    grad_x_ptr,  # [K, R, Din], written
    rows, width, inverse_width, x_stride_layer, x_stride_row, weight_stride_layer, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_x = rstd * (w - n mean(w n)) with w = grad_y * weight and n = x * rstd. Grid: K R, one row each."""
    index = tl.program_id(0).to(tl.int64)
    layer, row = index // rows, index % rows
    x_row = x_ptr + layer * x_stride_layer + row * x_stride_row
    grad_row = grad_y_ptr + index * width
    weight_row = weight_ptr + layer * weight_stride_layer
    rstd = tl.load(rstd_ptr + index)
    column = tl.arange(0, BLOCK)
    products = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, width, BLOCK):
        mask = column < width - start
        x = tl.load(x_row + start + column, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_row + start + column, mask=mask, other=0.0).to(tl.float32)
        weighted = tl.load(grad_row + start + column, mask=mask, other=0.0).to(tl.float32) * weight
        products += weighted * (x * rstd)
    mean = tl.sum(products) * inverse_width
    for start in range(0, width, BLOCK):
        mask = column < width - start
        x = tl.load(x_row + start + column, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_row + start + column, mask=mask, other=0.0).to(tl.float32)
        weighted = tl.load(grad_row + start + column, mask=mask, other=0.0).to(tl.float32) * weight
        tl.store(grad_x_ptr + index * width + start + column, rstd * (weighted - x * rstd * mean), mask=mask)


@jit
def _norm_weight_backward_kernel(
    grad_y_ptr,  # [K, R, Din]
    x_ptr,  # [K, R, Din]
    rstd_ptr,  # [K, R] float32
    partial_ptr,  # [K, ceil(R / ROWS), Din] float32, written
    rows, width, x_stride_layer, x_stride_row, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums grad_y * (x * rstd, as rounded) over ROWS rows of one layer. Grid: K * row blocks, column blocks."""
    blocks = tl.cdiv(rows, ROWS)
    layer = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * ROWS
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = column < width
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, ROWS, BLOCK_M):
        row = first + start + tl.arange(0, BLOCK_M)
        row_mask = row < rows
        mask = row_mask[:, None] & column_mask[None, :]
        index = layer * rows + row
        x_row = x_ptr + layer * x_stride_layer + row.to(tl.int64) * x_stride_row
        x = tl.load(x_row[:, None] + column[None, :], mask=mask, other=0.0)
        rstd = tl.load(rstd_ptr + index, mask=row_mask, other=0.0)
        grad = tl.load(grad_y_ptr + index[:, None] * width + column[None, :], mask=mask, other=0.0)
        total += grad.to(tl.float32) * (x.to(tl.float32) * rstd[:, None]).to(x.dtype).to(tl.float32)
    block = tl.program_id(0).to(tl.int64)
    tl.store(partial_ptr + block * width + column, tl.sum(total, axis=0), mask=column_mask)


# ---- launchers ----

# Norm: 16 elements a thread; a row of 1536 is read in one step, 3584 in two, 8192 in four, and again from L1.
_NORM = Launch({"BLOCK": 2048}, num_warps=4)
# Its weight's gradient: 16 sums a thread, since 32 spill at widths that 16 does not divide; 64 rows a program are 224
# programs at 512 rows of width 3584.
_NORM_WEIGHT_BACKWARD = Launch({"ROWS": 64, "BLOCK_M": 32, "BLOCK_N": 128}, num_warps=8)


def _triton_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y [.., R, Din] in the dtype of x * weight; rstd [.., R, 1] float32. x [.., R, Din], weight [Din] or [K, Din]."""
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    rstd = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    x, weight = unit_stride(layered(x)), unit_stride(weight)
    layers, rows, width = x.shape
    arguments = (x, weight, y, rstd, rows, width, 1.0 / width, eps, *x.stride()[:2], _layer_stride(weight))
    launch_kernel(_norm_kernel, (layers * rows,), arguments, _NORM, x.device)
    return y, rstd


def _triton_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """grad_x like x, grad_weight like weight. grad, x [.., R, Din], rstd [.., R, 1]."""
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_x else None
    x, weight, grad = unit_stride(layered(x)), unit_stride(weight), grad.contiguous()
    layers, rows, width = x.shape
    if need_x:
        arguments = (grad, x, weight, rstd, grad_x, rows, width, 1.0 / width, *x.stride()[:2], _layer_stride(weight))
        launch_kernel(_norm_backward_kernel, (layers * rows,), arguments, _NORM, x.device)
    if not need_weight:
        return grad_x, None
    sizes = _NORM_WEIGHT_BACKWARD.constants
    blocks = triton.cdiv(rows, sizes["ROWS"])
    partial = rstd.new_empty(layers, blocks, width)
    grid = (layers * blocks, triton.cdiv(width, sizes["BLOCK_N"]))
    arguments = (grad, x, rstd, partial, rows, width, *x.stride()[:2])
    launch_kernel(_norm_weight_backward_kernel, grid, arguments, _NORM_WEIGHT_BACKWARD, x.device)
    return grad_x, partial.sum(1 if weight.dim() == 2 else (0, 1)).to(weight.dtype)


def _layer_stride(norm_weight: Tensor) -> int:
    """0 for one weight that all layers share."""
    return norm_weight.stride(0) if norm_weight.dim() == 2 else 0


# ---- autograd ----


@dataclass(frozen=True)
class NormOptions:
    triton: bool
    eps: float  # added to the mean square


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, options: NormOptions) -> Tensor:
        if options.triton:
            y, rstd = _triton_norm(x, weight, options.eps)
        else:
            wide = widen(x)
            rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + options.eps)
            y = _per_row(weight) * (wide * rstd).to(x.dtype)
        ctx.options = options
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, rstd = ctx.saved_tensors
        need_x, need_weight, _ = ctx.needs_input_grad
        if ctx.options.triton:
            return *_triton_norm_backward(grad, x, weight, rstd, need_x, need_weight), None
        wide_grad, normalized = widen(grad), widen(x) * rstd
        grad_x = grad_weight = None
        if need_weight:
            products = wide_grad * normalized.to(x.dtype)
            grad_weight = products.sum(-2 if weight.dim() == 2 else tuple(range(x.dim() - 1))).to(weight.dtype)
        if need_x:
            weighted = wide_grad * _per_row(weight)
            grad_x = (rstd * (weighted - normalized * (weighted * normalized).mean(-1, keepdim=True))).to(x.dtype)
        return grad_x, grad_weight, None


def _per_row(norm_weight: Tensor) -> Tensor:
    """[Din], or [K, 1, Din]."""
    return norm_weight[:, None] if norm_weight.dim() == 2 else norm_weight


def check_norm(norm_weight: Tensor, norm_eps: float, gate: Tensor) -> None:
    """Refuses a norm that does not fit in front of `gate` [Dh, Din] or [K, Dh, Din]."""
    width = gate.shape[-1]
    stacked = gate.dim() == 3 and isinstance(norm_weight, Tensor) and norm_weight.dim() == 2
    check_tensor("norm_weight", norm_weight, ("K", "Din") if stacked else ("Din",))
    if norm_weight.shape != ((gate.shape[0], width) if stacked else (width,)):
        raise ValueError(
            f"norm_weight is {list(norm_weight.shape)} but gate and up take width {width}; it must be [{width}]"
            + (f" or [{gate.shape[0]}, {width}]" if gate.dim() == 3 else "")
        )
    if not (math.isfinite(norm_eps) and norm_eps > 0):
        raise ValueError(f"norm_eps={norm_eps} must be a finite number above 0, as in the model's config (often 1e-6)")
