"""Gated feed-forward network of a verbalizer (SwiGLU), for one layer or for a stack of layers at once.

    h = x, or norm_weight * x / sqrt(mean(x^2) + eps)                   RMSNorm in front, where norm_weight is given
    g = h gate^T,  u = h up^T,  a = silu(g) * u,  y = a down^T          silu(g) = g sigmoid(g)

Shapes: x [.., Din], norm_weight [Din], gate and up [Dh, Din], down [Dout, Dh] -> y [.., Dout]; or all with a leading
layer axis K: x [K, .., Din], norm_weight [Din] or [K, Din], gate and up [K, Dh, Din], down [K, Dout, Dh] ->
y [K, .., Dout]. Dh hidden width, R rows of a layer.
Backward keeps h, g and u and computes a again; between the products everything is float32, rounded once. The norm is
in rms_norm.py.

Triton: gate, up and SwiGLU are one kernel, so that h is read once and g and u are written only where a gradient needs
them. The other products have nothing to fuse with and stay with the library.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._common import check_same_device, check_tensor, resolve_impl, widen
from ._launch import Launch, launch_kernel, layered, unit_stride
from ._triton import constant, interpreted, jit, tl, triton
from .rms_norm import NormOptions, RMSNorm, check_norm, reference_rms_norm

# ---- reference ----


def reference_verb_ffn(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, norm_weight: Tensor | None = None, norm_eps: float = 1e-6
) -> Tensor:
    """float64 oracle, differentiable by autograd; same shapes as `verb_ffn`, float64 result."""
    x, gate, up, down = (t.double() for t in (x, gate, up, down))
    rows = x.flatten(1, -2) if gate.dim() == 3 else x
    if norm_weight is not None:
        rows = reference_rms_norm(rows, norm_weight, norm_eps)
    y = (torch.nn.functional.silu(rows @ gate.mT) * (rows @ up.mT)) @ down.mT
    return y.reshape(*x.shape[:-1], down.shape[-2])


# ---- Triton kernels ----
INTERPRETED = constant(interpreted())
# Offsets of a layer or a row are int64: K R D passes 2^31 at 20 layers of 13000 rows of width 8192.


@jit
def _gate_up_kernel(
    x_ptr,  # [K, R, Din]
    gate_ptr,  # [K, Dh, Din]
    up_ptr,  # [K, Dh, Din]
    a_ptr,  # [K, R, Dh], written
    g_ptr,  # [K, R, Dh], written; None where no gradient is needed
    u_ptr,  # as g_ptr
    rows, hidden, width, x_stride_layer, x_stride_row, gate_stride_layer, gate_stride_row, up_stride_layer,
    up_stride_row, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """a = silu(x gate^T) * (x up^T): one [BLOCK_M, BLOCK_N] tile of one layer. Grid: K * tiles of R * tiles of Dh."""
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(hidden, BLOCK_N)
    layer = (tl.program_id(0) // (tiles_m * tiles_n)).to(tl.int64)
    tile = tl.program_id(0) % (tiles_m * tiles_n)
    # GROUP_M row tiles walk along Dh together: programs that run at the same time share weights and rows in L2
    group = GROUP_M * tiles_n
    first_m = tile // group * GROUP_M
    height = tl.minimum(tiles_m - first_m, GROUP_M)
    first_row = ((first_m + tile % group % height) * BLOCK_M).to(tl.int64)
    first_column = (tile % group // height * BLOCK_N).to(tl.int64)
    # int64 in the tile's corner alone: offsets inside a tile are small, and as int32 they take half the registers
    x_tile = x_ptr + layer * x_stride_layer + first_row * x_stride_row
    gate_tile = gate_ptr + layer * gate_stride_layer + first_column * gate_stride_row
    up_tile = up_ptr + layer * up_stride_layer + first_column * up_stride_row
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    row_mask = m < rows - first_row
    column_mask = n < hidden - first_column

    x_offset = m[:, None] * x_stride_row + k[None, :]
    gate_offset = n[None, :] * gate_stride_row + k[:, None]
    up_offset = n[None, :] * up_stride_row + k[:, None]
    g = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    u = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, width, BLOCK_K):
        k_mask = k < width - start
        x = tl.load(x_tile + x_offset, mask=row_mask[:, None] & k_mask[None, :], other=0.0)
        weight_mask = k_mask[:, None] & column_mask[None, :]
        gate = tl.load(gate_tile + gate_offset, mask=weight_mask, other=0.0)
        up = tl.load(up_tile + up_offset, mask=weight_mask, other=0.0)
        if INTERPRETED:  # NumPy has no bfloat16: the interpreter would multiply its bits
            x, gate, up = x.to(tl.float32), gate.to(tl.float32), up.to(tl.float32)
        g = tl.dot(x, gate, g, input_precision="ieee")
        u = tl.dot(x, up, u, input_precision="ieee")
        x_tile += BLOCK_K
        gate_tile += BLOCK_K
        up_tile += BLOCK_K

    corner = (layer * rows + first_row) * hidden + first_column
    out = m[:, None] * hidden + n[None, :]
    out_mask = row_mask[:, None] & column_mask[None, :]
    # rounded before a is made, as the backward will find them; it also frees half the registers
    g = g.to(a_ptr.dtype.element_ty)
    u = u.to(a_ptr.dtype.element_ty)
    if g_ptr is not None:
        tl.store(g_ptr + corner + out, g, mask=out_mask)
        tl.store(u_ptr + corner + out, u, mask=out_mask)
    g = g.to(tl.float32)
    tl.store(a_ptr + corner + out, g * tl.sigmoid(g) * u, mask=out_mask)


@jit
def _swiglu_backward_kernel(
    grad_a_ptr,  # [size]; None where grad_g and grad_u are not wanted
    g_ptr,  # [size]
    u_ptr,  # [size]
    grad_g_ptr,  # [size], written
    grad_u_ptr,  # [size], written
    a_ptr,  # [size], written; None where it is not wanted
    size,
    BLOCK: tl.constexpr,
):
    """grad_g and grad_u from grad_a, and a = silu(g) * u again. Grid: blocks of the flat [K R Dh]."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    g = tl.load(g_ptr + index, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + index, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    silu = g * sigmoid
    if a_ptr is not None:
        tl.store(a_ptr + index, silu * u, mask=mask)
    if grad_a_ptr is not None:
        grad_a = tl.load(grad_a_ptr + index, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_u_ptr + index, grad_a * silu, mask=mask)
        tl.store(grad_g_ptr + index, grad_a * u * (sigmoid + silu * (1.0 - sigmoid)), mask=mask)


# ---- launchers ----


def _tile(block_m: int, block_n: int, block_k: int, num_warps: int, num_stages: int) -> Launch:
    # GROUP_M 8: eight row tiles and the weights they meet are a few MB, well inside any L2
    sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP_M": 8}
    return Launch(sizes, num_warps, num_stages)


# (bytes of an element, rows of a layer, kind of GPU) -> tile of _gate_up_kernel. None is measured yet; they follow from
# registers and shared memory (benchmarks/resources.py). "hopper" has 227 KiB of shared memory and wgmma; "other" stays
# within 99 KiB, which all GPUs from Ampere on have.
_GATE_UP = {
    # two 128 x 128 float32 accumulators: 128 of 255 registers; x is read once for 256 columns, as in the library's
    # largest tile. 48 KiB a stage (x, gate, up)
    (2, "many", "hopper"): _tile(128, 128, 64, 8, 4),
    # mma.sync takes its operands from registers as well, so half the depth: 191 registers. 24 KiB a stage
    (2, "many", "other"): _tile(128, 128, 32, 8, 5),
    # the time is that of reading the weights: narrow tiles, so that many programs read (112 at Dh 3584), and deep
    # loads. 64 rows is the least that wgmma takes. 32 KiB a stage
    (2, "few", "hopper"): _tile(64, 32, 128, 4, 4),
    (2, "few", "other"): _tile(64, 32, 128, 4, 3),
    # widths that are no multiple of 16 (no model known) are read element by element, through registers
    **{(2, "ragged", kind): _tile(64, 64, 32, 8, 2) for kind in ("hopper", "other")},
    # float32 never takes TF32 (13 bits lost); the ordinary cores want their operands in registers: small tiles
    **{(4, "many", kind): _tile(64, 64, 16, 8, 2) for kind in ("hopper", "other")},
    **{(4, "few", kind): _tile(16, 64, 16, 4, 2) for kind in ("hopper", "other")},
}
# Backward's elementwise part: 8 elements a thread, one 16-byte access of each 2-byte tensor.
_SWIGLU_BACKWARD = Launch({"BLOCK": 1024}, num_warps=4)

_FEW_ROWS = 64  # one row of small tiles; a large one would be at least half empty
_ENOUGH_TILES = 66  # fewer large tiles than this leave more than half of an H200's 132 multiprocessors idle


def _gpu_kind(device: torch.device) -> str:
    """Third part of _GATE_UP's key."""
    if device.type != "cuda":
        return "hopper"  # the interpreter, which has no limits
    return "hopper" if torch.cuda.get_device_capability(device) == (9, 0) else "other"


def _gate_up_launch(layers: int, rows: int, hidden: int, even: bool, itemsize: int, kind: str) -> Launch:
    """The tile for x [layers, rows, Din] and gate [layers, hidden, Din]; even: sizes are multiples of 16."""
    if not even and itemsize == 2:
        return _GATE_UP[itemsize, "ragged", kind]
    large = _GATE_UP[itemsize, "many", kind]
    few = rows <= _FEW_ROWS or _tiles(large, layers, rows, hidden) < _ENOUGH_TILES
    return _GATE_UP[itemsize, "few", kind] if few else large


def _tiles(launch: Launch, layers: int, rows: int, hidden: int) -> int:
    sizes = launch.constants
    return layers * triton.cdiv(rows, sizes["BLOCK_M"]) * triton.cdiv(hidden, sizes["BLOCK_N"])


def _triton_gate_up(x: Tensor, gate: Tensor, up: Tensor, keep: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """a, and g and u where `keep`, each [.., R, Dh] in x's dtype. x [.., R, Din], gate and up [.., Dh, Din]."""
    shape = (*x.shape[:-1], gate.shape[-2])
    x, gate, up = (unit_stride(layered(t)) for t in (x, gate, up))
    layers, rows, width = x.shape
    hidden = gate.shape[1]
    a, g, u = (x.new_empty(shape) if wanted else None for wanted in (True, keep, keep))
    strides = (*x.stride()[:2], *gate.stride()[:2], *up.stride()[:2])
    even = all(n % 16 == 0 for n in (hidden, width, *strides))
    launch = _gate_up_launch(layers, rows, hidden, even, x.element_size(), _gpu_kind(x.device))
    arguments = (x, gate, up, a, g, u, rows, hidden, width, *strides)
    launch_kernel(_gate_up_kernel, (_tiles(launch, layers, rows, hidden),), arguments, launch, x.device)
    return a, g, u


def _triton_swiglu_backward(
    grad_a: Tensor | None, g: Tensor, u: Tensor, need_a: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """grad_g, grad_u (None without grad_a) and a (None unless needed); all [.., R, Dh]."""
    grad_a = None if grad_a is None else grad_a.contiguous()
    grad_g, grad_u = (None, None) if grad_a is None else (torch.empty_like(g), torch.empty_like(u))
    a = torch.empty_like(g) if need_a else None
    grid = (triton.cdiv(g.numel(), _SWIGLU_BACKWARD.constants["BLOCK"]),)
    arguments = (grad_a, g, u, grad_g, grad_u, a, g.numel())
    launch_kernel(_swiglu_backward_kernel, grid, arguments, _SWIGLU_BACKWARD, g.device)
    return grad_g, grad_u, a


# ---- autograd ----


@dataclass(frozen=True)
class _Options:
    triton: bool
    keep: bool  # whether a gradient may be asked for
    norm_eps: float  # used where a norm is in front


class _VerbFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, options: _Options) -> Tensor:
        if options.triton:
            a, g, u = _triton_gate_up(x, gate, up, options.keep)
        else:
            g, u = x @ gate.mT, x @ up.mT  # [.., R, Dh]
            a = torch.nn.functional.silu(widen(g)).mul_(widen(u)).to(x.dtype)
        ctx.options = options
        if options.keep:
            need_weights = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
            ctx.save_for_backward(x if need_weights else None, gate, up, down, g, u)
        return a @ down.mT

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, gate, up, down, g, u = ctx.saved_tensors
        need_x, need_gate, need_up, need_down, _ = ctx.needs_input_grad
        grad_a = grad @ down if need_x or need_gate or need_up else None
        swiglu_backward = _triton_swiglu_backward if ctx.options.triton else _torch_swiglu_backward
        grad_g, grad_u, a = swiglu_backward(grad_a, g, u, need_down)
        grad_x = None
        if need_x:
            grad_x = grad_g @ gate
            (grad_x.addmm_ if grad_x.dim() == 2 else grad_x.baddbmm_)(grad_u, up)
        return (
            grad_x,
            grad_g.mT @ x if need_gate else None,
            grad_u.mT @ x if need_up else None,
            grad.mT @ a if need_down else None,
            None,
        )


def _torch_swiglu_backward(
    grad_a: Tensor | None, g: Tensor, u: Tensor, need_a: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As _triton_swiglu_backward."""
    dtype, g, u = g.dtype, widen(g), widen(u)
    sigmoid = g.sigmoid()
    silu = g * sigmoid
    a = (silu * u).to(dtype) if need_a else None
    if grad_a is None:
        return None, None, a
    grad_a = widen(grad_a)
    return (grad_a * u * (sigmoid + silu * (1 - sigmoid))).to(dtype), (grad_a * silu).to(dtype), a


# ---- public function ----


def verb_ffn(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    impl: str = "auto",
) -> Tensor:
    """down(silu(gate h) * up h), h = x or its RMSNorm: the verbalizer's network (VLsI, table 4f, verb-FFN).

    Differentiable in every tensor.

    Args:
        x: [.., Din], or [K, .., Din] for stacked weights; float32, bfloat16, float16 or float64.
        gate: [Dh, Din], or [K, Dh, Din].
        up: as gate.
        down: [Dout, Dh], or [K, Dout, Dh].
        norm_weight: [Din], or [K, Din] for stacked weights: RMSNorm in front, equal to transformers' Qwen2RMSNorm
            (but float64 throughout for float64 inputs).
        norm_eps: added to the mean square.
        impl: "auto": "triton" on CUDA where it is installed and no input is float64, else "torch"; "reference":
            float64 inside.

    Returns:
        [.., Dout] in x's dtype. Under autocast all are converted to its dtype first, as a linear layer would; a norm
        takes x and norm_weight as they are, as a module in front of the linear layers would.

    Raises:
        ValueError: shapes that do not fit, several devices, differing dtypes outside autocast, unknown impl, "triton"
            on a device without it.
        TypeError: dtypes other than the four, float64 for "triton".
        ImportError: "triton" where it is not installed.
    """
    x, gate, up, down = _checked(x, gate, up, down, norm_weight, norm_eps)
    impl = resolve_impl(impl, x.device, x, gate, norm_weight)
    if impl == "reference":
        return reference_verb_ffn(x, gate, up, down, norm_weight, norm_eps).to(gate.dtype)
    rows = x.flatten(1, -2) if gate.dim() == 3 else x[None].flatten(0, -2)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, gate, up, down, norm_weight) if t is not None)
    options = _Options(impl == "triton", keep, float(norm_eps))
    run = _run_eagerly if options.triton else _run
    return run(rows, gate, up, down, norm_weight, options).view(*x.shape[:-1], down.shape[-2])


def _run(rows: Tensor, gate: Tensor, up: Tensor, down: Tensor, norm_weight: Tensor | None, options: _Options) -> Tensor:
    """[.., R, Din] -> [.., R, Dout]."""
    with torch.autocast(device_type=rows.device.type, enabled=False):
        if norm_weight is not None:
            rows = RMSNorm.apply(rows, norm_weight, NormOptions(options.triton, options.norm_eps))
        return _VerbFFN.apply(rows.to(gate.dtype), gate, up, down, options)


# torch.compile would trace into the launchers; what it can fuse around them is not worth that
_run_eagerly = torch.compiler.disable(_run)


def _checked(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, norm_weight: Tensor | None, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The inputs after checks, in autocast's dtype where autocast is on (but x as it is where a norm is in front)."""
    lead = ("K",) if gate.dim() == 3 else ()
    check_tensor("gate", gate, (*lead, "Dh", "Din"))
    check_tensor("up", up, (*lead, "Dh", "Din"))
    check_tensor("down", down, (*lead, "Dout", "Dh"))
    check_tensor("x", x, ("..",) * max(x.dim(), len(lead) + 1) if x.dim() else ("Din",))
    if norm_weight is not None:
        check_norm(norm_weight, norm_eps, gate)
    check_same_device(x=x, gate=gate, up=up, down=down, norm_weight=norm_weight)
    if up.shape != gate.shape or down.shape[-1] != gate.shape[-2] or down.shape[:-2] != gate.shape[:-2]:
        raise ValueError(
            f"gate {list(gate.shape)}, up {list(up.shape)} and down {list(down.shape)} do not fit; they must be "
            "[.., Dh, Din] twice and [.., Dout, Dh]"
        )
    if x.shape[-1] != gate.shape[-1]:
        raise ValueError(f"x has width {x.shape[-1]} but gate and up take {gate.shape[-1]}")
    if lead and (x.dim() < 3 or x.shape[0] != gate.shape[0]):
        raise ValueError(
            f"stacked weights hold {gate.shape[0]} layers, so x must be [{gate.shape[0]}, .., {gate.shape[-1]}], got "
            f"{list(x.shape)}; stack the layers' inputs on axis 0"
        )
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        return x if norm_weight is not None else x.to(dtype), gate.to(dtype), up.to(dtype), down.to(dtype)
    named = {"x": x, "gate": gate, "up": up, "down": down, "norm_weight": norm_weight}
    dtypes = {name: t.dtype for name, t in named.items() if t is not None}
    if len(set(dtypes.values())) > 1:
        listed = ", ".join(f"{name} is {dtype}" for name, dtype in dtypes.items())
        raise ValueError(f"{listed}; convert them to one dtype, or use autocast")
    return x, gate, up, down
